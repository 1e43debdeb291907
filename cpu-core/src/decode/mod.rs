//! From bytes to traces: iced-x86 decodes, `digest` turns operands into op fields, `trace` keeps the result valid.

pub(crate) mod digest;
pub(crate) mod trace;

/// What a decoded trace depends on besides its bytes and its address: widths, and whose pages it was fetched from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Mode(u8);

impl Mode {
    /// `code_bytes`: 2, 4 or 8. `stack_mask`: of the stack pointer. `user`: CPL 3.
    pub(crate) fn new(code_bytes: u32, stack_mask: u64, user: bool) -> Self {
        Self(code_bytes.trailing_zeros() as u8 - 1 | u8::from(stack_mask > 0xffff) << 2 | u8::from(user) << 3)
    }

    /// For keys.
    pub(crate) fn bits(self) -> u8 {
        self.0
    }

    /// 16, 32 or 64: what iced calls bitness.
    pub(crate) fn bitness(self) -> u32 {
        16 << (self.0 & 3)
    }

    /// 64-bit mode.
    pub(crate) fn is_64bit(self) -> bool {
        self.0 & 3 == 2
    }
}
