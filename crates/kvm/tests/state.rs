//! What is set is what is read: the state ioctls of a vCPU, as a VMM saves and loads it.

mod common;

use std::sync::Arc;

use common::{FakeClient, SCRATCH};
use kvm_abi::consts::*;
use kvm_abi::request::*;
use kvm_abi::*;
use nix::errno::Errno;

struct Machine {
    client: Arc<FakeClient>,
    vcpu: i32,
}

impl Machine {
    /// A vCPU with a page of RAM at 0 that loops.
    fn new() -> Self {
        let client = FakeClient::new();
        let vm = client.vm_with_ram(0x1000);
        client.memory.write(0, &[0xeb, 0xfe]).unwrap();
        let vcpu = client.ioctl(vm, KVM_CREATE_VCPU, 0).unwrap();
        Self { client, vcpu }
    }

    fn get<T: Plain>(&self, request: u32) -> T {
        self.client.get(self.vcpu, request)
    }

    fn set<T: Plain>(&self, request: u32, value: &T) {
        self.client.set(self.vcpu, request, value).unwrap();
    }

    fn set_cpuid(&self, table: &[kvm_cpuid_entry2]) -> Result<i32, Errno> {
        let mut bytes = [table.len() as u32, 0].map(u32::to_le_bytes).concat();
        bytes.extend(table.iter().flat_map(|entry| entry.as_bytes()));
        Ok(self.client.ioctl_bytes(self.vcpu, KVM_SET_CPUID2, bytes)?.0)
    }

    fn cpuid(&self, fd: i32, request: u32) -> Vec<kvm_cpuid_entry2> {
        let mut bytes = vec![0; 8 + 40 * 100];
        bytes[0] = 100;
        let (_, after) = self.client.ioctl_bytes(fd, request, bytes).unwrap();
        let count = u32::from_bytes(&after[..4]).unwrap() as usize;
        after[8..].chunks_exact(40).take(count).filter_map(kvm_cpuid_entry2::from_bytes).collect()
    }

    fn run_until_signal(&self) {
        let mut sregs: kvm_sregs = self.get(KVM_GET_SREGS);
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        self.set(KVM_SET_SREGS, &sregs);
        self.set(KVM_SET_REGS, &kvm_regs { rflags: 2, ..Plain::zeroed() });
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(std::time::Duration::from_millis(20));
                self.client.raise();
            });
            assert_eq!(self.client.ioctl(self.vcpu, KVM_RUN, 0), Err(Errno::EINTR));
        });
        self.client.consume_signal();
    }
}

#[test]
fn registers_come_back() {
    let m = Machine::new();
    let words: Vec<u8> = (1..=18u64).flat_map(|n| (n * 0x0101_0101_0101_0101).to_le_bytes()).collect();
    let mut regs = kvm_regs::from_bytes(&words).unwrap();
    regs.rflags = 0;
    m.set(KVM_SET_REGS, &regs);
    assert_eq!(m.get::<kvm_regs>(KVM_GET_REGS), kvm_regs { rflags: 2, ..regs }, "RFLAGS bit 1 is forced");
}

#[test]
fn long_mode_comes_back() {
    let m = Machine::new();
    let mut sregs: kvm_sregs = m.get(KVM_GET_SREGS);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer, sregs.cr8) = (0x8005_0033, 0x1000, 0x6a0, 0xd01, 5);
    sregs.cs = kvm_segment { selector: 8, limit: u32::MAX, type_: 11, present: 1, s: 1, l: 1, g: 1, ..Plain::zeroed() };
    sregs.ss =
        kvm_segment { selector: 0x10, limit: u32::MAX, type_: 3, present: 1, s: 1, db: 1, g: 1, ..Plain::zeroed() };
    sregs.fs = kvm_segment { base: 0x7fff_0000_1234, ..sregs.ss };
    sregs.ldt = kvm_segment { unusable: 1, ..Plain::zeroed() };
    sregs.gdt = kvm_dtable { base: 0xffff_8000_0000_1000, limit: 0x7f, padding: [0; 3] };
    sregs.interrupt_bitmap = [0, 1 << 2, 1, 0];
    m.set(KVM_SET_SREGS, &sregs);
    let mut expected = sregs;
    expected.interrupt_bitmap = [0, 1 << 2, 0, 0];
    assert_eq!(m.get::<kvm_sregs>(KVM_GET_SREGS), expected, "only the lowest vector is queued");
}

#[test]
fn a_refused_set_changes_nothing() {
    let m = Machine::new();
    let before: kvm_sregs = m.get(KVM_GET_SREGS);
    let mut bad = before;
    (bad.cr2, bad.cr0, bad.apic_base) = (0x1234, 0x8000_0000, 0);
    assert_eq!(m.client.set(m.vcpu, KVM_SET_SREGS, &bad), Err(Errno::EINVAL));
    assert_eq!(m.get::<kvm_sregs>(KVM_GET_SREGS), before);
}

