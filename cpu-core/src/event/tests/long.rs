//! IA-32e mode: 16-byte gates, IST, SYSCALL, IRETQ, system registers.

mod double_faults;
mod fast_calls;
mod invpcid;

use iced_x86::code_asm::*;
use x86_defs::descriptor::system_type as system;
use x86_defs::vector::{DB, DF, GP, NM, NP, PF, SS, TS, UD};
use x86_defs::{AccessRights, Cr0, Cr4, Descriptor, Efer, Rflags, Selector, msr};

use super::Seen::{self, Done, Event};
use super::{DONE, handler, run_to_handler, segment};
use crate::state::{DescriptorTable, Gpr, Seg, Segment};
use crate::testing::Machine;
use crate::vmx::Exit;

const GDT: u64 = 0x1_0000;
const IDT: u64 = 0x1_1000;
pub(super) const TSS: u64 = 0x1_2000;
const INNER_STACK: u64 = 0x3_0008;
const IST1: u64 = 0x3_8000;
const STACK: u64 = 0x4_0008;
const OTHER_CODE: u64 = 0x5_0000;
const AT: u64 = crate::testing::CODE;
const BREAKPOINT: u8 = 3;
pub(super) const NON_CANONICAL: u64 = 0x8000_0000_0000;

mod sel {
    pub(super) const CODE0: u16 = 0x08;
    pub(super) const DATA0: u16 = 0x10;
    pub(super) const COMPAT3: u16 = 0x18 | 3;
    pub(super) const DATA3: u16 = 0x20 | 3;
    pub(super) const CODE3: u16 = 0x28 | 3;
    pub(super) const BOTH: u16 = 0x30;
    pub(super) const TSS: u16 = 0x38;
    pub(super) const CALL_GATE: u16 = 0x48;
    pub(super) const ABSENT_GATE: u16 = 0x58;
    pub(super) const LDT: u16 = 0x68;
    pub(super) const TASK_GATE: u16 = 0x78;
    pub(super) const AVAILABLE_TSS: u16 = 0x80;
    pub(super) const END: u16 = 0x90;
}

const P: u32 = 0x80;
const LEVEL3: u32 = 3 << 5;
const CODE64: u32 = P | 0x1b | AccessRights::G | AccessRights::L;
const CODE32: u32 = P | 0x1b | AccessRights::G | AccessRights::DB;
const DATA: u32 = P | 0x13 | AccessRights::G | AccessRights::DB;

fn gate(selector: u16, offset: u64, rights: u32, ist: u8) -> [u64; 2] {
    [super::gate(selector, offset, rights, ist), offset >> 32]
}

pub(super) struct Guest(pub(super) Machine);

impl Guest {
    pub(super) fn new(cpl: u8, assemble: impl FnOnce(&mut CodeAssembler)) -> Self {
        let mut machine = Machine::new_64bit(|a| {
            assemble(a);
            a.int(i32::from(DONE)).unwrap();
        });
        let tss = |typ: u8| Descriptor::new(TSS as u32, 0x67, AccessRights(P | u32::from(typ))).0;
        let call = gate(sel::CODE0, OTHER_CODE, P | LEVEL3 | u32::from(system::CALL_GATE32), 0);
        let absent = gate(sel::CODE0, OTHER_CODE, LEVEL3 | u32::from(system::CALL_GATE32), 0);
        let entries = [
            0,
            segment(CODE64),
            segment(DATA),
            segment(CODE32 | LEVEL3),
            segment(DATA | LEVEL3),
            segment(CODE64 | LEVEL3),
            segment(CODE64 | AccessRights::DB),
            tss(system::TSS32_BUSY),
            0,
            call[0],
            call[1],
            absent[0],
            absent[1],
            Descriptor::new(0x1_8000, 0xff, AccessRights(P | u32::from(system::LDT))).0,
            0,
            gate(sel::TSS, 0, P | LEVEL3 | u32::from(system::TASK_GATE), 0)[0],
            tss(system::TSS32_AVAILABLE),
            0,
        ];
        for (i, entry) in entries.iter().enumerate() {
            machine.write(GDT + 8 * i as u64, &entry.to_le_bytes());
        }
        for vector in 0..=255u8 {
            let dpl = if matches!(vector, DONE | BREAKPOINT) { LEVEL3 } else { 0 };
            let rights = P | dpl | u32::from(system::INTERRUPT_GATE32);
            set_gate(&mut machine, vector, gate(sel::CODE0, handler(vector), rights, 0));
            machine.write(handler(vector), &[0xf4]);
        }
        machine.write(OTHER_CODE, &[0xcd, DONE]);
        machine.write(TSS + 4, &INNER_STACK.to_le_bytes());
        machine.write(TSS + 36, &IST1.to_le_bytes());
        let cpu = &mut machine.cpu;
        cpu.gdt = DescriptorTable { base: GDT, limit: sel::END - 1 };
        cpu.idt = DescriptorTable { base: IDT, limit: 0xfff };
        cpu.tr = Segment::of(Selector(sel::TSS), Descriptor(entries[7]));
        let (code, data) = if cpl == 0 { (sel::CODE0, sel::DATA0) } else { (sel::CODE3, sel::DATA3) };
        let load = |selector: u16| Segment::of(Selector(selector), Descriptor(entries[usize::from(selector / 8)]));
        cpu.seg = [load(data); 6];
        cpu.seg[Seg::Cs as usize] = load(code);
        cpu.cpl = cpl;
        cpu.msrs.star = 0x0018_0008 << 32;
        cpu.msrs.lstar = OTHER_CODE;
        cpu.gpr[Gpr::Rsp as usize] = STACK;
        cpu.derive();
        Self(machine)
    }

