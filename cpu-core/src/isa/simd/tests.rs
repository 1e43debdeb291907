//! What the fuzzer cannot see from user mode: control bits, faults by configuration, state images.

use iced_x86::code_asm::*;
use x86_defs::{Cr0, Cr4, vector};

use crate::testing::{Machine, step};

const DATA: u64 = 0x2_0000;

#[test]
fn control_bits_hold_instructions_back() {
    type Assemble = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;
    const SSE: Assemble = |a| a.addps(xmm1, xmm2);
    const MMX: Assemble = |a| a.paddb(mm1, mm2);
    const X87: Assemble = |a| a.fld1();
    const WAIT: Assemble = |a| a.wait();
    const FXSAVE: Assemble = |a| a.fxsave64(ptr(rbx));
    const MOVNTI: Assemble = |a| a.movnti(dword_ptr(rbx), eax);
    const CRC: Assemble = |a| a.crc32(eax, ebx);
    let (ts, em, mp, fxsr) = (Cr0::TS, Cr0::EM, Cr0::MP, Cr4::OSFXSR);
    let none = Cr0::empty();
    // SDM Vol. 3 "Action Taken for Combinations of OSFXSR, EM, MP, TS" and Vol. 1 "x87 FPU and SIMD Floating-Point".
    for (assemble, low, high, expected) in [
        (SSE, none, fxsr, None),
        (SSE, ts, fxsr, Some(vector::NM)),
        (SSE, em, fxsr, Some(vector::UD)),
        (SSE, em | ts, fxsr, Some(vector::UD)),
        (SSE, none, Cr4::empty(), Some(vector::UD)),
        (SSE, ts, Cr4::empty(), Some(vector::UD)),
        (MMX, none, Cr4::empty(), None),
        (MMX, ts, fxsr, Some(vector::NM)),
        (MMX, em, fxsr, Some(vector::UD)),
        (X87, none, Cr4::empty(), None),
        (X87, ts, fxsr, Some(vector::NM)),
        (X87, em, fxsr, Some(vector::NM)),
        (WAIT, ts, fxsr, None),
        (WAIT, mp, fxsr, None),
        (WAIT, em, fxsr, None),
        (WAIT, ts | mp, fxsr, Some(vector::NM)),
        (FXSAVE, ts, fxsr, Some(vector::NM)),
        (FXSAVE, em, fxsr, Some(vector::NM)),
        (FXSAVE, none, Cr4::empty(), None),
        (MOVNTI, ts | em, Cr4::empty(), None),
        (CRC, ts | em, Cr4::empty(), None),
    ] {
        let mut machine = Machine::new_64bit(|a| assemble(a).expect("encodable"));
        machine.cpu.set_reg(crate::state::Gpr::Rbx, DATA);
        machine.cpu.cr0 = machine.cpu.cr0 - (ts | em | mp) | low;
        machine.cpu.cr4 = machine.cpu.cr4 - fxsr | high;
        machine.cpu.derive();
        assert_eq!(step(&mut machine), expected, "{low:?} {high:?}");
    }
}

fn division(mxcsr: u32) -> Machine {
    let mut machine = Machine::new_64bit(|a| {
        a.divsd(xmm1, xmm2).expect("encodable");
        a.addsd(xmm3, xmm4).expect("encodable");
    });
    machine.cpu.fpu.mxcsr = mxcsr;
    machine.cpu.set_xmm(1, 0x3ff0_0000_0000_0000);
    machine.cpu.set_xmm(3, 0x3ff0_0000_0000_0000);
    machine.cpu.set_xmm(4, 0x3ca0_0000_0000_0001);
    machine
}

#[test]
fn masked_exceptions_set_sticky_flags() {
    let mut machine = division(0x1f80);
    assert_eq!((step(&mut machine), step(&mut machine)), (None, None));
    assert_eq!(machine.cpu.xmm(1), 0x7ff0_0000_0000_0000);
    assert_eq!(machine.cpu.fpu.mxcsr, 0x1fa4, "ZE of the division, PE of the sum");
}

#[test]
fn flags_of_the_host_do_not_come_back() {
    let mut machine = division(0x1f80);
    step(&mut machine);
    machine.cpu.fpu.mxcsr = 0x1f80;
    step(&mut machine);
    assert_eq!(machine.cpu.fpu.mxcsr, 0x1fa0, "PE alone");
}

#[test]
fn unmasked_exception_commits_flags_only() {
    let mut machine = division(0x1d80);
    assert_eq!(step(&mut machine), Some(vector::XM));
    assert_eq!((machine.cpu.xmm(1), machine.cpu.fpu.mxcsr), (0x3ff0_0000_0000_0000, 0x1d84));
    let mut machine = division(0x1d80);
    machine.cpu.cr4 -= Cr4::OSXMMEXCPT;
    assert_eq!(step(&mut machine), Some(vector::UD));
}

#[test]
fn rounding_of_the_guest_is_used_and_the_host_keeps_its_own() {
    // Toward +infinity: 1 + tiny is the next double.
    let mut machine = division(0x1f80 | 2 << 13);
    assert_eq!((step(&mut machine), step(&mut machine)), (None, None));
    assert_eq!(machine.cpu.xmm(3), 0x3ff0_0000_0000_0001);
    let one = std::hint::black_box(1.0f64);
    assert_eq!((one + f64::from_bits(0x3ca0_0000_0000_0000)).to_bits(), one.to_bits());
}

