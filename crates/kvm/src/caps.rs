//! Capabilities: what `KVM_CHECK_EXTENSION` answers.
//!
//! A capability is here only when every ioctl, exit and flag that api.rst puts under it works. Anything absent reads as 0.

use kvm_abi::consts::*;
use mmu::memory::SPACES;
use nix::unistd::{SysconfVar, sysconf};

use crate::exit::hypercall;
use crate::{debug, kvmclock, mce, memory, nested, options, run_page, steal, sync_regs, vm, xen, xsave};

/// `KVM_CAP_MAX_VCPUS`: vCPUs in one VM. Linux 6.1 has the same.
pub(crate) const MAX_VCPUS: u32 = 1024;
/// `KVM_CAP_MAX_VCPU_ID`: ids are below this, four times the number, as in Linux 6.1.
pub(crate) const MAX_VCPU_ID: u32 = 4 * MAX_VCPUS;
/// `KVM_CAP_NR_MEMSLOTS`, in each address space: what Linux offered before 5.12. Later 32764; a client that fills them all needs its memory for that.
pub(crate) const NR_MEMSLOTS: u32 = 509;
/// Entries of a GSI routing table.
pub(crate) const MAX_IRQ_ROUTES: u32 = 4096;

macro_rules! capabilities {
    ($($name:ident = $number:ident => $value:expr;)*) => {
        /// A capability that is offered, or `Basic`: what KVM always had.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[expect(missing_docs, reason = "the names are those of KVM_CAP_…")]
        pub enum Capability { Basic, $($name),* }

        impl Capability {
            /// Number and name of the `KVM_CAP_…` constant; `Basic` has none.
            pub fn number(self) -> Option<(u32, &'static str)> {
                match self {
                    Self::Basic => None,
                    $(Self::$name => Some(($number, stringify!($number)))),*
                }
            }
        }

        /// The answer to `KVM_CHECK_EXTENSION`; 0 for what is not offered.
        pub(crate) fn check_extension(number: u64) -> i32 {
            match u32::try_from(number) {
                $(Ok($number) => $value as i32,)*
                _ => 0,
            }
        }
    };
}

