//! Memory slots: what KVM_SET_USER_MEMORY_REGION answers, in the order of checks of `__kvm_set_memory_region` (Linux 6.1),
//! where guest-physical addresses lead, and the dirty log.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mmu::slot::MAX_SLOTS;
use mmu::{AccessError, Alias, Backing, Change, Lookup, Mapping, Memory, Piece, SlotError, SlotFlags, SlotSpec, View};
use x86_defs::GuestPhysAddr;

use crate::common::{Stop, spec};

const PLAIN: SlotFlags = SlotFlags { log_dirty: false, readonly: false };
const LOG: SlotFlags = SlotFlags { log_dirty: true, readonly: false };
const ROM: SlotFlags = SlotFlags { log_dirty: false, readonly: true };

/// Slots 0: 0x1000–0x5000, 1: 0x8000–0xa000, 2 (ROM): 0x10000–0x12000.
fn three() -> Arc<Memory> {
    let memory = Arc::new(Memory::new());
    for (id, gpa, len, flags) in [(0, 0x1000, 0x4000, PLAIN), (1, 0x8000, 0x2000, PLAIN), (2, 0x10000, 0x2000, ROM)] {
        assert_eq!(memory.set_slot(spec(id, gpa, len, flags)), Ok(Change::Create));
    }
    memory
}

#[test]
fn answers_to_set_user_memory_region() {
    use Change::{Create, Flags, Move, Nothing};
    use SlotError::{Invalid, Overlap};
    let hva = 0x7000_0000;
    for (id, gpa, len, flags, userspace_addr, answer) in [
        (3, 0x20000, 0x1000, PLAIN, hva, Ok(Create)),
        (3, 0x20000, 0x1000, ROM, hva, Ok(Create)),
        (3, 0x5000, 0x3000, PLAIN, hva, Ok(Create)), // fills the gap exactly
        (3, 0x20001, 0x1000, PLAIN, hva, Err(Invalid)), // address
        (3, 0x20000, 0x1001, PLAIN, hva, Err(Invalid)), // size
        (3, 0x20000, 0x0800, PLAIN, hva, Err(Invalid)), // less than a page
        (3, 0x20000, 0x1000, PLAIN, hva + 1, Err(Invalid)), // client's address
        (MAX_SLOTS, 0x20000, 0x1000, PLAIN, hva, Err(Invalid)),
        (u32::MAX, 0x20000, 0x1000, PLAIN, hva, Err(Invalid)),
        (3, u64::MAX - 0xfff, 0x1000, PLAIN, hva, Err(Invalid)), // wraps
        (3, 0x20000, 1 << 43, PLAIN, hva, Err(Invalid)),         // more than 2^31 - 1 pages
        (3, 1 << 52, 0x1000, PLAIN, hva, Err(Invalid)),          // no page-table entry can name it
        (3, 0x4000, 0x1000, PLAIN, hva, Err(Overlap)),           // last page of slot 0
        (3, 0x0, 0x2000, PLAIN, hva, Err(Overlap)),              // first page of slot 0
        (3, 0x0, 0x100000, PLAIN, hva, Err(Overlap)),            // around everything
        (3, 0x2000, 0x1000, PLAIN, hva, Err(Overlap)),           // inside
        (MAX_SLOTS, 0x2000, 0x1000, PLAIN, hva, Err(Invalid)),   // the number is looked at before the overlap
        (0, 0x1000, 0x4000, PLAIN, hva, Ok(Nothing)),
        (0, 0x1000, 0x4000, LOG, hva, Ok(Flags)),
        (0, 0x2000, 0x4000, PLAIN, hva, Ok(Move)), // overlaps only itself
        (0, 0x20000, 0x4000, LOG, hva, Ok(Move)),
        (0, 0x6000, 0x4000, PLAIN, hva, Err(Overlap)), // moved into slot 1
        (0, 0x1000, 0x5000, PLAIN, hva, Err(Invalid)), // resized
        (0, 0x6000, 0x5000, PLAIN, hva, Err(Invalid)), // resized, before overlap
        (0, 0x1000, 0x4000, PLAIN, hva + 0x1000, Err(Invalid)), // other RAM
        (0, 0x1000, 0x4000, ROM, hva, Err(Invalid)),   // read-only is for ever
        (2, 0x10000, 0x2000, PLAIN, hva, Err(Invalid)),
    ] {
        let memory = three();
        let spec = SlotSpec { userspace_addr, ..self::spec(id, gpa, len.min(0x10_0000), flags) };
        let before = memory.generation();
        assert_eq!(memory.slots().classify(id, spec.gpa, len, flags, userspace_addr), answer, "{id} {gpa:#x} {len:#x}");
        let spec = SlotSpec { len, ..spec };
        assert_eq!(memory.set_slot(spec), answer, "{id} {gpa:#x} {len:#x}");
        let moved = memory.generation() != before;
        assert_eq!(moved, answer.is_ok_and(|change| change != Nothing), "the generation counts changes");
    }
}

