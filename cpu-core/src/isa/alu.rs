//! ADD OR ADC SBB AND SUB XOR CMP TEST: two operands in, one out, six flags. INC DEC NEG NOT: one operand. SDM Vol. 2, the
//! page of each mnemonic.
#![expect(unsafe_code, reason = "hot semantics run on the dispatch's raw CPU pointer")]

use std::marker::PhantomData;

use iced_x86::Mnemonic as M;

use super::branch::{fuse_compare, fuse_result};
use super::{FormOf, Row, by_form, by_width, form_of, plain_handler, row};
use crate::decode::digest::{Digest, Fuse, Lowered, not_fused};
use crate::flags::{AF, CF, Flags, OF, kind};
use crate::host::HostWord;
use crate::op::{BaseDisp, BaseIndex, Form, Handler, Machine, Semantics, To, attempt, handler};
use crate::word::Word;

pub(super) const ROWS: &[Row] = &[
    row(M::Add, alu2::<Add>),
    row(M::Or, alu2::<Or>),
    row(M::Adc, alu2::<Adc>),
    row(M::Sbb, alu2::<Sbb>),
    row(M::And, alu2::<And>),
    row(M::Sub, alu2::<Sub>),
    row(M::Xor, alu2::<Xor>),
    row(M::Cmp, alu2::<Cmp>),
    row(M::Test, alu2::<Test>),
    row(M::Inc, alu1::<Inc>),
    row(M::Dec, alu1::<Dec>),
    row(M::Neg, alu1::<Neg>),
    row(M::Not, alu1::<Not>),
];

/// A two-operand instruction that replaces all six flags.
pub(super) trait Alu2: 'static {
    /// Kind of the flags that `eval` returns.
    const KIND: u64;
    /// The first operand is written.
    const WRITES: bool = true;
    /// CF is an operand.
    const READS_CF: bool = false;
    /// Result and flags; `old` is looked at only under `READS_CF`.
    fn eval<W: Word>(dst: W, src: W, old: Flags) -> (W, Flags);
    /// `S`, this without memory, and a branch behind it.
    fn fuse<S: Semantics>(_condition: u8) -> Option<Handler> {
        None
    }
    /// `S`, this with a memory operand, and a branch behind it.
    fn fuse_memory<S: Semantics>(_condition: u8) -> Option<Handler> {
        None
    }
}

/// `dst ← dst + src`. SDM Vol. 2 "ADD".
pub(super) struct Add;
impl Alu2 for Add {
    const KIND: u64 = kind::ADD;
    #[inline(always)]
    fn eval<W: Word>(dst: W, src: W, _: Flags) -> (W, Flags) {
        (dst.wrapping_add(src), Flags::of_sum(dst, src))
    }
    fn fuse<S: Semantics>(condition: u8) -> Option<Handler> {
        fuse_result::<S>(condition)
    }
}

/// `dst ← dst − src`. SDM Vol. 2 "SUB".
pub(super) struct Sub;
impl Alu2 for Sub {
    const KIND: u64 = kind::SUB;
    #[inline(always)]
    fn eval<W: Word>(dst: W, src: W, _: Flags) -> (W, Flags) {
        (dst.wrapping_sub(src), Flags::of_difference(dst, src))
    }
    fn fuse<S: Semantics>(condition: u8) -> Option<Handler> {
        fuse_compare::<S>(condition)
    }
}

/// As SUB; the difference is dropped. SDM Vol. 2 "CMP".
pub(super) struct Cmp;
impl Alu2 for Cmp {
    const KIND: u64 = kind::SUB;
    const WRITES: bool = false;
    #[inline(always)]
    fn eval<W: Word>(dst: W, src: W, old: Flags) -> (W, Flags) {
        Sub::eval(dst, src, old)
    }
    fn fuse<S: Semantics>(condition: u8) -> Option<Handler> {
        fuse_compare::<S>(condition)
    }
    fn fuse_memory<S: Semantics>(condition: u8) -> Option<Handler> {
        fuse_compare::<S>(condition)
    }
}

