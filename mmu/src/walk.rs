//! Page walks: from linear to guest-physical addresses. SDM Vol. 3, chapter "Paging".
//!
//! On the TLB-miss path: no lock, no allocation, and the slot of the last table is tried first.

use x86_defs::{Cr0, Cr4, Efer, GuestPhysAddr, LinearAddr, PAGE_BYTES, PfError, pte};

use crate::entry::{self, Reserved};
use crate::rights::{Access, AccessKind, Rights, access_bits};
use crate::structures::{Step, Structures};
use crate::view::View;

/// Everything outside of memory that a translation depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paging {
    /// CR0: PG and WP count.
    pub cr0: Cr0,
    /// CR3.
    pub cr3: u64,
    /// CR4: PSE, PAE, PGE, LA57, SMEP, SMAP, PKE count.
    pub cr4: Cr4,
    /// IA32_EFER: LMA and NXE count.
    pub efer: Efer,
    /// The PDPTE registers of PAE paging.
    pub pdpte: [u64; 4],
    /// RFLAGS.AC.
    pub rflags_ac: bool,
    /// MAXPHYADDR, CPUID.80000008H:EAX\[7:0\], 32 to 52.
    pub phys_bits: u8,
    /// Whether 1-GByte pages exist, CPUID.80000001H:EDX\[26\].
    pub page_1gb: bool,
    /// PKRU.
    pub pkru: u32,
}

/// Paging mode. "Paging Modes and Control Bits".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// CR0.PG = 0.
    None,
    /// 32-bit paging.
    Bits32,
    /// PAE paging.
    Pae,
    /// 4-level paging.
    FourLevel,
    /// 5-level paging.
    FiveLevel,
}

impl Paging {
    /// The mode that the control bits select.
    #[inline(always)]
    pub fn mode(&self) -> Mode {
        if !self.cr0.contains(Cr0::PG) {
            Mode::None
        } else if !self.cr4.contains(Cr4::PAE) {
            Mode::Bits32
        } else if !self.efer.contains(Efer::LMA) {
            Mode::Pae
        } else if !self.cr4.contains(Cr4::LA57) {
            Mode::FourLevel
        } else {
            Mode::FiveLevel
        }
    }
}

/// Where a linear address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The guest-physical address of the linear address itself, not of its page.
    pub gpa: GuestPhysAddr,
    /// Size of the guest's page.
    pub page_bytes: u64,
    /// A write with the same privilege needs no walk: it is allowed, and D is set.
    pub writable: bool,
    /// A user-mode address: U/S is 1 all the way.
    pub user: bool,
    /// No entry forbids instruction fetches. SMEP is not considered.
    pub executable: bool,
    /// The translation is global: CR4.PGE = 1 and G is set.
    pub global: bool,
}

/// A translation that cannot be used: #PF with CR2 = the linear address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// The error code.
    pub error_code: PfError,
}

/// Translates one access from linear to guest-physical; sets A on the path and D on a written leaf, atomically.
/// `la`: canonical (else the caller raised #GP or #SS). `access`: read, write or fetch, as user or supervisor.
/// Err: #PF, error code as in SDM Vol. 3 "Page-Fault Exceptions", CR2 = `la`; no A or D bit has changed.
///
/// A table outside of RAM reads as not present, and A and D bits in read-only RAM stay as they are: as KVM does
/// (`walk_addr_generic` in arch/x86/kvm/mmu/paging_tmpl.h).
#[inline]
pub fn walk(view: &View, paging: &Paging, la: LinearAddr, access: Access) -> Result<Translation, PageFault> {
    full::<true>(view, paging, la, access, None)
}

/// As [`walk`], remembering upper levels in `structures`. The answer is that of `walk` if whoever changes paging
/// structures or control registers flushes as the SDM demands, and flushes when the view takes a newer picture.
#[inline]
pub fn walk_cached(
    view: &View,
    paging: &Paging,
    la: LinearAddr,
    access: Access,
    structures: &mut Structures,
) -> Result<Translation, PageFault> {
    match structures.find(la).and_then(|step| resume(view, paging, la, access, step)) {
        Some(translation) => Ok(translation),
        None => full::<true>(view, paging, la, access, Some(structures)),
    }
}

/// As [`walk`], but leaves A and D alone.
pub fn translate_only(view: &View, paging: &Paging, la: LinearAddr, access: Access) -> Result<Translation, PageFault> {
    full::<false>(view, paging, la, access, None)
}

