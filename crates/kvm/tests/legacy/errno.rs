//! Every errno, and the arguments that get it.

use kvm::ioctl::ROWS;
use kvm_abi::consts::*;
use kvm_abi::legacy::REQUESTS;
use kvm_abi::request::*;
use kvm_abi::*;
use nix::errno::Errno;

use crate::machine::{Machine, alias, empty, region};

/// The requests of 2007 and the files that take them.
fn of_2007() -> impl Iterator<Item = (&'static str, u32)> {
    REQUESTS.iter().flat_map(|&(file, requests)| requests.iter().map(move |&request| (file, request)))
}

#[test]
fn unknown_requests_are_einval_on_every_file() {
    let m = Machine::new();
    // DEBUG_GUEST of an i386 caller, another size, another direction, another type, no number of 2007's.
    let unknown = [0x404c_ae87, 0x4050_ae81, 0x8144_ae83, KVM_GET_REGS ^ 3 << 30, 0xaf80, 0xaeff, 0];
    for fd in [0, m.vm, m.vcpu] {
        for request in unknown {
            assert_eq!(
                m.client.ioctl_bytes(fd, request, vec![0; 0x200]).map(|_| ()),
                Err(Errno::EINVAL),
                "{request:#x}"
            );
        }
    }
    let modern = m.client.ioctl(0, KVM_CREATE_VM, 0).unwrap();
    assert_eq!(m.client.ioctl(modern, 0xaeff, 0), Err(Errno::ENOTTY), "on a VM file of today");
}

#[test]
fn requests_to_the_wrong_file_are_einval() {
    let m = Machine::new();
    for (_, request) in of_2007() {
        for (fd, file) in [(0, "System"), (m.vm, "Vm"), (m.vcpu, "Vcpu")] {
            if !ROWS.iter().any(|row| row.request == request && row.file == file) {
                let result = m.client.ioctl_bytes(fd, request, vec![0; 0x200]).map(|_| ());
                assert_eq!(result, Err(Errno::EINVAL), "{request:#x} {file}");
            }
        }
    }
}

#[test]
fn bad_pointers_are_efault_and_change_nothing() {
    let m = Machine::new();
    let (regs, sregs) = (m.regs(), m.sregs());
    for (file, request) in of_2007().filter(|&(_, request)| direction(request) != NONE) {
        let fd = match file {
            "System" => 0,
            "Vm" => m.vm,
            _ => m.vcpu,
        };
        assert_eq!(m.client.ioctl(fd, request, 0x1000), Err(Errno::EFAULT), "{request:#x}");
    }
    assert_eq!((m.regs(), m.sregs()), (regs, sregs));
}

#[test]
fn entries_behind_a_readable_header_are_efault_too() {
    let m = Machine::new();
    // A header in the last bytes of memory, entries beyond.
    let last = |bytes: &[u8]| {
        let at = crate::common::BASE + crate::common::BYTES - bytes.len() as u64;
        m.client.memory.write(at - crate::common::BASE, bytes).unwrap();
        at
    };
    let counted = last(&[1u32, 0].map(u32::to_le_bytes).concat());
    for request in [KVM_GET_MSRS, KVM_SET_MSRS, KVM_SET_CPUID] {
        assert_eq!(m.client.ioctl(m.vcpu, request, counted), Err(Errno::EFAULT), "{request:#x}");
    }
    assert_eq!(m.client.ioctl(m.vcpu, KVM_SET_SIGNAL_MASK, last(&8u32.to_le_bytes())), Err(Errno::EFAULT));
    assert_eq!(m.client.ioctl(0, KVM_GET_MSR_INDEX_LIST, last(&200u32.to_le_bytes())), Err(Errno::EFAULT));
    let log = DirtyLog { slot: 0, padding1: 0, dirty_bitmap: 0x1000 };
    assert_eq!(m.client.set(m.vm, KVM_GET_DIRTY_LOG, &log), Err(Errno::EFAULT));
}

#[test]
fn arguments_that_should_be_0_are_einval() {
    let m = Machine::new();
    for (fd, request) in [(0, KVM_GET_API_VERSION), (0, KVM_CREATE_VM), (0, KVM_GET_VCPU_MMAP_SIZE), (m.vcpu, KVM_RUN)]
    {
        assert_eq!(m.client.ioctl(fd, request, 1), Err(Errno::EINVAL), "{request:#x}");
    }
}

#[test]
fn regions_are_einval_eexist_and_enomem() {
    let (client, vm) = empty();
    let region = |slot, gpa, size| region(&client, vm, slot, 0, gpa, size);
    assert_eq!(region(0, 0x1000, 0x2000), Ok(0));
    assert_eq!(region(1, 0x4000, 0x1001), Err(Errno::EINVAL), "size");
    assert_eq!(region(1, 0x4800, 0x1000), Err(Errno::EINVAL), "address");
    assert_eq!(region(0x1_0000, 0x4000, 0x1000), Err(Errno::EINVAL), "slot");
    assert_eq!(region(u32::MAX, 0x4000, 0x1000), Err(Errno::EINVAL), "slot");
    assert_eq!(region(1, !0xfff, 0x2000), Err(Errno::EINVAL), "wraps");
    assert_eq!(region(0, 0x1000, 0x3000), Err(Errno::EINVAL), "resize");
    assert_eq!(region(1, 0x2000, 0x1000), Err(Errno::EEXIST), "overlap");
    assert_eq!(region(1, 0x3000, 0x2000), Ok(0));
    assert_eq!(region(1, 0x2000, 0x2000), Err(Errno::EEXIST), "moved onto another");
    assert_eq!(region(2, 1 << 50, 1 << 40), Err(Errno::ENOMEM));
    assert_eq!(region(2, 0x10_0000, 1 << 50), Err(Errno::ENOMEM));
    // In this order.
    assert_eq!(region(0, 0x1000, 0x4000), Err(Errno::EINVAL), "another size that would overlap");
    assert_eq!(region(2, 0, 1 << 40), Err(Errno::EEXIST), "more than there is, and it would overlap");
    assert_eq!(client.ram(vm).load_u64(0x3000), Some(0), "what is refused changes nothing");
}

