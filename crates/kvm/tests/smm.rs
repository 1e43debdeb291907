//! System management mode. Where things lie in SMRAM is from AMD's APM Vol. 2 "AMD64 SMM State-Save Area" and, without long
//! mode, from SDM Vol. 3 "SMRAM State Save Map"; what the handler finds, what waits and what shuts the processor down is the SDM's
//! chapter "System Management Mode"; what user space sees is api.rst's.

mod common;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::{BASE, FakeClient, Random};
use iced_x86::code_asm::*;
use kvm_abi::consts::*;
use kvm_abi::request::*;
use kvm_abi::*;
use mmu::Mapping;
use nix::errno::Errno;

const RAM: u64 = 0x10_0000;
const CODE: u64 = 0x1000;
const TABLES: u64 = 0x4000;
/// Guest-physical address of SMRAM, and where it lies in the client's memory.
const SMBASE: u64 = 0x20_0000;
const SMRAM_AT: u64 = RAM;
const SMRAM: u64 = 0x1_0000;
const SMRAM_SLOT: u32 = 1 << 16 | 7;
/// Offset of the handler.
const HANDLER: u64 = 0x8000;
/// Ports with which the handler and the guest say where they are.
const IN_SMM: u32 = 0x90;
const OUTSIDE: u32 = 0x91;
const RESUMED: [u8; 2] = [0x0f, 0xaa];

const IA32_SMBASE: u32 = 0x9e;
const SMI_COUNT: u32 = 0x34;

struct Machine {
    client: Arc<FakeClient>,
    vm: i32,
    vcpu: i32,
    page: Arc<Mapping>,
}

fn assemble(bitness: u32, at: u64, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(bitness).unwrap();
    code(&mut a).unwrap();
    a.assemble(at).unwrap()
}

/// OUT, for ever.
fn spins(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.set_label(&mut top)?;
    a.out(OUTSIDE, al)?;
    a.jmp(top)
}

/// As SMM code begins: 16-bit. It says that it is there, and goes.
fn tells(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.out(IN_SMM, al)?;
    a.db(&RESUMED)
}

