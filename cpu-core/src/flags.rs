//! Arithmetic flags, evaluated when somebody looks. A producer leaves its operands and a kind; RFLAGS bits come from
//! them on demand. SDM Vol. 1 "Status Flags".

use crate::word::Word;

/// Carry.
pub const CF: u64 = 1 << 0;
/// Parity of the low byte of the result.
pub const PF: u64 = 1 << 2;
/// Carry out of bit 3.
pub const AF: u64 = 1 << 4;
/// Zero.
pub const ZF: u64 = 1 << 6;
/// Sign.
pub const SF: u64 = 1 << 7;
/// Signed overflow.
pub const OF: u64 = 1 << 11;
/// The six status flags.
pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;

/// How `a` and `b` make flags; the low two bits are log2 of the operand's bytes.
pub mod kind {
    /// `a` holds the six flags in their RFLAGS places.
    pub const EXPLICIT: u64 = 0;
    /// `a - b`.
    pub const SUB: u64 = 4;
    /// `a + b`.
    pub const ADD: u64 = 8;
    /// `a + 1`; CF is `b`.
    pub const INC: u64 = 12;
    /// `a - 1`; CF is `b`.
    pub const DEC: u64 = 16;
    /// SF, ZF and PF of result `a`; CF, AF and OF are in `b` in their RFLAGS places.
    pub const RESULT: u64 = 20;
}

/// The status flags in lazy form.
#[derive(Clone, Copy, Debug)]
pub struct Flags {
    /// One of [`kind`], plus log2 of the width in bytes.
    pub kind: u64,
    /// First operand, zero-extended.
    pub a: u64,
    /// Second operand, zero-extended.
    pub b: u64,
}

impl Flags {
    /// Flags given bit by bit, in RFLAGS places; other bits are dropped.
    pub fn explicit(bits: u64) -> Self {
        Self { kind: kind::EXPLICIT, a: bits & STATUS, b: 0 }
    }

    /// Flags of `a + b`.
    #[inline(always)]
    pub fn of_sum<W: Word>(a: W, b: W) -> Self {
        Self { kind: kind::ADD + W::LOG2, a: a.zext(), b: b.zext() }
    }

    /// Flags of `a - b`.
    #[inline(always)]
    pub fn of_difference<W: Word>(a: W, b: W) -> Self {
        Self { kind: kind::SUB + W::LOG2, a: a.zext(), b: b.zext() }
    }

    /// Flags of a logical operation: SF, ZF, PF of `result`, CF and OF clear (AF, undefined, is clear).
    #[inline(always)]
    pub fn of_logic<W: Word>(result: W) -> Self {
        // result - 0 borrows nothing and overflows nowhere.
        Self { kind: kind::SUB + W::LOG2, a: result.zext(), b: 0 }
    }

    /// SF, ZF, PF of `result`; CF, AF, OF as given in `bits`.
    #[inline(always)]
    pub fn of_result<W: Word>(result: W, bits: u64) -> Self {
        Self { kind: kind::RESULT + W::LOG2, a: result.zext(), b: bits & (CF | AF | OF) }
    }

    /// Flags of `a + 1`, CF kept.
    #[inline(always)]
    pub fn of_increment<W: Word>(a: W, cf: bool) -> Self {
        Self { kind: kind::INC + W::LOG2, a: a.zext(), b: u64::from(cf) }
    }

    /// Flags of `a - 1`, CF kept.
    #[inline(always)]
    pub fn of_decrement<W: Word>(a: W, cf: bool) -> Self {
        Self { kind: kind::DEC + W::LOG2, a: a.zext(), b: u64::from(cf) }
    }

    /// The six status flags in their RFLAGS places.
    #[inline(always)]
    pub fn bits(self) -> u64 {
        // In registers: a handler that passed on the address of a local could not end in a jump.
        bits_of_parts(self.kind, self.a, self.b)
    }

    /// As [`Self::bits`], where the compiler sees what made the flags and folds the rest.
    #[inline(always)]
    fn bits_folded(self) -> u64 {
        match self.kind & 3 {
            _ if self.kind < kind::SUB => self.a & STATUS,
            0 => self.bits_of::<u8>(),
            1 => self.bits_of::<u16>(),
            2 => self.bits_of::<u32>(),
            _ => self.bits_of::<u64>(),
        }
    }