#[test]
fn aliases_are_einval() {
    let (client, vm) = empty();
    let alias = |slot, gpa, size, target| alias(&client, vm, slot, gpa, size, target);
    assert_eq!(alias(4, 0xa_0000, 0x1000, 0), Err(Errno::EINVAL), "slot");
    assert_eq!(alias(0, 0xa_0000, 0x1001, 0), Err(Errno::EINVAL), "size");
    assert_eq!(alias(0, 0xa_0800, 0x1000, 0), Err(Errno::EINVAL), "address");
    assert_eq!(alias(0, !0xfff, 0x2000, 0), Err(Errno::EINVAL), "wraps");
    assert_eq!(alias(0, 0xa_0000, 0x2000, !0xfff), Err(Errno::EINVAL), "the target wraps");
    assert_eq!(alias(0, 0xa_0000, 0x2000, 0x123), Ok(0), "the target's alignment does not count");
}

#[test]
fn lists_that_are_too_long_are_e2big() {
    let m = Machine::new();
    let counted = |request, count: u32, entry: usize| {
        let mut bytes = [count, 0].map(u32::to_le_bytes).concat();
        bytes.resize(8 + entry * count as usize, 0);
        m.client.ioctl_bytes(m.vcpu, request, bytes).map(|(ret, _)| ret)
    };
    assert_eq!(counted(KVM_GET_MSRS, 256, 16), Err(Errno::E2BIG));
    assert_eq!(counted(KVM_SET_MSRS, 256, 16), Err(Errno::E2BIG));
    assert_eq!(counted(KVM_GET_MSRS, 255, 16), Ok(255), "index 0 is one that reads");
    assert_eq!(counted(KVM_SET_CPUID, 41, 24), Err(Errno::E2BIG));
    assert_eq!(counted(KVM_SET_CPUID, 40, 24), Ok(0));
}

#[test]
fn no_msr_at_all_is_enomem() {
    let m = Machine::new();
    for request in [KVM_GET_MSRS, KVM_SET_MSRS] {
        assert_eq!(m.msrs(request, &[]).map(|(done, _)| done), Err(Errno::ENOMEM));
    }
}

#[test]
fn a_slot_without_a_log_is_enoent_and_one_beyond_all_einval() {
    let (client, vm) = empty();
    region(&client, vm, 0, 0, 0, 0x1000).unwrap();
    let log =
        |slot| client.set(vm, KVM_GET_DIRTY_LOG, &DirtyLog { slot, padding1: 0, dirty_bitmap: crate::common::BASE });
    assert_eq!(log(0), Err(Errno::ENOENT));
    assert_eq!(log(1), Err(Errno::ENOENT), "none there");
    assert_eq!(log(0x1_0000), Err(Errno::EINVAL));
}

#[test]
fn a_signal_set_of_another_size_is_einval() {
    let m = Machine::new();
    for len in [0u32, 4, 7, 9, 16, u32::MAX] {
        let bytes = [&len.to_le_bytes()[..], &[0; 16]].concat();
        assert_eq!(m.client.ioctl_bytes(m.vcpu, KVM_SET_SIGNAL_MASK, bytes).map(|_| ()), Err(Errno::EINVAL), "{len}");
    }
}

#[test]
fn a_vector_beyond_255_is_einval() {
    let m = Machine::new();
    assert_eq!(m.interrupt(256), Err(Errno::EINVAL));
    assert_eq!(m.interrupt(u32::MAX), Err(Errno::EINVAL));
    assert_eq!(m.interrupt(255), Ok(0));
}

#[test]
fn requests_of_today_that_replaced_those_of_2007_are_einval() {
    let m = Machine::new();
    let region = kvm_userspace_memory_region { slot: 5, memory_size: 0x1000, ..Plain::zeroed() };
    assert_eq!(m.client.set(m.vm, KVM_SET_USER_MEMORY_REGION, &region), Err(Errno::EINVAL));
    let modern = m.client.ioctl(0, KVM_CREATE_VM, 0).unwrap();
    m.client.ioctl(modern, KVM_CREATE_VCPU, 0).unwrap();
    assert_eq!(m.client.ioctl_bytes(modern, KVM_SET_MEMORY_REGION, vec![0; 24]).map(|_| ()), Err(Errno::ENOTTY));
    assert_eq!(m.client.ioctl_bytes(modern, KVM_SET_MEMORY_ALIAS, vec![0; 32]).map(|_| ()), Err(Errno::ENOTTY));
}