#[test]
fn reset_is_the_manuals() {
    let m = Machine::new();
    let sregs: kvm_sregs = m.get(KVM_GET_SREGS);
    let regs: kvm_regs = m.get(KVM_GET_REGS);
    assert_eq!((sregs.cs.selector, sregs.cs.base, sregs.cs.limit), (0xf000, 0xffff_0000, 0xffff));
    assert_eq!((regs.rip, regs.rflags, regs.rdx), (0xfff0, 2, 0x600));
    assert_eq!((sregs.cr0, sregs.apic_base), (0x6000_0010, 0xfee0_0900));
    assert_eq!(m.get::<kvm_fpu>(KVM_GET_FPU).fcw, 0x37f);
    let debug: kvm_debugregs = m.get(KVM_GET_DEBUGREGS);
    assert_eq!((debug.dr6, debug.dr7), (0xffff_0ff0, 0x400));
}

#[test]
fn fpu_and_xsave_show_the_same_registers() {
    let m = Machine::new();
    let mut fpu: kvm_fpu = m.get(KVM_GET_FPU);
    (fpu.fcw, fpu.fsw, fpu.ftwx, fpu.last_ip) = (0x27f, 0x3800, 0x80, 0x1234);
    fpu.fpr[0][..10].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 0x88, 9, 0x40]);
    fpu.xmm[15] = [0xab; 16];
    m.set(KVM_SET_FPU, &fpu);
    assert_eq!(m.get::<kvm_fpu>(KVM_GET_FPU), fpu);
    let image: [u32; 1024] = m.get(KVM_GET_XSAVE);
    // With AVX, AVX-512 and protection keys where the host has them.
    let avx = if std::arch::is_x86_feature_detected!("avx") { 4 } else { 0 };
    let avx512 = if std::arch::is_x86_feature_detected!("avx512bw") { 0xe0 } else { 0 };
    let components = 3 | avx | avx512 | image[128] & 1 << 9;
    assert_eq!(image[0], 0x3800_027f);
    assert_eq!(image[6], 0x1f80, "KVM_SET_FPU leaves MXCSR alone");
    assert_eq!(image[(160 + 15 * 16) / 4], 0xabab_abab);
    assert_eq!(image[128..130], [components, 0]);
    m.set(KVM_SET_XSAVE, &image);
    assert_eq!(m.get::<[u32; 1024]>(KVM_GET_XSAVE), image);
    assert_eq!(m.get::<kvm_fpu>(KVM_GET_FPU), fpu);
}

#[test]
fn events_come_back_and_set_regs_drops_a_pending_exception() {
    let m = Machine::new();
    let mut events: kvm_vcpu_events = m.get(KVM_GET_VCPU_EVENTS);
    (events.exception.injected, events.exception.nr) = (1, 14);
    (events.exception.has_error_code, events.exception.error_code) = (1, 6);
    (events.nmi.pending, events.nmi.masked) = (1, 1);
    events.interrupt.shadow = 2;
    m.set(KVM_SET_VCPU_EVENTS, &events);
    assert_eq!(m.get::<kvm_vcpu_events>(KVM_GET_VCPU_EVENTS).as_bytes(), events.as_bytes());
    m.set(KVM_SET_REGS, &m.get::<kvm_regs>(KVM_GET_REGS));
    let after: kvm_vcpu_events = m.get(KVM_GET_VCPU_EVENTS);
    assert_eq!((after.exception.injected, after.nmi.pending), (0, 1));
}

#[test]
fn every_listed_msr_can_be_read_and_written_back() {
    let m = Machine::new();
    let room = 256u32;
    let mut bytes = room.to_le_bytes().to_vec();
    bytes.resize(4 + 4 * room as usize, 0);
    let (_, after) = m.client.ioctl_bytes(0, KVM_GET_MSR_INDEX_LIST, bytes).unwrap();
    let count = u32::from_bytes(&after[..4]).unwrap();
    for index in after[4..].chunks_exact(4).take(count as usize).filter_map(u32::from_bytes) {
        let mut msrs = [1u32, 0].map(u32::to_le_bytes).concat();
        msrs.extend(kvm_msr_entry { index, reserved: 0, data: 0 }.as_bytes());
        let (done, read) = m.client.ioctl_bytes(m.vcpu, KVM_GET_MSRS, msrs).unwrap();
        assert_eq!(done, 1, "KVM_GET_MSRS {index:#x}");
        assert_eq!(m.client.ioctl_bytes(m.vcpu, KVM_SET_MSRS, read).unwrap().0, 1, "KVM_SET_MSRS {index:#x}");
    }
}

#[test]
fn a_short_list_stores_the_count_and_e2big() {
    let m = Machine::new();
    m.client.write_u32(SCRATCH, 1);
    assert_eq!(m.client.ioctl(0, KVM_GET_MSR_INDEX_LIST, SCRATCH), Err(Errno::E2BIG));
    assert!(m.client.read_u32(SCRATCH) > 1);
    m.client.write_u32(SCRATCH, 1);
    assert_eq!(m.client.ioctl(0, KVM_GET_SUPPORTED_CPUID, SCRATCH), Err(Errno::E2BIG));
    assert_eq!(m.client.read_u32(SCRATCH), 1, "here the count stays");
}

