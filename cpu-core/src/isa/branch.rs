//! Near branches: JMP Jcc CALL RET LOOP JCXZ. Far forms are with the segments. SDM Vol. 2, the page of each mnemonic.
#![expect(unsafe_code, reason = "hot semantics run on the dispatch's raw CPU pointer")]

use std::marker::PhantomData;

use iced_x86::{Code as C, Mnemonic as M};

use super::stack::push_64;
use super::{Row, by_form, by_stack, codes, plain_handler, row};
use crate::cpu::{Cpu, Done, Stop, Then};
use crate::decode::digest::{Branch, Digest, Lowered};
use crate::fault::Fault;
use crate::flags::{Flags, kind};
use crate::host::HostWord;
use crate::op::{Form, Handler, Machine, Op, Semantics, Stored, To, attempt, handler, ras_pop, ras_push};
use crate::state::{Gpr, Seg};

use super::mov::ANY;

pub(super) const ROWS: &[Row] = &[
    codes(&[C::Jmp_rel8_16, C::Jmp_rel8_32, C::Jmp_rel8_64, C::Jmp_rel16, C::Jmp_rel32_32, C::Jmp_rel32_64], jmp),
    codes(&[C::Jmp_rm16, C::Jmp_rm32, C::Jmp_rm64], jmp_indirect),
    codes(&[C::Call_rel16, C::Call_rel32_32, C::Call_rel32_64], call),
    codes(&[C::Call_rm16, C::Call_rm32, C::Call_rm64], call_indirect),
    codes(&[C::Retnw, C::Retnd, C::Retnq, C::Retnw_imm16, C::Retnd_imm16, C::Retnq_imm16], ret),
    row(M::Jo, jcc::<0>),
    row(M::Jno, jcc::<1>),
    row(M::Jb, jcc::<2>),
    row(M::Jae, jcc::<3>),
    row(M::Je, jcc::<4>),
    row(M::Jne, jcc::<5>),
    row(M::Jbe, jcc::<6>),
    row(M::Ja, jcc::<7>),
    row(M::Js, jcc::<8>),
    row(M::Jns, jcc::<9>),
    row(M::Jp, jcc::<10>),
    row(M::Jnp, jcc::<11>),
    row(M::Jl, jcc::<12>),
    row(M::Jge, jcc::<13>),
    row(M::Jle, jcc::<14>),
    row(M::Jg, jcc::<15>),
    row(M::Jcxz, counted::<0>),
    row(M::Jecxz, counted::<0>),
    row(M::Jrcxz, counted::<0>),
    row(M::Loop, counted::<1>),
    row(M::Loope, counted::<2>),
    row(M::Loopne, counted::<3>),
];

/// A branch target must lie inside CS outside 64-bit mode, and be canonical in it; 16-bit operands cut it.
/// Returns the target as RIP will hold it.
fn target_of(d: &Digest<'_>, width: u32) -> u64 {
    let target = d.ins.near_branch_target();
    match width {
        2 => target & 0xffff,
        4 => target & 0xffff_ffff,
        _ => target,
    }
}

/// Bytes of a near branch's operand: of RIP as it is loaded.
fn operand_bytes(d: &Digest<'_>) -> u32 {
    use iced_x86::OpKind::{NearBranch16, NearBranch32};
    match d.ins.op0_kind() {
        NearBranch16 => 2,
        NearBranch32 => 4,
        _ => 8,
    }
}

/// The target can be linked to: nothing to check when the branch is taken. Elsewhere a plain function checks.
fn is_linkable(d: &Digest<'_>) -> bool {
    d.mode.is_64bit() && operand_bytes(d) == 8
}

impl Cpu {
    /// Checks and loads RIP: #GP(0) outside the limit of CS, or where not canonical.
    pub(crate) fn near_jump(&mut self, target: u64) -> Result<(), Stop> {
        self.check_target(target)?;
        self.rip = target;
        Ok(())
    }

