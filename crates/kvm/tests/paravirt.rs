//! KVM's own services as a guest uses them: steal time, hypercalls, an EOI in memory. What must happen is said by
//! Documentation/virt/kvm/x86/{msr,hypercalls,cpuid}.rst, `linux/kvm_para.h`, and x86.c and lapic.c of Linux 6.1.

mod common;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::FakeClient;
use iced_x86::code_asm::*;
use kvm::Kvm;
use kvm_abi::consts::*;
use kvm_abi::request::*;
use kvm_abi::{Plain, kvm_cpuid_entry2, kvm_mp_state, kvm_msi, kvm_msr_entry, kvm_regs, kvm_sregs};
use mmu::Mapping;
use nix::errno::Errno;

const RAM: u64 = 0x2_0000;
/// Of vCPU n: 1000H further each.
const CODE: u64 = 0x1000;
const HANDLER: u64 = 0x8000;
const PAGE: u64 = 0x9000;
/// Where guests leave what they saw.
const SEEN: u64 = 0xa000;
const APIC: u64 = 0xfee0_0000;

const WALL_CLOCK: u32 = 0x4b56_4d00;
const SYSTEM_TIME: u32 = 0x4b56_4d01;
const STEAL_TIME: u32 = 0x4b56_4d03;
const PV_EOI: u32 = 0x4b56_4d04;
const POLL_CONTROL: u32 = 0x4b56_4d05;

const KICK_CPU: u32 = 5;
const CLOCK_PAIRING: u32 = 9;
const SEND_IPI: u32 = 10;
const SCHED_YIELD: u32 = 11;
const MAP_GPA_RANGE: u32 = 12;
const ENOSYS: i32 = -1000;

type Code = Result<(), IcedError>;

struct Machine {
    kvm: Arc<Kvm>,
    client: Arc<FakeClient>,
    vm: i32,
    vcpus: Vec<(i32, Arc<Mapping>)>,
}

fn wrmsr(a: &mut CodeAssembler, index: u32, value: u32) -> Code {
    a.mov(ecx, index)?;
    a.mov(eax, value)?;
    a.xor(edx, edx)?;
    a.wrmsr()
}

fn is_amd() -> bool {
    matches!(std::arch::x86_64::__cpuid(0).ebx.to_le_bytes(), [b'A', b'u', b't', b'h'] | [b'H', b'y', b'g', b'o'])
}

/// EAX and up to four arguments; the result goes to `SEEN` + `at`.
fn hypercall(a: &mut CodeAssembler, at: u64, number: u32, args: [u32; 4]) -> Code {
    a.mov(eax, number)?;
    a.mov(ebx, args[0])?;
    a.mov(ecx, args[1])?;
    a.mov(edx, args[2])?;
    a.mov(esi, args[3])?;
    // Either works on either vendor's CPU.
    if at.is_multiple_of(8) {
        a.vmcall()?
    } else {
        a.vmmcall()?
    }
    a.mov(dword_ptr((SEEN + at) as i32), eax)
}

/// Writes a register of the local APIC.
fn apic(a: &mut CodeAssembler, offset: u64, value: u32) -> Code {
    a.mov(ebx, (APIC + offset) as u32)?;
    a.mov(dword_ptr(ebx), value)
}

/// Says where it is, for ever.
fn outs(a: &mut CodeAssembler) -> Code {
    let mut top = a.create_label();
    a.set_label(&mut top)?;
    a.out(0x80, al)?;
    a.jmp(top)
}

