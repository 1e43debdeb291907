//! What `KVM_GET_VCPU_EVENTS` and `KVM_SET_VCPU_EVENTS` carry only where user space asked for it.

mod common;

use std::sync::Arc;

use common::FakeClient;
use kvm_abi::consts::*;
use kvm_abi::request::*;
use kvm_abi::{Plain, kvm_debugregs, kvm_regs, kvm_sregs, kvm_vcpu_events};
use mmu::Mapping;
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

const CODE: u64 = 0x1000;
const HANDLER: u64 = 0x4000;
/// The port of the handler of #DB and #PF.
const HANDLED: u32 = 0x92;

struct Machine {
    client: Arc<FakeClient>,
    vm: i32,
    vcpu: i32,
    page: Arc<Mapping>,
}

impl Machine {
    /// A vCPU in real mode that loops.
    fn new() -> Self {
        let client = FakeClient::new();
        let vm = client.vm_with_ram(0x1_0000);
        client.memory.write(CODE, &[0xeb, 0xfe]).unwrap();
        // OUT, and around again.
        client.memory.write(HANDLER, &[0xe6, HANDLED as u8, 0xeb, 0xfc]).unwrap();
        for vector in [1, 14] {
            client.memory.store_u32(4 * vector, HANDLER as u32).unwrap();
        }
        let vcpu = client.ioctl(vm, KVM_CREATE_VCPU, 0).unwrap();
        let page = client.map(vcpu);
        let mut sregs: kvm_sregs = client.get(vcpu, KVM_GET_SREGS);
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        client.set(vcpu, KVM_SET_SREGS, &sregs).unwrap();
        client.set(vcpu, KVM_SET_REGS, &kvm_regs { rip: CODE, rsp: 0x8000, rflags: 2, ..Plain::zeroed() }).unwrap();
        Self { client, vm, vcpu, page }
    }

    fn enable(&self, cap: u32) {
        self.client.enable(self.vm, cap, 1).unwrap();
    }

    fn events(&self) -> kvm_vcpu_events {
        self.client.get(self.vcpu, KVM_GET_VCPU_EVENTS)
    }

    fn set_events(&self, events: &kvm_vcpu_events) -> Result<i32, Errno> {
        self.client.set(self.vcpu, KVM_SET_VCPU_EVENTS, events)
    }

    /// The port of an OUT, if it ends in one.
    fn run(&self) -> u32 {
        self.client.ioctl(self.vcpu, KVM_RUN, 0).unwrap();
        self.page.load_u32(32).unwrap() >> 16
    }
}

/// api.rst `KVM_CAP_EXCEPTION_PAYLOAD`, and `kvm_deliver_exception_payload` of x86.c: what is pending brings CR2 or DR6 with it.
#[test]
fn exceptions_bring_their_payload() {
    let machine = Machine::new();
    let (get, set) = (|| machine.events(), |events: &kvm_vcpu_events| machine.set_events(events));
    let mut events = get();
    assert_eq!(events.flags & KVM_VCPUEVENT_VALID_PAYLOAD, 0);
    events.flags = KVM_VCPUEVENT_VALID_PAYLOAD;
    assert_eq!(set(&events), Err(Errno::EINVAL), "not switched on");
    machine.enable(KVM_CAP_EXCEPTION_PAYLOAD);
    assert_ne!(get().flags & KVM_VCPUEVENT_VALID_PAYLOAD, 0);

    events.exception.nr = 32;
    events.exception.pending = 1;
    assert_eq!(set(&events), Err(Errno::EINVAL));
    (events.exception.nr, events.exception.injected) = (14, 1);
    (events.exception_has_payload, events.exception_payload) = (1, 0x1234_5678);
    set(&events).unwrap();
    let seen = get();
    assert_eq!((seen.exception.pending, seen.exception.injected, seen.exception.nr), (1, 0, 14), "pending wins");
    assert_eq!((seen.exception_has_payload, seen.exception_payload), (1, 0x1234_5678));
    let faulted_at = || machine.client.get::<kvm_sregs>(machine.vcpu, KVM_GET_SREGS).cr2;
    assert_eq!(faulted_at(), 0, "it is not delivered");
    let run = || machine.run();
    assert_eq!((run(), faulted_at()), (HANDLED, 0x1234_5678));
    assert_eq!(get().exception_has_payload, 0);

    // What was injected before tells nothing new.
    events.exception.pending = 0;
    events.exception_payload = 0x9999;
    set(&events).unwrap();
    let seen = get();
    assert_eq!((seen.exception.pending, seen.exception.injected, seen.exception_has_payload), (0, 1, 0));
    assert_eq!((run(), faulted_at()), (HANDLED, 0x1234_5678));

    // #DB: bits 16 and 11 are 0 in DR6 where they are 1 in the payload; bit 12 is not DR6's.
    (events.exception.nr, events.exception.pending) = (1, 1);
    events.exception_payload = 1 << 14 | 1 << 16 | 1 << 12 | 2;
    set(&events).unwrap();
    assert_eq!(run(), HANDLED);
    assert_eq!(machine.client.get::<kvm_debugregs>(machine.vcpu, KVM_GET_DEBUGREGS).dr6, 0xfffe_4ff2);
}

/// api.rst `KVM_CAP_X86_TRIPLE_FAULT_EVENT`.
#[test]
fn a_triple_fault_may_wait() {
    let machine = Machine::new();
    let (get, set) = (|| machine.events(), |events: &kvm_vcpu_events| machine.set_events(events));
    let mut events = get();
    assert_eq!(events.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT, 0);
    events.flags = KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
    events.triple_fault.pending = 1;
    assert_eq!(set(&events), Err(Errno::EINVAL), "not switched on");
    machine.enable(KVM_CAP_X86_TRIPLE_FAULT_EVENT);
    set(&events).unwrap();
    let seen = get();
    assert_eq!((seen.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT, seen.triple_fault.pending), (events.flags, 1));
    machine.run();
    assert_eq!(machine.page.load_u32(8), Some(KVM_EXIT_SHUTDOWN));
    assert_eq!(get().triple_fault.pending, 0);
}

/// The header at `KVM_CAP_LAST_CPU`: `fail_entry.cpu` is where the guest was to run.
#[test]
fn a_refused_entry_names_the_cpu() {
    let machine = Machine::new();
    assert_eq!(machine.client.ioctl(machine.vm, KVM_CHECK_EXTENSION, KVM_CAP_LAST_CPU.into()), Ok(1));
    let mut sregs: kvm_sregs = machine.client.get(machine.vcpu, KVM_GET_SREGS);
    // A TSS that is not busy, at which only VM entry looks.
    sregs.tr.type_ = 9;
    machine.client.set(machine.vcpu, KVM_SET_SREGS, &sregs).unwrap();
    let (all, this) = (sched_getaffinity(Pid::from_raw(0)).unwrap(), Pid::from_raw(0));
    for cpu in (0..CpuSet::count()).filter(|&cpu| all.is_set(cpu).unwrap()) {
        let mut one = CpuSet::new();
        one.set(cpu).unwrap();
        sched_setaffinity(this, &one).unwrap();
        machine.run();
        assert_eq!(machine.page.load_u32(8), Some(KVM_EXIT_FAIL_ENTRY));
        assert_eq!((machine.page.load_u64(32), machine.page.load_u32(40)), (Some(0x8000_0021), Some(cpu as u32)));
    }
}