capabilities! {
    // capability                = number                              => value
    Irqchip                      = KVM_CAP_IRQCHIP                     => 1;
    Hlt                          = KVM_CAP_HLT                         => 1;
    UserMemory                   = KVM_CAP_USER_MEMORY                 => 1;
    SetTssAddr                   = KVM_CAP_SET_TSS_ADDR                => 1;
    Vapic                        = KVM_CAP_VAPIC                       => 1;
    ExtCpuid                     = KVM_CAP_EXT_CPUID                   => 1;
    MmuShadowCacheControl        = KVM_CAP_MMU_SHADOW_CACHE_CONTROL    => 1;
    Clocksource                  = KVM_CAP_CLOCKSOURCE                 => 1;
    NrVcpus                      = KVM_CAP_NR_VCPUS                    => recommended_vcpus();
    NrMemslots                   = KVM_CAP_NR_MEMSLOTS                 => NR_MEMSLOTS;
    Pit                          = KVM_CAP_PIT                         => 1;
    NopIoDelay                   = KVM_CAP_NOP_IO_DELAY                => 1;
    MpState                      = KVM_CAP_MP_STATE                    => 1;
    ReinjectControl              = KVM_CAP_REINJECT_CONTROL            => 1;
    CoalescedMmio                = KVM_CAP_COALESCED_MMIO              => run_page::RING_PAGE;
    DestroyMemoryRegionWorks     = KVM_CAP_DESTROY_MEMORY_REGION_WORKS => 1;
    UserNmi                      = KVM_CAP_USER_NMI                    => 1;
    SetGuestDebug                = KVM_CAP_SET_GUEST_DEBUG             => 1;
    // QEMU refuses to start without it, also where it never routes anything.
    IrqRouting                   = KVM_CAP_IRQ_ROUTING                 => MAX_IRQ_ROUTES;
    IrqInjectStatus              = KVM_CAP_IRQ_INJECT_STATUS           => 1;
    JoinMemoryRegionsWorks       = KVM_CAP_JOIN_MEMORY_REGIONS_WORKS   => 1;
    Mce                          = KVM_CAP_MCE                         => mce::MAX_BANKS;
    Irqfd                        = KVM_CAP_IRQFD                       => 1;
    Pit2                         = KVM_CAP_PIT2                        => 1;
    PitState2                    = KVM_CAP_PIT_STATE2                  => 1;
    Ioeventfd                    = KVM_CAP_IOEVENTFD                   => 1;
    SetIdentityMapAddr           = KVM_CAP_SET_IDENTITY_MAP_ADDR       => 1;
    XenHvm                       = KVM_CAP_XEN_HVM                     => xen::flags();
    AdjustClock                  = KVM_CAP_ADJUST_CLOCK                => kvmclock::CLOCK_FLAGS;
    VcpuEvents                   = KVM_CAP_VCPU_EVENTS                 => 1;
    Debugregs                    = KVM_CAP_DEBUGREGS                   => 1;
    X86RobustSinglestep          = KVM_CAP_X86_ROBUST_SINGLESTEP       => 1;
    Xsave                        = KVM_CAP_XSAVE                       => 1;
    Xcrs                         = KVM_CAP_XCRS                        => 1;
    TscControl                   = KVM_CAP_TSC_CONTROL                 => 1;
    EnableCap                    = KVM_CAP_ENABLE_CAP                  => 1;
    InternalErrorData            = KVM_CAP_INTERNAL_ERROR_DATA         => 1;
    GetTscKhz                    = KVM_CAP_GET_TSC_KHZ                 => 1;
    MaxVcpus                     = KVM_CAP_MAX_VCPUS                   => MAX_VCPUS;
    TscDeadlineTimer             = KVM_CAP_TSC_DEADLINE_TIMER          => 1;
    SyncRegs                     = KVM_CAP_SYNC_REGS                   => sync_regs::FIELDS;
    KvmclockCtrl                 = KVM_CAP_KVMCLOCK_CTRL               => 1;
    SignalMsi                    = KVM_CAP_SIGNAL_MSI                  => 1;
    IoapicPolarityIgnored        = KVM_CAP_IOAPIC_POLARITY_IGNORED     => 1;
    ReadonlyMem                  = KVM_CAP_READONLY_MEM                => 1;
    IrqfdResample                = KVM_CAP_IRQFD_RESAMPLE              => 1;
    EnableCapVm                  = KVM_CAP_ENABLE_CAP_VM               => 1;
    DeviceCtrl                   = KVM_CAP_DEVICE_CTRL                 => 1;
    IoeventfdNoLength            = KVM_CAP_IOEVENTFD_NO_LENGTH         => 1;
    X86Smm                       = KVM_CAP_X86_SMM                     => 1;
    MultiAddressSpace            = KVM_CAP_MULTI_ADDRESS_SPACE         => SPACES;
    CheckExtensionVm             = KVM_CAP_CHECK_EXTENSION_VM          => 1;
    SplitIrqchip                 = KVM_CAP_SPLIT_IRQCHIP               => 1;
    IoeventfdAnyLength           = KVM_CAP_IOEVENTFD_ANY_LENGTH        => 1;
    ExtEmulCpuid                 = KVM_CAP_EXT_EMUL_CPUID              => 1;
    MaxVcpuId                    = KVM_CAP_MAX_VCPU_ID                 => MAX_VCPU_ID;
    GetMsrFeatures               = KVM_CAP_GET_MSR_FEATURES            => 1;
    SetBootCpuId                 = KVM_CAP_SET_BOOT_CPU_ID             => 1;
    Hyperv                       = KVM_CAP_HYPERV                      => 1;
    HypervTime                   = KVM_CAP_HYPERV_TIME                 => 1;
    HypervVpIndex                = KVM_CAP_HYPERV_VP_INDEX             => 1;
    HypervCpuid                  = KVM_CAP_HYPERV_CPUID                => 1;
    SysHypervCpuid               = KVM_CAP_SYS_HYPERV_CPUID            => 1;
    HypervEnforceCpuid           = KVM_CAP_HYPERV_ENFORCE_CPUID        => 1;
    DisableQuirks                = KVM_CAP_DISABLE_QUIRKS              => 1;
    VcpuAttributes               = KVM_CAP_VCPU_ATTRIBUTES             => 1;
    MsrPlatformInfo              = KVM_CAP_MSR_PLATFORM_INFO           => 1;
    X2apicApi                    = KVM_CAP_X2APIC_API                  => vm::X2APIC_API;
    ImmediateExit                = KVM_CAP_IMMEDIATE_EXIT              => 1;
    NestedState                  = KVM_CAP_NESTED_STATE                => nested::BYTES;
    // Of what may exit or not there is PAUSE, in a loop.
    X86DisableExits              = KVM_CAP_X86_DISABLE_EXITS           => KVM_X86_DISABLE_EXITS_PAUSE;
    ExceptionPayload             = KVM_CAP_EXCEPTION_PAYLOAD           => 1;
    X86TripleFaultEvent          = KVM_CAP_X86_TRIPLE_FAULT_EVENT      => 1;
    PmuEventFilter               = KVM_CAP_PMU_EVENT_FILTER            => 1;
    HaltPoll                     = KVM_CAP_HALT_POLL                   => 1;
    ExitOnEmulationFailure       = KVM_CAP_EXIT_ON_EMULATION_FAILURE   => 1;
    LastCpu                      = KVM_CAP_LAST_CPU                    => 1;
    SystemEventData              = KVM_CAP_SYSTEM_EVENT_DATA           => 1;
    CoalescedPio                 = KVM_CAP_COALESCED_PIO               => 1;
    StealTime                    = KVM_CAP_STEAL_TIME                  => steal::is_measured();
    EnforcePvFeatureCpuid        = KVM_CAP_ENFORCE_PV_FEATURE_CPUID    => 1;
    SetGuestDebug2               = KVM_CAP_SET_GUEST_DEBUG2            => debug::CONTROLS;
    X86UserSpaceMsr              = KVM_CAP_X86_USER_SPACE_MSR          => 1;
    X86MsrFilter                 = KVM_CAP_X86_MSR_FILTER              => 1;
    Sregs2                       = KVM_CAP_SREGS2                      => 1;
    Xsave2                       = KVM_CAP_XSAVE2                      => xsave::IMAGE_BYTES;
    BinaryStatsFd                = KVM_CAP_BINARY_STATS_FD             => 1;
    SysAttributes                = KVM_CAP_SYS_ATTRIBUTES              => 1;
    DisableQuirks2               = KVM_CAP_DISABLE_QUIRKS2             => options::QUIRKS;
    VmTscControl                 = KVM_CAP_VM_TSC_CONTROL              => 1;
    ExitHypercall                = KVM_CAP_EXIT_HYPERCALL              => hypercall::EXITS;
    // KVM_CAP_X86_NOTIFY_VMEXIT is not here. It bounds how long a guest goes without an instruction boundary: an event's delivery that makes
    // the next event, for ever. The core looks around between deliveries (`Cpu::take_events`), so its VMM gets at it at any moment, and no
    // KVM_EXIT_NOTIFY could ever tell of one; a VMM that enables it wants exactly those.
    ManualDirtyLogProtect2       = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2   => memory::MANUAL_DIRTY_LOG;
    DirtyLogRing                 = KVM_CAP_DIRTY_LOG_RING              => memory::MAX_DIRTY_RING_BYTES;
    DirtyLogRingAcqRel           = KVM_CAP_DIRTY_LOG_RING_ACQ_REL      => memory::MAX_DIRTY_RING_BYTES;
}

/// `KVM_CAP_NR_VCPUS`: vCPUs that the host can well run. Clients that make that many get at least four.
fn recommended_vcpus() -> u32 {
    let online = sysconf(SysconfVar::_NPROCESSORS_ONLN).ok().flatten().unwrap_or(1);
    u32::try_from(online).unwrap_or(1).clamp(4, 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_unknown_is_zero_and_no_error() {
        for number in [69_6969, u64::MAX, 1 << 32 | u64::from(KVM_CAP_USER_MEMORY)] {
            assert_eq!(check_extension(number), 0, "{number}");
        }
    }

    #[test]
    fn counts_agree() {
        let value = |cap: u32| check_extension(cap.into());
        assert!(value(KVM_CAP_NR_VCPUS) >= 4);
        assert!(value(KVM_CAP_MAX_VCPUS) >= value(KVM_CAP_NR_VCPUS));
        assert!(value(KVM_CAP_MAX_VCPU_ID) >= value(KVM_CAP_MAX_VCPUS));
        assert!(value(KVM_CAP_NR_MEMSLOTS) >= 32);
    }
}
