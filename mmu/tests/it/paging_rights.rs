//! Access rights and page-fault error codes: the cross product of entry bits, control bits and access kinds. The oracle is
//! written from the lists in SDM Vol. 3, chapter "Paging", "Determination of Access Rights" and "Page-Fault Exceptions",
//! in their wording; it knows nothing of the walker.

use crate::common;
use mmu::{Access, AccessKind, Mode, Paging, Structures, View, translate_only, walk, walk_cached};
use x86_defs::{Cr0, Cr4, Efer, GuestPhysAddr, LinearAddr, PfError, pte};

/// The machine state that the SDM's rules speak of.
#[derive(Clone, Copy, Debug)]
struct Control {
    mode: Mode,
    wp: bool,
    smep: bool,
    smap: bool,
    nxe: bool,
    ac: bool,
}

/// One entry, as the bits that the rules speak of.
#[derive(Clone, Copy, Debug)]
struct Entry {
    p: bool,
    rw: bool,
    us: bool,
    xd: bool,
    reserved: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    /// CPL < 3.
    Supervisor,
    /// CPL = 3.
    User,
    /// Implicit supervisor-mode access, CPL < 3.
    Implicit,
    /// Implicit supervisor-mode access, CPL = 3.
    ImplicitFromUser,
}

const WHO: [Who; 4] = [Who::Supervisor, Who::User, Who::Implicit, Who::ImplicitFromUser];
const KINDS: [AccessKind; 3] = [AccessKind::Read, AccessKind::Write, AccessKind::Fetch];

/// "Determination of Access Rights": whether the access is allowed, given that a translation exists.
fn sdm_allows(control: Control, entries: &[Entry], who: Who, kind: AccessKind) -> bool {
    // "If the U/S flag is 0 in at least one of the paging-structure entries, the address is a supervisor-mode address."
    let supervisor_mode_address = entries.iter().any(|entry| !entry.us);
    let rw_in_every = entries.iter().all(|entry| entry.rw);
    let xd_in_some = entries.iter().any(|entry| entry.xd);
    let xd_counts = control.mode != Mode::Bits32 && control.nxe;
    if who == Who::User {
        return match kind {
            AccessKind::Read => !supervisor_mode_address,
            AccessKind::Write => !supervisor_mode_address && rw_in_every,
            AccessKind::Fetch => !supervisor_mode_address && (!xd_counts || !xd_in_some),
        };
    }
    // Data accesses of the supervisor to user-mode addresses need CR4.SMAP = 0, or AC = 1 and the access not implicit.
    let explicit = who == Who::Supervisor;
    let user_data_reachable = !control.smap || control.ac && explicit;
    match (kind, supervisor_mode_address) {
        (AccessKind::Read, true) => true,
        (AccessKind::Read, false) => user_data_reachable,
        (AccessKind::Write, true) => !control.wp || rw_in_every,
        (AccessKind::Write, false) if !control.wp => user_data_reachable,
        (AccessKind::Write, false) => rw_in_every && user_data_reachable,
        (AccessKind::Fetch, true) => !xd_counts || !xd_in_some,
        (AccessKind::Fetch, false) => !control.smep && (!xd_counts || !xd_in_some),
    }
}

/// "Page-Fault Exceptions": the error code, or `None` for an access that succeeds. `entries` from the root down.
fn sdm_error_code(control: Control, entries: &[Entry], who: Who, kind: AccessKind) -> Option<u32> {
    // The walk ends at the first entry that is not present or has a reserved bit set. XD is reserved while NXE = 0.
    let stop = entries.iter().find(|entry| !entry.p || entry.reserved || entry.xd && !control.nxe);
    let (present, reserved) = match stop {
        Some(entry) => (entry.p, entry.p),
        None if sdm_allows(control, entries, who, kind) => return None,
        None => (true, false),
    };
    let mut code = 0;
    // P flag (bit 0): 0 if there is no translation because the P flag was 0 in an entry.
    code |= u32::from(present);
    // W/R (bit 1): 1 if the access causing the page-fault exception was a write.
    code |= u32::from(kind == AccessKind::Write) << 1;
    // U/S (bit 2): 1 if a user-mode access; implicit accesses are supervisor-mode whatever the CPL.
    code |= u32::from(who == Who::User) << 2;
    // RSVD flag (bit 3): 1 if there is no translation because a reserved bit was set.
    code |= u32::from(reserved) << 3;
    // I/D flag (bit 4): for a fetch, 1 if CR4.SMEP = 1, or CR4.PAE = 1 and IA32_EFER.NXE = 1.
    let pae = control.mode != Mode::Bits32;
    code |= u32::from(kind == AccessKind::Fetch && (control.smep || pae && control.nxe)) << 4;
    Some(code)
}

