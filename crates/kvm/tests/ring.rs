//! Dirty rings. What must happen is api.rst's ("KVM_CAP_DIRTY_LOG_RING"), and virt/kvm/dirty_ring.c of Linux 6.1. What the ioctls
//! return stands in `returns.txt`.

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;

use common::{BASE, FakeClient};
use iced_x86::code_asm::*;
use kvm_abi::consts::*;
use kvm_abi::request::*;
use kvm_abi::{Plain, XenAttr, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_translation, kvm_xen_hvm_config};
use mmu::Mapping;
use nix::errno::Errno;

/// `KVM_DIRTY_LOG_PAGE_OFFSET` pages.
const RING: u64 = 64 << 12;
/// `struct kvm_dirty_gfn`
const ENTRY: u64 = 16;
const DIRTY: u32 = 1;
const RESET: u32 = 2;
/// `KVM_DIRTY_RING_RSVD_ENTRIES`
const RESERVED: u32 = 64;
/// The smallest.
const ENTRIES: u32 = 256;

/// Does not log.
const CODE: u64 = 0x1000;
/// The slot that logs.
const LOGGED: u64 = 0x20_0000;
const SLOT: u32 = 7;
const PAGES: u64 = 1024;

/// What a vCPU runs.
type Code<'a> = &'a dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>;

struct Machine {
    client: Arc<FakeClient>,
    vm: i32,
    vcpus: Vec<(i32, Arc<Mapping>)>,
}

/// What is harvested: slot and page.
type Harvest = Vec<(u32, u64)>;

impl Machine {
    /// Each vCPU runs its code in flat 32-bit mode, and EBX is where the logged slot begins.
    fn new(irqchip: bool, codes: &[Code<'_>]) -> Self {
        let client = FakeClient::new();
        let vm = client.ioctl(0, KVM_CREATE_VM, 0).unwrap();
        client.enable(vm, KVM_CAP_DIRTY_LOG_RING, u64::from(ENTRIES) * ENTRY).unwrap();
        if irqchip {
            client.ioctl(vm, KVM_CREATE_IRQCHIP, 0).unwrap();
        }
        let mut machine = Self { client, vm, vcpus: Vec::new() };
        machine.slot(0, 0, 0, 0x10_0000, 0);
        machine.slot(SLOT, KVM_MEM_LOG_DIRTY_PAGES, LOGGED, PAGES << 12, 0x10_0000);
        for (at, code) in (0..).zip(codes) {
            let mut a = CodeAssembler::new(32).unwrap();
            code(&mut a).unwrap();
            let rip = CODE + 0x1000 * at;
            machine.client.memory.write(rip, &a.assemble(rip).unwrap()).unwrap();
            let vcpu = machine.client.ioctl(vm, KVM_CREATE_VCPU, at).unwrap();
            if irqchip {
                machine.client.set(vcpu, KVM_SET_MP_STATE, &kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).unwrap();
            }
            let mut sregs: kvm_sregs = machine.client.get(vcpu, KVM_GET_SREGS);
            sregs.cr0 |= 1;
            for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
                (segment.base, segment.selector, segment.limit, segment.g, segment.db) = (0, 8, u32::MAX, 1, 1);
            }
            machine.client.set(vcpu, KVM_SET_SREGS, &sregs).unwrap();
            let regs = kvm_regs { rip, rflags: 2, rbx: LOGGED, rsp: 0x8_0000, ..Plain::zeroed() };
            machine.client.set(vcpu, KVM_SET_REGS, &regs).unwrap();
            machine.vcpus.push((vcpu, machine.client.map(vcpu)));
        }
        machine
    }

    fn slot(&self, slot: u32, flags: u32, gpa: u64, bytes: u64, at: u64) {
        self.client.slot(self.vm, (slot, flags), gpa, bytes, at).unwrap();
    }

    /// The exit's reason.
    fn run(&self, vcpu: usize) -> u32 {
        self.client.ioctl(self.vcpus[vcpu].0, KVM_RUN, 0).unwrap();
        self.vcpus[vcpu].1.load_u32(8).unwrap()
    }

