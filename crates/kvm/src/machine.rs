//! The machine around a CPU: its time-stamp counter and the MSRs of a local APIC that user space emulates.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use cpu_core::{HostPlatform, Hypercall, Kick, MsrRefusal, Platform};
use kvm_abi::consts::{
    KVM_X86_QUIRK_FIX_HYPERCALL_INSN, KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT, KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS,
};
use mmu::{DirtyRing, View};
use parking_lot::Mutex;
use x86_defs::msr::{self, apic_base, misc_enable};

use crate::chip::VcpuApic;
use crate::cpuid;
use crate::era::Era;
use crate::exit;
use crate::hyperv::{self, VcpuHyperv};
use crate::kvmclock::{PvTime, VmClock};
use crate::mce::Mce;
use crate::msr::{self as msrs, Bank, is_apic_base};
use crate::options::Options;
use crate::paravirt::{self, Paravirt};
use crate::processors::Processors;

/// Fraction bits of the TSC ratio, as VMX's multiplier has.
const RATIO_BITS: u32 = 48;
const RATIO_ONE: u64 = 1 << RATIO_BITS;

/// A counter whose rate is asked to differ from the host's by no more is the host's: in millionths (`tsc_tolerance_ppm` in
/// x86.c). A VM that has moved here comes with the rate that was measured where it was.
const TOLERANCE_PPM: u64 = 250;

/// The host's time-stamp counter, kHz. Measured once, over 4 ms: reading both clocks takes tens of ns, so to about 10 ppm.
pub(crate) fn host_tsc_khz() -> u32 {
    static KHZ: OnceLock<u32> = OnceLock::new();
    *KHZ.get_or_init(|| {
        let (start, from) = both_clocks();
        std::thread::sleep(Duration::from_millis(4));
        let (end, to) = both_clocks();
        (u128::from(to - from) * 1_000_000 / (end - start).as_nanos()).try_into().unwrap_or(u32::MAX)
    })
}

/// The system's clock and the counter in one moment: the closest of some readings, for between the two a thread may lose its
/// CPU.
fn both_clocks() -> (Instant, u64) {
    let read = || {
        let (before, now, after) = (host_tsc(), Instant::now(), host_tsc());
        (after.wrapping_sub(before), now, before)
    };
    let (_, now, tsc) = (0..16).map(|_| read()).min_by_key(|(gap, ..)| *gap).expect("some readings");
    (now, tsc)
}

/// Guest's counts to one of the host's, for a counter of `khz`.
fn tsc_ratio(khz: u32, host: u32) -> u64 {
    let (khz, host) = (u64::from(khz), u64::from(host));
    let lowest = host * (1_000_000 - TOLERANCE_PPM) / 1_000_000;
    let highest = host * (1_000_000 + TOLERANCE_PPM) / 1_000_000;
    if (lowest..=highest).contains(&khz) {
        return RATIO_ONE;
    }
    let ratio = (u128::from(khz) << RATIO_BITS) / u128::from(host);
    u64::try_from(ratio).expect("`checked_tsc_khz` bounds the rate")
}

/// A rate that a guest's counter can have; 0 is the host's.
pub(crate) fn checked_tsc_khz(khz: u32) -> Option<u32> {
    let host = host_tsc_khz();
    let khz = if khz == 0 { host } else { khz };
    (u64::from(khz) < u64::from(host) << 16).then_some(khz)
}

/// The host's time-stamp counter.
pub(crate) fn host_tsc() -> u64 {
    HostPlatform::default().tsc()
}

/// Keeps the counters of a VM's vCPUs together when they are written one after the other, as `kvm_synchronize_tsc` does.
#[derive(Clone, Default)]
pub(crate) struct Clock(Arc<Mutex<Option<Written>>>);

/// The last write of a time-stamp counter.
#[derive(Clone, Copy)]
struct Written {
    value: u64,
    /// Scaled host counter at that time.
    at: u64,
    ratio: u64,
}

impl Clock {
    /// The offset for a counter that shall read `value`, when the scaled host counter reads `now`. 0, and what comes within
    /// a second of what another vCPU's counter reads, means: as that one.
    fn offset(&self, value: u64, now: u64, ratio: u64, second: u64) -> u64 {
        let mut last = self.0.lock();
        if let Some(written) = *last
            && written.ratio == ratio
        {
            let others = written.value.wrapping_add(now.wrapping_sub(written.at));
            if value == 0 || value.abs_diff(others) < second {
                return written.value.wrapping_sub(written.at);
            }
        }
        *last = Some(Written { value, at: now, ratio });
        value.wrapping_sub(now)
    }

