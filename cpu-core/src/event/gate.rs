//! Through the IDT: real-address mode's vectors, gates of protected and IA-32e mode, virtual-8086 mode. SDM Vol. 2 "INT
//! n/INTO/INT3/INT1", Operation, in its order.

use x86_defs::descriptor::system_type as system;
use x86_defs::{Cr4, Gate, Rflags, Selector};

use super::task::{self, Cause};
use super::{Event, Source};
use crate::cpu::{Cpu, Stop};
use crate::fault::Fault;
use crate::isa::has_room;
use crate::protect::Found;
use crate::state::{Gpr, Seg, Segment};

const IF: u64 = Rflags::IF.bits();
/// What every gate clears besides IF.
const CLEARED: u64 = Rflags::TF.bits() | Rflags::NT.bits() | Rflags::RF.bits() | Rflags::VM.bits();

/// A fault that belongs to the new task comes as `Ok(Err(Stop))`; after `Err(Stop)` nothing has changed.
pub(super) type Entered = Result<Result<(), Stop>, Stop>;

/// Starts the handler of `event`.
pub(super) fn enter(cpu: &mut Cpu, event: &Event) -> Entered {
    if cpu.is_real() {
        return cpu.attempt(|cpu| real(cpu, event, cpu.idt.base, cpu.idt.limit)).map(Ok);
    }
    if cpu.is_v86() && event.source == Source::Software {
        // SDM Vol. 3 "Class 3—Software Interrupt Handling in Virtual-8086 Mode", methods 1 to 6.
        if cpu.cr4.contains(Cr4::VME) && !redirected(cpu, event.vector)? {
            return cpu.attempt(|cpu| virtual_8086(cpu, event)).map(Ok);
        }
        if cpu.iopl() < 3 {
            return Err(cpu.fault(Fault::gp(0)));
        }
    }
    if cpu.is_long() { long(cpu, event).map(Ok) } else { protected(cpu, event) }
}

/// Error code that names an IDT entry.
fn in_idt(event: &Event) -> u32 {
    u32::from(event.vector) * 8 + x86_defs::vector::selector_error::IDT
}

/// "REAL-ADDRESS-MODE": a far pointer from the table, three words on the stack, no error code.
fn real(cpu: &mut Cpu, event: &Event, table: u64, limit: u16) -> Result<(), Stop> {
    let at = u64::from(event.vector) * 4;
    if at + 3 > u64::from(limit) {
        return Err(cpu.fault(Fault::gp(0)));
    }
    let entry = cpu.load_system::<u32>(cpu.system_address(table, at))?;
    cpu.push(event.rflags as u16)?;
    cpu.push(cpu.seg[Seg::Cs as usize].selector)?;
    cpu.push(event.back as u16)?;
    jump_real(cpu, entry)?;
    let new = cpu.rflags() & !(IF | (Rflags::TF | Rflags::AC | Rflags::RF).bits());
    cpu.set_rflags(new);
    Ok(())
}

fn jump_real(cpu: &mut Cpu, entry: u32) -> Result<(), Stop> {
    cpu.load_real_segment(Seg::Cs, (entry >> 16) as u16);
    cpu.derive();
    cpu.far_target(u64::from(entry & 0xffff))
}

/// Whether INT `vector` of a virtual-8086 program goes to protected mode: its bit in the software interrupt redirection
/// bitmap, the 32 bytes below the I/O bitmap. #GP(0) where the TSS does not hold it.
fn redirected(cpu: &mut Cpu, vector: u8) -> Result<bool, Stop> {
    let tss = cpu.tr;
    let holds = |last: u64| last <= u64::from(tss.limit);
    if tss.type_ & 8 == 0 || !holds(103) {
        return Err(cpu.fault(Fault::gp(0)));
    }
    let io_map = u64::from(cpu.load_system::<u16>(cpu.system_address(tss.base, 102))?);
    let at = io_map.wrapping_sub(32) + u64::from(vector / 8);
    if io_map < 32 || !holds(at) {
        return Err(cpu.fault(Fault::gp(0)));
    }
    let bits = cpu.load_system::<u8>(cpu.system_address(tss.base, at))?;
    Ok(bits >> (vector & 7) & 1 != 0)
}

