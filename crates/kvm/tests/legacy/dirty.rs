//! `KVM_GET_DIRTY_LOG`: every way in which a guest writes. A page may also be in the log because it was only touched, so the
//! tests look for what must be there, and begin with a log that has been taken.

use iced_x86::code_asm::*;
use kvm_abi::DirtyLog;
use kvm_abi::consts::*;
use kvm_abi::request::*;
use nix::errno::Errno;

use crate::common::BASE;
use crate::machine::{CODE, DEVICE, Machine, Release, TABLES, alias, region};

/// Runs to HLT; the pages of slot 0 that were logged by it.
fn logged(m: &Machine) -> Vec<u64> {
    m.dirty(0).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    m.dirty(0).unwrap()
}

#[test]
fn get_dirty_log_gives_and_clears_a_bit_per_page() {
    let m = Machine::real(|a| {
        a.mov(byte_ptr(0x5000), 1).unwrap();
        a.mov(byte_ptr(0x5fff), 1).unwrap();
        a.mov(byte_ptr(0x10).es(), 1).unwrap();
        a.hlt().unwrap();
    });
    m.set_sregs(|sregs| sregs.es.base = 0x4_7000);
    let pages = logged(&m);
    assert!(pages.contains(&5) && pages.contains(&0x47), "{pages:?}");
    assert!(!pages.contains(&6));
    assert_eq!(m.dirty(0), Ok(vec![]));
    m.set_regs(|regs| regs.rip = CODE);
    assert_eq!(logged(&m), [5, 0x47], "a page that was logged before is logged again");
}

/// ⌈pages / 64⌉ words, from the slot's start.
#[test]
fn the_bitmap_is_of_whole_words_and_counts_from_the_slot() {
    let m = Machine::real(|a| {
        a.mov(byte_ptr(0).es(), 1).unwrap();
        a.hlt().unwrap();
    });
    region(&m.client, m.vm, 1, KVM_MEM_LOG_DIRTY_PAGES, 0x10_0000, 65 << 12).unwrap();
    m.set_sregs(|sregs| sregs.es.base = 0x10_0000 + (64 << 12));
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    m.client.memory.write(0, &[0x55; 24]).unwrap();
    m.client.set(m.vm, KVM_GET_DIRTY_LOG, &DirtyLog { slot: 1, padding1: 0, dirty_bitmap: BASE }).unwrap();
    let words = [0, 8, 16].map(|at| m.client.memory.load_u64(at).unwrap());
    assert_eq!(words, [0, 1, 0x5555_5555_5555_5555]);
}

