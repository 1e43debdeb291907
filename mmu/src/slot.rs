//! Memory slots: which guest-physical addresses are RAM, and where that RAM is.
//!
//! The rules are those of `__kvm_set_memory_region` in virt/kvm/kvm_main.c (Linux 6.1), in its order of checks. Aliases are
//! those of KVM_SET_MEMORY_ALIAS (Linux 2.6.22): the lowest alias wins, aliases win over slots, one level only.

use std::sync::Arc;

use thiserror::Error;
use x86_defs::{GuestPhysAddr, PAGE_BYTES, PAGE_MASK, PAGE_SHIFT};

use crate::dirty::DirtyLog;
use crate::host::{HostPtr, Span};
use crate::mapping::Mapping;

/// Slots an address space may have: bits 15:0 of their ids are 0 to 508, what KVM_CAP_NR_MEMSLOTS answered for years.
pub const MAX_SLOTS: u32 = 509;
/// Aliases a VM may have, as in 2007.
pub const MAX_ALIASES: u32 = 4;
/// KVM_MEM_MAX_NR_PAGES: pages in one slot.
const MAX_SLOT_PAGES: u64 = (1 << 31) - 1;
/// First guest-physical address that no page-table entry can name.
const GPA_END: u64 = 1 << 52;

/// Flags of a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotFlags {
    /// KVM_MEM_LOG_DIRTY_PAGES.
    pub log_dirty: bool,
    /// KVM_MEM_READONLY: reads and fetches hit, writes are MMIO.
    pub readonly: bool,
}

/// Where the RAM of a slot is: in a mapping, from a byte offset on.
#[derive(Clone, Debug)]
pub struct Backing {
    mapping: Arc<Mapping>,
    offset: u64,
}

impl Backing {
    /// The bytes of `mapping` from `offset`, a multiple of 4096, on.
    pub fn new(mapping: Arc<Mapping>, offset: u64) -> Self {
        Self { mapping, offset }
    }

    /// The mapping.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// First byte in the mapping.
    pub fn offset(&self) -> u64 {
        self.offset
    }
}

/// What KVM_SET_USER_MEMORY_REGION asks for, with `len` > 0.
#[derive(Clone, Debug)]
pub struct SlotSpec {
    /// Slot number; its address space is in bits 16 and up.
    pub id: u32,
    /// First guest-physical address.
    pub gpa: GuestPhysAddr,
    /// Bytes.
    pub len: u64,
    /// Flags.
    pub flags: SlotFlags,
    /// The client's address of the RAM. Only compared: an existing slot cannot be given another.
    pub userspace_addr: u64,
    /// The RAM; ignored when the slot exists, which keeps its own.
    pub backing: Backing,
}

/// Why a slot cannot be as asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SlotError {
    /// `EINVAL`: misaligned, out of range, or a change that needs a delete first.
    #[error("bad slot number, alignment, size or change of a slot")]
    Invalid,
    /// `EEXIST`: overlaps another slot.
    #[error("slot overlaps another one")]
    Overlap,
    /// `ENOENT`: no such slot, or it does not log.
    #[error("no such slot, or no dirty log")]
    NotFound,
}

/// What setting a slot amounts to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A new slot.
    Create,
    /// The slot appears at another guest-physical address, contents kept.
    Move,
    /// Other flags.
    Flags,
    /// Everything as it was.
    Nothing,
}

/// One memory slot. Immutable but for its dirty bits.
#[derive(Clone)]
pub struct Slot {
    gpa: u64,
    span: Span,
    flags: SlotFlags,
    dirty: Option<Arc<DirtyLog>>,
    id: u32,
    userspace_addr: u64,
    /// Keeps `span` mapped.
    backing: Backing,
}

impl Slot {
    /// Slot number.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// First guest-physical address.
    pub fn gpa(&self) -> GuestPhysAddr {
        GuestPhysAddr(self.gpa)
    }

    /// Bytes; a slot is never empty.
    #[expect(clippy::len_without_is_empty, reason = "a slot is never empty")]
    pub fn len(&self) -> u64 {
        self.span.bytes()
    }

    /// Flags.
    pub fn flags(&self) -> SlotFlags {
        self.flags
    }

    /// The client's address of the RAM, as given.
    pub fn userspace_addr(&self) -> u64 {
        self.userspace_addr
    }

    /// The RAM.
    pub fn backing(&self) -> &Backing {
        &self.backing
    }

