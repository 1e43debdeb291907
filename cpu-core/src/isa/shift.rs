//! SHL SHR SAR, ROL ROR RCL RCR, SHLD SHRD. SDM Vol. 2, the page of each mnemonic.
//!
//! The SDM leaves OF undefined for counts other than 1 and AF undefined for shifts. Here they are what a Zen 5 leaves:
//! OF as the count-1 rule gives it from the result, AF set.
#![expect(unsafe_code, reason = "hot semantics run on the dispatch's raw CPU pointer")]

use std::marker::PhantomData;

use iced_x86::Mnemonic as M;

use super::{Row, by_width, plain_handler, row};
use crate::cpu::{Cpu, Done, Then};
use crate::decode::digest::{Digest, FlagsOut, Lowered};
use crate::flags::{AF, CF, Flags, OF, kind};
use crate::host::HostWord;
use crate::op::{Handler, Machine, Op, Semantics, To, handler};
use crate::word::Word;

pub(super) const ROWS: &[Row] = &[
    row(M::Shl, shift::<Shl>),
    row(M::Sal, shift::<Shl>),
    row(M::Shr, shift::<Shr>),
    row(M::Sar, shift::<Sar>),
    row(M::Rol, shift::<Rol>),
    row(M::Ror, shift::<Ror>),
    row(M::Rcl, shift::<Rcl>),
    row(M::Rcr, shift::<Rcr>),
    row(M::Shld, double::<Shld>),
    row(M::Shrd, double::<Shrd>),
];

/// An instruction that moves bits by a count.
trait Shift: 'static {
    /// Changes CF and OF alone.
    const ROTATES: bool = false;
    /// CF is an operand.
    const READS_CF: bool = false;
    /// Result, and CF, OF and AF in their RFLAGS places. `count` is masked and not 0, but may exceed 8- and 16-bit
    /// operands.
    fn eval<W: Word>(dst: W, count: u32, cf: bool) -> (W, u64);
}

/// Bit `at` of `value`.
#[inline(always)]
fn bit(value: u64, at: u32) -> bool {
    value >> at & 1 != 0
}

/// Bits `count` steps left of the operand's end: the last one shifted out. Counts above the width leave 0.
#[inline(always)]
fn out_of_the_left<W: Word>(dst: W, count: u32) -> bool {
    (W::BYTES >= 4 || count <= W::BITS) && bit(dst.zext(), W::BITS - count)
}

#[inline(always)]
fn carry_overflow(cf: bool, of: bool) -> u64 {
    u64::from(cf) * CF | u64::from(of) * OF
}

/// The two upper bits differ: what OF says of a shift or rotate to the right.
#[inline(always)]
fn sign_changed<W: Word>(result: W) -> bool {
    result.msb() != bit(result.zext(), W::BITS - 2)
}

/// SDM Vol. 2 "SAL/SAR/SHL/SHR".
pub(super) struct Shl;
impl Shift for Shl {
    #[inline(always)]
    fn eval<W: Word>(dst: W, count: u32, _: bool) -> (W, u64) {
        let result = W::of(dst.zext() << count);
        let cf = out_of_the_left(dst, count);
        (result, carry_overflow(cf, result.msb() != cf) | AF)
    }
}

/// SDM Vol. 2 "SAL/SAR/SHL/SHR".
pub(super) struct Shr;
impl Shift for Shr {
    #[inline(always)]
    fn eval<W: Word>(dst: W, count: u32, _: bool) -> (W, u64) {
        let result = W::of(dst.zext() >> count);
        (result, carry_overflow(bit(dst.zext(), count - 1), bit(result.zext(), W::BITS - 2)) | AF)
    }
}

/// SDM Vol. 2 "SAL/SAR/SHL/SHR".
struct Sar;
impl Shift for Sar {
    #[inline(always)]
    fn eval<W: Word>(dst: W, count: u32, _: bool) -> (W, u64) {
        let wide = dst.sext() as i64;
        (W::of((wide >> count) as u64), carry_overflow(wide >> (count - 1) & 1 != 0, false) | AF)
    }
}

#[inline(always)]
fn rotate_left<W: Word>(dst: W, count: u32) -> W {
    let count = count & (W::BITS - 1);
    W::of(dst.zext() << count | dst.zext() >> (W::BITS.wrapping_sub(count) & (W::BITS - 1)))
}

/// SDM Vol. 2 "RCL/RCR/ROL/ROR".
struct Rol;
impl Shift for Rol {
    const ROTATES: bool = true;
    #[inline(always)]
    fn eval<W: Word>(dst: W, count: u32, _: bool) -> (W, u64) {
        let result = rotate_left(dst, count);
        let cf = bit(result.zext(), 0);
        (result, carry_overflow(cf, result.msb() != cf))
    }
}

