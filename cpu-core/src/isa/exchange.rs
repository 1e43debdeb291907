//! XCHG XADD CMPXCHG CMPXCHG8B CMPXCHG16B, atomic where the SDM says so; XLAT, SALC, MOVNTI MOVDIRI MOVDIR64B, RDRAND RDSEED. SDM
//! Vol. 2, the page of each mnemonic.
#![expect(unsafe_code, reason = "hot semantics run on the dispatch's raw CPU pointer")]

use std::marker::PhantomData;

use iced_x86::Mnemonic as M;

use super::{Row, by_width, plain_handler, row};
use crate::cpu::{Cpu, Done, Then};
use crate::decode::digest::{Digest, Lowered, function};
use crate::fault::Fault;
use crate::flags::{CF, Flags, ZF};
use crate::host::HostWord;
use crate::op::{Machine, Op, Semantics, To, handler};
use crate::state::{Gpr, Seg};

pub(super) const ROWS: &[Row] = &[
    row(M::Xchg, xchg),
    row(M::Xadd, xadd),
    row(M::Cmpxchg, cmpxchg),
    row(M::Cmpxchg8b, cmpxchg8b),
    row(M::Cmpxchg16b, function(cmpxchg16b)),
    row(M::Xlatb, xlat),
    row(M::Salc, function(salc)),
    row(M::Movnti, store_around_cache),
    row(M::Movdiri, store_around_cache),
    row(M::Movdir64b, |d| Some(quiet(d, plain_handler(store_64)))),
    row(M::Rdrand, random),
    row(M::Rdseed, random),
];

const RAX: u8 = Gpr::Rax as u8 * 8;
const RDX: u8 = Gpr::Rdx as u8 * 8;

/// An op that leaves the flags alone.
fn quiet(d: &Digest<'_>, h: crate::op::Handler) -> Lowered {
    Lowered { reads_flags: false, ..d.lower(h).keeps_flags() }
}

struct XchgReg<W>(PhantomData<W>);
impl<W: HostWord> Semantics for XchgReg<W> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let (one, other) = (m.op().dst, m.op().src);
        let (a, b) = (m.get::<W>(one), m.get::<W>(other));
        m.put(one, b);
        m.put(other, a);
        To::Next
    }
}

fn xchg(d: &Digest<'_>) -> Option<Lowered> {
    let bytes = d.bytes(0);
    if d.is_mem(0) {
        return Some(quiet(d, by_width!(bytes, W => plain_handler(xchg_memory::<W>))));
    }
    Some(quiet(d, by_width!(bytes, W => handler::<XchgReg<W>>)).cannot_stop())
}

/// Locked with or without the prefix. SDM Vol. 2 "XCHG".
fn xchg_memory<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let new = cpu.get::<W>(op.src);
    let seg = op.segment();
    let la = cpu.linear(seg, cpu.ea(op), W::BYTES, true)?;
    let old = cpu.modify::<W>(la, seg, true, |_| Some(new))?;
    cpu.put(op.src, old);
    Ok(Then::Next)
}

/// `aux`: LOCK.
fn maybe_locked(d: &Digest<'_>, h: crate::op::Handler) -> Lowered {
    let mut lowered = d.lower(h);
    lowered.op.aux = u8::from(d.ins.has_lock_prefix());
    lowered
}

fn xadd(d: &Digest<'_>) -> Option<Lowered> {
    let memory = d.is_mem(0);
    Some(by_width!(d.bytes(0), W => {
        if memory { maybe_locked(d, plain_handler(xadd_memory::<W>)) } else { d.lower(plain_handler(xadd_register::<W>)) }
    }))
}

/// SDM Vol. 2 "XADD": the sum wins where both operands are one register.
fn xadd_register<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let (dst, src) = (cpu.get::<W>(op.dst), cpu.get::<W>(op.src));
    cpu.put(op.src, dst);
    cpu.put(op.dst, dst.wrapping_add(src));
    cpu.set_flags(Flags::of_sum(dst, src));
    Ok(Then::Next)
}

fn xadd_memory<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let src = cpu.get::<W>(op.src);
    let seg = op.segment();
    let la = cpu.linear(seg, cpu.ea(op), W::BYTES, true)?;
    let dst = cpu.modify::<W>(la, seg, op.aux != 0, |dst| Some(dst.wrapping_add(src)))?;
    cpu.put(op.src, dst);
    cpu.set_flags(Flags::of_sum(dst, src));
    Ok(Then::Next)
}

fn cmpxchg(d: &Digest<'_>) -> Option<Lowered> {
    let memory = d.is_mem(0);
    Some(by_width!(d.bytes(0), W => if memory {
        maybe_locked(d, plain_handler(cmpxchg_memory::<W>))
    } else {
        d.lower(plain_handler(cmpxchg_register::<W>))
    }))
}

/// SDM Vol. 2 "CMPXCHG".
fn cmpxchg_register<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let (expected, found) = (cpu.get::<W>(RAX), cpu.get::<W>(op.dst));
    if found == expected {
        let new = cpu.get::<W>(op.src);
        cpu.put(op.dst, new);
    } else {
        cpu.put(RAX, found);
    }
    cpu.set_flags(Flags::of_difference(expected, found));
    Ok(Then::Next)
}

