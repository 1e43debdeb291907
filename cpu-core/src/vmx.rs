//! VMX exits: the SDM's basic exit reasons with what the qualification fields would say (Vol. 3, App. C).

/// Why [`crate::Cpu::run`] came back. RIP is at the instruction that caused the exit unless said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Reason 0, for a #DB or #BP that the debugger intercepts. RIP as the exception would push it.
    Exception {
        /// Vector.
        vector: u8,
        /// What DR6 would show for a #DB.
        dr6: u64,
    },
    /// Reason 1: [`crate::Kick::kick`] was called.
    ExternalInterrupt,
    /// Reason 2: a fault while delivering a double fault.
    TripleFault,
    /// Reason 7: the guest can take an interrupt now, and the KVM layer asked to hear of it.
    InterruptWindow,
    /// Reason 12. RIP is behind the HLT.
    Hlt,
    /// Reason 18. RIP is behind the VMCALL or VMMCALL.
    Vmcall,
    /// Reason 28, for a MOV to CR8 that the platform wants an exit for. RIP is behind it.
    CrAccess,
    /// Reason 30. IN and INS wait for [`crate::Cpu::complete_io_in`], OUT and OUTS for [`crate::Cpu::complete_io_out`].
    Io(Io),
    /// Reason 31 or 32: RDMSR or WRMSR of what the guest may not touch, if the platform wants an exit for it.
    Msr(MsrAccess),
    /// Reason 33: guest state that VM entry refuses.
    EntryFailure,
    /// Reason 40: PAUSE in a loop, if the platform wants an exit for it. RIP is behind it.
    Pause,
    /// Reason 48 on memory that no slot holds, or a write to a read-only slot.
    Mmio(Mmio),
    /// Reason 48 while an event was being delivered: its descriptor tables or TSS lie where there is no RAM.
    Undeliverable {
        /// Vector of the event.
        vector: u8,
    },
    /// No VMX reason: an instruction the core lacks, or one fetched from where there is no memory.
    Unimplemented {
        /// Its bytes, as far as they could be fetched.
        bytes: [u8; 15],
        /// How many of them.
        len: u8,
    },
}

/// One port access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Io {
    /// I/O port.
    pub port: u16,
    /// Bytes per element: 1, 2 or 4.
    pub size: u8,
    /// IN or INS.
    pub input: bool,
    /// INS or OUTS.
    pub string: bool,
    /// Elements: of a repeated INS or OUTS upwards as many as lie in the page and [`crate::Variant`] allows; otherwise 1.
    pub count: u32,
    /// The instruction is done with them: no further exit of it follows.
    pub last: bool,
    /// OUT and OUTS: the value, or the first of [`crate::Cpu::outs_data`], zero-extended. IN: EAX as it is. INS: 0.
    pub data: u32,
}

/// An access to an MSR that is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrAccess {
    /// ECX.
    pub index: u32,
    /// WRMSR: EDX:EAX.
    pub write: Option<u64>,
    /// Why.
    pub refusal: MsrRefusal,
    /// Bytes of the instruction, for [`crate::Cpu::skip_instruction`].
    pub len: u8,
}

/// Why an access to an MSR is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrRefusal {
    /// The value, or the CPU's mode or CPUID.
    Invalid,
    /// There is no such MSR.
    Unknown,
    /// [`crate::Platform::allows_msr`] says no.
    Filtered,
}

/// One access to memory that the VMM backs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mmio {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Bytes: 1 to 8.
    pub len: u8,
    /// The value of a write; a read waits for [`crate::Cpu::complete_mmio_read`]. A write is finished: RIP is behind it.
    pub write: Option<u64>,
}
