//! VMCALL or VMMCALL (SDM Vol. 3 App. C, reason 18). RIP is behind it.
//!
//! Today's Linux answers here: RAX ← −EPERM outside CPL 0, −ENOSYS for what it does not know or the guest may not use, 32 bits of
//! numbers, arguments and results outside 64-bit mode (`kvm_emulate_hypercall` of x86.c; Documentation/virt/kvm/x86/hypercalls.rst).
//! `KVM_HC_MAP_GPA_RANGE` is user space's, if it wants to hear of it (`KVM_CAP_EXIT_HYPERCALL`). 2007 hands all to user space and
//! puts `hypercall.ret` into RAX at the next KVM_RUN; its exit reason was meant to be `KVM_EXIT_HYPERCALL`.

use cpu_core::{Gpr, Seg};
use irqchip::{DeliveryMode, Message};
use kvm_abi::consts::KVM_EXIT_HYPERCALL;
use nix::time::{ClockId, clock_gettime};
use x86_defs::cpuid::{self as bit, Feature};
use x86_defs::{Cr0, GuestPhysAddr, PAGE_SHIFT, vector};

use super::{Outcome, Pending, Reason, Row};
use crate::hyperv;
use crate::machine::host_tsc;
use crate::vcpu::Vcpu;

pub(super) const ROW: Row = Row { reason: Reason::Vmcall, vmx: Some(18), shows: &["HYPERCALL", "XEN"] };

/// `KVM_E…` of `linux/kvm_para.h`.
const EPERM: i64 = 1;
const EFAULT: i64 = 14;
const EINVAL: i64 = 22;
const EOPNOTSUPP: i64 = 95;
const ENOSYS: i64 = 1000;

/// EAX bit 31 tells Hyper-V's hypercalls from Xen's.
const HYPERV_MARK: u64 = 1 << 31;

/// Bytes of VMCALL and VMMCALL.
pub(super) const LEN: u64 = 3;

/// RBX, RCX, RDX and RSI, and whether the guest is in 64-bit mode.
struct Arguments {
    a: [u64; 4],
    long: bool,
}

/// One hypercall that is answered here.
struct Call {
    number: u64,
    /// Unknown to a guest that may not use this.
    feature: Option<Feature>,
    /// What RAX gets.
    answer: fn(&mut Vcpu, &Arguments) -> i64,
}

const fn call(number: u64, feature: Option<Feature>, answer: fn(&mut Vcpu, &Arguments) -> i64) -> Call {
    Call { number, feature, answer }
}

/// Numbers of `linux/kvm_para.h`.
const CALLS: &[Call] = &[
    // KVM_HC_VAPIC_POLL_IRQ: the exit alone lets pending interrupts in.
    call(1, None, |_, _| 0),
    call(5, Some(bit::KVM_PV_UNHALT), kick_cpu),
    call(9, None, clock_pairing),
    call(10, Some(bit::KVM_PV_SEND_IPI), send_ipi),
    call(11, Some(bit::KVM_PV_SCHED_YIELD), sched_yield),
];
/// `KVM_HC_MAP_GPA_RANGE`
const MAP_GPA_RANGE: u64 = 12;
/// What `KVM_CAP_EXIT_HYPERCALL` can hand to user space.
pub(crate) const EXITS: u64 = 1 << MAP_GPA_RANGE;

