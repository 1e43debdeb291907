//! `include/linux/kvm.h` of Linux 2.6.22, written out by hand from that header: `KVM_API_VERSION` 12.
//!
//! Nothing here comes from a header of today or from the code under test.

/// What `KVM_GET_API_VERSION` returns.
pub(crate) const API_VERSION: i32 = 12;
/// For `MemoryRegion::flags`.
pub(crate) const MEM_LOG_DIRTY_PAGES: u32 = 1;
/// `mmap(vcpu_fd)`: `kvm_run`, then the page of port data.
pub(crate) const VCPU_MMAP_SIZE: i32 = 8192;

macro_rules! requests {
    ($($name:ident $number:literal;)*) => {
        /// Request numbers of ioctl(2).
        pub(crate) mod request {
            $(pub(crate) const $name: u32 = $number;)*
            /// All of them.
            pub(crate) const ALL: &[(&str, u32)] = &[$((stringify!($name), $name)),*];
        }
    };
}

requests! {
    // /dev/kvm
    GET_API_VERSION    0xae00;
    CREATE_VM          0xae01;
    GET_MSR_INDEX_LIST 0xc004_ae02;
    CHECK_EXTENSION    0xae03;
    GET_VCPU_MMAP_SIZE 0xae04;
    // VM
    SET_MEMORY_REGION  0x4018_ae40;
    CREATE_VCPU        0xae41;
    GET_DIRTY_LOG      0x4010_ae42;
    SET_MEMORY_ALIAS   0x4020_ae43;
    // vCPU
    RUN                0xae80;
    GET_REGS           0x8090_ae81;
    SET_REGS           0x4090_ae82;
    GET_SREGS          0x8138_ae83;
    SET_SREGS          0x4138_ae84;
    TRANSLATE          0xc018_ae85;
    INTERRUPT          0x4004_ae86;
    DEBUG_GUEST        0x4050_ae87;
    GET_MSRS           0xc008_ae88;
    SET_MSRS           0x4008_ae89;
    SET_CPUID          0x4008_ae8a;
    SET_SIGNAL_MASK    0x4004_ae8b;
    GET_FPU            0x81a0_ae8c;
    SET_FPU            0x41a0_ae8d;
}

/// `kvm_run.exit_reason`.
pub(crate) mod exit_reason {
    pub(crate) const UNKNOWN: u32 = 0;
    pub(crate) const EXCEPTION: u32 = 1;
    pub(crate) const IO: u32 = 2;
    pub(crate) const HYPERCALL: u32 = 3;
    pub(crate) const DEBUG: u32 = 4;
    pub(crate) const HLT: u32 = 5;
    pub(crate) const MMIO: u32 = 6;
    pub(crate) const IRQ_WINDOW_OPEN: u32 = 7;
    pub(crate) const SHUTDOWN: u32 = 8;
    pub(crate) const FAIL_ENTRY: u32 = 9;
    pub(crate) const INTR: u32 = 10;
}

/// Byte offsets in `kvm_run`.
pub(crate) mod run {
    /// in, u8
    pub(crate) const REQUEST_INTERRUPT_WINDOW: usize = 0;
    /// out, u32
    pub(crate) const EXIT_REASON: usize = 8;
    /// out, u8
    pub(crate) const READY_FOR_INTERRUPT_INJECTION: usize = 12;
    /// out, u8
    pub(crate) const IF_FLAG: usize = 13;
    /// in and out, u64
    pub(crate) const CR8: usize = 16;
    /// out, u64
    pub(crate) const APIC_BASE: usize = 24;
    /// `hw.hardware_exit_reason`, `fail_entry.hardware_entry_failure_reason`: u64
    pub(crate) const HARDWARE_REASON: usize = 32;
    /// `ex`: u32 exception, u32 error_code
    pub(crate) const EXCEPTION: usize = 32;
    /// `io`: u8 direction (1: out), u8 size, u16 port, u32 count, u64 data_offset
    pub(crate) const IO_DIRECTION: usize = 32;
    pub(crate) const IO_SIZE: usize = 33;
    pub(crate) const IO_PORT: usize = 34;
    pub(crate) const IO_COUNT: usize = 36;
    pub(crate) const IO_DATA_OFFSET: usize = 40;
    /// `mmio`: u64 phys_addr, u8 data[8], u32 len, u8 is_write
    pub(crate) const MMIO_PHYS_ADDR: usize = 32;
    pub(crate) const MMIO_DATA: usize = 40;
    pub(crate) const MMIO_LEN: usize = 48;
    pub(crate) const MMIO_IS_WRITE: usize = 52;
    /// `hypercall`: u64 args[6], u64 ret, u32 longmode
    pub(crate) const HYPERCALL_ARGS: usize = 32;
    pub(crate) const HYPERCALL_RET: usize = 80;
    pub(crate) const HYPERCALL_LONGMODE: usize = 88;
}

