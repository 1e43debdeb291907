//! One row per ioctl. Dispatch, names, `KVM_CHECK_EXTENSION` coverage and the README's table come from here.

use kvm_abi::request;
use kvm_abi::{
    ClearDirtyLog, DeviceAttr, DirtyLog, MsrFilter, XenAttr, kvm_clock_data, kvm_coalesced_mmio_zone, kvm_cpuid,
    kvm_cpuid_entry, kvm_cpuid_entry2, kvm_cpuid2, kvm_create_device, kvm_debugregs, kvm_enable_cap, kvm_fpu,
    kvm_guest_debug, kvm_interrupt, kvm_mp_state, kvm_msi, kvm_msr_entry, kvm_msr_list, kvm_msrs, kvm_regs,
    kvm_signal_mask, kvm_sregs, kvm_sregs2, kvm_translation, kvm_userspace_memory_region, kvm_vcpu_events, kvm_x86_mce,
    kvm_xcrs, kvm_xen_hvm_config,
    legacy::{kvm_debug_guest, kvm_memory_alias, kvm_memory_region},
};
use nix::errno::Errno;

use super::plan::{Call, In, InAt, InFam, InNumberedOut, InOut, InOutFam, OptionalFam, Out, Value};
use super::{Caller, Target, attributes, chip, system, vcpu, vm, xen};
use crate::caps::Capability;
use crate::client::Reply;

/// How much of an ioctl there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// All of it.
    Full,
    /// What is missing.
    Partial(&'static str),
}
use Support::{Full, Partial};

/// One ioctl.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// As in the header.
    pub name: &'static str,
    /// The whole number: direction, size, type and number are compared.
    pub request: u32,
    /// `System`, `Vm`, `Vcpu` or `Device`.
    pub file: &'static str,
    /// What `KVM_CHECK_EXTENSION` must offer before clients may rely on it.
    pub capability: Capability,
    /// How much of it there is.
    pub support: Support,
}

macro_rules! ioctls {
    ($($name:ident $nr:literal $file:ident $plan:ty, $capability:ident, $support:expr => $handler:path;)*) => {
        /// Every row, in the table's order.
        pub const ROWS: &[Row] = &[$(Row {
            name: stringify!($name),
            request: request::$name,
            file: stringify!($file),
            capability: Capability::$capability,
            support: $support,
        }),*];

        // A row's number follows from its plan; it must be the header's.
        $( const _: () = assert!(request::$name == <$plan>::request($nr), stringify!($name)); )*

        /// Answers a request; `None` if no row has it.
        pub(crate) fn dispatch(target: Target<'_>, call: &Call<'_>) -> Option<Result<Reply, Errno>> {
            match (call.request, target) {
                $( (request::$name, ioctls!(@pattern $file file)) =>
                    Some(<$plan>::run(ioctls!(@file $file file call), call, $handler)), )*
                _ => None,
            }
        }
    };
    (@pattern System $file:ident) => { Target::System($file) };
    (@pattern Vm $file:ident) => { Target::Vm($file) };
    (@pattern Vcpu $file:ident) => { Target::Vcpu($file) };
    (@pattern Device $file:ident) => { Target::Device($file) };
    (@file Vcpu $file:ident $call:ident) => { $file };
    (@file $kind:ident $file:ident $call:ident) => { &Caller { file: $file, client: $call.client } };
}

// fs/fuse/ioctl.c, fuse_do_ioctl: a file that is not CUSE's own has no unrestricted ioctls, and CUSE's own has no mmap.
const NO_NULL_MASK: Support = Partial(
    "a null pointer, which ends the mask, is EFAULT: the kernel reads 4 bytes there for a file of FUSE before it asks anybody",
);

