//! A debugger of the guest: `KVM_SET_GUEST_DEBUG`, and 2007's `KVM_DEBUG_GUEST` in its terms.
//!
//! The debugger's #DB and #BP exit instead of reaching the guest. Its breakpoints are in force in the place of the
//! guest's own, whose registers the guest goes on using; its single steps use RFLAGS.TF, which `KVM_GET_REGS` hides.

use cpu_core::{Breakpoints, Events, PendingException};
use kvm_abi::consts::*;
use kvm_abi::legacy::kvm_debug_guest;
use kvm_abi::{Plain, kvm_guest_debug};
use nix::errno::Errno;
use x86_defs::{Rflags, vector};

use crate::vcpu::Vcpu;

/// Bits of `control` that there are: the answer for `KVM_CAP_SET_GUEST_DEBUG2`.
pub(crate) const CONTROLS: u32 = KVM_GUESTDBG_ENABLE
    | KVM_GUESTDBG_SINGLESTEP
    | KVM_GUESTDBG_USE_HW_BP
    | KVM_GUESTDBG_USE_SW_BP
    | KVM_GUESTDBG_INJECT_BP
    | KVM_GUESTDBG_INJECT_DB
    | KVM_GUESTDBG_BLOCKIRQ;

/// DR7's enable bit of breakpoint 0 for all tasks; breakpoint n has it 2n higher.
const G0: u64 = 2;
/// DR7 bit 10, which always reads as 1.
const DR7_FIXED: u64 = 0x400;

fn single_steps(vcpu: &Vcpu) -> bool {
    vcpu.guest_debug.control & KVM_GUESTDBG_SINGLESTEP != 0
}

/// `KVM_GUESTDBG_BLOCKIRQ`: interrupts and NMIs wait. A vector that is on its way already (`KVM_INTERRUPT` without a local
/// APIC here) does not.
pub(crate) fn blocks_interrupts(vcpu: &Vcpu) -> bool {
    vcpu.guest_debug.control & KVM_GUESTDBG_BLOCKIRQ != 0
}

/// RFLAGS bits of the debugger that the API does not show.
pub(crate) fn hidden_flags(vcpu: &Vcpu) -> u64 {
    if single_steps(vcpu) { (Rflags::TF | Rflags::RF).bits() } else { 0 }
}

/// RFLAGS bits that a debugger keeps set.
pub(crate) fn forced_flags(vcpu: &Vcpu) -> u64 {
    if single_steps(vcpu) { Rflags::TF.bits() } else { 0 }
}

/// 2007's request: execution breakpoints and single steps.
pub(crate) fn of_legacy(debug: &kvm_debug_guest) -> kvm_guest_debug {
    let mut out: kvm_guest_debug = Plain::zeroed();
    if debug.enabled == 0 {
        return out;
    }
    out.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
    if debug.singlestep != 0 {
        out.control |= KVM_GUESTDBG_SINGLESTEP;
    }
    out.arch.debugreg[7] = DR7_FIXED;
    for (n, breakpoint) in debug.breakpoints.iter().enumerate().filter(|(_, breakpoint)| breakpoint.enabled != 0) {
        out.arch.debugreg[n] = breakpoint.address;
        out.arch.debugreg[7] |= G0 << (2 * n);
    }
    out
}

/// Replaces what the debugger wants. EBUSY: a trap is to be injected while an exception waits.
pub(crate) fn set(vcpu: &mut Vcpu, debug: &kvm_guest_debug) -> Result<(), Errno> {
    if debug.control & (KVM_GUESTDBG_INJECT_DB | KVM_GUESTDBG_INJECT_BP) != 0 {
        let events = vcpu.cpu.events();
        if events.exception.is_some() {
            return Err(Errno::EBUSY);
        }
        let vector = if debug.control & KVM_GUESTDBG_INJECT_DB != 0 { vector::DB } else { vector::BP };
        vcpu.cpu.set_events(Events { exception: Some(PendingException::new(vector, None)), ..events });
    }
    let mut regs = vcpu.cpu.regs();
    regs.rflags &= !hidden_flags(vcpu);
    vcpu.guest_debug = if debug.control & KVM_GUESTDBG_ENABLE != 0 { *debug } else { Plain::zeroed() };
    regs.rflags |= forced_flags(vcpu);
    vcpu.cpu.set_regs(&regs);

    let control = vcpu.guest_debug.control;
    let mut exiting = 0;
    if control & (KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_USE_HW_BP) != 0 {
        exiting |= 1 << vector::DB;
    }
    if control & KVM_GUESTDBG_USE_SW_BP != 0 {
        exiting |= 1 << vector::BP;
    }
    vcpu.cpu.set_exception_bitmap(exiting);
    vcpu.cpu.hold_nmi(blocks_interrupts(vcpu));

    let [db0, db1, db2, db3, .., dr7] = vcpu.guest_debug.arch.debugreg;
    let breakpoints = Breakpoints { db: [db0, db1, db2, db3], dr7 };
    vcpu.cpu.set_debugger((control & KVM_GUESTDBG_USE_HW_BP != 0).then_some(breakpoints));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_abi::legacy::kvm_breakpoint;

    #[test]
    fn breakpoints_of_2007_become_dr7_bits() {
        let mut debug = kvm_debug_guest { enabled: 1, singlestep: 1, ..Default::default() };
        debug.breakpoints[0] = kvm_breakpoint { enabled: 1, padding: 0, address: 0x1000 };
        debug.breakpoints[3] = kvm_breakpoint { enabled: 1, padding: 0, address: 0x3000 };
        let modern = of_legacy(&debug);
        assert_eq!(modern.arch.debugreg, [0x1000, 0, 0, 0x3000, 0, 0, 0, 0x400 | 0x2 | 0x80]);
        assert_eq!(modern.control, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP | KVM_GUESTDBG_SINGLESTEP);
        debug.enabled = 0;
        assert_eq!(of_legacy(&debug).control, 0);
    }
}