/// `dst ← dst + src + CF`. SDM Vol. 2 "ADC".
struct Adc;
impl Alu2 for Adc {
    const KIND: u64 = kind::RESULT;
    const READS_CF: bool = true;
    #[inline(always)]
    fn eval<W: Word>(dst: W, src: W, old: Flags) -> (W, Flags) {
        let carry = old.cf();
        let sum = dst.wrapping_add(src).wrapping_add(W::of(carry.into()));
        let cf = sum < dst || carry && sum == dst;
        let of = (!(dst ^ src) & (dst ^ sum)).msb();
        let bits = u64::from(cf) * CF | u64::from(of) * OF | (dst ^ src ^ sum).zext() & AF;
        (sum, Flags::of_result(sum, bits))
    }
}

/// `dst ← dst − src − CF`. SDM Vol. 2 "SBB".
struct Sbb;
impl Alu2 for Sbb {
    const KIND: u64 = kind::RESULT;
    const READS_CF: bool = true;
    #[inline(always)]
    fn eval<W: Word>(dst: W, src: W, old: Flags) -> (W, Flags) {
        let borrow = old.cf();
        let difference = dst.wrapping_sub(src).wrapping_sub(W::of(borrow.into()));
        let cf = dst < src || borrow && dst == src;
        let of = ((dst ^ src) & (dst ^ difference)).msb();
        let bits = u64::from(cf) * CF | u64::from(of) * OF | (dst ^ src ^ difference).zext() & AF;
        (difference, Flags::of_result(difference, bits))
    }
}

/// `dst ← dst AND src`. SDM Vol. 2 "AND".
pub(super) struct And;
impl Alu2 for And {
    const KIND: u64 = kind::SUB;
    #[inline(always)]
    fn eval<W: Word>(dst: W, src: W, _: Flags) -> (W, Flags) {
        (dst & src, Flags::of_logic(dst & src))
    }
    fn fuse<S: Semantics>(condition: u8) -> Option<Handler> {
        fuse_result::<S>(condition)
    }
}

/// As AND; the result is dropped. SDM Vol. 2 "TEST".
pub(super) struct Test;
impl Alu2 for Test {
    const KIND: u64 = kind::SUB;
    const WRITES: bool = false;
    #[inline(always)]
    fn eval<W: Word>(dst: W, src: W, old: Flags) -> (W, Flags) {
        And::eval(dst, src, old)
    }
    fn fuse<S: Semantics>(condition: u8) -> Option<Handler> {
        fuse_result::<S>(condition)
    }
    fn fuse_memory<S: Semantics>(condition: u8) -> Option<Handler> {
        fuse_result::<S>(condition)
    }
}

/// `dst ← dst OR src`. SDM Vol. 2 "OR".
pub(super) struct Or;
impl Alu2 for Or {
    const KIND: u64 = kind::SUB;
    #[inline(always)]
    fn eval<W: Word>(dst: W, src: W, _: Flags) -> (W, Flags) {
        (dst | src, Flags::of_logic(dst | src))
    }
}

/// `dst ← dst XOR src`. SDM Vol. 2 "XOR".
pub(super) struct Xor;
impl Alu2 for Xor {
    const KIND: u64 = kind::SUB;
    #[inline(always)]
    fn eval<W: Word>(dst: W, src: W, _: Flags) -> (W, Flags) {
        (dst ^ src, Flags::of_logic(dst ^ src))
    }
}

/// Destination and source of [`Alu2`].
pub(super) struct RegReg<A, W, const FLAGS: bool>(PhantomData<(A, W)>);
pub(super) struct RegImm<A, W, const FLAGS: bool>(PhantomData<(A, W)>);
pub(super) struct RegMem<A, W, F, const FLAGS: bool>(PhantomData<(A, W, F)>);
pub(super) struct MemReg<A, W, F, const FLAGS: bool>(PhantomData<(A, W, F)>);
pub(super) struct MemImm<A, W, F, const FLAGS: bool>(PhantomData<(A, W, F)>);

#[inline(always)]
fn reg_op<A: Alu2, W: HostWord, const FLAGS: bool>(m: &mut Machine, src: W) -> To {
    let at = m.op().dst;
    let (result, flags) = A::eval(m.get::<W>(at), src, m.flags());
    if A::WRITES {
        m.put(at, result);
    }
    if FLAGS {
        m.set_flags(flags);
    }
    To::Next
}

