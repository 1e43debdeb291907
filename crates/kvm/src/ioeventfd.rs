//! `KVM_IOEVENTFD`: writes to a port or an address that signal an eventfd and do not exit. api.rst, "KVM_IOEVENTFD".

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use kvm_abi::consts::{
    kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign, kvm_ioeventfd_flag_nr_max,
    kvm_ioeventfd_flag_nr_pio, kvm_ioeventfd_flag_nr_virtio_ccw_notify,
};
use nix::errno::Errno;
use parking_lot::RwLock;

use crate::client::Client;
use crate::eventfd::EventFd;

const DATAMATCH: u32 = 1 << kvm_ioeventfd_flag_nr_datamatch;
const PIO: u32 = 1 << kvm_ioeventfd_flag_nr_pio;
const DEASSIGN: u32 = 1 << kvm_ioeventfd_flag_nr_deassign;
const CCW: u32 = 1 << kvm_ioeventfd_flag_nr_virtio_ccw_notify;
const FLAGS: u32 = (1 << kvm_ioeventfd_flag_nr_max) - 1;

/// `enum kvm_bus`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bus {
    /// Memory.
    Mmio,
    /// Ports.
    Pio,
    /// A notification of other architectures: nothing here ever writes to it.
    Ccw,
}

/// A write that somebody waits for.
struct Ioeventfd {
    event: EventFd,
    bus: Bus,
    addr: u64,
    /// Bytes; 0: any.
    len: u32,
    /// Only this value.
    datamatch: Option<u64>,
}

impl Ioeventfd {
    fn is_hit(&self, bus: Bus, addr: u64, len: u32, value: u64) -> bool {
        self.bus == bus
            && self.addr == addr
            && (self.len == 0 || self.len == len && self.datamatch.is_none_or(|wanted| wanted == value))
    }

    /// `ioeventfd_check_collision`: one write would hit both.
    fn collides(&self, other: &Self) -> bool {
        let values = match (self.datamatch, other.datamatch) {
            (Some(a), Some(b)) => a == b,
            _ => true,
        };
        let lens = self.len == 0 || other.len == 0 || self.len == other.len && values;
        self.bus == other.bus && self.addr == other.addr && lens
    }
}

/// All of a VM. Read by every port and MMIO exit, written by the ioctl.
#[derive(Default)]
pub(crate) struct Ioeventfds {
    all: RwLock<Vec<Ioeventfd>>,
    /// There is one: exits of a VM that has none take no lock.
    any: AtomicBool,
}

/// `struct kvm_ioeventfd` as words: datamatch, addr, len, fd, flags.
pub(crate) type Argument = [u32; 16];

impl Ioeventfds {
    /// Adds or removes one. EINVAL: an unknown flag, a length that is none, no length with a value, no eventfd. EBADF.
    /// EEXIST: it would collide. ENOENT: nothing to remove.
    pub(crate) fn set(&self, client: &dyn Client, argument: &Argument) -> Result<(), Errno> {
        let &[match_low, match_high, addr_low, addr_high, len, fd, flags, ..] = argument;
        let addr = u64::from(addr_high) << 32 | u64::from(addr_low);
        let by_value = flags & DATAMATCH != 0;
        if flags & !FLAGS != 0
            || !matches!(len, 0 | 1 | 2 | 4 | 8)
            || addr.checked_add(len.into()).is_none()
            || len == 0 && by_value
        {
            return Err(Errno::EINVAL);
        }
        let new = Ioeventfd {
            event: EventFd::new(client.descriptor(fd as i32)?)?,
            bus: match flags & (PIO | CCW) {
                0 => Bus::Mmio,
                CCW => Bus::Ccw,
                _ => Bus::Pio,
            },
            addr,
            len,
            datamatch: by_value.then_some(u64::from(match_high) << 32 | u64::from(match_low)),
        };
        let mut all = self.all.write();
        if flags & DEASSIGN == 0 {
            if all.iter().any(|old| old.collides(&new)) {
                return Err(Errno::EEXIST);
            }
            all.push(new);
            self.any.store(true, Relaxed);
            return Ok(());
        }
        let same = |old: &Ioeventfd| {
            (old.bus, old.addr, old.len, old.datamatch) == (new.bus, new.addr, new.len, new.datamatch)
                && old.event.is_same(&new.event)
        };
        let at = all.iter().position(same).ok_or(Errno::ENOENT)?;
        all.swap_remove(at);
        self.any.store(!all.is_empty(), Relaxed);
        Ok(())
    }

    /// The guest writes. True: an eventfd was signalled, and nobody else is to see it.
    pub(crate) fn write(&self, bus: Bus, addr: u64, len: u32, value: u64) -> bool {
        if !self.any.load(Relaxed) {
            return false;
        }
        let all = self.all.read();
        let hit = all.iter().find(|one| one.is_hit(bus, addr, len, value));
        if let Some(one) = hit {
            one.event.signal();
        }
        hit.is_some()
    }
}
