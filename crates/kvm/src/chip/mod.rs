//! Interrupt controllers in the kernel: the chips of a VM, the local APIC of each vCPU, and the time that both need.
//!
//! The models are `irqchip`'s. Here are the ports and addresses that guests know them at, the thread that rings for timers
//! ([`alarm`]), eventfds ([`irqfd`]), the loop of `KVM_RUN` for a vCPU with an APIC ([`run`]), and KVM's layouts ([`state`]).
//!
//! Locks: `irqchip::router` says which its chips have. `irqfds` and the alarm's list are innermost and held for a moment.

pub(crate) mod alarm;
mod bus;
pub(crate) mod irqfd;
mod pages;
mod run;
pub(crate) mod state;
mod vcpu;
mod waker;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Weak};

use irqchip::router::Listener;
use irqchip::{Irqchip, Lapic, Pit, Route, Wake};
use nix::errno::Errno;
use parking_lot::RwLock;

use self::alarm::{Alarm, Who, monotonic_ns};
pub(crate) use self::bus::{read_memory, write_memory};
use self::irqfd::Irqfds;
pub(crate) use self::vcpu::VcpuApic;
pub(crate) use self::waker::Waker;
use crate::caps::MAX_VCPU_ID;
use crate::xen::Xen;

/// The interrupt controllers of a VM.
pub(crate) struct Chip {
    pub(crate) wires: Irqchip,
    alarm: Arc<Alarm>,
    irqfds: Irqfds,
    /// By vCPU id.
    wakers: RwLock<BTreeMap<u32, Arc<Waker>>>,
    /// Port 61H is answered here (`KVM_PIT_SPEAKER_DUMMY`).
    speaker: AtomicBool,
}

/// The wires tell the chip that they are part of.
struct Told(Weak<Chip>, Arc<Xen>);

impl Listener for Told {
    fn ended(&self, chip: Route) {
        let Some(chips) = self.0.upgrade() else { return };
        for gsi in chips.wires.gsis_of(chip) {
            chips.wires.gsi_ended(gsi);
            chips.resample(gsi);
        }
    }

    fn eoi_for_user(&self, lapic: &Lapic, vector: u8) {
        let Some(chips) = self.0.upgrade() else { return };
        if let Some(waker) = chips.wakers.read().get(&lapic.id()) {
            waker.put_eoi(vector);
        }
    }

    fn event(&self, vcpu: u32, port: u32) -> i32 {
        self.1.send(vcpu, port).map_or(-1, i32::from)
    }
}

impl Chip {
    /// `split`: only local APICs, and how many pins user space's I/O APICs have. EAGAIN, EMFILE: no thread or descriptors.
    pub(crate) fn new(split: Option<u32>, xen: &Arc<Xen>) -> Result<Arc<Self>, Errno> {
        let alarm = Arc::new(Alarm::new()?);
        let chip = Arc::new_cyclic(|chip: &Weak<Self>| Self {
            wires: Irqchip::new(split, MAX_VCPU_ID as usize, Box::new(Told(chip.clone(), xen.clone()))),
            alarm: alarm.clone(),
            irqfds: Irqfds::default(),
            wakers: RwLock::default(),
            speaker: AtomicBool::new(false),
        });
        alarm.start(Arc::downgrade(&chip))?;
        Ok(chip)
    }

    /// Adds the timer. EEXIST: there is one.
    pub(crate) fn create_pit(&self, speaker: bool) -> Result<(), Errno> {
        if !self.wires.add_pit(Pit::new()) {
            return Err(Errno::EEXIST);
        }
        self.speaker.store(speaker, Relaxed);
        Ok(())
    }

    /// Rings for `who` at `at`, ns of the monotonic clock, or not any more.
    pub(crate) fn set_alarm(&self, who: Who, at: Option<u64>) {
        self.alarm.set(who, at);
    }

    /// The timer's next tick may have moved.
    pub(crate) fn arm_pit(&self) {
        let next = self.wires.with_pit(|pit| pit.next()).flatten();
        self.alarm.set(Who::Pit, next);
    }

    /// Time has come.
    fn ring(&self, who: Who) {
        match who {
            Who::Pit => {
                self.wires.advance_pit(monotonic_ns());
                self.arm_pit();
            }
            Who::Xen(id) => {
                if let Some(waker) = self.wakers.read().get(&id) {
                    waker.wake();
                }
            }
            Who::Vcpu(id) => {
                if let Some(waker) = self.wakers.read().get(&id) {
                    waker.rung.store(true, Relaxed);
                    waker.wake();
                }
            }
        }
    }
}

impl Drop for Chip {
    fn drop(&mut self) {
        self.alarm.stop();
    }
}
