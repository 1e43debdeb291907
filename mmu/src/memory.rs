//! The memory of one VM, and how a change of it reaches running vCPUs.
//!
//! A change makes a new [`Slots`] and bumps the generation; nothing in the old picture is modified. A vCPU works on the
//! picture in its [`crate::View`] and takes a new one between two instructions. Whoever changes memory and must know that
//! nobody uses the old state any more (the RAM of a deleted slot, a harvested dirty bit) changes, kicks the vCPUs and calls
//! [`Memory::wait_until_seen`]. Guest execution pays nothing for this: no lock, no counter.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex, RwLock};

use crate::ring::DirtyRing;
use crate::slot::{Alias, Backing, Change, Slot, SlotError, SlotSpec, Slots};

/// Address spaces of a VM: KVM_CAP_MULTI_ADDRESS_SPACE. A slot's number has its space in bits 16 and up.
pub const SPACES: usize = 2;
/// The address space of a vCPU in system management mode; otherwise it is 0.
pub const SMM_SPACE: usize = 1;

/// Where a slot is, by its number. `Invalid`: no such space.
fn space_of(id: u32) -> Result<usize, SlotError> {
    let space = (id >> 16) as usize;
    if space < SPACES { Ok(space) } else { Err(SlotError::Invalid) }
}

/// Guest-physical memory of a VM.
#[derive(Debug, Default)]
pub struct Memory {
    /// By address space.
    current: RwLock<[Arc<Slots>; SPACES]>,
    /// Bumped, with `current` locked, by every change.
    generation: AtomicU64,
    views: Mutex<Vec<Arc<Position>>>,
    /// Threads in `wait_until_seen`.
    waiters: AtomicU32,
    seen: Condvar,
}

/// Where a view is. 0: outside of guest execution. Otherwise inside, and one more than the generation it works with.
#[derive(Debug, Default)]
pub(crate) struct Position(AtomicU64);

impl Memory {
    /// A VM without memory.
    pub fn new() -> Self {
        Self::default()
    }

    /// The slots of address space 0 as they are now.
    pub fn slots(&self) -> Arc<Slots> {
        self.current.read()[0].clone()
    }

    /// The slots as they are now, by address space.
    pub fn spaces(&self) -> [Arc<Slots>; SPACES] {
        self.current.read().clone()
    }

    /// The slots among which number `id` is, or would be. `Invalid`: no such address space.
    pub fn slots_around(&self, id: u32) -> Result<Arc<Slots>, SlotError> {
        Ok(self.current.read()[space_of(id)?].clone())
    }

    /// Number of the current state; every change, a harvest of dirty bits included, makes it larger.
    #[inline]
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// The slots of an address space and their generation, as one.
    pub(crate) fn snapshot(&self, space: usize) -> (Arc<Slots>, u64) {
        let current = self.current.read();
        (current[space].clone(), self.generation())
    }

    fn change<T>(
        &self,
        space: usize,
        make: impl FnOnce(&Slots) -> Result<Option<(Slots, T)>, SlotError>,
    ) -> Result<Option<T>, SlotError> {
        let mut current = self.current.write();
        let Some((new, answer)) = make(&current[space])? else { return Ok(None) };
        let old = std::mem::replace(&mut current[space], Arc::new(new));
        self.generation.fetch_add(1, Ordering::SeqCst);
        drop(current);
        drop(old); // Perhaps the last user of a mapping: unmapped without the lock.
        Ok(Some(answer))
    }

    /// Makes or changes a slot, as KVM_SET_USER_MEMORY_REGION with a size does. An existing slot keeps its RAM and, while
    /// it logs, its dirty bits.
    pub fn set_slot(&self, spec: SlotSpec) -> Result<Change, SlotError> {
        let change = self.change(space_of(spec.id)?, |slots| match slots.with(&spec)? {
            (_, Change::Nothing) => Ok(None),
            done => Ok(Some(done)),
        })?;
        Ok(change.unwrap_or(Change::Nothing))
    }

    /// Puts other RAM behind an existing slot, because that is what its owner has there now: flags and dirty bits stay.
    pub fn set_backing(&self, id: u32, backing: Backing) -> Result<(), SlotError> {
        self.change(space_of(id)?, |slots| Ok(Some((slots.with_backing(id, backing)?, ()))))?;
        Ok(())
    }

    /// Deletes a slot; `Invalid` if there is none.
    pub fn delete_slot(&self, id: u32) -> Result<(), SlotError> {
        self.change(space_of(id)?, |slots| Ok(Some((slots.without(id)?, ()))))?;
        Ok(())
    }

