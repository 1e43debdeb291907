//! Task switches with paging on: whose address space a fault belongs to, and that nothing has changed before the switch. SDM
//! Vol. 3 "Task Switching" and "Task Address Space".

use super::*;
use x86_defs::vector::PF;

const DIRECTORY: u64 = 0x10_0000;
const TABLE: u64 = 0x10_1000;
const OTHER_DIRECTORY: u64 = 0x10_2000;
const OTHER_TABLE: u64 = 0x10_3000;
/// A page that the two address spaces map to different memory.
const WINDOW: u64 = 0x30_0000;
const P_RW_US: u32 = 7;
const RW: u32 = 2;

/// The first 4 MiB one to one, in a directory for each task. CR0.WP is on.
fn paged(assemble: impl FnOnce(&mut CodeAssembler), change: &[(u64, u32)]) -> Guest {
    let fields = [(28, OTHER_DIRECTORY as u32)];
    let mut guest = Guest::new(0, assemble).with_other_task(&[&fields, change].concat());
    for (directory, table) in [(DIRECTORY, TABLE), (OTHER_DIRECTORY, OTHER_TABLE)] {
        guest.0.write(directory, &(table as u32 | P_RW_US).to_le_bytes());
        for page in 0..1024u32 {
            guest.0.write(table + 4 * u64::from(page), &(page << 12 | P_RW_US).to_le_bytes());
        }
    }
    let cpu = &mut guest.0.cpu;
    cpu.cr0 |= Cr0::PG | Cr0::WP;
    cpu.cr3 = DIRECTORY;
    cpu.flush_tlb();
    cpu.derive();
    guest
}

fn entry(table: u64, la: u64) -> u64 {
    table + (la >> 12) * 4
}

fn jump(a: &mut CodeAssembler) {
    a.db(&[0xea, 0, 0, 0, 0, sel::OTHER_TSS as u8, 0]).unwrap();
}

fn call(a: &mut CodeAssembler) {
    a.db(&[0x9a, 0, 0, 0, 0, sel::OTHER_TSS as u8, 0]).unwrap();
}

#[test]
fn a_task_brings_its_address_space_and_gives_it_back() {
    let mut guest = paged(
        |a| {
            call(a);
            a.mov(edx, dword_ptr(WINDOW as i32)).unwrap();
        },
        &[],
    );
    guest.0.write(WINDOW, &1u32.to_le_bytes());
    guest.0.write(WINDOW + 0x1000, &2u32.to_le_bytes());
    guest.0.write(entry(OTHER_TABLE, WINDOW), &((WINDOW as u32 + 0x1000) | P_RW_US).to_le_bytes());
    // MOV EAX, [WINDOW]; IRETD. EAX stays in the other TSS.
    let window = (WINDOW as u32).to_le_bytes();
    guest.0.write(OTHER_CODE.into(), &[[0xa1].as_slice(), &window, &[0xcf]].concat());
    // The old task's CR3 is not saved by the switch: what stands there is what IRET loads.
    guest.0.write(TSS + 28, &(DIRECTORY as u32).to_le_bytes());
    assert_eq!(guest.run(), Done);
    assert_eq!((guest.long(OTHER_TSS + 40), guest.0.cpu.reg(Gpr::Rdx)), (2, 1));
    assert_eq!((guest.0.cpu.cr3, guest.0.cpu.tr.selector), (DIRECTORY, sel::TSS));
}

#[test]
fn page_faults_on_either_tss_belong_to_the_old_task() {
    // Page, what its entry loses, error code. A supervisor's write: W/R, and P where the page is there.
    let table = [(TSS, RW, 3), (OTHER_TSS, RW, 3), (TSS, 1, 2), (OTHER_TSS, 1, 2)];
    for (page, without, code) in table {
        let mut guest = paged(jump, &[]);
        if page == TSS {
            // The I/O map reaches into more pages; the TSS proper is in the first.
            guest.0.cpu.tr.limit = 0x67;
        }
        guest.0.write(entry(TABLE, page), &((page as u32 | P_RW_US) & !without).to_le_bytes());
        guest.0.cpu.set_reg(Gpr::Rbx, 0x1234);
        let descriptors = guest.0.read::<0xa8>(GDT);
        assert_eq!(guest.run(), Event(PF, Some(code), 0), "{page:#x} without {without}");
        let cpu = &guest.0.cpu;
        assert_eq!(cpu.cr2 & !0xfff, page);
        assert_eq!((cpu.tr.selector, cpu.cr3, cpu.reg(Gpr::Rbx)), (sel::TSS, DIRECTORY, 0x1234));
        assert_eq!(guest.0.read::<0xa8>(GDT), descriptors, "busy bits have not moved");
    }
}

