//! The segments that a case may load: Linux's GDT as user mode sees it, and an LDT of the harness's own.

use crate::layout::{CODE_BASE, DATA_BASE};

/// A segment of the LDT, as `modify_ldt` makes it: DPL 3, accessed, AVL set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LdtSegment {
    base: u64,
    /// In bytes, or in pages where `pages`.
    limit: u32,
    contents: Contents,
    /// D or B bit.
    wide: bool,
    /// Data that cannot be written, code that cannot be read.
    narrow_rights: bool,
    pages: bool,
    present: bool,
}

/// Bits 3:2 of a descriptor's type, as asm/ldt.h numbers them.
#[derive(Clone, Copy, Debug)]
enum Contents {
    Data = 0,
    ExpandDown = 1,
    Code = 2,
}

const fn segment(contents: Contents, base: u64, limit: u32, wide: bool) -> LdtSegment {
    LdtSegment { base, limit, contents, wide, narrow_rights: false, pages: false, present: true }
}

/// The LDT; entry `n` has selector `8n + 7`.
pub(crate) const LDT: [LdtSegment; 12] = [
    // 07 and 0f: the 16-bit segments of `Mode::Bits16`.
    segment(Contents::Code, CODE_BASE, 0xffff, false),
    segment(Contents::Data, DATA_BASE, 0xffff, false),
    // 17: 32-bit data that ends with the writable pages. 1f: expand-down from their second half up.
    segment(Contents::Data, DATA_BASE, 0x1fff, true),
    segment(Contents::ExpandDown, DATA_BASE, 0x0fff, true),
    // 27: read-only data. 2f: execute-only code. 37: flat code.
    LdtSegment { narrow_rights: true, ..segment(Contents::Data, DATA_BASE, 0xffff, true) },
    LdtSegment { narrow_rights: true, ..segment(Contents::Code, CODE_BASE, 0x1fff, true) },
    LdtSegment { pages: true, ..segment(Contents::Code, 0, 0xf_ffff, true) },
    // 3f and 47: not present.
    LdtSegment { present: false, ..segment(Contents::Code, 0, 0xffff, true) },
    LdtSegment { present: false, ..segment(Contents::Data, 0, 0xffff, true) },
    // 4f: 16-bit expand-down. 57: flat data. 5f: code of 16 bytes.
    segment(Contents::ExpandDown, DATA_BASE, 0x07ff, false),
    LdtSegment { pages: true, ..segment(Contents::Data, 0, 0xf_ffff, true) },
    segment(Contents::Code, CODE_BASE, 0xf, true),
];

impl LdtSegment {
    /// `struct user_desc` (asm/ldt.h) of entry `number`.
    pub(crate) fn user_desc(&self, number: usize) -> [u32; 4] {
        let flags = u32::from(self.wide)
            | (self.contents as u32) << 1
            | u32::from(self.narrow_rights) << 3
            | u32::from(self.pages) << 4
            | u32::from(!self.present) << 5
            | 1 << 6;
        [number as u32, self.base as u32, self.limit, flags]
    }

    /// The descriptor that the kernel makes of it (arch/x86 `fill_ldt`).
    pub(crate) fn descriptor(&self) -> u64 {
        let kind = (self.contents as u64) << 2 | u64::from(!self.narrow_rights) << 1 | 1;
        let access = kind | 1 << 4 | 3 << 5 | u64::from(self.present) << 7;
        let flags = 1 | u64::from(self.wide) << 2 | u64::from(self.pages) << 3;
        let limit = u64::from(self.limit);
        limit & 0xffff
            | (self.base & 0xff_ffff) << 16
            | access << 40
            | (limit >> 16 & 0xf) << 48
            | flags << 52
            | (self.base >> 24 & 0xff) << 56
    }
}

/// Linux's GDT (arch/x86 `gdt_page`) without the system descriptors, which user mode cannot load. The last entry is the
/// segment whose limit is the CPU's number: here it is 0.
pub(crate) const GDT: [u64; 16] = [
    0,
    0x00cf_9b00_0000_ffff,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0x0040_f500_0000_0000,
];
/// Bytes of Linux's GDT less one.
pub(crate) const GDT_LIMIT: u16 = 0x7f;
/// Entry of the TSS; the LDT's follows.
pub(crate) const GDT_TSS: u16 = 8;
/// Entry of the LDT.
pub(crate) const GDT_LDT: u16 = 10;

/// The descriptor behind a selector that user mode may load; 0 for any other.
pub(crate) fn descriptor(selector: u16) -> u64 {
    let entry = usize::from(selector >> 3);
    if selector & 4 != 0 {
        LDT.get(entry).map_or(0, LdtSegment::descriptor)
    } else {
        GDT.get(entry).copied().unwrap_or(0)
    }
}

/// Selectors worth loading: every segment with every RPL that matters, null, system, empty and past the limits.
pub(crate) const SELECTORS: [u16; 44] = [
    0x00, 0x01, 0x03, 0x07, 0x0f, 0x17, 0x1f, 0x27, 0x2f, 0x37, 0x3f, 0x47, 0x4f, 0x57, 0x5f, 0x07, 0x0f, 0x57, 0x37,
    0x23, 0x2b, 0x33, 0x23, 0x2b, 0x33, 0x20, 0x29, 0x32, 0x04, 0x0d, 0x16, 0x3c, 0x0b, 0x10, 0x13, 0x18, 0x1b, 0x40,
    0x43, 0x50, 0x63, 0x67, 0x83, 0xfffc,
];
