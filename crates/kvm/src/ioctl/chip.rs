//! Ioctls of interrupt controllers: on a VM file, and the local APIC's on a vCPU file. A VM of 2007 has none of them.

use std::sync::Arc;

use irqchip::{Route, ioapic, pic, router};
use kvm_abi::consts::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQ_ROUTING_XEN_EVTCHN, KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MSI_VALID_DEVID, KVM_PIT_SPEAKER_DUMMY,
};
use kvm_abi::kvm_msi;
use nix::errno::Errno;

use super::{Caller, Fam};
use crate::caps::MAX_IRQ_ROUTES;
use crate::chip::state::{Irqchip, PitState};
use crate::chip::{Chip, irqfd};
use crate::client::Client;
use crate::era::Era;
use crate::ioeventfd;
use crate::vcpu::Vcpu;
use crate::vm::Vm;
use crate::xen::check_priority;

/// `struct kvm_irq_level`: number (or status), level.
type IrqLevel = [u32; 2];
/// `struct kvm_irq_routing_entry`: gsi, type, flags, padding, and by type chip and pin, address and data, or port, vCPU and priority.
type RoutingEntry = [u32; 12];

/// The VM's chips; `missing` if they are user space's.
fn chip<'a>(vm: &'a Caller<'_, Vm>, missing: Errno) -> Result<&'a Arc<Chip>, Errno> {
    vm.require(Era::Modern)?;
    vm.chip().ok_or(missing)
}

/// The VM's chips, PIC and I/O APIC too.
fn whole<'a>(vm: &'a Caller<'_, Vm>, missing: Errno) -> Result<&'a Arc<Chip>, Errno> {
    chip(vm, missing).and_then(|chip| if chip.wires.is_split() { Err(missing) } else { Ok(chip) })
}

/// PIC, I/O APIC, and a local APIC for each vCPU made from now on. api.rst `KVM_CREATE_IRQCHIP`. EEXIST. EINVAL: there are
/// vCPUs.
pub(super) fn create_irqchip(vm: &Caller<'_, Vm>, _: &dyn Client, _: u64) -> Result<(), Errno> {
    vm.require(Era::Modern)?;
    vm.create_chip(None)
}

/// Raises or lowers a line. api.rst `KVM_IRQ_LINE`. ENXIO: the chips are user space's.
pub(super) fn irq_line(vm: &Caller<'_, Vm>, line: &IrqLevel) -> Result<(), Errno> {
    chip(vm, Errno::ENXIO)?.set_line(line[0], line[1] != 0);
    Ok(())
}

/// As [`irq_line`], and tells in the number's place what became of it. api.rst `KVM_IRQ_LINE_STATUS`.
pub(super) fn irq_line_status(vm: &Caller<'_, Vm>, line: &mut IrqLevel) -> Result<(), Errno> {
    line[0] = chip(vm, Errno::ENXIO)?.set_line(line[0], line[1] != 0) as u32;
    Ok(())
}

/// State of one chip. api.rst `KVM_GET_IRQCHIP`. ENXIO: the chips are user space's. EINVAL: no such chip.
pub(super) fn get_irqchip(vm: &Caller<'_, Vm>, state: &mut Irqchip) -> Result<(), Errno> {
    whole(vm, Errno::ENXIO)?.get_irqchip(state)
}

/// Loads what [`get_irqchip`] reads. api.rst `KVM_SET_IRQCHIP`.
pub(super) fn set_irqchip(vm: &Caller<'_, Vm>, state: &Irqchip) -> Result<(), Errno> {
    whole(vm, Errno::ENXIO)?.set_irqchip(state)
}

/// Replaces all routes. api.rst `KVM_SET_GSI_ROUTING`. EINVAL: the chips are user space's, flags, too many, an entry that
/// names nothing, one number by two routes that do not go together. E2BIG is not returned, as in Linux.
pub(super) fn set_gsi_routing(vm: &Caller<'_, Vm>, list: &Fam<'_, RoutingEntry>) -> Result<(), Errno> {
    let chip = chip(vm, Errno::EINVAL)?;
    if list.count() > MAX_IRQ_ROUTES || list.header_word(1)? != 0 {
        return Err(Errno::EINVAL);
    }
    let mut routes: router::Routes = Vec::new();
    for entry in list.read()? {
        let (gsi, route) = (entry[0], route(&entry, &chip.wires).ok_or(Errno::EINVAL)?);
        let clashes = |other: Route| match (route, other) {
            // One number may be an input of different chips.
            (Route::IoApic(_), Route::Pic(_)) | (Route::Pic(_), Route::IoApic(_)) => false,
            (Route::Pic(a), Route::Pic(b)) => a >> 3 == b >> 3,
            _ => true,
        };
        if gsi >= MAX_IRQ_ROUTES || routes.iter().any(|&(number, other)| number == gsi && clashes(other)) {
            return Err(Errno::EINVAL);
        }
        routes.push((gsi, route));
    }
    chip.wires.set_routes(routes);
    Ok(())
}

