//! An exception that the debugger intercepts (SDM Vol. 3 App. C, reason 0): `KVM_EXIT_DEBUG`. api.rst §5, `debug`.
//!
//! pc: linear address of the next instruction after a step, of the instruction at a breakpoint. dr6: as #DB would leave
//! it, bits that are always set included. DR6 itself and the guest's stack stay as they were. In 2007 the exit had no fields.

use kvm_abi::consts::KVM_EXIT_DEBUG;
use x86_defs::vector;

use super::{Outcome, Reason, Row};
use crate::vcpu::Vcpu;

pub(super) const ROW: Row = Row { reason: Reason::Exception, vmx: Some(0), shows: &["DEBUG"] };

/// `DR6_ACTIVE_LOW`: bits that read as 1 when nothing happened.
const DR6_FIXED: u64 = 0xffff_0ff0;
/// DR7 bit 10 always reads as 1.
const DR7_FIXED: u64 = 0x400;

pub(super) fn handle(vcpu: &mut Vcpu, exception: u8, dr6: u64) -> Outcome {
    if vcpu.era.describes_debug_exits() {
        let (dr6, dr7) = match exception {
            vector::DB => (dr6 | DR6_FIXED, vcpu.cpu.breakpoints().dr7 | DR7_FIXED),
            _ => (0, 0),
        };
        vcpu.page.set_debug(exception.into(), vcpu.linear_rip(), dr6, dr7);
    }
    vcpu.page.set_exit_reason(KVM_EXIT_DEBUG);
    Outcome::User
}