    fn flags(&self, vcpu: usize, index: u32) -> u32 {
        self.vcpus[vcpu].1.load_u32(RING + u64::from(index % ENTRIES) * ENTRY).unwrap()
    }

    /// Takes entries from `*next` on, at most `most`.
    fn harvest(&self, vcpu: usize, next: &mut u32, most: u32) -> Harvest {
        let mut found = Vec::new();
        while self.flags(vcpu, *next) == DIRTY && (found.len() as u32) < most {
            let at = RING + u64::from(*next % ENTRIES) * ENTRY;
            let page = &self.vcpus[vcpu].1;
            found.push((page.load_u32(at + 4).unwrap(), page.load_u64(at + 8).unwrap()));
            page.store_u32(at, RESET).unwrap();
            *next += 1;
        }
        found
    }

    fn reset(&self) -> u32 {
        self.client.ioctl(self.vm, KVM_RESET_DIRTY_RINGS, 0).unwrap() as u32
    }

    fn set_msr(&self, index: u32, data: u64) {
        let entry = kvm_msr_entry { index, data, ..Plain::zeroed() };
        let bytes = [1u32.to_le_bytes().to_vec(), vec![0; 4], entry.as_bytes().to_vec()].concat();
        assert_eq!(self.client.ioctl_bytes(self.vcpus[0].0, KVM_SET_MSRS, bytes).unwrap().0, 1);
    }
}

fn pages(pages: impl IntoIterator<Item = u64>) -> Harvest {
    pages.into_iter().map(|page| (SLOT, page)).collect()
}

/// Writes a doubleword to the page.
fn store(a: &mut CodeAssembler, page: i32) -> Result<(), IcedError> {
    a.inc(dword_ptr(ebx + (page << 12)))
}

/// Writes each page from EDX on, for ever.
fn writes_on(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.set_label(&mut top)?;
    a.mov(dword_ptr(ebx), eax)?;
    a.add(ebx, 0x1000)?;
    a.jmp(top)
}

#[test]
fn the_ring_has_each_page_once_until_it_is_reset() {
    let machine = Machine::new(
        false,
        &[&|a| {
            let mut top = a.create_label();
            a.set_label(&mut top)?;
            // The second is cached by then, and the third is not logged.
            store(a, 5)?;
            store(a, 5)?;
            a.inc(dword_ptr(0x9000))?;
            store(a, 3)?;
            a.hlt()?;
            a.jmp(top)
        }],
    );
    let mut next = 0;
    assert_eq!(machine.run(0), KVM_EXIT_HLT);
    assert_eq!((machine.flags(0, 0), machine.flags(0, 1), machine.flags(0, 2)), (DIRTY, DIRTY, 0));
    assert_eq!(machine.reset(), 0, "nothing is harvested");
    assert_eq!(machine.harvest(0, &mut next, ENTRIES), pages([5, 3]));
    // Harvested is not reset: what is written meanwhile is not told of again.
    assert_eq!(machine.run(0), KVM_EXIT_HLT);
    assert_eq!(machine.harvest(0, &mut next, ENTRIES), []);
    assert_eq!((machine.flags(0, 0), machine.flags(0, 1)), (RESET, RESET));
    assert_eq!(machine.reset(), 2);
    assert_eq!((machine.flags(0, 0), machine.flags(0, 1)), (0, 0));
    assert_eq!(machine.reset(), 0);
    assert_eq!(machine.run(0), KVM_EXIT_HLT);
    // In sequence, and not all at once.
    assert_eq!(machine.harvest(0, &mut next, 1), pages([5]));
    assert_eq!(machine.reset(), 1);
    assert_eq!((machine.flags(0, 2), machine.flags(0, 3)), (0, DIRTY));
    assert_eq!(machine.run(0), KVM_EXIT_HLT);
    assert_eq!(machine.harvest(0, &mut next, ENTRIES), pages([3, 5]));
}

/// Bit 0 of a harvested entry counts for nothing.
#[test]
fn both_flags_mean_harvested() {
    let machine = Machine::new(
        false,
        &[&|a| {
            store(a, 1)?;
            a.hlt()
        }],
    );
    assert_eq!(machine.run(0), KVM_EXIT_HLT);
    machine.vcpus[0].1.store_u32(RING, DIRTY | RESET).unwrap();
    assert_eq!(machine.reset(), 1);
    assert_eq!(machine.flags(0, 0), 0);
}

