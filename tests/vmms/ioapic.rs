//! An I/O APIC of the VMM's own: each entry that is not masked is a route to a message. Intel's 82093AA datasheet, section 3.

use anyhow::Result;

use crate::routes::{Msi, Routes};

const PINS: usize = 24;
const MASKED: u64 = 1 << 16;

/// The registers.
pub struct Ioapic {
    select: u32,
    entries: [u64; PINS],
    routes: Routes,
}

impl Ioapic {
    /// As it is after reset.
    pub fn new(routes: Routes) -> Self {
        Self { select: 0, entries: [MASKED; PINS], routes }
    }

    /// The pin, and whether it is its upper half.
    fn selected(&self) -> Option<(usize, bool)> {
        let at = self.select.checked_sub(0x10)?;
        Some(((at / 2) as usize, at % 2 == 1)).filter(|(pin, _)| *pin < PINS)
    }

    /// A load.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match (offset, self.select, self.selected()) {
            (0x00, ..) => self.select,
            // Version 11h, and the number of the last entry.
            (0x10, 1, _) => (PINS as u32 - 1) << 16 | 0x11,
            (0x10, _, Some((pin, false))) => self.entries[pin] as u32,
            (0x10, _, Some((pin, true))) => (self.entries[pin] >> 32) as u32,
            _ => 0,
        };
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(to, byte)| *to = byte);
    }

    /// A store.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else { return Ok(()) };
        match (offset, self.selected()) {
            (0x00, _) => self.select = value & 0xff,
            (0x10, Some((pin, upper))) => {
                let entry = &mut self.entries[pin];
                let (value, shift) = (u64::from(value), if upper { 32 } else { 0 });
                *entry = *entry & !(0xffff_ffff << shift) | value << shift;
                let entry = *entry;
                self.routes.set(pin as u32, (entry & MASKED == 0).then(|| message(entry)))?;
            }
            _ => {}
        }
        Ok(())
    }
}

/// SDM Vol. 3 "Message Address Register Format", "Message Data Register Format".
fn message(entry: u64) -> Msi {
    let (destination, logical) = (entry >> 56, entry >> 11 & 1);
    // Vector and delivery mode; asserted; trigger mode.
    let data = entry & 0x7ff | 1 << 14 | (entry >> 15 & 1) << 15;
    Msi { address: 0xfee0_0000 | destination << 12 | logical << 2, data: data as u32 }
}
