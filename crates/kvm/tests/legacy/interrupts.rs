//! `KVM_INTERRUPT`, windows, HLT: when a vector goes in, and what user space sees of it.

use std::time::Duration;

use iced_x86::code_asm::*;
use kvm_abi::consts::*;
use nix::errno::Errno;

use crate::machine::{CODE, DEVICE, Machine, Release};

/// A guest that sets IF with its second instruction, at [`CODE`] + 1.
fn unblocking() -> Machine {
    Machine::real(|a| {
        a.nop().unwrap();
        a.sti().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    })
}

#[test]
fn a_vector_waits_for_if_and_the_end_of_the_shadow() {
    let m = Machine::real(|a| {
        a.nop().unwrap();
        a.sti().unwrap();
        a.inc(bx).unwrap();
        a.inc(bx).unwrap();
        a.hlt().unwrap();
    });
    m.handler(0x21);
    m.interrupt(0x21).unwrap();
    m.set_regs(|regs| regs.rbx = 0);
    assert_eq!(m.run(), Ok(KVM_EXIT_IO), "no exit for a window that nobody asked for");
    assert_eq!(m.io_data(1), [0x21]);
    assert_eq!(m.regs().rbx, 1, "one instruction behind STI");
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
}

#[test]
fn one_vector_goes_in_at_a_time() {
    let m = Machine::real(|a| {
        a.sti().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    m.handler(0x30);
    m.handler(0x31);
    m.interrupt(0x31).unwrap();
    m.interrupt(0x30).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io_data(1), [0x30]);
    assert_eq!(m.sregs().interrupt_bitmap, [1 << 0x31, 0, 0, 0], "in the handler IF is 0");
    assert_eq!(m.ready_and_if(), (0, 0));
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io_data(1), [0x31]);
    assert_eq!(m.ready_and_if(), (1, 0));
}

#[test]
fn request_interrupt_window_exits_when_the_guest_unblocks() {
    let m = unblocking();
    m.handler(0x21);
    m.request_window(true);
    assert_eq!(m.run(), Ok(KVM_EXIT_IRQ_WINDOW_OPEN));
    assert_eq!((m.regs().rip, m.ready_and_if()), (CODE + 3, (1, 1)));
    // The vector goes in at once.
    m.interrupt(0x21).unwrap();
    m.request_window(false);
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io_data(1), [0x21]);
}

#[test]
fn a_queued_vector_goes_before_the_window() {
    let m = unblocking();
    m.handler(0x21);
    m.request_window(true);
    m.interrupt(0x21).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_IO), "the vector, without an exit for the window");
    assert_eq!(m.run(), Ok(KVM_EXIT_IRQ_WINDOW_OPEN), "when its handler is done");
}

/// No exit comes of a window that is open already: the request ends with EINTR.
#[test]
fn a_window_that_is_open_at_entry_is_eintr() {
    let m = Machine::real(|a| {
        let mut top = a.create_label();
        a.sti().unwrap();
        a.nop().unwrap();
        a.out(0x10, al).unwrap();
        a.set_label(&mut top).unwrap();
        a.inc(bx).unwrap();
        a.jmp(top).unwrap();
    });
    m.set_regs(|regs| regs.rbx = 0);
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.ready_and_if(), (1, 1));
    m.request_window(true);
    for _ in 0..3 {
        let before = m.regs();
        assert_eq!(m.run(), Err(Errno::EINTR));
        assert_eq!((m.reason(), m.ready_and_if()), (KVM_EXIT_INTR, (1, 1)));
        assert_ne!((m.regs().rip, m.regs().rbx), (before.rip, before.rbx), "the guest has been entered");
    }
}

