//! Protection as tables: what each load, gate, return and task switch does, with the SDM's error codes.
//!
//! A 32-bit guest without paging.

mod debugging;
mod fast_calls;
mod paged_tasks;
mod priority;
mod stacks;

use iced_x86::code_asm::*;
use x86_defs::descriptor::system_type as system;
use x86_defs::vector::{BR, DB, DF, GP, NP, OF, SS, TS, UD};
use x86_defs::{AccessRights, Cr0, Cr4, Descriptor, Rflags, Selector};

use super::Seen::{self, Done, Event};
use super::{DONE, gate, handler, run_to_handler, segment};
use crate::state::{DescriptorTable, Gpr, Seg, Segment};
use crate::testing::Machine;
use crate::vmx::Exit;

const GDT: u64 = 0x1_0000;
const IDT: u64 = 0x1_1000;
const TSS: u64 = 0x1_2000;
const OTHER_TSS: u64 = 0x1_6000;
const LDT: u64 = 0x1_8000;
const INNER_STACK: u32 = 0x3_0000;
const STACK: u64 = 0x4_0000;
const OTHER_CODE: u32 = 0x5_0000;
/// Another vector that every level may raise.
const OPEN: u8 = 0x21;

/// Selectors of the guest's GDT.
mod sel {
    pub(super) const CODE0: u16 = 0x08;
    pub(super) const DATA0: u16 = 0x10;
    pub(super) const CODE3: u16 = 0x18 | 3;
    pub(super) const DATA3: u16 = 0x20 | 3;
    pub(super) const TSS: u16 = 0x28;
    pub(super) const OTHER_TSS: u16 = 0x30;
    pub(super) const LDT: u16 = 0x38;
    pub(super) const CONFORMING: u16 = 0x40;
    pub(super) const ABSENT_CODE: u16 = 0x48;
    pub(super) const READONLY: u16 = 0x50;
    pub(super) const EXEC_ONLY: u16 = 0x58;
    pub(super) const ABSENT_DATA: u16 = 0x60;
    pub(super) const CALL_GATE: u16 = 0x68;
    pub(super) const TASK_GATE: u16 = 0x70;
    pub(super) const CALL_GATE0: u16 = 0x78;
    pub(super) const ABSENT_GATE: u16 = 0x80;
    pub(super) const DATA1: u16 = 0x88;
    pub(super) const BUSY_TSS: u16 = 0x90;
    pub(super) const SMALL_TSS: u16 = 0x98;
    pub(super) const NULL_GATE: u16 = 0xa0;
    pub(super) const OUTSIDE: u16 = 0xa8;
    pub(super) const IN_LDT: u16 = 0x0c;
}

const P: u32 = 0x80;
const CODE: u32 = P | 0x1b | 0xc000;
const DATA: u32 = P | 0x13 | 0xc000;

fn tss(base: u64, limit: u32, typ: u8) -> u64 {
    Descriptor::new(base as u32, limit, AccessRights(P | u32::from(typ))).0
}

struct Guest(Machine);

impl Guest {
    fn new(cpl: u8, assemble: impl FnOnce(&mut CodeAssembler)) -> Self {
        let mut machine = Machine::new_32bit(|a| {
            assemble(a);
            a.int(i32::from(DONE)).unwrap();
        });
        let level = |cpl: u32| cpl << 5;
        let entries = [
            0,
            segment(CODE),
            segment(DATA),
            segment(CODE | level(3)),
            segment(DATA | level(3)),
            tss(TSS, 0x67 + 0x2001, system::TSS32_BUSY),
            tss(OTHER_TSS, 0x67, system::TSS32_AVAILABLE),
            tss(LDT, 0xff, system::LDT),
            segment(CODE | 4),
            segment(CODE & !P),
            segment(DATA & !2),
            segment(CODE & !2),
            segment(DATA & !P),
            gate(sel::CODE0, OTHER_CODE.into(), P | level(3) | u32::from(system::CALL_GATE32), 2),
            gate(sel::OTHER_TSS, 0, P | level(3) | u32::from(system::TASK_GATE), 0),
            gate(sel::CODE0, OTHER_CODE.into(), P | u32::from(system::CALL_GATE32), 0),
            gate(sel::CODE0, OTHER_CODE.into(), level(3) | u32::from(system::CALL_GATE32), 0),
            segment(DATA | level(1)),
            tss(OTHER_TSS, 0x67, system::TSS32_BUSY),
            tss(OTHER_TSS, 0x66, system::TSS32_AVAILABLE),
            gate(0, OTHER_CODE.into(), P | level(3) | u32::from(system::CALL_GATE32), 0),
        ];
        for (i, entry) in entries.iter().enumerate() {
            machine.write(GDT + 8 * i as u64, &entry.to_le_bytes());
        }
        machine.write(LDT + 8, &segment(DATA | level(3)).to_le_bytes());
        for vector in 0..=255u8 {
            let dpl = if matches!(vector, DONE | 3 | 4 | OPEN) { level(3) } else { 0 };
            let entry = gate(sel::CODE0, handler(vector), P | dpl | u32::from(system::INTERRUPT_GATE32), 0);
            machine.write(IDT + 8 * u64::from(vector), &entry.to_le_bytes());
            machine.write(handler(vector), &[0xf4]);
        }
        machine.write(OTHER_CODE.into(), &[0xcd, DONE]);
        machine.write(TSS + 4, &INNER_STACK.to_le_bytes());
        machine.write(TSS + 8, &sel::DATA0.to_le_bytes());
        machine.write(TSS + 102, &104u16.to_le_bytes());
        machine.write(TSS + 104, &[0xff; 0x2001]);
        let cpu = &mut machine.cpu;
        cpu.gdt = DescriptorTable { base: GDT, limit: 8 * entries.len() as u16 - 1 };
        cpu.idt = DescriptorTable { base: IDT, limit: 0x7ff };
        cpu.tr = Segment::of(Selector(sel::TSS), Descriptor(entries[5]));
        cpu.ldt = Segment::of(Selector(sel::LDT), Descriptor(entries[7]));
        let (code, data) = if cpl == 0 { (1, 2) } else { (3, 4) };
        cpu.seg = [Segment::of(Selector(data * 8 | u16::from(cpl)), Descriptor(entries[usize::from(data)])); 6];
        cpu.seg[Seg::Cs as usize] =
            Segment::of(Selector(code * 8 | u16::from(cpl)), Descriptor(entries[usize::from(code)]));
        cpu.cpl = cpl;
        cpu.gpr[Gpr::Rsp as usize] = STACK;
        cpu.derive();
        Self(machine)
    }

