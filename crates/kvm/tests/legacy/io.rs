//! Port I/O: what an exit shows, and what the next `KVM_RUN` makes of the answer.

use iced_x86::code_asm::*;
use kvm_abi::consts::*;
use nix::errno::Errno;

use crate::machine::{CODE, DEVICE, Machine};

const IN: u8 = 0;
const OUT: u8 = 1;

#[test]
fn out_shows_eax_and_rip_is_behind_it() {
    let m = Machine::real(|a| {
        a.out(0x80, al).unwrap(); // a port like any other
        a.out(dx, ax).unwrap();
        a.out(0x12, eax).unwrap();
        a.hlt().unwrap();
    });
    m.set_regs(|regs| (regs.rax, regs.rdx) = (0x1234_5678, 0xfff0));
    for (exit, rip) in [((OUT, 1, 0x80, 1), 2), ((OUT, 2, 0xfff0, 1), 3), ((OUT, 4, 0x12, 1), 6)] {
        assert_eq!(m.run(), Ok(KVM_EXIT_IO));
        assert_eq!(m.io(), exit);
        assert_eq!(m.io_data(4), 0x1234_5678_u32.to_le_bytes(), "all of EAX, whatever the size");
        assert_eq!(m.regs().rip, CODE + rip);
    }
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
}

/// A VMM resets between an OUT and the next KVM_RUN: what it loads is where the guest goes on.
#[test]
fn a_reset_from_inside_an_exit_is_not_skewed() {
    for code in [0xe6, 0xe4] {
        let m = Machine::real(|a| a.nop().unwrap());
        m.ram.write(CODE, &[code, 0x64]).unwrap(); // out 64h, al; in al, 64h
        m.ram.write(0x3000, &[0xf4]).unwrap();
        let (regs, sregs) = (m.regs(), m.sregs());
        assert_eq!(m.run(), Ok(KVM_EXIT_IO));
        m.set_regs(|r| *r = kvm_abi::kvm_regs { rip: 0x3000, rax: 0x55, ..regs });
        m.set_sregs(|s| *s = sregs);
        assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
        assert_eq!((m.regs().rip, m.regs().rax), (0x3001, 0x55));
    }
}

#[test]
fn in_takes_its_bytes_at_the_next_run() {
    let m = Machine::real(|a| {
        a.in_(al, 0x10).unwrap();
        a.in_(ax, dx).unwrap();
        a.hlt().unwrap();
    });
    m.set_regs(|regs| (regs.rax, regs.rdx) = (0x1122_3344_5566_7788, 0x20));
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io(), (IN, 1, 0x10, 1));
    assert_eq!((m.regs().rip, m.regs().rax), (CODE + 2, 0x1122_3344_5566_7788), "RIP moves first, RAX then");
    // What stands in kvm_run by now does not count: the exit is remembered.
    m.run.write(32, &[0xff; 16]).unwrap();
    m.run.store_u32(4096, 0xaabb_ccdd).unwrap();
    m.set_regs(|_| ());
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io(), (IN, 2, 0x20, 1));
    assert_eq!(m.regs().rax, 0x1122_3344_5566_77dd);
    m.run.store_u32(4096, 0xaabb_ccdd).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!(m.regs().rax, 0x1122_3344_5566_ccdd);
}

/// As the manual has it. 2007 left RAX bits 63:32 alone, which no compiler's code expects.
#[test]
fn in_of_a_doubleword_clears_the_upper_half_of_rax() {
    let m = Machine::long(|a| {
        a.in_(eax, 0x10).unwrap();
        a.hlt().unwrap();
    });
    m.set_regs(|regs| regs.rax = u64::MAX);
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    m.run.store_u32(4096, 0x8765_4321).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!(m.regs().rax, 0x8765_4321);
}

