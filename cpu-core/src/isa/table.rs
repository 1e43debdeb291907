//! LGDT LIDT SGDT SIDT LLDT LTR SLDT STR, and what asks about descriptors: VERR VERW LAR LSL ARPL. SDM Vol. 2, the page of
//! each mnemonic.

use iced_x86::{Code as C, Mnemonic as M};
use x86_defs::descriptor::system_type as system;
use x86_defs::{Cr4, Selector};

use super::{Row, codes, row};
use crate::cpu::{Cpu, Done, Stop, Then};
use crate::decode::digest::{Digest, Lowered, function, function_ends};
use crate::fault::Fault;
use crate::flags::{Flags, ZF};
use crate::host::HostWord;
use crate::op::{Handler, Op};
use crate::protect::is_available_tss;
use crate::state::{DescriptorTable, Segment};

pub(super) const ROWS: &[Row] = &[
    codes(&[C::Lgdt_m1632_16], function_ends(lgdt::<2>)),
    codes(&[C::Lgdt_m1632], function_ends(lgdt::<4>)),
    codes(&[C::Lgdt_m1664], function_ends(lgdt::<8>)),
    codes(&[C::Lidt_m1632_16], function_ends(lidt::<2>)),
    codes(&[C::Lidt_m1632], function_ends(lidt::<4>)),
    codes(&[C::Lidt_m1664], function_ends(lidt::<8>)),
    codes(&[C::Sgdt_m1632_16], function(sgdt::<2>)),
    codes(&[C::Sgdt_m1632], function(sgdt::<4>)),
    codes(&[C::Sgdt_m1664], function(sgdt::<8>)),
    codes(&[C::Sidt_m1632_16], function(sidt::<2>)),
    codes(&[C::Sidt_m1632], function(sidt::<4>)),
    codes(&[C::Sidt_m1664], function(sidt::<8>)),
    row(M::Lldt, |d| from_rm16(d, super::plain_handler(lldt))),
    row(M::Ltr, |d| from_rm16(d, super::plain_handler(ltr))),
    row(M::Sldt, |d| to_rm(d, super::plain_handler(sldt))),
    row(M::Str, |d| to_rm(d, super::plain_handler(str_))),
    row(M::Verr, |d| from_rm16(d, super::plain_handler(verr))),
    row(M::Verw, |d| from_rm16(d, super::plain_handler(verw))),
    row(M::Lar, |d| {
        inquiry(
            d,
            [super::plain_handler(lar::<u16>), super::plain_handler(lar::<u32>), super::plain_handler(lar::<u64>)],
        )
    }),
    row(M::Lsl, |d| {
        inquiry(
            d,
            [super::plain_handler(lsl::<u16>), super::plain_handler(lsl::<u32>), super::plain_handler(lsl::<u64>)],
        )
    }),
    row(M::Arpl, |d| to_rm(d, super::plain_handler(arpl))),
];

/// A 16-bit source, register or memory: `aux` tells.
fn from_rm16(d: &Digest<'_>, h: Handler) -> Option<Lowered> {
    let mut lowered = d.lower(h).ends();
    lowered.op.aux = u8::from(d.is_mem(0));
    // Operand 0 as a register is `dst`.
    Some(lowered)
}

/// A destination, register or memory; `aux` holds the register's bytes, 0 for memory.
pub(super) fn to_rm(d: &Digest<'_>, h: Handler) -> Option<Lowered> {
    let mut lowered = d.lower(h);
    lowered.op.aux = if d.is_mem(0) { 0 } else { d.bytes(0) as u8 };
    Some(lowered)
}

/// LAR and LSL: by the destination's width; the source is `src` or memory.
fn inquiry(d: &Digest<'_>, [h16, h32, h64]: [Handler; 3]) -> Option<Lowered> {
    let mut lowered = d.lower(match d.bytes(0) {
        2 => h16,
        4 => h32,
        _ => h64,
    });
    lowered.op.aux = u8::from(d.is_mem(1));
    Some(lowered)
}

impl Cpu {
    /// User-mode instruction prevention: #GP(0) above CPL 0 where CR4.UMIP is set.
    pub(super) fn check_umip(&mut self) -> Result<(), Stop> {
        if self.cpl > 0 && self.cr4.contains(Cr4::UMIP) { Err(self.fault(Fault::gp(0))) } else { Ok(()) }
    }

    /// #UD in real-address and virtual-8086 mode.
    fn require_protected(&mut self) -> Result<(), Stop> {
        if self.is_protected() { Ok(()) } else { Err(self.undefined()) }
    }

    fn rm16(&mut self, op: &Op, slot: u8) -> Result<u16, Stop> {
        if op.aux != 0 { self.read_operand(op) } else { Ok(self.get(slot)) }
    }

