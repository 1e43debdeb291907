//! `KVM_SET_MEMORY_REGION` and `KVM_SET_MEMORY_ALIAS`, `KVM_CREATE_VCPU`.

use iced_x86::code_asm::*;
use kvm_abi::consts::*;
use kvm_abi::legacy::kvm_memory_alias;
use kvm_abi::request::*;
use nix::errno::Errno;

use crate::machine::{CODE, DEVICE, Machine, alias, assemble, empty, region};

#[test]
fn set_memory_region_makes_zeroed_ram_and_size_0_frees_it() {
    let (client, vm) = empty();
    region(&client, vm, 0, 0, 0x1000, 0x3000).unwrap();
    let ram = client.ram(vm);
    ram.write(0x1000, b"first").unwrap();
    assert_eq!(region(&client, vm, 0, KVM_MEM_LOG_DIRTY_PAGES, 0x7000, 0), Ok(0), "address and flags say nothing");
    assert_eq!(region(&client, vm, 0, 0, 0, 0), Ok(0), "deleting what is not there");
    region(&client, vm, 0, 0, 0x1000, 0x3000).unwrap();
    assert_eq!(ram.load_u64(0x1000), Some(0));
}

#[test]
fn a_region_of_the_same_size_moves_with_its_contents() {
    let (client, vm) = empty();
    region(&client, vm, 0, 0, 0x1000, 0x3000).unwrap();
    let ram = client.ram(vm);
    ram.write(0x1000, b"first").unwrap();
    ram.write(0x3ffc, b"last").unwrap();
    // Up and down by less than its size.
    for to in [0x2000, 0x1000, 0x10_0000] {
        region(&client, vm, 0, 0, to, 0x3000).unwrap();
        let mut bytes = [0; 5];
        ram.read(to, &mut bytes).unwrap();
        assert_eq!(&bytes, b"first", "{to:#x}");
        ram.read(to + 0x2ffb, &mut bytes).unwrap();
        assert_eq!(&bytes[1..], b"last", "{to:#x}");
    }
    region(&client, vm, 1, 0, 0x1000, 0x3000).unwrap();
    assert_eq!(ram.load_u64(0x1000), Some(0), "a place that was left is zero");
}

