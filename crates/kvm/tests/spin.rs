//! Guests that spin with PAUSE, on more vCPUs than there are processors: PAUSE-loop exiting (SDM Vol. 3 "Instructions That Cause VM
//! Exits Conditionally"), and `KVM_X86_DISABLE_EXITS_PAUSE` of api.rst.

mod common;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::FakeClient;
use iced_x86::code_asm::*;
use kvm::Kvm;
use kvm_abi::consts::*;
use kvm_abi::request::*;
use kvm_abi::{kvm_regs, kvm_sregs};
use mmu::Mapping;

const RAM: u64 = 0x1_0000;
const CODE: u64 = 0x1000;
/// What they wait for: not 0.
const GATE: u64 = 0x2000;
/// How often each has looked, a line of the cache each.
const LOOKS: u64 = 0x3000;
const LINE: u64 = 64;

struct Machine {
    kvm: Arc<Kvm>,
    client: Arc<FakeClient>,
    vcpus: Vec<(i32, Arc<Mapping>)>,
}

impl Machine {
    /// vCPUs that look at the gate, with PAUSE between the looks, and halt once it is open.
    fn new(vcpus: u64, disabled_exits: u32) -> Self {
        let kvm = Kvm::new();
        let client = FakeClient::with(&kvm);
        let vm = client.vm_with_ram(RAM);
        client.enable(vm, KVM_CAP_X86_DISABLE_EXITS, disabled_exits.into()).unwrap();
        let mut a = CodeAssembler::new(16).unwrap();
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.pause().unwrap();
        a.inc(dword_ptr(bx)).unwrap();
        a.cmp(dword_ptr(GATE as i32), 0).unwrap();
        a.je(again).unwrap();
        a.hlt().unwrap();
        client.memory.write(CODE, &a.assemble(CODE).unwrap()).unwrap();
        let vcpus = (0..vcpus)
            .map(|id| {
                let fd = client.ioctl(vm, KVM_CREATE_VCPU, id).unwrap();
                let mut sregs: kvm_sregs = client.get(fd, KVM_GET_SREGS);
                (sregs.cs.base, sregs.cs.selector) = (0, 0);
                client.set(fd, KVM_SET_SREGS, &sregs).unwrap();
                let mut regs: kvm_regs = client.get(fd, KVM_GET_REGS);
                (regs.rip, regs.rbx, regs.rflags) = (CODE, LOOKS + LINE * id, 2);
                client.set(fd, KVM_SET_REGS, &regs).unwrap();
                (fd, client.map(fd))
            })
            .collect();
        Self { kvm, client, vcpus }
    }

    /// Runs them all until `enough`, then opens the gate and waits until they halt.
    fn run_until(&self, enough: impl Fn() -> bool) {
        thread::scope(|scope| {
            for (fd, page) in &self.vcpus {
                let client = self.client.thread();
                scope.spawn(move || {
                    client.ioctl(*fd, KVM_RUN, 0).unwrap();
                    assert_eq!(page.load_u32(8), Some(KVM_EXIT_HLT));
                });
            }
            let deadline = Instant::now() + Duration::from_secs(50);
            while !enough() && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(1));
            }
            self.client.memory.store_u32(GATE, 1).unwrap();
        });
    }

    /// Exits on PAUSE so far.
    fn pauses(&self) -> u64 {
        let status = self.kvm.status();
        status.vms[0].vcpus.iter().filter_map(|vcpu| vcpu.vmx_exits.get("PAUSE_INSTRUCTION")).sum()
    }

    /// Each has looked that often at least.
    fn all_looked(&self, times: u32) -> bool {
        (0..self.vcpus.len() as u64).all(|id| self.client.memory.load_u32(LOOKS + LINE * id).unwrap() >= times)
    }
}

fn processors() -> u64 {
    thread::available_parallelism().unwrap().get() as u64
}

#[test]
fn who_spins_leaves_its_processor_while_there_are_too_few() {
    let machine = Machine::new(processors() + 2, 0);
    machine.run_until(|| machine.pauses() >= 100);
    assert!(machine.pauses() >= 100);
}

/// Loops of several milliseconds, where the window of one is some microseconds.
const LONG: u32 = 1_000_000;

#[test]
fn who_spins_keeps_its_processor_while_there_are_enough() {
    let machine = Machine::new(processors().min(4), 0);
    machine.run_until(|| machine.all_looked(LONG));
    assert!(machine.all_looked(LONG));
    assert_eq!(machine.pauses(), 0);
}

#[test]
fn who_spins_keeps_its_processor_where_exits_on_pause_are_disabled() {
    let machine = Machine::new(processors() + 2, KVM_X86_DISABLE_EXITS_PAUSE);
    machine.run_until(|| machine.all_looked(LONG));
    assert!(machine.all_looked(LONG));
    assert_eq!(machine.pauses(), 0);
}
