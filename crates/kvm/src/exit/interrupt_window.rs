//! The guest can take an interrupt now (SDM Vol. 3 App. C, reason 7). If user space asked for the window it is
//! `KVM_EXIT_IRQ_WINDOW_OPEN`, unless a vector of 2007's queue or of a local APIC here goes in first. Returned by the loop of KVM_RUN, which looks
//! after every exit.

use super::{Outcome, Reason, Row};
use crate::vcpu::Vcpu;

pub(super) const ROW: Row = Row { reason: Reason::InterruptWindow, vmx: Some(7), shows: &["IRQ_WINDOW_OPEN"] };

pub(super) fn handle(vcpu: &mut Vcpu) -> Outcome {
    if vcpu.wants_interrupt_window() && vcpu.interrupts.is_empty() && vcpu.machine.apic().is_none() {
        vcpu.show_interrupt_window();
        return Outcome::User;
    }
    Outcome::Resume
}