    /// #GP(0) where RIP could not be `target`.
    pub(crate) fn check_target(&mut self, target: u64) -> Result<(), Stop> {
        let good = if self.is_64bit() {
            self.is_canonical(target)
        } else {
            target <= u64::from(self.seg[Seg::Cs as usize].limit)
        };
        if good { Ok(()) } else { Err(self.fault(Fault::gp(0))) }
    }
}

pub(super) struct Jump;
impl Semantics for Jump {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        To::Op(m.op().imm as *const Op)
    }
}

fn jmp(d: &Digest<'_>) -> Option<Lowered> {
    let width = operand_bytes(d);
    if !is_linkable(d) {
        let mut lowered = quiet(d, plain_handler(jmp_checked)).ends();
        lowered.op.imm = target_of(d, width);
        return Some(lowered);
    }
    Some(Lowered {
        branch: Some(Branch::Always(target_of(d, width))),
        barrier: true,
        ..quiet(d, handler::<Jump>).ends()
    })
}

/// An op that leaves the flags alone.
fn quiet(d: &Digest<'_>, h: Handler) -> Lowered {
    Lowered { reads_flags: false, ..d.lower(h).keeps_flags() }
}

/// JMP rel where the limit counts.
fn jmp_checked(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.near_jump(op.imm)?;
    Ok(Then::Branch)
}

/// A conditional branch on flags of a known kind, or of any.
pub(super) struct Jcc<const CC: u8, const KNOWN: u64>;
impl<const CC: u8, const KNOWN: u64> Semantics for Jcc<CC, KNOWN> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let mut flags = m.flags();
        if KNOWN != ANY {
            flags.kind = KNOWN;
        }
        let taken =
            if KNOWN != ANY && KNOWN >= kind::ADD { known_condition::<CC, KNOWN>(flags) } else { flags.condition(CC) };
        if taken { side_exit(m.op, m) } else { To::Next }
    }
}

/// `S` and the conditional branch behind it in one dispatch. `S` misses, faults and leaves as by itself: the branch has
/// not begun then.
pub(super) struct Fused<S, const CC: u8>(PhantomData<S>);
impl<S: Semantics, const CC: u8> Semantics for Fused<S, CC> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        // SAFETY: `m` is the dispatch's.
        match unsafe { S::run(m) } {
            To::Next => {}
            other => return other,
        }
        // SAFETY: the trace builder fuses an op only with the branch's behind it.
        let branch = unsafe { m.op.add(1) };
        if m.flags().condition_folded(CC) { side_exit(branch, m) } else { To::Skip }
    }
}

/// The handler of `S` and a branch on condition `cc`, for the conditions that compilers use behind a comparison.
pub(super) fn fuse_compare<S: Semantics>(cc: u8) -> Option<Handler> {
    Some(match cc {
        2 => handler::<Fused<S, 2>>,
        3 => handler::<Fused<S, 3>>,
        4 => handler::<Fused<S, 4>>,
        5 => handler::<Fused<S, 5>>,
        6 => handler::<Fused<S, 6>>,
        7 => handler::<Fused<S, 7>>,
        12 => handler::<Fused<S, 12>>,
        13 => handler::<Fused<S, 13>>,
        14 => handler::<Fused<S, 14>>,
        15 => handler::<Fused<S, 15>>,
        _ => return None,
    })
}

/// As [`fuse_compare`], behind a result that is looked at for itself.
pub(super) fn fuse_result<S: Semantics>(cc: u8) -> Option<Handler> {
    Some(match cc {
        4 => handler::<Fused<S, 4>>,
        5 => handler::<Fused<S, 5>>,
        8 => handler::<Fused<S, 8>>,
        9 => handler::<Fused<S, 9>>,
        14 => handler::<Fused<S, 14>>,
        15 => handler::<Fused<S, 15>>,
        _ => return None,
    })
}

