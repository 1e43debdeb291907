//! Floats: arithmetic, comparison, rounding. SDM Vol. 1 "SIMD Floating-Point Exceptions"; Vol. 2, the page of each mnemonic.
//!
//! What an immediate directs is done 128 bits at a time by the host's SSE instruction, which is in a table already.
#![expect(unsafe_code, reason = "rows expand to host instructions")]

use iced_x86::Mnemonic as M;

use super::{Halves, floats, halves, plain, register, vex};
use crate::cpu::{Cpu, Done, Stop, Then};
use crate::decode::digest::{Digest, FlagsOut, Lowered};
use crate::flags::Flags;
use crate::host_simd::{
    self, CONTROL, Compared, DEFAULT, Float, V, float_compare_impl, from_u128, is_inexact_unbounded, tiny, to_u128,
};
use crate::host_vex::{two_operands, vex_float_impl};
use crate::isa::simd::float::{Dppd, Dpps, Mpsadbw, Roundpd, Roundps, Roundsd, Roundss, settle, under};
use crate::isa::{Row, plain_handler};
use crate::op::Op;
use crate::state::VectorRegister;

/// Any lane of `out` that `tiny` finds, by halves.
pub(super) fn any_tiny(out: &VectorRegister, wide: bool, tiny: fn(V) -> bool) -> bool {
    let [low, high] = halves(out);
    tiny(from_u128(low)) || wide && tiny(from_u128(high))
}

/// As [`is_inexact_unbounded`] of the SSE instruction `name`, by halves.
pub(super) fn inexact_halves(name: &str, [_, a, b]: [&VectorRegister; 3], wide: bool, mxcsr: u32) -> Option<bool> {
    let (a, b) = (halves(a), halves(b));
    let half = |i: usize| is_inexact_unbounded(name, from_u128(a[i]), from_u128(b[i]), mxcsr);
    Some(half(0)? || wide && half(1)?)
}

/// Row's selector: `op a, a, b`, by the name of its SSE form; what lanes of the result may be tiny; the operands of the
/// 256-bit form where there is none.
macro_rules! float3 {
    ($name:literal, $tiny:ident) => {
        $crate::isa::simd::vex::float::float3!($name, $tiny, "ymm0, ymm0, ymm1")
    };
    ($name:literal, $tiny:ident, $wide:literal) => {
        $crate::isa::simd::vex::float::float_text!(
            $name,
            $tiny,
            concat!("v", $name, " xmm0, xmm0, xmm1"),
            concat!("v", $name, " ", $wide)
        )
    };
}

/// As [`float3`], for `op a, b`; the operands of the 256-bit form where they are of two sizes.
macro_rules! float2 {
    ($name:literal, $tiny:ident) => {
        $crate::isa::simd::vex::float::float2!($name, $tiny, "ymm0, ymm1")
    };
    ($name:literal, $tiny:ident, $wide:literal) => {
        $crate::isa::simd::vex::float::float_text!(
            $name,
            $tiny,
            concat!("v", $name, " xmm0, xmm1"),
            concat!("v", $name, " ", $wide)
        )
    };
}

macro_rules! float_text {
    ($name:literal, $tiny:ident, $x:expr, $y:expr) => {{
        struct I;
        two_operands!(vex_float_impl, [] I, $x, $y, {
            fn is_tiny(out: &VectorRegister, wide: bool) -> bool {
                $crate::isa::simd::vex::float::any_tiny(out, wide, tiny::$tiny)
            }
            fn is_inexact_unbounded(
                operands: [&VectorRegister; 3],
                wide: bool,
                mxcsr: u32,
            ) -> Option<bool> {
                $crate::isa::simd::vex::float::inexact_halves($name, operands, wide, mxcsr)
            }
        });
        floats::<I>
    }};
}
pub(super) use {float_text, float2, float3};

/// A comparison with one of 32 predicates; the operands of the 256-bit form, or of the one there is.
macro_rules! compare {
    ($name:literal, $wide:literal) => {{
        struct One<const IMM: u8>;
        two_operands!(compare_impl, [<const IMM: u8>] One<IMM>, concat!($name, " xmm0, xmm0, xmm1, {IMM}"),
            concat!($name, " ", $wide), {});
        type Run = unsafe fn(*mut VectorRegister, *const VectorRegister, *const VectorRegister, &mut host_simd::Under);
        static TABLE: [[Run; 32]; 2] = [predicates!(One, false), predicates!(One, true)];
        fn run(cpu: &mut Cpu, op: &Op) -> Done {
            cpu.require_avx()?;
            let b = register(cpu.last_operand(op)?);
            let a = cpu.fpu.vector[usize::from(op.src & 15)];
            let mut out = VectorRegister::default();
            let mut under = under(cpu);
            let wide = usize::from(op.imm & super::WIDE != 0);
            // SAFETY: vector registers of ours; the selector has asked the host.
            unsafe { TABLE[wide][op.imm as usize & 31](&mut out, &a, &b, &mut under) };
            settle(cpu, under.found, || false, |_| None)?;
            cpu.fpu.vector[usize::from(op.dst & 15)] = out;
            Ok(Then::Next)
        }
        |d: &Digest<'_>| plain(d, plain_handler(run))
    }};
}

