//! A VMM as libkvm and kvmctl were in 2007: two slots around a hole, a "silly APIC" of eight ports in user space, a
//! thread per vCPU, interrupts between processors as signals to these threads.
//!
//! Two things are ours: port [`END`] ends the run, as does an exit that kvmctl died of. kvmctl itself had to be killed.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;

use crate::guest::Image;
use crate::signal;
use crate::vmm::{Exit, Kvm, Ram, Vcpu, Vm};

/// Guest-physical end of RAM.
pub(crate) const RAM_END: u64 = 128 << 20;
/// What is no RAM: the window of the display and of option ROMs.
pub(crate) const HOLE: std::ops::Range<u64> = 0xa_0000..0xc_0000;
/// vCPUs that a VM of 2.6.23 can have.
pub(crate) const MAX_CPUS: usize = 4;

/// Ports of the silly APIC.
pub(crate) mod port {
    /// R: how many CPUs there are.
    pub(crate) const CPUS: u16 = 0x1000;
    /// R: the number of the CPU that asks.
    pub(crate) const OWN_ID: u16 = 0x1004;
    /// RW: where CPUs that are started begin.
    pub(crate) const START_ADDRESS: u16 = 0x1008;
    /// W: starts the CPU of that number.
    pub(crate) const START: u16 = 0x100c;
    /// RW: the vector of interrupts between CPUs.
    pub(crate) const IPI_VECTOR: u16 = 0x1010;
    /// W: interrupts the CPU of that number.
    pub(crate) const IPI: u16 = 0x1014;
    /// All of them.
    pub(crate) const SILLY_APIC: std::ops::RangeInclusive<u16> = 0x1000..=0x10ff;
    /// W: `KVM_INTERRUPT` on CPU 0 with the byte as the vector.
    pub(crate) const INTERRUPT: u16 = 0xff;
    /// W: a serial port.
    pub(crate) const SERIAL: u16 = 0xf1;
    /// W: the guest is done.
    pub(crate) const END: u16 = 0xf4;
}

/// A VM with its memory.
pub(crate) struct Machine {
    pub(crate) vm: Vm,
    pub(crate) ram: Ram,
    vcpu0: Vcpu,
    /// What lies nowhere swallows writes and reads as ones, as a bus does. kvmctl died of it.
    pub(crate) has_bus: bool,
}

/// The lowest 640 KiB and everything from the BIOS up.
pub(crate) fn set_memory(vm: &Vm) -> Result<()> {
    vm.set_memory_region(3, 0, 0, HOLE.start).context("slot 3")?;
    vm.set_memory_region(0, 0, HOLE.end, RAM_END - HOLE.end).context("slot 0")
}

/// What the threads of a run share.
struct Run<'a> {
    vm: &'a Vm,
    vcpu0: &'a Vcpu,
    cpus: usize,
    has_bus: bool,
    start_address: AtomicU64,
    ipi_vector: AtomicU32,
    /// Threads by vCPU; 0: not yet there.
    threads: [AtomicU32; MAX_CPUS],
    starts: Mutex<Vec<Sender<u64>>>,
    ended: AtomicBool,
    lines: Mutex<Vec<String>>,
}

impl Machine {
    /// Slots, mapping and vCPU 0, in the order of libkvm, and `image` in memory.
    pub(crate) fn new(kvm: &Kvm, image: &Image) -> Result<Self> {
        let vm = kvm.create_vm()?;
        set_memory(&vm)?;
        let ram = vm.map(0, RAM_END)?;
        let vcpu0 = vm.create_vcpu(0)?;
        for (at, bytes) in &image.pieces {
            ram.write(*at, bytes);
        }
        Ok(Self { vm, ram, vcpu0, has_bus: false })
    }

    pub(crate) fn vcpu0(&self) -> &Vcpu {
        &self.vcpu0
    }