    #[inline(always)]
    fn bits_of<W: Word>(self) -> u64 {
        let (a, b) = (W::of(self.a), W::of(self.b));
        let (result, carry, overflow, adjust) = match self.kind & !3 {
            kind::SUB => {
                let r = a.wrapping_sub(b);
                (r, a < b, ((a ^ b) & (a ^ r)).msb(), (a ^ b ^ r).zext() & 0x10)
            }
            kind::ADD => {
                let r = a.wrapping_add(b);
                (r, r < a, (!(a ^ b) & (a ^ r)).msb(), (a ^ b ^ r).zext() & 0x10)
            }
            kind::INC => {
                let r = a.wrapping_add(W::of(1));
                (r, self.b != 0, r == W::SIGN, u64::from(r.zext() & 0xf == 0) << 4)
            }
            kind::DEC => {
                let r = a.wrapping_sub(W::of(1));
                (r, self.b != 0, a == W::SIGN, u64::from(a.zext() & 0xf == 0) << 4)
            }
            _ => (a, self.b & CF != 0, self.b & OF != 0, self.b & AF),
        };
        of_result_bits(result) | u64::from(carry) | u64::from(overflow) << 11 | adjust
    }

    /// As [`Self::bits`], of flags whose kind is known when the caller is compiled.
    #[inline(always)]
    pub fn bits_known<const KIND: u64>(self) -> u64 {
        let known = Self { kind: KIND, ..self };
        match KIND & 3 {
            0 => known.bits_of::<u8>(),
            1 => known.bits_of::<u16>(),
            2 => known.bits_of::<u32>(),
            _ => known.bits_of::<u64>(),
        }
    }

    /// CF alone.
    #[inline(always)]
    pub fn cf(self) -> bool {
        // Ranges, the common ones first: a match would become an indirect jump that the host mispredicts.
        if self.kind >= kind::INC {
            self.b & CF != 0
        } else if self.kind < kind::SUB {
            self.a & CF != 0
        } else if self.kind < kind::ADD {
            // Operands are zero-extended, so the compare is right at any width.
            self.a < self.b
        } else {
            let max = u64::MAX >> (64 - (8 << (self.kind & 3)));
            self.a > max - self.b
        }
    }

    /// As [`Self::condition`], where the compiler sees what made the flags and folds the rest.
    #[inline(always)]
    pub fn condition_folded(self, cc: u8) -> bool {
        if self.kind >= kind::SUB && self.kind < kind::ADD {
            return self.condition(cc);
        }
        condition_of_bits(cc, self.bits_folded())
    }

    /// Condition `cc`, 0 to 15 as encoded in Jcc (SDM Vol. 1 App. B).
    #[inline(always)]
    pub fn condition(self, cc: u8) -> bool {
        match self.kind {
            k if k == kind::SUB => condition_of_difference::<u8>(cc, self),
            k if k == kind::SUB + 1 => condition_of_difference::<u16>(cc, self),
            k if k == kind::SUB + 2 => condition_of_difference::<u32>(cc, self),
            k if k == kind::SUB + 3 => condition_of_difference::<u64>(cc, self),
            _ => condition_of_bits(cc, self.bits()),
        }
    }
}

#[inline(never)]
fn bits_of_parts(kind: u64, a: u64, b: u64) -> u64 {
    Flags { kind, a, b }.bits_folded()
}

/// SF, ZF and PF of `result`.
#[inline(always)]
pub fn of_result_bits<W: Word>(result: W) -> u64 {
    u64::from(result == W::of(0)) << 6
        | u64::from(result.msb()) << 7
        | u64::from((result.zext() as u8).count_ones() & 1 == 0) << 2
}

/// Condition `cc` over RFLAGS bits.
#[inline(always)]
pub fn condition_of_bits(cc: u8, bits: u64) -> bool {
    let sf_ne_of = (bits >> 7 ^ bits >> 11) & 1 != 0;
    let holds = match cc >> 1 {
        0 => bits & OF != 0,
        1 => bits & CF != 0,
        2 => bits & ZF != 0,
        3 => bits & (CF | ZF) != 0,
        4 => bits & SF != 0,
        5 => bits & PF != 0,
        6 => sf_ne_of,
        _ => bits & ZF != 0 || sf_ne_of,
    };
    holds != (cc & 1 != 0)
}

/// Condition `cc` after `a - b`, compared as the compiler of the guest meant it.
#[inline(always)]
fn condition_of_difference<W: Word>(cc: u8, flags: Flags) -> bool {
    let (a, b) = (W::of(flags.a), W::of(flags.b));
    let r = a.wrapping_sub(b);
    let holds = match cc >> 1 {
        0 => ((a ^ b) & (a ^ r)).msb(),
        1 => a < b,
        2 => a == b,
        3 => a <= b,
        4 => r.msb(),
        5 => (r.zext() as u8).count_ones() & 1 == 0,
        6 => a.signed_lt(b),
        _ => !b.signed_lt(a),
    };
    holds != (cc & 1 != 0)
}
