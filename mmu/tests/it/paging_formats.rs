//! Formats of entries: which bits are reserved and how addresses come out, bit by bit. The oracle is the tables of SDM
//! Vol. 3, chapter "Paging", "Format of a … Entry …", typed in as bit ranges.

use mmu::{Access, AccessKind, Mode, Paging, load_pdptes, translate_only};
use x86_defs::{Cr0, Cr4, Efer, GuestPhysAddr, LinearAddr, pte};

use crate::common::{self, numbers};

const READ: Access = Access { kind: AccessKind::Read, user: false, implicit: false };

fn paging(mode: Mode, phys_bits: u8, nxe: bool, page_1gb: bool) -> Paging {
    let mut cr4 = Cr4::PSE;
    cr4.set(Cr4::PAE, mode != Mode::Bits32);
    cr4.set(Cr4::LA57, mode == Mode::FiveLevel);
    let long = matches!(mode, Mode::FourLevel | Mode::FiveLevel);
    let mut efer = if long { Efer::LME | Efer::LMA } else { Efer::empty() };
    efer.set(Efer::NXE, nxe);
    Paging {
        cr0: Cr0::PE | Cr0::PG,
        cr3: 0x1000,
        cr4,
        efer,
        pdpte: [0x1000 | pte::P; 4],
        rflags_ac: false,
        phys_bits,
        page_1gb,
        pkru: 0,
    }
}

/// Bits that the SDM's table of the format calls reserved, for MAXPHYADDR = `m`. PS says whether the entry has bit 7 set.
fn reserved(mode: Mode, level: u32, ps: bool, m: u8, nxe: bool, page_1gb: bool) -> Vec<std::ops::RangeInclusive<u8>> {
    let mut ranges = Vec::new();
    match (mode, level, ps) {
        // Bits 20:13 are address bits 39:32 up to M, "(M–19)" on are reserved, as is bit 21.
        (Mode::Bits32, 2, true) => ranges.push(m.min(40) - 19..=21),
        (Mode::Bits32, ..) => {}
        (Mode::Pae, 2, true) => ranges.extend([13..=20, m..=62]),
        (Mode::Pae, ..) => ranges.push(m..=62),
        (_, 4 | 5, _) => ranges.extend([7..=7, m..=51]),
        (_, 3, true) if page_1gb => ranges.extend([13..=29, m..=51]),
        // Without 1-GByte pages PS itself is reserved in a PDPTE.
        (_, 3, true) => ranges.extend([7..=7, m..=51]),
        (_, 2, true) => ranges.extend([13..=20, m..=51]),
        _ => ranges.push(m..=51),
    }
    if mode != Mode::Bits32 && !nxe {
        ranges.push(63..=63);
    }
    ranges
}

#[test]
fn every_bit_of_every_format_is_reserved_where_the_sdm_says_so() {
    let (_memory, view) = common::ram(0x10000);
    let modes = [(Mode::Bits32, 2), (Mode::Pae, 2), (Mode::FourLevel, 4), (Mode::FiveLevel, 5)];
    for ((mode, levels), m) in modes.into_iter().flat_map(|mode| [36, 40, 46, 52].map(|m| (mode, m))) {
        for (nxe, page_1gb) in [(false, false), (false, true), (true, false), (true, true)] {
            let paging = paging(mode, m, nxe, page_1gb);
            for level in 1..=levels {
                for ps in [false, true] {
                    // Bits of the entry under test may make any of these pages its next table.
                    (0..16).for_each(|page| view.write(GuestPhysAddr::from_page(page), &[0; 8]).unwrap());
                    for upper in level + 1..=levels {
                        let table = 0x1000 * u64::from(levels - upper + 1);
                        view.write(GuestPhysAddr(table), &((table + 0x1000) | pte::P).to_le_bytes()).unwrap();
                    }
                    let at = GuestPhysAddr(0x1000 * u64::from(levels - level + 1));
                    let ranges = reserved(mode, level, ps, m, nxe, page_1gb);
                    for bit in 1..if mode == Mode::Bits32 { 32 } else { 64 } {
                        let entry = pte::P | 1 << bit | if ps { pte::PS } else { 0 };
                        if entry & pte::PS != 0 && !ps {
                            continue;
                        }
                        view.write(at, &entry.to_le_bytes()).unwrap();
                        let is = match translate_only(&view, &paging, LinearAddr(0), READ) {
                            Err(fault) => fault.error_code.bits() & 8 != 0,
                            Ok(_) => false,
                        };
                        let forbidden = ranges.iter().any(|range| range.contains(&bit) || ps && range.contains(&7));
                        assert_eq!(is, forbidden, "{mode:?} level {level} PS {ps} M {m} {nxe} {page_1gb} bit {bit}");
                    }
                }
            }
        }
    }
}

