//! Breakpoints on ports and data, the T bit of a task, RF. SDM Vol. 3, chapter "Debug, Branch Profile, TSC, …", sections "Debug
//! Registers" and "Debug Exceptions".

use super::*;

/// DR6 bits that tell a cause.
const CAUSES: u64 = 0xe00f;

/// DR7 for breakpoint 0, for all tasks: R/W and LEN as encoded.
fn armed(rw: u64, len: u64) -> u64 {
    0x402 | rw << 16 | len << 18
}

#[test]
fn port_breakpoints_trap_behind_the_access() {
    // DR0, LEN, port, bytes, hit. SDM "Breakpoint Field Recognition": LEN 0 is a byte, 1 a word, 3 a doubleword.
    let table: &[(u64, u64, i32, u8, bool)] = &[
        (0x60, 0, 0x60, 1, true),
        (0x60, 0, 0x61, 1, false),
        (0x60, 0, 0x5f, 1, false),
        (0x61, 0, 0x60, 2, true),
        (0x61, 0, 0x60, 1, false),
        (0x60, 1, 0x61, 1, true),
        (0x60, 3, 0x63, 1, true),
        (0x60, 3, 0x64, 1, false),
        (0x63, 0, 0x60, 4, true),
        // Unaligned: the low bits of the address do not count.
        (0x63, 3, 0x60, 1, true),
    ];
    for &(at, len, port, bytes, hit) in table {
        for input in [true, false] {
            let mut guest = Guest::new(0, |a| {
                match (input, bytes) {
                    (true, 1) => a.in_(al, port),
                    (true, 2) => a.in_(ax, port),
                    (true, _) => a.in_(eax, port),
                    (false, 1) => a.out(port, al),
                    (false, 2) => a.out(port, ax),
                    (false, _) => a.out(port, eax),
                }
                .unwrap();
                a.nop().unwrap();
            });
            let cpu = &mut guest.0.cpu;
            cpu.cr4 |= Cr4::DE;
            cpu.debug.db[0] = at;
            cpu.debug.dr7 = armed(2, len);
            assert!(matches!(cpu.run(), Exit::Io(_)));
            if input {
                cpu.complete_io_in(&[0; 4][..bytes.into()])
            } else {
                cpu.complete_io_out()
            }
            let behind = if bytes == 2 { 3 } else { 2 };
            let expected = if hit { Event(DB, None, behind) } else { Done };
            assert_eq!(guest.run(), expected, "DR0 {at:#x} LEN {len}, {bytes} bytes at {port:#x}, IN {input}");
            assert_eq!(guest.0.cpu.debug.dr6 & CAUSES, hit.into());
        }
    }
}

#[test]
fn data_breakpoints_trap_behind_the_access() {
    const AT: u64 = 0x7_0010;
    // R/W, LEN, DR0, address, bytes, write, hit.
    let table: &[(u64, u64, u64, u64, u8, bool, bool)] = &[
        (1, 0, AT, AT, 1, true, true),
        (1, 0, AT, AT, 1, false, false),
        (3, 0, AT, AT, 1, false, true),
        (3, 0, AT, AT, 1, true, true),
        (1, 0, AT + 1, AT, 1, true, false),
        (1, 0, AT + 3, AT, 4, true, true),
        (1, 0, AT + 4, AT, 4, true, false),
        (1, 3, AT, AT + 3, 1, true, true),
        (1, 3, AT, AT + 4, 1, true, false),
        (1, 1, AT + 1, AT, 1, true, true),
        (3, 3, AT, AT - 1, 4, false, true),
    ];
    for &(rw, len, breakpoint, address, bytes, write, hit) in table {
        let mut guest = Guest::new(0, |a| {
            match (write, bytes) {
                (true, 1) => a.mov(byte_ptr(ebx), al),
                (true, _) => a.mov(dword_ptr(ebx), eax),
                (false, 1) => a.mov(al, byte_ptr(ebx)),
                (false, _) => a.mov(eax, dword_ptr(ebx)),
            }
            .unwrap();
            a.nop().unwrap();
        });
        let cpu = &mut guest.0.cpu;
        cpu.set_reg(Gpr::Rbx, address);
        let mut regs = cpu.debug_regs();
        (regs.db[0], regs.dr7) = (breakpoint, armed(rw, len));
        cpu.set_debug_regs(regs);
        let expected = if hit { Event(DB, None, 2) } else { Done };
        assert_eq!(guest.run(), expected, "{:x?}", (rw, len, breakpoint, address, bytes, write));
        assert_eq!(guest.0.cpu.debug.dr6 & CAUSES, hit.into());
    }
}

