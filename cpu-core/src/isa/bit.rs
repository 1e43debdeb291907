//! BT BTS BTR BTC, BSF BSR TZCNT LZCNT POPCNT, and BMI1, BMI2 and ADX. SDM Vol. 2, the page of each mnemonic.
#![expect(unsafe_code, reason = "hot semantics run on the dispatch's raw CPU pointer")]

use std::marker::PhantomData;

use iced_x86::Mnemonic as M;

use super::{Row, by_form, by_width, plain_handler, row};
use crate::cpu::{Cpu, Done, Stop, Then};
use crate::decode::digest::{Digest, Lowered};
use crate::flags::{CF, Flags, OF, ZF, kind};
use crate::host::HostWord;
use crate::op::{Form, Handler, Machine, Op, Semantics, To, attempt, handler};
use crate::word::Word;

pub(super) const ROWS: &[Row] = &[
    row(M::Bt, bit_test::<Bt>),
    row(M::Bts, bit_test::<Bts>),
    row(M::Btr, bit_test::<Btr>),
    row(M::Btc, bit_test::<Btc>),
    row(M::Bsf, scan::<Bsf>),
    row(M::Bsr, scan::<Bsr>),
    row(M::Tzcnt, scan::<Tzcnt>),
    row(M::Lzcnt, scan::<Lzcnt>),
    row(M::Popcnt, scan::<Popcnt>),
    row(M::Andn, three::<Andn>),
    row(M::Bextr, three::<Bextr>),
    row(M::Bzhi, three::<Bzhi>),
    row(M::Pdep, three::<Pdep>),
    row(M::Pext, three::<Pext>),
    row(M::Sarx, three::<Sarx>),
    row(M::Shlx, three::<Shlx>),
    row(M::Shrx, three::<Shrx>),
    row(M::Blsi, two::<Blsi>),
    row(M::Blsmsk, two::<Blsmsk>),
    row(M::Blsr, two::<Blsr>),
    row(M::Rorx, two::<Rorx>),
    row(M::Adcx, two::<Adcx>),
    row(M::Adox, two::<Adox>),
];

// Single bits

/// What happens to the bit that goes to CF.
trait BitTest: 'static {
    /// The operand is written.
    const WRITES: bool = true;
    /// The operand with the bit `mask` treated.
    fn eval<W: Word>(value: W, mask: W) -> W;
}

/// SDM Vol. 2 "BT".
struct Bt;
impl BitTest for Bt {
    const WRITES: bool = false;
    #[inline(always)]
    fn eval<W: Word>(value: W, _: W) -> W {
        value
    }
}

/// SDM Vol. 2 "BTS".
struct Bts;
impl BitTest for Bts {
    #[inline(always)]
    fn eval<W: Word>(value: W, mask: W) -> W {
        value | mask
    }
}

/// SDM Vol. 2 "BTR".
struct Btr;
impl BitTest for Btr {
    #[inline(always)]
    fn eval<W: Word>(value: W, mask: W) -> W {
        value & !mask
    }
}

/// SDM Vol. 2 "BTC".
struct Btc;
impl BitTest for Btc {
    #[inline(always)]
    fn eval<W: Word>(value: W, mask: W) -> W {
        value ^ mask
    }
}

/// Only the bit at `offset` modulo the width.
#[inline(always)]
fn mask_at<W: Word>(offset: u64) -> W {
    W::of(1 << (offset & u64::from(W::BITS - 1)))
}

/// CF changes, ZF stays; so do the others, which the SDM leaves undefined.
#[inline(always)]
fn with_carry(old: Flags, cf: bool) -> Flags {
    Flags::explicit(old.bits() & !CF | u64::from(cf))
}

struct TestReg<B, W, const IMM: bool, const FLAGS: bool>(PhantomData<(B, W)>);

impl<B: BitTest, W: HostWord, const IMM: bool, const FLAGS: bool> Semantics for TestReg<B, W, IMM, FLAGS> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let at = m.op().dst;
        let offset = if IMM { m.op().imm } else { m.get(m.op().src) };
        let value = m.get::<W>(at);
        let mask = mask_at::<W>(offset);
        if B::WRITES {
            m.put(at, B::eval(value, mask));
        }
        if FLAGS {
            m.set_flags(with_carry(m.flags(), value & mask != W::of(0)));
        }
        To::Next
    }
}