    /// The dirty log, if the slot keeps one.
    pub fn dirty(&self) -> Option<&Arc<DirtyLog>> {
        self.dirty.as_ref()
    }

    pub(crate) fn span(&self) -> &Span {
        &self.span
    }

    /// Whether guest writes reach the RAM.
    #[inline(always)]
    pub(crate) fn writable(&self) -> bool {
        !self.flags.readonly && self.span.writable()
    }

    /// Byte offset of `gpa` in the slot, if inside.
    #[inline(always)]
    pub(crate) fn offset_of(&self, gpa: u64) -> Option<u64> {
        let offset = gpa.wrapping_sub(self.gpa);
        (offset < self.span.bytes()).then_some(offset)
    }

    fn end(&self) -> u64 {
        self.gpa + self.len()
    }
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "slot {}: {:#x}+{:#x} {:?} {:?}", self.id, self.gpa, self.len(), self.flags, self.backing)
    }
}

/// One alias of the 2007 ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alias {
    /// First guest-physical address.
    pub gpa: GuestPhysAddr,
    /// Bytes.
    pub len: u64,
    /// What it shows; the low 12 bits do not count.
    pub target: GuestPhysAddr,
}

/// What is at a page of guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// RAM.
    Ram {
        /// Host address of the 4-KByte page's first byte.
        ptr: HostPtr,
        /// Whether guest writes reach it.
        writable: bool,
        /// Whether writes must be logged: a cached pointer may be written only after a lookup for writing, and only until
        /// the view takes a newer snapshot.
        logged: bool,
    },
    /// A write to a page of a read-only slot: MMIO.
    Readonly,
    /// No slot: MMIO.
    Hole,
}

/// An immutable picture of all slots of an address space, and its aliases.
#[derive(Clone, Default)]
pub struct Slots {
    /// By guest-physical address.
    sorted: Vec<Slot>,
    aliases: [Option<Alias>; MAX_ALIASES as usize],
    has_aliases: bool,
}