impl Machine {
    /// In real mode at `code`; SMRAM, which has `handler`, is in address space 1 alone, and RAM in both.
    fn new(
        chip: bool,
        code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
        handler: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> Self {
        let client = FakeClient::new();
        let vm = client.ioctl(0, KVM_CREATE_VM, 0).unwrap();
        if chip {
            client.ioctl(vm, KVM_CREATE_IRQCHIP, 0).unwrap();
        }
        for (slot, gpa, size, at) in [(0, 0, RAM, 0), (1 << 16, 0, RAM, 0), (SMRAM_SLOT, SMBASE, SMRAM, SMRAM_AT)] {
            client.slot(vm, (slot, 0), gpa, size, at).unwrap();
        }
        client.memory.write(CODE, &assemble(16, CODE, code)).unwrap();
        client.memory.write(SMRAM_AT + HANDLER, &assemble(16, HANDLER, handler)).unwrap();
        let vcpu = client.ioctl(vm, KVM_CREATE_VCPU, 0).unwrap();
        let page = client.map(vcpu);
        let machine = Self { client, vm, vcpu, page };
        let mut sregs: kvm_sregs = machine.get(KVM_GET_SREGS);
        (sregs.cs.base, sregs.cs.selector, sregs.ds.limit, sregs.ds.g) = (0, 0, 0xffff_ffff, 1);
        machine.set(KVM_SET_SREGS, &sregs);
        machine.set(KVM_SET_REGS, &kvm_regs { rip: CODE, rsp: 0x8000, rflags: 2, ..Plain::zeroed() });
        machine.set_msr(IA32_SMBASE, SMBASE);
        machine
    }

    /// The same in 64-bit mode, its memory mapped as it is.
    fn new_long(code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Self {
        let machine = Self::new(false, |a| a.nop(), tells);
        let memory = &machine.client.memory;
        memory.write(CODE, &assemble(64, CODE, code)).unwrap();
        memory.store_u64(TABLES, TABLES + 0x1003).unwrap();
        memory.store_u64(TABLES + 0x1000, TABLES + 0x2003).unwrap();
        memory.store_u64(TABLES + 0x2000, 0x83).unwrap();
        let mut sregs: kvm_sregs = machine.get(KVM_GET_SREGS);
        let flat = kvm_segment { selector: 0x10, limit: u32::MAX, type_: 3, s: 1, present: 1, db: 1, g: 1, ..sregs.ds };
        let code = kvm_segment { selector: 8, type_: 0xb, l: 1, db: 0, ..flat };
        (sregs.cs, sregs.ss, sregs.ds, sregs.es) = (code, flat, flat, flat);
        sregs.fs = kvm_segment { base: 0x7f12_3456_7000, limit: 0x1fff, selector: 0, ..flat };
        sregs.gs = kvm_segment { base: 0xffff_8880_1234_5000, avl: 1, ..flat };
        sregs.ldt = kvm_segment { selector: 0x18, base: 0xffff_8000_0000_1000, limit: 0x27, type_: 2, ..sregs.ldt };
        sregs.tr = kvm_segment { selector: 0x28, base: 0xffff_8000_0000_2000, limit: 0x67, type_: 11, ..sregs.tr };
        (sregs.gdt.base, sregs.gdt.limit) = (0xffff_8000_0000_3000, 0x7f);
        (sregs.idt.base, sregs.idt.limit) = (0xffff_8000_0000_4000, 0xfff);
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8005_0033, TABLES, 0x6a0, 0xd01);
        machine.set(KVM_SET_SREGS, &sregs);
        let words: Vec<u8> = (1..=18u64).flat_map(|n| (n * 0x0102_0304_0506_0708).to_le_bytes()).collect();
        let regs = kvm_regs::from_bytes(&words).unwrap();
        machine.set(KVM_SET_REGS, &kvm_regs { rip: CODE, rsp: 0x8000, rflags: 0x8d7, ..regs });
        machine.set(KVM_SET_DEBUGREGS, &kvm_debugregs { dr6: 0xffff_0ff1, dr7: 0x700, ..Plain::zeroed() });
        machine
    }

    fn get<T: Plain>(&self, request: u32) -> T {
        self.client.get(self.vcpu, request)
    }

    fn set<T: Plain>(&self, request: u32, value: &T) {
        self.client.set(self.vcpu, request, value).unwrap();
    }

    fn msr_bytes(index: u32, value: u64) -> Vec<u8> {
        [&1u64.to_le_bytes()[..], &u64::from(index).to_le_bytes(), &value.to_le_bytes()].concat()
    }

    fn set_msr(&self, index: u32, value: u64) {
        assert_eq!(self.client.ioctl_bytes(self.vcpu, KVM_SET_MSRS, Self::msr_bytes(index, value)).unwrap().0, 1);
    }

    fn msr(&self, index: u32) -> u64 {
        let (count, bytes) = self.client.ioctl_bytes(self.vcpu, KVM_GET_MSRS, Self::msr_bytes(index, 0)).unwrap();
        assert_eq!(count, 1);
        u64::from_bytes(&bytes[16..]).unwrap()
    }

    fn events(&self) -> kvm_vcpu_events {
        self.get(KVM_GET_VCPU_EVENTS)
    }

    /// smm, pending, smm_inside_nmi, latched_init.
    fn smi(&self) -> [u8; 4] {
        let smi = self.events().smi;
        [smi.smm, smi.pending, smi.smm_inside_nmi, smi.latched_init]
    }

    fn queue_smi(&self) {
        self.client.ioctl(self.vcpu, KVM_SMI, 0).unwrap();
    }

    /// Exit reason.
    fn run(&self) -> u32 {
        self.client.ioctl(self.vcpu, KVM_RUN, 0).unwrap();
        self.page.load_u32(8).unwrap()
    }

    /// The port of an OUT, and `kvm_run.flags`.
    fn run_to_out(&self) -> (u32, u16) {
        assert_eq!(self.run(), KVM_EXIT_IO);
        (self.page.load_u32(32).unwrap() >> 16, self.page.load_u16(14).unwrap())
    }

    /// A field of the state-save area, by its offset from SMBASE.
    fn saved(&self, offset: u64, bytes: u32) -> u64 {
        let word = self.client.memory.load_u64(SMRAM_AT + (offset & !7)).unwrap() >> (8 * (offset & 7));
        if bytes == 8 { word } else { word & ((1 << (8 * bytes)) - 1) }
    }

    fn save(&self, offset: u64, bytes: &[u8]) {
        self.client.memory.write(SMRAM_AT + offset, bytes).unwrap();
    }
}

const HANDLED: (u32, u16) = (IN_SMM, KVM_RUN_X86_SMM as u16);
const RUNS: (u32, u16) = (OUTSIDE, 0);

#[test]
fn an_smi_is_handled_in_smram_and_rsm_goes_back() {
    let machine = Machine::new(false, spins, tells);
    assert_eq!(machine.run_to_out(), RUNS);
    machine.queue_smi();
    assert_eq!(machine.smi(), [0, 1, 0, 0]);
    assert_eq!(machine.run_to_out(), HANDLED);
    assert_eq!(machine.smi(), [1, 0, 0, 0]);
    assert_eq!(machine.events().nmi.masked, 1);
    let regs: kvm_regs = machine.get(KVM_GET_REGS);
    assert_eq!((regs.rip, regs.rflags), (HANDLER, 2), "the OUT is not finished");
    assert_eq!(machine.run_to_out(), RUNS);
    assert_eq!(machine.smi(), [0; 4]);
    assert_eq!(machine.events().nmi.masked, 0);
    assert_eq!(machine.run_to_out(), RUNS);
}

/// SDM Vol. 3 "SMM Handler Execution Environment": the table of registers on entry; IDTR as Linux's KVM has it.
#[test]
fn the_handler_finds_flat_real_mode() {
    let machine = Machine::new_long(spins);
    machine.queue_smi();
    assert_eq!(machine.run_to_out(), HANDLED);
    let sregs: kvm_sregs = machine.get(KVM_GET_SREGS);
    assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x5_0032, 0, 0), "PE, EM, TS and PG are clear");
    assert_eq!((sregs.cs.selector, sregs.cs.base, sregs.cs.limit), ((SMBASE >> 4) as u16, SMBASE, u32::MAX));
    for segment in [sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss] {
        assert_eq!((segment.selector, segment.base, segment.limit, segment.g), (0, 0, u32::MAX, 1));
    }
    assert_eq!((sregs.idt.base, sregs.idt.limit), (0, 0));
    assert_eq!(machine.get::<kvm_debugregs>(KVM_GET_DEBUGREGS).dr7, 0x400);
}