fn paging(control: Control) -> Paging {
    let mut cr0 = Cr0::PE | Cr0::PG;
    cr0.set(Cr0::WP, control.wp);
    let mut cr4 = Cr4::PSE;
    cr4.set(Cr4::PAE, control.mode != Mode::Bits32);
    cr4.set(Cr4::LA57, control.mode == Mode::FiveLevel);
    cr4.set(Cr4::SMEP, control.smep);
    cr4.set(Cr4::SMAP, control.smap);
    let long = matches!(control.mode, Mode::FourLevel | Mode::FiveLevel);
    let mut efer = if long { Efer::LME | Efer::LMA } else { Efer::empty() };
    efer.set(Efer::NXE, control.nxe);
    Paging {
        cr0,
        cr3: 0x1000,
        cr4,
        efer,
        pdpte: [0x1000 | pte::P; 4],
        rflags_ac: control.ac,
        phys_bits: 40,
        page_1gb: true,
        pkru: 0,
    }
}

/// A mode and the level of the entry that maps the page; tables are at 0x1000, 0x2000, … from the root down.
#[derive(Clone, Copy, Debug)]
struct Shape {
    mode: Mode,
    levels: u32,
    leaf: u32,
}

const SHAPES: &[Shape] = &[
    Shape { mode: Mode::Bits32, levels: 2, leaf: 1 },
    Shape { mode: Mode::Bits32, levels: 2, leaf: 2 },
    Shape { mode: Mode::Pae, levels: 2, leaf: 1 },
    Shape { mode: Mode::Pae, levels: 2, leaf: 2 },
    Shape { mode: Mode::FourLevel, levels: 4, leaf: 1 },
    Shape { mode: Mode::FourLevel, levels: 4, leaf: 2 },
    Shape { mode: Mode::FourLevel, levels: 4, leaf: 3 },
    Shape { mode: Mode::FiveLevel, levels: 5, leaf: 1 },
    Shape { mode: Mode::FiveLevel, levels: 5, leaf: 3 },
];

/// The linear address of every case: index 1 in each table.
fn linear(shape: Shape) -> LinearAddr {
    match shape.mode {
        Mode::Bits32 => LinearAddr(1 << 22 | 1 << 12 | 0x123),
        Mode::Pae => LinearAddr(1 << 21 | 1 << 12 | 0x123),
        _ => LinearAddr(1 << 48 | 1 << 39 | 1 << 30 | 1 << 21 | 1 << 12 | 0x123),
    }
}

fn store(view: &View, shape: Shape, level: u32, entry: u64) {
    let table = 0x1000 * u64::from(shape.levels - level + 1);
    if shape.mode == Mode::Bits32 {
        view.write(GuestPhysAddr(table + 4), &(entry as u32).to_le_bytes()).unwrap();
    } else {
        view.write(GuestPhysAddr(table + 8), &entry.to_le_bytes()).unwrap();
    }
}

fn encode(shape: Shape, level: u32, entry: Entry) -> u64 {
    let mut bits = if level > shape.leaf { 0x1000 * u64::from(shape.levels - level + 2) } else { 0 };
    if level == shape.leaf && level > 1 {
        bits |= pte::PS;
    }
    for (set, bit) in [(entry.p, pte::P), (entry.rw, pte::RW), (entry.us, pte::US), (entry.xd, pte::NX)] {
        bits |= if set { bit } else { 0 };
    }
    if entry.reserved {
        // 32-bit: bit 21 of a 4-MByte page. Otherwise the highest address bit, beyond MAXPHYADDR = 40.
        bits |= if shape.mode == Mode::Bits32 { 1 << 21 } else { 1 << 51 };
    }
    bits
}

/// All five bits of an entry, where the format has them.
fn entries(shape: Shape, level: u32) -> impl Iterator<Item = Entry> {
    let bit = |number: u32, n: u32| number >> n & 1 != 0;
    (0..32)
        .map(move |n| Entry { p: bit(n, 0), rw: bit(n, 1), us: bit(n, 2), xd: bit(n, 3), reserved: bit(n, 4) })
        .filter(move |entry| {
            let bits32 = shape.mode == Mode::Bits32;
            !(bits32 && entry.xd) && !(bits32 && entry.reserved && !(level == 2 && shape.leaf == 2))
        })
}

