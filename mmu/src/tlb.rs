//! The software TLB: linear page → host address, one array a kind of access.
//!
//! A tag is the linear page number with a context in its low 12 bits, so that one compare answers page, address
//! space generation and privilege at once, and a flush is an increment. Entries name RAM only, and only what the next
//! access may do with no further thought: a write entry exists when rights allow it, D is set, the dirty log knows,
//! and no decoded code lies in the page.

use crate::structures::Structures;

/// Entries of each of the two data arrays; measured flat between 256 and 4096.
pub const DATA_ENTRIES: usize = 1024;
/// Entries of the fetch array, asked once a trace lookup.
pub const FETCH_ENTRIES: usize = 256;

const PAGE_MASK: u64 = !0xfff;
const CONTEXT_USER: u64 = 1;
const CONTEXT_AC: u64 = 2;
const GENERATION_STEP: u64 = 4;

/// One translation. `addend` + linear address = host address.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(16))]
pub struct Entry {
    /// Linear page | context; 0 is never looked up.
    pub tag: u64,
    /// Host address minus linear address; in the fetch array, guest-physical page.
    pub addend: u64,
}

/// Translations of one vCPU.
#[repr(C)]
#[derive(Debug)]
pub struct Tlb {
    /// Generation, AC and privilege of the running code: the low 12 bits of every tag it can hit.
    context: u64,
    /// Every page larger than 4 KiB that was entered lies under this address and mask: INVLPG there flushes all.
    large: Option<(u64, u64)>,
    read: [Entry; DATA_ENTRIES],
    write: [Entry; DATA_ENTRIES],
    fetch: [Entry; FETCH_ENTRIES],
    /// What walks remember; flushed with the rest.
    pub structures: Structures,
}

/// Index of `la` in a data array.
#[inline(always)]
fn slot(la: u64) -> usize {
    (la >> 12) as usize & (DATA_ENTRIES - 1)
}

impl Default for Tlb {
    fn default() -> Self {
        Self::new()
    }
}

impl Tlb {
    /// An empty TLB in supervisor context.
    pub fn new() -> Self {
        Self {
            context: GENERATION_STEP,
            large: None,
            read: [Entry::default(); DATA_ENTRIES],
            write: [Entry::default(); DATA_ENTRIES],
            fetch: [Entry::default(); FETCH_ENTRIES],
            structures: Structures::new(),
        }
    }

    /// Context of accesses from now on. `user`: CPL 3. `ac`: supervisor code that SMAP lets reach user pages.
    pub fn set_context(&mut self, user: bool, ac: bool) {
        let user = if user { CONTEXT_USER } else { 0 };
        let ac = if ac { CONTEXT_AC } else { 0 };
        self.context = self.context & !(CONTEXT_USER | CONTEXT_AC) | user | ac;
    }

    /// Host address of `size` bytes at `la` for a read in the current context.
    #[inline(always)]
    pub fn read(&self, la: u64, size: u64) -> Option<u64> {
        Self::probe(&self.read, self.context, la, size)
    }

    /// Host address of `size` bytes at `la` for a write in the current context.
    #[inline(always)]
    pub fn write(&self, la: u64, size: u64) -> Option<u64> {
        Self::probe(&self.write, self.context, la, size)
    }

    #[inline(always)]
    fn probe(entries: &[Entry; DATA_ENTRIES], context: u64, la: u64, size: u64) -> Option<u64> {
        let entry = &entries[slot(la)];
        // The last byte's page is compared, so an access that crosses into the next page misses.
        let key = (la.wrapping_add(size - 1) & PAGE_MASK) | context;
        if entry.tag == key { Some(la.wrapping_add(entry.addend)) } else { None }
    }

    /// Guest-physical address that fetches at `la` come from.
    #[inline(always)]
    pub fn fetch(&self, la: u64) -> Option<u64> {
        let entry = &self.fetch[(la >> 12) as usize & (FETCH_ENTRIES - 1)];
        if entry.tag == (la & PAGE_MASK) | self.context { Some(entry.addend | (la & !PAGE_MASK)) } else { None }
    }

    /// Enters a page for reads: `host` is the address of its first byte.
    pub fn fill_read(&mut self, la: u64, host: u64, page_bytes: u64) {
        self.note_size(la, page_bytes);
        self.read[slot(la)] = self.entry(la, host.wrapping_sub(la & PAGE_MASK));
    }

