//! A machine is built, step by step, and run.
#![expect(unsafe_code, reason = "KVM is handed a pointer to the guest's RAM")]

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::Files;
use crate::block::{Disk, QUEUE_NOTIFY};
use crate::boot::{self, Start};
use crate::bus::{self, Bus, locked};
use crate::filter;
use crate::kick::Target;
use crate::ram::Ram;
use crate::style::{Step, Style, Worker};
use crate::vcpu::{self, Runner};

/// `ARCH_GET_XCOMP_SUPP` of arch/x86/include/uapi/asm/prctl.h.
const ARCH_GET_XCOMP_SUPP: i32 = 0x1021;

/// How often all vCPUs are kicked while the guest runs: pausing and resuming costs a VMM no more.
const KICKS: Duration = Duration::from_millis(100);

/// What steps have made so far.
struct Machine<'a> {
    style: &'static Style,
    files: &'a Files,
    ram: Option<Ram>,
    start: Option<Start>,
    kvm: Option<Kvm>,
    cpuid: Option<CpuId>,
    // Dropped in this order: the vCPUs before their VM.
    vcpus: Vec<VcpuFd>,
    vm: Option<Arc<VmFd>>,
    devices: Option<Devices>,
}

/// The devices, and what wakes whoever serves them.
struct Devices {
    bus: Arc<Bus>,
    queue: EventFd,
    reset: EventFd,
}

const QUEUE: u64 = 1;
const RESET: u64 = 2;

/// What the main thread waits for.
fn watch(devices: &Devices, queue: bool) -> Result<Epoll> {
    let epoll = Epoll::new().context("epoll")?;
    let events = [(&devices.reset, RESET), (&devices.queue, QUEUE)];
    for (event, name) in events.into_iter().take(if queue { 2 } else { 1 }) {
        let interest = EpollEvent::new(EventSet::IN, name);
        epoll.ctl(ControlOperation::Add, event.as_raw_fd(), interest).context("epoll")?;
    }
    Ok(epoll)
}

/// A thread that serves the disk.
fn serve_alone(queue: &EventFd, disk: &Mutex<Disk>, reset: &EventFd) {
    while queue.read().is_ok() {
        if let Err(error) = locked(disk).serve() {
            eprintln!("vmms: the disk: {error:#}");
            let _ = reset.write(1);
        }
    }
}

/// What is not there yet is a mistake in the style's row.
fn made<'m, T>(what: &'m Option<T>, name: &str) -> Result<&'m T> {
    what.as_ref().with_context(|| format!("the style needs {name} before it is made"))
}

/// Builds what `style` says and runs it until the guest asks for a reset.
pub fn run(style: &'static Style, files: &Files) -> Result<()> {
    style.kick.install()?;
    filter::install_handler()?;
    let (ram, start, kvm, cpuid, vm, devices) = (None, None, None, None, None, None);
    let mut machine = Machine { style, files, ram, start, kvm, cpuid, vcpus: Vec::new(), vm, devices };
    for step in style.order {
        machine.step(*step).with_context(|| format!("{}: {step:?}", style.name))?;
    }
    machine.run()
}

