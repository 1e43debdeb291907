//! CLC STC CMC CLD STD CLI STI, PUSHF POPF, LAHF SAHF, CLAC STAC: RFLAGS as an operand. SDM Vol. 2, the page of each
//! mnemonic; Vol. 3 "Interrupt and Exception Handling in Virtual-8086 Mode" and "Protected-Mode Virtual Interrupts".

use iced_x86::Mnemonic as M;
use x86_defs::{Cr4, Rflags};

use super::{Row, row};
use crate::cpu::{Cpu, Done, Stop, Then};
use crate::decode::digest::function;
use crate::fault::Fault;
use crate::flags::{AF, CF, Flags, OF, PF, SF, STATUS, ZF};
use crate::host::HostWord;
use crate::op::Op;
use crate::state::Gpr;

pub(super) const ROWS: &[Row] = &[
    row(M::Clc, function(clc)),
    row(M::Stc, function(stc)),
    row(M::Cmc, function(cmc)),
    row(M::Cld, function(cld)),
    row(M::Std, function(std)),
    row(M::Cli, function(cli)),
    row(M::Sti, function(sti)),
    row(M::Pushf, function(pushf::<u16>)),
    row(M::Pushfd, function(pushf::<u32>)),
    row(M::Pushfq, function(pushf::<u64>)),
    row(M::Popf, function(popf::<u16>)),
    row(M::Popfd, function(popf::<u32>)),
    row(M::Popfq, function(popf::<u64>)),
    row(M::Lahf, function(lahf)),
    row(M::Sahf, function(sahf)),
    row(M::Clac, function(clac)),
    row(M::Stac, function(stac)),
];

const AC: u64 = Rflags::AC.bits();
const DF: u64 = Rflags::DF.bits();
const ID: u64 = Rflags::ID.bits();
const IF: u64 = Rflags::IF.bits();
const IOPL: u64 = Rflags::IOPL.bits();
const NT: u64 = Rflags::NT.bits();
const RF: u64 = Rflags::RF.bits();
const TF: u64 = Rflags::TF.bits();
const VIF: u64 = Rflags::VIF.bits();
const VIP: u64 = Rflags::VIP.bits();
const VM: u64 = Rflags::VM.bits();

fn clc(cpu: &mut Cpu, _: &Op) -> Done {
    cpu.set_flags(Flags::explicit(cpu.flags().bits() & !CF));
    Ok(Then::Next)
}

fn stc(cpu: &mut Cpu, _: &Op) -> Done {
    cpu.set_flags(Flags::explicit(cpu.flags().bits() | CF));
    Ok(Then::Next)
}

fn cmc(cpu: &mut Cpu, _: &Op) -> Done {
    cpu.set_flags(Flags::explicit(cpu.flags().bits() ^ CF));
    Ok(Then::Next)
}

fn cld(cpu: &mut Cpu, _: &Op) -> Done {
    cpu.rflags &= !DF;
    Ok(Then::Next)
}

fn std(cpu: &mut Cpu, _: &Op) -> Done {
    cpu.rflags |= DF;
    Ok(Then::Next)
}

impl Cpu {
    /// CLI and STI act on VIF: virtual-8086 mode under CR4.VME, or CPL 3 under CR4.PVI, with IOPL below CPL.
    fn has_virtual_if(&self) -> bool {
        if self.is_v86() { self.cr4.contains(Cr4::VME) } else { self.cpl == 3 && self.cr4.contains(Cr4::PVI) }
    }

    /// IF is CLI's and STI's to change.
    fn owns_if(&self) -> bool {
        self.is_real() || self.iopl() >= self.cpl
    }

    /// Holds back interrupts until the instruction behind the op's is done. Exact wherever the trace is left.
    pub(super) fn shadow_next(&mut self, op: &Op, mov_ss: bool) {
        // The head has charged the whole trace; `left` counts from this instruction on.
        let unspent = self.budget + i64::from(op.left) - 1;
        self.shadow_at = self.instructions.wrapping_add((self.quantum - unspent) as u64);
        (self.events.shadow_sti, self.events.shadow_mov_ss) = (!mov_ss, mov_ss);
    }

    /// IF has just been set: whether the loop must look before the trace goes on.
    fn has_waiting_events(&self) -> bool {
        self.events.interrupt.is_some() || self.interrupt_window || self.rflags & TF != 0
    }
}

/// SDM Vol. 2 "CLI", table of decisions.
fn cli(cpu: &mut Cpu, _: &Op) -> Done {
    if cpu.owns_if() {
        cpu.rflags &= !IF;
    } else if cpu.has_virtual_if() {
        cpu.rflags &= !VIF;
    } else {
        return Err(cpu.fault(Fault::gp(0)));
    }
    Ok(Then::Next)
}

/// SDM Vol. 2 "STI", table of decisions.
fn sti(cpu: &mut Cpu, op: &Op) -> Done {
    if cpu.owns_if() {
        if cpu.rflags & IF != 0 {
            return Ok(Then::Next);
        }
        cpu.rflags |= IF;
        cpu.shadow_next(op, false);
        return Ok(if cpu.has_waiting_events() { Then::Leave } else { Then::Next });
    }
    if !cpu.has_virtual_if() || cpu.rflags & VIP != 0 {
        return Err(cpu.fault(Fault::gp(0)));
    }
    cpu.rflags |= VIF;
    Ok(Then::Next)
}

