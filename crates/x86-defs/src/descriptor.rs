//! Selectors, segment and gate descriptors. SDM Vol. 3 "Segment Selectors", "Segment Descriptors", "System Descriptor
//! Types", "IDT Descriptors", "Call Gates".

use std::fmt;

/// A segment selector.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Selector(pub u16);

impl Selector {
    /// Requested privilege level.
    #[inline]
    pub const fn rpl(self) -> u8 {
        (self.0 & 3) as u8
    }

    /// Table indicator: true for the LDT.
    #[inline]
    pub const fn ti(self) -> bool {
        self.0 & 4 != 0
    }

    /// Byte offset of the descriptor in its table.
    #[inline]
    pub const fn offset(self) -> u64 {
        (self.0 & !7) as u64
    }

    /// Number of the descriptor in its table.
    #[inline]
    pub const fn index(self) -> u16 {
        self.0 >> 3
    }

    /// Whether it is a null selector: index 0 of the GDT, any RPL.
    #[inline]
    pub const fn is_null(self) -> bool {
        self.0 & !3 == 0
    }

    /// The same descriptor with another RPL.
    #[inline]
    pub const fn with_rpl(self, rpl: u8) -> Self {
        Self(self.0 & !3 | (rpl & 3) as u16)
    }

    /// The selector's part of an error code: index and TI, EXT and IDT clear.
    #[inline]
    pub const fn error_code(self) -> u32 {
        (self.0 & !3) as u32
    }
}

impl fmt::Debug for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#06x}", self.0)
    }
}

/// Types of code and data segments (S = 1), bit by bit.
pub mod segment_type {
    /// Accessed.
    pub const ACCESSED: u8 = 1 << 0;
    /// Data: writable.
    pub const WRITABLE: u8 = 1 << 1;
    /// Code: readable.
    pub const READABLE: u8 = 1 << 1;
    /// Data: expand-down.
    pub const EXPAND_DOWN: u8 = 1 << 2;
    /// Code: conforming.
    pub const CONFORMING: u8 = 1 << 2;
    /// Code, not data.
    pub const CODE: u8 = 1 << 3;

    /// Writable data segment, accessed: what a stack or data segment has at reset.
    pub const DATA_RW_ACCESSED: u8 = 3;
    /// Readable code segment, accessed.
    pub const CODE_RX_ACCESSED: u8 = 11;
}

/// Types of system segments and gates (S = 0).
pub mod system_type {
    /// 16-bit TSS, available.
    pub const TSS16_AVAILABLE: u8 = 1;
    /// LDT.
    pub const LDT: u8 = 2;
    /// 16-bit TSS, busy.
    pub const TSS16_BUSY: u8 = 3;
    /// 16-bit call gate.
    pub const CALL_GATE16: u8 = 4;
    /// Task gate.
    pub const TASK_GATE: u8 = 5;
    /// 16-bit interrupt gate.
    pub const INTERRUPT_GATE16: u8 = 6;
    /// 16-bit trap gate.
    pub const TRAP_GATE16: u8 = 7;
    /// 32-bit TSS, available; in IA-32e mode the 64-bit one.
    pub const TSS32_AVAILABLE: u8 = 9;
    /// 32-bit TSS, busy; in IA-32e mode the 64-bit one.
    pub const TSS32_BUSY: u8 = 11;
    /// 32-bit call gate; in IA-32e mode the 64-bit one.
    pub const CALL_GATE32: u8 = 12;
    /// 32-bit interrupt gate; in IA-32e mode the 64-bit one.
    pub const INTERRUPT_GATE32: u8 = 14;
    /// 32-bit trap gate; in IA-32e mode the 64-bit one.
    pub const TRAP_GATE32: u8 = 15;
    /// The busy bit of a TSS type.
    pub const BUSY: u8 = 2;
}

/// Attributes of a loaded segment in the layout of the VMCS: SDM Vol. 3 "Guest Register State", "Format of Access
/// Rights". Bits 7:0 are the descriptor's bits 47:40, bits 15:12 its bits 55:52, bit 16 says unusable.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct AccessRights(pub u32);

impl AccessRights {
    /// S: code or data, not system.
    pub const S: u32 = 1 << 4;
    /// P: present.
    pub const P: u32 = 1 << 7;
    /// AVL: for system software.
    pub const AVL: u32 = 1 << 12;
    /// L: 64-bit code segment.
    pub const L: u32 = 1 << 13;
    /// D/B: default operation size or stack size.
    pub const DB: u32 = 1 << 14;
    /// G: limit counts 4-KByte units.
    pub const G: u32 = 1 << 15;
    /// The register holds no usable segment.
    pub const UNUSABLE: u32 = 1 << 16;

