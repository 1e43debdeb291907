//! 8259 PIC, I/O APIC, local APIC, i8254 PIT, and the wires between them.
//!
//! The models know the manuals and nothing of KVM's ABI. No thread runs inside: whoever owns a model tells it the time
//! ([`Now`]) and asks when to come back. What other threads may do to a vCPU's local APIC is lock-free (see [`lapic`]);
//! the chips that a VM has once lie behind the locks of [`router::Irqchip`], which says in what order they are taken.

pub mod ioapic;
pub mod lapic;
pub mod pic;
pub mod pit;
pub mod reg;
pub mod router;

pub use ioapic::IoApic;
pub use lapic::{Lapic, Wake};
pub use pic::Pic;
pub use pit::Pit;
pub use router::{Irqchip, Route};

/// The clocks at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// A monotonic clock, ns.
    pub ns: u64,
    /// The time-stamp counter of the vCPU that is concerned.
    pub tsc: u64,
}

/// What an interrupt message does to a local APIC. SDM Vol. 3 "Interrupt Command Register (ICR)", bits 10:8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryMode {
    /// The vector, to all that are addressed.
    Fixed = 0,
    /// The vector, to one of them.
    LowestPriority = 1,
    /// A system management interrupt.
    Smi = 2,
    /// A non-maskable interrupt.
    Nmi = 4,
    /// INIT.
    Init = 5,
    /// A start-up IPI; the vector is the page to start at.
    StartUp = 6,
    /// As a PIC's INTR.
    ExtInt = 7,
}

impl DeliveryMode {
    /// From the field's three bits; `None`: reserved.
    pub fn of(bits: u32) -> Option<Self> {
        Some(match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            7 => Self::ExtInt,
            _ => return None,
        })
    }
}

/// An interrupt on its way to local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Vector, or a start-up IPI's page.
    pub vector: u8,
    /// What it does.
    pub mode: DeliveryMode,
    /// Who is meant: an APIC id, or a message destination address of `logical` form.
    pub dest: u32,
    /// `dest` is logical.
    pub logical: bool,
    /// Level-triggered: its EOI goes to the I/O APICs.
    pub level: bool,
    /// Of a level-triggered message: asserted, not de-asserted.
    pub assert: bool,
}

impl Message {
    /// Of a message-signalled interrupt. SDM Vol. 3 "Message Signalled Interrupts": the destination is in address bits
    /// 19:12, bit 3 is the redirection hint, bit 2 the destination mode; data has vector, delivery mode and trigger mode.
    /// `wide`: bits 31:8 of the destination are in address bits 63:40, as api.rst `KVM_CAP_X2APIC_API` has it. `None`: a
    /// reserved delivery mode.
    pub fn of_msi(address: u64, data: u32, wide: bool) -> Option<Self> {
        let mode = DeliveryMode::of(data >> 8)?;
        // With the hint the message goes to one of those addressed.
        let hinted = address & 1 << 3 != 0 && mode == DeliveryMode::Fixed;
        Some(Self {
            vector: data as u8,
            mode: if hinted { DeliveryMode::LowestPriority } else { mode },
            dest: (address >> 12 & 0xff) as u32 | if wide { (address >> 32) as u32 & !0xff } else { 0 },
            logical: address & 1 << 2 != 0,
            level: data & 1 << 15 != 0,
            assert: true,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn msi_fields_are_where_the_manual_has_them() {
        let message = Message::of_msi(0xfee0_5000, 0x0041, false).unwrap();
        let fixed = DeliveryMode::Fixed;
        assert_eq!(message, Message { vector: 0x41, mode: fixed, dest: 5, logical: false, level: false, assert: true });
        let message = Message::of_msi(0xfeef_f00c, 0xc152, false).unwrap();
        assert_eq!((message.dest, message.logical, message.level), (0xff, true, true));
        assert_eq!(message.mode, DeliveryMode::LowestPriority);
        assert_eq!(Message::of_msi(0xfee0_0000, 0x0300, false), None, "delivery mode 3 is reserved");
        for (wide, dest) in [(false, 0x34), (true, 0x1234)] {
            assert_eq!(Message::of_msi(0x1200_fee3_4000, 0x41, wide).map(|message| message.dest), Some(dest));
        }
    }
}
