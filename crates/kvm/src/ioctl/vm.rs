//! Ioctls of a VM file.

use std::sync::atomic::Ordering::Relaxed;

use kvm_abi::consts::*;
use kvm_abi::legacy::{kvm_memory_alias, kvm_memory_region};
use kvm_abi::{
    ClearDirtyLog, DirtyLog, MsrFilter, kvm_clock_data, kvm_coalesced_mmio_zone, kvm_create_device, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use nix::errno::Errno;

use super::Caller;
use crate::client::{Client, File};
use crate::device::Device;
use crate::era::Era;
use crate::stats::StatsFile;
use crate::vcpu::VcpuFile;
use crate::vm::Vm;
use crate::{caps, kvmclock, options};

/// `KVM_X86_DISABLE_VALID_EXITS`: those that are not offered are taken and stay as they are, as in Linux.
const DISABLE_EXITS: u32 = KVM_X86_DISABLE_EXITS_MWAIT
    | KVM_X86_DISABLE_EXITS_HLT
    | KVM_X86_DISABLE_EXITS_PAUSE
    | KVM_X86_DISABLE_EXITS_CSTATE;
/// `KVM_PMU_EVENT_FILTER_MAX_EVENTS`
const MAX_PMU_EVENTS: u32 = 300;

/// Switches on what a VM has only if it is wanted, each capability with its own `args[0]`. api.rst `KVM_ENABLE_CAP`, and "Capabilities
/// that can be enabled on VMs". EINVAL: another capability, flags, a value that it does not take. EEXIST, EINVAL: as
/// [`Vm::create_chip`]. E2BIG, EINVAL: as [`Vm::set_dirty_ring`].
pub(super) fn enable_cap(vm: &Caller<'_, Vm>, cap: &kvm_enable_cap) -> Result<(), Errno> {
    vm.require(Era::Modern)?;
    let value = cap.args[0];
    if matches!(cap.cap, KVM_CAP_DIRTY_LOG_RING | KVM_CAP_DIRTY_LOG_RING_ACQ_REL) {
        // The kernel looks at no flags here, and takes 32 bits.
        return vm.set_dirty_ring(value as u32);
    }
    if cap.flags != 0 {
        return Err(Errno::EINVAL);
    }
    match cap.cap {
        // How many inputs user space's I/O APICs have.
        KVM_CAP_SPLIT_IRQCHIP if value <= caps::MAX_IRQ_ROUTES.into() => vm.create_chip(Some(value as u32)),
        KVM_CAP_EXIT_HYPERCALL => vm.set_hypercall_exits(value),
        KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 => vm.set_manual_dirty_log(value),
        KVM_CAP_DISABLE_QUIRKS2 if value & !u64::from(options::QUIRKS) != 0 => Err(Errno::EINVAL),
        KVM_CAP_DISABLE_QUIRKS | KVM_CAP_DISABLE_QUIRKS2 => {
            vm.options.disable_quirks(value);
            Ok(())
        }
        KVM_CAP_MSR_PLATFORM_INFO => {
            vm.options.shows_platform_info.store(value != 0, Relaxed);
            Ok(())
        }
        KVM_CAP_X2APIC_API => vm.set_x2apic_api(value),
        KVM_CAP_EXCEPTION_PAYLOAD => {
            vm.options.has_payloads.store(value != 0, Relaxed);
            Ok(())
        }
        KVM_CAP_X86_TRIPLE_FAULT_EVENT => {
            vm.options.has_triple_faults.store(value != 0, Relaxed);
            Ok(())
        }
        // The others are not offered, and no error.
        KVM_CAP_X86_DISABLE_EXITS if value & !u64::from(DISABLE_EXITS) == 0 => {
            vm.options.keeps_pauses.fetch_or(value & u64::from(KVM_X86_DISABLE_EXITS_PAUSE) != 0, Relaxed);
            Ok(())
        }
        // Nothing polls before it sleeps, and what cannot be emulated always exits.
        KVM_CAP_HALT_POLL if u32::try_from(value).is_ok() => Ok(()),
        KVM_CAP_EXIT_ON_EMULATION_FAILURE if value <= 1 => Ok(()),
        KVM_CAP_X86_USER_SPACE_MSR => vm.options.set_msr_exits(value),
        KVM_CAP_MAX_VCPU_ID => vm.options.limit_vcpu_ids(value),
        _ => Err(Errno::EINVAL),
    }
}

/// What performance counters may count, of which there are none. api.rst `KVM_SET_PMU_EVENT_FILTER`. EINVAL: neither list, flags.
/// E2BIG. EFAULT.
pub(super) fn set_pmu_event_filter(vm: &Caller<'_, Vm>, filter: &[u32; 8]) -> Result<(), Errno> {
    vm.require(Era::Modern)?;
    let &[action, events, _, flags, ..] = filter;
    match (action, flags) {
        (KVM_PMU_EVENT_ALLOW | KVM_PMU_EVENT_DENY, 0) if events <= MAX_PMU_EVENTS => Ok(()),
        (KVM_PMU_EVENT_ALLOW | KVM_PMU_EVENT_DENY, 0) => Err(Errno::E2BIG),
        _ => Err(Errno::EINVAL),
    }
}

/// Which MSRs guests may touch. api.rst `KVM_X86_SET_MSR_FILTER`. EINVAL as [`Filter::set`](crate::msr_filter::Filter::set).
/// EFAULT.
pub(super) fn set_msr_filter(vm: &Caller<'_, Vm>, filter: &MsrFilter) -> Result<(), Errno> {
    vm.require(Era::Modern)?;
    vm.options.msr_filter.set(vm.client, filter)
}

/// A device, and its descriptor in `fd`; or only whether there would be one. api.rst `KVM_CREATE_DEVICE`. ENODEV: another type than
/// x86 has, which is `KVM_DEV_TYPE_VFIO`. EBUSY: the VM has one.
pub(super) fn create_device(vm: &Caller<'_, Vm>, device: &mut kvm_create_device) -> Result<(), Errno> {
    vm.require(Era::Modern)?;
    if device.type_ != kvm_device_type_KVM_DEV_TYPE_VFIO {
        return Err(Errno::ENODEV);
    }
    if device.flags & KVM_CREATE_DEVICE_TEST == 0 {
        let file = Device::new(vm.file)?;
        let fd = vm.client.install(file.clone(), true).inspect_err(|_| file.released())?;
        device.fd = fd as u32;
    }
    Ok(())
}

/// A file with statistics of the VM. api.rst `KVM_GET_STATS_FD`.
pub(super) fn get_stats_fd(vm: &Caller<'_, Vm>, client: &dyn Client, _: u64) -> Result<i32, Errno> {
    vm.require(Era::Modern)?;
    client.install(StatsFile::of_vm(vm.file), true)
}

/// The id of the bootstrap processor. api.rst `KVM_SET_BOOT_CPU_ID`. EBUSY: there are vCPUs.
pub(super) fn set_boot_cpu_id(vm: &Caller<'_, Vm>, _: &dyn Client, id: u64) -> Result<(), Errno> {
    vm.require(Era::Modern)?;
    let vcpus = vm.vcpus.lock();
    if !vcpus.is_empty() {
        return Err(Errno::EBUSY);
    }
    vm.options.set_boot_cpu(id as u32);
    Ok(())
}

/// How many pages shadow page tables may take, of which there are none here. api.rst `KVM_SET_NR_MMU_PAGES`. EINVAL: fewer than
/// 64.
pub(super) fn set_nr_mmu_pages(vm: &Caller<'_, Vm>, _: &dyn Client, pages: u64) -> Result<(), Errno> {
    vm.require(Era::Modern)?;
    vm.options.set_mmu_pages(pages)
}

/// That number. api.rst `KVM_GET_NR_MMU_PAGES`. No error.
pub(super) fn get_nr_mmu_pages(vm: &Caller<'_, Vm>, _: &dyn Client, _: u64) -> Result<i32, Errno> {
    vm.require(Era::Modern)?;
    Ok(i32::try_from(vm.options.mmu_pages()).unwrap_or(i32::MAX))
}

/// Rate of the time-stamp counters of vCPUs to come; 0 is the host's. api.rst `KVM_SET_TSC_KHZ`. EINVAL: out of range.
pub(super) fn set_tsc_khz(vm: &Caller<'_, Vm>, _: &dyn Client, khz: u64) -> Result<(), Errno> {
    vm.require(Era::Modern)?;
    vm.options.set_tsc_khz(khz as u32)
}

/// That rate. api.rst `KVM_GET_TSC_KHZ`.
pub(super) fn get_tsc_khz(vm: &Caller<'_, Vm>, _: &dyn Client, _: u64) -> Result<i32, Errno> {
    vm.require(Era::Modern)?;
    Ok(vm.options.tsc_khz() as i32)
}

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
    if !vm.options.takes_vcpu(id) {
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
/// space. ENOENT: the slot does not log. ENXIO: vCPUs have rings.
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
    vm.options.hyperv.time_changed();
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
/// page that begins no word, a range that is not the slot's. ENOENT: no slot, or it does not log. ENXIO: vCPUs have rings. EFAULT.
pub(super) fn clear_dirty_log(vm: &Caller<'_, Vm>, log: &mut ClearDirtyLog) -> Result<(), Errno> {
    vm.require(Era::Modern)?;
    vm.file.clear_dirty_log(vm.client, log)
}

/// Has pages that were harvested from the rings told of again when they are written again. How many. api.rst
/// "KVM_CAP_DIRTY_LOG_RING". EINVAL: vCPUs have no rings.
pub(super) fn reset_dirty_rings(vm: &Caller<'_, Vm>, _: &dyn Client, _: u64) -> Result<i32, Errno> {
    vm.require(Era::Modern)?;
    vm.file.reset_dirty_rings()
}