/// `kvm_dirty_ring_soft_full`: 64 entries are kept for what is written on the way out.
#[test]
fn a_vcpu_leaves_when_its_ring_is_nearly_full() {
    for irqchip in [false, true] {
        let machine = Machine::new(irqchip, &[&writes_on]);
        let mut next = 0;
        let mut seen = 0;
        while seen < PAGES - u64::from(ENTRIES) {
            assert_eq!(machine.run(0), KVM_EXIT_DIRTY_RING_FULL);
            // Nothing runs while it is so, signal or not.
            let before: kvm_regs = machine.client.get(machine.vcpus[0].0, KVM_GET_REGS);
            machine.client.raise();
            assert_eq!(machine.run(0), KVM_EXIT_DIRTY_RING_FULL);
            let after: kvm_regs = machine.client.get(machine.vcpus[0].0, KVM_GET_REGS);
            assert_eq!(before.as_bytes(), after.as_bytes());
            machine.client.consume_signal();
            let found = machine.harvest(0, &mut next, ENTRIES);
            assert!((ENTRIES - RESERVED..=ENTRIES).contains(&(found.len() as u32)), "{}", found.len());
            assert_eq!(found, pages(seen..seen + found.len() as u64));
            seen += found.len() as u64;
            assert!(before.rbx - LOGGED <= seen << 12, "no page is written that is not told of");
            // Harvested entries are in use still.
            assert_eq!(machine.run(0), KVM_EXIT_DIRTY_RING_FULL);
            assert_eq!(machine.reset(), found.len() as u32);
        }
    }
}

/// The limit is that of entries in use: with one fewer the guest goes on.
#[test]
fn room_for_one_lets_one_in() {
    let machine = Machine::new(false, &[&writes_on]);
    let mut next = 0;
    assert_eq!(machine.run(0), KVM_EXIT_DIRTY_RING_FULL);
    let used = (0..ENTRIES).filter(|&index| machine.flags(0, index) == DIRTY).count() as u32;
    let over = used - (ENTRIES - RESERVED);
    assert_eq!(machine.harvest(0, &mut next, over).len() as u32, over);
    assert_eq!(machine.reset(), over);
    assert_eq!(machine.run(0), KVM_EXIT_DIRTY_RING_FULL, "as many as the limit are used");
    assert_eq!(machine.flags(0, used), 0, "and no instruction ran");
    assert_eq!(machine.harvest(0, &mut next, 1), pages([u64::from(over)]));
    assert_eq!(machine.reset(), 1);
    assert_eq!(machine.run(0), KVM_EXIT_DIRTY_RING_FULL);
    assert_eq!(machine.flags(0, used), DIRTY);
}

/// A repeated string instruction is interrupted as any other.
#[test]
fn one_instruction_cannot_overrun_the_ring() {
    let machine = Machine::new(
        false,
        &[&|a| {
            a.mov(edi, ebx)?;
            a.mov(ecx, (PAGES << 10) as u32)?;
            a.rep().stosd()?;
            a.hlt()
        }],
    );
    let (mut next, mut all) = (0, BTreeSet::new());
    loop {
        let reason = machine.run(0);
        let found = machine.harvest(0, &mut next, ENTRIES);
        assert!(found.len() < ENTRIES as usize);
        all.extend(found.iter().map(|&(_, page)| page));
        assert_eq!(machine.reset(), found.len() as u32);
        if reason == KVM_EXIT_HLT {
            break;
        }
        assert_eq!(reason, KVM_EXIT_DIRTY_RING_FULL);
    }
    assert_eq!(all, (0..PAGES).collect());
}