const FREE: Entry = Entry { p: true, rw: true, us: true, xd: false, reserved: false };

fn check(view: &View, shape: Shape, path: &[Entry]) {
    for bits in 0..32_u32 {
        let bit = |n: u32| bits >> n & 1 != 0;
        let control = Control { mode: shape.mode, wp: bit(0), smep: bit(1), smap: bit(2), nxe: bit(3), ac: bit(4) };
        let paging = paging(control);
        for who in WHO {
            for kind in KINDS {
                let access = Access {
                    kind,
                    user: matches!(who, Who::User | Who::ImplicitFromUser),
                    implicit: matches!(who, Who::Implicit | Who::ImplicitFromUser),
                };
                let expected = sdm_error_code(control, path, who, kind);
                let answer = translate_only(view, &paging, linear(shape), access);
                let code = answer.err().map(|fault| fault.error_code.bits());
                assert_eq!(code, expected, "{shape:?} {control:?} {path:?} {who:?} {kind:?}");
                if let Ok(translation) = answer {
                    assert_eq!(translation.user, path.iter().all(|entry| entry.us));
                    assert_eq!(translation.executable, !path.iter().any(|entry| entry.xd));
                    assert!(!translation.writable, "D is clear");
                }
            }
        }
    }
}

/// The entry that maps the page against each of the entries above it, all bits of both.
#[test]
fn rights_and_error_codes_are_the_sdms() {
    let (_memory, view) = common::ram(0x10000);
    for &shape in SHAPES {
        for level in shape.leaf..=shape.levels {
            store(&view, shape, level, encode(shape, level, FREE));
        }
        let mut path = vec![FREE; (shape.levels - shape.leaf + 1) as usize];
        let last = path.len() - 1;
        for leaf in entries(shape, shape.leaf) {
            store(&view, shape, shape.leaf, encode(shape, shape.leaf, leaf));
            path[last] = leaf;
            if last == 0 {
                check(&view, shape, &path);
            }
            for level in shape.leaf + 1..=shape.levels {
                let index = (shape.levels - level) as usize;
                for upper in entries(shape, level) {
                    store(&view, shape, level, encode(shape, level, upper));
                    path[index] = upper;
                    check(&view, shape, &path);
                }
                store(&view, shape, level, encode(shape, level, FREE));
                path[index] = FREE;
            }
        }
    }
}

/// The rights of all levels together: every combination of R/W, U/S and XD in every entry of the path.
#[test]
fn rights_of_all_levels_together_are_the_sdms() {
    let (_memory, view) = common::ram(0x10000);
    for &shape in SHAPES {
        let levels: Vec<u32> = (shape.leaf..=shape.levels).rev().collect();
        let rights: Vec<Entry> = entries(shape, shape.leaf).filter(|entry| entry.p && !entry.reserved).collect();
        for number in 0..rights.len().pow(levels.len() as u32) {
            let digit = |place: usize| number / rights.len().pow(place as u32) % rights.len();
            let path: Vec<Entry> = (0..levels.len()).map(|place| rights[digit(place)]).collect();
            for (&level, &entry) in levels.iter().zip(&path) {
                store(&view, shape, level, encode(shape, level, entry));
            }
            check(&view, shape, &path);
        }
    }
}

/// The same answers when the upper levels are remembered: a page table with every kind of entry behind one region.
#[test]
fn rights_are_the_sdms_when_upper_levels_are_remembered() {
    let (_memory, view) = common::ram(0x10000);
    let shape = Shape { mode: Mode::FourLevel, levels: 4, leaf: 1 };
    let table = GuestPhysAddr(0x4000);
    let mut structures = Structures::new();
    for upper in entries(shape, 2).filter(|upper| upper.p && !upper.reserved) {
        for level in 2..=4 {
            let entry = encode(shape, level, if level == 3 { upper } else { FREE });
            store(&view, shape, level, entry | pte::A);
        }
        let leaves: Vec<Entry> = entries(shape, 1).collect();
        for (index, leaf) in leaves.iter().enumerate() {
            let entry = encode(shape, 1, *leaf) | pte::A | pte::D;
            view.write(table.wrapping_add(8 * index as u64), &entry.to_le_bytes()).unwrap();
        }
        for bits in 0..32_u32 {
            let bit = |n: u32| bits >> n & 1 != 0;
            let control = Control { mode: shape.mode, wp: bit(0), smep: bit(1), smap: bit(2), nxe: bit(3), ac: bit(4) };
            let paging = paging(control);
            structures.flush();
            for (index, leaf) in leaves.iter().enumerate() {
                let la = LinearAddr(linear(shape).0 & !0x1f_f000 | (index as u64) << 12);
                let path = [FREE, upper, FREE, *leaf];
                for (user, kind) in [false, true].into_iter().flat_map(|user| KINDS.map(|kind| (user, kind))) {
                    let access = Access { kind, user, implicit: false };
                    let answer = walk_cached(&view, &paging, la, access, &mut structures);
                    let who = if user { Who::User } else { Who::Supervisor };
                    let code = answer.err().map(|fault| fault.error_code.bits());
                    assert_eq!(
                        code,
                        sdm_error_code(control, &path, who, kind),
                        "{control:?} {path:?} {who:?} {kind:?}"
                    );
                }
            }
        }
    }
}