    fn quad(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.0.read(at))
    }

    /// Quadword `i` of the handler's stack.
    fn frame(&self, i: u64) -> u64 {
        self.quad(self.0.cpu.reg(Gpr::Rsp) + 8 * i)
    }

    pub(super) fn run(&mut self) -> Seen {
        run_to_handler(&mut self.0, 8)
    }
}

fn set_gate(machine: &mut Machine, vector: u8, [low, high]: [u64; 2]) {
    machine.write(IDT + 16 * u64::from(vector), &low.to_le_bytes());
    machine.write(IDT + 16 * u64::from(vector) + 8, &high.to_le_bytes());
}

pub(super) fn run(cpl: u8, assemble: impl FnOnce(&mut CodeAssembler)) -> Seen {
    Guest::new(cpl, assemble).run()
}

/// A write to the stack of #DB, which a breakpoint watches, and #DB has that stack for itself.
pub(super) fn debugger_on_its_own_stack() -> Machine {
    let mut guest = Guest::new(0, |a| a.mov(qword_ptr(IST1 - 8), rax).unwrap());
    let rights = P | u32::from(system::INTERRUPT_GATE32);
    set_gate(&mut guest.0, 1, gate(sel::CODE0, handler(1), rights, 1));
    guest.0.cpu.debug.db[0] = IST1 - 8;
    // Enabled, writes, eight bytes.
    guest.0.cpu.debug.dr7 = 0x400 | 2 | 1 << 16 | 2 << 18;
    guest.0.cpu.flush_tlb();
    guest.0
}

#[test]
fn frames_are_aligned_and_whole() {
    // CPL, IST, top of the handler's stack, SS in it.
    let table =
        [(0, 0, STACK & !15, sel::DATA0), (0, 1, IST1, sel::DATA0), (3, 0, INNER_STACK & !15, 0), (3, 1, IST1, 0)];
    for (cpl, ist, top, stack) in table {
        let mut guest = Guest::new(cpl, |a| a.ud2().unwrap());
        let rights = P | u32::from(system::INTERRUPT_GATE32);
        set_gate(&mut guest.0, UD, gate(sel::CODE0, handler(UD), rights, ist));
        guest.0.cpu.set_rflags(0x202);
        assert_eq!(guest.run(), Event(UD, None, 0));
        assert_eq!(guest.0.cpu.reg(Gpr::Rsp), top - 40, "CPL {cpl}, IST {ist}");
        let (code, data) = if cpl == 0 { (sel::CODE0, sel::DATA0) } else { (sel::CODE3, sel::DATA3) };
        let frame: Vec<u64> = (0..5).map(|i| guest.frame(i)).collect();
        assert_eq!(frame, [AT, code.into(), 0x1_0202, STACK, data.into()]);
        let cpu = &guest.0.cpu;
        assert_eq!((cpu.seg[Seg::Ss as usize].selector, cpu.seg[Seg::Ss as usize].dpl, cpu.cpl), (stack, 0, 0));
    }
}

