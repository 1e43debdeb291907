//! The I/O APIC of a PC: 24 inputs, each with a redirection table entry. Data sheet "82093AA I/O Advanced Programmable
//! Interrupt Controller"; SDM Vol. 3 for the messages that it sends.
//!
//! Where a guest can tell, this follows KVM (ioapic.c): an entry that becomes edge-triggered forgets its remote IRR, as
//! Linux's guests rely on to end an interrupt by hand; inputs are active high whatever the polarity bit says.

use crate::reg::{Access, Device, Reg, find, is_sorted, reg};
use crate::{DeliveryMode, Message, Now};

/// Inputs.
pub const PINS: u8 = 24;
/// Where firmware expects it.
pub const DEFAULT_BASE: u64 = 0xfec0_0000;
/// Bytes of memory that it decodes.
pub const LEN: u64 = 0x100;
/// IOREGSEL and IOWIN.
const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;

/// Bits of a redirection table entry.
pub mod entry {
    /// Delivery mode, three bits.
    pub const DELIVERY_MODE_SHIFT: u32 = 8;
    /// The destination is logical.
    pub const LOGICAL: u64 = 1 << 11;
    /// Delivery status.
    pub const DELIVERY_STATUS: u64 = 1 << 12;
    /// Accepted and not yet ended, level only.
    pub const REMOTE_IRR: u64 = 1 << 14;
    /// Level-triggered.
    pub const LEVEL: u64 = 1 << 15;
    /// Masked.
    pub const MASK: u64 = 1 << 16;
    /// Destination, eight bits.
    pub const DESTINATION_SHIFT: u32 = 56;
}

/// Where its messages go.
pub trait Target {
    /// True: somebody accepted it.
    fn send(&self, message: &Message) -> bool;
}

impl Device for IoApic {
    type Bus = ();
}

/// Registers behind IOREGSEL. Entries are two registers each, low half first.
const REGS: &[Reg<IoApic>] = &[
    // index name                      reset        guest-writable
    reg(0x00, "IOAPICID", 0x0000_0000, 0x0f00_0000),
    reg(0x01, "IOAPICVER", 0x0017_0011, 0x0000_0000),
    reg(0x02, "IOAPICARB", 0x0000_0000, 0x0000_0000).read(IoApic::arbitration_id),
    reg(0x10, "IOREDTBL", 0x0001_0000, 0xff01_afff).times(2 * PINS as u32).read(IoApic::half_entry),
];
const _: () = assert!(is_sorted(REGS, 1));

/// Bits of an entry that a guest may write.
const ENTRY_WRITABLE: u64 = 0xff00_0000_0001_afff;

/// State that travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// Where it decodes memory.
    pub base: u64,
    /// IOREGSEL
    pub select: u8,
    /// IOAPICID, bits 27:24 as a number.
    pub id: u8,
    /// Inputs that are high and, if edge-triggered, were not taken.
    pub irr: u32,
    /// Redirection table.
    pub entries: [u64; PINS as usize],
}

/// One I/O APIC.
#[derive(Clone, Debug)]
pub struct IoApic {
    state: State,
    /// Edges that went out while their input is still high.
    delivered: u32,
    sources: [u32; PINS as usize],
}

impl Default for IoApic {
    fn default() -> Self {
        Self::new()
    }
}

impl IoApic {
    /// After reset: all inputs masked.
    pub fn new() -> Self {
        let state = State { base: DEFAULT_BASE, select: 0, id: 0, irr: 0, entries: [entry::MASK; PINS as usize] };
        Self { state, delivered: 0, sources: [0; PINS as usize] }
    }

    fn arbitration_id(&self, _: Access<'_, ()>) -> u32 {
        u32::from(self.state.id) << 24
    }

    fn half_entry(&self, access: Access<'_, ()>) -> u32 {
        let index = access.offset - 0x10;
        (self.state.entries[index as usize / 2] >> (32 * (index & 1))) as u32
    }

    /// Where it decodes memory.
    pub fn base(&self) -> u64 {
        self.state.base
    }

