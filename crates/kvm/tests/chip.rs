//! Guests with interrupt controllers in the kernel. What must happen is the SDM's and api.rst's; no guest here needs user
//! space before it says so with an OUT.

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::{Duration, Instant};

use common::{FIRST_EVENT, FakeClient};
use iced_x86::code_asm::*;
use kvm::Kvm;
use kvm_abi::consts::*;
use kvm_abi::request::*;
use kvm_abi::{Plain, kvm_interrupt, kvm_mp_state, kvm_msi, kvm_regs, kvm_sregs};
use mmu::Mapping;
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

const RAM: u64 = 0x1_0000;
const CODE: u64 = 0x1000;
/// Where the handler of every vector that is used starts.
const HANDLER: u64 = 0x2000;
/// Page of a start-up IPI.
const START_UP_PAGE: u64 = 3;
const APIC: u64 = 0xfee0_0000;
/// Ports with which guests say where they are.
const HANDLED: u32 = 0x80;
const STARTED: u32 = 0x81;

/// Which controllers.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Whole,
    Split,
}

struct Machine {
    kvm: Arc<Kvm>,
    client: Arc<FakeClient>,
    vm: i32,
    vcpus: Vec<(i32, Arc<Mapping>)>,
}

fn assemble(at: u64, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(16).unwrap();
    code(&mut a).unwrap();
    a.assemble(at).unwrap()
}

/// Writes a register of the local APIC; DS reaches all of memory.
fn apic(a: &mut CodeAssembler, offset: u64, value: u32) -> Result<(), IcedError> {
    a.mov(ebx, (APIC + offset) as u32)?;
    a.mov(dword_ptr(ebx), value)
}

