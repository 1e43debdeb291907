//! The guest spins with PAUSE (SDM Vol. 3 App. C, reason 40), and there are more vCPUs than processors: one of the others may hold the
//! lock that it waits for. They run first (`kvm_vcpu_on_spin`). RIP is behind the PAUSE.

use super::{Outcome, Reason, Row};
use crate::vcpu::Vcpu;

pub(super) const ROW: Row = Row { reason: Reason::Pause, vmx: Some(40), shows: &[] };

pub(super) fn handle(vcpu: &mut Vcpu) -> Outcome {
    vcpu.mark_preempted();
    vcpu.machine.processors.give_way(&vcpu.waker);
    Outcome::Resume
}
