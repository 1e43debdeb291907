//! `KVM_IRQFD`: eventfds that interrupt. api.rst, "KVM_IRQFD".

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use irqchip::router::{SOURCE_RESAMPLE, SOURCE_USER};
use kvm_abi::consts::{KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE};
use nix::errno::Errno;
use parking_lot::Mutex;

use super::Chip;
use super::alarm::FIRST_KEY;
use crate::client::Client;
use crate::eventfd::EventFd;

struct Irqfd {
    key: u64,
    gsi: u32,
    event: EventFd,
    /// Level-triggered: the line is held until the guest ends the interrupt, and then this is signalled.
    resample: Option<EventFd>,
}

/// All of a VM.
#[derive(Default)]
pub(super) struct Irqfds {
    all: Mutex<Vec<Arc<Irqfd>>>,
    keys: AtomicU64,
}

/// `struct kvm_irqfd` as words: fd, gsi, flags, resamplefd.
pub(crate) type Argument = [u32; 8];

/// Adds or removes one. EINVAL: an unknown flag, no eventfd, resampling without the chips here. EBADF. EBUSY: this
/// eventfd interrupts already. What is not there is removed with success, also without any chip.
pub(crate) fn set(chip: Option<&Arc<Chip>>, client: &dyn Client, argument: &Argument) -> Result<(), Errno> {
    let &[fd, gsi, flags, resample_fd, ..] = argument;
    if flags & !(KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE) != 0 {
        return Err(Errno::EINVAL);
    }
    if flags & KVM_IRQFD_FLAG_DEASSIGN != 0 {
        let event = EventFd::new(client.descriptor(fd as i32)?)?;
        if let Some(chip) = chip {
            chip.remove_irqfd(&event, gsi);
        }
        return Ok(());
    }
    let chip = chip.ok_or(Errno::EINVAL)?;
    let event = EventFd::new(client.descriptor(fd as i32)?)?;
    let resample = match flags & KVM_IRQFD_FLAG_RESAMPLE != 0 {
        true if chip.wires.is_split() => return Err(Errno::EINVAL),
        true => Some(EventFd::new(client.descriptor(resample_fd as i32)?)?),
        false => None,
    };
    chip.add_irqfd(event, gsi, resample)
}

impl Chip {
    fn add_irqfd(&self, event: EventFd, gsi: u32, resample: Option<EventFd>) -> Result<(), Errno> {
        let mut all = self.irqfds.all.lock();
        if all.iter().any(|irqfd| irqfd.event.is_same(&event)) {
            return Err(Errno::EBUSY);
        }
        let key = FIRST_KEY + self.irqfds.keys.fetch_add(1, Relaxed);
        let irqfd = Arc::new(Irqfd { key, gsi, event, resample });
        // Level-triggered: what was signalled before interrupts at once.
        self.alarm.watch(irqfd.event.as_fd(), key)?;
        all.push(irqfd);
        Ok(())
    }

    /// The line goes low with the last that could hold it (`irqfd_resampler_shutdown`).
    fn remove_irqfd(&self, event: &EventFd, gsi: u32) {
        let mut all = self.irqfds.all.lock();
        let mut held = false;
        for gone in all.extract_if(.., |irqfd| irqfd.gsi == gsi && irqfd.event.is_same(event)) {
            self.alarm.forget(gone.event.as_fd());
            held |= gone.resample.is_some();
        }
        let holds = |irqfd: &Arc<Irqfd>| irqfd.gsi == gsi && irqfd.resample.is_some();
        let last = held && !all.iter().any(holds);
        drop(all);
        if last {
            self.wires.set_gsi(gsi, SOURCE_RESAMPLE, false);
        }
    }

    /// Removes all.
    pub(crate) fn drop_irqfds(&self) {
        let gone = std::mem::take(&mut *self.irqfds.all.lock());
        for irqfd in gone {
            self.alarm.forget(irqfd.event.as_fd());
            if irqfd.resample.is_some() {
                self.wires.set_gsi(irqfd.gsi, SOURCE_RESAMPLE, false);
            }
        }
    }

    /// The eventfd with this key may have been signalled.
    pub(super) fn eventfd_signalled(&self, key: u64) {
        let irqfd = self.irqfds.all.lock().iter().find(|irqfd| irqfd.key == key).cloned();
        let Some(irqfd) = irqfd.filter(|irqfd| irqfd.event.take()) else { return };
        if irqfd.resample.is_some() {
            self.wires.set_gsi(irqfd.gsi, SOURCE_RESAMPLE, true);
        } else {
            self.wires.set_gsi(irqfd.gsi, SOURCE_USER, true);
            self.wires.set_gsi(irqfd.gsi, SOURCE_USER, false);
        }
    }

    /// The guest has ended the interrupt of a line: those that hold it let go, and are told. Who still has something to
    /// say signals again.
    pub(super) fn resample(&self, gsi: u32) {
        let holders: Vec<_> = {
            let all = self.irqfds.all.lock();
            all.iter().filter(|irqfd| irqfd.gsi == gsi && irqfd.resample.is_some()).cloned().collect()
        };
        if holders.is_empty() {
            return;
        }
        self.wires.set_gsi(gsi, SOURCE_RESAMPLE, false);
        for event in holders.iter().filter_map(|irqfd| irqfd.resample.as_ref()) {
            event.signal();
        }
    }
}
