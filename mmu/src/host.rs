//! Accesses to memory that somebody else writes at the same time: guest RAM and the `kvm_run` pages.
//!
//! Rust's references promise that nobody writes behind them; the VMM does just that. So no `&[u8]` into such memory exists:
//! single values move through atomics, bytes through assembly that the compiler does not reason about. An access of 1, 2,
//! 4 or 8 bytes is one host instruction, hence as atomic as the guest's own would be. A page that the client took away
//! from under a mapping reads as zeros, see `sigbus.rs`.
#![expect(unsafe_code, reason = "the one place off the hot path that dereferences pointers into guest RAM")]

use std::arch::asm;
use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// A host address inside guest RAM. Holding one keeps nothing mapped: it is good for as long as the
/// [`View`](crate::View) that gave it has not taken a newer snapshot.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct HostPtr(*mut u8);

impl HostPtr {
    /// The address. Dereferencing it is the caller's unsafe business; no reference may be made from it.
    #[inline(always)]
    pub fn as_ptr(self) -> *mut u8 {
        self.0
    }

    /// The address `bytes` further on.
    #[inline(always)]
    pub fn offset(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes as usize))
    }
}

/// `value`, computed here and in this way: the compiler knows nothing about it and computes none of what follows from it anew.
#[inline(always)]
pub fn opaque(mut value: u64) -> u64 {
    // SAFETY: no instruction at all.
    unsafe { asm!("/* {} */", inout(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

impl fmt::Debug for HostPtr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host:{:p}", self.0)
    }
}

/// A run of mapped host memory and whether it may be written. Offsets are checked, so its methods are safe.
#[derive(Clone, Copy)]
pub(crate) struct Span {
    base: NonNull<u8>,
    bytes: u64,
    writable: bool,
}

// SAFETY: a span is an address range of the process; every access through it is an atomic or an assembly instruction.
unsafe impl Send for Span {}
// SAFETY: as above; concurrent accesses are what it is for.
unsafe impl Sync for Span {}

macro_rules! atomics {
    ($($load:ident $store:ident $reference:ident $atomic:ident $value:ty;)*) => {$(
        /// One load; `None` if misaligned or not inside.
        #[inline]
        pub(crate) fn $load(&self, offset: u64) -> Option<$value> {
            Some(self.$reference(offset)?.load(Ordering::Acquire))
        }

        /// One store; `None` if misaligned, not inside, or not writable.
        #[inline]
        pub(crate) fn $store(&self, offset: u64, value: $value) -> Option<()> {
            if !self.writable {
                return None;
            }
            self.$reference(offset)?.store(value, Ordering::Release);
            Some(())
        }

        /// The value as an atomic; `None` if misaligned or not inside. Only loads may go to a span that is not writable.
        #[inline]
        pub(crate) fn $reference(&self, offset: u64) -> Option<&$atomic> {
            let p = self.pointer(offset, size_of::<$value>() as u64)?.cast::<$value>();
            if !p.is_aligned() {
                return None;
            }
            // SAFETY: `pointer` checked the bounds, the line above the alignment; the creator of the span keeps the memory
            // mapped while it lives. Whoever else writes there, in whatever process, races with atomics only.
            Some(unsafe { $atomic::from_ptr(p) })
        }
    )*};
}

impl Span {
    /// `[base, base + bytes)`.
    ///
    /// # Safety
    /// The range stays mapped, readable and, if `writable`, writable, for as long as the span or a copy of it is used.
    pub(crate) unsafe fn new(base: NonNull<u8>, bytes: u64, writable: bool) -> Self {
        Self { base, bytes, writable }
    }

    #[inline(always)]
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    #[inline(always)]
    pub(crate) fn writable(&self) -> bool {
        self.writable
    }

    /// The part `[offset, offset + bytes)`, if it is inside.
    pub(crate) fn part(&self, offset: u64, bytes: u64) -> Option<Self> {
        let base = NonNull::new(self.pointer(offset, bytes)?)?;
        Some(Self { base, bytes, writable: self.writable })
    }

    /// The address of `offset`, which the caller has found to be inside.
    #[inline(always)]
    pub(crate) fn host(&self, offset: u64) -> HostPtr {
        debug_assert!(offset < self.bytes, "host address outside its span");
        HostPtr(self.base.as_ptr().wrapping_add(offset as usize))
    }

    #[inline(always)]
    fn pointer(&self, offset: u64, bytes: u64) -> Option<*mut u8> {
        if offset > self.bytes || bytes > self.bytes - offset {
            return None;
        }
        Some(self.base.as_ptr().wrapping_add(offset as usize))
    }

    atomics! {
        load_u8  store_u8  atomic_u8  AtomicU8  u8;
        load_u16 store_u16 atomic_u16 AtomicU16 u16;
        load_u32 store_u32 atomic_u32 AtomicU32 u32;
        load_u64 store_u64 atomic_u64 AtomicU64 u64;
    }

    /// Copies out; `None`, and nothing copied, if it is not all inside.
    #[inline]
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> Option<()> {
        let from = self.pointer(offset, buf.len() as u64)?;
        // SAFETY: source checked by `pointer` and kept mapped by the span's creator; the destination is ours alone.
        unsafe { copy(buf.as_mut_ptr(), from, buf.len()) };
        Some(())
    }

    /// Copies in; `None`, and nothing copied, if it is not all inside or not writable.
    #[inline]
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Option<()> {
        if !self.writable {
            return None;
        }
        let to = self.pointer(offset, bytes.len() as u64)?;
        // SAFETY: destination checked by `pointer`, writable, kept mapped by the span's creator; others may write it too,
        // and see or lose single instructions' worth of bytes as with any DMA. The source is a live slice.
        unsafe { copy(to, bytes.as_ptr(), bytes.len()) };
        Some(())
    }

    /// Stores a byte and returns the one that was there; `None` as for a store.
    #[inline]
    pub(crate) fn swap_u8(&self, offset: u64, new: u8) -> Option<u8> {
        if !self.writable {
            return None;
        }
        Some(self.atomic_u8(offset)?.swap(new, Ordering::SeqCst))
    }

    /// Sets bits of a byte and returns what was there; `None` as for a store.
    #[inline]
    pub(crate) fn fetch_or_u8(&self, offset: u64, bits: u8) -> Option<u8> {
        if !self.writable {
            return None;
        }
        Some(self.atomic_u8(offset)?.fetch_or(bits, Ordering::SeqCst))
    }

    /// Compares 4 bytes with `old` and, if equal, stores `new`. Whether it did; `None` as for a store.
    #[inline]
    pub(crate) fn compare_exchange_u32(&self, offset: u64, old: u32, new: u32) -> Option<bool> {
        if !self.writable {
            return None;
        }
        let cell = self.atomic_u32(offset)?;
        Some(cell.compare_exchange(old, new, Ordering::SeqCst, Ordering::Relaxed).is_ok())
    }

    /// Compares 8 bytes with `old` and, if equal, stores `new`. Whether it did; `None` as for a store.
    #[inline]
    pub(crate) fn compare_exchange_u64(&self, offset: u64, old: u64, new: u64) -> Option<bool> {
        if !self.writable {
            return None;
        }
        let cell = self.atomic_u64(offset)?;
        Some(cell.compare_exchange(old, new, Ordering::SeqCst, Ordering::Relaxed).is_ok())
    }
}

/// Copies `bytes` bytes; one of the two sides may be written by others meanwhile.
///
/// # Safety
/// `from` readable and `to` writable for `bytes` bytes; the sides do not overlap.
#[inline]
unsafe fn copy(to: *mut u8, from: *const u8, bytes: usize) {
    macro_rules! one {
        ($class:ident, $modifier:literal) => {
            // SAFETY: one load and one store of the caller's ranges; assembly, so a racing write is no matter of the
            // language: the load sees what the memory holds.
            unsafe {
                asm!(
                    concat!("mov {t", $modifier, "}, [{f}]"), concat!("mov [{d}], {t", $modifier, "}"),
                    t = out($class) _, f = in(reg) from, d = in(reg) to, options(nostack, preserves_flags)
                )
            }
        };
    }
    match bytes {
        0 => {}
        1 => one!(reg_byte, ""),
        2 => one!(reg, ":x"),
        4 => one!(reg, ":e"),
        8 => one!(reg, ":r"),
        // SAFETY: as above, byte by byte; DF is clear wherever Rust code runs.
        _ => unsafe {
            asm!(
                "rep movsb",
                inout("rdi") to => _, inout("rsi") from => _, inout("rcx") bytes => _,
                options(nostack, preserves_flags)
            )
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(cells: &mut [u64], writable: bool) -> Span {
        let bytes = size_of_val(cells) as u64;
        // SAFETY: the tests keep `cells` alive and touch it through the span alone meanwhile.
        unsafe { Span::new(NonNull::new(cells.as_mut_ptr().cast()).unwrap(), bytes, writable) }
    }

    #[test]
    fn every_length_is_copied_whole_and_nothing_more() {
        for len in 0..40_usize {
            let mut cells = [0xffff_ffff_ffff_ffff_u64; 8];
            let s = span(&mut cells, true);
            let bytes: Vec<u8> = (0..len as u8).collect();
            s.write(7, &bytes).unwrap();
            let mut all = [0; 64];
            s.read(0, &mut all).unwrap();
            let mut expected = [0xff; 64];
            expected[7..7 + len].copy_from_slice(&bytes);
            assert_eq!(all, expected, "{len}");
        }
    }

    #[test]
    fn bounds_alignment_and_permission_are_checked() {
        let mut cells = [0_u64; 2];
        let s = span(&mut cells, true);
        assert_eq!(s.load_u64(8), Some(0));
        assert_eq!((s.load_u64(9), s.load_u64(16), s.load_u64(u64::MAX), s.load_u32(13)), (None, None, None, None));
        assert_eq!((s.write(15, &[0; 2]), s.write(16, &[]), s.read(u64::MAX, &mut [0])), (None, Some(()), None));
        assert!(s.part(8, 8).is_some() && s.part(8, 9).is_none() && s.part(17, 0).is_none());
        let s = span(&mut cells, false);
        assert_eq!((s.write(0, &[1]), s.store_u8(0, 1), s.compare_exchange_u64(0, 0, 1)), (None, None, None));
    }

    #[test]
    fn compare_exchange_stores_only_over_the_expected_value() {
        let mut cells = [5_u64];
        let s = span(&mut cells, true);
        assert_eq!(s.compare_exchange_u64(0, 4, 6), Some(false));
        assert_eq!(s.compare_exchange_u64(0, 5, 6), Some(true));
        assert_eq!(s.compare_exchange_u32(0, 6, 7), Some(true));
        assert_eq!(s.load_u64(0), Some(7));
    }
}
