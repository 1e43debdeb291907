//! Page tables are a guest's bytes: whatever they hold, a walk ends, in RAM or with a fault, and says the same twice.

use mmu::{Access, AccessKind, Paging, Structures, View, translate_only, walk, walk_cached};
use x86_defs::{Cr0, Cr4, Efer, GuestPhysAddr, LinearAddr, PfError, pte};

use crate::common::{numbers, ram};

const RAM: u64 = 0x2_0000;

/// Mostly entries that lead somewhere, sometimes anything at all.
fn entry(random: u64) -> u64 {
    match random >> 60 {
        0 => random,
        1..4 => random & (RAM - 1) & !pte::PS | pte::P,
        4..8 => random & (RAM - 1) | pte::P | random & pte::NX,
        _ => random & (RAM - 1) & !0xf98 | pte::P | pte::RW | pte::US,
    }
}

#[test]
fn random_tables_and_controls() {
    let (_memory, view) = ram(RAM);
    let mut random = numbers();
    let mut next = || random.next().expect("endless");
    let (mut found, mut faults, mut reserved) = (0, 0, 0);
    for round in 0..150_000 {
        if round % 500 == 0 {
            for at in (0..RAM).step_by(8) {
                view.write(GuestPhysAddr(at), &entry(next()).to_le_bytes()).expect("RAM");
            }
        }
        let bits = next();
        let sane = bits & 7 != 0;
        let paging = Paging {
            cr0: Cr0::from_bits_retain(next()) | Cr0::PG,
            cr3: if sane { next() & (RAM - 1) } else { next() },
            cr4: Cr4::from_bits_retain(next()),
            efer: Efer::from_bits_retain(next()),
            pdpte: [entry(next()), entry(next()), next(), 0],
            rflags_ac: bits & 8 != 0,
            phys_bits: if sane { 40 } else { (bits >> 8) as u8 },
            page_1gb: bits & 16 != 0,
            pkru: next() as u32,
        };
        let kind = [AccessKind::Read, AccessKind::Write, AccessKind::Fetch][(bits >> 16) as usize % 3];
        let access = Access { kind, user: bits & 32 != 0, implicit: bits & 64 != 0 };
        let la = LinearAddr(next());
        let looked = translate_only(&view, &paging, la, access);
        let walked = walk(&view, &paging, la, access);
        match (looked, walked) {
            (Ok(looked), Ok(walked)) => {
                // The walk may have changed a table that is its own next table; then it says where it ended itself.
                found += 1;
                assert!(walked.page_bytes.is_power_of_two() && looked.page_bytes.is_power_of_two());
                assert_eq!(walked.gpa.offset(), la.offset());
                assert!(walked.gpa.0 < 1 << 52);
                let again = walk(&view, &paging, la, access);
                assert_eq!(again.map(|t| (t.gpa, t.user)), Ok((walked.gpa, walked.user)));
            }
            (Err(looked), Err(walked)) => {
                assert_eq!(looked, walked);
                faults += 1;
                reserved += u32::from(walked.error_code.contains(PfError::RSVD));
                let code = walked.error_code;
                assert_eq!(code.contains(PfError::WR), kind == AccessKind::Write);
                assert_eq!(code.contains(PfError::US), access.is_user_mode());
                assert!(!code.contains(PfError::RSVD) || code.contains(PfError::P));
            }
            (looked, walked) => panic!("{paging:?} {la:?} {access:?}: {looked:?}, then {walked:?}"),
        }
    }
    assert!(found > 5000 && faults > 5000 && reserved > 500, "{found} {faults} {reserved}");
}

fn bytes(view: &View) -> Vec<u8> {
    let mut all = vec![0; RAM as usize];
    view.read(GuestPhysAddr(0), &mut all).expect("RAM");
    all
}

/// Remembered upper levels change no answer and no flag, as long as flushes come where software must ask for them.
#[test]
fn remembered_structures_change_nothing() {
    let ((_a, plain), (_b, cached)) = (ram(RAM), ram(RAM));
    let mut structures = Structures::new();
    let mut random = numbers();
    let mut next = || random.next().expect("endless");
    let mut hits = 0;
    for _ in 0..40 {
        for at in (0..RAM).step_by(8) {
            let entry = entry(next()).to_le_bytes();
            [&plain, &cached].into_iter().for_each(|view| view.write(GuestPhysAddr(at), &entry).expect("RAM"));
        }
        for _ in 0..40 {
            structures.flush();
            let long = if next() & 3 == 0 { Efer::empty() } else { Efer::LMA };
            let pae = if next() & 7 == 0 { Cr4::empty() } else { Cr4::PAE };
            let mut paging = Paging {
                cr0: Cr0::from_bits_retain(next()) | Cr0::PG,
                cr3: next() & (RAM - 1),
                cr4: (Cr4::from_bits_retain(next()) - Cr4::PAE) | pae,
                efer: (Efer::from_bits_retain(next()) - Efer::LMA) | long,
                pdpte: [entry(next()), entry(next()), entry(next()), entry(next())],
                rflags_ac: false,
                phys_bits: 40,
                page_1gb: next() & 1 != 0,
                pkru: next() as u32,
            };
            let mask = if pae.is_empty() || long.is_empty() { 0xffff_ffff } else { u64::MAX };
            let base = next();
            for _ in 0..60 {
                let bits = next();
                let kind = [AccessKind::Read, AccessKind::Write, AccessKind::Fetch][(bits >> 16) as usize % 3];
                let access = Access { kind, user: bits & 32 != 0, implicit: bits & 64 != 0 };
                paging.rflags_ac = bits & 128 != 0;
                // A few pages of a few regions, so that regions come again.
                let la = LinearAddr((base ^ (bits & 0x60_3000)) & mask);
                let expected = walk(&plain, &paging, la, access);
                let mut answer = walk_cached(&cached, &paging, la, access, &mut structures);
                if let (Ok(answer), Ok(expected)) = (&mut answer, &expected) {
                    // D may have been set by other means since: then a write walks in full, and finds it.
                    assert!(!answer.writable || expected.writable);
                    answer.writable = expected.writable;
                }
                assert_eq!(answer, expected, "{la:?} {access:?} {paging:?}");
                hits += u32::from(expected.is_ok());
            }
        }
        assert!(bytes(&plain) == bytes(&cached), "the same flags were set");
    }
    assert!(hits > 5000, "{hits}");
}