    /// Runs `cpus` vCPUs until the guest ends, and `beside` on this thread meanwhile. What kvmctl would have printed.
    pub(crate) fn run(&self, cpus: usize, beside: impl FnOnce() -> Result<()>) -> Result<Vec<String>> {
        assert!((1..=MAX_CPUS).contains(&cpus));
        signal::handle(signal::ipi());
        let (senders, receivers): (Vec<_>, Vec<_>) = (1..cpus).map(|_| channel()).unzip();
        let run = Run {
            vm: &self.vm,
            vcpu0: &self.vcpu0,
            cpus,
            has_bus: self.has_bus,
            start_address: AtomicU64::new(0),
            ipi_vector: AtomicU32::new(0xff),
            threads: Default::default(),
            starts: Mutex::new(senders),
            ended: AtomicBool::new(false),
            lines: Mutex::default(),
        };
        let run = &run;
        std::thread::scope(|scope| {
            let secondary = |(n, start)| scope.spawn(move || run.ending(|| run.secondary(n + 1, start)));
            let mut threads: Vec<_> = receivers.into_iter().enumerate().map(secondary).collect();
            threads.push(scope.spawn(|| {
                run.ending(|| {
                    // With all threads there, whoever is told to start or to wake is.
                    run.prepare(0, run.vcpu0)?;
                    run.loop_of(0, run.vcpu0)
                })
            }));
            let beside = run.ending(beside);
            let threads: Vec<_> = threads.into_iter().map(|t| t.join().expect("vCPU threads do not panic")).collect();
            threads.into_iter().collect::<Result<()>>().and(beside)
        })?;
        ensure!(signal::BOO.load(Ordering::Relaxed) == 0, "boo: the handler of the IPI signal has run");
        Ok(std::mem::take(&mut run.lines.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

impl Run<'_> {
    /// Ends the run if `body` fails.
    fn ending(&self, body: impl FnOnce() -> Result<()>) -> Result<()> {
        let result = body();
        if result.is_err() {
            self.end();
        }
        result
    }

    fn say(&self, line: String) {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    }

    /// Makes this thread that of vCPU `n`: the IPI signal is let through by `KVM_RUN` alone.
    fn prepare(&self, n: usize, vcpu: &Vcpu) -> Result<()> {
        let before = signal::block(signal::ipi());
        vcpu.set_signal_mask(before & !signal::bit(signal::ipi())).context("KVM_SET_SIGNAL_MASK")?;
        self.threads[n].store(signal::thread().cast_unsigned(), Ordering::Release);
        Ok(())
    }

    /// A CPU that another one starts: made and run by its own thread.
    fn secondary(&self, n: usize, start: Receiver<u64>) -> Result<()> {
        let vcpu = self.vm.create_vcpu(n.try_into()?)?;
        self.prepare(n, &vcpu)?;
        let Ok(address) = start.recv() else { return Ok(()) };
        let mut regs = vcpu.regs().context("KVM_GET_REGS")?;
        regs.rip = address;
        vcpu.set_regs(regs).context("KVM_SET_REGS")?;
        self.loop_of(n, &vcpu)
    }

    fn loop_of(&self, n: usize, vcpu: &Vcpu) -> Result<()> {
        let mut serial = String::new();
        while !self.ended.load(Ordering::Acquire) {
            match vcpu.run() {
                // Not taken here: the signal stays pending until the guest halts, and the guest gets there.
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("KVM_RUN"),
                Ok(Exit::Io { out, port, count, .. }) => {
                    for element in 0..count {
                        self.port(n, vcpu, &mut serial, (port, out, element))?;
                    }
                }
                Ok(Exit::Hlt) => {
                    signal::wait(signal::ipi());
                    if !self.ended.load(Ordering::Acquire) {
                        vcpu.interrupt(self.ipi_vector.load(Ordering::Acquire)).context("KVM_INTERRUPT")?;
                    }
                }
                Ok(Exit::Mmio { write, .. }) if self.has_bus => {
                    if !write {
                        vcpu.set_mmio_data(u64::MAX);
                    }
                }
                Ok(other) => {
                    self.say(format!("{other:x?}"));
                    self.end();
                }
            }
        }
        Ok(())
    }

    fn port(&self, n: usize, vcpu: &Vcpu, serial: &mut String, (port, out, element): (u16, bool, u32)) -> Result<()> {
        if !out {
            let value = match port {
                port::CPUS => self.cpus as u32,
                port::OWN_ID => n as u32,
                port::START_ADDRESS => self.start_address.load(Ordering::Acquire) as u32,
                port::IPI_VECTOR => self.ipi_vector.load(Ordering::Acquire),
                port if port::SILLY_APIC.contains(&port) => u32::MAX,
                // kvmctl answers nothing: the guest finds its own EAX in the page.
                _ => return Ok(()),
            };
            vcpu.set_port_data(element, value);
            return Ok(());
        }
        let value = vcpu.port_data(element);
        match port {
            port::START_ADDRESS => self.start_address.store(value.into(), Ordering::Release),
            port::START => {
                let starts = self.starts.lock().unwrap_or_else(PoisonError::into_inner);
                let start = starts.get((value as usize).wrapping_sub(1)).context("no such CPU")?;
                start.send(self.start_address.load(Ordering::Acquire)).context("the CPU's thread has ended")?;
            }
            port::IPI_VECTOR => self.ipi_vector.store(value, Ordering::Release),
            port::IPI => {
                let thread = self.threads.get(value as usize).context("no such CPU")?.load(Ordering::Acquire);
                ensure!(thread != 0, "CPU {value} has not been started");
                signal::send(thread.cast_signed(), signal::ipi());
            }
            port::INTERRUPT => {
                self.say(format!("injecting interrupt {value:#x}"));
                self.vcpu0.interrupt(value).context("KVM_INTERRUPT")?;
            }
            port::SERIAL if value == u32::from(b'\n') => self.say(format!("GUEST: {}", std::mem::take(serial))),
            port::SERIAL => serial.push(char::from_u32(value).context("a byte")?),
            port::END => self.end(),
            port => self.say(format!("outb {value:#x}, {port:#x}")),
        }
        Ok(())
    }

    /// Gets every thread out of wherever it is.
    fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.starts.lock().unwrap_or_else(PoisonError::into_inner).clear();
        for thread in &self.threads {
            match thread.load(Ordering::Acquire) {
                0 => {}
                thread => signal::send(thread.cast_signed(), signal::ipi()),
            }
        }
    }
}
