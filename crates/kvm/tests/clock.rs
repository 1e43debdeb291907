//! The paravirtual clock as a guest reads it: pvclock-abi.h's formula over its page, against `KVM_GET_CLOCK` and the host's
//! wall clock.

mod common;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::FakeClient;
use iced_x86::code_asm::*;
use kvm_abi::consts::*;
use kvm_abi::request::*;
use kvm_abi::{Plain, kvm_clock_data, kvm_regs, kvm_sregs};
use nix::errno::Errno;

const CODE: u64 = 0x1000;
/// Of vCPU n: 40H further each.
const PAGE: u64 = 0x4000;
const WALL: u64 = 0x5000;
/// The counter as the guest read it.
const TSC: u64 = 0x6000;
const GUEST_STOPPED: u8 = 1 << 1;

/// Two vCPUs that switch their clocks on, then tell their counters at each run.
struct Machine {
    client: std::sync::Arc<FakeClient>,
    vm: i32,
    vcpus: [i32; 2],
}

impl Machine {
    fn new() -> Self {
        let client = FakeClient::new();
        let vm = client.vm_with_ram(0x1_0000);
        let mut a = CodeAssembler::new(16).unwrap();
        let mut top = a.create_label();
        for (register, value) in [(0x4b56_4d00u32, WALL as u32), (0x4b56_4d01, 0)] {
            a.mov(ecx, register).unwrap();
            a.mov(eax, value).unwrap();
            a.xor(edx, edx).unwrap();
            if value == 0 {
                a.mov(eax, ebp).unwrap();
            }
            a.wrmsr().unwrap();
        }
        // The page is there at once.
        a.mov(edi, dword_ptr(ebp - 1)).unwrap();
        a.set_label(&mut top).unwrap();
        a.rdtsc().unwrap();
        a.mov(dword_ptr(TSC as i32), eax).unwrap();
        a.mov(dword_ptr(TSC as i32 + 4), edx).unwrap();
        a.out(0x80, al).unwrap();
        a.jmp(top).unwrap();
        client.memory.write(CODE, &a.assemble(CODE).unwrap()).unwrap();
        let vcpus = [0, 1].map(|id| {
            let fd = client.ioctl(vm, KVM_CREATE_VCPU, id).unwrap();
            let mut sregs: kvm_sregs = client.get(fd, KVM_GET_SREGS);
            (sregs.cs.base, sregs.cs.selector) = (0, 0);
            client.set(fd, KVM_SET_SREGS, &sregs).unwrap();
            let regs = kvm_regs { rip: CODE, rflags: 2, rbp: PAGE + 0x40 * id + 1, ..Plain::zeroed() };
            client.set(fd, KVM_SET_REGS, &regs).unwrap();
            fd
        });
        Self { client, vm, vcpus }
    }

    fn clock(&self) -> kvm_clock_data {
        self.client.get(self.vm, KVM_GET_CLOCK)
    }

    /// Runs to the next OUT; what the guest's clock reads at the counter that it told.
    fn guest_ns(&self, vcpu: usize) -> u64 {
        self.client.ioctl(self.vcpus[vcpu], KVM_RUN, 0).unwrap();
        let memory = &self.client.memory;
        let page = PAGE + 0x40 * vcpu as u64;
        let version = memory.load_u32(page).unwrap();
        assert!(version != 0 && version.is_multiple_of(2));
        let [then, system_time] = [8, 16].map(|at| memory.load_u64(page + at).unwrap());
        let (mul, shift) = (memory.load_u32(page + 24).unwrap(), memory.load_u8(page + 28).unwrap() as i8);
        assert_eq!(memory.load_u8(page + 29).unwrap() & 1, 1, "the same on every vCPU");
        let ticks = memory.load_u64(TSC).unwrap().wrapping_sub(then);
        let shifted = if shift < 0 { ticks >> -shift } else { ticks << shift };
        system_time + (u128::from(shifted) * u128::from(mul) >> 32) as u64
    }

    fn page(&self, vcpu: u64) -> [u8; 32] {
        let mut page = [0; 32];
        self.client.memory.read(PAGE + 0x40 * vcpu, &mut page).unwrap();
        page
    }
}

