//! Far JMP, CALL, RET and IRET: new CS, often a new privilege level, stack or task. SDM Vol. 2, the Operation section of each
//! mnemonic, in its order; checks that only move between tables of the same fault are merged.

use iced_x86::Code as C;
use x86_defs::descriptor::system_type as system;
use x86_defs::{AccessRights, Gate, Rflags, Selector};

use super::{Row, codes};
use crate::cpu::{Cpu, Done, Stop, Then};
use crate::decode::digest::function_ends;
use crate::event::task::{self, Cause};
use crate::fault::Fault;
use crate::host::HostWord;
use crate::op::Op;
use crate::protect::{Found, is_available_tss};
use crate::state::{Gpr, Seg, Segment};

pub(super) const ROWS: &[Row] = &[
    codes(&[C::Jmp_ptr1616, C::Jmp_ptr1632], function_ends(jmp_immediate)),
    codes(&[C::Jmp_m1616], function_ends(jmp_memory::<u16>)),
    codes(&[C::Jmp_m1632], function_ends(jmp_memory::<u32>)),
    codes(&[C::Jmp_m1664], function_ends(jmp_memory::<u64>)),
    codes(&[C::Call_ptr1616], function_ends(call_immediate::<u16>)),
    codes(&[C::Call_ptr1632], function_ends(call_immediate::<u32>)),
    codes(&[C::Call_m1616], function_ends(call_memory::<u16>)),
    codes(&[C::Call_m1632], function_ends(call_memory::<u32>)),
    codes(&[C::Call_m1664], function_ends(call_memory::<u64>)),
    codes(&[C::Retfw, C::Retfw_imm16], function_ends(ret::<u16>)),
    codes(&[C::Retfd, C::Retfd_imm16], function_ends(ret::<u32>)),
    codes(&[C::Retfq, C::Retfq_imm16], function_ends(ret::<u64>)),
    codes(&[C::Iretw], function_ends(iret::<u16>)),
    codes(&[C::Iretd], function_ends(iret::<u32>)),
    codes(&[C::Iretq], function_ends(iret::<u64>)),
];

fn jmp_immediate(cpu: &mut Cpu, op: &Op) -> Done {
    jmp(cpu, op, (op.imm >> 32) as u16, op.imm & 0xffff_ffff)
}

fn jmp_memory<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let (offset, selector) = cpu.far_operand::<W>(op)?;
    jmp(cpu, op, selector, offset.zext())
}

fn call_immediate<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    call::<W>(cpu, op, (op.imm >> 32) as u16, op.imm & 0xffff_ffff)
}

fn call_memory<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let (offset, selector) = cpu.far_operand::<W>(op)?;
    call::<W>(cpu, op, selector, offset.zext())
}

/// What a selector of a far JMP or CALL leads to, its own privilege checks done.
enum Target {
    /// A code segment, at the CPL in the second place.
    Code(Found, u8),
    /// Through a call gate.
    Gate(Gate),
    /// A TSS, directly or through a task gate.
    Task(Selector, Found),
}

impl Cpu {
    /// The part that far JMP and far CALL share in protected mode.
    fn far_destination(&mut self, selector: Selector) -> Result<Target, Stop> {
        if selector.is_null() {
            return Err(self.fault(Fault::gp(0)));
        }
        let found = self.descriptor(selector, Fault::gp)?;
        let rights = found.raw.rights();
        if rights.s() {
            let reachable = if rights.is_conforming() {
                rights.dpl() <= self.cpl
            } else {
                selector.rpl() <= self.cpl && rights.dpl() == self.cpl
            };
            self.require(self.is_code_descriptor(found.raw) && reachable, Fault::gp, selector)?;
            self.require(rights.p(), Fault::np, selector)?;
            return Ok(Target::Code(found, self.cpl));
        }
        let long = self.is_long();
        let visible = rights.dpl() >= self.cpl && rights.dpl() >= selector.rpl();
        match rights.typ() {
            system::CALL_GATE32 if long => {
                let upper = self.upper_half(selector, &found, Fault::gp)?;
                self.require(visible && Gate::upper_type(upper) == 0, Fault::gp, selector)?;
                self.require(rights.p(), Fault::np, selector)?;
                Ok(Target::Gate(Gate::from_16(found.raw.0, upper)))
            }
            system::CALL_GATE16 | system::CALL_GATE32 if !long => {
                self.require(visible, Fault::gp, selector)?;
                self.require(rights.p(), Fault::np, selector)?;
                Ok(Target::Gate(Gate::from_8(found.raw.0)))
            }
            system::TASK_GATE if !long => {
                self.require(visible, Fault::gp, selector)?;
                self.require(rights.p(), Fault::np, selector)?;
                let tss = Gate::from_8(found.raw.0).selector;
                let found = self.task_of_gate(tss, Fault::gp)?;
                Ok(Target::Task(tss, found))
            }
            typ if !long && is_available_tss(typ, false) => {
                self.require(visible, Fault::gp, selector)?;
                self.require(rights.p(), Fault::np, selector)?;
                Ok(Target::Task(selector, found))
            }
            _ => Err(self.fault(Fault::gp(selector.error_code()))),
        }
    }

