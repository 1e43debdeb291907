//! `KVM_RUN`: from user space into the guest and back, in the order that api.rst and Linux's x86.c have.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use cpu_core::{Exit, Gpr, Poll};
use kvm_abi::consts::{
    KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_HYPERCALL, KVM_EXIT_INTR, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_SYSTEM_EVENT,
    KVM_RUN_X86_SMM,
};
use nix::errno::Errno;
use x86_defs::Rflags;

use crate::chip::alarm::monotonic_ns;
use crate::client::Client;
use crate::exit::{self, Outcome, Pending};
use crate::vcpu::Vcpu;
use crate::{clock, debug};

/// Instructions that a VM of 2007 executes before it looks for a signal that was pending at entry. Its VMMs retry with the
/// signal still pending, so each try must get somewhere.
const STEPS_DESPITE_SIGNAL: u32 = 256;

/// The host's timer of 2007 interrupted a guest so often, and each time the kernel looked around: 250 Hz.
const TICK: Duration = Duration::from_millis(4);

/// CR8 that exists: the task priority, bits 3:0.
const CR8_MAX: u64 = 15;

/// What a return shows in `if_flag`, `ready_for_interrupt_injection`, `cr8` and `apic_base`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shown {
    /// The state of now.
    Now,
    /// Whatever stood there.
    Before,
}

impl Vcpu {
    /// Runs the guest. Ok: `kvm_run` tells what user space is to do. EINTR: a signal or `immediate_exit`.
    pub(crate) fn run(&mut self, client: &dyn Client) -> Result<(), Errno> {
        let immediate_exit = self.era.has_new_run_fields() && self.page.immediate_exit();
        if self.era.has_new_run_fields() {
            self.page.set_flags(0);
        }
        let result = self.run_once(client, immediate_exit);
        if self.era.has_new_run_fields() {
            self.store_synced()?;
        }
        if result != Ok(Shown::Before) {
            self.show_state();
        }
        let result = result.map(|_| ());
        if result.is_ok() || result == Err(Errno::EINTR) && !immediate_exit {
            self.counters.kvm_exit(self.page.exit_reason());
        }
        result
    }

    fn run_once(&mut self, client: &dyn Client, immediate_exit: bool) -> Result<Shown, Errno> {
        if self.era.has_new_run_fields() {
            self.load_synced()?;
        }
        self.take_cr8()?;
        // What the last exit waits for comes before everything else, so no return loses or repeats it.
        if let Some(pending) = self.pending.take()
            && let Some(shown) = self.complete(pending)
        {
            return Ok(shown);
        }
        if self.era.exits_on_hypercalls() && self.page.exit_reason() == KVM_EXIT_HYPERCALL {
            self.cpu.set_reg(Gpr::Rax, self.page.legacy_hypercall_ret());
        }
        if immediate_exit {
            return Err(Errno::EINTR);
        }
        if std::mem::take(&mut self.triple_fault) {
            exit::handle(self, &Exit::TripleFault);
            return Ok(Shown::Now);
        }
        let _guard = client.on_interrupt(self.on_signal.clone(), self.signal_mask);
        self.counters.running.store(true, Relaxed);
        self.begin_steal();
        let result = if self.era.enters_despite_signal() {
            self.run_legacy(client)
        } else if self.machine.apic().is_some() {
            self.run_with_apic(client)
        } else {
            self.run_modern(client)
        };
        self.counters.running.store(false, Relaxed);
        self.mark_preempted();
        self.machine.processors.offer();
        result.map(|()| Shown::Now)
    }

    /// Finishes the last exit. Some: something else is for user space before the guest goes on.
    fn complete(&mut self, pending: Pending) -> Option<Shown> {
        let at_once = self.era.finishes_mmio_before_entry();
        let read = matches!(pending, Pending::MmioRead { rip } if rip == self.linear_rip());
        if exit::complete(self, pending) == Outcome::User {
            return Some(if at_once { Shown::Before } else { Shown::Now });
        }
        if !at_once || !read {
            return None;
        }
        let exit = self.step_guest()?;
        let shown = if matches!(exit, Exit::Mmio(_)) { Shown::Before } else { Shown::Now };
        (exit::handle(self, &exit) == Outcome::User).then_some(shown)
    }

