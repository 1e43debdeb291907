//! The host's SSE instructions on values, and its MXCSR.
//!
//! A result is what the host's own instruction makes of the operands, so it is exact by construction. The macros make a
//! zero-sized type of one instruction; the families' rows name it. Host MXCSR keeps [`DEFAULT`]'s control bits outside
//! of single asm blocks, as Rust demands.
#![expect(unsafe_code, reason = "guest RAM is reached by host address; a vector is reinterpreted as an integer")]

use std::arch::asm;

/// 128 bits in a host register.
pub(crate) use std::arch::x86_64::__m128i as V;

/// The vector as a number, lane 0 lowest.
#[inline(always)]
pub(crate) fn to_u128(value: V) -> u128 {
    // SAFETY: 16 bytes without padding on both sides; every bit pattern is a value.
    unsafe { std::mem::transmute::<V, u128>(value) }
}

/// The number as a vector.
#[inline(always)]
pub(crate) fn from_u128(value: u128) -> V {
    // SAFETY: 16 bytes without padding on both sides; every bit pattern is a value.
    unsafe { std::mem::transmute::<u128, V>(value) }
}

/// Loads 16 bytes in one instruction.
///
/// # Safety
/// `host` is the host address of 16 bytes of guest RAM, as in [`crate::host`].
#[inline(always)]
pub(crate) unsafe fn load(host: u64) -> V {
    let value;
    // SAFETY: the caller's: 16 bytes of mapped guest RAM. The instruction only reads.
    unsafe {
        asm!("movups {0}, [{1}]", out(xmm_reg) value, in(reg) host, options(nostack, preserves_flags, readonly));
    }
    value
}

/// Stores 16 bytes in one instruction.
///
/// # Safety
/// `host` is the host address of 16 bytes of guest RAM that may be written, as in [`crate::host`].
#[inline(always)]
pub(crate) unsafe fn store(host: u64, value: V) {
    // SAFETY: the caller's: 16 bytes of mapped, writable guest RAM, outside the Rust heap.
    unsafe {
        asm!("movups [{1}], {0}", in(xmm_reg) value, in(reg) host, options(nostack, preserves_flags));
    }
}

/// One host instruction `op a, b` on XMM registers that looks at nothing else.
pub(crate) trait Xmm2: 'static {
    /// The destination after it.
    fn eval(a: V, b: V) -> V;
}

/// One host instruction `op a, b` on MMX registers.
pub(crate) trait Mm2: 'static {
    /// The destination after it.
    fn eval(a: u64, b: u64) -> u64;
}

/// `impl Xmm2`.
macro_rules! xmm2_impl {
    ($I:ident, $name:literal) => {
        impl $crate::host_simd::Xmm2 for $I {
            #[inline(always)]
            fn eval(mut a: $crate::host_simd::V, b: $crate::host_simd::V) -> $crate::host_simd::V {
                // SAFETY: registers only, no flags. What lies above SSE2 is behind its selector's look at the host.
                unsafe {
                    std::arch::asm!(concat!($name, " {0}, {1}"), inout(xmm_reg) a, in(xmm_reg) b,
                        options(pure, nomem, nostack, preserves_flags));
                }
                a
            }
        }
    };
}

/// `impl Mm2`. EMMS leaves the host's x87 stack empty, as it was.
macro_rules! mm2_impl {
    ($I:ident, $name:literal) => {
        impl $crate::host_simd::Mm2 for $I {
            #[inline(always)]
            fn eval(mut a: u64, b: u64) -> u64 {
                // SAFETY: registers only; all x87 registers are declared lost and left empty.
                unsafe {
                    std::arch::asm!("movq mm0, {0}", "movq mm1, {1}", concat!($name, " mm0, mm1"), "movq {0}, mm0",
                        "emms", inout(reg) a, in(reg) b, out("st(0)") _, out("st(1)") _, out("st(2)") _,
                        out("st(3)") _, out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                        options(nomem, nostack, preserves_flags));
                }
                a
            }
        }
    };
}
pub(crate) use {mm2_impl, xmm2_impl};

// MXCSR

/// MXCSR bits 5:0: IE DE ZE OE UE PE.
pub(crate) const FLAGS: u32 = 0x3f;
/// MXCSR bits that say how to compute: masks, rounding, FZ, DAZ.
pub(crate) const CONTROL: u32 = 0xffc0;
/// Control bits under which Rust code runs: everything masked, round to nearest.
pub(crate) const DEFAULT: u32 = 0x1f80;