    /// User space has given a counter this offset: what others are given is compared with it.
    fn offset_given(&self, offset: u64, now: u64, ratio: u64) {
        *self.0.lock() = Some(Written { value: now.wrapping_add(offset), at: now, ratio });
    }
}

/// State that the core's platform and the API's handlers share. Only the thread that holds the vCPU writes it.
pub(crate) struct Machine {
    clock: Clock,
    pub(crate) processors: Arc<Processors>,
    pub(crate) options: Arc<Options>,
    pub(crate) era: Era,
    /// Guest's TSC = host's × ratio + offset.
    tsc_ratio: AtomicU64,
    tsc_offset: AtomicU64,
    tsc_khz: AtomicU64,
    /// IA32_APIC_BASE. Written by [`Machine::set_apic_base`].
    pub(crate) apic_base: AtomicU64,
    /// MAXPHYADDR.
    pub(crate) phys_bits: AtomicU8,
    /// Machine-check banks.
    pub(crate) mce: Mutex<Mce>,
    /// The guest has written what its CPUID follows: it is loaded anew before the next instruction.
    pub(crate) cpuid_is_stale: AtomicBool,
    /// The guest's CPUID has x2APIC.
    pub(crate) x2apic: AtomicBool,
    /// The guest's CPUID has SSE3.
    pub(crate) sse3: AtomicBool,
    /// The guest's CPUID has IA32_TSC_ADJUST: without it writes are ignored.
    pub(crate) tsc_adjust: AtomicBool,
    /// The guest's CPUID has IA32_ARCH_CAPABILITIES.
    pub(crate) arch_capabilities: AtomicBool,
    /// The local APIC, if it is not user space's.
    apic: OnceLock<VcpuApic>,
    /// The paravirtual clock.
    pub(crate) time: PvTime,
    /// Other services of KVM to its guests.
    pub(crate) pv: Paravirt,
    /// What there is of Hyper-V's interface, beside the VM's.
    pub(crate) hyperv: VcpuHyperv,
    /// Brings the vCPU's owner back from the guest.
    kick: OnceLock<Arc<Kick>>,
    /// Where pages go that the vCPU writes, if user space wants to know that way.
    ring: OnceLock<Arc<DirtyRing>>,
    /// MSRs without a meaning of their own here.
    pub(crate) msrs: Bank,
}

impl Machine {
    /// After reset; `bsp`: bootstrap processor.
    pub(crate) fn new(
        clock: Clock,
        time: Arc<VmClock>,
        processors: Arc<Processors>,
        options: Arc<Options>,
        bsp: bool,
        era: Era,
    ) -> Self {
        let khz = options.tsc_khz();
        let machine = Self {
            clock,
            processors,
            options,
            era,
            tsc_ratio: AtomicU64::new(RATIO_ONE),
            tsc_offset: AtomicU64::new(0),
            tsc_khz: AtomicU64::new(host_tsc_khz().into()),
            apic_base: AtomicU64::new(apic_base::DEFAULT | apic_base::EN | if bsp { apic_base::BSP } else { 0 }),
            phys_bits: AtomicU8::new(crate::cpuid::phys_bits(&[])),
            mce: Mutex::new(Mce::new()),
            cpuid_is_stale: AtomicBool::new(false),
            x2apic: AtomicBool::new(false),
            sse3: AtomicBool::new(false),
            tsc_adjust: AtomicBool::new(false),
            arch_capabilities: AtomicBool::new(false),
            apic: OnceLock::new(),
            time: PvTime::new(time),
            pv: Paravirt::new(),
            hyperv: VcpuHyperv::default(),
            kick: OnceLock::new(),
            ring: OnceLock::new(),
            msrs: Bank::new(),
        };
        if era.resets_misc_enable() {
            machine.msrs.write(msr::IA32_MISC_ENABLE, 0, false).expect("a register of these bits");
        }
        machine.set_tsc_khz(khz);
        machine.set_tsc(0);
        machine
    }

    /// Gives the vCPU its local APIC, once.
    pub(crate) fn set_apic(&self, apic: VcpuApic) {
        assert!(self.apic.set(apic).is_ok(), "a vCPU is made with its APIC");
    }

    /// The local APIC, if it is not user space's.
    pub(crate) fn apic(&self) -> Option<&VcpuApic> {
        self.apic.get()
    }

    /// Tells how the vCPU's owner is brought back, once.
    pub(crate) fn set_kick(&self, kick: Arc<Kick>) {
        assert!(self.kick.set(kick).is_ok(), "a vCPU has one core");
    }

