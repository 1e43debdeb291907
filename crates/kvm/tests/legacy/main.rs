//! The API of 2007: memory from the kernel, mmap of the VM file, and the rules of Linux 2.6.22 that its VMMs rely on.

mod common;

use std::sync::Arc;

use common::{BASE, FakeClient};
use kvm_abi::consts::*;
use kvm_abi::legacy::{kvm_memory_alias, kvm_memory_region};
use kvm_abi::request::*;
use kvm_abi::{DirtyLog, kvm_interrupt, kvm_regs, kvm_sregs};
use mmu::Mapping;
use nix::errno::Errno;

struct Machine {
    client: Arc<FakeClient>,
    vm: i32,
}

impl Machine {
    fn new() -> Self {
        let client = FakeClient::new();
        let vm = client.ioctl(0, KVM_CREATE_VM, 0).unwrap();
        Self { client, vm }
    }

    fn region(&self, slot: u32, flags: u32, guest_phys_addr: u64, memory_size: u64) -> Result<i32, Errno> {
        let region = kvm_memory_region { slot, flags, guest_phys_addr, memory_size };
        self.client.set(self.vm, KVM_SET_MEMORY_REGION, &region)
    }

    fn alias(&self, slot: u32, guest_phys_addr: u64, memory_size: u64, target_phys_addr: u64) -> Result<i32, Errno> {
        let alias = kvm_memory_alias { slot, flags: 0, guest_phys_addr, memory_size, target_phys_addr };
        self.client.set(self.vm, KVM_SET_MEMORY_ALIAS, &alias)
    }

    fn window(&self) -> Arc<Mapping> {
        self.client.file(self.vm).mapping().expect("the VM file can be mapped")
    }

    fn vcpu(&self, id: u64) -> i32 {
        self.client.ioctl(self.vm, KVM_CREATE_VCPU, id).unwrap()
    }

    fn set_segments(&self, vcpu: i32, change: impl FnOnce(&mut kvm_sregs)) {
        let mut sregs = self.client.get(vcpu, KVM_GET_SREGS);
        change(&mut sregs);
        self.client.set(vcpu, KVM_SET_SREGS, &sregs).unwrap();
    }

    fn dirty(&self, slot: u32) -> Result<u64, Errno> {
        let log = DirtyLog { slot, padding1: 0, dirty_bitmap: BASE };
        self.client.set(self.vm, KVM_GET_DIRTY_LOG, &log)?;
        Ok(self.client.memory.load_u64(0).unwrap())
    }

    fn reason(&self, vcpu: i32) -> u32 {
        self.client.map(vcpu).load_u32(8).unwrap()
    }
}

#[test]
fn the_vm_file_shows_ram_at_its_guest_address() {
    let m = Machine::new();
    assert!(m.client.file(m.vm).mapping().is_none(), "a VM is not of 2007 before it says so");
    m.region(3, 0, 0, 0xa_0000).unwrap();
    m.region(0, 0, 0xc_0000, 0x10_0000).unwrap();
    let vcpu = m.vcpu(0);
    let regs: kvm_regs = m.client.get(vcpu, KVM_GET_REGS);
    let sregs: kvm_sregs = m.client.get(vcpu, KVM_GET_SREGS);
    assert_eq!((sregs.cs.selector, sregs.cs.base, regs.rip), (0xf000, 0xf_0000, 0xfff0));
    // mov [1234h], ax; mov es:[0], ax: there is no memory at the second.
    m.window().write(0xf_fff0, &[0xa3, 0x34, 0x12, 0x26, 0xa3, 0x00, 0x00]).unwrap();
    m.client.set(vcpu, KVM_SET_REGS, &kvm_regs { rax: 0x4711, ..regs }).unwrap();
    m.set_segments(vcpu, |sregs| (sregs.es.selector, sregs.es.base) = (0xb000, 0xb_0000));
    m.client.ioctl(vcpu, KVM_RUN, 0).unwrap();
    assert_eq!(m.window().load_u16(0x1234), Some(0x4711));
    assert_eq!(m.reason(vcpu), KVM_EXIT_MMIO);
    assert_eq!(m.client.map(vcpu).load_u64(32), Some(0xb_0000));
}

#[test]
fn regions_are_zeroed_kept_and_moved() {
    let m = Machine::new();
    m.region(0, 0, 0x1000, 0x3000).unwrap();
    m.window().write(0x1000, b"first").unwrap();
    m.window().write(0x3ffc, b"last").unwrap();
    assert_eq!(m.region(0, 0, 0x1000, 0x2000), Err(Errno::EINVAL), "no resize");
    m.region(0, KVM_MEM_LOG_DIRTY_PAGES, 0x1000, 0x3000).unwrap();
    // Up and down by less than its size, contents kept.
    for to in [0x2000, 0x1000, 0x10_0000] {
        m.region(0, 0, to, 0x3000).unwrap();
        let mut bytes = [0; 5];
        m.window().read(to, &mut bytes).unwrap();
        assert_eq!(&bytes, b"first", "{to:#x}");
        m.window().read(to + 0x2ffb, &mut bytes).unwrap();
        assert_eq!(&bytes[1..], b"last", "{to:#x}");
    }
    m.region(0, 0, 0, 0).unwrap();
    m.region(0, 0, 0x10_0000, 0x3000).unwrap();
    assert_eq!(m.window().load_u64(0x10_0000), Some(0), "a new region is zero");
    assert_eq!(m.window().load_u64(0x1000), Some(0), "and so is a place that was left");
}

