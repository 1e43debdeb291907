//! How events reach a vCPU: vcpu_info says that one waits, and a vector interrupts the guest, not through the local APIC, while it does.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use mmu::Memory;
use x86_defs::GuestPhysAddr;

use super::{INFO_CLOCK, Place, Shared, Xen};
use crate::vcpu::Vcpu;

/// What a vCPU has that other threads use too.
pub(crate) struct Events {
    /// struct vcpu_info: upcall_pending in its first byte.
    pub(super) info: Place,
    pub(super) shared: Shared,
}

impl Events {
    pub(crate) fn new(memory: Arc<Memory>) -> Arc<Self> {
        Arc::new(Self { info: Place::default(), shared: Shared::new(memory) })
    }

    pub(super) fn clock(&self) -> Option<GuestPhysAddr> {
        self.info.get().map(|info| info.wrapping_add(INFO_CLOCK))
    }

    /// vcpu_info says so, if there is one.
    fn is_pending(&self) -> bool {
        self.info.get().is_some_and(|info| {
            let mut pending = [0];
            self.shared.with(|view| view.read(info, &mut pending)).is_ok() && pending != [0]
        })
    }
}

impl Xen {
    /// The vector that interrupts this vCPU now. `kvm_xen_has_interrupt`
    pub(crate) fn upcall(&self, vcpu: &Events) -> Option<u8> {
        if !self.is_on() {
            return None;
        }
        let vector = self.upcall_vector.load(Relaxed);
        (vector != 0 && vcpu.is_pending()).then_some(vector)
    }
}

impl Vcpu {
    /// See [`Xen::upcall`].
    pub(crate) fn upcall(&self) -> Option<u8> {
        self.vm.options.xen.upcall(&self.xen.events)
    }
}