fn bit_test<B: BitTest>(d: &Digest<'_>) -> Option<Lowered> {
    let bytes = d.bytes(0);
    let by_imm = d.is_imm(1);
    if bytes == 1 {
        return None;
    }
    if d.is_mem(0) {
        let h = match by_imm {
            true => by_width!(bytes, W => plain_handler(test_memory::<B, W, true>)),
            false => by_width!(bytes, W => plain_handler(test_memory::<B, W, false>)),
        };
        let mut lowered = d.lower(h);
        lowered.op.aux = u8::from(d.ins.has_lock_prefix());
        return Some(lowered);
    }
    let (loud, quiet) = match by_imm {
        true => by_width!(bytes, W =>
            (handler::<TestReg<B, W, true, true>> as Handler, handler::<TestReg<B, W, true, false>> as Handler)),
        false => by_width!(bytes, W =>
            (handler::<TestReg<B, W, false, true>> as _, handler::<TestReg<B, W, false, false>> as _)),
    };
    Some(d.lower(loud).cannot_stop().makes_flags(kind::EXPLICIT, quiet).reads_flags())
}

/// A register's offset reaches beyond the operand, both ways: the word that holds the bit is accessed. `aux`: LOCK.
fn test_memory<B: BitTest, W: HostWord, const IMM: bool>(cpu: &mut Cpu, op: &Op) -> Done {
    let offset = if IMM { op.imm } else { cpu.get::<W>(op.src).sext() };
    let words = if IMM { 0 } else { offset as i64 >> W::BITS.trailing_zeros() };
    let away = (words as u64).wrapping_mul(W::BYTES.into());
    let ea = cpu.ea(op).wrapping_add(away) & op.address_mask();
    let mask = mask_at::<W>(offset);
    let seg = op.segment();
    let value = if B::WRITES {
        let la = cpu.linear(seg, ea, W::BYTES, true)?;
        cpu.modify::<W>(la, seg, op.aux != 0, |value| Some(B::eval(value, mask)))?
    } else {
        cpu.read::<W>(seg, ea)?
    };
    cpu.set_flags(with_carry(cpu.flags(), value & mask != W::of(0)));
    Ok(Then::Next)
}

// Counts

/// A register from one operand.
trait Scan: 'static {
    /// Kind of the flags without the width, [`kind::EXPLICIT`] as it is.
    const KIND: u64;
    /// Result and flags; `None` leaves the whole destination.
    fn eval<W: Word>(src: W) -> (Option<W>, Flags);
}

/// SDM Vol. 2 "BSF". A source of 0 leaves the destination, upper half included, as AMD documents and Intel does.
struct Bsf;
impl Scan for Bsf {
    const KIND: u64 = kind::SUB;
    #[inline(always)]
    fn eval<W: Word>(src: W) -> (Option<W>, Flags) {
        // ZF is the source's; the others are undefined.
        let found = (src != W::of(0)).then(|| W::of(src.zext().trailing_zeros().into()));
        (found, Flags::of_logic(src))
    }
}

/// SDM Vol. 2 "BSR". As BSF for a source of 0.
struct Bsr;
impl Scan for Bsr {
    const KIND: u64 = kind::SUB;
    #[inline(always)]
    fn eval<W: Word>(src: W) -> (Option<W>, Flags) {
        let found = (src != W::of(0)).then(|| W::of((63 - src.zext().leading_zeros()).into()));
        (found, Flags::of_logic(src))
    }
}

/// SDM Vol. 2 "TZCNT": CF for a source of 0, ZF for a result of 0.
struct Tzcnt;
impl Scan for Tzcnt {
    const KIND: u64 = kind::RESULT;
    #[inline(always)]
    fn eval<W: Word>(src: W) -> (Option<W>, Flags) {
        let count = W::of(src.zext().trailing_zeros().min(W::BITS).into());
        (Some(count), Flags::of_result(count, u64::from(src == W::of(0)) * CF))
    }
}

/// SDM Vol. 2 "LZCNT": flags as TZCNT.
struct Lzcnt;
impl Scan for Lzcnt {
    const KIND: u64 = kind::RESULT;
    #[inline(always)]
    fn eval<W: Word>(src: W) -> (Option<W>, Flags) {
        let count = W::of((src.zext().leading_zeros() + W::BITS - 64).into());
        (Some(count), Flags::of_result(count, u64::from(src == W::of(0)) * CF))
    }
}

