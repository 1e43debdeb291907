//! Accesses to memory that no region has.

use iced_x86::code_asm::*;
use kvm_abi::consts::*;
use nix::errno::Errno;

use crate::machine::{CODE, DEVICE, Machine};

/// In real mode, ES at the device.
fn real(code: impl FnOnce(&mut CodeAssembler)) -> Machine {
    let m = Machine::real(code);
    m.set_sregs(|sregs| sregs.es.base = DEVICE);
    m
}

#[test]
fn a_write_is_over_when_it_is_reported() {
    let m = Machine::long(|a| {
        a.mov(byte_ptr(rdi), al).unwrap();
        a.mov(word_ptr(rdi), ax).unwrap();
        a.mov(dword_ptr(rdi), eax).unwrap();
        a.mov(qword_ptr(rdi), rax).unwrap();
        a.add(rdi, 8).unwrap();
        a.hlt().unwrap();
    });
    let value = 0x1122_3344_5566_7788u64;
    m.set_regs(|regs| (regs.rax, regs.rdi) = (value, DEVICE + 3));
    let mut rip = CODE;
    for (len, instruction) in [(1, 2), (2, 3), (4, 2), (8, 3)] {
        rip += instruction;
        assert_eq!(m.run(), Ok(KVM_EXIT_MMIO));
        assert_eq!(m.mmio(), (DEVICE + 3, value.to_le_bytes()[..len].to_vec(), true), "whole, aligned or not");
        assert_eq!(m.regs().rip, rip);
    }
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
}

#[test]
fn a_read_waits_at_its_instruction() {
    let m = Machine::long(|a| {
        a.movzx(eax, byte_ptr(rdi)).unwrap();
        a.mov(bx, word_ptr(rdi)).unwrap();
        a.mov(ecx, dword_ptr(rdi)).unwrap();
        a.mov(rdx, qword_ptr(rdi)).unwrap();
        a.hlt().unwrap();
    });
    let before = 0x5555_5555_5555_5555;
    m.set_regs(|regs| {
        (regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rdi) = (before, before, before, before, DEVICE + 8);
    });
    let mut rip = CODE;
    for (len, instruction) in [(1, 3), (2, 3), (4, 2), (8, 3)] {
        assert_eq!(m.run(), Ok(KVM_EXIT_MMIO));
        let (gpa, data, is_write) = m.mmio();
        assert_eq!((gpa, data.len(), is_write), (DEVICE + 8, len, false));
        assert_eq!(m.regs().rip, rip);
        m.run.store_u64(40, 0x1122_3344_5566_7788).unwrap();
        // Nothing but data counts.
        m.run.store_u64(32, 0).unwrap();
        m.run.store_u32(48, 99).unwrap();
        rip += instruction;
    }
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    let regs = m.regs();
    assert_eq!((regs.rax, regs.rbx), (0x88, 0x5555_5555_5555_7788));
    assert_eq!((regs.rcx, regs.rdx), (0x5566_7788, 0x1122_3344_5566_7788));
}

#[test]
fn a_run_that_ends_in_eintr_has_completed_the_read() {
    let m = real(|a| {
        let mut top = a.create_label();
        a.mov(ax, word_ptr(0x10).es()).unwrap();
        a.set_label(&mut top).unwrap();
        a.jmp(top).unwrap();
    });
    m.run.store_u64(40, 0x5a5a_5a5a_5a5a_5a5a).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_MMIO));
    assert_eq!(m.run.load_u64(40), Some(0x5a5a_5a5a_5a5a_5a5a), "a read leaves data as it was");
    m.run.store_u16(40, 0x1234).unwrap();
    m.client.raise();
    assert_eq!(m.run(), Err(Errno::EINTR));
    assert_eq!((m.regs().rax, m.regs().rip), (0x1234, CODE + 4));
    m.run.store_u16(40, 0x4321).unwrap();
    assert_eq!(m.run(), Err(Errno::EINTR));
    assert_eq!(m.regs().rax, 0x1234, "once");
}