#[test]
fn the_same_place_with_other_flags_keeps_contents_and_log() {
    let m = Machine::real(|a| {
        a.mov(word_ptr(0x5000), 7).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    let logged = |flags| region(&m.client, m.vm, 0, flags, 0, DEVICE);
    assert_eq!(logged(KVM_MEM_LOG_DIRTY_PAGES | 0xf0), Ok(0), "other bits say nothing");
    assert!(m.dirty(0).unwrap().contains(&5), "a log that goes on is kept");
    assert_eq!(logged(0), Ok(0));
    assert_eq!(m.dirty(0), Err(Errno::ENOENT));
    assert_eq!(logged(KVM_MEM_LOG_DIRTY_PAGES), Ok(0));
    assert_eq!(m.dirty(0), Ok(vec![]), "a new log is empty");
    assert_eq!(m.ram.load_u16(0x5000), Some(7));
}

#[test]
fn a_region_that_moves_keeps_its_log() {
    let m = Machine::real(|a| {
        a.mov(word_ptr(0x5000), 7).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    region(&m.client, m.vm, 0, KVM_MEM_LOG_DIRTY_PAGES, 0x100_0000, DEVICE).unwrap();
    assert!(m.dirty(0).unwrap().contains(&5));
}

#[test]
fn memory_may_change_under_a_vcpu() {
    let m = Machine::real(|a| {
        a.out(0x10, al).unwrap();
        a.mov(ax, word_ptr(0x10).es()).unwrap();
        a.hlt().unwrap();
    });
    m.set_sregs(|sregs| sregs.es.base = 0x10_0000);
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    region(&m.client, m.vm, 1, 0, 0x10_0000, 0x1000).unwrap();
    m.ram.store_u16(0x10_0010, 0x55aa).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!(m.regs().rax, 0x55aa);
    region(&m.client, m.vm, 1, 0, 0, 0).unwrap();
    m.set_regs(|regs| regs.rip = CODE + 2);
    assert_eq!(m.run(), Ok(KVM_EXIT_MMIO), "a region that is deleted is a device");
}

#[test]
fn more_than_four_slots_may_be_used() {
    let (client, vm) = empty();
    for slot in 0..32 {
        assert_eq!(region(&client, vm, slot, 0, 0x1000 * u64::from(slot), 0x1000), Ok(0), "{slot}");
    }
}

#[test]
fn create_vcpu_makes_any_number_once_each() {
    let m = Machine::new();
    for id in 1..8 {
        assert!(m.client.ioctl(m.vm, KVM_CREATE_VCPU, id).is_ok(), "2.6.22 had one, 2.6.23 four");
    }
    assert_eq!(m.client.ioctl(m.vm, KVM_CREATE_VCPU, 3), Err(Errno::EEXIST));
    assert_eq!(m.client.ioctl(m.vm, KVM_CREATE_VCPU, u64::MAX), Err(Errno::EINVAL), "an int: -1");
    assert_eq!(m.client.ioctl(m.vm, KVM_CREATE_VCPU, 0x8000_0000), Err(Errno::EINVAL));
    // Without slot 0, or with one that ends elsewhere: Intel's needed three pages there.
    let (client, vm) = empty();
    region(&client, vm, 1, 0, 0, 0x1000).unwrap();
    client.ram(vm).store_u64(0, u64::MAX).unwrap();
    assert!(client.ioctl(vm, KVM_CREATE_VCPU, 0).is_ok());
    assert_eq!(client.ram(vm).load_u64(0), Some(u64::MAX), "and nothing is kept there");
}

#[test]
fn set_memory_alias_shows_ram_a_second_time() {
    let m = Machine::real(|a| {
        a.mov(word_ptr(0x2000).es(), 0x1234).unwrap();
        a.mov(ax, word_ptr(0x2002).es()).unwrap();
        a.hlt().unwrap();
    });
    region(&m.client, m.vm, 1, 0, 0xe000_0000, 0x8000).unwrap();
    // The low bits of the target do not count.
    assert_eq!(alias(&m.client, m.vm, 0, 0xa_0000, 0x8000, 0xe000_0123), Ok(0));
    m.ram.store_u16(0xe000_2002, 0x5678).unwrap();
    m.set_sregs(|sregs| sregs.es.base = 0xa_0000);
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!((m.ram.load_u16(0xe000_2000), m.regs().rax), (Some(0x1234), 0x5678));
    // Moved, then gone.
    alias(&m.client, m.vm, 0, 0xb_0000, 0x8000, 0xe000_0000).unwrap();
    m.set_regs(|regs| regs.rip = CODE);
    assert_eq!(m.run(), Ok(KVM_EXIT_MMIO));
    assert_eq!(alias(&m.client, m.vm, 0, 0, 0, 0), Ok(0));
    assert_eq!(alias(&m.client, m.vm, 0, 0, 0, 0), Ok(0), "removing what is not there");
}

#[test]
fn an_alias_wins_over_a_slot_and_the_lowest_over_others() {
    let m = Machine::real(|a| {
        a.mov(ax, word_ptr(0x6000)).unwrap();
        a.hlt().unwrap();
    });
    m.ram.store_u16(0x6000, 6).unwrap();
    m.ram.store_u16(0x7000, 7).unwrap();
    m.ram.store_u16(0x5000, 5).unwrap();
    alias(&m.client, m.vm, 2, 0x6000, 0x1000, 0x7000).unwrap();
    // One level only: 7000H is not looked up again.
    alias(&m.client, m.vm, 3, 0x7000, 0x1000, 0x5000).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!(m.regs().rax, 7);
    alias(&m.client, m.vm, 1, 0x6000, 0x1000, 0x5000).unwrap();
    m.set_regs(|regs| regs.rip = CODE);
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!(m.regs().rax, 5);
}

#[test]
fn an_alias_of_a_hole_is_a_device_at_the_alias() {
    let m = Machine::real(|a| a.mov(byte_ptr(0x10).es(), 1).unwrap());
    alias(&m.client, m.vm, 0, 0xa_0000, 0x1000, 0xe000_0000).unwrap();
    m.set_sregs(|sregs| sregs.es.base = 0xa_0000);
    assert_eq!(m.run(), Ok(KVM_EXIT_MMIO));
    assert_eq!(m.mmio().0, 0xa_0010);
}

#[test]
fn an_alias_may_come_before_the_first_vcpu() {
    let (client, vm) = empty();
    assert_eq!(alias(&client, vm, 0, 0xa_0000, 0x1000, 0), Ok(0), "and makes the VM one of 2007");
    assert_eq!(region(&client, vm, 0, 0, 0, 0x1000), Ok(0));
    let code = assemble(16, 0, |a| a.hlt().unwrap());
    client.ram(vm).write(0, &code).unwrap();
    // Neither is in the other's way, and flags say nothing.
    assert_eq!(region(&client, vm, 1, 0, 0xa_0000, 0x1_0000), Ok(0));
    let again = kvm_memory_alias {
        slot: 1,
        flags: u32::MAX,
        guest_phys_addr: 0xa_0000,
        memory_size: 0x1000,
        target_phys_addr: 0,
    };
    assert_eq!(client.set(vm, KVM_SET_MEMORY_ALIAS, &again), Ok(0), "nor is another alias");
}

/// What mmap of the VM file shows: address, length, and what is written at the start of each piece's page.
#[test]
fn the_window_shows_ram_where_the_guest_sees_it() {
    let (client, vm) = empty();
    let pieces = || -> Vec<(u64, u64)> {
        let pieces = client.file(vm).ram_window().expect("a VM of 2007");
        pieces.iter().map(|piece| (piece.gpa, piece.ram.len)).collect()
    };
    region(&client, vm, 0, 0, 0x1000, 0x3000).unwrap();
    region(&client, vm, 1, 0, 0x8000, 0x2000).unwrap();
    assert_eq!(pieces(), [(0x1000, 0x3000), (0x8000, 0x2000)], "and holes between");
    client.ram(vm).store_u64(0x3000, 3).unwrap();
    client.ram(vm).store_u64(0x8000, 8).unwrap();
    // Over the end of slot 0, a hole, and into slot 1: the target's first page is RAM, and its last.
    alias(&client, vm, 0, 0x2000, 0x7000, 0x3000).unwrap();
    assert_eq!(pieces(), [(0x1000, 0x1000), (0x2000, 0x1000), (0x7000, 0x1000), (0x8000, 0x1000), (0x9000, 0x1000)]);
    assert_eq!((client.ram(vm).load_u64(0x2000), client.ram(vm).load_u64(0x7000)), (Some(3), Some(8)));
    assert_eq!(client.ram(vm).load_u64(0x3000), None, "the alias wins, and shows a hole");
    alias(&client, vm, 0, 0, 0, 0).unwrap();
    let old = client.file(vm).ram_window().unwrap().remove(0).ram.mapping;
    region(&client, vm, 0, 0, 0, 0).unwrap();
    region(&client, vm, 0, 0, 0x1000, 0x3000).unwrap();
    assert_eq!(client.ram(vm).load_u64(0x3000), Some(0), "a new region is new memory");
    assert_eq!(old.load_u64(0x2000), Some(3), "who has the old one keeps it");
}
