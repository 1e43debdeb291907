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
const EINVAL: i64 = 22;
const ETIME: i64 = 62;

/// XENVER_version
const VERSION: u64 = 0;
/// EVTCHNOP_send
const SEND: u64 = 4;
/// SCHEDOP_…
const YIELD: u32 = 0;
const POLL: u32 = 3;
/// VCPUOP_…
const SET_SINGLESHOT_TIMER: u32 = 8;
const STOP_SINGLESHOT_TIMER: u32 = 9;
/// VCPU_SSHOTTMR_future: a time that is past is an error.
const FUTURE: u32 = 1 << 0;

/// Channels of one poll, at the most.
const MAX_PORTS: u32 = 128;
/// A timer so far away, ns, is the doing of a counter that overflowed: it rings soon. Xen's "Linux workaround".
const FAR_BITS: u32 = 50;
const SOON: u64 = 100_000_000;

/// What a hypercall is about.
struct Arguments {
    params: [u64; 6],
    /// The guest is in 64-bit mode.
    long: bool,
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
const CALLS: &[Call] =
    &[call(15, set_timer_op), call(17, xen_version), call(24, vcpu_op), call(29, sched_op), call(32, event_channel_op)];

pub(super) fn handle(vcpu: &mut Vcpu, long: bool) -> Outcome {
    use Gpr::*;
    let registers = if long { [Rdi, Rsi, Rdx, R10, R8, R9] } else { [Rbx, Rcx, Rdx, Rsi, Rdi, Rbp] };
    let params = registers.map(|register| vcpu.cpu.reg(register) & mask(long));
    let input = vcpu.cpu.reg(Rax) & mask(long);
    let cpl = vcpu.cpu.sregs().segments[Seg::Ss as usize].dpl;
    let call = CALLS.iter().find(|call| call.number == input && cpl == 0);
    if let Some(result) = call.and_then(|call| (call.answer)(vcpu, &Arguments { params, long })) {
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

/// A time of the VM's clock, ns, in two parts outside 64-bit mode; 0: stop. `kvm_xen_hcall_set_timer_op`
fn set_timer_op(vcpu: &mut Vcpu, args: &Arguments) -> Option<i64> {
    if !vcpu.has_xen_timer() {
        return None;
    }
    let [low, high, ..] = args.params;
    let at = if args.long { low } else { high << 32 | low };
    let now = vcpu.xen_now();
    let left = at.wrapping_sub(now) as i64;
    let is_far = (at as i64) < 0 || left > 0 && (left >> FAR_BITS) as u32 != 0;
    match at {
        0 => vcpu.stop_xen_timer(),
        _ if is_far => vcpu.start_xen_timer(now.wrapping_add(SOON)),
        _ => vcpu.start_xen_timer(at),
    }
    Some(0)
}

/// `struct vcpu_set_singleshot_timer`: a time of the VM's clock, ns, and flags; 64-bit guests have padding behind them, which must be there
/// too. `kvm_xen_hcall_vcpu_op`
fn vcpu_op(vcpu: &mut Vcpu, args: &Arguments) -> Option<i64> {
    let [command, id, at, ..] = args.params;
    let command = command as u32;
    if !vcpu.has_xen_timer() || ![SET_SINGLESHOT_TIMER, STOP_SINGLESHOT_TIMER].contains(&command) {
        return None;
    }
    if id as u32 != vcpu.xen.id {
        return Some(-EINVAL);
    }
    if command == STOP_SINGLESHOT_TIMER {
        vcpu.stop_xen_timer();
        return Some(0);
    }
    let Some(timer): Option<[u8; 12]> = (match args.long {
        true => read::<16>(vcpu, at).and_then(|timer| timer.first_chunk().copied()),
        false => read(vcpu, at),
    }) else {
        return Some(-EFAULT);
    };
    let (expires, flags) = (word64(&timer, 0), word32(&timer, 8));
    if flags & FUTURE != 0 && (expires.wrapping_sub(vcpu.xen_now()) as i64) < 0 {
        return Some(-ETIME);
    }
    vcpu.start_xen_timer(expires);
    Some(0)
}

/// `kvm_xen_hcall_sched_op`
fn sched_op(vcpu: &mut Vcpu, args: &Arguments) -> Option<i64> {
    let [command, at, ..] = args.params;
    match command as u32 {
        POLL if args.long && vcpu.machine.apic().is_some() && vcpu.vm.options.xen.sends_all() => {
            Some(poll(vcpu, at).map_or_else(|errno| -errno, |()| 0))
        }
        POLL | YIELD => {
            super::pause::handle(vcpu);
            Some(0)
        }
        _ => None,
    }
}

/// `struct sched_poll`: where the ports are, how many, a timeout, ns; 0: none. RAX has the result when the vCPU goes on.
fn poll(vcpu: &mut Vcpu, at: u64) -> Result<(), i64> {
    let poll: [u8; 24] = read(vcpu, at).ok_or(EFAULT)?;
    let (first, count, timeout) = (word64(&poll, 0), word32(&poll, 8), word64(&poll, 16));
    if count > MAX_PORTS {
        return Err(EINVAL);
    }
    let mut ports = Vec::new();
    for at in (0..u64::from(count)).map(|number| first.wrapping_add(4 * number)) {
        let port = u32::from_le_bytes(read(vcpu, at).ok_or(EFAULT)?);
        if port >= vcpu.vm.options.xen.channels() {
            return Err(EINVAL);
        }
        ports.push(port);
    }
    vcpu.begin_xen_poll(&ports, timeout);
    Ok(())
}

fn word32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn word64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