#[test]
fn answers_to_a_delete() {
    let memory = three();
    assert_eq!(memory.delete_slot(3), Err(SlotError::Invalid));
    assert_eq!(memory.delete_slot(1), Ok(()));
    assert_eq!(memory.delete_slot(1), Err(SlotError::Invalid));
    assert_eq!(memory.set_slot(spec(3, 0x8000, 0x1000, PLAIN)), Ok(Change::Create));
}

#[test]
fn the_backing_must_hold_the_slot() {
    let memory = Memory::new();
    let mapping = Mapping::create("test", 0x3000).unwrap();
    let spec =
        |offset, len| SlotSpec { len, backing: Backing::new(mapping.clone(), offset), ..spec(0, 0, 0x1000, PLAIN) };
    assert_eq!(memory.set_slot(spec(0x1000, 0x3000)), Err(SlotError::Invalid));
    assert_eq!(memory.set_slot(spec(u64::MAX - 0xfff, 0x1000)), Err(SlotError::Invalid));
    assert_eq!(memory.set_slot(spec(0x1001, 0x1000)), Err(SlotError::Invalid));
    assert_eq!(memory.set_slot(spec(0x1000, 0x2000)), Ok(Change::Create));
}

#[test]
fn every_slot_number_works_at_once() {
    let memory = Arc::new(Memory::new());
    let mapping = Mapping::create("test", u64::from(MAX_SLOTS) * 0x1000).unwrap();
    // Numbers and addresses in opposite order, with holes between.
    for id in 0..MAX_SLOTS {
        let backing = Backing::new(mapping.clone(), u64::from(id) * 0x1000);
        let gpa = GuestPhysAddr(u64::from(MAX_SLOTS - id) * 0x2000);
        memory.set_slot(SlotSpec { gpa, backing, ..spec(id, 0, 0x1000, PLAIN) }).unwrap();
        mapping.store_u32(u64::from(id) * 0x1000, id).unwrap();
    }
    let view = View::new(&memory);
    for id in (0..MAX_SLOTS).chain((0..MAX_SLOTS).rev()) {
        let gpa = GuestPhysAddr(u64::from(MAX_SLOTS - id) * 0x2000);
        assert_eq!(view.load_u32(gpa), Some(id));
        assert_eq!(view.page(gpa.wrapping_add(0x1000), false), Lookup::Hole);
        assert_eq!(view.page(gpa.wrapping_sub(1), false), Lookup::Hole);
    }
}

#[test]
fn a_page_is_ram_rom_or_nothing() {
    let view = View::new(&three());
    let ram = |gpa, write| matches!(view.page(GuestPhysAddr(gpa), write), Lookup::Ram { .. });
    assert!(!ram(0xfff, false) && ram(0x1000, false) && ram(0x4fff, true) && !ram(0x5000, true));
    assert!(matches!(view.page(GuestPhysAddr(0x10123), false), Lookup::Ram { writable: false, .. }));
    assert_eq!(view.page(GuestPhysAddr(0x10123), true), Lookup::Readonly);
    assert_eq!(view.page(GuestPhysAddr(u64::MAX), true), Lookup::Hole);
}

