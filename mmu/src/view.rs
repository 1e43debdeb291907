//! A vCPU's picture of guest-physical memory.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use x86_defs::{GuestPhysAddr, PAGE_MASK, PAGE_SHIFT};

use crate::memory::{Memory, Position, SPACES};
use crate::ring::DirtyRing;
use crate::slot::{Lookup, Slot, Slots};

/// An access of several bytes met a page that is not RAM for it. The bytes before that page have been copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AccessError {
    /// No slot there.
    #[error("no memory at {0}")]
    Hole(GuestPhysAddr),
    /// A write to a read-only slot.
    #[error("read-only memory at {0}")]
    Readonly(GuestPhysAddr),
}

/// Who looks a slot up. Each remembers the slot it found last: page tables and data are often in different slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum User {
    Data,
    /// A paging-structure entry; the level does not matter, the tables of a guest are rarely far apart.
    Tables,
}

/// A vCPU's picture of its VM's memory. Host pointers that it gave stay mapped until it takes a newer picture.
#[derive(Debug)]
pub struct View {
    memory: Arc<Memory>,
    position: Arc<Position>,
    slots: Arc<Slots>,
    generation: u64,
    /// Address space.
    space: usize,
    hints: [Cell<usize>; 2],
    /// Where pages go that become dirty, beside their slot's log.
    ring: Option<Arc<DirtyRing>>,
    /// Pages that it touches or writes are told to logs and rings.
    is_logged: bool,
}

impl View {
    /// A view of address space 0 of `memory`, outside of guest execution.
    pub fn new(memory: &Arc<Memory>) -> Self {
        let (memory, position, hints) = (memory.clone(), memory.register(), Default::default());
        let (slots, generation) = memory.snapshot(0);
        Self { memory, position, slots, generation, space: 0, hints, ring: None, is_logged: true }
    }

    /// As [`View::new`]; what is done through it is told to no dirty log and no ring.
    pub fn unlogged(memory: &Arc<Memory>) -> Self {
        let mut view = Self::new(memory);
        view.is_logged = false;
        view
    }

    /// Puts pages that become dirty from now on into `ring`. In a VM whose vCPUs have rings every view is one of a vCPU's, with its
    /// ring: a page that one without marks is lost.
    pub fn set_ring(&mut self, ring: Option<Arc<DirtyRing>>) {
        self.ring = ring;
    }

    /// The memory that this is a view of.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// The slots in this picture.
    pub fn slots(&self) -> &Arc<Slots> {
        &self.slots
    }

    /// Number of this picture: no other generation or address space has it.
    #[inline]
    pub fn picture(&self) -> u64 {
        self.generation * SPACES as u64 + self.space as u64
    }

    /// Goes over to another address space, between two instructions. As when [`View::refresh`] is true.
    pub fn select(&mut self, space: usize) {
        assert!(space < SPACES, "an address space that there is");
        self.space = space;
        self.take();
    }

    /// Enters guest execution with the newest picture. True if it is newer than the last one: then everything that
    /// caches host pointers or write permission must go before the next access.
    #[must_use = "cached host pointers are stale when this is true"]
    pub fn enter(&mut self) -> bool {
        // Inside first, then look: a change made before the look is seen here, one made after it finds us inside.
        self.memory.inside(&self.position, self.generation);
        self.refresh()
    }

    /// Leaves guest execution. Pointers given before may be used no more until [`View::enter`] says they are good.
    pub fn leave(&mut self) {
        self.memory.outside(&self.position);
    }

    /// Takes the newest picture, between two instructions. True if it is newer than the last one, see [`View::enter`].
    #[must_use = "cached host pointers are stale when this is true"]
    #[inline]
    pub fn refresh(&mut self) -> bool {
        self.memory.generation() != self.generation && self.take()
    }

    #[cold]
    fn take(&mut self) -> bool {
        let (slots, generation) = self.memory.snapshot(self.space);
        self.slots = slots;
        self.generation = generation;
        if self.position.is_inside() {
            self.memory.inside(&self.position, generation);
        }
        true
    }

    /// Notes an access to the page at `offset` in the slot's dirty log, if there is one.
    #[inline(always)]
    fn log(&self, slot: &Slot, offset: u64, write: bool) {
        if let Some(dirty) = slot.dirty()
            && self.is_logged
        {
            let page = offset >> PAGE_SHIFT;
            let is_new = if write { dirty.mark(page) } else { dirty.touch(page) };
            if is_new && let Some(ring) = &self.ring {
                ring.push(slot.id(), page);
            }
        }
    }

    #[inline(always)]
    fn locate(&self, gpa: u64, user: User) -> Option<(&Slot, u64)> {
        let cell = &self.hints[user as usize];
        let mut hint = cell.get();
        let found = self.slots.locate(gpa, &mut hint);
        cell.set(hint);
        found
    }

    /// What is at the 4-KByte page of `gpa`, for a read (or fetch) or a write. A lookup for writing marks the page dirty;
    /// so does the first touch of a page of a slot that logs.
    #[inline]
    pub fn page(&self, gpa: GuestPhysAddr, write: bool) -> Lookup {
        let Some((slot, offset)) = self.locate(gpa.0 & PAGE_MASK, User::Data) else { return Lookup::Hole };
        let writable = slot.writable();
        if write && !writable {
            return Lookup::Readonly;
        }
        self.log(slot, offset, write);
        Lookup::Ram { ptr: slot.span().host(offset), writable, logged: slot.dirty().is_some() }
    }

    /// Marks the page of `gpa` dirty, if its slot logs.
    #[inline]
    pub fn mark_dirty(&self, gpa: GuestPhysAddr) {
        if let Some((slot, offset)) = self.locate(gpa.0, User::Data) {
            self.log(slot, offset, true);
        }
    }

