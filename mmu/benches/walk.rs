//! Cost of a page walk, by paging mode and footprint: what a miss of the software TLB pays. `cargo bench -p mmu`.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use mmu::{
    Access, AccessKind, Backing, Lookup, Mapping, Memory, Paging, SlotFlags, SlotSpec, Structures, View, walk,
    walk_cached,
};
use x86_defs::{Cr0, Cr4, Efer, GuestPhysAddr, LinearAddr, pte};

const RAM: u64 = 512 << 20;
const WALKS: u32 = 50_000;
const ROUNDS: usize = 21;

/// RAM as a PC has it: below 640 KiB, a ROM, from 1 MiB on.
fn pc() -> (Arc<Memory>, View) {
    let memory = Arc::new(Memory::new());
    let mapping = Mapping::create("bench", RAM).expect("a memfd");
    let rows = [(0, 0, 0xa_0000), (1, 0xc_0000, 0x4_0000), (2, 0x10_0000, RAM - 0x10_0000)];
    for (id, gpa, len) in rows {
        let readonly = id == 1;
        let spec = SlotSpec {
            id,
            gpa: GuestPhysAddr(gpa),
            len,
            flags: SlotFlags { log_dirty: false, readonly },
            userspace_addr: gpa,
            backing: Backing::new(mapping.clone(), gpa),
        };
        memory.set_slot(spec).expect("slots do not overlap");
    }
    let view = View::new(&memory);
    (memory, view)
}

fn store(view: &View, at: u64, entry: u64) {
    view.write(GuestPhysAddr(at), &entry.to_le_bytes()).expect("RAM");
}

const FLAGS: u64 = pte::P | pte::RW | pte::A | pte::D;

/// Maps linear 0 to 512 MiB to itself: page tables from 16 MiB, a page directory at 15 MiB, the upper levels before it.
fn identity(view: &View, large: bool) {
    store(view, 0xe0_0000, 0xe0_1000 | FLAGS);
    store(view, 0xe0_1000, 0xf0_0000 | FLAGS);
    for table in 0..RAM >> 21 {
        let entry = if large { table << 21 | pte::PS } else { (0x100_0000 + table * 0x1000) & !0xfff };
        store(view, 0xf0_0000 + table * 8, entry | FLAGS);
        for page in 0..512 {
            store(view, 0x100_0000 + table * 0x1000 + page * 8, table << 21 | page << 12 | FLAGS);
        }
    }
}

/// The same with 4-byte entries, a directory at 14 MiB.
fn identity_32(view: &View) {
    for table in 0..RAM >> 22 {
        let (at, entry) = (0xe0_0000 + table * 4, (0x100_0000 + table * 0x1000) | FLAGS);
        view.write(GuestPhysAddr(at), &(entry as u32).to_le_bytes()).expect("RAM");
        for page in 0..1024 {
            let at = 0x100_0000 + table * 0x1000 + page * 4;
            let entry = table << 22 | page << 12 | FLAGS;
            view.write(GuestPhysAddr(at), &(entry as u32).to_le_bytes()).expect("RAM");
        }
    }
}

fn paging(cr4: Cr4, efer: Efer) -> Paging {
    Paging {
        cr0: Cr0::PE | Cr0::PG | Cr0::WP,
        cr3: 0xe0_0000,
        cr4,
        efer,
        pdpte: [0xf0_0001, 0, 0, 0],
        rflags_ac: false,
        phys_bits: 40,
        page_1gb: true,
        pkru: 0,
    }
}

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    /// The walk alone.
    Plain,
    /// The walk and the slot of the page.
    Look,
    /// The walk with remembered upper levels.
    Cached,
}

/// Nanoseconds of a walk, best of all rounds, over `pages` pages, in an order that no prefetcher follows.
fn measure(name: &str, view: &View, paging: &Paging, pages: u64, kind: AccessKind, how: How) {
    let mut structures = Structures::new();
    let access = Access { kind, user: false, implicit: false };
    let mut times: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            let mut page = 0_u64;
            for _ in 0..WALKS {
                page = page.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x1234_5679) ^ page >> 29;
                let la = LinearAddr((((page >> 20) % pages) << 12) | 0x10);
                let (view, paging) = (black_box(view), black_box(paging));
                let found = match how {
                    How::Cached => walk_cached(view, paging, la, access, &mut structures),
                    How::Plain | How::Look => walk(view, paging, la, access),
                };
                let found = found.expect("mapped");
                if how == How::Look {
                    assert!(matches!(view.page(found.gpa, kind == AccessKind::Write), Lookup::Ram { .. }));
                }
                black_box(found);
            }
            start.elapsed().as_nanos() as f64 / f64::from(WALKS)
        })
        .collect();
    times.sort_by(f64::total_cmp);
    println!("{name:<52} {:>8.1} ns", times[0]);
}

fn main() {
    let (_memory, view) = pc();
    let long = paging(Cr4::PAE | Cr4::PGE | Cr4::SMEP | Cr4::SMAP, Efer::LMA | Efer::NXE);
    let pae = paging(Cr4::PAE, Efer::NXE);
    let bits32 = paging(Cr4::PSE, Efer::empty());
    let (few, all) = (64, RAM >> 12);

    identity(&view, false);
    measure("4-level, 4 KiB pages, 64 of them, read", &view, &long, few, AccessKind::Read, How::Plain);
    measure("4-level, 4 KiB pages, 64 of them, write", &view, &long, few, AccessKind::Write, How::Plain);
    measure("4-level, 4 KiB pages, 64, read and slot lookup", &view, &long, few, AccessKind::Read, How::Look);
    measure("4-level, 4 KiB pages, all over 512 MiB, read", &view, &long, all, AccessKind::Read, How::Plain);
    measure("4-level, 4 KiB pages, 64 of them, remembered", &view, &long, few, AccessKind::Read, How::Cached);
    measure("4-level, 4 KiB pages, all over, remembered", &view, &long, all, AccessKind::Read, How::Cached);
    measure("PAE, 4 KiB pages, 64 of them, read", &view, &pae, few, AccessKind::Read, How::Plain);
    identity(&view, true);
    measure("4-level, 2 MiB pages, all over 512 MiB, read", &view, &long, all, AccessKind::Read, How::Plain);
    measure("4-level, 2 MiB pages, all over, remembered", &view, &long, all, AccessKind::Read, How::Cached);
    identity_32(&view);
    measure("32-bit, 4 KiB pages, 64 of them, read", &view, &bits32, few, AccessKind::Read, How::Plain);
    measure("32-bit, 4 KiB pages, all over 512 MiB, read", &view, &bits32, all, AccessKind::Read, How::Plain);
}
