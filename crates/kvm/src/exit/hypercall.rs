//! VMCALL or VMMCALL (SDM Vol. 3 App. C, reason 18). RIP is behind it.
//!
//! Today's Linux answers here: RAX ← −EPERM outside CPL 0, −ENOSYS for what is not offered in CPUID, 32 bits of them
//! outside 64-bit mode (Documentation/virt/kvm/x86/hypercalls.rst). 2007 hands the arguments to user space and puts
//! `hypercall.ret` into RAX at the next KVM_RUN; its exit reason was meant to be `KVM_EXIT_HYPERCALL`.

use cpu_core::{Gpr, Seg};
use kvm_abi::consts::KVM_EXIT_HYPERCALL;

use super::{Outcome, Reason, Row};
use crate::vcpu::Vcpu;

pub(super) const ROW: Row = Row { reason: Reason::Vmcall, vmx: Some(18), shows: &["HYPERCALL"] };

/// `KVM_EPERM` and `KVM_ENOSYS` of `linux/kvm_para.h`.
const EPERM: i64 = 1;
const ENOSYS: i64 = 1000;
/// `KVM_HC_VAPIC_POLL_IRQ`: a no-op that lets pending interrupts in.
const VAPIC_POLL_IRQ: u64 = 1;

pub(super) fn handle(vcpu: &mut Vcpu) -> Outcome {
    let long = vcpu.cpu.is_64bit();
    if vcpu.era.exits_on_hypercalls() {
        use Gpr::*;
        let registers = if long { [Rdi, Rsi, Rdx, Rcx, R8, R9] } else { [Rax, Rcx, Rdx, Rsi, Rdi, Rbp] };
        let mask = if long { u64::MAX } else { 0xffff_ffff };
        let args = registers.map(|register| vcpu.cpu.reg(register) & mask);
        vcpu.page.set_legacy_hypercall(&args, long);
        vcpu.page.set_exit_reason(KVM_EXIT_HYPERCALL);
        return Outcome::User;
    }
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    let cpl = vcpu.cpu.sregs().segments[Seg::Ss as usize].dpl;
    let result = match vcpu.cpu.reg(Gpr::Rax) & mask {
        _ if cpl != 0 => -EPERM,
        VAPIC_POLL_IRQ => 0,
        _ => -ENOSYS,
    };
    vcpu.cpu.set_reg(Gpr::Rax, result as u64 & mask);
    Outcome::Resume
}
