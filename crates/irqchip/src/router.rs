//! The wires: global system interrupts to inputs and messages, messages to local APICs, EOIs back.
//!
//! Locks: one of `routes`, `pic`, `ioapic`, `pit` at a time, never two; under any of them messages may go to
//! local APICs, which takes no lock (see [`crate::lapic`]), and [`Wake::wake`] is called, which takes nothing that is ever
//! held around a call into here. The owner of a vCPU comes here without any lock of its own but the vCPU's.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, RwLock};

use crate::ioapic::{self, IoApic, Target};
use crate::lapic::{Bus, Lapic, Shorthand, event};
use crate::pic::{self, Pic};
use crate::pit::Pit;
use crate::{DeliveryMode, Message};

#[cfg(doc)]
use crate::Wake;

/// Who holds an input: user space's own lines.
pub const SOURCE_USER: u8 = 0;
/// The timer.
pub const SOURCE_PIT: u8 = 1;
/// Eventfds that are let go when the guest ends the interrupt.
pub const SOURCE_RESAMPLE: u8 = 2;

/// Global system interrupt of the timer.
const TIMER_GSI: u32 = 0;

/// Where a global system interrupt goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// An input of the PICs, 0 to 15.
    Pic(u8),
    /// An input of the I/O APIC.
    IoApic(u8),
    /// A message.
    Msi {
        /// Address.
        address: u64,
        /// Data.
        data: u32,
    },
    /// An event that the guest hears of past its local APICs: the listener sees to it.
    Event {
        /// Whose.
        vcpu: u32,
        /// Which.
        port: u32,
    },
}

/// Where one global system interrupt can go at once: both PICs and the I/O APIC.
pub const MAX_TARGETS: usize = 3;

/// Routes of each global system interrupt.
pub type Routes = Vec<(u32, Route)>;

/// What is told to whoever runs the chips.
pub trait Listener: Send + Sync {
    /// The guest has ended the interrupt of an input. Called without any lock held.
    fn ended(&self, chip: Route);

    /// An EOI that no I/O APIC here takes: the vCPU's owner lets user space know.
    fn eoi_for_user(&self, lapic: &Lapic, vector: u8);

    /// An event is due. As [`Irqchip::set_gsi`]. Called without any lock held.
    fn event(&self, vcpu: u32, port: u32) -> i32;
}

/// The chips that a VM has once, and its local APICs.
pub struct Irqchip {
    /// By initial APIC id. An entry never changes, so a look-up takes no lock.
    lapics: Box<[OnceLock<Arc<Lapic>>]>,
    /// Ids in the order in which they came.
    present: RwLock<Vec<u32>>,
    routes: RwLock<Routes>,
    /// Global system interrupts below this are inputs of user space's I/O APICs.
    outside_pins: u32,
    /// Messages have destinations of 32 bits.
    wide_ids: AtomicBool,
    /// What a device broadcasts to a byte's worth of APICs does not reach those in x2APIC mode.
    strict_broadcast: AtomicBool,
    /// `None`: user space has them.
    chips: Option<Chips>,
    pit: OnceLock<Mutex<Pit>>,
    listener: Box<dyn Listener>,
}

struct Chips {
    pic: Mutex<Pic>,
    ioapic: Mutex<IoApic>,
}

impl Irqchip {
    /// PIC, I/O APIC and default routes, or with `split` only local APICs, and how many of the first global system interrupts
    /// are inputs of I/O APICs elsewhere. APIC ids are below `max_ids`.
    pub fn new(split: Option<u32>, max_ids: usize, listener: Box<dyn Listener>) -> Self {
        Self {
            lapics: (0..max_ids).map(|_| OnceLock::new()).collect(),
            present: RwLock::default(),
            routes: RwLock::new(if split.is_some() { Vec::new() } else { default_routes() }),
            outside_pins: split.unwrap_or(0),
            wide_ids: AtomicBool::new(false),
            strict_broadcast: AtomicBool::new(false),
            chips: split.is_none().then(|| Chips { pic: Mutex::new(Pic::new()), ioapic: Mutex::new(IoApic::new()) }),
            pit: OnceLock::new(),
            listener,
        }
    }