    /// Copies from guest memory. One of 1, 2, 4 or 8 bytes inside a page is a single load.
    pub fn read(&self, gpa: GuestPhysAddr, buf: &mut [u8]) -> Result<(), AccessError> {
        let mut at = gpa;
        let mut rest = buf;
        while !rest.is_empty() {
            let (now, later) = rest.split_at_mut(rest.len().min(at.bytes_to_page_end() as usize));
            let (slot, offset) = self.locate(at.0, User::Data).ok_or(AccessError::Hole(at))?;
            self.log(slot, offset, false);
            slot.span().read(offset, now).ok_or(AccessError::Hole(at))?;
            at = at.wrapping_add(now.len() as u64);
            rest = later;
        }
        Ok(())
    }

    /// Copies into guest memory and marks the pages dirty. One of 1, 2, 4 or 8 bytes inside a page is a single store.
    pub fn write(&self, gpa: GuestPhysAddr, bytes: &[u8]) -> Result<(), AccessError> {
        let mut at = gpa;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(at.bytes_to_page_end() as usize));
            let (slot, offset) = self.locate(at.0, User::Data).ok_or(AccessError::Hole(at))?;
            if !slot.writable() {
                return Err(AccessError::Readonly(at));
            }
            slot.span().write(offset, now).ok_or(AccessError::Readonly(at))?;
            if slot.dirty().is_some() {
                // The bytes are there before the mark is looked at, so whoever takes the mark finds the bytes.
                fence(Ordering::SeqCst);
                self.log(slot, offset, true);
            }
            at = at.wrapping_add(now.len() as u64);
            rest = later;
        }
        Ok(())
    }

    /// The aligned doubleword at `gpa`, as one load; `None` if there is no RAM or `gpa` is not aligned.
    #[inline]
    pub fn load_u32(&self, gpa: GuestPhysAddr) -> Option<u32> {
        self.tables().load_u32(gpa.0)
    }

    /// The aligned quadword at `gpa`, as one load; `None` if there is no RAM or `gpa` is not aligned.
    #[inline]
    pub fn load_u64(&self, gpa: GuestPhysAddr) -> Option<u64> {
        self.tables().load_u64(gpa.0)
    }

    /// For several loads that are probably from one slot.
    #[inline(always)]
    pub(crate) fn tables(&self) -> Tables<'_> {
        Tables { view: self, slot: self.slots.direct(self.hints[User::Tables as usize].get()) }
    }

    /// Puts `new` at `gpa` and returns what was there, atomically, and marks the page dirty. `None` if it is not writable RAM.
    pub fn swap_u8(&self, gpa: GuestPhysAddr, new: u8) -> Option<u8> {
        let (slot, offset) = self.locate(gpa.0, User::Data)?;
        if !slot.writable() {
            return None;
        }
        let old = slot.span().swap_u8(offset, new)?;
        self.log(slot, offset, true);
        Some(old)
    }

    /// Sets `bits` at `gpa` and returns what was there, atomically, and marks the page dirty. `None` as for [`View::swap_u8`].
    pub fn fetch_or_u8(&self, gpa: GuestPhysAddr, bits: u8) -> Option<u8> {
        let (slot, offset) = self.locate(gpa.0, User::Data)?;
        if !slot.writable() {
            return None;
        }
        let old = slot.span().fetch_or_u8(offset, bits)?;
        self.log(slot, offset, true);
        Some(old)
    }

    /// Puts `new` at `gpa` if `old` is there, atomically, and marks the page dirty. `None` if it is not writable RAM or not
    /// aligned, otherwise whether `old` was there.
    #[inline]
    pub fn compare_exchange_u32(&self, gpa: GuestPhysAddr, old: u32, new: u32) -> Option<bool> {
        self.exchange(gpa, |slot, offset| slot.span().compare_exchange_u32(offset, old, new))
    }

    /// As [`View::compare_exchange_u32`], for a quadword.
    #[inline]
    pub fn compare_exchange_u64(&self, gpa: GuestPhysAddr, old: u64, new: u64) -> Option<bool> {
        self.exchange(gpa, |slot, offset| slot.span().compare_exchange_u64(offset, old, new))
    }

    #[inline(always)]
    fn exchange(&self, gpa: GuestPhysAddr, exchange: impl FnOnce(&Slot, u64) -> Option<bool>) -> Option<bool> {
        let (slot, offset) = self.locate(gpa.0, User::Tables)?;
        if !slot.writable() {
            return None;
        }
        let done = exchange(slot, offset)?;
        if done {
            self.log(slot, offset, true);
        }
        Some(done)
    }
}

/// Loads from the slot that holds the guest's paging structures, which the last load found.
pub(crate) struct Tables<'a> {
    view: &'a View,
    slot: Option<&'a Slot>,
}

macro_rules! loads {
    ($($load:ident $value:ty;)*) => {$(
        #[inline(always)]
        pub(crate) fn $load(&mut self, gpa: u64) -> Option<$value> {
            match self.slot.and_then(|slot| slot.span().$load(gpa.wrapping_sub(slot.gpa().0))) {
                Some(value) => Some(value),
                None => self.find(gpa).and_then(|(slot, offset)| slot.span().$load(offset)),
            }
        }
    )*};
}

impl<'a> Tables<'a> {
    loads! {
        load_u32 u32;
        load_u64 u64;
    }

    #[cold]
    #[inline(never)]
    fn find(&mut self, gpa: u64) -> Option<(&'a Slot, u64)> {
        let view: &'a View = self.view;
        let found = view.locate(gpa, User::Tables);
        self.slot = view.slots.direct(view.hints[User::Tables as usize].get());
        found
    }
}

impl Drop for View {
    fn drop(&mut self) {
        self.memory.deregister(&self.position);
    }
}
