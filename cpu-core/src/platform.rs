//! What the core asks of the machine around it. `crates/kvm` answers; tests bring a replayable fake.

use crate::vmx::MsrRefusal;

/// What becomes of one of the two instructions for a hypercall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hypercall {
    /// It is one.
    Native,
    /// It is the other vendor's: the processor's own is written over it, and runs.
    Patched,
    /// It is the other vendor's: #UD.
    Undefined,
}

/// The machine around one CPU.
pub trait Platform: Send {
    /// Time-stamp counter as the guest reads it, TSC_OFFSET and TSC_ADJUST included.
    fn tsc(&mut self) -> u64;

    /// The guest wrote IA32_TIME_STAMP_COUNTER (or IA32_TSC_ADJUST moved it): it reads `value` now.
    fn set_tsc(&mut self, value: u64);

    /// Random bits for RDRAND and RDSEED.
    fn random(&mut self) -> u64;

    /// An MSR the core itself does not hold (APIC base, x2APIC, paravirtual ones). `None`: no such MSR, #GP(0).
    fn read_msr(&mut self, index: u32) -> Option<u64> {
        let _ = index;
        None
    }

    /// See [`Self::read_msr`]. `None`: no such MSR or a reserved bit, #GP(0).
    fn write_msr(&mut self, index: u32, value: u64) -> Option<()> {
        let _ = (index, value);
        None
    }

    /// [`Self::read_msr`] knows this one, though it may refuse an access.
    fn knows_msr(&mut self, index: u32) -> bool {
        let _ = index;
        false
    }

    /// The guest may read, or write, this MSR. False: #GP(0), whatever it is.
    fn allows_msr(&mut self, index: u32, write: bool) -> bool {
        let _ = (index, write);
        true
    }

    /// A refused access ends in [`crate::Exit::Msr`], not in #GP(0).
    fn wants_msr_exit(&mut self, index: u32, write: bool, refusal: MsrRefusal) -> bool {
        let _ = (index, write, refusal);
        false
    }

    /// CPUID above CPL 0 is #GP(0): IA32_MISC_FEATURES_ENABLES bit 0 is set.
    fn cpuid_faults(&mut self) -> bool {
        false
    }

    /// MONITOR and MWAIT are #UD where CPUID lacks them; else no-ops everywhere.
    fn mwait_needs_cpuid(&mut self) -> bool {
        false
    }

    /// PAUSE-loop exiting is on, for the guest had better leave the processor than spin: the time, in counts of the host's TSC.
    fn watches_pauses(&mut self) -> Option<u64> {
        None
    }

    /// What becomes of VMCALL, or of VMMCALL where `amd`.
    fn hypercall(&mut self, amd: bool) -> Hypercall {
        let _ = amd;
        Hypercall::Native
    }

    /// MOV to CR8 changed it, where a local APIC owns the TPR. True: [`crate::Exit::CrAccess`] follows.
    fn cr8_written(&mut self, old: u64, value: u64) -> bool {
        let _ = (old, value);
        false
    }
}

/// The host's own counter and no devices: enough for tests and for a VM without an in-kernel interrupt controller.
#[derive(Debug, Default)]
pub struct HostPlatform {
    offset: u64,
}

impl Platform for HostPlatform {
    fn tsc(&mut self) -> u64 {
        crate::host::rdtsc().wrapping_add(self.offset)
    }

    fn set_tsc(&mut self, value: u64) {
        self.offset = value.wrapping_sub(crate::host::rdtsc());
    }

    fn random(&mut self) -> u64 {
        crate::host::random()
    }
}