/// The condition over the flags of a kind that is known when the handler is compiled.
#[inline(always)]
fn known_condition<const CC: u8, const KNOWN: u64>(flags: Flags) -> bool {
    crate::flags::condition_of_bits(CC, flags.bits_known::<KNOWN>())
}

/// Leaves the trace by `branch`: the instructions behind it are given back.
#[inline(always)]
fn side_exit(branch: *const Op, m: &mut Machine) -> To {
    // SAFETY: a branch of the running trace; the borrow ends here.
    let op = unsafe { &*branch };
    let (link, left) = (op.imm as *const Op, op.left);
    m.budget += i64::from(left) - 1;
    To::Op(link)
}

fn jcc<const CC: u8>(d: &Digest<'_>) -> Option<Lowered> {
    let width = operand_bytes(d);
    if !is_linkable(d) {
        let mut lowered = quiet(d, plain_handler(jcc_checked::<CC>)).reads_flags();
        lowered.op.imm = target_of(d, width);
        return Some(lowered);
    }
    const SUB: u64 = kind::SUB;
    const ADD: u64 = kind::ADD;
    const INC: u64 = kind::INC;
    const DEC: u64 = kind::DEC;
    macro_rules! known {
        ($($kind:expr,)*) => {
            match d.known_flags {
                $(Some(k) if k == $kind => handler::<Jcc<CC, { $kind }>> as Handler,)*
                _ => handler::<Jcc<CC, ANY>>,
            }
        };
    }
    let h = known![SUB, SUB + 1, SUB + 2, SUB + 3, ADD + 2, ADD + 3, INC + 2, INC + 3, DEC + 2, DEC + 3,];
    let branch = Some(Branch::Conditional(target_of(d, width)));
    Some(Lowered { branch, barrier: true, condition: Some(CC), ..quiet(d, h).reads_flags() })
}

fn jcc_checked<const CC: u8>(cpu: &mut Cpu, op: &Op) -> Done {
    if !cpu.flags().condition(CC) {
        return Ok(Then::Next);
    }
    cpu.near_jump(op.imm)?;
    Ok(Then::Branch)
}

pub(super) struct Call<F>(PhantomData<F>);
impl<F: Form> Semantics for Call<F> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let op = *m.op();
        let back = m.get::<u64>(crate::cpu::SLOT_TRACE_IP).wrapping_add(u64::from(op.off) + u64::from(op.len));
        match push_64::<F>(m, back) {
            Ok(Stored::Ram) => {
                // SAFETY: a call's op is followed by a data slot that holds the link of its return address.
                let after = unsafe { Op::link_behind(m.op) };
                ras_push(m, back, after);
                To::Op(op.imm as *const Op)
            }
            // The link leads to a head, which sees that attention is wanted.
            Ok(Stored::Elsewhere) => To::LeaveFor(op.imm as *const Op),
            Err(to) => to,
        }
    }
}

fn call(d: &Digest<'_>) -> Option<Lowered> {
    let width = operand_bytes(d);
    if !is_linkable(d) {
        let mut lowered = quiet(
            d,
            match width {
                2 => plain_handler(call_checked::<u16>),
                4 => plain_handler(call_checked::<u32>),
                _ => plain_handler(call_checked::<u64>),
            },
        );
        lowered.op.imm = target_of(d, width);
        return Some(lowered.ends());
    }
    let mut lowered = quiet(d, by_stack!(d, F => handler::<Call<F>>)).ends();
    lowered.op.seg = Seg::Ss as u8;
    Some(Lowered { branch: Some(Branch::Call(target_of(d, width))), data: true, ..lowered })
}

fn call_checked<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    call_to::<W>(cpu, op, op.imm)
}

fn call_to<W: HostWord>(cpu: &mut Cpu, op: &Op, target: u64) -> Done {
    cpu.check_target(target)?;
    let back = cpu.next_ip(op);
    cpu.push(W::of(back))?;
    cpu.rip = target;
    Ok(Then::Branch)
}

pub(super) struct JumpReg;
impl Semantics for JumpReg {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        To::Indirect(m.get(m.op().dst))
    }
}

