//! A vCPU's dirty ring: which pages it wrote, in memory that the client maps (api.rst "KVM_CAP_DIRTY_LOG_RING";
//! virt/kvm/dirty_ring.c).
//!
//! A slot's [`DirtyLog`](crate::dirty::DirtyLog) says which of its pages are in somebody's ring; that bit keeps a page from being
//! told of twice, as a writable entry of KVM's page tables does. A reset clears it again.
//!
//! The client may write any byte of the ring at any time. An index is masked before it is used, and what an entry names is
//! looked up like any number of a client's.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use parking_lot::Mutex;

use crate::mapping::Mapping;

/// Bytes of `struct kvm_dirty_gfn`: flags, slot, offset in pages.
pub const ENTRY_BYTES: u64 = 16;
const SLOT: u64 = 4;
const OFFSET: u64 = 8;
/// `KVM_DIRTY_GFN_F_DIRTY`
const DIRTY: u32 = 1 << 0;
/// `KVM_DIRTY_GFN_F_RESET`
const RESET: u32 = 1 << 1;

/// `KVM_DIRTY_RING_RSVD_ENTRIES`: the vCPU leaves the guest when no more are unused, for it may write further pages on its way.
/// KVM adds the entries of a processor's log (PML), of which there is none here.
pub const RESERVED_ENTRIES: u32 = 64;
/// `KVM_DIRTY_RING_MAX_ENTRIES`
pub const MAX_ENTRIES: u32 = 65536;

/// Entries are inside: [`DirtyRing::new`] has looked.
const INSIDE: &str = "an entry is inside of the ring";

/// The ring of one vCPU.
pub struct DirtyRing {
    mapping: Arc<Mapping>,
    /// Where in `mapping` it begins.
    at: u64,
    /// A power of two.
    entries: u32,
    state: Mutex<State>,
    full: Box<dyn Fn() + Send + Sync>,
}

/// Indices count on and are masked; they wrap as u32 does.
#[derive(Default)]
struct State {
    /// The next entry to fill.
    dirty: u32,
    /// The next entry to reset.
    reset: u32,
    /// Pages for which there was no room: slot, page.
    waiting: VecDeque<(u32, u64)>,
}

impl DirtyRing {
    /// An empty ring of `entries`, a power of two, at byte `at` of `mapping`. `full` is called when the vCPU must leave the guest.
    /// Panics if that is not inside of a mapping that can be written.
    pub fn new(mapping: Arc<Mapping>, at: u64, entries: u32, full: impl Fn() + Send + Sync + 'static) -> Self {
        assert!(entries.is_power_of_two() && entries > RESERVED_ENTRIES && at.is_multiple_of(ENTRY_BYTES));
        assert!(mapping.writable() && at + u64::from(entries) * ENTRY_BYTES <= mapping.len(), "{INSIDE}");
        Self { mapping, at, entries, state: Mutex::default(), full: Box::new(full) }
    }

    /// The vCPU may not enter the guest: client first.
    pub fn is_soft_full(&self) -> bool {
        self.is_full(&self.state.lock())
    }

    fn is_full(&self, state: &State) -> bool {
        state.used() >= self.entries - RESERVED_ENTRIES || !state.waiting.is_empty()
    }

    /// Puts a page in: of the slot with this number, address space included, counted from the slot's start.
    pub(crate) fn push(&self, slot: u32, page: u64) {
        let mut state = self.state.lock();
        if state.waiting.len() >= MAX_ENTRIES as usize {
            // Only a client that resets what it was never told of comes here.
            return;
        }
        state.waiting.push_back((slot, page));
        self.fill(&mut state);
        let is_full = self.is_full(&state);
        drop(state);
        if is_full {
            (self.full)();
        }
    }

    /// Moves to the ring what there is room for.
    fn fill(&self, state: &mut State) {
        while state.used() < self.entries
            && let Some((slot, page)) = state.waiting.pop_front()
        {
            let entry = self.entry(state.dirty);
            self.mapping.atomic_u32(entry + SLOT).expect(INSIDE).store(slot, Relaxed);
            self.mapping.atomic_u64(entry + OFFSET).expect(INSIDE).store(page, Relaxed);
            // Whoever sees the flag sees the rest.
            self.mapping.atomic_u32(entry).expect(INSIDE).store(DIRTY, Release);
            state.dirty = state.dirty.wrapping_add(1);
        }
    }

    /// Resets what the client has harvested, in order, and hands it to `forget`: slot and page, as the client left them there.
    /// How many.
    pub(crate) fn reset(&self, mut forget: impl FnMut(u32, u64)) -> u32 {
        let mut state = self.state.lock();
        let mut count = 0;
        // Once round at the most: a client that goes on harvesting waits for the next call.
        while count < self.entries {
            let entry = self.entry(state.reset);
            let flags = self.mapping.atomic_u32(entry).expect(INSIDE);
            if flags.load(Acquire) & RESET == 0 {
                break;
            }
            let slot = self.mapping.load_u32(entry + SLOT).expect(INSIDE);
            let page = self.mapping.load_u64(entry + OFFSET).expect(INSIDE);
            flags.store(0, Release);
            state.reset = state.reset.wrapping_add(1);
            count += 1;
            forget(slot, page);
        }
        self.fill(&mut state);
        count
    }

    fn entry(&self, index: u32) -> u64 {
        self.at + u64::from(index & (self.entries - 1)) * ENTRY_BYTES
    }
}

impl State {
    /// `kvm_dirty_ring_used`. Resetting entries that were never filled makes it huge: the ring stays full, as Linux's does.
    fn used(&self) -> u32 {
        self.dirty.wrapping_sub(self.reset)
    }
}

impl fmt::Debug for DirtyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DirtyRing {{ at: {:#x}, entries: {} }}", self.at, self.entries)
    }
}
