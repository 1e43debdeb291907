//! Which MSRs a guest may touch: `KVM_X86_SET_MSR_FILTER`. api.rst, and `kvm_msr_allowed` of Linux's x86.c.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use kvm_abi::consts::{
    KVM_MSR_FILTER_DEFAULT_DENY, KVM_MSR_FILTER_MAX_BITMAP_SIZE, KVM_MSR_FILTER_READ, KVM_MSR_FILTER_WRITE,
};
use kvm_abi::{MsrFilter, MsrFilterRange};
use nix::errno::Errno;
use parking_lot::RwLock;

use crate::client::Client;

/// x2APIC's, which no filter holds back.
const EXEMPT: RangeInclusive<u32> = 0x800..=0x8ff;

/// MSRs from `base` on, and a bit for each: 1 allows.
struct Range {
    flags: u32,
    base: u32,
    count: u32,
    bitmap: Vec<u64>,
}

struct Rules {
    allows_others: bool,
    ranges: Vec<Range>,
}

/// The filter of a VM.
#[derive(Default)]
pub(crate) struct Filter {
    is_set: AtomicBool,
    rules: RwLock<Option<Arc<Rules>>>,
}

impl Filter {
    /// Replaces the rules. EINVAL: unknown flags, a range without any, one that is too long, nothing but a denial of all.
    pub(crate) fn set(&self, client: &dyn Client, filter: &MsrFilter) -> Result<(), Errno> {
        let allows_others = filter.flags & KVM_MSR_FILTER_DEFAULT_DENY == 0;
        let is_empty = filter.ranges.iter().all(|range| range.nmsrs == 0);
        if filter.flags & !KVM_MSR_FILTER_DEFAULT_DENY != 0 || is_empty && !allows_others {
            return Err(Errno::EINVAL);
        }
        let given = filter.ranges.iter().filter(|range| range.nmsrs != 0);
        let ranges = given.map(|range| read_range(client, range)).collect::<Result<_, _>>()?;
        *self.rules.write() = Some(Arc::new(Rules { allows_others, ranges }));
        self.is_set.store(true, Relaxed);
        Ok(())
    }

    /// A guest may read, or write, this MSR. Bits of a range past the end of the MSRs count for none.
    pub(crate) fn allows(&self, index: u32, write: bool) -> bool {
        if !self.is_set.load(Relaxed) || EXEMPT.contains(&index) {
            return true;
        }
        let rules = self.rules.read().clone();
        let Some(rules) = rules else { return true };
        let kind = if write { KVM_MSR_FILTER_WRITE } else { KVM_MSR_FILTER_READ };
        let holds = |range: &&Range| {
            index >= range.base && index < range.base.wrapping_add(range.count) && range.flags & kind != 0
        };
        rules.ranges.iter().find(holds).map_or(rules.allows_others, |range| {
            let bit = index - range.base;
            range.bitmap[(bit / 64) as usize] >> (bit % 64) & 1 != 0
        })
    }
}

fn read_range(client: &dyn Client, range: &MsrFilterRange) -> Result<Range, Errno> {
    let &MsrFilterRange { flags, nmsrs, base, bitmap, .. } = range;
    let words = nmsrs.div_ceil(64);
    let known = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE;
    if flags & !known != 0 || flags == 0 || words > KVM_MSR_FILTER_MAX_BITMAP_SIZE / 8 {
        return Err(Errno::EINVAL);
    }
    let mut bytes = vec![0; words as usize * 8];
    client.read(bitmap, &mut bytes)?;
    let bitmap = bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
    Ok(Range { flags, base, count: nmsrs, bitmap })
}
