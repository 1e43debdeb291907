//! Moves of lanes that an immediate or a mask directs. Plain data movement, written out once for 128 bits in
//! [`crate::isa::simd::shuffle`]. SDM Vol. 2, the page of each mnemonic.

use iced_x86::Mnemonic as M;

use super::{Halves, WIDE, has_memory, plain, vex};
use crate::cpu::{Cpu, Done, Then};
use crate::decode::digest::{Digest, Lowered};
use crate::host::HostWord;
use crate::isa::simd::gfni::{Affine, AffineInverse, Multiply};
use crate::isa::simd::shuffle::{
    Blend, BlendByMask, ByImm, Insertps, Palignr, Pshufd, Pshufhw, Pshuflw, Pslldq, Psrldq, Shufpd, Shufps, lane,
};
use crate::isa::simd::sse4::{Aeskeygenassist, Pclmulqdq};
use crate::isa::{Row, plain_handler};
use crate::op::Op;

pub(in crate::isa) const ROWS: &[Row] = &[
    vex(M::Vpshufd, by_imm::<Pshufd, 0>),
    vex(M::Vpshufhw, by_imm::<Pshufhw, 0>),
    vex(M::Vpshuflw, by_imm::<Pshuflw, 0>),
    vex(M::Vshufps, by_imm::<Shufps, 0>),
    vex(M::Vshufpd, by_imm::<Shufpd, 2>),
    vex(M::Vpslldq, by_imm::<FirstOf<Pslldq>, 0>),
    vex(M::Vpsrldq, by_imm::<FirstOf<Psrldq>, 0>),
    vex(M::Vpalignr, by_imm::<Palignr, 0>),
    vex(M::Vblendps, by_imm::<Blend<32>, 4>),
    vex(M::Vblendpd, by_imm::<Blend<64>, 2>),
    vex(M::Vpblendw, by_imm::<Blend<16>, 0>),
    vex(M::Vpblendd, by_imm::<Blend<32>, 4>),
    vex(M::Vinsertps, insertps),
    vex(M::Vblendvps, by_mask::<32>),
    vex(M::Vblendvpd, by_mask::<64>),
    vex(M::Vpblendvb, by_mask::<8>),
    vex(M::Vpinsrb, insert::<u8>),
    vex(M::Vpinsrw, insert::<u16>),
    vex(M::Vpinsrd, insert::<u32>),
    vex(M::Vpinsrq, insert::<u64>),
    vex(M::Vpextrb, extract::<u8>),
    vex(M::Vpextrw, extract::<u16>),
    vex(M::Vpextrd, extract::<u32>),
    vex(M::Vpextrq, extract::<u64>),
    vex(M::Vextractps, extract::<u32>),
    vex(M::Vperm2f128, |d| plain(d, plain_handler(two_halves))),
    vex(M::Vperm2i128, |d| plain(d, plain_handler(two_halves))),
    vex(M::Vinsertf128, |d| plain(d, plain_handler(insert_half))),
    vex(M::Vinserti128, |d| plain(d, plain_handler(insert_half))),
    vex(M::Vextractf128, |d| plain(d, plain_handler(extract_half))),
    vex(M::Vextracti128, |d| plain(d, plain_handler(extract_half))),
    vex(M::Vpclmulqdq, by_imm::<Pclmulqdq, 0>),
    vex(M::Vaeskeygenassist, by_imm::<Aeskeygenassist, 0>),
    vex(M::Vgf2p8mulb, by_imm::<Multiply, 0>),
    vex(M::Vgf2p8affineqb, by_imm::<Affine, 0>),
    vex(M::Vgf2p8affineinvqb, by_imm::<AffineInverse, 0>),
    vex(M::Vpermq, |d| plain(d, plain_handler(permute_quads))),
    vex(M::Vpermpd, |d| plain(d, plain_handler(permute_quads))),
];

/// A byte shift, whose one source is the last operand here.
struct FirstOf<I>(std::marker::PhantomData<I>);
impl<I: ByImm> ByImm for FirstOf<I> {
    fn eval(_: u128, src: u128, imm: u8) -> u128 {
        I::eval(src, 0, imm)
    }
}

/// VPERMILPS and VPERMILPD with an immediate: lanes of `BITS` of one half.
struct Permil<const BITS: u32>;
impl<const BITS: u32> ByImm for Permil<BITS> {
    fn eval(_: u128, src: u128, imm: u8) -> u128 {
        let lanes = 128 / BITS;
        let selector = |i: u32| u32::from(imm) >> (i * (lanes / 2)) & (lanes - 1);
        (0..lanes).fold(0, |all, i| all | lane::<BITS>(src, selector(i)) << (BITS * i))
    }
}