fn full<const SET: bool>(
    view: &View,
    paging: &Paging,
    la: LinearAddr,
    access: Access,
    structures: Option<&mut Structures>,
) -> Result<Translation, PageFault> {
    let root = paging.cr3 & pte::ADDRESS;
    match paging.mode() {
        Mode::None => Ok(Translation {
            gpa: GuestPhysAddr(la.0),
            page_bytes: PAGE_BYTES,
            writable: true,
            user: true,
            executable: true,
            global: false,
        }),
        Mode::Bits32 => walk_32::<SET>(view, paging, la, access),
        Mode::Pae => {
            let la = LinearAddr(la.0 & 0xffff_ffff);
            let pdpte = paging.pdpte[(la.0 >> 30 & 3) as usize];
            if pdpte & pte::P == 0 {
                return Err(fault(paging, access, PfError::empty()));
            }
            walk_64::<SET, 2>(view, paging, la, access, pdpte & pte::ADDRESS, structures)
        }
        Mode::FourLevel => walk_64::<SET, 4>(view, paging, la, access, root, structures),
        Mode::FiveLevel => walk_64::<SET, 5>(view, paging, la, access, root, structures),
    }
}

/// Finishes a walk from what is remembered of its upper levels. `None` if that takes more than a look: no page, an access
/// that is not allowed, a flag to set.
#[inline]
fn resume(view: &View, paging: &Paging, la: LinearAddr, access: Access, step: Step) -> Option<Translation> {
    let leaf = if step.level == 1 {
        let leaf = view.load_u64(GuestPhysAddr(step.entry + (la.0 >> 12 & 0x1ff) * 8))?;
        if leaf & pte::P == 0 || Reserved::new(paging).violated(1, leaf) != 0 {
            return None;
        }
        leaf
    } else {
        step.entry
    };
    let rights = Rights::new(step.path & leaf, step.path | leaf, leaf);
    let dirty = leaf & pte::D != 0;
    if leaf & pte::A == 0 || access.kind == AccessKind::Write && !dirty {
        return None;
    }
    check(paging, access, rights).ok()?;
    Some(finish(paging, access, rights, leaf, dirty, la, step.level))
}

/// The four PDPTEs of PAE paging that CR3 points to, as MOV to CR0, CR3 or CR4 loads them. `None`: a reserved bit is set
/// in a present one, or there is no RAM; the instruction raises #GP(0). "PDPTE Registers".
pub fn load_pdptes(view: &View, cr3: u64, phys_bits: u8) -> Option<[u64; 4]> {
    let mut pdptes = [0; 4];
    for (index, pdpte) in pdptes.iter_mut().enumerate() {
        *pdpte = view.load_u64(GuestPhysAddr((cr3 & 0xffff_ffe0) + index as u64 * 8))?;
        if !entry::pdpte_is_valid(phys_bits, *pdpte) {
            return None;
        }
    }
    Some(pdptes)
}

/// One entry on the way: where it is and what was in it.
type Visit = (GuestPhysAddr, u64);

/// Tables of 512 entries of 8 bytes; `TOP` levels of them from `root` on.
fn walk_64<const SET: bool, const TOP: u32>(
    view: &View,
    paging: &Paging,
    la: LinearAddr,
    access: Access,
    root: u64,
    structures: Option<&mut Structures>,
) -> Result<Translation, PageFault> {
    let reserved = Reserved::new(paging);
    let mut tables = view.tables();
    loop {
        let mut visits: [Visit; 5] = [(GuestPhysAddr(0), 0); 5];
        let (mut table, mut all, mut any) = (root, u64::MAX, 0);
        let (mut all_above, mut any_above);
        let mut level = TOP;
        let leaf = loop {
            let index = la.0 >> (3 + 9 * level) & 0x1ff;
            let at = GuestPhysAddr(table + index * 8);
            let entry = tables.load_u64(at.0).unwrap_or(0);
            if entry & pte::P == 0 {
                return Err(fault(paging, access, PfError::empty()));
            }
            if reserved.violated(level, entry) != 0 {
                return Err(fault(paging, access, PfError::P | PfError::RSVD));
            }
            (all_above, any_above) = (all, any);
            all &= entry;
            any |= entry;
            visits[(TOP - level) as usize] = (at, entry);
            if entry::is_leaf(level, entry) {
                break entry;
            }
            table = entry & pte::ADDRESS;
            level -= 1;
        };
        let rights = Rights::new(all, any, leaf);
        check(paging, access, rights)?;
        let mut dirty = leaf & pte::D != 0;
        if SET && (all & pte::A == 0 || access.kind == AccessKind::Write && !dirty) {
            let visits = &visits[..=(TOP - level) as usize];
            match set_flags(visits, access, |at, old, new| view.compare_exchange_u64(at, old, new)) {
                Some(set) => dirty |= set,
                None => continue,
            }
        }
        if let Some(structures) = structures {
            structures.keep(
                la,
                match level {
                    1 => Step::new(table, 1, all_above, any_above),
                    _ => Step::new(leaf | if dirty { pte::D } else { 0 }, level, all, any),
                },
            );
        }
        return Ok(finish(paging, access, rights, leaf, dirty, la, level));
    }
}