#[test]
fn each_vcpu_has_its_own() {
    let write = |page| {
        move |a: &mut CodeAssembler| {
            let mut top = a.create_label();
            a.set_label(&mut top)?;
            store(a, page)?;
            store(a, 9)?;
            a.hlt()?;
            a.jmp(top)
        }
    };
    let machine = Machine::new(false, &[&write(1), &write(2)]);
    let (mut first, mut second) = (0, 0);
    assert_eq!((machine.run(0), machine.run(1)), (KVM_EXIT_HLT, KVM_EXIT_HLT));
    assert_eq!(machine.harvest(0, &mut first, ENTRIES), pages([1, 9]));
    assert_eq!(machine.harvest(1, &mut second, ENTRIES), pages([2]), "a page that is in a ring already");
    assert_eq!(machine.reset(), 3, "of all vCPUs");
    assert_eq!((machine.run(1), machine.run(0)), (KVM_EXIT_HLT, KVM_EXIT_HLT));
    assert_eq!(machine.harvest(0, &mut first, ENTRIES), pages([1]));
    assert_eq!(machine.harvest(1, &mut second, ENTRIES), pages([2, 9]));
}

/// A slot's number has its address space in bits 31:16.
#[test]
fn an_entry_names_the_address_space() {
    let machine = Machine::new(false, &[&|a| a.hlt()]);
    let flags = KVM_MEM_LOG_DIRTY_PAGES;
    machine.slot(1 << 16 | 3, flags, 0x2_0000, 0x2_0000, 0xf0_0000 - 0x2_0000);
    machine.client.ioctl(machine.vcpus[0].0, KVM_SMI, 0).unwrap();
    // The save area is in the page below SMBASE + 10000H.
    machine.run(0);
    let found = machine.harvest(0, &mut 0, ENTRIES);
    assert!(found.contains(&(1 << 16 | 3, 0x1f)), "{found:x?}");
}

#[test]
fn what_is_written_for_a_vcpu_is_in_its_ring() {
    let page = |number: u64| LOGGED + (number << 12);
    // KVM_HC_CLOCK_PAIRING
    let machine = Machine::new(
        true,
        &[&|a| {
            a.mov(eax, 9)?;
            a.mov(ebx, page(13) as u32)?;
            a.xor(ecx, ecx)?;
            a.vmcall()?;
            a.hlt()
        }],
    );
    let mut next = 0;
    let mut harvest = || {
        let found = machine.harvest(0, &mut next, ENTRIES);
        machine.reset();
        let mut found: Vec<_> = found.into_iter().map(|(_, page)| page).collect();
        found.sort_unstable();
        found
    };
    // The wall clock, the paravirtual clock, steal time (MSR_KVM_WALL_CLOCK_NEW, SYSTEM_TIME_NEW, STEAL_TIME) and the vAPIC page are
    // written before the guest's next instruction.
    machine.set_msr(0x4b56_4d00, page(10));
    machine.set_msr(0x4b56_4d01, page(11) | 1);
    machine.client.set_waited(1000);
    machine.set_msr(0x4b56_4d03, page(12) | 1);
    machine.client.set(machine.vcpus[0].0, KVM_SET_VAPIC_ADDR, &page(14)).unwrap();
    let run = || {
        let client = machine.client.clone();
        let ends = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(200));
            client.raise();
        });
        assert_eq!(machine.client.ioctl(machine.vcpus[0].0, KVM_RUN, 0), Err(Errno::EINTR));
        ends.join().unwrap();
        machine.client.consume_signal();
    };
    run();
    assert_eq!(harvest(), [10, 11, 12, 13, 14]);
    // Hyper-V's hypercall page and reference TSC page: HV_X64_MSR_GUEST_OS_ID, HYPERCALL, REFERENCE_TSC.
    machine.set_msr(0x4000_0000, 1);
    machine.set_msr(0x4000_0001, page(15) | 1);
    machine.set_msr(0x4000_0021, page(16) | 1);
    assert_eq!(harvest(), [15, 16]);
    // Xen's hypercall page: an MSR of user space's choice.
    let config = kvm_xen_hvm_config { flags: KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL, msr: 0x4000_0200, ..Plain::zeroed() };
    machine.client.set(machine.vm, KVM_XEN_HVM_CONFIG, &config).unwrap();
    machine.set_msr(0x4000_0200, page(17));
    assert_eq!(harvest(), [17]);
    // A clock more, and the run state, which steal time gives way to.
    for (type_, at) in [(KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO, 18), (KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, 19)] {
        let attr = XenAttr { type_: type_ as u16, u: [page(at), 0, 0, 0, 0, 0, 0, 0], ..XenAttr::default() };
        machine.client.set(machine.vcpus[0].0, KVM_XEN_VCPU_SET_ATTR, &attr).unwrap();
    }
    let vcpu = machine.vcpus[0].0;
    let regs: kvm_regs = machine.client.get(vcpu, KVM_GET_REGS);
    machine.client.set(vcpu, KVM_SET_REGS, &kvm_regs { rip: regs.rip - 1, ..regs }).unwrap();
    machine.client.set(vcpu, KVM_SET_MP_STATE, &kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).unwrap();
    run();
    assert_eq!(harvest(), [11, 14, 18, 19]);
}

