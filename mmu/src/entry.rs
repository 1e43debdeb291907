//! Formats of paging-structure entries: which bits are reserved, where an entry points, how large its page is. SDM Vol. 3,
//! chapter "Paging": "Formats of CR3 and Paging-Structure Entries with 32-Bit Paging", "… PAE Paging", "… 4-Level Paging
//! and 5-Level Paging".

use x86_defs::{Cr4, Efer, pte};

use crate::walk::{Mode, Paging};

/// Bits that must be 0 in the 64-bit entries of one paging mode. A row per level, 1 is the page table, 5 the PML5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserved {
    /// In any entry.
    always: u64,
    /// PS in a PDPTE: 1-GByte pages are not there with PAE paging, and not on every processor.
    no_1gb: u64,
}

/// Address bits 20:13 of a 2-MByte page.
const BELOW_2MB: u64 = 0x001f_e000;
/// Address bits 29:13 of a 1-GByte page.
const BELOW_1GB: u64 = 0x3fff_e000;
/// Bits 62:52, which PAE paging reserves and 4-level paging ignores.
const PAE_HIGH: u64 = 0x7ff0_0000_0000_0000;

impl Reserved {
    /// The rules for the mode of `paging`.
    #[inline(always)]
    pub fn new(paging: &Paging) -> Self {
        let mut always = pte::ADDRESS & !address_bits(paging.phys_bits);
        if !paging.efer.contains(Efer::NXE) {
            always |= pte::NX;
        }
        if paging.mode() == Mode::Pae {
            always |= PAE_HIGH;
        }
        Self { always, no_1gb: if paging.page_1gb { 0 } else { pte::PS } }
    }

    /// The reserved bits that are set in `entry`, which is present and of `level`.
    #[inline(always)]
    pub fn violated(&self, level: u32, entry: u64) -> u64 {
        let more = match level {
            1 => 0,
            2 if entry & pte::PS != 0 => BELOW_2MB,
            3 if entry & pte::PS != 0 => BELOW_1GB | self.no_1gb,
            4 | 5 => pte::PS,
            _ => 0,
        };
        entry & (self.always | more)
    }
}

/// All ones below bit `phys_bits`.
#[inline(always)]
pub(crate) fn address_bits(phys_bits: u8) -> u64 {
    u64::MAX >> (64 - u32::from(phys_bits.clamp(32, 52)))
}

/// Whether an entry of `level` with 64 bits maps a page, given that no reserved bit is set.
#[inline(always)]
pub(crate) fn is_leaf(level: u32, entry: u64) -> bool {
    level == 1 || entry & pte::PS != 0
}

/// Address bits that a 4-MByte page of 32-bit paging may have above bit 31: PSE-36 with up to 40 bits.
#[inline(always)]
fn pse36_bits(phys_bits: u8) -> u32 {
    let bits = u32::from(phys_bits.clamp(32, 40)) - 32;
    ((1 << bits) - 1) << 13
}

/// Whether a present PDE of 32-bit paging maps a 4-MByte page.
#[inline(always)]
pub(crate) fn maps_4mb(cr4: Cr4, entry: u32) -> bool {
    cr4.contains(Cr4::PSE) && u64::from(entry) & pte::PS != 0
}

/// Reserved bits that are set in a PDE that maps a 4-MByte page: 21 down to the first that is no address bit.
#[inline(always)]
pub(crate) fn violated_4mb(phys_bits: u8, entry: u32) -> u32 {
    entry & 0x003f_e000 & !pse36_bits(phys_bits)
}

/// First address of the 4-MByte page that a PDE maps.
#[inline(always)]
pub(crate) fn base_4mb(phys_bits: u8, entry: u32) -> u64 {
    u64::from(entry & 0xffc0_0000) | u64::from(entry & pse36_bits(phys_bits)) << 19
}

/// Whether MOV to CR3 (or CR0, CR4) accepts a PDPTE of PAE paging, or raises #GP(0). "PDPTE Registers".
pub fn pdpte_is_valid(phys_bits: u8, pdpte: u64) -> bool {
    let reserved = pte::PAE_PDPTE_RESERVED | !address_bits(phys_bits);
    pdpte & pte::P == 0 || pdpte & reserved == 0
}
