//! A machine is built, step by step, and run.
#![expect(unsafe_code, reason = "KVM is handed a pointer to the guest's RAM")]

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use softkvm_tests::acpi;
use softkvm_tests::linux::Start;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::block::Disk;
use crate::boot;
use crate::bus::{self, Bus, Registers, locked};
use crate::ioapic::Ioapic;
use crate::kick::{Kick, Target};
use crate::mmio::{self, Mmio};
use crate::pci::{self, Pci};
use crate::ram::Ram;
use crate::routes::{Interrupt, Routes};
use crate::style::{Chip, Lines, Step, Style, Transport, Worker};
use crate::vcpu::{Plan, Runner};
use crate::{Files, filter};

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
    vcpus: Vec<Option<VcpuFd>>,
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

/// Forks a process that serves the disk; what is left here are its registers. There are no other threads yet.
fn in_a_process(mut disk: Disk, queue: &EventFd) -> Result<Disk> {
    let mut ends = [0; 2];
    // SAFETY: the kernel writes two descriptors.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(std::io::Error::last_os_error()).context("pipe2");
    }
    // SAFETY: both are new, and nobody else's.
    let [mut from, to] = ends.map(|end| unsafe { File::from_raw_fd(end) });
    // SAFETY: no other thread holds a lock that the child could need.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()).context("fork"),
        0 => {
            drop(to);
            // SAFETY: takes integers only. The process is of no use without the VMM.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            let served = disk.learn_queue(&mut from).and_then(|()| {
                loop {
                    queue.read().context("the queue's eventfd")?;
                    disk.serve()?;
                }
            });
            let served: Result<()> = served;
            // The VMM may have ended before the guest used the disk.
            served.err().iter().for_each(|error| eprintln!("vmms: the disk's process: {error:#}"));
            std::process::exit(1);
        }
        _ => {
            disk.served_by(to);
            Ok(disk)
        }
    }
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
    machine.vcpus.resize_with(style.cpus.into(), || None);
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
            Step::SplitIrqchip => {
                let cap = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, args: [24, 0, 0, 0], ..Default::default() };
                self.vm()?.enable_cap(&cap).context("KVM_ENABLE_CAP")?;
            }
            Step::Routes => Routes::new(self.vm()?, true, BTreeMap::new()).apply()?,
            Step::MaxVcpus => {
                let most = made(&self.kvm, "/dev/kvm")?.get_max_vcpus();
                if most < self.style.cpus.into() {
                    bail!("KVM_CAP_MAX_VCPUS is {most}");
                }
            }
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
            Step::Vcpus(steps) => {
                let plan = self.plan()?;
                for (id, vcpu) in (0..).zip(&mut self.vcpus) {
                    for step in steps {
                        plan.step(*step, id, vcpu).with_context(|| format!("vCPU {id}: {step:?}"))?;
                    }
                }
            }
            Step::Filter => self.style.filter.on_builder()?,
            Step::Devices => self.devices = Some(self.devices()?),
        }
        Ok(())
    }

    fn vm(&self) -> Result<&Arc<VmFd>> {
        made(&self.vm, "a VM")
    }

    fn plan(&self) -> Result<Plan> {
        Ok(Plan {
            vm: Arc::clone(self.vm()?),
            offered: self.cpuid.clone(),
            start: self.start,
            memory: made(&self.ram, "RAM")?.memory.clone(),
            cpus: self.style.cpus,
        })
    }

    fn devices(&self) -> Result<Devices> {
        let style = self.style;
        let eventfd = |flags| EventFd::new(flags).context("an eventfd");
        let vm = self.vm()?;
        let pci = style.transport == Transport::Pci;
        let mut with_route = BTreeMap::new();
        let mut interrupt = |gsi: u32| -> Result<Interrupt> {
            let event = eventfd(EFD_NONBLOCK)?;
            match style.lines {
                Lines::IrqLine => return Ok(Interrupt::Line(Arc::clone(vm), gsi)),
                Lines::Irqfd => vm.register_irqfd(&event, gsi).context("KVM_IRQFD")?,
                Lines::IrqfdWithRoute => drop(with_route.insert(gsi, event.try_clone().context("an eventfd")?)),
            }
            Ok(Interrupt::Event(event))
        };
        let serial = interrupt(acpi::SERIAL_IRQ.into())?;
        let disk_interrupt = interrupt(if pci { bus::DISK_GSI } else { bus::DISK_IRQ.into() })?;
        // A thread or process of its own waits in read(2).
        let queue = eventfd(if style.worker == Worker::Main { EFD_NONBLOCK } else { 0 })?;
        let offset = if pci { pci::QUEUE_NOTIFY } else { mmio::QUEUE_NOTIFY };
        let at = IoEventAddress::Mmio(bus::DISK + offset);
        // With virtio-pci any length will do; with virtio-mmio the queue's number is compared.
        if pci { vm.register_ioevent(&queue, &at, NoDatamatch) } else { vm.register_ioevent(&queue, &at, 0_u32) }
            .context("KVM_IOEVENTFD")?;
        let routes = Routes::new(vm, style.chip == Chip::Kernel, with_route);
        let ioapic = (style.chip == Chip::Split).then(|| Ioapic::new(routes.clone()));
        let registers = if pci { Registers::Pci(Box::new(Pci::new(routes))) } else { Registers::Mmio(Mmio::default()) };
        let path = &self.files.disk;
        let image = OpenOptions::new().read(true).write(true).open(path);
        let image = image.with_context(|| format!("cannot open {}", path.display()))?;
        let mut disk = Disk::new(made(&self.ram, "RAM")?.memory.clone(), image, disk_interrupt)?;
        if style.worker == Worker::Process {
            disk = in_a_process(disk, &queue)?;
        }
        let reset = eventfd(EFD_NONBLOCK)?;
        let reset_of_bus = reset.try_clone().context("an eventfd")?;
        let bus = Arc::new(Bus::new(serial, Arc::new(Mutex::new(disk)), registers, ioapic, reset_of_bus));
        Ok(Devices { bus, queue, reset })
    }

    fn run(mut self) -> Result<()> {
        let devices = self.devices.take().context("the style has no devices")?;
        let stop = Arc::new(AtomicBool::new(false));
        let run_size = made(&self.kvm, "/dev/kvm")?.get_vcpu_mmap_size().context("KVM_GET_VCPU_MMAP_SIZE")?;
        let plan = self.plan()?;
        let (mut threads, mut targets) = (Vec::new(), Vec::new());
        for (id, vcpu) in (0..).zip(self.vcpus.drain(..)) {
            let target = Arc::new(Target::default());
            if let (Kick::SecondMapping, Some(vcpu)) = (self.style.kick, &vcpu) {
                target.map_second(vcpu, run_size)?;
            }
            let (bus, plan) = (Arc::clone(&devices.bus), plan.clone());
            let (target_of_thread, stop) = (Arc::clone(&target), Arc::clone(&stop));
            let runner = Runner { style: self.style, id, plan, bus, target: target_of_thread, stop };
            let thread = std::thread::Builder::new().name(format!("vcpu {id}")).spawn(move || runner.run(vcpu));
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
