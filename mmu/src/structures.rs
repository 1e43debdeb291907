//! The paging-structure cache: where a walk of a 2-MByte region got to. SDM Vol. 3, chapter "Paging", "Paging-Structure
//! Caches".
//!
//! The processor may remember what the upper levels of a translation said until software invalidates it, and so does
//! this: the next walk in the region reads one entry instead of four, or none where a large page maps it. Only what the
//! SDM lets a processor remember is kept: entries that are present, without reserved bits, and accessed. A remembered
//! step answers only what it allows outright; anything else (a fault, a flag to set) is walked in full.

use x86_defs::{LinearAddr, pte};

/// Regions remembered: 512 MBytes if they lie side by side.
const STEPS: usize = 256;
const REGION_SHIFT: u32 = 21;
/// Region numbers have 43 bits; the rest of a tag is the generation.
const GENERATION_SHIFT: u32 = 64 - REGION_SHIFT;

/// What is remembered of one region.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(32))]
pub(crate) struct Step {
    tag: u64,
    /// Level 1: guest-physical address of the page table. Otherwise the entry that maps the region.
    pub(crate) entry: u64,
    /// R/W, U/S and A of the entries read so far, ANDed; XD of them, ORed.
    pub(crate) path: u64,
    /// Level of the entry that maps the page: 1, 2 or 3.
    pub(crate) level: u32,
}

impl Step {
    /// `entry` and `level` as in the fields; `all` and `any` of the entries on the way, `entry` too if it is one.
    pub(crate) fn new(entry: u64, level: u32, all: u64, any: u64) -> Self {
        Self { tag: 0, entry, path: all & (pte::RW | pte::US | pte::A) | any & pte::NX, level }
    }
}

/// The steps that one vCPU remembers. Whoever changes what a TLB must forget flushes this as well: there is nothing in it
/// about privilege, but everything else that a walk depends on.
#[derive(Debug)]
pub struct Structures {
    steps: [Step; STEPS],
    generation: u64,
}

impl Default for Structures {
    fn default() -> Self {
        Self::new()
    }
}

impl Structures {
    /// An empty cache.
    pub const fn new() -> Self {
        Self { steps: [Step { tag: 0, entry: 0, path: 0, level: 0 }; STEPS], generation: 1 }
    }

    /// Forgets everything. INVLPG, too, is for all regions: "regardless of the linear addresses to which they correspond".
    #[inline]
    pub fn flush(&mut self) {
        self.generation += 1;
        if self.generation >> (64 - GENERATION_SHIFT) != 0 {
            *self = Self::new();
        }
    }

    #[inline(always)]
    fn tag(&self, la: LinearAddr) -> u64 {
        la.0 >> REGION_SHIFT | self.generation << GENERATION_SHIFT
    }

    #[inline(always)]
    fn index(la: LinearAddr) -> usize {
        (la.0 >> REGION_SHIFT) as usize % STEPS
    }

    #[inline(always)]
    pub(crate) fn find(&self, la: LinearAddr) -> Option<Step> {
        let step = self.steps[Self::index(la)];
        (step.tag == self.tag(la)).then_some(step)
    }

    #[inline]
    pub(crate) fn keep(&mut self, la: LinearAddr, step: Step) {
        if step.path & pte::A != 0 {
            self.steps[Self::index(la)] = Step { tag: self.tag(la), ..step };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Step = Step { tag: 0, entry: 0x1000, path: pte::A, level: 1 };

    #[test]
    fn regions_and_generations_do_not_mix() {
        let mut structures = Structures::new();
        let la = LinearAddr(0xffff_8880_0020_0000);
        structures.keep(la, STEP);
        assert_eq!(structures.find(LinearAddr(la.0 + 0x1f_ffff)).map(|step| step.entry), Some(0x1000));
        assert!(structures.find(LinearAddr(la.0 + 0x20_0000)).is_none());
        assert!(structures.find(LinearAddr(la.0 + (STEPS as u64) * 0x20_0000)).is_none());
        structures.flush();
        assert!(structures.find(la).is_none());
        for _ in 0..3 << (64 - GENERATION_SHIFT) {
            structures.flush();
            assert!(structures.find(la).is_none());
        }
        structures.keep(la, Step { path: 0, ..STEP });
        assert!(structures.find(la).is_none(), "not accessed: not remembered");
    }
}