/// INT n of a virtual-8086 program to its own handler: methods 5 (IOPL 3) and 6 (virtual IF).
fn virtual_8086(cpu: &mut Cpu, event: &Event) -> Result<(), Stop> {
    let entry = cpu.load_system::<u32>(u64::from(event.vector) * 4)?;
    let virtual_if = cpu.iopl() < 3;
    let image = if virtual_if { cpu.virtual_image(event.rflags) } else { event.rflags };
    cpu.push(image as u16)?;
    cpu.push(cpu.seg[Seg::Cs as usize].selector)?;
    cpu.push(event.back as u16)?;
    jump_real(cpu, entry)?;
    let off = if virtual_if { Rflags::VIF.bits() } else { IF };
    let new = cpu.rflags() & !(off | (Rflags::TF | Rflags::RF | Rflags::NT).bits());
    cpu.set_rflags(new);
    Ok(())
}

/// "PROTECTED-MODE": an 8-byte gate.
fn protected(cpu: &mut Cpu, event: &Event) -> Entered {
    let at = u64::from(event.vector) * 8;
    if at + 7 > u64::from(cpu.idt.limit) {
        return Err(cpu.fault(Fault::gp(in_idt(event))));
    }
    let gate = Gate::from_8(cpu.load_system::<u64>(cpu.system_address(cpu.idt.base, at))?);
    let known = matches!(
        gate.typ(),
        system::TASK_GATE
            | system::INTERRUPT_GATE16
            | system::TRAP_GATE16
            | system::INTERRUPT_GATE32
            | system::TRAP_GATE32
    );
    usable(cpu, event, &gate, known)?;
    if gate.typ() == system::TASK_GATE {
        let found = cpu.task_of_gate(gate.selector, Fault::gp)?;
        return task::switch(cpu, gate.selector, found, Cause::Event(event), event.back);
    }
    let (found, cpl) = handler_code(cpu, &gate)?;
    cpu.attempt(|cpu| {
        if cpu.is_v86() {
            if cpl != 0 {
                return Err(cpu.fault(Fault::gp(gate.selector.error_code())));
            }
            inner(cpu, event, &gate, found, cpl, true)
        } else if cpl < cpu.cpl {
            inner(cpu, event, &gate, found, cpl, false)
        } else {
            same_level(cpu, event, &gate, found)
        }
    })?;
    Ok(Ok(()))
}

/// Type, DPL for software's events, present.
fn usable(cpu: &mut Cpu, event: &Event, gate: &Gate, known: bool) -> Result<(), Stop> {
    let visible = event.source == Source::Hardware || gate.rights.dpl() >= cpu.cpl;
    if gate.rights.s() || !known || !visible {
        return Err(cpu.fault(Fault::gp(in_idt(event))));
    }
    if !gate.rights.p() {
        return Err(cpu.fault(Fault::np(in_idt(event))));
    }
    Ok(())
}

/// The gate's code segment and the privilege level that it runs at.
fn handler_code(cpu: &mut Cpu, gate: &Gate) -> Result<(Found, u8), Stop> {
    let selector = gate.selector;
    if selector.is_null() {
        return Err(cpu.fault(Fault::gp(0)));
    }
    let found = cpu.descriptor(selector, Fault::gp)?;
    let rights = found.raw.rights();
    let kind = rights.is_code() && (!cpu.is_long() || rights.l() && !rights.db());
    cpu.require(kind && rights.dpl() <= cpu.cpl, Fault::gp, selector)?;
    cpu.require(rights.p(), Fault::np, selector)?;
    // A virtual-8086 program cannot be interrupted into a conforming segment.
    let v86 = cpu.is_v86();
    cpu.require(!(v86 && rights.is_conforming()), Fault::gp, selector)?;
    Ok((found, if rights.is_conforming() { cpu.cpl } else { rights.dpl() }))
}

fn is_wide(gate: &Gate) -> bool {
    gate.typ() & 8 != 0
}

fn push_by(cpu: &mut Cpu, wide: bool, values: &[u64]) -> Result<(), Stop> {
    for value in values {
        if wide {
            cpu.push(*value as u32)?;
        } else {
            cpu.push(*value as u16)?;
        }
    }
    Ok(())
}

/// RFLAGS of the handler.
fn enter_handler(cpu: &mut Cpu, gate: &Gate) -> Result<(), Stop> {
    let interrupt = gate.typ() & 1 == 0;
    cpu.far_target(gate.offset)?;
    let new = cpu.rflags() & !(CLEARED | if interrupt { IF } else { 0 });
    cpu.set_rflags(new);
    Ok(())
}

