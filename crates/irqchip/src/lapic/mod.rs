//! The local APIC, in xAPIC and x2APIC mode. SDM Vol. 3, chapter "Advanced Programmable Interrupt Controller (APIC)".
//!
//! Every register is an atomic, so no lock is ever taken on a vCPU's APIC. The thread that holds the vCPU (the owner) alone
//! reads and writes registers, acknowledges, ends interrupts and drives the timer. Any other thread may do one thing,
//! [`Lapic::accept`]: it sets TMR, then IRR (or a bit of the events), then wakes the owner, and looks at registers that
//! decide who is addressed. A register that the owner changes at that moment reads as it was or as it is, as on hardware.
//!
//! Where a guest can tell, this follows KVM (lapic.c): the version is 14H with six LVT entries, the timer's clock is
//! 1 GHz, pending interrupts are delivered while software has the APIC disabled.

mod access;
mod page;
mod timer;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

use x86_defs::msr::apic_base;

use crate::reg::{Device, Reg, is_sorted, reg};
use crate::{DeliveryMode, Message};

pub use page::PAGE_WORDS;
pub use timer::Deadline;

/// Bytes between registers.
const STEP: u32 = 0x10;
/// Bytes of memory that it decodes.
pub const LEN: u64 = 0x1000;
/// Offset of the task priority.
pub const TPR: u64 = at::TPR as u64;
/// Offset of the spurious-interrupt vector register.
pub const SVR: u64 = at::SVR as u64;
/// Version 14H, six LVT entries.
const VERSION: u32 = 0x0005_0014;
/// Version register: one entry more, that of corrected machine checks.
const VERSION_CMCI: u32 = 1 << 16;
/// Version register: EOI broadcast can be suppressed.
const VERSION_DIRECTED_EOI: u32 = 1 << 24;
/// Destination that means all, in both modes.
const BROADCAST: u32 = 0xff;
const X2APIC_BROADCAST: u32 = 0xffff_ffff;

/// Offsets that the code names.
mod at {
    pub(super) const ID: u32 = 0x020;
    pub(super) const TPR: u32 = 0x080;
    pub(super) const LDR: u32 = 0x0d0;
    pub(super) const DFR: u32 = 0x0e0;
    pub(super) const SVR: u32 = 0x0f0;
    pub(super) const ISR: u32 = 0x100;
    pub(super) const TMR: u32 = 0x180;
    pub(super) const IRR: u32 = 0x200;
    pub(super) const ESR: u32 = 0x280;
    pub(super) const ICR: u32 = 0x300;
    pub(super) const ICR_HIGH: u32 = 0x310;
    pub(super) const LVT_CMCI: u32 = 0x2f0;
    pub(super) const LVT_TIMER: u32 = 0x320;
    pub(super) const LVT_PERFORMANCE: u32 = 0x340;
    pub(super) const LVT_LINT0: u32 = 0x350;
    pub(super) const LVT_LINT1: u32 = 0x360;
    pub(super) const LVT_ERROR: u32 = 0x370;
    pub(super) const INITIAL_COUNT: u32 = 0x380;
    pub(super) const CURRENT_COUNT: u32 = 0x390;
    pub(super) const DIVIDE: u32 = 0x3e0;
}

/// Bits of the local vector table.
mod lvt {
    pub(super) const MASKED: u32 = 1 << 16;
    pub(super) const LEVEL: u32 = 1 << 15;
    pub(super) const MODE_SHIFT: u32 = 8;
}

/// Bits of the spurious-interrupt vector register.
mod svr {
    pub(super) const ENABLED: u32 = 1 << 8;
    pub(super) const SUPPRESS_EOI_BROADCAST: u32 = 1 << 12;
}

/// Bits of the interrupt command register.
mod icr {
    pub(super) const MODE_SHIFT: u32 = 8;
    pub(super) const LOGICAL: u32 = 1 << 11;
    pub(super) const ASSERT: u32 = 1 << 14;
    pub(super) const LEVEL: u32 = 1 << 15;
    pub(super) const SHORTHAND_SHIFT: u32 = 18;
    /// Reserved, and kept by KVM as written in xAPIC mode; WRMSR refuses them.
    pub(super) const RESERVED: u32 = 0xfff3_2000;
}