    /// The TSS that a task gate names: in the GDT, available, present.
    pub(crate) fn task_of_gate(&mut self, tss: Selector, report: crate::protect::Report) -> Result<Found, Stop> {
        self.require(!tss.ti(), report, tss)?;
        let found = self.descriptor(tss, report)?;
        let rights = found.raw.rights();
        self.require(!rights.s() && is_available_tss(rights.typ(), false), report, tss)?;
        self.require(rights.p(), Fault::np, tss)?;
        Ok(found)
    }

    /// The code segment behind a call gate, for a transfer that may (`inward`) raise privilege.
    fn gate_code(&mut self, gate: &Gate, inward: bool) -> Result<Found, Stop> {
        let selector = gate.selector;
        if selector.is_null() {
            return Err(self.fault(Fault::gp(0)));
        }
        let found = self.descriptor(selector, Fault::gp)?;
        let rights = found.raw.rights();
        let reachable =
            if rights.is_conforming() || inward { rights.dpl() <= self.cpl } else { rights.dpl() == self.cpl };
        let kind = rights.is_code() && (!self.is_long() || rights.l() && !rights.db());
        self.require(kind && reachable, Fault::gp, selector)?;
        self.require(rights.p(), Fault::np, selector)?;
        Ok(found)
    }

    /// A task switch by JMP, CALL or IRET. A fault of the new task is reported there: the instruction is done.
    fn switch_task(&mut self, op: &Op, selector: Selector, found: Found, cause: Cause<'_>) -> Done {
        let next = self.next_ip(op);
        self.suppress_step = true;
        let _in_new_task = task::switch(self, selector, found, cause, next)?;
        self.keep_rf = true;
        Ok(Then::Jump)
    }

    /// CS in real-address and virtual-8086 mode; RIP must be inside it.
    fn far_real(&mut self, selector: u16, ip: u64) -> Result<(), Stop> {
        self.load_real_segment(Seg::Cs, selector);
        self.derive();
        self.far_target(ip)
    }

    /// CS as far transfers load it, and RIP inside it.
    fn loads_cs(&mut self, selector: Selector, found: Found, cpl: u8, ip: u64) -> Result<(), Stop> {
        self.load_cs(selector, found, cpl)?;
        self.derive();
        self.far_target(ip)
    }
}

/// SDM Vol. 2 "JMP", far.
fn jmp(cpu: &mut Cpu, op: &Op, selector: u16, ip: u64) -> Done {
    if !cpu.is_protected() {
        cpu.attempt(|cpu| cpu.far_real(selector, ip))?;
        return Ok(Then::Jump);
    }
    let selector = Selector(selector);
    match cpu.far_destination(selector)? {
        Target::Code(found, cpl) => cpu.attempt(|cpu| cpu.loads_cs(selector, found, cpl, ip))?,
        Target::Gate(gate) => {
            let found = cpu.gate_code(&gate, false)?;
            let cpl = cpu.cpl;
            cpu.attempt(|cpu| cpu.loads_cs(gate.selector, found, cpl, gate.offset))?;
        }
        Target::Task(tss, found) => return cpu.switch_task(op, tss, found, Cause::Jump),
    }
    Ok(Then::Jump)
}

