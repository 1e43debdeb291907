//! What the core asks of the machine around it. `crates/kvm` answers; tests bring a replayable fake.

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
