//! Conversions between floats and integers, and between widths of floats, F16C's among them. SDM Vol. 2, the page of each
//! mnemonic.
#![expect(unsafe_code, reason = "rows expand to host instructions")]

use iced_x86::{Code as C, Mnemonic as M};

use super::float::{float2, scalar};
use super::{WIDE, floats, halves, has_memory, plain, vex};
use crate::access::By;
use crate::cpu::{Cpu, Done, Then};
use crate::decode::digest::Digest;
use crate::host::HostWord;
use crate::host_simd::{self, Float, V, float_from_general_impl, float_to_general_impl, from_u128, tiny, to_u128};
use crate::host_vex::{two_operands, vex_float_impl};
use crate::isa::simd::float::{settle, under};
use crate::isa::{Row, codes, plain_handler};
use crate::op::Op;
use crate::state::VectorRegister;

macro_rules! from_general {
    ($name:literal, $W:ty, $b:literal) => {{
        struct I;
        float_from_general_impl!(I, $W, $name, $b);
        |d: &Digest<'_>| plain(d, plain_handler(from_general::<I>))
    }};
}

macro_rules! to_general {
    ($name:literal, $W:ty, $o:literal) => {{
        struct I;
        float_to_general_impl!(I, $W, $name, $o);
        |d: &Digest<'_>| plain(d, plain_handler(to_general::<I>))
    }};
}

pub(in crate::isa) const ROWS: &[Row] = &[
    vex(M::Vcvtps2pd, float2!("cvtps2pd", never, "ymm0, xmm1")),
    vex(M::Vcvtpd2ps, float2!("cvtpd2ps", ps, "xmm0, ymm1")),
    vex(M::Vcvtdq2ps, float2!("cvtdq2ps", never)),
    vex(M::Vcvtps2dq, float2!("cvtps2dq", never)),
    vex(M::Vcvttps2dq, float2!("cvttps2dq", never)),
    vex(M::Vcvtpd2dq, float2!("cvtpd2dq", never, "xmm0, ymm1")),
    vex(M::Vcvttpd2dq, float2!("cvttpd2dq", never, "xmm0, ymm1")),
    vex(M::Vcvtph2ps, float2!("cvtph2ps", never, "ymm0, xmm1")),
    vex(M::Vcvtps2ph, |d| plain(d, plain_handler(to_half))),
    codes(&[C::VEX_Vcvtsi2ss_xmm_xmm_rm32], from_general!("cvtsi2ss", u32, "{b:e}")),
    codes(&[C::VEX_Vcvtsi2ss_xmm_xmm_rm64], from_general!("cvtsi2ss", u64, "{b:r}")),
    codes(&[C::VEX_Vcvtsi2sd_xmm_xmm_rm32], from_general!("cvtsi2sd", u32, "{b:e}")),
    codes(&[C::VEX_Vcvtsi2sd_xmm_xmm_rm64], from_general!("cvtsi2sd", u64, "{b:r}")),
    codes(&[C::VEX_Vcvtss2si_r32_xmmm32], to_general!("cvtss2si", u32, "{o:e}")),
    codes(&[C::VEX_Vcvtss2si_r64_xmmm32], to_general!("cvtss2si", u64, "{o:r}")),
    codes(&[C::VEX_Vcvtsd2si_r32_xmmm64], to_general!("cvtsd2si", u32, "{o:e}")),
    codes(&[C::VEX_Vcvtsd2si_r64_xmmm64], to_general!("cvtsd2si", u64, "{o:r}")),
    codes(&[C::VEX_Vcvttss2si_r32_xmmm32], to_general!("cvttss2si", u32, "{o:e}")),
    codes(&[C::VEX_Vcvttss2si_r64_xmmm32], to_general!("cvttss2si", u64, "{o:r}")),
    codes(&[C::VEX_Vcvttsd2si_r32_xmmm64], to_general!("cvttsd2si", u32, "{o:e}")),
    codes(&[C::VEX_Vcvttsd2si_r64_xmmm64], to_general!("cvttsd2si", u64, "{o:r}")),
];

/// A general register or memory into the low lane of a copy of the first source.
fn from_general<I: Float<In: HostWord, Out = V>>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_avx()?;
    let b: I::In = if has_memory(op) { cpu.read_operand(op)? } else { cpu.get(op.aux) };
    let out = scalar::<I>(cpu, from_u128(cpu.xmm(op.src)), b)?;
    cpu.set_ymm(op.dst, [to_u128(out), 0]);
    Ok(Then::Next)
}

fn to_general<I: Float<In = V, Out: HostWord>>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_avx()?;
    let b = from_u128(cpu.last_operand(op)?[0]);
    let out = scalar::<I>(cpu, b, b)?;
    cpu.put(op.dst, out);
    Ok(Then::Next)
}

