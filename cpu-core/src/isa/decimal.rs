//! AAA AAS AAM AAD DAA DAS: decimal digits in AL and AH. Invalid in 64-bit mode. SDM Vol. 2, the page of each mnemonic.

use iced_x86::Mnemonic as M;

use super::{Row, row};
use crate::cpu::{Cpu, Done, Then};
use crate::decode::digest::function;
use crate::fault::Fault;
use crate::flags::{AF, CF, Flags, of_result_bits};
use crate::op::Op;
use crate::state::Gpr;

pub(super) const ROWS: &[Row] = &[
    row(M::Aaa, function(aaa)),
    row(M::Aas, function(aas)),
    row(M::Aam, function(aam)),
    row(M::Aad, function(aad)),
    row(M::Daa, function(daa)),
    row(M::Das, function(das)),
];

const AX: u8 = Gpr::Rax as u8 * 8;

/// SF, ZF and PF of `result`, and `bits`. OF is undefined, here clear.
fn flags_of(result: u8, bits: u64) -> Flags {
    Flags::explicit(of_result_bits(result) | bits)
}

/// Unpacked digits: AL's lower half stays, AX moves by `digit` if it is not a decimal one.
fn adjust_unpacked(cpu: &mut Cpu, digit: u16) -> Done {
    let ax = cpu.get::<u16>(AX);
    let adjusted = ax & 0xf > 9 || cpu.flags().bits() & AF != 0;
    let moved = if adjusted { ax.wrapping_add(digit) } else { ax };
    cpu.put(AX, moved & 0xff0f);
    // SF, ZF and PF are undefined: of AL as it is left.
    cpu.set_flags(flags_of(moved as u8 & 0xf, if adjusted { AF | CF } else { 0 }));
    Ok(Then::Next)
}

/// SDM Vol. 2 "AAA": AL + 6, AH + 1.
fn aaa(cpu: &mut Cpu, _: &Op) -> Done {
    adjust_unpacked(cpu, 0x106)
}

/// SDM Vol. 2 "AAS": AX − 6, then AH − 1.
fn aas(cpu: &mut Cpu, _: &Op) -> Done {
    adjust_unpacked(cpu, 0x106u16.wrapping_neg())
}

/// SDM Vol. 2 "AAM": #DE for a base of 0.
fn aam(cpu: &mut Cpu, op: &Op) -> Done {
    let base = op.imm as u8;
    let al = cpu.get::<u8>(AX);
    let Some(tens) = al.checked_div(base) else { return Err(cpu.fault(Fault::DE)) };
    let ones = al % base;
    cpu.put(AX, u16::from_le_bytes([ones, tens]));
    cpu.set_flags(flags_of(ones, 0));
    Ok(Then::Next)
}

/// SDM Vol. 2 "AAD".
fn aad(cpu: &mut Cpu, op: &Op) -> Done {
    let [al, ah] = cpu.get::<u16>(AX).to_le_bytes();
    let value = al.wrapping_add(ah.wrapping_mul(op.imm as u8));
    cpu.put(AX, u16::from(value));
    cpu.set_flags(flags_of(value, 0));
    Ok(Then::Next)
}

/// Packed digits in AL: what is added to (taken from) it, and AF and CF.
fn packed_adjustment(cpu: &Cpu) -> (u8, u64) {
    let al = cpu.get::<u8>(AX);
    let old = cpu.flags().bits();
    let low = al & 0xf > 9 || old & AF != 0;
    let high = al > 0x99 || old & CF != 0;
    (u8::from(low) * 6 + u8::from(high) * 0x60, u64::from(low) * AF | u64::from(high) * CF)
}

/// SDM Vol. 2 "DAA".
fn daa(cpu: &mut Cpu, _: &Op) -> Done {
    let (by, flags) = packed_adjustment(cpu);
    let al = cpu.get::<u8>(AX).wrapping_add(by);
    cpu.put(AX, al);
    cpu.set_flags(flags_of(al, flags));
    Ok(Then::Next)
}

/// SDM Vol. 2 "DAS": CF also where taking 6 borrows.
fn das(cpu: &mut Cpu, _: &Op) -> Done {
    let (by, flags) = packed_adjustment(cpu);
    let al = cpu.get::<u8>(AX);
    let borrow = flags & AF != 0 && al < 6;
    cpu.put(AX, al.wrapping_sub(by));
    cpu.set_flags(flags_of(al.wrapping_sub(by), flags | u64::from(borrow) * CF));
    Ok(Then::Next)
}