    /// Gives the vCPU its dirty ring, once.
    pub(crate) fn set_ring(&self, ring: Arc<DirtyRing>) {
        assert!(self.ring.set(ring).is_ok(), "a vCPU is made with its ring");
    }

    /// The vCPU's dirty ring, if the VM has such.
    pub(crate) fn ring(&self) -> Option<&Arc<DirtyRing>> {
        self.ring.get()
    }

    /// Guest memory of address space 0 for what is written there on behalf of this vCPU: pages that become dirty are its own.
    pub(crate) fn memory(&self) -> View {
        let mut view = View::new(self.options.hyperv.memory());
        view.set_ring(self.ring().cloned());
        view
    }

    /// The guest has changed what the loop of `KVM_RUN` sees to before the next instruction.
    pub(crate) fn come_back(&self) {
        if let Some(kick) = self.kick.get() {
            kick.kick();
        }
    }

    /// What the core asks.
    pub(crate) fn platform(self: &Arc<Self>) -> Box<dyn Platform> {
        Box::new(VcpuPlatform(self.clone()))
    }

    fn scaled(&self) -> u64 {
        self.scaled_at(host_tsc())
    }

    fn scaled_at(&self, host_tsc: u64) -> u64 {
        match self.tsc_ratio.load(Relaxed) {
            RATIO_ONE => host_tsc,
            ratio => ((u128::from(host_tsc) * u128::from(ratio)) >> RATIO_BITS) as u64,
        }
    }

    /// The guest's counter.
    pub(crate) fn tsc(&self) -> u64 {
        self.tsc_at(host_tsc())
    }

    /// What it reads when the host's is this.
    pub(crate) fn tsc_at(&self, host_tsc: u64) -> u64 {
        self.scaled_at(host_tsc).wrapping_add(self.tsc_offset.load(Relaxed))
    }

    fn set_tsc_offset(&self, offset: u64) {
        self.tsc_offset.store(offset, Relaxed);
        self.time.counter_changed();
        self.options.hyperv.time_changed();
    }

    /// `KVM_VCPU_TSC_OFFSET`
    pub(crate) fn tsc_offset(&self) -> u64 {
        self.tsc_offset.load(Relaxed)
    }

    /// See [`Self::tsc_offset`].
    pub(crate) fn give_tsc_offset(&self, offset: u64) {
        self.clock.offset_given(offset, self.scaled(), self.tsc_ratio.load(Relaxed));
        self.set_tsc_offset(offset);
    }

    /// User space writes the counter.
    pub(crate) fn set_tsc(&self, value: u64) {
        let second = self.tsc_khz.load(Relaxed) * 1000;
        let offset = self.clock.offset(value, self.scaled(), self.tsc_ratio.load(Relaxed), second);
        self.set_tsc_offset(offset);
    }

    /// Bits of MISC_FEATURES_ENABLES that may be set: CPUID faulting, if MSR_PLATFORM_INFO has it.
    pub(crate) fn misc_features(&self) -> u64 {
        let info = self.msrs.read(msr::MSR_PLATFORM_INFO).unwrap_or(0);
        if info & msrs::HAS_CPUID_FAULTING != 0 { msrs::CPUID_FAULTS } else { 0 }
    }

    /// The guest's WRMSR IA32_MISC_ENABLE: what tells of performance monitoring is read-only, one bit of it silently.
    fn guest_sets_misc_enable(&self, value: u64) -> Option<()> {
        const READ_ONLY: u64 = misc_enable::BTS_UNAVAIL | misc_enable::PEBS_UNAVAIL;
        let old = self.msrs.read(msr::IA32_MISC_ENABLE)?;
        if (old ^ value) & READ_ONLY != 0 {
            return None;
        }
        self.set_misc_enable(value & !misc_enable::EMON | old & misc_enable::EMON)
    }

    /// CPUID's MONITOR bit follows the MWAIT bit, and needs SSE3, where `KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT` is off.
    pub(crate) fn set_misc_enable(&self, value: u64) -> Option<()> {
        let old = self.msrs.read(msr::IA32_MISC_ENABLE)?;
        if (old ^ value) & misc_enable::MWAIT != 0 && !self.options.has_quirk(KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT) {
            if !self.sse3.load(Relaxed) {
                return None;
            }
            self.cpuid_is_stale.store(true, Relaxed);
            self.come_back();
        }
        self.msrs.write(msr::IA32_MISC_ENABLE, value, false)
    }

    /// `KVM_GET_TSC_KHZ`: as it was asked for.
    pub(crate) fn tsc_khz(&self) -> u32 {
        self.tsc_khz.load(Relaxed) as u32
    }