#[test]
fn the_area_has_amd64s_layout() {
    let machine = Machine::new_long(spins);
    let (regs, sregs): (kvm_regs, kvm_sregs) = (machine.get(KVM_GET_REGS), machine.get(KVM_GET_SREGS));
    machine.queue_smi();
    assert_eq!(machine.run_to_out(), HANDLED);
    let general = [
        regs.r15, regs.r14, regs.r13, regs.r12, regs.r11, regs.r10, regs.r9, regs.r8, regs.rdi, regs.rsi, regs.rbp,
        regs.rsp, regs.rbx, regs.rdx, regs.rcx, regs.rax,
    ];
    for (n, value) in (0..).zip(general) {
        assert_eq!(machine.saved(0xff80 + 8 * n, 8), value, "general register {n} from the end");
    }
    for (name, offset, bytes, value) in [
        ("RIP", 0xff78, 8, CODE),
        ("RFLAGS", 0xff70, 8, 0x8d7),
        ("DR6", 0xff68, 8, 0xffff_0ff1),
        ("DR7", 0xff60, 8, 0x700),
        ("CR0", 0xff58, 8, sregs.cr0),
        ("CR3", 0xff50, 8, TABLES),
        ("CR4", 0xff48, 8, 0x6a0),
        ("SMBASE", 0xff00, 4, SMBASE),
        ("revision", 0xfefc, 4, 0x2_0064),
        ("EFER", 0xfed0, 8, 0xd01),
        ("GDTR limit", 0xfe64, 4, 0x7f),
        ("GDTR base", 0xfe68, 8, 0xffff_8000_0000_3000),
        ("IDTR limit", 0xfe84, 4, 0xfff),
        ("IDTR base", 0xfe88, 8, 0xffff_8000_0000_4000),
        ("ES selector", 0xfe00, 2, 0x10),
        ("ES attributes", 0xfe02, 2, 0xc093),
        ("ES limit", 0xfe04, 4, 0xffff_ffff),
        ("CS selector", 0xfe10, 2, 8),
        ("CS attributes", 0xfe12, 2, 0xa09b),
        ("SS attributes", 0xfe22, 2, 0xc093),
        ("DS attributes", 0xfe32, 2, 0xc093),
        ("FS limit", 0xfe44, 4, 0x1fff),
        ("FS base", 0xfe48, 8, 0x7f12_3456_7000),
        ("GS attributes", 0xfe52, 2, 0xd093),
        ("GS base", 0xfe58, 8, 0xffff_8880_1234_5000),
        ("LDTR selector", 0xfe70, 2, 0x18),
        ("LDTR attributes", 0xfe72, 2, 0x82),
        ("LDTR limit", 0xfe74, 4, 0x27),
        ("LDTR base", 0xfe78, 8, 0xffff_8000_0000_1000),
        ("TR selector", 0xfe90, 2, 0x28),
        ("TR attributes", 0xfe92, 2, 0x8b),
        ("TR limit", 0xfe94, 4, 0x67),
        ("TR base", 0xfe98, 8, 0xffff_8000_0000_2000),
    ] {
        assert_eq!(machine.saved(offset, bytes), value, "{name}");
    }
}

