//! The one device that `KVM_CREATE_DEVICE` makes on x86: `KVM_DEV_TYPE_VFIO`, which is told of the VFIO groups that a VM uses.
//! Documentation/virt/kvm/devices/vfio.rst; virt/kvm/vfio.c.
//!
//! The kernel's KVM asks the groups whether their DMA is coherent with caches. Memory types mean nothing here, so groups are kept
//! while the device is, and no more. Their DMA needs nobody's help: it goes to the client's memory, which is the guest's.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use mmu::Mapping;
use nix::errno::Errno;
use nix::sys::stat::{SFlag, fstat, major};
use parking_lot::Mutex;

use crate::client::{Client, File, FileKind, Reply};
use crate::ioctl::{self, Call, Target};
use crate::vm::Vm;

/// The file of a device.
pub(crate) struct Device {
    vm: Arc<Vm>,
    groups: Mutex<Vec<Group>>,
}

/// A VFIO group: the kernel lets nobody open one twice, so its number says which file it is.
struct Group {
    rdev: u64,
    _held: OwnedFd,
}

impl Device {
    /// EBUSY: the VM has one.
    pub(crate) fn new(vm: &Arc<Vm>) -> Result<Arc<Self>, Errno> {
        if vm.has_vfio.swap(true, Relaxed) {
            return Err(Errno::EBUSY);
        }
        Ok(Arc::new(Self { vm: vm.clone(), groups: Mutex::default() }))
    }

    /// `KVM_DEV_VFIO_GROUP_ADD`. EBADF: no descriptor. EINVAL: not a group's. EEXIST.
    pub(crate) fn add_group(&self, client: &dyn Client, fd: i32) -> Result<(), Errno> {
        let held = client.descriptor(fd)?;
        let found = fstat(held.as_fd())?;
        let devices = fs::read_to_string("/proc/devices").unwrap_or_default();
        if !is_group(found.st_mode, found.st_rdev, &devices) {
            return Err(Errno::EINVAL);
        }
        let (mut groups, rdev) = (self.groups.lock(), found.st_rdev);
        if groups.iter().any(|group| group.rdev == rdev) {
            return Err(Errno::EEXIST);
        }
        groups.push(Group { rdev, _held: held });
        Ok(())
    }

    /// `KVM_DEV_VFIO_GROUP_DEL`. EBADF: no descriptor. ENOENT: not one that was added.
    pub(crate) fn remove_group(&self, client: &dyn Client, fd: i32) -> Result<(), Errno> {
        let rdev = fstat(client.descriptor(fd)?.as_fd())?.st_rdev;
        let mut groups = self.groups.lock();
        let at = groups.iter().position(|group| group.rdev == rdev).ok_or(Errno::ENOENT)?;
        groups.remove(at);
        Ok(())
    }
}

/// A character device of the driver `vfio`, whose numbers are those of groups. `devices`: /proc/devices.
fn is_group(mode: u32, rdev: u64, devices: &str) -> bool {
    let is_character = SFlag::from_bits_truncate(mode & SFlag::S_IFMT.bits()) == SFlag::S_IFCHR;
    let characters = devices.lines().take_while(|line| !line.starts_with("Block"));
    let mut majors = characters.filter_map(|line| line.trim().split_once(' ')).filter(|(_, name)| *name == "vfio");
    is_character && majors.any(|(number, _)| number.parse() == Ok(major(rdev)))
}

impl File for Device {
    fn ioctl(self: Arc<Self>, client: &dyn Client, request: u32, arg: u64, input: &[u8]) -> Result<Reply, Errno> {
        self.vm.check_address_space(client)?;
        ioctl::dispatch(Target::Device(&self), &Call { client, request, arg, input }).unwrap_or(Err(Errno::ENOTTY))
    }

    fn mapping(&self) -> Option<Arc<Mapping>> {
        None
    }

    fn kind(&self) -> FileKind {
        FileKind::Device
    }

    fn released(&self) {
        self.groups.lock().clear();
        self.vm.has_vfio.store(false, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::makedev;

    #[test]
    fn a_group_is_a_device_of_vfios() {
        let devices = "Character devices:\n  1 mem\n 10 misc\n242 vfio\n243 vfio-dev\n\nBlock devices:\n241 vfio\n";
        let character = SFlag::S_IFCHR.bits() | 0o600;
        assert!(is_group(character, makedev(242, 17), devices));
        // /dev/vfio/vfio is misc's; a single device is no group.
        for (mode, major) in [(character, 10), (character, 243), (character, 241), (SFlag::S_IFREG.bits() | 0o600, 242)]
        {
            assert!(!is_group(mode, makedev(major, 17), devices), "{mode:o} {major}");
        }
        assert!(!is_group(character, makedev(242, 17), ""), "a kernel without VFIO");
    }
}