pub(super) struct JumpMem<F>(PhantomData<F>);
impl<F: Form> Semantics for JumpMem<F> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        // SAFETY: `m` is the dispatch's.
        let la = attempt!(unsafe { F::linear(m, 8, false) });
        To::Indirect(attempt!(m.load::<F, u64>(la)))
    }
}

/// Bytes of an indirect near branch's operand.
fn indirect_bytes(d: &Digest<'_>) -> u32 {
    if d.is_mem(0) { d.ins.memory_size().size() as u32 } else { d.bytes(0) }
}

fn jmp_indirect(d: &Digest<'_>) -> Option<Lowered> {
    let h: Handler = match (indirect_bytes(d), d.is_mem(0)) {
        (8, false) => handler::<JumpReg>,
        (8, true) => by_form!(d, F => handler::<JumpMem<F>>),
        (4, _) => plain_handler(jmp_any::<u32>),
        _ => plain_handler(jmp_any::<u16>),
    };
    Some(from(d, quiet(d, h).ends()))
}

/// `aux` tells the plain forms where the target is.
fn from(d: &Digest<'_>, mut lowered: Lowered) -> Lowered {
    lowered.op.aux = u8::from(d.is_mem(0));
    lowered
}

fn indirect_target<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Result<u64, Stop> {
    Ok(if op.aux != 0 { cpu.read_operand::<W>(op)?.zext() } else { cpu.get::<W>(op.dst).zext() })
}

fn jmp_any<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let target = indirect_target::<W>(cpu, op)?;
    cpu.near_jump(target)?;
    Ok(Then::Branch)
}

#[inline(always)]
fn call_indirect_to<F: Form>(m: &mut Machine, target: u64) -> To {
    // SAFETY: `cpu` is the running CPU; the borrow ends with the statement.
    if !unsafe { &*m.cpu }.is_canonical(target) {
        return noncanonical(m);
    }
    let op = *m.op();
    let back = m.get::<u64>(crate::cpu::SLOT_TRACE_IP).wrapping_add(u64::from(op.off) + u64::from(op.len));
    attempt!(push_64::<F>(m, back));
    // SAFETY: an indirect call's op is followed by a data slot that holds the link of its return address.
    let after = unsafe { Op::link_behind(m.op) };
    ras_push(m, back, after);
    // A store into code or a device is noticed on the way: the lookup sees `leave`, and a head sees the epoch.
    To::IndirectChecked(target)
}

/// #GP(0): RIP cannot hold the target.
#[cold]
fn noncanonical(m: &mut Machine) -> To {
    // SAFETY: `cpu` is the running CPU; the borrow ends here.
    unsafe { &mut *m.cpu }.fault(Fault::gp(0));
    To::Stop
}

pub(super) struct CallReg<F>(PhantomData<F>);
impl<F: Form> Semantics for CallReg<F> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let target = m.get(m.op().dst);
        call_indirect_to::<F>(m, target)
    }
}

pub(super) struct CallMem<F>(PhantomData<F>);
impl<F: Form> Semantics for CallMem<F> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        // SAFETY: `m` is the dispatch's.
        let la = attempt!(unsafe { F::linear(m, 8, false) });
        let target = attempt!(m.load::<F, u64>(la));
        call_indirect_to::<F>(m, target)
    }
}

fn call_indirect(d: &Digest<'_>) -> Option<Lowered> {
    let h: Handler = match (indirect_bytes(d), d.is_mem(0)) {
        (8, false) => by_stack!(d, F => handler::<CallReg<F>>),
        (8, true) => by_form!(d, F => handler::<CallMem<F>>),
        (4, _) => return Some(from(d, quiet(d, plain_handler(call_any::<u32>)).ends())),
        _ => return Some(from(d, quiet(d, plain_handler(call_any::<u16>)).ends())),
    };
    Some(Lowered { branch: Some(Branch::CallIndirect), data: true, ..quiet(d, h).ends() })
}

