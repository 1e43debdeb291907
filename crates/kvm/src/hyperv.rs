//! Hyper-V's interface to its guests, as far as it goes: identity, hypercall page, reference time, frequencies, reset, crash,
//! re-enlightenment. No synthetic interrupt controller, so no messages, events and timers. `KVM_GET_SUPPORTED_HV_CPUID` tells
//! guests of no more than there is.
//!
//! Documentation: "Hypervisor Top Level Functional Specification" (TLFS); what KVM makes of it is hyperv.c of Linux 6.1. MSRs are a guest's
//! if its CPUID has the interface "Hv#1", and with `KVM_CAP_HYPERV_ENFORCE_CPUID` the feature that each belongs to.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Weak};

use kvm_abi::consts::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET};
use kvm_abi::{Plain, kvm_cpuid_entry2};
use mmu::{Memory, View};
use parking_lot::Mutex;
use x86_defs::GuestPhysAddr;

use crate::caps::MAX_VCPUS;
use crate::cpuid;
use crate::kvmclock::VmClock;
use crate::machine::{Machine, host_tsc};

const GUEST_OS_ID: u32 = 0x4000_0000;
const HYPERCALL: u32 = 0x4000_0001;
const VP_INDEX: u32 = 0x4000_0002;
const RESET: u32 = 0x4000_0003;
const TIME_REF_COUNT: u32 = 0x4000_0020;
const REFERENCE_TSC: u32 = 0x4000_0021;
const TSC_FREQUENCY: u32 = 0x4000_0022;
const APIC_FREQUENCY: u32 = 0x4000_0023;
const CRASH_P0: u32 = 0x4000_0100;
const CRASH_P4: u32 = CRASH_P0 + 4;
const CRASH_CTL: u32 = 0x4000_0105;
const REENLIGHTENMENT_CONTROL: u32 = 0x4000_0106;
const TSC_EMULATION_CONTROL: u32 = 0x4000_0107;
const TSC_EMULATION_STATUS: u32 = 0x4000_0108;

/// Features of leaf 4000_0003H, EAX unless said otherwise.
mod feature {
    pub(super) const TIME_REF_COUNT: u32 = 1 << 1;
    pub(super) const HYPERCALL: u32 = 1 << 5;
    pub(super) const VP_INDEX: u32 = 1 << 6;
    pub(super) const RESET: u32 = 1 << 7;
    pub(super) const REFERENCE_TSC: u32 = 1 << 9;
    pub(super) const FREQUENCIES: u32 = 1 << 11;
    pub(super) const REENLIGHTENMENT: u32 = 1 << 13;
    pub(super) const POST_MESSAGES_EBX: u32 = 1 << 4;
    pub(super) const SIGNAL_EVENTS_EBX: u32 = 1 << 5;
    pub(super) const FREQUENCIES_EDX: u32 = 1 << 8;
    pub(super) const CRASH_EDX: u32 = 1 << 10;
}

/// Registers of a leaf.
const EAX: usize = 0;
const EDX: usize = 3;

/// Each MSR and its feature: register and bit.
const MSRS: [(u32, usize, u32); 17] = [
    (GUEST_OS_ID, EAX, feature::HYPERCALL),
    (HYPERCALL, EAX, feature::HYPERCALL),
    (VP_INDEX, EAX, feature::VP_INDEX),
    (RESET, EAX, feature::RESET),
    (TIME_REF_COUNT, EAX, feature::TIME_REF_COUNT),
    (REFERENCE_TSC, EAX, feature::REFERENCE_TSC),
    (TSC_FREQUENCY, EAX, feature::FREQUENCIES),
    (APIC_FREQUENCY, EAX, feature::FREQUENCIES),
    (CRASH_P0, EDX, feature::CRASH_EDX),
    (CRASH_P0 + 1, EDX, feature::CRASH_EDX),
    (CRASH_P0 + 2, EDX, feature::CRASH_EDX),
    (CRASH_P0 + 3, EDX, feature::CRASH_EDX),
    (CRASH_P4, EDX, feature::CRASH_EDX),
    (CRASH_CTL, EDX, feature::CRASH_EDX),
    (REENLIGHTENMENT_CONTROL, EAX, feature::REENLIGHTENMENT),
    (TSC_EMULATION_CONTROL, EAX, feature::REENLIGHTENMENT),
    (TSC_EMULATION_STATUS, EAX, feature::REENLIGHTENMENT),
];