    /// The entry of `pin`.
    pub fn entry(&self, pin: u8) -> u64 {
        self.state.entries[usize::from(pin)]
    }

    /// What goes out for `pin`; `None`: a delivery mode that is reserved.
    fn message(&self, pin: u8) -> Option<Message> {
        let entry = self.entry(pin);
        Some(Message {
            vector: entry as u8,
            mode: DeliveryMode::of((entry >> entry::DELIVERY_MODE_SHIFT) as u32)?,
            dest: (entry >> entry::DESTINATION_SHIFT) as u32,
            logical: entry & entry::LOGICAL != 0,
            level: entry & entry::LEVEL != 0,
            assert: true,
        })
    }

    /// Sends the request of `pin` if its entry lets it. As [`IoApic::set_line`].
    fn service(&mut self, pin: u8, to: &dyn Target) -> i32 {
        let entry = self.entry(pin);
        let level = entry & entry::LEVEL != 0;
        if entry & entry::MASK != 0 || level && entry & entry::REMOTE_IRR != 0 {
            return -1;
        }
        let accepted = self.message(pin).is_some_and(|message| to.send(&message));
        if !level {
            self.delivered |= 1 << pin;
        } else if accepted {
            self.state.entries[usize::from(pin)] |= entry::REMOTE_IRR;
        }
        accepted.into()
    }

    /// `source` holds input `pin` high, or lets go. What `KVM_IRQ_LINE_STATUS` tells: −1: masked, 0: it was there already or
    /// nobody took it, 1: taken.
    pub fn set_line(&mut self, pin: u8, source: u8, level: bool, to: &dyn Target) -> i32 {
        let held = &mut self.sources[usize::from(pin)];
        *held = if level { *held | 1 << source } else { *held & !(1 << source) };
        let bit = 1 << pin;
        if *held == 0 {
            self.state.irr &= !bit;
            self.delivered &= !bit;
            return 1;
        }
        let edge = self.entry(pin) & entry::LEVEL == 0;
        if edge && self.state.irr & bit != 0 {
            return 0;
        }
        self.state.irr |= bit;
        self.service(pin, to)
    }

    /// Nothing of `source` holds any input.
    pub fn forget_source(&mut self, source: u8, to: &dyn Target) {
        for pin in 0..PINS {
            if self.sources[usize::from(pin)] & 1 << source != 0 {
                self.set_line(pin, source, false, to);
            }
        }
    }

    /// An EOI message for `vector`. Inputs whose interrupt ended; call [`IoApic::look_again`] once their devices know.
    pub fn end_of_interrupt(&mut self, vector: u8) -> u32 {
        let waits = entry::LEVEL | entry::REMOTE_IRR;
        let mut ended = 0;
        for (pin, entry) in self.state.entries.iter_mut().enumerate() {
            if *entry as u8 == vector && *entry & waits == waits {
                *entry &= !entry::REMOTE_IRR;
                ended |= 1 << pin;
            }
        }
        ended
    }

    /// Level inputs of `pins` that are still high interrupt again.
    pub fn look_again(&mut self, pins: u32, to: &dyn Target) {
        let high = pins & self.state.irr;
        for pin in (0..PINS).filter(|pin| high & 1 << pin != 0) {
            if self.entry(pin) & entry::LEVEL != 0 {
                self.service(pin, to);
            }
        }
    }

    /// True: some entry sends level-triggered interrupts with this vector.
    pub fn has_level_vector(&self, vector: u8) -> bool {
        self.state.entries.iter().any(|entry| *entry as u8 == vector && entry & entry::LEVEL != 0)
    }

    /// A read at `offset` from the base. Other offsets read 0.
    pub fn read(&self, offset: u64) -> u32 {
        match offset & !0xf {
            IOREGSEL => self.state.select.into(),
            IOWIN => {
                let index = self.state.select.into();
                let Some(reg) = find(REGS, 1, index) else { return 0 };
                match reg.shown {
                    Some(shown) => shown(self, Access { bus: &(), now: Now::default(), offset: index }),
                    None if reg.offset == 0 => u32::from(self.state.id) << 24,
                    None => reg.reset,
                }
            }
            _ => 0,
        }
    }