/// As [`vex_float_impl`], with the predicate as the block's constant.
macro_rules! compare_impl {
    ([$($generics:tt)*] $I:ty, ($($load_x:expr),*), ($($load_y:expr),*), $x:expr, $y:expr, $rest:tt) => {
        impl $($generics)* $I {
            /// Compares under `under.run`.
            ///
            /// # Safety
            /// As `Vex::run`.
            unsafe fn run<const WIDE: bool>(
                d: *mut VectorRegister,
                a: *const VectorRegister,
                b: *const VectorRegister,
                under: &mut host_simd::Under,
            ) {
                let under = std::ptr::from_mut(under);
                if WIDE {
                    // SAFETY: the caller's pointers; MXCSR's control bits end as Rust code wants them.
                    unsafe {
                        std::arch::asm!($($load_y),*, "vldmxcsr [{under}]", $y, "vstmxcsr [{under} + 4]",
                            "vldmxcsr [{under} + 8]", "vmovdqu [{d}], ymm0", "vzeroupper", d = in(reg) d,
                            a = in(reg) a, b = in(reg) b, under = in(reg) under, IMM = const IMM,
                            out("xmm0") _, out("xmm1") _, options(nostack));
                    }
                } else {
                    // SAFETY: as above.
                    unsafe {
                        std::arch::asm!($($load_x),*, "vldmxcsr [{under}]", $x, "vstmxcsr [{under} + 4]",
                            "vldmxcsr [{under} + 8]", "vmovdqu [{d}], ymm0", d = in(reg) d, a = in(reg) a,
                            b = in(reg) b, under = in(reg) under, IMM = const IMM, out("xmm0") _, out("xmm1") _,
                            options(nostack));
                    }
                }
            }
        }
    };
}

macro_rules! predicates {
    (@8 $One:ident, $wide:literal, $($h:literal)*) => {
        [$($One::<{ $h }>::run::<$wide>, $One::<{ $h + 1 }>::run::<$wide>, $One::<{ $h + 2 }>::run::<$wide>,
           $One::<{ $h + 3 }>::run::<$wide>, $One::<{ $h + 4 }>::run::<$wide>, $One::<{ $h + 5 }>::run::<$wide>,
           $One::<{ $h + 6 }>::run::<$wide>, $One::<{ $h + 7 }>::run::<$wide>),*]
    };
    ($One:ident, $wide:literal) => {
        predicates!(@8 $One, $wide, 0 8 16 24)
    };
}

/// ZF, PF and CF from two scalars.
macro_rules! flags {
    ($name:literal) => {{
        struct I;
        float_compare_impl!(I, $name);
        |d: &Digest<'_>| Some(Lowered { flags: FlagsOut::Unknown, ..plain(d, plain_handler(compare_flags::<I>))? })
    }};
}