#[test]
fn cpuid_comes_back_and_is_fixed_by_the_first_run() {
    let m = Machine::new();
    let offered = m.cpuid(0, KVM_GET_SUPPORTED_CPUID);
    assert!(!offered.is_empty() && !m.cpuid(0, KVM_GET_EMULATED_CPUID).is_empty());
    m.set_cpuid(&offered).unwrap();
    assert_eq!(m.cpuid(m.vcpu, KVM_GET_CPUID2), offered);
    // What CPUID offers CR4 may have: SMEP, SMAP, PCIDE.
    let mut sregs: kvm_sregs = m.get(KVM_GET_SREGS);
    sregs.cr4 |= 1 << 20 | 1 << 21 | 1 << 17;
    assert_eq!(m.client.set(m.vcpu, KVM_SET_SREGS, &sregs), Ok(0));
    sregs.cr4 = 0;
    m.set(KVM_SET_SREGS, &sregs);

    m.run_until_signal();
    assert_eq!(m.set_cpuid(&offered), Ok(0), "the same table may be set again");
    assert_eq!(m.set_cpuid(&offered[1..]), Err(Errno::EINVAL));
    assert_eq!(m.cpuid(m.vcpu, KVM_GET_CPUID2), offered);
}

#[test]
fn the_apic_bit_of_cpuid_follows_the_apic_base() {
    let m = Machine::new();
    m.set_cpuid(&m.cpuid(0, KVM_GET_SUPPORTED_CPUID)).unwrap();
    let apic = |m: &Machine| m.cpuid(m.vcpu, KVM_GET_CPUID2)[1].edx >> 9 & 1;
    assert_eq!(apic(&m), 1);
    let mut sregs: kvm_sregs = m.get(KVM_GET_SREGS);
    sregs.apic_base = 0xfee0_0100;
    m.set(KVM_SET_SREGS, &sregs);
    assert_eq!(apic(&m), 0);
}

#[test]
fn translate_without_paging_is_identity() {
    let m = Machine::new();
    let mut translation = kvm_translation { linear_address: 0x10000, ..Plain::zeroed() };
    m.client.ioctl_with(m.vcpu, KVM_TRANSLATE, &mut translation).unwrap();
    assert_eq!((translation.physical_address, translation.valid), (0x10000, 1));
    translation.linear_address = u64::MAX;
    m.client.ioctl_with(m.vcpu, KVM_TRANSLATE, &mut translation).unwrap();
    assert_eq!((translation.physical_address, translation.valid), (u64::MAX, 0));
}

#[test]
fn the_counter_runs_and_can_be_set() {
    let m = Machine::new();
    let khz = m.client.ioctl(m.vcpu, KVM_GET_TSC_KHZ, 0).unwrap();
    assert!(khz > 0);
    let tsc = |data: u64, request: u32| {
        let mut msrs = [1u32, 0].map(u32::to_le_bytes).concat();
        msrs.extend(kvm_msr_entry { index: 0x10, reserved: 0, data }.as_bytes());
        let (done, after) = m.client.ioctl_bytes(m.vcpu, request, msrs).unwrap();
        assert_eq!(done, 1);
        kvm_msr_entry::from_bytes(&after[8..24]).unwrap().data
    };
    let first = tsc(0, KVM_GET_MSRS);
    assert!(tsc(0, KVM_GET_MSRS) > first);
    tsc(1 << 60, KVM_SET_MSRS);
    let later = tsc(0, KVM_GET_MSRS);
    assert!(later >= 1 << 60 && later < (1 << 60) + khz as u64 * 60_000);
}

#[test]
fn status_tells_of_vms_that_live_and_that_ended() {
    let kvm = kvm::Kvm::new();
    let client = FakeClient::with(&kvm);
    let vm = client.ioctl(0, KVM_CREATE_VM, 0).unwrap();
    client.slot(vm, (3, 0), 0, 0x2000, 0).unwrap();
    client.ioctl(vm, KVM_CREATE_VCPU, 5).unwrap();
    let status = kvm.status();
    assert_eq!((status.vms.len(), status.ended.len()), (1, 0));
    assert_eq!((status.vms[0].memory_bytes, status.vms[0].slots, status.vms[0].owner_pid), (0x2000, 1, client.pid));
    assert_eq!(status.vms[0].vcpus[0].id, 5);
    // The vCPU keeps the VM.
    client.files.lock().remove(vm as usize);
    assert_eq!(kvm.status().vms.len(), 1);
    client.files.lock().clear();
    let status = kvm.status();
    assert_eq!((status.vms.len(), status.ended.len()), (0, 1));
}