/// While guest code runs and the guest's control bits are [`DEFAULT`], the host's MXCSR is the guest's: a handler then
/// need not load it, and stores it behind the instruction. Under other control bits the host's is [`DEFAULT`]. Nothing
/// else computes with floats between the guest's instructions; a [`crate::Platform`] that does would leave PE behind.
#[inline(always)]
pub(crate) fn follow(guest: u32) {
    let value = if guest & CONTROL == DEFAULT { guest } else { DEFAULT };
    // SAFETY: the operand is readable, and the control bits are those that Rust code runs under.
    unsafe {
        asm!("ldmxcsr [{0}]", in(reg) &value, options(nostack, readonly));
    }
}

/// What [`Float::eval_under`] loads, where it leaves MXCSR, and what it loads in the end.
#[repr(C)]
pub(crate) struct Under {
    pub(crate) run: u32,
    pub(crate) found: u32,
    pub(crate) back: u32,
}

/// One host instruction that computes with floats: `op a, b` with the immediate `imm`, where it has one.
pub(crate) trait Float: 'static {
    /// Second operand.
    type In: Copy;
    /// Result.
    type Out: Copy;

    /// Computes under the host's MXCSR and stores that to `mxcsr`.
    ///
    /// # Safety
    /// `mxcsr` may be written. The host has the instruction: what lies above SSE2 is selected only after a look.
    unsafe fn eval(a: V, b: Self::In, imm: u8, mxcsr: *mut u32) -> Self::Out;

    /// Computes under `under.run`.
    fn eval_under(a: V, b: Self::In, imm: u8, under: &mut Under) -> Self::Out;

    /// Part of the result is denormal: tiny, and exact if UE is clear.
    fn is_tiny(_: Self::Out) -> bool {
        false
    }

    /// As [`is_tiny`](Self::is_tiny), of what is computed on the way to the result under MXCSR `run`.
    fn has_tiny_step(_a: V, _b: Self::In, _imm: u8, _run: u32) -> bool {
        false
    }

    /// Part of the result is inexact were its exponent unbounded, which is what PE tells beside an unmasked OE or UE.
    /// `None`: the row cannot say.
    fn is_inexact_unbounded(_a: V, _b: Self::In, _mxcsr: u32) -> Option<bool> {
        None
    }
}

/// Denormal lanes of results, by shape.
pub(crate) mod tiny {
    use super::{V, to_u128};

    fn single(bits: u32) -> bool {
        bits & 0x7f80_0000 == 0 && bits & 0x007f_ffff != 0
    }

    fn double(bits: u64) -> bool {
        bits & 0x7ff0_0000_0000_0000 == 0 && bits & 0x000f_ffff_ffff_ffff != 0
    }

    pub(crate) fn ss(value: V) -> bool {
        single(to_u128(value) as u32)
    }
    pub(crate) fn sd(value: V) -> bool {
        double(to_u128(value) as u64)
    }
    pub(crate) fn ps(value: V) -> bool {
        (0..4).any(|i| single((to_u128(value) >> (32 * i)) as u32))
    }
    pub(crate) fn pd(value: V) -> bool {
        (0..2).any(|i| double((to_u128(value) >> (64 * i)) as u64))
    }
    /// Integers, masks and operands passed on are never tiny.
    pub(crate) fn never(_: V) -> bool {
        false
    }
}

