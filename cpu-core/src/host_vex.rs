//! The host's VEX instructions on vectors in memory.
//!
//! Rust code runs without AVX, so a vector of 256 bits has no register in it: an instruction is one asm block from memory
//! to memory, with the operands in (X|Y)MM0 to 2. Its result has zeros above, up to bit 511. It leaves the upper halves of the host's registers zero, as code for
//! SSE wants them. Who names a row asks the host first whether it has the instruction.
#![expect(unsafe_code, reason = "operands are reached by address")]

use crate::host_simd::Under;
use crate::state::VectorRegister;

/// One host instruction that looks at nothing but its operands: `d ← a op b`, zeros above it.
pub(crate) trait Vex: 'static {
    /// Executes the form of 256 bits (`WIDE`) or of 128.
    ///
    /// # Safety
    /// All three point to vector registers of ours; they may be the same. The host has the instruction.
    unsafe fn run<const WIDE: bool>(d: *mut VectorRegister, a: *const VectorRegister, b: *const VectorRegister);
}

/// One host instruction that computes with floats: `d ← a op b`, or of all three, zeros above it.
pub(crate) trait VexFloat: 'static {
    /// Computes under the host's MXCSR and stores that to `mxcsr`.
    ///
    /// # Safety
    /// As [`Vex::run`]; `mxcsr` is writable.
    unsafe fn run<const WIDE: bool>(
        d: *mut VectorRegister,
        a: *const VectorRegister,
        b: *const VectorRegister,
        mxcsr: *mut u32,
    );

    /// Computes under `under.run`.
    ///
    /// # Safety
    /// As [`Vex::run`].
    unsafe fn run_under<const WIDE: bool>(
        d: *mut VectorRegister,
        a: *const VectorRegister,
        b: *const VectorRegister,
        under: &mut Under,
    );

    /// Part of the result is denormal.
    fn is_tiny(_out: &VectorRegister, _wide: bool) -> bool {
        false
    }

    /// Part of the result is inexact were its exponent unbounded, as in [`crate::host_simd::Float`].
    fn is_inexact_unbounded(_operands: [&VectorRegister; 3], _wide: bool, _mxcsr: u32) -> Option<bool> {
        None
    }
}

/// An asm block over pointers `d`, `a` and `b`, behind which no register of the host holds anything.
macro_rules! vex_asm {
    ([$($text:expr),*], $d:ident, $a:ident, $b:ident $(, $p:ident)?) => {
        // SAFETY: the caller's pointers; MXCSR's control bits end as Rust code wants them.
        unsafe {
            std::arch::asm!($($text),*, d = in(reg) $d, a = in(reg) $a, b = in(reg) $b, $($p = in(reg) $p,)?
                out("xmm0") _, out("xmm1") _, out("xmm2") _, options(nostack))
        }
    };
}

/// `impl Vex`: the text of the 128-bit and of the 256-bit form, with `a` in register 0, `b` in 1, the result in 0.
macro_rules! vex_impl {
    ($I:ident, $x:expr, $y:expr) => {
        impl $crate::host_vex::Vex for $I {
            #[inline(always)]
            unsafe fn run<const WIDE: bool>(
                d: *mut $crate::state::VectorRegister,
                a: *const $crate::state::VectorRegister,
                b: *const $crate::state::VectorRegister,
            ) {
                if WIDE {
                    $crate::host_vex::vex_asm!(
                        [
                            "vmovdqu ymm0, [{a}]",
                            "vmovdqu ymm1, [{b}]",
                            $y,
                            "vmovdqu [{d}], ymm0",
                            "vpxor xmm0, xmm0, xmm0",
                            "vmovdqu [{d} + 32], ymm0",
                            "vzeroupper"
                        ],
                        d,
                        a,
                        b
                    );
                } else {
                    $crate::host_vex::vex_asm!(
                        [
                            "vmovdqu xmm0, [{a}]",
                            "vmovdqu xmm1, [{b}]",
                            $x,
                            "vmovdqu [{d}], ymm0",
                            "vpxor xmm0, xmm0, xmm0",
                            "vmovdqu [{d} + 32], ymm0"
                        ],
                        d,
                        a,
                        b
                    );
                }
            }
        }
    };
}

