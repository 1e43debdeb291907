//! The TLB against full walks: after any legal sequence of changes to page tables and the invalidations that the SDM asks
//! software for, a hit is what a walk says, and a write hit is to a page whose D is set.

use mmu::tlb::Tlb;
use mmu::{Access, AccessKind, Lookup, Paging, View, translate_only, walk_cached};
use x86_defs::{Cr0, Cr4, Efer, GuestPhysAddr, LinearAddr, pte};

use crate::common::{numbers, ram};

const RAM: u64 = 8 << 20;
/// Two address spaces, each a PML4, PDPT, page directory and four page tables, from here on.
const TABLES: u64 = 0x10_0000;
const SPACE_BYTES: u64 = 0x10_000;

struct Space {
    root: u64,
}

impl Space {
    fn directory_entry(&self, la: u64) -> GuestPhysAddr {
        GuestPhysAddr(self.root + 0x2000 + (la >> 21 & 511) * 8)
    }

    fn table(&self, la: u64) -> u64 {
        self.root + 0x3000 + (la >> 21 & 3) * 0x1000
    }

    fn table_entry(&self, la: u64) -> GuestPhysAddr {
        GuestPhysAddr(self.table(la) + (la >> 12 & 511) * 8)
    }

    fn build(&self, view: &View) {
        let store = |at: u64, entry: u64| view.write(GuestPhysAddr(at), &entry.to_le_bytes()).expect("RAM");
        let open = pte::P | pte::RW | pte::US;
        store(self.root, (self.root + 0x1000) | open);
        store(self.root + 0x1000, (self.root + 0x2000) | open);
        for region in 0..4 {
            store(self.root + 0x2000 + region * 8, self.table(region << 21) | open);
        }
    }
}

fn rights(random: u64) -> u64 {
    let bit = |n: u64, flag: u64| if random >> n & 3 != 0 { flag } else { 0 };
    bit(0, pte::P) | bit(2, pte::RW) | bit(4, pte::US) | bit(6, pte::G) | if random >> 8 & 3 == 0 { pte::NX } else { 0 }
}