pub(in crate::isa) const ROWS: &[Row] = &[
    vex(M::Vaddps, float3!("addps", ps)),
    vex(M::Vaddpd, float3!("addpd", pd)),
    vex(M::Vaddss, float3!("addss", ss, "xmm0, xmm0, xmm1")),
    vex(M::Vaddsd, float3!("addsd", sd, "xmm0, xmm0, xmm1")),
    vex(M::Vsubps, float3!("subps", ps)),
    vex(M::Vsubpd, float3!("subpd", pd)),
    vex(M::Vsubss, float3!("subss", ss, "xmm0, xmm0, xmm1")),
    vex(M::Vsubsd, float3!("subsd", sd, "xmm0, xmm0, xmm1")),
    vex(M::Vmulps, float3!("mulps", ps)),
    vex(M::Vmulpd, float3!("mulpd", pd)),
    vex(M::Vmulss, float3!("mulss", ss, "xmm0, xmm0, xmm1")),
    vex(M::Vmulsd, float3!("mulsd", sd, "xmm0, xmm0, xmm1")),
    vex(M::Vdivps, float3!("divps", ps)),
    vex(M::Vdivpd, float3!("divpd", pd)),
    vex(M::Vdivss, float3!("divss", ss, "xmm0, xmm0, xmm1")),
    vex(M::Vdivsd, float3!("divsd", sd, "xmm0, xmm0, xmm1")),
    vex(M::Vminps, float3!("minps", never)),
    vex(M::Vminpd, float3!("minpd", never)),
    vex(M::Vminss, float3!("minss", never, "xmm0, xmm0, xmm1")),
    vex(M::Vminsd, float3!("minsd", never, "xmm0, xmm0, xmm1")),
    vex(M::Vmaxps, float3!("maxps", never)),
    vex(M::Vmaxpd, float3!("maxpd", never)),
    vex(M::Vmaxss, float3!("maxss", never, "xmm0, xmm0, xmm1")),
    vex(M::Vmaxsd, float3!("maxsd", never, "xmm0, xmm0, xmm1")),
    vex(M::Vsqrtss, float3!("sqrtss", never, "xmm0, xmm0, xmm1")),
    vex(M::Vsqrtsd, float3!("sqrtsd", never, "xmm0, xmm0, xmm1")),
    vex(M::Vaddsubps, float3!("addsubps", ps)),
    vex(M::Vaddsubpd, float3!("addsubpd", pd)),
    vex(M::Vhaddps, float3!("haddps", ps)),
    vex(M::Vhaddpd, float3!("haddpd", pd)),
    vex(M::Vhsubps, float3!("hsubps", ps)),
    vex(M::Vhsubpd, float3!("hsubpd", pd)),
    vex(M::Vcvtss2sd, float3!("cvtss2sd", never, "xmm0, xmm0, xmm1")),
    vex(M::Vcvtsd2ss, float3!("cvtsd2ss", ss, "xmm0, xmm0, xmm1")),
    vex(M::Vsqrtps, float2!("sqrtps", never)),
    vex(M::Vsqrtpd, float2!("sqrtpd", never)),
    vex(M::Vcmpps, compare!("vcmpps", "ymm0, ymm0, ymm1, {IMM}")),
    vex(M::Vcmppd, compare!("vcmppd", "ymm0, ymm0, ymm1, {IMM}")),
    vex(M::Vcmpss, compare!("vcmpss", "xmm0, xmm0, xmm1, {IMM}")),
    vex(M::Vcmpsd, compare!("vcmpsd", "xmm0, xmm0, xmm1, {IMM}")),
    vex(M::Vcomiss, flags!("comiss")),
    vex(M::Vcomisd, flags!("comisd")),
    vex(M::Vucomiss, flags!("ucomiss")),
    vex(M::Vucomisd, flags!("ucomisd")),
    vex(M::Vroundps, |d| plain(d, plain_handler(by_halves::<Roundps, 0>))),
    vex(M::Vroundpd, |d| plain(d, plain_handler(by_halves::<Roundpd, 0>))),
    vex(M::Vroundss, |d| plain(d, plain_handler(by_halves::<Roundss, 0>))),
    vex(M::Vroundsd, |d| plain(d, plain_handler(by_halves::<Roundsd, 0>))),
    vex(M::Vdpps, |d| plain(d, plain_handler(by_halves::<Dpps, 0>))),
    vex(M::Vdppd, |d| plain(d, plain_handler(by_halves::<Dppd, 0>))),
    // Integers; the upper half has an immediate of its own in bits 5:3.
    vex(M::Vmpsadbw, |d| plain(d, plain_handler(by_halves::<Mpsadbw, 3>))),
];

/// MXCSR.UM.
const UNDERFLOW_MASK: u32 = 1 << 11;

/// `I` on each half; the upper one's immediate starts at bit `SHIFT`. Exceptions are those of both.
fn by_halves<I: Float<In = V, Out = V>, const SHIFT: u32>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_avx()?;
    let b = cpu.last_operand(op)?;
    let a = cpu.ymm(op.src);
    let imm = op.imm as u8;
    let mut under = under(cpu);
    let mut out: Halves = [0; 2];
    let mut found = 0;
    let mut is_tiny = false;
    let unmasked_underflow = cpu.fpu.mxcsr & UNDERFLOW_MASK == 0;
    for half in 0..if op.imm & super::WIDE != 0 { 2 } else { 1 } {
        let (a, b, imm) = (from_u128(a[half]), from_u128(b[half]), imm >> (SHIFT * half as u32));
        let value = I::eval_under(a, b, imm, &mut under);
        found |= under.found;
        is_tiny |= I::is_tiny(value) || unmasked_underflow && I::has_tiny_step(a, b, imm, under.run);
        out[half] = to_u128(value);
    }
    settle(cpu, found, || is_tiny, |_| None)?;
    cpu.set_ymm(op.dst, out);
    Ok(Then::Next)
}

/// `I` under the guest's MXCSR: in the host's where they are the same.
pub(super) fn scalar<I: Float>(cpu: &mut Cpu, a: V, b: I::In) -> Result<I::Out, Stop> {
    if cpu.fpu.mxcsr & CONTROL == DEFAULT {
        // SAFETY: the CPU's MXCSR, which under these control bits the host's follows.
        return Ok(unsafe { I::eval(a, b, 0, &mut cpu.fpu.mxcsr) });
    }
    super::super::float::careful::<I>(cpu, a, b, 0)
}

fn compare_flags<I: Float<In = V, Out = Compared>>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_avx()?;
    let b = from_u128(cpu.last_operand(op)?[0]);
    let a = from_u128(cpu.xmm(op.dst));
    let out = scalar::<I>(cpu, a, b)?;
    cpu.set_flags(Flags::explicit(out.0));
    Ok(Then::Next)
}