#[test]
fn reserved_bits_of_mxcsr_are_gp() {
    let mut machine = Machine::new_64bit(|a| a.ldmxcsr(dword_ptr(rbx)).expect("encodable"));
    machine.cpu.set_reg(crate::state::Gpr::Rbx, DATA);
    machine.write(DATA, &0x1_1f80u32.to_le_bytes());
    assert_eq!(step(&mut machine), Some(vector::GP));
    machine.write(DATA, &0x9fc0u32.to_le_bytes());
    assert_eq!((step(&mut machine), machine.cpu.fpu.mxcsr), (None, 0x9fc0));
}

#[test]
fn aligned_forms_want_alignment() {
    for (offset, expected) in [(0, None), (8, Some(vector::GP))] {
        let mut machine = Machine::new_64bit(|a| {
            a.movaps(xmm1, xmmword_ptr(rbx)).expect("encodable");
        });
        machine.cpu.set_reg(crate::state::Gpr::Rbx, DATA + offset);
        assert_eq!(step(&mut machine), expected);
    }
}

/// A machine at `XSAVE64 [rbx]; XRSTOR64 [rbx]` with XCR0 = x87 and SSE, and something in both.
fn xsave_machine() -> Machine {
    let mut machine = Machine::new_64bit(|a| {
        a.xsave64(ptr(rbx)).expect("encodable");
        a.xrstor64(ptr(rbx)).expect("encodable");
    });
    machine.cpu.cr4 |= Cr4::OSXSAVE;
    machine.cpu.derive();
    machine.cpu.fpu.xcr0 = 3;
    machine.cpu.fpu.fcw = 0x27f;
    machine.cpu.fpu.mxcsr = 0x3f80;
    for n in 0..16 {
        machine.cpu.set_xmm(n, u128::from(n) << 100 | 1);
    }
    machine.cpu.set_reg(crate::state::Gpr::Rbx, DATA);
    machine.cpu.set_reg(crate::state::Gpr::Rax, 3);
    machine
}

#[test]
fn xsave_and_xrstor_are_inverse() {
    let mut machine = xsave_machine();
    let before = machine.cpu.fpu.clone();
    assert_eq!(step(&mut machine), None);
    assert_eq!(u64::from_le_bytes(machine.read(DATA + 512)), 3);
    machine.cpu.fpu = crate::state::Fpu { xcr0: 3, ..Default::default() };
    assert_eq!(step(&mut machine), None);
    assert_eq!(machine.cpu.fpu, before);
}

#[test]
fn xrstor_initialises_what_xstate_bv_leaves_out() {
    let mut machine = xsave_machine();
    assert_eq!(step(&mut machine), None);
    machine.write(DATA + 512, &0u64.to_le_bytes());
    assert_eq!(step(&mut machine), None);
    assert_eq!((machine.cpu.fpu.fcw, machine.cpu.xmm(5)), (0x37f, 0));
    assert_eq!(machine.cpu.fpu.mxcsr, 0x3f80, "the standard form loads it whatever XSTATE_BV says");
}

#[test]
fn xrstor_checks_its_header() {
    // SDM Vol. 1 "Standard Form of XRSTOR" and "Compacted Form of XRSTOR".
    for (place, value, expected) in [
        (512, 7u64, Some(vector::GP)),
        (520, 1, Some(vector::GP)),
        (528, 1, Some(vector::GP)),
        (536, 1, None),
        (520, 1 << 63 | 3, None),
        (520, 1 << 63 | 1, Some(vector::GP)),
        (520, 1 << 63 | 7, Some(vector::GP)),
        (24, 0x1_0000, Some(vector::GP)),
    ] {
        let mut machine = xsave_machine();
        assert_eq!(step(&mut machine), None);
        machine.write(DATA + place, &value.to_le_bytes());
        assert_eq!(step(&mut machine), expected, "{place} {value:x}");
    }
}

#[test]
fn xsave_wants_osxsave_and_64_byte_alignment() {
    let mut machine = xsave_machine();
    machine.cpu.set_reg(crate::state::Gpr::Rbx, DATA + 32);
    assert_eq!(step(&mut machine), Some(vector::GP));
    machine.cpu.cr4 -= Cr4::OSXSAVE;
    assert_eq!(step(&mut machine), Some(vector::UD));
}

#[test]
fn sse_loads_and_stores_cross_pages() {
    let mut machine = Machine::new_64bit(|a| {
        a.movups(xmm1, xmmword_ptr(rbx)).expect("encodable");
        a.movups(xmmword_ptr(rcx), xmm1).expect("encodable");
        a.hlt().expect("encodable");
    });
    let bytes: [u8; 16] = std::array::from_fn(|i| i as u8 + 1);
    machine.write(DATA + 0xff9, &bytes);
    machine.cpu.set_reg(crate::state::Gpr::Rbx, DATA + 0xff9);
    machine.cpu.set_reg(crate::state::Gpr::Rcx, DATA + 0x1ff3);
    machine.cpu.run();
    assert_eq!(machine.read::<16>(DATA + 0x1ff3), bytes);
}
