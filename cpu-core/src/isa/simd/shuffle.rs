//! Moves of lanes that an immediate or a mask directs: shuffles, byte shifts, blends, inserts and extracts. They are
//! plain data movement, so they are written out; no host instruction takes an immediate from a register. SDM Vol. 2,
//! the page of each mnemonic.
#![expect(unsafe_code, reason = "hot semantics run on the dispatch's raw CPU pointer")]

use std::marker::PhantomData;

use iced_x86::{Code as C, Mnemonic as M};

use super::{M32, M128, Source, by_heat, keeps, source, sse};
use crate::cpu::{Cpu, Done, Then};
use crate::decode::digest::{Digest, Lowered};
use crate::host::HostWord;
use crate::host_simd::{from_u128, to_u128};
use crate::isa::{Row, codes, plain_handler, row};
use crate::op::{Form, Handler, Machine, Op, Semantics, To, attempt, handler};

pub(in crate::isa) const ROWS: &[Row] = &[
    row(M::Pshufd, by_imm::<Pshufd>),
    row(M::Pshufhw, by_imm::<Pshufhw>),
    row(M::Pshuflw, by_imm::<Pshuflw>),
    row(M::Shufps, by_imm::<Shufps>),
    row(M::Shufpd, by_imm::<Shufpd>),
    codes(&[C::Pslldq_xmm_imm8], |d| keeps(d, handler::<ByteShift<Pslldq>>)),
    codes(&[C::Psrldq_xmm_imm8], |d| keeps(d, handler::<ByteShift<Psrldq>>)),
    codes(&[C::Palignr_xmm_xmmm128_imm8], by_imm::<Palignr>),
    row(M::Blendps, by_imm::<Blend<32>>),
    row(M::Blendpd, by_imm::<Blend<64>>),
    row(M::Pblendw, by_imm::<Blend<16>>),
    row(M::Insertps, insertps),
    row(M::Pblendvb, by_imm::<BlendByMask<8>>),
    row(M::Blendvps, by_imm::<BlendByMask<32>>),
    row(M::Blendvpd, by_imm::<BlendByMask<64>>),
    codes(&[C::Pshufw_mm_mmm64_imm8], |d| keeps(d, mm_by_imm::<Pshufw>(d))),
    codes(&[C::Palignr_mm_mmm64_imm8], |d| keeps(d, mm_by_imm::<PalignrMm>(d))),
    codes(&[C::Pinsrw_mm_r32m16_imm8, C::Pinsrw_mm_r64m16_imm8], |d| {
        keeps(d, if d.is_mem(1) { plain_handler(pinsrw_mm::<true>) } else { plain_handler(pinsrw_mm::<false>) })
    }),
    codes(&[C::Pextrw_r32_mm_imm8, C::Pextrw_r64_mm_imm8], |d| keeps(d, plain_handler(pextrw_mm))),
    codes(&[C::Pinsrw_xmm_r32m16_imm8, C::Pinsrw_xmm_r64m16_imm8], insert::<u16>),
    row(M::Pinsrb, insert::<u8>),
    row(M::Pinsrd, insert::<u32>),
    row(M::Pinsrq, insert::<u64>),
    // Every form of PEXTRW that is not MMX's.
    row(M::Pextrw, extract::<u16>),
    row(M::Pextrb, extract::<u8>),
    row(M::Pextrd, extract::<u32>),
    row(M::Pextrq, extract::<u64>),
    row(M::Extractps, extract::<u32>),
];

/// `dst ← f(dst, src, imm)` on XMM registers. `xmm0` is looked at by the variable blends alone.
pub(super) trait ByImm: 'static {
    /// Reads the implicit XMM0 in place of the immediate.
    const BY_XMM0: bool = false;
    fn eval(dst: u128, src: u128, imm: u8) -> u128;
    fn eval_by_mask(dst: u128, _src: u128, _mask: u128) -> u128 {
        dst
    }
}

/// Lane `i` of `BITS`.
#[inline(always)]
pub(super) fn lane<const BITS: u32>(value: u128, i: u32) -> u128 {
    value >> (BITS * i) & (u128::MAX >> (128 - BITS))
}

pub(super) struct Pshufd;
impl ByImm for Pshufd {
    #[inline(always)]
    fn eval(_: u128, src: u128, imm: u8) -> u128 {
        let pick = |i: u32| lane::<32>(src, u32::from(imm) >> (2 * i) & 3) << (32 * i);
        pick(0) | pick(1) | pick(2) | pick(3)
    }
}

/// Four words of a quadword in the order of `imm`.
#[inline(always)]
fn words(src: u64, imm: u8) -> u64 {
    let pick = |i: u32| (src >> (16 * (u32::from(imm) >> (2 * i) & 3)) & 0xffff) << (16 * i);
    pick(0) | pick(1) | pick(2) | pick(3)
}

