//! Guest state that VM entry refuses (SDM Vol. 3 App. C, reason 33, "VM-entry failure due to invalid guest state").
//!
//! Today `KVM_EXIT_FAIL_ENTRY` with the whole exit reason. In 2007 that stood for errors of the VM instructions, of which none
//! is executed here, and this came as `KVM_EXIT_UNKNOWN`.

use kvm_abi::consts::{KVM_EXIT_FAIL_ENTRY, KVM_EXIT_UNKNOWN};

use nix::sched::sched_getcpu;

use super::{Outcome, Reason, Row};
use crate::vcpu::Vcpu;

pub(super) const ROW: Row = Row { reason: Reason::EntryFailure, vmx: Some(33), shows: &["FAIL_ENTRY", "UNKNOWN"] };

/// The host's CPU that runs this thread, which was in the guest just now: `KVM_CAP_LAST_CPU`.
pub(super) fn last_cpu() -> u32 {
    sched_getcpu().map_or(0, |cpu| cpu as u32)
}

/// Reason 33 with bit 31, "VM-entry failure". SDM Vol. 3 "Format of Exit Reason".
const FAILED_VMENTRY: u64 = 0x8000_0021;

pub(super) fn handle(vcpu: &mut Vcpu) -> Outcome {
    if vcpu.era.bad_state_is_unknown() {
        vcpu.page.set_hw(FAILED_VMENTRY);
        vcpu.page.set_exit_reason(KVM_EXIT_UNKNOWN);
    } else {
        vcpu.page.set_fail_entry(FAILED_VMENTRY, last_cpu());
        vcpu.page.set_exit_reason(KVM_EXIT_FAIL_ENTRY);
    }
    Outcome::User
}
