//! The dirty log of one slot: a bit per 4-KByte page, set by vCPUs, taken by KVM_GET_DIRTY_LOG. Where vCPUs have rings, a page
//! with its bit is in one of them ([`crate::ring`]).
//!
//! KVM marks a page on its first touch too, whatever the access: it maps pages of a logged slot writable if it can, and logs
//! them as it does so (`make_spte` in arch/x86/kvm/mmu/spte.c). A test of kvm-ioctls counts on that. Later reads and fetches
//! of the page are not logged, so a second bitmap remembers the touched pages.

use std::sync::atomic::{AtomicU64, Ordering};

/// Dirty bits of a slot. Shared by all vCPUs.
#[derive(Debug)]
pub struct DirtyLog {
    dirty: Box<[AtomicU64]>,
    touched: Box<[AtomicU64]>,
}

impl DirtyLog {
    /// A log with no page marked, for a slot of `pages` pages.
    pub fn new(pages: u64) -> Self {
        let words = pages.div_ceil(64) as usize;
        let zeros = || (0..words).map(|_| AtomicU64::new(0)).collect();
        Self { dirty: zeros(), touched: zeros() }
    }

    /// Marks page `page` (counted from the slot's start) dirty; whether it was not. No effect outside the slot.
    #[inline]
    pub fn mark(&self, page: u64) -> bool {
        set(&self.touched, page);
        set(&self.dirty, page)
    }

    /// Tells of a read or fetch of `page`: marks it dirty if nothing touched it before; whether it was not dirty and is now.
    #[inline]
    pub fn touch(&self, page: u64) -> bool {
        set(&self.touched, page) && set(&self.dirty, page)
    }

    /// The dirty bits, 64 pages to a word, lowest bit first; clears them. A bit set meanwhile is in this answer or in the
    /// next, never in neither.
    pub fn take(&self) -> Vec<u64> {
        // A word that is zero is left alone: writing it would only steal its cache line from the vCPUs.
        let take = |word: &AtomicU64| match word.load(Ordering::Acquire) {
            0 => 0,
            _ => word.swap(0, Ordering::AcqRel),
        };
        self.dirty.iter().map(take).collect()
    }

    /// The dirty bits, 64 pages to a word; they stay.
    pub fn bits(&self) -> Vec<u64> {
        self.dirty.iter().map(|word| word.load(Ordering::Acquire)).collect()
    }

    /// Clears the bits of `mask`, whose first word is that of page `64 * first`. Whether any was set.
    pub fn clear(&self, first: usize, mask: &[u64]) -> bool {
        let words = self.dirty.iter().skip(first).zip(mask);
        words.fold(false, |any, (word, &mask)| any | (mask != 0 && word.fetch_and(!mask, Ordering::AcqRel) & mask != 0))
    }

    /// Clears the mark of `page`. No effect outside the slot.
    pub fn clear_page(&self, page: u64) {
        if let Some(word) = usize::try_from(page / 64).ok().and_then(|at| self.dirty.get(at)) {
            word.fetch_and(!(1 << (page % 64)), Ordering::AcqRel);
        }
    }

    /// Whether `page` is marked.
    pub fn is_dirty(&self, page: u64) -> bool {
        self.dirty.get((page / 64) as usize).is_some_and(|word| word.load(Ordering::Acquire) >> (page % 64) & 1 != 0)
    }
}

/// Sets bit `page`; whether it was clear. Reads first: a set bit is the common case and needs no locked write.
#[inline]
fn set(words: &[AtomicU64], page: u64) -> bool {
    let Some(word) = words.get((page / 64) as usize) else { return false };
    let bit = 1 << (page % 64);
    word.load(Ordering::Acquire) & bit == 0 && word.fetch_or(bit, Ordering::AcqRel) & bit == 0
}
