//! Numbers and layouts of the KVM API of 2007 and of today, no behaviour.
//!
//! Today's structures are those of the crate `kvm-bindings`. [`legacy`] has what `include/linux/kvm.h` of Linux 2.6.22
//! had and today's lacks, [`request`] every request number, [`Plain`] moves structures from and to bytes.

pub mod legacy;
mod plain;
pub mod request;

pub use kvm_bindings::{
    kvm_clock_data, kvm_cpuid, kvm_cpuid_entry, kvm_cpuid_entry2, kvm_cpuid2, kvm_create_device, kvm_debugregs,
    kvm_dirty_log, kvm_dtable, kvm_enable_cap, kvm_fpu, kvm_guest_debug, kvm_interrupt, kvm_irq_routing,
    kvm_irq_routing_entry, kvm_mp_state, kvm_msi, kvm_msr_entry, kvm_msr_list, kvm_msrs, kvm_nested_state, kvm_regs,
    kvm_run, kvm_segment, kvm_signal_mask, kvm_sregs, kvm_sregs2, kvm_translation, kvm_userspace_memory_region,
    kvm_vcpu_events, kvm_x86_mce, kvm_xcrs, kvm_xen_hvm_config, kvm_xsave,
};
pub use plain::{
    ClearDirtyLog, DeviceAttr, DirtyLog, MsrFilter, MsrFilterRange, Plain, XenAttr, kvm_coalesced_mmio_zone,
};

/// Capabilities, exit reasons, flags: the constants of today's header under their own names.
pub mod consts {
    pub use kvm_bindings::*;
}

/// `KVM_API_VERSION`: 12 since 2.6.22.
pub const KVM_API_VERSION: i32 = kvm_bindings::KVM_API_VERSION as i32;

/// `KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL`, which the bindings lack.
pub const KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL: u32 = u32::MAX;

/// Vectors that `KVM_INTERRUPT` accepts are below this.
pub const KVM_NR_INTERRUPTS: u32 = 256;

/// Names of `kvm_run.exit_reason`, numbered from 0, without `KVM_EXIT_`.
pub const EXIT_NAMES: [&str; 32] = [
    "UNKNOWN",
    "EXCEPTION",
    "IO",
    "HYPERCALL",
    "DEBUG",
    "HLT",
    "MMIO",
    "IRQ_WINDOW_OPEN",
    "SHUTDOWN",
    "FAIL_ENTRY",
    "INTR",
    "SET_TPR",
    "TPR_ACCESS",
    "S390_SIEIC",
    "S390_RESET",
    "DCR",
    "NMI",
    "INTERNAL_ERROR",
    "OSI",
    "PAPR_HCALL",
    "S390_UCONTROL",
    "WATCHDOG",
    "S390_TSCH",
    "EPR",
    "SYSTEM_EVENT",
    "S390_STSI",
    "IOAPIC_EOI",
    "HYPERV",
    "ARM_NISV",
    "X86_RDMSR",
    "X86_WRMSR",
    "DIRTY_RING_FULL",
];
