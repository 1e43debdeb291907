//! Where CPUID instructions are in a program's code, and what is put in their place.

use std::collections::HashSet;
use std::ops::Range;

use iced_x86::code_asm::{CodeAssembler, dword_ptr, ecx, ptr, rax, rsp};
use iced_x86::{Decoder, DecoderOptions, FlowControl, IcedError, Instruction, Mnemonic};

/// A near jump: what a window must have room for.
const JUMP: usize = 5;
/// How many instructions before CPUID may go with it.
const BEFORE: usize = 4;
/// Stubs grow by so much at most where displacements do not fit into a byte.
pub const SLACK: u64 = 4096;
/// What a function may use below its stack pointer. System V ABI, AMD64 Architecture Processor Supplement, "The Stack Frame".
const RED_ZONE: i32 = 128;

/// Whole instructions that are replaced: CPUID, and neighbours as far as room is needed. Nothing jumps into the middle.
#[derive(Debug)]
pub struct Window {
    range: Range<u64>,
    instructions: Vec<Instruction>,
}

/// What was found in a piece of code.
#[derive(Debug)]
pub struct Found {
    /// To be replaced.
    pub windows: Vec<Window>,
    /// CPUID instructions that cannot be.
    pub skipped: usize,
}

/// All CPUID instructions of `code`, which lies at `address`.
pub fn windows(code: &[u8], address: u64) -> Found {
    let mut found = Found { windows: Vec::new(), skipped: 0 };
    if !code.windows(2).any(|pair| pair == [0x0f, 0xa2]) {
        return found;
    }
    // From the start of the code on, one instruction after the other; bytes that are none are passed over one by one.
    let all: Vec<Instruction> = Decoder::with_ip(64, code, address, DecoderOptions::NONE).into_iter().collect();
    let targets: HashSet<u64> = all.iter().map(Instruction::near_branch_target).filter(|target| *target != 0).collect();
    let mut end = 0;
    for (at, _) in all.iter().enumerate().filter(|(_, one)| one.mnemonic() == Mnemonic::Cpuid) {
        let window = (0..=BEFORE).find_map(|before| window(&all, at.checked_sub(before)?, at, &targets));
        match window.filter(|window| window.range.start >= end) {
            Some(window) => {
                end = window.range.end;
                found.windows.push(window);
            }
            None => found.skipped += 1,
        }
    }
    found
}

/// Instructions from `first` on to behind the one at `cpuid`, and on until there is room; `None` if they cannot be moved.
fn window(all: &[Instruction], first: usize, cpuid: usize, targets: &HashSet<u64>) -> Option<Window> {
    let start = all[first].ip();
    let enough = |at: usize| at >= cpuid && (all[at].next_ip() - start) as usize >= JUMP;
    let last = (cpuid..all.len().min(cpuid + JUMP)).find(|at| enough(*at))?;
    let instructions = &all[first..=last];
    let movable = |(at, one): (usize, &Instruction)| match one.flow_control() {
        FlowControl::Next => true,
        // Where CPUID is passed over nothing may be lost: only what stands behind it may lead away.
        FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch | FlowControl::Return => first + at > cpuid,
        _ => false,
    };
    let sound = instructions.iter().enumerate().all(movable) && instructions.iter().all(|one| !one.is_invalid());
    let range = start..all[last].next_ip();
    let entered = (range.start + 1..range.end).any(|inside| targets.contains(&inside));
    (sound && !entered).then(|| Window { range, instructions: instructions.to_vec() })
}

/// What a window becomes.
#[derive(Debug)]
pub struct Stub {
    /// Where its code lies.
    pub at: u64,
    /// The same instructions, with CPUID's answer changed.
    pub code: Vec<u8>,
    /// The window.
    pub window: Range<u64>,
    /// What is written over it.
    pub jump: Vec<u8>,
}

/// The stubs of all windows, one after the other from `at` on. Leaf `leaf` gets the bits `bits` in ECX.
pub fn stubs(windows: &[Window], at: u64, leaf: u32, bits: u32) -> Result<Vec<Stub>, IcedError> {
    let mut at = at;
    let mut stubs = Vec::with_capacity(windows.len());
    for window in windows {
        let code = stub(window, at, leaf, bits)?;
        let mut jump = CodeAssembler::new(64)?;
        jump.jmp(at)?;
        let mut jump = jump.assemble(window.range.start)?;
        // Nobody comes to what is left of the window.
        const NOP: u8 = 0x90;
        jump.resize((window.range.end - window.range.start) as usize, NOP);
        let next = at + code.len() as u64;
        stubs.push(Stub { at, code, window: window.range.clone(), jump });
        at = next;
    }
    Ok(stubs)
}

