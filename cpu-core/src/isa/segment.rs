//! MOV, PUSH and POP of segment registers, LDS LES LFS LGS LSS. The checks of a load are in `protect`. SDM Vol. 2, the page
//! of each mnemonic.

use iced_x86::{Code as C, Mnemonic as M};

use super::{Row, by_width, codes, row};
use crate::cpu::{Cpu, Done, Stop, Then};
use crate::decode::digest::{Digest, Lowered};
use crate::host::HostWord;
use crate::op::{Handler, Op, plain};
use crate::state::{Gpr, Seg};

pub(super) const ROWS: &[Row] = &[
    codes(&[C::Mov_Sreg_rm16, C::Mov_Sreg_r32m16, C::Mov_Sreg_r64m16], mov_to),
    codes(&[C::Mov_rm16_Sreg, C::Mov_r32m16_Sreg, C::Mov_r64m16_Sreg], mov_from),
    codes(&[C::Pushw_ES, C::Pushw_CS, C::Pushw_SS, C::Pushw_DS, C::Pushw_FS, C::Pushw_GS], |d| calm(d, push::<u16>)),
    codes(&[C::Pushd_ES, C::Pushd_CS, C::Pushd_SS, C::Pushd_DS, C::Pushd_FS, C::Pushd_GS], |d| calm(d, push::<u32>)),
    codes(&[C::Pushq_FS, C::Pushq_GS], |d| calm(d, push::<u64>)),
    codes(&[C::Popw_ES, C::Popw_SS, C::Popw_DS, C::Popw_FS, C::Popw_GS], |d| calm(d, pop::<u16>)),
    codes(&[C::Popd_ES, C::Popd_SS, C::Popd_DS, C::Popd_FS, C::Popd_GS], |d| calm(d, pop::<u32>)),
    codes(&[C::Popq_FS, C::Popq_GS], |d| calm(d, pop::<u64>)),
    row(M::Lds, far_pointer::<{ Seg::Ds as u8 }>),
    row(M::Les, far_pointer::<{ Seg::Es as u8 }>),
    row(M::Lfs, far_pointer::<{ Seg::Fs as u8 }>),
    row(M::Lgs, far_pointer::<{ Seg::Gs as u8 }>),
    row(M::Lss, far_pointer::<{ Seg::Ss as u8 }>),
];

/// An op that leaves the flags alone.
pub(super) fn calm<F: Fn(&mut Cpu, &Op) -> Done + Copy + 'static>(d: &Digest<'_>, _: F) -> Option<Lowered> {
    Some(quiet(d, plain::<F>))
}

fn quiet(d: &Digest<'_>, h: Handler) -> Lowered {
    Lowered { reads_flags: false, ..d.lower(h).keeps_flags() }
}

impl Cpu {
    /// Loads a segment register as an instruction does: SS holds back events, and what hangs on decoding ends the trace.
    fn load_by_instruction(&mut self, seg: Seg, selector: u16, op: &Op) -> Result<Then, Stop> {
        let mode = self.mode();
        self.load_segment(seg, selector)?;
        if seg != Seg::Ss {
            return Ok(Then::Next);
        }
        // SDM Vol. 3 "Masking Exceptions and Interrupts When Switching Stacks".
        self.shadow_next(op, true);
        self.suppress_step = true;
        let waits = self.events.interrupt.is_some() || self.has_breakpoints() || self.interrupt_window;
        Ok(if waits || self.mode() != mode { Then::Leave } else { Then::Next })
    }
}

/// `aux`: the selector is in memory.
fn mov_to(d: &Digest<'_>) -> Option<Lowered> {
    let mut lowered = quiet(d, super::plain_handler(load));
    lowered.op.aux = u8::from(d.is_mem(1));
    Some(lowered)
}

fn load(cpu: &mut Cpu, op: &Op) -> Done {
    let selector = if op.aux != 0 { cpu.read_operand::<u16>(op)? } else { cpu.get(op.src) };
    cpu.load_by_instruction(segment_of(op.dst), selector, op)
}

/// A register takes the selector zero-extended to the operand size, memory always 16 bits.
fn mov_from(d: &Digest<'_>) -> Option<Lowered> {
    if d.is_mem(0) {
        return calm(d, store_memory);
    }
    Some(quiet(
        d,
        match d.bytes(0) {
            2 => super::plain_handler(store::<u16>),
            4 => super::plain_handler(store::<u32>),
            _ => super::plain_handler(store::<u64>),
        },
    ))
}

fn store_memory(cpu: &mut Cpu, op: &Op) -> Done {
    let selector = cpu.seg[segment_of(op.src) as usize].selector;
    cpu.write_operand(op, selector)?;
    Ok(Then::Next)
}

fn store<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let selector = cpu.seg[segment_of(op.src) as usize].selector;
    cpu.put(op.dst, W::of(selector.into()));
    Ok(Then::Next)
}

fn segment_of(number: u8) -> Seg {
    Seg::ALL[usize::from(number) % 6]
}

/// The selector goes zero-extended to the operand size, one of the two ways of SDM Vol. 2 "PUSH".
fn push<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let selector = cpu.seg[segment_of(op.dst) as usize].selector;
    cpu.push(W::of(selector.into()))?;
    Ok(Then::Next)
}

fn pop<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let selector = cpu.peek::<W>(0)?.zext() as u16;
    // The stack that is popped from has the old SS's size.
    let moved = cpu.stack_pointer(W::BYTES.into());
    let then = cpu.load_by_instruction(segment_of(op.dst), selector, op)?;
    cpu.set_reg(Gpr::Rsp, moved);
    Ok(then)
}

/// LDS and its like: the offset, and behind it the selector.
fn far_pointer<const SEG: u8>(d: &Digest<'_>) -> Option<Lowered> {
    if !d.is_mem(1) {
        return None;
    }
    Some(quiet(d, by_width!(d.bytes(0), W => super::plain_handler(load_pointer::<W, SEG>))))
}

fn load_pointer<W: HostWord, const SEG: u8>(cpu: &mut Cpu, op: &Op) -> Done {
    let (offset, selector) = cpu.far_operand::<W>(op)?;
    let mode = cpu.mode();
    cpu.load_segment(segment_of(SEG), selector)?;
    cpu.put(op.dst, offset);
    Ok(if cpu.mode() == mode { Then::Next } else { Then::Leave })
}

impl Cpu {
    /// A far pointer in memory: offset, then selector.
    pub(super) fn far_operand<W: HostWord>(&mut self, op: &Op) -> Result<(W, u16), Stop> {
        let at = self.ea(op);
        let behind = at.wrapping_add(W::BYTES.into()) & op.address_mask();
        let offset = self.read::<W>(op.segment(), at)?;
        let selector = self.read::<u16>(op.segment(), behind)?;
        Ok((offset, selector))
    }
}