/// SDM Vol. 2 "CALL", far.
fn call<W: HostWord>(cpu: &mut Cpu, op: &Op, selector: u16, ip: u64) -> Done {
    let back = cpu.next_ip(op);
    let old_cs = u64::from(cpu.seg[Seg::Cs as usize].selector);
    if !cpu.is_protected() {
        cpu.attempt(|cpu| {
            cpu.push(W::of(old_cs))?;
            cpu.push(W::of(back))?;
            cpu.far_real(selector, ip)
        })?;
        return Ok(Then::Jump);
    }
    let selector = Selector(selector);
    match cpu.far_destination(selector)? {
        Target::Code(found, cpl) => cpu.attempt(|cpu| {
            // The stack pointer has the width of the mode that is left.
            cpu.push(W::of(old_cs))?;
            cpu.push(W::of(back))?;
            cpu.loads_cs(selector, found, cpl, ip)
        })?,
        Target::Gate(gate) => {
            let found = cpu.gate_code(&gate, true)?;
            let rights = found.raw.rights();
            if !rights.is_conforming() && rights.dpl() < cpu.cpl {
                cpu.attempt(|cpu| call_inward(cpu, &gate, found, back))?;
            } else {
                cpu.attempt(|cpu| call_gate_level(cpu, &gate, found, back))?;
            }
        }
        Target::Task(tss, found) => return cpu.switch_task(op, tss, found, Cause::Call),
    }
    Ok(Then::Jump)
}

/// "SAME-PRIVILEGE" of a call gate: the gate's size decides what is pushed.
fn call_gate_level(cpu: &mut Cpu, gate: &Gate, found: Found, back: u64) -> Result<(), Stop> {
    let old_cs = u64::from(cpu.seg[Seg::Cs as usize].selector);
    let cpl = cpu.cpl;
    if cpu.is_long() {
        // The pushes happen as 64-bit code, whose stack pointer is RSP.
        cpu.load_cs(gate.selector, found, cpl)?;
        cpu.derive();
        cpu.push(old_cs)?;
        cpu.push(back)?;
        return cpu.far_target(gate.offset);
    }
    if gate.typ() == system::CALL_GATE32 {
        cpu.push(old_cs as u32)?;
        cpu.push(back as u32)?;
    } else {
        cpu.push(old_cs as u16)?;
        cpu.push(back as u16)?;
    }
    cpu.loads_cs(gate.selector, found, cpl, gate.offset)
}

/// "MORE-PRIVILEGE": a new stack from the TSS, the old one and the parameters on it.
fn call_inward(cpu: &mut Cpu, gate: &Gate, found: Found, back: u64) -> Result<(), Stop> {
    let cpl = found.raw.rights().dpl();
    let old_cs = u64::from(cpu.seg[Seg::Cs as usize].selector);
    let old_ss = u64::from(cpu.seg[Seg::Ss as usize].selector);
    let old_rsp = cpu.reg(Gpr::Rsp);
    if cpu.is_long() {
        let rsp = cpu.stack_pointer_64(cpl, 0)?;
        cpu.load_cs(gate.selector, found, cpl)?;
        cpu.seg[Seg::Ss as usize] = Segment { dpl: cpl, ..Segment::null(cpl.into()) };
        cpu.set_reg(Gpr::Rsp, rsp);
        cpu.derive();
        for value in [old_ss, old_rsp, old_cs, back] {
            cpu.push(value)?;
        }
        return cpu.far_target(gate.offset);
    }
    let wide = gate.typ() == system::CALL_GATE32;
    let (ss, esp) = cpu.inner_stack(cpl)?;
    let count = u64::from(gate.parameters);
    let bytes = (4 + count) * if wide { 4 } else { 2 };
    if !has_room(&ss, esp, bytes) {
        return Err(cpu.fault(Fault::ss(Selector(ss.selector).error_code())));
    }
    let mut parameters = [0u32; 31];
    for (i, parameter) in parameters[..count as usize].iter_mut().enumerate() {
        let i = i as u64;
        *parameter = if wide { cpu.peek::<u32>(4 * i)? } else { cpu.peek::<u16>(2 * i)?.into() };
    }
    cpu.load_cs(gate.selector, found, cpl)?;
    cpu.seg[Seg::Ss as usize] = ss;
    cpu.load_stack_pointer(esp);
    cpu.derive();
    let all = [old_ss, old_rsp]
        .into_iter()
        .chain(parameters[..count as usize].iter().rev().map(|parameter| u64::from(*parameter)))
        .chain([old_cs, back]);
    for value in all {
        if wide {
            cpu.push(value as u32)?;
        } else {
            cpu.push(value as u16)?;
        }
    }
    cpu.far_target(gate.offset)
}