/// `[address] ← A([address], src)`, or its flags alone.
///
/// # Safety
/// That of [`Semantics::run`].
#[inline(always)]
unsafe fn mem_op<A: Alu2, W: HostWord, F: Form, const FLAGS: bool>(m: &mut Machine, src: W) -> To {
    // SAFETY: `m` is the dispatch's.
    let la = attempt!(unsafe { F::linear(m, W::BYTES, A::WRITES) });
    let old = m.flags();
    if !A::WRITES {
        let dst = attempt!(m.load::<F, W>(la));
        if FLAGS {
            m.set_flags(A::eval(dst, src, old).1);
        }
        return To::Next;
    }
    let (dst, stored) = attempt!(m.modify::<F, W>(la, |dst| A::eval(dst, src, old).0));
    if FLAGS {
        m.set_flags(A::eval(dst, src, old).1);
    }
    stored.then()
}

impl<A: Alu2, W: HostWord, const FLAGS: bool> Semantics for RegReg<A, W, FLAGS> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let src = m.get(m.op().src);
        reg_op::<A, W, FLAGS>(m, src)
    }
}

impl<A: Alu2, W: HostWord, const FLAGS: bool> Semantics for RegImm<A, W, FLAGS> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let src = W::of(m.op().imm);
        reg_op::<A, W, FLAGS>(m, src)
    }
}

impl<A: Alu2, W: HostWord, F: Form, const FLAGS: bool> Semantics for RegMem<A, W, F, FLAGS> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        // SAFETY: `m` is the dispatch's.
        let la = attempt!(unsafe { F::linear(m, W::BYTES, false) });
        let src = attempt!(m.load::<F, W>(la));
        reg_op::<A, W, FLAGS>(m, src)
    }
}

impl<A: Alu2, W: HostWord, F: Form, const FLAGS: bool> Semantics for MemReg<A, W, F, FLAGS> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let src = m.get(m.op().src);
        // SAFETY: `m` is the dispatch's.
        unsafe { mem_op::<A, W, F, FLAGS>(m, src) }
    }
}

impl<A: Alu2, W: HostWord, F: Form, const FLAGS: bool> Semantics for MemImm<A, W, F, FLAGS> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let src = W::of(m.op().imm);
        // SAFETY: `m` is the dispatch's.
        unsafe { mem_op::<A, W, F, FLAGS>(m, src) }
    }
}

/// Picks what fuses an op with a branch, for the operand widths of compiled code.
macro_rules! by_common_width {
    ($bytes:expr, $W:ident => $fuse:expr) => {
        match $bytes {
            1 => {
                type $W = u8;
                $fuse
            }
            4 => {
                type $W = u32;
                $fuse
            }
            8 => {
                type $W = u64;
                $fuse
            }
            _ => not_fused as Fuse,
        }
    };
}

/// As `by_common_width!`, with a memory operand of 64-bit mode.
macro_rules! by_flat_form {
    ($digest:expr, $bytes:expr, $W:ident, $F:ident => $fuse:expr) => {
        match form_of($digest) {
            FormOf::BaseDisp => {
                type $F = BaseDisp;
                by_common_width!($bytes, $W => $fuse)
            }
            FormOf::BaseIndex => {
                type $F = BaseIndex;
                by_common_width!($bytes, $W => $fuse)
            }
            _ => not_fused as Fuse,
        }
    };
}