impl Machine {
    /// vCPUs in real mode, vCPU n at the nth code. `chip`: interrupt controllers are here, and all APICs enabled.
    fn new(chip: bool, codes: &[&dyn Fn(&mut CodeAssembler) -> Code]) -> Self {
        let kvm = Kvm::new();
        let client = FakeClient::with(&kvm);
        let vm = client.vm_with_ram(RAM);
        if chip {
            client.ioctl(vm, KVM_CREATE_IRQCHIP, 0).unwrap();
        }
        let mut vcpus = Vec::new();
        for (id, code) in (0..).zip(codes) {
            let at = CODE + 0x1000 * id;
            let mut a = CodeAssembler::new(16).unwrap();
            if chip {
                apic(&mut a, 0xf0, 0x1ff).unwrap();
            }
            code(&mut a).unwrap();
            client.memory.write(at, &a.assemble(at).unwrap()).unwrap();
            let fd = client.ioctl(vm, KVM_CREATE_VCPU, id).unwrap();
            let mut sregs: kvm_sregs = client.get(fd, KVM_GET_SREGS);
            (sregs.cs.base, sregs.cs.selector, sregs.ds.limit, sregs.ds.g) = (0, 0, 0xffff_ffff, 1);
            client.set(fd, KVM_SET_SREGS, &sregs).unwrap();
            let regs = kvm_regs { rip: at, rsp: 0xf000 + 0x400 * id, rflags: 2, ..Plain::zeroed() };
            client.set(fd, KVM_SET_REGS, &regs).unwrap();
            if chip {
                let runs = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
                client.set(fd, KVM_SET_MP_STATE, &runs).unwrap();
            }
            vcpus.push((fd, client.map(fd)));
        }
        Self { kvm, client, vm, vcpus }
    }

    fn handler(&self, code: impl FnOnce(&mut CodeAssembler) -> Code) {
        let mut a = CodeAssembler::new(16).unwrap();
        code(&mut a).unwrap();
        self.client.memory.write(HANDLER, &a.assemble(HANDLER).unwrap()).unwrap();
        for vector in 0..256 {
            self.client.memory.store_u32(4 * vector, HANDLER as u32).unwrap();
        }
    }

    /// The exit's reason.
    fn run(&self, vcpu: usize) -> u32 {
        let (fd, page) = &self.vcpus[vcpu];
        // On the thread's own client: arguments in memory are none.
        self.client.ioctl(*fd, KVM_RUN, 0).unwrap();
        page.load_u32(8).unwrap()
    }

    fn seen(&self, at: u64) -> i32 {
        self.client.memory.load_u32(SEEN + at).unwrap() as i32
    }

    fn msr(&self, index: u32) -> Option<u64> {
        let mut bytes = vec![1, 0, 0, 0, 0, 0, 0, 0];
        bytes.extend(kvm_msr_entry { index, ..Plain::zeroed() }.as_bytes());
        let (count, bytes) = self.client.ioctl_bytes(self.vcpus[0].0, KVM_GET_MSRS, bytes).unwrap();
        (count == 1).then(|| u64::from_le_bytes(bytes[16..24].try_into().unwrap()))
    }

    fn set_msr(&self, index: u32, data: u64) -> bool {
        let mut bytes = vec![1, 0, 0, 0, 0, 0, 0, 0];
        bytes.extend(kvm_msr_entry { index, data, ..Plain::zeroed() }.as_bytes());
        self.client.ioctl_bytes(self.vcpus[0].0, KVM_SET_MSRS, bytes).unwrap().0 == 1
    }

    fn signal_msi(&self, vector: u8) {
        let msi = kvm_msi { address_lo: APIC as u32, data: vector.into(), ..Plain::zeroed() };
        self.client.file(self.vm).ioctl(&*self.client, KVM_SIGNAL_MSI, 0, msi.as_bytes()).unwrap();
    }