/// Whether `bytes` can be pushed below `esp` on a stack segment that is not loaded yet.
pub(crate) fn has_room(ss: &Segment, esp: u64, bytes: u64) -> bool {
    let top = if ss.db { 0xffff_ffff } else { 0xffff };
    let last = (esp & top).wrapping_sub(1) & top;
    let first = (esp & top).wrapping_sub(bytes) & top;
    if first > last {
        // Wrapped: only a stack that spans everything holds both ends.
        return !ss.is_expand_down() && u64::from(ss.limit) >= top;
    }
    if ss.is_expand_down() { first > u64::from(ss.limit) } else { last <= u64::from(ss.limit) }
}

impl Cpu {
    /// ESP or SP as SS's B flag says; 64-bit code has all of RSP.
    pub(crate) fn load_stack_pointer(&mut self, value: u64) {
        let mask = self.stack_mask();
        let old = self.reg(Gpr::Rsp);
        self.set_reg(Gpr::Rsp, if mask == 0xffff { old & !mask | value & mask } else { value & mask });
    }

    /// A privilege level's stack, from the current TSS (SDM Vol. 3 "Stack Switching"): SS checked, SP as it was read.
    pub(crate) fn inner_stack(&mut self, cpl: u8) -> Result<(Segment, u64), Stop> {
        let tss = self.tr;
        let (selector, esp) = if tss.type_ & 8 != 0 {
            let at = u64::from(cpl) * 8 + 4;
            self.tss_holds(at + 5)?;
            let esp = self.load_system::<u32>(self.system_address(tss.base, at))?;
            (self.load_system::<u16>(self.system_address(tss.base, at + 4))?, u64::from(esp))
        } else {
            let at = u64::from(cpl) * 4 + 2;
            self.tss_holds(at + 3)?;
            let sp = self.load_system::<u16>(self.system_address(tss.base, at))?;
            (self.load_system::<u16>(self.system_address(tss.base, at + 2))?, u64::from(sp))
        };
        let selector = Selector(selector);
        if selector.is_null() {
            return Err(self.fault(Fault::ts(0)));
        }
        Ok((self.stack_segment(selector, cpl, Fault::ts)?, esp))
    }

    /// RSP of a privilege level, or of interrupt stack `ist` if it is not 0, from the 64-bit TSS.
    pub(crate) fn stack_pointer_64(&mut self, cpl: u8, ist: u8) -> Result<u64, Stop> {
        let at = if ist != 0 { 36 + 8 * (u64::from(ist) - 1) } else { 4 + 8 * u64::from(cpl) };
        self.tss_holds(at + 7)?;
        let rsp = self.load_system::<u64>(self.system_address(self.tr.base, at))?;
        if self.is_canonical(rsp) { Ok(rsp) } else { Err(self.fault(Fault::ss(0))) }
    }

    /// #TS(current TSS) where the TSS ends before offset `last`.
    fn tss_holds(&mut self, last: u64) -> Result<(), Stop> {
        let selector = Selector(self.tr.selector);
        self.require(last <= u64::from(self.tr.limit), Fault::ts, selector)
    }

    /// Loads and checks a return's code selector: RET and IRET agree but for NT and VM.
    fn return_code(&mut self, selector: Selector) -> Result<Found, Stop> {
        if selector.is_null() {
            return Err(self.fault(Fault::gp(0)));
        }
        let found = self.descriptor(selector, Fault::gp)?;
        let rights: AccessRights = found.raw.rights();
        let level =
            if rights.is_conforming() { rights.dpl() <= selector.rpl() } else { rights.dpl() == selector.rpl() };
        let good = self.is_code_descriptor(found.raw) && selector.rpl() >= self.cpl && level;
        self.require(good, Fault::gp, selector)?;
        self.require(rights.p(), Fault::np, selector)?;
        Ok(found)
    }