    /// Today: no instruction runs while a signal is pending, and an open window that user space asked for goes first.
    fn run_modern(&mut self, client: &dyn Client) -> Result<(), Errno> {
        loop {
            self.waker.clear();
            if self.show_full_ring() {
                return Ok(());
            }
            if client.interrupted() {
                if self.wants_interrupt_window() && self.ready_for_interrupt() {
                    self.show_interrupt_window();
                    return Ok(());
                }
                return self.interrupted();
            }
            if self.machine.cpuid_is_stale.load(Relaxed) && self.machine.cpuid_is_stale.swap(false, Relaxed) {
                self.load_cpuid();
            }
            if let Some(event) = self.machine.hyperv.take_event() {
                self.page.set_system_event(event);
                self.page.set_exit_reason(KVM_EXIT_SYSTEM_EVENT);
                return Ok(());
            }
            self.take_xen_events();
            self.cpu.set_interrupt_window_exiting(self.wants_interrupt_window());
            let exit = self.enter_guest(client);
            if exit::answer(self, client, &exit)? == Outcome::User {
                return Ok(());
            }
        }
    }

    /// 2007: the guest is entered first. Signals, and a window that is open, are looked at after exits that were answered
    /// here; both end with EINTR.
    fn run_legacy(&mut self, client: &dyn Client) -> Result<(), Errno> {
        let hidden = debug::hidden_flags(self);
        if self.era.steps_resume() && hidden != 0 {
            let regs = self.cpu.regs();
            self.cpu.set_regs(&cpu_core::Regs { rflags: regs.rflags | hidden, ..regs });
        }
        let result = self.run_legacy_loop(client);
        self.requeue_interrupt();
        result
    }

    fn run_legacy_loop(&mut self, client: &dyn Client) -> Result<(), Errno> {
        let mut steps = if client.interrupted() { STEPS_DESPITE_SIGNAL } else { 0 };
        loop {
            if self.ready_for_interrupt()
                && let Some(vector) = self.interrupts.pop()
            {
                self.cpu.queue_interrupt(vector);
            }
            let wanted = self.wants_interrupt_window();
            let open = self.interrupts.is_empty() && self.cpu.interrupt_window_open();
            if wanted && open {
                // No exit comes of a window that is open at entry; the next look around, which a tick of the host's timer
                // might have brought as soon as this, ends with EINTR.
                steps = steps.max(1);
            }
            self.cpu.set_interrupt_window_exiting(!self.interrupts.is_empty() || wanted && !open);
            let exit = if steps > 0 {
                steps -= 1;
                self.step_guest()
            } else {
                Some(self.enter_legacy_guest(client, wanted))
            };
            if let Some(exit) = exit
                && exit::handle(self, &exit) == Outcome::User
            {
                return Ok(());
            }
            if steps > 0 {
                continue;
            }
            let open = self.interrupts.is_empty() && self.cpu.interrupt_window_open();
            if client.interrupted() || self.wants_interrupt_window() && open {
                return self.interrupted();
            }
        }
    }

    pub(crate) fn enter_guest(&mut self, client: &dyn Client) -> Exit {
        self.write_clock();
        let start = clock::now();
        self.take_steal(client, start);
        let in_guest = self.machine.processors.enter();
        let exit = match (client.poll_interval(), self.xen_timer_without_alarm()) {
            (None, None) => self.cpu.run(),
            (every, timer) => {
                let left = timer.map(|at| Duration::from_nanos(at.saturating_sub(monotonic_ns())));
                let mut stop =
                    || every.is_some() && client.interrupted() || timer.is_some_and(|at| at <= monotonic_ns());
                let every = every.into_iter().chain(left).min().expect("one of the two");
                self.cpu.run_polled(Poll { every, stop: &mut stop })
            }
        };
        drop(in_guest);
        self.count(start);
        exit
    }

    /// `wanted`: what is known of `request_interrupt_window`, which 2.6.22 looks at again at each tick.
    fn enter_legacy_guest(&mut self, client: &dyn Client, wanted: bool) -> Exit {
        self.write_clock();
        let start = clock::now();
        let every = client.poll_interval();
        let page = &self.page;
        let mut stop = || !wanted && page.request_interrupt_window() || every.is_some() && client.interrupted();
        let in_guest = self.machine.processors.enter();
        let exit = self.cpu.run_polled(Poll { every: every.map_or(TICK, |every| every.min(TICK)), stop: &mut stop });
        drop(in_guest);
        self.count(start);
        exit
    }