fn route(entry: &RoutingEntry, wires: &router::Irqchip) -> Option<Route> {
    let &[_, kind, flags, _, first, second, third, ..] = entry;
    match kind {
        KVM_IRQ_ROUTING_MSI if flags & !KVM_MSI_VALID_DEVID == 0 => {
            let address = u64::from(second) << 32 | u64::from(first);
            (!wires.has_wide_ids() || router::is_wide_address(address)).then_some(Route::Msi { address, data: third })
        }
        KVM_IRQ_ROUTING_XEN_EVTCHN if flags == 0 => {
            let (port, vcpu, priority) = (first, second, third);
            check_priority(priority).ok().map(|()| Route::Event { vcpu, port })
        }
        KVM_IRQ_ROUTING_IRQCHIP if flags == 0 && !wires.is_split() => match first {
            KVM_IRQCHIP_PIC_MASTER if second < 8 => Some(Route::Pic(second as u8)),
            KVM_IRQCHIP_PIC_SLAVE if second < u32::from(pic::PINS) - 8 => Some(Route::Pic(second as u8 + 8)),
            KVM_IRQCHIP_IOAPIC if second < ioapic::PINS.into() => Some(Route::IoApic(second as u8)),
            _ => None,
        },
        _ => None,
    }
}

/// Sends a message. api.rst `KVM_SIGNAL_MSI`. Returns how many took it. EINVAL: the chips are user space's, flags, an address that
/// ids of 32 bits do not have. EPERM: it is for nobody, as Linux's −1 reads.
pub(super) fn signal_msi(vm: &Caller<'_, Vm>, msi: &kvm_msi) -> Result<i32, Errno> {
    let chip = chip(vm, Errno::EINVAL)?;
    if msi.flags & !KVM_MSI_VALID_DEVID != 0 {
        return Err(Errno::EINVAL);
    }
    let address = u64::from(msi.address_hi) << 32 | u64::from(msi.address_lo);
    if chip.wires.has_wide_ids() && !router::is_wide_address(address) {
        return Err(Errno::EINVAL);
    }
    match chip.wires.signal_msi(address, msi.data) {
        taken if taken >= 0 => Ok(taken),
        _ => Err(Errno::EPERM),
    }
}

/// An eventfd that interrupts. api.rst `KVM_IRQFD`. Errors as [`irqfd::set`]; EINVAL: none may be added while the chips are
/// user space's.
pub(super) fn set_irqfd(vm: &Caller<'_, Vm>, argument: &irqfd::Argument) -> Result<(), Errno> {
    vm.require(Era::Modern)?;
    irqfd::set(vm.chip(), vm.client, argument)
}

/// An eventfd that a guest's write signals. api.rst `KVM_IOEVENTFD`. Errors as [`ioeventfd::Ioeventfds::set`].
pub(super) fn set_ioeventfd(vm: &Caller<'_, Vm>, argument: &ioeventfd::Argument) -> Result<(), Errno> {
    vm.require(Era::Modern)?;
    vm.ioeventfds.set(vm.client, argument)
}

/// The timer; `KVM_PIT_SPEAKER_DUMMY`: port 61H too. api.rst `KVM_CREATE_PIT2`. EEXIST. ENOENT: the PIC is user space's.
pub(super) fn create_pit2(vm: &Caller<'_, Vm>, config: &[u32; 16]) -> Result<(), Errno> {
    whole(vm, Errno::ENOENT)?.create_pit(config[0] & KVM_PIT_SPEAKER_DUMMY != 0)
}

