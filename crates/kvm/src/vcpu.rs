//! A vCPU: the interpreter's state, the pages shared with the client, and what the API keeps beside both.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use cpu_core::{Cpu, Kick, Sregs};
use irqchip::Wake;
use kvm_abi::consts::{
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, KVM_X86_QUIRK_LINT0_REENABLED,
    KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT,
};
use kvm_abi::{Plain, kvm_cpuid_entry2, kvm_guest_debug};
use mmu::Mapping;
use nix::errno::Errno;
use parking_lot::Mutex;
use x86_defs::cpuid as bit;
use x86_defs::msr::{IA32_MISC_ENABLE, apic_base, misc_enable};

use crate::chip::{VcpuApic, Waker};
use crate::client::{Client, File, FileKind, Reply, SignalMask};
use crate::cpuid;
use crate::era::Era;
use crate::exit::Pending;
use crate::interrupt::InterruptQueue;
use crate::ioctl::{self, Call, Target};
use crate::machine::Machine;
use crate::run_page::RunPage;
use crate::status::Counters;
use crate::steal::StealTime;
use crate::vm::{VcpuEntry, Vm};
use crate::xen::{self, VcpuXen};

/// The file of a vCPU. Its lock is held for the whole of every ioctl, `KVM_RUN` included, as the kernel's is.
pub(crate) struct VcpuFile {
    vm: Arc<Vm>,
    id: u32,
    pages: Arc<Mapping>,
    vcpu: Mutex<Vcpu>,
}

/// A vCPU, as the holder of its lock sees it.
pub(crate) struct Vcpu {
    pub(crate) vm: Arc<Vm>,
    pub(crate) id: u32,
    pub(crate) era: Era,
    pub(crate) cpu: Box<Cpu>,
    pub(crate) page: RunPage,
    pub(crate) counters: Arc<Counters>,
    /// What the core's platform and the API both see: APIC base and time-stamp counter.
    pub(crate) machine: Arc<Machine>,
    /// The answer that the last exit still waits for.
    pub(crate) pending: Option<Pending>,
    /// Vectors that `KVM_INTERRUPT` of 2007 collected.
    pub(crate) interrupts: InterruptQueue,
    /// The one that `KVM_INTERRUPT` brought while only the local APIC is here.
    pub(crate) external_vector: Option<u8>,
    /// What INIT brings back.
    pub(crate) reset_sregs: Box<Sregs>,
    /// Signals blocked during `KVM_RUN`.
    pub(crate) signal_mask: Option<SignalMask>,
    /// The next entry ends in a shutdown.
    pub(crate) triple_fault: bool,
    /// `KVM_MP_STATE_…`
    pub(crate) mp_state: u32,
    /// As the client gave it.
    pub(crate) cpuid: Vec<kvm_cpuid_entry2>,
    /// The client gave one.
    pub(crate) has_cpuid: bool,
    /// The guest has been entered: its CPUID is fixed from now on.
    pub(crate) has_run: bool,
    pub(crate) guest_debug: kvm_guest_debug,
    /// The guest may use what its CPUID has, and no more of KVM's services.
    pub(crate) enforces_pv: bool,
    /// What the guest is told of its vCPU's waiting.
    pub(crate) steal: StealTime,
    /// What there is of Xen's interface, beside the VM's.
    pub(crate) xen: VcpuXen,
    /// `KVM_TPR_ACCESS_REPORTING`
    pub(crate) reports_tpr: bool,
    /// The guest accessed the task priority in memory, and user space is to hear of it.
    pub(crate) tpr_access: Option<TprAccess>,
    /// Calls it out of the guest, and out of its sleep.
    pub(crate) waker: Arc<Waker>,
    /// What a signal to the client's thread does while it is in `KVM_RUN`.
    pub(crate) on_signal: Arc<dyn Fn() + Send + Sync>,
}

/// An access to the task priority: RIP of the instruction, and whether it wrote.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TprAccess {
    pub(crate) rip: u64,
    pub(crate) write: bool,
}