    /// A write at `offset` from the base.
    pub fn write(&mut self, offset: u64, value: u32, to: &dyn Target) {
        match offset & !0xf {
            IOREGSEL => self.state.select = value as u8,
            IOWIN => {
                let index = u32::from(self.state.select);
                let Some(reg) = find(REGS, 1, index) else { return };
                match reg.offset {
                    0x00 => self.state.id = ((value & reg.writable) >> 24) as u8,
                    0x10 => self.entry_written((index - 0x10) / 2, index & 1 != 0, value, to),
                    _ => {}
                }
            }
            _ => {}
        }
    }

    fn entry_written(&mut self, pin: u32, high: bool, value: u32, to: &dyn Target) {
        let half = if high { 0xffff_ffff << 32 } else { 0xffff_ffff };
        let mask = half & ENTRY_WRITABLE;
        let value = if high { u64::from(value) << 32 } else { value.into() };
        let entry = &mut self.state.entries[pin as usize];
        *entry = *entry & !mask | value & mask;
        if *entry & entry::LEVEL == 0 {
            *entry &= !entry::REMOTE_IRR;
        }
        self.look_again(1 << pin, to);
    }

    /// For `KVM_GET_IRQCHIP`.
    pub fn state(&self) -> State {
        State { irr: self.state.irr & !self.delivered, ..self.state }
    }

