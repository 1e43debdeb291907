//! Ioctls of a VM file.

use kvm_abi::consts::KVM_CLOCK_REALTIME;
use kvm_abi::legacy::{kvm_memory_alias, kvm_memory_region};
use kvm_abi::{ClearDirtyLog, DirtyLog, kvm_clock_data, kvm_coalesced_mmio_zone, kvm_userspace_memory_region};
use nix::errno::Errno;

use super::Caller;
use crate::client::Client;
use crate::era::Era;
use crate::vcpu::VcpuFile;
use crate::vm::Vm;
use crate::{caps, kvmclock};

/// As on the system file. api.rst `KVM_CHECK_EXTENSION`. No error.
pub(super) fn check_extension(_: &Caller<'_, Vm>, _: &dyn Client, capability: u64) -> Result<i32, Errno> {
    Ok(caps::check_extension(capability))
}

/// Makes a vCPU and returns its descriptor. api.rst `KVM_CREATE_VCPU`. EINVAL: an id or number beyond the limits. EEXIST.
pub(super) fn create_vcpu(vm: &Caller<'_, Vm>, client: &dyn Client, id: u64) -> Result<i32, Errno> {
    // The kernel takes an int.
    let id = id as u32;
    if id >= caps::MAX_VCPU_ID || vm.vcpus.lock().len() >= caps::MAX_VCPUS as usize {
        return Err(Errno::EINVAL);
    }
    let era = vm.settle_era();
    let vcpu = VcpuFile::new(vm.file.clone(), id, era)?;
    client.install(vcpu, era.vcpu_cloexec()).inspect_err(|_| {
        vm.vcpus.lock().remove(&id);
    })
}

/// Shows client memory to the guest, moves, re-flags or deletes a slot. api.rst `KVM_SET_USER_MEMORY_REGION`.
/// EINVAL: misaligned, unknown flag, out of range, another size or address, nothing to delete. EEXIST: overlap.
pub(super) fn set_user_memory_region(vm: &Caller<'_, Vm>, region: &kvm_userspace_memory_region) -> Result<(), Errno> {
    vm.require(Era::Modern)?;
    vm.file.set_user_memory_region(vm.client, region)
}

/// Stores and clears the dirty bitmap of a slot. api.rst `KVM_GET_DIRTY_LOG`. EINVAL: no such slot number or address
/// space. ENOENT: the slot does not log.
pub(super) fn get_dirty_log(vm: &Caller<'_, Vm>, log: &DirtyLog) -> Result<(), Errno> {
    vm.file.get_dirty_log(vm.client, log)
}

/// RAM of a 2007 VM. EINVAL: misaligned, no such slot number, another size than before. EEXIST: overlap. ENOMEM.
pub(super) fn set_memory_region(vm: &Caller<'_, Vm>, region: &kvm_memory_region) -> Result<(), Errno> {
    vm.require(Era::Legacy)?;
    vm.file.set_memory_region(region)
}

/// A second address for RAM of a 2007 VM. EINVAL: misaligned, alias above 3, wraps.
pub(super) fn set_memory_alias(vm: &Caller<'_, Vm>, alias: &kvm_memory_alias) -> Result<(), Errno> {
    vm.require(Era::Legacy)?;
    vm.file.set_memory_alias(alias)
}

/// Three pages that Intel's CPUs without unrestricted guest need; nothing is kept there. api.rst `KVM_SET_TSS_ADDR`.
/// EINVAL: above 4 GiB − 12 KiB.
pub(super) fn set_tss_addr(_: &Caller<'_, Vm>, _: &dyn Client, addr: u64) -> Result<(), Errno> {
    if addr > 0xffff_d000 { Err(Errno::EINVAL) } else { Ok(()) }
}

/// A page that Intel's CPUs without unrestricted guest need; nothing is kept there. api.rst `KVM_SET_IDENTITY_MAP_ADDR`.
/// EINVAL: a vCPU exists.
pub(super) fn set_identity_map_addr(vm: &Caller<'_, Vm>, addr: &u64) -> Result<(), Errno> {
    let vcpus = vm.vcpus.lock();
    if !vcpus.is_empty() {
        return Err(Errno::EINVAL);
    }
    vm.set_identity_map_addr(*addr);
    Ok(())
}

/// The VM's clock, with the host's at the same moment. api.rst `KVM_GET_CLOCK`. No error.
pub(super) fn get_clock(vm: &Caller<'_, Vm>) -> Result<kvm_clock_data, Errno> {
    Ok(vm.time.data())
}

/// Lets it go on from another time; with `KVM_CLOCK_REALTIME` what has passed since then is added. api.rst `KVM_SET_CLOCK`.
/// EINVAL: an unknown flag.
pub(super) fn set_clock(vm: &Caller<'_, Vm>, data: &kvm_clock_data) -> Result<(), Errno> {
    if data.flags & !kvmclock::CLOCK_FLAGS != 0 {
        return Err(Errno::EINVAL);
    }
    vm.time.set(data.clock, (data.flags & KVM_CLOCK_REALTIME != 0).then_some(data.realtime));
    // Guests that run look at their pages again.
    for vcpu in vm.vcpus.lock().values() {
        vcpu.kick.kick();
    }
    Ok(())
}

/// Writes to these ports or addresses wait in a ring. api.rst `KVM_REGISTER_COALESCED_MMIO`. Errors as
/// [`Zones::add`](crate::coalesced::Zones::add).
pub(super) fn register_coalesced_mmio(vm: &Caller<'_, Vm>, zone: &kvm_coalesced_mmio_zone) -> Result<(), Errno> {
    vm.require(Era::Modern)?;
    vm.coalesced.add(zone)
}

/// They do no more. api.rst `KVM_UNREGISTER_COALESCED_MMIO`. EINVAL: neither memory nor ports.
pub(super) fn unregister_coalesced_mmio(vm: &Caller<'_, Vm>, zone: &kvm_coalesced_mmio_zone) -> Result<(), Errno> {
    vm.require(Era::Modern)?;
    vm.coalesced.remove(zone)
}

/// Clears bits of the dirty log, those that the bitmap has. api.rst `KVM_CLEAR_DIRTY_LOG`. EINVAL: no such slot number, a first
/// page that begins no word, a range that is not the slot's. ENOENT: no slot, or it does not log. EFAULT.
pub(super) fn clear_dirty_log(vm: &Caller<'_, Vm>, log: &mut ClearDirtyLog) -> Result<(), Errno> {
    vm.require(Era::Modern)?;
    vm.file.clear_dirty_log(vm.client, log)
}