    /// The TSS that [`sel::OTHER_TSS`] names, at CPL 0.
    fn with_other_task(mut self, change: &[(u64, u32)]) -> Self {
        let fields: [(u64, u32); 10] = [
            (32, OTHER_CODE),
            (36, 2),
            (40, 0x1111),
            (56, 0x6_0000),
            (72, sel::DATA0.into()),
            (76, sel::CODE0.into()),
            (80, sel::DATA0.into()),
            (84, sel::DATA0.into()),
            (96, sel::LDT.into()),
            (102, 104),
        ];
        for (at, value) in fields.iter().chain(change) {
            self.0.write(OTHER_TSS + at, &value.to_le_bytes());
        }
        self
    }

    fn long(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.0.read(at))
    }

    /// Doubleword `i` of the handler's stack.
    fn frame(&self, i: u64) -> u32 {
        self.long(self.0.cpu.reg(Gpr::Rsp) + 4 * i)
    }

    fn run(&mut self) -> Seen {
        run_to_handler(&mut self.0, 4)
    }
}

/// An access and a stack that are not aligned, at CPL 3, where the handler of #AC is too.
pub(super) fn alignment_check_at_level_3() -> Machine {
    let mut guest = Guest::new(3, |a| a.mov(eax, dword_ptr(esp)).unwrap());
    let entry = gate(sel::CODE3, handler(17), P | u32::from(system::INTERRUPT_GATE32), 0);
    guest.0.write(IDT + 8 * 17, &entry.to_le_bytes());
    let cpu = &mut guest.0.cpu;
    cpu.cr0 |= Cr0::AM;
    cpu.set_rflags(2 | Rflags::AC.bits());
    cpu.gpr[Gpr::Rsp as usize] = STACK - 2;
    cpu.derive();
    cpu.flush_tlb();
    guest.0
}

/// Runs `assemble` at `cpl` and says what came of it.
fn run(cpl: u8, assemble: impl FnOnce(&mut CodeAssembler)) -> Seen {
    Guest::new(cpl, assemble).run()
}

fn error(selector: u16) -> Option<u64> {
    Some(u64::from(selector & !3))
}

#[test]
fn loads_of_data_segments() {
    let table = [
        (0, sel::DATA0, Done),
        (0, sel::DATA3, Done),
        (0, 0, Done),
        (0, 3, Done),
        (0, sel::CODE0, Done),
        (0, sel::READONLY, Done),
        (0, sel::CONFORMING, Done),
        (0, sel::IN_LDT | 3, Done),
        (0, sel::EXEC_ONLY, Event(GP, error(sel::EXEC_ONLY), 4)),
        (0, sel::TSS, Event(GP, error(sel::TSS), 4)),
        (0, sel::OUTSIDE, Event(GP, error(sel::OUTSIDE), 4)),
        (0, 0xfffc, Event(GP, Some(0xfffc), 4)),
        (0, sel::DATA0 | 3, Event(GP, error(sel::DATA0), 4)),
        (0, sel::ABSENT_DATA, Event(NP, error(sel::ABSENT_DATA), 4)),
        (3, sel::DATA3, Done),
        (3, sel::DATA0, Event(GP, error(sel::DATA0), 4)),
        (3, sel::DATA1 | 1, Event(GP, error(sel::DATA1), 4)),
        (3, sel::CONFORMING | 3, Done),
        (3, sel::CODE0, Event(GP, error(sel::CODE0), 4)),
    ];
    for (cpl, selector, expected) in table {
        let seen = run(cpl, |a| {
            a.mov(ax, i32::from(selector)).unwrap();
            a.mov(es, ax).unwrap();
        });
        assert_eq!(seen, expected, "CPL {cpl}, selector {selector:#x}");
    }
}

