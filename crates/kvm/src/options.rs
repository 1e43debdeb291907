//! What user space has chosen for a VM as a whole, by `KVM_ENABLE_CAP` and ioctls of its kind, and what its vCPUs make of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};

use kvm_abi::consts::{
    KVM_X86_QUIRK_CD_NW_CLEARED, KVM_X86_QUIRK_FIX_HYPERCALL_INSN, KVM_X86_QUIRK_LAPIC_MMIO_HOLE,
    KVM_X86_QUIRK_LINT0_REENABLED, KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT, KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS,
    KVM_X86_QUIRK_OUT_7E_INC_RIP,
};
use mmu::Memory;
use nix::errno::Errno;
use parking_lot::Mutex;

use crate::caps::MAX_VCPU_ID;
use crate::exit::msr;
use crate::hyperv::Partition;
use crate::kvmclock::VmClock;
use crate::machine::host_tsc_khz;
use crate::msr_filter::Filter;
use crate::xen::Xen;

/// `KVM_X86_VALID_QUIRKS`: the answer for `KVM_CAP_DISABLE_QUIRKS2`. Memory types mean nothing here, so CD_NW_CLEARED is the same
/// on and off.
pub(crate) const QUIRKS: u32 = KVM_X86_QUIRK_LINT0_REENABLED
    | KVM_X86_QUIRK_CD_NW_CLEARED
    | KVM_X86_QUIRK_LAPIC_MMIO_HOLE
    | KVM_X86_QUIRK_OUT_7E_INC_RIP
    | KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT
    | KVM_X86_QUIRK_FIX_HYPERCALL_INSN
    | KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS;

/// `KVM_MIN_ALLOC_MMU_PAGES`
const MIN_MMU_PAGES: u64 = 64;
/// `KVM_MEMSLOT_PAGES_TO_MMU_PAGES_RATIO`
const MEMORY_TO_MMU_PAGES: u64 = 50;

/// The choices of one VM.
pub(crate) struct Options {
    /// `KVM_X86_QUIRK_…` that are off.
    disabled_quirks: AtomicU64,
    /// `KVM_CAP_EXCEPTION_PAYLOAD`: `KVM_GET_VCPU_EVENTS` tells exceptions that were delivered from those that will be.
    pub(crate) has_payloads: AtomicBool,
    /// `KVM_CAP_X86_TRIPLE_FAULT_EVENT`
    pub(crate) has_triple_faults: AtomicBool,
    /// `KVM_CAP_MSR_PLATFORM_INFO`: guests read that MSR.
    pub(crate) shows_platform_info: AtomicBool,
    /// `KVM_X86_DISABLE_EXITS_PAUSE`: guests that spin keep their processor.
    pub(crate) keeps_pauses: AtomicBool,
    /// `KVM_SET_BOOT_CPU_ID`
    boot_cpu: AtomicU32,
    /// `KVM_CAP_MAX_VCPU_ID`, fixed by the first vCPU.
    max_vcpu_ids: Mutex<Option<u32>>,
    /// `KVM_SET_TSC_KHZ` of the VM, for vCPUs to come; 0: the host's.
    tsc_khz: AtomicU32,
    /// `KVM_SET_NR_MMU_PAGES`, or what follows from the memory.
    mmu_pages: AtomicU64,
    has_mmu_pages: AtomicBool,
    /// `KVM_X86_SET_MSR_FILTER`
    pub(crate) msr_filter: Filter,
    /// What there is of Hyper-V's interface.
    pub(crate) hyperv: Partition,
    /// What there is of Xen's.
    pub(crate) xen: Arc<Xen>,
    /// `KVM_CAP_X86_USER_SPACE_MSR`: why an access to an MSR is user space's.
    msr_exits: AtomicU32,
}

impl Options {
    pub(crate) fn new(memory: Arc<Memory>, time: Arc<VmClock>) -> Self {
        Self {
            xen: Xen::new(memory.clone(), time.clone()),
            hyperv: Partition::new(memory, time),
            disabled_quirks: AtomicU64::new(0),
            has_payloads: AtomicBool::new(false),
            has_triple_faults: AtomicBool::new(false),
            shows_platform_info: AtomicBool::new(true),
            keeps_pauses: AtomicBool::new(false),
            boot_cpu: AtomicU32::new(0),
            max_vcpu_ids: Mutex::new(None),
            tsc_khz: AtomicU32::new(0),
            mmu_pages: AtomicU64::new(0),
            has_mmu_pages: AtomicBool::new(false),
            msr_filter: Filter::default(),
            msr_exits: AtomicU32::new(0),
        }
    }

