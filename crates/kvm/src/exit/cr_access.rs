//! MOV to CR8 lowered the task priority, which user space's local APIC wants to hear of (SDM Vol. 3 App. C, reason 28):
//! `KVM_EXIT_SET_TPR`. RIP is behind it, and the new priority is in `kvm_run.cr8`.

use kvm_abi::consts::KVM_EXIT_SET_TPR;

use super::{Outcome, Reason, Row};
use crate::vcpu::Vcpu;

pub(super) const ROW: Row = Row { reason: Reason::CrAccess, vmx: Some(28), shows: &["SET_TPR"] };

pub(super) fn handle(vcpu: &mut Vcpu) -> Outcome {
    vcpu.page.set_exit_reason(KVM_EXIT_SET_TPR);
    Outcome::User
}