/// VCVTPS2PH with one of eight immediates: bits 1:0 round, unless bit 2 leaves that to MXCSR.
struct ToHalf<const IMM: u8>;
type RunToHalf = fn(&VectorRegister, &mut VectorRegister, &mut host_simd::Under);

impl<const IMM: u8> ToHalf<IMM> {
    fn run<const WIDE: bool>(from: &VectorRegister, to: &mut VectorRegister, under: &mut host_simd::Under) {
        let (from, to, under) = (std::ptr::from_ref(from), std::ptr::from_mut(to), std::ptr::from_mut(under));
        if WIDE {
            // SAFETY: vector registers and MXCSR images of ours; the selector has asked the host.
            unsafe {
                std::arch::asm!("vmovdqu ymm0, [{from}]", "vldmxcsr [{under}]", "vcvtps2ph xmm0, ymm0, {IMM}",
                    "vstmxcsr [{under} + 4]", "vldmxcsr [{under} + 8]", "vmovdqu [{to}], xmm0", "vzeroupper",
                    from = in(reg) from, to = in(reg) to, under = in(reg) under, IMM = const IMM, out("xmm0") _,
                    options(nostack));
            }
        } else {
            // SAFETY: as above.
            unsafe {
                std::arch::asm!("vmovdqu xmm0, [{from}]", "vldmxcsr [{under}]", "vcvtps2ph xmm0, xmm0, {IMM}",
                    "vstmxcsr [{under} + 4]", "vldmxcsr [{under} + 8]", "vmovdqu [{to}], xmm0",
                    from = in(reg) from, to = in(reg) to, under = in(reg) under, IMM = const IMM, out("xmm0") _,
                    options(nostack));
            }
        }
    }
}

static TO_HALF: [[RunToHalf; 8]; 2] = [
    [
        ToHalf::<0>::run::<false>,
        ToHalf::<1>::run::<false>,
        ToHalf::<2>::run::<false>,
        ToHalf::<3>::run::<false>,
        ToHalf::<4>::run::<false>,
        ToHalf::<5>::run::<false>,
        ToHalf::<6>::run::<false>,
        ToHalf::<7>::run::<false>,
    ],
    [
        ToHalf::<0>::run::<true>,
        ToHalf::<1>::run::<true>,
        ToHalf::<2>::run::<true>,
        ToHalf::<3>::run::<true>,
        ToHalf::<4>::run::<true>,
        ToHalf::<5>::run::<true>,
        ToHalf::<6>::run::<true>,
        ToHalf::<7>::run::<true>,
    ],
];

fn to_half(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_avx()?;
    let wide = op.imm & WIDE != 0;
    let lanes = if wide { 8 } else { 4 };
    let bytes = (op.imm >> super::BYTES_AT) as usize & 0xff;
    let from = cpu.fpu.vector[usize::from(op.src & 15)];
    let mut out = VectorRegister::default();
    let mut under = under(cpu);
    TO_HALF[usize::from(wide)][op.imm as usize & 7](&from, &mut out, &mut under);
    let result = halves(&out)[0];
    // A store faults before the conversion does.
    let (seg, at) = (op.segment(), cpu.ea(op));
    if bytes != 0 {
        let la = cpu.linear(seg, at, bytes as u32, true)?;
        cpu.check_span(la, bytes as u32, seg)?;
        cpu.check_alignment(la, bytes as u32, By::Code)?;
        cpu.probe_write(la, bytes as u32, seg)?;
    }
    let tiny = || (0..lanes).any(|i| matches!((result >> (16 * i)) as u16 & 0x7fff, 1..=0x3ff));
    let source = halves(&from);
    let inexact =
        |mxcsr: u32| Some((0..lanes).any(|i| is_inexact_half((source[i / 4] >> (32 * (i % 4))) as u32, mxcsr)));
    settle(cpu, under.found, tiny, inexact)?;
    match bytes {
        0 => cpu.set_ymm(op.dst, [result, 0]),
        8 => cpu.write_operand(op, result as u64)?,
        _ => cpu.write_bytes(seg, at, &result.to_le_bytes())?,
    }
    Ok(Then::Next)
}

/// Whether a single has more than the eleven significant bits of a half.
pub(in crate::isa::simd) fn is_inexact_half(value: u32, mxcsr: u32) -> bool {
    const DAZ: u32 = 1 << 6;
    let (exponent, fraction) = (value >> 23 & 0xff, value & 0x7f_ffff);
    let significand = match exponent {
        0xff => return false,
        0 if mxcsr & DAZ != 0 => 0,
        0 => fraction,
        _ => fraction | 1 << 23,
    };
    significand != 0 && 32 - significand.leading_zeros() - significand.trailing_zeros() > 11
}
