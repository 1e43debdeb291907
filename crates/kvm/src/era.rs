//! The two eras of the API, and all that differs between them.
//!
//! A VM that gets its memory through `KVM_SET_MEMORY_REGION` is one of 2007; modern user space never calls that, and
//! 2007's calls it before `KVM_CREATE_VCPU`. Everything not named here is the same.

use nix::errno::Errno;

/// Which API a VM speaks. Decided once: by the first ioctl that only one of them has, or by the first vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Era {
    /// Linux 2.6.22.
    Legacy,
    /// Today's, as in Linux 6.1.
    Modern,
}

impl Era {
    /// What an unknown request on a VM file gets.
    pub(crate) fn unknown_vm_request(self) -> Errno {
        match self {
            Self::Legacy => Errno::EINVAL,
            Self::Modern => Errno::ENOTTY,
        }
    }

    /// Today a VM belongs to the address space that made it; others get `EIO`.
    pub(crate) fn bound_to_address_space(self) -> bool {
        self == Self::Modern
    }

    /// CS base after reset. 2007's VMMs have no memory below 4 GiB and expect to start in the first mebibyte.
    pub(crate) fn reset_cs_base(self) -> u64 {
        match self {
            Self::Legacy => 0x000f_0000,
            Self::Modern => 0xffff_0000,
        }
    }

    /// 2007 took any state in `KVM_SET_SREGS`; today what VM entry would refuse is `EINVAL`.
    pub(crate) fn validates_sregs(self) -> bool {
        self == Self::Modern
    }

    /// 2007's `KVM_INTERRUPT` collects vectors, lowest delivered first; today's holds one, the last.
    pub(crate) fn collects_interrupts(self) -> bool {
        self == Self::Legacy
    }

    /// 2007 enters the guest before it looks for signals, so a pending one never stops progress; and it knows no
    /// `immediate_exit`.
    pub(crate) fn enters_despite_signal(self) -> bool {
        self == Self::Legacy
    }

    /// 2007's HLT goes on at once while a vector is queued, whatever IF says.
    pub(crate) fn hlt_looks_at_queue(self) -> bool {
        self == Self::Legacy
    }

    /// 2007's `ready_for_interrupt_injection` leaves out IF, which its VMMs test beside it.
    pub(crate) fn ready_includes_if(self) -> bool {
        self == Self::Modern
    }

    /// Entries that `KVM_SET_CPUID` takes at most.
    pub(crate) fn max_cpuid_entries(self) -> u32 {
        match self {
            Self::Legacy => kvm_abi::legacy::KVM_MAX_CPUID_ENTRIES,
            Self::Modern => crate::cpuid::MAX_ENTRIES,
        }
    }

    /// vCPU files are closed on exec today.
    pub(crate) fn vcpu_cloexec(self) -> bool {
        self == Self::Modern
    }
}
