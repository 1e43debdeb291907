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
    // SAFETY: as above.
    unsafe { std::mem::transmute::<u128, V>(value) }
}

/// Loads 16 bytes in one instruction.
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

/// Control bits that the host's MXCSR has while no guest instruction runs: round to nearest, everything masked.
pub(crate) const DEFAULT: u32 = 0x1f80;

/// Clears the host's sticky exception flags. They are a subset of the guest's at all times: see `simd::float`.
#[inline(always)]
pub(crate) fn forget_flags() {
    // SAFETY: the operand is readable; MXCSR gets the value that Rust code runs under, flags clear.
    unsafe {
        asm!("ldmxcsr [{0}]", in(reg) &DEFAULT, options(nostack, readonly));
    }
}