#[test]
fn a_task_with_its_t_bit_traps_before_its_first_instruction() {
    let mut guest =
        Guest::new(0, |a| a.db(&[0xea, 0, 0, 0, 0, sel::OTHER_TSS as u8, 0]).unwrap()).with_other_task(&[(100, 1)]);
    assert_eq!(guest.run(), Event(DB, None, u64::from(OTHER_CODE) - crate::testing::CODE));
    assert_eq!(guest.0.cpu.debug.dr6 & CAUSES, 1 << 15);
    assert_eq!(guest.0.cpu.tr.selector, sel::OTHER_TSS);
}

#[test]
fn iret_resumes_at_a_breakpoint_once() {
    for (flags, rounds) in [(2 | Rflags::RF.bits() as u32, 1), (2, 0)] {
        let mut guest = Guest::new(0, |a| a.iretd().unwrap());
        for (i, value) in [OTHER_CODE, sel::CODE0.into(), flags].into_iter().enumerate() {
            guest.0.write(STACK - 12 + 4 * i as u64, &value.to_le_bytes());
        }
        // INC EBX, and back to it.
        guest.0.write(OTHER_CODE.into(), &[0x43, 0xeb, 0xfd]);
        let cpu = &mut guest.0.cpu;
        cpu.set_reg(Gpr::Rsp, STACK - 12);
        let mut regs = cpu.debug_regs();
        (regs.db[0], regs.dr7) = (OTHER_CODE.into(), armed(0, 0));
        cpu.set_debug_regs(regs);
        assert_eq!(guest.run(), Event(DB, None, u64::from(OTHER_CODE) - crate::testing::CODE));
        assert_eq!(guest.0.cpu.reg(Gpr::Rbx), rounds, "{flags:#x}");
    }
}

#[test]
fn popf_does_not_load_rf() {
    let mut guest = Guest::new(0, |a| {
        a.push(0x1_0002).unwrap();
        a.popfd().unwrap();
        a.nop().unwrap();
    });
    let mut regs = guest.0.cpu.debug_regs();
    (regs.db[0], regs.dr7) = (crate::testing::CODE + 6, armed(0, 0));
    guest.0.cpu.set_debug_regs(regs);
    assert_eq!(guest.run(), Event(DB, None, 6));
}

#[test]
fn a_debugger_leaves_the_guest_its_registers() {
    use crate::state::Breakpoints;
    const AT: u64 = crate::testing::CODE;
    let mut guest = Guest::new(0, |a| {
        a.mov(ebx, dr0).unwrap();
        a.mov(eax, AT as i32 + 0x1d).unwrap();
        a.mov(dr0, eax).unwrap();
        a.mov(ecx, dr7).unwrap();
        a.mov(eax, 0x402).unwrap();
        a.mov(dr7, eax).unwrap();
        a.mov(edx, dr0).unwrap();
        // The debugger's breakpoint, then the guest's.
        a.nop().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
    });
    let cpu = &mut guest.0.cpu;
    cpu.debug.db[0] = 0x1234;
    cpu.set_debugger(Some(Breakpoints { db: [0, AT + 0x19, 0, 0], dr7: 0x408 }));
    cpu.set_exception_bitmap(1 << DB);
    assert_eq!(guest.run(), Seen::Exit(Exit::Exception { vector: DB, dr6: 2 }));
    let cpu = &mut guest.0.cpu;
    assert_eq!(cpu.rip, AT + 0x19);
    assert_eq!([Gpr::Rbx, Gpr::Rcx, Gpr::Rdx].map(|r| cpu.reg(r)), [0x1234, 0x400, AT + 0x1d]);
    // Past it, the guest's own breakpoint is none while the debugger's are in force.
    cpu.set_rflags(cpu.rflags() | Rflags::RF.bits());
    assert_eq!(guest.run(), Done);
    let cpu = &mut guest.0.cpu;
    cpu.set_debugger(None);
    cpu.set_exception_bitmap(0);
    cpu.rip = AT + 0x19;
    assert_eq!(guest.run(), Event(DB, None, 0x1d));
}