ioctls! {
    // request                  nr   file   argument                               capability      support => handler
    KVM_GET_API_VERSION        0x00 System Value,                                  Basic,          Full => system::get_api_version;
    KVM_CREATE_VM              0x01 System Value,                                  Basic,          Full => system::create_vm;
    KVM_GET_MSR_INDEX_LIST     0x02 System InOutFam<kvm_msr_list, u32>,            Basic,          Full => system::get_msr_index_list;
    KVM_CHECK_EXTENSION        0x03 System Value,                                  Basic,          Full => system::check_extension;
    KVM_GET_VCPU_MMAP_SIZE     0x04 System Value,                                  Basic,          Full => system::get_vcpu_mmap_size;
    KVM_GET_SUPPORTED_CPUID    0x05 System InOutFam<kvm_cpuid2, kvm_cpuid_entry2>, ExtCpuid,       Full => system::get_supported_cpuid;
    KVM_GET_EMULATED_CPUID     0x09 System InOutFam<kvm_cpuid2, kvm_cpuid_entry2>, ExtEmulCpuid,   Full => system::get_emulated_cpuid;
    KVM_GET_MSR_FEATURE_INDEX_LIST 0x0a System InOutFam<kvm_msr_list, u32>,        GetMsrFeatures, Full => system::get_msr_feature_index_list;
    KVM_GET_MSRS               0x88 System InOutFam<kvm_msrs, kvm_msr_entry>,      GetMsrFeatures, Full => system::get_msrs;
    KVM_X86_GET_MCE_CAP_SUPPORTED 0x9d System Out<u64>,                            Mce,            Full => system::get_mce_cap_supported;
    KVM_GET_SUPPORTED_HV_CPUID 0xc1 System InOutFam<kvm_cpuid2, kvm_cpuid_entry2>, SysHypervCpuid, Full => system::get_supported_hv_cpuid;
    KVM_GET_DEVICE_ATTR        0xe2 System In<DeviceAttr>,                         SysAttributes,  Full => attributes::get_of_system;
    KVM_HAS_DEVICE_ATTR        0xe3 System In<DeviceAttr>,                         SysAttributes,  Full => attributes::has_of_system;

    KVM_CHECK_EXTENSION        0x03 Vm     Value,                                  CheckExtensionVm, Full => vm::check_extension;
    KVM_SET_MEMORY_REGION      0x40 Vm     In<kvm_memory_region>,                  Basic,          Full => vm::set_memory_region;
    KVM_CREATE_VCPU            0x41 Vm     Value,                                  Basic,          Full => vm::create_vcpu;
    KVM_GET_DIRTY_LOG          0x42 Vm     In<DirtyLog>,                           Basic,          Full => vm::get_dirty_log;
    KVM_SET_MEMORY_ALIAS       0x43 Vm     In<kvm_memory_alias>,                   Basic,          Full => vm::set_memory_alias;
    KVM_SET_NR_MMU_PAGES       0x44 Vm     Value,                                  MmuShadowCacheControl, Full => vm::set_nr_mmu_pages;
    KVM_GET_NR_MMU_PAGES       0x45 Vm     Value,                                  MmuShadowCacheControl, Full => vm::get_nr_mmu_pages;
    KVM_SET_USER_MEMORY_REGION 0x46 Vm     In<kvm_userspace_memory_region>,        UserMemory,     Full => vm::set_user_memory_region;
    KVM_SET_TSS_ADDR           0x47 Vm     Value,                                  SetTssAddr,     Full => vm::set_tss_addr;
    KVM_SET_IDENTITY_MAP_ADDR  0x48 Vm     In<u64>,                                SetIdentityMapAddr, Full => vm::set_identity_map_addr;
    KVM_CREATE_IRQCHIP         0x60 Vm     Value,                                  Irqchip,        Full => chip::create_irqchip;
    KVM_IRQ_LINE               0x61 Vm     In<[u32; 2]>,                           Irqchip,        Full => chip::irq_line;
    KVM_GET_IRQCHIP            0x62 Vm     InOut<[u32; 130]>,                      Irqchip,        Full => chip::get_irqchip;
    KVM_SET_IRQCHIP            0x63 Vm     InNumberedOut<[u32; 130]>,              Irqchip,        Full => chip::set_irqchip;
    KVM_CREATE_PIT             0x64 Vm     Value,                                  Pit,            Full => chip::create_pit;
    KVM_GET_PIT                0x65 Vm     InOut<[u32; 18]>,                       Pit,            Full => chip::get_pit;
    KVM_SET_PIT                0x66 Vm     InNumberedOut<[u32; 18]>,               Pit,            Full => chip::set_pit;
    KVM_IRQ_LINE_STATUS        0x67 Vm     InOut<[u32; 2]>,                        IrqInjectStatus, Full => chip::irq_line_status;
    KVM_REGISTER_COALESCED_MMIO 0x67 Vm    In<kvm_coalesced_mmio_zone>,            CoalescedMmio,  Full => vm::register_coalesced_mmio;
    KVM_UNREGISTER_COALESCED_MMIO 0x68 Vm  In<kvm_coalesced_mmio_zone>,            CoalescedMmio,  Full => vm::unregister_coalesced_mmio;
    KVM_SET_GSI_ROUTING        0x6a Vm     InFam<[u32; 2], [u32; 12]>,             IrqRouting,     Full => chip::set_gsi_routing;
    KVM_REINJECT_CONTROL       0x71 Vm     Value,                                  ReinjectControl, Full => chip::reinject_control;
    KVM_IRQFD                  0x76 Vm     In<[u32; 8]>,                           Irqfd,          Full => chip::set_irqfd;
    KVM_CREATE_PIT2            0x77 Vm     In<[u32; 16]>,                          Pit2,           Full => chip::create_pit2;
    KVM_SET_BOOT_CPU_ID        0x78 Vm     Value,                                  SetBootCpuId,   Full => vm::set_boot_cpu_id;
    KVM_IOEVENTFD              0x79 Vm     In<[u32; 16]>,                          Ioeventfd,      Full => chip::set_ioeventfd;
    KVM_XEN_HVM_CONFIG         0x7a Vm     In<kvm_xen_hvm_config>,                 XenHvm,         Full => xen::configure;
    KVM_XEN_HVM_GET_ATTR       0xc8 Vm     InOut<XenAttr>,                         XenHvm,         Full => xen::get_attr;
    KVM_XEN_HVM_SET_ATTR       0xc9 Vm     In<XenAttr>,                            XenHvm,         Full => xen::set_attr;
    KVM_XEN_HVM_EVTCHN_SEND    0xd0 Vm     In<[u32; 3]>,                           XenHvm,         Full => xen::send;
    KVM_SET_CLOCK              0x7b Vm     In<kvm_clock_data>,                     AdjustClock,    Full => vm::set_clock;
    KVM_GET_CLOCK              0x7c Vm     Out<kvm_clock_data>,                    AdjustClock,    Full => vm::get_clock;
    KVM_GET_PIT2               0x9f Vm     Out<[u32; 28]>,                         PitState2,      Full => chip::get_pit2;
    KVM_SET_PIT2               0xa0 Vm     In<[u32; 28]>,                          PitState2,      Full => chip::set_pit2;
    KVM_SET_TSC_KHZ            0xa2 Vm     Value,                                  VmTscControl,   Full => vm::set_tsc_khz;
    KVM_GET_TSC_KHZ            0xa3 Vm     Value,                                  VmTscControl,   Full => vm::get_tsc_khz;
    KVM_ENABLE_CAP             0xa3 Vm     In<kvm_enable_cap>,                     EnableCapVm,    Full => vm::enable_cap;
    KVM_CLEAR_DIRTY_LOG        0xc0 Vm     InOut<ClearDirtyLog>,                   ManualDirtyLogProtect2, Full => vm::clear_dirty_log;
    KVM_RESET_DIRTY_RINGS      0xc7 Vm     Value,                                  DirtyLogRing,   Full => vm::reset_dirty_rings;
    KVM_SIGNAL_MSI             0xa5 Vm     In<kvm_msi>,                            SignalMsi,      Full => chip::signal_msi;
    KVM_X86_SET_MSR_FILTER     0xc6 Vm     In<MsrFilter>,                          X86MsrFilter,   Full => vm::set_msr_filter;
    KVM_SET_PMU_EVENT_FILTER   0xb2 Vm     In<[u32; 8]>,                           PmuEventFilter, Full => vm::set_pmu_event_filter;
    KVM_CREATE_DEVICE          0xe0 Vm     InOut<kvm_create_device>,               DeviceCtrl,     Full => vm::create_device;
    KVM_GET_STATS_FD           0xce Vm     Value,                                  BinaryStatsFd,  Full => vm::get_stats_fd;

    KVM_RUN                    0x80 Vcpu   Value,                                  Basic,          Full => vcpu::run;
    KVM_GET_REGS               0x81 Vcpu   Out<kvm_regs>,                          Basic,          Full => vcpu::get_regs;
    KVM_SET_REGS               0x82 Vcpu   In<kvm_regs>,                           Basic,          Full => vcpu::set_regs;
    KVM_GET_SREGS              0x83 Vcpu   Out<kvm_sregs>,                         Basic,          Full => vcpu::get_sregs;
    KVM_SET_SREGS              0x84 Vcpu   In<kvm_sregs>,                          Basic,          Full => vcpu::set_sregs;
    KVM_TRANSLATE              0x85 Vcpu   InOut<kvm_translation>,                 Basic,          Full => vcpu::translate;
    KVM_INTERRUPT              0x86 Vcpu   In<kvm_interrupt>,                      Basic,          Full => vcpu::interrupt;
    KVM_DEBUG_GUEST            0x87 Vcpu   In<kvm_debug_guest>,                    Basic,          Full => vcpu::debug_guest;
    KVM_GET_MSRS               0x88 Vcpu   InOutFam<kvm_msrs, kvm_msr_entry>,      Basic,          Full => vcpu::get_msrs;
    KVM_SET_MSRS               0x89 Vcpu   InFam<kvm_msrs, kvm_msr_entry>,         Basic,          Full => vcpu::set_msrs;
    KVM_SET_CPUID              0x8a Vcpu   InFam<kvm_cpuid, kvm_cpuid_entry>,      Basic,          Full => vcpu::set_cpuid;
    KVM_SET_SIGNAL_MASK        0x8b Vcpu   OptionalFam<kvm_signal_mask, u8>,       Basic,          NO_NULL_MASK => vcpu::set_signal_mask;
    KVM_GET_FPU                0x8c Vcpu   Out<kvm_fpu>,                           Basic,          Full => vcpu::get_fpu;
    KVM_SET_FPU                0x8d Vcpu   In<kvm_fpu>,                            Basic,          Full => vcpu::set_fpu;
    KVM_GET_LAPIC              0x8e Vcpu   Out<[u32; 256]>,                        Irqchip,        Full => chip::get_lapic;
    KVM_SET_LAPIC              0x8f Vcpu   In<[u32; 256]>,                         Irqchip,        Full => chip::set_lapic;
    KVM_SET_CPUID2             0x90 Vcpu   InFam<kvm_cpuid2, kvm_cpuid_entry2>,    ExtCpuid,       Full => vcpu::set_cpuid2;
    KVM_GET_CPUID2             0x91 Vcpu   InOutFam<kvm_cpuid2, kvm_cpuid_entry2>, ExtCpuid,       Full => vcpu::get_cpuid2;
    KVM_TPR_ACCESS_REPORTING   0x92 Vcpu   InOut<[u32; 10]>,                       Vapic,          Full => chip::tpr_access_reporting;
    KVM_SET_VAPIC_ADDR         0x93 Vcpu   In<u64>,                                Vapic,          Full => chip::set_vapic_addr;
    KVM_GET_MP_STATE           0x98 Vcpu   Out<kvm_mp_state>,                      MpState,        Full => vcpu::get_mp_state;
    KVM_SET_MP_STATE           0x99 Vcpu   In<kvm_mp_state>,                       MpState,        Full => vcpu::set_mp_state;
    KVM_NMI                    0x9a Vcpu   Value,                                  UserNmi,        Full => vcpu::nmi;
    KVM_SET_GUEST_DEBUG        0x9b Vcpu   In<kvm_guest_debug>,                    SetGuestDebug,  Full => vcpu::set_guest_debug;
    KVM_X86_SETUP_MCE          0x9c Vcpu   In<u64>,                                Mce,            Full => vcpu::setup_mce;
    KVM_X86_SET_MCE            0x9e Vcpu   In<kvm_x86_mce>,                        Mce,            Full => vcpu::set_mce;
    KVM_GET_VCPU_EVENTS        0x9f Vcpu   Out<kvm_vcpu_events>,                   VcpuEvents,     Full => vcpu::get_vcpu_events;
    KVM_SET_VCPU_EVENTS        0xa0 Vcpu   In<kvm_vcpu_events>,                    VcpuEvents,     Full => vcpu::set_vcpu_events;
    KVM_GET_DEBUGREGS          0xa1 Vcpu   Out<kvm_debugregs>,                     Debugregs,      Full => vcpu::get_debugregs;
    KVM_SET_DEBUGREGS          0xa2 Vcpu   In<kvm_debugregs>,                      Debugregs,      Full => vcpu::set_debugregs;
    KVM_SET_TSC_KHZ            0xa2 Vcpu   Value,                                  TscControl,     Full => vcpu::set_tsc_khz;
    KVM_GET_TSC_KHZ            0xa3 Vcpu   Value,                                  GetTscKhz,      Full => vcpu::get_tsc_khz;
    KVM_GET_XSAVE              0xa4 Vcpu   Out<[u32; 1024]>,                       Xsave,          Full => vcpu::get_xsave;
    KVM_SET_XSAVE              0xa5 Vcpu   In<[u32; 1024]>,                        Xsave,          Full => vcpu::set_xsave;
    KVM_GET_XCRS               0xa6 Vcpu   Out<kvm_xcrs>,                          Xcrs,           Full => vcpu::get_xcrs;
    KVM_SET_XCRS               0xa7 Vcpu   In<kvm_xcrs>,                           Xcrs,           Full => vcpu::set_xcrs;
    KVM_ENABLE_CAP             0xa3 Vcpu   In<kvm_enable_cap>,                     EnableCap,      Full => vcpu::enable_cap;
    KVM_KVMCLOCK_CTRL          0xad Vcpu   Value,                                  KvmclockCtrl,   Full => vcpu::kvmclock_ctrl;
    KVM_SMI                    0xb7 Vcpu   Value,                                  X86Smm,         Full => vcpu::smi;
    KVM_GET_NESTED_STATE       0xbe Vcpu   InOut<[u32; 32]>,                       NestedState,    Full => vcpu::get_nested_state;
    KVM_SET_NESTED_STATE       0xbf Vcpu   In<[u32; 32]>,                          NestedState,    Full => vcpu::set_nested_state;
    KVM_GET_SUPPORTED_HV_CPUID 0xc1 Vcpu   InOutFam<kvm_cpuid2, kvm_cpuid_entry2>, HypervCpuid,    Full => vcpu::get_supported_hv_cpuid;
    KVM_XEN_VCPU_GET_ATTR      0xca Vcpu   InOut<XenAttr>,                         XenHvm,         Full => xen::get_vcpu_attr;
    KVM_XEN_VCPU_SET_ATTR      0xcb Vcpu   InAt<XenAttr>,                          XenHvm,         Full => xen::set_vcpu_attr;
    KVM_GET_SREGS2             0xcc Vcpu   Out<kvm_sregs2>,                        Sregs2,         Full => vcpu::get_sregs2;
    KVM_SET_SREGS2             0xcd Vcpu   In<kvm_sregs2>,                         Sregs2,         Full => vcpu::set_sregs2;
    KVM_GET_STATS_FD           0xce Vcpu   Value,                                  BinaryStatsFd,  Full => vcpu::get_stats_fd;
    KVM_GET_XSAVE2             0xcf Vcpu   Out<[u32; 1024]>,                       Xsave2,         Full => vcpu::get_xsave2;
    KVM_SET_DEVICE_ATTR        0xe1 Vcpu   InAt<DeviceAttr>,                       VcpuAttributes, Full => attributes::set;
    KVM_GET_DEVICE_ATTR        0xe2 Vcpu   InAt<DeviceAttr>,                       VcpuAttributes, Full => attributes::get;
    KVM_HAS_DEVICE_ATTR        0xe3 Vcpu   InAt<DeviceAttr>,                       VcpuAttributes, Full => attributes::has;

    KVM_SET_DEVICE_ATTR        0xe1 Device In<DeviceAttr>,                         DeviceCtrl,     Full => attributes::set_of_device;
    KVM_GET_DEVICE_ATTR        0xe2 Device In<DeviceAttr>,                         DeviceCtrl,     Full => attributes::get_of_device;
    KVM_HAS_DEVICE_ATTR        0xe3 Device In<DeviceAttr>,                         DeviceCtrl,     Full => attributes::has_of_device;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caps::check_extension;

    #[test]
    fn a_row_stands_under_a_capability_that_is_offered() {
        for row in ROWS {
            if let Some((number, name)) = row.capability.number() {
                assert!(check_extension(number.into()) > 0, "{} needs {name}", row.name);
            }
        }
    }

    #[test]
    fn no_file_has_a_request_twice() {
        for (i, a) in ROWS.iter().enumerate() {
            assert!(ROWS[i + 1..].iter().all(|b| (a.file, a.request) != (b.file, b.request)), "{}", a.name);
        }
    }

    #[test]
    fn every_request_of_2007_has_a_row() {
        for (file, requests) in kvm_abi::legacy::REQUESTS {
            for request in requests {
                assert!(ROWS.iter().any(|row| row.file == file && row.request == *request), "{file} {request:#x}");
            }
        }
    }
}
