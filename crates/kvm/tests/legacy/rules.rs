//! What breaks unmodified VMMs of 2007 if it is missed.

use std::time::Duration;

use iced_x86::code_asm::*;
use kvm::client::SignalMask;
use kvm_abi::consts::*;
use kvm_abi::request::*;
use kvm_abi::*;
use nix::errno::Errno;

use crate::machine::{CODE, DEVICE, Machine, Release, STACK, assemble, empty, region};

#[test]
fn a_fresh_vcpu_starts_in_the_first_mebibyte() {
    let m = Machine::new();
    let (sregs, rip) = (m.sregs(), m.regs().rip);
    assert_eq!((sregs.cs.selector, sregs.cs.base, rip), (0xf000, 0xf_0000, 0xfff0));
    let (client, vm) = empty();
    region(&client, vm, 0, 0, 0, 0x10_0000).unwrap();
    let vcpu = client.ioctl(vm, KVM_CREATE_VCPU, 0).unwrap();
    client.ram(vm).write(0xf_fff0, &[0xf4]).unwrap();
    assert_eq!(client.ioctl(vcpu, KVM_RUN, 0), Ok(0));
    assert_eq!(client.map(vcpu).load_u32(8), Some(KVM_EXIT_HLT), "there is code at the reset vector");
}

#[test]
fn memory_comes_from_the_kernel_and_shows_in_the_vm_file() {
    let (client, vm) = empty();
    assert!(client.file(vm).mapping().is_none(), "a VM is not of 2007 before it says so");
    region(&client, vm, 3, 0, 0, 0xa_0000).unwrap();
    region(&client, vm, 0, 0, 0xc_0000, 128 << 20).unwrap();
    let ram = client.ram(vm);
    assert_eq!((ram.load_u64(0), ram.load_u64(0xf_fff0)), (Some(0), Some(0)), "zeroed");
    // mov [1234h], ax; hlt: the guest's store shows at the guest's address.
    ram.write(0xf_fff0, &[0xa3, 0x34, 0x12, 0xf4]).unwrap();
    let vcpu = client.ioctl(vm, KVM_CREATE_VCPU, 0).unwrap();
    let mut regs: kvm_regs = client.get(vcpu, KVM_GET_REGS);
    regs.rax = 0x4711;
    client.set(vcpu, KVM_SET_REGS, &regs).unwrap();
    client.ioctl(vcpu, KVM_RUN, 0).unwrap();
    assert_eq!(ram.load_u16(0x1234), Some(0x4711));
}