    fn wait_for_halt(&self, vcpu: usize) {
        let deadline = Instant::now() + Duration::from_secs(50);
        while !self.kvm.status().vms[0].vcpus[vcpu].vmx_exits.contains_key("HLT") {
            assert!(Instant::now() < deadline, "vCPU {vcpu} does not halt");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// What the calling thread has waited for a CPU.
fn own_delay() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split(' ').nth(1).unwrap().parse().unwrap()
}

/// Steal, version and flags; preempted.
fn steal_page(machine: &Machine) -> (u64, u32, u32, u8) {
    let memory = &machine.client.memory;
    let [version, flags] = [8, 12].map(|at| memory.load_u32(PAGE + at).unwrap());
    (memory.load_u64(PAGE).unwrap(), version, flags, memory.load_u8(PAGE + 16).unwrap())
}

#[test]
fn steal_time_is_what_both_threads_waited() {
    let machine = Machine::new(
        false,
        &[&|a| {
            wrmsr(a, STEAL_TIME, PAGE as u32 | 1)?;
            let mut top = a.create_label();
            a.set_label(&mut top)?;
            a.mov(al, byte_ptr(PAGE as i32 + 16))?;
            a.mov(byte_ptr(SEEN as i32), al)?;
            a.out(0x80, al)?;
            a.jmp(top)
        }],
    );
    // A place that is not aligned.
    assert!(!machine.set_msr(STEAL_TIME, PAGE | 0x3f));
    assert!(!machine.set_msr(STEAL_TIME, PAGE | 2));
    machine.client.memory.store_u32(PAGE + 8, 7).unwrap();
    machine.client.memory.store_u32(SEEN, 0xff).unwrap();
    machine.client.set_waited(1_000_000_000);
    let own = own_delay();
    assert_eq!(machine.run(0), KVM_EXIT_IO);
    let (steal, version, flags, preempted) = steal_page(&machine);
    assert!(steal <= own_delay() - own, "what was before is not stolen: {steal}");
    assert!(version >= 8 && version.is_multiple_of(2), "junk that was there is no version: {version}");
    assert_eq!((flags, preempted), (0, 1), "the vCPU does not run now");
    assert_eq!(machine.seen(0), 0, "while it runs, it does");
    machine.client.set_waited(1_005_000_000);
    thread::sleep(Duration::from_millis(1));
    assert_eq!(machine.run(0), KVM_EXIT_IO);
    let (later, newer, ..) = steal_page(&machine);
    assert!(newer > version && newer.is_multiple_of(2));
    let stolen = later - steal;
    assert!((5_000_000..=5_000_000 + own_delay() - own).contains(&stolen), "{stolen}");
    assert_eq!(machine.msr(STEAL_TIME), Some(PAGE | 1));
}

#[test]
fn a_thread_that_comes_anew_brings_no_time() {
    let machine = Machine::new(
        false,
        &[&|a| {
            wrmsr(a, STEAL_TIME, PAGE as u32 | 1)?;
            outs(a)
        }],
    );
    machine.client.set_waited(0);
    let own = own_delay();
    machine.run(0);
    let other = machine.client.thread_numbered(machine.client.pid + 7);
    other.set_waited(77_000_000_000);
    thread::sleep(Duration::from_millis(1));
    other.ioctl(machine.vcpus[0].0, KVM_RUN, 0).unwrap();
    let steal = steal_page(&machine).0;
    assert!(steal <= own_delay() - own, "{steal}");
}

/// pv_tlb_flush of Linux's guests: who finds the vCPU preempted leaves a mark in place of an IPI.
#[test]
fn a_mark_in_the_page_drops_translations() {
    const TABLE: u64 = 0xb000;
    const DIRECTORY: u64 = 0xc000;
    let machine = Machine::new(false, &[&|a| a.nop()]);
    let mut a = CodeAssembler::new(32).unwrap();
    let mut top = a.create_label();
    wrmsr(&mut a, STEAL_TIME, PAGE as u32 | 1).unwrap();
    a.set_label(&mut top).unwrap();
    a.mov(eax, dword_ptr(0x1_0000)).unwrap();
    a.mov(dword_ptr(SEEN as i32), eax).unwrap();
    a.out(0x80, al).unwrap();
    a.jmp(top).unwrap();
    let (client, fd) = (&machine.client, machine.vcpus[0].0);
    client.memory.write(CODE, &a.assemble(CODE).unwrap()).unwrap();
    client.memory.store_u32(DIRECTORY, TABLE as u32 | 3).unwrap();
    for page in 0..0x20u32 {
        client.memory.store_u32(TABLE + 4 * u64::from(page), page << 12 | 3).unwrap();
    }
    let mut sregs: kvm_sregs = client.get(fd, KVM_GET_SREGS);
    (sregs.cr0, sregs.cr3) = (0x8000_0011, DIRECTORY);
    for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
        (segment.base, segment.limit, segment.db, segment.g, segment.selector) = (0, 0xffff_ffff, 1, 1, 8);
    }
    client.set(fd, KVM_SET_SREGS, &sregs).unwrap();
    for (page, value) in [(0x10u64, 0x1111), (0x11, 0x2222)] {
        client.memory.store_u32(page << 12, value).unwrap();
    }
    machine.run(0);
    assert_eq!(machine.seen(0), 0x1111);
    for (page, value) in [(0x11u32, 0x2222), (0x10, 0x1111)] {
        client.memory.store_u32(TABLE + 4 * 0x10, page << 12 | 3).unwrap();
        assert_eq!(client.memory.load_u8(PAGE + 16), Some(1));
        client.memory.store_u8(PAGE + 16, 1 | 2).unwrap();
        machine.run(0);
        assert_eq!(machine.seen(0), value);
    }
}

#[test]
fn a_kick_ends_a_halt_before_and_after_it_began() {
    let machine = Machine::new(
        true,
        &[
            &|a| {
                hypercall(a, 0, KICK_CPU, [0, 1, 0, 0])?;
                outs(a)
            },
            &|a| {
                a.cli()?;
                a.hlt()?;
                a.out(0x81, al)?;
                a.hlt()?;
                a.out(0x82, al)?;
                a.hlt()?;
                a.out(0x83, al)
            },
        ],
    );
    let port = |vcpu: usize| machine.vcpus[vcpu].1.load_u32(32).unwrap() >> 16;
    // The second vCPU sleeps.
    thread::scope(|scope| {
        scope.spawn(|| {
            machine.wait_for_halt(1);
            machine.run(0);
        });
        assert_eq!((machine.run(1), port(1)), (KVM_EXIT_IO, 0x81));
    });
    assert_eq!(machine.seen(0), 0);
    // It comes first, and is kept.
    let regs = kvm_regs { rip: CODE, rflags: 2, ..Plain::zeroed() };
    machine.client.set(machine.vcpus[0].0, KVM_SET_REGS, &regs).unwrap();
    machine.run(0);
    assert_eq!((machine.run(1), port(1)), (KVM_EXIT_IO, 0x82));
    // Once only: it halts now, until a signal.
    thread::scope(|scope| {
        let halted = scope.spawn(|| machine.client.file(machine.vcpus[1].0).ioctl(&*machine.client, KVM_RUN, 0, &[]));
        thread::sleep(Duration::from_millis(20));
        machine.client.raise();
        assert_eq!(halted.join().unwrap().err(), Some(Errno::EINTR));
    });
}

#[test]
fn a_halted_vcpu_is_marked_and_one_that_runs_is_not() {
    let machine = Machine::new(
        true,
        &[&|a| {
            wrmsr(a, STEAL_TIME, PAGE as u32 | 1)?;
            a.sti()?;
            a.hlt()?;
            a.mov(al, byte_ptr(PAGE as i32 + 16))?;
            a.mov(byte_ptr(SEEN as i32), al)?;
            a.out(0x80, al)
        }],
    );
    machine.handler(|a| a.iret());
    machine.client.memory.store_u32(SEEN, 0xff).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| machine.run(0));
        let deadline = Instant::now() + Duration::from_secs(50);
        while machine.client.memory.load_u8(PAGE + 16) != Some(1) {
            assert!(Instant::now() < deadline);
            thread::yield_now();
        }
        machine.signal_msi(0x40);
    });
    assert_eq!(machine.seen(0), 0);
}