pub(super) struct Pshufhw;
impl ByImm for Pshufhw {
    #[inline(always)]
    fn eval(_: u128, src: u128, imm: u8) -> u128 {
        u128::from(src as u64) | u128::from(words((src >> 64) as u64, imm)) << 64
    }
}

pub(super) struct Pshuflw;
impl ByImm for Pshuflw {
    #[inline(always)]
    fn eval(_: u128, src: u128, imm: u8) -> u128 {
        src >> 64 << 64 | u128::from(words(src as u64, imm))
    }
}

pub(super) struct Shufps;
impl ByImm for Shufps {
    #[inline(always)]
    fn eval(dst: u128, src: u128, imm: u8) -> u128 {
        let pick = |from: u128, i: u32| lane::<32>(from, u32::from(imm) >> (2 * i) & 3) << (32 * i);
        pick(dst, 0) | pick(dst, 1) | pick(src, 2) | pick(src, 3)
    }
}

pub(super) struct Shufpd;
impl ByImm for Shufpd {
    #[inline(always)]
    fn eval(dst: u128, src: u128, imm: u8) -> u128 {
        lane::<64>(dst, u32::from(imm & 1)) | lane::<64>(src, u32::from(imm >> 1 & 1)) << 64
    }
}

pub(super) struct Pslldq;
impl ByImm for Pslldq {
    #[inline(always)]
    fn eval(dst: u128, _: u128, imm: u8) -> u128 {
        dst.checked_shl(8 * u32::from(imm)).unwrap_or(0)
    }
}

pub(super) struct Psrldq;
impl ByImm for Psrldq {
    #[inline(always)]
    fn eval(dst: u128, _: u128, imm: u8) -> u128 {
        dst.checked_shr(8 * u32::from(imm)).unwrap_or(0)
    }
}

/// 16 bytes from byte `imm` on of `dst` above `src`, zeros above both.
pub(super) struct Palignr;
impl ByImm for Palignr {
    #[inline(always)]
    fn eval(dst: u128, src: u128, imm: u8) -> u128 {
        let bits = 8 * u32::from(imm);
        match imm {
            0 => src,
            1..16 => src >> bits | dst << (128 - bits),
            _ => dst.checked_shr(bits - 128).unwrap_or(0),
        }
    }
}

/// Lane `i` of `src` where bit `i` of the immediate is set.
pub(super) struct Blend<const BITS: u32>;
impl<const BITS: u32> ByImm for Blend<BITS> {
    #[inline(always)]
    fn eval(dst: u128, src: u128, imm: u8) -> u128 {
        let ones = u128::MAX >> (128 - BITS);
        let mask = (0..128 / BITS).fold(0, |mask, i| mask | (u128::from(imm >> i & 1) * ones) << (BITS * i));
        dst & !mask | src & mask
    }
}

/// Lane of `src` where the sign of XMM0's lane is set.
pub(super) struct BlendByMask<const BITS: u32>;
impl<const BITS: u32> ByImm for BlendByMask<BITS> {
    const BY_XMM0: bool = true;
    fn eval(dst: u128, _: u128, _: u8) -> u128 {
        dst
    }
    #[inline(always)]
    fn eval_by_mask(dst: u128, src: u128, mask: u128) -> u128 {
        let ones = u128::MAX >> (128 - BITS);
        let mask = (0..128 / BITS).fold(0, |all, i| all | ((mask >> (BITS * i + BITS - 1) & 1) * ones) << (BITS * i));
        dst & !mask | src & mask
    }
}

/// `src` has been loaded as 4 bytes where it is memory: the selector makes the source lane 0 then.
pub(super) struct Insertps;
impl ByImm for Insertps {
    #[inline(always)]
    fn eval(dst: u128, src: u128, imm: u8) -> u128 {
        let value = lane::<32>(src, u32::from(imm >> 6));
        let at = 32 * u32::from(imm >> 4 & 3);
        let ones = u128::from(u32::MAX);
        let inserted = dst & !(ones << at) | value << at;
        let zeroed = (0..4).fold(0, |mask, i| mask | (u128::from(imm >> i & 1) * ones) << (32 * i));
        inserted & !zeroed
    }
}

struct ImmReg<I>(PhantomData<I>);
struct ImmMem<I, S, F>(PhantomData<(I, S, F)>);
struct ByteShift<I>(PhantomData<I>);

#[inline(always)]
fn finish<I: ByImm>(m: &mut Machine, src: u128) -> To {
    let (dst, imm) = (m.op().dst, m.op().imm as u8);
    let old = to_u128(m.xmm(dst));
    let result = if I::BY_XMM0 { I::eval_by_mask(old, src, to_u128(m.xmm(0))) } else { I::eval(old, src, imm) };
    m.set_xmm(dst, from_u128(result));
    To::Next
}

impl<I: ByImm> Semantics for ImmReg<I> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(sse(m));
        let src = to_u128(m.xmm(m.op().src));
        finish::<I>(m, src)
    }
}