/// A guest without long mode: SDM's map. The descriptors are at offsets that the SDM reserves; as Linux's KVM has them.
#[test]
fn the_area_of_32_bits() {
    let machine = Machine::new(false, spins, tells);
    let no_long_mode = kvm_cpuid_entry2 { function: 0x8000_0001, ..Plain::zeroed() };
    let has_pse = kvm_cpuid_entry2 { function: 1, edx: 1 << 3, ..Plain::zeroed() };
    let list = [&2u64.to_le_bytes()[..], no_long_mode.as_bytes(), has_pse.as_bytes()].concat();
    machine.client.ioctl_bytes(machine.vcpu, KVM_SET_CPUID2, list).unwrap();
    let words: Vec<u8> = (1..=18u64).flat_map(|n| (n * 0x0102_0304).to_le_bytes()).collect();
    let regs = kvm_regs::from_bytes(&words).unwrap();
    let regs = kvm_regs { rip: CODE, rflags: 0x8d7, r8: 8, ..regs };
    machine.set(KVM_SET_REGS, &regs);
    let mut sregs: kvm_sregs = machine.get(KVM_GET_SREGS);
    (sregs.gdt.base, sregs.gdt.limit, sregs.idt.limit, sregs.cr4) = (0x1234_5678, 0x7f, 0x3ff, 0x10);
    (sregs.ss.selector, sregs.ss.base) = (0x700, 0x7000);
    machine.set(KVM_SET_SREGS, &sregs);
    let sregs: kvm_sregs = machine.get(KVM_GET_SREGS);
    machine.queue_smi();
    assert_eq!(machine.run_to_out(), HANDLED);
    for (name, offset, value) in [
        ("CR0", 0xfffc, sregs.cr0),
        ("CR3", 0xfff8, 0),
        ("EFLAGS", 0xfff4, 0x8d7),
        ("EIP", 0xfff0, CODE),
        ("EDI", 0xffec, regs.rdi),
        ("ESI", 0xffe8, regs.rsi),
        ("EBP", 0xffe4, regs.rbp),
        ("ESP", 0xffe0, regs.rsp),
        ("EBX", 0xffdc, regs.rbx),
        ("EDX", 0xffd8, regs.rdx),
        ("ECX", 0xffd4, regs.rcx),
        ("EAX", 0xffd0, regs.rax),
        ("DR6", 0xffcc, 0xffff_0ff0),
        ("DR7", 0xffc8, 0x400),
        ("SS", 0xffb0, 0x700),
        ("SS base", 0xffa4, 0x7000),
        ("SS limit", 0xffa0, 0xffff),
        ("SS attributes", 0xff9c, 0x9300),
        ("DS limit", 0xff30, 0xffff_ffff),
        ("DS attributes", 0xff2c, 0x80_9300),
        ("GDT base", 0xff74, 0x1234_5678),
        ("GDT limit", 0xff70, 0x7f),
        ("IDT limit", 0xff54, 0x3ff),
        ("CR4", 0xff14, 0x10),
        ("revision", 0xfefc, 0x2_0000),
        ("SMBASE", 0xfef8, SMBASE),
    ] {
        assert_eq!(machine.saved(offset, 4), value, "{name}");
    }
    assert_eq!(machine.run_to_out(), RUNS);
    assert_eq!(machine.get::<kvm_regs>(KVM_GET_REGS), regs);
    assert_eq!(machine.get::<kvm_sregs>(KVM_GET_SREGS), sregs);
}

#[test]
fn all_that_is_saved_comes_back() {
    let machine = Machine::new_long(spins);
    let (regs, sregs): (kvm_regs, kvm_sregs) = (machine.get(KVM_GET_REGS), machine.get(KVM_GET_SREGS));
    let debug: kvm_debugregs = machine.get(KVM_GET_DEBUGREGS);
    machine.queue_smi();
    assert_eq!(machine.run_to_out(), HANDLED);
    assert_eq!(machine.run_to_out(), RUNS);
    assert_eq!(machine.get::<kvm_regs>(KVM_GET_REGS), regs);
    assert_eq!(machine.get::<kvm_sregs>(KVM_GET_SREGS), sregs);
    assert_eq!(machine.get::<kvm_debugregs>(KVM_GET_DEBUGREGS), debug);
}

/// SDM Vol. 3 "SMBASE Relocation"; the registers of the area are the handler's to change.
#[test]
fn what_the_handler_changes_counts() {
    let machine = Machine::new_long(spins);
    machine.queue_smi();
    assert_eq!(machine.run_to_out(), HANDLED);
    machine.save(0xfff8, &0x1122_3344_5566_7788u64.to_le_bytes());
    machine.save(0xff00, &0x3_0000u32.to_le_bytes());
    machine.save(0xff78, &(CODE + 2).to_le_bytes());
    assert_eq!(machine.run_to_out(), RUNS);
    let regs: kvm_regs = machine.get(KVM_GET_REGS);
    assert_eq!((regs.rax, regs.rip), (0x1122_3344_5566_7788, CODE), "JMP, then OUT");
    assert_eq!(machine.msr(IA32_SMBASE), 0x3_0000);
    machine.client.memory.write(0x3_8000, &assemble(16, HANDLER, |a| a.out(0x92, al))).unwrap();
    machine.queue_smi();
    assert_eq!(machine.run_to_out(), (0x92, 1));
    assert_eq!(machine.client.memory.load_u64(0x3_fff8), Some(0x1122_3344_5566_7788));
    assert_eq!(machine.msr(SMI_COUNT), 2);
}

#[test]
fn smram_is_seen_in_smm_alone() {
    let reads = |a: &mut CodeAssembler| {
        a.mov(ebx, SMBASE as u32)?;
        a.mov(eax, dword_ptr(ebx))?;
        a.out(OUTSIDE, al)
    };
    let handler = |a: &mut CodeAssembler| {
        a.mov(ebx, SMBASE as u32)?;
        a.mov(ecx, dword_ptr(ebx))?;
        a.mov(dword_ptr(ebx + 4), ecx)?;
        tells(a)
    };
    let machine = Machine::new(false, reads, handler);
    machine.client.memory.store_u32(SMRAM_AT, 0x5555_aaaa).unwrap();
    machine.queue_smi();
    assert_eq!(machine.run_to_out(), HANDLED);
    assert_eq!(machine.client.memory.load_u32(SMRAM_AT + 4), Some(0x5555_aaaa));
    assert_eq!(machine.run(), KVM_EXIT_MMIO);
    assert_eq!(machine.page.load_u64(32), Some(SMBASE));
}

