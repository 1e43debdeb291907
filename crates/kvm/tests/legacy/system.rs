//! Ioctls of `/dev/kvm`, and what happens to files.

use std::time::Duration;

use iced_x86::code_asm::*;
use kvm_abi::consts::*;
use kvm_abi::request::*;
use kvm_abi::*;
use nix::errno::Errno;

use crate::common::{FakeClient, SCRATCH};
use crate::machine::{DEVICE, Machine, Release, empty, region};

#[test]
fn get_api_version_is_12_and_takes_no_argument() {
    let client = FakeClient::new();
    assert_eq!(client.ioctl(0, KVM_GET_API_VERSION, 0), Ok(12));
    assert_eq!(client.ioctl(0, KVM_GET_API_VERSION, 1), Err(Errno::EINVAL));
}

#[test]
fn create_vm_makes_an_empty_vm_and_takes_no_argument() {
    let (client, vm) = empty();
    assert_eq!(client.ioctl(0, KVM_CREATE_VM, 1), Err(Errno::EINVAL));
    let log = DirtyLog { slot: 0, padding1: 0, dirty_bitmap: SCRATCH };
    assert_eq!(client.set(vm, KVM_GET_DIRTY_LOG, &log), Err(Errno::ENOENT), "no memory");
    let second = client.ioctl(0, KVM_CREATE_VM, 0).unwrap();
    assert_ne!(vm, second);
}

/// MSRs that 2007's list had, in its order; the last is emulated.
pub const OF_2007: [u32; 10] =
    [0x174, 0x175, 0x176, 0xc000_0081, 0xc000_0083, 0xc000_0102, 0xc000_0084, 0xc000_0082, 0x10, 0x1a0];

#[test]
fn get_msr_index_list_tells_the_total_before_e2big() {
    let client = FakeClient::new();
    client.write_u32(SCRATCH, 0);
    assert_eq!(client.ioctl(0, KVM_GET_MSR_INDEX_LIST, SCRATCH), Err(Errno::E2BIG));
    let total = client.read_u32(SCRATCH);
    assert!(total >= 10);
    client.write_u32(SCRATCH, total - 1);
    assert_eq!(client.ioctl(0, KVM_GET_MSR_INDEX_LIST, SCRATCH), Err(Errno::E2BIG), "all or none");
    assert_eq!(client.read_u32(SCRATCH), total);
    assert_eq!(client.ioctl(0, KVM_GET_MSR_INDEX_LIST, SCRATCH), Ok(0));
    let list: Vec<u32> = (1..=u64::from(total)).map(|at| client.read_u32(SCRATCH + 4 * at)).collect();
    assert!(OF_2007.iter().all(|index| list.contains(index)), "{list:x?}");
}

#[test]
fn check_extension_knows_none_of_the_unknown() {
    let client = FakeClient::new();
    for number in [5, 0x1000, u64::from(u32::MAX), u64::MAX] {
        assert_eq!(client.ioctl(0, KVM_CHECK_EXTENSION, number), Ok(0), "{number}");
    }
}

/// 8192 in 2007: `kvm_run` and the data page. Today's third page is harmless, what matters is where the first two are.
#[test]
fn get_vcpu_mmap_size_covers_kvm_run_and_the_data_page() {
    let m = Machine::new();
    let size = m.client.ioctl(0, KVM_GET_VCPU_MMAP_SIZE, 0).unwrap();
    assert!(size >= 8192 && size % 4096 == 0);
    assert_eq!(m.client.ioctl(0, KVM_GET_VCPU_MMAP_SIZE, 1), Err(Errno::EINVAL));
    assert!(m.run.len() >= size as u64);
    assert!((0..size as u64 / 8).all(|word| m.run.load_u64(8 * word) == Some(0)), "all zero at first");
}

#[test]
fn a_closed_vcpu_keeps_its_slot_and_the_vm_lives_with_the_last_file() {
    let m = Machine::new();
    m.client.files.lock().truncate(m.vcpu as usize);
    assert_eq!(m.client.ioctl(m.vm, KVM_CREATE_VCPU, 0), Err(Errno::EEXIST));
    let second = m.client.ioctl(m.vm, KVM_CREATE_VCPU, 1).unwrap();
    // The VM's own file goes; its vCPU's keeps it.
    let file = m.client.file(second);
    m.client.files.lock().truncate(1);
    assert_eq!(m.kvm.status().vms.len(), 1);
    drop(file);
    assert_eq!(m.kvm.status().vms.len(), 0);
}

#[test]
fn vcpu_files_stay_open_over_exec() {
    let m = Machine::new();
    assert_eq!(m.client.cloexec.lock().last(), Some(&false));
    let modern = m.client.ioctl(0, KVM_CREATE_VM, 0).unwrap();
    m.client.ioctl(modern, KVM_CREATE_VCPU, 0).unwrap();
    assert_eq!(m.client.cloexec.lock().last(), Some(&true), "today's are closed");
}

#[test]
fn any_process_may_use_any_file() {
    let (client, vm) = empty();
    region(&client, vm, 0, 0, 0, DEVICE).unwrap();
    assert!(client.fork().ioctl(vm, KVM_CREATE_VCPU, 0).is_ok());
    let modern = client.ioctl(0, KVM_CREATE_VM, 0).unwrap();
    assert_eq!(client.fork().ioctl(modern, KVM_CREATE_VCPU, 0), Err(Errno::EIO), "today's belong to their maker");
}

#[test]
fn ioctls_of_a_running_vcpu_wait_until_run_returns() {
    let m = Machine::real(|a| {
        let mut wait = a.create_label();
        a.set_label(&mut wait).unwrap();
        a.cmp(word_ptr(0x200), 1).unwrap();
        a.jne(wait).unwrap();
        a.hlt().unwrap();
    });
    std::thread::scope(|scope| {
        let release = Release(&m);
        let runner = scope.spawn(|| m.client.ioctl(m.vcpu, KVM_RUN, 0));
        while !m.kvm.status().vms[0].vcpus[0].running {
            std::thread::yield_now();
        }
        let reader = scope.spawn(|| m.regs().rip);
        // Memory may change meanwhile, as of 2.6.23.
        region(&m.client.fork(), m.vm, 1, 0, 0x10_0000, 0x1000).unwrap();
        std::thread::sleep(Duration::from_millis(30));
        assert!(!reader.is_finished() && !runner.is_finished());
        drop(release);
        assert_eq!(runner.join().unwrap(), Ok(0));
        assert_eq!(reader.join().unwrap(), m.regs().rip, "what is read is the state after the exit");
    });
    assert_eq!(m.reason(), KVM_EXIT_HLT);
}