    /// PIC and I/O APIC are user space's.
    pub fn is_split(&self) -> bool {
        self.chips.is_none()
    }

    /// `KVM_CAP_X2APIC_API`: messages and [`Lapic::page`] have ids of 32 bits from now on, FFH is one of them, or both.
    pub fn set_x2apic_api(&self, wide_ids: bool, strict_broadcast: bool) {
        self.wide_ids.fetch_or(wide_ids, Relaxed);
        self.strict_broadcast.fetch_or(strict_broadcast, Relaxed);
    }

    /// Messages and [`Lapic::page`] have ids of 32 bits.
    pub fn has_wide_ids(&self) -> bool {
        self.wide_ids.load(Relaxed)
    }

    /// Adds a vCPU's APIC. False: the id is taken or too large.
    pub fn add_lapic(&self, lapic: Arc<Lapic>) -> bool {
        let id = lapic.id();
        let added = self.lapics.get(id as usize).is_some_and(|slot| slot.set(lapic).is_ok());
        if added {
            self.present.write().push(id);
        }
        added
    }

    /// The APIC with an initial id.
    pub fn lapic(&self, id: u32) -> Option<&Arc<Lapic>> {
        self.lapics.get(id as usize)?.get()
    }

    /// Any APIC for which `f` is true.
    fn any(&self, mut f: impl FnMut(&Lapic) -> bool) -> bool {
        self.present.read().iter().any(|&id| self.lapic(id).is_some_and(|lapic| f(lapic)))
    }

    // Messages

    /// Delivers to those for whom `addressed` is true. How many accepted it; `None`: it is for nobody.
    fn deliver(&self, message: &Message, mut addressed: impl FnMut(&Lapic) -> bool) -> Option<u32> {
        if message.mode == DeliveryMode::LowestPriority {
            let mut best: Option<(u32, u32)> = None;
            self.any(|lapic| {
                if addressed(lapic)
                    && let Some(priority) = lapic.arbitration()
                    && best.is_none_or(|(least, _)| priority < least)
                {
                    best = Some((priority, lapic.id()));
                }
                false
            });
            let lapic = best.and_then(|(_, id)| self.lapic(id))?;
            lapic.chosen();
            return Some(lapic.accept(message).into());
        }
        let mut accepted = None;
        self.any(|lapic| {
            if addressed(lapic) {
                *accepted.get_or_insert(0) += u32::from(lapic.accept(message));
            }
            false
        });
        accepted
    }

    /// A message from a device. As [`Irqchip::deliver`].
    fn send_message(&self, message: &Message) -> Option<u32> {
        let strict = self.strict_broadcast.load(Relaxed);
        // Most messages name one APIC, and its initial id is its id.
        if !message.logical
            && message.mode != DeliveryMode::LowestPriority
            && message.dest != 0xff
            && let Some(lapic) = self.lapic(message.dest)
            && lapic.is_addressed(message.dest, false, strict)
        {
            return Some(lapic.accept(message).into());
        }
        self.deliver(message, |lapic| lapic.is_addressed(message.dest, message.logical, strict))
    }

    /// A message-signalled interrupt. As [`Irqchip::set_gsi`].
    pub fn signal_msi(&self, address: u64, data: u32) -> i32 {
        let accepted = self.message(address, data).and_then(|message| self.send_message(&message));
        accepted.map_or(-1, |accepted| accepted as i32)
    }

    /// What is written there. `None`: a reserved delivery mode, or bits in the upper half that are no destination.
    fn message(&self, address: u64, data: u32) -> Option<Message> {
        let wide = self.has_wide_ids();
        if wide && !is_wide_address(address) { None } else { Message::of_msi(address, data, wide) }
    }

    /// `KVM_HC_KICK_CPU`: ends HLT of the vCPU with this APIC id.
    pub fn unhalt(&self, dest: u32) {
        self.any(|lapic| {
            if lapic.is_addressed(dest, false, true) {
                lapic.put_event(event::UNHALT);
            }
            false
        });
    }

