//! FMA: products added with one rounding. SDM Vol. 1 "Fused-Multiply-ADD (FMA) Extensions"; Vol. 2, the page of each mnemonic.
#![expect(unsafe_code, reason = "rows expand to host instructions")]

use iced_x86::Mnemonic as M;

use super::{floats, halves, vex};
use crate::host_simd::tiny;
use crate::host_vex::vex_float_impl;
use crate::isa::Row;
use crate::state::VectorRegister;

/// Lane widths and counts by the last letters of a mnemonic.
const fn shape(letters: &str) -> (u32, bool) {
    let letters = letters.as_bytes();
    (if letters[1] == b's' { 32 } else { 64 }, letters[0] == b's')
}

/// Whether the addend is subtracted, in even and in odd lanes, after the product's sign has been taken out.
const fn subtracts(operation: &str) -> [bool; 2] {
    match operation.as_bytes() {
        b"fmadd" | b"fnmsub" => [false, false],
        b"fmsub" | b"fnmadd" => [true, true],
        b"fmaddsub" => [true, false],
        _ => [false, true],
    }
}

/// Operands of the 256-bit form; scalars have none.
macro_rules! registers {
    (ss) => {
        "xmm0, xmm1, xmm2"
    };
    (sd) => {
        "xmm0, xmm1, xmm2"
    };
    ($packed:ident) => {
        "ymm0, ymm1, ymm2"
    };
}

/// Row's selector: the mnemonic, its lanes, the order of its operands, what it does.
macro_rules! fma {
    ($name:literal, $tiny:ident, $order:literal, $operation:ident) => {{
        struct I;
        vex_float_impl!([] I, ("vmovdqu xmm0, [{d}]", "vmovdqu xmm1, [{a}]", "vmovdqu xmm2, [{b}]"),
            ("vmovdqu ymm0, [{d}]", "vmovdqu ymm1, [{a}]", "vmovdqu ymm2, [{b}]"),
            concat!($name, " xmm0, xmm1, xmm2"), concat!($name, " ", registers!($tiny)), {
                fn is_tiny(out: &VectorRegister, wide: bool) -> bool {
                    super::float::any_tiny(out, wide, tiny::$tiny)
                }
                fn is_inexact_unbounded(operands: [&VectorRegister; 3], wide: bool, mxcsr: u32) -> Option<bool> {
                    let [d, a, b] = operands;
                    // Factors, then the addend.
                    let operands = match $order {
                        132 => [d, b, a],
                        213 => [a, d, b],
                        _ => [a, b, d],
                    };
                    let (bits, scalar) = shape(stringify!($tiny));
                    let lanes = if scalar { 1 } else if wide { 256 / bits } else { 128 / bits };
                    let subtracts = subtracts(stringify!($operation));
                    Some((0..lanes).any(|i| {
                        let [x, y, z] = operands.map(|operand| lane(operand, bits, i, mxcsr));
                        is_inexact(x, y, z, subtracts[i as usize & 1], bits)
                    }))
                }
            });
        floats::<I>
    }};
}

