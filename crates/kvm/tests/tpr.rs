//! The task priority as user space hears of it: `KVM_EXIT_SET_TPR`, `KVM_EXIT_TPR_ACCESS`, and the doubleword of
//! `KVM_SET_VAPIC_ADDR`. What must happen is lapic.c's, x86.c's and vmx.c's (`handle_cr`) of Linux 6.1.

mod common;

use std::sync::Arc;

use common::FakeClient;
use iced_x86::code_asm::*;
use kvm_abi::consts::*;
use kvm_abi::request::*;
use kvm_abi::{Plain, kvm_msi, kvm_regs, kvm_sregs};
use mmu::Mapping;
use nix::errno::Errno;

const RAM: u64 = 0x2_0000;
const CODE: u64 = 0x1000;
const HANDLER: u64 = 0x8000;
const VAPIC: u64 = 0x9000;
const SEEN: u64 = 0xa000;
const TPR: u64 = 0xfee0_0080;

struct Machine {
    client: Arc<FakeClient>,
    vm: i32,
    vcpu: i32,
    page: Arc<Mapping>,
}

impl Machine {
    /// A vCPU in real mode. `chip`: its local APIC is here, and enabled.
    fn new(chip: bool, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Self {
        let client = FakeClient::new();
        let vm = client.vm_with_ram(RAM);
        if chip {
            client.ioctl(vm, KVM_CREATE_IRQCHIP, 0).unwrap();
        }
        let mut a = CodeAssembler::new(16).unwrap();
        if chip {
            a.mov(ebx, 0xfee0_00f0u32).unwrap();
            a.mov(dword_ptr(ebx), 0x1ff).unwrap();
            a.mov(ebx, TPR as u32).unwrap();
        }
        code(&mut a).unwrap();
        client.memory.write(CODE, &a.assemble(CODE).unwrap()).unwrap();
        let vcpu = client.ioctl(vm, KVM_CREATE_VCPU, 0).unwrap();
        let mut sregs: kvm_sregs = client.get(vcpu, KVM_GET_SREGS);
        (sregs.cs.base, sregs.cs.selector, sregs.ds.limit, sregs.ds.g) = (0, 0, 0xffff_ffff, 1);
        client.set(vcpu, KVM_SET_SREGS, &sregs).unwrap();
        let regs = kvm_regs { rip: CODE, rsp: 0xf000, rflags: 2, ..Plain::zeroed() };
        client.set(vcpu, KVM_SET_REGS, &regs).unwrap();
        let page = client.map(vcpu);
        Self { client, vm, vcpu, page }
    }

    fn run(&self) -> u32 {
        self.client.ioctl(self.vcpu, KVM_RUN, 0).unwrap();
        self.page.load_u32(8).unwrap()
    }

    fn regs(&self) -> kvm_regs {
        self.client.get(self.vcpu, KVM_GET_REGS)
    }

    /// `tpr_access`: RIP, whether it wrote.
    fn access(&self) -> (u64, u32) {
        (self.page.load_u64(32).unwrap(), self.page.load_u32(40).unwrap())
    }

    fn report(&self, enabled: u32, flags: u32) -> Result<i32, Errno> {
        let mut control = [0u32; 10];
        (control[0], control[1]) = (enabled, flags);
        self.client.set(self.vcpu, KVM_TPR_ACCESS_REPORTING, &control)
    }

    fn tpr(&self) -> u32 {
        self.client.get::<[u32; 256]>(self.vcpu, KVM_GET_LAPIC)[0x80 / 4]
    }

    fn seen(&self, at: u64) -> u32 {
        self.client.memory.load_u32(SEEN + at).unwrap()
    }
}

#[test]
fn a_lower_cr8_is_told_where_the_apic_is_user_spaces() {
    for chip in [false, true] {
        let machine = Machine::new(chip, |a| a.hlt());
        let (client, vcpu) = (&machine.client, machine.vcpu);
        let mut a = CodeAssembler::new(64).unwrap();
        for priority in [5, 5, 9, 3] {
            a.mov(eax, priority).unwrap();
            a.mov(cr8, rax).unwrap();
        }
        a.out(0x80, al).unwrap();
        let code = a.assemble(CODE).unwrap();
        client.memory.write(CODE, &code).unwrap();
        for (at, entry) in [(0xb000u64, 0xc003u32), (0xc000, 0xd003), (0xd000, 0x83)] {
            client.memory.store_u32(at, entry).unwrap();
        }
        let mut sregs: kvm_sregs = client.get(vcpu, KVM_GET_SREGS);
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0011, 0xb000, 0x20, 0x500);
        (sregs.cs.l, sregs.cs.limit, sregs.cs.g, sregs.cs.selector) = (1, 0xffff_ffff, 1, 8);
        client.set(vcpu, KVM_SET_SREGS, &sregs).unwrap();
        client.set(vcpu, KVM_SET_REGS, &kvm_regs { rip: CODE, rflags: 2, ..Plain::zeroed() }).unwrap();
        if !chip {
            assert_eq!(machine.run(), KVM_EXIT_SET_TPR);
            assert_eq!(machine.page.load_u64(16), Some(3), "kvm_run.cr8");
            assert_eq!(machine.regs().rip, CODE + code.len() as u64 - 2, "RIP is behind MOV");
        }
        assert_eq!(machine.run(), KVM_EXIT_IO);
        assert_eq!(machine.page.load_u64(16), Some(3));
    }
}