/// As [`Float::is_inexact_unbounded`], for the instruction called `name`: x87 has the exponents, and rounds as told.
#[cold]
pub(crate) fn is_inexact_unbounded(name: &str, a: V, b: V, mxcsr: u32) -> Option<bool> {
    use crate::host_x87::{Arithmetic, is_inexact};
    const DAZ: u32 = 1 << 6;
    let rounding = (mxcsr >> 13) as u16 & 3;
    let (a, b) = (to_u128(a), to_u128(b));
    let lane = |value: u128, i: u32, bytes: u32| {
        let value = (value >> (8 * bytes * i)) as u64;
        let (value, exponent) = if bytes == 4 { (value & 0xffff_ffff, 0xff << 23) } else { (value, 0x7ff << 52) };
        let sign = 1 << (8 * bytes - 1);
        if mxcsr & DAZ != 0 && value & exponent == 0 { value & sign } else { value }
    };
    if let "cvtsd2ss" | "cvtpd2ps" = name {
        let lanes = if name == "cvtsd2ss" { 1 } else { 2 };
        return Some((0..lanes).any(|i| is_inexact(Arithmetic::Narrow, 4, lane(b, i, 8), 0, rounding)));
    }
    if let "addsubps" | "addsubpd" = name {
        // Even lanes are differences, odd ones sums.
        let bytes = if name == "addsubps" { 4 } else { 8 };
        let operation = |i: u32| if i.is_multiple_of(2) { Arithmetic::Sub } else { Arithmetic::Add };
        let inexact = |i| is_inexact(operation(i), bytes, lane(a, i, bytes), lane(b, i, bytes), rounding);
        return Some((0..16 / bytes).any(inexact));
    }
    // The horizontal ones take both operands of a lane from one register.
    let horizontal = name.starts_with('h');
    let (operation, shape) = name[usize::from(horizontal)..].split_at_checked(3)?;
    let operation = match operation {
        "add" => Arithmetic::Add,
        "sub" => Arithmetic::Sub,
        "mul" => Arithmetic::Mul,
        "div" => Arithmetic::Div,
        _ => return None,
    };
    let (bytes, lanes) = match shape {
        "ss" => (4, 1),
        "sd" => (8, 1),
        "ps" => (4, 4),
        "pd" => (8, 2),
        _ => return None,
    };
    if horizontal {
        let pair = |v, i| is_inexact(operation, bytes, lane(v, 2 * i, bytes), lane(v, 2 * i + 1, bytes), rounding);
        return Some([a, b].into_iter().any(|v| (0..lanes / 2).any(|i| pair(v, i))));
    }
    Some((0..lanes).any(|i| is_inexact(operation, bytes, lane(a, i, bytes), lane(b, i, bytes), rounding)))
}

/// `impl Float`, XMM and XMM to XMM: the instruction's text up to its operands, and behind them.
macro_rules! float_xmm_impl {
    ([$($generics:tt)*] $I:ty, $tiny:ident, $name:literal, $tail:literal $(, $imm:ident)?) => {
        impl $($generics)* $crate::host_simd::Float for $I {
            type In = $crate::host_simd::V;
            type Out = $crate::host_simd::V;
            #[inline(always)]
            unsafe fn eval(mut a: Self::Out, b: Self::In, _: u8, mxcsr: *mut u32) -> Self::Out {
                // SAFETY: registers, and the caller's `mxcsr`; control bits stay. Above SSE2: the selector looked.
                unsafe {
                    std::arch::asm!(concat!($name, " {a}, {b}", $tail), "stmxcsr [{p}]", a = inout(xmm_reg) a,
                        b = in(xmm_reg) b, p = in(reg) mxcsr, $($imm = const $imm,)? options(nostack));
                }
                a
            }
            fn eval_under(mut a: Self::Out, b: Self::In, _: u8, under: &mut $crate::host_simd::Under) -> Self::Out {
                // SAFETY: registers, and `under`, which is ours; MXCSR ends as `back`: the control bits of Rust code.
                unsafe {
                    std::arch::asm!("ldmxcsr [{p}]", concat!($name, " {a}, {b}", $tail), "stmxcsr [{p} + 4]",
                        "ldmxcsr [{p} + 8]", a = inout(xmm_reg) a, b = in(xmm_reg) b,
                        p = in(reg) std::ptr::from_mut(under), $($imm = const $imm,)? options(nostack));
                }
                a
            }
            fn is_tiny(out: Self::Out) -> bool {
                $crate::host_simd::tiny::$tiny(out)
            }
            fn is_inexact_unbounded(a: Self::Out, b: Self::In, mxcsr: u32) -> Option<bool> {
                $crate::host_simd::is_inexact_unbounded($name, a, b, mxcsr)
            }
        }
    };
}

/// `impl Float`, general register to XMM.
macro_rules! float_from_general_impl {
    ($I:ident, $W:ty, $name:literal, $b:literal) => {
        impl $crate::host_simd::Float for $I {
            type In = $W;
            type Out = $crate::host_simd::V;
            #[inline(always)]
            unsafe fn eval(mut a: Self::Out, b: Self::In, _: u8, mxcsr: *mut u32) -> Self::Out {
                // SAFETY: registers, and the caller's `mxcsr`; control bits stay.
                unsafe {
                    std::arch::asm!(concat!($name, " {a}, ", $b), "stmxcsr [{p}]", a = inout(xmm_reg) a,
                        b = in(reg) b, p = in(reg) mxcsr, options(nostack));
                }
                a
            }
            fn eval_under(mut a: Self::Out, b: Self::In, _: u8, under: &mut $crate::host_simd::Under) -> Self::Out {
                // SAFETY: registers, and `under`, which is ours; MXCSR ends as `back`: the control bits of Rust code.
                unsafe {
                    std::arch::asm!("ldmxcsr [{p}]", concat!($name, " {a}, ", $b), "stmxcsr [{p} + 4]",
                        "ldmxcsr [{p} + 8]", a = inout(xmm_reg) a, b = in(reg) b,
                        p = in(reg) std::ptr::from_mut(under), options(nostack));
                }
                a
            }
        }
    };
}