/// Bits of the error status register.
mod esr {
    pub(super) const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    pub(super) const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
    pub(super) const ILLEGAL_REGISTER: u32 = 1 << 7;
}

/// All registers. SDM Vol. 3 "Local APIC Register Address Map" and "x2APIC Register Address Space".
const REGS: &[Reg<Lapic>] = &[
    // offset name                       reset        guest-writable
    reg(0x020, "ID", 0x0000_0000, 0xff00_0000).msr_read_only(),
    reg(0x030, "Version", VERSION, 0x0000_0000).read(Lapic::version),
    reg(0x080, "TPR", 0x0000_0000, 0x0000_00ff).write(Lapic::tpr_written),
    reg(0x090, "APR", 0x0000_0000, 0x0000_0000).memory_only(),
    reg(0x0a0, "PPR", 0x0000_0000, 0x0000_0000).read(Lapic::ppr_shown),
    reg(0x0b0, "EOI", 0x0000_0000, 0x0000_0000).write(Lapic::eoi_written).write_only(),
    reg(0x0c0, "RRD", 0x0000_0000, 0x0000_0000).memory_only(),
    reg(0x0d0, "LDR", 0x0000_0000, 0xff00_0000).msr_read_only(),
    reg(0x0e0, "DFR", 0xffff_ffff, 0xf000_0000).memory_only(),
    reg(0x0f0, "SVR", 0x0000_00ff, 0x0000_13ff).write(Lapic::svr_written),
    reg(0x100, "ISR", 0x0000_0000, 0x0000_0000).times(8),
    reg(0x180, "TMR", 0x0000_0000, 0x0000_0000).times(8),
    reg(0x200, "IRR", 0x0000_0000, 0x0000_0000).times(8),
    reg(0x280, "ESR", 0x0000_0000, 0x0000_0000).write(Lapic::esr_written),
    reg(0x2f0, "LVT CMCI", 0x0001_0000, 0x0001_07ff).write(Lapic::lvt_written),
    reg(0x300, "ICR", 0x0000_0000, 0xffff_efff).write(Lapic::icr_written),
    reg(0x310, "ICR high", 0x0000_0000, 0xff00_0000).memory_only(),
    reg(0x320, "LVT timer", 0x0001_0000, 0x0007_00ff).write(Lapic::lvt_timer_written),
    reg(0x330, "LVT thermal", 0x0001_0000, 0x0001_07ff).write(Lapic::lvt_written),
    reg(0x340, "LVT performance", 0x0001_0000, 0x0001_07ff).write(Lapic::lvt_written),
    reg(0x350, "LVT LINT0", 0x0001_0000, 0x0001_a7ff).write(Lapic::lvt_lint0_written),
    reg(0x360, "LVT LINT1", 0x0001_0000, 0x0001_a7ff).write(Lapic::lvt_written),
    reg(0x370, "LVT error", 0x0001_0000, 0x0001_00ff).write(Lapic::lvt_written),
    reg(0x380, "Initial count", 0x0000_0000, 0xffff_ffff).write(Lapic::initial_count_written),
    reg(0x390, "Current count", 0x0000_0000, 0x0000_0000).read(Lapic::current_count_shown),
    reg(0x3e0, "Divide configuration", 0x0000_0000, 0x0000_000b).write(Lapic::divide_written),
    reg(0x3f0, "Self IPI", 0x0000_0000, 0x0000_00ff).write(Lapic::self_ipi_written).msr_only().write_only(),
];
const _: () = assert!(is_sorted(REGS, STEP));

/// Entries of the local vector table.
const LVTS: [u32; 6] = [at::LVT_TIMER, 0x330, at::LVT_PERFORMANCE, at::LVT_LINT0, at::LVT_LINT1, at::LVT_ERROR];