impl Machine {
    /// vCPU 0 in real mode at `code`, its APIC enabled. Every vector's handler says so, ends the interrupt, and returns.
    fn new(kind: Kind, vcpus: u32, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Self {
        let kvm = Kvm::new();
        let client = FakeClient::with(&kvm);
        let vm = client.vm_with_ram(RAM);
        match kind {
            Kind::Whole => client.ioctl(vm, KVM_CREATE_IRQCHIP, 0).map(drop).unwrap(),
            Kind::Split => {
                client.enable(vm, KVM_CAP_SPLIT_IRQCHIP, 24).map(drop).unwrap();
            }
        }
        let code = assemble(CODE, |a| {
            apic(a, 0xf0, 0x1ff)?;
            code(a)
        });
        client.memory.write(CODE, &code).unwrap();
        let handler = assemble(HANDLER, |a| {
            a.out(HANDLED, al)?;
            apic(a, 0xb0, 0)?;
            a.iret()
        });
        client.memory.write(HANDLER, &handler).unwrap();
        for vector in 0..256 {
            client.memory.store_u32(4 * vector, HANDLER as u32).unwrap();
        }
        let vcpus: Vec<_> = (0..vcpus)
            .map(|id| {
                let fd = client.ioctl(vm, KVM_CREATE_VCPU, id.into()).unwrap();
                (fd, client.map(fd))
            })
            .collect();
        let machine = Self { kvm, client, vm, vcpus };
        let fd = machine.vcpus[0].0;
        let mut sregs: kvm_sregs = machine.client.get(fd, KVM_GET_SREGS);
        (sregs.cs.base, sregs.cs.selector, sregs.ds.limit, sregs.ds.g) = (0, 0, 0xffff_ffff, 1);
        machine.client.set(fd, KVM_SET_SREGS, &sregs).unwrap();
        let mut regs: kvm_regs = machine.client.get(fd, KVM_GET_REGS);
        (regs.rip, regs.rsp, regs.rflags) = (CODE, 0x8000, 2);
        machine.client.set(fd, KVM_SET_REGS, &regs).unwrap();
        machine
    }

    /// Exit reason, and the port of an OUT.
    fn run(&self, vcpu: usize) -> Result<(u32, u16), Errno> {
        self.run_by(&self.client, vcpu)
    }

    fn run_by(&self, client: &FakeClient, vcpu: usize) -> Result<(u32, u16), Errno> {
        let (fd, page) = &self.vcpus[vcpu];
        client.ioctl(*fd, KVM_RUN, 0)?;
        Ok((page.load_u32(8).unwrap(), page.load_u32(32).unwrap().wrapping_shr(16) as u16))
    }

    /// Waits until a vCPU has executed `count` HLT. It goes to sleep then, or is about to.
    fn wait_for_halt(&self, vcpu: usize, count: u64) {
        let deadline = Instant::now() + Duration::from_secs(50);
        while self.kvm.status().vms[0].vcpus[vcpu].vmx_exits.get("HLT").is_none_or(|halts| *halts < count) {
            assert!(Instant::now() < deadline, "vCPU {vcpu} does not halt");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn signal_msi(&self, vector: u8) -> Result<i32, Errno> {
        let msi = kvm_msi { address_lo: APIC as u32, data: vector.into(), ..Plain::zeroed() };
        // Not through the memory that all threads' arguments share.
        let input = msi.as_bytes();
        self.client.file(self.vm).ioctl(&*self.client, KVM_SIGNAL_MSI, 0, input).map(|reply| reply.ret)
    }

    fn mp_state(&self, vcpu: usize) -> u32 {
        self.client.get::<kvm_mp_state>(self.vcpus[vcpu].0, KVM_GET_MP_STATE).mp_state
    }

    fn line(&self, gsi: u32, level: u32) -> i32 {
        let input = [gsi, level];
        let reply = self.client.file(self.vm).ioctl(&*self.client, KVM_IRQ_LINE_STATUS, 0, input.as_bytes()).unwrap();
        <[u32; 2]>::from_bytes(&reply.output).unwrap()[0] as i32
    }

    /// Inputs of the I/O APIC that are high: `struct kvm_ioapic_state`, irr.
    fn ioapic_irr(&self) -> u32 {
        let mut chip = [0u32; 130];
        chip[0] = KVM_IRQCHIP_IOAPIC;
        self.client.ioctl_with(self.vm, KVM_GET_IRQCHIP, &mut chip).unwrap();
        chip[6]
    }

    fn msi_route(&self, gsi: u32, data: u32) {
        let mut bytes = vec![1, 0, 0, 0, 0, 0, 0, 0];
        let entry = [gsi, KVM_IRQ_ROUTING_MSI, 0, 0, APIC as u32, 0, data, 0, 0, 0, 0, 0];
        bytes.extend(entry.iter().flat_map(|word| word.to_le_bytes()));
        self.client.ioctl_bytes(self.vm, KVM_SET_GSI_ROUTING, bytes).unwrap();
    }
}

const OUT: fn(u32) -> (u32, u16) = |port| (KVM_EXIT_IO, port as u16);

/// PICs with vectors from 20H, all inputs but `open` of the first masked.
fn set_up_pics(a: &mut CodeAssembler, open: u32) -> Result<(), IcedError> {
    for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xff & !open), (0xa1, 0xff)] {
        a.mov(al, value)?;
        a.out(port, al)?;
    }
    Ok(())
}

fn halts(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.sti()?;
    a.hlt()
}

fn spins(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.sti()?;
    a.set_label(&mut top)?;
    a.nop()?;
    a.jmp(top)
}

#[test]
fn timer_ends_a_halt_and_interrupts_a_loop() {
    for end in [halts, spins] {
        let machine = Machine::new(Kind::Whole, 1, |a| {
            apic(a, 0x320, 0x40)?;
            apic(a, 0x3e0, 0xb)?;
            apic(a, 0x380, 30_000_000)?;
            end(a)
        });
        let start = Instant::now();
        assert_eq!(machine.run(0), Ok(OUT(HANDLED)));
        assert!(start.elapsed() >= Duration::from_millis(29), "{:?}", start.elapsed());
    }
}

#[test]
fn periodic_timer_comes_again() {
    let machine = Machine::new(Kind::Whole, 1, |a| {
        apic(a, 0x320, 0x2_0040)?;
        apic(a, 0x3e0, 0xb)?;
        apic(a, 0x380, 5_000_000)?;
        spins(a)
    });
    let start = Instant::now();
    for _ in 0..6 {
        assert_eq!(machine.run(0), Ok(OUT(HANDLED)));
    }
    assert!(start.elapsed() >= Duration::from_millis(29), "{:?}", start.elapsed());
}

#[test]
fn tsc_deadline_fires() {
    for end in [halts, spins] {
        let machine = Machine::new(Kind::Whole, 1, |a| {
            apic(a, 0x320, 0x4_0040)?;
            a.rdtsc()?;
            a.add(eax, 50_000_000)?;
            a.adc(edx, 0)?;
            a.mov(ecx, 0x6e0)?;
            a.wrmsr()?;
            end(a)
        });
        let start = Instant::now();
        assert_eq!(machine.run(0), Ok(OUT(HANDLED)));
        let khz = machine.client.ioctl(machine.vcpus[0].0, KVM_GET_TSC_KHZ, 0).unwrap() as u64;
        assert!(start.elapsed() >= Duration::from_micros(50_000_000_000 / khz - 1000), "{:?}", start.elapsed());
    }
}

#[test]
fn pit_ticks_through_the_pic() {
    let machine = Machine::new(Kind::Whole, 1, |a| {
        set_up_pics(a, 1 << 0)?;
        for (port, value) in [(0x43, 0x34), (0x40, 0), (0x40, 0x40)] {
            a.mov(al, value)?;
            a.out(port, al)?;
        }
        halts(a)
    });
    machine.client.set(machine.vm, KVM_CREATE_PIT2, &[0u32; 16]).unwrap();
    assert_eq!(machine.run(0), Ok(OUT(HANDLED)));
}

#[test]
fn lines_end_a_halt_by_pic_and_ioapic() {
    let machine = Machine::new(Kind::Whole, 1, |a| {
        set_up_pics(a, 1 << 4)?;
        halts(a)?;
        // Then input 9 of the I/O APIC, level-triggered.
        a.mov(ebx, 0xfec0_0000u32)?;
        a.mov(dword_ptr(ebx), 0x10 + 2 * 9)?;
        a.mov(dword_ptr(ebx + 0x10), 0x8051)?;
        a.hlt()?;
        a.out(STARTED, al)
    });
    thread::scope(|scope| {
        scope.spawn(|| {
            machine.wait_for_halt(0, 1);
            assert_eq!(machine.line(4, 1), 1, "the I/O APIC masks it");
        });
        assert_eq!(machine.run(0), Ok(OUT(HANDLED)));
    });
    thread::scope(|scope| {
        scope.spawn(|| {
            machine.wait_for_halt(0, 2);
            assert_eq!(machine.line(9, 1), 1, "the PIC masks it");
        });
        assert_eq!(machine.run(0), Ok(OUT(HANDLED)));
    });
    assert_eq!(machine.line(9, 0), 1);
    assert_eq!(machine.run(0), Ok(OUT(STARTED)));
}

/// api.rst `KVM_IRQ_LINE`: 1 is asserted, whatever polarity the guest has told the I/O APIC (bit 13 of an entry:
/// `KVM_CAP_IOAPIC_POLARITY_IGNORED`).
#[test]
fn the_polarity_of_an_input_is_ignored() {
    const ACTIVE_LOW: u32 = 1 << 13;
    const LEVEL: u32 = 1 << 15;
    for mode in [0, LEVEL] {
        let machine = Machine::new(Kind::Whole, 1, |a| {
            set_up_pics(a, 0)?;
            a.mov(ebx, 0xfec0_0000u32)?;
            a.mov(dword_ptr(ebx), 0x10 + 2 * 9)?;
            a.mov(dword_ptr(ebx + 0x10), 0x51 | ACTIVE_LOW | mode)?;
            a.out(STARTED, al)?;
            // An entry reads as it was written.
            a.mov(eax, dword_ptr(ebx + 0x10))?;
            a.sti()?;
            a.nop()?;
            a.out(STARTED, al)?;
            a.nop()?;
            a.out(STARTED, al)
        });
        let cap = u64::from(KVM_CAP_IOAPIC_POLARITY_IGNORED);
        assert_eq!(machine.client.ioctl(machine.vm, KVM_CHECK_EXTENSION, cap), Ok(1));
        assert_eq!(machine.run(0), Ok(OUT(STARTED)));
        // Inactive, as it was: nothing comes of it.
        assert_eq!(machine.line(9, 0), 1, "{mode:x}");
        assert_eq!(machine.run(0), Ok(OUT(STARTED)), "{mode:x}");
        let regs: kvm_regs = machine.client.get(machine.vcpus[0].0, KVM_GET_REGS);
        assert_eq!(regs.rax & u64::from(ACTIVE_LOW), u64::from(ACTIVE_LOW), "{mode:x}");
        assert_eq!(machine.line(9, 1), 1, "{mode:x}");
        assert_eq!(machine.run(0), Ok(OUT(HANDLED)), "{mode:x}");
        assert_eq!(machine.line(9, 0), 1, "{mode:x}");
        assert_eq!(machine.run(0), Ok(OUT(STARTED)), "{mode:x}");
    }
}

/// Also when nobody but the client's own answer tells of the signal.
#[test]
fn halt_sleeps_until_a_signal_and_goes_on() {
    for silent in [false, true] {
        let machine = Machine::new(Kind::Whole, 1, |a| {
            halts(a)?;
            a.out(STARTED, al)
        });
        machine.client.silent.store(silent, Relaxed);
        thread::scope(|scope| {
            scope.spawn(|| {
                machine.wait_for_halt(0, 1);
                machine.client.raise();
            });
            assert_eq!(machine.run(0), Err(Errno::EINTR));
        });
        assert_eq!(machine.vcpus[0].1.load_u32(8), Some(KVM_EXIT_INTR));
        assert_eq!(machine.mp_state(0), KVM_MP_STATE_HALTED);
        machine.client.consume_signal();
        assert_eq!(machine.signal_msi(0x44), Ok(1));
        assert_eq!(machine.run(0), Ok(OUT(HANDLED)));
        assert_eq!(machine.run(0), Ok(OUT(STARTED)));
    }
}

/// A message comes at any moment between the last handler and the sleep.
#[test]
fn no_message_to_a_processor_about_to_halt_is_lost() {
    const MESSAGES: u32 = 2000;
    let machine = Machine::new(Kind::Whole, 1, |a| {
        let mut top = a.create_label();
        a.out(STARTED, al)?;
        a.set_label(&mut top)?;
        halts(a)?;
        a.jmp(top)
    });
    assert_eq!(machine.run(0), Ok(OUT(STARTED)));
    let (send, wanted) = std::sync::mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            for () in wanted {
                assert_eq!(machine.signal_msi(0x44), Ok(1));
            }
        });
        for message in 0..MESSAGES {
            send.send(()).unwrap();
            // Half of them while the guest is on its way, half when it sleeps.
            if message % 2 == 0 {
                thread::yield_now();
            }
            assert_eq!(machine.run(0), Ok(OUT(HANDLED)), "{message}");
        }
        drop(send);
    });
}

