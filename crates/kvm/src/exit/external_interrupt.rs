//! Somebody wants the vCPU's attention (SDM Vol. 3 App. C, reason 1). Nothing is done here: the loop of KVM_RUN looks for
//! signals after every exit, and ends with `-EINTR` and `KVM_EXIT_INTR` if there is one.

use super::{Outcome, Reason, Row};
use crate::vcpu::Vcpu;

pub(super) const ROW: Row = Row { reason: Reason::ExternalInterrupt, vmx: Some(1), shows: &["INTR"] };

pub(super) fn handle(_: &mut Vcpu) -> Outcome {
    Outcome::Resume
}