#[test]
fn one_hypercall_interrupts_many() {
    let target = |a: &mut CodeAssembler| {
        a.sti()?;
        a.hlt()?;
        a.nop()
    };
    let machine = Machine::new(
        true,
        &[
            &|a| {
                // vCPUs 1 and 2 of a bitmap that begins at 1; the second half begins 32 further on.
                hypercall(a, 0, SEND_IPI, [0b11, 1, 1, 0x4044])?;
                // Nobody's.
                hypercall(a, 4, SEND_IPI, [0b11, 0, 100, 0x4044])?;
                hypercall(a, 8, SEND_IPI, [0b11, 0, 0xffff_ffff, 0x4044])?;
                // A shorthand, a logical destination.
                hypercall(a, 12, SEND_IPI, [0b11, 0, 1, 0xc_4044])?;
                hypercall(a, 16, SEND_IPI, [0b11, 0, 1, 0x4844])?;
                outs(a)
            },
            &target,
            &target,
        ],
    );
    machine.handler(|a| {
        a.out(0x90, al)?;
        apic(a, 0xb0, 0)?;
        a.iret()
    });
    thread::scope(|scope| {
        let targets = [1, 2].map(|vcpu| {
            let machine = &machine;
            scope.spawn(move || {
                let reason = machine.run(vcpu);
                (reason, machine.vcpus[vcpu].1.load_u32(32).unwrap() >> 16)
            })
        });
        machine.wait_for_halt(1);
        machine.wait_for_halt(2);
        machine.run(0);
        for target in targets {
            assert_eq!(target.join().unwrap(), (KVM_EXIT_IO, 0x90));
        }
    });
    assert_eq!([0, 4, 8, 12, 16].map(|at| machine.seen(at)), [2, 0, 0, -22, -22]);
}

