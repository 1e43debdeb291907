//! Mask registers: moves, logic, tests. VEX-encoded, and a part of AVX-512. SDM Vol. 2, the page of each mnemonic.

use iced_x86::Mnemonic as M;

use super::{host_has, ones};
use crate::cpu::{Cpu, Done, Then};
use crate::decode::digest::{Digest, FlagsOut, Lowered};
use crate::flags::{CF, Flags, ZF};
use crate::host::HostWord;
use crate::isa::simd::{keeps, lacking};
use crate::isa::{Row, plain_handler, row};
use crate::op::{Handler, Op};

pub(in crate::isa) const ROWS: &[Row] = &[
    row(M::Kaddb, |d| masks(d, plain_handler(|cpu, op| two::<8>(cpu, op, |a, b| a.wrapping_add(b))))),
    row(M::Kaddw, |d| masks(d, plain_handler(|cpu, op| two::<16>(cpu, op, |a, b| a.wrapping_add(b))))),
    row(M::Kaddd, |d| masks(d, plain_handler(|cpu, op| two::<32>(cpu, op, |a, b| a.wrapping_add(b))))),
    row(M::Kaddq, |d| masks(d, plain_handler(|cpu, op| two::<64>(cpu, op, |a, b| a.wrapping_add(b))))),
    row(M::Kandb, |d| masks(d, plain_handler(|cpu, op| two::<8>(cpu, op, |a, b| a & b)))),
    row(M::Kandw, |d| masks(d, plain_handler(|cpu, op| two::<16>(cpu, op, |a, b| a & b)))),
    row(M::Kandd, |d| masks(d, plain_handler(|cpu, op| two::<32>(cpu, op, |a, b| a & b)))),
    row(M::Kandq, |d| masks(d, plain_handler(|cpu, op| two::<64>(cpu, op, |a, b| a & b)))),
    row(M::Kandnb, |d| masks(d, plain_handler(|cpu, op| two::<8>(cpu, op, |a, b| !a & b)))),
    row(M::Kandnw, |d| masks(d, plain_handler(|cpu, op| two::<16>(cpu, op, |a, b| !a & b)))),
    row(M::Kandnd, |d| masks(d, plain_handler(|cpu, op| two::<32>(cpu, op, |a, b| !a & b)))),
    row(M::Kandnq, |d| masks(d, plain_handler(|cpu, op| two::<64>(cpu, op, |a, b| !a & b)))),
    row(M::Korb, |d| masks(d, plain_handler(|cpu, op| two::<8>(cpu, op, |a, b| a | b)))),
    row(M::Korw, |d| masks(d, plain_handler(|cpu, op| two::<16>(cpu, op, |a, b| a | b)))),
    row(M::Kord, |d| masks(d, plain_handler(|cpu, op| two::<32>(cpu, op, |a, b| a | b)))),
    row(M::Korq, |d| masks(d, plain_handler(|cpu, op| two::<64>(cpu, op, |a, b| a | b)))),
    row(M::Kxnorb, |d| masks(d, plain_handler(|cpu, op| two::<8>(cpu, op, |a, b| !(a ^ b))))),
    row(M::Kxnorw, |d| masks(d, plain_handler(|cpu, op| two::<16>(cpu, op, |a, b| !(a ^ b))))),
    row(M::Kxnord, |d| masks(d, plain_handler(|cpu, op| two::<32>(cpu, op, |a, b| !(a ^ b))))),
    row(M::Kxnorq, |d| masks(d, plain_handler(|cpu, op| two::<64>(cpu, op, |a, b| !(a ^ b))))),
    row(M::Kxorb, |d| masks(d, plain_handler(|cpu, op| two::<8>(cpu, op, |a, b| a ^ b)))),
    row(M::Kxorw, |d| masks(d, plain_handler(|cpu, op| two::<16>(cpu, op, |a, b| a ^ b)))),
    row(M::Kxord, |d| masks(d, plain_handler(|cpu, op| two::<32>(cpu, op, |a, b| a ^ b)))),
    row(M::Kxorq, |d| masks(d, plain_handler(|cpu, op| two::<64>(cpu, op, |a, b| a ^ b)))),
    row(M::Kunpckbw, |d| masks(d, plain_handler(|cpu, op| two::<16>(cpu, op, |a, b| a << 8 | b & ones(8))))),
    row(M::Kunpckwd, |d| masks(d, plain_handler(|cpu, op| two::<32>(cpu, op, |a, b| a << 16 | b & ones(16))))),
    row(M::Kunpckdq, |d| masks(d, plain_handler(|cpu, op| two::<64>(cpu, op, |a, b| a << 32 | b & ones(32))))),
    row(M::Knotb, |d| masks(d, plain_handler(|cpu, op| one::<8>(cpu, op, |a, _| !a)))),
    row(M::Knotw, |d| masks(d, plain_handler(|cpu, op| one::<16>(cpu, op, |a, _| !a)))),
    row(M::Knotd, |d| masks(d, plain_handler(|cpu, op| one::<32>(cpu, op, |a, _| !a)))),
    row(M::Knotq, |d| masks(d, plain_handler(|cpu, op| one::<64>(cpu, op, |a, _| !a)))),
    row(M::Kshiftlb, |d| masks(d, plain_handler(|cpu, op| one::<8>(cpu, op, |a, by| a.checked_shl(by).unwrap_or(0))))),
    row(M::Kshiftlw, |d| masks(d, plain_handler(|cpu, op| one::<16>(cpu, op, |a, by| a.checked_shl(by).unwrap_or(0))))),
    row(M::Kshiftld, |d| masks(d, plain_handler(|cpu, op| one::<32>(cpu, op, |a, by| a.checked_shl(by).unwrap_or(0))))),
    row(M::Kshiftlq, |d| masks(d, plain_handler(|cpu, op| one::<64>(cpu, op, |a, by| a.checked_shl(by).unwrap_or(0))))),
    row(M::Kshiftrb, |d| masks(d, plain_handler(|cpu, op| one::<8>(cpu, op, |a, by| a.checked_shr(by).unwrap_or(0))))),
    row(M::Kshiftrw, |d| masks(d, plain_handler(|cpu, op| one::<16>(cpu, op, |a, by| a.checked_shr(by).unwrap_or(0))))),
    row(M::Kshiftrd, |d| masks(d, plain_handler(|cpu, op| one::<32>(cpu, op, |a, by| a.checked_shr(by).unwrap_or(0))))),
    row(M::Kshiftrq, |d| masks(d, plain_handler(|cpu, op| one::<64>(cpu, op, |a, by| a.checked_shr(by).unwrap_or(0))))),
    row(M::Kortestb, |d| flags(d, plain_handler(|cpu, op| test::<8>(cpu, op, |a, b| (a | b, !(a | b)))))),
    row(M::Kortestw, |d| flags(d, plain_handler(|cpu, op| test::<16>(cpu, op, |a, b| (a | b, !(a | b)))))),
    row(M::Kortestd, |d| flags(d, plain_handler(|cpu, op| test::<32>(cpu, op, |a, b| (a | b, !(a | b)))))),
    row(M::Kortestq, |d| flags(d, plain_handler(|cpu, op| test::<64>(cpu, op, |a, b| (a | b, !(a | b)))))),
    row(M::Ktestb, |d| flags(d, plain_handler(|cpu, op| test::<8>(cpu, op, |a, b| (a & b, !a & b))))),
    row(M::Ktestw, |d| flags(d, plain_handler(|cpu, op| test::<16>(cpu, op, |a, b| (a & b, !a & b))))),
    row(M::Ktestd, |d| flags(d, plain_handler(|cpu, op| test::<32>(cpu, op, |a, b| (a & b, !a & b))))),
    row(M::Ktestq, |d| flags(d, plain_handler(|cpu, op| test::<64>(cpu, op, |a, b| (a & b, !a & b))))),
    row(M::Kmovb, kmov::<u8>),
    row(M::Kmovw, kmov::<u16>),
    row(M::Kmovd, kmov::<u32>),
    row(M::Kmovq, kmov::<u64>),
];