/// All of them.
pub(crate) fn indices() -> impl Iterator<Item = u32> {
    MSRS.iter().map(|&(index, ..)| index)
}

/// Interface of leaf 4000_0001H.
const HV_1: u32 = u32::from_le_bytes(*b"Hv#1");
/// Vendor of KVM's own.
const VENDOR: &[u8; 12] = b"Linux KVM Hv";
const LAST_LEAF: u32 = 0x4000_0082;

/// HYPERCALL and REFERENCE_TSC: on. The page is in the bits above.
const ENABLE: u64 = 1;
const PAGE: u64 = !0xfff;
/// CRASH_CTL: the guest has crashed.
const CRASH_NOTIFY: u64 = 1 << 63;
/// Hz of the local APIC's timer, as `irqchip` has it.
const APIC_HZ: u64 = 1_000_000_000;

/// `KVM_GET_SUPPORTED_HV_CPUID`
pub(crate) fn supported() -> Vec<kvm_cpuid_entry2> {
    let word = |text: &[u8], at: usize| u32::from_le_bytes([text[at], text[at + 1], text[at + 2], text[at + 3]]);
    let leaf =
        |function, [eax, ebx, ecx, edx]: [u32; 4]| kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Plain::zeroed() };
    let vendor = |last| [last, word(VENDOR, 0), word(VENDOR, 4), word(VENDOR, 8)];
    let features = MSRS.iter().filter(|row| row.1 == EAX).fold(0, |bits, row| bits | row.2);
    // Relaxed timing; whether the guest's processors never share a core with others that it does not know of.
    let recommended = 1 << 5 | if is_smt_possible() { 0 } else { 1 << 18 };
    vec![
        leaf(0x4000_0000, vendor(LAST_LEAF)),
        leaf(0x4000_0001, [HV_1, 0, 0, 0]),
        // Hyper-V 2016.
        leaf(0x4000_0002, [0x3839, 0x000a_0000, 0, 0]),
        leaf(0x4000_0003, [features, 0, 0, feature::FREQUENCIES_EDX | feature::CRASH_EDX]),
        // A spinlock is tried so often before the hypervisor is told.
        leaf(0x4000_0004, [recommended, 0xfff, 0, 0]),
        leaf(0x4000_0005, [MAX_VCPUS, 64, 0, 0]),
        // No debugger.
        leaf(0x4000_0080, vendor(0)),
        leaf(0x4000_0081, [u32::from_le_bytes(*b"VS#1"), 0, 0, 0]),
        leaf(LAST_LEAF, [0; 4]),
        // Of nested guests, which there are none: what KVM says always.
        leaf(0x4000_000a, [1 << 19, 0, 0, 0]),
    ]
}

fn is_smt_possible() -> bool {
    let control = std::fs::read_to_string("/sys/devices/system/cpu/smt/control").unwrap_or_default();
    !control.starts_with("forceoff") && !control.starts_with("notsupported")
}

/// What becomes of the page of REFERENCE_TSC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum TscPage {
    #[default]
    Unset,
    /// It says the line below.
    Set,
    /// It cannot be written: the guest uses TIME_REF_COUNT.
    Broken,
}

/// Reference time, 100 ns: (counter × scale) / 2^64 + offset.
#[derive(Clone, Copy, Debug, Default)]
struct Line {
    scale: u64,
    offset: u64,
}

impl Line {
    fn at(self, tsc: u64) -> u64 {
        scaled(tsc, self.scale).wrapping_add(self.offset)
    }
}

fn scaled(tsc: u64, scale: u64) -> u64 {
    ((u128::from(tsc) * u128::from(scale)) >> 64) as u64
}

#[derive(Debug, Default)]
struct State {
    guest_os_id: u64,
    hypercall: u64,
    reference_tsc: u64,
    tsc_page: TscPage,
    line: Line,
    /// Whose counter the line is over.
    of: Weak<Machine>,
    crash: [u64; 5],
    crash_ctl: u64,
    reenlightenment: u64,
    emulation_control: u64,
    emulation_status: u64,
}

