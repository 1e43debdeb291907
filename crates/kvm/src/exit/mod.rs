//! From VMX exits to `kvm_run` exits, as kvm-intel translates them: one file per reason.
//!
//! A handler either answers the exit here and resumes the guest, or fills `kvm_run` and returns to user space. What user
//! space must answer first is kept as `Pending` and finished by the next `KVM_RUN`, before anything else.

mod cr_access;
mod debug;
mod entry_failure;
mod external_interrupt;
mod hlt;
pub(crate) mod hypercall;
mod interrupt_window;
mod io;
mod mmio;
pub(crate) mod msr;
mod pause;
mod triple_fault;
mod unimplemented;
mod xen;

use cpu_core::Exit;
use nix::errno::Errno;

use crate::client::Client;
use crate::vcpu::Vcpu;

/// What a handler made of an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Answered here: the guest goes on.
    Resume,
    /// `kvm_run` is filled in: `KVM_RUN` returns 0.
    User,
}

/// The answer that an exit waits for. `rip`: linear RIP at the exit; user space that moved it wants no completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pending {
    /// IN, with the bytes that it waits for, or OUT.
    Io { input: Option<u32>, rip: u64 },
    /// A read of memory that user space backs.
    MmioRead { rip: u64 },
    /// A write to it, done but for further parts.
    MmioWrite,
    /// RDMSR or WRMSR, an instruction of `len` bytes.
    Msr { read: bool, len: u8 },
    /// A hypercall of Xen's.
    Xen { rip: u64 },
    /// A hypercall; RIP is still at it. Wherever user space moves it, the answer counts (`complete_hypercall_exit`).
    Hypercall,
}

/// One basic exit reason and what becomes of it.
pub(crate) struct Row {
    reason: Reason,
    /// SDM Vol. 3 App. C; `None` for what only an interpreter has.
    vmx: Option<u16>,
    /// `kvm_run` exits it may lead to; none: always answered here.
    shows: &'static [&'static str],
}

macro_rules! reasons {
    ($($name:ident $text:literal $module:ident::$row:ident;)*) => {
        /// Why the core came back.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Reason { $($name),* }

        impl Reason {
            /// In the enum's order.
            pub(crate) const NAMES: [&str; Self::COUNT] = [$($text),*];
            /// How many.
            pub(crate) const COUNT: usize = [$(Self::$name),*].len();
        }

        /// All rows, in the enum's order.
        const ROWS: [&Row; Reason::COUNT] = [$(&$module::$row),*];
    };
}

reasons! {
    Exception         "EXCEPTION_NMI"      debug::ROW;
    ExternalInterrupt "EXTERNAL_INTERRUPT" external_interrupt::ROW;
    TripleFault       "TRIPLE_FAULT"       triple_fault::ROW;
    InterruptWindow   "PENDING_INTERRUPT"  interrupt_window::ROW;
    Hlt               "HLT"                hlt::ROW;
    Vmcall            "VMCALL"             hypercall::ROW;
    CrAccess          "CR_ACCESS"          cr_access::ROW;
    IoInstruction     "IO_INSTRUCTION"     io::ROW;
    Rdmsr             "MSR_READ"           msr::READ;
    Wrmsr             "MSR_WRITE"          msr::WRITE;
    EntryFailure      "INVALID_STATE"      entry_failure::ROW;
    Pause             "PAUSE_INSTRUCTION"  pause::ROW;
    EptViolation      "EPT_VIOLATION"      mmio::ROW;
    Unimplemented     "UNIMPLEMENTED"      unimplemented::ROW;
}

/// One line of the README's table of exits.
#[derive(Clone, Copy, Debug)]
pub struct Support {
    /// As the SDM names the reason, in Linux's spelling.
    pub name: &'static str,
    /// Basic exit reason.
    pub vmx: Option<u16>,
    /// `KVM_EXIT_…` it may lead to, without the prefix.
    pub shows: &'static [&'static str],
}

/// Every exit reason and what user space sees of it.
pub fn support() -> impl Iterator<Item = Support> {
    ROWS.iter().map(|row| Support { name: Reason::NAMES[row.reason as usize], vmx: row.vmx, shows: row.shows })
}

/// Translates what the core reported.
pub(crate) fn handle(vcpu: &mut Vcpu, exit: &Exit) -> Outcome {
    let (row, outcome) = match *exit {
        Exit::Exception { vector, dr6 } => (&debug::ROW, debug::handle(vcpu, vector, dr6)),
        Exit::ExternalInterrupt => (&external_interrupt::ROW, external_interrupt::handle(vcpu)),
        Exit::TripleFault => (&triple_fault::ROW, triple_fault::handle(vcpu)),
        Exit::InterruptWindow => (&interrupt_window::ROW, interrupt_window::handle(vcpu)),
        Exit::Hlt => (&hlt::ROW, hlt::handle(vcpu)),
        Exit::Vmcall => (&hypercall::ROW, hypercall::handle(vcpu)),
        Exit::CrAccess => (&cr_access::ROW, cr_access::handle(vcpu)),
        Exit::Io(ref io) => (&io::ROW, io::handle(vcpu, io)),
        Exit::Msr(ref access) => {
            (if access.write.is_some() { &msr::WRITE } else { &msr::READ }, msr::handle(vcpu, access))
        }
        Exit::EntryFailure => (&entry_failure::ROW, entry_failure::handle(vcpu)),
        Exit::Pause => (&pause::ROW, pause::handle(vcpu)),
        Exit::Mmio(ref mmio) => (&mmio::ROW, mmio::handle(vcpu, mmio)),
        Exit::Undeliverable { vector } => (&unimplemented::ROW, unimplemented::handle_undeliverable(vcpu, vector)),
        Exit::Unimplemented { ref bytes, len } => {
            (&unimplemented::ROW, unimplemented::handle(vcpu, &bytes[..usize::from(len)]))
        }
    };
    vcpu.counters.vmx_exit(row.reason);
    outcome
}

/// As [`handle`], and what takes the client as well. EFAULT: its memory is not there.
pub(crate) fn answer(vcpu: &mut Vcpu, client: &dyn Client, exit: &Exit) -> Result<Outcome, Errno> {
    let outcome = handle(vcpu, exit);
    match vcpu.xen.page.take() {
        None => Ok(outcome),
        Some(access) => msr::write_xen_page(vcpu, client, &access),
    }
}

/// Finishes the last exit with user space's answer.
pub(crate) fn complete(vcpu: &mut Vcpu, pending: Pending) -> Outcome {
    match pending {
        Pending::Xen { rip } if rip != vcpu.linear_rip() => Outcome::Resume,
        Pending::Xen { .. } => xen::complete(vcpu),
        Pending::Io { rip, .. } | Pending::MmioRead { rip } if rip != vcpu.linear_rip() => {
            vcpu.cpu.abandon_exit();
            Outcome::Resume
        }
        Pending::Io { input, .. } => io::complete(vcpu, input),
        Pending::MmioRead { .. } => mmio::complete_read(vcpu),
        Pending::MmioWrite => mmio::complete_write(vcpu),
        Pending::Msr { read, len } => msr::complete(vcpu, read, len),
        Pending::Hypercall => hypercall::complete(vcpu),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stand_in_the_order_of_their_reasons() {
        for (index, row) in ROWS.iter().enumerate() {
            assert_eq!(row.reason as usize, index, "{}", Reason::NAMES[index]);
        }
    }
}
