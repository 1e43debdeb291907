//! `KVM_RUN` of a vCPU that has a local APIC here: interrupts go in, HLT and the wait for INIT happen inside.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use cpu_core::{Events, Seg};
use irqchip::lapic::event;
use kvm_abi::consts::{
    KVM_EXIT_IOAPIC_EOI, KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_TPR_ACCESS, KVM_MP_STATE_AP_RESET_HOLD, KVM_MP_STATE_HALTED,
    KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, KVM_X86_QUIRK_LINT0_REENABLED,
};
use nix::errno::Errno;
use x86_defs::Cr0;
use x86_defs::msr::{MSR_SMI_COUNT, apic_base};

use super::VcpuApic;
use super::alarm::monotonic_ns;
use crate::client::Client;
use crate::debug;
use crate::exit::{self, Outcome};
use crate::machine::Machine;
use crate::vcpu::Vcpu;

/// RDX after INIT where CPUID tells no signature (`kvm_vcpu_reset`).
const DEFAULT_SIGNATURE: u64 = 0x600;

impl Vcpu {
    /// Ok: `kvm_run` tells what user space is to do. EINTR: a signal. EAGAIN: the vCPU waited for INIT and has it now.
    pub(crate) fn run_with_apic(&mut self, client: &dyn Client) -> Result<(), Errno> {
        let result = self.run_apic_loop(client);
        self.end_xen_poll();
        result
    }

    fn run_apic_loop(&mut self, client: &dyn Client) -> Result<(), Errno> {
        let machine = self.machine.clone();
        let apic = machine.apic().expect("the caller has looked");
        let waits_for_init = self.mp_state == KVM_MP_STATE_UNINITIALIZED;
        loop {
            // Whoever calls from here on is seen below, or ends the run or the sleep.
            apic.waker.clear();
            if self.mp_state == KVM_MP_STATE_RUNNABLE && self.show_full_ring() {
                return Ok(());
            }
            if client.interrupted() {
                if self.wants_interrupt_window() && self.ready_for_interrupt() {
                    self.show_interrupt_window();
                    return Ok(());
                }
                return self.interrupted();
            }
            if machine.cpuid_is_stale.load(Relaxed) && machine.cpuid_is_stale.swap(false, Relaxed) {
                self.load_cpuid();
            }
            if let Some(event) = machine.hyperv.take_event() {
                self.page.set_system_event(event);
                self.page.set_exit_reason(KVM_EXIT_SYSTEM_EVENT);
                return Ok(());
            }
            apic.lapic.advance(machine.now());
            if let Some(vector) = apic.waker.take_eoi() {
                self.page.set_ioapic_eoi(vector);
                self.page.set_exit_reason(KVM_EXIT_IOAPIC_EOI);
                return Ok(());
            }
            if let Some(access) = self.tpr_access {
                if !self.cpu.is_inside_instruction() {
                    self.tpr_access = None;
                    self.page.set_tpr_access(access.rip, access.write);
                    self.page.set_exit_reason(KVM_EXIT_TPR_ACCESS);
                    return Ok(());
                }
                // It is told of behind the instruction.
                if let Some(exit) = self.step_guest()
                    && exit::handle(self, &exit) == Outcome::User
                {
                    return Ok(());
                }
                continue;
            }
            self.take_xen_events();
            let came = self.accept_events(apic);
            if waits_for_init && came {
                return Err(Errno::EAGAIN);
            }
            self.look_at_xen_poll();
            let halted = matches!(self.mp_state, KVM_MP_STATE_HALTED | KVM_MP_STATE_AP_RESET_HOLD);
            if halted && self.is_woken(apic) {
                apic.lapic.take_events(event::UNHALT);
                self.end_xen_poll();
                self.mp_state = KVM_MP_STATE_RUNNABLE;
                if self.show_full_ring() {
                    return Ok(());
                }
            }
            if self.mp_state != KVM_MP_STATE_RUNNABLE {
                self.mark_preempted();
                machine.processors.offer();
                sleep(apic, &machine, client.poll_interval(), self.xen_poll_until());
            } else {
                let waits = self.inject(apic);
                let wanted = self.wants_interrupt_window() && self.has_room_for_interrupt();
                self.cpu.set_interrupt_window_exiting(waits || wanted);
                self.cpu.set_cr8(apic.lapic.cr8());
                apic.show_pages(machine.pv.pv_eoi.load(Relaxed));
                apic.arm(&machine);
                let exit = self.enter_guest(client);
                apic.take_pages(machine.pv.pv_eoi.load(Relaxed));
                if exit::answer(self, client, &exit)? == Outcome::User {
                    return Ok(());
                }
            }
            // Also behind a HLT: who asked for the window has the interrupt that ends it.
            if self.wants_interrupt_window() && self.ready_for_interrupt() {
                self.show_interrupt_window();
                return Ok(());
            }
        }
    }

    /// NMIs and SMIs that came are the core's to deliver (`process_nmi`, `process_smi`).
    pub(crate) fn accept_nmi_and_smi(&mut self, apic: &VcpuApic) {
        let events = apic.lapic.take_events(event::NMI | event::SMI);
        if events & event::NMI != 0 {
            self.cpu.queue_nmi();
        }
        if events & event::SMI != 0 {
            self.cpu.queue_smi();
        }
    }

