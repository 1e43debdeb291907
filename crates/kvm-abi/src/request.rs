//! Request numbers. `asm-generic/ioctl.h`: direction in bits 31:30, size in 29:16, type in 15:8, number in 7:0.

use kvm_bindings::*;

use crate::legacy::{kvm_debug_guest, kvm_memory_alias, kvm_memory_region};

/// The type of all of KVM's requests.
pub const KVMIO: u32 = 0xae;

/// No argument, or a number passed by value.
pub const NONE: u32 = 0;
/// The kernel reads the argument.
pub const WRITE: u32 = 1;
/// The kernel writes the argument.
pub const READ: u32 = 2;

/// A request number from its parts; `size` in bytes, below 16384.
pub const fn ioc(direction: u32, nr: u8, size: usize) -> u32 {
    assert!(size < 1 << 14);
    direction << 30 | (size as u32) << 16 | KVMIO << 8 | nr as u32
}

/// Bytes that the kernel moves between `arg` and itself.
pub const fn size(request: u32) -> usize {
    (request >> 16 & 0x3fff) as usize
}

/// `READ`, `WRITE`, both or neither.
pub const fn direction(request: u32) -> u32 {
    request >> 30
}

macro_rules! requests {
    ($($name:ident = $kind:ident $nr:literal $($arg:ty)?;)*) => {
        $( #[doc = concat!("`", stringify!($name), "`")] pub const $name: u32 = requests!(@$kind $nr $($arg)?); )*

        /// Every request of this module with its name, for traces.
        pub const NAMES: &[(u32, &str)] = &[$(($name, stringify!($name))),*];
    };
    (@io $nr:literal) => { ioc(NONE, $nr, 0) };
    (@ior $nr:literal $arg:ty) => { ioc(READ, $nr, size_of::<$arg>()) };
    (@iow $nr:literal $arg:ty) => { ioc(WRITE, $nr, size_of::<$arg>()) };
    (@iowr $nr:literal $arg:ty) => { ioc(READ | WRITE, $nr, size_of::<$arg>()) };
}

requests! {
    // system
    KVM_GET_API_VERSION = io 0x00;
    KVM_CREATE_VM = io 0x01;
    KVM_GET_MSR_INDEX_LIST = iowr 0x02 kvm_msr_list;
    KVM_CHECK_EXTENSION = io 0x03;
    KVM_GET_VCPU_MMAP_SIZE = io 0x04;
    KVM_GET_SUPPORTED_CPUID = iowr 0x05 kvm_cpuid2;
    KVM_GET_EMULATED_CPUID = iowr 0x09 kvm_cpuid2;
    KVM_GET_MSR_FEATURE_INDEX_LIST = iowr 0x0a kvm_msr_list;
    KVM_X86_GET_MCE_CAP_SUPPORTED = ior 0x9d u64;
    // VM
    KVM_SET_MEMORY_REGION = iow 0x40 kvm_memory_region;
    KVM_CREATE_VCPU = io 0x41;
    KVM_GET_DIRTY_LOG = iow 0x42 kvm_dirty_log;
    KVM_SET_MEMORY_ALIAS = iow 0x43 kvm_memory_alias;
    KVM_SET_NR_MMU_PAGES = io 0x44;
    KVM_GET_NR_MMU_PAGES = io 0x45;
    KVM_SET_USER_MEMORY_REGION = iow 0x46 kvm_userspace_memory_region;
    KVM_SET_TSS_ADDR = io 0x47;
    KVM_SET_IDENTITY_MAP_ADDR = iow 0x48 u64;
    KVM_CREATE_IRQCHIP = io 0x60;
    KVM_IRQ_LINE = iow 0x61 kvm_irq_level;
    KVM_GET_IRQCHIP = iowr 0x62 kvm_irqchip;
    // It is read; the number says otherwise.
    KVM_SET_IRQCHIP = ior 0x63 kvm_irqchip;
    KVM_IRQ_LINE_STATUS = iowr 0x67 kvm_irq_level;
    KVM_REGISTER_COALESCED_MMIO = iow 0x67 kvm_coalesced_mmio_zone;
    KVM_UNREGISTER_COALESCED_MMIO = iow 0x68 kvm_coalesced_mmio_zone;
    KVM_SET_GSI_ROUTING = iow 0x6a kvm_irq_routing;
    KVM_REINJECT_CONTROL = io 0x71;
    KVM_IRQFD = iow 0x76 kvm_irqfd;
    KVM_CREATE_PIT2 = iow 0x77 kvm_pit_config;
    KVM_IOEVENTFD = iow 0x79 kvm_ioeventfd;
    KVM_SET_CLOCK = iow 0x7b kvm_clock_data;
    KVM_GET_CLOCK = ior 0x7c kvm_clock_data;
    KVM_GET_PIT2 = ior 0x9f kvm_pit_state2;
    KVM_SET_PIT2 = iow 0xa0 kvm_pit_state2;
    KVM_ENABLE_CAP = iow 0xa3 kvm_enable_cap;
    KVM_CLEAR_DIRTY_LOG = iowr 0xc0 kvm_clear_dirty_log;
    KVM_RESET_DIRTY_RINGS = io 0xc7;
    KVM_SIGNAL_MSI = iow 0xa5 kvm_msi;
    KVM_XEN_HVM_CONFIG = iow 0x7a kvm_xen_hvm_config;
    KVM_XEN_HVM_EVTCHN_SEND = iow 0xd0 kvm_irq_routing_xen_evtchn;
    KVM_XEN_HVM_GET_ATTR = iowr 0xc8 kvm_xen_hvm_attr;
    KVM_XEN_HVM_SET_ATTR = iow 0xc9 kvm_xen_hvm_attr;
    KVM_SET_BOOT_CPU_ID = io 0x78;
    KVM_CREATE_PIT = io 0x64;
    KVM_GET_PIT = iowr 0x65 kvm_pit_state;
    KVM_SET_PIT = ior 0x66 kvm_pit_state;
    KVM_SET_PMU_EVENT_FILTER = iow 0xb2 kvm_pmu_event_filter;
    KVM_CREATE_DEVICE = iowr 0xe0 kvm_create_device;
    KVM_X86_SET_MSR_FILTER = iow 0xc6 kvm_msr_filter;
    // vCPU
    KVM_RUN = io 0x80;
    KVM_GET_REGS = ior 0x81 kvm_regs;
    KVM_SET_REGS = iow 0x82 kvm_regs;
    KVM_GET_SREGS = ior 0x83 kvm_sregs;
    KVM_SET_SREGS = iow 0x84 kvm_sregs;
    KVM_TRANSLATE = iowr 0x85 kvm_translation;
    KVM_INTERRUPT = iow 0x86 kvm_interrupt;
    KVM_DEBUG_GUEST = iow 0x87 kvm_debug_guest;
    KVM_GET_MSRS = iowr 0x88 kvm_msrs;
    KVM_SET_MSRS = iow 0x89 kvm_msrs;
    KVM_SET_CPUID = iow 0x8a kvm_cpuid;
    KVM_SET_SIGNAL_MASK = iow 0x8b kvm_signal_mask;
    KVM_GET_FPU = ior 0x8c kvm_fpu;
    KVM_SET_FPU = iow 0x8d kvm_fpu;
    KVM_GET_LAPIC = ior 0x8e kvm_lapic_state;
    KVM_SET_LAPIC = iow 0x8f kvm_lapic_state;
    KVM_SET_CPUID2 = iow 0x90 kvm_cpuid2;
    KVM_GET_CPUID2 = iowr 0x91 kvm_cpuid2;
    KVM_TPR_ACCESS_REPORTING = iowr 0x92 kvm_tpr_access_ctl;
    KVM_SET_VAPIC_ADDR = iow 0x93 kvm_vapic_addr;
    KVM_GET_MP_STATE = ior 0x98 kvm_mp_state;
    KVM_SET_MP_STATE = iow 0x99 kvm_mp_state;
    KVM_NMI = io 0x9a;
    KVM_SMI = io 0xb7;
    KVM_SET_GUEST_DEBUG = iow 0x9b kvm_guest_debug;
    KVM_X86_SETUP_MCE = iow 0x9c u64;
    KVM_X86_SET_MCE = iow 0x9e kvm_x86_mce;
    KVM_GET_VCPU_EVENTS = ior 0x9f kvm_vcpu_events;
    KVM_SET_VCPU_EVENTS = iow 0xa0 kvm_vcpu_events;
    KVM_GET_DEBUGREGS = ior 0xa1 kvm_debugregs;
    KVM_SET_DEBUGREGS = iow 0xa2 kvm_debugregs;
    KVM_SET_TSC_KHZ = io 0xa2;
    KVM_GET_TSC_KHZ = io 0xa3;
    KVM_GET_XSAVE = ior 0xa4 kvm_xsave;
    KVM_SET_XSAVE = iow 0xa5 kvm_xsave;
    KVM_GET_XCRS = ior 0xa6 kvm_xcrs;
    KVM_SET_XCRS = iow 0xa7 kvm_xcrs;
    KVM_KVMCLOCK_CTRL = io 0xad;
    KVM_GET_NESTED_STATE = iowr 0xbe kvm_nested_state;
    KVM_SET_NESTED_STATE = iow 0xbf kvm_nested_state;
    KVM_XEN_VCPU_GET_ATTR = iowr 0xca kvm_xen_vcpu_attr;
    KVM_XEN_VCPU_SET_ATTR = iow 0xcb kvm_xen_vcpu_attr;
    KVM_GET_SREGS2 = ior 0xcc kvm_sregs2;
    KVM_SET_SREGS2 = iow 0xcd kvm_sregs2;
    // The size is that of the first 4 KiB; more may follow.
    KVM_GET_XSAVE2 = ior 0xcf kvm_xsave;
    // several files
    KVM_GET_SUPPORTED_HV_CPUID = iowr 0xc1 kvm_cpuid2;
    KVM_GET_STATS_FD = io 0xce;
    KVM_SET_DEVICE_ATTR = iow 0xe1 kvm_device_attr;
    KVM_GET_DEVICE_ATTR = iow 0xe2 kvm_device_attr;
    KVM_HAS_DEVICE_ATTR = iow 0xe3 kvm_device_attr;
}