#[test]
fn without_a_local_apic_there_is_nobody_to_interrupt() {
    let machine = Machine::new(
        false,
        &[&|a| {
            hypercall(a, 0, SEND_IPI, [1, 0, 0, 0x4044])?;
            hypercall(a, 4, KICK_CPU, [0, 0, 0, 0])?;
            hypercall(a, 8, SCHED_YIELD, [0, 0, 0, 0])?;
            hypercall(a, 12, 1000, [0, 0, 0, 0])?;
            hypercall(a, 16, MAP_GPA_RANGE, [0, 1, 0, 0])?;
            outs(a)
        }],
    );
    machine.run(0);
    assert_eq!([0, 4, 8, 12, 16].map(|at| machine.seen(at)), [-95, 0, 0, ENOSYS, ENOSYS]);
}

#[test]
fn what_the_guests_cpuid_lacks_is_absent_where_that_is_enforced() {
    let code = |a: &mut CodeAssembler| {
        for (at, number) in [(0, KICK_CPU), (4, SEND_IPI), (8, SCHED_YIELD)] {
            hypercall(a, at, number, [0; 4])?;
        }
        a.mov(ecx, STEAL_TIME)?;
        a.rdmsr()?;
        a.out(0x80, al)
    };
    let leaf = |function: u32, features: u32, spells: [u32; 3]| kvm_cpuid_entry2 {
        function,
        eax: features,
        ebx: spells[0],
        ecx: spells[1],
        edx: spells[2],
        ..Plain::zeroed()
    };
    let signature = [0x4b4d_564b, 0x564b_4d56, 0x4d];
    // Also where another hypervisor's leaves come first.
    for (base, features) in [(0x4000_0000, 0), (0x4000_0100, 0), (0x4000_0100, 1 << 11)] {
        let machine = Machine::new(true, &[&code]);
        machine.handler(|a| a.out(0x81, al));
        let vcpu = machine.vcpus[0].0;
        assert_eq!(machine.client.enable(vcpu, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1), Ok(0));
        assert_eq!(machine.client.enable(vcpu, KVM_CAP_EXIT_HYPERCALL, 0), Err(Errno::EINVAL), "the VM's");
        let table = [leaf(base, base | 1, signature), leaf(base | 1, features, [0; 3])];
        let mut bytes = vec![2, 0, 0, 0, 0, 0, 0, 0];
        table.iter().for_each(|entry| bytes.extend(entry.as_bytes()));
        machine.client.ioctl_bytes(vcpu, KVM_SET_CPUID2, bytes).unwrap();
        for index in [0x11, 0x12, WALL_CLOCK, SYSTEM_TIME, STEAL_TIME, PV_EOI, POLL_CONTROL] {
            assert_eq!((machine.msr(index), machine.set_msr(index, 0)), (None, false), "{index:#x}");
        }
        machine.run(0);
        assert_eq!(machine.vcpus[0].1.load_u32(32).unwrap() >> 16, 0x81, "#GP");
        let ipi = if features != 0 { 0 } else { ENOSYS };
        assert_eq!([0, 4, 8].map(|at| machine.seen(at)), [ENOSYS, ipi, ENOSYS]);
        assert_eq!(machine.client.enable(vcpu, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 0), Ok(0));
        assert_eq!(machine.msr(POLL_CONTROL), Some(1));
    }
}