/// Two processors wake each other by turns, without user space.
#[test]
fn no_message_between_processors_is_lost() {
    const VECTOR: u32 = 0x50;
    const ROUNDS: u32 = 1000;
    let machine = Machine::new(Kind::Whole, 2, |a| {
        let mut top = a.create_label();
        a.mov(esi, ROUNDS)?;
        apic(a, 0x310, 1 << 24)?;
        apic(a, 0x300, 0x4500)?;
        apic(a, 0x300, 0x4600 | START_UP_PAGE as u32)?;
        halts(a)?;
        a.set_label(&mut top)?;
        a.cli()?;
        apic(a, 0x300, 0x4000 | VECTOR)?;
        halts(a)?;
        a.dec(esi)?;
        a.jne(top)?;
        a.out(STARTED, al)
    });
    let handler = assemble(HANDLER, |a| {
        apic(a, 0xb0, 0)?;
        a.iret()
    });
    machine.client.memory.write(HANDLER, &handler).unwrap();
    let second = assemble(0, |a| {
        let mut top = a.create_label();
        a.mov(sp, 0x7000)?;
        apic(a, 0xf0, 0x1ff)?;
        apic(a, 0x310, 0)?;
        a.set_label(&mut top)?;
        apic(a, 0x300, 0x4000 | VECTOR)?;
        halts(a)?;
        a.cli()?;
        a.jmp(top)
    });
    machine.client.memory.write(START_UP_PAGE << 12, &second).unwrap();
    let client = machine.client.thread();
    thread::scope(|scope| {
        scope.spawn(|| {
            assert_eq!(machine.run_by(&client, 1), Err(Errno::EAGAIN));
            // Real mode as INIT leaves it does not reach the APIC.
            let mut sregs: kvm_sregs = machine.client.get(machine.vcpus[1].0, KVM_GET_SREGS);
            (sregs.ds.limit, sregs.ds.g) = (0xffff_ffff, 1);
            machine.client.set(machine.vcpus[1].0, KVM_SET_SREGS, &sregs).unwrap();
            assert_eq!(machine.run_by(&client, 1), Err(Errno::EINTR));
        });
        assert_eq!(machine.run(0), Ok(OUT(STARTED)));
        client.raise();
    });
}

