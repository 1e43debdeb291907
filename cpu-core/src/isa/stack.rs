//! PUSH POP PUSHA POPA ENTER LEAVE: the stack in all three address widths. PUSHF and POPF are with the system
//! instructions. SDM Vol. 2, the page of each mnemonic.
#![expect(unsafe_code, reason = "hot semantics run on the dispatch's raw CPU pointer")]

use std::marker::PhantomData;

use iced_x86::{Code as C, Mnemonic as M, Register};

use super::{Row, by_stack, codes, plain_handler, row};
use crate::cpu::{Cpu, Done, Stop, Then};
use crate::decode::digest::{Digest, Lowered, function};
use crate::host::HostWord;
use crate::op::{Form, Handler, Machine, Op, Semantics, Stored, To, attempt, handler};
use crate::state::{Gpr, Seg};

pub(super) const ROWS: &[Row] = &[
    codes(
        &[
            C::Push_r16,
            C::Push_r32,
            C::Push_r64,
            C::Push_rm16,
            C::Push_rm32,
            C::Push_rm64,
            C::Pushw_imm8,
            C::Push_imm16,
            C::Pushd_imm8,
            C::Pushd_imm32,
            C::Pushq_imm8,
            C::Pushq_imm32,
        ],
        push,
    ),
    codes(&[C::Pop_r16, C::Pop_r32, C::Pop_r64, C::Pop_rm16, C::Pop_rm32, C::Pop_rm64], pop),
    row(M::Pusha, function(pusha::<u16>)),
    row(M::Pushad, function(pusha::<u32>)),
    row(M::Popa, function(popa::<u16>)),
    row(M::Popad, function(popa::<u32>)),
    codes(&[C::Enterw_imm16_imm8], function(enter::<u16>)),
    codes(&[C::Enterd_imm16_imm8], function(enter::<u32>)),
    codes(&[C::Enterq_imm16_imm8], function(enter::<u64>)),
    codes(&[C::Leavew], function(leave::<u16>)),
    codes(&[C::Leaved], function(leave::<u32>)),
    codes(&[C::Leaveq], leave_64),
];

const RSP: u8 = Gpr::Rsp as u8 * 8;
const RBP: u8 = Gpr::Rbp as u8 * 8;

impl Cpu {
    /// RSP, ESP or SP moved by `delta`; what lies above the stack's address size stays.
    pub(crate) fn stack_pointer(&self, delta: i64) -> u64 {
        let mask = self.stack_mask();
        let rsp = self.reg(Gpr::Rsp);
        let moved = rsp.wrapping_add(delta as u64);
        if mask == 0xffff_ffff { moved & mask } else { rsp & !mask | moved & mask }
    }

    /// Stores `value` below the stack pointer and moves it.
    pub(crate) fn push<W: HostWord>(&mut self, value: W) -> Result<(), Stop> {
        let to = self.stack_pointer(-i64::from(W::BYTES));
        let offset = to & self.stack_mask();
        self.write(Seg::Ss, offset, value)?;
        self.set_reg(Gpr::Rsp, to);
        Ok(())
    }

    /// Loads from the stack at `at` bytes above its top, without moving it.
    pub(crate) fn peek<W: HostWord>(&mut self, at: u64) -> Result<W, Stop> {
        let offset = self.reg(Gpr::Rsp).wrapping_add(at) & self.stack_mask();
        self.read(Seg::Ss, offset)
    }

    /// Loads from the top of the stack and moves it.
    pub(crate) fn pop<W: HostWord>(&mut self) -> Result<W, Stop> {
        let value = self.peek(0)?;
        self.set_reg(Gpr::Rsp, self.stack_pointer(W::BYTES.into()));
        Ok(value)
    }
}

pub(super) struct PushReg64<F>(PhantomData<F>);
pub(super) struct PushImm64<F>(PhantomData<F>);
pub(super) struct PopReg64<F>(PhantomData<F>);

#[inline(always)]
pub(super) fn push_64<F: Form>(m: &mut Machine, value: u64) -> Result<Stored, To> {
    let to = m.get::<u64>(RSP).wrapping_sub(8);
    let stored = m.store::<F, u64>(to, value)?;
    m.put(RSP, to);
    Ok(stored)
}