/// Who an IPI is for, beside or in place of a destination: ICR bits 19:18.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shorthand {
    /// The destination decides.
    None,
    /// The sender.
    ToSelf,
    /// All.
    All,
    /// All but the sender.
    Others,
}

/// What a local APIC reaches.
pub trait Bus {
    /// Sends an IPI.
    fn send_ipi(&self, from: &Lapic, shorthand: Shorthand, message: &Message);

    /// A level-triggered interrupt ended, and its EOI is broadcast to the I/O APICs.
    fn end_of_interrupt(&self, from: &Lapic, vector: u8);
}

/// Brings a vCPU's owner to look at its APIC. Called from any thread, does not block.
pub trait Wake: Send + Sync {
    /// Something came for it.
    fn wake(&self);
}

impl Device for Lapic {
    type Bus = dyn Bus;
}

/// Bits of [`Lapic::take_events`].
pub mod event {
    /// INIT came; a start-up IPI that came before it is gone.
    pub const INIT: u32 = 1 << 0;
    /// A start-up IPI came.
    pub const START_UP: u32 = 1 << 1;
    /// An NMI came.
    pub const NMI: u32 = 1 << 2;
    /// An SMI came.
    pub const SMI: u32 = 1 << 3;
    /// Another vCPU ends this one's HLT (`KVM_HC_KICK_CPU`), the one under way or the next.
    pub const UNHALT: u32 = 1 << 4;
}

/// The local APIC of one vCPU.
pub struct Lapic {
    /// Initial APIC id.
    id: u32,
    regs: [AtomicU32; (LEN / 0x10) as usize],
    /// IA32_APIC_BASE
    base: AtomicU64,
    timer: timer::Timer,
    /// Errors since the last write of ESR.
    errors: AtomicU32,
    events: AtomicU32,
    start_up_vector: AtomicU8,
    /// How often it was chosen for a lowest-priority message: those chosen less go first, as in KVM.
    arbitration: AtomicU32,
    directed_eoi: AtomicBool,
    /// The LVT has an entry for corrected machine checks.
    cmci: AtomicBool,
    wake: Arc<dyn Wake>,
}

impl Lapic {
    /// After power-on. `id`: initial APIC id; `base`: IA32_APIC_BASE.
    pub fn new(id: u32, base: u64, wake: Arc<dyn Wake>) -> Self {
        let lapic = Self {
            id,
            regs: std::array::from_fn(|_| AtomicU32::new(0)),
            base: AtomicU64::new(base),
            timer: timer::Timer::default(),
            errors: AtomicU32::new(0),
            events: AtomicU32::new(0),
            start_up_vector: AtomicU8::new(0),
            arbitration: AtomicU32::new(0),
            directed_eoi: AtomicBool::new(false),
            cmci: AtomicBool::new(false),
            wake,
        };
        lapic.store(at::ID, id << 24);
        lapic.init(true);
        lapic
    }

    /// INIT: all registers but the id are as after reset. `opens_lint0`: the bootstrap processor's LINT0 is open to the PIC, a
    /// quirk that KVM keeps for firmware that relies on it.
    pub fn init(&self, opens_lint0: bool) {
        for reg in REGS.iter().filter(|reg| !reg.msr_only && reg.offset != at::ID && self.has(reg)) {
            for n in 0..reg.count {
                self.store(reg.offset + n * STEP, reg.reset);
            }
        }
        self.timer.stop();
        self.errors.store(0, Relaxed);
        self.arbitration.store(0, Relaxed);
        if opens_lint0 && self.base.load(Relaxed) & apic_base::BSP != 0 {
            self.store(at::LVT_LINT0, (DeliveryMode::ExtInt as u32) << lvt::MODE_SHIFT);
        }
        if self.is_x2apic() {
            self.store(at::LDR, self.x2apic_ldr());
        }
    }

    fn load(&self, offset: u32) -> u32 {
        self.regs[(offset / STEP) as usize].load(SeqCst)
    }

    fn store(&self, offset: u32, value: u32) {
        self.regs[(offset / STEP) as usize].store(value, SeqCst);
    }