#[test]
fn hypercalls_are_for_ring_0() {
    let machine = Machine::new(false, &[&|a| a.nop()]);
    let mut a = CodeAssembler::new(32).unwrap();
    hypercall(&mut a, 0, SCHED_YIELD, [0; 4]).unwrap();
    a.out(0x80, al).unwrap();
    let (client, fd) = (&machine.client, machine.vcpus[0].0);
    client.memory.write(CODE, &a.assemble(CODE).unwrap()).unwrap();
    let mut sregs: kvm_sregs = client.get(fd, KVM_GET_SREGS);
    sregs.cr0 = 0x11;
    for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
        (segment.base, segment.limit, segment.db, segment.g) = (0, 0xffff_ffff, 1, 1);
        (segment.selector, segment.dpl) = (8 | 3, 3);
    }
    client.set(fd, KVM_SET_SREGS, &sregs).unwrap();
    // IOPL 3 lets it say that it is done.
    let regs = kvm_regs { rip: CODE, rflags: 2 | 3 << 12, ..Plain::zeroed() };
    client.set(fd, KVM_SET_REGS, &regs).unwrap();
    assert_eq!(machine.run(0), KVM_EXIT_IO);
    assert_eq!(machine.seen(0), -1, "KVM_EPERM");
}

#[test]
fn clocks_can_be_paired() {
    let machine = Machine::new(
        false,
        &[&|a| {
            a.rdtsc()?;
            a.mov(dword_ptr(SEEN as i32 + 0x20), eax)?;
            a.mov(dword_ptr(SEEN as i32 + 0x24), edx)?;
            hypercall(a, 0, CLOCK_PAIRING, [PAGE as u32, 0, 0, 0])?;
            a.rdtsc()?;
            a.mov(dword_ptr(SEEN as i32 + 0x28), eax)?;
            a.mov(dword_ptr(SEEN as i32 + 0x2c), edx)?;
            // Another clock; no memory.
            hypercall(a, 4, CLOCK_PAIRING, [PAGE as u32, 1, 0, 0])?;
            hypercall(a, 8, CLOCK_PAIRING, [RAM as u32 - 32, 0, 0, 0])?;
            outs(a)
        }],
    );
    let memory = &machine.client.memory;
    memory.write(PAGE, &[0xff; 64]).unwrap();
    let before = SystemTime::now();
    machine.run(0);
    let after = SystemTime::now();
    assert_eq!([0, 4, 8].map(|at| machine.seen(at)), [0, -95, -14]);
    let [seconds, nanos, tsc] = [0, 8, 16].map(|at| memory.load_u64(PAGE + at).unwrap());
    let then = UNIX_EPOCH + Duration::new(seconds, nanos as u32);
    assert!((before..=after).contains(&then), "{before:?} {then:?} {after:?}");
    let [first, last] = [0x20, 0x28].map(|at| memory.load_u64(SEEN + at).unwrap());
    assert!((first..=last).contains(&tsc), "{first} {tsc} {last}");
    assert!((24..64).all(|at| memory.load_u8(PAGE + at) == Some(0)), "flags and padding");
}