fn masks(d: &Digest<'_>, h: Handler) -> Option<Lowered> {
    if host_has(d) { keeps(d, h) } else { lacking(d) }
}

fn flags(d: &Digest<'_>, h: Handler) -> Option<Lowered> {
    Some(Lowered { flags: FlagsOut::Unknown, ..masks(d, h)? })
}

impl Cpu {
    /// kn.
    fn k(&self, n: u8) -> u64 {
        self.fpu.k[usize::from(n & 7)]
    }

    /// Writes kn: `BITS` of `value`, zeros above.
    fn set_k<const BITS: u32>(&mut self, n: u8, value: u64) {
        self.fpu.k[usize::from(n & 7)] = value & ones(BITS);
    }
}

fn two<const BITS: u32>(cpu: &mut Cpu, op: &Op, f: fn(u64, u64) -> u64) -> Done {
    cpu.require_avx512()?;
    cpu.set_k::<BITS>(op.dst, f(cpu.k(op.src), cpu.k(op.aux)));
    Ok(Then::Next)
}

/// Of `BITS` of a register and the immediate.
fn one<const BITS: u32>(cpu: &mut Cpu, op: &Op, f: fn(u64, u32) -> u64) -> Done {
    cpu.require_avx512()?;
    cpu.set_k::<BITS>(op.dst, f(cpu.k(op.src) & ones(BITS), op.imm as u32 & 0xff));
    Ok(Then::Next)
}

/// ZF: the first result is zero; CF: the second.
fn test<const BITS: u32>(cpu: &mut Cpu, op: &Op, f: fn(u64, u64) -> (u64, u64)) -> Done {
    cpu.require_avx512()?;
    let (zero, carry) = f(cpu.k(op.dst), cpu.k(op.src));
    let is_zero = |value: u64| u64::from(value & ones(BITS) == 0);
    cpu.set_flags(Flags::explicit(is_zero(zero) * ZF | is_zero(carry) * CF));
    Ok(Then::Next)
}

fn kmov<W: HostWord>(d: &Digest<'_>) -> Option<Lowered> {
    fn copy<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_avx512()?;
        cpu.fpu.k[usize::from(op.dst & 7)] = W::of(cpu.k(op.src)).zext();
        Ok(Then::Next)
    }
    fn load<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_avx512()?;
        cpu.fpu.k[usize::from(op.dst & 7)] = cpu.read_operand::<W>(op)?.zext();
        Ok(Then::Next)
    }
    fn store<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_avx512()?;
        cpu.write_operand(op, W::of(cpu.k(op.src)))?;
        Ok(Then::Next)
    }
    fn from_general<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_avx512()?;
        cpu.fpu.k[usize::from(op.dst & 7)] = W::of(cpu.get::<u64>(op.src)).zext();
        Ok(Then::Next)
    }
    fn to_general<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_avx512()?;
        cpu.put(op.dst, W::of(cpu.k(op.src)).zext());
        Ok(Then::Next)
    }
    masks(
        d,
        if d.is_mem(0) {
            plain_handler(store::<W>)
        } else if d.is_mem(1) {
            plain_handler(load::<W>)
        } else if d.reg(0).is_gpr() {
            plain_handler(to_general::<W>)
        } else if d.reg(1).is_gpr() {
            plain_handler(from_general::<W>)
        } else {
            plain_handler(copy::<W>)
        },
    )
}