/// `struct kvm_memory_region`
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct MemoryRegion {
    pub(crate) slot: u32,
    pub(crate) flags: u32,
    pub(crate) guest_phys_addr: u64,
    pub(crate) memory_size: u64,
}

/// `struct kvm_memory_alias`
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct MemoryAlias {
    pub(crate) slot: u32,
    pub(crate) flags: u32,
    pub(crate) guest_phys_addr: u64,
    pub(crate) memory_size: u64,
    pub(crate) target_phys_addr: u64,
}

/// `struct kvm_dirty_log`
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct DirtyLog {
    pub(crate) slot: u32,
    pub(crate) padding: u32,
    pub(crate) dirty_bitmap: *mut u64,
}

/// `struct kvm_regs`
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Regs {
    pub(crate) rax: u64,
    pub(crate) rbx: u64,
    pub(crate) rcx: u64,
    pub(crate) rdx: u64,
    pub(crate) rsi: u64,
    pub(crate) rdi: u64,
    pub(crate) rsp: u64,
    pub(crate) rbp: u64,
    pub(crate) r8_to_r15: [u64; 8],
    pub(crate) rip: u64,
    pub(crate) rflags: u64,
}

/// `struct kvm_segment`
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Segment {
    pub(crate) base: u64,
    pub(crate) limit: u32,
    pub(crate) selector: u16,
    pub(crate) typ: u8,
    pub(crate) present: u8,
    pub(crate) dpl: u8,
    pub(crate) db: u8,
    pub(crate) s: u8,
    pub(crate) l: u8,
    pub(crate) g: u8,
    pub(crate) avl: u8,
    pub(crate) unusable: u8,
    pub(crate) padding: u8,
}

/// `struct kvm_dtable`
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Dtable {
    pub(crate) base: u64,
    pub(crate) limit: u16,
    pub(crate) padding: [u16; 3],
}

/// `struct kvm_sregs`
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Sregs {
    pub(crate) cs: Segment,
    pub(crate) ds: Segment,
    pub(crate) es: Segment,
    pub(crate) fs: Segment,
    pub(crate) gs: Segment,
    pub(crate) ss: Segment,
    pub(crate) tr: Segment,
    pub(crate) ldt: Segment,
    pub(crate) gdt: Dtable,
    pub(crate) idt: Dtable,
    pub(crate) cr0: u64,
    pub(crate) cr2: u64,
    pub(crate) cr3: u64,
    pub(crate) cr4: u64,
    pub(crate) cr8: u64,
    pub(crate) efer: u64,
    pub(crate) apic_base: u64,
    pub(crate) interrupt_bitmap: [u64; 4],
}

/// `struct kvm_fpu`
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Fpu {
    pub(crate) fpr: [[u8; 16]; 8],
    pub(crate) fcw: u16,
    pub(crate) fsw: u16,
    pub(crate) ftwx: u8,
    pub(crate) pad1: u8,
    pub(crate) last_opcode: u16,
    pub(crate) last_ip: u64,
    pub(crate) last_dp: u64,
    pub(crate) xmm: [[u8; 16]; 16],
    pub(crate) mxcsr: u32,
    pub(crate) pad2: u32,
}

