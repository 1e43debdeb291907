//! Event channels of two levels, and how they reach a vCPU. `kvm_xen_set_evtchn_fast` and its kin.
//!
//! A channel has a bit in shared_info, and one that masks it. A bit that is new and not masked sets one in vcpu_info for its word, and
//! vcpu_info's byte that says so. That byte interrupts the guest by the VM's vector, past the local APIC and while it is not 0
//! (`HVM_PARAM_CALLBACK_IRQ`); or the event is a message to the local APIC, where a vCPU has a vector of its own.
//!
//! Any thread sends. Bits are set by byte, atomically, so an area may lie at any address. What came while vcpu_info could not be
//! written waits here for the vCPU's owner.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

use irqchip::{DeliveryMode, Lapic, Message, Wake};
use kvm_abi::consts::{KVM_XEN_EVTCHN_DEASSIGN, KVM_XEN_EVTCHN_RESET, KVM_XEN_EVTCHN_UPDATE};
use kvm_abi::{KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL, XenAttr};
use mmu::{Memory, View};
use nix::errno::Errno;
use x86_defs::GuestPhysAddr;

use super::{INFO_CLOCK, Place, Shared, Xen};
use crate::chip::Waker;
use crate::client::Client;
use crate::eventfd::EventFd;
use crate::vcpu::Vcpu;

/// What a vCPU polls for beside a channel: any of them.
pub(super) const ANY: u64 = 1 << 32;
/// It does not poll.
pub(super) const NOTHING: u64 = u64::MAX;

/// What a vCPU has that other threads use too.
pub(crate) struct Events {
    id: u32,
    /// struct vcpu_info: upcall_pending in its first byte.
    pub(super) info: Place,
    /// Bits for its pending_sel that wait for it.
    waiting: AtomicU64,
    /// The vector of the vCPU's own, by way of its local APIC; 0: none.
    pub(super) upcall_vector: AtomicU8,
    pub(super) shared: Shared,
    /// The channel that the vCPU polls, [`ANY`] or [`NOTHING`].
    polls_for: AtomicU64,
    lapic: Option<Arc<Lapic>>,
    waker: Arc<Waker>,
}

impl Events {
    pub(crate) fn new(id: u32, memory: Arc<Memory>, lapic: Option<Arc<Lapic>>, waker: Arc<Waker>) -> Arc<Self> {
        Arc::new(Self {
            id,
            info: Place::default(),
            waiting: AtomicU64::new(0),
            upcall_vector: AtomicU8::new(0),
            shared: Shared::new(memory),
            polls_for: AtomicU64::new(NOTHING),
            lapic,
            waker,
        })
    }

    /// The vCPU's id.
    pub(super) fn id(&self) -> u32 {
        self.id
    }

    pub(super) fn clock(&self) -> Option<GuestPhysAddr> {
        self.info.get().map(|info| info.wrapping_add(INFO_CLOCK))
    }

    /// vcpu_info says so, if there is one.
    fn is_pending(&self) -> bool {
        self.info.get().is_some_and(|info| {
            let mut pending = [0];
            self.shared.with(|view| view.read(info, &mut pending)).is_ok() && pending != [0]
        })
    }

    pub(super) fn polls_for(&self) -> u64 {
        self.polls_for.load(SeqCst)
    }

    pub(super) fn begin_poll(&self, what: u64) {
        self.polls_for.store(what, SeqCst);
    }

    pub(super) fn end_poll(&self) {
        self.begin_poll(NOTHING);
    }

    /// The vCPU is brought to look, and out of its poll.
    fn unblock(&self) {
        self.end_poll();
        self.waker.wake();
    }

    /// Tells of an event in word `word` of the channels; `selector`: where pending_sel is.
    fn tell(&self, info: GuestPhysAddr, selector: u64, word: u32) {
        let was_told = self.shared.with(|view| {
            let was_set = set_bit(view, info.wrapping_add(selector), word)?;
            if !was_set {
                view.write(info, &[1]).ok()?;
            }
            Some(was_set)
        });
        match was_told {
            Some(true) => {}
            Some(false) if self.interrupt() => {}
            Some(false) => self.unblock(),
            None => {
                if self.waiting.fetch_or(1 << word, SeqCst) & 1 << word == 0 {
                    self.unblock();
                }
            }
        }
    }

    /// By the vector of its own. False: it has none. `kvm_xen_inject_vcpu_vector`
    fn interrupt(&self) -> bool {
        let vector = self.upcall_vector.load(Relaxed);
        let Some(lapic) = self.lapic.as_ref().filter(|_| vector != 0) else { return false };
        let (mode, dest) = (DeliveryMode::Fixed, self.id);
        lapic.accept(&Message { vector, mode, dest, logical: false, level: false, assert: true });
        true
    }
}

