//! The software TLB: linear page → host address, one array a kind of access.
//!
//! A tag is the linear page number with a context in its low 12 bits, so that one compare answers page, address
//! space generation and privilege at once, and a flush is an increment. Entries name RAM only, and only what the next
//! access may do with no further thought: a write entry exists when rights allow it, D is set, the dirty log knows,
//! and no decoded code lies in the page.
//!
//! MOV CR3 leaves global translations, a kernel's all, in place. Each array knows which of its entries are others, so that
//! what goes is found without a look at the rest.

use crate::host;
use crate::structures::Structures;
use crate::walk::Translation;

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

/// Translations for one kind of access; `N` entries, `WORDS` × 64.
#[repr(C)]
#[derive(Debug)]
struct Array<const N: usize, const WORDS: usize> {
    entries: [Entry; N],
    /// A bit an entry: it may hold a translation that is not global.
    local: [u64; WORDS],
}

type Data = Array<DATA_ENTRIES, { DATA_ENTRIES / 64 }>;
type Fetch = Array<FETCH_ENTRIES, { FETCH_ENTRIES / 64 }>;

impl<const N: usize, const WORDS: usize> Array<N, WORDS> {
    const EMPTY: Self = Self { entries: [Entry { tag: 0, addend: 0 }; N], local: [0; WORDS] };

    #[inline(always)]
    fn slot(la: u64) -> usize {
        const { assert!(N == 64 * WORDS && N.is_power_of_two()) }
        (la >> 12) as usize & (N - 1)
    }

    #[inline(always)]
    fn at(&self, la: u64) -> &Entry {
        &self.entries[Self::slot(la)]
    }

    fn fill(&mut self, la: u64, entry: Entry, global: bool) {
        let slot = Self::slot(la);
        self.entries[slot] = entry;
        let (word, bit) = (slot / 64, 1 << (slot % 64));
        self.local[word] = if global { self.local[word] & !bit } else { self.local[word] | bit };
    }

    fn is_global(&self, la: u64) -> bool {
        let slot = Self::slot(la);
        self.local[slot / 64] >> (slot % 64) & 1 == 0
    }

    fn drop_page(&mut self, la: u64) {
        self.entries[Self::slot(la)].tag = 0;
    }

    /// Drops what is not global.
    fn drop_local(&mut self) {
        for (local, entries) in self.local.iter_mut().zip(self.entries.chunks_exact_mut(64)) {
            while *local != 0 {
                entries[local.trailing_zeros() as usize].tag = 0;
                *local &= *local - 1;
            }
        }
    }
}

/// Every page larger than 4 KiB that was entered lies under the address and mask: INVLPG there flushes all.
#[derive(Clone, Copy, Debug, Default)]
struct Large(Option<(u64, u64)>);

