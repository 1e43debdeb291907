//! What the fuzzer cannot see from user mode: what enables AVX, its state component, both paths of a memory operand.

use std::arch::is_x86_feature_detected;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use x86_defs::{Cr0, Cr4, vector};

use crate::state::{Gpr, VectorRegister};
use crate::testing::Machine;
use crate::vmx::Exit;

const DATA: u64 = 0x2_0000;

/// Runs one instruction; the vector of its fault.
fn step(machine: &mut Machine) -> Option<u8> {
    machine.cpu.set_exception_bitmap(!0);
    match machine.cpu.step() {
        None => None,
        Some(Exit::Exception { vector, .. }) => Some(vector),
        Some(other) => panic!("{other:?}"),
    }
}

fn enable(machine: &mut Machine) {
    machine.cpu.cr4 |= Cr4::OSXSAVE;
    machine.cpu.set_xcr0(7);
}

#[test]
fn osxsave_xcr0_and_ts_hold_vex_back() {
    if !is_x86_feature_detected!("avx") {
        return;
    }
    type Assemble = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    const ALL: [Assemble; 8] = [
        |a| a.vaddps(ymm1, ymm2, ymm3),
        |a| a.vpxor(xmm1, xmm2, xmm3),
        |a| a.vmovdqu(ymm1, ymmword_ptr(rbx)),
        |a| a.vpshufd(xmm1, xmm2, 3),
        |a| a.vmovd(eax, xmm1),
        |a| a.vzeroupper(),
        |a| a.vldmxcsr(dword_ptr(rbx)),
        |a| a.vucomisd(xmm1, xmm2),
    ];
    let (ts, em, osxsave) = (Cr0::TS, Cr0::EM, Cr4::OSXSAVE);
    // SDM Vol. 2 "Exceptions Type of Intel AVX Instructions": CR0.EM and CR4.OSFXSR do not matter.
    for (low, high, xcr0, expected) in [
        (Cr0::empty(), osxsave, 7, None),
        (em, osxsave, 7, None),
        (Cr0::empty(), Cr4::empty(), 7, Some(vector::UD)),
        (Cr0::empty(), osxsave, 3, Some(vector::UD)),
        (Cr0::empty(), osxsave, 1, Some(vector::UD)),
        (ts, osxsave, 7, Some(vector::NM)),
        (ts, osxsave, 3, Some(vector::UD)),
    ] {
        for (at, assemble) in ALL.iter().enumerate() {
            let mut machine = Machine::new_64bit(|a| assemble(a).expect("encodable"));
            machine.cpu.set_reg(Gpr::Rbx, DATA);
            machine.cpu.cr0 = machine.cpu.cr0 - (ts | em) | low;
            machine.cpu.cr4 = machine.cpu.cr4 - osxsave - Cr4::OSFXSR | high;
            machine.cpu.set_xcr0(xcr0);
            assert_eq!(step(&mut machine), expected, "row {at}, {low:?} {high:?} {xcr0}");
        }
    }
}

#[test]
fn real_mode_has_no_vex_prefix() {
    let mut machine = Machine::new_real(|a| a.vpxor(xmm1, xmm2, xmm3).expect("encodable"));
    enable(&mut machine);
    assert_eq!(step(&mut machine), Some(vector::UD));
}

#[test]
fn vectors_cross_pages() {
    if !is_x86_feature_detected!("avx") {
        return;
    }
    for offset in [0, 1, 0xfe0, 0xfe1, 0xff0, 0xfff] {
        let mut machine = Machine::new_64bit(|a| {
            a.vmovups(ymm1, ymmword_ptr(rbx)).expect("encodable");
            a.vxorps(ymm2, ymm2, ymmword_ptr(rbx)).expect("encodable");
            a.vmovups(ymmword_ptr(rcx), ymm1).expect("encodable");
            a.vmovups(ymmword_ptr(rdx), ymm2).expect("encodable");
            a.hlt().expect("encodable");
        });
        enable(&mut machine);
        let bytes: [u8; 32] = std::array::from_fn(|i| i as u8 + 1);
        machine.write(DATA + offset, &bytes);
        machine.cpu.set_reg(Gpr::Rbx, DATA + offset);
        machine.cpu.set_reg(Gpr::Rcx, DATA + 0x4000 + offset);
        machine.cpu.set_reg(Gpr::Rdx, DATA + 0x8000 + offset);
        machine.cpu.run();
        assert_eq!(machine.read::<32>(DATA + 0x4000 + offset), bytes, "{offset:x}");
        assert_eq!(machine.read::<32>(DATA + 0x8000 + offset), bytes, "{offset:x}");
    }
}

