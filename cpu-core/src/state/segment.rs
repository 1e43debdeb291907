//! Segment registers with their hidden part, and the two descriptor-table registers.

/// A segment register: selector and the descriptor cached behind it (SDM Vol. 3 "Segment Registers").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Visible part.
    pub selector: u16,
    /// Linear address of offset 0.
    pub base: u64,
    /// Offset of the last byte, in bytes: already scaled by G.
    pub limit: u32,
    /// Type field, 4 bits.
    pub type_: u8,
    /// Set for code and data, clear for system descriptors.
    pub s: bool,
    /// Descriptor privilege level, 0 to 3.
    pub dpl: u8,
    /// Segment present.
    pub present: bool,
    /// Available to software.
    pub avl: bool,
    /// 64-bit code segment.
    pub l: bool,
    /// Default operation size, or stack pointer size for SS, big limit for expand-down data.
    pub db: bool,
    /// Limit is in 4 KiB units in the descriptor.
    pub g: bool,
    /// VMX's "segment unusable": loaded with a null selector.
    pub unusable: bool,
}

impl Segment {
    /// What real-address mode leaves behind a selector: base = selector × 16, 64 KiB, read/write, accessed.
    pub fn real_mode(selector: u16) -> Self {
        Self {
            selector,
            base: u64::from(selector) << 4,
            limit: 0xffff,
            type_: 3,
            s: true,
            present: true,
            ..Self::default()
        }
    }

    /// Null selector loaded outside real mode.
    pub fn null(selector: u16) -> Self {
        Self { selector, unusable: true, ..Self::default() }
    }

    /// A code segment (type bit 3 of an S=1 descriptor).
    pub fn is_code(&self) -> bool {
        self.s && self.type_ & 8 != 0
    }

    /// Data segment that grows down.
    pub fn is_expand_down(&self) -> bool {
        self.s && self.type_ & 0xc == 4
    }

    /// Data may be read through it: any data segment, or a readable code segment.
    pub fn is_readable(&self) -> bool {
        self.s && (self.type_ & 8 == 0 || self.type_ & 2 != 0)
    }

    /// Data may be written through it.
    pub fn is_writable(&self) -> bool {
        self.s && self.type_ & 0xa == 2
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescriptorTable {
    /// Linear address of entry 0.
    pub base: u64,
    /// Offset of the last byte.
    pub limit: u16,
}