fn alu2<A: Alu2>(d: &Digest<'_>) -> Option<Lowered> {
    let bytes = d.bytes(0);
    let (loud, quiet) = match (d.is_mem(0), d.is_mem(1), d.is_imm(1)) {
        _ if d.ins.has_lock_prefix() => {
            let lowered = if d.is_imm(1) {
                by_width!(bytes, W => d.lower(plain_handler(locked_imm::<A, W>)))
            } else {
                by_width!(bytes, W => d.lower(plain_handler(locked_reg::<A, W>)))
            };
            return Some(Lowered { flags: crate::decode::digest::FlagsOut::Unknown, ..lowered });
        }
        (true, _, true) => by_width!(bytes, W => by_form!(d, F =>
            (handler::<MemImm<A, W, F, true>> as crate::op::Handler, handler::<MemImm<A, W, F, false>> as _))),
        (true, _, false) => by_width!(bytes, W => by_form!(d, F =>
            (handler::<MemReg<A, W, F, true>> as _, handler::<MemReg<A, W, F, false>> as _))),
        (false, true, _) => by_width!(bytes, W => by_form!(d, F =>
            (handler::<RegMem<A, W, F, true>> as _, handler::<RegMem<A, W, F, false>> as _))),
        (false, false, true) => by_width!(bytes, W =>
            (handler::<RegImm<A, W, true>> as _, handler::<RegImm<A, W, false>> as _)),
        (false, false, false) => by_width!(bytes, W =>
            (handler::<RegReg<A, W, true>> as _, handler::<RegReg<A, W, false>> as _)),
    };
    let mut lowered = d.lower(loud).makes_flags(A::KIND + u64::from(bytes.trailing_zeros()), quiet);
    lowered.reads_flags = A::READS_CF;
    lowered.barrier = d.is_mem(0) || d.is_mem(1);
    lowered.fused = match (d.is_mem(0), d.is_mem(1), d.is_imm(1)) {
        (true, _, true) => by_flat_form!(d, bytes, W, F => A::fuse_memory::<MemImm<A, W, F, true>>),
        (true, _, false) => by_flat_form!(d, bytes, W, F => A::fuse_memory::<MemReg<A, W, F, true>>),
        (false, true, _) => by_flat_form!(d, bytes, W, F => A::fuse_memory::<RegMem<A, W, F, true>>),
        (false, false, true) => by_common_width!(bytes, W => A::fuse::<RegImm<A, W, true>>),
        (false, false, false) => by_common_width!(bytes, W => A::fuse::<RegReg<A, W, true>>),
    };
    if d.is_mem(0) && !d.is_imm(1) {
        // `Digest::op` puts operand 1 of a memory destination into `src` already.
        debug_assert!(d.is_reg(1));
    }
    Some(lowered)
}

fn locked<A: Alu2, W: HostWord>(cpu: &mut crate::cpu::Cpu, op: &crate::op::Op, src: W) -> crate::cpu::Done {
    let seg = op.segment();
    let la = cpu.linear(seg, cpu.ea(op), W::BYTES, true)?;
    let old = cpu.flags();
    let dst = cpu.modify::<W>(la, seg, true, |dst| Some(A::eval(dst, src, old).0))?;
    cpu.set_flags(A::eval(dst, src, old).1);
    Ok(crate::cpu::Then::Next)
}

fn locked_reg<A: Alu2, W: HostWord>(cpu: &mut crate::cpu::Cpu, op: &crate::op::Op) -> crate::cpu::Done {
    let src = cpu.get(op.src);
    locked::<A, W>(cpu, op, src)
}

fn locked_imm<A: Alu2, W: HostWord>(cpu: &mut crate::cpu::Cpu, op: &crate::op::Op) -> crate::cpu::Done {
    locked::<A, W>(cpu, op, W::of(op.imm))
}

/// A one-operand instruction.
pub(super) trait Alu1: 'static {
    /// Kind of the flags that `eval` makes; `None` where it keeps them.
    const KIND: Option<u64>;
    /// CF passes through.
    const KEEPS_CF: bool = false;
    /// Result and flags; `cf` is given only under `KEEPS_CF`.
    fn eval<W: Word>(dst: W, cf: bool) -> (W, Flags);
    /// `S`, this on a register, and a branch behind it.
    fn fuse<S: Semantics>(_condition: u8) -> Option<Handler> {
        None
    }
}

/// `dst ← dst + 1`, CF kept. SDM Vol. 2 "INC".
pub(super) struct Inc;
impl Alu1 for Inc {
    const KIND: Option<u64> = Some(kind::INC);
    const KEEPS_CF: bool = true;
    #[inline(always)]
    fn eval<W: Word>(dst: W, cf: bool) -> (W, Flags) {
        (dst.wrapping_add(W::of(1)), Flags::of_increment(dst, cf))
    }
    fn fuse<S: Semantics>(condition: u8) -> Option<Handler> {
        fuse_result::<S>(condition)
    }
}

