//! Where a case's code and data lie, in the sandboxed child and in the interpreter's guest alike.
//!
//! All below 4 GiB, so the same case runs in compatibility mode. Around the regions nothing is mapped.

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Two pages, readable and executable.
pub const CODE_BASE: u64 = 0x1000_0000;
/// Bytes of the code pages.
pub const CODE_BYTES: usize = 0x2000;
/// Bytes of code that a case may have, INT3 behind it included.
pub const CASE_BYTES: usize = 64;
/// Two pages, readable and writable, of every case its own.
pub const DATA_BASE: u64 = 0x2000_0000;
/// Bytes of the writable data pages.
pub const DATA_BYTES: usize = 0x2000;
/// One page right behind the writable ones, read-only; `readonly_page()` holds its bytes.
pub const READONLY_BASE: u64 = DATA_BASE + DATA_BYTES as u64;
/// First unmapped byte behind the data pages.
pub const DATA_END: u64 = READONLY_BASE + PAGE;

/// What the read-only page holds: a byte tells its offset, neighbours differ.
pub fn readonly_page() -> [u8; PAGE as usize] {
    std::array::from_fn(|i| (i as u8).wrapping_mul(0x9d) ^ (i >> 8) as u8)
}
