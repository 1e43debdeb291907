//! IN OUT INS OUTS. Permission is the core's (IOPL, the TSS's bitmap), the ports are the caller's: each element is an exit. SDM
//! Vol. 2, the page of each mnemonic; Vol. 1 "Protected-Mode I/O".

use iced_x86::{Code as C, Mnemonic as M};
use x86_defs::tss::tss32;
use x86_defs::{Cr4, Rflags};

use super::{Row, codes, row};
use crate::cpu::{Cpu, Done, Stop, Then};
use crate::decode::digest::{Digest, Lowered};
use crate::fault::Fault;
use crate::host::HostWord;
use crate::op::{Handler, Op};
use crate::state::{Breakpoints, Gpr, Seg};
use crate::vmx::{Exit, Io};

pub(super) const ROWS: &[Row] = &[
    codes(&[C::In_AL_imm8, C::In_AL_DX], |d| port(d, super::plain_handler(input::<u8>))),
    codes(&[C::In_AX_imm8, C::In_AX_DX], |d| port(d, super::plain_handler(input::<u16>))),
    codes(&[C::In_EAX_imm8, C::In_EAX_DX], |d| port(d, super::plain_handler(input::<u32>))),
    codes(&[C::Out_imm8_AL, C::Out_DX_AL], |d| port(d, super::plain_handler(output::<u8>))),
    codes(&[C::Out_imm8_AX, C::Out_DX_AX], |d| port(d, super::plain_handler(output::<u16>))),
    codes(&[C::Out_imm8_EAX, C::Out_DX_EAX], |d| port(d, super::plain_handler(output::<u32>))),
    row(M::Insb, |d| string(d, super::plain_handler(ins::<u8>))),
    row(M::Insw, |d| string(d, super::plain_handler(ins::<u16>))),
    row(M::Insd, |d| string(d, super::plain_handler(ins::<u32>))),
    row(M::Outsb, |d| string(d, super::plain_handler(outs::<u8>))),
    row(M::Outsw, |d| string(d, super::plain_handler(outs::<u16>))),
    row(M::Outsd, |d| string(d, super::plain_handler(outs::<u32>))),
];

/// `aux`: the port is the immediate.
fn port(d: &Digest<'_>, h: Handler) -> Option<Lowered> {
    let mut lowered = d.lower(h).keeps_flags().ends();
    lowered.op.aux = u8::from(d.is_imm(0) || d.is_imm(1));
    Some(lowered)
}

/// `aux`: repeated.
fn string(d: &Digest<'_>, h: Handler) -> Option<Lowered> {
    let mut lowered = d.lower(h).keeps_flags().ends();
    lowered.op.aux = u8::from(d.ins.has_rep_prefix() || d.ins.has_repne_prefix());
    Some(lowered)
}

impl Cpu {
    /// #GP(0) where `size` ports from `port` are not the program's: CPL above IOPL, or virtual-8086 mode, and a bit of the I/O
    /// permission bitmap set or missing.
    fn check_port(&mut self, port: u16, size: u32) -> Result<(), Stop> {
        if self.is_real() || !self.is_v86() && self.cpl <= self.iopl() {
            return Ok(());
        }
        let tss = self.tr;
        let limit = u64::from(tss.limit);
        let denied = Fault::gp(0);
        if tss.unusable || !tss.present || tss.type_ & 9 != 9 || limit < tss32::IO_MAP_BASE + 1 {
            return Err(self.fault(denied));
        }
        let map = u64::from(self.load_system::<u16>(self.system_address(tss.base, tss32::IO_MAP_BASE))?);
        // Two bytes are read whatever the port: the map ends in a byte of ones.
        let at = map + u64::from(port / 8);
        if at + 1 > limit {
            return Err(self.fault(denied));
        }
        let bits = self.load_system::<u16>(self.system_address(tss.base, at))?;
        let wanted = (1u16 << size) - 1;
        if bits >> (port & 7) & wanted != 0 { Err(self.fault(denied)) } else { Ok(()) }
    }

    fn port_of(&self, op: &Op) -> u16 {
        if op.aux != 0 { (op.imm & 0xff) as u16 } else { self.reg(Gpr::Rdx) as u16 }
    }

    /// Causes of the breakpoints on ports that the access hits (CR4.DE, R/W of 2).
    fn note_port(&mut self, port: u16, size: u32) {
        if !self.cr4.contains(Cr4::DE) || !self.has_breakpoints() {
            return;
        }
        let (first, last) = (u64::from(port), u64::from(port) + u64::from(size) - 1);
        let Breakpoints { db, dr7 } = self.breakpoints();
        for i in 0..4 {
            let enabled = dr7 >> (2 * i) & 3 != 0 && dr7 >> (16 + 4 * i) & 3 == 2;
            let len = [1, 2, 8, 4][(dr7 >> (18 + 4 * i) & 3) as usize];
            let start = db[i as usize] & !(len - 1);
            if enabled && first < start + len && start <= last {
                self.debug_pending |= 1 << i;
            }
        }
    }

    /// Leaves for the caller to access the port; the instruction is finished by `complete_io_in` or `complete_io_out`.
    fn ask(&mut self, op: &Op, io: Io) -> Stop {
        self.io_len = op.len;
        self.io_pending = Some(io);
        self.exit(Exit::Io(io))
    }
}

/// SDM Vol. 2 "IN".
fn input<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let port = cpu.port_of(op);
    cpu.check_port(port, W::BYTES)?;
    cpu.note_port(port, W::BYTES);
    let data = cpu.reg(Gpr::Rax) as u32;
    Err(cpu.ask(op, Io { port, size: W::BYTES as u8, input: true, string: false, count: 1, last: true, data }))
}

