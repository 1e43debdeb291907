//! What `softkvm status` shows, and the counters behind it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use kvm_abi::EXIT_NAMES;
use serde::{Deserialize, Serialize};

use crate::clock;
use crate::exit::Reason;

/// Every VM, and the last ones that ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// In order of creation.
    pub vms: Vec<VmStatus>,
    /// Oldest first.
    pub ended: Vec<VmStatus>,
}

/// One VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStatus {
    /// Number, from 1, in order of creation.
    pub id: u64,
    /// Process that made it.
    pub owner_pid: u32,
    /// True once it speaks the API of 2007.
    pub legacy: bool,
    /// Bytes in memory slots.
    pub memory_bytes: u64,
    /// Memory slots in use.
    pub slots: usize,
    /// Milliseconds since it was made, or until it ended.
    pub age_ms: u64,
    /// In order of id.
    pub vcpus: Vec<VcpuStatus>,
}

/// One vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuStatus {
    /// As given to `KVM_CREATE_VCPU`.
    pub id: u32,
    /// Inside `KVM_RUN` now.
    pub running: bool,
    /// Guest instructions, as of the last return from the guest.
    pub instructions: u64,
    /// Nanoseconds in the guest.
    pub run_ns: u64,
    /// By basic exit reason of the SDM.
    pub vmx_exits: BTreeMap<String, u64>,
    /// By `kvm_run.exit_reason`.
    pub kvm_exits: BTreeMap<String, u64>,
}

/// Counters of one vCPU; read by others while it runs.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// What the core counts, as of the last return from the guest.
    pub(crate) core: Arc<cpu_core::Profile>,
    vmx: [AtomicU64; Reason::COUNT],
    kvm: [AtomicU64; EXIT_NAMES.len()],
    /// See [`clock`].
    pub(crate) run_counts: AtomicU64,
    pub(crate) running: AtomicBool,
}

/// Exits by reason, at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Exits {
    vmx: [u64; Reason::COUNT],
    kvm: [u64; EXIT_NAMES.len()],
}

impl Exits {
    /// What came since `before`.
    pub(crate) fn since(&self, before: &Self) -> Self {
        Self {
            vmx: std::array::from_fn(|i| self.vmx[i] - before.vmx[i]),
            kvm: std::array::from_fn(|i| self.kvm[i] - before.kvm[i]),
        }
    }

    /// As two fields of a [`VcpuStatus`]: those that happened, by name.
    pub(crate) fn named(&self) -> VcpuStatus {
        let named = |(name, &count): (&str, &u64)| (count > 0).then(|| (name.to_owned(), count));
        VcpuStatus {
            vmx_exits: Reason::NAMES.into_iter().zip(&self.vmx).filter_map(named).collect(),
            kvm_exits: EXIT_NAMES.into_iter().zip(&self.kvm).filter_map(named).collect(),
            ..VcpuStatus::default()
        }
    }
}

impl Counters {
    /// Nothing yet, with the core's.
    pub(crate) fn new(core: Arc<cpu_core::Profile>) -> Self {
        Self { core, ..Self::default() }
    }

    /// Exits by reason.
    pub(crate) fn all_exits(&self) -> Exits {
        let now = |counter: &AtomicU64| counter.load(Relaxed);
        Exits { vmx: self.vmx.each_ref().map(now), kvm: self.kvm.each_ref().map(now) }
    }

    /// The core came back.
    pub(crate) fn vmx_exit(&self, reason: Reason) {
        self.vmx[reason as usize].fetch_add(1, Relaxed);
    }

    /// `KVM_RUN` returns with this exit reason.
    pub(crate) fn kvm_exit(&self, reason: u32) {
        if let Some(counter) = self.kvm.get(reason as usize) {
            counter.fetch_add(1, Relaxed);
        }
    }

    /// Of one reason.
    pub(crate) fn vmx_exits(&self, reason: Reason) -> u64 {
        self.vmx[reason as usize].load(Relaxed)
    }

    /// Of all reasons.
    pub(crate) fn exits(&self) -> u64 {
        self.vmx.iter().map(|counter| counter.load(Relaxed)).sum()
    }

    /// `KVM_EXIT_…` of that number.
    pub(crate) fn kvm_exits(&self, reason: u32) -> u64 {
        self.kvm.get(reason as usize).map_or(0, |counter| counter.load(Relaxed))
    }

    pub(crate) fn instructions(&self) -> u64 {
        self.core.instructions()
    }

    pub(crate) fn run_ns(&self) -> u64 {
        clock::nanoseconds(self.run_counts.load(Relaxed))
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running.load(Relaxed)
    }

    /// All of it, as of now.
    pub(crate) fn status(&self, id: u32) -> VcpuStatus {
        VcpuStatus {
            id,
            running: self.running.load(Relaxed),
            instructions: self.instructions(),
            run_ns: self.run_ns(),
            ..self.all_exits().named()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_abi::consts::*;

    #[test]
    fn names_stand_at_their_numbers() {
        for (number, name) in [
            (KVM_EXIT_UNKNOWN, "UNKNOWN"),
            (KVM_EXIT_IO, "IO"),
            (KVM_EXIT_HLT, "HLT"),
            (KVM_EXIT_MMIO, "MMIO"),
            (KVM_EXIT_IRQ_WINDOW_OPEN, "IRQ_WINDOW_OPEN"),
            (KVM_EXIT_FAIL_ENTRY, "FAIL_ENTRY"),
            (KVM_EXIT_INTR, "INTR"),
            (KVM_EXIT_INTERNAL_ERROR, "INTERNAL_ERROR"),
        ] {
            assert_eq!(EXIT_NAMES[number as usize], name);
        }
    }

    #[test]
    fn only_what_happened_is_listed() {
        let counters = Counters::default();
        counters.vmx_exit(Reason::Hlt);
        counters.kvm_exit(KVM_EXIT_HLT);
        counters.kvm_exit(12345);
        let status = counters.status(3);
        assert_eq!(status.vmx_exits, BTreeMap::from([("HLT".to_owned(), 1)]));
        assert_eq!(status.kvm_exits, BTreeMap::from([("HLT".to_owned(), 1)]));
    }
}
