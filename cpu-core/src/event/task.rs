//! The hardware task switch. SDM Vol. 3, chapter "Task Management", section "Task Switching", in its order: checks and
//! page-level probes first, in the old task; what faults behind the switch is reported in the new one.

use x86_defs::tss::{tss16, tss32};
use x86_defs::{Cr0, Cr4, Dr6, Dr7, Rflags, Selector};

use super::Event;
use super::gate::Entered;
use crate::access::By;
use crate::cpu::{Cpu, Stop};
use crate::fault::Fault;
use crate::protect::Found;
use crate::state::{Seg, Segment};

/// What switches.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cause<'a> {
    /// JMP: the old task becomes available.
    Jump,
    /// CALL: the new task is nested in the old one.
    Call,
    /// IRET with NT set: back to the task that the link names.
    Iret,
    /// A task gate in the IDT: nested, with the event's error code on the new stack.
    Event(&'a Event),
}

/// The state that a TSS holds, from either format.
#[derive(Clone, Copy, Debug, Default)]
struct Image {
    cr3: u64,
    ip: u64,
    flags: u64,
    gpr: [u64; 8],
    /// ES CS SS DS FS GS.
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
}

const NT: u64 = Rflags::NT.bits();
const VM: u64 = Rflags::VM.bits();

/// Switches to the task of `selector`, whose descriptor is available (busy for IRET) and present. `back`: EIP to be saved.
pub(crate) fn switch(cpu: &mut Cpu, selector: Selector, found: Found, cause: Cause<'_>, back: u64) -> Entered {
    let wide = found.raw.typ() & 8 != 0;
    let least = if wide { tss32::MIN_LIMIT } else { tss16::MIN_LIMIT };
    cpu.require(found.raw.limit() >= least, Fault::ts, selector)?;
    let base = u64::from(found.raw.base());
    let old = cpu.tr;
    let old_wide = old.type_ & 8 != 0;
    let old_least = if old_wide { tss32::MIN_LIMIT } else { tss16::MIN_LIMIT };
    // The old state must fit where it came from.
    let outgoing = Selector(old.selector);
    cpu.require(old.limit >= old_least, Fault::ts, outgoing)?;
    probe(cpu, old.base, old_least)?;
    probe(cpu, base, least)?;
    let old_descriptor = cpu.system_address(cpu.gdt.base, outgoing.offset());
    let nested = matches!(cause, Cause::Call | Cause::Event(_));

    let image = load(cpu, base, wide)?;

    // Everything of the old task's has been looked at: nothing below faults in it.
    if !nested {
        cpu.mark_busy(old_descriptor, false)?;
    }
    let mut flags = match cause {
        Cause::Event(event) => event.rflags,
        _ => cpu.rflags(),
    };
    if matches!(cause, Cause::Iret) {
        flags &= !NT;
    }
    save(cpu, old.base, old_wide, back, flags)?;
    if nested {
        cpu.store_system::<u16>(cpu.system_address(base, tss32::LINK), outgoing.0)?;
    }
    let mut flags = image.flags;
    if nested {
        flags |= NT;
    }
    let mut raw = found.raw;
    if !matches!(cause, Cause::Iret) {
        cpu.mark_busy(found.la, true)?;
    }
    raw.0 |= x86_defs::Descriptor::BUSY;
    cpu.tr = Segment::of(selector, raw);
    cpu.set_task_switched();
    // Local breakpoints belong to a task.
    let local = Dr7::L0 | Dr7::L1 | Dr7::L2 | Dr7::L3 | Dr7::LE;
    cpu.debug.dr7 &= !local.bits();

    let entered = begin(cpu, &image, flags, wide, cause);
    cpu.derive();
    if image.trap {
        cpu.debug_pending |= Dr6::BT.bits();
    }
    Ok(entered)
}

/// All bytes of a TSS can be read and written: a page fault is taken before anything changes.
fn probe(cpu: &mut Cpu, base: u64, limit: u32) -> Result<(), Stop> {
    let first = cpu.system_address(base, 0);
    let last = cpu.system_address(base, limit.into());
    cpu.target(first, true, By::System, Seg::Ds)?;
    if first >> 12 != last >> 12 {
        cpu.target(last & !0xfff, true, By::System, Seg::Ds)?;
    }
    Ok(())
}

/// Reads a TSS.
fn load(cpu: &mut Cpu, base: u64, wide: bool) -> Result<Image, Stop> {
    let mut image = Image::default();
    if wide {
        let mut long = |at: u64| cpu.load_system::<u32>(cpu.system_address(base, at));
        image.cr3 = long(tss32::CR3)?.into();
        image.ip = long(tss32::EIP)?.into();
        image.flags = long(tss32::EFLAGS)?.into();
        for (i, register) in image.gpr.iter_mut().enumerate() {
            *register = long(tss32::EAX + 4 * i as u64)?.into();
        }
        for (i, selector) in image.selectors.iter_mut().enumerate() {
            *selector = long(tss32::ES + 4 * i as u64)? as u16;
        }
        image.ldt = long(tss32::LDT)? as u16;
        image.trap = long(tss32::T)? & 1 != 0;
        return Ok(image);
    }
    let mut word = |at: u64| cpu.load_system::<u16>(cpu.system_address(base, at));
    image.ip = word(tss16::IP)?.into();
    image.flags = word(tss16::FLAGS)?.into();
    for (i, register) in image.gpr.iter_mut().enumerate() {
        // The upper halves are undefined behind a 16-bit TSS; hardware sets them.
        *register = 0xffff_0000 | u64::from(word(tss16::AX + 2 * i as u64)?);
    }
    for (i, selector) in image.selectors[..4].iter_mut().enumerate() {
        *selector = word(tss16::ES + 2 * i as u64)?;
    }
    image.ldt = word(tss16::LDT)?;
    Ok(image)
}

