//! Galois field instructions: bytes as polynomials over GF(2), modulo x⁸ + x⁴ + x³ + x + 1, and 8×8 bit matrices. SDM Vol. 2
//! "GF2P8MULB", "GF2P8AFFINEQB", "GF2P8AFFINEINVQB".
//!
//! Computed here and not by the host's instructions, for few hosts have them: all sixteen bytes at once, bit by bit.

use iced_x86::Mnemonic as M;

use super::float::{Mem, Operand, Reg};
use super::shuffle::ByImm;
use super::{M128, keeps};
use crate::cpu::{Cpu, Done, Then};
use crate::decode::digest::{Digest, Lowered};
use crate::host_simd::{V, to_u128};
use crate::isa::{Row, plain_handler, row};
use crate::op::{Exact, Op};

pub(in crate::isa) const ROWS: &[Row] = &[
    row(M::Gf2p8mulb, by_imm::<Multiply>),
    row(M::Gf2p8affineqb, by_imm::<Affine>),
    row(M::Gf2p8affineinvqb, by_imm::<AffineInverse>),
];

/// The same byte in all sixteen places.
const fn all(byte: u8) -> u128 {
    u128::MAX / 0xff * byte as u128
}

/// Bit `i` of each byte, in bit 0.
const fn bit(of: u128, i: u32) -> u128 {
    of >> i & all(1)
}

/// Products of bytes.
fn multiply(mut a: u128, b: u128) -> u128 {
    let mut product = 0;
    for i in 0..8 {
        product ^= a & bit(b, i) * 0xff;
        // Times x; what leaves at the top comes back as x⁴ + x³ + x + 1.
        a = (a & all(0x7f)) << 1 ^ bit(a, 7) * 0x1b;
    }
    product
}

/// Inverses of bytes, x²⁵⁴, which is 0 for 0.
fn inverse(x: u128) -> u128 {
    let mut square = multiply(x, x);
    let mut power = square;
    for _ in 0..6 {
        square = multiply(square, square);
        power = multiply(power, square);
    }
    power
}

/// Bit i of a byte becomes the parity of its product with byte 7−i of the quadword of `matrix` beside it.
fn transform(x: u128, matrix: u128) -> u128 {
    let mut result = 0;
    for i in 0..8 {
        let rows = matrix >> (8 * (7 - i)) & (0xff << 64 | 0xff);
        let mut parity = x & rows * (u64::MAX as u128 / 0xff);
        for shift in [4, 2, 1] {
            parity ^= parity >> shift;
        }
        result |= bit(parity, 0) << i;
    }
    result
}

pub(super) struct Multiply;
impl ByImm for Multiply {
    fn eval(a: u128, b: u128, _: u8) -> u128 {
        multiply(a, b)
    }
}

pub(super) struct Affine;
impl ByImm for Affine {
    fn eval(x: u128, matrix: u128, imm: u8) -> u128 {
        transform(x, matrix) ^ all(imm)
    }
}

pub(super) struct AffineInverse;
impl ByImm for AffineInverse {
    fn eval(x: u128, matrix: u128, imm: u8) -> u128 {
        transform(inverse(x), matrix) ^ all(imm)
    }
}

fn by_imm<I: ByImm>(d: &Digest<'_>) -> Option<Lowered> {
    fn run<I: ByImm, O: Operand<V>>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_sse()?;
        let b = O::exact(cpu, op)?;
        let out = I::eval(cpu.xmm(op.dst), to_u128(b), op.imm as u8);
        cpu.set_xmm(op.dst, out);
        Ok(Then::Next)
    }
    let mem = plain_handler(run::<I, Mem<M128, Exact>>);
    keeps(d, if d.is_mem(1) { mem } else { plain_handler(run::<I, Reg>) })
}

#[cfg(test)]
mod tests {
    use std::arch::x86_64::*;

    use super::*;

