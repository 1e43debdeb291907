//! HLT (SDM Vol. 3 App. C, reason 12). RIP is behind it. With a local APIC here the loop of `KVM_RUN` sleeps; without one
//! user space waits for the next interrupt: `KVM_EXIT_HLT`. A VM of 2007 goes on at once while a vector is queued, whatever IF says.

use kvm_abi::consts::{KVM_EXIT_HLT, KVM_MP_STATE_HALTED};

use super::{Outcome, Reason, Row};
use crate::vcpu::Vcpu;

pub(super) const ROW: Row = Row { reason: Reason::Hlt, vmx: Some(12), shows: &["HLT"] };

pub(super) fn handle(vcpu: &mut Vcpu) -> Outcome {
    if vcpu.era.hlt_looks_at_queue() && !vcpu.interrupts.is_empty() {
        return Outcome::Resume;
    }
    if vcpu.machine.apic().is_some() {
        vcpu.mp_state = KVM_MP_STATE_HALTED;
        return Outcome::Resume;
    }
    vcpu.page.set_exit_reason(KVM_EXIT_HLT);
    Outcome::User
}