#[test]
fn a_run_that_ends_in_eintr_has_completed_the_io() {
    let m = Machine::real(|a| {
        let mut top = a.create_label();
        a.in_(al, 0x10).unwrap();
        a.set_label(&mut top).unwrap();
        a.jmp(top).unwrap();
    });
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    m.run.store_u8(4096, 0x77).unwrap();
    m.client.raise();
    assert_eq!(m.run(), Err(Errno::EINTR));
    assert_eq!(m.regs().rax & 0xff, 0x77);
    m.run.store_u8(4096, 0x11).unwrap();
    assert_eq!(m.run(), Err(Errno::EINTR));
    assert_eq!(m.regs().rax & 0xff, 0x77, "once");
}

#[test]
fn rep_outs_goes_to_the_end_of_the_page_and_on() {
    let m = Machine::real(|a| {
        a.rep().outsb().unwrap();
        a.hlt().unwrap();
    });
    let text = *b"one page, and then the next page";
    m.ram.write(0x4ff7, &text).unwrap();
    m.set_regs(|regs| (regs.rcx, regs.rsi, regs.rdx) = (32, 0x4ff7, 0xf1));
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io(), (OUT, 1, 0xf1, 9));
    assert_eq!(m.io_data(9), text[..9]);
    let regs = m.regs();
    assert_eq!((regs.rip, regs.rcx, regs.rsi), (CODE, 32, 0x4ff7), "not the last exit of the instruction");
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io(), (OUT, 1, 0xf1, 23));
    assert_eq!(m.io_data(23), text[9..]);
    let regs = m.regs();
    assert_eq!((regs.rip, regs.rcx, regs.rsi), (CODE + 2, 23, 0x5000), "the last: RIP is behind it, the rest follows");
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    let regs = m.regs();
    assert_eq!((regs.rip, regs.rcx, regs.rsi), (CODE + 3, 0, 0x5017));
}

#[test]
fn rep_ins_stores_what_the_data_page_has_at_the_next_run() {
    let m = Machine::real(|a| {
        a.rep().insw().unwrap();
        a.hlt().unwrap();
    });
    m.set_regs(|regs| (regs.rcx, regs.rdi, regs.rdx) = (6, 0x4ff8, 0x1f0));
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io(), (IN, 2, 0x1f0, 4));
    m.run.write(4096, b"firstone").unwrap();
    assert_eq!((m.regs().rip, m.ram.load_u64(0x4ff8)), (CODE, Some(0)));
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io(), (IN, 2, 0x1f0, 2));
    m.run.write(4096, b"more").unwrap();
    assert_eq!((m.regs().rip, m.regs().rcx, m.regs().rdi), (CODE + 2, 2, 0x5000));
    m.set_regs(|_| ());
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    let mut bytes = [0; 12];
    m.ram.read(0x4ff8, &mut bytes).unwrap();
    assert_eq!(&bytes, b"firstonemore");
    assert_eq!((m.regs().rcx, m.regs().rdi), (0, 0x5004));
}

/// A whole page in one exit.
#[test]
fn one_exit_takes_up_to_a_page() {
    for input in [false, true] {
        let m = Machine::long(|a| {
            if input {
                a.rep().insd().unwrap()
            } else {
                a.rep().outsd().unwrap()
            }
            a.hlt().unwrap();
        });
        m.ram.write(0x5000, &[0xa5; 4096]).unwrap();
        m.set_regs(|regs| (regs.rcx, regs.rsi, regs.rdi) = (1024, 0x5000, 0x5000));
        assert_eq!(m.run(), Ok(KVM_EXIT_IO));
        assert_eq!(m.io(), (if input { IN } else { OUT }, 4, 0, 1024));
        if input {
            m.run.write(4096, &[0x5a; 4096]).unwrap();
        } else {
            assert_eq!(m.io_data(4096), [0xa5; 4096]);
        }
        assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
        assert_eq!(m.ram.load_u64(0x5ff8), Some(if input { 0x5a5a_5a5a_5a5a_5a5a } else { 0xa5a5_a5a5_a5a5_a5a5 }));
    }
}

