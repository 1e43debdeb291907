//! MUL IMUL MULX, DIV IDIV. SDM Vol. 2, the page of each mnemonic.
//!
//! MUL and IMUL leave SF, ZF, AF and PF undefined: here they follow the lower half, AF clear. DIV and IDIV leave all six
//! undefined: here they stay.
#![expect(unsafe_code, reason = "hot semantics run on the dispatch's raw CPU pointer")]

use std::marker::PhantomData;

use iced_x86::Mnemonic as M;

use super::{Row, by_form, by_width, plain_handler, row};
use crate::cpu::{Cpu, Done, Stop, Then};
use crate::decode::digest::{Digest, Lowered};
use crate::fault::Fault;
use crate::flags::{CF, Flags, OF, kind};
use crate::host::HostWord;
use crate::op::{Form, Handler, Machine, Op, Semantics, To, attempt, handler};
use crate::state::Gpr;
use crate::word::Word;

pub(super) const ROWS: &[Row] = &[
    row(M::Mul, one_operand::<false>),
    row(M::Imul, imul),
    row(M::Mulx, mulx),
    row(M::Div, divide::<false>),
    row(M::Idiv, divide::<true>),
];

const RAX: u8 = Gpr::Rax as u8 * 8;
const RDX: u8 = Gpr::Rdx as u8 * 8;

/// Lower and upper half of the product.
#[inline(always)]
fn product<W: Word, const SIGNED: bool>(a: W, b: W) -> (W, W) {
    if W::BYTES < 8 {
        let wide = if SIGNED { a.sext().wrapping_mul(b.sext()) } else { a.zext().wrapping_mul(b.zext()) };
        return (W::of(wide), W::of(wide >> W::BITS));
    }
    let wide = if SIGNED {
        (i128::from(a.sext() as i64) * i128::from(b.sext() as i64)) as u128
    } else {
        u128::from(a.zext()) * u128::from(b.zext())
    };
    (W::of(wide as u64), W::of((wide >> 64) as u64))
}

/// CF and OF say that the upper half is more than the lower one's extension.
#[inline(always)]
fn flags_of<W: Word, const SIGNED: bool>(low: W, high: W) -> Flags {
    let extension = if SIGNED && low.msb() { !W::of(0) } else { W::of(0) };
    Flags::of_result(low, if high == extension { 0 } else { CF | OF })
}

/// Accumulator × operand into the double-width accumulator. SDM Vol. 2 "MUL", "IMUL".
#[inline(always)]
fn accumulate<W: HostWord, const SIGNED: bool, const FLAGS: bool>(m: &mut Machine, src: W) -> To {
    let (low, high) = product::<W, SIGNED>(m.get(RAX), src);
    m.put(RAX, low);
    // The upper half of a byte product goes to AH.
    m.put(if W::BYTES == 1 { RAX + 1 } else { RDX }, high);
    if FLAGS {
        m.set_flags(flags_of::<W, SIGNED>(low, high));
    }
    To::Next
}

struct OneReg<W, const SIGNED: bool, const FLAGS: bool>(PhantomData<W>);
struct OneMem<W, F, const SIGNED: bool, const FLAGS: bool>(PhantomData<(W, F)>);

impl<W: HostWord, const SIGNED: bool, const FLAGS: bool> Semantics for OneReg<W, SIGNED, FLAGS> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let src = m.get(m.op().dst);
        accumulate::<W, SIGNED, FLAGS>(m, src)
    }
}

impl<W: HostWord, F: Form, const SIGNED: bool, const FLAGS: bool> Semantics for OneMem<W, F, SIGNED, FLAGS> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        // SAFETY: `m` is the dispatch's.
        let la = attempt!(unsafe { F::linear(m, W::BYTES, false) });
        let src = attempt!(m.load::<F, W>(la));
        accumulate::<W, SIGNED, FLAGS>(m, src)
    }
}

/// An op that makes product flags of `bytes`.
fn multiplies(d: &Digest<'_>, loud: Handler, quiet: Handler, bytes: u32, memory: bool) -> Lowered {
    let lowered = d.lower(loud).makes_flags(kind::RESULT + u64::from(bytes.trailing_zeros()), quiet);
    Lowered { reads_flags: false, barrier: memory, ..lowered }
}