/// SDM Vol. 2 "PUSHF/PUSHFD/PUSHFQ": RF and VM are pushed as 0.
fn pushf<W: HostWord>(cpu: &mut Cpu, _: &Op) -> Done {
    let mut image = cpu.rflags() & !(RF | VM);
    if cpu.is_v86() && cpu.iopl() < 3 {
        if !cpu.cr4.contains(Cr4::VME) || W::BYTES != 2 {
            return Err(cpu.fault(Fault::gp(0)));
        }
        image = cpu.virtual_image(image);
    }
    cpu.push(W::of(image))?;
    Ok(Then::Next)
}

impl Cpu {
    /// FLAGS as a virtual-8086 program with virtual interrupts sees them: IF is VIF, IOPL 3.
    pub(crate) fn virtual_image(&self, image: u64) -> u64 {
        let virtual_if = if self.rflags & VIF != 0 { IF } else { 0 };
        image & !IF | virtual_if | IOPL
    }

    /// RFLAGS from a popped 16-bit image under virtual interrupts: IF goes to VIF, IOPL and IF stay. #GP(0) where it sets
    /// TF, or IF while VIP is pending.
    pub(crate) fn load_virtual_image(&mut self, image: u64) -> Result<u64, Stop> {
        if image & TF != 0 || image & IF != 0 && self.rflags & VIP != 0 {
            return Err(self.fault(Fault::gp(0)));
        }
        let loaded = STATUS | TF | DF | NT;
        let virtual_if = if image & IF != 0 { VIF } else { 0 };
        Ok(self.rflags() & !(loaded | VIF) | image & loaded | virtual_if)
    }
}

/// SDM Vol. 2 "POPF/POPFD/POPFQ", tables of effects by mode, IOPL and VME.
fn popf<W: HostWord>(cpu: &mut Cpu, _: &Op) -> Done {
    let image = cpu.peek::<W>(0)?.zext();
    let old = cpu.rflags();
    let wide = W::BYTES > 2;
    let new = if cpu.is_v86() {
        if cpu.iopl() == 3 {
            // IOPL, VM, VIP and VIF stay; RF is cleared.
            let loaded = STATUS | TF | DF | NT | IF | if wide { AC | ID } else { 0 };
            old & !loaded | image & loaded
        } else if cpu.cr4.contains(Cr4::VME) && !wide {
            cpu.load_virtual_image(image)?
        } else {
            return Err(cpu.fault(Fault::gp(0)));
        }
    } else {
        let mut loaded = STATUS | TF | DF | NT | if wide { AC | ID } else { 0 };
        if cpu.owns_if() {
            loaded |= IF;
        }
        if cpu.cpl == 0 {
            loaded |= IOPL;
        }
        old & !loaded | image & loaded
    };
    cpu.set_reg(Gpr::Rsp, cpu.stack_pointer(W::BYTES.into()));
    let new = new & !if wide { RF } else { 0 };
    cpu.set_rflags(new);
    // The loop must see a trap flag, and an interrupt that may come in now.
    let came = new & !old;
    let look = came & TF != 0 || came & IF != 0 && cpu.has_waiting_events();
    Ok(if look { Then::Leave } else { Then::Next })
}

/// AH ← SF ZF 0 AF 0 PF 1 CF. SDM Vol. 2 "LAHF".
fn lahf(cpu: &mut Cpu, _: &Op) -> Done {
    let low = cpu.flags().bits() & (SF | ZF | AF | PF | CF) | 2;
    cpu.put(AH, low as u8);
    Ok(Then::Next)
}

/// SDM Vol. 2 "SAHF": OF stays.
fn sahf(cpu: &mut Cpu, _: &Op) -> Done {
    let ah = u64::from(cpu.get::<u8>(AH));
    let old = cpu.flags().bits();
    cpu.set_flags(Flags::explicit(old & OF | ah & (SF | ZF | AF | PF | CF)));
    Ok(Then::Next)
}

/// Slot of AH.
const AH: u8 = 1;

/// SDM Vol. 2 "CLAC": #UD above CPL 0.
fn clac(cpu: &mut Cpu, _: &Op) -> Done {
    set_ac(cpu, false)
}

/// SDM Vol. 2 "STAC": #UD above CPL 0.
fn stac(cpu: &mut Cpu, _: &Op) -> Done {
    set_ac(cpu, true)
}

fn set_ac(cpu: &mut Cpu, on: bool) -> Done {
    if cpu.cpl != 0 || !cpu.offered.smap {
        return Err(cpu.undefined());
    }
    let old = cpu.rflags;
    cpu.rflags = old & !AC | if on { AC } else { 0 };
    // The TLB's context follows at once, so the trace goes on.
    if old != cpu.rflags {
        cpu.derive();
    }
    Ok(Then::Next)
}