    /// Initial APIC id, that of x2APIC mode.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// IA32_APIC_BASE
    pub fn base(&self) -> u64 {
        self.base.load(Relaxed)
    }

    /// Loads IA32_APIC_BASE. Enabling brings the ids of the mode.
    pub fn set_base(&self, base: u64) {
        let old = self.base.swap(base, Relaxed);
        let rises = |bit: u64| base & !old & bit != 0;
        if rises(apic_base::EN) || old & !base & apic_base::EXTD != 0 {
            self.store(at::ID, self.id << 24);
        }
        if rises(apic_base::EXTD) {
            self.store(at::ID, self.id);
            self.store(at::LDR, self.x2apic_ldr());
        }
    }

    /// EOI broadcast can be suppressed: not where the I/O APIC is in the same hands.
    pub fn set_directed_eoi(&self, offered: bool) {
        self.directed_eoi.store(offered, Relaxed);
    }

    /// There is an entry for corrected machine checks, or not. A new one is masked.
    pub fn set_cmci(&self, offered: bool) {
        if !self.cmci.swap(offered, Relaxed) && offered {
            self.store(at::LVT_CMCI, lvt::MASKED);
        }
    }

    /// A machine check was corrected, or needs no action. False: masked.
    pub fn corrected_machine_check(&self) -> bool {
        self.local(at::LVT_CMCI)
    }

    /// The register is there.
    fn has(&self, reg: &Reg<Self>) -> bool {
        reg.offset != at::LVT_CMCI || self.cmci.load(Relaxed)
    }

    /// Enabled in IA32_APIC_BASE.
    pub fn is_enabled(&self) -> bool {
        self.base() & apic_base::EN != 0
    }

    /// In x2APIC mode.
    pub fn is_x2apic(&self) -> bool {
        let x2apic = apic_base::EN | apic_base::EXTD;
        self.base() & x2apic == x2apic
    }

    fn is_software_enabled(&self) -> bool {
        self.load(at::SVR) & svr::ENABLED != 0
    }

    /// SDM Vol. 3 "Deriving Logical x2APIC ID from the Local x2APIC ID".
    fn x2apic_ldr(&self) -> u32 {
        (self.id & !0xf) << 12 | 1 << (self.id & 0xf)
    }

    // Vectors

    fn highest(&self, first: u32) -> Option<u8> {
        (0..8u32).rev().find_map(|n| {
            let word = self.load(first + n * STEP);
            (word != 0).then(|| (n * 32 + word.ilog2()) as u8)
        })
    }

    fn word_and_bit(first: u32, vector: u8) -> (usize, u32) {
        ((first / STEP) as usize + usize::from(vector >> 5), 1 << (vector & 31))
    }

    fn set_bit(&self, first: u32, vector: u8, set: bool) {
        let (word, bit) = Self::word_and_bit(first, vector);
        let word = &self.regs[word];
        if set {
            word.fetch_or(bit, SeqCst)
        } else {
            word.fetch_and(!bit, SeqCst)
        };
    }

    fn bit(&self, first: u32, vector: u8) -> bool {
        let (word, bit) = Self::word_and_bit(first, vector);
        self.regs[word].load(SeqCst) & bit != 0
    }

    /// Processor priority. SDM Vol. 3 "Task and Processor Priorities".
    fn ppr(&self) -> u32 {
        let tpr = self.load(at::TPR);
        let serving = u32::from(self.highest(at::ISR).unwrap_or(0)) & 0xf0;
        if tpr & 0xf0 >= serving { tpr } else { serving }
    }

    /// The interrupt that would be delivered now.
    pub fn pending(&self) -> Option<u8> {
        let vector = self.is_enabled().then(|| self.highest(at::IRR))??;
        (u32::from(vector) & 0xf0 > self.ppr() & 0xf0).then_some(vector)
    }

    /// The processor takes the interrupt that is pending.
    pub fn acknowledge(&self) -> Option<u8> {
        let vector = self.pending()?;
        self.set_bit(at::IRR, vector, false);
        self.set_bit(at::ISR, vector, true);
        Some(vector)
    }

