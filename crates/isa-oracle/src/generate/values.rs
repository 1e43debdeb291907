//! Operand values at which instructions behave differently: limits of every width, all kinds of floating-point numbers.

use super::rng::Rng;

/// An integer: often a limit of some width or next to one, often small, sometimes anything.
pub(super) fn integer(rng: &mut Rng) -> u64 {
    let width = rng.pick(&[8, 16, 32, 64]);
    let limit = |bits: u32| if bits == 64 { u64::MAX } else { (1u64 << bits) - 1 };
    match rng.below(8) {
        0 => rng.below(4),
        1 => rng.below(130),
        2 => limit(width) - rng.below(3),
        3 => (1u64 << (width - 1)).wrapping_add(rng.below(5)).wrapping_sub(2),
        4 => 1u64 << rng.below(64),
        5 => 0u64.wrapping_sub(rng.below(130)),
        6 => rng.bits() & limit(width),
        _ => rng.bits(),
    }
}

fn f32_bits(rng: &mut Rng) -> u32 {
    let sign = (rng.below(2) as u32) << 31;
    let near = |rng: &mut Rng, base: u32| base.wrapping_add(rng.below(5) as u32).wrapping_sub(2);
    sign | 0x7fff_ffff
        & match rng.below(14) {
            0 => 0,
            1 => near(rng, 1f32.to_bits()),
            2 => rng.below(4) as u32,                           // least denormals
            3 => near(rng, 0x0080_0000),                        // least normal
            4 => near(rng, 0x7f7f_ffff),                        // greatest finite, infinity
            5 => 0x7f80_0000,                                   // infinity
            6 => 0x7fc0_0000 | (rng.bits() as u32 & 0xffff),    // quiet NaN
            7 => 0x7f80_0001 | (rng.bits() as u32 & 0x3f_ffff), // signalling NaN
            8 => {
                let power = rng.pick(&[31, 32, 63, 24, 15, 16, 7, 8]);
                near(rng, (127 + power) << 23)
            }
            9 => (rng.below(2000) as f32 / 4.0).to_bits(),
            10 => rng.bits() as u32 & 0x007f_ffff,                 // any denormal
            11 => 0x3f80_0000 ^ (rng.bits() as u32 & 0x0fff_ffff), // exponents about 0
            _ => rng.bits() as u32,
        }
}

fn f64_bits(rng: &mut Rng) -> u64 {
    let sign = rng.below(2) << 63;
    let near = |rng: &mut Rng, base: u64| base.wrapping_add(rng.below(5)).wrapping_sub(2);
    sign | (u64::MAX >> 1)
        & match rng.below(16) {
            0 => 0,
            1 => near(rng, 1f64.to_bits()),
            2 => rng.below(4),
            3 => near(rng, 0x0010_0000_0000_0000),
            4 => near(rng, 0x7fef_ffff_ffff_ffff),
            5 => 0x7ff0_0000_0000_0000,
            6 => 0x7ff8_0000_0000_0000 | (rng.bits() & 0xffff_ffff),
            7 => 0x7ff0_0000_0000_0001 | (rng.bits() & 0x0007_ffff_ffff_ffff),
            8 => {
                let power = rng.pick(&[31u64, 32, 63, 64, 53, 15, 16, 127, 24]);
                near(rng, (1023 + power) << 52)
            }
            9 => (rng.below(100_000) as f64 / 8.0).to_bits(),
            10 => rng.bits() & 0x000f_ffff_ffff_ffff,
            11 => 0x3ff0_0000_0000_0000 ^ (rng.bits() & 0x01ff_ffff_ffff_ffff),
            // Around the limits of single precision: overflow, underflow and rounding on conversion.
            12 => near(rng, f64::from(f32::MAX).to_bits() + (1 << 28)),
            13 => f64::from(f32::from_bits(f32_bits(rng))).to_bits() ^ rng.below(1 << 30),
            _ => rng.bits(),
        }
}

/// Halves that fill 16 bytes: of all kinds, or of one range, so that not every vector has NaNs.
fn halves(rng: &mut Rng) -> u128 {
    let range = rng.below(6);
    (0..8).fold(0, |vector, _| vector << 16 | u128::from(f16_bits(rng, range)))
}

fn f16_bits(rng: &mut Rng, range: u64) -> u16 {
    let sign = (rng.below(2) as u16) << 15;
    let bits = rng.bits() as u16;
    let near = |rng: &mut Rng, base: u16| base.wrapping_add(rng.below(5) as u16).wrapping_sub(2);
    sign | 0x7fff
        & match range {
            0 => 0x3c00 ^ (bits & 0x0fff), // exponents about 0
            1 => bits & 0x3bff,            // below 1, and denormals
            2 => 0x4000 | bits & 0x3bff,   // from 2 to the greatest
            3 => bits & 0x07ff,            // denormals and the least normals
            _ => match rng.below(14) {
                0 => 0,
                1 => near(rng, 0x3c00),     // 1
                2 => rng.below(4) as u16,   // least denormals
                3 => near(rng, 0x0400),     // least normal
                4 => near(rng, 0x7bff),     // greatest finite, infinity
                5 => 0x7c00,                // infinity
                6 => 0x7e00 | bits & 0x1ff, // quiet NaN
                7 => 0x7c01 | bits & 0x1fe, // signalling NaN
                8 => {
                    let power = rng.pick(&[7, 8, 10, 11, 15]);
                    near(rng, (15 + power) << 10)
                }
                9 => bits & 0x3ff, // any denormal
                _ => bits,
            },
        }
}