#[test]
fn masked_interrupts_wait_for_sti_and_for_cr8() {
    let machine = Machine::new(Kind::Whole, 1, |a| {
        apic(a, 0x80, 0x50)?;
        apic(a, 0x300, 0x4_4045)?;
        a.sti()?;
        a.nop()?;
        a.out(STARTED, al)?;
        apic(a, 0x80, 0x30)?;
        a.nop()?;
        a.out(STARTED, al)
    });
    assert_eq!(machine.run(0), Ok(OUT(STARTED)));
    let sregs: kvm_sregs = machine.client.get(machine.vcpus[0].0, KVM_GET_SREGS);
    assert_eq!((sregs.cr8, machine.vcpus[0].1.load_u64(16)), (5, Some(5)), "the task priority shows everywhere");
    assert_eq!(machine.run(0), Ok(OUT(HANDLED)));
    assert_eq!(machine.run(0), Ok(OUT(STARTED)));
}

/// The second processor waits in KVM_RUN for INIT, gets EAGAIN once, starts where the IPI says, and interrupts the first
/// by an x2APIC message.
#[test]
fn second_processor_starts_and_interrupts_the_first() {
    let machine = Machine::new(Kind::Whole, 2, |a| {
        apic(a, 0x310, 1 << 24)?;
        apic(a, 0x300, 0x4500)?;
        apic(a, 0x300, 0x4600 | START_UP_PAGE as u32)?;
        halts(a)
    });
    let start = assemble(0, |a| {
        a.out(STARTED, al)?;
        for (register, low) in [(0x1b, 0xfee0_0c00u32), (0x80f, 0x1ff), (0x830, 0x4046)] {
            a.mov(ecx, register)?;
            a.mov(eax, low)?;
            a.xor(edx, edx)?;
            a.wrmsr()?;
        }
        a.hlt()
    });
    machine.client.memory.write(START_UP_PAGE << 12, &start).unwrap();
    let second = machine.vcpus[1].0;
    let mut cpuid = vec![1, 0, 0, 0, 0, 0, 0, 0];
    let leaf = [1u32, 0, 0, 0x600, 0, 1 << 21, 1 << 9 | 1 << 5, 0, 0, 0];
    cpuid.extend(leaf.iter().flat_map(|word| word.to_le_bytes()));
    machine.client.ioctl_bytes(second, KVM_SET_CPUID2, cpuid).unwrap();
    assert_eq!((machine.mp_state(0), machine.mp_state(1)), (KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED));
    let client = machine.client.thread();
    thread::scope(|scope| {
        scope.spawn(|| {
            assert_eq!(machine.run_by(&client, 1), Err(Errno::EAGAIN));
            let started = loop {
                // The start-up IPI may come after INIT was told of.
                match machine.run_by(&client, 1) {
                    Err(Errno::EAGAIN) => {}
                    result => break result,
                }
            };
            assert_eq!(started, Ok(OUT(STARTED)));
            // Halts for good with interrupts off.
            scope.spawn(|| {
                machine.wait_for_halt(1, 1);
                client.raise();
            });
            assert_eq!(machine.run_by(&client, 1), Err(Errno::EINTR));
        });
        assert_eq!(machine.run(0), Ok(OUT(HANDLED)));
    });
}