    /// The end of the interrupt under way would have no effect but that: no other waits, no I/O APIC hears of it.
    pub fn eoi_is_silent(&self) -> bool {
        self.highest(at::ISR).is_some_and(|vector| !self.bit(at::TMR, vector)) && self.highest(at::IRR).is_none()
    }

    /// The interrupt under way ended without a write of EOI.
    pub fn end_silently(&self) {
        if let Some(vector) = self.highest(at::ISR) {
            self.set_bit(at::ISR, vector, false);
        }
    }

    /// The PIC's INTR comes through: LINT0 is ExtINT, or the APIC is disabled.
    pub fn accepts_pic(&self) -> bool {
        let lint0 = self.load(at::LVT_LINT0);
        let extint = lint0 >> lvt::MODE_SHIFT & 7 == DeliveryMode::ExtInt as u32;
        !self.is_enabled() || lint0 & lvt::MASKED == 0 && extint
    }

    /// Task priority, and in the three bytes above it: nothing, priority class in service, highest vector that waits.
    pub fn priorities(&self) -> u32 {
        let [serving, waiting] = [at::ISR, at::IRR].map(|first| u32::from(self.highest(first).unwrap_or(0)));
        self.load(at::TPR) & 0xff | (serving & 0xf0) << 8 | waiting << 24
    }

    /// Loads the task priority.
    pub fn set_tpr(&self, value: u8) {
        self.store(at::TPR, value.into());
    }

    /// Task priority as CR8 has it.
    pub fn cr8(&self) -> u64 {
        (self.load(at::TPR) >> 4).into()
    }

    /// MOV to CR8. True: an interrupt is pending now.
    pub fn set_cr8(&self, value: u64) -> bool {
        self.store(at::TPR, (value as u32 & 0xf) << 4);
        self.pending().is_some()
    }

    // What other threads may call