fn stub(window: &Window, at: u64, leaf: u32, bits: u32) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    for instruction in &window.instructions {
        if instruction.mnemonic() != Mnemonic::Cpuid {
            a.add_instruction(*instruction)?;
            continue;
        }
        // All registers and flags but the four of CPUID stay, and the red zone.
        let mut other = a.create_label();
        a.lea(rsp, ptr(rsp - RED_ZONE))?;
        a.pushfq()?;
        a.push(rax)?;
        a.cpuid()?;
        a.cmp(dword_ptr(rsp), leaf)?;
        a.jne(other)?;
        a.or(ecx, bits)?;
        a.set_label(&mut other)?;
        a.lea(rsp, ptr(rsp + 8))?;
        a.popfq()?;
        a.lea(rsp, ptr(rsp + RED_ZONE))?;
    }
    a.jmp(window.range.end)?;
    a.assemble(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: u64 = 0x40_1000;
    const STUBS: u64 = 0x30_0000;

    fn assemble(code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
        let mut a = CodeAssembler::new(64).unwrap();
        code(&mut a).unwrap();
        a.assemble(AT).unwrap()
    }

    fn text(code: &[u8], at: u64) -> Vec<String> {
        Decoder::with_ip(64, code, at, DecoderOptions::NONE).into_iter().map(|one| one.to_string()).collect()
    }

    #[test]
    fn cpuid_and_what_follows_become_a_jump() {
        let code = assemble(|a| {
            a.cpuid()?;
            a.mov(dword_ptr(rax), ecx)?;
            a.mov(ecx, dword_ptr(rax + 0x40))?;
            a.ret()
        });
        let found = windows(&code, AT);
        let made = stubs(&found.windows, STUBS, 1, 0x20).unwrap();
        let [stub] = &made[..] else { panic!("{found:?}") };
        assert_eq!(stub.window, AT..AT + 7);
        assert_eq!(text(&stub.jump, AT), ["jmp 0000000000300000h", "nop", "nop"]);
        assert_eq!(
            text(&stub.code, STUBS)[3..],
            [
                "cpuid",
                "cmp dword ptr [rsp],1",
                "jne short 0000000000300012h",
                "or ecx,20h",
                "lea rsp,[rsp+8]",
                "popfq",
                "lea rsp,[rsp+80h]",
                "mov [rax],ecx",
                "mov ecx,[rax+40h]",
                "jmp 0000000000401007h"
            ]
        );
    }

    /// A loop over leaves comes back to the instruction behind CPUID's place: what stands before goes with it.
    #[test]
    fn a_jump_into_the_window_moves_it() {
        let code = assemble(|a| {
            let mut behind = a.create_label();
            a.mov(ecx, 4_u32)?;
            a.cpuid()?;
            a.set_label(&mut behind)?;
            a.mov(dword_ptr(rax), ecx)?;
            a.loop_(behind)
        });
        let found = windows(&code, AT);
        let [window] = &found.windows[..] else { panic!("{found:?}") };
        assert_eq!(window.range, AT..AT + 7);
        let made = stubs(&found.windows, STUBS, 1, 0x20).unwrap();
        let moved = text(&made[0].code, STUBS);
        assert_eq!((&moved[0][..], &moved[4][..]), ("mov ecx,4", "cpuid"));
    }

    #[test]
    fn between_two_jump_targets_it_stays() {
        let code = assemble(|a| {
            let (mut here, mut behind) = (a.create_label(), a.create_label());
            a.set_label(&mut here)?;
            a.cpuid()?;
            a.set_label(&mut behind)?;
            a.loop_(behind)?;
            a.loop_(here)
        });
        let found = windows(&code, AT);
        assert_eq!((found.windows.len(), found.skipped), (0, 1));
    }

    #[test]
    fn the_same_bytes_inside_an_instruction_are_no_cpuid() {
        let code = assemble(|a| {
            a.mov(ecx, 0x90a2_0f90_u32)?;
            a.ret()
        });
        let found = windows(&code, AT);
        assert_eq!((found.windows.len(), found.skipped), (0, 0));
    }

    /// What is addressed relative to RIP is so from its new place too.
    #[test]
    fn relative_addresses_stay_what_they_were() {
        // cpuid; mov [rip+1FF8h],ecx; ret
        let code = [0x0f, 0xa2, 0x89, 0x0d, 0xf8, 0x1f, 0, 0, 0xc3];
        let made = stubs(&windows(&code, AT).windows, STUBS, 1, 0x20).unwrap();
        let moved: Vec<_> = Decoder::with_ip(64, &made[0].code, STUBS, DecoderOptions::NONE).into_iter().collect();
        let stores: Vec<_> = moved.iter().filter(|one| one.is_ip_rel_memory_operand()).collect();
        assert_eq!(stores.iter().map(|one| one.ip_rel_memory_address()).collect::<Vec<_>>(), [AT + 0x2000]);
    }
}