/// `impl Float`, XMM to general register.
macro_rules! float_to_general_impl {
    ($I:ident, $W:ty, $name:literal, $o:literal) => {
        impl $crate::host_simd::Float for $I {
            type In = $crate::host_simd::V;
            type Out = $W;
            #[inline(always)]
            unsafe fn eval(_: $crate::host_simd::V, b: Self::In, _: u8, mxcsr: *mut u32) -> Self::Out {
                let out;
                // SAFETY: registers, and the caller's `mxcsr`; control bits stay.
                unsafe {
                    std::arch::asm!(concat!($name, " ", $o, ", {b}"), "stmxcsr [{p}]", o = out(reg) out,
                        b = in(xmm_reg) b, p = in(reg) mxcsr, options(nostack));
                }
                out
            }
            fn eval_under(
                _: $crate::host_simd::V,
                b: Self::In,
                _: u8,
                under: &mut $crate::host_simd::Under,
            ) -> Self::Out {
                let out;
                // SAFETY: registers, and `under`, which is ours; MXCSR ends as `back`: the control bits of Rust code.
                unsafe {
                    std::arch::asm!("ldmxcsr [{p}]", concat!($name, " ", $o, ", {b}"), "stmxcsr [{p} + 4]",
                        "ldmxcsr [{p} + 8]", o = out(reg) out, b = in(xmm_reg) b,
                        p = in(reg) std::ptr::from_mut(under), options(nostack));
                }
                out
            }
        }
    };
}

/// ZF, PF and CF of a comparison in their RFLAGS places.
#[derive(Clone, Copy)]
pub(crate) struct Compared(pub(crate) u64);

/// `impl Float`, XMM and XMM to ZF, PF, CF.
macro_rules! float_compare_impl {
    ($I:ident, $name:literal) => {
        impl $crate::host_simd::Float for $I {
            type In = $crate::host_simd::V;
            type Out = $crate::host_simd::Compared;
            #[inline(always)]
            unsafe fn eval(a: $crate::host_simd::V, b: Self::In, _: u8, mxcsr: *mut u32) -> Self::Out {
                let (z, p, c): (u8, u8, u8);
                // SAFETY: registers, and the caller's `mxcsr`; control bits stay.
                unsafe {
                    std::arch::asm!(concat!($name, " {a}, {b}"), "setz {z}", "setp {f}", "setb {c}",
                        "stmxcsr [{p}]", a = in(xmm_reg) a, b = in(xmm_reg) b, z = out(reg_byte) z,
                        f = out(reg_byte) p, c = out(reg_byte) c, p = in(reg) mxcsr, options(nostack));
                }
                $crate::host_simd::Compared(u64::from(z) << 6 | u64::from(p) << 2 | u64::from(c))
            }
            fn eval_under(
                a: $crate::host_simd::V,
                b: Self::In,
                _: u8,
                under: &mut $crate::host_simd::Under,
            ) -> Self::Out {
                let (z, p, c): (u8, u8, u8);
                // SAFETY: registers, and `under`, which is ours; MXCSR ends as `back`: the control bits of Rust code.
                unsafe {
                    std::arch::asm!("ldmxcsr [{p}]", concat!($name, " {a}, {b}"), "setz {z}", "setp {f}", "setb {c}",
                        "stmxcsr [{p} + 4]", "ldmxcsr [{p} + 8]", a = in(xmm_reg) a, b = in(xmm_reg) b,
                        z = out(reg_byte) z, f = out(reg_byte) p, c = out(reg_byte) c,
                        p = in(reg) std::ptr::from_mut(under), options(nostack));
                }
                $crate::host_simd::Compared(u64::from(z) << 6 | u64::from(p) << 2 | u64::from(c))
            }
        }
    };
}
pub(crate) use {float_compare_impl, float_from_general_impl, float_to_general_impl, float_xmm_impl};