/// The same address is other code in SMM.
#[test]
fn code_of_both_address_spaces_stays_apart() {
    let machine = Machine::new(false, spins, tells);
    machine.client.slot(machine.vm, (5, 0), SMBASE, SMRAM, SMRAM_AT + SMRAM).unwrap();
    machine.client.memory.write(SMRAM_AT + SMRAM + HANDLER, &assemble(16, HANDLER, spins)).unwrap();
    let mut sregs: kvm_sregs = machine.get(KVM_GET_SREGS);
    (sregs.cs.base, sregs.cs.selector) = (SMBASE, (SMBASE >> 4) as u16);
    machine.set(KVM_SET_SREGS, &sregs);
    machine.set(KVM_SET_REGS, &kvm_regs { rip: HANDLER, rflags: 2, ..Plain::zeroed() });
    for _ in 0..3 {
        assert_eq!(machine.run_to_out(), RUNS);
        machine.queue_smi();
        assert_eq!(machine.run_to_out(), HANDLED);
    }
}

#[test]
fn another_smi_waits_for_rsm() {
    let machine = Machine::new(false, spins, tells);
    machine.queue_smi();
    assert_eq!(machine.run_to_out(), HANDLED);
    machine.queue_smi();
    machine.queue_smi();
    assert_eq!(machine.smi(), [1, 1, 0, 0]);
    assert_eq!(machine.run_to_out(), HANDLED, "again, before any other instruction");
    assert_eq!(machine.run_to_out(), RUNS);
    assert_eq!(machine.msr(SMI_COUNT), 2);
}

/// SDM Vol. 3 "NMI Handling While in SMM".
#[test]
fn nmis_wait_for_rsm() {
    let machine = Machine::new(false, spins, tells);
    let handler = assemble(16, 0x3000, |a| a.out(0x93, al));
    machine.client.memory.write(0x3000, &handler).unwrap();
    machine.client.memory.store_u32(8, 0x3000).unwrap();
    machine.queue_smi();
    machine.client.ioctl(machine.vcpu, KVM_NMI, 0).unwrap();
    assert_eq!(machine.run_to_out(), HANDLED);
    assert_eq!(machine.events().nmi.pending, 1);
    assert_eq!(machine.run_to_out(), (0x93, 0));
    // An SMI in the NMI's handler: RSM leaves NMIs masked.
    machine.queue_smi();
    machine.client.ioctl(machine.vcpu, KVM_NMI, 0).unwrap();
    machine.client.memory.write(0x3002, &assemble(16, 0x3002, spins)).unwrap();
    assert_eq!(machine.run_to_out(), HANDLED);
    assert_eq!(machine.smi(), [1, 0, 1, 0]);
    assert_eq!(machine.run_to_out(), RUNS);
    let nmi = machine.events().nmi;
    assert_eq!((nmi.masked, nmi.pending), (1, 1));
}

/// SDM Vol. 3 "INIT Handling While in SMM": latched. api.rst `KVM_GET_VCPU_EVENTS`.
#[test]
fn an_init_waits_for_rsm() {
    let machine = Machine::new(true, spins, tells);
    machine.queue_smi();
    assert_eq!(machine.run_to_out(), HANDLED);
    let init = kvm_msi { address_lo: 0xfee0_0000, data: 5 << 8 | 1 << 14, ..Plain::zeroed() };
    machine.client.set(machine.vm, KVM_SIGNAL_MSI, &init).unwrap();
    assert_eq!(machine.smi(), [1, 0, 0, 1]);
    // It may be moved with the rest.
    let events = machine.events();
    let mut without = events;
    without.smi.latched_init = 0;
    without.flags = KVM_VCPUEVENT_VALID_SMM;
    machine.set(KVM_SET_VCPU_EVENTS, &without);
    assert_eq!(machine.smi(), [1, 0, 0, 0]);
    machine.set(KVM_SET_VCPU_EVENTS, &kvm_vcpu_events { flags: KVM_VCPUEVENT_VALID_SMM, ..events });
    assert_eq!(machine.smi(), [1, 0, 0, 1]);
    // The reset vector is where no memory is; the code that the SMI came to never runs.
    assert_eq!(machine.run(), KVM_EXIT_INTERNAL_ERROR);
    assert_eq!(machine.get::<kvm_regs>(KVM_GET_REGS).rip, 0xfff0);
    assert_eq!(machine.get::<kvm_sregs>(KVM_GET_SREGS).cs.selector, 0xf000);
    assert_eq!(machine.smi(), [0; 4]);
}