pub(super) fn permil<const BITS: u32>(d: &Digest<'_>) -> Option<Lowered> {
    if BITS == 32 { by_imm::<Permil<BITS>, 0>(d) } else { by_imm::<Permil<BITS>, 2>(d) }
}

/// `I` on both halves; the upper one's immediate starts at bit `SHIFT`.
fn by_imm<I: ByImm, const SHIFT: u32>(d: &Digest<'_>) -> Option<Lowered> {
    fn run<I: ByImm, const SHIFT: u32>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_avx()?;
        let b = cpu.last_operand(op)?;
        let (a, imm) = (cpu.ymm(op.src), op.imm as u8);
        let high = if op.imm & WIDE != 0 { I::eval(a[1], b[1], imm >> SHIFT) } else { 0 };
        cpu.set_ymm(op.dst, [I::eval(a[0], b[0], imm), high]);
        Ok(Then::Next)
    }
    plain(d, plain_handler(run::<I, SHIFT>))
}

fn insertps(d: &Digest<'_>) -> Option<Lowered> {
    let mut lowered = by_imm::<Insertps, 0>(d)?;
    if d.is_mem(2) {
        // Bits 7:6 choose a lane of a register only.
        lowered.op.imm &= !0xc0;
    }
    Some(lowered)
}

/// Lanes of the last operand where the mask, a fourth register, has its sign set.
fn by_mask<const BITS: u32>(d: &Digest<'_>) -> Option<Lowered> {
    fn run<const BITS: u32>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_avx()?;
        let b = cpu.last_operand(op)?;
        let (a, mask) = (cpu.ymm(op.src), cpu.ymm(op.imm as u8));
        let half = |i: usize| BlendByMask::<BITS>::eval_by_mask(a[i], b[i], mask[i]);
        cpu.set_ymm(op.dst, [half(0), if op.imm & WIDE != 0 { half(1) } else { 0 }]);
        Ok(Then::Next)
    }
    plain(d, plain_handler(run::<BITS>))
}

/// A lane from a general register or memory into a copy of the first source.
fn insert<W: HostWord>(d: &Digest<'_>) -> Option<Lowered> {
    fn run<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_avx()?;
        let value: W = if has_memory(op) { cpu.read_operand(op)? } else { cpu.get(op.aux) };
        let at = W::BITS * (op.imm as u32 & (128 / W::BITS - 1));
        let ones = u128::from(u64::MAX >> (64 - W::BITS));
        let result = cpu.xmm(op.src) & !(ones << at) | u128::from(value.zext()) << at;
        cpu.set_ymm(op.dst, [result, 0]);
        Ok(Then::Next)
    }
    plain(d, plain_handler(run::<W>))
}

/// A lane to memory, or zero-extended to a general register.
fn extract<W: HostWord>(d: &Digest<'_>) -> Option<Lowered> {
    fn run<W: HostWord, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_avx()?;
        let value = W::of((cpu.xmm(op.src) >> (W::BITS * (op.imm as u32 & (128 / W::BITS - 1)))) as u64);
        if MEMORY {
            cpu.write_operand(op, value)?;
        } else {
            cpu.put(op.dst, value.zext());
        }
        Ok(Then::Next)
    }
    plain(d, if d.is_mem(0) { plain_handler(run::<W, true>) } else { plain_handler(run::<W, false>) })
}

/// Halves of both sources, or zeros.
fn two_halves(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_avx()?;
    let b = cpu.last_operand(op)?;
    let a = cpu.ymm(op.src);
    let pick = |control: u64| if control & 8 != 0 { 0 } else { [a[0], a[1], b[0], b[1]][control as usize & 3] };
    cpu.set_ymm(op.dst, [pick(op.imm), pick(op.imm >> 4)]);
    Ok(Then::Next)
}

fn insert_half(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_avx()?;
    let b = cpu.last_operand(op)?;
    let mut result = cpu.ymm(op.src);
    result[op.imm as usize & 1] = b[0];
    cpu.set_ymm(op.dst, result);
    Ok(Then::Next)
}

fn extract_half(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_avx()?;
    let half = cpu.ymm(op.src)[op.imm as usize & 1];
    if has_memory(op) {
        let at = cpu.ea(op);
        cpu.write_bytes(op.segment(), at, &half.to_le_bytes())?;
    } else {
        cpu.set_ymm(op.dst, [half, 0]);
    }
    Ok(Then::Next)
}

fn permute_quads(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_avx()?;
    let b: Halves = cpu.last_operand(op)?;
    let quads = [b[0] as u64, (b[0] >> 64) as u64, b[1] as u64, (b[1] >> 64) as u64];
    let pick = |i: u32| u128::from(quads[(op.imm >> (2 * i)) as usize & 3]);
    cpu.set_ymm(op.dst, [pick(0) | pick(1) << 64, pick(2) | pick(3) << 64]);
    Ok(Then::Next)
}