/// The write comes at once, before an interrupt and before anything is refreshed.
#[test]
fn the_write_of_a_read_modify_write_follows_at_once_and_refreshes_nothing() {
    let m = real(|a| {
        a.sti().unwrap();
        a.nop().unwrap();
        a.add(word_ptr(0x10).es(), 5).unwrap();
        a.hlt().unwrap();
    });
    m.handler(0x21);
    assert_eq!(m.run(), Ok(KVM_EXIT_MMIO));
    assert_eq!(m.ready_and_if(), (1, 1));
    m.run.store_u16(40, 10).unwrap();
    m.interrupt(0x21).unwrap();
    m.run.write(12, &[0x66, 0x77]).unwrap();
    m.run.store_u64(24, 0x1234).unwrap();
    m.client.raise();
    assert_eq!(m.run(), Ok(KVM_EXIT_MMIO), "a signal makes no difference");
    assert_eq!(m.mmio(), (DEVICE + 0x10, vec![15, 0], true));
    assert_eq!(m.ready_and_if(), (0x66, 0x77));
    assert_eq!(m.run.load_u64(24), Some(0x1234));
    m.client.consume_signal();
    assert_eq!(m.run(), Ok(KVM_EXIT_IO), "the interrupt");
    assert_eq!(m.ready_and_if(), (1, 0));
    assert_eq!(m.run.load_u64(24), Some(0xfee0_0900));
}

#[test]
fn instructions_of_every_kind_reach_a_device() {
    let m = Machine::long(|a| {
        a.push(qword_ptr(rdi)).unwrap(); // read
        a.xchg(dword_ptr(rdi), eax).unwrap(); // read, write
        a.lock().cmpxchg(dword_ptr(rdi), ebx).unwrap(); // read, write
        a.shl(byte_ptr(rdi), 1).unwrap(); // read, write
        a.not(word_ptr(rdi)).unwrap(); // read, write
        a.bts(dword_ptr(rdi), 3).unwrap(); // read, write
        a.mul(dword_ptr(rdi)).unwrap(); // read; an exception exit in 2007
        a.cmpsb().unwrap(); // read; likewise
        a.movups(xmm0, xmmword_ptr(rdi)).unwrap(); // two reads; likewise
        a.hlt().unwrap();
    });
    m.set_sregs(|sregs| (sregs.cr0, sregs.cr4) = (sregs.cr0 & !0xc, sregs.cr4 | 0x200));
    m.set_regs(|regs| (regs.rdi, regs.rsi) = (DEVICE, 0x4000));
    let read = |len: usize| (len, false);
    let write = |len: usize| (len, true);
    let expected = [
        &[read(8)][..],
        &[read(4), write(4)],
        &[read(4), write(4)],
        &[read(1), write(1)],
        &[read(2), write(2)],
        &[read(4), write(4)],
        &[read(4)],
        &[read(1)],
        &[read(8), read(8)],
    ];
    for (len, is_write) in expected.concat() {
        assert_eq!(m.run(), Ok(KVM_EXIT_MMIO));
        let (_, data, written) = m.mmio();
        assert_eq!((data.len(), written), (len, is_write));
    }
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
}

/// 2.6.23 wrote back what these had only read.
#[test]
fn instructions_that_only_compare_do_not_write() {
    let m = real(|a| {
        a.cmp(word_ptr(0x10).es(), 5).unwrap();
        a.test(byte_ptr(0x10).es(), 1).unwrap();
        a.bt(word_ptr(0x10).es(), 1).unwrap();
        a.hlt().unwrap();
    });
    for _ in 0..3 {
        assert_eq!(m.run(), Ok(KVM_EXIT_MMIO));
        assert!(!m.mmio().2);
    }
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
}