impl<F: Form> Semantics for PushReg64<F> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let value = m.get(m.op().dst);
        attempt!(push_64::<F>(m, value)).then()
    }
}

impl<F: Form> Semantics for PushImm64<F> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let value = m.op().imm;
        attempt!(push_64::<F>(m, value)).then()
    }
}

impl<F: Form> Semantics for PopReg64<F> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let rsp = m.get::<u64>(RSP);
        let value = attempt!(m.load::<F, u64>(rsp));
        m.put(RSP, rsp.wrapping_add(8));
        // POP RSP keeps what it loaded.
        m.put(m.op().dst, value);
        To::Next
    }
}

/// The op of a stack instruction: its own accesses, if it makes any but the stack's, are through its memory operand.
fn on_stack(d: &Digest<'_>, h: Handler) -> Lowered {
    let mut lowered = d.lower(h);
    if !d.is_mem(0) {
        lowered.op.seg = lowered.op.seg & !7 | Seg::Ss as u8;
    }
    Lowered { reads_flags: false, barrier: true, ..lowered.keeps_flags() }
}

fn push(d: &Digest<'_>) -> Option<Lowered> {
    let bytes = d.ins.stack_pointer_increment().unsigned_abs();
    let h: Handler = match (bytes, d.mode.is_64bit()) {
        (8, true) if d.is_reg(0) => by_stack!(d, F => handler::<PushReg64<F>>),
        (8, true) if d.is_imm(0) => by_stack!(d, F => handler::<PushImm64<F>>),
        (2, _) => plain_handler(push_any::<u16>),
        (4, _) => plain_handler(push_any::<u32>),
        (8, _) => plain_handler(push_any::<u64>),
        _ => return None,
    };
    let mut lowered = on_stack(d, h);
    // `aux` tells `push_any` where the value is.
    lowered.op.aux = if d.is_mem(0) {
        FROM_MEMORY
    } else if d.is_imm(0) {
        FROM_IMMEDIATE
    } else {
        FROM_REGISTER
    };
    Some(lowered)
}

const FROM_REGISTER: u8 = 0;
const FROM_MEMORY: u8 = 1;
const FROM_IMMEDIATE: u8 = 2;

fn push_any<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let value = match op.aux {
        FROM_MEMORY => cpu.read_operand(op)?,
        FROM_IMMEDIATE => W::of(op.imm),
        _ => cpu.get(op.dst),
    };
    cpu.push(value)?;
    Ok(Then::Next)
}

fn pop(d: &Digest<'_>) -> Option<Lowered> {
    let bytes = d.ins.stack_pointer_increment().unsigned_abs();
    let h: Handler = match (bytes, d.is_mem(0)) {
        (8, false) if d.mode.is_64bit() => by_stack!(d, F => handler::<PopReg64<F>>),
        (2, false) => plain_handler(pop_reg::<u16>),
        (4, false) => plain_handler(pop_reg::<u32>),
        (2, true) => plain_handler(pop_mem::<u16>),
        (4, true) => plain_handler(pop_mem::<u32>),
        (8, true) => plain_handler(pop_mem::<u64>),
        _ => return None,
    };
    let mut lowered = on_stack(d, h);
    lowered.op.aux = u8::from(matches!(d.ins.memory_base(), Register::ESP | Register::RSP));
    Some(lowered)
}

fn pop_reg<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let value: W = cpu.pop()?;
    cpu.put(op.dst, value);
    Ok(Then::Next)
}

/// The address is computed after ESP has moved, if it is based on it. SDM Vol. 2 "POP".
fn pop_mem<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let value: W = cpu.peek(0)?;
    let old = cpu.reg(Gpr::Rsp);
    let moved = cpu.stack_pointer(W::BYTES.into());
    if op.aux != 0 {
        cpu.set_reg(Gpr::Rsp, moved);
    }
    if let Err(stop) = cpu.write_operand(op, value) {
        cpu.set_reg(Gpr::Rsp, old);
        return Err(stop);
    }
    cpu.set_reg(Gpr::Rsp, moved);
    Ok(Then::Next)
}