#[test]
fn gates_are_checked() {
    let interrupt = u32::from(system::INTERRUPT_GATE32);
    let ud = u64::from(UD) * 8 + 3;
    let table = [
        (gate(sel::CODE0, handler(UD), P | u32::from(system::INTERRUPT_GATE16), 0), GP, ud),
        (gate(sel::TSS, 0, P | u32::from(system::TASK_GATE), 0), GP, ud),
        (gate(sel::CODE0, handler(UD), interrupt, 0), NP, ud),
        (gate(0, handler(UD), P | interrupt, 0), GP, 1),
        (gate(sel::DATA0, handler(UD), P | interrupt, 0), GP, u64::from(sel::DATA0) | 1),
        (gate(sel::BOTH, handler(UD), P | interrupt, 0), GP, u64::from(sel::BOTH) | 1),
        (gate(sel::COMPAT3 & !3, handler(UD), P | interrupt, 0), GP, u64::from(sel::COMPAT3 & !3) | 1),
        (gate(sel::CODE0, NON_CANONICAL, P | interrupt, 0), GP, 1),
    ];
    for (entry, vector, code) in table {
        let mut guest = Guest::new(0, |a| a.ud2().unwrap());
        set_gate(&mut guest.0, UD, entry);
        assert_eq!(guest.run(), Event(vector, Some(code), 0), "{entry:x?}");
    }
}

#[test]
fn stacks_of_the_tss_are_checked() {
    // A stack pointer that is not canonical; a TSS too short to hold one. #SS and #TS need stacks: IST 2.
    for (change, vector, code) in [(0, SS, 1), (1, TS, u64::from(sel::TSS) | 1)] {
        let mut guest = Guest::new(3, |a| a.ud2().unwrap());
        if change == 0 {
            guest.0.write(TSS + 4, &NON_CANONICAL.to_le_bytes());
            guest.0.write(TSS + 44, &IST1.to_le_bytes());
            set_gate(&mut guest.0, SS, gate(sel::CODE0, handler(SS), P | u32::from(system::INTERRUPT_GATE32), 2));
            assert_eq!(guest.run(), Event(vector, Some(code), 0));
        } else {
            guest.0.cpu.tr.limit = 0xa;
            // Every level change lacks a stack: #TS while delivering #TS, then #DF, then nothing.
            assert_eq!(guest.run(), Seen::Exit(Exit::TripleFault));
        }
    }
}

#[test]
fn page_faults_tell_their_address() {
    let mut guest = Guest::new(0, |a| a.mov(rax, qword_ptr(0x4000_0000)).unwrap());
    assert_eq!(guest.run(), Event(PF, Some(0), 0));
    assert_eq!(guest.0.cpu.cr2, 0x4000_0000);
    // The stack of the handler is not there either.
    let mut guest = Guest::new(3, |a| a.ud2().unwrap());
    guest.0.write(TSS + 4, &0x4000_1000u64.to_le_bytes());
    let rights = P | u32::from(system::INTERRUPT_GATE32);
    set_gate(&mut guest.0, PF, gate(sel::CODE0, handler(PF), rights, 1));
    assert_eq!(guest.run(), Event(PF, Some(2), 0));
    assert_eq!(guest.0.cpu.cr2, 0x4000_0ff8);
}