/// `kvm_run` is shared: 2.6.22 reads the request again whenever the host's timer has interrupted the guest.
#[test]
fn a_request_that_comes_while_the_guest_runs_is_heard() {
    for enabled in [true, false] {
        let m = Machine::real(|a| {
            let (mut wait, mut top) = (a.create_label(), a.create_label());
            a.set_label(&mut wait).unwrap();
            a.cmp(word_ptr(0x200), 1).unwrap();
            a.jne(wait).unwrap();
            a.sti().unwrap();
            a.nop().unwrap();
            a.set_label(&mut top).unwrap();
            a.jmp(top).unwrap();
        });
        m.set_regs(|regs| regs.rflags |= if enabled { 0x200 } else { 0 });
        std::thread::scope(|scope| {
            let release = Release(&m);
            let run = scope.spawn(|| m.run());
            while !m.kvm.status().vms[0].vcpus[0].running {
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_millis(10));
            assert!(!run.is_finished());
            m.request_window(true);
            if enabled {
                assert_eq!(run.join().unwrap(), Err(Errno::EINTR), "the window is open");
                assert_eq!(m.reason(), KVM_EXIT_INTR);
            } else {
                std::thread::sleep(Duration::from_millis(30));
                assert!(!run.is_finished(), "IF is 0");
                drop(release);
                assert_eq!(run.join().unwrap(), Ok(KVM_EXIT_IRQ_WINDOW_OPEN), "as soon as the guest unblocks");
            }
        });
    }
}

/// IF is not part of it: clients test both.
#[test]
fn ready_says_nothing_queued_and_no_shadow() {
    let m = Machine::real(|a| {
        a.out(0x10, al).unwrap();
        a.out(0x10, al).unwrap();
        a.sti().unwrap();
        a.in_(al, 0x10).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.ready_and_if(), (1, 0));
    m.interrupt(0x21).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.ready_and_if(), (0, 0));
    m.set_sregs(|sregs| sregs.interrupt_bitmap = [0; 4]);
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.ready_and_if(), (1, 1), "an instruction that exits ends the shadow");
    // And so a vector goes in before the instruction behind the IN.
    m.handler(0x22);
    m.interrupt(0x22).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io_data(1), [0x22]);
}

#[test]
fn a_device_read_in_a_shadow_is_not_ready() {
    let m = Machine::real(|a| {
        a.sti().unwrap();
        a.mov(al, byte_ptr(0x10).es()).unwrap();
        a.hlt().unwrap();
    });
    m.set_sregs(|sregs| sregs.es.base = DEVICE);
    assert_eq!(m.run(), Ok(KVM_EXIT_MMIO));
    assert_eq!(m.ready_and_if(), (0, 1));
}

#[test]
fn sti_hlt_exits_ready_and_the_next_run_goes_on() {
    let m = Machine::real(|a| {
        a.sti().unwrap();
        a.hlt().unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!((m.regs().rip, m.ready_and_if()), (CODE + 2, (1, 1)), "RIP is behind it, in real mode too");
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT), "there is no halted state");
    assert_eq!(m.regs().rip, CODE + 3);
}

#[test]
fn hlt_goes_on_while_a_vector_is_queued_even_without_if() {
    let m = Machine::real(|a| {
        a.hlt().unwrap();
        a.out(0x44, al).unwrap();
    });
    m.interrupt(0x21).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io().2, 0x44);
    assert_eq!(m.sregs().interrupt_bitmap, [1 << 0x21, 0, 0, 0]);
}

#[test]
fn a_vector_that_could_not_be_delivered_waits_again() {
    let m = Machine::real(|a| {
        a.sti().unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    m.handler(0x21);
    // The interrupt table is where there is no memory.
    m.set_sregs(|sregs| sregs.idt.base = DEVICE);
    m.interrupt(0x21).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_EXCEPTION));
    assert_eq!(m.sregs().interrupt_bitmap, [1 << 0x21, 0, 0, 0]);
    m.set_sregs(|sregs| sregs.idt.base = 0);
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io_data(1), [0x21]);
}

/// A signal that comes as the vector is about to go in neither loses it nor delivers it twice.
#[test]
fn a_vector_under_way_shows_in_the_bitmap_once() {
    let m = Machine::real(|a| {
        let mut top = a.create_label();
        a.sti().unwrap();
        a.out(0x10, al).unwrap();
        a.set_label(&mut top).unwrap();
        a.jmp(top).unwrap();
    });
    m.handler(0x21);
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    m.interrupt(0x21).unwrap();
    m.set_sregs(|_| ());
    assert_eq!(m.sregs().interrupt_bitmap, [1 << 0x21, 0, 0, 0]);
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io_data(1), [0x21]);
    m.client.raise();
    assert_eq!(m.run(), Err(Errno::EINTR), "and not again");
}