fn one_operand<const SIGNED: bool>(d: &Digest<'_>) -> Option<Lowered> {
    let bytes = d.bytes(0);
    let memory = d.is_mem(0);
    let (loud, quiet) = if memory {
        by_width!(bytes, W => by_form!(d, F =>
            (handler::<OneMem<W, F, SIGNED, true>> as Handler, handler::<OneMem<W, F, SIGNED, false>> as Handler)))
    } else {
        by_width!(bytes, W => (handler::<OneReg<W, SIGNED, true>> as _, handler::<OneReg<W, SIGNED, false>> as _))
    };
    Some(multiplies(d, loud, quiet, bytes, memory))
}

/// IMUL with two or three operands: the lower half of the product.
struct TwoReg<W, const IMM: bool, const FLAGS: bool>(PhantomData<W>);
struct TwoMem<W, F, const IMM: bool, const FLAGS: bool>(PhantomData<(W, F)>);

#[inline(always)]
fn truncate<W: HostWord, const IMM: bool, const FLAGS: bool>(m: &mut Machine, src: W) -> To {
    let at = m.op().dst;
    let other = if IMM { W::of(m.op().imm) } else { m.get(at) };
    let (low, high) = product::<W, true>(src, other);
    m.put(at, low);
    if FLAGS {
        m.set_flags(flags_of::<W, true>(low, high));
    }
    To::Next
}

impl<W: HostWord, const IMM: bool, const FLAGS: bool> Semantics for TwoReg<W, IMM, FLAGS> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let src = m.get(m.op().src);
        truncate::<W, IMM, FLAGS>(m, src)
    }
}

impl<W: HostWord, F: Form, const IMM: bool, const FLAGS: bool> Semantics for TwoMem<W, F, IMM, FLAGS> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        // SAFETY: `m` is the dispatch's.
        let la = attempt!(unsafe { F::linear(m, W::BYTES, false) });
        let src = attempt!(m.load::<F, W>(la));
        truncate::<W, IMM, FLAGS>(m, src)
    }
}

fn imul(d: &Digest<'_>) -> Option<Lowered> {
    if d.ins.op_count() == 1 {
        return one_operand::<true>(d);
    }
    let bytes = d.bytes(0);
    let memory = d.is_mem(1);
    macro_rules! pair {
        ($W:ident, $imm:literal) => {
            if memory {
                by_form!(d, F => (handler::<TwoMem<$W, F, $imm, true>> as Handler,
                                  handler::<TwoMem<$W, F, $imm, false>> as Handler))
            } else {
                (handler::<TwoReg<$W, $imm, true>> as Handler, handler::<TwoReg<$W, $imm, false>> as Handler)
            }
        };
    }
    if bytes == 1 {
        return None;
    }
    let (loud, quiet) = if d.ins.op_count() == 3 {
        by_width!(bytes, W => pair!(W, true))
    } else {
        by_width!(bytes, W => pair!(W, false))
    };
    Some(multiplies(d, loud, quiet, bytes, memory))
}

/// `imm` tells that the source is memory.
fn mulx(d: &Digest<'_>) -> Option<Lowered> {
    let h = match d.bytes(0) {
        4 => plain_handler(multiply_apart::<u32>),
        _ => plain_handler(multiply_apart::<u64>),
    };
    let mut lowered = Lowered { reads_flags: false, ..d.lower(h).keeps_flags() };
    lowered.op.imm = u64::from(d.is_mem(2));
    Some(lowered)
}

/// RDX × source into two registers; the upper half wins where they are one. SDM Vol. 2 "MULX".
fn multiply_apart<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let src = if op.imm != 0 { cpu.read_operand(op)? } else { cpu.get::<W>(op.aux) };
    let (low, high) = product::<W, false>(cpu.get(RDX), src);
    cpu.put(op.src, low);
    cpu.put(op.dst, high);
    Ok(Then::Next)
}

