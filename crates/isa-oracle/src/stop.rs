//! Where a case ends: behind its instruction, or wherever control went.
//!
//! A case lands on the INT3 that follows its instruction, since a breakpoint costs half of a single-step trap under a
//! hypervisor, lets a repeated string instruction run to its end, and leaves TF out of what PUSHF stores. Instructions
//! that may go elsewhere, and bytes of which the decoder makes nothing, are single-stepped.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction};

use crate::layout::CODE_BYTES;
use crate::state::Case;

/// What ends the case.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stop {
    /// The single-step trap (RFLAGS.TF).
    Step,
    /// The INT3 that follows the instruction.
    Landing,
}

/// The case's bytes as the decoder sees them.
pub fn decode(case: &Case) -> Instruction {
    Decoder::with_ip(case.mode.bitness(), &case.bytes, case.state.rip, DecoderOptions::NONE).decode()
}

/// All of the case's instructions.
pub(crate) fn instructions(case: &Case) -> impl Iterator<Item = Instruction> {
    Decoder::with_ip(case.mode.bitness(), &case.bytes, case.state.rip, DecoderOptions::NONE).into_iter()
}

/// What ends `case`.
pub(crate) fn of(case: &Case) -> Stop {
    let end = case.state.rip.wrapping_add(case.bytes.len() as u64);
    let inside = end < case.mode.start() + CODE_BYTES as u64;
    let straight = |instruction: &Instruction| match instruction.flow_control() {
        FlowControl::Next => !instruction.is_invalid(),
        // In a run of several: forward, to an instruction of it or to its end.
        FlowControl::ConditionalBranch => {
            let target = instruction.near_branch_target();
            instruction.len() < case.bytes.len() && instruction.ip() < target && target <= end
        }
        _ => false,
    };
    if inside && instructions(case).all(|instruction| straight(&instruction)) { Stop::Landing } else { Stop::Step }
}

/// Whether `rip` is right behind the case's instruction.
pub(crate) fn behind(case: &Case, rip: u64) -> bool {
    rip == case.state.rip + case.bytes.len() as u64
}