/// SDM Vol. 2 "RCL/RCR/ROL/ROR".
pub(super) struct Ror;
impl Shift for Ror {
    const ROTATES: bool = true;
    #[inline(always)]
    fn eval<W: Word>(dst: W, count: u32, _: bool) -> (W, u64) {
        let result = rotate_left(dst, W::BITS.wrapping_sub(count));
        (result, carry_overflow(result.msb(), sign_changed(result)))
    }
}

/// Counts of a rotate through CF go round after one more bit than the operand has.
#[inline(always)]
fn through_carry<W: Word>(count: u32) -> u32 {
    if W::BYTES < 4 { count % (W::BITS + 1) } else { count }
}

/// SDM Vol. 2 "RCL/RCR/ROL/ROR".
struct Rcl;
impl Shift for Rcl {
    const ROTATES: bool = true;
    const READS_CF: bool = true;
    #[inline(always)]
    fn eval<W: Word>(dst: W, count: u32, cf: bool) -> (W, u64) {
        let count = through_carry::<W>(count);
        if count == 0 {
            return (dst, carry_overflow(cf, dst.msb() != cf));
        }
        let wide = dst.zext();
        let low = u64::from(cf) << (count - 1) | wide.checked_shr(W::BITS + 1 - count).unwrap_or(0);
        let result = W::of(wide << count | low);
        let cf = bit(wide, W::BITS - count);
        (result, carry_overflow(cf, result.msb() != cf))
    }
}

/// SDM Vol. 2 "RCL/RCR/ROL/ROR".
struct Rcr;
impl Shift for Rcr {
    const ROTATES: bool = true;
    const READS_CF: bool = true;
    #[inline(always)]
    fn eval<W: Word>(dst: W, count: u32, cf: bool) -> (W, u64) {
        let count = through_carry::<W>(count);
        if count == 0 {
            return (dst, carry_overflow(cf, sign_changed(dst)));
        }
        let wide = dst.zext();
        let high = u64::from(cf) << (W::BITS - count) | wide.checked_shl(W::BITS + 1 - count).unwrap_or(0);
        let result = W::of(wide >> count | high);
        (result, carry_overflow(bit(wide, count - 1), sign_changed(result)))
    }
}

/// Count as the processor masks it: 5 bits, 6 for 64-bit operands.
#[inline(always)]
fn masked<W: Word>(count: u64) -> u32 {
    count as u32 & if W::BYTES == 8 { 0x3f } else { 0x1f }
}

/// Flags behind a shift whose count was not 0.
#[inline(always)]
fn flags_after<S: Shift, W: Word>(old: Flags, result: W, bits: u64) -> Flags {
    if S::ROTATES { Flags::explicit(old.bits() & !(CF | OF) | bits) } else { Flags::of_result(result, bits) }
}

/// By a constant count that is not 0, or by CL.
pub(super) struct Reg<S, W, const CL: bool, const FLAGS: bool>(PhantomData<(S, W)>);

impl<S: Shift, W: HostWord, const CL: bool, const FLAGS: bool> Semantics for Reg<S, W, CL, FLAGS> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let at = m.op().dst;
        let count = if CL { masked::<W>(m.get::<u8>(CL_SLOT).into()) } else { m.op().imm as u32 & 0x3f };
        let dst = m.get::<W>(at);
        if CL && count == 0 {
            // The register is written all the same: 32 bits clear the upper half.
            m.put(at, dst);
            return To::Next;
        }
        let old = m.flags();
        let (result, bits) = S::eval(dst, count, S::READS_CF && old.cf());
        m.put(at, result);
        if FLAGS {
            m.set_flags(flags_after::<S, W>(old, result, bits));
        }
        To::Next
    }
}

/// CL as a register operand.
const CL_SLOT: u8 = crate::state::Gpr::Rcx as u8 * 8;

fn shift<S: Shift>(d: &Digest<'_>) -> Option<Lowered> {
    let bytes = d.bytes(0);
    if d.is_mem(0) {
        let h = if d.is_imm(1) {
            by_width!(bytes, W => plain_handler(memory::<S, W, false>))
        } else {
            by_width!(bytes, W => plain_handler(memory::<S, W, true>))
        };
        return Some(d.lower(h));
    }
    let by_cl = !d.is_imm(1);
    let (loud, quiet) = if by_cl {
        by_width!(bytes, W => (handler::<Reg<S, W, true, true>> as Handler, handler::<Reg<S, W, true, false>> as Handler))
    } else {
        by_width!(bytes, W => (handler::<Reg<S, W, false, true>> as _, handler::<Reg<S, W, false, false>> as _))
    };
    let width = u64::from(bytes.trailing_zeros());
    let made = if S::ROTATES { kind::EXPLICIT } else { kind::RESULT + width };
    register_form(d, loud, quiet, by_cl, bytes, made, S::ROTATES)
}

