//! Coalesced I/O: writes that wait in a ring until user space comes by. api.rst, "KVM_(UN)REGISTER_COALESCED_MMIO".
//!
//! The ring is the VM's, and each vCPU's mapping shows it at one page: that of the vCPU which came first.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use kvm_abi::kvm_coalesced_mmio_zone;
use mmu::Mapping;
use nix::errno::Errno;
use parking_lot::{Mutex, RwLock};

use crate::era::Era;
use crate::vcpu::Vcpu;

/// `NR_IOBUS_DEVS`
const MAX_ZONES: usize = 1000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Zone {
    addr: u64,
    size: u64,
    pio: bool,
}

impl Zone {
    /// EINVAL: neither memory nor ports.
    fn of(zone: &kvm_coalesced_mmio_zone) -> Result<Self, Errno> {
        // The union of `pio` and the older `pad`.
        let &kvm_coalesced_mmio_zone { addr, size, pio } = zone;
        if pio > 1 {
            return Err(Errno::EINVAL);
        }
        Ok(Self { addr, size: size.into(), pio: pio == 1 })
    }

    fn holds(&self, pio: bool, addr: u64, len: u64) -> bool {
        let inside = |end: u64| addr >= self.addr && end <= self.addr.wrapping_add(self.size);
        self.pio == pio && addr.checked_add(len).is_some_and(inside)
    }
}

/// All of a VM.
#[derive(Default)]
pub(crate) struct Zones {
    all: RwLock<Vec<Zone>>,
    /// There is one: exits of a VM that has none take no lock.
    any: AtomicBool,
    /// Pages of the vCPU that came first.
    pages: OnceLock<Arc<Mapping>>,
    /// Held by the vCPU that puts something into the ring.
    ring: Mutex<()>,
}

impl Zones {
    /// EINVAL: neither memory nor ports. ENOSPC: too many.
    pub(crate) fn add(&self, zone: &kvm_coalesced_mmio_zone) -> Result<(), Errno> {
        let zone = Zone::of(zone)?;
        let mut all = self.all.write();
        if all.len() == MAX_ZONES {
            return Err(Errno::ENOSPC);
        }
        all.push(zone);
        self.any.store(true, Relaxed);
        Ok(())
    }

    /// Removes all that hold this range; none is no error. EINVAL: neither memory nor ports.
    pub(crate) fn remove(&self, zone: &kvm_coalesced_mmio_zone) -> Result<(), Errno> {
        let gone = Zone::of(zone)?;
        let mut all = self.all.write();
        all.retain(|zone| !zone.holds(gone.pio, gone.addr, gone.size));
        self.any.store(!all.is_empty(), Relaxed);
        Ok(())
    }

    /// Pages of the first vCPU, once there is one; none in 2007, which had no ring.
    pub(crate) fn pages(&self) -> Option<&Arc<Mapping>> {
        self.pages.get()
    }

    /// A vCPU has come.
    pub(crate) fn keep(&self, era: Era, pages: &Arc<Mapping>) {
        if era.has_ring() {
            self.pages.get_or_init(|| pages.clone());
        }
    }

    fn hold(&self, pio: bool, addr: u64, len: u64) -> bool {
        self.any.load(Relaxed) && self.all.read().iter().any(|zone| zone.holds(pio, addr, len))
    }
}

/// The guest writes. True: it waits in the ring.
pub(crate) fn write(vcpu: &Vcpu, pio: bool, addr: u64, len: u8, value: u64) -> bool {
    let zones = &vcpu.vm.coalesced;
    if !zones.hold(pio, addr, len.into()) {
        return false;
    }
    let _others = zones.ring.lock();
    vcpu.page.put_in_ring(addr, len, value, pio)
}