    /// `KVM_CAP_DISABLE_QUIRKS`; no error, whatever the bits.
    pub(crate) fn disable_quirks(&self, quirks: u64) {
        self.disabled_quirks.store(quirks, Relaxed);
    }

    /// A `KVM_X86_QUIRK_…` is on, as all are from the start.
    pub(crate) fn has_quirk(&self, quirk: u32) -> bool {
        self.disabled_quirks.load(Relaxed) & u64::from(quirk) == 0
    }

    /// Accesses to MSRs that fail for this reason are user space's.
    pub(crate) fn exits_on_msr(&self, reason: u32) -> bool {
        self.msr_exits.load(Relaxed) & reason != 0
    }

    /// See [`Self::exits_on_msr`]. EINVAL: no such reason.
    pub(crate) fn set_msr_exits(&self, reasons: u64) -> Result<(), Errno> {
        if reasons & !u64::from(msr::REASONS) != 0 {
            return Err(Errno::EINVAL);
        }
        self.msr_exits.store(reasons as u32, Relaxed);
        Ok(())
    }

    /// The id of the bootstrap processor.
    pub(crate) fn boot_cpu(&self) -> u32 {
        self.boot_cpu.load(Relaxed)
    }

    /// See [`Self::boot_cpu`].
    pub(crate) fn set_boot_cpu(&self, id: u32) {
        self.boot_cpu.store(id, Relaxed);
    }

    /// Ids are below `ids` from now on. EINVAL: more than there can be, or another limit is in force.
    pub(crate) fn limit_vcpu_ids(&self, ids: u64) -> Result<(), Errno> {
        if ids > MAX_VCPU_ID.into() {
            return Err(Errno::EINVAL);
        }
        let ids = ids as u32;
        let mut limit = self.max_vcpu_ids.lock();
        match *limit {
            Some(old) if old != ids => Err(Errno::EINVAL),
            None if ids != 0 => {
                *limit = Some(ids);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// A vCPU of that id may be made. Without a limit the largest is in force from now on.
    pub(crate) fn takes_vcpu(&self, id: u32) -> bool {
        id < *self.max_vcpu_ids.lock().get_or_insert(MAX_VCPU_ID)
    }

    /// Rate of the time-stamp counter of a new vCPU.
    pub(crate) fn tsc_khz(&self) -> u32 {
        match self.tsc_khz.load(Relaxed) {
            0 => host_tsc_khz(),
            khz => khz,
        }
    }

    /// See [`Self::tsc_khz`]; 0 is the host's. EINVAL: out of range.
    pub(crate) fn set_tsc_khz(&self, khz: u32) -> Result<(), Errno> {
        let khz = crate::machine::checked_tsc_khz(khz).ok_or(Errno::EINVAL)?;
        self.tsc_khz.store(khz, Relaxed);
        Ok(())
    }

    /// How many pages of shadow page tables the VM may have. There are none here, so it is a number and no more.
    pub(crate) fn mmu_pages(&self) -> u64 {
        self.mmu_pages.load(Relaxed)
    }

    /// See [`Self::mmu_pages`]. EINVAL: fewer than 64.
    pub(crate) fn set_mmu_pages(&self, pages: u64) -> Result<(), Errno> {
        if pages < MIN_MMU_PAGES {
            return Err(Errno::EINVAL);
        }
        self.mmu_pages.store(pages, Relaxed);
        self.has_mmu_pages.store(true, Relaxed);
        Ok(())
    }

    /// A slot came or went: 2 % of all memory, unless user space has said how many (`kvm_arch_commit_memory_region`).
    pub(crate) fn memory_changed(&self, pages: u64) {
        if !self.has_mmu_pages.load(Relaxed) {
            self.mmu_pages.store((pages / MEMORY_TO_MMU_PAGES).max(MIN_MMU_PAGES), Relaxed);
        }
    }
}