#[test]
fn accesses_in_memory_are_told_behind_the_instruction() {
    let machine = Machine::new(true, |a| {
        a.out(0x80, al)?;
        a.mov(dword_ptr(ebx), 0x37)?;
        a.mov(eax, dword_ptr(ebx))?;
        a.movzx(ecx, byte_ptr(ebx + 1))?;
        a.xor(dword_ptr(ebx), 0x10)?;
        // No whole register is written; another one.
        a.mov(byte_ptr(ebx), 0)?;
        a.mov(eax, dword_ptr(ebx + 0x10))?;
        a.out(0x81, al)?;
        a.mov(dword_ptr(ebx), 0)?;
        a.out(0x82, al)
    });
    assert_eq!(machine.report(1, 1), Err(Errno::EINVAL));
    assert_eq!(machine.report(1, 0), Ok(0));
    assert_eq!(machine.run(), KVM_EXIT_IO);
    // OUT is finished by the next KVM_RUN.
    let mut at = machine.regs().rip + 2;
    for (bytes, write, tpr, value) in [(8, 1, 0x37, 0), (4, 0, 0x37, 0x37), (6, 0, 0x37, 0x37), (5, 1, 0x27, 0x37)] {
        assert_eq!(machine.run(), KVM_EXIT_TPR_ACCESS);
        assert_eq!(machine.access(), (at, write));
        let regs = machine.regs();
        assert!((at + bytes - 1..=at + bytes).contains(&regs.rip), "{:#x} {:#x}", at, regs.rip);
        assert_eq!((machine.tpr(), regs.rax), (tpr, value));
        at = regs.rip;
    }
    assert_eq!(machine.run(), KVM_EXIT_IO);
    assert_eq!(machine.report(0, 0), Ok(0));
    assert_eq!(machine.run(), KVM_EXIT_IO);
    assert_eq!(machine.tpr(), 0);
}

#[test]
fn a_doubleword_in_memory_is_the_task_priority() {
    let machine = Machine::new(true, |a| {
        a.mov(dword_ptr(ebx), 0x20)?;
        a.mov(eax, dword_ptr(VAPIC as i32))?;
        a.mov(dword_ptr(SEEN as i32), eax)?;
        a.mov(byte_ptr(VAPIC as i32), 0x60)?;
        a.out(0x80, al)?;
        a.sti()?;
        a.mov(eax, dword_ptr(VAPIC as i32))?;
        a.mov(dword_ptr(SEEN as i32 + 4), eax)?;
        // Lower again, and the hypercall that lets in what waits.
        a.mov(byte_ptr(VAPIC as i32), 0x10)?;
        a.mov(eax, 1)?;
        a.vmcall()?;
        a.out(0x82, al)
    });
    let client = &machine.client;
    let mut a = CodeAssembler::new(16).unwrap();
    a.mov(eax, dword_ptr(VAPIC as i32)).unwrap();
    a.mov(dword_ptr(SEEN as i32 + 8), eax).unwrap();
    a.out(0x81, al).unwrap();
    a.mov(ebx, 0xfee0_00b0u32).unwrap();
    a.mov(dword_ptr(ebx), 0).unwrap();
    a.iret().unwrap();
    client.memory.write(HANDLER, &a.assemble(HANDLER).unwrap()).unwrap();
    client.memory.store_u32(4 * 0x51, HANDLER as u32).unwrap();
    let set = |at: u64| client.set(machine.vcpu, KVM_SET_VAPIC_ADDR, &at);
    for at in [RAM, RAM - 2, u64::MAX - 3] {
        assert_eq!(set(at), Err(Errno::EINVAL), "{at:#x}");
    }
    assert_eq!(set(VAPIC), Ok(0));
    assert_eq!(machine.run(), KVM_EXIT_IO);
    assert_eq!(machine.seen(0), 0x20, "what the register has, the doubleword shows");
    assert_eq!(machine.tpr(), 0x60, "and the other way round");
    assert_eq!(client.get::<kvm_sregs>(machine.vcpu, KVM_GET_SREGS).cr8, 6);
    let msi = kvm_msi { address_lo: 0xfee0_0000, data: 0x51, ..Plain::zeroed() };
    client.set(machine.vm, KVM_SIGNAL_MSI, &msi).unwrap();
    assert_eq!(machine.run(), KVM_EXIT_IO);
    assert_eq!(machine.page.load_u32(32).unwrap() >> 16, 0x81);
    assert_eq!(machine.seen(4), 0x5100_0060, "it waits");
    assert_eq!(machine.seen(8), 0x0000_5010, "it is in service");
    assert_eq!(machine.run(), KVM_EXIT_IO);
    assert_eq!(machine.page.load_u32(32).unwrap() >> 16, 0x82);
    assert_eq!(set(0), Ok(0));
    client.memory.store_u32(VAPIC, 0xff).unwrap();
    machine.client.set(machine.vcpu, KVM_SET_REGS, &kvm_regs { rip: CODE, ..machine.regs() }).unwrap();
    machine.run();
    assert_eq!(machine.tpr(), 0x20, "nobody looks there any more");
}

#[test]
fn without_a_local_apic_there_is_no_page() {
    let machine = Machine::new(false, |a| a.hlt());
    for at in [0, VAPIC] {
        assert_eq!(machine.client.set(machine.vcpu, KVM_SET_VAPIC_ADDR, &at), Err(Errno::EINVAL));
    }
    assert_eq!(machine.report(1, 0), Ok(0), "the flag is the vCPU's");
}