fn call_any<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let target = indirect_target::<W>(cpu, op)?;
    call_to::<W>(cpu, op, target)
}

pub(super) struct Ret64<F>(PhantomData<F>);
impl<F: Form> Semantics for Ret64<F> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let rsp = m.get::<u64>(Gpr::Rsp as u8 * 8);
        let ip = attempt!(m.load::<F, u64>(rsp));
        // `imm` is what the RET releases beyond the address.
        let release = m.op().imm.wrapping_add(8);
        // A return to nowhere faults at the RET, with RSP as it was; a predicted one is canonical.
        match ras_pop(m, ip) {
            To::Op(op) => {
                m.put(Gpr::Rsp as u8 * 8, rsp.wrapping_add(release));
                To::Op(op)
            }
            _ => {
                // SAFETY: `cpu` is the running CPU; the borrow ends with the statement.
                if !unsafe { &*m.cpu }.is_canonical(ip) {
                    return noncanonical(m);
                }
                m.put(Gpr::Rsp as u8 * 8, rsp.wrapping_add(release));
                To::IndirectChecked(ip)
            }
        }
    }
}

fn ret(d: &Digest<'_>) -> Option<Lowered> {
    let h: Handler = match d.ins.code() {
        C::Retnq | C::Retnq_imm16 => by_stack!(d, F => handler::<Ret64<F>>),
        C::Retnd | C::Retnd_imm16 => plain_handler(ret_any::<u32>),
        _ => plain_handler(ret_any::<u16>),
    };
    let mut lowered = quiet(d, h).ends();
    lowered.op.seg = Seg::Ss as u8;
    lowered.op.imm &= 0xffff;
    Some(lowered)
}

fn ret_any<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let target = cpu.peek::<W>(0)?.zext();
    cpu.near_jump(target)?;
    cpu.set_reg(Gpr::Rsp, cpu.stack_pointer(i64::from(W::BYTES) + op.imm as i64));
    Ok(Then::Branch)
}

/// JCXZ (0), LOOP (1), LOOPE (2), LOOPNE (3): `aux` is the counter's width in bytes.
fn counted<const KIND: u8>(d: &Digest<'_>) -> Option<Lowered> {
    use C::*;
    let bytes = match d.ins.code() {
        Jcxz_rel8_16 | Jcxz_rel8_32 | Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX
        | Loopne_rel8_16_CX | Loopne_rel8_32_CX => 2,
        Jrcxz_rel8_16 | Jrcxz_rel8_64 | Loop_rel8_16_RCX | Loop_rel8_64_RCX | Loope_rel8_16_RCX | Loope_rel8_64_RCX
        | Loopne_rel8_16_RCX | Loopne_rel8_64_RCX => 8,
        _ => 4,
    };
    let h = match bytes {
        2 => plain_handler(count::<u16, KIND>),
        4 => plain_handler(count::<u32, KIND>),
        _ => plain_handler(count::<u64, KIND>),
    };
    let mut lowered = quiet(d, h).reads_flags();
    lowered.op.imm = target_of(d, operand_bytes(d));
    Some(lowered)
}

fn count<W: HostWord, const KIND: u8>(cpu: &mut Cpu, op: &Op) -> Done {
    const RCX: u8 = Gpr::Rcx as u8 * 8;
    let counter = cpu.get::<W>(RCX);
    let left = if KIND == 0 { counter } else { counter.wrapping_sub(W::of(1)) };
    let zf = KIND >= 2 && cpu.flags().condition(4);
    let taken = match KIND {
        0 => counter == W::of(0),
        1 => left != W::of(0),
        2 => left != W::of(0) && zf,
        _ => left != W::of(0) && !zf,
    };
    if taken {
        cpu.check_target(op.imm)?;
    }
    if KIND != 0 {
        cpu.put(RCX, left);
    }
    if !taken {
        return Ok(Then::Next);
    }
    cpu.rip = op.imm;
    Ok(Then::Branch)
}
