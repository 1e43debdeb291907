//! How an x87 instruction runs: operands out of the stack, the host's instruction, results back, pointers kept.

use crate::access::By;
use crate::cpu::{Cpu, Done, Stop, Then};
use crate::decode::digest::{Digest, Lowered};
use crate::flags::Flags;
use crate::host_x87::{Frame, Memory, Writes, X87, forget_flags};
use crate::isa::plain_handler;
use crate::isa::simd::keeps;
use crate::isa::x87::EXCEPTIONS;
use crate::op::Op;
use crate::state::{Fpu, Seg};

const TOP: u16 = 7 << 11;
/// FCW: precision and rounding control, and the masks.
const FCW_CONTROL: u16 = 0xf3f;
/// Extended precision, round to nearest, everything masked.
const FCW_USUAL: u16 = 0x33f;
/// IE DE ZE OE UE: unmasked, they keep a store from happening.
const NO_STORE: u16 = 0x1f;

impl Fpu {
    /// Rn, by distance from TOP, is not empty.
    #[inline(always)]
    pub(super) fn is_full(&self, i: u8) -> bool {
        self.ftw >> self.physical(i) & 1 != 0
    }

    /// Sets the tag of ST(i).
    pub(super) fn set_full(&mut self, i: u8, full: bool) {
        let bit = 1 << self.physical(i);
        self.ftw = if full { self.ftw | bit } else { self.ftw & !bit };
    }

    /// Writes ST(i) and marks it valid.
    pub(super) fn set_st(&mut self, i: u8, value: [u8; 16]) {
        let register = self.physical(i);
        self.st[register] = value;
        self.ftw |= 1 << register;
    }

    /// ST(i), whatever its tag.
    pub(super) fn st_at(&self, i: u8) -> [u8; 16] {
        self.st[self.physical(i)]
    }

    /// Moves TOP by `by` registers, modulo 8.
    pub(super) fn move_top(&mut self, by: u8) {
        self.fsw = self.fsw & !TOP | u16::from(self.top().wrapping_add(by) & 7) << 11;
    }

    /// Empties ST(0) and pops it.
    pub(super) fn pop(&mut self) {
        self.set_full(0, false);
        self.move_top(1);
    }
}

/// What an instruction did to the stack, in terms of the registers that it saw.
pub(super) struct Outcome {
    /// FSW, with the guest's TOP from before.
    fsw: u16,
    /// How far TOP went: 0, 1 or 2 pops, 7 for a push.
    moved: u8,
    /// ST(0), the other register: not empty afterwards.
    full: [bool; 2],
}

/// Runs `I` on ST(0) and ST(i). The memory operand is in `frame.memory`, and comes back there.
pub(super) fn run<I: X87>(fpu: &Fpu, i: u8, frame: &mut Frame) -> Outcome {
    frame.a = fpu.st_at(0);
    frame.b = fpu.st_at(i);
    let inputs = (I::INPUTS < 1 || fpu.is_full(0)) && (I::INPUTS < 2 || fpu.is_full(i));
    let room = I::OUTPUTS <= I::INPUTS || !fpu.is_full(7);
    if !(I::FAST && inputs && room && fpu.fcw & EXCEPTIONS == EXCEPTIONS) {
        return run_whole::<I>(fpu, i, frame);
    }
    if fpu.fcw & FCW_CONTROL == FCW_USUAL {
        I::fast(frame);
    } else {
        frame.cw = fpu.fcw;
        I::fast_under(frame);
    }
    Outcome {
        fsw: fpu.fsw & !I::CC | frame.sw & (I::CC | EXCEPTIONS),
        moved: I::INPUTS.wrapping_sub(I::OUTPUTS) & 7,
        full: [true; 2],
    }
}