/// SDM Vol. 3 "Delivery Mode" 010: ICR, LVT, MSI, I/O APIC. Each ends a HLT.
#[test]
fn apics_deliver_smis() {
    const MODE: u32 = 2 << 8;
    let waits = |a: &mut CodeAssembler| {
        a.mov(ebx, 0xfee0_00f0u32)?;
        a.mov(dword_ptr(ebx), 0x1ff)?;
        a.out(OUTSIDE, al)?;
        a.hlt()?;
        spins(a)
    };
    // From itself: no sleep, but the instruction after the write runs in SMM.
    let sends = |a: &mut CodeAssembler| {
        a.mov(ebx, 0xfee0_0300u32)?;
        a.mov(dword_ptr(ebx), MODE | 1 << 14 | 1 << 18)?;
        spins(a)
    };
    let machine = Machine::new(true, sends, tells);
    assert_eq!(machine.run_to_out(), HANDLED);
    assert_eq!(machine.run_to_out(), RUNS);

    let by_msi = |machine: &Machine, client: &FakeClient| {
        let msi = kvm_msi { address_lo: 0xfee0_0000, data: MODE, ..Plain::zeroed() };
        client.file(machine.vm).ioctl(client, KVM_SIGNAL_MSI, 0, msi.as_bytes()).map(drop)
    };
    let by_ioapic = |machine: &Machine, client: &FakeClient| {
        client.file(machine.vm).ioctl(client, KVM_IRQ_LINE, 0, [20u32, 1].as_bytes()).map(drop)
    };
    type Source<'a> = &'a (dyn Fn(&Machine, &FakeClient) -> Result<(), Errno> + Sync);
    for source in [&by_msi as Source<'_>, &by_ioapic] {
        let machine = Machine::new(true, waits, tells);
        let mut chip = [0u32; 130];
        chip[0] = KVM_IRQCHIP_IOAPIC;
        machine.client.ioctl_with(machine.vm, KVM_GET_IRQCHIP, &mut chip).unwrap();
        // struct kvm_ioapic_state: base, ioregsel, id, irr, padding, then two words for each input.
        (chip[8 + 2 * 20], chip[9 + 2 * 20]) = (MODE, 0);
        machine.client.ioctl_with(machine.vm, KVM_SET_IRQCHIP, &mut chip).unwrap();
        assert_eq!(machine.run_to_out(), RUNS);
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(20));
                source(&machine, &machine.client).unwrap();
            });
            assert_eq!(machine.run_to_out(), HANDLED);
        });
        assert_eq!(machine.run_to_out(), RUNS, "HLT is not entered again");
    }

    let by_error_of_lvt = |a: &mut CodeAssembler| {
        a.mov(ebx, 0xfee0_00f0u32)?;
        a.mov(dword_ptr(ebx), 0x1ff)?;
        a.mov(ebx, 0xfee0_0370u32)?;
        // The error entry has no delivery mode: what is written there stays fixed.
        a.mov(dword_ptr(ebx), MODE | 0x40)?;
        a.mov(eax, dword_ptr(ebx))?;
        a.out(OUTSIDE, al)
    };
    let machine = Machine::new(true, by_error_of_lvt, tells);
    assert_eq!(machine.run_to_out(), RUNS);
    assert_eq!(machine.get::<kvm_regs>(KVM_GET_REGS).rax, 0x40);
}

/// SDM Vol. 3 "Local Vector Table", delivery mode 010. What rises there is the timer, once some APIC has NMIs at its LINT0
/// (`pit_do_work`, `kvm_apic_nmi_wd_deliver`); counters of performance and LINT1 have no source here.
#[test]
fn an_entry_of_the_local_vector_table_delivers_smis() {
    const LINT0: usize = 0x350;
    const SVR: usize = 0xf0;
    let waits = |a: &mut CodeAssembler| {
        a.mov(ebx, 0xfee0_00f0u32)?;
        a.mov(dword_ptr(ebx), 0x1ff)?;
        a.mov(ebx, 0xfee0_0350u32)?;
        a.mov(dword_ptr(ebx), 0x200)?;
        // Counter 0: mode 2, 65536 counts.
        for (port, value) in [(0x43, 0x34), (0x40, 0), (0x40, 0)] {
            a.mov(al, value)?;
            a.out(port, al)?;
        }
        a.hlt()?;
        spins(a)
    };
    let machine = Machine::new(true, waits, tells);
    machine.client.set(machine.vm, KVM_CREATE_PIT2, &[0u32; 16]).unwrap();
    let watched = machine.client.ioctl(machine.vm, KVM_CREATE_VCPU, 1).unwrap();
    let mut page: [u32; 256] = machine.client.get(watched, KVM_GET_LAPIC);
    (page[SVR / 4], page[LINT0 / 4]) = (0x1ff, 0x400);
    machine.client.set(watched, KVM_SET_LAPIC, &page).unwrap();
    assert_eq!(machine.run_to_out(), HANDLED);
    assert_eq!(machine.run_to_out(), RUNS, "HLT is not entered again");
    let events: kvm_vcpu_events = machine.client.get(watched, KVM_GET_VCPU_EVENTS);
    assert_eq!((events.nmi.pending, events.smi.pending), (1, 0), "the other has its NMI");
}

/// SDM Vol. 3 "Shutdown" in "RSM": what the area must not hold. Linux's KVM checks CR3 and the upper halves of DR6 and DR7 too.
#[test]
fn a_state_that_cannot_be_shuts_down() {
    for (name, offset, value) in [
        ("CR0.PG without PE", 0xff58, 0x8005_0032u64),
        ("CR0.NW without CD", 0xff58, 0xa005_0033),
        ("CR0 has 32 bits", 0xff58, 0x1_8005_0033),
        ("a reserved bit of CR4", 0xff48, 0x6a0 | 1 << 31),
        ("long mode without PAE", 0xff48, 0x680),
        ("a reserved bit of EFER", 0xfed0, 0xd03),
        ("CR3 beyond MAXPHYADDR", 0xff50, 1 << 52),
        ("DR6 has 32 bits", 0xff68, 1 << 32),
        ("DR7 has 32 bits", 0xff60, 1 << 32),
    ] {
        let machine = Machine::new_long(spins);
        machine.queue_smi();
        assert_eq!(machine.run_to_out(), HANDLED);
        machine.save(offset, &value.to_le_bytes());
        assert_eq!(machine.run(), KVM_EXIT_SHUTDOWN, "{name}");
        assert_eq!(machine.smi(), [0; 4], "{name}");
    }
}

