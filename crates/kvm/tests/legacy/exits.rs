//! Every exit reason of the header, each with a guest that causes it. `KVM_EXIT_FAIL_ENTRY` has none: 2.6.22's `vmx_vcpu_run`
//! gives it where VMLAUNCH or VMRESUME itself fails, on control fields or host state (SDM Vol. 3 "Checks on VMX Controls and
//! Host-State Area"), and what the ioctls of 2007 load ends up in neither. Guest state is `entry.rs`.

use std::time::Duration;

use iced_x86::code_asm::*;
use kvm_abi::consts::*;
use kvm_abi::kvm_segment;
use nix::errno::Errno;

use crate::machine::{CODE, DEVICE, Machine};

/// VM entry refuses the guest's state: basic exit reason 33, and bit 31.
#[test]
fn exit_unknown_tells_the_hardware_exit_reason() {
    let m = Machine::long(|a| a.hlt().unwrap());
    let good = m.sregs();
    m.set_sregs(|sregs| sregs.tr.type_ = 2);
    assert_eq!(m.run(), Ok(KVM_EXIT_UNKNOWN));
    assert_eq!(m.run.load_u64(32), Some(0x8000_0021));
    assert_eq!(m.regs().rip, CODE, "nothing has run");
    m.client.raise();
    m.set_sregs(|sregs| (sregs.tr, sregs.cs) = (good.tr, kvm_segment { type_: 0, ..good.cs }));
    assert_eq!(m.run(), Ok(KVM_EXIT_UNKNOWN), "under a pending signal too");
    m.client.consume_signal();
    m.set_sregs(|sregs| *sregs = good);
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
}

/// What 2.6.22 handed to user space as UNKNOWN because it had no handler: here it is executed, or #UD where a processor without
/// VMX has it. SDM Vol. 2, the page of each.
#[test]
fn instructions_that_exited_as_unknown_are_executed() {
    let executed: [&[u8]; 5] = [
        &[0x0f, 0x08],                   // INVD, reason 13
        &[0x0f, 0x09],                   // WBINVD
        &[0x0f, 0x01, 0x3e, 0x00, 0x50], // INVLPG [5000h], 14
        &[0x0f, 0x31],                   // RDTSC, 16
        &[0xf3, 0x90],                   // PAUSE, 40
    ];
    for code in executed {
        let m = Machine::real(|a| a.nop().unwrap());
        m.ram.write(CODE, &[code, &[0xf4]].concat()).unwrap();
        assert_eq!(m.run(), Ok(KVM_EXIT_HLT), "{code:02x?}");
    }
    let undefined: [&[u8]; 10] = [
        &[0x0f, 0x01, 0xc2],                // VMLAUNCH, 20
        &[0x0f, 0x01, 0xc3],                // VMRESUME, 24
        &[0x0f, 0x01, 0xc4],                // VMXOFF, 26
        &[0x66, 0x0f, 0xc7, 0x36, 0, 0x50], // VMCLEAR, 19
        &[0x0f, 0xc7, 0x36, 0, 0x50],       // VMPTRLD, 21
        &[0x0f, 0xc7, 0x3e, 0, 0x50],       // VMPTRST, 22
        &[0x0f, 0x78, 0xc8],                // VMREAD, 23
        &[0x0f, 0x79, 0xc8],                // VMWRITE, 25
        &[0xf3, 0x0f, 0xc7, 0x36, 0, 0x50], // VMXON, 27
        &[0x0f, 0xaa],                      // RSM outside of SMM, 17
    ];
    for code in undefined {
        let m = Machine::real(|a| a.nop().unwrap());
        m.ram.write(CODE, &[code, &[0xf4]].concat()).unwrap();
        m.handler(6);
        assert_eq!(m.run(), Ok(KVM_EXIT_IO), "{code:02x?}");
        assert_eq!(m.io_data(1), [6], "{code:02x?}");
    }
}

/// The guest runs into nothing: the page fault of the fetch could not be emulated.
#[test]
fn exit_exception_tells_vector_and_error_code() {
    let m = Machine::real(|a| a.nop().unwrap());
    m.set_sregs(|sregs| sregs.cs.base = DEVICE);
    m.set_regs(|regs| regs.rip = 0x10);
    m.run.write(32, &[0xff; 8]).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_EXCEPTION));
    assert_eq!((m.run.load_u32(32), m.run.load_u32(36)), (Some(14), Some(0)));
    assert_eq!(m.regs().rip, 0x10);
}

/// What exited in 2007 because real mode was virtual-8086 mode goes to the guest.
#[test]
fn exceptions_in_real_mode_are_the_guests() {
    let m = Machine::real(|a| {
        a.ud2().unwrap();
        a.hlt().unwrap();
    });
    m.handler(6);
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io_data(1), [6]);
}

#[test]
fn exit_io_tells_the_port() {
    let m = Machine::real(|a| a.out(0x42, al).unwrap());
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io(), (1, 1, 0x42, 1));
}