/// As [`run`], whatever tags and masks say. In the image TOP is 0: R0 is ST(0), R1 is ST(i), R7 is ST(7).
pub(super) fn run_whole<I: X87>(fpu: &Fpu, i: u8, frame: &mut Frame) -> Outcome {
    const REGISTERS: usize = 28;
    let full = [fpu.is_full(0), fpu.is_full(i)];
    let tag = |full: bool, register: u32| (u16::from(!full) * 3) << (2 * register);
    let tags = tag(full[0], 0) | tag(full[1], 1) | tag(fpu.is_full(7), 7) | 0x3ff0;
    frame.image = [0; 112];
    frame.image[0..2].copy_from_slice(&fpu.fcw.to_le_bytes());
    frame.image[4..6].copy_from_slice(&(fpu.fsw & !TOP).to_le_bytes());
    frame.image[8..10].copy_from_slice(&tags.to_le_bytes());
    for (register, value) in [(0, frame.a), (1, frame.b), (7, fpu.st_at(7))] {
        frame.image[REGISTERS + 10 * register..][..10].copy_from_slice(&value[..10]);
    }
    I::whole(frame);
    let word = |at: usize| u16::from_le_bytes([frame.image[at], frame.image[at + 1]]);
    let (fsw, tags) = (word(4), word(8));
    let top = usize::from(fsw >> 11 & 7);
    let register = |n: usize| {
        let mut value = [0; 16];
        value[..10].copy_from_slice(&frame.image[REGISTERS + 10 * ((n + 8 - top) & 7)..][..10]);
        value
    };
    (frame.r0, frame.r1) = match top {
        0 => (register(0), register(1)),
        7 => (register(7), register(0)),
        _ => (register(1), [0; 16]),
    };
    let full = [tags & 3 != 3, tags >> 2 & 3 != 3];
    Outcome { fsw: fsw & !TOP | fpu.fsw & TOP, moved: top as u8, full }
}

/// Puts the results where they belong.
pub(super) fn commit<I: X87>(fpu: &mut Fpu, i: u8, frame: &Frame, outcome: &Outcome) {
    fpu.fsw = outcome.fsw;
    match outcome.moved {
        0 => {
            if matches!(I::WRITES, Writes::Sti | Writes::Both) {
                fpu.set_st(i, frame.r1);
                fpu.set_full(i, outcome.full[1]);
            }
            if matches!(I::WRITES, Writes::St0 | Writes::Both) && I::OUTPUTS <= I::INPUTS {
                fpu.set_st(0, frame.r0);
                fpu.set_full(0, outcome.full[0]);
            }
        }
        7 => {
            if I::INPUTS == 1 {
                fpu.set_st(0, frame.r1);
                fpu.set_full(0, outcome.full[0]);
            }
            fpu.move_top(7);
            fpu.set_st(0, frame.r0);
        }
        pops => {
            if I::WRITES == Writes::Sti {
                fpu.set_st(i, frame.r0);
                fpu.set_full(i, outcome.full[1]);
            }
            for _ in 0..pops {
                fpu.pop();
            }
        }
    }
    fpu.settle_summary();
}

impl Cpu {
    /// Remembers where the last x87 instruction was (SDM Vol. 1 "x87 FPU Instruction and Data (Operand) Pointers").
    pub(super) fn note_x87(&mut self, op: &Op, memory: bool) {
        self.fpu.fip = self.ip_of(op);
        self.fpu.fcs = self.seg[Seg::Cs as usize].selector;
        self.fpu.fop = op.imm as u16;
        if memory {
            self.fpu.fdp = self.ea(op);
            self.fpu.fds = self.seg[op.segment() as usize].selector;
        }
    }

    /// Loads a memory operand of 2, 4, 8 or 10 bytes.
    pub(super) fn load_x87(&mut self, op: &Op) -> Result<[u8; 16], Stop> {
        let mut bytes = [0; 16];
        match op.aux {
            2 => bytes[..2].copy_from_slice(&self.read_operand::<u16>(op)?.to_le_bytes()),
            4 => bytes[..4].copy_from_slice(&self.read_operand::<u32>(op)?.to_le_bytes()),
            8 => bytes[..8].copy_from_slice(&self.read_operand::<u64>(op)?.to_le_bytes()),
            // Two accesses, as the host makes: the limit of the second is looked at behind the first.
            _ => {
                let (seg, at) = (op.segment(), self.ea(op));
                bytes[..8].copy_from_slice(&self.read::<u64>(seg, at)?.to_le_bytes());
                let above = at.wrapping_add(8) & op.address_mask();
                bytes[8..10].copy_from_slice(&self.read::<u16>(seg, above)?.to_le_bytes());
            }
        }
        Ok(bytes)
    }

    /// Faults as the store of the memory operand would.
    fn probe_x87(&mut self, op: &Op) -> Result<(), Stop> {
        let (seg, at) = (op.segment(), self.ea(op));
        let first = u32::from(op.aux).min(8);
        let la = self.linear(seg, at, first, true)?;
        self.check_span(la, first, seg)?;
        self.check_alignment(la, first, By::Code)?;
        self.probe_write(la, first, seg)?;
        if op.aux > 8 {
            let la = self.linear(seg, at.wrapping_add(8) & op.address_mask(), 2, true)?;
            self.probe_write(la, 2, seg)?;
        }
        Ok(())
    }

