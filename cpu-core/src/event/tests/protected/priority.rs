//! What comes first when several events are due, and what holds them back. SDM Vol. 3 "Priority Among Concurrent Events",
//! "Masking Exceptions and Interrupts When Switching Stacks"; Vol. 2 "STI" and "MOV".

use super::*;

const INTERRUPT: u8 = 0x40;
const NMI: u8 = x86_defs::vector::NMI;

/// Distance of a handler from the code, as [`Event`] shows it of an event that interrupts the handler's first instruction.
fn at(vector: u8) -> u64 {
    handler(vector).wrapping_sub(crate::testing::CODE)
}

/// Of events due together the first is delivered first, so the last is what runs, on top of the others' first instructions.
#[test]
fn traps_precede_nmis_and_nmis_precede_interrupts() {
    let mut guest = Guest::new(0, |a| a.nop().unwrap());
    guest.0.cpu.set_rflags(2 | (Rflags::TF | Rflags::IF).bits());
    assert_eq!(guest.0.cpu.step(), None);
    guest.0.cpu.queue_nmi();
    guest.0.cpu.queue_interrupt(INTERRUPT);
    // #DB for the NOP, and the NMI before #DB's handler; the interrupt finds IF clear.
    assert_eq!(guest.run(), Event(NMI, None, at(DB)));
    assert_eq!(guest.frame(3), crate::testing::CODE as u32 + 1);
    assert_eq!(guest.0.cpu.events().interrupt, Some(INTERRUPT));
}

#[test]
fn an_interrupt_precedes_a_breakpoint_on_the_next_instruction() {
    let mut guest = Guest::new(0, |a| a.nop().unwrap());
    let mut regs = guest.0.cpu.debug_regs();
    (regs.db[0], regs.dr7) = (crate::testing::CODE, 0x402);
    guest.0.cpu.set_debug_regs(regs);
    guest.0.cpu.set_rflags(2 | Rflags::IF.bits());
    guest.0.cpu.queue_interrupt(INTERRUPT);
    assert_eq!(guest.run(), Event(INTERRUPT, None, 0));
}

#[test]
fn a_breakpoint_precedes_the_faults_of_its_instruction() {
    // Beyond the limit of CS, and invalid.
    for limit in [crate::testing::CODE as u32 - 1, u32::MAX] {
        let mut guest = Guest::new(3, |a| a.ud2().unwrap());
        let cpu = &mut guest.0.cpu;
        let mut regs = cpu.debug_regs();
        (regs.db[0], regs.dr7) = (crate::testing::CODE, 0x402);
        cpu.set_debug_regs(regs);
        cpu.seg[Seg::Cs as usize] = Segment { limit, g: limit == u32::MAX, ..cpu.seg[Seg::Cs as usize] };
        cpu.derive();
        assert_eq!(guest.run(), Event(DB, None, 0), "{limit:#x}");
    }
}

#[test]
fn shadows_last_one_instruction() {
    type Code = fn(&mut CodeAssembler);
    // What runs first, IF, whether an NMI waits too, where the first event comes.
    let table: &[(&str, Code, bool, bool, u64)] = &[
        ("STI", |a| a.sti().unwrap(), false, false, 2),
        // The second changes nothing, so it has no shadow of its own.
        ("STI STI", |a| (a.sti().unwrap(), a.sti().unwrap()).0, false, false, 2),
        ("MOV SS", |a| a.mov(ss, ax).unwrap(), true, false, 4),
        ("MOV SS", |a| a.mov(ss, ax).unwrap(), true, true, 4),
        ("POP SS", |a| a.pop(ss).unwrap(), true, true, 2),
        ("MOV DS", |a| a.mov(ds, ax).unwrap(), true, true, 3),
    ];
    for (name, code, enabled, nmi, expected) in table {
        let mut guest = Guest::new(0, |a| {
            code(a);
            a.nop().unwrap();
            a.nop().unwrap();
        });
        let cpu = &mut guest.0.cpu;
        cpu.set_reg(Gpr::Rax, sel::DATA0.into());
        cpu.set_rflags(2 | if *enabled { Rflags::IF.bits() } else { 0 });
        guest.0.write(STACK, &u32::from(sel::DATA0).to_le_bytes());
        if *enabled {
            // What is due at once would precede the instruction.
            assert_eq!(guest.0.cpu.step(), None);
        }
        let vector = if *nmi { NMI } else { INTERRUPT };
        if *nmi {
            guest.0.cpu.queue_nmi()
        } else {
            guest.0.cpu.queue_interrupt(INTERRUPT)
        }
        assert_eq!(guest.run(), Event(vector, None, *expected), "{name}, NMI {nmi}");
    }
}

#[test]
fn an_interrupt_window_opens_behind_the_shadow() {
    let mut guest = Guest::new(0, |a| {
        a.sti().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
    });
    guest.0.cpu.set_interrupt_window_exiting(true);
    assert_eq!(guest.run(), Seen::Exit(Exit::InterruptWindow));
    assert_eq!(guest.0.cpu.rip, crate::testing::CODE + 2);
}