/// SDM Vol. 2 "OUT".
fn output<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let port = cpu.port_of(op);
    cpu.check_port(port, W::BYTES)?;
    cpu.note_port(port, W::BYTES);
    let data = cpu.get::<W>(Gpr::Rax as u8 * 8).zext() as u32;
    Err(cpu.ask(op, Io { port, size: W::BYTES as u8, input: false, string: false, count: 1, last: true, data }))
}

/// Elements that are left: 1 without REP.
fn remaining(cpu: &Cpu, op: &Op) -> u64 {
    if op.aux == 0 { 1 } else { cpu.reg(Gpr::Rcx) & op.address_mask() }
}

/// One element is done: the index moves, the count drops.
fn advance<W: HostWord>(cpu: &mut Cpu, op: &Op, index: Gpr) -> Then {
    let mask = op.address_mask();
    let step = u64::from(W::BYTES);
    let back = cpu.rflags & Rflags::DF.bits() != 0;
    let moved = if back { cpu.reg(index).wrapping_sub(step) } else { cpu.reg(index).wrapping_add(step) };
    cpu.put_by_mask(index, moved, mask);
    if op.aux == 0 {
        return Then::Leave;
    }
    let left = (cpu.reg(Gpr::Rcx) & mask).wrapping_sub(1);
    cpu.put_by_mask(Gpr::Rcx, left, mask);
    if left & mask == 0 { Then::Leave } else { Then::Again }
}

impl Cpu {
    /// Writes a register at the address size.
    fn put_by_mask(&mut self, register: Gpr, value: u64, mask: u64) {
        match mask {
            0xffff => self.put_gpr(register, value as u16),
            0xffff_ffff => self.put_gpr(register, value as u32),
            _ => self.put_gpr(register, value),
        }
    }
}

/// SDM Vol. 2 "INS/INSB/INSW/INSD".
fn ins<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    if remaining(cpu, op) == 0 {
        return Ok(Then::Leave);
    }
    let port = cpu.reg(Gpr::Rdx) as u16;
    cpu.check_port(port, W::BYTES)?;
    let offset = cpu.reg(Gpr::Rdi) & op.address_mask();
    let la = cpu.linear(Seg::Es, offset, W::BYTES, true)?;
    if cpu.io_elements.is_empty() {
        // A store that cannot be made must not have taken the data from the device.
        cpu.probe_write(la, W::BYTES, Seg::Es)?;
        let (count, last) =
            elements::<W>(cpu, op, la, offset, cpu.write_bound[Seg::Es as usize], cpu.variant.ins_bytes);
        return Err(cpu.ask(op, Io { port, size: W::BYTES as u8, input: true, string: true, count, last, data: 0 }));
    }
    while let Some(&value) = cpu.io_elements.last() {
        let offset = cpu.reg(Gpr::Rdi) & op.address_mask();
        let la = cpu.linear(Seg::Es, offset, W::BYTES, true)?;
        cpu.store(la, W::of(value.into()), Seg::Es)?;
        cpu.io_elements.pop();
        cpu.note_port(port, W::BYTES);
        if advance::<W>(cpu, op, Gpr::Rdi) == Then::Leave {
            return Ok(Then::Leave);
        }
    }
    Ok(Then::Again)
}

/// Elements that one exit is about, and whether they are all that is left: those that REP moves upwards from `offset` on,
/// inside the page of `la` and below `bound`, in `most` bytes. One where somebody looks at every element.
fn elements<W: HostWord>(cpu: &Cpu, op: &Op, la: u64, offset: u64, bound: u64, most: u16) -> (u32, bool) {
    let left = remaining(cpu, op);
    let watched = cpu.rflags & (Rflags::DF | Rflags::TF).bits() != 0 || cpu.has_breakpoints();
    if watched {
        return (1, left == 1);
    }
    let page = 0x1000 - (la & 0xfff);
    let segment = bound.saturating_sub(offset);
    let wrap = op.address_mask() - offset;
    let bytes = page.min(segment).min(wrap).min(most.into());
    let count = left.min(bytes / u64::from(W::BYTES)).max(1);
    (count as u32, count == left)
}

/// SDM Vol. 2 "OUTS/OUTSB/OUTSW/OUTSD".
fn outs<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    if remaining(cpu, op) == 0 {
        return Ok(Then::Leave);
    }
    let port = cpu.reg(Gpr::Rdx) as u16;
    if !cpu.io_elements.is_empty() {
        let mut then = Then::Again;
        while then == Then::Again && cpu.io_elements.pop().is_some() {
            cpu.note_port(port, W::BYTES);
            then = advance::<W>(cpu, op, Gpr::Rsi);
        }
        cpu.forget_answers();
        return Ok(then);
    }
    cpu.check_port(port, W::BYTES)?;
    let offset = cpu.reg(Gpr::Rsi) & op.address_mask();
    let la = cpu.linear(op.segment(), offset, W::BYTES, false)?;
    let value = cpu.load::<W>(la, op.segment())?;
    // What the TLB names is RAM, to the end of the page; a device is asked for each element.
    let ram = cpu.tlb.read(la, W::BYTES.into()).is_some();
    let most = if ram { cpu.variant.outs_bytes } else { 0 };
    let (count, last) = elements::<W>(cpu, op, la, offset, cpu.read_bound[op.segment() as usize], most);
    cpu.outs_data.clear();
    if count > 1 {
        for element in 0..u64::from(count) {
            let value = cpu.load::<W>(la + element * u64::from(W::BYTES), op.segment())?;
            cpu.outs_data.extend_from_slice(&value.zext().to_le_bytes()[..W::BYTES as usize]);
        }
    }
    let data = value.zext() as u32;
    Err(cpu.ask(op, Io { port, size: W::BYTES as u8, input: false, string: true, count, last, data }))
}