impl Machine<'_> {
    fn step(&mut self, step: Step) -> Result<()> {
        match step {
            Step::Ram => self.ram = Some(Ram::new(self.style.ram, &self.files.vmlinux)?),
            Step::Load => self.start = Some(boot::load(self.style, self.files, &made(&self.ram, "RAM")?.memory)?),
            Step::Restore => self.ram = Some(made(&self.ram, "RAM")?.restored()?),
            Step::Open => {
                let kvm = Kvm::new().context("cannot open /dev/kvm")?;
                if kvm.get_api_version() != 12 {
                    bail!("KVM_GET_API_VERSION is {}", kvm.get_api_version());
                }
                self.kvm = Some(kvm);
            }
            Step::Caps(caps) => {
                let kvm = made(&self.kvm, "/dev/kvm")?;
                if let Some(missing) = caps.iter().find(|cap| !kvm.check_extension(**cap)) {
                    bail!("{missing:?} is missing");
                }
            }
            Step::Xcomp => {
                let mut mask = 0_u64;
                // Its result is only looked at where a guest shall have AMX.
                // SAFETY: the kernel writes 8 bytes.
                unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_GET_XCOMP_SUPP, &raw mut mask) };
            }
            Step::Cpuid => {
                let cpuid = made(&self.kvm, "/dev/kvm")?.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
                self.cpuid = Some(cpuid.context("KVM_GET_SUPPORTED_CPUID")?);
            }
            Step::Vm => self.vm = Some(Arc::new(made(&self.kvm, "/dev/kvm")?.create_vm().context("KVM_CREATE_VM")?)),
            Step::Limits => {
                let kvm = made(&self.kvm, "/dev/kvm")?;
                if kvm.get_nr_memslots() == 0 {
                    bail!("no memory slots");
                }
                kvm.check_extension_int(Cap::Xsave2);
            }
            Step::MsrList => {
                made(&self.kvm, "/dev/kvm")?.get_msr_index_list().context("KVM_GET_MSR_INDEX_LIST")?;
            }
            Step::Tss(at) => self.vm()?.set_tss_address(at).context("KVM_SET_TSS_ADDR")?,
            Step::IdentityMap(at) => self.vm()?.set_identity_map_address(at).context("KVM_SET_IDENTITY_MAP_ADDR")?,
            Step::Irqchip => self.vm()?.create_irq_chip().context("KVM_CREATE_IRQCHIP")?,
            Step::Pit(flags) => {
                let pit = kvm_pit_config { flags, ..Default::default() };
                self.vm()?.create_pit2(pit).context("KVM_CREATE_PIT2")?;
            }
            Step::SplitIrqchip => bail!("no style does this yet"),
            Step::Slots => {
                for (slot, part) in (0..).zip(&made(&self.ram, "RAM")?.parts) {
                    let region = kvm_userspace_memory_region {
                        slot,
                        flags: 0,
                        guest_phys_addr: part.gpa,
                        memory_size: part.len as u64,
                        userspace_addr: part.host as u64,
                    };
                    // SAFETY: the region is RAM, which stays mapped until the process ends.
                    unsafe { self.vm()?.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")?;
                }
            }
            Step::Vcpus => {
                for id in 0..self.style.cpus {
                    let vcpu = self.vm()?.create_vcpu(id.into()).context("KVM_CREATE_VCPU")?;
                    self.vcpus.push(vcpu);
                }
            }
            Step::SetCpuid => {
                for (id, vcpu) in (0..).zip(&self.vcpus) {
                    vcpu::set_cpuid(vcpu, made(&self.cpuid, "CPUID")?, id, self.style.cpus)?;
                }
            }
            Step::State => {
                for vcpu in &self.vcpus {
                    vcpu::set_state(vcpu, *made(&self.start, "a kernel")?, &made(&self.ram, "RAM")?.memory, true)?;
                }
            }
            Step::Devices => self.devices = Some(self.devices()?),
        }
        Ok(())
    }

    fn vm(&self) -> Result<&Arc<VmFd>> {
        made(&self.vm, "a VM")
    }

    fn devices(&self) -> Result<Devices> {
        let eventfd = || EventFd::new(EFD_NONBLOCK).context("an eventfd");
        let (serial, disk, reset) = (eventfd()?, eventfd()?, eventfd()?);
        // A thread of its own waits in read(2).
        let queue =
            EventFd::new(if self.style.worker == Worker::Main { EFD_NONBLOCK } else { 0 }).context("an eventfd")?;
        let vm = self.vm()?;
        vm.register_irqfd(&serial, bus::SERIAL_IRQ.into()).context("KVM_IRQFD of the serial port")?;
        vm.register_irqfd(&disk, bus::DISK_IRQ.into()).context("KVM_IRQFD of the disk")?;
        let notify = IoEventAddress::Mmio(bus::DISK + QUEUE_NOTIFY);
        vm.register_ioevent(&queue, &notify, 0_u32).context("KVM_IOEVENTFD")?;
        let path = &self.files.disk;
        let image = OpenOptions::new().read(true).write(true).open(path);
        let image = image.with_context(|| format!("cannot open {}", path.display()))?;
        let disk = Disk::new(made(&self.ram, "RAM")?.memory.clone(), image, disk)?;
        let reset_of_bus = reset.try_clone().context("an eventfd")?;
        let bus = Arc::new(Bus::new(serial, Arc::new(Mutex::new(disk)), reset_of_bus));
        Ok(Devices { bus, queue, reset })
    }

    fn run(mut self) -> Result<()> {
        let devices = self.devices.take().context("the style has no devices")?;
        let stop = Arc::new(AtomicBool::new(false));
        let run_size = made(&self.kvm, "/dev/kvm")?.get_vcpu_mmap_size().context("KVM_GET_VCPU_MMAP_SIZE")?;
        let (mut threads, mut targets) = (Vec::new(), Vec::new());
        for (id, mut vcpu) in self.vcpus.drain(..).enumerate() {
            let target = Arc::new(Target::default());
            target.map_second(&vcpu, run_size)?;
            let bus = Arc::clone(&devices.bus);
            let runner = Runner { style: self.style, bus, target: Arc::clone(&target), stop: Arc::clone(&stop) };
            let thread = std::thread::Builder::new().name(format!("vcpu {id}")).spawn(move || {
                // A filter may forbid the thread to close it.
                (runner.run(&mut vcpu), vcpu)
            });
            threads.push(thread.context("a thread")?);
            targets.push(target);
        }
        let epoll = watch(&devices, self.style.worker == Worker::Main)?;
        if self.style.worker == Worker::Thread {
            let (queue, disk) = (devices.queue.try_clone().context("an eventfd")?, Arc::clone(&devices.bus.disk));
            let reset = devices.reset.try_clone().context("an eventfd")?;
            // It waits for the queue when the process ends.
            std::thread::Builder::new().name("disk".into()).spawn(move || serve_alone(&queue, &disk, &reset))?;
        }
        self.style.filter.on_main()?;
        let served = self.serve(&epoll, &devices, &targets);
        stop.store(true, Ordering::Release);
        let kicked = targets.iter().try_for_each(|target| target.kick(self.style.kick));
        for thread in threads {
            let Ok((ran, vcpu)) = thread.join() else { bail!("a vCPU's thread panicked") };
            drop(vcpu);
            ran?;
        }
        let kicks = served?;
        kicked?;
        let requests = locked(&devices.bus.disk).requests;
        println!("\nvmms: {kicks} kicks, {requests} requests to the disk");
        Ok(())
    }

    /// The main thread's loop, until the guest asks for a reset: how often vCPUs were kicked.
    fn serve(&self, epoll: &Epoll, devices: &Devices, targets: &[Arc<Target>]) -> Result<u64> {
        let (mut kicks, mut kicked) = (0, Instant::now());
        loop {
            let mut events = [EpollEvent::default(); 2];
            let count = match epoll.wait(KICKS.as_millis() as i32, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error).context("epoll"),
            };
            for event in &events[..count] {
                if event.data() == RESET {
                    return Ok(kicks);
                }
                devices.queue.read().context("the queue's eventfd")?;
                locked(&devices.bus.disk).serve()?;
            }
            if kicked.elapsed() >= KICKS {
                kicked = Instant::now();
                targets.iter().try_for_each(|target| target.kick(self.style.kick))?;
                kicks += targets.len() as u64;
            }
        }
    }
}
