//! Guest memory that shows something of the local APIC: a bit that ends an interrupt, and a doubleword with its priorities.
//!
//! **PV EOI** (Documentation/virt/kvm/x86/msr.rst `MSR_KVM_PV_EOI_EN`; `apic_sync_pv_eoi_to_guest` and its counterpart of lapic.c).
//! The bit is offered where an EOI would have no other effect: no I/O APIC waits for it, no other interrupt does.
//!
//! **The vAPIC page** (`KVM_SET_VAPIC_ADDR`; `kvm_lapic_sync_to_vapic`). User space patches instructions of 32-bit guests that use the
//! task priority: they use the lowest byte of the doubleword, and look in the others whether an interrupt may be let in.
//!
//! Both are guest memory that the guest changes without an exit. So whatever looks at the APIC's registers begins with
//! [`VcpuApic::take_pages`]; another interrupt brings the vCPU's owner, who does.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use mmu::View;
use nix::errno::Errno;
use parking_lot::Mutex;
use x86_defs::GuestPhysAddr;

use super::VcpuApic;
use crate::machine::Machine;
use crate::paravirt::ENABLE;

/// `KVM_PV_EOI_ENABLED`
const MAY_SKIP: u8 = 1 << 0;

/// A vCPU's pages. Only its owner looks.
pub(super) struct Pages {
    view: Mutex<View>,
    /// The bit was set and not looked at since.
    eoi_offered: AtomicBool,
    /// Address of the doubleword; 0: there is none.
    vapic: AtomicU64,
}

impl Pages {
    pub(super) fn new(memory: View) -> Self {
        let (view, eoi_offered) = (Mutex::new(memory), AtomicBool::new(false));
        Self { view, eoi_offered, vapic: AtomicU64::new(0) }
    }

    fn with<R>(&self, f: impl FnOnce(&View) -> R) -> R {
        let mut view = self.view.lock();
        // Nothing here holds a pointer into memory.
        let _ = view.refresh();
        f(&view)
    }

    fn has(&self, at: u64, bytes: u64) -> bool {
        self.with(|view| [at, at + bytes - 1].iter().all(|&at| view.slots().find(GuestPhysAddr(at)).is_some()))
    }
}

impl VcpuApic {
    /// Before each entry, and behind whatever changes registers while the guest runs. `eoi`: the MSR.
    pub(super) fn show_pages(&self, eoi: u64) {
        if eoi & ENABLE != 0 && self.lapic.eoi_is_silent() {
            let offered = self.pages.with(|view| view.swap_u8(GuestPhysAddr(eoi & !ENABLE), MAY_SKIP));
            self.pages.eoi_offered.store(offered.is_some(), Relaxed);
        }
        let vapic = self.pages.vapic.load(Relaxed);
        if vapic != 0 {
            let word = self.lapic.priorities();
            // Memory that is gone is passed over, as in Linux.
            let _ = self.pages.with(|view| view.write(GuestPhysAddr(vapic), &word.to_le_bytes()));
        }
    }

    /// Before anything looks at registers. The bit is taken back, or the interrupt has ended; the task priority is the page's.
    pub(super) fn take_pages(&self, eoi: u64) {
        if self.pages.eoi_offered.load(Relaxed) {
            self.pages.eoi_offered.store(false, Relaxed);
            if eoi & ENABLE != 0
                && let Some(byte) = self.pages.with(|view| view.swap_u8(GuestPhysAddr(eoi & !ENABLE), 0))
                && byte & MAY_SKIP == 0
            {
                self.lapic.end_silently();
            }
        }
        let vapic = self.pages.vapic.load(Relaxed);
        if vapic != 0 {
            let mut tpr = [0];
            if self.pages.with(|view| view.read(GuestPhysAddr(vapic), &mut tpr)).is_ok() {
                self.lapic.set_tpr(tpr[0]);
            }
        }
    }

    /// `KVM_SET_VAPIC_ADDR`; 0: nowhere. EINVAL: no memory is there.
    pub(crate) fn set_vapic(&self, at: u64) -> Result<(), Errno> {
        if at != 0 && at.checked_add(4).is_none_or(|_| !self.pages.has(at, 4)) {
            return Err(Errno::EINVAL);
        }
        self.pages.vapic.store(at, Relaxed);
        Ok(())
    }
}

impl Machine {
    /// `MSR_KVM_PV_EOI_EN`. `None`: not aligned, or no memory is there.
    pub(crate) fn set_pv_eoi(&self, value: u64) -> Option<()> {
        let at = value & !ENABLE;
        if !at.is_multiple_of(4) {
            return None;
        }
        if let Some(apic) = self.apic() {
            if value & ENABLE != 0 && !apic.pages.has(at, 1) {
                return None;
            }
            apic.take_pages(self.pv.pv_eoi.load(Relaxed));
        }
        self.pv.pv_eoi.store(value, Relaxed);
        Some(())
    }
}
