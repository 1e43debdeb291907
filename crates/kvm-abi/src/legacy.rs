//! What `include/linux/kvm.h` of Linux 2.6.22 had and today's header lacks.
//!
//! The rest of that header still has today's numbers and layouts: exit reasons 0 to 10, `kvm_run` up to byte 96 except
//! for `hypercall`, and every request that is not in this module.

use crate::request::*;

/// The requests of 2.6.22, by file.
pub const REQUESTS: [(&str, &[u32]); 3] = [
    (
        "System",
        &[KVM_GET_API_VERSION, KVM_CREATE_VM, KVM_GET_MSR_INDEX_LIST, KVM_CHECK_EXTENSION, KVM_GET_VCPU_MMAP_SIZE],
    ),
    ("Vm", &[KVM_SET_MEMORY_REGION, KVM_CREATE_VCPU, KVM_GET_DIRTY_LOG, KVM_SET_MEMORY_ALIAS]),
    (
        "Vcpu",
        &[
            KVM_RUN,
            KVM_GET_REGS,
            KVM_SET_REGS,
            KVM_GET_SREGS,
            KVM_SET_SREGS,
            KVM_TRANSLATE,
            KVM_INTERRUPT,
            KVM_DEBUG_GUEST,
            KVM_GET_MSRS,
            KVM_SET_MSRS,
            KVM_SET_CPUID,
            KVM_SET_SIGNAL_MASK,
            KVM_GET_FPU,
            KVM_SET_FPU,
        ],
    ),
];

/// The exit reasons of 2.6.22, numbered from 0: the first ones of today's.
pub const EXIT_REASONS: [&str; 11] = *crate::EXIT_NAMES.first_chunk().unwrap();

/// `KVM_SET_MEMORY_REGION`: RAM that the kernel allocates, reached through mmap of the VM file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct kvm_memory_region {
    /// 0 to 3.
    pub slot: u32,
    /// Bit 0: `KVM_MEM_LOG_DIRTY_PAGES`. Others have no meaning.
    pub flags: u32,
    /// Bytes, a multiple of 4 KiB.
    pub guest_phys_addr: u64,
    /// Bytes, a multiple of 4 KiB; 0 deletes.
    pub memory_size: u64,
}

/// `KVM_SET_MEMORY_ALIAS`: a second address for RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct kvm_memory_alias {
    /// 0 to 3, numbered apart from memory slots.
    pub slot: u32,
    /// No meaning.
    pub flags: u32,
    /// Bytes, a multiple of 4 KiB.
    pub guest_phys_addr: u64,
    /// Bytes, a multiple of 4 KiB; 0 removes.
    pub memory_size: u64,
    /// Bytes; the low 12 bits are dropped.
    pub target_phys_addr: u64,
}

/// One breakpoint of `kvm_debug_guest`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct kvm_breakpoint {
    /// Zero or not.
    pub enabled: u32,
    /// Not looked at.
    pub padding: u32,
    /// Linear address.
    pub address: u64,
}

/// `KVM_DEBUG_GUEST`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct kvm_debug_guest {
    /// Zero switches everything below off.
    pub enabled: u32,
    /// Not looked at.
    pub pad: u32,
    /// Execution breakpoints.
    pub breakpoints: [kvm_breakpoint; 4],
    /// Zero or not.
    pub singlestep: u32,
    /// What the compiler adds on x86-64; on i386 the structure ends before.
    pub pad2: u32,
}

/// Aliases of a 2.6.22 VM.
pub const KVM_ALIAS_SLOTS: u32 = 4;
/// Entries that `KVM_SET_CPUID` takes at most.
pub const KVM_MAX_CPUID_ENTRIES: u32 = 40;

/// Byte offsets of `hypercall` in a 2.6.22 `kvm_run`; today a field `nr` stands before `args`.
pub mod hypercall {
    /// Six `u64`.
    pub const ARGS: usize = 32;
    /// One `u64`.
    pub const RET: usize = 80;
    /// One `u32`.
    pub const LONGMODE: usize = 88;
}
