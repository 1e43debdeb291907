//! Short runs of instructions: what one leaves to the next, flags above all, goes through more of the interpreter than
//! any single instruction does.

use iced_x86::{Code, FlowControl, Instruction, Mnemonic as M};

use super::Generator;
use crate::compare::{defined_flags, flags_read, undefined_flags};
use crate::state::{Case, Mode, flag};
use crate::{decode, vendor};

/// Bytes that a run may have: the code window less the INT3 behind it.
const MOST_BYTES: usize = crate::layout::CASE_BYTES - 8;

impl Generator {
    /// A run of two to seven instructions drawn from `forms`, conditional branches forward among them. None where chance
    /// gave nothing comparable.
    pub fn sequence(&mut self, forms: &[(Code, Mode)]) -> Option<Case> {
        let (code, mode) = self.rng.pick(forms);
        let mut case = self.case(code, mode)?;
        if !is_plain(&decode(&case), &case) || case.state.rip != mode.start() {
            return None;
        }
        let wanted = 2 + self.rng.below(6) as usize;
        let mut pieces = vec![case.bytes.clone()];
        for _ in 0..wanted * 8 {
            if pieces.len() == wanted {
                break;
            }
            let (code, other) = self.rng.pick(forms);
            if other != mode {
                continue;
            }
            let Some(next) = self.case(code, mode) else { continue };
            let instruction = decode(&next);
            // Most memory operands would be at addresses that an earlier instruction has spoiled: a few are enough.
            let memory = (0..instruction.op_count()).any(|i| instruction.op_kind(i) == iced_x86::OpKind::Memory);
            if !is_plain(&instruction, &next) || instruction.is_ip_rel_memory_operand() || memory && !self.rng.one_in(4)
            {
                continue;
            }
            pieces.push(next.bytes);
        }
        if self.rng.one_in(2) {
            self.add_branches(&mut pieces);
        }
        case.bytes = pieces.concat();
        // What vectors do under alignment checks is up to the CPU.
        case.state.rflags &= !flag::AC;
        (case.bytes.len() <= MOST_BYTES && open_flags(&case, false).is_some()).then_some(case)
    }

    /// Puts conditional branches over some of the pieces.
    fn add_branches(&mut self, pieces: &mut Vec<Vec<u8>>) {
        for _ in 0..1 + self.rng.below(2) {
            let at = 1 + self.rng.below(pieces.len() as u64) as usize;
            let over = self.rng.below((pieces.len() - at + 1) as u64) as usize;
            let distance: usize = pieces[at..at + over].iter().map(Vec::len).sum();
            // Branches that came before may now end inside this one's bytes: only their own distance moves them.
            let spans = pieces[..at].iter().any(|piece| matches!(piece[..], [0x70..=0x7f, _]));
            if distance < 0x80 && !spans {
                pieces.insert(at, vec![0x70 + self.rng.below(16) as u8, distance as u8]);
            }
        }
    }
}

/// Goes on behind itself, whatever happens, and leaves nothing open but flags.
fn is_plain(instruction: &Instruction, case: &Case) -> bool {
    !instruction.is_invalid()
        && instruction.flow_control() == FlowControl::Next
        && !instruction.is_string_instruction()
        && !vendor::has_notes(instruction.mnemonic())
        && instruction.len() == case.bytes.len()
        && !instruction.op0_register().is_segment_register()
        && !matches!(instruction.mnemonic(), M::Lar | M::Lsl | M::Lss | M::Popf | M::Popfd | M::Popfq)
}

/// RFLAGS bits that may be undefined behind the run, or where it stopped if it was not `done`; None where an instruction
/// of it looks at such a bit.
pub(crate) fn open_flags(case: &Case, done: bool) -> Option<u64> {
    let branches = !done || crate::stop::instructions(case).any(|i| i.flow_control() != FlowControl::Next);
    let mut open = 0;
    for instruction in crate::stop::instructions(case) {
        if flags_read(&instruction) & open != 0 {
            return None;
        }
        open |= undefined_flags(&instruction);
        // Shifts by 0 leave the flags alone, whatever the decoder's tables say of other counts.
        let shifts =
            matches!(instruction.mnemonic(), M::Rcl | M::Rcr | M::Rol | M::Ror | M::Sal | M::Sar | M::Shl | M::Shr);
        if !branches && !shifts {
            open &= !defined_flags(&instruction);
        }
    }
    Some(open)
}