/// What passes RSM and not VM entry, as with Intel's.
#[test]
fn a_state_that_vm_entry_refuses_fails_there() {
    for (name, offset, bytes) in [
        ("RIP is not canonical", 0xff78, &(1u64 << 63).to_le_bytes()[..]),
        ("TR is no TSS", 0xfe92, &[0x83, 0]),
        ("CS is data", 0xfe12, &[0x91, 0xa0]),
        ("a reserved bit of RFLAGS", 0xff70, &[0, 0x80, 0, 0]),
    ] {
        let machine = Machine::new_long(spins);
        machine.queue_smi();
        assert_eq!(machine.run_to_out(), HANDLED);
        machine.save(offset, bytes);
        assert_eq!(machine.run(), KVM_EXIT_FAIL_ENTRY, "{name}");
        assert_eq!(machine.page.load_u64(32), Some(0x8000_0021), "{name}");
    }
}

/// Without RAM at SMBASE the area is lost, and so is what would run.
#[test]
fn no_smram_ends_in_an_internal_error() {
    let machine = Machine::new(false, spins, tells);
    machine.set_msr(IA32_SMBASE, 0x4000_0000);
    machine.queue_smi();
    assert_eq!(machine.run(), KVM_EXIT_INTERNAL_ERROR);
    assert_eq!(machine.smi(), [1, 0, 0, 0]);
    // RSM that finds no area: SMBASE has a page for the handler, and none for the area.
    machine.set_msr(IA32_SMBASE, RAM - 0x9000);
    machine.client.memory.write(0x2000, &RESUMED).unwrap();
    let mut sregs: kvm_sregs = machine.get(KVM_GET_SREGS);
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    machine.set(KVM_SET_SREGS, &sregs);
    machine.set(KVM_SET_REGS, &kvm_regs { rip: 0x2000, rflags: 2, ..Plain::zeroed() });
    assert_eq!(machine.run(), KVM_EXIT_INTERNAL_ERROR);
    assert_eq!(machine.page.load_u32(32), Some(KVM_INTERNAL_ERROR_EMULATION));
}

/// `smbase` of x86.c has 64 bits, the base of CS has 32.
#[test]
fn smbase_beyond_4_gib_fails_at_vm_entry() {
    let machine = Machine::new(false, spins, tells);
    machine.set_msr(IA32_SMBASE, 1 << 32);
    assert_eq!(machine.msr(IA32_SMBASE), 1 << 32);
    machine.queue_smi();
    for _ in 0..2 {
        assert_eq!(machine.run(), KVM_EXIT_FAIL_ENTRY);
        assert_eq!(machine.smi(), [1, 0, 0, 0]);
    }
}

/// api.rst `KVM_SET_VCPU_EVENTS`, and x86.c where it says EINVAL.
#[test]
fn events_carry_smm() {
    let machine = Machine::new(true, spins, tells);
    let mut events = machine.events();
    assert_ne!(events.flags & KVM_VCPUEVENT_VALID_SMM, 0);
    events.smi.pending = 1;
    events.flags = 0;
    machine.set(KVM_SET_VCPU_EVENTS, &events);
    assert_eq!(machine.smi(), [0; 4], "not without the flag");
    events.flags = KVM_VCPUEVENT_VALID_SMM;
    machine.set(KVM_SET_VCPU_EVENTS, &events);
    assert_eq!(machine.smi(), [0, 1, 0, 0]);
    for state in [KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_SIPI_RECEIVED] {
        let state = kvm_mp_state { mp_state: state };
        assert_eq!(machine.client.set(machine.vcpu, KVM_SET_MP_STATE, &state), Err(Errno::EINVAL));
    }
    (events.smi.pending, events.smi.smm, events.smi.smm_inside_nmi) = (0, 1, 1);
    machine.set(KVM_SET_VCPU_EVENTS, &events);
    assert_eq!(machine.smi(), [1, 0, 1, 0]);
    assert_eq!(machine.run_to_out(), (OUTSIDE, 1), "in SMM by word of user space");
    events.smi.smm = 0;
    machine.set(KVM_SET_VCPU_EVENTS, &events);
    assert_eq!(machine.smi(), [0; 4], "RSM is over for NMIs, too");
    machine.set(KVM_SET_MP_STATE, &kvm_mp_state { mp_state: KVM_MP_STATE_INIT_RECEIVED });
    for (smm, pending) in [(1, 0), (0, 1)] {
        (events.smi.smm, events.smi.pending) = (smm, pending);
        assert_eq!(machine.client.set(machine.vcpu, KVM_SET_VCPU_EVENTS, &events), Err(Errno::EINVAL));
    }
}