#[test]
fn eventfd_interrupts_without_an_ioctl() {
    let machine = Machine::new(Kind::Whole, 1, halts);
    machine.msi_route(5, 0x47);
    let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).unwrap();
    let fd = machine.client.adopt(&event) as u32;
    machine.client.set(machine.vm, KVM_IRQFD, &[fd, 5, 0, 0, 0, 0, 0, 0]).unwrap();
    assert_eq!(machine.client.set(machine.vm, KVM_IRQFD, &[fd, 6, 0, 0, 0, 0, 0, 0]), Err(Errno::EBUSY));
    thread::scope(|scope| {
        scope.spawn(|| {
            machine.wait_for_halt(0, 1);
            event.write(1).unwrap();
        });
        assert_eq!(machine.run(0), Ok(OUT(HANDLED)));
    });
    machine.client.set(machine.vm, KVM_IRQFD, &[fd, 5, KVM_IRQFD_FLAG_DEASSIGN, 0, 0, 0, 0, 0]).unwrap();
    machine.client.set(machine.vm, KVM_IRQFD, &[fd, 6, 0, 0, 0, 0, 0, 0]).unwrap();
    let nothing = [FIRST_EVENT as u32 + 9, 6, 0, 0, 0, 0, 0, 0];
    assert_eq!(machine.client.set(machine.vm, KVM_IRQFD, &nothing), Err(Errno::EBADF));
}