    /// A message for this APIC. True: it was accepted.
    pub fn accept(&self, message: &Message) -> bool {
        match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                if message.level && !message.assert || !self.is_software_enabled() || !self.is_enabled() {
                    return false;
                }
                if message.vector < 16 {
                    self.error(esr::RECEIVE_ILLEGAL_VECTOR);
                    return false;
                }
                if self.bit(at::TMR, message.vector) != message.level {
                    self.set_bit(at::TMR, message.vector, message.level);
                }
                self.set_bit(at::IRR, message.vector, true);
            }
            DeliveryMode::Smi => self.raise(event::SMI),
            DeliveryMode::Nmi => self.raise(event::NMI),
            // The de-assertion of a level is for the arbitration ids of old.
            DeliveryMode::Init if message.level && !message.assert => return false,
            DeliveryMode::Init => {
                self.raise(event::INIT);
                self.events.fetch_and(!event::START_UP, SeqCst);
            }
            DeliveryMode::StartUp => {
                self.start_up_vector.store(message.vector, SeqCst);
                self.raise(event::START_UP);
            }
            // The PIC is wired to LINT0 and asked there.
            DeliveryMode::ExtInt => return false,
        }
        self.wake.wake();
        true
    }

    fn raise(&self, event: u32) {
        self.events.fetch_or(event, SeqCst);
    }

    /// Events that wait, as [`event`] has them.
    pub fn events(&self) -> u32 {
        self.events.load(SeqCst)
    }

    /// Takes events of `which`.
    pub fn take_events(&self, which: u32) -> u32 {
        self.events.fetch_and(!which, SeqCst) & which
    }

    /// Puts events back or brings them from a saved state.
    pub fn put_event(&self, event: u32) {
        self.raise(event);
        self.wake.wake();
    }

    /// The page of the last start-up IPI.
    pub fn start_up_vector(&self) -> u8 {
        self.start_up_vector.load(SeqCst)
    }

    /// Loads it.
    pub fn set_start_up_vector(&self, vector: u8) {
        self.start_up_vector.store(vector, SeqCst);
    }

    /// Wakes the owner: INTR of the PIC rose.
    pub fn wake(&self) {
        self.wake.wake();
    }

    /// True: a message with this destination is for this APIC. SDM Vol. 3 "Determining IPI Destination". `strict`: one that is
    /// broadcast to a byte's worth of APICs does not reach those in x2APIC mode, as an IPI does not. A destination beyond a byte
    /// names the initial id in either mode: a vCPU that is plugged in starts in xAPIC mode (`kvm_apic_match_physical_addr`).
    pub fn is_addressed(&self, dest: u32, logical: bool, strict: bool) -> bool {
        let x2apic = self.is_x2apic();
        if dest == X2APIC_BROADCAST && x2apic || dest == BROADCAST && (!x2apic || !strict) {
            return true;
        }
        let ldr = self.load(at::LDR);
        match (logical, x2apic) {
            (false, _) if x2apic || dest > BROADCAST => dest == self.id,
            (false, _) => dest == self.load(at::ID) >> 24,
            (true, true) => ldr >> 16 == dest >> 16 && ldr & dest & 0xffff != 0,
            // Flat model: one bit for each. Cluster model: four bits number, four bits one for each.
            (true, false) if self.load(at::DFR) >> 28 == 0xf => ldr >> 24 & dest != 0,
            (true, false) => ldr >> 28 == dest >> 4 && ldr >> 24 & dest & 0xf != 0,
        }
    }

    /// What makes it a candidate for a lowest-priority message: `None`, it is not; otherwise the lower goes first.
    pub fn arbitration(&self) -> Option<u32> {
        (self.is_enabled() && self.is_software_enabled()).then(|| self.arbitration.load(Relaxed))
    }

    /// It was chosen.
    pub fn chosen(&self) {
        self.arbitration.fetch_add(1, Relaxed);
    }

    // What happens here

    /// An error. SDM Vol. 3 "Error Handling": ESR shows it at the next write, LVT error tells at once.
    fn error(&self, bit: u32) {
        let before = self.errors.fetch_or(bit, SeqCst);
        if before & bit == 0 {
            self.local(at::LVT_ERROR);
        }
    }

    /// A local interrupt source fires. False: masked.
    fn local(&self, offset: u32) -> bool {
        let entry = self.load(offset);
        if !self.is_enabled() || entry & lvt::MASKED != 0 {
            return false;
        }
        // The timer and the error entry have no delivery mode.
        let fixed = matches!(offset, at::LVT_TIMER | at::LVT_ERROR);
        let mode = if fixed { Some(DeliveryMode::Fixed) } else { DeliveryMode::of(entry >> lvt::MODE_SHIFT) };
        let level = (at::LVT_LINT0..=at::LVT_LINT1).contains(&offset) && entry & lvt::LEVEL != 0;
        mode.is_some_and(|mode| {
            self.accept(&Message { vector: entry as u8, mode, dest: self.id, logical: false, level, assert: true })
        })
    }

    /// LINT0 leads to NMIs: the timer is a watchdog (`apic_lvt_nmi_mode`).
    pub fn takes_nmis_at_lint0(&self) -> bool {
        let entry = self.load(at::LVT_LINT0);
        entry & lvt::MASKED == 0 && entry >> lvt::MODE_SHIFT & 7 == DeliveryMode::Nmi as u32
    }

    /// LINT0 rises, but not for the PIC, which is asked. True: it came through.
    pub fn lint0(&self) -> bool {
        self.local(at::LVT_LINT0)
    }

    /// LINT1 rises: the NMI input of a PC, and `KVM_NMI`. True: it came through as an NMI or otherwise.
    pub fn lint1(&self) -> bool {
        self.local(at::LVT_LINT1)
    }

    /// A counter overflowed. The entry masks itself.
    pub fn performance_interrupt(&self) -> bool {
        let accepted = self.local(at::LVT_PERFORMANCE);
        if accepted {
            self.store(at::LVT_PERFORMANCE, self.load(at::LVT_PERFORMANCE) | lvt::MASKED);
        }
        accepted
    }
}

#[cfg(test)]
mod tests;