#[test]
fn iretq_corner_cases() {
    // CS, SS, RIP, expected.
    let table = [
        (sel::CODE3, sel::DATA3, OTHER_CODE, Done),
        (sel::COMPAT3, sel::DATA3, OTHER_CODE, Done),
        (sel::CODE0, sel::DATA0, OTHER_CODE, Done),
        (sel::CODE0, 0, OTHER_CODE, Done),
        (sel::CODE3, 0, OTHER_CODE, Event(GP, Some(0), 0)),
        (sel::CODE3, 3, OTHER_CODE, Event(GP, Some(0), 0)),
        (sel::COMPAT3, 0, OTHER_CODE, Event(GP, Some(0), 0)),
        (sel::CODE0, sel::DATA3, OTHER_CODE, Event(GP, Some(0x20), 0)),
        (sel::BOTH, sel::DATA0, OTHER_CODE, Event(GP, Some(sel::BOTH.into()), 0)),
        (0, sel::DATA0, OTHER_CODE, Event(GP, Some(0), 0)),
        (sel::CODE3, sel::DATA3, NON_CANONICAL, Event(GP, Some(0), 0)),
        (sel::TSS, sel::DATA0, OTHER_CODE, Event(GP, Some(sel::TSS.into()), 0)),
    ];
    for (code, stack, rip, expected) in table {
        let mut guest = Guest::new(0, |a| a.iretq().unwrap());
        for (i, value) in [rip, code.into(), 0x3202, STACK - 0x100, stack.into()].into_iter().enumerate() {
            guest.0.write(STACK - 40 + 8 * i as u64, &value.to_le_bytes());
        }
        guest.0.cpu.set_reg(Gpr::Rsp, STACK - 40);
        assert_eq!(guest.run(), expected, "CS {code:#x}, SS {stack:#x}, RIP {rip:#x}");
        if expected == Done {
            let frame: Vec<u64> = (0..5).map(|i| guest.frame(i)).collect();
            assert_eq!(frame, [rip + 2, code.into(), 0x3202, STACK - 0x100, stack.into()]);
        } else {
            assert_eq!(guest.0.cpu.seg[Seg::Ss as usize].selector, sel::DATA0, "nothing was loaded");
        }
    }
    let mut guest = Guest::new(0, |a| a.iretq().unwrap());
    guest.0.cpu.set_rflags(2 | Rflags::NT.bits());
    assert_eq!(guest.run(), Event(GP, Some(0), 0));
}

#[test]
fn syscall_and_sysret() {
    let mut guest = Guest::new(3, |a| a.syscall().unwrap());
    guest.0.cpu.msrs.fmask = 0x4_7700;
    guest.0.cpu.set_rflags(0x4_0a46 | 0x202);
    assert_eq!(guest.run(), Done);
    let cpu = &guest.0.cpu;
    assert_eq!((cpu.reg(Gpr::Rcx), cpu.reg(Gpr::R11)), (AT + 2, 0x4_0a46 | 0x202));
    // The frame of INT 80H at the target shows what SYSCALL loaded.
    assert_eq!((guest.frame(0), guest.frame(1), guest.frame(4)), (OTHER_CODE + 2, 8, 0x10));
    assert_eq!((guest.frame(2), guest.frame(3)), (0x846, STACK));

    let table = [
        // Target, 64-bit, expected CS and SS.
        (OTHER_CODE, true, Ok((sel::CODE3, sel::DATA3))),
        (OTHER_CODE | 0xffff_ffff_0000_0000, false, Ok((sel::COMPAT3, sel::DATA3))),
        (NON_CANONICAL, true, Err(Event(GP, Some(0), 0))),
    ];
    for (target, wide, expected) in table {
        let mut guest = Guest::new(0, |a| if wide { a.sysretq().unwrap() } else { a.sysret().unwrap() });
        guest.0.cpu.set_reg(Gpr::Rcx, target);
        guest.0.cpu.set_reg(Gpr::R11, 0xffff_ffff_fffc_0202 & !Rflags::TF.bits());
        let seen = guest.run();
        match expected {
            Ok((code, stack)) => {
                assert_eq!(seen, Done);
                assert_eq!((guest.frame(1), guest.frame(4)), (code.into(), stack.into()));
                // RF and VM are not loaded, reserved bits neither.
                assert_eq!(guest.frame(2), 0x3c_0202);
            }
            Err(expected) => assert_eq!(seen, expected),
        }
    }
    assert_eq!(run(3, |a| a.sysretq().unwrap()), Event(GP, Some(0), 0));
    let mut guest = Guest::new(3, |a| a.syscall().unwrap());
    guest.0.cpu.efer -= Efer::SCE;
    assert_eq!(guest.run(), Event(UD, None, 0));
}

#[test]
fn call_gates_of_ia_32e_mode() {
    let call = |selector: u16| {
        move |a: &mut CodeAssembler| {
            a.mov(eax, i32::from(selector)).unwrap();
            a.push(rax).unwrap();
            a.push(0).unwrap();
            // FF /3 with REX.W: m16:64.
            a.db(&[0x48, 0xff, 0x1c, 0x24]).unwrap();
        }
    };
    let mut guest = Guest::new(3, call(sel::CALL_GATE));
    assert_eq!(guest.run(), Done);
    // The frame of INT 80H lies below that of the gate, 32 bytes from the aligned top.
    let top = INNER_STACK - 32;
    let frame: Vec<u64> = (0..4).map(|i| guest.quad(top + 8 * i)).collect();
    assert_eq!(frame, [AT + 12, sel::CODE3.into(), STACK - 16, sel::DATA3.into()]);
    for (selector, vector) in
        [(sel::ABSENT_GATE, NP), (sel::TASK_GATE, GP), (sel::AVAILABLE_TSS, GP), (sel::LDT, GP), (sel::BOTH, GP)]
    {
        assert_eq!(run(3, call(selector)), Event(vector, Some(selector.into()), 8), "{selector:#x}");
    }
}