/// What the vCPUs of a VM share: a partition, in Hyper-V's words.
pub(crate) struct Partition {
    memory: Arc<Memory>,
    time: Arc<VmClock>,
    /// GUEST_OS_ID is not 0: hypercalls are Hyper-V's.
    has_os: AtomicBool,
    has_page: AtomicBool,
    state: Mutex<State>,
}

/// What a vCPU has beside that.
#[derive(Default)]
pub(crate) struct VcpuHyperv {
    /// The guest's CPUID has the interface.
    enabled: AtomicBool,
    /// `KVM_CAP_HYPERV_ENFORCE_CPUID`
    enforced: AtomicBool,
    /// Leaf 4000_0003H, and EBX of the next.
    features: Mutex<([u32; 4], u32)>,
    vp_index: AtomicU32,
    /// `KVM_SYSTEM_EVENT_…` that user space is to hear of before the next instruction; 0: none.
    event: AtomicU32,
}

impl VcpuHyperv {
    pub(crate) fn load_cpuid(&self, table: &[kvm_cpuid_entry2]) {
        let is_hyperv = cpuid::find(table, 0x4000_0001, 0).is_some_and(|leaf| leaf.eax == HV_1);
        self.enabled.store(is_hyperv, Relaxed);
        let of = |leaf| cpuid::find(table, leaf, 0).map_or([0; 4], |leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]);
        *self.features.lock() = (of(0x4000_0003), of(0x4000_0004)[1]);
    }

    /// `KVM_CAP_HYPERV_ENFORCE_CPUID`
    pub(crate) fn enforce(&self, enforce: bool) {
        self.enforced.store(enforce, Relaxed);
    }

    /// The number that guests know the vCPU by: at first its place in the order of creation.
    pub(crate) fn set_index(&self, index: u32) {
        self.vp_index.store(index, Relaxed);
    }

    pub(crate) fn take_event(&self) -> Option<u32> {
        if self.event.load(Relaxed) == 0 { None } else { Some(self.event.swap(0, Relaxed)) }
    }

    /// The MSR is one of these, and whoever asks may have it.
    fn has(&self, index: u32, by_guest: bool) -> bool {
        let Some(&(_, register, bit)) = MSRS.iter().find(|row| row.0 == index) else { return false };
        let is_allowed = || !self.enforced.load(Relaxed) || self.features.lock().0[register] & bit != 0;
        !by_guest || self.enabled.load(Relaxed) && is_allowed()
    }
}

impl Partition {
    pub(crate) fn new(memory: Arc<Memory>, time: Arc<VmClock>) -> Self {
        let (has_os, has_page) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { memory, time, has_os, has_page, state: Mutex::default() }
    }

    /// Guest-physical memory.
    pub(crate) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// The counter of a vCPU, or the VM's clock, is another: the page says so, unless the guest has asked for a counter that goes on
    /// (`tsc_page_update_unsafe`).
    pub(crate) fn time_changed(&self) {
        if self.has_page.load(Relaxed) {
            let mut state = self.state.lock();
            if state.tsc_page == TscPage::Set && state.emulation_control == 0 {
                self.write_page(&mut state);
            }
        }
    }

    /// Sequence, reserved, scale, offset. While the sequence is 0 the guest uses the MSR.
    fn write_page(&self, state: &mut State) {
        let at = GuestPhysAddr(state.reference_tsc & PAGE);
        let mut sequence = [0; 4];
        let written = state.of.upgrade().and_then(|machine| {
            let view = machine.memory();
            view.read(at, &mut sequence).ok()?;
            view.write(at, &[0; 4]).ok()?;
            // 2^64 × 10,000,000 / Hz
            let scale = u64::try_from((10_000u128 << 64) / u128::from(machine.tsc_khz().max(1))).ok()?;
            let now = host_tsc();
            let offset = (self.time.ns_at(now) / 100).wrapping_sub(scaled(machine.tsc_at(now), scale));
            view.write(at.wrapping_add(8), &[scale.to_le_bytes(), offset.to_le_bytes()].concat()).ok()?;
            let next = match u32::from_le_bytes(sequence).wrapping_add(1) {
                0 | u32::MAX => 1,
                next => next,
            };
            view.write(at, &next.to_le_bytes()).ok()?;
            Some(Line { scale, offset })
        });
        state.tsc_page = if written.is_some() { TscPage::Set } else { TscPage::Broken };
        state.line = written.unwrap_or_default();
    }
}

