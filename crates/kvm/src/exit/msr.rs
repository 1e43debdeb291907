//! RDMSR or WRMSR of what the guest may not touch, if user space wants to hear of it (SDM Vol. 3 App. C, reasons 31 and 32):
//! `KVM_EXIT_X86_RDMSR`, `KVM_EXIT_X86_WRMSR`. api.rst §5, `msr`, and "KVM_CAP_X86_USER_SPACE_MSR".
//!
//! error: 0, for user space to set: then the instruction ends with #GP(0). reason: `KVM_MSR_EXIT_REASON_…`. index: ECX. data: the value
//! of WRMSR; user space's answer to RDMSR. RIP is at the instruction until the next KVM_RUN, which does what is left of it before
//! anything else.

use cpu_core::{Gpr, MsrAccess, MsrRefusal};
use kvm_abi::consts::{
    KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_INVAL,
    KVM_MSR_EXIT_REASON_UNKNOWN,
};
use nix::errno::Errno;
use x86_defs::vector;

use super::{Outcome, Pending, Reason, Row};
use crate::client::Client;
use crate::vcpu::Vcpu;
use crate::xen::Xen;

pub(super) const READ: Row = Row { reason: Reason::Rdmsr, vmx: Some(31), shows: &["X86_RDMSR"] };
pub(super) const WRITE: Row = Row { reason: Reason::Wrmsr, vmx: Some(32), shows: &["X86_WRMSR"] };

/// What `KVM_CAP_X86_USER_SPACE_MSR` can be enabled for.
pub(crate) const REASONS: u32 = KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER;

/// `KVM_MSR_EXIT_REASON_…`
pub(crate) fn reason(refusal: MsrRefusal) -> u32 {
    match refusal {
        MsrRefusal::Invalid => KVM_MSR_EXIT_REASON_INVAL,
        MsrRefusal::Unknown => KVM_MSR_EXIT_REASON_UNKNOWN,
        MsrRefusal::Filtered => KVM_MSR_EXIT_REASON_FILTER,
    }
}

/// A guest names its page of Xen's hypercalls: that is done here.
pub(crate) fn is_xen_page(xen: &Xen, index: u32, write: bool, refusal: MsrRefusal) -> bool {
    write && refusal != MsrRefusal::Filtered && xen.is_msr(index)
}

pub(super) fn handle(vcpu: &mut Vcpu, access: &MsrAccess) -> Outcome {
    if is_xen_page(&vcpu.vm.options.xen, access.index, access.write.is_some(), access.refusal) {
        vcpu.xen.page = Some(*access);
        return Outcome::Resume;
    }
    show(vcpu, access)
}

/// What [`handle`] has left to be done with `client` at hand. EFAULT: user space's page is not there.
pub(super) fn write_xen_page(vcpu: &mut Vcpu, client: &dyn Client, access: &MsrAccess) -> Result<Outcome, Errno> {
    if vcpu.write_xen_page(client, access.write.unwrap_or(0))? {
        vcpu.cpu.skip_instruction(access.len);
        return Ok(Outcome::Resume);
    }
    let refused = MsrAccess { refusal: MsrRefusal::Invalid, ..*access };
    if vcpu.vm.options.exits_on_msr(reason(refused.refusal)) {
        return Ok(show(vcpu, &refused));
    }
    vcpu.cpu.queue_exception(vector::GP, Some(0));
    Ok(Outcome::Resume)
}

fn show(vcpu: &mut Vcpu, access: &MsrAccess) -> Outcome {
    let &MsrAccess { index, write, refusal, len } = access;
    vcpu.page.set_msr(reason(refusal), index, write.unwrap_or(0));
    vcpu.page.set_exit_reason(if write.is_some() { KVM_EXIT_X86_WRMSR } else { KVM_EXIT_X86_RDMSR });
    vcpu.pending = Some(Pending::Msr { read: write.is_none(), len });
    Outcome::User
}

pub(super) fn complete(vcpu: &mut Vcpu, read: bool, len: u8) -> Outcome {
    let (error, data) = vcpu.page.msr_answer();
    if error {
        vcpu.cpu.queue_exception(vector::GP, Some(0));
        return Outcome::Resume;
    }
    if read {
        vcpu.cpu.set_reg(Gpr::Rax, data & 0xffff_ffff);
        vcpu.cpu.set_reg(Gpr::Rdx, data >> 32);
    }
    vcpu.cpu.skip_instruction(len);
    Outcome::Resume
}