#[test]
fn addresses_of_all_page_sizes() {
    let (_memory, view) = common::ram(0x10_0000);
    let mut random = numbers();
    let mut next = || random.next().unwrap();
    for (mode, levels, leaf, page_bits) in [
        (Mode::Pae, 2, 1, 12),
        (Mode::Pae, 2, 2, 21),
        (Mode::FourLevel, 4, 1, 12),
        (Mode::FourLevel, 4, 2, 21),
        (Mode::FourLevel, 4, 3, 30),
        (Mode::FiveLevel, 5, 1, 12),
        (Mode::FiveLevel, 5, 3, 30),
    ] {
        for _ in 0..2000 {
            let mut paging = paging(mode, 46, true, true);
            let la = if mode == Mode::Pae { next() & 0xffff_ffff } else { next() };
            let table = |_| (next() % 0xf0 + 1) << 12;
            let tables: Vec<u64> = (0..levels).map(table).collect();
            if (1..tables.len()).any(|i| tables[..i].contains(&tables[i])) {
                continue;
            }
            if mode == Mode::Pae {
                paging.pdpte = [0; 4];
                paging.pdpte[(la >> 30) as usize] = tables[0] | pte::P;
            } else {
                // The low 12 bits of CR3 hold PCID or PCD and PWT, never an address.
                paging.cr3 = tables[0] | 0xfff;
            }
            let frame = next() & ((1 << 46) - 1) & !((1 << page_bits) - 1);
            for level in leaf..=levels {
                let index = la >> (12 + 9 * (level - 1)) & 511;
                let at = tables[(levels - level) as usize] + index * 8;
                let large = if level == leaf && level > 1 { pte::PS | pte::PAT_LARGE } else { 0 };
                let entry = if level == leaf { frame | large } else { tables[(levels - level + 1) as usize] };
                view.write(GuestPhysAddr(at), &(entry | pte::P | pte::PWT | pte::PCD).to_le_bytes()).unwrap();
            }
            let t = translate_only(&view, &paging, LinearAddr(la), READ).expect("mapped");
            assert_eq!(t.gpa.0, frame | la & ((1 << page_bits) - 1), "{mode:?} {leaf} {la:#x}");
            assert_eq!(t.page_bytes, 1 << page_bits);
        }
    }
}

#[test]
fn addresses_of_32_bit_paging() {
    let (_memory, view) = common::ram(0x10_0000);
    for (la, n) in numbers().take(4000).zip(numbers().skip(7)) {
        let la = la & 0xffff_ffff;
        let mut paging = paging(Mode::Bits32, 40, false, false);
        paging.cr3 = 0x5000 | n & 0xfff;
        let pde = GuestPhysAddr(0x5000 + (la >> 22) * 4);
        let pte_at = GuestPhysAddr(0x6000 + (la >> 12 & 0x3ff) * 4);
        view.write(pde, &0x6001_u32.to_le_bytes()).unwrap();
        view.write(pte_at, &(n as u32 | 1).to_le_bytes()).unwrap();
        let t = translate_only(&view, &paging, LinearAddr(la), READ).expect("mapped");
        assert_eq!((t.gpa.0, t.page_bytes), (n & 0xffff_f000 | la & 0xfff, 4096));
        // A 4-MByte page: bits 31:22 of the entry, then bits 20:13 as address bits 39:32.
        let large = n as u32 & !0x0020_0000 | 0x81;
        view.write(pde, &large.to_le_bytes()).unwrap();
        let t = translate_only(&view, &paging, LinearAddr(la), READ).expect("mapped");
        let high = u64::from(large >> 13 & 0xff) << 32;
        assert_eq!((t.gpa.0, t.page_bytes), (high | n & 0xffc0_0000 | la & 0x3f_ffff, 4 << 20));
        // Without CR4.PSE the same entry names a page table.
        paging.cr4.remove(Cr4::PSE);
        view.write(pde, &(0x6081_u32).to_le_bytes()).unwrap();
        let t = translate_only(&view, &paging, LinearAddr(la), READ).expect("mapped");
        assert_eq!((t.gpa.0, t.page_bytes), (n & 0xffff_f000 | la & 0xfff, 4096));
    }
}

