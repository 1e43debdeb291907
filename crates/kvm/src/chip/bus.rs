//! Ports and addresses that are answered here.

use std::sync::atomic::Ordering::Relaxed;

use irqchip::{ioapic, lapic, pic, pit};

use super::Chip;
use super::alarm::monotonic_ns;
use crate::vcpu::{TprAccess, Vcpu};

/// What a read of nothing shows.
const FLOATING: u64 = u64::MAX;

impl Chip {
    fn has_pic_port(&self, port: u16) -> bool {
        !self.wires.is_split() && (pic::PORTS.contains(&(port & !1)) || pic::ELCR_PORTS.contains(&port))
    }

    fn has_pit_port(&self, port: u16) -> bool {
        let counter = port & !3 == pit::PORT;
        self.wires.has_pit() && (counter || port == pit::SPEAKER_PORT && self.speaker.load(Relaxed))
    }

    /// Some: the port is ours.
    pub(crate) fn read_port(&self, port: u16, size: u8) -> Option<u32> {
        if self.has_pic_port(port) {
            // Bytes only, as in `picdev_read`.
            return self.wires.with_pic(|pic| if size == 1 { pic.read(port).into() } else { 0 });
        }
        if !self.has_pit_port(port) {
            return None;
        }
        let now = monotonic_ns();
        let read = |pit: &mut irqchip::Pit| match port {
            pit::SPEAKER_PORT => pit.read_speaker(now),
            _ => pit.read(port, now),
        };
        self.wires.with_pit(read).map(u32::from)
    }

    /// True: the port is ours.
    pub(crate) fn write_port(&self, port: u16, size: u8, value: u32) -> bool {
        let value = value as u8;
        if self.has_pic_port(port) {
            if size == 1 {
                self.wires.with_pic(|pic| pic.write(port, value));
            }
            return true;
        }
        if !self.has_pit_port(port) {
            return false;
        }
        let now = monotonic_ns();
        self.wires.with_pit(|pit| match port {
            pit::SPEAKER_PORT => pit.write_speaker(value, now),
            _ => pit.write(port, value, now),
        });
        if port != pit::SPEAKER_PORT {
            self.arm_pit();
        }
        true
    }
}

/// `gpa` as an offset into the `len` bytes at `base`.
fn offset(gpa: u64, base: u64, len: u64) -> Option<u64> {
    gpa.checked_sub(base).filter(|offset| *offset < len)
}

/// Reads memory that is a chip's. `None`: it is nobody's here.
pub(crate) fn read_memory(vcpu: &mut Vcpu, gpa: u64, len: u8) -> Option<u64> {
    let machine = vcpu.machine.clone();
    let apic = machine.apic()?;
    if let Some(offset) = apic.page_address(&machine).and_then(|base| offset(gpa, base, lapic::LEN)) {
        if !apic.has_page() {
            return Some(FLOATING);
        }
        report_tpr(vcpu, offset, false);
        return Some(apic.lapic.read(offset as u32, len, &apic.chip.wires, vcpu.machine.now()).into());
    }
    read_ioapic(&apic.chip, gpa)
}

fn read_ioapic(chip: &Chip, gpa: u64) -> Option<u64> {
    chip.wires.with_ioapic(|ioapic| offset(gpa, ioapic.base(), ioapic::LEN).map(|offset| ioapic.read(offset).into()))?
}

/// `KVM_TPR_ACCESS_REPORTING`: any part of the register that is read, the whole that is written.
fn report_tpr(vcpu: &mut Vcpu, offset: u64, write: bool) {
    if vcpu.reports_tpr && offset & !0xf == lapic::TPR {
        vcpu.tpr_access = Some(TprAccess { rip: vcpu.cpu.mmio_rip(), write });
    }
}

/// Writes memory that is a chip's. False: it is nobody's here.
pub(crate) fn write_memory(vcpu: &mut Vcpu, gpa: u64, len: u8, value: u64) -> bool {
    let machine = vcpu.machine.clone();
    let Some(apic) = machine.apic() else { return false };
    if let Some(offset) = apic.page_address(&machine).and_then(|base| offset(gpa, base, lapic::LEN)) {
        if apic.has_page() {
            if len == 4 && offset == lapic::TPR {
                report_tpr(vcpu, offset, true);
            }
            apic.lapic.write(offset as u32, len, value as u32, &apic.chip.wires, vcpu.machine.now());
            if offset == lapic::SVR {
                vcpu.machine.options.xen.apic_enabled(apic.lapic.id());
            }
        }
        return true;
    }
    let wires = &apic.chip.wires;
    let written = wires.with_ioapic(|ioapic| {
        let offset = offset(gpa, ioapic.base(), ioapic::LEN)?;
        ioapic.write(offset, value as u32, wires);
        Some(())
    });
    written.flatten().is_some()
}