/// One mmap of 128 MiB, holes included, has nothing there; to the guest a hole is a device.
#[test]
fn the_mapping_of_the_vm_file_reaches_over_holes() {
    let m = Machine::real(|a| {
        a.mov(ax, word_ptr(0x10).es()).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.ram.load_u8(DEVICE), None);
    m.set_sregs(|sregs| sregs.es.base = DEVICE);
    assert_eq!(m.run(), Ok(KVM_EXIT_MMIO));
    assert_eq!(m.mmio().0, DEVICE + 0x10);
}

#[test]
fn a_pending_signal_does_not_keep_the_guest_from_running() {
    let m = Machine::real(|a| {
        let mut top = a.create_label();
        a.set_label(&mut top).unwrap();
        a.inc(ax).unwrap();
        a.jmp(top).unwrap();
    });
    m.client.raise();
    let mut last = 0;
    for _ in 0..3 {
        assert_eq!(m.run(), Err(Errno::EINTR));
        assert_eq!(m.reason(), KVM_EXIT_INTR);
        assert!(m.regs().rax > last, "each try gets somewhere");
        last = m.regs().rax;
    }
    // What is for user space comes out, signal or not.
    m.ram.write(CODE, &assemble(16, CODE, |a| a.out(0x10, al).unwrap())).unwrap();
    m.set_regs(|regs| regs.rip = CODE);
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
}

#[test]
fn the_signal_mask_counts_during_run_alone() {
    let m = Machine::real(|a| a.hlt().unwrap());
    let set = |mask: u64| {
        let bytes = [&8u32.to_le_bytes()[..], &mask.to_le_bytes()].concat();
        m.client.ioctl_bytes(m.vcpu, KVM_SET_SIGNAL_MASK, bytes).map(|(ret, _)| ret)
    };
    assert_eq!(set(u64::MAX), Ok(0));
    assert_eq!(m.client.masks.lock().len(), 0, "nothing is blocked outside of KVM_RUN");
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    let without_kill_and_stop = !(1 << 8 | 1 << 18);
    assert_eq!(*m.client.masks.lock(), [Some(SignalMask(without_kill_and_stop))]);
    // Null: the thread's own mask again.
    assert_eq!(m.client.ioctl(m.vcpu, KVM_SET_SIGNAL_MASK, 0), Ok(0));
    m.set_regs(|regs| regs.rip = CODE);
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!(m.client.masks.lock().last(), Some(&None));
}

#[test]
fn without_a_cpuid_table_leaves_are_zero_and_long_mode_works() {
    let m = Machine::long(|a| {
        for leaf in [0u32, 1, 7, 0x8000_0001] {
            a.mov(eax, leaf).unwrap();
            a.cpuid().unwrap();
            for register in [rax, rbx, rcx, rdx] {
                a.or(rsi, register).unwrap();
            }
        }
        a.mov(ecx, 0xc000_0080u32).unwrap();
        a.rdmsr().unwrap();
        a.or(eax, 0x801).unwrap(); // SCE and NXE
        a.wrmsr().unwrap();
        a.mov(rax, cr4).unwrap();
        a.or(eax, 0x90).unwrap(); // PSE and PGE
        a.mov(cr4, rax).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!(m.regs().rsi, 0);
    assert_eq!((m.sregs().efer, m.sregs().cr4), (0xd01, 0xb0));
}

#[test]
fn every_run_loads_cr8_and_apic_base_is_output_only() {
    let m = Machine::long(|a| {
        a.mov(rax, cr8).unwrap();
        a.out(0x10, al).unwrap();
        a.mov(ebx, 3).unwrap();
        a.mov(cr8, rbx).unwrap();
        a.hlt().unwrap();
    });
    m.set_sregs(|sregs| sregs.cr8 = 5);
    m.run.store_u64(16, 9).unwrap();
    m.run.store_u64(24, 0x1234).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.regs().rax, 9, "kvm_run.cr8 goes over what KVM_SET_SREGS loaded");
    assert_eq!(m.run.load_u64(24), Some(0xfee0_0900), "apic_base is written, not read");
    assert_eq!(m.sregs().apic_base, 0xfee0_0900);
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!((m.run.load_u64(16), m.sregs().cr8), (Some(3), 3), "and shows what the guest wrote");
    m.run.store_u64(16, 0x123).unwrap();
    m.set_regs(|regs| regs.rip = CODE);
    assert_eq!(m.run(), Ok(KVM_EXIT_IO), "any value is taken");
}

#[test]
fn an_untouched_data_page_gives_eax_back_to_in() {
    let m = Machine::long(|a| {
        a.in_(al, 0x10).unwrap();
        a.in_(ax, 0x10).unwrap();
        a.in_(eax, 0x10).unwrap();
        a.hlt().unwrap();
    });
    m.set_regs(|regs| regs.rax = 0x1234_5678);
    for _ in 0..3 {
        assert_eq!(m.run(), Ok(KVM_EXIT_IO));
        assert_eq!(m.io_data(4), 0x1234_5678_u32.to_le_bytes(), "whatever the size");
    }
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!(m.regs().rax, 0x1234_5678);
}

/// Each waits for the other, and neither exits meanwhile.
#[test]
fn vcpus_run_in_parallel() {
    let m = Machine::real(|a| {
        // word [200h + di] ← 1, until word [200h + si] is 1.
        let mut wait = a.create_label();
        a.mov(word_ptr(di + 0x200), 1).unwrap();
        a.set_label(&mut wait).unwrap();
        a.cmp(word_ptr(si + 0x200), 1).unwrap();
        a.jne(wait).unwrap();
        a.hlt().unwrap();
    });
    let second = m.client.ioctl(m.vm, KVM_CREATE_VCPU, 1).unwrap();
    m.client.set(second, KVM_SET_SREGS, &m.sregs()).unwrap();
    m.client
        .set(second, KVM_SET_REGS, &kvm_regs { rip: CODE, rsp: STACK, rsi: 0, rdi: 2, rflags: 2, ..Plain::zeroed() })
        .unwrap();
    m.set_regs(|regs| (regs.rsi, regs.rdi) = (2, 0));
    std::thread::scope(|scope| {
        let _release = Release(&m);
        let first = scope.spawn(|| m.client.ioctl(m.vcpu, KVM_RUN, 0));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!first.is_finished());
        assert_eq!(m.client.ioctl(second, KVM_RUN, 0), Ok(0));
        assert_eq!(first.join().unwrap(), Ok(0));
    });
    assert_eq!((m.reason(), m.client.map(second).load_u32(8)), (KVM_EXIT_HLT, Some(KVM_EXIT_HLT)));
}

#[test]
fn interrupts_collect_and_the_lowest_comes_first_whatever_cr8_says() {
    let m = Machine::real(|a| {
        a.sti().unwrap();
        for _ in 0..8 {
            a.nop().unwrap();
        }
        a.hlt().unwrap();
    });
    for vector in [0x30, 0x21, 0x81] {
        m.handler(vector);
    }
    for irq in [0x81, 0x21, 0x30, 0x21] {
        assert_eq!(m.interrupt(irq), Ok(0), "no EEXIST");
    }
    m.run.store_u64(16, 15).unwrap();
    for vector in [0x21, 0x30, 0x81] {
        assert_eq!(m.run(), Ok(KVM_EXIT_IO));
        assert_eq!(m.io_data(1), [vector]);
    }
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!(m.sregs().interrupt_bitmap, [0; 4]);
}