/// SDM Vol. 2 "POPCNT": ZF for a source of 0, the rest clear.
struct Popcnt;
impl Scan for Popcnt {
    const KIND: u64 = kind::EXPLICIT;
    #[inline(always)]
    fn eval<W: Word>(src: W) -> (Option<W>, Flags) {
        (Some(W::of(src.zext().count_ones().into())), Flags::explicit(u64::from(src == W::of(0)) * ZF))
    }
}

struct ScanReg<S, W, const FLAGS: bool>(PhantomData<(S, W)>);
struct ScanMem<S, W, F, const FLAGS: bool>(PhantomData<(S, W, F)>);

#[inline(always)]
fn scan_value<S: Scan, W: HostWord, const FLAGS: bool>(m: &mut Machine, src: W) -> To {
    let (result, flags) = S::eval(src);
    if let Some(result) = result {
        m.put(m.op().dst, result);
    }
    if FLAGS {
        m.set_flags(flags);
    }
    To::Next
}

impl<S: Scan, W: HostWord, const FLAGS: bool> Semantics for ScanReg<S, W, FLAGS> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let src = m.get(m.op().src);
        scan_value::<S, W, FLAGS>(m, src)
    }
}

impl<S: Scan, W: HostWord, F: Form, const FLAGS: bool> Semantics for ScanMem<S, W, F, FLAGS> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        // SAFETY: `m` is the dispatch's.
        let la = attempt!(unsafe { F::linear(m, W::BYTES, false) });
        let src = attempt!(m.load::<F, W>(la));
        scan_value::<S, W, FLAGS>(m, src)
    }
}

fn scan<S: Scan>(d: &Digest<'_>) -> Option<Lowered> {
    let bytes = d.bytes(0);
    if bytes == 1 {
        return None;
    }
    let memory = d.is_mem(1);
    let (loud, quiet) = if memory {
        by_width!(bytes, W => by_form!(d, F =>
            (handler::<ScanMem<S, W, F, true>> as Handler, handler::<ScanMem<S, W, F, false>> as Handler)))
    } else {
        by_width!(bytes, W => (handler::<ScanReg<S, W, true>> as _, handler::<ScanReg<S, W, false>> as _))
    };
    let width = if S::KIND == kind::EXPLICIT { 0 } else { u64::from(bytes.trailing_zeros()) };
    let lowered = d.lower(loud).makes_flags(S::KIND + width, quiet);
    Some(Lowered { reads_flags: false, barrier: memory, ..lowered })
}

// BMI1, BMI2, ADX

/// A register from two operands; `None` keeps the flags.
trait Three: 'static {
    /// `b` comes as it is, not cut to what the instruction looks at.
    fn eval<W: Word>(a: W, b: W) -> (W, Option<Flags>);
}

/// SDM Vol. 2 "ANDN".
struct Andn;
impl Three for Andn {
    fn eval<W: Word>(a: W, b: W) -> (W, Option<Flags>) {
        let result = !a & b;
        (result, Some(Flags::of_logic(result)))
    }
}

/// The lowest `n` bits.
fn low_bits(n: u64) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}

/// `b`: first bit in 7:0, how many in 15:8. SDM Vol. 2 "BEXTR".
struct Bextr;
impl Three for Bextr {
    fn eval<W: Word>(a: W, b: W) -> (W, Option<Flags>) {
        let (start, length) = (b.zext() & 0xff, b.zext() >> 8 & 0xff);
        let shifted = if start < 64 { a.zext() >> start } else { 0 };
        let result = W::of(shifted & low_bits(length));
        (result, Some(Flags::of_logic(result)))
    }
}

/// SDM Vol. 2 "BZHI": CF where the index is beyond the operand.
struct Bzhi;
impl Three for Bzhi {
    fn eval<W: Word>(a: W, b: W) -> (W, Option<Flags>) {
        let index = b.zext() & 0xff;
        let result = a & W::of(low_bits(index));
        (result, Some(Flags::of_result(result, u64::from(index >= W::BITS.into()) * CF)))
    }
}

