//! An exception while another is being delivered. SDM Vol. 3 "Interrupt 8—Double Fault Exception (#DF)", table "Conditions for
//! Generating a Double Fault".

use super::*;
use x86_defs::vector::DE;

/// Where nothing is mapped.
const NOWHERE: u64 = 0x4000_0000;

/// What the guest of level 3 runs into.
#[derive(Clone, Copy, Debug)]
enum First {
    Divide,
    Undefined,
    Protection,
    Page,
}

/// What is wrong with the way to its handler.
#[derive(Clone, Copy, Debug)]
enum Second {
    /// The gate is not present: #NP.
    Gate,
    /// The gate's code segment is null: #GP.
    Selector,
    /// The stack of the inner level is not mapped: #PF.
    Stack,
}

fn guest(first: First, second: Second) -> Guest {
    let mut guest = Guest::new(3, |a| {
        match first {
            First::Divide => a.div(bl),
            First::Undefined => a.ud2(),
            First::Protection => a.hlt(),
            First::Page => a.mov(rax, qword_ptr(NOWHERE)),
        }
        .unwrap();
    });
    let vector = match first {
        First::Divide => DE,
        First::Undefined => UD,
        First::Protection => GP,
        First::Page => PF,
    };
    let interrupt = u32::from(system::INTERRUPT_GATE32);
    // A stack of their own for the handlers of the second exception and of #DF.
    for other in [GP, NP, PF, DF] {
        if other != vector {
            set_gate(&mut guest.0, other, gate(sel::CODE0, handler(other), P | interrupt, 1));
        }
    }
    match second {
        Second::Gate => set_gate(&mut guest.0, vector, gate(sel::CODE0, handler(vector), interrupt, 0)),
        Second::Selector => set_gate(&mut guest.0, vector, gate(0, handler(vector), P | interrupt, 0)),
        Second::Stack => guest.0.write(TSS + 4, &(NOWHERE + 0x1000).to_le_bytes()),
    }
    guest
}

#[test]
fn exceptions_combine_as_the_table_says() {
    const NOT_PRESENT: u64 = 3;
    let np = |vector: u8| Event(NP, Some(u64::from(vector) * 8 + NOT_PRESENT), 0);
    let gp = Event(GP, Some(1), 0);
    // A supervisor's write to a page that is not there.
    let pf = Event(PF, Some(2), 0);
    let df = Event(DF, Some(0), 0);
    let table = [
        (First::Undefined, Second::Gate, np(UD)),
        (First::Undefined, Second::Selector, gp),
        (First::Undefined, Second::Stack, pf),
        (First::Divide, Second::Gate, df),
        (First::Divide, Second::Selector, df),
        (First::Divide, Second::Stack, pf),
        (First::Protection, Second::Gate, df),
        (First::Protection, Second::Selector, df),
        (First::Protection, Second::Stack, pf),
        (First::Page, Second::Gate, df),
        (First::Page, Second::Selector, df),
        (First::Page, Second::Stack, df),
    ];
    for (first, second, expected) in table {
        assert_eq!(guest(first, second).run(), expected, "{first:?}, {second:?}");
    }
}

#[test]
fn a_third_fault_shuts_down() {
    for second in [Second::Gate, Second::Selector, Second::Stack] {
        let mut guest = guest(First::Page, second);
        set_gate(&mut guest.0, DF, gate(sel::CODE0, handler(DF), u32::from(system::INTERRUPT_GATE32), 0));
        assert_eq!(guest.run(), Seen::Exit(Exit::TripleFault), "{second:?}");
    }
}

#[test]
fn interrupts_combine_with_nothing() {
    let mut guest = Guest::new(3, |a| a.nop().unwrap());
    set_gate(&mut guest.0, 0x40, gate(sel::CODE0, handler(0x40), u32::from(system::INTERRUPT_GATE32), 0));
    guest.0.cpu.set_rflags(2 | Rflags::IF.bits());
    guest.0.cpu.queue_interrupt(0x40);
    assert_eq!(guest.run(), Event(NP, Some(0x40 * 8 + 3), 0));
}
