//! Events between instructions: what waits to be delivered and what holds it back.

/// An exception that is to be delivered before the next instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingException {
    /// Vector, 0 to 31.
    pub vector: u8,
    /// Error code, where the vector has one.
    pub error: Option<u32>,
    /// It was on its way to its handler when the guest was left.
    pub injected: bool,
    /// What CR2 or DR6 learns of it when it is delivered (`kvm_deliver_exception_payload`); `None`: they know.
    pub payload: Option<u64>,
}

impl PendingException {
    /// One that nothing has seen yet, and of which CR2 and DR6 are as they are to be.
    pub fn new(vector: u8, error: Option<u32>) -> Self {
        Self { vector, error, injected: false, payload: None }
    }
}

/// What KVM_GET_VCPU_EVENTS and KVM_SET_VCPU_EVENTS move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Events {
    /// Exception to be delivered first.
    pub exception: Option<PendingException>,
    /// External interrupt (or `soft` INT n) accepted but not yet delivered.
    pub interrupt: Option<u8>,
    /// The interrupt is software's: it is delivered whatever IF says.
    pub soft: bool,
    /// NMI waits.
    pub nmi_pending: bool,
    /// An NMI handler runs: NMIs wait for IRET.
    pub nmi_masked: bool,
    /// An SMI waits.
    pub smi_pending: bool,
    /// In system management mode: SMIs and INITs wait for RSM.
    pub smm: bool,
    /// NMIs were masked when the SMI came: RSM leaves them so.
    pub smm_inside_nmi: bool,
    /// The last instruction was STI that set IF: one more runs before interrupts.
    pub shadow_sti: bool,
    /// The last instruction was MOV SS or POP SS.
    pub shadow_mov_ss: bool,
}