/// Quotient and remainder of `high:low` / `by`; `None`: #DE, for a divisor of 0 or a quotient that does not fit.
fn quotient<W: Word, const SIGNED: bool>(low: W, high: W, by: W) -> Option<(W, W)> {
    if SIGNED {
        let by = i128::from(by.sext() as i64);
        let wide = i128::from(high.sext() as i64) << W::BITS | i128::from(low.zext());
        let (q, r) = (wide.checked_div(by)?, wide.checked_rem(by)?);
        let fits = q == i128::from(W::of(q as u64).sext() as i64);
        return fits.then(|| (W::of(q as u64), W::of(r as u64)));
    }
    // With the upper half below the divisor, the quotient fits.
    if high >= by {
        return None;
    }
    if W::BYTES < 8 || high == W::of(0) {
        let wide = if W::BYTES < 8 { high.zext() << (W::BITS & 63) } else { 0 } | low.zext();
        return Some((W::of(wide / by.zext()), W::of(wide % by.zext())));
    }
    let wide = u128::from(high.zext()) << 64 | u128::from(low.zext());
    let by = u128::from(by.zext());
    Some((W::of((wide / by) as u64), W::of((wide % by) as u64)))
}

fn divide<const SIGNED: bool>(d: &Digest<'_>) -> Option<Lowered> {
    let h = by_width!(d.bytes(0), W => if d.is_mem(0) {
        plain_handler(divide_memory::<W, SIGNED>)
    } else {
        plain_handler(divide_register::<W, SIGNED>)
    });
    Some(Lowered { reads_flags: false, ..d.lower(h).keeps_flags() })
}

fn divide_memory<W: HostWord, const SIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Done {
    let by = cpu.read_operand::<W>(op)?;
    divide_by::<W, SIGNED>(cpu, by)
}

fn divide_register<W: HostWord, const SIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Done {
    let by = cpu.get::<W>(op.dst);
    divide_by::<W, SIGNED>(cpu, by)
}

/// SDM Vol. 2 "DIV", "IDIV". Byte forms divide AX and leave the remainder in AH.
fn divide_by<W: HostWord, const SIGNED: bool>(cpu: &mut Cpu, by: W) -> Result<Then, Stop> {
    let upper = if W::BYTES == 1 { RAX + 1 } else { RDX };
    let Some((q, r)) = quotient::<W, SIGNED>(cpu.get(RAX), cpu.get(upper), by) else {
        return Err(cpu.fault(Fault::DE));
    };
    cpu.put(RAX, q);
    cpu.put(upper, r);
    Ok(Then::Next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_split_into_halves() {
        assert_eq!(product::<u8, true>(0x80, 0x80), (0, 0x40));
        assert_eq!(product::<u32, false>(u32::MAX, u32::MAX), (1, u32::MAX - 1));
        assert_eq!(product::<u64, true>(u64::MAX, 2), (u64::MAX - 1, u64::MAX));
        assert_eq!(product::<u64, false>(u64::MAX, 2), (u64::MAX - 1, 1));
    }

    #[test]
    fn overflow_shows_in_carry() {
        assert_eq!(flags_of::<u32, true>(0x8000_0000, 0).bits() & (CF | OF), CF | OF);
        assert_eq!(flags_of::<u32, true>(0x8000_0000, u32::MAX).bits() & (CF | OF), 0);
        assert_eq!(flags_of::<u32, false>(0x8000_0000, 0).bits() & (CF | OF), 0);
    }

    #[test]
    fn quotients_that_do_not_fit_are_refused() {
        assert_eq!(quotient::<u8, false>(0, 1, 1), None);
        assert_eq!(quotient::<u8, false>(0xff, 0, 0), None);
        assert_eq!(quotient::<u8, false>(0xff, 0xfe, 0xff), Some((0xff, 0xfe)));
        assert_eq!(quotient::<u8, true>(0x80, 0xff, 0xff), None);
        assert_eq!(quotient::<u8, true>(0x80, 0xff, 1), Some((0x80, 0)));
        assert_eq!(quotient::<u64, true>(0, 1 << 63, u64::MAX), None);
        assert_eq!(quotient::<u64, true>(7u64.wrapping_neg(), u64::MAX, 2), Some((3u64.wrapping_neg(), u64::MAX)));
        assert_eq!(quotient::<u64, false>(5, 1, 2), Some((0x8000_0000_0000_0002, 1)));
    }
}