pub(in crate::isa) const ROWS: &[Row] = &[
    vex(M::Vfmadd132ps, fma!("vfmadd132ps", ps, 132, fmadd)),
    vex(M::Vfmadd132pd, fma!("vfmadd132pd", pd, 132, fmadd)),
    vex(M::Vfmadd132ss, fma!("vfmadd132ss", ss, 132, fmadd)),
    vex(M::Vfmadd132sd, fma!("vfmadd132sd", sd, 132, fmadd)),
    vex(M::Vfmadd213ps, fma!("vfmadd213ps", ps, 213, fmadd)),
    vex(M::Vfmadd213pd, fma!("vfmadd213pd", pd, 213, fmadd)),
    vex(M::Vfmadd213ss, fma!("vfmadd213ss", ss, 213, fmadd)),
    vex(M::Vfmadd213sd, fma!("vfmadd213sd", sd, 213, fmadd)),
    vex(M::Vfmadd231ps, fma!("vfmadd231ps", ps, 231, fmadd)),
    vex(M::Vfmadd231pd, fma!("vfmadd231pd", pd, 231, fmadd)),
    vex(M::Vfmadd231ss, fma!("vfmadd231ss", ss, 231, fmadd)),
    vex(M::Vfmadd231sd, fma!("vfmadd231sd", sd, 231, fmadd)),
    vex(M::Vfmsub132ps, fma!("vfmsub132ps", ps, 132, fmsub)),
    vex(M::Vfmsub132pd, fma!("vfmsub132pd", pd, 132, fmsub)),
    vex(M::Vfmsub132ss, fma!("vfmsub132ss", ss, 132, fmsub)),
    vex(M::Vfmsub132sd, fma!("vfmsub132sd", sd, 132, fmsub)),
    vex(M::Vfmsub213ps, fma!("vfmsub213ps", ps, 213, fmsub)),
    vex(M::Vfmsub213pd, fma!("vfmsub213pd", pd, 213, fmsub)),
    vex(M::Vfmsub213ss, fma!("vfmsub213ss", ss, 213, fmsub)),
    vex(M::Vfmsub213sd, fma!("vfmsub213sd", sd, 213, fmsub)),
    vex(M::Vfmsub231ps, fma!("vfmsub231ps", ps, 231, fmsub)),
    vex(M::Vfmsub231pd, fma!("vfmsub231pd", pd, 231, fmsub)),
    vex(M::Vfmsub231ss, fma!("vfmsub231ss", ss, 231, fmsub)),
    vex(M::Vfmsub231sd, fma!("vfmsub231sd", sd, 231, fmsub)),
    vex(M::Vfnmadd132ps, fma!("vfnmadd132ps", ps, 132, fnmadd)),
    vex(M::Vfnmadd132pd, fma!("vfnmadd132pd", pd, 132, fnmadd)),
    vex(M::Vfnmadd132ss, fma!("vfnmadd132ss", ss, 132, fnmadd)),
    vex(M::Vfnmadd132sd, fma!("vfnmadd132sd", sd, 132, fnmadd)),
    vex(M::Vfnmadd213ps, fma!("vfnmadd213ps", ps, 213, fnmadd)),
    vex(M::Vfnmadd213pd, fma!("vfnmadd213pd", pd, 213, fnmadd)),
    vex(M::Vfnmadd213ss, fma!("vfnmadd213ss", ss, 213, fnmadd)),
    vex(M::Vfnmadd213sd, fma!("vfnmadd213sd", sd, 213, fnmadd)),
    vex(M::Vfnmadd231ps, fma!("vfnmadd231ps", ps, 231, fnmadd)),
    vex(M::Vfnmadd231pd, fma!("vfnmadd231pd", pd, 231, fnmadd)),
    vex(M::Vfnmadd231ss, fma!("vfnmadd231ss", ss, 231, fnmadd)),
    vex(M::Vfnmadd231sd, fma!("vfnmadd231sd", sd, 231, fnmadd)),
    vex(M::Vfnmsub132ps, fma!("vfnmsub132ps", ps, 132, fnmsub)),
    vex(M::Vfnmsub132pd, fma!("vfnmsub132pd", pd, 132, fnmsub)),
    vex(M::Vfnmsub132ss, fma!("vfnmsub132ss", ss, 132, fnmsub)),
    vex(M::Vfnmsub132sd, fma!("vfnmsub132sd", sd, 132, fnmsub)),
    vex(M::Vfnmsub213ps, fma!("vfnmsub213ps", ps, 213, fnmsub)),
    vex(M::Vfnmsub213pd, fma!("vfnmsub213pd", pd, 213, fnmsub)),
    vex(M::Vfnmsub213ss, fma!("vfnmsub213ss", ss, 213, fnmsub)),
    vex(M::Vfnmsub213sd, fma!("vfnmsub213sd", sd, 213, fnmsub)),
    vex(M::Vfnmsub231ps, fma!("vfnmsub231ps", ps, 231, fnmsub)),
    vex(M::Vfnmsub231pd, fma!("vfnmsub231pd", pd, 231, fnmsub)),
    vex(M::Vfnmsub231ss, fma!("vfnmsub231ss", ss, 231, fnmsub)),
    vex(M::Vfnmsub231sd, fma!("vfnmsub231sd", sd, 231, fnmsub)),
    vex(M::Vfmaddsub132ps, fma!("vfmaddsub132ps", ps, 132, fmaddsub)),
    vex(M::Vfmaddsub132pd, fma!("vfmaddsub132pd", pd, 132, fmaddsub)),
    vex(M::Vfmaddsub213ps, fma!("vfmaddsub213ps", ps, 213, fmaddsub)),
    vex(M::Vfmaddsub213pd, fma!("vfmaddsub213pd", pd, 213, fmaddsub)),
    vex(M::Vfmaddsub231ps, fma!("vfmaddsub231ps", ps, 231, fmaddsub)),
    vex(M::Vfmaddsub231pd, fma!("vfmaddsub231pd", pd, 231, fmaddsub)),
    vex(M::Vfmsubadd132ps, fma!("vfmsubadd132ps", ps, 132, fmsubadd)),
    vex(M::Vfmsubadd132pd, fma!("vfmsubadd132pd", pd, 132, fmsubadd)),
    vex(M::Vfmsubadd213ps, fma!("vfmsubadd213ps", ps, 213, fmsubadd)),
    vex(M::Vfmsubadd213pd, fma!("vfmsubadd213pd", pd, 213, fmsubadd)),
    vex(M::Vfmsubadd231ps, fma!("vfmsubadd231ps", ps, 231, fmsubadd)),
    vex(M::Vfmsubadd231pd, fma!("vfmsubadd231pd", pd, 231, fmsubadd)),
];