/// A page directory and page tables of 1024 entries of 4 bytes.
fn walk_32<const SET: bool>(
    view: &View,
    paging: &Paging,
    la: LinearAddr,
    access: Access,
) -> Result<Translation, PageFault> {
    let la = la.0 & 0xffff_ffff;
    let mut tables = view.tables();
    let mut load = |at: GuestPhysAddr| match tables.load_u32(at.0) {
        Some(entry) if u64::from(entry) & pte::P != 0 => Ok(entry),
        _ => Err(fault(paging, access, PfError::empty())),
    };
    loop {
        let pde_at = GuestPhysAddr((paging.cr3 & pte::ADDRESS_32) + (la >> 22) * 4);
        let pde = load(pde_at)?;
        let mut visits: [Visit; 2] = [(pde_at, pde.into()); 2];
        let (used, leaf, base, page_bytes) = if entry::maps_4mb(paging.cr4, pde) {
            if entry::violated_4mb(paging.phys_bits, pde) != 0 {
                return Err(fault(paging, access, PfError::P | PfError::RSVD));
            }
            (1, u64::from(pde), entry::base_4mb(paging.phys_bits, pde), 4 << 20)
        } else {
            let pte_at = GuestPhysAddr((u64::from(pde) & pte::ADDRESS_32) + (la >> 12 & 0x3ff) * 4);
            let leaf = u64::from(load(pte_at)?);
            visits[1] = (pte_at, leaf);
            (2, leaf, leaf & pte::ADDRESS_32, PAGE_BYTES)
        };
        let all = u64::from(pde) & leaf;
        let rights = Rights::new(all, 0, 0);
        check(paging, access, rights)?;
        let mut dirty = leaf & pte::D != 0;
        if SET && (all & pte::A == 0 || access.kind == AccessKind::Write && !dirty) {
            let set = |at, old: u64, new: u64| view.compare_exchange_u32(at, old as u32, new as u32);
            match set_flags(&visits[..used], access, set) {
                Some(set) => dirty |= set,
                None => continue,
            }
        }
        let gpa = base | la & (page_bytes - 1);
        return Ok(translation(paging, access, rights, leaf, dirty, gpa, page_bytes));
    }
}

/// Err if the translation exists but `access` may not use it.
#[inline(always)]
fn check(paging: &Paging, access: Access, rights: Rights) -> Result<(), PageFault> {
    let forbidden = rights.key_forbids(paging, access);
    if !forbidden && rights.allow(paging, access) {
        return Ok(());
    }
    Err(fault(paging, access, if forbidden { PfError::P | PfError::PK } else { PfError::P }))
}

/// Sets A in `visits`, and D in the last of them for a write. `None` if an entry is no longer what the walk read: then it
/// must be made again. Otherwise whether D is now set by this.
#[cold]
fn set_flags(
    visits: &[Visit],
    access: Access,
    exchange: impl Fn(GuestPhysAddr, u64, u64) -> Option<bool>,
) -> Option<bool> {
    let mut dirty = false;
    for (index, &(at, old)) in visits.iter().enumerate() {
        let sets_d = index + 1 == visits.len() && access.kind == AccessKind::Write;
        let new = old | pte::A | if sets_d { pte::D } else { 0 };
        if new != old {
            match exchange(at, old, new) {
                Some(true) => dirty |= sets_d,
                Some(false) => return None,
                None => {}
            }
        }
    }
    Some(dirty)
}

/// The translation by a 64-bit entry of `level`.
#[inline(always)]
fn finish(
    paging: &Paging,
    access: Access,
    rights: Rights,
    leaf: u64,
    dirty: bool,
    la: LinearAddr,
    level: u32,
) -> Translation {
    let page_bytes = 1_u64 << (3 + 9 * level);
    let gpa = leaf & pte::ADDRESS & !(page_bytes - 1) | la.0 & (page_bytes - 1);
    translation(paging, access, rights, leaf, dirty, gpa, page_bytes)
}

#[inline(always)]
fn translation(
    paging: &Paging,
    access: Access,
    rights: Rights,
    leaf: u64,
    dirty: bool,
    gpa: u64,
    page_bytes: u64,
) -> Translation {
    let write = Access { kind: AccessKind::Write, ..access };
    Translation {
        gpa: GuestPhysAddr(gpa),
        page_bytes,
        writable: dirty && rights.allow(paging, write) && !rights.key_forbids(paging, write),
        user: rights.us,
        executable: !rights.nx,
        global: leaf & pte::G != 0 && paging.cr4.contains(Cr4::PGE),
    }
}

#[cold]
fn fault(paging: &Paging, access: Access, cause: PfError) -> PageFault {
    PageFault { error_code: cause | access_bits(paging, access) }
}