impl VcpuFile {
    /// A vCPU after reset. EEXIST: the id is taken.
    pub(crate) fn new(vm: Arc<Vm>, id: u32, era: Era) -> Result<Arc<Self>, Errno> {
        let is_boot_cpu = id == vm.options.boot_cpu();
        let (processors, options) = (vm.processors().clone(), vm.options.clone());
        let (clock, time) = (vm.clock.clone(), vm.time.clone());
        let machine = Arc::new(Machine::new(clock, time, processors, options, is_boot_cpu, era));
        let mut cpu = Cpu::new(vm.memory.clone(), machine.platform(), cpuid::phys_bits(&[]));
        cpu.set_variant(era.variant());
        let mut sregs = cpu.sregs();
        sregs.segments[cpu_core::Seg::Cs as usize].base = era.reset_cs_base();
        cpu.set_sregs(&sregs);
        let kick: Arc<Kick> = cpu.kicker();
        machine.set_kick(kick.clone());
        let waker = Waker::new(kick.clone());
        let counters = Arc::new(Counters::new(cpu.profile()));

        let mut vcpus = vm.vcpus.lock();
        if vcpus.contains_key(&id) {
            return Err(Errno::EEXIST);
        }
        let first = vm.coalesced.pages();
        let page = RunPage::new(vm.dirty_ring_bytes.load(Relaxed), first).map_err(|_| Errno::ENOMEM)?;
        vm.coalesced.keep(era, page.mapping());
        let full = kick.clone();
        let ring = page.dirty_ring(move || full.kick()).map(Arc::new);
        if let Some(ring) = &ring {
            machine.set_ring(ring.clone());
            cpu.set_dirty_ring(ring.clone());
        }
        let index = vcpus.len() as u32;
        machine.hyperv.set_index(index);
        vcpus.insert(id, VcpuEntry { kick, counters: counters.clone(), ring });
        if let Some(chip) = vm.chip() {
            let base = machine.apic_base.load(Relaxed);
            let apic = VcpuApic::new(chip, id, base, waker.clone(), machine.memory()).ok_or(Errno::EEXIST)?;
            apic.lapic.init(vm.options.has_quirk(KVM_X86_QUIRK_LINT0_REENABLED));
            machine.set_apic(apic);
        }
        let lapic = machine.apic().map(|apic| apic.lapic.clone());
        let events = xen::Events::new(id, vm.memory.clone(), lapic, waker.clone());
        vm.options.xen.add(events.clone());
        drop(vcpus);
        let waits_for_init = machine.apic().is_some() && !is_boot_cpu;

        let pages = page.mapping().clone();
        let vcpu = Vcpu {
            vm: vm.clone(),
            id,
            era,
            cpu,
            page,
            counters,
            steal: StealTime::new(machine.memory()),
            xen: VcpuXen::new(events, index),
            machine,
            pending: None,
            interrupts: InterruptQueue::default(),
            external_vector: None,
            reset_sregs: Box::new(sregs),
            signal_mask: None,
            triple_fault: false,
            mp_state: if waits_for_init { KVM_MP_STATE_UNINITIALIZED } else { KVM_MP_STATE_RUNNABLE },
            cpuid: Vec::new(),
            has_cpuid: false,
            has_run: false,
            guest_debug: Plain::zeroed(),
            enforces_pv: false,
            reports_tpr: false,
            tpr_access: None,
            on_signal: Arc::new({
                let waker = waker.clone();
                move || waker.wake()
            }),
            waker,
        };
        Ok(Arc::new(Self { vm, id, pages, vcpu: Mutex::new(vcpu) }))
    }
}

impl File for VcpuFile {
    fn ioctl(self: Arc<Self>, client: &dyn Client, request: u32, arg: u64, input: &[u8]) -> Result<Reply, Errno> {
        self.vm.check_address_space(client)?;
        let mut vcpu = self.vcpu.lock();
        ioctl::dispatch(Target::Vcpu(&mut vcpu), &Call { client, request, arg, input }).unwrap_or(Err(Errno::EINVAL))
    }

    fn mapping(&self) -> Option<Arc<Mapping>> {
        Some(self.pages.clone())
    }

    fn kind(&self) -> FileKind {
        FileKind::Vcpu(self.id)
    }

    fn released(&self) {}
}

impl Vcpu {
    /// Hands the guest's CPUID table to the core, with the bit that follows other state: APIC its enable bit.
    pub(crate) fn load_cpuid(&mut self) {
        if self.era.decodes_apic_base() {
            let enabled = self.machine.apic_base.load(Relaxed) & apic_base::EN != 0;
            cpuid::change(&mut self.cpuid, bit::APIC, enabled);
        }
        if !self.vm.options.has_quirk(KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT) {
            let enabled = self.machine.msrs.read(IA32_MISC_ENABLE).is_some_and(|value| value & misc_enable::MWAIT != 0);
            cpuid::change(&mut self.cpuid, bit::MONITOR, enabled);
        }
        self.machine.hyperv.load_cpuid(&self.cpuid);
        let table: Vec<_> = self.cpuid.iter().map(crate::state::to_core_cpuid).collect();
        self.cpu.set_cpuid(&table);
        self.machine.x2apic.store(cpuid::has(&self.cpuid, bit::X2APIC), Relaxed);
        self.machine.sse3.store(cpuid::has(&self.cpuid, bit::SSE3), Relaxed);
        self.machine.tsc_adjust.store(cpuid::has(&self.cpuid, bit::IA32_TSC_ADJUST), Relaxed);
        self.machine.arch_capabilities.store(cpuid::has(&self.cpuid, bit::IA32_ARCH_CAPABILITIES), Relaxed);
        self.machine.pv.enforce(self.enforces_pv.then_some(&self.cpuid));
        let phys_bits = cpuid::phys_bits(&self.cpuid);
        self.machine.phys_bits.store(phys_bits, Relaxed);
        self.cpu.set_phys_bits(phys_bits);
    }

    /// `kvm_vcpu_ready_for_interrupt_injection`: user space may call `KVM_INTERRUPT` and the vector goes in at once.
    pub(crate) fn ready_for_interrupt(&self) -> bool {
        self.cpu.interrupt_window_open() && self.cpu.events().exception.is_none() && self.has_room_for_interrupt()
    }

    /// `kvm_cpu_accept_dm_intr`: no vector of user space's waits, and with a local APIC here LINT0 lets one through.
    pub(crate) fn has_room_for_interrupt(&self) -> bool {
        self.external_vector.is_none() && self.machine.apic().is_none_or(|apic| apic.lapic.accepts_pic())
    }
}