    /// Type, 0 to 15: see [`segment_type`] and [`system_type`].
    #[inline]
    pub const fn typ(self) -> u8 {
        (self.0 & 15) as u8
    }

    /// Descriptor privilege level.
    #[inline]
    pub const fn dpl(self) -> u8 {
        (self.0 >> 5 & 3) as u8
    }

    /// Whether it is a code or data segment.
    #[inline]
    pub const fn s(self) -> bool {
        self.0 & Self::S != 0
    }

    /// Whether it is present.
    #[inline]
    pub const fn p(self) -> bool {
        self.0 & Self::P != 0
    }

    /// Available for system software.
    #[inline]
    pub const fn avl(self) -> bool {
        self.0 & Self::AVL != 0
    }

    /// 64-bit code segment.
    #[inline]
    pub const fn l(self) -> bool {
        self.0 & Self::L != 0
    }

    /// Default operation size, or size of the stack pointer and upper bound of an expand-down segment.
    #[inline]
    pub const fn db(self) -> bool {
        self.0 & Self::DB != 0
    }

    /// Granularity.
    #[inline]
    pub const fn g(self) -> bool {
        self.0 & Self::G != 0
    }

    /// Whether the register holds no usable segment.
    #[inline]
    pub const fn unusable(self) -> bool {
        self.0 & Self::UNUSABLE != 0
    }

    /// Whether it is a code segment.
    #[inline]
    pub const fn is_code(self) -> bool {
        self.s() && self.typ() & segment_type::CODE != 0
    }

    /// Whether it is a conforming code segment.
    #[inline]
    pub const fn is_conforming(self) -> bool {
        self.is_code() && self.typ() & segment_type::CONFORMING != 0
    }

    /// Whether it is a data segment that may be written.
    #[inline]
    pub const fn is_writable_data(self) -> bool {
        self.s() && !(self.is_code()) && self.typ() & segment_type::WRITABLE != 0
    }

    /// Whether it may be read: data, or readable code.
    #[inline]
    pub const fn is_readable(self) -> bool {
        self.s() && (!self.is_code() || self.typ() & segment_type::READABLE != 0)
    }

    /// Whether it is an expand-down data segment.
    #[inline]
    pub const fn is_expand_down(self) -> bool {
        self.s() && !self.is_code() && self.typ() & segment_type::EXPAND_DOWN != 0
    }

    /// The same with another type.
    #[inline]
    pub const fn with_typ(self, typ: u8) -> Self {
        Self(self.0 & !15 | (typ & 15) as u32)
    }

    /// The same with another DPL.
    #[inline]
    pub const fn with_dpl(self, dpl: u8) -> Self {
        Self(self.0 & !0x60 | ((dpl & 3) as u32) << 5)
    }
}

impl fmt::Debug for AccessRights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// The eight bytes of a segment or system descriptor as one little-endian number.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Descriptor(pub u64);

impl Descriptor {
    /// The accessed bit of a code or data descriptor.
    pub const ACCESSED: u64 = 1 << 40;
    /// The busy bit of a TSS descriptor.
    pub const BUSY: u64 = 1 << 41;

    /// Base address, 32 bits.
    #[inline]
    pub const fn base(self) -> u32 {
        ((self.0 >> 16 & 0x00ff_ffff) | (self.0 >> 32 & 0xff00_0000)) as u32
    }

    /// Base address of a 16-byte system descriptor (LDT, TSS in IA-32e mode); `upper` are its second eight bytes.
    #[inline]
    pub const fn base64(self, upper: u64) -> u64 {
        self.base() as u64 | upper << 32
    }

    /// The 20-bit limit field.
    #[inline]
    pub const fn limit_field(self) -> u32 {
        ((self.0 & 0xffff) | (self.0 >> 32 & 0x000f_0000)) as u32
    }

    /// Segment limit in bytes: the offset of the last byte (expand-down: of the last byte that is outside).
    #[inline]
    pub const fn limit(self) -> u32 {
        let field = self.limit_field();
        if self.rights().g() { field << 12 | 0xfff } else { field }
    }

    /// The attribute bits.
    #[inline]
    pub const fn rights(self) -> AccessRights {
        AccessRights((self.0 >> 40) as u32 & 0xf0ff)
    }

    /// Type.
    #[inline]
    pub const fn typ(self) -> u8 {
        self.rights().typ()
    }