    /// Memory takes 16 bits, a register the value zero-extended to the operand size.
    pub(super) fn put_rm(&mut self, op: &Op, value: u64) -> Result<(), Stop> {
        match op.aux {
            0 => self.write_operand(op, value as u16)?,
            2 => self.put(op.dst, value as u16),
            4 => self.put(op.dst, value as u32),
            _ => self.put(op.dst, value),
        }
        Ok(())
    }

    fn set_zf(&mut self, on: bool) {
        let bits = self.flags().bits() & !ZF | if on { ZF } else { 0 };
        self.set_flags(Flags::explicit(bits));
    }

    /// Limit, then a base of 24, 32 or 64 bits.
    fn table_operand<const BYTES: u32>(&mut self, op: &Op) -> Result<DescriptorTable, Stop> {
        self.require_cpl0()?;
        let at = self.ea(op);
        let behind = at.wrapping_add(2) & op.address_mask();
        let limit = self.read::<u16>(op.segment(), at)?;
        let base = if BYTES == 8 {
            self.read::<u64>(op.segment(), behind)?
        } else {
            let base = u64::from(self.read::<u32>(op.segment(), behind)?);
            if BYTES == 2 { base & 0xff_ffff } else { base }
        };
        if BYTES == 8 && !self.is_canonical(base) {
            return Err(self.fault(Fault::gp(0)));
        }
        Ok(DescriptorTable { base, limit })
    }

    fn store_table<const BYTES: u32>(&mut self, op: &Op, table: DescriptorTable) -> Done {
        self.check_umip()?;
        let mut image = [0; 10];
        image[..2].copy_from_slice(&table.limit.to_le_bytes());
        image[2..].copy_from_slice(&table.base.to_le_bytes());
        if BYTES == 2 {
            // 24 bits of base and a byte of 0 with 16-bit operands.
            image[5] = 0;
        }
        let at = self.ea(op);
        self.write_bytes(op.segment(), at, &image[..if BYTES == 8 { 10 } else { 6 }])?;
        Ok(Then::Next)
    }
}

fn lgdt<const BYTES: u32>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.gdt = cpu.table_operand::<BYTES>(op)?;
    cpu.serialize();
    Ok(Then::Leave)
}

fn lidt<const BYTES: u32>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.idt = cpu.table_operand::<BYTES>(op)?;
    cpu.serialize();
    Ok(Then::Leave)
}

fn sgdt<const BYTES: u32>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.store_table::<BYTES>(op, cpu.gdt)
}

fn sidt<const BYTES: u32>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.store_table::<BYTES>(op, cpu.idt)
}

/// The base of a system descriptor: 64 bits in IA-32e mode, whose upper half has a type of 0.
fn system_base(cpu: &mut Cpu, selector: Selector, found: &crate::protect::Found) -> Result<u64, Stop> {
    if !cpu.is_long() {
        return Ok(found.raw.base().into());
    }
    let upper = cpu.upper_half(selector, found, Fault::gp)?;
    cpu.require(x86_defs::Gate::upper_type(upper) == 0, Fault::gp, selector)?;
    let base = found.raw.base64(upper);
    if cpu.is_canonical(base) { Ok(base) } else { Err(cpu.fault(Fault::gp(0))) }
}

/// SDM Vol. 2 "LLDT".
fn lldt(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_protected()?;
    cpu.require_cpl0()?;
    let selector = Selector(cpu.rm16(op, op.dst)?);
    if selector.is_null() {
        cpu.ldt = Segment::null(selector.0);
        cpu.serialize();
        return Ok(Then::Leave);
    }
    cpu.require(!selector.ti(), Fault::gp, selector)?;
    let found = cpu.descriptor(selector, Fault::gp)?;
    let rights = found.raw.rights();
    cpu.require(!rights.s() && rights.typ() == system::LDT, Fault::gp, selector)?;
    cpu.require(rights.p(), Fault::np, selector)?;
    let base = system_base(cpu, selector, &found)?;
    cpu.ldt = Segment { base, ..Segment::of(selector, found.raw) };
    cpu.serialize();
    Ok(Then::Leave)
}

/// SDM Vol. 2 "LTR".
fn ltr(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_protected()?;
    cpu.require_cpl0()?;
    let selector = Selector(cpu.rm16(op, op.dst)?);
    if selector.is_null() {
        return Err(cpu.fault(Fault::gp(0)));
    }
    cpu.require(!selector.ti(), Fault::gp, selector)?;
    let mut found = cpu.descriptor(selector, Fault::gp)?;
    let rights = found.raw.rights();
    let good = !rights.s() && is_available_tss(rights.typ(), cpu.is_long());
    cpu.require(good, Fault::gp, selector)?;
    cpu.require(rights.p(), Fault::np, selector)?;
    let base = system_base(cpu, selector, &found)?;
    cpu.mark_busy(found.la, true)?;
    found.raw.0 |= x86_defs::Descriptor::BUSY;
    cpu.tr = Segment { base, ..Segment::of(selector, found.raw) };
    cpu.serialize();
    Ok(Then::Leave)
}