/// A machine at XSAVEC [rbx], then XRSTOR [rbx], with `upper` in YMM7.
fn compacting(upper: u8) -> Machine {
    let mut machine = Machine::new_64bit(|a| {
        a.xsavec64(ptr(rbx)).expect("encodable");
        a.xrstor64(ptr(rbx)).expect("encodable");
    });
    enable(&mut machine);
    machine.cpu.fpu.vector[7].0[16..32].fill(upper);
    machine.write(DATA, &[0xee; 0x400]);
    // XSAVEC leaves the reserved bytes of the header alone, and XRSTOR wants zeros there.
    machine.write(DATA + 512, &[0; 64]);
    machine.cpu.set_reg(Gpr::Rbx, DATA);
    machine.cpu.set_reg(Gpr::Rax, 6);
    machine
}

/// SDM Vol. 1 "Operation of XSAVEC": the AVX component follows the header, and is left out while initial.
#[test]
fn avx_state_is_saved_while_it_is_in_use() {
    for (upper, in_use, saved) in [(0x5a, 6u64, 0x5a), (0, 2, 0xee)] {
        let mut machine = compacting(upper);
        assert_eq!(step(&mut machine), None);
        assert_eq!(u64::from_le_bytes(machine.read(DATA + 512)), in_use);
        assert_eq!(u64::from_le_bytes(machine.read(DATA + 520)), 1 << 63 | 6);
        assert_eq!(machine.read::<1>(DATA + 576 + 7 * 16), [saved]);
        machine.cpu.fpu.vector[7] = VectorRegister([0x77; 64]);
        assert_eq!(step(&mut machine), None);
        assert_eq!(machine.cpu.fpu.vector[7].0[16..32], [upper; 16]);
    }
}

#[test]
fn xgetbv_1_shows_what_is_in_use() {
    for (upper, expected) in [(0, 3), (1, 7)] {
        let mut machine = Machine::new_64bit(|a| a.xgetbv().expect("encodable"));
        enable(&mut machine);
        machine.cpu.fpu.vector[15].0[31] = upper;
        machine.cpu.set_reg(Gpr::Rcx, 1);
        assert_eq!(step(&mut machine), None);
        assert_eq!(machine.cpu.reg(Gpr::Rax), expected);
    }
}

/// SDM Vol. 1 "Operation of XSAVES" and "Operation of XRSTORS": as XSAVEC and XRSTOR, for CPL 0, and never standard.
#[test]
fn supervisor_forms_are_compacted_and_privileged() {
    let machine = || {
        let mut machine = Machine::new_64bit(|a| {
            a.xsaves64(ptr(rbx)).expect("encodable");
            a.xrstors64(ptr(rbx)).expect("encodable");
        });
        enable(&mut machine);
        machine.cpu.fpu.vector[7].0[16..32].fill(0x5a);
        machine.cpu.set_reg(Gpr::Rbx, DATA);
        machine.cpu.set_reg(Gpr::Rax, 7);
        machine
    };
    let mut inverse = machine();
    assert_eq!(step(&mut inverse), None);
    assert_eq!(u64::from_le_bytes(inverse.read(DATA + 520)), 1 << 63 | 7);
    inverse.cpu.fpu.vector[7] = VectorRegister::default();
    assert_eq!(step(&mut inverse), None);
    assert_eq!(inverse.cpu.fpu.vector[7].0[16..32], [0x5a; 16]);

    let mut standard = machine();
    assert_eq!(step(&mut standard), None);
    standard.write(DATA + 520, &0u64.to_le_bytes());
    assert_eq!(step(&mut standard), Some(vector::GP));

    let mut user = machine();
    user.cpu.cpl = 3;
    assert_eq!(step(&mut user), Some(vector::GP));
}
