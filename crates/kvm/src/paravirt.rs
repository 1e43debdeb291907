//! MSRs of KVM's own, and which of its services a guest may use.
//!
//! Documentation/virt/kvm/x86/msr.rst and cpuid.rst. Each service is a bit of CPUID leaf 4000_0001H. Whether the guest's table has
//! it matters only where user space says so (`KVM_CAP_ENFORCE_PV_FEATURE_CPUID`): then an MSR without its bit is none, and a
//! hypercall is unknown.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use kvm_abi::kvm_cpuid_entry2;
use x86_defs::cpuid::{self as bit, Feature};
use x86_defs::msr;

use crate::machine::Machine;
use crate::{cpuid, steal};

/// Bit of an MSR that names a page: the service is on.
pub(crate) const ENABLE: u64 = 1;

/// Each MSR and the service it belongs to.
const MSRS: [(u32, Feature); 7] = [
    (msr::MSR_KVM_WALL_CLOCK, bit::KVM_CLOCKSOURCE),
    (msr::MSR_KVM_SYSTEM_TIME, bit::KVM_CLOCKSOURCE),
    (msr::MSR_KVM_WALL_CLOCK_NEW, bit::KVM_CLOCKSOURCE2),
    (msr::MSR_KVM_SYSTEM_TIME_NEW, bit::KVM_CLOCKSOURCE2),
    (msr::MSR_KVM_STEAL_TIME, bit::KVM_STEAL_TIME),
    (msr::MSR_KVM_PV_EOI_EN, bit::KVM_PV_EOI),
    (msr::MSR_KVM_POLL_CONTROL, bit::KVM_POLL_CONTROL),
];

/// All of them.
pub(crate) fn indices() -> impl Iterator<Item = u32> {
    MSRS.into_iter().map(|(index, _)| index)
}

/// What a vCPU has of them, beside the clock.
pub(crate) struct Paravirt {
    /// EAX of the leaf, where that is enforced; else all bits.
    features: AtomicU32,
    /// `MSR_KVM_STEAL_TIME`
    pub(crate) steal_time: AtomicU64,
    /// `MSR_KVM_PV_EOI_EN`
    pub(crate) pv_eoi: AtomicU64,
    /// `MSR_KVM_POLL_CONTROL`: whether the host should poll before a halted vCPU sleeps. It never does.
    poll_control: AtomicU64,
}

impl Paravirt {
    pub(crate) fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Self { features: AtomicU32::new(u32::MAX), steal_time: zero(), pv_eoi: zero(), poll_control: AtomicU64::new(1) }
    }

    /// The guest may use a service.
    pub(crate) fn allows(&self, feature: Feature) -> bool {
        self.features.load(Relaxed) & feature.mask() != 0
    }

    /// Takes over the guest's table if it is enforced.
    pub(crate) fn enforce(&self, table: Option<&[kvm_cpuid_entry2]>) {
        self.features.store(table.map_or(u32::MAX, cpuid::kvm_features), Relaxed);
    }
}

impl Machine {
    fn has_pv_msr(&self, index: u32) -> bool {
        MSRS.iter().any(|&(number, feature)| number == index && self.pv.allows(feature))
    }

    /// `None`: another MSR, or #GP(0).
    pub(crate) fn read_pv_msr(&self, index: u32) -> Option<u64> {
        if !self.has_pv_msr(index) {
            return None;
        }
        match index {
            msr::MSR_KVM_STEAL_TIME => Some(self.pv.steal_time.load(Relaxed)),
            msr::MSR_KVM_PV_EOI_EN => Some(self.pv.pv_eoi.load(Relaxed)),
            msr::MSR_KVM_POLL_CONTROL => Some(self.pv.poll_control.load(Relaxed)),
            _ => self.time.read_msr(index),
        }
    }

    /// `None`: another MSR, or #GP(0). Pages are written before the guest's next instruction.
    pub(crate) fn write_pv_msr(&self, index: u32, value: u64) -> Option<()> {
        if !self.has_pv_msr(index) {
            return None;
        }
        match index {
            msr::MSR_KVM_STEAL_TIME => {
                if !steal::is_measured() || value & steal::RESERVED != 0 {
                    return None;
                }
                self.pv.steal_time.store(value, Relaxed);
            }
            msr::MSR_KVM_PV_EOI_EN => self.set_pv_eoi(value)?,
            msr::MSR_KVM_POLL_CONTROL if value > 1 => return None,
            msr::MSR_KVM_POLL_CONTROL => self.pv.poll_control.store(value, Relaxed),
            _ => self.time.write_msr(index, value)?,
        }
        self.come_back();
        Some(())
    }

    /// INIT: no page is written any more (`kvm_vcpu_reset`).
    pub(crate) fn reset_pv(&self) {
        self.pv.steal_time.store(0, Relaxed);
        self.pv.pv_eoi.store(0, Relaxed);
        self.time.reset();
    }
}