#[test]
fn rep_movs_from_device_to_device_is_a_read_and_a_write_each() {
    let m = real(|a| {
        a.rep().movsw().unwrap();
        a.hlt().unwrap();
    });
    m.set_sregs(|sregs| sregs.ds.base = 0xb_0000);
    m.set_regs(|regs| (regs.rcx, regs.rsi, regs.rdi) = (3, 0x20, 0x40));
    for n in 0..3u64 {
        assert_eq!(m.run(), Ok(KVM_EXIT_MMIO));
        assert_eq!((m.mmio().0, m.mmio().2), (0xb_0020 + 2 * n, false));
        assert_eq!((m.regs().rcx, m.regs().rip), (3 - n, CODE));
        m.run.store_u16(40, 0x100 + n as u16).unwrap();
        assert_eq!(m.run(), Ok(KVM_EXIT_MMIO));
        assert_eq!(m.mmio(), (DEVICE + 0x40 + 2 * n, vec![n as u8, 1], true));
        assert_eq!(m.regs().rcx, 2 - n);
    }
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
}

#[test]
fn rep_stos_to_a_device_is_an_exit_for_each() {
    let m = real(|a| {
        a.rep().stosd().unwrap();
        a.hlt().unwrap();
    });
    m.set_regs(|regs| (regs.rcx, regs.rdi, regs.rax) = (3, 0x40, 0xabcd));
    for n in 0..3u64 {
        assert_eq!(m.run(), Ok(KVM_EXIT_MMIO));
        assert_eq!(m.mmio(), (DEVICE + 0x40 + 4 * n, vec![0xcd, 0xab, 0, 0], true));
        assert_eq!((m.regs().rcx, m.regs().rdi), (2 - n, 0x44 + 4 * n));
    }
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
}

/// Lengths are 1, 2, 4 and 8, and no part is left out: clients know no other.
#[test]
fn an_access_over_a_page_end_comes_in_natural_parts() {
    let m = Machine::long(|a| {
        a.mov(qword_ptr(rdi), rax).unwrap();
        a.mov(rbx, qword_ptr(rdi)).unwrap();
        a.hlt().unwrap();
    });
    let value = 0x8877_6655_4433_2211u64;
    for offset in 0xff9..0x1000 {
        let start = DEVICE + offset;
        m.set_regs(|regs| (regs.rip, regs.rax, regs.rdi) = (CODE, value, start));
        for is_write in [true, false] {
            let mut at = start;
            while at < start + 8 {
                assert_eq!(m.run(), Ok(KVM_EXIT_MMIO));
                let (gpa, data, written) = m.mmio();
                assert_eq!((gpa, written), (at, is_write));
                assert!(matches!(data.len(), 1 | 2 | 4), "{}", data.len());
                let from = (at - start) as usize;
                if is_write {
                    assert_eq!(data, value.to_le_bytes()[from..from + data.len()]);
                } else {
                    m.run.write(40, &value.to_le_bytes()[from..from + data.len()]).unwrap();
                }
                at += data.len() as u64;
            }
            assert_eq!(at, start + 8);
        }
        assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
        assert_eq!(m.regs().rbx, value);
    }
}

#[test]
fn the_part_of_an_access_that_is_ram_makes_no_exit() {
    let m = Machine::long(|a| {
        a.mov(dword_ptr(rdi), eax).unwrap();
        a.mov(ebx, dword_ptr(rdi)).unwrap();
        a.hlt().unwrap();
    });
    m.set_regs(|regs| (regs.rax, regs.rdi) = (0x4433_2211, DEVICE - 3));
    assert_eq!(m.run(), Ok(KVM_EXIT_MMIO));
    assert_eq!(m.mmio(), (DEVICE, vec![0x44], true));
    assert_eq!(m.ram.load_u8(DEVICE - 1), Some(0x33));
    assert_eq!(m.run(), Ok(KVM_EXIT_MMIO));
    assert_eq!((m.mmio().0, m.mmio().1.len()), (DEVICE, 1));
    m.run.store_u8(40, 0x99).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!(m.regs().rbx, 0x9933_2211);
}