impl Machine {
    /// Hypercalls are Hyper-V's.
    pub(crate) fn has_hyperv_hypercalls(&self) -> bool {
        self.hyperv.enabled.load(Relaxed) && self.options.hyperv.has_os.load(Relaxed)
    }

    /// A hypercall that the guest's features have.
    pub(crate) fn allows_hyperv_call(&self, code: u16) -> bool {
        if !self.hyperv.enforced.load(Relaxed) {
            return true;
        }
        let (features, spins) = *self.hyperv.features.lock();
        match code {
            call::NOTIFY_LONG_SPIN_WAIT => spins != 0 && spins != u32::MAX,
            call::POST_MESSAGE => features[1] & feature::POST_MESSAGES_EBX != 0,
            call::SIGNAL_EVENT => features[1] & feature::SIGNAL_EVENTS_EBX != 0,
            _ => true,
        }
    }

    /// `None`: another MSR, or #GP(0).
    pub(crate) fn read_hyperv_msr(&self, index: u32, by_guest: bool) -> Option<u64> {
        if !self.hyperv.has(index, by_guest) {
            return None;
        }
        let partition = &self.options.hyperv;
        let state = partition.state.lock();
        Some(match index {
            GUEST_OS_ID => state.guest_os_id,
            HYPERCALL => state.hypercall,
            VP_INDEX => self.hyperv.vp_index.load(Relaxed).into(),
            TIME_REF_COUNT => match (state.tsc_page, state.of.upgrade()) {
                (TscPage::Set, Some(machine)) => state.line.at(machine.tsc()),
                _ => partition.time.ns_at(host_tsc()) / 100,
            },
            REFERENCE_TSC => state.reference_tsc,
            TSC_FREQUENCY => u64::from(self.tsc_khz()) * 1000,
            APIC_FREQUENCY => APIC_HZ,
            CRASH_P0..=CRASH_P4 => state.crash[(index - CRASH_P0) as usize],
            CRASH_CTL => state.crash_ctl,
            REENLIGHTENMENT_CONTROL => state.reenlightenment,
            TSC_EMULATION_CONTROL => state.emulation_control,
            TSC_EMULATION_STATUS => state.emulation_status,
            _ => 0,
        })
    }

    /// `None`: another MSR, or #GP(0).
    pub(crate) fn write_hyperv_msr(self: &Arc<Self>, index: u32, value: u64, by_guest: bool) -> Option<()> {
        if !self.hyperv.has(index, by_guest) {
            return None;
        }
        let partition = &self.options.hyperv;
        let mut state = partition.state.lock();
        match index {
            GUEST_OS_ID => {
                state.guest_os_id = value;
                partition.has_os.store(value != 0, Relaxed);
                if value == 0 {
                    state.hypercall &= !ENABLE;
                }
            }
            // Without an identity it stays off.
            HYPERCALL if state.guest_os_id == 0 => {}
            HYPERCALL => {
                if value & ENABLE != 0 {
                    let page = hypercall_page(self.options.xen.intercepts());
                    self.memory().write(GuestPhysAddr(value & PAGE), &page).ok()?;
                }
                state.hypercall = value;
            }
            VP_INDEX if by_guest || value as u32 >= MAX_VCPUS => return None,
            VP_INDEX => self.hyperv.set_index(value as u32),
            REFERENCE_TSC => {
                state.reference_tsc = value;
                state.of = Arc::downgrade(self);
                let on = value & ENABLE != 0;
                partition.has_page.store(on, Relaxed);
                if !on {
                    state.tsc_page = TscPage::Unset;
                } else if by_guest || state.emulation_control == 0 {
                    partition.write_page(&mut state);
                } else {
                    partition.take_page(&mut state, &self.memory());
                }
            }
            CRASH_P0..=CRASH_P4 => state.crash[(index - CRASH_P0) as usize] = value,
            CRASH_CTL if !by_guest => state.crash_ctl = value & CRASH_NOTIFY,
            CRASH_CTL => self.tell(value & CRASH_NOTIFY != 0, KVM_SYSTEM_EVENT_CRASH),
            RESET => self.tell(value == 1, KVM_SYSTEM_EVENT_RESET),
            REENLIGHTENMENT_CONTROL => state.reenlightenment = value,
            TSC_EMULATION_CONTROL => state.emulation_control = value,
            TSC_EMULATION_STATUS if by_guest && value != 0 => return None,
            TSC_EMULATION_STATUS => state.emulation_status = value,
            // Read-only; user space's writes are ignored.
            _ if by_guest => return None,
            _ => {}
        }
        Some(())
    }