#[test]
fn without_rep_the_count_is_1_whatever_rcx_says() {
    let m = Machine::real(|a| {
        a.outsw().unwrap();
        a.insb().unwrap();
        a.hlt().unwrap();
    });
    m.set_regs(|regs| (regs.rcx, regs.rsi, regs.rdi) = (0, 0x5000, 0x6000));
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io(), (OUT, 2, 0, 1));
    assert_eq!(m.regs().rip, CODE + 1);
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io(), (IN, 1, 0, 1));
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!((m.regs().rsi, m.regs().rdi, m.regs().rcx), (0x5002, 0x6001, 0));
}

#[test]
fn the_count_is_cut_to_the_address_size() {
    // 16 bits.
    let m = Machine::real(|a| a.rep().outsb().unwrap());
    m.set_regs(|regs| (regs.rcx, regs.rsi) = (0x1_0003, 0x7_5000));
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io().3, 3);
    // 32 bits, by prefix.
    let m = Machine::real(|a| a.db(&[0x67, 0xf3, 0x6e]).unwrap());
    m.set_regs(|regs| (regs.rcx, regs.rsi) = (1 << 32 | 4, 0x5000));
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io().3, 4);
    // 64 bits: as many as the page has.
    let m = Machine::long(|a| a.rep().outsb().unwrap());
    m.set_regs(|regs| (regs.rcx, regs.rsi) = (1 << 32, 0x5ff0));
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io().3, 16);
}

#[test]
fn a_count_of_0_makes_no_exit() {
    let m = Machine::real(|a| {
        a.rep().outsb().unwrap();
        a.rep().insd().unwrap();
        a.hlt().unwrap();
    });
    m.set_regs(|regs| (regs.rcx, regs.rsi) = (0x1_0000, 0x5000));
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!(m.regs().rsi, 0x5000);
}

#[test]
fn an_element_over_a_page_end_is_done_alone() {
    let m = Machine::real(|a| {
        a.rep().outsd().unwrap();
        a.hlt().unwrap();
    });
    m.ram.write(0x4ffa, b"abcdefghijkl").unwrap();
    m.set_regs(|regs| (regs.rcx, regs.rsi) = (3, 0x4ffa));
    for (count, data) in [(1, &b"abcd"[..]), (1, b"efgh"), (1, b"ijkl")] {
        assert_eq!(m.run(), Ok(KVM_EXIT_IO));
        assert_eq!((m.io().3, &m.io_data(4)[..]), (count, data));
    }
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    let m = Machine::real(|a| {
        a.rep().insd().unwrap();
        a.hlt().unwrap();
    });
    m.set_regs(|regs| (regs.rcx, regs.rdi) = (1, 0x4ffe));
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    m.run.write(4096, b"abcd").unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!(m.ram.load_u16(0x5000), Some(u16::from_le_bytes(*b"cd")));
}

/// 2007 answered DF = 1 with #GP(0) and a broken next run.
#[test]
fn downwards_elements_come_one_by_one() {
    let m = Machine::real(|a| {
        a.std().unwrap();
        a.rep().outsb().unwrap();
        a.mov(cx, 2).unwrap();
        a.rep().insb().unwrap();
        a.hlt().unwrap();
    });
    m.ram.write(0x5000, b"forward").unwrap();
    m.set_regs(|regs| (regs.rcx, regs.rsi, regs.rdi) = (7, 0x5006, 0x6001));
    for byte in b"forward".iter().rev() {
        assert_eq!(m.run(), Ok(KVM_EXIT_IO));
        assert_eq!((m.io(), m.io_data(1)), ((OUT, 1, 0, 1), vec![*byte]));
    }
    for byte in b"ba" {
        assert_eq!(m.run(), Ok(KVM_EXIT_IO));
        assert_eq!(m.io(), (IN, 1, 0, 1));
        m.run.store_u8(4096, *byte).unwrap();
    }
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!(m.ram.load_u16(0x6000), Some(u16::from_le_bytes(*b"ab")));
}