    /// Puts a descriptor together. `limit` is in bytes; with G set in `rights` its low 12 bits are lost.
    #[inline]
    pub const fn new(base: u32, limit: u32, rights: AccessRights) -> Self {
        let field = if rights.g() { limit >> 12 } else { limit } as u64;
        let (base, ar) = (base as u64, rights.0 as u64);
        Self(
            field & 0xffff
                | (field & 0xf_0000) << 32
                | (base & 0x00ff_ffff) << 16
                | (base & 0xff00_0000) << 32
                | (ar & 0xf0ff) << 40,
        )
    }
}

impl fmt::Debug for Descriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#018x}", self.0)
    }
}

/// A call, interrupt, trap or task gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Gate {
    /// Target code segment; the TSS for a task gate.
    pub selector: Selector,
    /// Entry point. 16 bits wide for the 16-bit types, 64 for 16-byte gates; meaningless for a task gate.
    pub offset: u64,
    /// Parameters that a call gate copies: words (16-bit gate) or doublewords; 0 to 31.
    pub parameters: u8,
    /// Interrupt-stack-table index of a 16-byte interrupt or trap gate, 0 to 7.
    pub ist: u8,
    /// Type, DPL and P, in the layout of [`AccessRights`].
    pub rights: AccessRights,
}

impl Gate {
    /// Reads an eight-byte gate: legacy IDTs, and call and task gates outside IA-32e mode.
    #[inline]
    pub const fn from_8(raw: u64) -> Self {
        let rights = AccessRights((raw >> 40) as u32 & 0xff);
        let wide = rights.typ() & 8 != 0;
        let high = if wide { raw >> 32 & 0xffff_0000 } else { 0 };
        Self {
            selector: Selector((raw >> 16) as u16),
            offset: raw & 0xffff | high,
            parameters: (raw >> 32 & 0x1f) as u8,
            ist: 0,
            rights,
        }
    }

    /// Reads a 16-byte gate of IA-32e mode; `upper` are the second eight bytes.
    #[inline]
    pub const fn from_16(raw: u64, upper: u64) -> Self {
        Self {
            selector: Selector((raw >> 16) as u16),
            offset: raw & 0xffff | raw >> 32 & 0xffff_0000 | upper << 32,
            parameters: 0,
            ist: (raw >> 32 & 7) as u8,
            rights: AccessRights((raw >> 40) as u32 & 0xff),
        }
    }

    /// Type.
    #[inline]
    pub const fn typ(self) -> u8 {
        self.rights.typ()
    }

    /// The type field of the upper half of a 16-byte call gate, bits 12:8 of its last doubleword but one, which must
    /// be 0. SDM Vol. 3 "IA-32e Mode Call Gates".
    #[inline]
    pub const fn upper_type(upper: u64) -> u8 {
        (upper >> 40 & 0x1f) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_code_segment() {
        let d = Descriptor(0x00cf_9b00_0000_ffff);
        assert_eq!((d.base(), d.limit(), d.rights().0), (0, u32::MAX, 0xc09b));
        assert!(d.rights().is_code() && d.rights().p() && d.rights().db() && !d.rights().l());
        assert_eq!(Descriptor::new(0, u32::MAX, AccessRights(0xc09b)), d);
    }

    #[test]
    fn fields_survive_a_round_trip() {
        for (base, limit, rights) in
            [(0x1234_5678, 0xf_ffff, 0x0093), (0xfedc_ba98, 0x67, 0x408b), (0xffff_0000, 0xabcd_efff, 0xa0fb)]
        {
            let d = Descriptor::new(base, limit, AccessRights(rights));
            assert_eq!((d.base(), d.limit(), d.rights().0), (base, limit, rights));
        }
    }

    #[test]
    fn gates() {
        let g = Gate::from_8(0x1234_8e00_0008_5678);
        assert_eq!((g.selector.0, g.offset, g.typ(), g.rights.dpl(), g.rights.p()), (8, 0x1234_5678, 14, 0, true));
        let g = Gate::from_8(0x1234_e403_0008_5678);
        assert_eq!((g.offset, g.typ(), g.parameters, g.rights.dpl()), (0x5678, 4, 3, 3));
        let g = Gate::from_16(0x8100_8e03_0010_2000, 0xffff_ffff);
        assert_eq!((g.offset, g.ist, g.selector.0), (0xffff_ffff_8100_2000, 3, 0x10));
    }

    #[test]
    fn selectors() {
        let s = Selector(0x2f);
        assert_eq!((s.rpl(), s.ti(), s.index(), s.offset(), s.error_code()), (3, true, 5, 0x28, 0x2c));
        assert!(Selector(3).is_null() && !Selector(4).is_null());
    }
}
