//! What a guest waits for by hypercalls: its timer, which sends an event, and polls of event channels. `kvm_xen_start_timer`,
//! `kvm_xen_inject_timer_irqs`, `kvm_xen_schedop_poll`.
//!
//! The owner of the vCPU looks whether they are due; the VM's alarm brings it to look. Without local APICs here there is no alarm: the
//! loop around the guest looks at the time itself, and nobody polls.

use kvm_abi::consts::{KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE};
use kvm_abi::{KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL, XenAttr};
use nix::errno::Errno;

use super::event::{ANY, NOTHING, check_priority};
use crate::chip::alarm::{Who, monotonic_ns};
use crate::machine::host_tsc;
use crate::vcpu::Vcpu;

/// A vCPU's timer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Timer {
    /// Where it sends its event; 0: user space has the timer.
    port: u32,
    /// When, by the VM's clock, as it was asked for; 0: it is not set.
    expires: u64,
    /// The same by the monotonic clock.
    due: Option<u64>,
}

/// A vCPU that sleeps in a poll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Poll {
    /// By the monotonic clock, ns. `None`: for ever.
    until: Option<u64>,
}

impl Vcpu {
    /// The VM's clock.
    pub(crate) fn xen_now(&self) -> u64 {
        self.vm.time.ns_at(host_tsc())
    }

    /// User space lets the kernel have the timer.
    pub(crate) fn has_xen_timer(&self) -> bool {
        self.xen.timer.port != 0
    }

    /// Sets the timer to `expires` by the VM's clock; what is past is due at once.
    pub(crate) fn start_xen_timer(&mut self, expires: u64) {
        let left = (expires.wrapping_sub(self.xen_now()) as i64).max(0);
        self.set_xen_timer(expires, Some(monotonic_ns().saturating_add(left as u64)));
    }

    pub(crate) fn stop_xen_timer(&mut self) {
        self.set_xen_timer(0, None);
    }

    fn set_xen_timer(&mut self, expires: u64, due: Option<u64>) {
        let timer = &mut self.xen.timer;
        let changes = timer.due != due;
        (timer.expires, timer.due) = (expires, due);
        if let Some(apic) = self.machine.apic()
            && changes
        {
            apic.chip.set_alarm(Who::Xen(self.id), due);
        }
    }

    /// `KVM_XEN_VCPU_ATTR_TYPE_TIMER`: port, priority, when; 0: not. EINVAL: not a channel of two levels.
    pub(super) fn load_xen_timer(&mut self, attr: &XenAttr) -> Result<(), Errno> {
        let (port, expires) = (attr.word(0), attr.u[1]);
        if port != 0 {
            check_priority(attr.word(1))?;
        }
        self.stop_xen_timer();
        self.xen.timer.port = port;
        if port != 0 && expires != 0 {
            self.start_xen_timer(expires);
        }
        Ok(())
    }

    pub(super) fn show_xen_timer(&self, attr: &mut XenAttr) {
        attr.set_word(0, self.xen.timer.port);
        attr.set_word(1, KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL);
        attr.u[1] = self.xen.timer.expires;
    }

    /// A timer that is due sends its event, and is not set any more. An event that cannot be sent is lost.
    pub(super) fn ring_xen_timer(&mut self) {
        let Timer { port, due: Some(due), .. } = self.xen.timer else { return };
        if self.vm.options.xen.intercepts() && port != 0 && due <= monotonic_ns() {
            self.stop_xen_timer();
            let _ = self.vm.options.xen.send(self.id, port);
            // Whatever it polls for (`xen_timer_callback`).
            self.xen.events.end_poll();
        }
    }

    /// When the loop around the guest is to look at the timer by itself, ns of the monotonic clock.
    pub(crate) fn xen_timer_without_alarm(&self) -> Option<u64> {
        let watches = self.machine.apic().is_none() && self.has_xen_timer() && self.vm.options.xen.intercepts();
        self.xen.timer.due.filter(|_| watches)
    }

    /// The vCPU sleeps until one of these channels, or with none or several any, has an event for it; or, unless `timeout` is 0, for so
    /// many ns. Not at all if one has already. Events that are not masked end it too, as do interrupts.
    pub(crate) fn begin_xen_poll(&mut self, ports: &[u32], timeout: u64) {
        let events = &self.xen.events;
        // Who sends sets the bit first, and then looks at this.
        events.begin_poll(if let &[port] = ports { port.into() } else { ANY });
        if self.vm.options.xen.has_event(ports) {
            return events.end_poll();
        }
        let until = (timeout != 0).then(|| monotonic_ns().saturating_add(timeout));
        self.xen.poll = Some(Poll { until });
        self.mp_state = KVM_MP_STATE_HALTED;
    }

    /// Until when it sleeps.
    pub(crate) fn xen_poll_until(&self) -> Option<u64> {
        self.xen.poll?.until
    }

    /// Looks whether its end has come.
    pub(crate) fn look_at_xen_poll(&mut self) {
        let Some(poll) = self.xen.poll else { return };
        if self.xen.events.polls_for() == NOTHING || poll.until.is_some_and(|until| until <= monotonic_ns()) {
            self.end_xen_poll();
        }
    }

    /// The vCPU goes on, if it polls.
    pub(crate) fn end_xen_poll(&mut self) {
        if self.xen.poll.take().is_some() {
            self.xen.events.end_poll();
            // Unless INIT came.
            if self.mp_state == KVM_MP_STATE_HALTED {
                self.mp_state = KVM_MP_STATE_RUNNABLE;
            }
        }
    }
}