#[test]
fn a_bad_pointer_is_efault_and_clears_nothing() {
    let m = Machine::real(|a| {
        a.mov(byte_ptr(0x5000), 1).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    let bad = DirtyLog { slot: 0, padding1: 0, dirty_bitmap: 0x1000 };
    assert_eq!(m.client.set(m.vm, KVM_GET_DIRTY_LOG, &bad), Err(Errno::EFAULT));
    assert!(m.dirty(0).unwrap().contains(&5));
}

#[test]
fn stores_of_every_kind_are_logged() {
    let m = Machine::real(|a| {
        a.mov(word_ptr(0x5010), ax).unwrap();
        a.add(word_ptr(0x6010), ax).unwrap();
        a.lock().xadd(word_ptr(0x7010), ax).unwrap();
        a.mov(sp, 0x9000).unwrap();
        a.push(ax).unwrap();
        a.mov(dword_ptr(0xaffe), eax).unwrap(); // crosses a page
        a.fnstcw(word_ptr(0xc010)).unwrap();
        a.sidt(fword_ptr(0xd010)).unwrap();
        a.hlt().unwrap();
    });
    let pages = logged(&m);
    for page in [5, 6, 7, 8, 0xa, 0xb, 0xc, 0xd] {
        assert!(pages.contains(&page), "{page} {pages:x?}");
    }
}

#[test]
fn string_stores_are_logged() {
    let m = Machine::real(|a| {
        a.mov(di, 0x4ff0).unwrap();
        a.mov(cx, 0x1020).unwrap();
        a.rep().stosb().unwrap();
        a.mov(si, 0x4ff0).unwrap();
        a.mov(di, 0x8ff0).unwrap();
        a.mov(cx, 0x20).unwrap();
        a.rep().movsb().unwrap();
        a.hlt().unwrap();
    });
    let pages = logged(&m);
    for page in [4, 5, 6, 8, 9] {
        assert!(pages.contains(&page), "{page} {pages:x?}");
    }
}

#[test]
fn frames_of_interrupts_are_logged() {
    let m = Machine::real(|a| {
        a.sti().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    m.handler(0x21);
    m.set_regs(|regs| regs.rsp = 0x7010);
    m.interrupt(0x21).unwrap();
    m.dirty(0).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert!(m.dirty(0).unwrap().contains(&7));
}

#[test]
fn accessed_and_dirty_bits_of_the_walker_are_logged() {
    let m = Machine::long(|a| {
        a.mov(rax, qword_ptr(0x4000)).unwrap();
        a.hlt().unwrap();
    });
    m.dirty(0).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    let pages = m.dirty(0).unwrap();
    let tables = [TABLES >> 12, (TABLES >> 12) + 1, (TABLES >> 12) + 2];
    assert!(tables.iter().all(|page| pages.contains(page)), "{pages:x?}");
    let accessed = 1 << 5;
    assert_ne!(m.ram.load_u64(TABLES + 0x2000).unwrap() & accessed, 0);
    assert_eq!(m.ram.load_u64(TABLES + 0x2008).unwrap() & accessed, 0, "where nobody was");
}

/// Not so in 2007, which lost these pages.
#[test]
fn data_of_ins_is_logged() {
    let m = Machine::real(|a| {
        a.mov(di, 0x5010).unwrap();
        a.mov(cx, 4).unwrap();
        a.rep().insb().unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    m.dirty(0).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert!(m.dirty(0).unwrap().contains(&5));
}

/// Not so in 2007, which logged the alias address, where no slot is.
#[test]
fn a_store_through_an_alias_is_logged_at_its_target() {
    let m = Machine::real(|a| {
        a.mov(byte_ptr(0x2000).es(), 1).unwrap();
        a.mov(di, 0x3000).unwrap();
        a.mov(cx, 2).unwrap();
        a.rep().stosb().unwrap();
        a.hlt().unwrap();
    });
    region(&m.client, m.vm, 1, KVM_MEM_LOG_DIRTY_PAGES, 0xe000_0000, 0x8000).unwrap();
    alias(&m.client, m.vm, 0, DEVICE, 0x8000, 0xe000_0000).unwrap();
    m.set_sregs(|sregs| sregs.es.base = DEVICE);
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!(m.dirty(1), Ok(vec![2, 3]));
}

#[test]
fn what_user_space_writes_is_not_logged() {
    let m = Machine::new();
    m.dirty(0).unwrap();
    m.ram.store_u8(0x5000, 1).unwrap();
    assert_eq!(m.dirty(0), Ok(vec![]));
}

#[test]
fn a_log_that_is_taken_while_the_guest_stores_loses_nothing() {
    let m = Machine::real(|a| {
        let mut top = a.create_label();
        a.set_label(&mut top).unwrap();
        a.mov(byte_ptr(0x5000), 1).unwrap();
        a.cmp(byte_ptr(0x200), 1).unwrap();
        a.jne(top).unwrap();
        a.hlt().unwrap();
    });
    std::thread::scope(|scope| {
        let release = Release(&m);
        let runner = scope.spawn(|| m.client.ioctl(m.vcpu, KVM_RUN, 0));
        while !m.kvm.status().vms[0].vcpus[0].running {
            std::thread::yield_now();
        }
        for _ in 0..20 {
            m.dirty(0).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        // The guest goes on storing, whenever the scheduler lets it: the page comes back.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while !m.dirty(0).unwrap().contains(&5) {
            assert!(std::time::Instant::now() < deadline, "a store is missing from the log");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        drop(release);
        runner.join().unwrap().unwrap();
    });
}