/// Sets bit `bit` of an array at `gpa`; whether it was set. `None`: no memory is there that can be written.
fn set_bit(view: &View, gpa: GuestPhysAddr, bit: u32) -> Option<bool> {
    let mask = 1 << (bit % 8);
    Some(view.fetch_or_u8(gpa.wrapping_add(u64::from(bit / 8)), mask)? & mask != 0)
}

/// `None`: no memory is there.
fn has_bit(view: &View, gpa: GuestPhysAddr, bit: u32) -> Option<bool> {
    let mut byte = [0];
    view.read(gpa.wrapping_add(u64::from(bit / 8)), &mut byte).ok()?;
    Some(byte[0] >> (bit % 8) & 1 != 0)
}

/// EVTCHNSTAT_… of include/xen/interface/event_channel.h: what a port that a guest sends on is bound to.
const INTERDOMAIN: u32 = 2;
const IPI: u32 = 5;

/// Where what a guest sends on a port goes.
pub(super) enum Target {
    /// To itself.
    Channel { type_: u32, vcpu: u32, port: u32 },
    /// To user space.
    EventFd(EventFd),
}

impl Xen {
    /// The vector that interrupts this vCPU now. `kvm_xen_has_interrupt`
    pub(crate) fn upcall(&self, vcpu: &Events) -> Option<u8> {
        if !self.is_on() {
            return None;
        }
        let vector = self.upcall_vector.load(Relaxed);
        (vector != 0 && vcpu.is_pending()).then_some(vector)
    }

    /// Sends an event to the vCPU of this id: whether it is new. ENOTCONN: it is, and masked. EINVAL: no such vCPU or channel, or nothing
    /// is shared that tells of it. EFAULT: shared_info is not in memory.
    pub(crate) fn send(&self, vcpu: u32, port: u32) -> Result<bool, Errno> {
        let layout = self.layout();
        let vcpu = self.vcpus.read().get(&vcpu).cloned().ok_or(Errno::EINVAL)?;
        let info = vcpu.info.get().ok_or(Errno::EINVAL)?;
        if port >= layout.channels {
            return Err(Errno::EINVAL);
        }
        let shared = self.shared_info.get().ok_or(Errno::EINVAL)?;
        let was_set_and_is_masked = self.shared.with(|view| {
            let was_set = set_bit(view, shared.wrapping_add(layout.pending), port)?;
            Some((was_set, has_bit(view, shared.wrapping_add(layout.mask), port)?))
        });
        match was_set_and_is_masked.ok_or(Errno::EFAULT)? {
            (true, _) => Ok(false),
            (false, true) => {
                if [port.into(), ANY].contains(&vcpu.polls_for()) {
                    vcpu.unblock();
                }
                Err(Errno::ENOTCONN)
            }
            (false, false) => {
                vcpu.tell(info, layout.selector, port / layout.word_bits);
                Ok(true)
            }
        }
    }

    /// One of these channels has an event; or there is no shared_info to say so. `wait_pending_event`
    pub(super) fn has_event(&self, ports: &[u32]) -> bool {
        let Some(shared) = self.shared_info.get() else { return true };
        let pending = shared.wrapping_add(self.layout().pending);
        self.shared.with(|view| {
            has_bit(view, pending, 0).is_none() || ports.iter().any(|&port| has_bit(view, pending, port) == Some(true))
        })
    }

    /// So many channels there are.
    pub(crate) fn channels(&self) -> u32 {
        self.layout().channels
    }