/// The op of a form without memory. A count that may turn out 0 keeps the flags, so they are read; a constant 0 is left
/// to a plain function.
fn register_form(
    d: &Digest<'_>,
    loud: Handler,
    quiet: Handler,
    by_cl: bool,
    bytes: u32,
    made: u64,
    reads_flags: bool,
) -> Option<Lowered> {
    let mut lowered = d.lower(loud).cannot_stop();
    if by_cl {
        return Some(Lowered { quiet: Some(quiet), flags: FlagsOut::Unknown, reads_flags: true, ..lowered });
    }
    lowered.op.imm &= if bytes == 8 { 0x3f } else { 0x1f };
    if lowered.op.imm == 0 {
        let touch = by_width!(bytes, W => plain_handler(touch::<W>));
        return Some(Lowered { reads_flags: false, ..d.lower(touch).keeps_flags() });
    }
    Some(Lowered { reads_flags, ..lowered.makes_flags(made, quiet) })
}

/// A register operand that is written with what it holds.
fn touch<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let value = cpu.get::<W>(op.dst);
    cpu.put(op.dst, value);
    Ok(Then::Next)
}

/// Count of a plain form: CL or the immediate.
fn count_of<W: Word>(cpu: &Cpu, op: &Op, by_cl: bool) -> u32 {
    masked::<W>(if by_cl { cpu.get::<u8>(CL_SLOT).into() } else { op.imm })
}

fn memory<S: Shift, W: HostWord, const CL: bool>(cpu: &mut Cpu, op: &Op) -> Done {
    let count = count_of::<W>(cpu, op, CL);
    let old = cpu.flags();
    let cf = S::READS_CF && old.cf();
    let eval = |dst: W| if count == 0 { (dst, 0) } else { S::eval(dst, count, cf) };
    let seg = op.segment();
    let la = cpu.linear(seg, cpu.ea(op), W::BYTES, true)?;
    let dst = cpu.modify::<W>(la, seg, false, |dst| Some(eval(dst).0))?;
    if count != 0 {
        let (result, bits) = eval(dst);
        cpu.set_flags(flags_after::<S, W>(old, result, bits));
    }
    Ok(Then::Next)
}

/// A shift that fills from a second operand.
trait Double: 'static {
    /// Result, and CF, OF and AF in their RFLAGS places. `count` is masked and not 0. Above 16, where the SDM leaves the
    /// result of 16-bit forms undefined, the source comes in twice and CF is 0, as on a Zen 5.
    fn eval<W: Word>(dst: W, src: W, count: u32) -> (W, u64);
}

/// SDM Vol. 2 "SHLD".
struct Shld;
impl Double for Shld {
    #[inline(always)]
    fn eval<W: Word>(dst: W, src: W, count: u32) -> (W, u64) {
        let (low, shifted) = (src.zext(), W::of(dst.zext() << count));
        let result = if W::BYTES >= 4 || count <= W::BITS {
            shifted | W::of(low >> (W::BITS - count))
        } else {
            W::of(low << (count - W::BITS) | low >> (2 * W::BITS - count))
        };
        let cf = out_of_the_left(dst, count);
        (result, carry_overflow(cf, shifted.msb() != cf) | AF)
    }
}

/// SDM Vol. 2 "SHRD".
struct Shrd;
impl Double for Shrd {
    #[inline(always)]
    fn eval<W: Word>(dst: W, src: W, count: u32) -> (W, u64) {
        let (high, wide) = (src.zext(), dst.zext());
        let (result, cf) = if W::BYTES >= 4 || count <= W::BITS {
            (W::of(wide >> count | high << (W::BITS - count)), bit(wide, count - 1))
        } else {
            (W::of(high >> (count - W::BITS) | high << (2 * W::BITS - count)), false)
        };
        (result, carry_overflow(cf, sign_changed(result)) | AF)
    }
}

struct DoubleReg<S, W, const CL: bool, const FLAGS: bool>(PhantomData<(S, W)>);

