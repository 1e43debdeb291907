//! Accessed and dirty flags, and global pages. SDM Vol. 3, chapter "Paging", "Accessed and Dirty Flags" and "Global Pages".

use std::sync::atomic::{AtomicBool, Ordering};

use mmu::{Access, AccessKind, Memory, Paging, SlotFlags, View, translate_only, walk};
use x86_defs::{Cr0, Cr4, Efer, GuestPhysAddr, LinearAddr, pte};

use crate::common;

fn access(kind: AccessKind) -> Access {
    Access { kind, user: false, implicit: false }
}

fn long_mode() -> Paging {
    Paging {
        cr0: Cr0::PE | Cr0::PG | Cr0::WP,
        cr3: 0x1000,
        cr4: Cr4::PAE | Cr4::PGE,
        efer: Efer::LMA | Efer::NXE,
        pdpte: [0; 4],
        rflags_ac: false,
        phys_bits: 40,
        page_1gb: true,
        pkru: 0,
    }
}

fn bits32() -> Paging {
    Paging { cr4: Cr4::PSE | Cr4::PGE, efer: Efer::empty(), ..long_mode() }
}

fn load(view: &View, at: u64) -> u64 {
    view.load_u64(GuestPhysAddr(at)).unwrap()
}

fn store(view: &View, at: u64, entry: u64) {
    view.write(GuestPhysAddr(at), &entry.to_le_bytes()).unwrap();
}

/// Every combination of A on both levels, D, R/W and the access: A on all the path, D on the leaf of a write, and no
/// flag at all when the access faults.
#[test]
fn flags_are_set_by_accesses_that_succeed() {
    let (_memory, view) = common::ram(0x10000);
    for bits in 0..128_u64 {
        let bit = |n: u64, flag: u64| if bits >> n & 1 != 0 { flag } else { 0 };
        let upper = 0x2000 | pte::P | pte::RW | bit(0, pte::A);
        let leaf = 0x9000 | pte::P | bit(1, pte::A) | bit(2, pte::D) | bit(3, pte::RW) | bit(4, pte::G);
        for (paging, large) in [(long_mode(), false), (bits32(), false), (bits32(), true)] {
            for kind in [AccessKind::Read, AccessKind::Write, AccessKind::Fetch] {
                let wide = paging.efer.contains(Efer::LMA);
                let leaf = if large { leaf & !0x003f_f000 | pte::PS } else { leaf };
                let (levels, leaf_at) = match (wide, large) {
                    (true, _) => (4, 0x4000),
                    (false, false) => (2, 0x2000),
                    (false, true) => (1, 0x1000),
                };
                for level in 1..levels {
                    store(&view, 0x1000 * level, upper - 0x2000 + 0x1000 * (level + 1));
                }
                store(&view, leaf_at, leaf);
                let allowed = kind != AccessKind::Write || leaf & pte::RW != 0;
                assert!(translate_only(&view, &paging, LinearAddr(0x10), access(kind)).is_ok() == allowed);
                assert_eq!(load(&view, leaf_at), leaf, "a translation alone sets nothing");
                let answer = walk(&view, &paging, LinearAddr(0x10), access(kind));
                let (a, d) = match (allowed, kind) {
                    (false, _) => (0, 0),
                    (true, AccessKind::Write) => (pte::A, pte::D),
                    (true, _) => (pte::A, 0),
                };
                for level in 1..levels {
                    assert_eq!(load(&view, 0x1000 * level), (upper - 0x2000 + 0x1000 * (level + 1)) | a);
                }
                assert_eq!(load(&view, leaf_at), leaf | a | d, "{kind:?} {bits:#x}");
                if let Ok(t) = answer {
                    assert_eq!(t.writable, (leaf | d) & pte::D != 0 && leaf & pte::RW != 0);
                    assert_eq!(t.global, leaf & pte::G != 0);
                    let local = Paging { cr4: paging.cr4 - Cr4::PGE, ..paging };
                    assert!(!walk(&view, &local, LinearAddr(0x10), access(kind)).unwrap().global);
                } else {
                    assert!(!allowed);
                }
            }
        }
    }
}