    /// `KVM_XEN_HVM_EVTCHN_SEND`: port, vCPU, priority. EINVAL: not a channel of two levels, and as [`Self::send`]. EFAULT.
    pub(crate) fn send_by_user(&self, &[port, vcpu, priority]: &[u32; 3]) -> Result<(), Errno> {
        self.check_port(port)?;
        check_priority(priority)?;
        match self.send(vcpu, port) {
            Ok(_) | Err(Errno::ENOTCONN) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    fn check_port(&self, port: u32) -> Result<(), Errno> {
        if (1..self.layout().channels).contains(&port) { Ok(()) } else { Err(Errno::EINVAL) }
    }

    /// The guest sends on one of its ports. False: user space is to see to it. `kvm_xen_hcall_evtchn_send`
    pub(crate) fn send_by_guest(&self, port: u32) -> bool {
        let (vcpu, port) = match self.ports.lock().get(&port) {
            None => return false,
            Some(Target::EventFd(event)) => {
                event.signal();
                return true;
            }
            Some(&Target::Channel { vcpu, port, .. }) => (vcpu, port),
        };
        matches!(self.send(vcpu, port), Ok(_) | Err(Errno::ENOTCONN))
    }

    /// `KVM_XEN_ATTR_TYPE_EVTCHN`: port, type, flags, and where it goes: a port, a vCPU (or an eventfd, with port 0) and a priority.
    /// EINVAL: no such port, type or priority, or an update of what stays. ENOENT: nothing was there. EEXIST: something is. EBADF.
    pub(super) fn set_port(&self, client: &dyn Client, attr: &XenAttr) -> Result<(), Errno> {
        let [port, type_, flags, to, vcpu, priority] = std::array::from_fn(|word| attr.word(word));
        if flags == KVM_XEN_EVTCHN_RESET {
            self.ports.lock().clear();
            return Ok(());
        }
        self.check_port(port)?;
        match flags {
            KVM_XEN_EVTCHN_DEASSIGN => self.ports.lock().remove(&port).map(drop).ok_or(Errno::ENOENT),
            KVM_XEN_EVTCHN_UPDATE => {
                let mut ports = self.ports.lock();
                match ports.get_mut(&port).ok_or(Errno::ENOENT)? {
                    Target::Channel { type_: old, vcpu: old_vcpu, port: old_to } if *old == type_ && *old_to == to => {
                        check_priority(priority)?;
                        *old_vcpu = vcpu;
                        Ok(())
                    }
                    _ => Err(Errno::EINVAL),
                }
            }
            0 => {
                let target = match type_ {
                    IPI if to != port => return Err(Errno::EINVAL),
                    INTERDOMAIN if to == 0 => Target::EventFd(EventFd::new(client.descriptor(vcpu as i32)?)?),
                    IPI | INTERDOMAIN => {
                        self.check_port(to)?;
                        check_priority(priority)?;
                        Target::Channel { type_, vcpu, port: to }
                    }
                    _ => return Err(Errno::EINVAL),
                };
                match self.ports.lock().entry(port) {
                    Entry::Occupied(_) => Err(Errno::EEXIST),
                    Entry::Vacant(place) => {
                        place.insert(target);
                        Ok(())
                    }
                }
            }
            _ => Err(Errno::EINVAL),
        }
    }

    /// Software has enabled the local APIC of this vCPU, which takes messages from now on. `kvm_xen_sw_enable_lapic`
    pub(crate) fn apic_enabled(&self, vcpu: u32) {
        if !self.is_on() {
            return;
        }
        let vcpu = self.vcpus.read().get(&vcpu).cloned();
        if let Some(vcpu) = vcpu.filter(|vcpu| vcpu.is_pending()) {
            vcpu.interrupt();
        }
    }
}

/// EINVAL: a channel of another kind than two levels.
pub(crate) fn check_priority(priority: u32) -> Result<(), Errno> {
    if priority == KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL { Ok(()) } else { Err(Errno::EINVAL) }
}

pub(super) type Ports = BTreeMap<u32, Target>;

impl Vcpu {
    /// See [`Xen::upcall`].
    pub(crate) fn upcall(&self) -> Option<u8> {
        self.vm.options.xen.upcall(&self.xen.events)
    }

    /// Events wait for vcpu_info, which is not in memory; the guest does not stay in HLT for it. `kvm_xen_has_pending_events`
    pub(crate) fn has_xen_events(&self) -> bool {
        self.xen.events.waiting.load(SeqCst) != 0 && self.vm.options.xen.is_on()
    }

    /// What came for the guest is told of before it goes on.
    pub(crate) fn take_xen_events(&mut self) {
        if self.has_xen_events() {
            let _ = self.tell_xen_events();
        }
        self.ring_xen_timer();
    }

    /// Events that wait for vcpu_info are told of there, if that is in memory now. `kvm_xen_inject_pending_events`
    fn tell_xen_events(&self) -> Option<()> {
        let (events, layout) = (&self.xen.events, self.vm.options.xen.layout());
        let info = events.info.get()?;
        let words = events.waiting.load(SeqCst) & (u64::MAX >> (64 - layout.word_bits));
        let view = self.machine.memory();
        for word in (0..layout.word_bits).filter(|word| words >> word & 1 != 0) {
            set_bit(&view, info.wrapping_add(layout.selector), word)?;
        }
        view.write(info, &[1]).ok()?;
        events.waiting.fetch_and(!words, SeqCst);
        events.interrupt();
        Some(())
    }
}