pub(super) fn handle(vcpu: &mut Vcpu) -> Outcome {
    let long = vcpu.cpu.is_64bit();
    if vcpu.era.exits_on_hypercalls() {
        use Gpr::*;
        let registers = if long { [Rdi, Rsi, Rdx, Rcx, R8, R9] } else { [Rax, Rcx, Rdx, Rsi, Rdi, Rbp] };
        let args = registers.map(|register| vcpu.cpu.reg(register) & mask(long));
        vcpu.page.set_legacy_hypercall(&args, long);
        vcpu.page.set_exit_reason(KVM_EXIT_HYPERCALL);
        return Outcome::User;
    }
    if vcpu.vm.options.xen.intercepts() {
        let marked = vcpu.cpu.reg(Gpr::Rax) & HYPERV_MARK != 0 && vcpu.machine.has_hyperv_hypercalls();
        return if marked { answer_hyperv(vcpu, long) } else { super::xen::handle(vcpu, long) };
    }
    if vcpu.machine.has_hyperv_hypercalls() {
        return answer_hyperv(vcpu, long);
    }
    let number = vcpu.cpu.reg(Gpr::Rax) & mask(long);
    let a = [Gpr::Rbx, Gpr::Rcx, Gpr::Rdx, Gpr::Rsi].map(|register| vcpu.cpu.reg(register) & mask(long));
    let cpl = vcpu.cpu.sregs().segments[Seg::Ss as usize].dpl;
    let result = if cpl != 0 {
        -EPERM
    } else if let Some(call) = CALLS.iter().find(|call| call.number == number) {
        let allowed = call.feature.is_none_or(|feature| vcpu.machine.pv.allows(feature));
        if allowed { (call.answer)(vcpu, &Arguments { a, long }) } else { -ENOSYS }
    } else if number == MAP_GPA_RANGE && vcpu.vm.exits_on_hypercall(number) {
        if is_range(a[0], a[1]) {
            return show(vcpu, number, &a[..3], long);
        }
        -EINVAL
    } else {
        -ENOSYS
    };
    vcpu.cpu.set_reg(Gpr::Rax, result as u64 & mask(long));
    Outcome::Resume
}

/// `kvm_hv_hypercall`: #UD outside CPL 0 and protected mode.
fn answer_hyperv(vcpu: &mut Vcpu, long: bool) -> Outcome {
    use Gpr::*;
    let sregs = vcpu.cpu.sregs();
    if sregs.segments[Seg::Ss as usize].dpl != 0 || !sregs.cr0.contains(Cr0::PE) {
        rewind(vcpu);
        vcpu.cpu.queue_exception(vector::UD, None);
        return Outcome::Resume;
    }
    let pair = |high, low| vcpu.cpu.reg(high) << 32 | vcpu.cpu.reg(low) & 0xffff_ffff;
    let (control, input) = if long { (vcpu.cpu.reg(Rcx), vcpu.cpu.reg(Rdx)) } else { (pair(Rdx, Rax), pair(Rbx, Rcx)) };
    let result = hyperv::answer(&vcpu.machine, control, input);
    vcpu.cpu.set_reg(Rax, result & mask(long));
    if !long {
        vcpu.cpu.set_reg(Rdx, result >> 32);
    }
    Outcome::Resume
}

/// RIP is at the instruction again.
pub(super) fn rewind(vcpu: &mut Vcpu) {
    let regs = vcpu.cpu.regs();
    vcpu.cpu.set_regs(&cpu_core::Regs { rip: regs.rip.wrapping_sub(LEN), ..regs });
}

/// What a register has in this mode.
pub(super) fn mask(long: bool) -> u64 {
    if long { u64::MAX } else { 0xffff_ffff }
}

/// Whole pages, at least one, that do not wrap.
fn is_range(gpa: u64, pages: u64) -> bool {
    let first = gpa >> PAGE_SHIFT;
    gpa.trailing_zeros() >= PAGE_SHIFT && first.wrapping_add(pages) > first
}

/// api.rst §5, `hypercall`. Linux moves RIP behind the instruction only once user space has answered.
fn show(vcpu: &mut Vcpu, number: u64, args: &[u64], long: bool) -> Outcome {
    rewind(vcpu);
    vcpu.page.set_hypercall(number, args, long);
    vcpu.page.set_exit_reason(KVM_EXIT_HYPERCALL);
    vcpu.pending = Some(Pending::Hypercall);
    Outcome::User
}

/// User space's answer is in `hypercall.ret`.
pub(super) fn complete(vcpu: &mut Vcpu) -> Outcome {
    let mut regs = vcpu.cpu.regs();
    regs.gpr[Gpr::Rax as usize] = vcpu.page.hypercall_ret() & mask(vcpu.cpu.is_64bit());
    regs.rip = regs.rip.wrapping_add(LEN) & mask(vcpu.cpu.is_64bit());
    vcpu.cpu.set_regs(&regs);
    Outcome::Resume
}