/// "INTRA-PRIVILEGE-LEVEL-INTERRUPT".
fn same_level(cpu: &mut Cpu, event: &Event, gate: &Gate, found: Found) -> Result<(), Stop> {
    let cs = cpu.seg[Seg::Cs as usize].selector;
    let wide = is_wide(gate);
    push_by(cpu, wide, &[event.rflags, cs.into(), event.back])?;
    if let Some(code) = event.error {
        push_by(cpu, wide, &[code.into()])?;
    }
    let cpl = cpu.cpl;
    cpu.load_cs(gate.selector, found, cpl)?;
    cpu.derive();
    enter_handler(cpu, gate)
}

/// "INTER-PRIVILEGE-LEVEL-INTERRUPT" and "INTERRUPT-FROM-VIRTUAL-8086-MODE".
fn inner(cpu: &mut Cpu, event: &Event, gate: &Gate, found: Found, cpl: u8, v86: bool) -> Result<(), Stop> {
    let wide = is_wide(gate);
    let old = cpu.seg;
    let selector_of = |seg: Seg| u64::from(old[seg as usize].selector);
    let old_esp = cpu.reg(Gpr::Rsp);
    let (ss, esp) = cpu.inner_stack(cpl)?;
    let count = 5 + u64::from(event.error.is_some()) + if v86 { 4 } else { 0 };
    if !has_room(&ss, esp, count * if wide { 4 } else { 2 }) {
        return Err(cpu.fault(Fault::ss(Selector(ss.selector).error_code())));
    }
    cpu.load_cs(gate.selector, found, cpl)?;
    cpu.seg[Seg::Ss as usize] = ss;
    if v86 {
        let new = cpu.rflags() & !Rflags::VM.bits();
        cpu.set_rflags(new);
    }
    cpu.derive();
    cpu.load_stack_pointer(esp);
    if v86 {
        push_by(cpu, wide, &[Seg::Gs, Seg::Fs, Seg::Ds, Seg::Es].map(selector_of))?;
        for seg in [Seg::Gs, Seg::Fs, Seg::Ds, Seg::Es] {
            cpu.seg[seg as usize] = Segment::null(0);
        }
    }
    push_by(cpu, wide, &[selector_of(Seg::Ss), old_esp, event.rflags, selector_of(Seg::Cs), event.back])?;
    if let Some(code) = event.error {
        push_by(cpu, wide, &[code.into()])?;
    }
    enter_handler(cpu, gate)
}

/// IA-32e mode: a 16-byte gate, 64-bit handlers, RSP aligned to 16 bytes, SS:RSP always pushed.
fn long(cpu: &mut Cpu, event: &Event) -> Result<(), Stop> {
    let at = u64::from(event.vector) * 16;
    if at + 15 > u64::from(cpu.idt.limit) {
        return Err(cpu.fault(Fault::gp(in_idt(event))));
    }
    let low = cpu.load_system::<u64>(cpu.system_address(cpu.idt.base, at))?;
    let high = cpu.load_system::<u64>(cpu.system_address(cpu.idt.base, at + 8))?;
    let gate = Gate::from_16(low, high);
    let known = matches!(gate.typ(), system::INTERRUPT_GATE32 | system::TRAP_GATE32);
    usable(cpu, event, &gate, known)?;
    let (found, cpl) = handler_code(cpu, &gate)?;
    let inward = cpl < cpu.cpl;
    let old_rsp = cpu.reg(Gpr::Rsp);
    let rsp = if inward || gate.ist != 0 { cpu.stack_pointer_64(cpl, gate.ist)? } else { old_rsp };
    let (cs, ss) = (cpu.seg[Seg::Cs as usize].selector, cpu.seg[Seg::Ss as usize].selector);
    cpu.attempt(|cpu| {
        cpu.load_cs(gate.selector, found, cpl)?;
        if inward {
            cpu.seg[Seg::Ss as usize] = Segment { dpl: cpl, ..Segment::null(cpl.into()) };
        }
        cpu.derive();
        cpu.set_reg(Gpr::Rsp, rsp & !15);
        for value in [u64::from(ss), old_rsp, event.rflags, cs.into(), event.back] {
            cpu.push(value)?;
        }
        if let Some(code) = event.error {
            cpu.push(u64::from(code))?;
        }
        enter_handler(cpu, &gate)
    })
}
