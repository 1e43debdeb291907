//! Selectors where segment loads and far transfers look for them.

use iced_x86::{Instruction, Mnemonic as M, OpKind};

use super::rng::Rng;
use crate::layout::DATA_BASE;
use crate::segments::SELECTORS;
use crate::state::{Case, Mode, USER_CS, USER32_CS, flag};

/// Gives the source of a segment load, or the target of a far transfer, a selector that may be worth loading.
pub(super) fn place(rng: &mut Rng, case: &mut Case, instruction: &Instruction) {
    let mut selector = rng.pick(&SELECTORS);
    if (case.mode, instruction.mnemonic(), selector | 3) == (Mode::Bits16, M::Call, USER_CS) {
        // From a 16-bit stack into 64-bit code: bits 63:32 of RSP are the kernel's espfix address, and it does not return.
        selector = USER32_CS;
    }
    if instruction.mnemonic() == M::Retf && case.mode != Mode::Bits64 && selector | 3 == USER_CS {
        // Whether the parameters are released with the old stack pointer's width or the new one's is not written down.
        selector = USER32_CS;
    }
    match instruction.mnemonic() {
        M::Mov | M::Lar | M::Lsl | M::Verr | M::Verw => {
            let source = instruction.op_count() - 1;
            if instruction.mnemonic() == M::Mov && !instruction.op0_register().is_segment_register() {
                return;
            }
            if instruction.op_kind(source) == OpKind::Register {
                let register = &mut case.state.gpr[instruction.op_register(source).full_register().number()];
                *register = *register & !0xffff | u64::from(selector);
            } else {
                put_operand(case, instruction, source, 0, selector);
            }
        }
        M::Pop if instruction.op0_register().is_segment_register() => put_stack(case, 0, selector),
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => {
            let at = instruction.memory_size().size() as u64 - 2;
            put_operand(case, instruction, 1, at, selector);
        }
        M::Jmp | M::Call => match instruction.op0_kind() {
            OpKind::FarBranch16 | OpKind::FarBranch32 => {
                let end = case.bytes.len();
                case.bytes[end - 2..].copy_from_slice(&selector.to_le_bytes());
                let offset = target(rng, selector).to_le_bytes();
                let width = if instruction.op0_kind() == OpKind::FarBranch16 { 2 } else { 4 };
                case.bytes[end - 2 - width..end - 2].copy_from_slice(&offset[..width]);
            }
            OpKind::Memory => {
                let at = instruction.memory_size().size() as u64 - 2;
                let offset = target(rng, selector);
                put_operand(case, instruction, 0, 0, offset as u16);
                if at == 4 {
                    put_operand(case, instruction, 0, 2, (offset >> 16) as u16);
                }
                put_operand(case, instruction, 0, at, selector);
            }
            _ => {}
        },
        M::Retf => {
            let width = slot_bytes(instruction);
            put_word(case, 0, width, target(rng, selector));
            put_word(case, width, width, selector.into());
        }
        M::Iret | M::Iretd | M::Iretq => {
            let width = slot_bytes(instruction);
            // TF stays as it is, so the case still ends behind this instruction.
            let flags = rng.bits() & (flag::SETTABLE | flag::IF | 3 << 12) | flag::TF | 2;
            let flags = if rng.one_in(8) { flags | flag::RF } else { flags & !flag::NT };
            put_word(case, 0, width, target(rng, selector));
            put_word(case, width, width, selector.into());
            put_word(case, 2 * width, width, flags);
            put_word(case, 3 * width, width, DATA_BASE + rng.below(0x1000));
            let stack = if rng.one_in(2) { 0x2b } else { rng.pick(&SELECTORS) };
            put_word(case, 4 * width, width, stack.into());
        }
        _ => {}
    }
}

/// Bytes of what RETF and IRET pop.
fn slot_bytes(instruction: &Instruction) -> u64 {
    match instruction.code().op_code().operand_size() {
        16 => 2,
        32 => 4,
        _ => 8,
    }
}

/// An offset that is inside most code segments.
fn target(rng: &mut Rng, selector: u16) -> u64 {
    let based = selector & 4 != 0 && selector >> 3 != 6;
    let offset = if rng.one_in(8) { rng.bits() & 0xffff_ffff } else { rng.below(0x2000) };
    if based { offset } else { crate::layout::CODE_BASE + offset }
}

fn put_operand(case: &mut Case, instruction: &Instruction, operand: u32, at: u64, value: u16) {
    if let Some(address) = super::operand_address(case, instruction, operand) {
        put_bytes(case, address.wrapping_add(at), &value.to_le_bytes());
    }
}

fn put_stack(case: &mut Case, at: u64, value: u16) {
    put_word(case, at, 2, value.into());
}

fn put_word(case: &mut Case, at: u64, bytes: u64, value: u64) {
    let pointer = match case.mode {
        Mode::Bits64 => case.state.gpr[4],
        Mode::Bits32 => case.state.gpr[4] & 0xffff_ffff,
        Mode::Bits16 => case.mode.data_base() + (case.state.gpr[4] & 0xffff),
    };
    put_bytes(case, pointer.wrapping_add(at), &value.to_le_bytes()[..bytes as usize]);
}

fn put_bytes(case: &mut Case, address: u64, bytes: &[u8]) {
    for (i, byte) in bytes.iter().enumerate() {
        let place = address.wrapping_add(i as u64).wrapping_sub(DATA_BASE) as usize;
        if let Some(slot) = case.state.memory.get_mut(place) {
            *slot = *byte;
        }
    }
}