/// The guest's other processors, and devices, change entries while a walk sets flags in them: nothing is lost.
#[test]
fn flags_are_set_atomically() {
    let (memory, view) = common::ram(0x10000);
    for level in 1..4 {
        store(&view, 0x1000 * level, (0x1000 * (level + 1)) | pte::P | pte::RW | pte::A);
    }
    let slots = memory.slots();
    let mapping = slots.by_id(0).unwrap().backing().mapping();
    let entry = mapping.atomic_u64(0x4000).unwrap();
    let (done, flips) = (AtomicBool::new(false), AtomicBool::new(false));
    const AVL: u64 = 1 << 9;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Bits 11:9 are the guest's: count in bit 9 of an entry that the other side keeps changing.
            let mut expected = 0;
            while !done.load(Ordering::Relaxed) {
                let old = entry.fetch_xor(AVL, Ordering::SeqCst);
                assert_eq!(old & AVL, expected, "a flip was lost");
                expected ^= AVL;
                flips.store(true, Ordering::Relaxed);
            }
        });
        let _stop = common::Stop(&done);
        for round in 0..20_000_u64 {
            // A new page each time, which must not inherit flags of the last one.
            let frame = 0x5000 + (round & 7) * 0x1000;
            let old = entry.load(Ordering::SeqCst);
            let new = |old| frame | pte::P | pte::RW | old & AVL;
            let mut at = old;
            while let Err(now) = entry.compare_exchange(at, new(at), Ordering::SeqCst, Ordering::SeqCst) {
                at = now;
            }
            let t = walk(&view, &long_mode(), LinearAddr(0x10), access(AccessKind::Write)).unwrap();
            assert_eq!(t.gpa.0, frame | 0x10);
            assert!(t.writable);
            assert_eq!(entry.load(Ordering::SeqCst) & !AVL, frame | pte::P | pte::RW | pte::A | pte::D);
        }
        while !flips.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
    });
}

/// KVM leaves A and D alone in tables in a read-only slot, and the access succeeds.
#[test]
fn tables_in_rom_work_without_flags() {
    let memory = std::sync::Arc::new(Memory::new());
    let rom = common::spec(0, 0, 0x10000, SlotFlags { readonly: true, log_dirty: false });
    for level in 1..5_u64 {
        let entry = (0x1000 * (level + 1)) | pte::P | pte::RW;
        rom.backing.mapping().store_u64(0x1000 * level, entry).unwrap();
    }
    memory.set_slot(rom).unwrap();
    let view = View::new(&memory);
    let t = walk(&view, &long_mode(), LinearAddr(0x10), access(AccessKind::Write)).unwrap();
    assert_eq!((t.gpa.0, t.writable), (0x5010, false));
    assert_eq!(load(&view, 0x4000), 0x5000 | pte::P | pte::RW);
}

/// The walker's own stores are guest stores for the dirty log.
#[test]
fn flags_are_logged() {
    let memory = std::sync::Arc::new(Memory::new());
    memory.set_slot(common::spec(0, 0, 0x10000, SlotFlags { log_dirty: true, readonly: false })).unwrap();
    let view = View::new(&memory);
    for level in 1..5 {
        store(&view, 0x1000 * level, (0x1000 * (level + 1)) | pte::P | pte::RW | pte::A);
    }
    assert_eq!(memory.take_dirty(0).unwrap(), [0b11110]);
    walk(&view, &long_mode(), LinearAddr(0), access(AccessKind::Read)).unwrap();
    assert_eq!(memory.take_dirty(0).unwrap(), [0], "A was set already");
    walk(&view, &long_mode(), LinearAddr(0), access(AccessKind::Write)).unwrap();
    assert_eq!(memory.take_dirty(0).unwrap(), [0b10000], "D was set in the page table");
}