#[test]
fn resampling_lets_the_line_go_at_the_eoi() {
    let machine = Machine::new(Kind::Whole, 1, |a| {
        set_up_pics(a, 0)?;
        a.mov(ebx, 0xfec0_0000u32)?;
        a.mov(dword_ptr(ebx), 0x10 + 2 * 10)?;
        a.mov(dword_ptr(ebx + 0x10), 0x8052)?;
        halts(a)?;
        a.out(STARTED, al)
    });
    let [event, resample] = [(); 2].map(|()| EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap());
    let fds = [&event, &resample].map(|fd| machine.client.adopt(fd) as u32);
    let argument = [fds[0], 10, KVM_IRQFD_FLAG_RESAMPLE, fds[1], 0, 0, 0, 0];
    machine.client.set(machine.vm, KVM_IRQFD, &argument).unwrap();
    event.write(1).unwrap();
    assert_eq!(machine.run(0), Ok(OUT(HANDLED)));
    assert_eq!(resample.read(), Err(Errno::EAGAIN), "not before the EOI");
    assert_eq!(machine.run(0), Ok(OUT(STARTED)));
    assert_eq!(resample.read(), Ok(1));
}

/// Two devices at one line, each in a thread of its own as crosvm's are in processes: who is told of the EOI and has something left to
/// say signals again. Their line is let go with the last of them.
#[test]
fn devices_that_share_a_line_interrupt_until_all_are_served() {
    const PENDING: u64 = 3;
    let machine = Machine::new(Kind::Whole, 1, |a| {
        let mut again = a.create_label();
        set_up_pics(a, 0)?;
        a.mov(ebx, 0xfec0_0000u32)?;
        a.mov(dword_ptr(ebx), 0x10 + 2 * 10)?;
        a.mov(dword_ptr(ebx + 0x10), 0x8052)?;
        a.set_label(&mut again)?;
        halts(a)?;
        a.jmp(again)
    });
    let events = || [(); 2].map(|()| EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap());
    let devices = [events(), events()];
    let fds = devices.each_ref().map(|device| device.each_ref().map(|fd| machine.client.adopt(fd) as u32));
    for [event, resample] in fds {
        let argument = [event, 10, KVM_IRQFD_FLAG_RESAMPLE, resample, 0, 0, 0, 0];
        machine.client.set(machine.vm, KVM_IRQFD, &argument).unwrap();
    }
    // How many requests each has to tell of; the handler serves one of each at its OUT.
    let pending = [PENDING, 1].map(std::sync::atomic::AtomicU64::new);
    let done = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        for ([event, resample], pending) in devices.iter().zip(&pending) {
            event.write(1).unwrap();
            scope.spawn(|| {
                while !done.load(Relaxed) {
                    if resample.read().is_ok() && pending.load(Relaxed) > 0 {
                        event.write(1).unwrap();
                    }
                    thread::sleep(Duration::from_millis(1));
                }
            });
        }
        for left in (0..PENDING).rev() {
            assert_eq!(machine.run(0), Ok(OUT(HANDLED)), "{left} left");
            for pending in &pending {
                let _ = pending.fetch_update(Relaxed, Relaxed, |count| count.checked_sub(1));
            }
        }
        done.store(true, Relaxed);
    });
    assert_eq!(pending.map(|pending| pending.into_inner()), [0; 2]);
    // The last interrupt has no EOI yet. Without anybody at the line it is low (`irqfd_resampler_shutdown`).
    assert_ne!(machine.ioapic_irr() & 1 << 10, 0);
    for ([event, _], low) in fds.into_iter().zip([false, true]) {
        machine.client.set(machine.vm, KVM_IRQFD, &[event, 10, KVM_IRQFD_FLAG_DEASSIGN, 0, 0, 0, 0, 0]).unwrap();
        assert_eq!(machine.ioapic_irr() & 1 << 10 == 0, low);
    }
}

