//! The x87 FPU: D8 to DF and WAIT. SDM Vol. 1 chapter 8; Vol. 2, the page of each mnemonic.

pub(super) mod arith;
pub(super) mod control;
pub(super) mod moves;
mod run;
#[cfg(test)]
mod tests;

use crate::cpu::{Cpu, Stop, fp_gate};
use crate::fault::Fault;
use crate::state::Fpu;
use crate::{host_simd, host_x87};

/// Exception flags of FSW and masks of FCW: IE DE ZE OE UE PE.
pub(crate) const EXCEPTIONS: u16 = 0x3f;
/// FSW: condition codes.
pub(crate) const C1: u16 = 1 << 9;
/// See [`C1`].
pub(crate) const C2: u16 = 1 << 10;
/// C0 to C3.
pub(crate) const CC: u16 = 0x4700;
/// FSW: an unmasked exception waits.
pub(crate) const ES: u16 = 1 << 7;
/// FSW: busy, a copy of ES.
pub(crate) const BUSY: u16 = 1 << 15;

impl Fpu {
    /// Loads FCW: bit 6 is always set, bits 7 and 15:13 never.
    pub(crate) fn set_fcw(&mut self, value: u16) {
        self.fcw = value & 0x1f3f | 0x40;
    }

    /// Makes ES and B what flags and masks say.
    pub(crate) fn settle_summary(&mut self) {
        let pending = self.fsw & !self.fcw & EXCEPTIONS != 0;
        self.fsw = self.fsw & !(ES | BUSY) | (u16::from(pending) * (ES | BUSY));
    }

    /// Whatever was loaded from outside becomes a state that a processor can be in, and the host's flags follow it.
    pub(crate) fn settle(&mut self) {
        self.set_fcw(self.fcw);
        self.settle_summary();
        self.mxcsr &= crate::isa::MXCSR_MASK;
        host_simd::follow(self.mxcsr);
        host_x87::forget_flags();
    }

    /// State after FNINIT.
    pub(crate) fn init_x87(&mut self) {
        self.fcw = 0x37f;
        self.fsw = 0;
        self.ftw = 0;
        self.fop = 0;
        self.fip = 0;
        self.fdp = 0;
        self.fcs = 0;
        self.fds = 0;
    }
}

impl Cpu {
    /// #NM where CR0 holds x87 back.
    #[inline(always)]
    pub(crate) fn require_x87(&mut self) -> Result<(), Stop> {
        if self.fp_gate & (fp_gate::TS | fp_gate::EM) == 0 { Ok(()) } else { Err(self.fault(Fault::NM)) }
    }

    /// As [`Self::require_x87`], then #MF if an unmasked exception waits. CR0.NE is 1 under VMX whatever the guest sees
    /// (SDM Vol. 3 "Restrictions on VMX Operation"), so FERR# is never raised.
    #[inline(always)]
    pub(crate) fn wait_x87(&mut self) -> Result<(), Stop> {
        self.require_x87()?;
        if self.fpu.fsw & ES == 0 { Ok(()) } else { Err(self.fault(Fault::MF)) }
    }
}
