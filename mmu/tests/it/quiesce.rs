//! Changes of memory under running vCPUs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use mmu::{Lookup, Mapping, Memory, SlotFlags, View};
use x86_defs::GuestPhysAddr;

use crate::common::{Stop, spec};

#[test]
fn enter_and_refresh_tell_of_changes_once() {
    let memory = Arc::new(Memory::new());
    let mut view = View::new(&memory);
    assert!(!view.enter());
    memory.set_slot(spec(0, 0, 0x1000, SlotFlags::default())).unwrap();
    assert_eq!(view.page(GuestPhysAddr(0), false), Lookup::Hole, "the old picture until refresh");
    assert!(view.refresh() && !view.refresh());
    assert!(matches!(view.page(GuestPhysAddr(0), false), Lookup::Ram { .. }));
    view.leave();
    memory.delete_slot(0).unwrap();
    assert!(view.enter() && !view.refresh());
    assert_eq!(view.page(GuestPhysAddr(0), false), Lookup::Hole);
}

#[test]
fn waiting_is_for_views_that_are_inside_with_an_older_picture() {
    let memory = Arc::new(Memory::new());
    let (mut busy, outside) = (View::new(&memory), View::new(&memory));
    assert!(!busy.enter());
    memory.set_slot(spec(0, 0, 0x1000, SlotFlags::default())).unwrap();
    let generation = memory.generation();
    memory.wait_until_seen(generation - 1);
    for way_out in ["refresh", "leave", "drop"] {
        let (said, heard) = mpsc::channel();
        std::thread::scope(|scope| {
            let memory = memory.clone();
            scope.spawn(move || {
                memory.wait_until_seen(memory.generation());
                said.send(()).unwrap();
            });
            assert!(heard.recv_timeout(Duration::from_millis(50)).is_err(), "still inside: {way_out}");
            match way_out {
                "refresh" => assert!(busy.refresh()),
                "leave" => busy.leave(),
                _ => busy = View::new(&busy.memory().clone()),
            }
            heard.recv_timeout(Duration::from_secs(10)).expect(way_out);
        });
        if way_out == "refresh" {
            // Seen: another wait for the same generation does not block.
            memory.wait_until_seen(generation);
        }
        busy.leave();
        let _ = busy.enter();
        memory.set_slot(spec(1, 0x10_0000, 0x1000, SlotFlags::default())).unwrap();
        memory.delete_slot(1).unwrap();
    }
    drop(outside);
}

/// vCPUs run on cached pages while RAM comes and goes. After `wait_until_seen` the old RAM is nobody's: a store into it
/// would be found.
#[test]
fn nobody_uses_old_ram_after_the_wait() {
    let memory = Arc::new(Memory::new());
    memory.set_slot(spec(0, 0, 0x1000, SlotFlags::default())).unwrap();
    let (done, stores) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let mut view = View::new(&memory);
                while !done.load(Ordering::Relaxed) {
                    let _ = view.enter();
                    for _ in 0..50 {
                        // The picture stands still between two refreshes, as a TLB entry would.
                        if view.write(GuestPhysAddr(0x10), &1_u64.to_le_bytes()).is_ok() {
                            stores.fetch_add(1, Ordering::Relaxed);
                        }
                        std::hint::spin_loop();
                    }
                    let _ = view.refresh();
                    view.leave();
                }
            });
        }
        let _stop = Stop(&done);
        for round in 0..300 {
            let old: Arc<Mapping> = memory.slots().by_id(0).unwrap().backing().mapping().clone();
            memory.delete_slot(0).unwrap();
            memory.wait_until_seen(memory.generation());
            old.store_u64(0x10, 0).unwrap();
            memory.set_slot(spec(0, 0, 0x1000, SlotFlags::default())).unwrap();
            std::thread::yield_now();
            assert_eq!(old.load_u64(0x10), Some(0), "a store after the wait, round {round}");
            // Old views may keep it alive until they refresh, the memory itself does not.
            memory.wait_until_seen(memory.generation());
        }
    });
    assert!(stores.load(Ordering::Relaxed) > 0, "the vCPUs ran");
}
