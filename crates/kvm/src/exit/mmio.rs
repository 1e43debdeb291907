//! An access to memory that no slot holds, or a write to a read-only slot (SDM Vol. 3 App. C, reason 48):
//! `KVM_EXIT_MMIO`. api.rst §5, `mmio`.
//!
//! len: bytes, 1 to 8. data: 8 bytes, stale on a read. A write is done when it is reported, RIP is behind it; if it took
//! several parts, the next KVM_RUN reports the next before anything else. A read is finished by the next KVM_RUN.

use cpu_core::Mmio;
use kvm_abi::consts::KVM_EXIT_MMIO;

use super::{Outcome, Pending, Reason, Row};
use crate::chip;
use crate::coalesced;
use crate::ioeventfd::Bus;
use crate::vcpu::Vcpu;

pub(super) const ROW: Row = Row { reason: Reason::EptViolation, vmx: Some(48), shows: &["MMIO"] };

pub(super) fn handle(vcpu: &mut Vcpu, mmio: &Mmio) -> Outcome {
    if is_answered_here(vcpu, mmio) {
        return if mmio.write.is_some() { complete_write(vcpu) } else { Outcome::Resume };
    }
    vcpu.page.set_mmio(mmio.gpa, mmio.len.into(), mmio.write);
    vcpu.page.set_exit_reason(KVM_EXIT_MMIO);
    vcpu.pending = Some(match mmio.write {
        Some(_) => Pending::MmioWrite,
        None => Pending::MmioRead { rip: vcpu.linear_rip() },
    });
    Outcome::User
}

/// Interrupt controllers, eventfds and the ring.
fn is_answered_here(vcpu: &mut Vcpu, mmio: &Mmio) -> bool {
    match mmio.write {
        Some(value) => {
            chip::write_memory(vcpu, mmio.gpa, mmio.len, value)
                || vcpu.vm.ioeventfds.write(Bus::Mmio, mmio.gpa, mmio.len.into(), value)
                || coalesced::write(vcpu, false, mmio.gpa, mmio.len, value)
        }
        None => match chip::read_memory(vcpu, mmio.gpa, mmio.len) {
            Some(value) => {
                vcpu.cpu.complete_mmio_read(value);
                true
            }
            None => false,
        },
    }
}

pub(super) fn complete_read(vcpu: &mut Vcpu) -> Outcome {
    let data = vcpu.page.mmio_data();
    vcpu.cpu.complete_mmio_read(data);
    Outcome::Resume
}

pub(super) fn complete_write(vcpu: &mut Vcpu) -> Outcome {
    match vcpu.cpu.next_mmio_write() {
        Some(next) => handle(vcpu, &next),
        None => Outcome::Resume,
    }
}