/// As x86.c has them: `host_initiated` alone.
#[test]
fn smbase_is_user_spaces() {
    let machine = Machine::new(
        false,
        |a| {
            a.mov(ecx, SMI_COUNT)?;
            a.rdmsr()?;
            a.out(OUTSIDE, al)?;
            a.mov(ecx, IA32_SMBASE)?;
            a.rdmsr()
        },
        tells,
    );
    machine.client.memory.write(0x3000, &assemble(16, 0x3000, |a| a.out(0x93, al))).unwrap();
    machine.client.memory.store_u32(4 * 13, 0x3000).unwrap();
    machine.set_msr(SMI_COUNT, 77);
    assert_eq!(machine.run_to_out(), RUNS);
    assert_eq!(machine.get::<kvm_regs>(KVM_GET_REGS).rax, 77);
    assert_eq!(machine.run_to_out(), (0x93, 0), "#GP");
    let other = Machine::new(false, spins, tells);
    let fresh = other.client.ioctl(other.vm, KVM_CREATE_VCPU, 1).unwrap();
    let (_, bytes) = other.client.ioctl_bytes(fresh, KVM_GET_MSRS, Machine::msr_bytes(IA32_SMBASE, 0)).unwrap();
    assert_eq!(u64::from_bytes(&bytes[16..]), Some(0x3_0000), "SDM Vol. 3 \"SMRAM\"");
}

/// api.rst `KVM_SET_USER_MEMORY_REGION`: bits 16 and up of the slot are the address space; each has its own slots and log.
#[test]
fn address_spaces_have_slots_of_their_own() {
    let machine = Machine::new(false, spins, |a| {
        a.mov(ebx, 0x9000)?;
        a.mov(dword_ptr(ebx), eax)?;
        tells(a)
    });
    let set = |slot, flags, gpa| machine.client.slot(machine.vm, (slot, flags), gpa, RAM, 0);
    assert_eq!(machine.client.ioctl(machine.vm, KVM_CHECK_EXTENSION, KVM_CAP_MULTI_ADDRESS_SPACE.into()), Ok(2));
    assert_eq!(set(2 << 16, 0, 0x4000_0000), Err(Errno::EINVAL));
    assert_eq!(set(1 << 16 | 509, 0, 0x4000_0000), Err(Errno::EINVAL));
    assert_eq!(set(1 << 16 | 9, 0, 0), Err(Errno::EEXIST));
    assert_eq!(set(9, 0, 0), Err(Errno::EEXIST));
    set(0, KVM_MEM_LOG_DIRTY_PAGES, 0).unwrap();
    set(1 << 16, KVM_MEM_LOG_DIRTY_PAGES, 0).unwrap();
    let log = |slot: u32| {
        let bitmap = BASE + 0x40_0000;
        let log = DirtyLog { slot, padding1: 0, dirty_bitmap: bitmap };
        machine.client.set(machine.vm, KVM_GET_DIRTY_LOG, &log)?;
        Ok(machine.client.memory.load_u64(bitmap - BASE).unwrap())
    };
    assert_eq!(log(2 << 16), Err(Errno::EINVAL));
    log(0).unwrap();
    log(1 << 16).unwrap();
    machine.queue_smi();
    assert_eq!(machine.run_to_out(), HANDLED);
    assert_eq!(log(0), Ok(0));
    assert_eq!(log(1 << 16), Ok(1 << 9));
}

/// Whatever lies in the area, RSM ends in the guest, in a shutdown or in an exit, and the VM goes on.
#[test]
fn foreign_bytes_in_the_area() {
    let machine = Machine::new_long(spins);
    let (regs, sregs): (kvm_regs, kvm_sregs) = (machine.get(KVM_GET_REGS), machine.get(KVM_GET_SREGS));
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    // A guest that loops somewhere is called back.
    let mut clean = vec![0; 0x200];
    let mut ends = std::collections::BTreeMap::new();
    for round in 0..2000 {
        machine.set(KVM_SET_SREGS, &sregs);
        machine.set(KVM_SET_REGS, &regs);
        machine.set(KVM_SET_VCPU_EVENTS, &kvm_vcpu_events { flags: KVM_VCPUEVENT_VALID_SMM, ..Plain::zeroed() });
        machine.queue_smi();
        assert_eq!(machine.run_to_out(), HANDLED, "round {round}");
        machine.client.memory.read(SMRAM_AT + 0xfe00, &mut clean).unwrap();
        let mut area = clean.clone();
        for _ in 0..=random.next() % 6 {
            let at = (random.next() % 0x40 * 8) as usize;
            let value = random.number();
            area[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        // SMBASE stays: the next round needs it.
        area[0x100..0x104].copy_from_slice(&clean[0x100..0x104]);
        machine.save(0xfe00, &area);
        // One instruction behind RSM, at the most.
        let debug = kvm_guest_debug { control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP, ..Plain::zeroed() };
        machine.set(KVM_SET_GUEST_DEBUG, &debug);
        let mut exit = machine.run();
        if exit == KVM_EXIT_DEBUG && machine.smi()[0] != 0 {
            exit = machine.run();
        }
        *ends.entry(exit).or_insert(0) += 1;
        machine.set(KVM_SET_GUEST_DEBUG, &kvm_guest_debug { ..Plain::zeroed() });
    }
    assert!(ends.len() >= 4, "the fuzzing reaches little: {ends:?}");
}
