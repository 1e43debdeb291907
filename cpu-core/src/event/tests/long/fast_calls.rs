//! SYSENTER and SYSEXIT of IA-32e mode, SYSCALL of compatibility mode, by vendor. SDM Vol. 2, their pages; APM Vol. 3
//! "SYSCALL" and "SYSENTER" for AMD's.

use super::*;
use crate::state::CpuidEntry;

const UPPER: u64 = 0xffff_8000_0000_0000;

fn with_msrs(mut guest: Guest) -> Guest {
    let msrs = &mut guest.0.cpu.msrs;
    msrs.sysenter_cs = sel::CODE0.into();
    msrs.sysenter_esp = INNER_STACK;
    msrs.sysenter_eip = OTHER_CODE;
    guest
}

/// CPL 3 in compatibility mode: `assemble` must encode the same in 32 bits.
fn compatibility(assemble: impl FnOnce(&mut CodeAssembler)) -> Guest {
    let mut guest = with_msrs(Guest::new(3, assemble));
    let cpu = &mut guest.0.cpu;
    cpu.seg[Seg::Cs as usize] = Segment::of(Selector(sel::COMPAT3), Descriptor(segment(CODE32 | LEVEL3)));
    cpu.derive();
    guest
}

fn of_amd(mut guest: Guest) -> Guest {
    let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
    let regs = [1, word(b"Auth"), word(b"cAMD"), word(b"enti")];
    guest.0.cpu.set_cpuid(&[CpuidEntry { function: 0, index: None, regs }]);
    guest
}

#[test]
fn sysenter_reaches_64_bit_code_from_both_sub_modes() {
    for compatible in [false, true] {
        let enter = |a: &mut CodeAssembler| a.sysenter().unwrap();
        let mut guest = if compatible { compatibility(enter) } else { with_msrs(Guest::new(3, enter)) };
        guest.0.cpu.msrs.sysenter_esp = UPPER;
        guest.0.write(OTHER_CODE, &[0xf4]);
        guest.0.cpu.set_rflags(2 | Rflags::IF.bits());
        assert_eq!(guest.0.cpu.run(), Exit::Hlt);
        let cpu = &guest.0.cpu;
        assert_eq!((cpu.rip, cpu.reg(Gpr::Rsp), cpu.rflags(), cpu.cpl), (OTHER_CODE + 1, UPPER, 2, 0));
        let (code, stack) = (cpu.seg[Seg::Cs as usize], cpu.seg[Seg::Ss as usize]);
        assert_eq!(
            (code.selector, code.l, code.db, stack.selector, stack.dpl),
            (sel::CODE0, true, false, sel::DATA0, 0)
        );
        assert!(cpu.is_64bit());
    }
}

#[test]
fn sysexit_goes_to_either_sub_mode() {
    // IA32_SYSENTER_CS + 16 is compatibility mode's, + 32 that of 64-bit mode.
    for (wide, code, stack) in [(false, 0x18 | 3, 0x20 | 3), (true, 0x28 | 3, 0x30 | 3)] {
        let mut guest = with_msrs(Guest::new(0, |a| if wide { a.sysexitq() } else { a.sysexit() }.unwrap()));
        guest.0.cpu.set_reg(Gpr::Rdx, if wide { OTHER_CODE } else { UPPER | OTHER_CODE });
        guest.0.cpu.set_reg(Gpr::Rcx, if wide { STACK } else { UPPER | STACK });
        assert_eq!(guest.run(), Done, "{wide}");
        let frame: Vec<u64> = (0..5).map(|i| guest.frame(i)).collect();
        assert_eq!(frame, [OTHER_CODE + 2, code, 2, STACK, stack]);
    }
}

#[test]
fn sysexit_refuses_addresses_that_are_not_canonical() {
    for (target, top) in [(NON_CANONICAL, STACK), (OTHER_CODE, NON_CANONICAL)] {
        let mut guest = with_msrs(Guest::new(0, |a| a.sysexitq().unwrap()));
        guest.0.cpu.set_reg(Gpr::Rdx, target);
        guest.0.cpu.set_reg(Gpr::Rcx, top);
        assert_eq!(guest.run(), Event(GP, Some(0), 0));
    }
    assert_eq!(with_msrs(Guest::new(3, |a| a.sysexitq().unwrap())).run(), Event(GP, Some(0), 0));
}

#[test]
fn vendors_differ_in_compatibility_mode() {
    let call = |a: &mut CodeAssembler| a.syscall().unwrap();
    assert_eq!(compatibility(call).run(), Event(UD, None, 0), "Intel's SYSCALL is that of 64-bit mode");
    let mut guest = of_amd(compatibility(call));
    guest.0.cpu.msrs.cstar = OTHER_CODE;
    guest.0.cpu.msrs.lstar = 0;
    guest.0.cpu.msrs.fmask = Rflags::IF.bits();
    guest.0.cpu.set_rflags(2 | Rflags::IF.bits());
    assert_eq!(guest.run(), Done);
    assert_eq!((guest.0.cpu.reg(Gpr::Rcx), guest.0.cpu.reg(Gpr::R11)), (AT + 2, 2 | Rflags::IF.bits()));
    assert_eq!((guest.frame(1), guest.frame(2)), (sel::CODE0.into(), 2));

    let enter = |a: &mut CodeAssembler| a.sysenter().unwrap();
    assert_eq!(of_amd(compatibility(enter)).run(), Event(UD, None, 0));
    assert_eq!(of_amd(with_msrs(Guest::new(3, enter))).run(), Event(UD, None, 0));
    assert_eq!(of_amd(with_msrs(Guest::new(0, |a| a.sysexit().unwrap()))).run(), Event(UD, None, 0));
}