/// The walk of KVM_TRANSLATE sets accessed bits, as any other.
#[test]
fn page_tables_are_written_too() {
    let machine = Machine::new(
        false,
        &[&|a| {
            a.mov(dword_ptr(0), eax)?;
            a.hlt()
        }],
    );
    let (directory, table) = (LOGGED + (20 << 12), LOGGED + (21 << 12));
    let ram = |gpa: u64| 0x10_0000 + (gpa - LOGGED);
    // Linear 0 to 400000H as they are, the tables in pages that log.
    machine.client.memory.store_u32(ram(directory), table as u32 | 3).unwrap();
    for page in 0..1024u32 {
        machine.client.memory.store_u32(ram(table) + u64::from(page) * 4, page << 12 | 3).unwrap();
    }
    let vcpu = machine.vcpus[0].0;
    let mut sregs: kvm_sregs = machine.client.get(vcpu, KVM_GET_SREGS);
    (sregs.cr0, sregs.cr3) = (sregs.cr0 | 1 << 31, directory);
    machine.client.set(vcpu, KVM_SET_SREGS, &sregs).unwrap();
    let mut translation = kvm_translation { linear_address: 0x9000, ..Plain::zeroed() };
    machine.client.ioctl_with(vcpu, KVM_TRANSLATE, &mut translation).unwrap();
    assert_eq!((translation.valid, translation.physical_address), (1, 0x9000));
    let found: BTreeSet<_> = machine.harvest(0, &mut 0, ENTRIES).into_iter().collect();
    assert_eq!(found, pages([20, 21]).into_iter().collect());
    let mut next = 2;
    assert_eq!(machine.reset(), 2);
    assert_eq!(machine.run(0), KVM_EXIT_HLT);
    assert_eq!(machine.harvest(0, &mut next, ENTRIES), pages([21]), "the directory's entry is accessed already");
}

/// What INS brings is stored by the next KVM_RUN.
#[test]
fn data_of_ins_is_in_the_ring() {
    let machine = Machine::new(
        false,
        &[&|a| {
            a.lea(edi, dword_ptr(ebx + 0x6ffe))?;
            a.mov(dx, 0x10)?;
            a.mov(ecx, 4)?;
            a.rep().insb()?;
            a.hlt()
        }],
    );
    assert_eq!(machine.run(0), KVM_EXIT_IO);
    let mut reason = KVM_EXIT_IO;
    while reason == KVM_EXIT_IO {
        reason = machine.run(0);
    }
    assert_eq!(reason, KVM_EXIT_HLT);
    assert_eq!(machine.harvest(0, &mut 0, ENTRIES), pages([6, 7]));
}

#[test]
fn a_slot_that_logs_no_more_is_passed_over() {
    let machine = Machine::new(
        false,
        &[&|a| {
            let mut top = a.create_label();
            a.set_label(&mut top)?;
            store(a, 1)?;
            a.hlt()?;
            a.jmp(top)
        }],
    );
    let mut next = 0;
    assert_eq!(machine.run(0), KVM_EXIT_HLT);
    machine.slot(SLOT, 0, LOGGED, PAGES << 12, 0x10_0000);
    assert_eq!(machine.harvest(0, &mut next, ENTRIES), pages([1]));
    assert_eq!(machine.reset(), 1);
    assert_eq!(machine.run(0), KVM_EXIT_HLT);
    assert_eq!(machine.flags(0, next), 0);
    // On again: from now on.
    machine.slot(SLOT, KVM_MEM_LOG_DIRTY_PAGES, LOGGED, PAGES << 12, 0x10_0000);
    assert_eq!(machine.run(0), KVM_EXIT_HLT);
    assert_eq!(machine.harvest(0, &mut next, ENTRIES), pages([1]));
}

