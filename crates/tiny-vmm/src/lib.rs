//! A VMM of one vCPU for tests and benchmarks: a client of /dev/kvm like any other, by way of kvm-ioctls.
//!
//! The guest starts with flat segments, an empty IDT (limit 0, so any exception becomes a triple fault) and, in long
//! mode, the first GiB mapped one to one. It knows nothing of softkvm and runs on the kernel's own KVM as well.

mod alarm;
mod guest;
mod mode;

pub use alarm::{Alarm, Kick};
pub use guest::{End, Guest, InternalError};
pub use iced_x86::code_asm;
pub use kvm_ioctls::VcpuExit;
pub use mode::Mode;

use anyhow::{Context, Result};
use code_asm::CodeAssembler;

/// Where the guest's code is loaded and begins to run: guest-physical, and linear as all segments are flat.
pub const CODE: u64 = 0x1000;
/// The guest's first RSP; nothing else of ours is below it down to the code.
pub const STACK: u64 = 0x8_0000;

/// Assembles what `write` says for `mode`, to be run at [`CODE`].
pub fn assemble(
    mode: Mode,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
) -> Result<Vec<u8>> {
    let mut assembler = CodeAssembler::new(mode.bits()).context("no assembler")?;
    write(&mut assembler).context("the guest's code does not assemble")?;
    assembler.assemble(CODE).context("the guest's code does not assemble")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_assembled_for_the_mode() {
        let add = |mode| assemble(mode, |a| a.add(code_asm::eax, code_asm::ecx)).expect("ADD assembles");
        assert_eq!(add(Mode::Real), [0x66, 0x01, 0xc8]);
        assert_eq!(add(Mode::Protected), [0x01, 0xc8]);
        assert_eq!(add(Mode::Long), [0x01, 0xc8]);
    }
}