/// As [`create_pit2`] with port 61H. The header's `KVM_CREATE_PIT`. EEXIST. ENOENT.
pub(super) fn create_pit(vm: &Caller<'_, Vm>, _: &dyn Client, _: u64) -> Result<(), Errno> {
    whole(vm, Errno::ENOENT)?.create_pit(true)
}

/// As [`get_pit2`], without flags. The header's `KVM_GET_PIT`. ENXIO.
pub(super) fn get_pit(vm: &Caller<'_, Vm>, state: &mut [u32; 18]) -> Result<(), Errno> {
    state.copy_from_slice(&chip(vm, Errno::ENXIO)?.get_pit()?[..18]);
    Ok(())
}

/// As [`set_pit2`]; flags stay. The header's `KVM_SET_PIT`. ENXIO.
pub(super) fn set_pit(vm: &Caller<'_, Vm>, state: &[u32; 18]) -> Result<(), Errno> {
    let chip = chip(vm, Errno::ENXIO)?;
    let mut all = chip.get_pit()?;
    all[..18].copy_from_slice(state);
    chip.set_pit(&all)
}

/// State of the timer. api.rst `KVM_GET_PIT2`. ENXIO: there is none.
pub(super) fn get_pit2(vm: &Caller<'_, Vm>) -> Result<PitState, Errno> {
    chip(vm, Errno::ENXIO)?.get_pit()
}

/// Loads what [`get_pit2`] reads. api.rst `KVM_SET_PIT2`.
pub(super) fn set_pit2(vm: &Caller<'_, Vm>, state: &PitState) -> Result<(), Errno> {
    chip(vm, Errno::ENXIO)?.set_pit(state)
}

/// Whether ticks that a guest missed come later. api.rst `KVM_REINJECT_CONTROL`: `struct kvm_reinject_control`, whose size
/// the number does not tell. ENXIO: there is no timer.
pub(super) fn reinject_control(vm: &Caller<'_, Vm>, client: &dyn Client, arg: u64) -> Result<(), Errno> {
    let mut control = [0; 32];
    client.read(arg, &mut control)?;
    let chip = chip(vm, Errno::ENXIO)?;
    chip.wires.with_pit(|pit| pit.set_reinject(control[0] != 0)).ok_or(Errno::ENXIO)
}

/// The registers of the local APIC. api.rst `KVM_GET_LAPIC`. EINVAL: it is user space's, or has another id than fits.
pub(super) fn get_lapic(vcpu: &mut Vcpu) -> Result<[u32; 256], Errno> {
    let apic = vcpu.machine.apic().ok_or(Errno::EINVAL)?;
    apic.lapic.page(vcpu.machine.now(), apic.chip.wires.has_wide_ids()).ok_or(Errno::EINVAL)
}

/// Loads what [`get_lapic`] reads. api.rst `KVM_SET_LAPIC`.
pub(super) fn set_lapic(vcpu: &mut Vcpu, page: &[u32; 256]) -> Result<(), Errno> {
    let apic = vcpu.machine.apic().ok_or(Errno::EINVAL)?;
    apic.lapic.load_page(page, vcpu.machine.now(), apic.chip.wires.has_wide_ids()).ok_or(Errno::EINVAL)?;
    vcpu.vm.options.xen.apic_enabled(apic.lapic.id());
    vcpu.load_cr8();
    Ok(())
}

/// Where a 32-bit guest's patched instructions keep the task priority; 0: nowhere. api.rst `KVM_SET_VAPIC_ADDR`. EINVAL: the local
/// APIC is user space's, or no memory is there.
pub(super) fn set_vapic_addr(vcpu: &mut Vcpu, addr: &u64) -> Result<(), Errno> {
    vcpu.machine.apic().ok_or(Errno::EINVAL)?.set_vapic(*addr)
}

/// Accesses to the task priority in memory end in `KVM_EXIT_TPR_ACCESS`, behind the instruction; `struct kvm_tpr_access_ctl`:
/// enabled, flags. Linux's x86.c `vcpu_ioctl_tpr_access_reporting`. EINVAL: flags.
pub(super) fn tpr_access_reporting(vcpu: &mut Vcpu, control: &mut [u32; 10]) -> Result<(), Errno> {
    let &mut [enabled, flags, ..] = control;
    if flags != 0 {
        return Err(Errno::EINVAL);
    }
    vcpu.reports_tpr = enabled != 0;
    Ok(())
}
