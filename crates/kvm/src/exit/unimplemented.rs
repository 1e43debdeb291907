//! An instruction that the core lacks, or one fetched from where there is no memory: `KVM_EXIT_INTERNAL_ERROR`, suberror
//! `KVM_INTERNAL_ERROR_EMULATION`, as today's Linux reports an instruction that its emulator lacks. api.rst §5,
//! `emulation_failure`.
//!
//! data: flags, then `insn_size` and 15 bytes of instruction padded with NOP, then five words of debugging information
//! that are not ABI: exit reason, two qualifications, interruption information and error code; zero here.
//!
//! A VM of 2007 sees `KVM_EXIT_EXCEPTION`, which was what its emulator could not do: the page fault that a fetch or an event
//! met where there is no memory, #UD for an instruction that is missing.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
use kvm_abi::consts::{
    KVM_EXIT_EXCEPTION, KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
};

use x86_defs::{pf::PfError, vector};

use super::entry_failure::last_cpu;
use super::{Outcome, Reason, Row};
use crate::vcpu::Vcpu;

pub(super) const ROW: Row = Row { reason: Reason::Unimplemented, vmx: None, shows: &["INTERNAL_ERROR", "EXCEPTION"] };

/// Words of debugging information behind the instruction.
const DEBUG_WORDS: usize = 5;

pub(super) fn handle(vcpu: &mut Vcpu, instruction: &[u8]) -> Outcome {
    log(vcpu, instruction);
    if vcpu.era.shows_exceptions() {
        let user = vcpu.cpu.sregs().segments[cpu_core::Seg::Ss as usize].dpl == 3;
        let fetch = if user { PfError::US } else { PfError::empty() };
        return if instruction.is_empty() {
            show_exception(vcpu, vector::PF, fetch.bits())
        } else {
            show_exception(vcpu, vector::UD, 0)
        };
    }
    let mut data = vec![0];
    if !instruction.is_empty() {
        data[0] = u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
        let mut bytes = [0x90; 16];
        bytes[0] = instruction.len() as u8;
        bytes[1..=instruction.len()].copy_from_slice(instruction);
        data.extend(bytes.chunks_exact(8).map(|word| word.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b))));
    }
    data.resize(data.len() + DEBUG_WORDS, 0);
    vcpu.page.set_internal(KVM_INTERNAL_ERROR_EMULATION, &data);
    vcpu.page.set_exit_reason(KVM_EXIT_INTERNAL_ERROR);
    Outcome::User
}

/// An event whose tables or TSS lie where there is no RAM: suberror `KVM_INTERNAL_ERROR_DELIVERY_EV`, as `vmx_handle_exit`
/// has it. data: IDT-vectoring information (valid, hardware exception or external interrupt), basic exit reason 48 (EPT
/// violation), qualification, which is 0, and CPU.
pub(super) fn handle_undeliverable(vcpu: &mut Vcpu, vector: u8) -> Outcome {
    if vcpu.era.shows_exceptions() {
        if vector >= 32 {
            // An interrupt that did not arrive waits again.
            vcpu.interrupts.insert(vector);
        }
        return show_exception(vcpu, vector::PF, 0);
    }
    let kind = if vector < 32 { 3 << 8 } else { 0 };
    let vectoring = 1 << 31 | kind | u64::from(vector);
    vcpu.page.set_internal(KVM_INTERNAL_ERROR_DELIVERY_EV, &[vectoring, 48, 0, last_cpu().into()]);
    vcpu.page.set_exit_reason(KVM_EXIT_INTERNAL_ERROR);
    Outcome::User
}

fn show_exception(vcpu: &mut Vcpu, exception: u8, error_code: u32) -> Outcome {
    vcpu.page.set_ex(exception.into(), error_code);
    vcpu.page.set_exit_reason(KVM_EXIT_EXCEPTION);
    Outcome::User
}

/// One line a second at most, for all VMs.
fn log(vcpu: &Vcpu, bytes: &[u8]) {
    static LAST: AtomicU64 = AtomicU64::new(0);
    static START: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    let now = START.elapsed().as_secs() + 1;
    if LAST.swap(now, Relaxed) == now {
        return;
    }
    let regs = vcpu.cpu.regs();
    let (vm, id, rip) = (vcpu.vm.id, vcpu.id, format_args!("{:#x}", vcpu.linear_rip()));
    if bytes.is_empty() {
        tracing::warn!(vm, vcpu = id, rip, "instruction fetch from where there is no memory");
        return;
    }
    let bitness = match (vcpu.cpu.is_64bit(), vcpu.cpu.sregs().segments[cpu_core::Seg::Cs as usize].db) {
        (true, _) => 64,
        (false, true) => 32,
        (false, false) => 16,
    };
    let instruction = Decoder::with_ip(bitness, bytes, regs.rip, DecoderOptions::NONE).decode();
    let mut text = String::new();
    IntelFormatter::new().format(&instruction, &mut text);
    tracing::warn!(vm, vcpu = id, rip, bytes = format_args!("{bytes:02x?}"), "instruction not implemented: {text}");
}