/// An 80-bit number, unsupported encodings (unnormals, pseudo-denormals) included.
pub(super) fn f80_bits(rng: &mut Rng) -> u128 {
    let sign = u128::from(rng.below(2)) << 79;
    let number = |exponent: u64, mantissa: u64| u128::from(exponent) << 64 | u128::from(mantissa);
    const ONE: u64 = 1 << 63;
    sign | match rng.below(18) {
        0 => 0,
        1 => number(0x3fff, ONE),
        2 => number(0, rng.below(4)),
        3 => number(1, ONE + rng.below(3)),
        4 => number(0x7ffe, u64::MAX - rng.below(3)),
        5 => number(0x7fff, ONE),
        6 => number(0x7fff, 0xc000_0000_0000_0000 | rng.bits() >> 32),
        7 => number(0x7fff, ONE | 1 | rng.bits() >> 2),
        8 => number(0, rng.bits() >> 1),
        9 => number(0, ONE | rng.bits()),
        10 => number(rng.bits() & 0x7fff, rng.bits() >> 1),
        11 => number(rng.bits() & 0x7fff, rng.bits() | ONE),
        12 => {
            let mantissa = ONE | rng.bits() << rng.below(64);
            number(0x3fff + rng.below(70), mantissa)
        }
        13 => number(0x3fff - rng.below(70), ONE | rng.bits()),
        // Just where double and single precision overflow and underflow.
        14 => {
            let exponent = rng.pick(&[0x3fff + 1023, 0x3fff - 1022, 0x3fff + 127, 0x3fff - 126]);
            number(exponent + rng.below(3) - 1, ONE | rng.bits() | u64::MAX << rng.below(63))
        }
        15 => {
            let value = rng.below(200_000);
            let shift = value.leading_zeros().min(63);
            number(0x3fff + 63 - u64::from(shift), (value << shift) | (u64::from(value == 0) * ONE))
        }
        16 => number(0x3fff + 63, ONE | rng.bits()),
        _ => number(0x3fff + rng.below(3) - 1, ONE | rng.bits()),
    }
}

/// Sixteen bytes: as floats of one width, as integers of one width, or as an 80-bit number; mostly as halves where the
/// instruction has such.
pub(super) fn vector(rng: &mut Rng, of_halves: bool) -> u128 {
    if of_halves && !rng.one_in(4) {
        return halves(rng);
    }
    let join = |parts: [u64; 2]| u128::from(parts[0]) | u128::from(parts[1]) << 64;
    match rng.below(8) {
        0..=2 => {
            let two = |rng: &mut Rng| u64::from(f32_bits(rng)) | u64::from(f32_bits(rng)) << 32;
            join([two(rng), two(rng)])
        }
        3 | 4 => join([f64_bits(rng), f64_bits(rng)]),
        5 => {
            let mut bytes = [0; 16];
            let width = rng.pick(&[1usize, 2, 4, 8]);
            for lane in bytes.chunks_mut(width) {
                lane.copy_from_slice(&integer(rng).to_le_bytes()[..width]);
            }
            u128::from_le_bytes(bytes)
        }
        6 => f80_bits(rng),
        _ => join([rng.bits(), rng.bits()]),
    }
}

/// `bytes` of memory that an operand of `bytes.len()` bytes covers. `of_halves`: as for [`vector`].
pub(super) fn memory(rng: &mut Rng, bytes: &mut [u8], of_halves: bool) {
    match bytes.len() {
        2 | 4 | 8 if of_halves => bytes.copy_from_slice(&vector(rng, true).to_le_bytes()[..bytes.len()]),
        1..=2 => bytes.copy_from_slice(&integer(rng).to_le_bytes()[..bytes.len()]),
        4 | 8 if rng.one_in(2) => bytes.copy_from_slice(&integer(rng).to_le_bytes()[..bytes.len()]),
        10 if rng.one_in(3) => decimal(rng, bytes),
        10 => bytes.copy_from_slice(&f80_bits(rng).to_le_bytes()[..10]),
        _ => {
            for chunk in bytes.chunks_mut(16) {
                chunk.copy_from_slice(&vector(rng, of_halves).to_le_bytes()[..chunk.len()]);
            }
        }
    }
}

/// A packed BCD number of 18 digits and a sign.
fn decimal(rng: &mut Rng, bytes: &mut [u8]) {
    for byte in &mut bytes[..9] {
        *byte = (rng.below(10) << 4 | rng.below(10)) as u8;
    }
    bytes[9] = (rng.below(2) << 7) as u8;
}