#[test]
fn loads_of_the_stack_segment() {
    let table = [
        (0, sel::DATA0, Done),
        (0, 0, Event(GP, Some(0), 4)),
        (0, sel::DATA3, Event(GP, error(sel::DATA3), 4)),
        (0, sel::DATA0 | 3, Event(GP, error(sel::DATA0), 4)),
        (0, sel::READONLY, Event(GP, error(sel::READONLY), 4)),
        (0, sel::CODE0, Event(GP, error(sel::CODE0), 4)),
        (0, sel::ABSENT_DATA, Event(SS, error(sel::ABSENT_DATA), 4)),
        (3, sel::DATA3, Done),
        (3, sel::IN_LDT | 3, Done),
        (3, sel::DATA0, Event(GP, error(sel::DATA0), 4)),
    ];
    for (cpl, selector, expected) in table {
        let seen = run(cpl, |a| {
            a.mov(ax, i32::from(selector)).unwrap();
            a.mov(ss, ax).unwrap();
        });
        assert_eq!(seen, expected, "CPL {cpl}, selector {selector:#x}");
    }
}

#[test]
fn a_load_sets_the_accessed_bit() {
    let mut guest = Guest::new(0, |a| {
        a.mov(ax, i32::from(sel::DATA0)).unwrap();
        a.mov(es, ax).unwrap();
    });
    guest.0.write(GDT + u64::from(sel::DATA0), &segment(DATA & !1).to_le_bytes());
    assert_eq!(guest.run(), Done);
    assert_eq!(guest.0.read::<8>(GDT + u64::from(sel::DATA0)), segment(DATA).to_le_bytes());
}

/// The far pointers of JMP and CALL, CPL 0 and 3: the same checks.
#[test]
fn far_jumps_and_calls() {
    let table = [
        (0, 0, Event(GP, Some(0), 0)),
        (0, sel::OUTSIDE, Event(GP, error(sel::OUTSIDE), 0)),
        (0, sel::DATA0, Event(GP, error(sel::DATA0), 0)),
        (0, sel::LDT, Event(GP, error(sel::LDT), 0)),
        (0, sel::CODE3, Event(GP, error(sel::CODE3), 0)),
        (0, sel::CODE0, Done),
        (0, sel::CODE0 | 3, Event(GP, error(sel::CODE0), 0)),
        (0, sel::CONFORMING | 3, Done),
        (0, sel::ABSENT_CODE, Event(NP, error(sel::ABSENT_CODE), 0)),
        (0, sel::CALL_GATE, Done),
        (0, sel::CALL_GATE0, Done),
        (0, sel::NULL_GATE, Event(GP, Some(0), 0)),
        (0, sel::ABSENT_GATE, Event(NP, error(sel::ABSENT_GATE), 0)),
        (0, sel::BUSY_TSS, Event(GP, error(sel::BUSY_TSS), 0)),
        (0, sel::SMALL_TSS, Event(TS, error(sel::SMALL_TSS), 0)),
        (0, sel::OTHER_TSS, Done),
        (0, sel::TASK_GATE, Done),
        (3, sel::CODE0, Event(GP, error(sel::CODE0), 0)),
        (3, sel::CODE3, Done),
        (3, sel::CONFORMING, Done),
        (3, sel::CALL_GATE0, Event(GP, error(sel::CALL_GATE0), 0)),
        (3, sel::OTHER_TSS, Event(GP, error(sel::OTHER_TSS), 0)),
        (3, sel::TASK_GATE, Done),
    ];
    for (cpl, selector, expected) in table {
        for call in [false, true] {
            let mut guest = Guest::new(cpl, |a| {
                let [lo, hi] = selector.to_le_bytes();
                let [b0, b1, b2, b3] = OTHER_CODE.to_le_bytes();
                a.db(&[if call { 0x9a } else { 0xea }, b0, b1, b2, b3, lo, hi]).unwrap();
            })
            .with_other_task(&[]);
            assert_eq!(guest.run(), expected, "CPL {cpl}, selector {selector:#x}, call {call}");
        }
    }
    // Only a CALL may go inward through a gate.
    let through = |opcode: u8| move |a: &mut CodeAssembler| a.db(&[opcode, 0, 0, 0, 0, 0x68, 0]).unwrap();
    assert_eq!(run(3, through(0xea)), Event(GP, error(sel::CODE0), 0));
}

#[test]
fn call_gate_switches_stacks_and_copies_parameters() {
    let mut guest = Guest::new(3, |a| {
        a.push(0x1111).unwrap();
        a.push(0x2222).unwrap();
        a.db(&[0x9a, 0, 0, 0, 0, sel::CALL_GATE as u8, 0]).unwrap();
    });
    assert_eq!(guest.run(), Done);
    // Above the frame of INT 80H, which stays at level 0.
    let frame: Vec<u32> = (3..9).map(|i| guest.frame(i)).collect();
    let back = CODE_AT + 17;
    assert_eq!(frame, [back, sel::CODE3.into(), 0x2222, 0x1111, STACK as u32 - 8, sel::DATA3.into()]);
    assert_eq!(guest.0.cpu.reg(Gpr::Rsp), u64::from(INNER_STACK) - 4 * 9);
    assert_eq!((guest.0.cpu.cpl, guest.0.cpu.seg[Seg::Ss as usize].selector), (0, sel::DATA0));
}

const CODE_AT: u32 = crate::testing::CODE as u32;