/// AX, CX, DX, BX, SP as it was, BP, SI, DI. SDM Vol. 2 "PUSHA/PUSHAD".
fn pusha<W: HostWord>(cpu: &mut Cpu, _: &Op) -> Done {
    let rsp = cpu.reg(Gpr::Rsp);
    for slot in 0..8 {
        let value = if slot * 8 == RSP { W::of(rsp) } else { cpu.get::<W>(slot * 8) };
        if let Err(stop) = cpu.push(value) {
            cpu.set_reg(Gpr::Rsp, rsp);
            return Err(stop);
        }
    }
    Ok(Then::Next)
}

/// The reverse of PUSHA, SP's image skipped. SDM Vol. 2 "POPA/POPAD".
fn popa<W: HostWord>(cpu: &mut Cpu, _: &Op) -> Done {
    let mut values = [W::of(0); 8];
    for (i, value) in values.iter_mut().enumerate() {
        *value = cpu.peek(i as u64 * u64::from(W::BYTES))?;
    }
    for (i, value) in values.into_iter().enumerate() {
        let slot = (7 - i as u8) * 8;
        if slot != RSP {
            cpu.put(slot, value);
        }
    }
    cpu.set_reg(Gpr::Rsp, cpu.stack_pointer(8 * i64::from(W::BYTES)));
    Ok(Then::Next)
}

/// SDM Vol. 2 "ENTER": `imm` bytes of locals, `aux` levels.
fn enter<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let (rsp, rbp) = (cpu.reg(Gpr::Rsp), cpu.reg(Gpr::Rbp));
    let result = enter_frames::<W>(cpu, op.imm & 0xffff, op.aux & 31);
    if result.is_err() {
        cpu.set_reg(Gpr::Rsp, rsp);
        cpu.set_reg(Gpr::Rbp, rbp);
    }
    result.map(|()| Then::Next)
}

fn enter_frames<W: HostWord>(cpu: &mut Cpu, locals: u64, levels: u8) -> Result<(), Stop> {
    let mask = cpu.stack_mask();
    cpu.push(cpu.get::<W>(RBP))?;
    let frame = cpu.reg(Gpr::Rsp);
    if levels > 0 {
        let mut display = cpu.reg(Gpr::Rbp);
        for _ in 1..levels {
            display = display.wrapping_sub(W::BYTES.into());
            let link: W = cpu.read(Seg::Ss, display & mask)?;
            cpu.push(link)?;
        }
        cpu.push(W::of(frame))?;
    }
    let to = cpu.stack_pointer(-(locals as i64));
    // The new top must be writable, although nothing is written there.
    let la = cpu.linear(Seg::Ss, to & mask, W::BYTES, true)?;
    cpu.probe_write(la, W::BYTES, Seg::Ss)?;
    cpu.set_reg(Gpr::Rsp, to);
    cpu.put(RBP, W::of(frame));
    Ok(())
}

/// SP ← BP, then POP BP. SDM Vol. 2 "LEAVE".
fn leave<W: HostWord>(cpu: &mut Cpu, _: &Op) -> Done {
    let mask = cpu.stack_mask();
    let rbp = cpu.reg(Gpr::Rbp);
    let value: W = cpu.read(Seg::Ss, rbp & mask)?;
    let moved = rbp.wrapping_add(W::BYTES.into());
    let rsp = cpu.reg(Gpr::Rsp);
    cpu.set_reg(Gpr::Rsp, if mask == 0xffff_ffff { moved & mask } else { rsp & !mask | moved & mask });
    cpu.put(RBP, value);
    Ok(Then::Next)
}

struct Leave64<F>(PhantomData<F>);
impl<F: Form> Semantics for Leave64<F> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let rbp = m.get::<u64>(RBP);
        let value = attempt!(m.load::<F, u64>(rbp));
        m.put(RSP, rbp.wrapping_add(8));
        m.put(RBP, value);
        To::Next
    }
}

fn leave_64(d: &Digest<'_>) -> Option<Lowered> {
    Some(on_stack(d, by_stack!(d, F => handler::<Leave64<F>>)))
}