    /// `kvm_apic_accept_events`: INIT and start-up IPIs that came, and what [`Self::accept_nmi_and_smi`] does. True: one of the
    /// first two. In SMM an INIT waits, and a start-up IPI is lost.
    pub(crate) fn accept_events(&mut self, apic: &VcpuApic) -> bool {
        if apic.lapic.events() == 0 {
            return false;
        }
        self.accept_nmi_and_smi(apic);
        if self.cpu.is_in_smm() {
            apic.lapic.take_events(event::START_UP);
            return false;
        }
        let events = apic.lapic.take_events(event::INIT | event::START_UP);
        if events & event::INIT != 0 {
            self.init(apic);
            let is_bsp = self.machine.apic_base.load(Relaxed) & apic_base::BSP != 0;
            self.mp_state = if is_bsp { KVM_MP_STATE_RUNNABLE } else { KVM_MP_STATE_INIT_RECEIVED };
        }
        if events & event::START_UP != 0 && self.mp_state == KVM_MP_STATE_INIT_RECEIVED {
            self.start_up(apic.lapic.start_up_vector());
            self.mp_state = KVM_MP_STATE_RUNNABLE;
        }
        events & (event::INIT | event::START_UP) != 0
    }

    /// SDM Vol. 3 "Processor State After Reset", the column of INIT: x87, vector state and MSRs stay, and CR0.CD and NW.
    fn init(&mut self, apic: &VcpuApic) {
        let kept = self.cpu.sregs().cr0 & (Cr0::CD | Cr0::NW);
        let mut sregs = self.reset_sregs.clone();
        sregs.cr0 = sregs.cr0.difference(Cr0::CD | Cr0::NW) | kept;
        self.cpu.set_sregs(&sregs);
        let signature = crate::cpuid::find(&self.cpuid, 1, 0).map_or(DEFAULT_SIGNATURE, |leaf| leaf.eax.into());
        let mut regs = cpu_core::Regs { gpr: [0; 16], rip: 0xfff0, rflags: 2 };
        regs.gpr[2] = signature;
        self.cpu.set_regs(&regs);
        self.cpu.set_events(Events::default());
        self.cpu.set_msr(MSR_SMI_COUNT, 0).expect("the core has it");
        self.pending = None;
        self.external_vector = None;
        self.machine.reset_pv();
        apic.lapic.init(self.vm.options.has_quirk(KVM_X86_QUIRK_LINT0_REENABLED));
    }

    /// SDM Vol. 3 "MP Initialization Protocol Algorithm": execution starts at the page that the vector names.
    fn start_up(&mut self, vector: u8) {
        let mut sregs = self.cpu.sregs();
        let cs = &mut sregs.segments[Seg::Cs as usize];
        cs.selector = u16::from(vector) << 8;
        cs.base = u64::from(vector) << 12;
        self.cpu.set_sregs(&sregs);
        let regs = self.cpu.regs();
        self.cpu.set_regs(&cpu_core::Regs { rip: 0, ..regs });
    }

    /// An interrupt waits that the APIC lets through: the PIC's, user space's, its own; or one of Xen's, which passes it by.
    fn has_interrupt(&self, apic: &VcpuApic) -> bool {
        apic.lapic.pending().is_some()
            || self.upcall().is_some()
            || apic.lapic.accepts_pic() && (self.external_vector.is_some() || apic.chip.wires.pic_output())
    }

    /// `kvm_vcpu_has_events`: what ends a HLT.
    fn is_woken(&self, apic: &VcpuApic) -> bool {
        let events = self.cpu.events();
        apic.lapic.events() & event::UNHALT != 0
            || events.exception.is_some()
            || self.cpu.has_smi()
            || events.nmi_pending && !events.nmi_masked
            || events.interrupt.is_some() && self.cpu.rflags() & x86_defs::Rflags::IF.bits() != 0
            || self.cpu.interrupt_window_open() && self.has_interrupt(apic)
            || self.has_xen_events()
    }

    /// Takes an interrupt to the core if it can be delivered at once. True: one waits.
    fn inject(&mut self, apic: &VcpuApic) -> bool {
        if !self.has_interrupt(apic) || debug::blocks_interrupts(self) {
            return false;
        }
        if !self.cpu.interrupt_window_open() || self.cpu.events().exception.is_some() {
            return true;
        }
        // Xen's is first, and the guest takes it back by a store (`kvm_cpu_get_extint`).
        let pic = |vcpu: &mut Self| if apic.lapic.accepts_pic() { vcpu.take_external(apic) } else { None };
        let external = self.upcall().or_else(|| pic(self));
        if let Some(vector) = external.or_else(|| apic.lapic.acknowledge()) {
            self.cpu.queue_interrupt(vector);
        }
        self.has_interrupt(apic)
    }

    fn take_external(&mut self, apic: &VcpuApic) -> Option<u8> {
        self.external_vector.take().or_else(|| {
            let wires = &apic.chip.wires;
            wires.pic_output().then(|| wires.with_pic(|pic| pic.acknowledge()))?
        })
    }
}

/// Until somebody calls, the timer is due, `until` has come, or it is time to ask for signals that nobody tells of.
fn sleep(apic: &VcpuApic, machine: &Machine, ask_every: Option<Duration>, until: Option<u64>) {
    apic.disarm();
    let wakes = apic.deadline_ns(machine).into_iter().chain(until).min();
    let left = wakes.map(|at| Duration::from_nanos(at.saturating_sub(monotonic_ns())));
    apic.waker.sleep(left.into_iter().chain(ask_every).min());
}