#[test]
fn addresses_that_are_not_canonical() {
    let mut load = Guest::new(3, |a| a.mov(rax, qword_ptr(rbx)).unwrap());
    load.0.cpu.set_reg(Gpr::Rbx, NON_CANONICAL);
    assert_eq!(load.run(), Event(GP, Some(0), 0));
    let mut load = Guest::new(3, |a| a.mov(rax, qword_ptr(rbp)).unwrap());
    load.0.cpu.set_reg(Gpr::Rbp, NON_CANONICAL);
    assert_eq!(load.run(), Event(SS, Some(0), 0));
    let mut jump = Guest::new(3, |a| a.jmp(rbx).unwrap());
    jump.0.cpu.set_reg(Gpr::Rbx, NON_CANONICAL);
    assert_eq!(jump.run(), Event(GP, Some(0), 0));
}

/// Writes of system registers: value, then what follows.
#[test]
fn system_registers() {
    type Case = (&'static str, fn(&mut CodeAssembler), u64, Seen);
    let table: &[Case] = &[
        ("CR0: PG off in 64-bit mode", |a| a.mov(cr0, rax).unwrap(), 0x11, Event(GP, Some(0), 0)),
        ("CR0: NW without CD", |a| a.mov(cr0, rax).unwrap(), 0xa000_0033, Event(GP, Some(0), 0)),
        ("CR0: upper half", |a| a.mov(cr0, rax).unwrap(), 0x1_8000_0033, Event(GP, Some(0), 0)),
        ("CR0: WP", |a| a.mov(cr0, rax).unwrap(), 0x8001_0033, Done),
        ("CR3: beyond MAXPHYADDR", |a| a.mov(cr3, rax).unwrap(), 1 << 40, Event(GP, Some(0), 0)),
        ("CR3: NO_FLUSH without PCIDE", |a| a.mov(cr3, rax).unwrap(), 1 << 63 | 0x8_0000, Event(GP, Some(0), 0)),
        ("CR4: PAE off", |a| a.mov(cr4, rax).unwrap(), 0, Event(GP, Some(0), 0)),
        ("CR4: reserved", |a| a.mov(cr4, rax).unwrap(), 1 << 40 | 0x20, Event(GP, Some(0), 0)),
        ("CR4: VMXE", |a| a.mov(cr4, rax).unwrap(), 0x2020, Event(GP, Some(0), 0)),
        ("CR4: PCIDE", |a| a.mov(cr4, rax).unwrap(), 0x2_0020, Done),
        ("CR8", |a| a.mov(cr8, rax).unwrap(), 15, Done),
        ("CR8: too large", |a| a.mov(cr8, rax).unwrap(), 16, Event(GP, Some(0), 0)),
        ("DR7: upper half", |a| a.mov(dr7, rax).unwrap(), 1 << 32, Event(GP, Some(0), 0)),
        ("DR6: upper half", |a| a.mov(dr6, rax).unwrap(), 1 << 32, Event(GP, Some(0), 0)),
        ("DR4 is DR6", |a| a.mov(dr4, rax).unwrap(), 0, Done),
        ("XSETBV without OSXSAVE", |a| a.xsetbv().unwrap(), 0, Event(UD, None, 0)),
        ("WRFSBASE without FSGSBASE", |a| a.wrfsbase(rax).unwrap(), 0, Event(UD, None, 0)),
        ("LMSW cannot clear PE", |a| a.lmsw(ax).unwrap(), 0, Done),
    ];
    for (name, code, value, expected) in table {
        let mut guest = Guest::new(0, code);
        guest.0.cpu.set_reg(Gpr::Rax, *value);
        assert_eq!(guest.run(), *expected, "{name}");
        if *expected == Done {
            assert!(guest.0.cpu.cr0.contains(Cr0::PE | Cr0::PG), "{name}");
        }
    }
}

#[test]
fn model_specific_registers() {
    let table = [
        (msr::IA32_EFER, 0xd01, Done),
        (msr::IA32_EFER, 0xc01, Event(GP, Some(0), 2)),
        (msr::IA32_EFER, 1 << 1, Event(GP, Some(0), 2)),
        (msr::IA32_LSTAR, NON_CANONICAL, Event(GP, Some(0), 2)),
        (msr::IA32_FS_BASE, NON_CANONICAL, Event(GP, Some(0), 2)),
        (msr::IA32_TSC_AUX, 1 << 32, Event(GP, Some(0), 2)),
        (msr::IA32_TSC_AUX, 0xffff_ffff, Done),
        (0x474f_4f00, 0, Event(GP, Some(0), 2)),
    ];
    for (index, value, expected) in table {
        let mut guest = Guest::new(0, |a| {
            a.nop().unwrap();
            a.nop().unwrap();
            a.wrmsr().unwrap();
            a.rdmsr().unwrap();
        });
        guest.0.cpu.set_reg(Gpr::Rcx, index.into());
        guest.0.cpu.set_reg(Gpr::Rax, value & 0xffff_ffff);
        guest.0.cpu.set_reg(Gpr::Rdx, value >> 32);
        assert_eq!(guest.run(), expected, "{index:#x} ← {value:#x}");
        if expected == Done {
            let cpu = &guest.0.cpu;
            assert_eq!(cpu.reg(Gpr::Rax) | cpu.reg(Gpr::Rdx) << 32, value);
        }
    }
}

#[test]
fn swapgs_exchanges_bases() {
    let mut guest = Guest::new(0, |a| {
        a.swapgs().unwrap();
        a.mov(rax, qword_ptr(0x10).gs()).unwrap();
    });
    guest.0.cpu.msrs.kernel_gs_base = 0x6_0000;
    guest.0.write(0x6_0010, &0x1234_5678u64.to_le_bytes());
    assert_eq!(guest.run(), Done);
    assert_eq!(guest.0.cpu.reg(Gpr::Rax), 0x1234_5678);
    assert_eq!(guest.0.cpu.msrs.kernel_gs_base, 0);
    assert_eq!(run(3, |a| a.swapgs().unwrap()), Event(GP, Some(0), 0));
}

/// A name and what assembles it.
pub(super) type Named = (&'static str, fn(&mut CodeAssembler));

#[test]
fn umip_keeps_the_tables_secret() {
    let table: &[Named] = &[
        ("SGDT", |a| a.sgdt(ptr(rsp)).unwrap()),
        ("SIDT", |a| a.sidt(ptr(rsp)).unwrap()),
        ("SLDT", |a| a.sldt(eax).unwrap()),
        ("STR", |a| a.str(eax).unwrap()),
        ("SMSW", |a| a.smsw(eax).unwrap()),
    ];
    for (name, code) in table {
        assert_eq!(run(3, code), Done, "{name}");
        let mut guest = Guest::new(3, code);
        guest.0.cpu.cr4 |= Cr4::UMIP;
        assert_eq!(guest.run(), Event(GP, Some(0), 0), "{name}");
    }
}

#[test]
fn smap_and_smep_keep_the_kernel_out_of_user_pages() {
    // All pages of this guest are the user's: data accesses fault at once, so the handler cannot start either.
    let mut guest = Guest::new(0, |a| a.mov(eax, dword_ptr(rsp)).unwrap());
    guest.0.cpu.cr4 |= Cr4::SMAP;
    guest.0.cpu.derive();
    guest.0.cpu.flush_tlb();
    assert_eq!(guest.run(), Seen::Exit(Exit::TripleFault));
    // With AC set they pass; the tables are still read as if it were clear.
    let mut guest = Guest::new(0, |a| a.mov(eax, dword_ptr(rsp)).unwrap());
    guest.0.cpu.cr4 |= Cr4::SMEP;
    guest.0.cpu.derive();
    guest.0.cpu.flush_tlb();
    assert_eq!(guest.run(), Seen::Exit(Exit::TripleFault));
}

/// As the host's CPU does in a program that sets RFLAGS.AC.
#[test]
fn alignment_is_checked_at_level_3() {
    const AC: u8 = x86_defs::vector::AC;
    type Code = fn(&mut CodeAssembler);
    // The least distance from 16-byte alignment that is no fault, and what others raise.
    let table: &[(&str, Code, u64, u8)] = &[
        ("MOV r8", |a| a.mov(al, byte_ptr(rbx)).unwrap(), 1, AC),
        ("MOV r16", |a| a.mov(ax, word_ptr(rbx)).unwrap(), 2, AC),
        ("MOV r32", |a| a.mov(eax, dword_ptr(rbx)).unwrap(), 4, AC),
        ("MOV r64", |a| a.mov(rax, qword_ptr(rbx)).unwrap(), 8, AC),
        ("MOVSS", |a| a.movss(xmm0, dword_ptr(rbx)).unwrap(), 4, AC),
        ("MOVLPS", |a| a.movlps(xmm0, qword_ptr(rbx)).unwrap(), 8, AC),
        ("CVTPS2PD", |a| a.cvtps2pd(xmm0, qword_ptr(rbx)).unwrap(), 8, AC),
        ("MOVUPS", |a| a.movups(xmm0, xmmword_ptr(rbx)).unwrap(), 16, AC),
        ("MOVUPS to memory", |a| a.movups(xmmword_ptr(rbx), xmm0).unwrap(), 16, AC),
        ("LDDQU", |a| a.lddqu(xmm0, xmmword_ptr(rbx)).unwrap(), 16, AC),
        ("PCMPESTRI", |a| a.pcmpestri(xmm0, xmmword_ptr(rbx), 0).unwrap(), 16, AC),
        ("MOVDQA", |a| a.movdqa(xmm0, xmmword_ptr(rbx)).unwrap(), 16, GP),
        ("CMPXCHG16B", |a| a.cmpxchg16b(xmmword_ptr(rbx)).unwrap(), 16, GP),
    ];
    for &(name, code, alignment, vector) in table {
        for distance in [1, 2, 4, 8, 16] {
            for checked in [true, false] {
                let mut guest = Guest::new(3, code);
                guest.0.cpu.cr0 |= Cr0::AM;
                guest.0.cpu.set_rflags(2 | if checked { Rflags::AC.bits() } else { 0 });
                guest.0.cpu.set_reg(Gpr::Rbx, 0x7_1000 + distance);
                guest.0.cpu.derive();
                let faults = distance % alignment != 0 && (checked || vector == GP);
                let expected = if faults { Event(vector, Some(0), 0) } else { Done };
                assert_eq!(guest.run(), expected, "{name} at {distance}, AC {checked}");
            }
        }
    }
}

#[test]
fn nmis_wait_for_iret() {
    let mut guest = Guest::new(0, |a| {
        a.nop().unwrap();
        a.nop().unwrap();
    });
    guest.0.cpu.queue_nmi();
    assert_eq!(guest.run(), Event(2, None, 0));
    guest.0.cpu.queue_nmi();
    // The handler returns; the second one comes right behind the IRET.
    guest.0.write(handler(2), &[0x48, 0xcf]);
    guest.0.cpu.rip = handler(2);
    guest.0.write(handler(2) + 2, &[0xf4]);
    assert!(guest.0.cpu.events().nmi_masked);
    guest.0.cpu.step();
    assert!(!guest.0.cpu.events().nmi_masked && guest.0.cpu.events().nmi_pending);
    // Delivered, and its handler's IRET done too.
    guest.0.cpu.step();
    assert!(!guest.0.cpu.events().nmi_pending);
    assert_eq!(guest.0.cpu.instructions(), 3);
}

#[test]
fn device_not_available_comes_before_the_access() {
    let mut guest = Guest::new(3, |a| a.movaps(xmm0, xmmword_ptr(rbx)).unwrap());
    guest.0.cpu.cr0 |= Cr0::TS;
    guest.0.cpu.derive();
    guest.0.cpu.set_reg(Gpr::Rbx, NON_CANONICAL);
    assert_eq!(guest.run(), Event(NM, None, 0));
}

#[test]
fn single_step_over_syscall_follows_the_mask() {
    for (mask, expected) in [(TF, Done), (0, Event(DB, None, OTHER_CODE - AT))] {
        let mut guest = Guest::new(3, |a| a.syscall().unwrap());
        guest.0.cpu.msrs.fmask = mask;
        guest.0.cpu.set_rflags(2 | TF);
        assert_eq!(guest.run(), expected);
    }
}

const TF: u64 = Rflags::TF.bits();
