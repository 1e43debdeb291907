//! Run states: how long a vCPU ran, waited for a CPU, was blocked and offline. `kvm_xen_update_runstate`, `kvm_xen_update_runstate_guest`.
//!
//! Running and waiting are seen here, by what steal time is told from (`steal.rs`), of which this takes the place; the other two are
//! user space's to say. A vCPU in user space or in HLT runs, as far as Xen's guests are told.

use std::sync::atomic::{Ordering::SeqCst, fence};

use kvm_abi::XenAttr;
use mmu::View;
use nix::errno::Errno;
use x86_defs::GuestPhysAddr;

use crate::client::Client;
use crate::vcpu::Vcpu;

/// RUNSTATE_…: what each time of [`Runstate::times`] is of.
const RUNNING: u32 = 0;
const RUNNABLE: u32 = 1;
const OFFLINE: u32 = 3;
/// XEN_RUNSTATE_UPDATE, in the time of entry: the rest is being written.
const UPDATE: u64 = 1 << 63;

/// Times are of the VM's clock, ns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Runstate {
    state: u32,
    /// Since when; 0: never, and the vCPU was offline.
    entry: u64,
    times: [u64; 4],
}

impl Runstate {
    /// The vCPU goes over to `state`. Of the time up to now it has waited for `waited`, which counts if it ran.
    fn enter(&mut self, state: u32, now: u64, waited: u64) {
        let mut passed = now.wrapping_sub(self.entry);
        if self.entry == 0 {
            self.state = OFFLINE;
        }
        if self.state == RUNNING {
            let waited = waited.min(passed);
            passed -= waited;
            self.add(RUNNABLE, waited);
        }
        self.add(self.state, passed);
        (self.state, self.entry) = (state, now);
    }

    fn add(&mut self, state: u32, ns: u64) {
        let time = &mut self.times[state as usize];
        *time = time.wrapping_add(ns);
    }

    fn sum(times: &[u64]) -> u64 {
        times.iter().fold(0, |sum, &time| sum.wrapping_add(time))
    }

    /// Shows it to the guest, `times` behind the state. Memory that is gone is passed over, as in Linux.
    fn write(&self, view: &View, gpa: GuestPhysAddr, times: u64) -> Option<()> {
        let entry = gpa.wrapping_add(times);
        let write = |at: GuestPhysAddr, bytes: &[u8]| {
            let written = view.write(at, bytes);
            fence(SeqCst);
            written.ok()
        };
        write(entry, &(self.entry | UPDATE).to_le_bytes())?;
        write(gpa, &self.state.to_le_bytes())?;
        write(entry.wrapping_add(8), self.times.map(u64::to_le_bytes).as_flattened())?;
        write(entry, &self.entry.to_le_bytes())
    }

    /// `KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA`: state, entry, times.
    pub(super) fn show(&self, attr: &mut XenAttr) {
        (attr.u[0], attr.u[1]) = (self.state.into(), self.entry);
        attr.u[2..6].copy_from_slice(&self.times);
    }

    /// `KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT`
    pub(super) fn state(&self) -> u32 {
        self.state
    }
}

impl Vcpu {
    /// Called before each entry of a VM that is Xen's: the vCPU runs now.
    pub(crate) fn take_runstate(&mut self, client: &dyn Client, now: u64) {
        if self.steal.is_due(now) {
            self.enter_runstate(client, RUNNING);
            if let Some(gpa) = self.xen.runstate_info.get() {
                let times = self.vm.options.xen.layout().runstate_times;
                let _ = self.xen.runstate.write(self.steal.view(), gpa, times);
            }
        }
    }

    /// `KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT`. EINVAL: there is no such state.
    pub(super) fn set_runstate(&mut self, client: &dyn Client, state: u64) -> Result<(), Errno> {
        let state = checked(state)?;
        self.change_runstate(client, state);
        Ok(())
    }

    /// User space has it another state.
    fn change_runstate(&mut self, client: &dyn Client, state: u32) {
        // This thread of ours is not the one of the last KVM_RUN.
        self.begin_steal();
        self.enter_runstate(client, state);
        self.steal.forgive();
    }

    fn enter_runstate(&mut self, client: &dyn Client, state: u32) {
        let waited = self.steal.waited(client);
        let now = self.xen_now();
        self.xen.runstate.enter(state, now, waited);
    }

    /// `KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA`: all of it. EINVAL: no such state, times that do not add up to that of the entry, which
    /// is to come.
    pub(super) fn load_runstate(&mut self, client: &dyn Client, attr: &XenAttr) -> Result<(), Errno> {
        let (state, entry) = (checked(attr.u[0])?, attr.u[1]);
        let times = [attr.u[2], attr.u[3], attr.u[4], attr.u[5]];
        if entry != Runstate::sum(&times) || self.xen_now() < entry {
            return Err(Errno::EINVAL);
        }
        // What it has waited up to now was before.
        self.change_runstate(client, state);
        self.xen.runstate = Runstate { state, entry, times };
        Ok(())
    }

    /// `KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST`: so much more of each, and another state unless that is all ones. EINVAL as
    /// [`Self::load_runstate`].
    pub(super) fn adjust_runstate(&mut self, client: &dyn Client, attr: &XenAttr) -> Result<(), Errno> {
        let state = if attr.u[0] == u64::MAX { None } else { Some(checked(attr.u[0])?) };
        let (entry, times) = (attr.u[1], &attr.u[2..6]);
        let moved = self.xen.runstate.entry.wrapping_add(entry);
        if entry != Runstate::sum(times) || self.xen_now() < moved {
            return Err(Errno::EINVAL);
        }
        self.xen.runstate.entry = moved;
        for (number, &time) in (0..).zip(times) {
            self.xen.runstate.add(number, time);
        }
        if let Some(state) = state {
            self.change_runstate(client, state);
        }
        Ok(())
    }
}

fn checked(state: u64) -> Result<u32, Errno> {
    if state <= OFFLINE.into() { Ok(state as u32) } else { Err(Errno::EINVAL) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `kvm_xen_update_runstate`
    #[test]
    fn times_add_up_to_that_of_the_entry() {
        let mut runstate = Runstate::default();
        runstate.enter(RUNNING, 1000, 700);
        assert_eq!(runstate, Runstate { state: RUNNING, entry: 1000, times: [0, 0, 0, 1000] }, "it was offline");
        runstate.enter(2, 1500, 200);
        assert_eq!(runstate, Runstate { state: 2, entry: 1500, times: [300, 200, 0, 1000] });
        runstate.enter(RUNNING, 1600, 50);
        assert_eq!(runstate.times, [300, 200, 100, 1000], "who is blocked waits for no CPU");
        // The clock was set back.
        runstate.enter(RUNNING, 1550, 0);
        assert_eq!(Runstate::sum(&runstate.times), 1550);
    }
}