#[test]
fn user_space_may_answer_for_ranges_of_memory() {
    let machine = Machine::new(
        false,
        &[&|a| {
            hypercall(a, 0, MAP_GPA_RANGE, [0x1001, 1, 0, 0])?;
            hypercall(a, 4, MAP_GPA_RANGE, [0x1000, 0, 0, 0])?;
            hypercall(a, 8, MAP_GPA_RANGE, [0x3000, 5, 1 << 4, 0])?;
            outs(a)
        }],
    );
    assert_eq!(machine.client.ioctl(machine.vm, KVM_CHECK_EXTENSION, KVM_CAP_EXIT_HYPERCALL.into()), Ok(1 << 12));
    assert_eq!(machine.client.enable(machine.vm, KVM_CAP_EXIT_HYPERCALL, 1 << 10), Err(Errno::EINVAL));
    assert_eq!(machine.client.enable(machine.vm, KVM_CAP_EXIT_HYPERCALL, 1 << 12), Ok(0));
    assert_eq!(machine.run(0), KVM_EXIT_HYPERCALL);
    assert_eq!([0, 4].map(|at| machine.seen(at)), [-22, -22]);
    let page = &machine.vcpus[0].1;
    // struct kvm_run's hypercall: nr, args[6], ret, longmode.
    assert_eq!([32, 40, 48, 56].map(|at| page.load_u64(at).unwrap()), [12, 0x3000, 5, 0x10]);
    assert_eq!(page.load_u32(96), Some(0));
    let regs: kvm_regs = machine.client.get(machine.vcpus[0].0, KVM_GET_REGS);
    let mut code = [0; 3];
    machine.client.memory.read(regs.rip, &mut code).unwrap();
    // The other vendor's instruction has become this one's.
    let own = if is_amd() { 0xd9 } else { 0xc1 };
    assert_eq!(code, [0x0f, 0x01, own], "RIP is at the hypercall until it is answered");
    page.store_u64(88, 0x1_2345_6789).unwrap();
    assert_eq!(machine.run(0), KVM_EXIT_IO);
    assert_eq!(machine.seen(8), 0x2345_6789, "32 bits of it");
}

#[test]
fn polling_is_a_bit() {
    let machine = Machine::new(false, &[&|a| a.hlt()]);
    assert_eq!(machine.msr(POLL_CONTROL), Some(1));
    assert!(!machine.set_msr(POLL_CONTROL, 2));
    assert!(machine.set_msr(POLL_CONTROL, 0));
    assert_eq!(machine.msr(POLL_CONTROL), Some(0));
}

/// The handler ends its interrupt as Linux's guests do: by the bit if it is there, else by the register. What it found is left at
/// `SEEN`, a byte for each interrupt.
fn ends_by_bit(a: &mut CodeAssembler) -> Code {
    let mut done = a.create_label();
    a.mov(esi, dword_ptr(SEEN as i32 + 0x40))?;
    a.inc(dword_ptr(SEEN as i32 + 0x40))?;
    a.btr(dword_ptr(PAGE as i32), 0)?;
    a.setc(byte_ptr(esi + SEEN as i32))?;
    a.jc(done)?;
    apic(a, 0xb0, 0)?;
    a.set_label(&mut done)?;
    a.out(0x91, al)?;
    a.iret()
}