    /// SS of a return to privilege level `cpl`, CS being loaded already.
    fn return_stack(&mut self, selector: Selector, cpl: u8) -> Result<(), Stop> {
        // `is_64bit` looks at the new CS: only 64-bit code may have a null SS.
        self.seg[Seg::Ss as usize] = self.stack_segment(selector, cpl, Fault::gp)?;
        Ok(())
    }
}

/// SDM Vol. 2 "RET", far. `imm`: bytes of parameters to release, on both stacks where there are two.
fn ret<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let release = (op.imm & 0xffff) as i64;
    let size = i64::from(W::BYTES);
    let ip = cpu.peek::<W>(0)?.zext();
    let selector = cpu.peek::<W>(size as u64)?.zext() as u16;
    let popped = cpu.stack_pointer(2 * size + release);
    if !cpu.is_protected() {
        cpu.attempt(|cpu| {
            cpu.set_reg(Gpr::Rsp, popped);
            cpu.far_real(selector, ip)
        })?;
        return Ok(Then::Jump);
    }
    let selector = Selector(selector);
    let found = cpu.return_code(selector)?;
    if selector.rpl() == cpu.cpl {
        let cpl = cpu.cpl;
        cpu.attempt(|cpu| {
            cpu.set_reg(Gpr::Rsp, popped);
            cpu.loads_cs(selector, found, cpl, ip)
        })?;
        return Ok(Then::Jump);
    }
    let behind = (2 * size + release) as u64;
    let esp = cpu.peek::<W>(behind)?.zext();
    let ss = cpu.peek::<W>(behind + size as u64)?.zext() as u16;
    cpu.attempt(|cpu| {
        cpu.load_cs(selector, found, selector.rpl())?;
        cpu.return_stack(Selector(ss), selector.rpl())?;
        cpu.derive();
        cpu.far_target(ip)?;
        cpu.load_stack_pointer(esp);
        cpu.set_reg(Gpr::Rsp, cpu.stack_pointer(release));
        cpu.drop_inner_segments();
        Ok(())
    })?;
    Ok(Then::Jump)
}

const IF: u64 = Rflags::IF.bits();
const TF: u64 = Rflags::TF.bits();
const VM: u64 = Rflags::VM.bits();

/// SDM Vol. 2 "IRET/IRETD/IRETQ". NMIs are unblocked even if it faults (Vol. 3 "Handling Multiple NMIs").
fn iret<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let nt = cpu.rflags & Rflags::NT.bits() != 0;
    cpu.events.nmi_masked = false;
    if cpu.is_protected() && nt {
        if cpu.is_long() {
            return Err(cpu.fault(Fault::gp(0)));
        }
        let link = cpu.load_system::<u16>(cpu.system_address(cpu.tr.base, 0))?;
        let selector = Selector(link);
        cpu.require(!selector.ti(), Fault::ts, selector)?;
        let found = cpu.descriptor(selector, Fault::ts)?;
        let rights = found.raw.rights();
        let busy = matches!(rights.typ(), system::TSS16_BUSY | system::TSS32_BUSY);
        cpu.require(!rights.s() && busy, Fault::ts, selector)?;
        cpu.require(rights.p(), Fault::np, selector)?;
        return cpu.switch_task(op, selector, found, Cause::Iret);
    }
    let size = u64::from(W::BYTES);
    let ip = cpu.peek::<W>(0)?.zext();
    let selector = cpu.peek::<W>(size)?.zext() as u16;
    let image = cpu.peek::<W>(2 * size)?.zext();
    let popped = cpu.stack_pointer(3 * size as i64);
    if cpu.is_real() {
        cpu.attempt(|cpu| {
            cpu.set_reg(Gpr::Rsp, popped);
            cpu.far_real(selector, ip)?;
            // SDM: 16-bit FLAGS whole; of EFLAGS what 257FD5H selects, VM, VIF and VIP stay.
            let loaded = if W::BYTES == 2 { 0x7fd5 } else { 0x25_7fd5 };
            let new = cpu.rflags() & !loaded | image & loaded;
            cpu.set_rflags(new);
            Ok(())
        })?;
    } else if cpu.is_v86() {
        let rflags = v86_image::<W>(cpu, image)?;
        cpu.attempt(|cpu| {
            cpu.set_reg(Gpr::Rsp, popped);
            cpu.far_real(selector, ip)?;
            cpu.set_rflags(rflags);
            Ok(())
        })?;
    } else if W::BYTES == 4 && image & VM != 0 && cpu.cpl == 0 && !cpu.is_long() {
        return_to_v86(cpu, selector, ip, image)?;
    } else {
        return_protected::<W>(cpu, Selector(selector), ip, image)?;
    }
    cpu.serialize();
    cpu.keep_rf = true;
    Ok(Then::Jump)
}