#[test]
fn inner_stacks_are_checked() {
    let table: &[(u16, u32, Seen)] = &[
        (0, INNER_STACK, Event(TS, Some(0), 0)),
        (sel::DATA0 | 1, INNER_STACK, Event(TS, error(sel::DATA0), 0)),
        (sel::READONLY, INNER_STACK, Event(TS, error(sel::READONLY), 0)),
        (sel::OUTSIDE, INNER_STACK, Event(TS, error(sel::OUTSIDE), 0)),
        (sel::ABSENT_DATA, INNER_STACK, Event(SS, error(sel::ABSENT_DATA), 0)),
    ];
    for &(stack, top, expected) in table {
        let mut guest = Guest::new(3, |a| a.db(&[0x9a, 0, 0, 0, 0, sel::CALL_GATE as u8, 0]).unwrap());
        guest.0.write(TSS + 4, &top.to_le_bytes());
        guest.0.write(TSS + 8, &stack.to_le_bytes());
        // The exception needs a stack of its own: a task with none of the broken ones.
        for vector in [TS, SS] {
            let entry = gate(sel::TASK_GATE, 0, P | u32::from(system::TASK_GATE), 0);
            let entry = entry & !0xffff_0000 | u64::from(sel::OTHER_TSS) << 16;
            guest.0.write(IDT + 8 * u64::from(vector), &entry.to_le_bytes());
        }
        let vector = match expected {
            Event(vector, ..) => vector,
            _ => unreachable!("every row faults"),
        };
        let mut guest = guest.with_other_task(&[(32, handler(vector) as u32)]);
        assert_eq!(guest.0.cpu.run(), Exit::Hlt);
        assert_eq!(guest.0.cpu.rip, handler(vector) + 1, "SS {stack:#x}");
        let Event(_, code, _) = expected else { unreachable!("every row faults") };
        assert_eq!(Some(guest.frame(0).into()), code, "SS {stack:#x}");
        // The old task was left at the CALL.
        assert_eq!(guest.long(TSS + 32), CODE_AT);
        assert_eq!(guest.long(OTHER_TSS) & 0xffff, sel::TSS.into());
    }
}

