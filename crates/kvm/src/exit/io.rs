//! IN and OUT (SDM Vol. 3 App. C, reason 30), string forms too: no port is answered here, all are `KVM_EXIT_IO`.
//!
//! size: bytes, 1|2|4. count: elements; more than 1 for INS only, which Linux's emulator reads ahead.
//! data_offset: bytes from the start of `kvm_run`. api.rst §5, `io`.
//! IN is finished by the next KVM_RUN, before any instruction runs and before signals are looked at. RIP moves then too,
//! unless user space has moved it. For OUT a VM of 2007 (as of 2.6.23) finds it moved at the exit already, and so does a
//! modern one at port 7EH, where Linux keeps a quirk for old VMMs.

use cpu_core::{IO_BYTES, Io};
use kvm_abi::consts::{KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT};

use super::{Outcome, Pending, Reason, Row};
use crate::era::Era;
use crate::run_page::IoExit;
use crate::vcpu::Vcpu;

pub(super) const ROW: Row = Row { reason: Reason::IoInstruction, vmx: Some(30), shows: &["IO"] };

/// `KVM_X86_QUIRK_OUT_7E_INC_RIP`
const QUIRK_PORT: u16 = 0x7e;

pub(super) fn handle(vcpu: &mut Vcpu, io: &Io) -> Outcome {
    let direction = if io.input { KVM_EXIT_IO_IN } else { KVM_EXIT_IO_OUT } as u8;
    // 2007 shows EAX on IN too, and its VMMs may hand it back unchanged; today's Linux clears the data.
    let data = if io.input && vcpu.era == Era::Modern { 0 } else { io.data };
    vcpu.page.set_io(&IoExit { direction, size: io.size, port: io.port, count: io.count }, data);
    vcpu.page.set_exit_reason(KVM_EXIT_IO);
    if !io.input && (vcpu.era == Era::Legacy || io.port == QUIRK_PORT) {
        vcpu.cpu.complete_io_out();
    } else {
        let bytes = io.count * u32::from(io.size);
        vcpu.pending = Some(Pending::Io { input: io.input.then_some(bytes), rip: vcpu.linear_rip() });
    }
    Outcome::User
}

/// `input`: bytes that the device gave, `None` for OUT.
pub(super) fn complete(vcpu: &mut Vcpu, input: Option<u32>) -> Outcome {
    let Some(bytes) = input else {
        vcpu.cpu.complete_io_out();
        return Outcome::Resume;
    };
    let mut data = [0; IO_BYTES];
    let data = &mut data[..(bytes as usize).min(IO_BYTES)];
    vcpu.page.read_pio_data(data);
    vcpu.cpu.complete_io_in(data);
    Outcome::Resume
}
