//! SYSENTER and SYSEXIT. SDM Vol. 2, their pages; Vol. 3 "Fast System Calls in 32-Bit Mode".

use super::*;

/// IA32_SYSENTER_CS of the guest: level 0 at 08H and 10H, level 3 at 18H and 20H.
fn with_msrs(mut guest: Guest) -> Guest {
    let msrs = &mut guest.0.cpu.msrs;
    msrs.sysenter_cs = sel::CODE0.into();
    msrs.sysenter_esp = INNER_STACK.into();
    msrs.sysenter_eip = OTHER_CODE.into();
    guest
}

#[test]
fn sysenter_loads_flat_segments_of_level_0() {
    for cpl in [0, 3] {
        let mut guest = with_msrs(Guest::new(cpl, |a| a.sysenter().unwrap()));
        guest.0.write(OTHER_CODE.into(), &[0xf4]);
        guest.0.cpu.set_rflags(2 | (Rflags::IF | Rflags::CF).bits());
        // Limits of the GDT do not matter: no descriptor is looked at.
        guest.0.cpu.gdt.limit = 7;
        assert_eq!(guest.0.cpu.run(), Exit::Hlt);
        let cpu = &guest.0.cpu;
        assert_eq!((cpu.rip, cpu.reg(Gpr::Rsp), cpu.rflags()), (u64::from(OTHER_CODE) + 1, INNER_STACK.into(), 3));
        let (code, stack) = (cpu.seg[Seg::Cs as usize], cpu.seg[Seg::Ss as usize]);
        assert_eq!((code.selector, code.type_, code.dpl, code.db, code.limit), (sel::CODE0, 11, 0, true, u32::MAX));
        assert_eq!((stack.selector, stack.type_, stack.dpl, stack.db, stack.limit), (sel::DATA0, 3, 0, true, u32::MAX));
        assert_eq!(cpu.cpl, 0);
    }
}

#[test]
fn sysexit_returns_to_level_3() {
    let mut guest = with_msrs(Guest::new(0, |a| {
        a.mov(edx, OTHER_CODE as i32).unwrap();
        a.mov(ecx, STACK as i32).unwrap();
        a.sysexit().unwrap();
    }));
    assert_eq!(guest.run(), Done);
    // What INT 80H of level 3 pushed.
    let frame: Vec<u32> = (0..5).map(|i| guest.frame(i)).collect();
    assert_eq!(frame, [OTHER_CODE + 2, sel::CODE3.into(), 2, STACK as u32, sel::DATA3.into()]);
}

#[test]
fn null_code_segments_and_levels_are_refused() {
    // The RPL of IA32_SYSENTER_CS does not count: 3 is a null selector too.
    for selector in [0, 3, 0x1_0000] {
        for (cpl, code) in [(3, CodeAssembler::sysenter as fn(&mut CodeAssembler) -> _), (0, CodeAssembler::sysexit)] {
            let mut guest = with_msrs(Guest::new(cpl, |a| code(a).unwrap()));
            guest.0.cpu.msrs.sysenter_cs = selector;
            assert_eq!(guest.run(), Event(GP, Some(0), 0), "{selector:#x}");
        }
    }
    assert_eq!(with_msrs(Guest::new(3, |a| a.sysexit().unwrap())).run(), Event(GP, Some(0), 0));
}

#[test]
fn real_mode_has_neither() {
    for code in [CodeAssembler::sysenter as fn(&mut CodeAssembler) -> _, CodeAssembler::sysexit] {
        let mut machine = Machine::new_real(|a| code(a).unwrap());
        machine.cpu.msrs.sysenter_cs = 8;
        // Vector 13 of the table at 0.
        machine.write(13 * 4, &[0, 0x40, 0, 0]);
        machine.write(0x4000, &[0xf4]);
        assert_eq!(machine.cpu.run(), Exit::Hlt);
        assert_eq!(machine.cpu.rip, 0x4001);
    }
}
