//! IN and OUT (SDM Vol. 3 App. C, reason 30), string forms too: ports of interrupt controllers and those that signal
//! eventfds are answered here, all others are `KVM_EXIT_IO`.
//!
//! size: bytes, 1|2|4. count: elements; more than 1 for INS, which Linux's emulator reads ahead, and for OUTS of a VM of 2007.
//! data_offset: bytes from the start of `kvm_run`. api.rst §5, `io`.
//! IN is finished by the next KVM_RUN, before any instruction runs and before signals are looked at. RIP moves then too,
//! unless user space has moved it. A VM of 2007 (as of 2.6.23) finds it moved at the exit already, and so does a modern one
//! for OUT to port 7EH, where Linux keeps a quirk for old VMMs, unless user space turns that off.

use cpu_core::{Gpr, Io};
use kvm_abi::consts::{KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT, KVM_X86_QUIRK_OUT_7E_INC_RIP};
use smallvec::{SmallVec, smallvec};

use super::{Outcome, Pending, Reason, Row};
use crate::coalesced;
use crate::ioeventfd::Bus;
use crate::run_page::IoExit;
use crate::vcpu::Vcpu;

pub(super) const ROW: Row = Row { reason: Reason::IoInstruction, vmx: Some(30), shows: &["IO"] };

/// The port of `KVM_X86_QUIRK_OUT_7E_INC_RIP`.
const QUIRK_PORT: u16 = 0x7e;

pub(super) fn handle(vcpu: &mut Vcpu, io: &Io) -> Outcome {
    if is_answered_here(vcpu, io) {
        return Outcome::Resume;
    }
    let direction = if io.input { KVM_EXIT_IO_IN } else { KVM_EXIT_IO_OUT } as u8;
    let data = match io.string {
        false if vcpu.era.io_shows_eax() => vcpu.cpu.reg(Gpr::Rax) as u32,
        _ if io.input => 0,
        _ => io.data,
    };
    vcpu.page.set_io(&IoExit { direction, size: io.size, port: io.port, count: io.count }, data);
    if io.count > 1 && !io.input {
        vcpu.page.write_pio_data(vcpu.cpu.outs_data());
    }
    vcpu.page.set_exit_reason(KVM_EXIT_IO);
    let at_once = vcpu.era.io_moves_rip_at_exit()
        || io.port == QUIRK_PORT && vcpu.vm.options.has_quirk(KVM_X86_QUIRK_OUT_7E_INC_RIP);
    if !io.input && !io.string && at_once {
        vcpu.cpu.complete_io_out();
    } else {
        let bytes = io.count * u32::from(io.size);
        vcpu.pending = Some(Pending::Io { input: io.input.then_some(bytes), rip: vcpu.linear_rip() });
    }
    Outcome::User
}

/// Interrupt controllers, eventfds and the ring. Several elements of OUTS at once are a VM's of 2007, which has neither.
fn is_answered_here(vcpu: &mut Vcpu, io: &Io) -> bool {
    let (port, size) = (io.port, io.size);
    let vm = &vcpu.vm;
    if io.input {
        let Some(chip) = vm.chip() else { return false };
        let mut data: SmallVec<[u8; 4]> = SmallVec::new();
        for _ in 0..io.count {
            let Some(value) = chip.read_port(port, size) else { return false };
            data.extend_from_slice(&value.to_le_bytes()[..size.into()]);
        }
        vcpu.cpu.complete_io_in(&data);
        return true;
    }
    let is_ours = io.count == 1
        && (vm.chip().is_some_and(|chip| chip.write_port(port, size, io.data))
            || vm.ioeventfds.write(Bus::Pio, port.into(), size.into(), io.data.into())
            || coalesced::write(vcpu, true, port.into(), size, io.data.into()));
    if is_ours {
        vcpu.cpu.complete_io_out();
    }
    is_ours
}

/// `input`: bytes that the device gave, `None` for OUT.
pub(super) fn complete(vcpu: &mut Vcpu, input: Option<u32>) -> Outcome {
    let Some(bytes) = input else {
        vcpu.cpu.complete_io_out();
        return Outcome::Resume;
    };
    let mut data: SmallVec<[u8; 4]> = smallvec![0; bytes as usize];
    vcpu.page.read_pio_data(&mut data);
    vcpu.cpu.complete_io_in(&data);
    Outcome::Resume
}
