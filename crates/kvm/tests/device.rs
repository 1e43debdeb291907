//! Devices that `KVM_CREATE_DEVICE` makes. What must happen is api.rst's and Documentation/virt/kvm/devices/vfio.rst's, errors are
//! those of `kvm_ioctl_create_device`, `kvm_device_ioctl` and virt/kvm/vfio.c.

mod common;

use std::sync::Arc;

use common::{BASE, FakeClient};
use kvm_abi::consts::*;
use kvm_abi::request::*;
use kvm_abi::{DeviceAttr, Plain, kvm_create_device};
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

fn vm() -> (Arc<FakeClient>, i32) {
    let client = FakeClient::new();
    let vm = client.ioctl(0, KVM_CREATE_VM, 0).unwrap();
    (client, vm)
}

/// What `fd` was and is.
fn create(client: &FakeClient, vm: i32, type_: u32, flags: u32) -> Result<u32, Errno> {
    let mut device = kvm_create_device { type_, fd: 77, flags };
    client.ioctl_with(vm, KVM_CREATE_DEVICE, &mut device)?;
    assert_eq!((device.type_, device.flags), (type_, flags));
    Ok(device.fd)
}

#[test]
fn x86_has_one_type() {
    let (client, vm) = vm();
    assert_eq!(client.ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_DEVICE_CTRL.into()), Ok(1));
    for type_ in (0..20).chain([u32::MAX, 1 << 31]).filter(|&type_| type_ != kvm_device_type_KVM_DEV_TYPE_VFIO) {
        for flags in [0, KVM_CREATE_DEVICE_TEST] {
            assert_eq!(create(&client, vm, type_, flags), Err(Errno::ENODEV), "{type_}");
        }
    }
    let vfio = kvm_device_type_KVM_DEV_TYPE_VFIO;
    let files = client.files.lock().len();
    // A test makes nothing, however often; a flag that does not exist is not looked at.
    for _ in 0..2 {
        assert_eq!(create(&client, vm, vfio, KVM_CREATE_DEVICE_TEST | 0x10), Ok(77));
    }
    assert_eq!(client.files.lock().len(), files);
    let fd = create(&client, vm, vfio, 0).unwrap();
    assert_eq!(client.file(fd as i32).kind().to_string(), "kvm-device");
    assert_eq!(client.cloexec.lock().last(), Some(&true));
    assert_eq!(create(&client, vm, vfio, 0), Err(Errno::EBUSY));
    assert_eq!(create(&client, vm, vfio, KVM_CREATE_DEVICE_TEST), Ok(77), "it would not tell");
    client.file(fd as i32).released();
    assert!(create(&client, vm, vfio, 0).is_ok(), "the first one is closed");
}

#[test]
fn a_device_of_vfio_is_told_of_groups_alone() {
    let (client, vm) = vm();
    let fd = create(&client, vm, kvm_device_type_KVM_DEV_TYPE_VFIO, 0).unwrap() as i32;
    let (groups, at) = (KVM_DEV_VFIO_GROUP, BASE + 0x1000);
    let attr = |group, attr: u32| DeviceAttr { group, attr: attr.into(), addr: at, ..Plain::zeroed() };
    for request in [KVM_HAS_DEVICE_ATTR, KVM_SET_DEVICE_ATTR] {
        for (group, number) in [(groups, 0), (groups, KVM_DEV_VFIO_GROUP_SET_SPAPR_TCE), (0, 1), (2, 1)] {
            assert_eq!(client.set(fd, request, &attr(group, number)), Err(Errno::ENXIO), "{group} {number}");
        }
    }
    for (number, stranger) in [(KVM_DEV_VFIO_GROUP_ADD, Errno::EINVAL), (KVM_DEV_VFIO_GROUP_DEL, Errno::ENOENT)] {
        let attr = attr(groups, number);
        assert_eq!(client.set(fd, KVM_HAS_DEVICE_ATTR, &attr), Ok(0));
        assert_eq!(client.set(fd, KVM_GET_DEVICE_ATTR, &attr), Err(Errno::EPERM));
        client.write_u32(at, u32::MAX);
        assert_eq!(client.set(fd, KVM_SET_DEVICE_ATTR, &attr), Err(Errno::EBADF));
        client.write_u32(at, client.adopt(EventFd::from_flags(EfdFlags::empty()).unwrap()) as u32);
        assert_eq!(client.set(fd, KVM_SET_DEVICE_ATTR, &attr), Err(stranger));
        assert_eq!(client.set(fd, KVM_SET_DEVICE_ATTR, &DeviceAttr { addr: 8, ..attr }), Err(Errno::EFAULT));
    }
    assert_eq!(client.ioctl(fd, KVM_GET_API_VERSION, 0), Err(Errno::ENOTTY));
    assert_eq!(client.fork().set(fd, KVM_HAS_DEVICE_ATTR, &attr(groups, 1)), Err(Errno::EIO));
}

/// 2007 had none.
#[test]
fn a_vm_of_2007_has_no_devices() {
    let (client, vm) = vm();
    client.ioctl_bytes(vm, KVM_SET_MEMORY_REGION, [0u64, 0, 0x1000].map(u64::to_le_bytes).concat()).unwrap();
    assert_eq!(create(&client, vm, kvm_device_type_KVM_DEV_TYPE_VFIO, 0), Err(Errno::EINVAL));
}