#[test]
fn without_paging_addresses_are_physical() {
    let (_memory, view) = common::ram(0x1000);
    let mut paging = paging(Mode::Bits32, 40, false, false);
    paging.cr0 = Cr0::PE;
    let access = Access { kind: AccessKind::Write, user: true, implicit: false };
    let t = translate_only(&view, &paging, LinearAddr(0xfee0_0123), access).expect("always");
    assert_eq!((t.gpa.0, t.writable, t.user, t.executable), (0xfee0_0123, true, true, true));
}

#[test]
fn tables_outside_of_ram_are_not_present() {
    let (_memory, view) = common::ram(0x4000);
    for (mode, levels) in [(Mode::Bits32, 2), (Mode::Pae, 2), (Mode::FourLevel, 4), (Mode::FiveLevel, 5)] {
        for outside in 1..=levels.min(3) {
            for level in 1..outside {
                let next = if level + 1 == outside { 0x10_0000 } else { 0x1000 * (level + 1) };
                view.write(GuestPhysAddr(0x1000 * level), &(next | pte::P).to_le_bytes()).unwrap();
            }
            let mut paging = paging(mode, 40, true, true);
            if outside == 1 {
                paging.cr3 = 0x10_0000;
                paging.pdpte = [0x10_0001; 4];
            }
            let fault = translate_only(&view, &paging, LinearAddr(0), READ).expect_err("nothing there");
            assert_eq!(fault.error_code.bits(), 0, "{mode:?} {outside}");
        }
    }
}

#[test]
fn a_clear_pdpte_is_not_present() {
    let (_memory, view) = common::ram(0x4000);
    let mut paging = paging(Mode::Pae, 40, true, false);
    paging.pdpte[2] = 0;
    let access = Access { kind: AccessKind::Write, user: true, implicit: false };
    let fault = translate_only(&view, &paging, LinearAddr(2 << 30), access).expect_err("not present");
    assert_eq!(fault.error_code.bits(), 6);
}

/// "PDPTE Registers": bits 2:1, 8:5 and 63:MAXPHYADDR of a present PDPTE raise #GP(0) in the instruction that loads it.
#[test]
fn pdptes_are_loaded_and_checked() {
    let (_memory, view) = common::ram(0x4000);
    for m in [36_u8, 40, 52] {
        for bit in 1..64_u8 {
            let entry = 1_u64 << bit;
            view.write(GuestPhysAddr(0x1020 + 16), &(entry | 1).to_le_bytes()).unwrap();
            let expected = !matches!(bit, 1..=2 | 5..=8) && bit < m;
            let loaded = load_pdptes(&view, 0x1020, m);
            assert_eq!(loaded, expected.then_some([0, 0, entry | 1, 0]), "{m} {bit}");
            view.write(GuestPhysAddr(0x1020 + 16), &entry.to_le_bytes()).unwrap();
            assert_eq!(load_pdptes(&view, 0x1020, m), Some([0, 0, entry, 0]), "not present: not checked");
        }
    }
    assert_eq!(load_pdptes(&view, 0x10_0000, 40), None);
}