#[test]
fn bytes_cross_pages_and_slots() {
    let memory = three();
    memory.set_slot(spec(3, 0x5000, 0x1000, PLAIN)).unwrap();
    let view = View::new(&memory);
    let bytes: Vec<u8> = (0..100).collect();
    view.write(GuestPhysAddr(0x5000 - 50), &bytes).unwrap();
    let mut back = [0; 100];
    view.read(GuestPhysAddr(0x5000 - 50), &mut back).unwrap();
    assert_eq!(back, bytes[..]);
    let error = AccessError::Hole(GuestPhysAddr(0x6000));
    assert_eq!(view.write(GuestPhysAddr(0x5fff), &[1, 2]), Err(error));
    assert_eq!(view.read(GuestPhysAddr(0x5fff), &mut back), Err(error));
    assert_eq!(back[0], 1, "what is before the hole was copied");
    assert_eq!(view.write(GuestPhysAddr(0x10000), &[1]), Err(AccessError::Readonly(GuestPhysAddr(0x10000))));
    assert_eq!(view.read(GuestPhysAddr(u64::MAX), &mut back[..2]), Err(AccessError::Hole(GuestPhysAddr(u64::MAX))));
}

/// A view sees it from its next look on; flags and dirty bits are the slot's, not the RAM's.
#[test]
fn a_slot_gets_other_ram() {
    let memory = three();
    assert_eq!(memory.set_slot(spec(0, 0x1000, 0x4000, LOG)), Ok(Change::Flags));
    let mut view = View::new(&memory);
    view.write(GuestPhysAddr(0x2000), b"old").unwrap();
    let mapping = Mapping::create("other", 0x8000).unwrap();
    mapping.write(0x4000 + 0x1000, b"new").unwrap();
    memory.set_backing(0, Backing::new(mapping.clone(), 0x4000)).unwrap();
    assert!(view.refresh(), "there is a new picture");
    let mut seen = [0; 3];
    view.read(GuestPhysAddr(0x2000), &mut seen).unwrap();
    assert_eq!(&seen, b"new");
    assert_eq!(memory.take_dirty(0), Ok(vec![0b0010]));
    assert_eq!(memory.set_backing(0, Backing::new(mapping.clone(), 0x5000)), Err(SlotError::Invalid), "too short");
    assert_eq!(memory.set_backing(0, Backing::new(mapping.clone(), 1)), Err(SlotError::Invalid));
    assert_eq!(memory.set_backing(9, Backing::new(mapping, 0)), Err(SlotError::NotFound));
}

#[test]
fn a_moved_slot_keeps_its_contents() {
    let memory = three();
    View::new(&memory).write(GuestPhysAddr(0x1234), b"kept").unwrap();
    memory.set_slot(spec(0, 0x20000, 0x4000, LOG)).unwrap();
    let view = View::new(&memory);
    let mut back = [0; 4];
    view.read(GuestPhysAddr(0x20234), &mut back).unwrap();
    assert_eq!(&back, b"kept");
    assert_eq!(view.page(GuestPhysAddr(0x1000), false), Lookup::Hole);
}

/// KVM_SET_MEMORY_ALIAS: the lowest number first, before the slots, one level, the target's low bits dropped.
#[test]
fn aliases_of_2007() {
    let memory = three();
    let mut view = View::new(&memory);
    view.write(GuestPhysAddr(0x2000), b"two").unwrap();
    view.write(GuestPhysAddr(0x8000), b"eight").unwrap();
    let alias = |gpa, len, target| Alias { gpa: GuestPhysAddr(gpa), len, target: GuestPhysAddr(target) };
    let at = |view: &View, gpa| view.load_u32(GuestPhysAddr(gpa)).map(|word| word.to_le_bytes()[0]);
    memory.set_alias(1, alias(0xa0000, 0x2000, 0x2abc)).unwrap();
    assert!(view.refresh());
    assert_eq!((at(&view, 0xa0000), at(&view, 0xa1000), at(&view, 0xa2000)), (Some(b't'), Some(0), None));
    memory.set_alias(0, alias(0xa0000, 0x1000, 0x8000)).unwrap();
    memory.set_alias(2, alias(0x1000, 0x1000, 0x8000)).unwrap();
    memory.set_alias(3, alias(0xc0000, 0x1000, 0xa0000)).unwrap();
    assert!(view.refresh());
    assert_eq!(at(&view, 0xa0000), Some(b'e'), "lowest alias first");
    assert_eq!(at(&view, 0x1000), Some(b'e'), "before slots");
    assert_eq!(at(&view, 0xc0000), None, "not re-aliased");
    for index in 0..4 {
        memory.set_alias(index, alias(0, 0, 0)).unwrap();
    }
    assert!(view.refresh());
    assert_eq!((at(&view, 0xa0000), at(&view, 0x1000)), (None, Some(0)));
    for (index, alias) in [
        (4, alias(0, 0x1000, 0)),
        (0, alias(1, 0x1000, 0)),
        (0, alias(0, 1, 0)),
        (0, alias(!0xfff, 0x1000, 0)),
        (0, alias(0, 0x1000, u64::MAX)),
    ] {
        assert_eq!(memory.set_alias(index, alias), Err(SlotError::Invalid), "{alias:?}");
    }
}

