//! Bits of paging-structure entries. SDM Vol. 3, chapter "Paging": "Formats of CR3 and Paging-Structure Entries".

/// Present.
pub const P: u64 = 1 << 0;
/// Writes allowed.
pub const RW: u64 = 1 << 1;
/// User-mode accesses allowed.
pub const US: u64 = 1 << 2;
/// Page-level write-through.
pub const PWT: u64 = 1 << 3;
/// Page-level cache disable.
pub const PCD: u64 = 1 << 4;
/// Accessed.
pub const A: u64 = 1 << 5;
/// Dirty; only in an entry that maps a page.
pub const D: u64 = 1 << 6;
/// Page size, in a PDE or PDPTE: the entry maps a page.
pub const PS: u64 = 1 << 7;
/// Global; only in an entry that maps a page.
pub const G: u64 = 1 << 8;
/// Page attribute table, in a PTE.
pub const PAT: u64 = 1 << 7;
/// Page attribute table, in an entry that maps a 2-MByte, 4-MByte or 1-GByte page.
pub const PAT_LARGE: u64 = 1 << 12;
/// Execute disable (the SDM's XD) while IA32_EFER.NXE = 1, otherwise reserved.
pub const NX: u64 = 1 << 63;
/// Physical-address field of PAE, 4-level and 5-level entries, before MAXPHYADDR narrows it.
pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Physical-address field of 32-bit entries.
pub const ADDRESS_32: u64 = 0xffff_f000;
/// Shift of the protection key.
pub const PKEY_SHIFT: u32 = 59;

/// Reserved bits of a PDPTE of PAE paging, below MAXPHYADDR: 2:1 and 8:5.
pub const PAE_PDPTE_RESERVED: u64 = 0x1e6;
