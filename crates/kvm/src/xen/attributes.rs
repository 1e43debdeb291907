//! `KVM_XEN_HVM_SET_ATTR` and `KVM_XEN_VCPU_SET_ATTR`, and what reads them.

use std::sync::atomic::Ordering::Relaxed;

use kvm_abi::XenAttr;
use kvm_abi::consts::*;
use nix::errno::Errno;
use x86_defs::{PAGE_BYTES, PAGE_MASK, PAGE_SHIFT};

use super::{INFO_BYTES, NOWHERE, Place, RUNSTATE_BYTES, TIME_INFO_BYTES, Xen};
use crate::caps::MAX_VCPUS;
use crate::client::Client;
use crate::steal;
use crate::vcpu::Vcpu;

/// Vectors below are the processor's.
const FIRST_VECTOR: u8 = 0x10;

/// 0 is none. EINVAL: one that is the processor's.
fn checked_vector(attr: &XenAttr) -> Result<u8, Errno> {
    match attr.u[0] as u8 {
        1..FIRST_VECTOR => Err(Errno::EINVAL),
        vector => Ok(vector),
    }
}

/// EOPNOTSUPP: the host's kernel does not measure.
fn check_measured() -> Result<(), Errno> {
    if steal::is_measured() { Ok(()) } else { Err(Errno::EOPNOTSUPP) }
}

impl Xen {
    /// ENOENT: no such attribute. EINVAL, EFAULT: by attribute, and as [`Self::set_port`].
    pub(crate) fn set_attribute(&self, client: &dyn Client, attr: &XenAttr) -> Result<(), Errno> {
        match attr.type_.into() {
            KVM_XEN_ATTR_TYPE_LONG_MODE => self.long_mode.store(attr.u[0] as u8 != 0, Relaxed),
            KVM_XEN_ATTR_TYPE_SHARED_INFO => return self.set_shared_info(attr.u[0]),
            KVM_XEN_ATTR_TYPE_UPCALL_VECTOR => self.upcall_vector.store(checked_vector(attr)?, Relaxed),
            KVM_XEN_ATTR_TYPE_EVTCHN => return self.set_port(client, attr),
            KVM_XEN_ATTR_TYPE_XEN_VERSION => self.version.store(attr.word(0), Relaxed),
            _ => return Err(Errno::ENOENT),
        }
        Ok(())
    }

    /// ENOENT: no such attribute, or none that can be read.
    pub(crate) fn attribute(&self, attr: &mut XenAttr) -> Result<(), Errno> {
        match attr.type_.into() {
            KVM_XEN_ATTR_TYPE_LONG_MODE => attr.set_byte(self.is_long().into()),
            KVM_XEN_ATTR_TYPE_SHARED_INFO => {
                attr.u[0] = self.shared_info.get().map_or(u64::MAX, |gpa| gpa.0 >> PAGE_SHIFT);
            }
            KVM_XEN_ATTR_TYPE_UPCALL_VECTOR => attr.set_byte(self.upcall_vector.load(Relaxed)),
            KVM_XEN_ATTR_TYPE_XEN_VERSION => attr.set_word(0, self.version.load(Relaxed)),
            _ => return Err(Errno::ENOENT),
        }
        Ok(())
    }
}

impl Vcpu {
    /// ENOENT: no such attribute. EINVAL, EFAULT, EOPNOTSUPP: by attribute.
    pub(crate) fn set_xen_attribute(&mut self, client: &dyn Client, attr: &XenAttr) -> Result<(), Errno> {
        match attr.type_.into() {
            KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO => self.share(|vcpu| &vcpu.xen.events.info, attr.u[0], INFO_BYTES),
            KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO => self.share(|vcpu| &vcpu.xen.time_info, attr.u[0], TIME_INFO_BYTES),
            KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR => {
                check_measured()?;
                self.share(|vcpu| &vcpu.xen.runstate_info, attr.u[0], RUNSTATE_BYTES)
            }
            KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT => {
                check_measured()?;
                self.set_runstate(client, attr.u[0])
            }
            KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA => {
                check_measured()?;
                self.load_runstate(client, attr)
            }
            KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST => {
                check_measured()?;
                self.adjust_runstate(client, attr)
            }
            KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID if attr.word(0) >= MAX_VCPUS => Err(Errno::EINVAL),
            KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID => {
                self.xen.id = attr.word(0);
                Ok(())
            }
            KVM_XEN_VCPU_ATTR_TYPE_TIMER => self.load_xen_timer(attr),
            KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR => {
                self.xen.events.upcall_vector.store(checked_vector(attr)?, Relaxed);
                Ok(())
            }
            _ => Err(Errno::ENOENT),
        }
    }

    /// Has an area of `bytes` at `gpa`; all ones: nowhere. EINVAL: it is not in one page. EFAULT: no memory is there that can be
    /// written; once there is, it counts.
    fn share(&self, place: impl Fn(&Self) -> &Place, gpa: u64, bytes: u64) -> Result<(), Errno> {
        if gpa != NOWHERE && (gpa & !PAGE_MASK) + bytes > PAGE_BYTES {
            return Err(Errno::EINVAL);
        }
        place(self).set(gpa);
        if gpa != NOWHERE {
            self.xen.events.shared.check(gpa)?;
            // There may be one more clock.
            self.machine.time.counter_changed();
        }
        Ok(())
    }

    /// ENOENT: no such attribute, or it is not set. EINVAL: it cannot be read. EOPNOTSUPP.
    pub(crate) fn xen_attribute(&self, attr: &mut XenAttr) -> Result<(), Errno> {
        match attr.type_.into() {
            KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO => attr.u[0] = self.xen.events.info.gpa(),
            KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO => attr.u[0] = self.xen.time_info.gpa(),
            KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR => {
                check_measured()?;
                attr.u[0] = self.xen.runstate_info.get().ok_or(Errno::ENOENT)?.0;
            }
            KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT => {
                check_measured()?;
                attr.u[0] = self.xen.runstate.state().into();
            }
            KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA => {
                check_measured()?;
                self.xen.runstate.show(attr);
            }
            KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST => return Err(Errno::EINVAL),
            KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID => attr.set_word(0, self.xen.id),
            KVM_XEN_VCPU_ATTR_TYPE_TIMER => self.show_xen_timer(attr),
            KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR => attr.set_byte(self.xen.events.upcall_vector.load(Relaxed)),
            _ => return Err(Errno::ENOENT),
        }
        Ok(())
    }
}