impl Slots {
    /// All slots, by guest-physical address.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Slot> {
        self.sorted.iter()
    }

    /// The aliases that there are, in the order in which they are asked.
    pub fn aliases(&self) -> impl Iterator<Item = &Alias> {
        self.aliases.iter().flatten()
    }

    /// Slot number `id`.
    pub fn by_id(&self, id: u32) -> Option<&Slot> {
        self.sorted.iter().find(|slot| slot.id == id)
    }

    /// The slot that holds `gpa`, after aliases, and the byte offset in it.
    pub fn find(&self, gpa: GuestPhysAddr) -> Option<(&Slot, u64)> {
        let mut hint = 0;
        self.locate(gpa.0, &mut hint)
    }

    /// As [`Slots::find`], trying slot number `hint` of the sorted order first and leaving the hit there.
    #[inline(always)]
    pub(crate) fn locate(&self, gpa: u64, hint: &mut usize) -> Option<(&Slot, u64)> {
        let gpa = if self.has_aliases { self.through_alias(gpa) } else { gpa };
        if let Some(slot) = self.sorted.get(*hint)
            && let Some(offset) = slot.offset_of(gpa)
        {
            return Some((slot, offset));
        }
        self.search(gpa, hint)
    }

    /// Slot number `hint` of the sorted order, if guest-physical addresses lead to slots directly.
    #[inline(always)]
    pub(crate) fn direct(&self, hint: usize) -> Option<&Slot> {
        if self.has_aliases { None } else { self.sorted.get(hint) }
    }

    #[inline(never)]
    fn search(&self, gpa: u64, hint: &mut usize) -> Option<(&Slot, u64)> {
        let index = self.sorted.partition_point(|slot| slot.gpa <= gpa).checked_sub(1)?;
        let slot = &self.sorted[index];
        let offset = slot.offset_of(gpa)?;
        *hint = index;
        Some((slot, offset))
    }

    #[inline(never)]
    fn through_alias(&self, gpa: u64) -> u64 {
        let hit = self.aliases.iter().flatten().find(|alias| gpa.wrapping_sub(alias.gpa.0) < alias.len);
        hit.map_or(gpa, |alias| (alias.target.0 & PAGE_MASK).wrapping_add(gpa - alias.gpa.0))
    }

    /// What setting `spec` would amount to. The order of the checks is KVM's.
    pub fn classify(
        &self,
        id: u32,
        gpa: GuestPhysAddr,
        len: u64,
        flags: SlotFlags,
        userspace_addr: u64,
    ) -> Result<Change, SlotError> {
        let aligned = (gpa.0 | len | userspace_addr) & !PAGE_MASK == 0;
        let end = gpa.checked_add(len);
        if !aligned || id & 0xffff >= MAX_SLOTS || end.is_none() || len >> PAGE_SHIFT > MAX_SLOT_PAGES || len == 0 {
            return Err(SlotError::Invalid);
        }
        let end = end.unwrap_or_default().0;
        let change = match self.by_id(id) {
            None => Change::Create,
            Some(old) => {
                let fixed =
                    old.userspace_addr == userspace_addr && old.len() == len && old.flags.readonly == flags.readonly;
                match (fixed, old.gpa == gpa.0, old.flags == flags) {
                    (false, ..) => return Err(SlotError::Invalid),
                    (true, false, _) => Change::Move,
                    (true, true, false) => Change::Flags,
                    (true, true, true) => Change::Nothing,
                }
            }
        };
        if matches!(change, Change::Create | Change::Move) {
            if self.sorted.iter().any(|slot| slot.id != id && slot.gpa < end && gpa.0 < slot.end()) {
                return Err(SlotError::Overlap);
            }
            if end > GPA_END {
                return Err(SlotError::Invalid);
            }
        }
        Ok(change)
    }

    /// These slots with `spec` carried out.
    pub(crate) fn with(&self, spec: &SlotSpec) -> Result<(Self, Change), SlotError> {
        let change = self.classify(spec.id, spec.gpa, spec.len, spec.flags, spec.userspace_addr)?;
        let old = self.by_id(spec.id);
        let backing = old.map_or(&spec.backing, |slot| &slot.backing).clone();
        if !backing.offset.is_multiple_of(PAGE_BYTES) {
            return Err(SlotError::Invalid);
        }
        let span = backing.mapping.span(backing.offset, spec.len).ok_or(SlotError::Invalid)?;
        let kept = old.and_then(|slot| slot.dirty.clone());
        let dirty =
            spec.flags.log_dirty.then(|| kept.unwrap_or_else(|| Arc::new(DirtyLog::new(spec.len >> PAGE_SHIFT))));
        let slot = Slot {
            gpa: spec.gpa.0,
            span,
            flags: spec.flags,
            dirty,
            id: spec.id,
            userspace_addr: spec.userspace_addr,
            backing,
        };
        let mut new = self.clone();
        new.sorted.retain(|slot| slot.id != spec.id);
        let at = new.sorted.partition_point(|other| other.gpa < slot.gpa);
        new.sorted.insert(at, slot);
        Ok((new, change))
    }

    /// These slots, number `id` with other RAM of the same size.
    pub(crate) fn with_backing(&self, id: u32, backing: Backing) -> Result<Self, SlotError> {
        let mut new = self.clone();
        let slot = new.sorted.iter_mut().find(|slot| slot.id == id).ok_or(SlotError::NotFound)?;
        if !backing.offset.is_multiple_of(PAGE_BYTES) {
            return Err(SlotError::Invalid);
        }
        slot.span = backing.mapping.span(backing.offset, slot.len()).ok_or(SlotError::Invalid)?;
        slot.backing = backing;
        Ok(new)
    }

    /// These slots without `id`.
    pub(crate) fn without(&self, id: u32) -> Result<Self, SlotError> {
        if self.by_id(id).is_none() {
            return Err(SlotError::Invalid);
        }
        let mut new = self.clone();
        new.sorted.retain(|slot| slot.id != id);
        Ok(new)
    }

    /// These slots with alias number `index` set, or removed if `alias.len` is 0.
    pub(crate) fn with_alias(&self, index: u32, alias: Alias) -> Result<Self, SlotError> {
        let aligned = (alias.gpa.0 | alias.len) & !PAGE_MASK == 0;
        let wraps = alias.gpa.checked_add(alias.len).is_none() || alias.target.checked_add(alias.len).is_none();
        if !aligned || index >= MAX_ALIASES || wraps {
            return Err(SlotError::Invalid);
        }
        let mut new = self.clone();
        new.aliases[index as usize] = (alias.len > 0).then_some(alias);
        new.has_aliases = new.aliases.iter().any(Option::is_some);
        Ok(new)
    }
}

impl std::fmt::Debug for Slots {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.sorted).entries(self.aliases.iter().flatten()).finish()
    }
}