/// RFLAGS that IRET in virtual-8086 mode loads: IOPL, VM, VIF and VIP stay.
fn v86_image<W: HostWord>(cpu: &mut Cpu, image: u64) -> Result<u64, Stop> {
    if cpu.iopl() == 3 {
        let loaded = if W::BYTES == 2 { 0x4fd5 } else { 0x25_4fd5 };
        return Ok(cpu.rflags() & !loaded | image & loaded);
    }
    if W::BYTES == 2 && cpu.cr4.contains(x86_defs::Cr4::VME) {
        return cpu.load_virtual_image(image);
    }
    Err(cpu.fault(Fault::gp(0)))
}

/// "RETURN-TO-VIRTUAL-8086-MODE": nine doublewords.
fn return_to_v86(cpu: &mut Cpu, selector: u16, ip: u64, image: u64) -> Result<(), Stop> {
    let esp = cpu.peek::<u32>(12)?;
    let mut selectors = [0u16; 5];
    for (i, selector) in selectors.iter_mut().enumerate() {
        *selector = cpu.peek::<u32>(16 + 4 * i as u64)? as u16;
    }
    cpu.attempt(|cpu| {
        cpu.set_rflags(image);
        cpu.cpl = 3;
        cpu.seg[Seg::Cs as usize] = Segment::virtual_8086(selector);
        for (seg, selector) in [Seg::Ss, Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs].into_iter().zip(selectors) {
            cpu.seg[seg as usize] = Segment::virtual_8086(selector);
        }
        cpu.derive();
        cpu.far_target(ip & 0xffff_ffff)?;
        cpu.set_reg(Gpr::Rsp, esp.into());
        Ok(())
    })
}

/// "PROTECTED-MODE-RETURN" and "IA-32e-MODE-RETURN".
fn return_protected<W: HostWord>(cpu: &mut Cpu, selector: Selector, ip: u64, image: u64) -> Result<(), Stop> {
    let size = u64::from(W::BYTES);
    let old_cpl = cpu.cpl;
    let found = cpu.return_code(selector)?;
    let cpl = selector.rpl();
    // 64-bit code pops SS:RSP whatever the privilege.
    let with_stack = cpl != old_cpl || cpu.is_64bit();
    let (esp, ss) =
        if with_stack { (cpu.peek::<W>(3 * size)?.zext(), cpu.peek::<W>(4 * size)?.zext() as u16) } else { (0, 0) };
    let popped = cpu.stack_pointer(3 * size as i64);
    cpu.attempt(|cpu| {
        cpu.load_cs(selector, found, cpl)?;
        if with_stack {
            cpu.return_stack(Selector(ss), cpl)?;
        }
        cpu.derive();
        cpu.far_target(ip)?;
        if with_stack {
            cpu.load_stack_pointer(esp);
        } else {
            cpu.set_reg(Gpr::Rsp, popped);
        }
        let mut loaded = Rflags::STATUS.bits() | TF | (Rflags::DF | Rflags::NT).bits();
        if W::BYTES > 2 {
            loaded |= (Rflags::RF | Rflags::AC | Rflags::ID).bits();
        }
        if old_cpl <= cpu.iopl() {
            loaded |= IF;
        }
        if old_cpl == 0 {
            loaded |= Rflags::IOPL.bits();
            if W::BYTES > 2 {
                loaded |= (Rflags::VIF | Rflags::VIP).bits();
            }
        }
        let new = cpu.rflags() & !loaded | image & loaded;
        cpu.set_rflags(new);
        if cpl != old_cpl {
            cpu.drop_inner_segments();
        }
        Ok(())
    })
}
