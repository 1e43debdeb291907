//! What vendors do differently, and what the SDM leaves undefined beyond the flags that iced-x86 knows of.
//!
//! The interpreter follows the SDM. The host that recorded a vector may be of another vendor: what such a host does
//! differently is written here once, with the reason, is printed at the head of the vectors it touches, and is masked.

use iced_x86::{Instruction, Mnemonic as M, OpKind};

use crate::compare::Mask;
use crate::state::{Case, flag};

/// What a row leaves open.
#[derive(Clone, Copy)]
enum Open {
    /// RFLAGS bits, always.
    Flags(u64),
    /// The bytes of a stored x87 environment that hold FOP, FIP, FCS, FDP and FDS.
    Environment,
    /// Something that the note's own arm in `widen` decides by operand values.
    ByValue,
}

/// A difference or an undefined result.
struct Note {
    mnemonics: &'static [M],
    open: Open,
    note: &'static str,
}

const NOTES: &[Note] = &[
    Note {
        mnemonics: &[M::Shld, M::Shrd],
        open: Open::ByValue,
        note: "count above the operand size: result and all flags undefined (SDM Vol. 2)",
    },
    Note {
        mnemonics: &[M::Bsf, M::Bsr],
        open: Open::Flags(0),
        note: "source 0: destination undefined in the SDM, unchanged on AMD and on Intel's CPUs; compared as unchanged",
    },
    Note {
        mnemonics: &[M::Fnstenv, M::Fstenv, M::Fnsave, M::Fsave, M::Fxsave, M::Fxsave64],
        open: Open::Environment,
        note: "AMD keeps FOP, FIP and FDP of the last instruction that raised an exception, Intel of the last one",
    },
];

/// The notes that `mnemonic` carries, for the head of its vectors.
pub fn notes(mnemonic: M) -> impl Iterator<Item = &'static str> {
    NOTES.iter().filter(move |note| note.mnemonics.contains(&mnemonic)).map(|note| note.note)
}

/// Adds to `mask` what `instruction` leaves open.
pub(crate) fn widen(mask: &mut Mask, case: &Case, instruction: &Instruction) {
    for note in NOTES.iter().filter(|note| note.mnemonics.contains(&instruction.mnemonic())) {
        match note.open {
            Open::Flags(flags) => mask.rflags |= flags,
            Open::Environment => environment(mask, case, instruction),
            Open::ByValue => by_value(mask, case, instruction),
        }
    }
}

fn by_value(mask: &mut Mask, case: &Case, instruction: &Instruction) {
    let count = match instruction.op2_kind() {
        OpKind::Register => case.state.gpr[1],
        _ => u64::from(instruction.immediate8()),
    };
    let wide = instruction.op1_register().size() == 8;
    let count = count & if wide { 63 } else { 31 };
    if count > 8 * instruction.op1_register().size() as u64 {
        mask.rflags |= flag::STATUS;
        open_destination(mask, case, instruction, instruction.op1_register().size() as u64);
    }
}

/// Leaves operand 0 open.
fn open_destination(mask: &mut Mask, case: &Case, instruction: &Instruction, size: u64) {
    match instruction.op0_kind() {
        OpKind::Register => mask.gpr.push(instruction.op0_register().full_register().number()),
        _ => {
            if let Some(address) = address(case, instruction) {
                mask.memory.push((address, address + size));
            }
        }
    }
}

/// Linear address of operand 0.
fn address(case: &Case, instruction: &Instruction) -> Option<u64> {
    crate::generate::operand_address(case, instruction, 0)
}

fn environment(mask: &mut Mask, case: &Case, instruction: &Instruction) {
    let Some(start) = address(case, instruction) else { return };
    let bytes = match instruction.mnemonic() {
        M::Fxsave | M::Fxsave64 => 6..24,
        _ if instruction.memory_size().size() == 14 || instruction.memory_size().size() == 94 => 6..14,
        _ => 12..28,
    };
    mask.memory.push((start + bytes.start, start + bytes.end));
}