/// `struct kvm_msr_entry`
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct MsrEntry {
    pub(crate) index: u32,
    pub(crate) reserved: u32,
    pub(crate) data: u64,
}

/// `struct kvm_msrs`
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Msrs<const N: usize> {
    pub(crate) nmsrs: u32,
    pub(crate) pad: u32,
    pub(crate) entries: [MsrEntry; N],
}

/// `struct kvm_msr_list`
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct MsrList<const N: usize> {
    pub(crate) nmsrs: u32,
    pub(crate) indices: [u32; N],
}

/// `struct kvm_translation`
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Translation {
    pub(crate) linear_address: u64,
    pub(crate) physical_address: u64,
    pub(crate) valid: u8,
    pub(crate) writeable: u8,
    pub(crate) usermode: u8,
    pub(crate) pad: [u8; 5],
}

/// `struct kvm_breakpoint`
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Breakpoint {
    pub(crate) enabled: u32,
    pub(crate) padding: u32,
    pub(crate) address: u64,
}

/// `struct kvm_debug_guest`
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct DebugGuest {
    pub(crate) enabled: u32,
    pub(crate) pad: u32,
    pub(crate) breakpoints: [Breakpoint; 4],
    pub(crate) singlestep: u32,
    /// The compiler's on x86-64.
    pub(crate) tail: u32,
}

/// `struct kvm_cpuid_entry`
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct CpuidEntry {
    pub(crate) function: u32,
    pub(crate) eax: u32,
    pub(crate) ebx: u32,
    pub(crate) ecx: u32,
    pub(crate) edx: u32,
    pub(crate) padding: u32,
}

/// `struct kvm_cpuid`
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Cpuid<const N: usize> {
    pub(crate) nent: u32,
    pub(crate) padding: u32,
    pub(crate) entries: [CpuidEntry; N],
}

/// `struct kvm_signal_mask` and the kernel's `sigset_t`.
#[derive(Clone, Copy)]
#[repr(C, packed)]
pub(crate) struct SignalMask {
    pub(crate) len: u32,
    pub(crate) sigset: u64,
}

/// `_IOC_SIZE`: the size of the structure that the number names.
const fn encoded(request: u32) -> usize {
    (request as usize >> 16) & 0x3fff
}

const _: () = {
    assert!(size_of::<MemoryRegion>() == encoded(request::SET_MEMORY_REGION));
    assert!(size_of::<MemoryAlias>() == encoded(request::SET_MEMORY_ALIAS));
    assert!(size_of::<DirtyLog>() == encoded(request::GET_DIRTY_LOG));
    assert!(size_of::<Regs>() == encoded(request::GET_REGS));
    assert!(size_of::<Regs>() == encoded(request::SET_REGS));
    assert!(size_of::<Sregs>() == encoded(request::GET_SREGS));
    assert!(size_of::<Sregs>() == encoded(request::SET_SREGS));
    assert!(size_of::<Translation>() == encoded(request::TRANSLATE));
    assert!(size_of::<DebugGuest>() == encoded(request::DEBUG_GUEST));
    assert!(size_of::<Msrs<0>>() == encoded(request::GET_MSRS));
    assert!(size_of::<Msrs<0>>() == encoded(request::SET_MSRS));
    assert!(size_of::<MsrList<0>>() == encoded(request::GET_MSR_INDEX_LIST));
    assert!(size_of::<Cpuid<0>>() == encoded(request::SET_CPUID));
    assert!(size_of::<SignalMask>() == encoded(request::SET_SIGNAL_MASK) + 8);
    assert!(size_of::<Fpu>() == encoded(request::GET_FPU));
    assert!(size_of::<Fpu>() == encoded(request::SET_FPU));
};