#[test]
fn a_write_through_an_alias_is_logged_at_its_target() {
    let memory = three();
    memory.set_slot(spec(1, 0x8000, 0x2000, LOG)).unwrap();
    let alias = Alias { gpa: GuestPhysAddr(0xa0000), len: 0x2000, target: GuestPhysAddr(0x8000) };
    memory.set_alias(0, alias).unwrap();
    let view = View::new(&memory);
    view.write(GuestPhysAddr(0xa1000), &[1]).unwrap();
    assert_eq!(memory.take_dirty(1).unwrap(), [2]);
}

#[test]
fn dirty_log_answers() {
    let memory = three();
    assert_eq!(memory.take_dirty(0), Err(SlotError::NotFound), "does not log");
    assert_eq!(memory.take_dirty(7), Err(SlotError::NotFound), "is not there");
    memory.set_slot(spec(0, 0x1000, 0x4000, LOG)).unwrap();
    let mut view = View::new(&memory);
    assert_eq!(memory.take_dirty(0).unwrap(), [0]);
    view.write(GuestPhysAddr(0x1fff), &[1, 2]).unwrap();
    view.mark_dirty(GuestPhysAddr(0x4fff));
    let before = memory.generation();
    assert_eq!(memory.take_dirty(0).unwrap(), [0b1011]);
    assert_ne!(memory.generation(), before, "cached write permission must go");
    assert!(view.refresh());
    assert_eq!(memory.take_dirty(0).unwrap(), [0]);
    assert!(!view.refresh(), "nothing was taken, nothing need go");
    // Switched on again while on: the bits stay. Switched off and on: a new log.
    view.write(GuestPhysAddr(0x1000), &[1]).unwrap();
    memory.set_slot(spec(0, 0x1000, 0x4000, LOG)).unwrap();
    assert_eq!(memory.take_dirty(0).unwrap(), [1]);
    view.write(GuestPhysAddr(0x1000), &[1]).unwrap();
    memory.set_slot(spec(0, 0x1000, 0x4000, PLAIN)).unwrap();
    assert_eq!(memory.take_dirty(0), Err(SlotError::NotFound));
    memory.set_slot(spec(0, 0x1000, 0x4000, LOG)).unwrap();
    assert_eq!(memory.take_dirty(0).unwrap(), [0]);
}

/// kvm-ioctls' `test_run_code`: a page that was only executed counts once.
#[test]
fn the_first_touch_of_a_page_is_logged() {
    let memory = three();
    memory.set_slot(spec(0, 0x1000, 0x4000, LOG)).unwrap();
    let view = View::new(&memory);
    assert!(matches!(view.page(GuestPhysAddr(0x1000), false), Lookup::Ram { logged: true, writable: true, .. }));
    assert!(matches!(view.page(GuestPhysAddr(0x3000), true), Lookup::Ram { .. }));
    assert_eq!(memory.take_dirty(0).unwrap(), [0b0101]);
    view.page(GuestPhysAddr(0x1000), false);
    view.page(GuestPhysAddr(0x3000), false);
    assert_eq!(memory.take_dirty(0).unwrap(), [0], "touched before");
    view.page(GuestPhysAddr(0x3000), true);
    assert_eq!(memory.take_dirty(0).unwrap(), [0b0100]);
}