/// `dst ← dst − 1`, CF kept. SDM Vol. 2 "DEC".
pub(super) struct Dec;
impl Alu1 for Dec {
    const KIND: Option<u64> = Some(kind::DEC);
    const KEEPS_CF: bool = true;
    #[inline(always)]
    fn eval<W: Word>(dst: W, cf: bool) -> (W, Flags) {
        (dst.wrapping_sub(W::of(1)), Flags::of_decrement(dst, cf))
    }
    fn fuse<S: Semantics>(condition: u8) -> Option<Handler> {
        fuse_result::<S>(condition)
    }
}

/// `dst ← 0 − dst`. SDM Vol. 2 "NEG".
struct Neg;
impl Alu1 for Neg {
    const KIND: Option<u64> = Some(kind::SUB);
    #[inline(always)]
    fn eval<W: Word>(dst: W, _: bool) -> (W, Flags) {
        (W::of(0).wrapping_sub(dst), Flags::of_difference(W::of(0), dst))
    }
}

/// `dst ← NOT dst`, no flags. SDM Vol. 2 "NOT".
struct Not;
impl Alu1 for Not {
    const KIND: Option<u64> = None;
    #[inline(always)]
    fn eval<W: Word>(dst: W, _: bool) -> (W, Flags) {
        (!dst, Flags::explicit(0))
    }
}

struct OneReg<A, W, const FLAGS: bool>(PhantomData<(A, W)>);
struct OneMem<A, W, F, const FLAGS: bool>(PhantomData<(A, W, F)>);

impl<A: Alu1, W: HostWord, const FLAGS: bool> Semantics for OneReg<A, W, FLAGS> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let at = m.op().dst;
        let cf = FLAGS && A::KEEPS_CF && m.flags().cf();
        let (result, flags) = A::eval(m.get::<W>(at), cf);
        m.put(at, result);
        if FLAGS {
            m.set_flags(flags);
        }
        To::Next
    }
}

impl<A: Alu1, W: HostWord, F: Form, const FLAGS: bool> Semantics for OneMem<A, W, F, FLAGS> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        // SAFETY: `m` is the dispatch's.
        let la = attempt!(unsafe { F::linear(m, W::BYTES, true) });
        let cf = FLAGS && A::KEEPS_CF && m.flags().cf();
        let (dst, stored) = attempt!(m.modify::<F, W>(la, |dst| A::eval(dst, cf).0));
        if FLAGS {
            m.set_flags(A::eval(dst, cf).1);
        }
        stored.then()
    }
}

fn alu1<A: Alu1>(d: &Digest<'_>) -> Option<Lowered> {
    let bytes = d.bytes(0);
    if d.ins.has_lock_prefix() {
        return Some(by_width!(bytes, W => d.lower(plain_handler(locked_one::<A, W>))));
    }
    let (loud, quiet) = if d.is_mem(0) {
        by_width!(bytes, W => by_form!(d, F =>
            (handler::<OneMem<A, W, F, true>> as crate::op::Handler, handler::<OneMem<A, W, F, false>> as _)))
    } else {
        by_width!(bytes, W => (handler::<OneReg<A, W, true>> as _, handler::<OneReg<A, W, false>> as _))
    };
    let lowered = match A::KIND {
        Some(kind) => d.lower(loud).makes_flags(kind + u64::from(bytes.trailing_zeros()), quiet),
        None => d.lower(quiet).keeps_flags(),
    };
    let fused = if d.is_mem(0) { not_fused } else { by_common_width!(bytes, W => A::fuse::<OneReg<A, W, true>>) };
    Some(Lowered { reads_flags: A::KEEPS_CF, barrier: d.is_mem(0), fused, ..lowered })
}

fn locked_one<A: Alu1, W: HostWord>(cpu: &mut crate::cpu::Cpu, op: &crate::op::Op) -> crate::cpu::Done {
    let seg = op.segment();
    let la = cpu.linear(seg, cpu.ea(op), W::BYTES, true)?;
    let cf = cpu.flags().cf();
    let dst = cpu.modify::<W>(la, seg, true, |dst| Some(A::eval(dst, cf).0))?;
    if A::KIND.is_some() {
        cpu.set_flags(A::eval(dst, cf).1);
    }
    Ok(crate::cpu::Then::Next)
}
