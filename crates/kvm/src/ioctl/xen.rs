//! Ioctls of Xen's interface to its guests, of a VM and of a vCPU.

use kvm_abi::{XenAttr, kvm_xen_hvm_config};
use nix::errno::Errno;

use super::Caller;
use crate::client::Client;
use crate::era::Era;
use crate::vcpu::Vcpu;
use crate::vm::Vm;

/// Which MSR guests name their hypercall page by, what is in it, and who answers. api.rst `KVM_XEN_HVM_CONFIG`. EINVAL as
/// [`Xen::configure`](crate::xen::Xen::configure).
pub(super) fn configure(vm: &Caller<'_, Vm>, config: &kvm_xen_hvm_config) -> Result<(), Errno> {
    vm.require(Era::Modern)?;
    vm.options.xen.configure(config)
}

/// What guests share with user space and the kernel. api.rst `KVM_XEN_HVM_SET_ATTR`. ENOENT: no such attribute. EINVAL, EFAULT,
/// EEXIST, EBADF: by attribute.
pub(super) fn set_attr(vm: &Caller<'_, Vm>, attr: &XenAttr) -> Result<(), Errno> {
    vm.require(Era::Modern)?;
    vm.options.xen.set_attribute(vm.client, attr)
}

/// Reads it. api.rst `KVM_XEN_HVM_GET_ATTR`. ENOENT: no such attribute, or one that is only written.
pub(super) fn get_attr(vm: &Caller<'_, Vm>, attr: &mut XenAttr) -> Result<(), Errno> {
    vm.require(Era::Modern)?;
    vm.options.xen.attribute(attr)
}

/// What a guest shares of this vCPU. api.rst `KVM_XEN_VCPU_SET_ATTR`. ENOENT: no such attribute. EINVAL, EFAULT, EOPNOTSUPP: by
/// attribute.
pub(super) fn set_vcpu_attr(vcpu: &mut Vcpu, client: &dyn Client, attr: &XenAttr) -> Result<(), Errno> {
    vcpu.set_xen_attribute(client, attr)
}

/// Reads it. api.rst `KVM_XEN_VCPU_GET_ATTR`. ENOENT: no such attribute, or it is not set. EINVAL: it is only written. EOPNOTSUPP.
pub(super) fn get_vcpu_attr(vcpu: &mut Vcpu, attr: &mut XenAttr) -> Result<(), Errno> {
    vcpu.xen_attribute(attr)
}

/// Sends an event to a vCPU; port, vCPU, priority. api.rst `KVM_XEN_HVM_EVTCHN_SEND`. EINVAL, EFAULT as
/// [`Xen::send_by_user`](crate::xen::Xen::send_by_user).
pub(super) fn send(vm: &Caller<'_, Vm>, event: &[u32; 3]) -> Result<(), Errno> {
    vm.require(Era::Modern)?;
    vm.options.xen.send_by_user(event)
}