    /// `KVM_HC_SEND_IPI`: to those of `bitmap`, whose first bit is APIC id `first`. How many took it.
    pub fn send_ipis(&self, bitmap: u64, first: u32, message: &Message) -> u32 {
        let named = (0..64).filter(|bit| bitmap >> bit & 1 != 0);
        let lapics = named.filter_map(|bit| self.lapic(first.checked_add(bit)?));
        lapics.map(|lapic| u32::from(lapic.accept(message))).sum()
    }

    // Lines

    /// `source` holds a global system interrupt high, or lets go. What `KVM_IRQ_LINE_STATUS` tells: −1, nobody took it
    /// (masked, no route); 0, it was there already; above, how many took it. A message goes out when it is high.
    pub fn set_gsi(&self, gsi: u32, source: u8, level: bool) -> i32 {
        let mut targets = [None; MAX_TARGETS];
        {
            let routes = self.routes.read();
            let first = routes.partition_point(|&(number, _)| number < gsi);
            let same = routes[first..].iter().take_while(|&&(number, _)| number == gsi);
            for (target, &(_, route)) in targets.iter_mut().zip(same) {
                *target = Some(route);
            }
        }
        let mut status = -1;
        for route in targets.into_iter().flatten() {
            let taken = match route {
                Route::Pic(pin) => self.set_pic(pin, source, level),
                Route::IoApic(pin) => self.set_ioapic(pin, source, level),
                Route::Msi { .. } | Route::Event { .. } if !level => continue,
                Route::Msi { address, data } => self.signal_msi(address, data),
                Route::Event { vcpu, port } => self.listener.event(vcpu, port),
            };
            if taken >= 0 {
                status = status.max(0) + taken;
            }
        }
        status
    }

    fn set_pic(&self, pin: u8, source: u8, level: bool) -> i32 {
        self.with_pic(|pic| pic.set_line(pin, source, level)).unwrap_or(-1)
    }

    fn set_ioapic(&self, pin: u8, source: u8, level: bool) -> i32 {
        self.with_ioapic(|ioapic| ioapic.set_line(pin, source, level, self)).unwrap_or(-1)
    }

    /// Access to the PICs. If INTR has risen, the vCPUs that it reaches are woken; devices whose service ended are told.
    pub fn with_pic<R>(&self, f: impl FnOnce(&mut Pic) -> R) -> Option<R> {
        let mut pic = self.chips.as_ref()?.pic.lock();
        let before = pic.output();
        let result = f(&mut pic);
        let rises = pic.output() && !before;
        let ended = pic.take_ended();
        drop(pic);
        if ended != 0 {
            for pin in (0..pic::PINS).filter(|pin| ended & 1 << pin != 0) {
                self.listener.ended(Route::Pic(pin));
            }
            // Lines are what devices want now.
            self.with_pic(Pic::update);
        }
        if rises {
            self.any(|lapic| {
                if lapic.accepts_pic() {
                    lapic.wake();
                }
                false
            });
        }
        Some(result)
    }

    /// Access to the I/O APIC.
    pub fn with_ioapic<R>(&self, f: impl FnOnce(&mut IoApic) -> R) -> Option<R> {
        Some(f(&mut self.chips.as_ref()?.ioapic.lock()))
    }

    /// INTR of the PICs.
    pub fn pic_output(&self) -> bool {
        self.chips.as_ref().is_some_and(|chips| chips.pic.lock().output())
    }

    // Routes

    /// Replaces all routes. Of one number the first [`MAX_TARGETS`] count.
    pub fn set_routes(&self, mut routes: Routes) {
        routes.sort_by_key(|&(gsi, _)| gsi);
        *self.routes.write() = routes;
    }

    /// Global system interrupts that reach an input.
    pub fn gsis_of(&self, chip: Route) -> Vec<u32> {
        self.routes.read().iter().filter(|(_, route)| *route == chip).map(|(gsi, _)| *gsi).collect()
    }

    /// True: some route of those inputs is a level-triggered message with this vector for this APIC. Split only: its EOI is
    /// user space's to hear of.
    fn is_level_route(&self, lapic: &Lapic, vector: u8) -> bool {
        self.routes.read().iter().any(|&(gsi, route)| match route {
            Route::Msi { address, data } if gsi < self.outside_pins => {
                self.message(address, data).is_some_and(|message| {
                    message.level
                        && message.vector == vector
                        && lapic.is_addressed(message.dest, message.logical, self.strict_broadcast.load(Relaxed))
                })
            }
            _ => false,
        })
    }