/// Not #GP(0), as in 2007.
#[test]
fn a_buffer_that_is_not_mapped_is_a_page_fault() {
    for input in [false, true] {
        let m = Machine::long(|a| if input { a.rep().insb().unwrap() } else { a.rep().outsb().unwrap() });
        m.ram.store_u64(crate::machine::TABLES + 0x2010, 0).unwrap();
        m.set_regs(|regs| (regs.rcx, regs.rsi, regs.rdi) = (4, 0x40_0010, 0x40_0010));
        assert_eq!(m.run(), Ok(KVM_EXIT_SHUTDOWN), "there is no IDT");
        assert_eq!(m.sregs().cr2, 0x40_0010);
    }
}

#[test]
fn a_buffer_in_a_device_takes_both_exits() {
    let m = Machine::real(|a| {
        a.rep().outsb().unwrap();
        a.hlt().unwrap();
    });
    m.set_sregs(|sregs| sregs.ds.base = DEVICE);
    m.set_regs(|regs| (regs.rcx, regs.rsi) = (2, 0x10));
    for byte in [0x41, 0x42] {
        assert_eq!(m.run(), Ok(KVM_EXIT_MMIO));
        m.run.store_u8(40, byte).unwrap();
        assert_eq!(m.run(), Ok(KVM_EXIT_IO));
        assert_eq!((m.io().3, m.io_data(1)), (1, vec![byte]));
    }
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
}

#[test]
fn a_reset_from_inside_a_string_exit_drops_the_rest() {
    let m = Machine::real(|a| a.rep().insb().unwrap());
    m.ram.write(0x3000, &[0x6c, 0xf4]).unwrap(); // insb; hlt
    m.set_regs(|regs| (regs.rcx, regs.rdi) = (4, 0x5000));
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    m.set_regs(|regs| (regs.rip, regs.rdi) = (0x3000, 0x6000));
    assert_eq!(m.run(), Ok(KVM_EXIT_IO), "the guest's next INS asks for itself");
    assert_eq!(m.io().3, 1);
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!(m.ram.load_u32(0x5000), Some(0));
}

#[test]
fn an_interrupt_comes_between_two_exits_of_one_instruction() {
    let m = Machine::real(|a| {
        a.sti().unwrap();
        a.rep().outsb().unwrap();
        a.hlt().unwrap();
    });
    m.handler(0x21);
    m.set_regs(|regs| (regs.rcx, regs.rsi, regs.rdx) = (0x12, 0x4ff0, 0xf1));
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io(), (OUT, 1, 0xf1, 0x10));
    m.interrupt(0x21).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!((m.io().2, m.io_data(1)), (0x10, vec![0x21]), "the handler");
    assert_eq!(m.regs().rcx, 2, "what is left of the instruction");
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io(), (OUT, 1, 0xf1, 2));
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
}

#[test]
fn ins_to_a_device_writes_each_element_there() {
    let m = Machine::real(|a| {
        a.rep().insw().unwrap();
        a.hlt().unwrap();
    });
    m.set_sregs(|sregs| sregs.es.base = DEVICE);
    m.set_regs(|regs| (regs.rcx, regs.rdi) = (2, 0x10));
    let mut written = Vec::new();
    loop {
        match m.run() {
            Ok(KVM_EXIT_IO) => m.run.write(4096, b"abcd").unwrap(),
            Ok(KVM_EXIT_MMIO) => written.push(m.mmio()),
            other => break assert_eq!(other, Ok(KVM_EXIT_HLT)),
        }
    }
    let second = if written[1].1 == b"cd" { b"cd" } else { b"ab" };
    assert_eq!(written, [(DEVICE + 0x10, b"ab".to_vec(), true), (DEVICE + 0x12, second.to_vec(), true)]);
}
