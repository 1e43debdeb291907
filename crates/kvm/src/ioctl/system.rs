//! Ioctls of `/dev/kvm`.

use kvm_abi::{KVM_API_VERSION, kvm_cpuid_entry2, kvm_msr_entry};
use nix::errno::Errno;

use super::vcpu::MAX_IO_MSRS;
use super::{Caller, Fam};
use crate::client::Client;
use crate::system::System;
use crate::vm::Vm;
use crate::{caps, cpuid, hyperv, mce, msr, run_page};

/// The version since 2.6.22. api.rst `KVM_GET_API_VERSION`. EINVAL: an argument.
pub(super) fn get_api_version(_: &Caller<'_, System>, _: &dyn Client, arg: u64) -> Result<i32, Errno> {
    if arg == 0 { Ok(KVM_API_VERSION) } else { Err(Errno::EINVAL) }
}

/// Makes a VM without memory or vCPUs and returns its descriptor. api.rst `KVM_CREATE_VM`. EINVAL: a machine type other
/// than 0.
pub(super) fn create_vm(system: &Caller<'_, System>, client: &dyn Client, machine_type: u64) -> Result<i32, Errno> {
    if machine_type != 0 {
        return Err(Errno::EINVAL);
    }
    let vm = Vm::new(system.kvm.clone(), client.address_space());
    system.kvm.register(&vm);
    let fd = client.install(vm.clone(), true)?;
    tracing::debug!(vm = vm.id, owner = vm.address_space.pid, "VM created");
    Ok(fd)
}

/// What `caps.rs` has under a number, 0 for anything else. api.rst `KVM_CHECK_EXTENSION`. No error.
pub(super) fn check_extension(_: &Caller<'_, System>, _: &dyn Client, capability: u64) -> Result<i32, Errno> {
    Ok(caps::check_extension(capability))
}

/// Bytes to map of a vCPU file. api.rst `KVM_GET_VCPU_MMAP_SIZE`. EINVAL: an argument.
pub(super) fn get_vcpu_mmap_size(_: &Caller<'_, System>, _: &dyn Client, arg: u64) -> Result<i32, Errno> {
    if arg == 0 { Ok(run_page::SIZE as i32) } else { Err(Errno::EINVAL) }
}

/// The MSRs that make up a guest's state. api.rst `KVM_GET_MSR_INDEX_LIST`. E2BIG: room for fewer; the count is stored
/// all the same.
pub(super) fn get_msr_index_list(_: &Caller<'_, System>, list: &Fam<'_, u32>) -> Result<(), Errno> {
    store_indices(list, &msr::index_list())
}

fn store_indices(list: &Fam<'_, u32>, indices: &[u32]) -> Result<(), Errno> {
    let room = list.count();
    list.set_count(indices.len() as u32)?;
    if (room as usize) < indices.len() { Err(Errno::E2BIG) } else { list.write(indices) }
}

/// The MSRs that tell of features. api.rst `KVM_GET_MSR_FEATURE_INDEX_LIST`. E2BIG as [`get_msr_index_list`].
pub(super) fn get_msr_feature_index_list(_: &Caller<'_, System>, list: &Fam<'_, u32>) -> Result<(), Errno> {
    store_indices(list, &msr::features().map(|(index, _)| index))
}

/// Their values, up to the first that is none of them; returns how many. api.rst `KVM_GET_MSRS`. E2BIG: 256 or more.
pub(super) fn get_msrs(_: &Caller<'_, System>, list: &Fam<'_, kvm_msr_entry>) -> Result<i32, Errno> {
    if list.count() >= MAX_IO_MSRS {
        return Err(Errno::E2BIG);
    }
    let mut entries = list.read()?;
    let (features, mut done) = (msr::features(), 0);
    for entry in &mut entries {
        let Some((_, value)) = features.iter().find(|(index, _)| *index == entry.index) else { break };
        entry.data = *value;
        done += 1;
    }
    list.write(&entries)?;
    Ok(done)
}

/// What the CPU offers. api.rst `KVM_GET_SUPPORTED_CPUID`. E2BIG: room for fewer entries.
pub(super) fn get_supported_cpuid(_: &Caller<'_, System>, list: &Fam<'_, kvm_cpuid_entry2>) -> Result<(), Errno> {
    store_cpuid(list, cpuid::supported())
}

/// What works although the CPU does not offer it. api.rst `KVM_GET_EMULATED_CPUID`. E2BIG: room for fewer entries.
/// EINVAL: padding that is not zero, which Linux checks in this one alone.
pub(super) fn get_emulated_cpuid(_: &Caller<'_, System>, list: &Fam<'_, kvm_cpuid_entry2>) -> Result<(), Errno> {
    if (1..=cpuid::MAX_ENTRIES).contains(&list.count()) && list.read()?.iter().any(|entry| entry.padding != [0; 3]) {
        return Err(Errno::EINVAL);
    }
    store_cpuid(list, &cpuid::emulated())
}

/// What there is of Hyper-V's interface. api.rst `KVM_GET_SUPPORTED_HV_CPUID`. E2BIG: room for fewer entries.
pub(super) fn get_supported_hv_cpuid(_: &Caller<'_, System>, list: &Fam<'_, kvm_cpuid_entry2>) -> Result<(), Errno> {
    store_cpuid(list, &hyperv::supported())
}

pub(super) fn store_cpuid(list: &Fam<'_, kvm_cpuid_entry2>, table: &[kvm_cpuid_entry2]) -> Result<(), Errno> {
    if (list.count() as usize) < table.len() {
        return Err(Errno::E2BIG);
    }
    list.write(table)?;
    list.set_count(table.len() as u32)
}

/// What `KVM_X86_SETUP_MCE` takes beside counts. api.rst `KVM_X86_GET_MCE_CAP_SUPPORTED`.
pub(super) fn get_mce_cap_supported(_: &Caller<'_, System>) -> Result<u64, Errno> {
    Ok(mce::SUPPORTED_CAP)
}