/// SDM Vol. 2 "PDEP".
struct Pdep;
impl Three for Pdep {
    fn eval<W: Word>(a: W, b: W) -> (W, Option<Flags>) {
        let (mut from, mut mask, mut result) = (a.zext(), b.zext(), 0);
        while mask != 0 {
            let lowest = mask & mask.wrapping_neg();
            if from & 1 != 0 {
                result |= lowest;
            }
            from >>= 1;
            mask &= !lowest;
        }
        (W::of(result), None)
    }
}

/// SDM Vol. 2 "PEXT".
struct Pext;
impl Three for Pext {
    fn eval<W: Word>(a: W, b: W) -> (W, Option<Flags>) {
        let (from, mut mask, mut result, mut next) = (a.zext(), b.zext(), 0, 0);
        while mask != 0 {
            let lowest = mask & mask.wrapping_neg();
            result |= u64::from(from & lowest != 0) << next;
            next += 1;
            mask &= !lowest;
        }
        (W::of(result), None)
    }
}

/// SDM Vol. 2 "SARX/SHLX/SHRX".
struct Sarx;
impl Three for Sarx {
    fn eval<W: Word>(a: W, b: W) -> (W, Option<Flags>) {
        (W::of((a.sext() as i64 >> (b.zext() & u64::from(W::BITS - 1))) as u64), None)
    }
}

/// SDM Vol. 2 "SARX/SHLX/SHRX".
struct Shlx;
impl Three for Shlx {
    fn eval<W: Word>(a: W, b: W) -> (W, Option<Flags>) {
        (W::of(a.zext() << (b.zext() & u64::from(W::BITS - 1))), None)
    }
}

/// SDM Vol. 2 "SARX/SHLX/SHRX".
struct Shrx;
impl Three for Shrx {
    fn eval<W: Word>(a: W, b: W) -> (W, Option<Flags>) {
        (W::of(a.zext() >> (b.zext() & u64::from(W::BITS - 1))), None)
    }
}

/// In `imm`: which operand is memory.
const FIRST_IS_MEMORY: u64 = 1;
const SECOND_IS_MEMORY: u64 = 2;

fn three<T: Three>(d: &Digest<'_>) -> Option<Lowered> {
    let h = match d.bytes(0) {
        4 => plain_handler(three_any::<T, u32>),
        _ => plain_handler(three_any::<T, u64>),
    };
    let mut lowered = d.lower(h);
    lowered.op.imm = if d.is_mem(1) {
        FIRST_IS_MEMORY
    } else if d.is_mem(2) {
        SECOND_IS_MEMORY
    } else {
        0
    };
    Some(lowered)
}

impl Cpu {
    /// VEX does not exist in real-address and virtual-8086 mode: #UD (SDM Vol. 2 "VEX Instruction Exceptions").
    fn require_vex(&mut self) -> Result<(), Stop> {
        if self.is_protected() { Ok(()) } else { Err(self.undefined()) }
    }
}

fn three_any<T: Three, W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_vex()?;
    let (a, b) = match op.imm {
        FIRST_IS_MEMORY => (cpu.read_operand::<W>(op)?, cpu.get(op.src)),
        SECOND_IS_MEMORY => (cpu.get::<W>(op.src), cpu.read_operand(op)?),
        _ => (cpu.get::<W>(op.src), cpu.get(op.aux)),
    };
    let (result, flags) = T::eval(a, b);
    cpu.put(op.dst, result);
    if let Some(flags) = flags {
        cpu.set_flags(flags);
    }
    Ok(Then::Next)
}

/// A register from one operand, the destination and an immediate; `None` keeps the flags.
trait Two: 'static {
    /// The encoding is VEX.
    const VEX: bool = true;
    fn eval<W: Word>(dst: W, src: W, imm: u64, old: Flags) -> (W, Option<Flags>);
}

/// SDM Vol. 2 "BLSI": CF unless the source is 0.
struct Blsi;
impl Two for Blsi {
    fn eval<W: Word>(_: W, src: W, _: u64, _: Flags) -> (W, Option<Flags>) {
        let result = src & W::of(0).wrapping_sub(src);
        (result, Some(Flags::of_result(result, u64::from(src != W::of(0)) * CF)))
    }
}