#[test]
fn guests_read_what_the_vms_clock_reads() {
    let machine = Machine::new();
    let mut before = machine.clock().clock;
    for round in 0..20 {
        let vcpu = round % 2;
        let ns = machine.guest_ns(vcpu);
        let after = machine.clock().clock;
        assert!((before..=after).contains(&ns), "{before} {ns} {after}");
        before = after;
    }
    assert_eq!(machine.page(0)[8..], machine.page(1)[8..], "one line for all");
    let regs: kvm_regs = machine.client.get(machine.vcpus[0], KVM_GET_REGS);
    assert!(regs.rdi != 0 && regs.rdi.is_multiple_of(2), "the page is written before the instruction behind WRMSR");
}

#[test]
fn the_clock_can_be_set_and_guests_see_it() {
    let machine = Machine::new();
    machine.guest_ns(0);
    let data = kvm_clock_data { clock: 7_000_000_000_000, ..Plain::zeroed() };
    assert_eq!(machine.client.set(machine.vm, KVM_SET_CLOCK, &data), Ok(0));
    for vcpu in 0..2 {
        let ns = machine.guest_ns(vcpu);
        assert!((7_000_000_000_000..=machine.clock().clock).contains(&ns), "{ns}");
    }
    // What passed meanwhile is added.
    let saved = machine.clock();
    assert_eq!(saved.flags, KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC);
    let old = kvm_clock_data { clock: 0, realtime: saved.realtime - 60_000_000_000, ..saved };
    assert_eq!(machine.client.set(machine.vm, KVM_SET_CLOCK, &old), Ok(0));
    let ns = machine.guest_ns(1);
    assert!((60_000_000_000..=machine.clock().clock).contains(&ns), "{ns}");
    let unknown = kvm_clock_data { flags: 1 << 7, ..saved };
    assert_eq!(machine.client.set(machine.vm, KVM_SET_CLOCK, &unknown), Err(Errno::EINVAL));
}

#[test]
fn a_written_counter_leaves_the_clock_alone() {
    let machine = Machine::new();
    machine.guest_ns(0);
    let entry = [1u32, 0, 0x10, 0, 0, 1 << 20];
    let bytes: Vec<u8> = entry.iter().flat_map(|word| word.to_le_bytes()).collect();
    assert_eq!(machine.client.ioctl_bytes(machine.vcpus[0], KVM_SET_MSRS, bytes).unwrap().0, 1);
    let before = machine.clock().clock;
    let ns = machine.guest_ns(0);
    assert!(machine.client.memory.load_u64(TSC).unwrap() >= 1 << 52);
    assert!((before..=machine.clock().clock).contains(&ns));
}

#[test]
fn the_wall_clock_is_that_of_the_vms_start() {
    let machine = Machine::new();
    let ns = machine.guest_ns(0);
    let [seconds, nanos] = [4, 8].map(|at| u64::from(machine.client.memory.load_u32(WALL + at).unwrap()));
    let now = Duration::from_secs(seconds) + Duration::from_nanos(nanos) + Duration::from_nanos(ns);
    let real = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    assert!(real.abs_diff(now) < Duration::from_secs(1), "{now:?} {real:?}");
}

#[test]
fn a_guest_is_told_once_that_it_stood_still() {
    let machine = Machine::new();
    let vcpu = machine.vcpus[0];
    assert_eq!(machine.client.ioctl(vcpu, KVM_KVMCLOCK_CTRL, 0), Err(Errno::EINVAL));
    machine.guest_ns(0);
    assert_eq!(machine.page(0)[29] & GUEST_STOPPED, 0);
    assert_eq!(machine.client.ioctl(vcpu, KVM_KVMCLOCK_CTRL, 0), Ok(0));
    machine.guest_ns(0);
    assert_eq!(machine.page(0)[29] & GUEST_STOPPED, GUEST_STOPPED);
    machine.client.memory.store_u8(PAGE + 29, 1).unwrap();
    machine.guest_ns(0);
    assert_eq!(machine.page(0)[29] & GUEST_STOPPED, 0);
}
