//! Delivery of exceptions and interrupts. SDM Vol. 3, chapter "Interrupt and Exception Handling"; Vol. 2 "INT n/INTO/INT3/
//! INT1" has the steps.

mod gate;
pub(crate) mod smm;
pub(crate) mod task;
#[cfg(test)]
mod tests;

use x86_defs::vector::{self, Combined, combine};
use x86_defs::{Dr6, Dr7, Rflags};

use crate::cpu::{Cpu, Stop, StopReason};
use crate::fault::{Fault, Origin};
use crate::state::PendingException;
use crate::vmx::Exit;

/// What is to be delivered.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Delivery {
    /// An exception of the current instruction.
    Exception(Fault),
    /// An exception that user space queued (KVM_SET_VCPU_EVENTS): CR2 and DR6 are as they are to be, or its payload tells.
    Injected(PendingException),
    /// An external interrupt.
    External(u8),
    /// A non-maskable interrupt.
    Nmi,
}

/// Where an event comes from: decides which privilege checks apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// An exception, an interrupt or INT1: no privilege check, EXT in error codes.
    Hardware,
    /// INT3 or INTO: the gate's DPL counts.
    Trap,
    /// INT n: the gate's DPL counts, and in virtual-8086 mode IOPL.
    Software,
}

/// One event on its way through the IDT.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Event {
    pub(crate) vector: u8,
    pub(crate) source: Source,
    /// Pushed behind the return address, outside real-address mode.
    pub(crate) error: Option<u32>,
    /// RIP to be pushed.
    pub(crate) back: u64,
    /// RFLAGS to be pushed.
    pub(crate) rflags: u64,
}

impl Cpu {
    /// RFLAGS as an event pushes it. RF is set for faults, bar #DB (SDM Vol. 3 "Instruction-Breakpoint Exception
    /// Condition").
    fn pushed_rflags(&self, fault: Option<&Fault>) -> u64 {
        let resume = fault
            .is_some_and(|f| f.origin == Origin::Fault && !matches!(f.vector, vector::DB | vector::DF | vector::MC));
        self.rflags() | if resume { Rflags::RF.bits() } else { 0 }
    }

    /// What the exception leaves behind before its handler runs: CR2, DR6, DR7.GD.
    fn report(&mut self, fault: &Fault) {
        if let Some(la) = fault.cr2 {
            self.cr2 = la;
        }
        if fault.vector == vector::DB {
            self.debug.dr6 = self.debug.dr6 & !0xf | fault.dr6;
            self.debug.dr7 &= !Dr7::GD.bits();
        }
    }

    /// That of a #DB is laid out as VMX's pending debug exceptions: bits that DR6 shows inverted are not, bit 12 is not DR6's.
    fn take_payload(&mut self, vector: u8, payload: u64) {
        match vector {
            vector::PF => self.cr2 = payload,
            vector::DB => {
                let payload = payload & 0xffff_ffff;
                let dr6 = self.debug.dr6 & !Dr6::B.bits() | Dr6::FIXED_1 | payload;
                self.debug.dr6 = (dr6 ^ payload & Dr6::FIXED_1) & !(1 << 12);
            }
            _ => {}
        }
    }

    fn event_of(&self, fault: &Fault) -> Event {
        Event {
            vector: fault.vector,
            source: Source::Hardware,
            error: fault.error,
            back: self.rip,
            rflags: self.pushed_rflags(Some(fault)),
        }
    }
}

/// Delivers, escalating to #DF and shutdown as the SDM's table says.
pub(crate) fn deliver(cpu: &mut Cpu, what: Delivery) -> Option<Exit> {
    let plain =
        |cpu: &Cpu, vector, error, rflags| Event { vector, source: Source::Hardware, error, back: cpu.rip, rflags };
    // The vector that a fault during delivery combines with; interrupts are benign.
    let (mut event, mut first) = match what {
        Delivery::Exception(fault) => {
            cpu.report(&fault);
            (cpu.event_of(&fault), Some(fault.vector))
        }
        Delivery::Injected(pending) => {
            if let Some(payload) = pending.payload {
                cpu.take_payload(pending.vector, payload);
            }
            if pending.vector == vector::DB {
                cpu.debug.dr7 &= !Dr7::GD.bits();
            }
            let fault = Fault { error: pending.error, ..Fault::plain(pending.vector) };
            let trap = matches!(pending.vector, vector::BP | vector::OF);
            let fault = if trap { Fault { origin: Origin::Trap, ..fault } } else { fault };
            (cpu.event_of(&fault), Some(pending.vector))
        }
        Delivery::External(number) => (plain(cpu, number, None, cpu.rflags()), None),
        Delivery::Nmi => (plain(cpu, vector::NMI, None, cpu.rflags()), None),
    };
    // Each round either ends or raises the class of `first`: benign, contributory or page fault, double fault. Only benign ones may
    // follow one another for ever, until somebody wants attention.
    loop {
        if let Ok(Ok(())) = gate::enter(cpu, &event) {
            *match what {
                Delivery::Exception(_) | Delivery::Injected(_) => &mut cpu.counts.exceptions,
                Delivery::External(_) => &mut cpu.counts.interrupts,
                Delivery::Nmi => &mut cpu.counts.nmis,
            } += 1;
            return None;
        }
        let mut fault = match cpu.stop.take() {
            Some(StopReason::Fault(fault)) => fault,
            // The tables or the stack lie where there is no RAM: KVM gives up too (KVM_INTERNAL_ERROR_DELIVERY_EV).
            _ => {
                cpu.abandon_exit();
                return Some(Exit::Undeliverable { vector: event.vector });
            }
        };
        with_ext(&mut fault);
        cpu.report(&fault);
        match first.map_or(Combined::Second, |first| combine(first, fault.vector)) {
            // #AC at the stack of its own handler ends in nothing else. KVM queues it anew, too (`kvm_multiple_exception`).
            Combined::Second if cpu.kick.asked() => {
                cpu.events.exception = Some(PendingException::new(fault.vector, fault.error));
                return None;
            }
            Combined::Second => {}
            Combined::DoubleFault => fault = Fault::with_error(vector::DF, 0),
            Combined::Shutdown => return Some(Exit::TripleFault),
        }
        event = cpu.event_of(&fault);
        first = Some(fault.vector);
    }
}

/// INT n, INT3, INTO and INT1: `back` is behind the instruction. A fault leaves everything as it was; one that a new task
/// makes behind a task gate is recorded in the CPU, and the instruction is done.
pub(crate) fn software(cpu: &mut Cpu, vector: u8, source: Source, back: u64) -> Result<(), Stop> {
    // RF does not outlive the instruction that it was set for.
    let rflags = cpu.rflags() & !Rflags::RF.bits();
    cpu.suppress_step = true;
    match gate::enter(cpu, &Event { vector, source, error: None, back, rflags }) {
        Ok(_in_new_task) => Ok(()),
        Err(Stop) => {
            if source == Source::Hardware
                && let Some(StopReason::Fault(fault)) = &mut cpu.stop
            {
                with_ext(fault);
            }
            Err(Stop)
        }
    }
}

/// Marks an error code with a selector as that of an event from outside the program.
fn with_ext(fault: &mut Fault) {
    if matches!(fault.vector, vector::TS | vector::NP | vector::SS | vector::GP) {
        fault.error = fault.error.map(|code| code | vector::selector_error::EXT);
    }
}