    fn tell(&self, whether: bool, event: u32) {
        if whether {
            self.hyperv.event.store(event, Relaxed);
            self.come_back();
        }
    }
}

impl Partition {
    /// After a migration the page stays as the guest knows it while its counter is emulated.
    fn take_page(&self, state: &mut State, memory: &View) {
        let mut page = [0; 24];
        if memory.read(GuestPhysAddr(state.reference_tsc & PAGE), &mut page).is_err() {
            state.tsc_page = TscPage::Broken;
            return;
        }
        let word = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().expect("eight bytes"));
        if word(0) as u32 == 0 {
            return self.write_page(state);
        }
        state.line = Line { scale: word(8), offset: word(16) };
        state.tsc_page = TscPage::Set;
    }
}

/// The processor's own hypercall and a return. Beside Xen's hypercalls these set bit 31 of EAX, to be told apart.
fn hypercall_page(marked: bool) -> Vec<u8> {
    let mut page = if marked { vec![0x0d, 0, 0, 0, 0x80] } else { Vec::new() };
    page.extend([0x0f, 0x01, if cpuid::host_is_amd() { 0xd9 } else { 0xc1 }, 0xc3]);
    page
}

/// Codes of hypercalls. TLFS, "Hypercall Reference".
pub(crate) mod call {
    pub(crate) const NOTIFY_LONG_SPIN_WAIT: u16 = 0x08;
    pub(crate) const POST_MESSAGE: u16 = 0x5c;
    pub(crate) const SIGNAL_EVENT: u16 = 0x5d;
}

/// Results. TLFS, "Hypercall Status Codes".
mod status {
    pub(super) const SUCCESS: u64 = 0;
    pub(super) const INVALID_HYPERCALL_CODE: u64 = 2;
    pub(super) const INVALID_HYPERCALL_INPUT: u64 = 3;
    pub(super) const INVALID_ALIGNMENT: u64 = 4;
    pub(super) const ACCESS_DENIED: u64 = 6;
}

/// Control word bits. TLFS, "Hypercall Inputs".
const FAST: u64 = 1 << 16;
const VARIABLE_HEADER: u64 = 0x3ff << 17;
const REPS: u64 = 0xfff << 32 | 0xfff << 48;
const RESERVED: u64 = 0x1f << 27 | 0xf << 44 | 0xf << 60;

/// The answer to a hypercall: control word, and input as an address or, where it is fast, by value.
pub(crate) fn answer(machine: &Machine, control: u64, input: u64) -> u64 {
    let code = control as u16;
    if !machine.allows_hyperv_call(code) {
        return status::ACCESS_DENIED;
    }
    if control & RESERVED != 0 {
        return status::INVALID_HYPERCALL_INPUT;
    }
    let is_plain = control & (VARIABLE_HEADER | REPS) == 0;
    match code {
        call::NOTIFY_LONG_SPIN_WAIT if is_plain => {
            std::thread::yield_now();
            status::SUCCESS
        }
        call::SIGNAL_EVENT if is_plain && control & FAST == 0 && !is_readable(&machine.memory(), input) => {
            status::INVALID_ALIGNMENT
        }
        // Nobody has bound an eventfd to a connection, and without a synthetic interrupt controller user space is not asked.
        call::NOTIFY_LONG_SPIN_WAIT | call::SIGNAL_EVENT | call::POST_MESSAGE => status::INVALID_HYPERCALL_INPUT,
        _ => status::INVALID_HYPERCALL_CODE,
    }
}

/// `kvm_hvcall_signal_event`: the parameter of eight bytes is there.
fn is_readable(memory: &View, at: u64) -> bool {
    at.is_multiple_of(8) && memory.read(GuestPhysAddr(at), &mut [0; 8]).is_ok()
}
