//! The four operand widths of the integer instructions.

use std::ops::{BitAnd, BitOr, BitXor, Not};

/// u8, u16, u32 or u64: an operand of 1, 2, 4 or 8 bytes.
pub trait Word:
    Copy
    + Ord
    + std::fmt::Debug
    + BitAnd<Output = Self>
    + BitOr<Output = Self>
    + BitXor<Output = Self>
    + Not<Output = Self>
    + Send
    + 'static
{
    /// Size in bytes.
    const BYTES: u32;
    /// Size in bits.
    const BITS: u32 = Self::BYTES * 8;
    /// log2 of the size in bytes.
    const LOG2: u64;
    /// Only the sign bit set.
    const SIGN: Self;
    /// The low bits of `value`.
    fn of(value: u64) -> Self;
    /// Zero-extended to 64 bits.
    fn zext(self) -> u64;
    /// Sign-extended to 64 bits.
    fn sext(self) -> u64;
    /// Modulo 2^BITS.
    fn wrapping_add(self, other: Self) -> Self;
    /// Modulo 2^BITS.
    fn wrapping_sub(self, other: Self) -> Self;

    /// Sign bit.
    #[inline(always)]
    fn msb(self) -> bool {
        self.zext() >> (Self::BITS - 1) != 0
    }

    /// `self < other` as signed numbers.
    #[inline(always)]
    fn signed_lt(self, other: Self) -> bool {
        (self.sext() as i64) < other.sext() as i64
    }
}

macro_rules! word {
    ($($t:ty, $signed:ty, $log2:expr;)*) => {$(
        impl Word for $t {
            const BYTES: u32 = 1 << $log2;
            const LOG2: u64 = $log2;
            const SIGN: Self = 1 << (Self::BITS - 1);
            #[inline(always)]
            fn of(value: u64) -> Self { value as Self }
            #[inline(always)]
            fn zext(self) -> u64 { self as u64 }
            #[inline(always)]
            fn sext(self) -> u64 { self as $signed as i64 as u64 }
            #[inline(always)]
            fn wrapping_add(self, other: Self) -> Self { <$t>::wrapping_add(self, other) }
            #[inline(always)]
            fn wrapping_sub(self, other: Self) -> Self { <$t>::wrapping_sub(self, other) }
        }
    )*};
}
word! {
    u8, i8, 0;
    u16, i16, 1;
    u32, i32, 2;
    u64, i64, 3;
}