impl<S: Double, W: HostWord, const CL: bool, const FLAGS: bool> Semantics for DoubleReg<S, W, CL, FLAGS> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let (at, from) = (m.op().dst, m.op().src);
        let count = if CL { masked::<W>(m.get::<u8>(CL_SLOT).into()) } else { m.op().imm as u32 & 0x3f };
        let dst = m.get::<W>(at);
        if CL && count == 0 {
            m.put(at, dst);
            return To::Next;
        }
        let (result, bits) = S::eval(dst, m.get::<W>(from), count);
        m.put(at, result);
        if FLAGS {
            m.set_flags(Flags::of_result(result, bits));
        }
        To::Next
    }
}

/// As `by_width!`, for the widths that SHLD and SHRD have.
macro_rules! by_wide {
    ($bytes:expr, $W:ident => $handler:expr) => {
        if $bytes == 1 { return None } else { by_width!($bytes, $W => $handler) }
    };
}

fn double<S: Double>(d: &Digest<'_>) -> Option<Lowered> {
    let bytes = d.bytes(0);
    if d.is_mem(0) {
        let h = if d.is_imm(2) {
            by_wide!(bytes, W => plain_handler(double_memory::<S, W, false>))
        } else {
            by_wide!(bytes, W => plain_handler(double_memory::<S, W, true>))
        };
        return Some(d.lower(h));
    }
    let by_cl = !d.is_imm(2);
    let (loud, quiet) = if by_cl {
        by_wide!(bytes, W => (handler::<DoubleReg<S, W, true, true>> as Handler, handler::<DoubleReg<S, W, true, false>> as Handler))
    } else {
        by_wide!(bytes, W => (handler::<DoubleReg<S, W, false, true>> as _, handler::<DoubleReg<S, W, false, false>> as _))
    };
    register_form(d, loud, quiet, by_cl, bytes, kind::RESULT + u64::from(bytes.trailing_zeros()), false)
}

fn double_memory<S: Double, W: HostWord, const CL: bool>(cpu: &mut Cpu, op: &Op) -> Done {
    let count = count_of::<W>(cpu, op, CL);
    let src = cpu.get::<W>(op.src);
    let eval = |dst: W| if count == 0 { (dst, 0) } else { S::eval(dst, src, count) };
    let seg = op.segment();
    let la = cpu.linear(seg, cpu.ea(op), W::BYTES, true)?;
    let dst = cpu.modify::<W>(la, seg, false, |dst| Some(eval(dst).0))?;
    if count != 0 {
        let (result, bits) = eval(dst);
        cpu.set_flags(Flags::of_result(result, bits));
    }
    Ok(Then::Next)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Results of a Zen 5: operand, count, CF in, result, CF and OF out.
    type Vector<W> = (W, u32, bool, W, u64);

    fn check<S: Shift, W: Word>(vectors: &[Vector<W>]) {
        for &(dst, count, cf, result, bits) in vectors {
            let (got, flags) = S::eval(dst, count, cf);
            assert_eq!((got, flags & (CF | OF)), (result, bits), "{dst:x?} by {count}");
        }
    }

    #[test]
    fn shifts_by_more_than_the_width() {
        check::<Shl, u8>(&[(0x81, 7, false, 0x80, OF), (0x81, 8, false, 0, CF | OF), (0x81, 9, false, 0, 0)]);
        check::<Shr, u8>(&[(0x81, 1, false, 0x40, CF | OF), (0x81, 8, false, 0, CF), (0x81, 9, false, 0, 0)]);
        check::<Sar, u8>(&[(0x81, 2, false, 0xe0, 0), (0x81, 31, false, 0xff, CF)]);
    }

    #[test]
    fn rotates_go_round() {
        check::<Rol, u8>(&[(0x81, 8, false, 0x81, CF), (0x81, 9, false, 3, CF | OF), (0x81, 7, false, 0xc0, OF)]);
        check::<Rcl, u8>(&[
            (0x81, 1, true, 3, CF | OF),
            (0x81, 8, true, 0xc0, CF),
            (0x81, 9, false, 0x81, OF),
            (0x81, 18, true, 0x81, CF),
        ]);
        check::<Rcl, u64>(&[(1 << 63, 1, true, 1, CF | OF)]);
        check::<Rcr, u64>(&[(1, 1, true, 1 << 63, CF | OF)]);
    }

    #[test]
    fn double_shifts_over_16_bits_take_the_source_twice() {
        assert_eq!(Shld::eval(0x1357u16, 0xa5c3, 16), (0xa5c3, CF | OF | AF));
        assert_eq!(Shld::eval(0x1357u16, 0xa5c3, 20), (0x5c3a, AF));
        assert_eq!(Shrd::eval(0x1357u16, 0xa5c3, 17), (0xd2e1, AF));
        assert_eq!(Shrd::eval(0x1357u16, 0xa5c3, 3), (0x626a, CF | OF | AF));
    }
}
