//! Xen's hypercalls, where these are intercepted: by VMCALL or VMMCALL, RIP behind it. `kvm_xen_hypercall`.
//!
//! A few are answered here, of a guest at CPL 0, if user space has set up what they are about; the rest is `KVM_EXIT_XEN`. api.rst §5,
//! `xen`: RIP stays at the instruction until user space has answered. Numbers are of include/xen/interface.

use cpu_core::{Gpr, Seg};
use kvm_abi::consts::KVM_EXIT_XEN;
use x86_defs::GuestPhysAddr;

use super::hypercall::{LEN, mask, rewind};
use super::{Outcome, Pending};
use crate::vcpu::Vcpu;

/// XEN_E…, which are Linux's numbers.
const EFAULT: i64 = 14;

/// XENVER_version
const VERSION: u64 = 0;
/// EVTCHNOP_send
const SEND: u64 = 4;

/// What a hypercall is about.
struct Arguments {
    params: [u64; 6],
}

/// One that may be answered here.
struct Call {
    number: u64,
    /// What RAX gets. `None`: user space answers.
    answer: fn(&mut Vcpu, &Arguments) -> Option<i64>,
}

const fn call(number: u64, answer: fn(&mut Vcpu, &Arguments) -> Option<i64>) -> Call {
    Call { number, answer }
}

/// `__HYPERVISOR_…`
const CALLS: &[Call] = &[call(17, xen_version), call(32, event_channel_op)];

pub(super) fn handle(vcpu: &mut Vcpu, long: bool) -> Outcome {
    use Gpr::*;
    let registers = if long { [Rdi, Rsi, Rdx, R10, R8, R9] } else { [Rbx, Rcx, Rdx, Rsi, Rdi, Rbp] };
    let params = registers.map(|register| vcpu.cpu.reg(register) & mask(long));
    let input = vcpu.cpu.reg(Rax) & mask(long);
    let cpl = vcpu.cpu.sregs().segments[Seg::Ss as usize].dpl;
    let call = CALLS.iter().find(|call| call.number == input && cpl == 0);
    if let Some(result) = call.and_then(|call| (call.answer)(vcpu, &Arguments { params })) {
        vcpu.cpu.set_reg(Rax, result as u64);
        return Outcome::Resume;
    }
    rewind(vcpu);
    vcpu.page.set_xen_hypercall(long, cpl, input, &params);
    vcpu.page.set_exit_reason(KVM_EXIT_XEN);
    vcpu.pending = Some(Pending::Xen { rip: vcpu.linear_rip() });
    Outcome::User
}

/// User space's answer is in `xen.u.hcall.result`.
pub(super) fn complete(vcpu: &mut Vcpu) -> Outcome {
    vcpu.cpu.set_reg(Gpr::Rax, vcpu.page.xen_result());
    vcpu.cpu.skip_instruction(LEN as u8);
    Outcome::Resume
}

/// What the guest has at a linear address, all of it where its first byte leads. Nothing is at guest-physical 0, as Linux has it.
fn read<const N: usize>(vcpu: &mut Vcpu, at: u64) -> Option<[u8; N]> {
    let gpa = vcpu.cpu.translate(at).filter(|&gpa| gpa != 0)?;
    let mut bytes = [0; N];
    vcpu.machine.memory().read(GuestPhysAddr(gpa), &mut bytes).ok()?;
    Some(bytes)
}

fn xen_version(vcpu: &mut Vcpu, args: &Arguments) -> Option<i64> {
    (args.params[0] == VERSION).then(|| vcpu.vm.options.xen.version()).flatten().map(i64::from)
}

/// `struct evtchn_send`: port.
fn event_channel_op(vcpu: &mut Vcpu, args: &Arguments) -> Option<i64> {
    let [SEND, at, ..] = args.params else { return None };
    let Some(port) = read(vcpu, at) else { return Some(-EFAULT) };
    vcpu.vm.options.xen.send_by_guest(u32::from_le_bytes(port)).then_some(0)
}
