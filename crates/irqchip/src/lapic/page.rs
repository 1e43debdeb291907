//! The registers as a page, which is how they travel.

use super::{Lapic, REGS, STEP, at};
use crate::Now;

/// 32-bit words of the part that has registers: 1 KiB.
pub const PAGE_WORDS: usize = 256;

impl Lapic {
    /// All registers where memory accesses would find them. The id is in bits 31:24 in either mode, but for `wide`: then x2APIC
    /// mode has all its bits. `None`: wide, and not the initial one.
    pub fn page(&self, now: Now, wide: bool) -> Option<[u32; PAGE_WORDS]> {
        if wide && self.is_x2apic() && self.load(at::ID) != self.id {
            return None;
        }
        let mut page = [0; PAGE_WORDS];
        for reg in REGS.iter().filter(|reg| !reg.msr_only) {
            for n in 0..reg.count {
                let offset = reg.offset + n * STEP;
                page[offset as usize / 4] = match offset {
                    at::ID if self.is_x2apic() && !wide => self.load(offset) << 24,
                    at::CURRENT_COUNT => self.current_count(now),
                    0x030 => self.version_shown(),
                    0x0a0 => self.ppr(),
                    _ => self.load(offset),
                };
            }
        }
        Some(page)
    }

    /// Loads all registers. In x2APIC mode the logical id follows from the id. `None`: as [`Self::page`].
    pub fn load_page(&self, page: &[u32; PAGE_WORDS], now: Now, wide: bool) -> Option<()> {
        if wide && self.is_x2apic() && page[at::ID as usize / 4] != self.id {
            return None;
        }
        for reg in REGS.iter().filter(|reg| !reg.msr_only) {
            for n in 0..reg.count {
                let offset = reg.offset + n * STEP;
                let word = page[offset as usize / 4];
                self.store(
                    offset,
                    match offset {
                        at::ID if self.is_x2apic() && !wide => word >> 24,
                        at::LDR if self.is_x2apic() => self.x2apic_ldr(),
                        at::CURRENT_COUNT => 0,
                        0x030 => reg.reset,
                        _ => word,
                    },
                );
            }
        }
        self.arbitration.store(0, std::sync::atomic::Ordering::Relaxed);
        self.resume_timer(page[at::CURRENT_COUNT as usize / 4], now);
        Some(())
    }
}