    /// Stores a memory operand of 2, 4, 8 or 10 bytes.
    pub(super) fn store_x87(&mut self, op: &Op, bytes: &[u8; 16]) -> Result<(), Stop> {
        let value = u128::from_le_bytes(*bytes);
        match op.aux {
            2 => self.write_operand(op, value as u16),
            4 => self.write_operand(op, value as u32),
            8 => self.write_operand(op, value as u64),
            _ => {
                let (seg, at) = (op.segment(), self.ea(op));
                let above = at.wrapping_add(8) & op.address_mask();
                self.probe_x87(op)?;
                self.write(seg, at, value as u64)?;
                self.write(seg, above, (value >> 64) as u16)
            }
        }
    }
}

/// An instruction whose row says all of it.
fn execute<I: X87>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.wait_x87()?;
    finish::<I>(cpu, op, run::<I>)
}

/// As [`execute`], on the whole image: for what a software path leaves to the host.
pub(super) fn execute_whole<I: X87>(cpu: &mut Cpu, op: &Op) -> Done {
    finish::<I>(cpu, op, run_whole_loaded::<I>)
}

fn run_whole_loaded<I: X87>(fpu: &Fpu, i: u8, frame: &mut Frame) -> Outcome {
    frame.a = fpu.st_at(0);
    frame.b = fpu.st_at(i);
    run_whole::<I>(fpu, i, frame)
}

fn finish<I: X87>(cpu: &mut Cpu, op: &Op, run: fn(&Fpu, u8, &mut Frame) -> Outcome) -> Done {
    let mut frame = Frame::new();
    if I::MEMORY == Memory::Load {
        frame.memory = cpu.load_x87(op)?;
    }
    let outcome = run(&cpu.fpu, op.src, &mut frame);
    let unmasked = outcome.fsw & !cpu.fpu.fcw;
    if I::MEMORY == Memory::Store {
        // Rights are checked even where an unmasked exception keeps the store from happening.
        let stored = match unmasked & NO_STORE {
            0 => cpu.store_x87(op, &frame.memory),
            _ => cpu.probe_x87(op),
        };
        if let Err(stop) = stored {
            forget_flags();
            return Err(stop);
        }
    }
    commit::<I>(&mut cpu.fpu, op.src, &frame, &outcome);
    cpu.note_x87(op, I::MEMORY != Memory::None);
    Ok(Then::Next)
}

/// FCOMI and the like: the result goes to ZF, PF and CF; OF, SF and AF are cleared.
fn execute_flags<I: X87>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.wait_x87()?;
    let mut frame = Frame::new();
    let outcome = run::<I>(&cpu.fpu, op.src, &mut frame);
    // The host sets them even where the comparison was invalid and that is unmasked.
    let bits = u64::from(frame.zf) << 6 | u64::from(frame.pf) << 2 | u64::from(frame.cf);
    cpu.set_flags(Flags::explicit(bits));
    commit::<I>(&mut cpu.fpu, op.src, &frame, &outcome);
    cpu.note_x87(op, false);
    Ok(Then::Next)
}

/// The last opcode as FOP holds it: low three bits of the first byte, and the second (SDM Vol. 1 "Last Instruction
/// Opcode").
fn opcode(d: &Digest<'_>) -> u64 {
    let at = d.bytes.iter().position(|byte| byte & 0xf8 == 0xd8).unwrap_or(0);
    let (first, second) = (d.bytes.get(at), d.bytes.get(at + 1));
    u64::from(first.map_or(0, |byte| byte & 7)) << 8 | u64::from(second.copied().unwrap_or(0))
}

/// An x87 op: `src` is i of the other register, `aux` the bytes of the memory operand, `imm` FOP.
pub(super) fn lower(d: &Digest<'_>, h: crate::op::Handler) -> Option<Lowered> {
    let mut lowered = keeps(d, h)?;
    let st = |i: u32| if d.is_reg(i) && d.reg(i).is_st() { d.reg(i).number() as u8 } else { 0 };
    lowered.op.src = match d.ins.op_count() {
        0 => 1,
        1 => st(0),
        _ => st(0).max(st(1)),
    };
    lowered.op.aux = d.ins.memory_size().size() as u8;
    lowered.op.imm = opcode(d);
    Some(lowered)
}

pub(super) fn select<I: X87>(d: &Digest<'_>) -> Option<Lowered> {
    lower(d, plain_handler(execute::<I>))
}

pub(super) fn select_flags<I: X87>(d: &Digest<'_>) -> Option<Lowered> {
    let lowered = lower(d, plain_handler(execute_flags::<I>))?;
    Some(Lowered { flags: crate::decode::digest::FlagsOut::Unknown, ..lowered })
}