/// A float as sign, significand and the exponent of the significand's lowest bit; `None` for infinities and NaNs.
pub(in crate::isa::simd) type Parts = Option<(bool, u64, i32)>;

/// Lane `i` of `bits`.
fn lane(from: &VectorRegister, bits: u32, i: u32, mxcsr: u32) -> Parts {
    let at = i * bits;
    parts((halves(from)[at as usize / 128] >> (at % 128)) as u64, bits, mxcsr)
}

/// A float of `bits`; denormals are zeros under DAZ, but for halves.
pub(in crate::isa::simd) fn parts(value: u64, bits: u32, mxcsr: u32) -> Parts {
    const DAZ: u32 = 1 << 6;
    let (fraction_bits, exponent_bits) = match bits {
        16 => (10, 5),
        32 => (23, 8),
        _ => (52, 11),
    };
    let exponent = (value >> fraction_bits) as i32 & ((1 << exponent_bits) - 1);
    let fraction = value & ((1 << fraction_bits) - 1);
    let bias = (1 << (exponent_bits - 1)) - 1 + fraction_bits;
    let sign = value >> (bits - 1) & 1 != 0;
    match exponent {
        0 if mxcsr & DAZ != 0 && bits != 16 => Some((sign, 0, 0)),
        0 => Some((sign, fraction, 1 - bias)),
        _ if exponent == (1 << exponent_bits) - 1 => None,
        _ => Some((sign, fraction | 1 << fraction_bits, exponent - bias)),
    }
}

/// Exponent of the least half.
pub(in crate::isa::simd) const LEAST_HALF: i32 = -24;

/// Whether `x × y ± z` has more significant bits than a float of `bits`, or lower ones than any half where that has 16.
pub(in crate::isa::simd) fn is_inexact(x: Parts, y: Parts, z: Parts, subtract: bool, bits: u32) -> bool {
    let (Some(x), Some(y), Some(z)) = (x, y, z) else { return false };
    let (precision, least) = match bits {
        16 => (11, LEAST_HALF),
        32 => (24, i32::MIN),
        _ => (53, i32::MIN),
    };
    let odd = |value: u128, exponent: i32| match value {
        0 => (0, 0),
        _ => (value >> value.trailing_zeros(), exponent + value.trailing_zeros() as i32),
    };
    let (product, at) = odd(u128::from(x.1) * u128::from(y.1), x.2 + y.2);
    let (addend, addend_at) = odd(z.1.into(), z.2);
    let width = |value: u128| 128 - value.leading_zeros();
    if product == 0 || addend == 0 {
        return width(product) > precision || product != 0 && at < least;
    }
    // The lower of the two is odd, so the sum reaches from its lowest bit up to about the higher one's highest.
    let distance = at - addend_at;
    if distance.unsigned_abs() > 125 {
        return true;
    }
    let (low, high) = if distance < 0 { (product, addend) } else { (addend, product) };
    let negative = (x.0 ^ y.0 ^ z.0) != subtract;
    let high = shifted(high, distance.unsigned_abs());
    let sum = if negative { difference(high, [low, 0]) } else { total(high, [low, 0]) };
    let trailing = if sum[0] != 0 { sum[0].trailing_zeros() } else { 128 + sum[1].trailing_zeros() };
    let length = if sum[1] != 0 { 128 + width(sum[1]) } else { width(sum[0]) };
    length > trailing + precision || length != 0 && at.min(addend_at) + (trailing as i32) < least
}

/// `value` × 2^`by`, lower half first; `by` is below 128.
fn shifted(value: u128, by: u32) -> [u128; 2] {
    [value << by, if by == 0 { 0 } else { value >> (128 - by) }]
}

fn total(a: [u128; 2], b: [u128; 2]) -> [u128; 2] {
    let (low, carry) = a[0].overflowing_add(b[0]);
    [low, a[1] + b[1] + u128::from(carry)]
}

/// The distance of the two.
fn difference(a: [u128; 2], b: [u128; 2]) -> [u128; 2] {
    let (a, b) = if (a[1], a[0]) < (b[1], b[0]) { (b, a) } else { (a, b) };
    let (low, borrow) = a[0].overflowing_sub(b[0]);
    [low, a[1] - b[1] - u128::from(borrow)]
}
