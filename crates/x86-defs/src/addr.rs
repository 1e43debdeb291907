//! Linear and guest-physical addresses as types that do not mix.

use std::fmt;

/// log2 of the smallest page.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in the smallest page.
pub const PAGE_BYTES: u64 = 1 << PAGE_SHIFT;
/// The address bits that name the page; `!PAGE_MASK` are those inside it.
pub const PAGE_MASK: u64 = !(PAGE_BYTES - 1);

macro_rules! address {
    ($(#[$doc:meta])* $name:ident, $tag:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The number of the 4-KByte page.
            #[inline(always)]
            pub const fn page(self) -> u64 {
                self.0 >> PAGE_SHIFT
            }

            /// Bytes from the start of the 4-KByte page.
            #[inline(always)]
            pub const fn offset(self) -> u64 {
                self.0 & !PAGE_MASK
            }

            /// First address of the 4-KByte page.
            #[inline(always)]
            pub const fn page_start(self) -> Self {
                Self(self.0 & PAGE_MASK)
            }

            /// First address of 4-KByte page number `page`.
            #[inline(always)]
            pub const fn from_page(page: u64) -> Self {
                Self(page << PAGE_SHIFT)
            }

            /// `self + bytes` modulo 2^64.
            #[inline(always)]
            pub const fn wrapping_add(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }

            /// `self - bytes` modulo 2^64.
            #[inline(always)]
            pub const fn wrapping_sub(self, bytes: u64) -> Self {
                Self(self.0.wrapping_sub(bytes))
            }

            /// `self + bytes`, unless it passes the end of the 64-bit space.
            #[inline(always)]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }

            /// `self` rounded down to a multiple of `bytes`, a power of two.
            #[inline(always)]
            pub const fn align_down(self, bytes: u64) -> Self {
                Self(self.0 & !(bytes - 1))
            }

            /// Whether `self` is a multiple of `bytes`, a power of two.
            #[inline(always)]
            pub const fn is_aligned(self, bytes: u64) -> bool {
                self.0 & (bytes - 1) == 0
            }

            /// Bytes from `self` to the end of its 4-KByte page: 1 to 4096.
            #[inline(always)]
            pub const fn bytes_to_page_end(self) -> u64 {
                PAGE_BYTES - self.offset()
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($tag, ":{:#x}"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }

        impl From<u64> for $name {
            #[inline(always)]
            fn from(address: u64) -> Self {
                Self(address)
            }
        }

        impl From<$name> for u64 {
            #[inline(always)]
            fn from(address: $name) -> Self {
                address.0
            }
        }
    };
}

address! {
    /// A linear address: after segmentation, before paging. SDM Vol. 3 "Protected-Mode Memory Management".
    LinearAddr, "la"
}

address! {
    /// A guest-physical address: after paging, before the VM's memory slots.
    GuestPhysAddr, "gpa"
}

impl LinearAddr {
    /// Whether bits 63 down to `bits - 1` are all equal; `bits` is 48 with 4-level and 57 with 5-level paging.
    /// SDM Vol. 1 "Canonical Addressing".
    #[inline(always)]
    pub const fn is_canonical(self, bits: u32) -> bool {
        let shift = 64 - bits;
        ((self.0 << shift) as i64 >> shift) as u64 == self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_addresses_have_equal_upper_bits() {
        for (address, in48, in57) in [
            (0, true, true),
            (0x0000_7fff_ffff_ffff, true, true),
            (0x0000_8000_0000_0000, false, true),
            (0xffff_8000_0000_0000, true, true),
            (0xffff_7fff_ffff_ffff, false, true),
            (0x0100_0000_0000_0000, false, false),
            (u64::MAX, true, true),
        ] {
            assert_eq!(LinearAddr(address).is_canonical(48), in48, "{address:#x}");
            assert_eq!(LinearAddr(address).is_canonical(57), in57, "{address:#x}");
        }
    }

    #[test]
    fn pages_and_offsets() {
        let a = GuestPhysAddr(0x1234_5678);
        assert_eq!((a.page(), a.offset(), a.page_start().0), (0x12345, 0x678, 0x1234_5000));
        assert_eq!((a.bytes_to_page_end(), a.align_down(0x100).0), (0x988, 0x1234_5600));
        assert_eq!(format!("{a:?} {a}"), "gpa:0x12345678 0x12345678");
        assert_eq!(GuestPhysAddr(u64::MAX).wrapping_add(2).0, 1);
        assert_eq!(GuestPhysAddr(u64::MAX).checked_add(2), None);
    }
}
