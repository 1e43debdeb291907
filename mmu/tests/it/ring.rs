//! A dirty ring whose vCPU goes on though it is full: api.rst knows no page that is dirty and never told of.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use mmu::ring::{DirtyRing, ENTRY_BYTES, RESERVED_ENTRIES};
use mmu::{Mapping, Memory, SlotFlags, View};
use x86_defs::GuestPhysAddr;

use crate::common::spec;

const ENTRIES: u32 = 128;
const PAGES: u64 = 300;
const SLOT: u32 = 5;
/// Where the ring begins.
const AT: u64 = 0x1000;
/// `KVM_DIRTY_GFN_F_DIRTY`, `KVM_DIRTY_GFN_F_RESET`.
const DIRTY: u32 = 1;
const RESET: u32 = 2;

#[test]
fn pages_wait_for_room_and_keep_their_order() {
    let memory = Arc::new(Memory::new());
    memory.set_slot(spec(SLOT, 0, PAGES << 12, SlotFlags { log_dirty: true, readonly: false })).unwrap();
    let shared = Mapping::create("ring", AT + u64::from(ENTRIES) * ENTRY_BYTES).unwrap();
    let calls = Arc::new(AtomicU32::new(0));
    let called = calls.clone();
    let ring = Arc::new(DirtyRing::new(shared.clone(), AT, ENTRIES, move || {
        called.fetch_add(1, Ordering::SeqCst);
    }));
    let mut view = View::new(&memory);
    view.set_ring(Some(ring.clone()));

    let limit = u64::from(ENTRIES - RESERVED_ENTRIES);
    for page in 0..PAGES {
        assert_eq!(ring.is_soft_full(), page >= limit, "{page}");
        view.mark_dirty(GuestPhysAddr(page << 12));
        view.mark_dirty(GuestPhysAddr(page << 12));
    }
    assert_eq!(
        calls.load(Ordering::SeqCst),
        (PAGES - limit + 1) as u32,
        "each page from the limit on calls the vCPU back"
    );

    let (mut next, mut seen) = (0, Vec::new());
    loop {
        let before = seen.len();
        loop {
            let entry = AT + u64::from(next % ENTRIES) * ENTRY_BYTES;
            if shared.load_u32(entry).unwrap() != DIRTY {
                break;
            }
            assert_eq!(shared.load_u32(entry + 4), Some(SLOT));
            seen.push(shared.load_u64(entry + 8).unwrap());
            shared.store_u32(entry, RESET).unwrap();
            next += 1;
        }
        let generation = memory.generation();
        let count = memory.reset_rings(std::slice::from_ref(&ring));
        assert_eq!(count as usize, seen.len() - before);
        if count == 0 {
            assert_eq!(memory.generation(), generation, "nothing was reset, nothing need go");
            break;
        }
        assert_ne!(memory.generation(), generation, "cached write permission must go");
    }
    assert_eq!(seen, (0..PAGES).collect::<Vec<_>>());
    assert!(!ring.is_soft_full());
    let slots = memory.slots();
    let log = slots.by_id(SLOT).and_then(mmu::Slot::dirty).unwrap();
    assert!((0..PAGES).all(|page| !log.is_dirty(page)), "each is told of when it is written again");
}