#[test]
fn eventfds_take_writes_that_match() {
    let machine = Machine::new(Kind::Whole, 1, |a| {
        a.mov(ax, 7)?;
        a.mov(dx, 0x1234)?;
        a.out(dx, ax)?;
        a.mov(ebx, 0x10_0000)?;
        a.mov(byte_ptr(ebx), 1)?;
        a.mov(dword_ptr(ebx), 1)?;
        a.mov(ax, 8)?;
        a.out(dx, ax)
    });
    let [port, memory] = [(); 2].map(|()| EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap());
    let fds = [&port, &memory].map(|fd| machine.client.adopt(fd) as u32);
    let words = |datamatch, addr, len, fd, flags| {
        let mut words = [0u32; 16];
        (words[0], words[2], words[4], words[5], words[6]) = (datamatch, addr, len, fd, flags);
        words
    };
    // KVM_IOEVENTFD_FLAG_DATAMATCH and _PIO.
    let by_port = words(7, 0x1234, 2, fds[0], 0b011);
    machine.client.set(machine.vm, KVM_IOEVENTFD, &by_port).unwrap();
    assert_eq!(machine.client.set(machine.vm, KVM_IOEVENTFD, &by_port), Err(Errno::EEXIST));
    machine.client.set(machine.vm, KVM_IOEVENTFD, &words(0, 0x10_0000, 0, fds[1], 0)).unwrap();
    assert_eq!(machine.run(0), Ok(OUT(0x1234)), "the value that does not match");
    assert_eq!((port.read(), memory.read()), (Ok(1), Ok(2)));
    let gone = words(7, 0x1234, 2, fds[0], 0b111);
    machine.client.set(machine.vm, KVM_IOEVENTFD, &gone).unwrap();
    assert_eq!(machine.client.set(machine.vm, KVM_IOEVENTFD, &gone), Err(Errno::ENOENT));
}

#[test]
fn split_tells_of_the_eoi_and_takes_external_interrupts() {
    let machine = Machine::new(Kind::Split, 1, |a| {
        apic(a, 0x350, 0x700)?;
        a.out(STARTED, al)?;
        halts(a)?;
        a.hlt()
    });
    machine.msi_route(3, 0x8053);
    assert_eq!(machine.run(0), Ok(OUT(STARTED)));
    assert_eq!(machine.line(3, 1), 1);
    assert_eq!(machine.run(0), Ok(OUT(HANDLED)));
    assert_eq!(machine.run(0).map(|(reason, _)| reason), Ok(KVM_EXIT_IOAPIC_EOI));
    assert_eq!(machine.vcpus[0].1.load_u8(32), Some(0x53));
    let interrupt = kvm_interrupt { irq: 0x60 };
    machine.client.set(machine.vcpus[0].0, KVM_INTERRUPT, &interrupt).unwrap();
    assert_eq!(machine.client.set(machine.vcpus[0].0, KVM_INTERRUPT, &interrupt), Err(Errno::EEXIST));
    assert_eq!(machine.run(0), Ok(OUT(HANDLED)));
    // Without the chips their ioctls fail as in Linux.
    assert_eq!(machine.client.ioctl_bytes(machine.vm, KVM_GET_IRQCHIP, vec![0; 520]).err(), Some(Errno::ENXIO));
    assert_eq!(machine.client.set(machine.vm, KVM_CREATE_PIT2, &[0u32; 16]), Err(Errno::ENOENT));
}

/// User space holds an interrupt while LINT0 is closed: nothing exits. Behind HLT it is asked for it.
#[test]
fn split_asks_for_interrupts_when_lint0_lets_them_through() {
    let machine = Machine::new(Kind::Split, 1, |a| {
        apic(a, 0x350, 0x1_0700)?;
        a.sti()?;
        a.nop()?;
        a.nop()?;
        a.out(STARTED, al)?;
        a.cli()?;
        apic(a, 0x350, 0x700)?;
        halts(a)
    });
    let page = &machine.vcpus[0].1;
    // request_interrupt_window; ready_for_interrupt_injection is byte 12.
    page.store_u8(0, 1).unwrap();
    assert_eq!(machine.run(0), Ok(OUT(STARTED)));
    assert_eq!(page.load_u8(12), Some(0));
    assert_eq!(machine.run(0).map(|(reason, _)| reason), Ok(KVM_EXIT_IRQ_WINDOW_OPEN));
    assert_eq!((page.load_u8(12), machine.mp_state(0)), (Some(1), KVM_MP_STATE_HALTED));
    page.store_u8(0, 0).unwrap();
    machine.client.set(machine.vcpus[0].0, KVM_INTERRUPT, &kvm_interrupt { irq: 0x60 }).unwrap();
    assert_eq!(machine.run(0), Ok(OUT(HANDLED)));
}