#[test]
fn exit_hypercall_tells_arguments_and_takes_a_result() {
    let m = Machine::long(|a| {
        a.vmcall().unwrap();
        a.db(&[0x0f, 0x01, 0xd9]).unwrap(); // VMMCALL
        a.hlt().unwrap();
    });
    m.set_regs(|regs| {
        regs.rax = 99;
        (regs.rdi, regs.rsi, regs.rdx) = (1 << 40, 2, 3);
        (regs.rcx, regs.r8, regs.r9) = (4, 5, 6);
    });
    assert_eq!(m.run(), Ok(KVM_EXIT_HYPERCALL));
    assert_eq!(m.regs().rip, CODE + 3);
    let word = |at: u64| m.run.load_u64(at).unwrap();
    assert_eq!([32, 40, 48, 56, 64, 72].map(word), [1 << 40, 2, 3, 4, 5, 6]);
    assert_eq!((word(80), m.run.load_u32(88)), (u64::MAX, Some(1)), "ret is -1 at first; longmode");
    m.run.store_u64(80, 0x1_2345_6789).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_HYPERCALL));
    assert_eq!(m.regs().rax, 0x1_2345_6789);
    // A client that answers nothing leaves another reason there: RAX stays.
    m.run.store_u32(8, 0).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!(m.regs().rax, 0x1_2345_6789);
}

#[test]
fn a_hypercall_of_32_bits_has_other_registers() {
    let m = Machine::real(|a| {
        a.vmcall().unwrap();
        a.hlt().unwrap();
    });
    m.set_regs(|regs| {
        (regs.rax, regs.rcx, regs.rdx) = (1 << 40 | 1, 2, 3);
        (regs.rsi, regs.rdi, regs.rbp, regs.rbx) = (4, 5, 6, 99);
    });
    assert_eq!(m.run(), Ok(KVM_EXIT_HYPERCALL));
    let word = |at: u64| m.run.load_u64(at).unwrap();
    assert_eq!([32, 40, 48, 56, 64, 72].map(word), [1, 2, 3, 4, 5, 6]);
    assert_eq!(m.run.load_u32(88), Some(0));
}

#[test]
fn exit_debug_comes_of_a_step() {
    let m = Machine::real(|a| {
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    let debug = kvm_abi::legacy::kvm_debug_guest { enabled: 1, singlestep: 1, ..Default::default() };
    m.set(kvm_abi::request::KVM_DEBUG_GUEST, &debug).unwrap();
    m.run.write(32, &[0xa5; 64]).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_DEBUG));
    assert_eq!(m.regs().rip, CODE + 1);
    let mut fields = [0; 64];
    m.run.read(32, &mut fields).unwrap();
    assert_eq!(fields, [0xa5; 64], "the structure is empty");
}

#[test]
fn exit_hlt_comes_behind_the_instruction() {
    let m = Machine::real(|a| a.hlt().unwrap());
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!(m.regs().rip, CODE + 1);
}

#[test]
fn exit_mmio_tells_the_address() {
    let m = Machine::long(|a| a.mov(dword_ptr(0x20_0010), eax).unwrap());
    m.set_regs(|regs| regs.rax = 7);
    assert_eq!(m.run(), Ok(KVM_EXIT_MMIO));
    assert_eq!(m.mmio(), (0x20_0010, vec![7, 0, 0, 0], true));
}

#[test]
fn exit_irq_window_open_comes_when_asked_for() {
    let m = Machine::real(|a| {
        a.sti().unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    m.request_window(true);
    assert_eq!(m.run(), Ok(KVM_EXIT_IRQ_WINDOW_OPEN));
}

#[test]
fn exit_shutdown_comes_of_a_triple_fault() {
    let m = Machine::long(|a| a.ud2().unwrap());
    assert_eq!(m.run(), Ok(KVM_EXIT_SHUTDOWN));
    // A VMM resets it and goes on.
    m.ram.write(CODE, &[0xf4]).unwrap();
    m.set_regs(|regs| regs.rip = CODE);
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
}

#[test]
fn exit_fail_entry_is_not_for_bad_guest_state() {
    let m = Machine::long(|a| a.hlt().unwrap());
    m.set_sregs(|sregs| sregs.cr0 &= !1);
    assert_eq!(m.run(), Ok(KVM_EXIT_UNKNOWN), "paging without protection");
    m.set_sregs(|sregs| (sregs.cr0, sregs.cr4) = (0x8000_0011, 0));
    assert_eq!(m.run(), Ok(KVM_EXIT_UNKNOWN), "long mode without PAE");
}

#[test]
fn exit_intr_comes_with_eintr() {
    let m = Machine::real(|a| {
        let mut top = a.create_label();
        a.set_label(&mut top).unwrap();
        a.jmp(top).unwrap();
    });
    let client = m.client.clone();
    let raiser = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        client.raise();
    });
    assert_eq!(m.run(), Err(Errno::EINTR));
    assert_eq!(m.reason(), KVM_EXIT_INTR);
    raiser.join().unwrap();
}
