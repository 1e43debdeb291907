//! What tells unmasked overflow and underflow more than the host's flags do: denormal lanes of a result, and whether it
//! were inexact with an unbounded exponent. As in the SSE and VEX families, of the lanes that a mask leaves.
//!
//! Of halves Intel's CPUs tell something else, measured: whether the denormal is inexact that masked underflow makes. So
//! exponents of AVX512-FP16's results are unbounded above alone. Integers that overflow are always inexact.

use super::Float;
use crate::host_x87::{Arithmetic, is_inexact};
use crate::isa::simd::vex::convert::is_inexact_half;
use crate::isa::simd::vex::fma::{self, LEAST_HALF, Parts};
use crate::state::VectorRegister;

/// How [`crate::host_simd::Float::is_inexact_unbounded`] is found out for an instruction.
#[derive(Clone, Copy)]
pub(super) enum Inexact {
    /// The row cannot say.
    Unknown,
    /// Never: a result is exact but for its exponent.
    Exact,
    /// `a op b` on lanes of these bytes.
    Two(Arithmetic, u8),
    /// Doubles of the first source to singles.
    Narrow,
    /// The same of the second source's lowest lane.
    NarrowScalar,
    /// Singles of the first source to halves, as F16C has it.
    Half,
    /// Floats of these bytes to halves, in the first source or in the second.
    ToHalf { bytes: u8, source: u8 },
    /// Halves of the first source times powers of two: an inexact one is a denormal that has lost bits.
    Scaled,
    /// `x × y ± z`: which operands are which by the mnemonic's digits; what is subtracted in even and in odd lanes.
    Fused { order: u16, subtracts: [bool; 2], lane: u8 },
}

/// MXCSR: denormal operands are zeros.
const DAZ: u32 = 1 << 6;

/// Lane `i` of `bytes`.
fn lane(from: &VectorRegister, bytes: u32, i: u32) -> u64 {
    let (at, bytes) = ((i * bytes) as usize, bytes as usize);
    from.0[at..at + bytes].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// The same, 0 for a denormal number under DAZ.
fn operand(from: &VectorRegister, bytes: u32, i: u32, mxcsr: u32) -> u64 {
    let value = lane(from, bytes, i);
    let exponent = if bytes == 4 { 0xff << 23 } else { 0x7ff << 52 };
    if mxcsr & DAZ != 0 && value & exponent == 0 { value & 1 << (8 * bytes - 1) } else { value }
}

/// Whether one of the `live` lanes of a result is denormal.
pub(super) fn is_any_tiny(out: &VectorRegister, float: Float, live: u64) -> bool {
    let (bytes, fraction_bits) = match float {
        Float::Single => (4, 23),
        Float::Double => (8, 52),
        Float::Half => (2, 10),
        Float::Other | Float::Flushed | Float::Told => return false,
    };
    let magnitude = |i: u32| lane(out, bytes, i) & (u64::MAX >> (65 - 8 * bytes));
    (0..64 / bytes).filter(|i| live >> i & 1 != 0).any(|i| (1..1 << fraction_bits).contains(&magnitude(i)))
}

impl Inexact {
    /// Of the `live` lanes. `operands`: the destination and the two sources.
    pub(super) fn of(self, operands: &[VectorRegister; 3], live: u64, mxcsr: u32) -> Option<bool> {
        let [d, a, b] = operands;
        let rounding = (mxcsr >> 13) as u16 & 3;
        let any = |bytes: u32, inexact: &dyn Fn(u32) -> bool| {
            Some((0..64 / bytes).filter(|i| live >> i & 1 != 0).any(inexact))
        };
        match self {
            Self::Unknown => None,
            Self::Exact => Some(false),
            Self::Two(operation, 2) => any(2, &|i| is_inexact_of_halves(operation, lane(a, 2, i), lane(b, 2, i))),
            Self::Two(operation, bytes) => {
                let bytes = u32::from(bytes);
                any(bytes, &|i| {
                    is_inexact(operation, bytes, operand(a, bytes, i, mxcsr), operand(b, bytes, i, mxcsr), rounding)
                })
            }
            Self::Narrow => any(8, &|i| is_inexact(Arithmetic::Narrow, 4, operand(a, 8, i, mxcsr), 0, rounding)),
            Self::NarrowScalar => any(8, &|i| is_inexact(Arithmetic::Narrow, 4, operand(b, 8, i, mxcsr), 0, rounding)),
            Self::Half => any(4, &|i| is_inexact_half(lane(a, 4, i) as u32, mxcsr)),
            Self::ToHalf { bytes, source } => {
                let (bytes, source) = (u32::from(bytes), &operands[usize::from(source)]);
                let part = |i| fma::parts(lane(source, bytes, i), 8 * bytes, mxcsr);
                any(bytes, &|i| fma::is_inexact(part(i), ONE, ZERO, false, 16))
            }
            Self::Scaled => any(2, &|i| is_inexact_scaled(lane(a, 2, i), lane(b, 2, i))),
            Self::Fused { order, subtracts, lane: bytes } => {
                let (x, y, z) = match order {
                    132 => (d, b, a),
                    213 => (a, d, b),
                    _ => (a, b, d),
                };
                let bytes = u32::from(bytes);
                let part = |from: &VectorRegister, i: u32| fma::parts(lane(from, bytes, i), 8 * bytes, mxcsr);
                any(bytes, &|i| {
                    fma::is_inexact(part(x, i), part(y, i), part(z, i), subtracts[i as usize & 1], 8 * bytes)
                })
            }
        }
    }
}

const ONE: Parts = Some((false, 1, 0));
const ZERO: Parts = Some((false, 0, 0));

/// Whether `a op b`, of halves, is inexact, as [`fma::is_inexact`]: x87 has no such precision.
fn is_inexact_of_halves(operation: Arithmetic, a: u64, b: u64) -> bool {
    let [a, b] = [a, b].map(|half| fma::parts(half, 16, 0));
    match operation {
        Arithmetic::Add => fma::is_inexact(a, ONE, b, false, 16),
        Arithmetic::Sub => fma::is_inexact(a, ONE, b, true, 16),
        Arithmetic::Mul => fma::is_inexact(a, b, ZERO, false, 16),
        Arithmetic::Div => match (a, b) {
            (Some((_, a, a_at)), Some((_, b, b_at))) if a != 0 && b != 0 => {
                let (a_zeros, b_zeros) = (a.trailing_zeros(), b.trailing_zeros());
                let at = a_at + a_zeros as i32 - b_at - b_zeros as i32;
                // A quotient of odd numbers is a whole number or never ends.
                !(a >> a_zeros).is_multiple_of(b >> b_zeros) || at < LEAST_HALF
            }
            _ => false,
        },
        Arithmetic::Narrow => unreachable!("nothing is narrower than halves"),
    }
}

/// Whether the half `a`, times 2 to the power of `b`'s floor, has bits below the least denormal's.
fn is_inexact_scaled(a: u64, b: u64) -> bool {
    let [Some((_, a, at)), Some((negative, power, power_at))] = [a, b].map(|half| fma::parts(half, 16, 0)) else {
        return false;
    };
    let power = if negative { -(power as i64) } else { power as i64 };
    let floor = if power_at < 0 { power >> -power_at } else { power << power_at };
    a != 0 && i64::from(at) + i64::from(a.trailing_zeros()) + floor < LEAST_HALF.into()
}