    /// For `KVM_SET_IRQCHIP`: what stands in `irr` is raised anew.
    pub fn set_state(&mut self, state: &State, to: &dyn Target) {
        self.state = State { irr: 0, ..*state };
        self.delivered = 0;
        for pin in (0..PINS).filter(|pin| state.irr & 1 << pin != 0) {
            self.state.irr |= 1 << pin;
            self.service(pin, to);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[derive(Default)]
    struct Bus(RefCell<Vec<Message>>);

    impl Target for Bus {
        fn send(&self, message: &Message) -> bool {
            self.0.borrow_mut().push(*message);
            true
        }
    }

    impl Bus {
        fn vectors(&self) -> Vec<u8> {
            self.0.take().iter().map(|message| message.vector).collect()
        }
    }

    fn register(apic: &mut IoApic, index: u8, value: u32, bus: &Bus) {
        apic.write(0x00, index.into(), bus);
        apic.write(0x10, value, bus);
    }

    fn read(apic: &mut IoApic, index: u8) -> u32 {
        apic.write(0x00, index.into(), &Bus::default());
        apic.read(0x10)
    }

    #[test]
    fn registers_are_those_of_the_data_sheet() {
        let (mut apic, bus) = (IoApic::new(), Bus::default());
        assert_eq!(read(&mut apic, 1), 0x0017_0011, "24 entries");
        register(&mut apic, 0, 0xffff_ffff, &bus);
        assert_eq!(read(&mut apic, 0), 0x0f00_0000);
        assert_eq!(read(&mut apic, 2), 0x0f00_0000, "loaded with the ID");
        assert_eq!((read(&mut apic, 0x10), read(&mut apic, 0x11)), (0x0001_0000, 0));
        register(&mut apic, 0x3f, 0xffff_ffff, &bus);
        register(&mut apic, 0x3e, 0xffff_ffff, &bus);
        assert_eq!((read(&mut apic, 0x3e), read(&mut apic, 0x3f)), (0x0001_afff, 0xff00_0000));
        assert_eq!((read(&mut apic, 3), read(&mut apic, 0x40)), (0, 0));
    }

    #[test]
    fn reset_values_of_the_table_are_those_of_the_model() {
        let mut apic = IoApic::new();
        for reg in REGS {
            for at in 0..reg.count {
                let low = reg.offset != 0x10 || at % 2 == 0;
                let reset = if low { reg.reset } else { 0 };
                assert_eq!(read(&mut apic, (reg.offset + at) as u8), reset, "{} + {at}", reg.name);
            }
        }
    }

    #[test]
    fn edge_goes_out_once() {
        let (mut apic, bus) = (IoApic::new(), Bus::default());
        register(&mut apic, 0x10 + 2 * 4 + 1, 0x0200_0000, &bus);
        register(&mut apic, 0x10 + 2 * 4, 0x0000_0831, &bus);
        assert_eq!(apic.set_line(4, 0, true, &bus), 1);
        let mode = DeliveryMode::Fixed;
        let expected = Message { vector: 0x31, mode, dest: 2, logical: true, level: false, assert: true };
        assert_eq!(bus.0.take(), [expected]);
        assert_eq!(apic.set_line(4, 0, true, &bus), 0, "no new edge");
        assert_eq!(apic.state().irr, 0, "what went out is not pending");
        apic.set_line(4, 0, false, &bus);
        apic.set_line(4, 0, true, &bus);
        assert_eq!(bus.vectors(), [0x31]);
    }

    #[test]
    fn edge_while_masked_is_lost_and_level_is_not() {
        for (trigger, sent) in [(0, vec![]), (0x8000, vec![0x40])] {
            let (mut apic, bus) = (IoApic::new(), Bus::default());
            register(&mut apic, 0x10, 0x0001_0040 | trigger, &bus);
            assert_eq!(apic.set_line(0, 0, true, &bus), -1);
            register(&mut apic, 0x10, 0x0000_0040 | trigger, &bus);
            assert_eq!(bus.vectors(), sent, "{trigger:#x}");
        }
    }

    #[test]
    fn level_waits_for_its_eoi() {
        let (mut apic, bus) = (IoApic::new(), Bus::default());
        register(&mut apic, 0x10 + 2 * 9, 0x0000_8050, &bus);
        apic.set_line(9, 0, true, &bus);
        assert_eq!(read(&mut apic, 0x10 + 2 * 9), 0x0000_c050, "remote IRR");
        assert_eq!(apic.set_line(9, 0, true, &bus), -1);
        assert_eq!(bus.vectors(), [0x50]);
        assert_eq!(apic.end_of_interrupt(0x51), 0);
        assert_eq!(apic.end_of_interrupt(0x50), 1 << 9);
        apic.look_again(1 << 9, &bus);
        assert_eq!(bus.vectors(), [0x50], "still high");
        apic.set_line(9, 0, false, &bus);
        assert_eq!(apic.end_of_interrupt(0x50), 1 << 9);
        apic.look_again(1 << 9, &bus);
        assert!(bus.vectors().is_empty());
    }

    #[test]
    fn switching_to_edge_forgets_remote_irr() {
        let (mut apic, bus) = (IoApic::new(), Bus::default());
        register(&mut apic, 0x10, 0x0000_8050, &bus);
        apic.set_line(0, 0, true, &bus);
        register(&mut apic, 0x10, 0x0001_0050, &bus);
        register(&mut apic, 0x10, 0x0000_8050, &bus);
        assert_eq!(bus.vectors(), [0x50, 0x50]);
    }

    #[test]
    fn sources_are_ored() {
        let (mut apic, bus) = (IoApic::new(), Bus::default());
        register(&mut apic, 0x10, 0x0000_8050, &bus);
        apic.set_line(0, 0, true, &bus);
        apic.set_line(0, 1, true, &bus);
        apic.set_line(0, 0, false, &bus);
        assert_eq!(apic.state().irr, 1);
        apic.forget_source(1, &bus);
        assert_eq!(apic.state().irr, 0);
    }

    #[test]
    fn state_travels_and_pending_inputs_are_raised_anew() {
        let (mut apic, bus) = (IoApic::new(), Bus::default());
        register(&mut apic, 0x10, 0x0001_8050, &bus);
        apic.set_line(0, 0, true, &bus);
        let mut state = apic.state();
        assert_eq!(state.irr, 1);
        state.entries[0] &= !entry::MASK;
        let mut other = IoApic::new();
        other.set_state(&state, &bus);
        assert_eq!(bus.vectors(), [0x50]);
        assert_eq!(other.entry(0), 0xc050);
    }
}