/// SDM Vol. 2 "SLDT".
fn sldt(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_protected()?;
    cpu.check_umip()?;
    cpu.put_rm(op, cpu.ldt.selector.into())?;
    Ok(Then::Next)
}

/// SDM Vol. 2 "STR".
fn str_(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_protected()?;
    cpu.check_umip()?;
    cpu.put_rm(op, cpu.tr.selector.into())?;
    Ok(Then::Next)
}

/// SDM Vol. 2 "VERR/VERW".
fn verify(cpu: &mut Cpu, op: &Op, write: bool) -> Done {
    cpu.require_protected()?;
    let selector = Selector(cpu.rm16(op, op.dst)?);
    let found = if selector.is_null() { None } else { cpu.peek_descriptor(selector)? };
    let accessible = found.is_some_and(|found| {
        let rights = found.raw.rights();
        let visible = rights.is_conforming() || rights.dpl() >= cpu.cpl && rights.dpl() >= selector.rpl();
        visible && if write { rights.is_writable_data() } else { rights.is_readable() }
    });
    cpu.set_zf(accessible);
    Ok(Then::Leave)
}

fn verr(cpu: &mut Cpu, op: &Op) -> Done {
    verify(cpu, op, false)
}

fn verw(cpu: &mut Cpu, op: &Op) -> Done {
    verify(cpu, op, true)
}

/// System types that LAR shows: TSS, LDT, gates; fewer in IA-32e mode. SDM Vol. 2 "LAR", table "Segment and Gate Types".
const LAR_TYPES: u16 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 9 | 1 << 11 | 1 << 12;
const LAR_TYPES_LONG: u16 = 1 << 2 | 1 << 9 | 1 << 11 | 1 << 12;
/// System types that have a limit. SDM Vol. 2 "LSL".
const LSL_TYPES: u16 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 9 | 1 << 11;
const LSL_TYPES_LONG: u16 = 1 << 2 | 1 << 9 | 1 << 11;

/// The descriptor, where LAR or LSL may show it.
fn shown(cpu: &mut Cpu, op: &Op, types: u16, types_long: u16) -> Result<Option<x86_defs::Descriptor>, Stop> {
    cpu.require_protected()?;
    let selector = Selector(cpu.rm16(op, op.src)?);
    if selector.is_null() {
        return Ok(None);
    }
    let Some(found) = cpu.peek_descriptor(selector)? else { return Ok(None) };
    let rights = found.raw.rights();
    let visible = rights.is_conforming() || rights.dpl() >= cpu.cpl && rights.dpl() >= selector.rpl();
    let types = if cpu.is_long() { types_long } else { types };
    let valid = rights.s() || types >> rights.typ() & 1 != 0;
    Ok((visible && valid).then_some(found.raw))
}

/// SDM Vol. 2 "LAR": the second doubleword of the descriptor AND 00FxFF00H.
fn lar<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let raw = shown(cpu, op, LAR_TYPES, LAR_TYPES_LONG)?;
    if let Some(raw) = raw {
        cpu.put(op.dst, W::of(raw.0 >> 32 & 0x00ff_ff00));
    }
    cpu.set_zf(raw.is_some());
    Ok(Then::Next)
}

/// SDM Vol. 2 "LSL": the limit in bytes.
fn lsl<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let raw = shown(cpu, op, LSL_TYPES, LSL_TYPES_LONG)?;
    if let Some(raw) = raw {
        cpu.put(op.dst, W::of(raw.limit().into()));
    }
    cpu.set_zf(raw.is_some());
    Ok(Then::Next)
}

/// SDM Vol. 2 "ARPL": raises the RPL of the first operand to that of the second.
fn arpl(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_protected()?;
    // With a memory operand the register is operand 1, and the only one.
    let rpl = cpu.get::<u16>(op.src) & 3;
    let adjusted = |old: u16| (old & 3 < rpl).then_some(old & !3 | rpl);
    let old = if op.aux == 0 {
        let at = cpu.ea(op);
        let la = cpu.linear(op.segment(), at, 2, true)?;
        cpu.modify::<u16>(la, op.segment(), false, adjusted)?
    } else {
        let old = cpu.get::<u16>(op.dst);
        if let Some(new) = adjusted(old) {
            cpu.put(op.dst, new);
        }
        old
    };
    cpu.set_zf(adjusted(old).is_some());
    Ok(Then::Next)
}
