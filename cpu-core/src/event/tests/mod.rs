//! What each load, gate, return and task switch does, with the SDM's error codes.
//!
//! In the guests of these tests every vector has a gate to a HLT of its own, so the stack below it shows the frame. Code
//! under test ends in INT 80H, which is open to all levels.

use x86_defs::{AccessRights, Descriptor};

use crate::state::Gpr;
use crate::testing::{CODE, Machine};
use crate::vmx::Exit;

mod endless;
mod extensions;
mod long;
mod protected;

/// The vector at the end of code under test.
const DONE: u8 = 0x80;
const HANDLERS: u64 = 0x2_0000;

/// What the guest ran into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// INT 80H at the end.
    Done,
    /// A vector with its error code, and the pushed instruction pointer relative to the code.
    Event(u8, Option<u64>, u64),
    Exit(Exit),
}

/// Where the gate of a vector leads.
fn handler(vector: u8) -> u64 {
    HANDLERS + 16 * u64::from(vector)
}

/// A flat segment's descriptor.
fn segment(rights: u32) -> u64 {
    Descriptor::new(0, u32::MAX, AccessRights(rights)).0
}

/// The first 8 bytes of a gate. `parameters`: bits 39:32, the number of parameters of a call gate or the IST.
fn gate(selector: u16, offset: u64, rights: u32, parameters: u8) -> u64 {
    offset & 0xffff
        | u64::from(selector) << 16
        | u64::from(parameters) << 32
        | u64::from(rights) << 40
        | (offset & 0xffff_0000) << 32
}

/// Runs to the HLT of a handler, whose stack holds words of `bytes` bytes: 4 or 8.
fn run_to_handler(machine: &mut Machine, bytes: u64) -> Seen {
    let exit = machine.cpu.run();
    if exit != Exit::Hlt {
        return Seen::Exit(exit);
    }
    let offset = machine.cpu.rip.wrapping_sub(HANDLERS + 1);
    assert!(offset < 16 * 256, "halted at {:#x}", machine.cpu.rip);
    let vector = (offset / 16) as u8;
    if vector == DONE {
        return Seen::Done;
    }
    let word = |i: u64| {
        let at = machine.cpu.reg(Gpr::Rsp) + bytes * i;
        if bytes == 8 { u64::from_le_bytes(machine.read(at)) } else { u32::from_le_bytes(machine.read(at)).into() }
    };
    let error = x86_defs::vector::has_error_code(vector).then(|| word(0));
    Seen::Event(vector, error, word(error.is_some().into()).wrapping_sub(CODE))
}
