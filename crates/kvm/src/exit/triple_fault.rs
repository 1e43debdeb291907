//! A fault while delivering #DF (SDM Vol. 3 App. C, reason 2): `KVM_EXIT_SHUTDOWN`. The state is the one that faulted; VMMs
//! reset the vCPU.

use kvm_abi::consts::KVM_EXIT_SHUTDOWN;

use super::{Outcome, Reason, Row};
use crate::vcpu::Vcpu;

pub(super) const ROW: Row = Row { reason: Reason::TripleFault, vmx: Some(2), shows: &["SHUTDOWN"] };

pub(super) fn handle(vcpu: &mut Vcpu) -> Outcome {
    vcpu.page.set_exit_reason(KVM_EXIT_SHUTDOWN);
    Outcome::User
}