    /// How fast the counter really counts, kHz.
    pub(crate) fn counted_khz(&self) -> u32 {
        if self.tsc_ratio.load(Relaxed) == RATIO_ONE { host_tsc_khz() } else { self.tsc_khz() }
    }

    /// `KVM_SET_TSC_KHZ`: the counter goes on from where it is at another rate. False: out of range.
    pub(crate) fn set_tsc_khz(&self, khz: u32) -> bool {
        let host = host_tsc_khz();
        let Some(khz) = checked_tsc_khz(khz) else { return false };
        let now = self.tsc();
        self.tsc_ratio.store(tsc_ratio(khz, host), Relaxed);
        self.tsc_khz.store(khz.into(), Relaxed);
        self.set_tsc_offset(now.wrapping_sub(self.scaled()));
        true
    }
}

/// The core's side of a [`Machine`].
struct VcpuPlatform(Arc<Machine>);

impl Platform for VcpuPlatform {
    fn tsc(&mut self) -> u64 {
        self.0.tsc()
    }

    /// IA32_TSC_ADJUST changes by as much as the counter. SDM Vol. 3 "IA32_TSC_ADJUST MSR".
    fn set_tsc(&mut self, value: u64) {
        let (old, new) = (self.0.tsc_offset.load(Relaxed), value.wrapping_sub(self.0.scaled()));
        let adjust = self.0.msrs.read(msr::IA32_TSC_ADJUST).unwrap_or(0).wrapping_add(new.wrapping_sub(old));
        self.0.msrs.write(msr::IA32_TSC_ADJUST, adjust, true).expect("a register of all bits");
        self.0.set_tsc_offset(new);
        self.0.come_back();
    }

    fn random(&mut self) -> u64 {
        HostPlatform::default().random()
    }

    fn cr8_written(&mut self, old: u64, value: u64) -> bool {
        self.0.guest_sets_tpr(old, value)
    }

    fn read_msr(&mut self, index: u32) -> Option<u64> {
        match index {
            msr::IA32_APIC_BASE => Some(self.0.apic_base.load(Relaxed)),
            msr::IA32_ARCH_CAPABILITIES if !self.0.arch_capabilities.load(Relaxed) => None,
            msr::MSR_PLATFORM_INFO if !self.0.options.shows_platform_info.load(Relaxed) => None,
            msr::IA32_TSC_DEADLINE | msr::IA32_X2APIC_BASE..=msr::IA32_X2APIC_LAST => self.0.read_apic_msr(index),
            _ if Mce::has(index) => self.0.mce.lock().read(index, true),
            _ => {
                let held = self.0.msrs.read(index).or_else(|| self.0.read_pv_msr(index));
                let held = held.or_else(|| self.0.read_hyperv_msr(index, true));
                held.or_else(|| msrs::constant_of(self.0.era, index))
            }
        }
    }

    fn knows_msr(&mut self, index: u32) -> bool {
        matches!(index, msr::IA32_APIC_BASE | msr::IA32_TSC_DEADLINE | msr::IA32_X2APIC_BASE..=msr::IA32_X2APIC_LAST)
            || Mce::has(index)
            || self.0.msrs.read(index).is_some()
            || paravirt::indices().chain(hyperv::indices()).any(|known| known == index)
    }

    fn allows_msr(&mut self, index: u32, write: bool) -> bool {
        self.0.options.msr_filter.allows(index, write)
    }

    fn wants_msr_exit(&mut self, index: u32, write: bool, refusal: MsrRefusal) -> bool {
        exit::msr::is_xen_page(&self.0.options.xen, index, write, refusal)
            || self.0.options.exits_on_msr(exit::msr::reason(refusal))
    }

    fn watches_pauses(&mut self) -> Option<u64> {
        let wanted = self.0.era.has_pause_exits() && self.0.processors.are_short();
        (wanted && !self.0.options.keeps_pauses.load(Relaxed)).then(host_tsc)
    }

    fn cpuid_faults(&mut self) -> bool {
        self.0.msrs.read(msr::MISC_FEATURES_ENABLES).is_some_and(|value| value & msrs::CPUID_FAULTS != 0)
    }

    fn mwait_needs_cpuid(&mut self) -> bool {
        !self.0.options.has_quirk(KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS)
    }

    fn hypercall(&mut self, amd: bool) -> Hypercall {
        if amd == cpuid::host_is_amd() || self.0.era.has_one_hypercall() {
            Hypercall::Native
        } else if self.0.options.has_quirk(KVM_X86_QUIRK_FIX_HYPERCALL_INSN) {
            Hypercall::Patched
        } else {
            Hypercall::Undefined
        }
    }