#[test]
fn an_interrupt_may_be_ended_by_a_bit_in_memory() {
    let machine = Machine::new(
        true,
        &[&|a| {
            wrmsr(a, PV_EOI, PAGE as u32 | 1)?;
            // Input 9 of the I/O APIC, level-triggered, vector 61H.
            a.mov(ebx, 0xfec0_0000u32)?;
            a.mov(dword_ptr(ebx), 0x10 + 2 * 9)?;
            a.mov(dword_ptr(ebx + 0x10), 0x8061)?;
            a.out(0x80, al)?;
            a.sti()?;
            let mut top = a.create_label();
            a.set_label(&mut top)?;
            a.hlt()?;
            a.jmp(top)
        }],
    );
    machine.handler(ends_by_bit);
    assert!(!machine.set_msr(PV_EOI, PAGE | 2), "not aligned");
    assert!(!machine.set_msr(PV_EOI, RAM | 1), "no memory");
    let isr = || machine.client.get::<[u32; 256]>(machine.vcpus[0].0, KVM_GET_LAPIC)[0x100 / 4..0x180 / 4].to_vec();
    machine.run(0);
    let found = |n: u64| machine.client.memory.load_u8(SEEN + n).unwrap();
    // The same again comes only because the first has ended.
    for n in 0..3 {
        machine.signal_msi(0x51);
        machine.run(0);
        assert_eq!(found(n), 1);
        assert!(isr().iter().all(|&word| word == 0), "{n}");
    }
    // Another waits, whose delivery the end lets through: it must be heard of.
    machine.signal_msi(0x52);
    machine.signal_msi(0x41);
    machine.run(0);
    assert_eq!(found(3), 0);
    machine.run(0);
    assert_eq!(found(4), 1);
    // The I/O APIC waits for the end.
    let line = |level: u32| {
        let input = [9, level];
        machine.client.file(machine.vm).ioctl(&*machine.client, KVM_IRQ_LINE_STATUS, 0, input.as_bytes()).unwrap();
    };
    line(1);
    machine.run(0);
    assert_eq!(found(5), 0);
    // And as the line is still high, it comes again.
    machine.run(0);
    assert_eq!(found(6), 0);
    line(0);
    assert_eq!(machine.msr(PV_EOI), Some(PAGE | 1));
}

#[test]
fn registers_show_what_was_ended_by_the_bit() {
    // In x2APIC mode registers are read without an exit.
    let machine = Machine::new(
        true,
        &[&|a| {
            wrmsr(a, 0x1b, 0xfee0_0d00)?;
            wrmsr(a, 0x80f, 0x1ff)?;
            wrmsr(a, PV_EOI, PAGE as u32 | 1)?;
            a.out(0x80, al)?;
            a.sti()?;
            let mut top = a.create_label();
            a.set_label(&mut top)?;
            a.nop()?;
            a.jmp(top)
        }],
    );
    machine.handler(|a| {
        // ISR of vectors 40H to 5FH, before and after the end, and PPR.
        a.mov(ecx, 0x812)?;
        a.rdmsr()?;
        a.mov(dword_ptr(SEEN as i32), eax)?;
        a.sti()?;
        a.out(0x90, al)?;
        a.cli()?;
        a.btr(dword_ptr(PAGE as i32), 0)?;
        a.setc(byte_ptr(SEEN as i32 + 4))?;
        a.mov(ecx, 0x812)?;
        a.rdmsr()?;
        a.mov(dword_ptr(SEEN as i32 + 8), eax)?;
        a.mov(ecx, 0x80a)?;
        a.rdmsr()?;
        a.mov(dword_ptr(SEEN as i32 + 12), eax)?;
        a.out(0x91, al)?;
        a.iret()
    });
    let vcpu = machine.vcpus[0].0;
    let mut bytes = vec![1, 0, 0, 0, 0, 0, 0, 0];
    bytes.extend(kvm_cpuid_entry2 { function: 1, ecx: 1 << 21, edx: 1 << 9, ..Plain::zeroed() }.as_bytes());
    machine.client.ioctl_bytes(vcpu, KVM_SET_CPUID2, bytes).unwrap();
    machine.client.memory.write(SEEN, &[0xee; 16]).unwrap();
    machine.run(0);
    machine.signal_msi(0x51);
    machine.run(0);
    assert_eq!(machine.seen(0), 1 << 0x11);
    machine.run(0);
    assert_eq!(machine.seen(4) & 0xff, 1);
    assert_eq!([8, 12].map(|at| machine.seen(at)), [0, 0]);
}