/// SDM Vol. 2 "BLSMSK": CF for a source of 0.
struct Blsmsk;
impl Two for Blsmsk {
    fn eval<W: Word>(_: W, src: W, _: u64, _: Flags) -> (W, Option<Flags>) {
        let result = src ^ src.wrapping_sub(W::of(1));
        (result, Some(Flags::of_result(result, u64::from(src == W::of(0)) * CF)))
    }
}

/// SDM Vol. 2 "BLSR": CF for a source of 0.
struct Blsr;
impl Two for Blsr {
    fn eval<W: Word>(_: W, src: W, _: u64, _: Flags) -> (W, Option<Flags>) {
        let result = src & src.wrapping_sub(W::of(1));
        (result, Some(Flags::of_result(result, u64::from(src == W::of(0)) * CF)))
    }
}

/// SDM Vol. 2 "RORX".
struct Rorx;
impl Two for Rorx {
    fn eval<W: Word>(_: W, src: W, imm: u64, _: Flags) -> (W, Option<Flags>) {
        let (wide, by) = (src.zext(), imm as u32 & (W::BITS - 1));
        (W::of(wide >> by | wide << ((W::BITS - by) & (W::BITS - 1))), None)
    }
}

/// Sum with the carry in the flag `bit`, which takes the carry out; the other five stay.
fn add_with<W: Word>(dst: W, src: W, old: Flags, bit: u64) -> (W, Option<Flags>) {
    let old = old.bits();
    let sum = u128::from(dst.zext()) + u128::from(src.zext()) + u128::from(old & bit != 0);
    let carry = sum >> W::BITS != 0;
    (W::of(sum as u64), Some(Flags::explicit(old & !bit | u64::from(carry) * bit)))
}

/// SDM Vol. 2 "ADCX".
struct Adcx;
impl Two for Adcx {
    const VEX: bool = false;
    fn eval<W: Word>(dst: W, src: W, _: u64, old: Flags) -> (W, Option<Flags>) {
        add_with(dst, src, old, CF)
    }
}

/// SDM Vol. 2 "ADOX".
struct Adox;
impl Two for Adox {
    const VEX: bool = false;
    fn eval<W: Word>(dst: W, src: W, _: u64, old: Flags) -> (W, Option<Flags>) {
        add_with(dst, src, old, OF)
    }
}

fn two<T: Two>(d: &Digest<'_>) -> Option<Lowered> {
    let h = match d.bytes(0) {
        4 => plain_handler(two_any::<T, u32>),
        _ => plain_handler(two_any::<T, u64>),
    };
    let mut lowered = d.lower(h);
    lowered.op.aux = u8::from(d.is_mem(1));
    Some(lowered)
}

/// `aux`: the source is memory.
fn two_any<T: Two, W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    if T::VEX {
        cpu.require_vex()?;
    }
    let src = if op.aux != 0 { cpu.read_operand::<W>(op)? } else { cpu.get(op.src) };
    let (result, flags) = T::eval(cpu.get(op.dst), src, op.imm, cpu.flags());
    cpu.put(op.dst, result);
    if let Some(flags) = flags {
        cpu.set_flags(flags);
    }
    Ok(Then::Next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_nothing() {
        assert_eq!(Tzcnt::eval(0u16).0, Some(16));
        assert_eq!(Lzcnt::eval(0u32).0, Some(32));
        assert_eq!(Lzcnt::eval(1u64).0, Some(63));
        assert_eq!(Bsf::eval(0u64).0, None);
        assert_eq!(Bsr::eval(0x80u16).0, Some(7));
    }

    #[test]
    fn deposit_and_extract_are_each_others_reverse() {
        assert_eq!(Pdep::eval(0b101u32, 0xf0).0, 0x50);
        assert_eq!(Pext::eval(0x50u32, 0xf0).0, 0b101);
        assert_eq!(Pext::eval(u64::MAX, u64::MAX).0, u64::MAX);
    }

    #[test]
    fn fields_beyond_the_operand_are_empty_or_whole() {
        assert_eq!(Bextr::eval(0xffff_ffffu32, 0x0840).0, 0);
        assert_eq!(Bextr::eval(0xffff_ffffu32, 0x0804).0, 0xff);
        assert_eq!(Bzhi::eval(0x1234u64, 0xff).0, 0x1234);
        assert_eq!(Bzhi::eval(0x1234u64, 4).0, 4);
    }
}
