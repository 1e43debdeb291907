//! The two eras of the API, and all that differs between them.
//!
//! A VM that gets its memory through `KVM_SET_MEMORY_REGION` is one of 2007; modern user space never calls that, and
//! 2007's calls it before `KVM_CREATE_VCPU`. Everything not named here is the same.
//!
//! Where 2.6.22 only lacked something, a VM of 2007 gets what today's has: more than one vCPU and four memory slots, no
//! three pages at the end of slot 0, `KVM_CHECK_EXTENSION` and the MSR list of today, ioctls that came later. Where it was
//! wrong and no client could use it, the manual counts: string I/O downwards, exceptions and HLT in real mode, what a
//! doubleword IN leaves in RAX bits 63:32 (nothing), CPL and page faults of string I/O. The paravirtual MSR 87655678H is
//! absent: no client names it, and its guests take #GP as the answer of a host without it.

use cpu_core::Variant;
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
    // Files

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

    /// vCPU files are closed on exec today.
    pub(crate) fn vcpu_cloexec(self) -> bool {
        self == Self::Modern
    }

    /// Today SMRAM is an address space of its own.
    pub(crate) fn has_address_spaces(self) -> bool {
        self == Self::Modern
    }

    // State

    /// A page of each vCPU's mapping is the ring of coalesced I/O.
    pub(crate) fn has_ring(self) -> bool {
        self == Self::Modern
    }

    /// Whether a guest spins was not looked at in 2007.
    pub(crate) fn has_pause_exits(self) -> bool {
        self == Self::Modern
    }

    /// CS base after reset. 2007's VMMs have no memory below 4 GiB and expect to start in the first mebibyte.
    pub(crate) fn reset_cs_base(self) -> u64 {
        match self {
            Self::Legacy => 0x000f_0000,
            Self::Modern => 0xffff_0000,
        }
    }

    /// 2007's MSRs are all 0 after reset, IA32_MISC_ENABLE too.
    pub(crate) fn resets_misc_enable(self) -> bool {
        self == Self::Legacy
    }

    /// What the API of 2007 made of the processor: control bits and CPUID as the client says, I/O in the portions that its
    /// VMMs take (string I/O by page; devices in 1, 2, 4 or 8 bytes).
    pub(crate) fn variant(self) -> Variant {
        match self {
            Self::Legacy => Variant {
                ungated_controls: true,
                plain_cpuid: true,
                natural_mmio: true,
                ins_bytes: 4096,
                outs_bytes: 4096,
            },
            Self::Modern => Variant::default(),
        }
    }

    /// 2007 took any state in `KVM_SET_SREGS`; today what VM entry would refuse is `EINVAL`.
    pub(crate) fn validates_sregs(self) -> bool {
        self == Self::Modern
    }

    /// Intel's of 2007 showed real mode as virtual-8086 mode, and a client may load the VM flag that it saved there.
    pub(crate) fn drops_vm_flag_in_real_mode(self) -> bool {
        self == Self::Legacy
    }

    /// Guests may not change what IA32_MISC_ENABLE tells of performance monitoring.
    pub(crate) fn checks_misc_enable(self) -> bool {
        self == Self::Modern
    }

    /// VMCALL and VMMCALL are the same to 2007's: each is a hypercall on any processor.
    pub(crate) fn has_one_hypercall(self) -> bool {
        self == Self::Legacy
    }

    /// A task priority that is lowered by MOV to CR8 ends `KVM_RUN`, if the local APIC is user space's. 2.6.22 does not tell.
    pub(crate) fn reports_tpr(self) -> bool {
        self == Self::Modern
    }

    /// IA32_APIC_BASE is looked at: reserved bits are refused, and CPUID's APIC bit follows its enable bit.
    pub(crate) fn decodes_apic_base(self) -> bool {
        self == Self::Modern
    }

    /// 2007's `KVM_SET_MSRS` of a bad EFER counts as done and leaves #GP(0) to the guest.
    pub(crate) fn bad_efer_faults_in_guest(self) -> bool {
        self == Self::Legacy
    }

    /// 2007 answers a few more MSRs, with constants.
    pub(crate) fn has_constant_msrs(self) -> bool {
        self == Self::Legacy
    }

    /// 2007's `KVM_GET_MSRS` and `KVM_SET_MSRS` of no entry fail to allocate nothing.
    pub(crate) fn no_msr_is_enomem(self) -> bool {
        self == Self::Legacy
    }

    /// Entries that `KVM_SET_CPUID` takes at most.
    pub(crate) fn max_cpuid_entries(self) -> u32 {
        match self {
            Self::Legacy => kvm_abi::legacy::KVM_MAX_CPUID_ENTRIES,
            Self::Modern => crate::cpuid::MAX_ENTRIES,
        }
    }

    /// Today a guest that has run keeps its CPUID, and a width of linear addresses that no CPU has is refused.
    pub(crate) fn checks_cpuid(self) -> bool {
        self == Self::Modern
    }

    /// `KVM_DEBUG_GUEST` works; today it is refused, `KVM_SET_GUEST_DEBUG` took its place.
    pub(crate) fn has_debug_guest(self) -> bool {
        self == Self::Legacy
    }

    // KVM_RUN

    /// `kvm_run` has today's fields where 2007 had padding: `flags`, `immediate_exit`, and those of `KVM_CAP_SYNC_REGS`.
    pub(crate) fn has_new_run_fields(self) -> bool {
        self == Self::Modern
    }

    /// A `kvm_run.cr8` above 15 is refused; 2007 took what fits.
    pub(crate) fn checks_cr8(self) -> bool {
        self == Self::Modern
    }

    /// 2007 enters the guest before it looks for signals, so a pending one never stops progress.
    pub(crate) fn enters_despite_signal(self) -> bool {
        self == Self::Legacy
    }

    /// 2007 executes an instruction again as soon as its MMIO read is answered, before all else. A write that follows is
    /// reported at once: `if_flag`, `ready_for_interrupt_injection`, `cr8` and `apic_base` stay as they were.
    pub(crate) fn finishes_mmio_before_entry(self) -> bool {
        self == Self::Legacy
    }

    /// 2.6.23 moved RIP before a port exit, the last one of INS or OUTS; other registers move at the next `KVM_RUN`. Today
    /// all of them do. An STI or MOV SS shadow ends with it.
    pub(crate) fn io_moves_rip_at_exit(self) -> bool {
        self == Self::Legacy
    }

    /// 2007 puts EAX into the data page of IN and OUT alike, whatever their size: VMMs may hand it back as it is. Today's
    /// IN finds zeros.
    pub(crate) fn io_shows_eax(self) -> bool {
        self == Self::Legacy
    }

    /// 2007's `KVM_INTERRUPT` collects vectors, lowest delivered first; today's holds one, the last.
    pub(crate) fn collects_interrupts(self) -> bool {
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

    /// 2007 sets TF and RF at every `KVM_RUN` while it single-steps, so a step gets past a breakpoint.
    pub(crate) fn steps_resume(self) -> bool {
        self == Self::Legacy
    }

    /// `KVM_EXIT_DEBUG` tells what happened and where; 2007's structure is empty, and clients look at registers.
    pub(crate) fn describes_debug_exits(self) -> bool {
        self == Self::Modern
    }

    /// 2007 hands hypercalls to user space; `exit_reason` still 3 at the next `KVM_RUN` means RAX ← `hypercall.ret`.
    pub(crate) fn exits_on_hypercalls(self) -> bool {
        self == Self::Legacy
    }

    /// Guest state that VM entry refuses was `KVM_EXIT_UNKNOWN` in 2007, when `KVM_EXIT_FAIL_ENTRY` stood for errors of the
    /// VM instructions.
    pub(crate) fn bad_state_is_unknown(self) -> bool {
        self == Self::Legacy
    }

    /// 2007's `KVM_EXIT_EXCEPTION` is where today has `KVM_EXIT_INTERNAL_ERROR`: what cannot be emulated.
    pub(crate) fn shows_exceptions(self) -> bool {
        self == Self::Legacy
    }
}