/// `writable` promises what a write with the same privilege would find.
#[test]
fn writable_is_what_a_write_would_find() {
    let (_memory, view) = common::ram(0x10000);
    for &shape in SHAPES {
        for level in shape.leaf..=shape.levels {
            store(&view, shape, level, encode(shape, level, FREE));
        }
        for leaf in entries(shape, shape.leaf).filter(|entry| entry.p && !entry.reserved && !entry.xd) {
            for bits in 0..64_u32 {
                let bit = |n: u32| bits >> n & 1 != 0;
                let dirty = bit(5);
                let entry = encode(shape, shape.leaf, leaf) | if dirty { pte::D } else { 0 };
                store(&view, shape, shape.leaf, entry);
                let control =
                    Control { mode: shape.mode, wp: bit(0), smep: bit(1), smap: bit(2), nxe: bit(3), ac: bit(4) };
                let paging = paging(control);
                for user in [false, true] {
                    let access = |kind| Access { kind, user, implicit: false };
                    let Ok(read) = translate_only(&view, &paging, linear(shape), access(AccessKind::Read)) else {
                        continue;
                    };
                    let write = translate_only(&view, &paging, linear(shape), access(AccessKind::Write));
                    assert_eq!(read.writable, write.is_ok() && dirty, "{shape:?} {control:?} {leaf:?} {user}");
                }
            }
        }
    }
}

/// "Protection Keys": data accesses to user-mode addresses, by the AD and WD bits of the page's key.
#[test]
fn protection_keys() {
    let (_memory, view) = common::ram(0x10000);
    let shape = Shape { mode: Mode::FourLevel, levels: 4, leaf: 1 };
    let key = 5;
    for level in 2..=4 {
        store(&view, shape, level, encode(shape, level, FREE));
    }
    for bits in 0..1024_u32 {
        let bit = |n: u32| bits >> n & 1 != 0;
        let (ad, wd, wp, us, pke, other) = (bit(0), bit(1), bit(2), bit(3), bit(4), bit(5));
        let leaf = Entry { us, rw: bit(6), ..FREE };
        store(&view, shape, 1, encode(shape, 1, leaf) | key << 59);
        let control = Control { mode: shape.mode, wp, smep: bit(7), smap: bit(8), nxe: true, ac: bit(9) };
        let mut paging = paging(control);
        paging.cr4.set(Cr4::PKE, pke);
        let this = u32::from(ad) | u32::from(wd) << 1;
        paging.pkru = if other { !(3 << (2 * key)) } else { 0 } | this << (2 * key);
        for user in [false, true] {
            let path = [FREE, FREE, FREE, leaf];
            let who = if user { Who::User } else { Who::Supervisor };
            for kind in KINDS {
                let denied = pke
                    && us
                    && match kind {
                        AccessKind::Read => ad,
                        AccessKind::Write => ad || wd && (user || wp),
                        AccessKind::Fetch => false,
                    };
                let mut expected = sdm_error_code(control, &path, who, kind);
                if denied {
                    let access_bits = u32::from(kind == AccessKind::Write) << 1 | u32::from(user) << 2;
                    expected = Some(expected.unwrap_or(1 | access_bits) | PfError::PK.bits());
                }
                let answer = walk(&view, &paging, linear(shape), Access { kind, user, implicit: false });
                let code = answer.err().map(|fault| fault.error_code.bits());
                assert_eq!(code, expected, "{bits:#x} {user} {kind:?}");
            }
        }
    }
}
