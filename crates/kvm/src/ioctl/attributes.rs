//! Attributes: `KVM_SET_DEVICE_ATTR`, `KVM_GET_DEVICE_ATTR` and `KVM_HAS_DEVICE_ATTR` on a vCPU's file, of which there is the
//! time-stamp counter's offset (Documentation/virt/kvm/devices/vcpu.rst, "GROUP: KVM_VCPU_TSC_CTRL"), the last two on
//! `/dev/kvm`, where there is what XCR0 may have (`kvm_x86_dev_get_attr`), and on a device's file, of which one is told of VFIO
//! groups (Documentation/virt/kvm/devices/vfio.rst). All: ENXIO for another group or attribute.

use kvm_abi::DeviceAttr;
use kvm_abi::consts::{
    KVM_DEV_VFIO_GROUP, KVM_DEV_VFIO_GROUP_ADD, KVM_DEV_VFIO_GROUP_DEL, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET,
    KVM_X86_XCOMP_GUEST_SUPP,
};
use nix::errno::Errno;

use super::Caller;
use crate::client::Client;
use crate::device::Device;
use crate::system::System;
use crate::vcpu::Vcpu;
use crate::xsave;

/// api.rst `KVM_HAS_DEVICE_ATTR`.
pub(super) fn has(_: &mut Vcpu, _: &dyn Client, attr: &DeviceAttr) -> Result<(), Errno> {
    exists((attr.group, attr.attr) == (KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET.into()))
}

/// Stores the value at `addr`. api.rst `KVM_GET_DEVICE_ATTR`. EFAULT.
pub(super) fn get(vcpu: &mut Vcpu, client: &dyn Client, attr: &DeviceAttr) -> Result<(), Errno> {
    has(vcpu, client, attr)?;
    client.write(attr.addr, &vcpu.machine.tsc_offset().to_le_bytes())
}

/// Takes the value at `addr`. api.rst `KVM_SET_DEVICE_ATTR`. EFAULT.
pub(super) fn set(vcpu: &mut Vcpu, client: &dyn Client, attr: &DeviceAttr) -> Result<(), Errno> {
    has(vcpu, client, attr)?;
    let mut offset = [0; 8];
    client.read(attr.addr, &mut offset)?;
    vcpu.machine.give_tsc_offset(u64::from_le_bytes(offset));
    Ok(())
}

/// api.rst `KVM_HAS_DEVICE_ATTR`, on `/dev/kvm`.
pub(super) fn has_of_system(_: &Caller<'_, System>, attr: &DeviceAttr) -> Result<(), Errno> {
    exists((attr.group, attr.attr) == (0, KVM_X86_XCOMP_GUEST_SUPP.into()))
}

/// Stores the components of XCR0 that guests may have. api.rst `KVM_GET_DEVICE_ATTR`, on `/dev/kvm`. EFAULT.
pub(super) fn get_of_system(system: &Caller<'_, System>, attr: &DeviceAttr) -> Result<(), Errno> {
    has_of_system(system, attr)?;
    system.client.write(attr.addr, &xsave::components().to_le_bytes())
}

/// api.rst `KVM_HAS_DEVICE_ATTR`, on a device.
pub(super) fn has_of_device(_: &Caller<'_, Device>, attr: &DeviceAttr) -> Result<(), Errno> {
    let attributes = [KVM_DEV_VFIO_GROUP_ADD.into(), KVM_DEV_VFIO_GROUP_DEL.into()];
    exists(attr.group == KVM_DEV_VFIO_GROUP && attributes.contains(&attr.attr))
}

/// A group is used, or no more: its descriptor lies at `addr`. api.rst `KVM_SET_DEVICE_ATTR`, on a device. EFAULT; errors as
/// [`Device::add_group`] and [`Device::remove_group`].
pub(super) fn set_of_device(device: &Caller<'_, Device>, attr: &DeviceAttr) -> Result<(), Errno> {
    has_of_device(device, attr)?;
    let mut fd = [0; 4];
    device.client.read(attr.addr, &mut fd)?;
    let fd = i32::from_le_bytes(fd);
    if attr.attr == u64::from(KVM_DEV_VFIO_GROUP_ADD) {
        device.add_group(device.client, fd)
    } else {
        device.remove_group(device.client, fd)
    }
}

/// api.rst `KVM_GET_DEVICE_ATTR`, on a device. EPERM: no attribute of it can be read.
pub(super) fn get_of_device(_: &Caller<'_, Device>, _: &DeviceAttr) -> Result<(), Errno> {
    Err(Errno::EPERM)
}

fn exists(exists: bool) -> Result<(), Errno> {
    if exists { Ok(()) } else { Err(Errno::ENXIO) }
}