    /// The guest may move and disable its APIC; x2APIC mode needs one in the kernel.
    fn write_msr(&mut self, index: u32, value: u64) -> Option<()> {
        match index {
            // It takes more than there is here.
            _ if self.0.options.xen.is_msr(index) => return None,
            msr::IA32_APIC_BASE if !is_apic_base(&self.0, value) => return None,
            msr::IA32_APIC_BASE => return self.0.guest_sets_apic_base(value),
            msr::IA32_TSC_DEADLINE | msr::IA32_X2APIC_BASE..=msr::IA32_X2APIC_LAST => {
                return self.0.write_apic_msr(index, value);
            }
            msr::IA32_TSC_ADJUST if !self.0.tsc_adjust.load(Relaxed) => {}
            // Moves the counter by as much as it changes.
            msr::IA32_TSC_ADJUST => {
                let change = value.wrapping_sub(self.0.msrs.read(index)?);
                self.0.set_tsc_offset(self.0.tsc_offset.load(Relaxed).wrapping_add(change));
                self.0.come_back();
                return self.0.msrs.write(index, value, true);
            }
            msr::IA32_MISC_ENABLE if self.0.era.checks_misc_enable() => return self.0.guest_sets_misc_enable(value),
            msr::MISC_FEATURES_ENABLES if value & !self.0.misc_features() != 0 => return None,
            _ if Mce::has(index) => return self.0.mce.lock().write(index, value, true),
            _ if self.0.write_pv_msr(index, value).is_some() => {}
            _ if self.0.write_hyperv_msr(index, value, true).is_some() => {}
            _ if msrs::constant_of(self.0.era, index).is_some() => {}
            _ => return self.0.msrs.write(index, value, true),
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_written_together_stay_together() {
        let clock = Clock::default();
        assert_eq!(clock.offset(1000, 5_000, RATIO_ONE, 100), 1000u64.wrapping_sub(5000));
        // The next vCPU is given the same value a little later.
        assert_eq!(clock.offset(1000, 5_050, RATIO_ONE, 100), 1000u64.wrapping_sub(5000));
        // Or zero, which asks for no value of its own.
        assert_eq!(clock.offset(0, 9_999, RATIO_ONE, 100), 1000u64.wrapping_sub(5000));
        // Far off is meant.
        assert_eq!(clock.offset(77_000, 9_999, RATIO_ONE, 100), 77_000 - 9_999);
    }

    /// `kvm_set_tsc_khz` and `set_tsc_khz` in x86.c.
    #[test]
    fn the_ratio_is_that_of_the_rates() {
        let counts = |khz| (u128::from(tsc_ratio(khz, 2_400_000)) * 2_400_000_000) >> RATIO_BITS;
        assert_eq!(
            [1_200_000, 4_800_000, 2_399_000, 1].map(counts),
            [1_200_000_000, 4_800_000_000, 2_398_999_999, 999]
        );
        // Within 250 ppm it is the host's.
        assert_eq!([2_399_400, 2_400_600, 2_399_999].map(counts), [2_400_000_000; 3]);
        assert_eq!([2_399_399, 2_400_601].map(counts), [2_399_398_999, 2_400_600_999]);
    }

    #[test]
    fn another_rate_goes_on_from_where_the_counter_is() {
        let time = VmClock::new();
        let options = Arc::new(Options::new(Arc::new(mmu::Memory::new()), time.clone()));
        let machine = Machine::new(Clock::default(), time, Arc::default(), options, true, Era::Modern);
        let before = machine.tsc();
        assert!(machine.set_tsc_khz(host_tsc_khz() / 2));
        let after = machine.tsc();
        assert!(after >= before && after - before < 1_000_000_000, "{before} {after}");
        assert_eq!((machine.tsc_khz(), machine.counted_khz()), (host_tsc_khz() / 2, host_tsc_khz() / 2));
        let counts = machine.tsc_at(2_000_000_000) - machine.tsc_at(1_000_000_000);
        assert!(counts.abs_diff(500_000_000) < 1_000, "{counts}");
        // What another machine has measured of the same counter.
        assert!(machine.set_tsc_khz(host_tsc_khz() + host_tsc_khz() / 10_000));
        assert_eq!(machine.tsc_at(2_000_000_000) - machine.tsc_at(1_000_000_000), 1_000_000_000);
        assert!(machine.tsc_khz() > host_tsc_khz() && machine.counted_khz() == host_tsc_khz());
        assert!(machine.set_tsc_khz(0));
        assert_eq!(machine.tsc_khz(), host_tsc_khz());
    }
}