#[test]
fn hits_are_what_a_walk_says() {
    let (_memory, view) = ram(RAM);
    let spaces = [Space { root: TABLES }, Space { root: TABLES + SPACE_BYTES }];
    spaces.iter().for_each(|space| space.build(&view));
    let mut tlb = Box::new(Tlb::new());
    let mut paging = Paging {
        cr0: Cr0::PE | Cr0::PG | Cr0::WP,
        cr3: spaces[0].root,
        cr4: Cr4::PAE | Cr4::PGE,
        efer: Efer::LMA | Efer::NXE,
        pdpte: [0; 4],
        rflags_ac: false,
        phys_bits: 40,
        page_1gb: false,
        pkru: 0,
    };
    let (mut space, mut user) = (&spaces[0], false);
    let mut random = numbers();
    let mut next = || random.next().expect("endless");
    let (mut hits, mut misses, mut faults) = (0, 0, 0);
    for _ in 0..400_000 {
        let bits = next();
        // Four pages in each of four regions.
        let la = ((bits >> 8 & 3) << 21) | ((bits >> 10 & 3) << 12) | (bits >> 12 & 0xff8);
        match bits & 0xff {
            0 => {
                let entry = (next() & (RAM - 1) & 0x7f_f000) | rights(next());
                let tables = TABLES..TABLES + 2 * SPACE_BYTES;
                let entry = if tables.contains(&(entry & pte::ADDRESS)) { 0 } else { entry };
                let old = view.load_u64(space.table_entry(la)).expect("RAM");
                view.write(space.table_entry(la), &entry.to_le_bytes()).expect("RAM");
                if old & pte::P != 0 {
                    tlb.flush_page(la);
                }
            }
            1 => {
                // More rights, A and D as they are: no invalidation is needed.
                let old = view.load_u64(space.table_entry(la)).expect("RAM");
                view.write(space.table_entry(la), &((old | pte::RW | pte::US) & !pte::NX).to_le_bytes()).expect("RAM");
            }
            2 => {
                // A table, a 2-MByte page elsewhere in RAM, or nothing.
                let entry = match next() & 7 {
                    0 => 0,
                    1..4 => 0x40_0000 | pte::PS | rights(next()),
                    _ => space.table(la) | rights(next()),
                };
                let old = view.load_u64(space.directory_entry(la)).expect("RAM");
                view.write(space.directory_entry(la), &entry.to_le_bytes()).expect("RAM");
                // INVLPG for a large page is for all of it; otherwise for each page that may be in the TLB.
                let pages = if old & pte::PS != 0 { la..la + 1 } else { la & !0x1f_ffff..(la & !0x1f_ffff) + 0x4000 };
                pages.step_by(0x1000).for_each(|page| {
                    tlb.flush_page(page);
                });
            }
            3 => {
                let global = |la: u64| {
                    let entries = [space.table_entry(la), space.directory_entry(la)];
                    entries.iter().any(|&at| view.load_u64(at).expect("RAM") & pte::G != 0)
                };
                // The spaces agree on nothing, so software keeps none of its global pages.
                let pages = (0..4).flat_map(|region| (0..4).map(move |page| region << 21 | page << 12));
                let kept: Vec<u64> = pages.filter(|&la| global(la)).collect();
                space = &spaces[(next() & 1) as usize];
                paging.cr3 = space.root;
                tlb.flush_local();
                kept.into_iter().for_each(|la| {
                    tlb.flush_page(la);
                });
            }
            4..8 => {
                user = !user;
                tlb.set_context(user, false);
            }
            8 => {
                paging.cr0 ^= Cr0::WP;
                tlb.flush();
            }
            9 => {
                tlb.flush_page(la);
            }
            _ => {}
        }
        let kind = [AccessKind::Read, AccessKind::Write, AccessKind::Fetch][(bits >> 32) as usize % 3];
        let access = Access { kind, user, implicit: false };
        let truth = translate_only(&view, &paging, LinearAddr(la), access);
        let hit = match kind {
            AccessKind::Read => tlb.read(la, 8),
            AccessKind::Write => tlb.write(la, 8),
            AccessKind::Fetch => tlb.fetch(la),
        };
        let host = |gpa: GuestPhysAddr| match view.page(gpa, kind == AccessKind::Write) {
            Lookup::Ram { ptr, .. } => ptr.as_ptr().addr() as u64,
            other => panic!("{other:?}"),
        };
        if let Some(at) = hit {
            hits += 1;
            let truth = truth.unwrap_or_else(|fault| panic!("a hit where a walk faults: {la:#x} {access:?} {fault:?}"));
            let expected = if kind == AccessKind::Fetch { truth.gpa.0 } else { host(truth.gpa) + truth.gpa.offset() };
            assert_eq!(at, expected, "{la:#x} {access:?}");
            assert!(kind != AccessKind::Write || truth.writable, "D is clear");
            continue;
        }
        let walked = walk_cached(&view, &paging, LinearAddr(la), access, &mut tlb.structures);
        assert_eq!(walked.map(|t| t.gpa), truth.map(|t| t.gpa), "{la:#x} {access:?}");
        let Ok(found) = walked else {
            faults += 1;
            continue;
        };
        misses += 1;
        match kind {
            AccessKind::Read => tlb.fill_read(la, host(found.gpa), &found),
            AccessKind::Write if found.writable => tlb.fill_write(la, host(found.gpa), &found),
            AccessKind::Write => panic!("D was set just now"),
            AccessKind::Fetch => tlb.fill_fetch(la, &found),
        }
    }
    assert!(hits > 40_000 && misses > 10_000 && faults > 10_000, "{hits} {misses} {faults}");
}
