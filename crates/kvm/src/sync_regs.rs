//! Registers that travel in `kvm_run` with each `KVM_RUN`. api.rst, "KVM_CAP_SYNC_REGS".

use kvm_abi::consts::{KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS};
use nix::errno::Errno;

use crate::ioctl::vcpu;
use crate::vcpu::Vcpu;

/// What there is: the answer to `KVM_CHECK_EXTENSION`.
pub(crate) const FIELDS: u32 = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;

fn has(bits: u64, field: u32) -> bool {
    bits & u64::from(field) != 0
}

impl Vcpu {
    /// Loads what user space has changed (`sync_regs`). EINVAL: a field that is none, or values that its ioctl refuses.
    pub(crate) fn load_synced(&mut self) -> Result<(), Errno> {
        let (valid, dirty) = self.page.sync_regs();
        if (valid | dirty) & !u64::from(FIELDS) != 0 {
            return Err(Errno::EINVAL);
        }
        if has(dirty, KVM_SYNC_X86_REGS) {
            let regs = self.page.synced_regs();
            vcpu::set_regs(self, &regs)?;
            self.page.synced(KVM_SYNC_X86_REGS);
        }
        if has(dirty, KVM_SYNC_X86_SREGS) {
            let sregs = self.page.synced_sregs();
            vcpu::set_sregs(self, &sregs)?;
            self.page.synced(KVM_SYNC_X86_SREGS);
        }
        if has(dirty, KVM_SYNC_X86_EVENTS) {
            let events = self.page.synced_events();
            vcpu::set_vcpu_events(self, &events)?;
            self.page.synced(KVM_SYNC_X86_EVENTS);
        }
        Ok(())
    }

    /// Shows what user space wants to see, after every return (`store_regs`).
    pub(crate) fn store_synced(&mut self) -> Result<(), Errno> {
        let (wanted, _) = self.page.sync_regs();
        if has(wanted, KVM_SYNC_X86_REGS) {
            let regs = vcpu::get_regs(self)?;
            self.page.show_regs(&regs);
        }
        if has(wanted, KVM_SYNC_X86_SREGS) {
            let sregs = vcpu::get_sregs(self)?;
            self.page.show_sregs(&sregs);
        }
        if has(wanted, KVM_SYNC_X86_EVENTS) {
            let events = vcpu::get_vcpu_events(self)?;
            self.page.show_events(&events);
        }
        Ok(())
    }
}