#[test]
fn the_first_fetch_faults_in_the_new_task() {
    let mut guest = paged(jump, &[]);
    guest.0.write(entry(OTHER_TABLE, OTHER_CODE.into()), &0u32.to_le_bytes());
    assert_eq!(guest.run(), Event(PF, Some(0), u64::from(OTHER_CODE) - crate::testing::CODE));
    assert_eq!((guest.0.cpu.tr.selector, guest.0.cpu.cr2), (sel::OTHER_TSS, OTHER_CODE.into()));
}

#[test]
fn an_exception_through_a_task_gate_saves_the_faulting_task() {
    let mut guest = paged(|a| a.mov(eax, dword_ptr(WINDOW as i32)).unwrap(), &[]);
    guest.0.write(entry(TABLE, WINDOW), &0u32.to_le_bytes());
    let task_gate = gate(sel::OTHER_TSS, 0, P | u32::from(system::TASK_GATE), 0);
    guest.0.write(IDT + 8 * u64::from(PF), &task_gate.to_le_bytes());
    guest.0.cpu.set_reg(Gpr::Rbx, 0x1234);
    assert_eq!(guest.run(), Done);
    // Below the frame of INT 80H lies the error code, on the new task's stack.
    assert_eq!((guest.frame(3), guest.0.cpu.reg(Gpr::Rsp)), (0, 0x6_0000 - 16));
    assert_eq!((guest.long(TSS + 32), guest.long(TSS + 52)), (crate::testing::CODE as u32, 0x1234));
    // Nested: the link, and NT in the flags that INT pushed.
    assert_eq!((guest.long(OTHER_TSS) & 0xffff, guest.frame(2) & 0x4000), (sel::TSS.into(), 0x4000));
    // RF is in the image of a fault.
    assert_eq!(guest.long(TSS + 36) & 0x1_0000, 0x1_0000);
}

#[test]
fn a_stack_that_is_not_there_faults_in_the_new_task() {
    let mut guest = paged(|a| a.ud2().unwrap(), &[(56, WINDOW as u32 + 0x10)]);
    // #GP has an error code to push. Its gate leads to the other task, whose stack is missing in its own space.
    guest.0.write(entry(OTHER_TABLE, WINDOW), &0u32.to_le_bytes());
    guest.0.write(IDT + 8 * u64::from(UD), &0u64.to_le_bytes());
    let task_gate = gate(sel::OTHER_TSS, 0, P | u32::from(system::TASK_GATE), 0);
    guest.0.write(IDT + 8 * u64::from(GP), &task_gate.to_le_bytes());
    // The handler of #PF has to bring a stack.
    let spare = task_gate_to_spare(&mut guest);
    guest.0.write(IDT + 8 * u64::from(PF), &spare.to_le_bytes());
    assert_eq!(guest.run(), Done);
    assert_eq!(guest.0.cpu.cr2, WINDOW + 0xc);
    assert_eq!(guest.0.cpu.tr.selector, sel::SMALL_TSS);
    // #PF came in the new task, before its first instruction.
    assert_eq!((guest.long(OTHER_TSS + 32), guest.frame(3)), (OTHER_CODE, 2));
}

/// A gate to a third task, whose stack is there.
fn task_gate_to_spare(guest: &mut Guest) -> u64 {
    const SPARE: u64 = 0x1_7000;
    guest.0.write(GDT + u64::from(sel::SMALL_TSS), &tss(SPARE, 0x67, system::TSS32_AVAILABLE).to_le_bytes());
    let image = guest.0.read::<0x68>(OTHER_TSS);
    guest.0.write(SPARE, &image);
    guest.0.write(SPARE + 28, &(DIRECTORY as u32).to_le_bytes());
    guest.0.write(SPARE + 56, &0x6_0000u32.to_le_bytes());
    gate(sel::SMALL_TSS, 0, P | u32::from(system::TASK_GATE), 0)
}