#[test]
fn exceptions_and_their_error_codes() {
    type Case = (&'static str, u8, fn(&mut CodeAssembler), Seen);
    let table: &[Case] = &[
        ("UD2", 3, |a| a.ud2().unwrap(), Event(UD, None, 0)),
        ("INT without DPL", 3, |a| a.int(0x20).unwrap(), Event(GP, Some(0x20 * 8 + 2), 0)),
        ("INT at CPL 0", 0, |a| a.int(0x20).unwrap(), Event(0x20, None, 2)),
        ("INT3", 3, |a| a.int3().unwrap(), Event(3, None, 1)),
        ("INT1", 3, |a| a.int1().unwrap(), Event(DB, None, 1)),
        ("INTO, clear", 3, |a| a.into().unwrap(), Done),
        (
            "INTO, set",
            3,
            |a| {
                a.mov(al, 0x7f).unwrap();
                a.add(al, 1).unwrap();
                a.into().unwrap();
            },
            Event(OF, None, 5),
        ),
        (
            "BOUND",
            0,
            |a| {
                a.push(5).unwrap();
                a.push(3).unwrap();
                a.mov(eax, 2).unwrap();
                a.bound(eax, dword_ptr(esp)).unwrap();
            },
            Event(BR, None, 9),
        ),
        ("HLT", 3, |a| a.hlt().unwrap(), Event(GP, Some(0), 0)),
        ("CLI", 3, |a| a.cli().unwrap(), Event(GP, Some(0), 0)),
        ("IN", 3, |a| a.in_(al, 0x60).unwrap(), Event(GP, Some(0), 0)),
        ("MOV CR0", 3, |a| a.mov(eax, cr0).unwrap(), Event(GP, Some(0), 0)),
        ("RDMSR", 3, |a| a.rdmsr().unwrap(), Event(GP, Some(0), 0)),
        ("LTR of a busy TSS", 0, |a| ltr(a, sel::BUSY_TSS), Event(GP, error(sel::BUSY_TSS), 4)),
        ("LTR of null", 0, |a| ltr(a, 0), Event(GP, Some(0), 4)),
        ("LTR", 0, |a| ltr(a, sel::OTHER_TSS), Done),
        ("SYSENTER without CS", 3, |a| a.sysenter().unwrap(), Event(GP, Some(0), 0)),
        ("SYSCALL without SCE", 3, |a| a.syscall().unwrap(), Event(UD, None, 0)),
        ("RSM", 0, |a| a.rsm().unwrap(), Event(UD, None, 0)),
    ];
    for (name, cpl, code, expected) in table {
        assert_eq!(run(*cpl, code), *expected, "{name}");
    }
}

fn ltr(a: &mut CodeAssembler, selector: u16) {
    a.mov(ax, i32::from(selector)).unwrap();
    a.ltr(ax).unwrap();
}

#[test]
fn broken_gates_combine_as_the_table_says() {
    let table = [
        // The gate of #UD is not present: #NP names it, EXT because an exception was on its way.
        (vec![(UD, 0u64)], Event(GP, Some(u64::from(UD) * 8 + 3), 0)),
        (
            vec![(UD, gate(sel::CODE0, 0, u32::from(system::INTERRUPT_GATE32), 0))],
            Event(NP, Some(u64::from(UD) * 8 + 3), 0),
        ),
        (vec![(UD, gate(0, 0, P | u32::from(system::INTERRUPT_GATE32), 0))], Event(GP, Some(1), 0)),
        (
            vec![(UD, gate(sel::DATA0, 0, P | u32::from(system::INTERRUPT_GATE32), 0))],
            Event(GP, Some(u64::from(sel::DATA0) | 1), 0),
        ),
        // #UD is benign; #GP and #NP are contributory.
        (vec![(UD, 0), (GP, 0)], Event(DF, Some(0), 0)),
        (vec![(UD, 0), (GP, 0), (DF, 0)], Seen::Exit(Exit::TripleFault)),
    ];
    for (gates, expected) in table {
        let mut guest = Guest::new(0, |a| a.ud2().unwrap());
        for (vector, entry) in &gates {
            guest.0.write(IDT + 8 * u64::from(*vector), &entry.to_le_bytes());
        }
        assert_eq!(guest.run(), expected, "{gates:x?}");
    }
}

#[test]
fn pushed_flags_and_flags_of_the_handler() {
    let mut guest = Guest::new(3, |a| a.ud2().unwrap());
    guest.0.cpu.set_rflags(0x0020_4203 | Rflags::AC.bits());
    assert_eq!(guest.run(), Event(UD, None, 0));
    // A fault sets RF in the image; NT, IF are cleared behind it, AC and ID stay.
    assert_eq!(guest.frame(2), 0x0021_4203 | Rflags::AC.bits() as u32);
    assert_eq!(guest.0.cpu.rflags(), 0x0020_0003 | Rflags::AC.bits());
    assert_eq!((guest.frame(1), guest.frame(3), guest.frame(4)), (sel::CODE3.into(), STACK as u32, sel::DATA3.into()));
}

#[test]
fn returns_to_outer_levels() {
    let frame = |code: u16, stack: u16| {
        move |a: &mut CodeAssembler| {
            a.push(i32::from(stack)).unwrap();
            a.push(STACK as i32 - 0x100).unwrap();
            a.push(0x3202).unwrap();
            a.push(i32::from(code)).unwrap();
            a.push(OTHER_CODE as i32).unwrap();
            a.iretd().unwrap();
        }
    };
    // Length of the five pushes.
    const AT: u64 = 2 + 5 + 5 + 2 + 5;
    let table = [
        (sel::CODE3, sel::DATA3, Done),
        (0, sel::DATA3, Event(GP, Some(0), AT)),
        (sel::CODE3, 0, Event(GP, Some(0), AT)),
        (sel::CODE3, sel::DATA0, Event(GP, error(sel::DATA0), AT)),
        (sel::CODE0 | 3, sel::DATA3, Event(GP, error(sel::CODE0), AT)),
        (sel::DATA3, sel::DATA3, Event(GP, error(sel::DATA3), AT)),
        (sel::CONFORMING | 3, sel::DATA3, Done),
        (sel::CODE0, 0, Done),
    ];
    for (code, stack, expected) in table {
        let mut guest = Guest::new(0, frame(code, stack));
        assert_eq!(guest.run(), expected, "CS {code:#x}, SS {stack:#x}");
        if expected == Done && code & 3 == 3 {
            assert_eq!(guest.frame(3), STACK as u32 - 0x100);
            assert_eq!(guest.frame(2), 0x3202);
            // DS is of level 0 and does not survive; the handler loads none.
            assert!(guest.0.cpu.seg[Seg::Ds as usize].unusable);
        }
    }
}

#[test]
fn a_fault_in_iret_leaves_everything() {
    let mut guest = Guest::new(0, |a| a.iretd().unwrap());
    let bad = [OTHER_CODE, sel::CODE3.into(), 0x3202, 0x1234, sel::DATA0.into()];
    for (i, value) in bad.iter().enumerate() {
        guest.0.write(STACK - 20 + 4 * i as u64, &value.to_le_bytes());
    }
    guest.0.cpu.set_reg(Gpr::Rsp, STACK - 20);
    assert_eq!(guest.run(), Event(GP, error(sel::DATA0), 0));
    // Delivered at level 0, on the stack that IRET would have popped.
    assert_eq!(guest.0.cpu.reg(Gpr::Rsp), STACK - 20 - 16);
    assert_eq!((guest.frame(2), guest.0.cpu.cpl), (sel::CODE0.into(), 0));
}

#[test]
fn task_switch_by_call_and_back() {
    let mut guest = Guest::new(0, |a| {
        a.mov(eax, 0x77).unwrap();
        a.db(&[0x9a, 0, 0, 0, 0, sel::OTHER_TSS as u8, 0]).unwrap();
        a.mov(ebx, 0x88).unwrap();
    })
    .with_other_task(&[]);
    // The other task counts and returns.
    guest.0.write(OTHER_CODE.into(), &[0x40, 0xcf]);
    assert_eq!(guest.run(), Done);
    let cpu = &guest.0.cpu;
    assert_eq!((cpu.reg(Gpr::Rax), cpu.reg(Gpr::Rbx), cpu.tr.selector), (0x77, 0x88, sel::TSS));
    assert!(cpu.cr0.contains(Cr0::TS));
    // EAX and EIP of the other task were saved, its NT cleared, its descriptor available again.
    assert_eq!((guest.long(OTHER_TSS + 40), guest.long(OTHER_TSS + 32)), (0x1112, OTHER_CODE + 2));
    assert_eq!(guest.long(OTHER_TSS + 36) & 0x4000, 0);
    assert_eq!(guest.long(OTHER_TSS) & 0xffff, sel::TSS.into());
    let typ = |selector: u16| guest.long(GDT + u64::from(selector) + 4) >> 8 & 15;
    assert_eq!((typ(sel::TSS), typ(sel::OTHER_TSS)), (11, 9));
}

#[test]
fn task_switch_by_jump_is_not_nested() {
    let mut guest = Guest::new(0, |a| a.db(&[0xea, 0, 0, 0, 0, sel::OTHER_TSS as u8, 0]).unwrap()).with_other_task(&[]);
    assert_eq!(guest.run(), Done);
    let typ = |selector: u16| guest.long(GDT + u64::from(selector) + 4) >> 8 & 15;
    assert_eq!((typ(sel::TSS), typ(sel::OTHER_TSS)), (9, 11));
    // The flags that INT pushed.
    assert_eq!(guest.frame(2) & 0x4000, 0);
    assert_eq!(guest.long(OTHER_TSS) & 0xffff, 0);
}

#[test]
fn a_16_bit_task_is_called_and_returns() {
    let mut guest = Guest::new(0, |a| {
        a.mov(eax, 0x1234_5678).unwrap();
        a.db(&[0x9a, 0, 0, 0, 0, sel::SMALL_TSS as u8, 0]).unwrap();
    });
    let entry = tss(OTHER_TSS, 0x2b, system::TSS16_AVAILABLE);
    guest.0.write(GDT + u64::from(sel::SMALL_TSS), &entry.to_le_bytes());
    let words: [(u64, u16); 9] = [
        (14, 0x1800),
        (16, 2),
        (18, 0x1111),
        (26, 0x7000),
        (34, sel::DATA0),
        (36, sel::CODE0),
        (38, sel::DATA0),
        (40, sel::DATA0),
        (42, 0),
    ];
    for (at, value) in words {
        guest.0.write(OTHER_TSS + at, &value.to_le_bytes());
    }
    // INC EAX, IRETD.
    guest.0.write(0x1800, &[0x40, 0xcf]);
    assert_eq!(guest.run(), Done);
    let cpu = &guest.0.cpu;
    assert_eq!((cpu.reg(Gpr::Rax), cpu.tr.selector), (0x1234_5678, sel::TSS));
    let word = |at: u64| u16::from_le_bytes(guest.0.read(OTHER_TSS + at));
    assert_eq!((word(0), word(14), word(18), word(26)), (sel::TSS, 0x1802, 0x1112, 0x7000));
    assert_eq!(word(16) & 0x4000, 0);
}

/// CLI, STI and PUSHF by mode and level: SDM Vol. 2, the tables of decisions.
#[test]
fn virtual_interrupt_flags() {
    const VIF: u64 = Rflags::VIF.bits();
    const IF: u64 = Rflags::IF.bits();
    // CR4, IOPL, instruction, RFLAGS before and after, without IOPL.
    type Case = (Cr4, u64, fn(&mut CodeAssembler), u64, Option<u64>);
    let table: &[Case] = &[
        (Cr4::empty(), 3, |a| a.cli().unwrap(), IF, Some(0)),
        (Cr4::empty(), 0, |a| a.cli().unwrap(), IF, None),
        (Cr4::PVI, 0, |a| a.cli().unwrap(), IF | VIF, Some(IF)),
        (Cr4::PVI, 0, |a| a.sti().unwrap(), IF, Some(IF | VIF)),
        (Cr4::PVI, 0, |a| a.sti().unwrap(), IF | Rflags::VIP.bits(), None),
        (Cr4::PVI, 3, |a| a.cli().unwrap(), IF | VIF, Some(VIF)),
    ];
    for (enabled, iopl, code, before, after) in table {
        let mut guest = Guest::new(3, code);
        guest.0.cpu.cr4 |= *enabled;
        guest.0.cpu.set_rflags(2 | iopl << 12 | before);
        let seen = guest.run();
        match after {
            None => assert_eq!(seen, Event(GP, Some(0), 0), "{enabled:?} {iopl} {before:#x}"),
            Some(after) => {
                assert_eq!(seen, Done, "{enabled:?} {iopl} {before:#x}");
                assert_eq!(u64::from(guest.frame(2)) & (IF | VIF), *after, "{enabled:?} {iopl} {before:#x}");
            }
        }
    }
}

#[test]
fn popf_changes_what_the_level_owns() {
    // CPL, IOPL before, image, RFLAGS after.
    let all = 0x3f_7fd7u32;
    let table = [
        (0, 0, all & !0x100, 0x24_7ed7),
        (3, 3, all & !0x100, 0x24_7ed7),
        (3, 0, all & !0x100, 0x24_4cd7),
        (3, 1, all & !0x100, 0x24_5cd7),
    ];
    for (cpl, iopl, image, after) in table {
        let mut guest = Guest::new(cpl, |a| {
            a.push(image as i32).unwrap();
            a.popfd().unwrap();
        });
        guest.0.cpu.set_rflags(2 | iopl << 12);
        assert_eq!(guest.run(), Done);
        assert_eq!(guest.frame(2), after, "CPL {cpl}, IOPL {iopl}");
    }
}

#[test]
fn segments_of_a_new_task_fault_in_it() {
    // Field, selector, vector, error code.
    let table: &[(u64, u16, u8, u32)] = &[
        (96, sel::DATA0, TS, sel::DATA0.into()),
        (76, 0, TS, 0),
        (76, sel::DATA0, TS, sel::DATA0.into()),
        (76, sel::CODE3 & !3, TS, u32::from(sel::CODE3 & !3)),
        (76, sel::ABSENT_CODE, NP, sel::ABSENT_CODE.into()),
        (80, 0, TS, 0),
        (80, sel::DATA3, TS, u32::from(sel::DATA3 & !3)),
        (80, sel::ABSENT_DATA, SS, sel::ABSENT_DATA.into()),
        (84, sel::EXEC_ONLY, TS, sel::EXEC_ONLY.into()),
        (84, sel::ABSENT_DATA, NP, sel::ABSENT_DATA.into()),
    ];
    for &(field, selector, vector, code) in table {
        let mut guest = Guest::new(0, |a| a.db(&[0xea, 0, 0, 0, 0, sel::OTHER_TSS as u8, 0]).unwrap())
            .with_other_task(&[(field, selector.into())]);
        // Delivered through a task gate to a third task: the second may lack a stack.
        let third = TSS + 0x3000;
        guest.0.write(GDT + u64::from(sel::SMALL_TSS), &tss(third, 0x67, system::TSS32_AVAILABLE).to_le_bytes());
        let fields: [(u64, u32); 6] = [
            (32, handler(vector) as u32),
            (36, 2),
            (56, 0x7_0000),
            (76, sel::CODE0.into()),
            (80, sel::DATA0.into()),
            (102, 104),
        ];
        for (at, value) in fields {
            guest.0.write(third + at, &value.to_le_bytes());
        }
        let entry = gate(sel::SMALL_TSS, 0, P | u32::from(system::TASK_GATE), 0);
        guest.0.write(IDT + 8 * u64::from(vector), &entry.to_le_bytes());
        assert_eq!(guest.0.cpu.run(), Exit::Hlt);
        assert_eq!(guest.0.cpu.rip, handler(vector) + 1, "field {field}, selector {selector:#x}");
        assert_eq!(guest.frame(0), code, "field {field}, selector {selector:#x}");
        // The faulting EIP is the new task's first.
        assert_eq!(guest.long(OTHER_TSS + 32), OTHER_CODE);
        assert_eq!(guest.long(third) & 0xffff, sel::OTHER_TSS.into());
    }
}

#[test]
fn virtual_8086_enters_and_leaves() {
    // UD2 in virtual-8086 mode at 1000H:0; its frame has nine doublewords.
    let mut guest = Guest::new(0, |a| a.iretd().unwrap());
    let frame: [u32; 9] = [0, 0x1000, 0x2_0202, 0x200, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000];
    for (i, value) in frame.iter().enumerate() {
        guest.0.write(STACK - 36 + 4 * i as u64, &value.to_le_bytes());
    }
    guest.0.write(0x1_0000 + 0x200, &[0]);
    guest.0.cpu.set_reg(Gpr::Rsp, STACK - 36);
    // The GDT lies at 1000H:0: the first bytes of a null descriptor are free.
    guest.0.write(GDT, &[0x0f, 0x0b]);
    let seen = guest.run();
    assert_eq!(seen, Event(UD, None, 0u64.wrapping_sub(crate::testing::CODE)));
    let image: Vec<u32> = (0..9).map(|i| guest.frame(i)).collect();
    assert_eq!(image, [0, 0x1000, 0x3_0202, 0x200, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000]);
    let cpu = &guest.0.cpu;
    assert!(!cpu.is_v86() && cpu.seg[Seg::Ds as usize].unusable && cpu.cpl == 0);
}

#[test]
fn software_interrupts_of_virtual_8086_mode() {
    // CR4.VME, IOPL, redirection bit: who handles INT 21H.
    const METHODS: [(bool, u32, bool, Seen); 6] = [
        (false, 3, false, Event(0x21, None, 2)),
        (false, 0, false, Event(GP, Some(0), 0)),
        (true, 0, true, Event(GP, Some(0), 0)),
        (true, 3, true, Event(0x21, None, 2)),
        // Redirected: the program's own handler executes UD2 at 1000H:10H.
        (true, 3, false, Event(UD, None, 0x10)),
        (true, 0, false, Event(UD, None, 0x10)),
    ];
    for (vme, iopl, bit, expected) in METHODS {
        let mut guest = Guest::new(0, |a| a.iretd().unwrap());
        let frame: [u32; 9] = [0, 0x7000, 0x8_0202 | 0x2_0000 | iopl << 12, 0x200, 0x2000, 0, 0, 0, 0];
        for (i, value) in frame.iter().enumerate() {
            guest.0.write(STACK - 36 + 4 * i as u64, &value.to_le_bytes());
        }
        guest.0.cpu.set_reg(Gpr::Rsp, STACK - 36);
        guest.0.write(0x7_0000, &[0xcd, 0x21]);
        guest.0.write(0x7_0010, &[0x0f, 0x0b]);
        guest.0.write(0x21 * 4, &[0x10, 0, 0, 0x70]);
        // The redirection bitmap is the 32 bytes below the I/O bitmap.
        guest.0.write(TSS + 102, &0x88u16.to_le_bytes());
        guest.0.write(TSS + 0x68, &[if bit { 0xff } else { 0 }; 32]);
        if vme {
            guest.0.cpu.cr4 |= Cr4::VME;
        }
        let seen = match guest.run() {
            Event(vector, code, at) => Event(vector, code, at.wrapping_add(crate::testing::CODE)),
            other => other,
        };
        assert_eq!(seen, expected, "VME {vme}, IOPL {iopl}, bit {bit}");
        if vme && !bit {
            // The image on the program's stack: method 6 shows VIF as IF, and IOPL 3.
            let image = u16::from_le_bytes(guest.0.read(0x2_0000 + 0x200 - 2));
            assert_eq!(image & 0x3200, 0x3200, "IOPL {iopl}");
        }
    }
}

#[test]
fn ports_follow_iopl_and_the_bitmap() {
    let table = [
        // IOPL, first byte of the map for port 60H, expected.
        (3, 0xff, true),
        (0, 0xff, false),
        (0, 0xfe, true),
        (0, 0xfd, false),
    ];
    for (iopl, map, allowed) in table {
        let mut guest = Guest::new(3, |a| a.in_(al, 0x60).unwrap());
        guest.0.cpu.set_rflags(2 | iopl << 12);
        guest.0.write(TSS + 104 + 0x60 / 8, &[map]);
        let seen = guest.run();
        assert_eq!(matches!(seen, Seen::Exit(Exit::Io(_))), allowed, "IOPL {iopl}, map {map:#x}: {seen:?}");
    }
}

#[test]
fn single_step_traps_behind_each_instruction() {
    let mut guest = Guest::new(0, |a| {
        a.nop().unwrap();
        a.nop().unwrap();
    });
    guest.0.cpu.set_rflags(2 | Rflags::TF.bits());
    assert_eq!(guest.run(), Event(DB, None, 1));
    assert_eq!(guest.0.cpu.debug.dr6 & 0xe00f, 1 << 14);
    // No trap behind MOV SS: the next instruction is done first.
    let mut guest = Guest::new(0, |a| {
        a.mov(ss, ax).unwrap();
        a.nop().unwrap();
    });
    guest.0.cpu.set_reg(Gpr::Rax, sel::DATA0.into());
    guest.0.cpu.set_rflags(2 | Rflags::TF.bits());
    assert_eq!(guest.run(), Event(DB, None, 4));
}

#[test]
fn instruction_breakpoints_fault_once() {
    let mut guest = Guest::new(0, |a| {
        a.nop().unwrap();
        a.nop().unwrap();
    });
    guest.0.cpu.debug.db[2] = crate::testing::CODE + 1;
    guest.0.cpu.debug.dr7 = 0x400 | 1 << 4;
    assert_eq!(guest.run(), Event(DB, None, 1));
    assert_eq!(guest.0.cpu.debug.dr6 & 0xe00f, 4);
    // Returning with RF set passes it.
    let rflags = u64::from(guest.frame(2)) | Rflags::RF.bits();
    guest.0.cpu.rip = crate::testing::CODE + 1;
    guest.0.cpu.set_rflags(rflags);
    assert_eq!(guest.run(), Done);
}

#[test]
fn general_detect_stops_debug_register_moves() {
    let mut guest = Guest::new(0, |a| a.mov(eax, dr0).unwrap());
    guest.0.cpu.debug.dr7 = 0x2400;
    assert_eq!(guest.run(), Event(DB, None, 0));
    assert_eq!((guest.0.cpu.debug.dr6 & 0x2000, guest.0.cpu.debug.dr7), (0x2000, 0x400));
}

#[test]
fn sti_holds_interrupts_for_one_instruction() {
    let mut guest = Guest::new(0, |a| {
        a.sti().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
    });
    guest.0.cpu.queue_interrupt(0x40);
    assert_eq!(guest.run(), Event(0x40, None, 2));
}

#[test]
fn verification_of_selectors() {
    // Selector, readable, writable at CPL 0.
    let table = [
        (sel::DATA0, true, true),
        (sel::READONLY, true, false),
        (sel::EXEC_ONLY, false, false),
        (sel::CODE0, true, false),
        (sel::TSS, false, false),
        (sel::OUTSIDE, false, false),
        (0, false, false),
        (sel::DATA0 | 3, false, false),
        (sel::CONFORMING | 3, true, false),
    ];
    for (selector, readable, writable) in table {
        let mut guest = Guest::new(0, |a| {
            a.mov(ax, i32::from(selector)).unwrap();
            a.verr(ax).unwrap();
            a.setz(bl).unwrap();
            a.verw(ax).unwrap();
            a.setz(bh).unwrap();
        });
        assert_eq!(guest.run(), Done);
        let found = guest.0.cpu.reg(Gpr::Rbx);
        assert_eq!((found & 0xff, found >> 8 & 0xff), (readable.into(), writable.into()), "selector {selector:#x}");
    }
}