#[test]
fn controllers_are_made_once_and_before_vcpus() {
    let machine = Machine::new(Kind::Whole, 1, halts);
    assert_eq!(machine.client.ioctl(machine.vm, KVM_CREATE_IRQCHIP, 0), Err(Errno::EEXIST));
    assert_eq!(machine.client.set(machine.vcpus[0].0, KVM_INTERRUPT, &kvm_interrupt { irq: 32 }), Err(Errno::ENXIO));
    assert_eq!(machine.signal_msi(0x40), Ok(0), "the APIC is not enabled yet");
    let nobody = kvm_msi { address_lo: APIC as u32 | 7 << 12, data: 0x40, ..Plain::zeroed() };
    assert_eq!(machine.client.set(machine.vm, KVM_SIGNAL_MSI, &nobody), Err(Errno::EPERM));
    let client = FakeClient::new();
    let vm = client.ioctl(0, KVM_CREATE_VM, 0).unwrap();
    let fd = client.adopt(EventFd::from_flags(EfdFlags::EFD_CLOEXEC).unwrap()) as u32;
    assert_eq!(client.set(vm, KVM_IRQFD, &[fd, 5, 0, 0, 0, 0, 0, 0]), Err(Errno::EINVAL));
    assert_eq!(client.set(vm, KVM_IRQFD, &[fd, 5, KVM_IRQFD_FLAG_DEASSIGN, 0, 0, 0, 0, 0]), Ok(0));
    assert_eq!(client.set(vm, KVM_IRQ_LINE, &[4u32, 1]), Err(Errno::ENXIO));
    assert_eq!(client.set::<kvm_msi>(vm, KVM_SIGNAL_MSI, &Plain::zeroed()), Err(Errno::EINVAL));
    let vcpu = client.ioctl(vm, KVM_CREATE_VCPU, 0).unwrap();
    assert_eq!(client.ioctl(vm, KVM_CREATE_IRQCHIP, 0), Err(Errno::EINVAL));
    assert_eq!(client.set(vcpu, KVM_SET_LAPIC, &[0u32; 256]), Err(Errno::EINVAL));
}

/// The header's first ioctls of the timer: `KVM_GET_PIT` is `KVM_GET_PIT2` without its flags.
#[test]
fn the_timer_by_its_first_ioctls() {
    let client = FakeClient::new();
    let vm = client.ioctl(0, KVM_CREATE_VM, 0).unwrap();
    assert_eq!(client.ioctl(vm, KVM_CREATE_PIT, 0), Err(Errno::ENOENT));
    client.ioctl(vm, KVM_CREATE_IRQCHIP, 0).unwrap();
    let mut state = [0u32; 18];
    assert_eq!(client.ioctl_with(vm, KVM_GET_PIT, &mut state), Err(Errno::ENXIO));
    client.ioctl(vm, KVM_CREATE_PIT, 0).unwrap();
    assert_eq!(client.ioctl(vm, KVM_CREATE_PIT2, common::SCRATCH), Err(Errno::EEXIST));
    client.ioctl_with(vm, KVM_GET_PIT, &mut state).unwrap();
    assert_eq!(state[0], 0x1_0000);
    // Channel 0: count, then mode 2 with both bytes, as a BIOS leaves it.
    (state[0], state[3]) = (1193, state[3] & 0xff00_0000 | 2 << 8 | 3);
    client.ioctl_with(vm, KVM_SET_PIT, &mut state.clone()).unwrap();
    let second: [u32; 28] = client.get(vm, KVM_GET_PIT2);
    let mut first = [0u32; 18];
    client.ioctl_with(vm, KVM_GET_PIT, &mut first).unwrap();
    assert_eq!(first, second[..18]);
    assert_eq!((first[0], first[3] & 0xffff), (1193, 2 << 8 | 3));
}