    /// The host's carry-less product of two bytes.
    fn carryless(a: u8, b: u8) -> u16 {
        /// # Safety
        /// The host has PCLMULQDQ.
        #[target_feature(enable = "pclmulqdq")]
        fn product(a: u8, b: u8) -> u16 {
            let vector = |byte: u8| _mm_cvtsi32_si128(byte.into());
            _mm_cvtsi128_si32(_mm_clmulepi64_si128::<0>(vector(a), vector(b))) as u16
        }
        // SAFETY: the callers have asked the host.
        #[expect(unsafe_code, reason = "the host's instruction is what ours is compared with")]
        unsafe {
            product(a, b)
        }
    }

    /// The host's substitution box of AES: FIPS 197 "SubBytes". Sixteen equal bytes make ShiftRows do nothing.
    fn substituted(byte: u8) -> u8 {
        /// # Safety
        /// The host has AES.
        #[target_feature(enable = "aes")]
        fn last_round(byte: u8) -> u8 {
            let state = _mm_aesenclast_si128(_mm_set1_epi8(byte.cast_signed()), _mm_setzero_si128());
            _mm_cvtsi128_si32(state) as u8
        }
        // SAFETY: the callers have asked the host.
        #[expect(unsafe_code, reason = "as above")]
        unsafe {
            last_round(byte)
        }
    }

    /// What the polynomial, 11BH, leaves of a product of 15 bits.
    fn reduced(mut product: u16) -> u8 {
        for i in (8..15).rev() {
            if product >> i & 1 != 0 {
                product ^= 0x11b << (i - 8);
            }
        }
        product as u8
    }

    fn every_byte() -> impl Iterator<Item = (u8, u128)> {
        (0..=u8::MAX).map(|byte| (byte, all(byte)))
    }

    #[test]
    fn products_are_the_carryless_ones_reduced() {
        if !is_x86_feature_detected!("pclmulqdq") {
            return;
        }
        for (a, sixteen) in every_byte() {
            for b in 0..=u8::MAX {
                // Neighbours differ, so what leaks from one byte into the next shows.
                let others = u128::from_le_bytes(std::array::from_fn(|i| b.wrapping_add(i as u8)));
                let expected =
                    u128::from_le_bytes(std::array::from_fn(|i| reduced(carryless(a, b.wrapping_add(i as u8)))));
                assert_eq!(Multiply::eval(sixteen, others, 0), expected, "{a:x} times {b:x} and on");
            }
        }
    }

    /// The parity of the product of two bytes is bit 7 of the carry-less product of one and the other reversed.
    #[test]
    fn rows_of_the_matrix_are_in_the_manuals_order() {
        if !is_x86_feature_detected!("pclmulqdq") {
            return;
        }
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut matrices = vec![0x0102_0408_1020_4080, 0x8040_2010_0804_0201, u64::MAX, 0];
        matrices.extend((0..60).map(|_| {
            seed = seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ seed >> 29;
            seed
        }));
        for (x, sixteen) in every_byte() {
            for pair in matrices.chunks(2) {
                let quad = |matrix: u64| {
                    let parity = |i: usize| carryless(matrix.to_le_bytes()[7 - i], x.reverse_bits()) >> 7 & 1;
                    let byte = (0..8).fold(0, |byte, i| byte | (parity(i) as u8) << i) ^ 0x5a;
                    u64::from_ne_bytes([byte; 8])
                };
                let both = |of: &dyn Fn(u64) -> u64| u128::from(of(pair[0])) | u128::from(of(pair[1])) << 64;
                assert_eq!(Affine::eval(sixteen, both(&|matrix| matrix), 0x5a), both(&quad), "{x:x}, {pair:x?}");
            }
        }
        assert_eq!(Affine::eval(0x1234, u128::from(matrices[0]), 0), 0x1234, "the unit matrix");
    }

    /// SubBytes is the inverse, its affine matrix and 63H.
    #[test]
    fn the_inverse_gives_the_substitution_box_of_aes() {
        const MATRIX: u64 = 0xf1e3_c78f_1f3e_7cf8;
        if !is_x86_feature_detected!("aes") {
            return;
        }
        for (x, sixteen) in every_byte() {
            let result = AffineInverse::eval(sixteen, u128::from(MATRIX) | u128::from(MATRIX) << 64, 0x63);
            assert_eq!(result, all(substituted(x)), "{x:x}");
        }
    }
}
