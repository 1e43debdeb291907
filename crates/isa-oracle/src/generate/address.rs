//! Makes a case's memory operands fall where accesses differ: aligned or not, across pages, into forbidden ones.

use iced_x86::{Instruction, Mnemonic, OpAccess, Register, UsedMemory};

use super::rng::Rng;
use super::values;
use crate::layout::{CODE_BASE, CODE_BYTES, DATA_BASE, DATA_BYTES, DATA_END, PAGE, READONLY_BASE};
use crate::state::{Case, Mode};

/// Adjusts a base register, an index or the displacement for each operand in `memory`, and fills the bytes it names.
pub(super) fn place(
    rng: &mut Rng,
    case: &mut Case,
    instruction: &Instruction,
    memory: &[UsedMemory],
    everything: bool,
) {
    let mut adjusted = Vec::new();
    for operand in memory.iter().filter(|operand| operand.access() != OpAccess::NoMemAccess || everything) {
        let size = operand.memory_size().size().max(1) as u64;
        let size = if instruction.is_save_restore_instruction() { 512.max(size) } else { size };
        let target = target(rng, case.mode, size, everything, needs_alignment(instruction, size));
        let Some(now) = effective(case, operand) else { continue };
        let mut delta = target.wrapping_sub(now);
        let base = operand.base();
        let index = operand.index();
        if is_general(base) && base != index && !adjusted.contains(&base.full_register()) {
            add(case, base, delta);
        } else if is_general(index) && operand.scale() == 1 && !adjusted.contains(&index.full_register()) {
            if base == index && !delta.is_multiple_of(2) {
                delta -= 1;
            }
            add(case, index, if base == index { delta.wrapping_shr(1) } else { delta });
        } else {
            displace(case, delta);
        }
        adjusted.extend([base.full_register(), index.full_register()]);
        if let Some(address) = effective(case, operand) {
            let around = if instruction.is_vsib() {
                80
            } else if everything {
                32
            } else {
                0
            };
            fill(rng, case, address, size, around, super::has_halves(instruction));
            let mxcsr = match instruction.mnemonic() {
                Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr => address,
                Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => address.wrapping_add(24),
                _ => continue,
            };
            // Half of the time without reserved bits, and never with the one that only AMD's CPUs have.
            let allowed = if rng.one_in(2) { 0xffff } else { !crate::vendor::MXCSR_AMD };
            for (i, keep) in allowed.to_le_bytes().into_iter().enumerate() {
                let place = mxcsr.wrapping_add(i as u64).wrapping_sub(DATA_BASE) as usize;
                if let Some(byte) = case.state.memory.get_mut(place) {
                    *byte &= keep;
                }
            }
        }
    }
    if memory.is_empty() && everything && rng.one_in(8) {
        let address = DATA_BASE + rng.below(DATA_BYTES as u64);
        fill(rng, case, address, 64, 32, false);
    }
}

/// FS or GS base: zero, a small number, or one that the operand must make up for.
pub(super) fn segment_base(rng: &mut Rng) -> u64 {
    match rng.below(4) {
        0 => 0,
        1 => rng.below(1 << 16),
        2 => DATA_BASE + rng.below(DATA_BYTES as u64),
        _ => 0x7000_0000_0000 | rng.bits() >> 24,
    }
}

fn is_general(register: Register) -> bool {
    register.is_gpr16() || register.is_gpr32() || register.is_gpr64()
}

/// Operands that fault unless aligned: half of them get their alignment.
fn needs_alignment(instruction: &Instruction, size: u64) -> bool {
    use Mnemonic as M;
    size >= 16 || matches!(instruction.mnemonic(), M::Cmpxchg8b)
}