    pub(crate) fn step_guest(&mut self) -> Option<Exit> {
        self.write_clock();
        let start = clock::now();
        let exit = self.cpu.step();
        self.count(start);
        exit
    }

    fn count(&mut self, start: u64) {
        self.has_run = true;
        self.counters.run_counts.fetch_add(clock::now().saturating_sub(start), Relaxed);
    }

    pub(crate) fn interrupted(&mut self) -> Result<(), Errno> {
        self.page.set_exit_reason(KVM_EXIT_INTR);
        Err(Errno::EINTR)
    }

    /// CR8 is user space's while the APIC is: every entry loads it.
    fn take_cr8(&mut self) -> Result<(), Errno> {
        if self.machine.apic().is_some() {
            return Ok(());
        }
        let cr8 = self.page.cr8();
        if cr8 > CR8_MAX && self.era.checks_cr8() {
            return Err(Errno::EINVAL);
        }
        self.cpu.set_cr8(cr8 & CR8_MAX);
        Ok(())
    }

    /// CR8 is the local APIC's if that is here.
    pub(crate) fn load_cr8(&mut self) {
        if let Some(apic) = self.machine.apic() {
            self.cpu.set_cr8(apic.lapic.cr8());
        }
    }

    /// The PIC is here: user space has no interrupts to bring.
    fn has_pic(&self) -> bool {
        self.machine.apic().is_some_and(|apic| !apic.chip.wires.is_split())
    }

    /// User space wants to hear when the guest can take an interrupt. Read anew each time: it may ask at any moment.
    pub(crate) fn wants_interrupt_window(&self) -> bool {
        self.page.request_interrupt_window() && !self.has_pic()
    }

    /// The dirty ring has no more entries than are reserved: user space is to harvest it before the guest goes on, signal or not
    /// (`vcpu_enter_guest`). True: so it is told.
    pub(crate) fn show_full_ring(&self) -> bool {
        let is_full = self.machine.ring().is_some_and(|ring| ring.is_soft_full());
        if is_full {
            self.page.set_exit_reason(KVM_EXIT_DIRTY_RING_FULL);
        }
        is_full
    }

    pub(crate) fn show_interrupt_window(&self) {
        self.page.set_exit_reason(KVM_EXIT_IRQ_WINDOW_OPEN);
    }

    /// `post_kvm_run_save`: what user space reads after every return.
    fn show_state(&mut self) {
        self.load_cr8();
        let if_flag = self.cpu.rflags() & Rflags::IF.bits() != 0;
        let ready = if self.era.ready_includes_if() {
            self.has_pic() || self.ready_for_interrupt()
        } else {
            let events = self.cpu.events();
            let shadow = (events.shadow_sti || events.shadow_mov_ss) && self.rip_behind_io().is_none();
            !shadow && self.interrupts.is_empty()
        };
        self.page.set_state(ready, if_flag, self.cpu.cr8(), self.machine.apic_base.load(Relaxed));
        if self.era.has_new_run_fields() && self.cpu.is_in_smm() {
            self.page.set_flags(KVM_RUN_X86_SMM as u16);
        }
    }

    /// A vector that was not delivered before an exit waits with the others.
    pub(crate) fn requeue_interrupt(&mut self) {
        let events = self.cpu.events();
        if let (Some(vector), false) = (events.interrupt, events.soft) {
            self.interrupts.insert(vector);
            self.cpu.set_events(cpu_core::Events { interrupt: None, ..events });
        }
    }

    /// RIP as a VM of 2007 shows it while a port access waits for user space: behind the instruction, if it is done then.
    pub(crate) fn rip_behind_io(&self) -> Option<u64> {
        let waits = self.era.io_moves_rip_at_exit() && matches!(self.pending, Some(Pending::Io { .. }));
        if waits { self.cpu.rip_behind_io() } else { None }
    }

    /// Linear address of the next instruction.
    pub(crate) fn linear_rip(&self) -> u64 {
        self.cpu.linear_rip()
    }
}