impl Large {
    fn note(&mut self, la: u64, page_bytes: u64) {
        if page_bytes <= 0x1000 {
            return;
        }
        let page = !(page_bytes - 1);
        self.0 = Some(match self.0 {
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

    fn may_hold(&self, la: u64) -> bool {
        self.0.is_some_and(|(base, mask)| la & mask == base)
    }
}

/// Translations of one vCPU.
#[repr(C)]
#[derive(Debug)]
pub struct Tlb {
    /// Generation, AC and privilege of the running code: the low 12 bits of every tag it can hit.
    context: u64,
    read: Data,
    write: Data,
    fetch: Fetch,
    /// Of global pages, and of the others.
    large: [Large; 2],
    /// What walks remember; flushed with the rest.
    pub structures: Structures,
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
            read: Array::EMPTY,
            write: Array::EMPTY,
            fetch: Array::EMPTY,
            large: Default::default(),
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
    fn probe(entries: &Data, context: u64, la: u64, size: u64) -> Option<u64> {
        let entry = entries.at(la);
        let there = host::opaque(la.wrapping_add(entry.addend));
        // The last byte's page is compared, so an access that crosses into the next page misses.
        let key = (la.wrapping_add(size - 1) & PAGE_MASK) | context;
        if entry.tag == key { Some(there) } else { None }
    }

    /// Guest-physical address that fetches at `la` come from.
    #[inline(always)]
    pub fn fetch(&self, la: u64) -> Option<u64> {
        let entry = self.fetch.at(la);
        if entry.tag == (la & PAGE_MASK) | self.context { Some(entry.addend | (la & !PAGE_MASK)) } else { None }
    }

    /// Whether what [`fetch`](Self::fetch) found at `la` outlives MOV CR3.
    pub fn fetch_is_global(&self, la: u64) -> bool {
        self.fetch.is_global(la)
    }

    /// Enters a page for reads: `host` is the address of its first byte, `found` where the walk for `la` led.
    pub fn fill_read(&mut self, la: u64, host: u64, found: &Translation) {
        let entry = self.entry(la, host.wrapping_sub(la & PAGE_MASK), found);
        self.read.fill(la, entry, found.global);
    }

    /// Enters a page for writes.
    pub fn fill_write(&mut self, la: u64, host: u64, found: &Translation) {
        let entry = self.entry(la, host.wrapping_sub(la & PAGE_MASK), found);
        self.write.fill(la, entry, found.global);
    }

    /// Enters a page for fetches, at its guest-physical address.
    pub fn fill_fetch(&mut self, la: u64, found: &Translation) {
        let entry = self.entry(la, found.gpa.0 & PAGE_MASK, found);
        self.fetch.fill(la, entry, found.global);
    }

    fn entry(&mut self, la: u64, addend: u64, found: &Translation) -> Entry {
        self.large[usize::from(!found.global)].note(la, found.page_bytes);
        Entry { tag: (la & PAGE_MASK) | self.context, addend }
    }

    /// Drops everything: changes of CR0, CR4, EFER, of memory slots.
    pub fn flush(&mut self) {
        self.large = Default::default();
        self.structures.flush();
        self.context += GENERATION_STEP;
        if self.context > !PAGE_MASK {
            *self = Self { context: self.context & (CONTEXT_USER | CONTEXT_AC) | GENERATION_STEP, ..Self::new() };
        }
    }

    /// MOV CR3: drops what is not global.
    pub fn flush_local(&mut self) {
        self.large[1] = Large::default();
        self.structures.flush();
        self.read.drop_local();
        self.write.drop_local();
        self.fetch.drop_local();
    }

    /// INVLPG: drops the page of `la` in every context. True: everything went, for the page may have been a large one.
    pub fn flush_page(&mut self, la: u64) -> bool {
        if self.large.iter().any(|large| large.may_hold(la)) {
            self.flush();
            return true;
        }
        self.structures.flush();
        self.read.drop_page(la);
        self.write.drop_page(la);
        self.fetch.drop_page(la);
        false
    }

    /// Drops write entries that reach the 4 KiB at host address `page`, whatever their linear address: code was
    /// decoded from it, or its dirty bit was harvested.
    pub fn protect(&mut self, page: u64) {
        for entry in &mut self.write.entries {
            if (entry.tag & PAGE_MASK).wrapping_add(entry.addend) == page {
                entry.tag = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use x86_defs::GuestPhysAddr;

    use super::*;

    const LA: u64 = 0xffff_8000_1234_5000;

    fn page(page_bytes: u64, global: bool) -> Translation {
        Translation { gpa: GuestPhysAddr(0x9000), page_bytes, writable: true, user: false, executable: true, global }
    }

    fn filled() -> Tlb {
        let mut tlb = Tlb::new();
        tlb.fill_read(LA + 8, 0x7000, &page(0x1000, false));
        tlb.fill_write(LA, 0x7000, &page(0x1000, false));
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
        tlb.fill_read(0x20_0000, 0x10_0000, &page(0x20_0000, true));
        tlb.fill_read(0x20_1000, 0x10_1000, &page(0x20_0000, true));
        tlb.flush_page(0x20_0000);
        assert_eq!(tlb.read(0x20_1000, 1), None);
    }

    /// SDM Vol. 3 "Operations that Invalidate TLBs and Paging-Structure Caches", MOV to CR3.
    #[test]
    fn mov_cr3_drops_all_but_global_pages() {
        let mut tlb = filled();
        let other = LA + 0x1000;
        tlb.fill_read(other, 0x8000, &page(0x1000, true));
        tlb.fill_fetch(other, &page(0x1000, true));
        tlb.fill_fetch(LA, &page(0x1000, false));
        assert!(tlb.fetch_is_global(other) && !tlb.fetch_is_global(LA));
        tlb.flush_local();
        assert_eq!((tlb.read(LA, 1), tlb.write(LA, 1), tlb.fetch(LA)), (None, None, None));
        assert_eq!((tlb.read(other, 1), tlb.fetch(other)), (Some(0x8000), Some(0x9000)));
        // One that takes the place of another kind.
        tlb.fill_read(other, 0x8000, &page(0x1000, false));
        tlb.fill_read(LA, 0x7000, &page(0x1000, true));
        tlb.flush_local();
        assert_eq!((tlb.read(LA, 1), tlb.read(other, 1)), (Some(0x7000), None));
        assert!(!tlb.flush_page(LA));
        tlb.flush();
        assert_eq!((tlb.read(LA, 1), tlb.fetch(other)), (None, None));
    }

    #[test]
    fn protect_drops_write_entries_only() {
        let mut tlb = filled();
        tlb.protect(0x7000);
        assert_eq!(tlb.write(LA, 1), None);
        assert_eq!(tlb.read(LA, 1), Some(0x7000));
    }
}