    /// Sets alias number `index` of address space 0, or removes it if `alias.len` is 0. KVM_SET_MEMORY_ALIAS of 2007: removing an alias that
    /// is not there is no error, and nothing is checked about the target.
    pub fn set_alias(&self, index: u32, alias: Alias) -> Result<(), SlotError> {
        self.change(0, |slots| Ok(Some((slots.with_alias(index, alias)?, ()))))?;
        Ok(())
    }

    /// The dirty bits of a slot, 64 pages to a word, lowest bit first; clears them. Vcpus may still write pages they found
    /// dirty before, so wait until they have seen the new generation before telling the client. `NotFound` if the slot
    /// does not exist or does not log.
    pub fn take_dirty(&self, id: u32) -> Result<Vec<u64>, SlotError> {
        // Exclusive, so that a picture taken with the old generation is also one from before the harvest.
        let current = self.current.write();
        let dirty = current[space_of(id)?].by_id(id).and_then(|slot| slot.dirty()).ok_or(SlotError::NotFound)?;
        let bits = dirty.take();
        if bits.iter().any(|&word| word != 0) {
            self.generation.fetch_add(1, Ordering::SeqCst);
        }
        Ok(bits)
    }

    /// Clears dirty bits of a slot as `DirtyLog::clear` has them. As [`Memory::take_dirty`].
    pub fn clear_dirty(&self, id: u32, first: usize, mask: &[u64]) -> Result<(), SlotError> {
        let current = self.current.write();
        let dirty = current[space_of(id)?].by_id(id).and_then(|slot| slot.dirty()).ok_or(SlotError::NotFound)?;
        if dirty.clear(first, mask) {
            self.generation.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Resets what clients have harvested of the rings: a page that is written again is told of again. As [`Memory::take_dirty`].
    /// What is not there, or does not log any more, is passed over. How many entries.
    pub fn reset_rings(&self, rings: &[Arc<DirtyRing>]) -> u32 {
        let current = self.current.write();
        // Most neighbours are of one slot.
        let mut last: Option<&Slot> = None;
        let mut forget = |id, page| {
            if last.is_none_or(|slot| slot.id() != id) {
                last = space_of(id).ok().and_then(|space| current[space].by_id(id));
            }
            if let Some(dirty) = last.and_then(Slot::dirty) {
                dirty.clear_page(page);
            }
        };
        let count = rings.iter().map(|ring| ring.reset(&mut forget)).sum();
        if count > 0 {
            self.generation.fetch_add(1, Ordering::SeqCst);
        }
        count
    }

    /// Blocks until every view is outside of guest execution or works with `generation` or a newer one. Kick the vCPUs
    /// first; never call it from a thread whose own view is inside.
    pub fn wait_until_seen(&self, generation: u64) {
        let mut views = self.views.lock();
        // Announced before the positions are read: a view that moves after our look finds the announcement (both sides use
        // sequentially consistent accesses) and then needs the lock, which we give up only while asleep.
        self.waiters.fetch_add(1, Ordering::SeqCst);
        while views.iter().any(|view| (1..=generation).contains(&view.0.load(Ordering::SeqCst))) {
            self.seen.wait(&mut views);
        }
        self.waiters.fetch_sub(1, Ordering::SeqCst);
    }

    pub(crate) fn register(&self) -> Arc<Position> {
        let position = Arc::new(Position::default());
        self.views.lock().push(position.clone());
        position
    }

    pub(crate) fn deregister(&self, position: &Arc<Position>) {
        self.views.lock().retain(|other| !Arc::ptr_eq(other, position));
        self.wake();
    }

    /// Says that a view is inside, working with `generation`.
    #[inline]
    pub(crate) fn inside(&self, position: &Position, generation: u64) {
        position.0.store(generation + 1, Ordering::SeqCst);
        self.wake();
    }

    /// Says that a view is outside.
    #[inline]
    pub(crate) fn outside(&self, position: &Position) {
        position.0.store(0, Ordering::SeqCst);
        self.wake();
    }

    #[inline]
    fn wake(&self) {
        if self.waiters.load(Ordering::SeqCst) != 0 {
            let _views = self.views.lock();
            self.seen.notify_all();
        }
    }
}

impl Position {
    pub(crate) fn is_inside(&self) -> bool {
        self.0.load(Ordering::Relaxed) != 0
    }
}