/// `impl VexFloat`: how the operands are loaded (128, 256 bits), the text of the two forms, the result in register 0, and
/// the rest of the trait.
macro_rules! vex_float_impl {
    ([$($generics:tt)*] $I:ty, ($($load_x:expr),*), ($($load_y:expr),*), $x:expr, $y:expr, { $($rest:tt)* }) => {
        impl $($generics)* $crate::host_vex::VexFloat for $I {
            #[inline(always)]
            unsafe fn run<const WIDE: bool>(
                d: *mut $crate::state::VectorRegister,
                a: *const $crate::state::VectorRegister,
                b: *const $crate::state::VectorRegister,
                mxcsr: *mut u32,
            ) {
                if WIDE {
                    $crate::host_vex::vex_asm!(
                        [$($load_y),*, $y, "vstmxcsr [{mxcsr}]", "vmovdqu [{d}], ymm0", "vpxor xmm0, xmm0, xmm0", "vmovdqu [{d} + 32], ymm0", "vzeroupper"],
                        d, a, b, mxcsr
                    );
                } else {
                    $crate::host_vex::vex_asm!(
                        [$($load_x),*, $x, "vstmxcsr [{mxcsr}]", "vmovdqu [{d}], ymm0", "vpxor xmm0, xmm0, xmm0", "vmovdqu [{d} + 32], ymm0"],
                        d, a, b, mxcsr
                    );
                }
            }
            unsafe fn run_under<const WIDE: bool>(
                d: *mut $crate::state::VectorRegister,
                a: *const $crate::state::VectorRegister,
                b: *const $crate::state::VectorRegister,
                under: &mut $crate::host_simd::Under,
            ) {
                let under = std::ptr::from_mut(under);
                if WIDE {
                    $crate::host_vex::vex_asm!(
                        [$($load_y),*, "vldmxcsr [{under}]", $y, "vstmxcsr [{under} + 4]", "vldmxcsr [{under} + 8]",
                         "vmovdqu [{d}], ymm0", "vpxor xmm0, xmm0, xmm0", "vmovdqu [{d} + 32], ymm0", "vzeroupper"],
                        d, a, b, under
                    );
                } else {
                    $crate::host_vex::vex_asm!(
                        [$($load_x),*, "vldmxcsr [{under}]", $x, "vstmxcsr [{under} + 4]", "vldmxcsr [{under} + 8]",
                         "vmovdqu [{d}], ymm0", "vpxor xmm0, xmm0, xmm0", "vmovdqu [{d} + 32], ymm0"],
                        d, a, b, under
                    );
                }
            }
            $($rest)*
        }
    };
}
pub(crate) use {vex_asm, vex_float_impl, vex_impl};

/// Loads of `a` and `b` into registers 0 and 1.
macro_rules! two_operands {
    ($macro:ident, [$($generics:tt)*] $I:ty, $x:expr, $y:expr, $rest:tt) => {
        $macro!([$($generics)*] $I, ("vmovdqu xmm0, [{a}]", "vmovdqu xmm1, [{b}]"),
            ("vmovdqu ymm0, [{a}]", "vmovdqu ymm1, [{b}]"), $x, $y, $rest);
    };
}
pub(crate) use two_operands;

/// Copies 32 bytes from a host address into a vector register, in one access; zeros above.
///
/// # Safety
/// `host` is 32 bytes of mapped guest RAM, `to` a vector register of ours. The host has AVX.
#[inline(always)]
pub(crate) unsafe fn load_32(host: u64, to: *mut VectorRegister) {
    // SAFETY: the caller's. The first instruction only reads, the others write what is ours.
    unsafe {
        std::arch::asm!("vmovdqu ymm0, [{0}]", "vmovdqu [{1}], ymm0", "vpxor xmm0, xmm0, xmm0",
            "vmovdqu [{1} + 32], ymm0", "vzeroupper", in(reg) host, in(reg) to,
            out("xmm0") _, options(nostack, preserves_flags));
    }
}

/// Copies 32 bytes of a vector register to a host address, in one access.
///
/// # Safety
/// `host` is 32 bytes of mapped, writable guest RAM outside the Rust heap. The host has AVX.
#[inline(always)]
pub(crate) unsafe fn store_32(host: u64, from: *const VectorRegister) {
    // SAFETY: the caller's.
    unsafe {
        std::arch::asm!("vmovdqu ymm0, [{1}]", "vmovdqu [{0}], ymm0", "vzeroupper", in(reg) host, in(reg) from,
            out("xmm0") _, options(nostack, preserves_flags));
    }
}

/// Signs of the bytes of a vector.
///
/// # Safety
/// `from` is a vector register of ours. The host has AVX2.
#[inline(always)]
pub(crate) unsafe fn signs_32(from: *const VectorRegister) -> u32 {
    let signs: u32;
    // SAFETY: the caller's; the instruction only reads.
    unsafe {
        std::arch::asm!("vmovdqu ymm0, [{1}]", "vpmovmskb {0:e}, ymm0", "vzeroupper", out(reg) signs, in(reg) from,
            out("xmm0") _, options(nostack, preserves_flags, readonly));
    }
    signs
}