/// Each mark is in exactly one harvest, however harvests and marks interleave.
#[test]
fn every_dirty_page_is_reported_exactly_once() {
    const PAGES: u64 = 4096;
    let memory = Arc::new(Memory::new());
    memory.set_slot(spec(0, 0, PAGES * 4096, LOG)).unwrap();
    let done = AtomicBool::new(false);
    let mut counts = vec![0_u32; PAGES as usize];
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..2)
            .map(|half| {
                let memory = &memory;
                scope.spawn(move || {
                    let view = View::new(memory);
                    for page in (half..PAGES).step_by(2) {
                        view.mark_dirty(GuestPhysAddr::from_page(page));
                    }
                })
            })
            .collect();
        let (memory, done, counts) = (&memory, &done, &mut counts);
        let harvester = scope.spawn(move || {
            loop {
                let last = done.load(Ordering::SeqCst);
                for (word, bits) in memory.take_dirty(0).unwrap().into_iter().enumerate() {
                    (0..64).filter(|bit| bits >> bit & 1 != 0).for_each(|bit| counts[word * 64 + bit] += 1);
                }
                if last {
                    break;
                }
            }
        });
        let stop = Stop(done);
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        drop(stop);
        harvester.join().unwrap();
    });
    assert!(counts.iter().all(|&count| count == 1));
}

#[test]
fn a_joined_mapping_is_its_pieces_in_order() {
    let (a, b) = (Mapping::create("a", 0x4000).unwrap(), Mapping::create("b", 0x2000).unwrap());
    a.write(0x1000, b"second page of a").unwrap();
    b.write(0, b"first page of b").unwrap();
    let piece = |mapping: &Arc<Mapping>, offset, len| Piece { mapping: mapping.clone(), offset, len };
    let joined = Mapping::join(&[piece(&b, 0, 0x1000), piece(&a, 0x1000, 0x2000)]).unwrap();
    assert_eq!(joined.len(), 0x3000);
    let mut text = [0; 16];
    joined.read(0x1000, &mut text).unwrap();
    assert_eq!(&text, b"second page of a");
    joined.write(0, b"shared").unwrap();
    b.read(0, &mut text).unwrap();
    assert_eq!(&text, b"sharedpage of b\0");
    // A joined mapping can be a piece in turn, cut anywhere.
    let again = Mapping::join(&[piece(&joined, 0x1000, 0x1000), piece(&joined, 0, 0x2000)]).unwrap();
    assert_eq!((again.load_u8(0), again.load_u8(0x1000), again.load_u8(0x2000)), (Some(b's'), Some(b's'), Some(b's')));
    assert!(Mapping::join(&[piece(&a, 0x3000, 0x2000)]).is_err());
    assert!(Mapping::join(&[]).is_err());
    again.discard(0x1000, 0x1000).unwrap();
    assert_eq!(b.load_u8(0), Some(0), "the file itself has a hole");
}

#[test]
fn an_unlogged_view_tells_the_log_of_nothing() {
    let memory = Arc::new(Memory::new());
    memory.set_slot(spec(0, 0, 0x3000, LOG)).unwrap();
    let (view, other) = (View::unlogged(&memory), View::new(&memory));
    view.write(GuestPhysAddr(0x1000), &[1]).unwrap();
    view.read(GuestPhysAddr(0), &mut [0]).unwrap();
    view.page(GuestPhysAddr(0x2000), true);
    assert_eq!(view.fetch_or_u8(GuestPhysAddr(0x1000), 0x81), Some(1));
    assert_eq!(memory.take_dirty(0).unwrap(), [0]);
    assert_eq!(other.fetch_or_u8(GuestPhysAddr(0x1000), 2), Some(0x81));
    assert_eq!(memory.take_dirty(0).unwrap(), [0b010], "and spoils it for nobody");
}

#[test]
fn bits_are_set_in_ram_alone() {
    let memory = Arc::new(Memory::new());
    memory.set_slot(spec(0, 0, 0x1000, ROM)).unwrap();
    let view = View::new(&memory);
    assert_eq!([0, 0x1000].map(|gpa| view.fetch_or_u8(GuestPhysAddr(gpa), 1)), [None; 2]);
}