/// `KVM_HC_KICK_CPU`: flags (none), APIC id. That vCPU's HLT ends.
fn kick_cpu(vcpu: &mut Vcpu, args: &Arguments) -> i64 {
    if let Some(apic) = vcpu.machine.apic() {
        apic.chip.wires.unhalt(args.a[1] as u32);
    }
    yield_to(vcpu, args.a[1]);
    0
}

/// `KVM_HC_SCHED_YIELD`: APIC id of the vCPU to run in this one's place.
fn sched_yield(vcpu: &mut Vcpu, args: &Arguments) -> i64 {
    yield_to(vcpu, args.a[0]);
    0
}

/// A thread cannot name the one that is to run instead. Without a local APIC here, and for itself, nothing happens.
fn yield_to(vcpu: &Vcpu, id: u64) {
    let Some(apic) = vcpu.machine.apic() else { return };
    let other = u32::try_from(id).ok().filter(|&id| id != vcpu.id).and_then(|id| apic.chip.wires.lapic(id));
    if other.is_some() {
        std::thread::yield_now();
    }
}

/// `KVM_HC_SEND_IPI`: two halves of a bitmap, the APIC id of its first bit, ICR. How many took it (`kvm_pv_send_ipi`).
fn send_ipi(vcpu: &mut Vcpu, args: &Arguments) -> i64 {
    const SHORTHAND: u64 = 3 << 18;
    /// `APIC_DEST_MASK`, which is a bit of what lies beyond.
    const DEST_MASK: u64 = 0x800;
    const LEVEL: u64 = 1 << 15;
    const ASSERT: u64 = 1 << 14;
    let [low, high, first, icr] = args.a;
    if icr & (DEST_MASK | SHORTHAND) != 0 {
        return -EINVAL;
    }
    let Some(apic) = vcpu.machine.apic() else { return -EOPNOTSUPP };
    let Some(mode) = DeliveryMode::of((icr >> 8) as u32) else { return 0 };
    let message = Message {
        vector: icr as u8,
        mode,
        dest: 0,
        logical: false,
        level: icr & LEVEL != 0,
        assert: icr & ASSERT != 0,
    };
    let (first, half) = (first as u32, if args.long { 64 } else { 32 });
    let wires = &apic.chip.wires;
    let taken = wires.send_ipis(low, first, &message) + wires.send_ipis(high, first.wrapping_add(half), &message);
    taken.into()
}

/// `KVM_HC_CLOCK_PAIRING`: address of a `struct kvm_clock_pairing` (seconds, nanoseconds, the guest's counter at that time, flags,
/// padding), which clock: 0, the host's wall clock.
fn clock_pairing(vcpu: &mut Vcpu, args: &Arguments) -> i64 {
    const WALLCLOCK: u64 = 0;
    let [gpa, clock, ..] = args.a;
    if clock != WALLCLOCK {
        return -EOPNOTSUPP;
    }
    let (now, at) = wall_clock();
    let mut pairing = [0; 64];
    pairing[..8].copy_from_slice(&now.tv_sec().to_le_bytes());
    pairing[8..16].copy_from_slice(&now.tv_nsec().to_le_bytes());
    pairing[16..24].copy_from_slice(&vcpu.machine.tsc_at(at).to_le_bytes());
    match vcpu.machine.memory().write(GuestPhysAddr(gpa), &pairing) {
        Ok(()) => 0,
        Err(_) => -EFAULT,
    }
}

/// The wall clock and the host's counter, of a few tries the closest: a thread may be interrupted between the two.
fn wall_clock() -> (nix::sys::time::TimeSpec, u64) {
    let read = || {
        let before = host_tsc();
        let now = clock_gettime(ClockId::CLOCK_REALTIME).expect("every Linux has this clock");
        let took = host_tsc().wrapping_sub(before);
        (took, now, before.wrapping_add(took / 2))
    };
    let (_, now, at) = (0..4).map(|_| read()).min_by_key(|&(took, ..)| took).expect("four tries");
    (now, at)
}