/// A client may put anything there: what it names is looked up, and the guest goes on once the ring has room.
#[test]
fn nonsense_in_the_ring_harms_nobody() {
    let machine = Machine::new(false, &[&writes_on]);
    assert_eq!(machine.run(0), KVM_EXIT_DIRTY_RING_FULL);
    let ring = &machine.vcpus[0].1;
    let used = (0..ENTRIES).filter(|&index| machine.flags(0, index) == DIRTY).count() as u32;
    for (index, (slot, page)) in (0..used).zip(
        [(SLOT, PAGES), (SLOT, u64::MAX), (u32::MAX, 0), (2 << 16, 0), (1 << 16 | SLOT, 0), (508, 1 << 63)]
            .into_iter()
            .cycle(),
    ) {
        let at = RING + u64::from(index) * ENTRY;
        ring.store_u32(at + 4, slot).unwrap();
        ring.store_u64(at + 8, page).unwrap();
        ring.store_u32(at, u32::MAX).unwrap();
    }
    assert_eq!(machine.reset(), used);
    assert_eq!(machine.run(0), KVM_EXIT_DIRTY_RING_FULL);
    // Entries that were never filled: `kvm_dirty_ring_used` counts below nothing, and the ring is full for good.
    for index in 0..ENTRIES {
        ring.store_u32(RING + u64::from(index) * ENTRY, RESET).unwrap();
    }
    assert_eq!(machine.reset(), ENTRIES);
    assert_eq!(machine.run(0), KVM_EXIT_DIRTY_RING_FULL);
}

/// Harvests and resets while the vCPU writes: of what it wrote last the client hears.
#[test]
fn nothing_is_lost_while_the_guest_runs() {
    let machine = Machine::new(
        false,
        &[&|a| {
            let (mut top, mut round) = (a.create_label(), a.create_label());
            a.set_label(&mut round)?;
            a.inc(eax)?;
            a.mov(ecx, 32)?;
            a.mov(edx, ebx)?;
            a.set_label(&mut top)?;
            a.mov(dword_ptr(edx), eax)?;
            a.add(edx, 0x1000)?;
            a.dec(ecx)?;
            a.jnz(top)?;
            a.cmp(eax, 200_000)?;
            a.jb(round)?;
            a.hlt()
        }],
    );
    let (mut next, mut known) = (0, [0u32; 32]);
    let runner = {
        let (client, vcpu) = (machine.client.thread(), machine.vcpus[0].0);
        std::thread::spawn(move || client.ioctl(vcpu, KVM_RUN, 0))
    };
    let mut over = false;
    while !over {
        over = runner.is_finished();
        let found = machine.harvest(0, &mut next, ENTRIES);
        assert_eq!(machine.reset(), found.len() as u32);
        for (slot, page) in found {
            assert_eq!(slot, SLOT);
            known[page as usize] = machine.client.read_u32(BASE + 0x10_0000 + (page << 12));
        }
    }
    assert_eq!(runner.join().unwrap(), Ok(0));
    assert_eq!(machine.vcpus[0].1.load_u32(8).unwrap(), KVM_EXIT_HLT);
    assert_eq!(known, [200_000; 32]);
}

/// A VM without rings shows three pages, and no more.
#[test]
fn without_rings_there_is_nothing_to_map() {
    let client = FakeClient::new();
    let vm = client.ioctl(0, KVM_CREATE_VM, 0).unwrap();
    let vcpu = client.ioctl(vm, KVM_CREATE_VCPU, 0).unwrap();
    assert_eq!(client.map(vcpu).len(), 3 << 12);
    let with = Machine::new(false, &[&|a| a.hlt()]);
    assert_eq!(with.vcpus[0].1.len(), RING + u64::from(ENTRIES) * ENTRY);
    assert_eq!(with.client.ioctl(0, KVM_GET_VCPU_MMAP_SIZE, 0), Ok(3 << 12));
}
