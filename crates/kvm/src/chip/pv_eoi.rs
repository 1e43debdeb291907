//! Paravirtual EOI: a bit in guest memory that says that the interrupt under way may be ended by clearing it.
//!
//! Documentation/virt/kvm/x86/msr.rst `MSR_KVM_PV_EOI_EN`; `apic_sync_pv_eoi_to_guest` and its counterpart of lapic.c. The bit is
//! offered where an EOI would have no other effect: no I/O APIC waits for it, no other interrupt does. Whatever looks at the
//! APIC's registers then has to look at the bit first; another interrupt brings the vCPU's owner, who does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use mmu::{Memory, View};
use parking_lot::Mutex;
use x86_defs::GuestPhysAddr;

use super::VcpuApic;
use crate::machine::Machine;
use crate::paravirt::ENABLE;

/// `KVM_PV_EOI_ENABLED`
const MAY_SKIP: u8 = 1 << 0;

/// A vCPU's side of it. Only the owner looks.
pub(super) struct PvEoi {
    view: Mutex<View>,
    /// The bit was set and not looked at since.
    pending: AtomicBool,
}

impl PvEoi {
    pub(super) fn new(memory: &Arc<Memory>) -> Self {
        Self { view: Mutex::new(View::new(memory)), pending: AtomicBool::new(false) }
    }

    /// Puts a byte there; the one before it.
    fn swap(&self, at: GuestPhysAddr, byte: u8) -> Option<u8> {
        let mut view = self.view.lock();
        // Nothing here holds a pointer into memory.
        let _ = view.refresh();
        view.swap_u8(at, byte)
    }

    fn is_there(&self, at: GuestPhysAddr) -> bool {
        self.view.lock().memory().slots().find(at).is_some()
    }
}

impl VcpuApic {
    /// Before each entry: lets the guest end its interrupt by the bit, if nothing depends on it. `msr`: where that is.
    pub(super) fn offer_pv_eoi(&self, msr: u64) {
        if msr & ENABLE != 0 && self.lapic.eoi_is_silent() {
            let offered = self.pv_eoi.swap(GuestPhysAddr(msr & !ENABLE), MAY_SKIP).is_some();
            self.pv_eoi.pending.store(offered, Relaxed);
        }
    }

    /// Before anything looks at the registers: takes the bit back, or ends the interrupt if the guest has.
    pub(super) fn take_pv_eoi(&self, msr: u64) {
        if !self.pv_eoi.pending.load(Relaxed) {
            return;
        }
        self.pv_eoi.pending.store(false, Relaxed);
        if msr & ENABLE != 0
            && let Some(byte) = self.pv_eoi.swap(GuestPhysAddr(msr & !ENABLE), 0)
            && byte & MAY_SKIP == 0
        {
            self.lapic.end_silently();
        }
    }
}

impl Machine {
    /// `MSR_KVM_PV_EOI_EN`. `None`: not aligned, or nothing is there.
    pub(crate) fn set_pv_eoi(&self, value: u64) -> Option<()> {
        let at = GuestPhysAddr(value & !ENABLE);
        if !at.0.is_multiple_of(4) {
            return None;
        }
        if let Some(apic) = self.apic() {
            if value & ENABLE != 0 && !apic.pv_eoi.is_there(at) {
                return None;
            }
            apic.take_pv_eoi(self.pv.pv_eoi.load(Relaxed));
        }
        self.pv.pv_eoi.store(value, Relaxed);
        Some(())
    }
}