    // The timer

    /// Adds the timer. False: there is one.
    pub fn add_pit(&self, pit: Pit) -> bool {
        self.pit.set(Mutex::new(pit)).is_ok()
    }

    /// There is a timer.
    pub fn has_pit(&self) -> bool {
        self.pit.get().is_some()
    }

    /// Access to the timer.
    pub fn with_pit<R>(&self, f: impl FnOnce(&mut Pit) -> R) -> Option<R> {
        Some(f(&mut self.pit.get()?.lock()))
    }

    /// Time has come to `now`, ns. When this is wanted next.
    pub fn advance_pit(&self, now: u64) -> Option<u64> {
        let (tick, next) = self.with_pit(|pit| (pit.advance(now), pit.next()))?;
        if tick {
            self.pulse_timer();
        }
        next
    }

    fn pulse_timer(&self) {
        self.set_gsi(TIMER_GSI, SOURCE_PIT, true);
        self.set_gsi(TIMER_GSI, SOURCE_PIT, false);
        // The NMI watchdog of a virtual wire: once one APIC has NMIs there, all hear of it (`pit_do_work`).
        if self.any(Lapic::takes_nmis_at_lint0) {
            self.any(|lapic| {
                lapic.lint0();
                false
            });
        }
    }

    /// The service of a global system interrupt has ended.
    pub fn gsi_ended(&self, gsi: u32) {
        if gsi == TIMER_GSI && self.with_pit(Pit::acknowledge) == Some(true) {
            self.pulse_timer();
        }
    }
}

/// Bits 39:32 of a message's address are 0 where destinations have 32 bits (`kvm_msi_route_invalid`).
pub fn is_wide_address(address: u64) -> bool {
    address >> 32 & 0xff == 0
}

/// Global system interrupt n is input n of the I/O APIC, and of the PICs if there is one.
fn default_routes() -> Routes {
    let pics = (0..pic::PINS).map(|pin| (pin.into(), Route::Pic(pin)));
    let mut routes: Routes = pics.chain((0..ioapic::PINS).map(|pin| (pin.into(), Route::IoApic(pin)))).collect();
    routes.sort_by_key(|&(gsi, _)| gsi);
    routes
}

impl Target for Irqchip {
    fn send(&self, message: &Message) -> bool {
        self.send_message(message).is_some_and(|accepted| accepted > 0)
    }
}

impl Bus for Irqchip {
    fn send_ipi(&self, from: &Lapic, shorthand: Shorthand, message: &Message) {
        let is_sender = |lapic: &Lapic| lapic.id() == from.id();
        match shorthand {
            Shorthand::ToSelf => {
                from.accept(message);
            }
            Shorthand::All => {
                self.deliver(message, |_| true);
            }
            Shorthand::Others => {
                self.deliver(message, |lapic| !is_sender(lapic));
            }
            Shorthand::None => {
                if !message.logical
                    && message.mode != DeliveryMode::LowestPriority
                    && message.dest < 0xff
                    && let Some(lapic) = self.lapic(message.dest)
                    && lapic.is_addressed(message.dest, false, true)
                {
                    lapic.accept(message);
                    return;
                }
                self.deliver(message, |lapic| lapic.is_addressed(message.dest, message.logical, true));
            }
        }
    }

    /// Devices hear of it before their input is looked at again: one that lets go then interrupts no more.
    fn end_of_interrupt(&self, from: &Lapic, vector: u8) {
        let Some(ended) = self.with_ioapic(|ioapic| ioapic.end_of_interrupt(vector)) else {
            if self.is_level_route(from, vector) {
                self.listener.eoi_for_user(from, vector);
            }
            return;
        };
        if ended == 0 {
            return;
        }
        for pin in (0..ioapic::PINS).filter(|pin| ended & 1 << pin != 0) {
            self.listener.ended(Route::IoApic(pin));
        }
        self.with_ioapic(|ioapic| ioapic.look_again(ended, self));
    }
}

#[cfg(test)]
mod tests;
