//! The host's EVEX instructions on vectors in memory.
//!
//! Each is a few bytes in the program, its operands in fixed registers: the result in ZMM0, k2 or RAX, sources in ZMM1,
//! ZMM2, k2 or RAX, the mask in k1. One routine loads these from a [`Frame`], calls, and stores them. An instruction with
//! an immediate is 256 of them, eight bytes apart. Masking merges; who wants zeros starts from a destination of zeros.
#![expect(unsafe_code, reason = "calls of assembled instructions, with their operands by address")]

use crate::host_simd::Under;
use crate::state::VectorRegister;

/// An assembled instruction and the RET behind it. Not for Rust to call: it takes its operands as above.
pub(crate) type Stub = unsafe extern "C" fn();

/// Bytes from one immediate's instruction to the next: prefix 4, opcode, ModRM, immediate, RET.
pub(crate) const IMM_STRIDE: usize = 8;

/// Operands of an instruction on their way to the host's registers, and its result.
#[repr(C, align(64))]
pub(crate) struct Frame {
    /// ZMM0, the destination, and ZMM1 and 2.
    pub(crate) vector: [VectorRegister; 3],
    /// k1.
    pub(crate) mask: u64,
    /// k2.
    pub(crate) k: u64,
    /// RAX.
    pub(crate) general: u64,
    /// What a float instruction computes under.
    pub(crate) under: Under,
}

/// What AVX-512 is executed with. What lacks one of these (Xeon Phi) counts as without.
pub fn host_has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512cd")
        && is_x86_feature_detected!("avx512vl")
}

/// The address of `stub`, or of its instruction with the immediate `imm`.
pub(crate) fn address(stub: Stub, imm: Option<u8>) -> usize {
    stub as usize + imm.map_or(0, |imm| usize::from(imm) * IMM_STRIDE)
}

macro_rules! call {
    ($at:ident, $frame:ident, [$($before:literal),*], [$($after:literal),*]) => {
        // SAFETY: the caller's `at`; it leaves all but the named registers and flags alone. The frame is ours.
        unsafe {
            std::arch::asm!(
                "vmovdqu64 zmm0, [{frame}]", "vmovdqu64 zmm1, [{frame} + 64]", "vmovdqu64 zmm2, [{frame} + 128]",
                "kmovq k1, [{frame} + 192]", "kmovq k2, [{frame} + 200]", "mov rax, [{frame} + 208]",
                $($before,)* "call {at}", $($after,)*
                "vmovdqu64 [{frame}], zmm0", "kmovq [{frame} + 200], k2", "mov [{frame} + 208], rax", "vzeroupper",
                at = in(reg) $at, frame = in(reg) std::ptr::from_mut($frame), out("rax") _, out("xmm0") _,
                out("xmm1") _, out("xmm2") _, out("k1") _, out("k2") _,
            )
        }
    };
}

/// Runs an instruction that looks at nothing but its operands.
///
/// # Safety
/// `at` is an [`address`] of a stub that this host can execute: [`host_has_avx512`] and the instruction's own feature.
pub(crate) unsafe fn run(at: usize, frame: &mut Frame) {
    call!(at, frame, [], []);
}

/// As [`run`], under `frame.under.run`, which leaves its exceptions in `frame.under.found`.
///
/// # Safety
/// As for [`run`].
pub(crate) unsafe fn run_float(at: usize, frame: &mut Frame) {
    call!(at, frame, ["vldmxcsr [{frame} + 216]"], ["vstmxcsr [{frame} + 220]", "vldmxcsr [{frame} + 224]"]);
}

const _: () = {
    use std::mem::offset_of;
    assert!(offset_of!(Frame, mask) == 192 && offset_of!(Frame, k) == 200 && offset_of!(Frame, general) == 208);
    assert!(offset_of!(Frame, under) == 216);
};

/// A stub: the text of one instruction, or of what takes its place.
macro_rules! stub {
    ($text:expr) => {{
        /// # Safety
        /// For an [`address`](crate::host_evex::address) alone.
        #[unsafe(naked)]
        unsafe extern "C" fn stub() {
            std::arch::naked_asm!($text, "ret")
        }
        stub
    }};
}

/// The stubs of an instruction with all immediates: its text up to the last comma. `{evex}` holds the assembler to that
/// encoding, so that all are of one size.
macro_rules! stub_imm {
    ($text:expr) => {{
        /// # Safety
        /// For an [`address`](crate::host_evex::address) alone.
        #[unsafe(naked)]
        unsafe extern "C" fn stub() {
            std::arch::naked_asm!(
                ".irp h, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, a, b, c, d, e, f",
                ".irp l, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, a, b, c, d, e, f",
                concat!("{{evex}} ", $text, ", 0x\\h\\l"),
                "ret",
                ".endr",
                ".endr"
            )
        }
        stub
    }};
}
pub(crate) use {stub, stub_imm};