/// The destination is written either way: with what it held where the comparison fails.
fn cmpxchg_memory<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let (expected, new) = (cpu.get::<W>(RAX), cpu.get::<W>(op.src));
    let seg = op.segment();
    let la = cpu.linear(seg, cpu.ea(op), W::BYTES, true)?;
    let found = cpu.modify::<W>(la, seg, op.aux != 0, |found| (found == expected).then_some(new))?;
    if found != expected {
        cpu.put(RAX, found);
    }
    cpu.set_flags(Flags::of_difference(expected, found));
    Ok(Then::Next)
}

impl Cpu {
    /// ZF alone.
    fn set_zero(&mut self, zf: bool) {
        let bits = self.flags().bits() & !ZF;
        self.set_flags(Flags::explicit(bits | u64::from(zf) * ZF));
    }
}

fn cmpxchg8b(d: &Digest<'_>) -> Option<Lowered> {
    Some(maybe_locked(d, plain_handler(exchange_8)))
}

/// EDX:EAX is compared, ECX:EBX stored. SDM Vol. 2 "CMPXCHG8B/CMPXCHG16B".
fn exchange_8(cpu: &mut Cpu, op: &Op) -> Done {
    let pair = |cpu: &Cpu, high: Gpr, low: Gpr| cpu.reg(high) << 32 | cpu.reg(low) & 0xffff_ffff;
    let (expected, new) = (pair(cpu, Gpr::Rdx, Gpr::Rax), pair(cpu, Gpr::Rcx, Gpr::Rbx));
    let seg = op.segment();
    let la = cpu.linear(seg, cpu.ea(op), 8, true)?;
    let found = cpu.modify::<u64>(la, seg, op.aux != 0, |found| (found == expected).then_some(new))?;
    if found != expected {
        cpu.put(RAX, found as u32);
        cpu.put(RDX, (found >> 32) as u32);
    }
    cpu.set_zero(found == expected);
    Ok(Then::Next)
}

/// #GP(0) where the operand is not 16-byte aligned. Atomic with or without LOCK, which no one can tell.
fn cmpxchg16b(cpu: &mut Cpu, op: &Op) -> Done {
    let pair = |cpu: &Cpu, high: Gpr, low: Gpr| u128::from(cpu.reg(high)) << 64 | u128::from(cpu.reg(low));
    let (expected, new) = (pair(cpu, Gpr::Rdx, Gpr::Rax), pair(cpu, Gpr::Rcx, Gpr::Rbx));
    let seg = op.segment();
    let la = cpu.linear(seg, cpu.ea(op), 16, true)?;
    if la & 15 != 0 {
        return Err(cpu.fault(Fault::gp(0)));
    }
    let found = cpu.compare_exchange_16(la, seg, expected, new)?;
    if found != expected {
        cpu.put(RAX, found as u64);
        cpu.put(RDX, (found >> 64) as u64);
    }
    cpu.set_zero(found == expected);
    Ok(Then::Next)
}

fn xlat(d: &Digest<'_>) -> Option<Lowered> {
    Some(quiet(d, plain_handler(translate)))
}

/// `AL ← seg:[BX + AL]`. SDM Vol. 2 "XLAT/XLATB".
fn translate(cpu: &mut Cpu, op: &Op) -> Done {
    let al = cpu.get::<u8>(RAX);
    let offset = cpu.reg(Gpr::Rbx).wrapping_add(al.into()) & op.address_mask();
    let value: u8 = cpu.read(op.segment(), offset)?;
    cpu.put(RAX, value);
    Ok(Then::Next)
}

/// `AL ← CF ? FFH : 0`. AMD64 Architecture Programmer's Manual Vol. 3 lists the opcode, D6, as SALC.
fn salc(cpu: &mut Cpu, _: &Op) -> Done {
    let value = if cpu.flags().cf() { 0xffu8 } else { 0 };
    cpu.put(RAX, value);
    Ok(Then::Next)
}

fn store_around_cache(d: &Digest<'_>) -> Option<Lowered> {
    Some(quiet(d, by_width!(d.bytes(1), W => plain_handler(store::<W>))))
}

/// A store; there is no cache to go around. SDM Vol. 2 "MOVNTI", "MOVDIRI".
fn store<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let value = cpu.get::<W>(op.src);
    cpu.write_operand(op, value)?;
    Ok(Then::Next)
}

/// 64 bytes from memory to `ES:[dst]`, which is aligned or #GP(0). SDM Vol. 2 "MOVDIR64B". The source is read first, as by the
/// Operation section and Intel's CPUs. Eight stores: no host without the instruction has a wider one that is atomic.
fn store_64(cpu: &mut Cpu, op: &Op) -> Done {
    let mut image = [0; 64];
    let from = cpu.ea(op);
    cpu.read_bytes(op.segment(), from, &mut image)?;
    let to = cpu.get::<u64>(op.dst) & op.address_mask();
    let la = cpu.linear(Seg::Es, to, 64, true)?;
    if la & 63 != 0 {
        return Err(cpu.fault(Fault::gp(0)));
    }
    cpu.write_bytes(Seg::Es, to, &image)?;
    Ok(Then::Next)
}

fn random(d: &Digest<'_>) -> Option<Lowered> {
    Some(by_width!(d.bytes(0), W => d.lower(plain_handler(random_bits::<W>))))
}

/// There are always bits: CF set, the others clear. SDM Vol. 2 "RDRAND", "RDSEED".
fn random_bits<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let bits = cpu.platform.random();
    cpu.put(op.dst, W::of(bits));
    cpu.set_flags(Flags::explicit(CF));
    Ok(Then::Next)
}