/// A linear address for an operand of `size` bytes.
fn target(rng: &mut Rng, mode: Mode, size: u64, everything: bool, align: bool) -> u64 {
    let middle = DATA_BASE + 0x100 + rng.below(DATA_BYTES as u64 - 0x800);
    let aligned = middle & !(size.next_power_of_two().clamp(1, 32) - 1);
    if !everything {
        return if align && !rng.one_in(16) || rng.one_in(2) { aligned } else { middle };
    }
    let straddle = |rng: &mut Rng, at: u64| at.wrapping_sub(rng.below(size + 1));
    match rng.below(20) {
        0..=8 => aligned,
        9..=12 => middle,
        13 | 14 => straddle(rng, DATA_BASE + PAGE),
        15 => straddle(rng, READONLY_BASE),
        16 => READONLY_BASE + rng.below(PAGE),
        17 => straddle(rng, DATA_END),
        18 => straddle(rng, DATA_BASE),
        _ if mode == Mode::Bits16 => DATA_BASE + 0xfff0 + rng.below(16),
        _ if mode == Mode::Bits32 => rng.pick(&[0, 0xffff_fff8, CODE_BASE, 0x3000_0000, 0x8000_0000]),
        _ => match rng.below(6) {
            0 => rng.below(0x1000),
            1 => straddle(rng, 0x8000_0000_0000),
            2 => 0xffff_7fff_ffff_fff0 + rng.below(16),
            3 => (rng.bits() | 1 << 62) & !(1 << 63),
            4 => CODE_BASE + rng.below(CODE_BYTES as u64),
            _ => 0x3000_0000 + rng.below(PAGE),
        },
    }
}

/// Linear address of memory operand `operand` of the case's instruction.
pub(crate) fn operand_address(case: &Case, instruction: &Instruction, operand: u32) -> Option<u64> {
    instruction.virtual_address(operand, 0, |register, _, _| register_value(case, register))
}

/// The operand's linear address in the case's state.
fn effective(case: &Case, operand: &UsedMemory) -> Option<u64> {
    operand.virtual_address(0, |register, _, _| register_value(case, register))
}

fn register_value(case: &Case, register: Register) -> Option<u64> {
    Some(match register {
        Register::FS => case.state.fs_base,
        Register::GS => case.state.gs_base,
        Register::CS => case.mode.code_base(),
        Register::ES | Register::SS | Register::DS => case.mode.data_base(),
        Register::RIP | Register::EIP => 0,
        register if register.is_gpr() => value(case, register),
        // The base of a gather: indices are small.
        register if register.is_vector_register() => 0,
        _ => return None,
    })
}

fn value(case: &Case, register: Register) -> u64 {
    let full = case.state.gpr[register.full_register().number()];
    match register.size() {
        8 => full,
        4 => full & 0xffff_ffff,
        2 => full & 0xffff,
        _ if matches!(register, Register::AH | Register::CH | Register::DH | Register::BH) => full >> 8 & 0xff,
        _ => full & 0xff,
    }
}

fn add(case: &mut Case, register: Register, delta: u64) {
    let at = register.full_register().number();
    let sum = case.state.gpr[at].wrapping_add(delta);
    case.state.gpr[at] = match (case.mode, register.size()) {
        // A narrower address ignores the rest: keep it as it was.
        (_, 2) => case.state.gpr[at] & !0xffff | sum & 0xffff,
        (Mode::Bits32 | Mode::Bits16, _) => sum & 0xffff_ffff,
        (_, 4) => case.state.gpr[at] & !0xffff_ffff | sum & 0xffff_ffff,
        _ => sum,
    };
}

/// Adds `delta` to the displacement in the bytes, where it has one of two bytes or more.
fn displace(case: &mut Case, delta: u64) {
    let bytes = case.bytes.clone();
    let mut decoder =
        iced_x86::Decoder::with_ip(case.mode.bitness(), &bytes, case.state.rip, iced_x86::DecoderOptions::NONE);
    let instruction = decoder.decode();
    let offsets = decoder.get_constant_offsets(&instruction);
    let (at, size) = (offsets.displacement_offset(), offsets.displacement_size());
    if !offsets.has_displacement() || size < 2 {
        return;
    }
    let field = &mut case.bytes[at..at + size];
    let mut word = [0; 8];
    word[..size].copy_from_slice(field);
    let sum = u64::from_le_bytes(word).wrapping_add(delta);
    field.copy_from_slice(&sum.to_le_bytes()[..size]);
}

/// Puts interesting bytes where the operand lies, and `around` it, as far as that is writable memory.
fn fill(rng: &mut Rng, case: &mut Case, address: u64, size: u64, around: u64, of_halves: bool) {
    let mut bytes = vec![0; size as usize];
    values::memory(rng, &mut bytes, of_halves);
    for i in 0..size + 2 * around {
        let place = address.wrapping_add(i).wrapping_sub(around).wrapping_sub(DATA_BASE);
        if let Some(byte) = case.state.memory.get_mut(place as usize) {
            *byte = match i.checked_sub(around).and_then(|i| bytes.get(i as usize)) {
                Some(inside) => *inside,
                None if *byte == 0 => rng.bits() as u8,
                None => *byte,
            };
        }
    }
}