impl<I: ByImm, S: Source, F: Form> Semantics for ImmMem<I, S, F> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(sse(m));
        let src = attempt!(source::<S, F>(m));
        finish::<I>(m, to_u128(src))
    }
}

impl<I: ByImm> Semantics for ByteShift<I> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(sse(m));
        finish::<I>(m, 0)
    }
}

fn by_imm<I: ByImm>(d: &Digest<'_>) -> Option<Lowered> {
    let mem = || by_heat!(d, F => handler::<ImmMem<I, M128, F>> as Handler);
    keeps(d, if d.is_mem(1) { mem() } else { handler::<ImmReg<I>> })
}

fn insertps(d: &Digest<'_>) -> Option<Lowered> {
    if !d.is_mem(1) {
        return by_imm::<Insertps>(d);
    }
    let mut lowered = keeps(d, by_heat!(d, F => handler::<ImmMem<Insertps, M32, F>> as Handler))?;
    // Bits 7:6 choose a lane of a register only.
    lowered.op.imm &= 0x3f;
    Some(lowered)
}

// MMX

trait MmByImm: 'static {
    fn eval(dst: u64, src: u64, imm: u8) -> u64;
}

struct Pshufw;
impl MmByImm for Pshufw {
    fn eval(_: u64, src: u64, imm: u8) -> u64 {
        words(src, imm)
    }
}

struct PalignrMm;
impl MmByImm for PalignrMm {
    fn eval(dst: u64, src: u64, imm: u8) -> u64 {
        let both = u128::from(src) | u128::from(dst) << 64;
        both.checked_shr(8 * u32::from(imm)).unwrap_or(0) as u64
    }
}

fn mm_by_imm<I: MmByImm>(d: &Digest<'_>) -> Handler {
    fn run<I: MmByImm>(cpu: &mut Cpu, op: &Op, src: u64) -> Done {
        let result = I::eval(cpu.mm(op.dst), src, op.imm as u8);
        cpu.enter_mmx();
        cpu.set_mm(op.dst, result);
        Ok(Then::Next)
    }
    fn mem<I: MmByImm>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_mmx()?;
        let src = cpu.read_operand(op)?;
        run::<I>(cpu, op, src)
    }
    fn reg<I: MmByImm>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_mmx()?;
        run::<I>(cpu, op, cpu.mm(op.src))
    }
    if d.is_mem(1) { plain_handler(mem::<I>) } else { plain_handler(reg::<I>) }
}

fn pinsrw_mm<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_mmx()?;
    let word: u16 = if MEMORY { cpu.read_operand(op)? } else { cpu.get(op.src) };
    let at = 16 * (op.imm & 3);
    let result = cpu.mm(op.dst) & !(0xffff << at) | u64::from(word) << at;
    cpu.enter_mmx();
    cpu.set_mm(op.dst, result);
    Ok(Then::Next)
}

fn pextrw_mm(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_mmx()?;
    let word = cpu.mm(op.src) >> (16 * (op.imm & 3)) as u32 & 0xffff;
    cpu.enter_mmx();
    cpu.put(op.dst, word as u32);
    Ok(Then::Next)
}

/// PINSRx: a lane from a general register or memory.
fn insert<W: HostWord>(d: &Digest<'_>) -> Option<Lowered> {
    fn run<W: HostWord>(cpu: &mut Cpu, op: &Op, value: W) -> Done {
        let at = W::BITS * (op.imm as u32 & (128 / W::BITS - 1));
        let ones = u128::from(u64::MAX >> (64 - W::BITS));
        let result = cpu.xmm(op.dst) & !(ones << at) | u128::from(value.zext()) << at;
        cpu.set_xmm(op.dst, result);
        Ok(Then::Next)
    }
    fn mem<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_sse()?;
        let value = cpu.read_operand::<W>(op)?;
        run(cpu, op, value)
    }
    fn reg<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_sse()?;
        run(cpu, op, cpu.get::<W>(op.src))
    }
    keeps(d, if d.is_mem(1) { plain_handler(mem::<W>) } else { plain_handler(reg::<W>) })
}

/// PEXTRx: a lane to memory, or zero-extended to a general register.
fn extract<W: HostWord>(d: &Digest<'_>) -> Option<Lowered> {
    fn value<W: HostWord>(cpu: &mut Cpu, op: &Op) -> W {
        W::of((cpu.xmm(op.src) >> (W::BITS * (op.imm as u32 & (128 / W::BITS - 1)))) as u64)
    }
    fn mem<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_sse()?;
        let value = value::<W>(cpu, op);
        cpu.write_operand(op, value)?;
        Ok(Then::Next)
    }
    fn reg<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_sse()?;
        let value = value::<W>(cpu, op).zext();
        cpu.put(op.dst, value);
        Ok(Then::Next)
    }
    keeps(d, if d.is_mem(0) { plain_handler(mem::<W>) } else { plain_handler(reg::<W>) })
}