/// Writes the dynamic fields of a TSS.
fn save(cpu: &mut Cpu, base: u64, wide: bool, ip: u64, flags: u64) -> Result<(), Stop> {
    let gpr = cpu.gpr;
    let selectors = cpu.seg.map(|segment| segment.selector);
    if wide {
        let mut put = |at: u64, value: u64| cpu.store_system::<u32>(cpu.system_address(base, at), value as u32);
        put(tss32::EIP, ip)?;
        put(tss32::EFLAGS, flags)?;
        for (i, register) in gpr[..8].iter().enumerate() {
            put(tss32::EAX + 4 * i as u64, *register)?;
        }
        for (i, selector) in selectors.iter().enumerate() {
            // The word above each selector is reserved and stays.
            let at = cpu.system_address(base, tss32::ES + 4 * i as u64);
            cpu.store_system::<u16>(at, *selector)?;
        }
        return Ok(());
    }
    let mut put = |at: u64, value: u16| cpu.store_system::<u16>(cpu.system_address(base, at), value);
    put(tss16::IP, ip as u16)?;
    put(tss16::FLAGS, flags as u16)?;
    for (i, register) in gpr[..8].iter().enumerate() {
        put(tss16::AX + 2 * i as u64, *register as u16)?;
    }
    for (i, selector) in selectors[..4].iter().enumerate() {
        put(tss16::ES + 2 * i as u64, *selector)?;
    }
    Ok(())
}

/// The new task's state, and its segments checked in it.
fn begin(cpu: &mut Cpu, image: &Image, flags: u64, wide: bool, cause: Cause<'_>) -> Result<(), Stop> {
    cpu.rip = image.ip;
    cpu.gpr[..8].copy_from_slice(&image.gpr);
    cpu.set_rflags(flags);
    for (i, selector) in image.selectors.iter().enumerate() {
        cpu.seg[i] = Segment::null(*selector);
    }
    cpu.ldt = Segment::null(image.ldt);
    // Until CS is loaded the task runs nowhere; its faults are delivered with the rights of the level it asks for.
    cpu.cpl = if flags & VM != 0 { 3 } else { (image.selectors[Seg::Cs as usize] & 3) as u8 };
    cpu.seg[Seg::Ss as usize].dpl = cpu.cpl;
    cpu.derive();
    if wide && cpu.cr0.contains(Cr0::PG) {
        load_cr3(cpu, image.cr3)?;
    }
    load_ldt(cpu, Selector(image.ldt))?;
    if flags & VM != 0 {
        for (i, selector) in image.selectors.iter().enumerate() {
            cpu.seg[i] = Segment::virtual_8086(*selector);
        }
    } else {
        load_segments(cpu, image)?;
    }
    cpu.derive();
    if let Cause::Event(Event { error: Some(code), .. }) = cause {
        if wide {
            cpu.push(*code)?;
        } else {
            cpu.push(*code as u16)?;
        }
    }
    cpu.check_target(image.ip)
}

fn load_cr3(cpu: &mut Cpu, cr3: u64) -> Result<(), Stop> {
    cpu.cr3 = cr3;
    if cpu.cr4.contains(Cr4::PAE) {
        let Some(pdpte) = mmu::load_pdptes(&cpu.view, cr3, cpu.phys_bits) else {
            return Err(cpu.fault(Fault::gp(0)));
        };
        cpu.pdpte = pdpte;
    }
    cpu.flush_tlb();
    Ok(())
}

/// #TS(selector) unless it is null or names a present LDT in the GDT.
fn load_ldt(cpu: &mut Cpu, selector: Selector) -> Result<(), Stop> {
    if selector.is_null() {
        return Ok(());
    }
    cpu.require(!selector.ti(), Fault::ts, selector)?;
    let found = cpu.descriptor(selector, Fault::ts)?;
    let rights = found.raw.rights();
    let good = !rights.s() && rights.typ() == x86_defs::descriptor::system_type::LDT && rights.p();
    cpu.require(good, Fault::ts, selector)?;
    cpu.ldt = Segment::of(selector, found.raw);
    Ok(())
}

/// CS, SS and the data segments. SDM Vol. 3 "Exception Conditions Checked During a Task Switch".
fn load_segments(cpu: &mut Cpu, image: &Image) -> Result<(), Stop> {
    let selector = Selector(image.selectors[Seg::Cs as usize]);
    let cpl = selector.rpl();
    if selector.is_null() {
        return Err(cpu.fault(Fault::ts(selector.error_code())));
    }
    let found = cpu.descriptor(selector, Fault::ts)?;
    let rights = found.raw.rights();
    let level = if rights.is_conforming() { rights.dpl() <= cpl } else { rights.dpl() == cpl };
    cpu.require(rights.is_code() && level, Fault::ts, selector)?;
    cpu.require(rights.p(), Fault::np, selector)?;
    cpu.load_cs(selector, found, cpl)?;

    let selector = Selector(image.selectors[Seg::Ss as usize]);
    cpu.seg[Seg::Ss as usize] = cpu.stack_segment(selector, cpl, Fault::ts)?;

    for seg in [Seg::Ds, Seg::Es, Seg::Fs, Seg::Gs] {
        let selector = Selector(image.selectors[seg as usize]);
        cpu.seg[seg as usize] = cpu.data_segment(selector, cpl, Fault::ts)?;
    }
    Ok(())
}
