//! Attributes: `KVM_SET_DEVICE_ATTR`, `KVM_GET_DEVICE_ATTR` and `KVM_HAS_DEVICE_ATTR` on a vCPU's file, of which there is the
//! time-stamp counter's offset (Documentation/virt/kvm/devices/vcpu.rst, "GROUP: KVM_VCPU_TSC_CTRL"), and the last two on
//! `/dev/kvm`, where there is what XCR0 may have (`kvm_x86_dev_get_attr`). All: ENXIO for another group or attribute.

use kvm_abi::DeviceAttr;
use kvm_abi::consts::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVM_X86_XCOMP_GUEST_SUPP};
use nix::errno::Errno;

use super::Caller;
use crate::client::Client;
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

fn exists(exists: bool) -> Result<(), Errno> {
    if exists { Ok(()) } else { Err(Errno::ENXIO) }
}
