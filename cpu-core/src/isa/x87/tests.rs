//! Pending exceptions, and what the host keeps.

use iced_x86::code_asm::*;
use x86_defs::vector;

use crate::testing::{Machine, step};

/// The host's control word, status flags and full tag word.
fn host() -> (u16, u16, u16) {
    let mut frame = crate::host_x87::Frame::new();
    crate::host_x87::save_host(&mut frame);
    let word = |at: usize| u16::from_le_bytes([frame.image[at], frame.image[at + 1]]);
    (word(0), word(4) & 0xc0, word(8))
}

#[test]
fn unmasked_exception_waits_for_the_next_instruction_that_does() {
    let mut machine = Machine::new_64bit(|a| {
        a.fld1().expect("encodable");
        a.fldz().expect("encodable");
        a.fdivp(st1, st0).expect("encodable");
        a.fnstsw(ax).expect("encodable");
        a.fld1().expect("encodable");
        a.fnclex().expect("encodable");
        a.fld1().expect("encodable");
    });
    machine.cpu.fpu.fcw = 0x37b;
    let ends: Vec<_> = (0..4).map(|_| step(&mut machine)).collect();
    assert_eq!(ends, [None; 4]);
    let fsw = machine.cpu.reg(crate::state::Gpr::Rax) as u16;
    assert_eq!(fsw & 0x80bf, 0x8084, "ES, B and ZE");
    assert_eq!(fsw >> 11 & 7, 6, "an unmasked #Z pops nothing");
    assert_eq!(step(&mut machine), Some(vector::MF));
    machine.cpu.rip += 2;
    assert_eq!((step(&mut machine), step(&mut machine)), (None, None));
    assert_eq!(host(), (0x37f, 0, 0xffff));
}

#[test]
fn state_from_outside_cannot_trap_the_host() {
    let mut machine = Machine::new_64bit(|a| a.fadd_2(st0, st1).expect("encodable"));
    // An unmasked exception without ES, reserved bits set: no processor gets there.
    machine.cpu.fpu.fcw = 0xe340;
    machine.cpu.fpu.fsw = 0x3f;
    assert_eq!(step(&mut machine), Some(vector::MF));
    assert_eq!((machine.cpu.fpu.fcw, machine.cpu.fpu.fsw & 0x8080), (0x340, 0x8080));
}

#[test]
fn flags_of_the_host_do_not_come_back() {
    let mut machine = Machine::new_64bit(|a| {
        a.fsqrt().expect("encodable");
        a.fnclex().expect("encodable");
        a.fabs().expect("encodable");
    });
    machine.cpu.fpu.ftw = 1;
    machine.cpu.fpu.st[0] = (0x4000u128 << 64 | 1 << 63).to_le_bytes();
    step(&mut machine);
    assert_eq!(machine.cpu.fpu.fsw & 0x3f, 0x20);
    step(&mut machine);
    step(&mut machine);
    assert_eq!(machine.cpu.fpu.fsw & 0x3f, 0);
}

#[test]
fn precision_control_rounds() {
    let third = |fcw: u16| {
        let mut machine = Machine::new_64bit(|a| a.fdiv_2(st0, st1).expect("encodable"));
        machine.cpu.fpu.fcw = fcw;
        machine.cpu.fpu.ftw = 3;
        machine.cpu.fpu.st[0] = (0x3fffu128 << 64 | 1 << 63).to_le_bytes();
        machine.cpu.fpu.st[1] = (0x4000u128 << 64 | 3 << 62).to_le_bytes();
        assert_eq!(step(&mut machine), None);
        u128::from_le_bytes(machine.cpu.fpu.st[0]) as u64
    };
    assert_eq!(third(0x37f), 0xaaaa_aaaa_aaaa_aaab);
    assert_eq!(third(0x27f), 0xaaaa_aaaa_aaaa_a800);
    assert_eq!(third(0x07f), 0xaaaa_ab00_0000_0000);
    assert_eq!(third(0xf7f), 0xaaaa_aaaa_aaaa_aaaa);
}

#[test]
fn last_pointers_follow_the_instruction() {
    let mut machine = Machine::new_64bit(|a| {
        a.fld(qword_ptr(rbx + 8)).expect("encodable");
        a.fnstenv(ptr(rcx)).expect("encodable");
    });
    machine.cpu.set_reg(crate::state::Gpr::Rbx, 0x2_0000);
    machine.cpu.set_reg(crate::state::Gpr::Rcx, 0x2_1000);
    assert_eq!((step(&mut machine), step(&mut machine)), (None, None));
    let field = |i: u64| u32::from_le_bytes(machine.read(0x2_1000 + 4 * i));
    assert_eq!((field(3), field(5)), (crate::testing::CODE as u32, 0x2_0008));
    // DD 43 08
    assert_eq!(field(4) >> 16, 0x543);
    assert_eq!(machine.cpu.fpu.fcw & 0x3f, 0x3f);
}