#[test]
fn errors_are_those_of_2007() {
    let m = Machine::new();
    m.region(0, 0, 0x1000, 0x1000).unwrap();
    assert_eq!(m.region(1, 0, 0x1800, 0x1000), Err(Errno::EINVAL));
    assert_eq!(m.region(1, 0, 0x4000, 0x1001), Err(Errno::EINVAL));
    assert_eq!(m.region(4, 0, 0x4000, 0x1000), Err(Errno::EINVAL));
    assert_eq!(m.region(1, 0, !0xfff, 0x2000), Err(Errno::EINVAL));
    assert_eq!(m.region(1, 0, 0x1000, 0x1000), Err(Errno::EEXIST));
    assert_eq!(m.region(1, 0, 0, 0), Ok(0), "deleting what is not there");
    assert_eq!(m.dirty(0), Err(Errno::ENOENT));
    assert_eq!(m.alias(4, 0xa_0000, 0x1000, 0), Err(Errno::EINVAL));
    assert_eq!(m.alias(0, 0xa_0000, 0, 0), Ok(0), "removing what is not there");
    assert_eq!(m.client.ioctl(m.vm, 0xaeff, 0), Err(Errno::EINVAL), "unknown requests, on every file");
    assert_eq!(m.client.ioctl_bytes(m.vm, KVM_SET_USER_MEMORY_REGION, vec![0; 32]), Err(Errno::EINVAL));
    let vcpu = m.vcpu(0);
    assert_eq!(m.client.ioctl_bytes(vcpu, KVM_GET_MSRS, vec![0; 8]), Err(Errno::ENOMEM));
    assert_eq!(m.client.ioctl_bytes(vcpu, KVM_SET_CPUID, [41u32, 0].map(u32::to_le_bytes).concat()), Err(Errno::E2BIG));
    assert_eq!(m.client.ioctl_bytes(vcpu, KVM_DEBUG_GUEST, vec![0; 80]).map(|(ret, _)| ret), Ok(0));
}

#[test]
fn an_alias_shows_ram_a_second_time() {
    let m = Machine::new();
    m.region(0, 0, 0, 0x10_0000).unwrap();
    m.region(1, KVM_MEM_LOG_DIRTY_PAGES, 0xe000_0000, 0x8000).unwrap();
    m.alias(0, 0xa_0000, 0x8000, 0xe000_0000).unwrap();
    let vcpu = m.vcpu(0);
    m.window().write(0xf_fff0, &[0xb8, 0x00, 0xa0, 0xa3, 0x00, 0x20, 0xeb, 0xfe]).unwrap(); // mov ax, a000h; mov [2000h], ax; jmp $
    m.set_segments(vcpu, |sregs| (sregs.ds.selector, sregs.ds.base) = (0xa000, 0xa_0000));
    m.client.raise();
    assert_eq!(m.client.ioctl(vcpu, KVM_RUN, 0), Err(Errno::EINTR));
    assert_eq!(m.window().load_u16(0xe000_2000), Some(0xa000));
    assert_eq!(m.dirty(1), Ok(0b100), "logged under the target");
}

#[test]
fn a_pending_signal_never_stops_progress() {
    let m = Machine::new();
    m.region(0, 0, 0, 0x10_0000).unwrap();
    let vcpu = m.vcpu(0);
    m.window().write(0xf_fff0, &[0x40, 0xeb, 0xfd]).unwrap(); // inc ax; jmp $-1
    m.client.raise();
    let mut last = 0;
    for _ in 0..3 {
        assert_eq!(m.client.ioctl(vcpu, KVM_RUN, 0), Err(Errno::EINTR));
        assert_eq!(m.reason(vcpu), KVM_EXIT_INTR);
        let regs: kvm_regs = m.client.get(vcpu, KVM_GET_REGS);
        assert!(regs.rax > last, "each try gets somewhere");
        last = regs.rax;
    }
}

#[test]
fn vectors_collect_and_show_in_the_bitmap() {
    let m = Machine::new();
    m.region(0, 0, 0, 0x10_0000).unwrap();
    let vcpu = m.vcpu(0);
    for irq in [0x80, 0x21, 0x21] {
        m.client.set(vcpu, KVM_INTERRUPT, &kvm_interrupt { irq }).unwrap();
    }
    let sregs: kvm_sregs = m.client.get(vcpu, KVM_GET_SREGS);
    assert_eq!(sregs.interrupt_bitmap, [1 << 0x21, 0, 1, 0]);
    // SET_SREGS replaces them, and takes any state: here a data type for CS, and the reset base of later years.
    let mut changed = sregs;
    changed.interrupt_bitmap = [0, 1, 0, 0];
    (changed.cs.base, changed.cs.type_, changed.efer) = (0xffff_0000, 2, 0x400);
    m.client.set(vcpu, KVM_SET_SREGS, &changed).unwrap();
    let sregs: kvm_sregs = m.client.get(vcpu, KVM_GET_SREGS);
    assert_eq!(sregs.interrupt_bitmap, [0, 1, 0, 0]);
    assert_eq!(sregs.cs.base, 0xf_0000);
}

#[test]
fn a_vm_may_pass_from_one_process_to_another() {
    let m = Machine::new();
    m.region(0, 0, 0, 0x10_0000).unwrap();
    let other = m.client.fork();
    assert!(other.ioctl(m.vm, KVM_CREATE_VCPU, 0).is_ok());
    let modern = m.client.ioctl(0, KVM_CREATE_VM, 0).unwrap();
    let other = m.client.fork();
    assert_eq!(other.ioctl(modern, KVM_CREATE_VCPU, 0), Err(Errno::EIO), "today's belong to their maker");
}