    /// Enters a page for writes.
    pub fn fill_write(&mut self, la: u64, host: u64, page_bytes: u64) {
        self.note_size(la, page_bytes);
        self.write[slot(la)] = self.entry(la, host.wrapping_sub(la & PAGE_MASK));
    }

    /// Enters a page for fetches: `gpa` is its guest-physical address.
    pub fn fill_fetch(&mut self, la: u64, gpa: u64, page_bytes: u64) {
        self.note_size(la, page_bytes);
        self.fetch[(la >> 12) as usize & (FETCH_ENTRIES - 1)] = self.entry(la, gpa & PAGE_MASK);
    }

    fn entry(&self, la: u64, addend: u64) -> Entry {
        Entry { tag: (la & PAGE_MASK) | self.context, addend }
    }

    fn note_size(&mut self, la: u64, page_bytes: u64) {
        if page_bytes <= 0x1000 {
            return;
        }
        let page = !(page_bytes - 1);
        self.large = Some(match self.large {
            None => (la & page, page),
            Some((base, mask)) => {
                let mut mask = mask & page;
                while (base ^ la) & mask != 0 {
                    mask <<= 1;
                }
                (base & mask, mask)
            }
        });
    }

    /// Drops everything: MOV CR3, changes of CR0, CR4, EFER, of memory slots.
    pub fn flush(&mut self) {
        self.large = None;
        self.structures.flush();
        self.context += GENERATION_STEP;
        if self.context > !PAGE_MASK {
            *self = Self { context: self.context & (CONTEXT_USER | CONTEXT_AC) | GENERATION_STEP, ..Self::new() };
        }
    }

    /// INVLPG: drops the page of `la` in every context. True: everything went, for the page may have been a large one.
    pub fn flush_page(&mut self, la: u64) -> bool {
        if self.large.is_some_and(|(base, mask)| la & mask == base) {
            self.flush();
            return true;
        }
        self.structures.flush();
        self.read[slot(la)].tag = 0;
        self.write[slot(la)].tag = 0;
        self.fetch[(la >> 12) as usize & (FETCH_ENTRIES - 1)].tag = 0;
        false
    }

    /// Drops write entries that reach the 4 KiB at host address `page`, whatever their linear address: code was
    /// decoded from it, or its dirty bit was harvested.
    pub fn protect(&mut self, page: u64) {
        for entry in &mut self.write {
            if (entry.tag & PAGE_MASK).wrapping_add(entry.addend) == page {
                entry.tag = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LA: u64 = 0xffff_8000_1234_5000;

    fn filled() -> Tlb {
        let mut tlb = Tlb::new();
        tlb.fill_read(LA + 8, 0x7000, 0x1000);
        tlb.fill_write(LA, 0x7000, 0x1000);
        tlb
    }

    #[test]
    fn hit_gives_the_host_address() {
        let tlb = filled();
        assert_eq!(tlb.read(LA + 0x10, 8), Some(0x7010));
        assert_eq!(tlb.write(LA + 0xff8, 8), Some(0x7ff8));
    }

    #[test]
    fn access_over_the_page_end_misses() {
        assert_eq!(filled().read(LA + 0xff9, 8), None);
    }

    #[test]
    fn other_privilege_misses_until_it_returns() {
        let mut tlb = filled();
        tlb.set_context(true, false);
        assert_eq!(tlb.read(LA, 1), None);
        tlb.set_context(false, false);
        assert_eq!(tlb.read(LA, 1), Some(0x7000));
    }

    #[test]
    fn flush_survives_generation_wrap() {
        let mut tlb = filled();
        for _ in 0..5000 {
            tlb.flush();
            assert_eq!(tlb.read(LA, 1), None);
        }
    }

    #[test]
    fn invlpg_in_a_large_page_drops_its_other_pieces() {
        let mut tlb = filled();
        tlb.fill_read(0x20_0000, 0x10_0000, 0x20_0000);
        tlb.fill_read(0x20_1000, 0x10_1000, 0x20_0000);
        tlb.flush_page(0x20_0000);
        assert_eq!(tlb.read(0x20_1000, 1), None);
    }

    #[test]
    fn protect_drops_write_entries_only() {
        let mut tlb = filled();
        tlb.protect(0x7000);
        assert_eq!(tlb.write(LA, 1), None);
        assert_eq!(tlb.read(LA, 1), Some(0x7000));
    }
}
