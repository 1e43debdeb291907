//! Memory slots of both eras on top of `mmu::Memory`.
//!
//! Today's slots show memory of the client. 2007's were allocated by the kernel and reached through mmap of the VM file:
//! here each has a file of its own, and [`Vm::ram_window`] says where in mmap of the VM file it shows.

use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

use kvm_abi::consts::{
    KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY,
};
use kvm_abi::legacy::{KVM_ALIAS_SLOTS, kvm_memory_alias, kvm_memory_region};
use kvm_abi::{ClearDirtyLog, DirtyLog, kvm_userspace_memory_region};
use mmu::mapping::Piece;
use mmu::memory::SPACES;
use mmu::ring::{self, ENTRY_BYTES};
use mmu::{Alias, Backing, Change, Mapping, SlotError, SlotFlags, SlotSpec};
use nix::errno::Errno;
use x86_defs::{GuestPhysAddr, PAGE_BYTES, PAGE_MASK};

use crate::caps::NR_MEMSLOTS;
use crate::client::{Client, Share, SharedPiece, WindowPiece};
use crate::vm::Vm;

/// Largest slot of 2007, whose kernel allocated each page at once: more than any host had.
const MAX_REGION_BYTES: u64 = 64 << 30;

/// Options of `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`: the answer to `KVM_CHECK_EXTENSION`.
pub(crate) const MANUAL_DIRTY_LOG: u32 = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;

/// Size of the largest dirty ring: the answer to `KVM_CHECK_EXTENSION`.
pub(crate) const MAX_DIRTY_RING_BYTES: u32 = ring::MAX_ENTRIES * ENTRY_BYTES as u32;
/// Size of the smallest: it holds the reserved entries, and is a page.
const MIN_DIRTY_RING_BYTES: u32 = PAGE_BYTES as u32;
const _: () = assert!(MIN_DIRTY_RING_BYTES > ring::RESERVED_ENTRIES * ENTRY_BYTES as u32);

/// First client address that no slot may reach: the kernel's half.
const CLIENT_END: u64 = 1 << 47;

/// What Linux returns.
fn errno(error: SlotError) -> Errno {
    match error {
        SlotError::Invalid => Errno::EINVAL,
        SlotError::Overlap => Errno::EEXIST,
        SlotError::NotFound => Errno::ENOENT,
    }
}

fn aligned(values: &[u64]) -> bool {
    values.iter().all(|value| value & !PAGE_MASK == 0)
}

impl Vm {
    /// A slot that there can be: an address space in bits 16 and up, and its number in that.
    fn is_slot(&self, slot: u32) -> bool {
        let spaces = if self.era().has_address_spaces() { SPACES as u32 } else { 1 };
        slot >> 16 < spaces && slot & 0xffff < NR_MEMSLOTS
    }

    /// `KVM_SET_USER_MEMORY_REGION`, the checks in the order of `__kvm_set_memory_region`.
    pub(crate) fn set_user_memory_region(
        &self,
        client: &dyn Client,
        region: &kvm_userspace_memory_region,
    ) -> Result<(), Errno> {
        let &kvm_userspace_memory_region { slot, flags, guest_phys_addr, memory_size, userspace_addr } = region;
        let user_end = userspace_addr.checked_add(memory_size);
        if !self.is_slot(slot)
            || flags & !(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY) != 0
            || !aligned(&[memory_size, guest_phys_addr, userspace_addr])
            || user_end.is_none_or(|end| end > CLIENT_END)
        {
            return Err(Errno::EINVAL);
        }
        let layout = self.layout.lock();
        let mut is_resized = true;
        if memory_size == 0 {
            self.memory.delete_slot(slot).map_err(errno)?;
        } else {
            let flags =
                SlotFlags { log_dirty: flags & KVM_MEM_LOG_DIRTY_PAGES != 0, readonly: flags & KVM_MEM_READONLY != 0 };
            let gpa = GuestPhysAddr(guest_phys_addr);
            let slots = self.memory.slots_around(slot).map_err(errno)?;
            let backing = match slots.classify(slot, gpa, memory_size, flags, userspace_addr).map_err(errno)? {
                Change::Nothing => return Ok(()),
                Change::Create => backing(client.share(userspace_addr, memory_size)?)?,
                Change::Move | Change::Flags => {
                    is_resized = false;
                    slots.by_id(slot).expect("only an existing slot changes").backing().clone()
                }
            };
            let logs_from_now = flags.log_dirty && slots.by_id(slot).is_none_or(|old| old.dirty().is_none());
            let spec = SlotSpec { id: slot, gpa, len: memory_size, flags, userspace_addr, backing };
            self.memory.set_slot(spec).map_err(errno)?;
            let starts_set = self.manual_dirty_log.load(Relaxed) & KVM_DIRTY_LOG_INITIALLY_SET != 0;
            if logs_from_now && starts_set && !self.has_dirty_rings() {
                let pages = memory_size / PAGE_BYTES;
                let word = |at: u64| u64::MAX >> 64u64.saturating_sub(pages - 64 * at);
                self.mark_dirty(slot, &(0..pages.div_ceil(64)).map(word).collect::<Vec<_>>());
            }
        }
        if is_resized {
            let spaces = self.memory.spaces();
            let bytes: u64 = spaces.iter().flat_map(|slots| slots.iter()).map(mmu::Slot::len).sum();
            self.options.memory_changed(bytes / PAGE_BYTES);
        }
        self.quiesce();
        drop(layout);
        Ok(())
    }

    /// The client's mappings at `range` are others now: slots show what is there, as the kernel's KVM looks it up. Where nothing
    /// is, a slot stays as it was.
    pub(crate) fn follow_remapping(&self, range: &Range<u64>, share: &mut Share<'_>) {
        let layout = self.layout.lock();
        let spaces = self.memory.spaces();
        let touched = |slot: &&mmu::Slot| {
            let start = slot.userspace_addr();
            // 0: the slot is of 2007, and of no address.
            start != 0 && start < range.end && range.start < start + slot.len()
        };
        for slot in spaces.iter().flat_map(|slots| slots.iter()).filter(touched) {
            let shared = share(slot.userspace_addr(), slot.len()).and_then(backing);
            let set = shared.and_then(|backing| self.memory.set_backing(slot.id(), backing).map_err(errno));
            if let Err(errno) = set {
                tracing::warn!(vm = self.id, slot = slot.id(), %errno, "the guest goes on to see memory that was replaced");
            }
        }
        self.quiesce();
        drop(layout);
    }

    /// `KVM_GET_DIRTY_LOG`: bit n of byte n / 8 is page n of the slot; whole 64-bit words. Cleared by being read, and only
    /// by that: what cannot be stored is kept, as in 2007. (Today's Linux loses it.)
    pub(crate) fn get_dirty_log(&self, client: &dyn Client, log: &DirtyLog) -> Result<(), Errno> {
        if self.has_dirty_rings() {
            return Err(Errno::ENXIO);
        }
        if !self.is_slot(log.slot) {
            return Err(Errno::EINVAL);
        }
        let layout = self.layout.lock();
        if self.manual_dirty_log.load(Relaxed) != 0 {
            let slots = self.memory.slots_around(log.slot).map_err(errno)?;
            let dirty = slots.by_id(log.slot).and_then(mmu::Slot::dirty).ok_or(Errno::ENOENT)?;
            let bytes: Vec<u8> = dirty.bits().iter().flat_map(|word| word.to_le_bytes()).collect();
            return client.write(log.dirty_bitmap, &bytes);
        }
        let words = self.memory.take_dirty(log.slot).map_err(errno)?;
        self.quiesce();
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let stored = client.write(log.dirty_bitmap, &bytes);
        if stored.is_err() {
            self.mark_dirty(log.slot, &words);
        }
        drop(layout);
        stored
    }

    /// `KVM_CLEAR_DIRTY_LOG`, the checks in the order of `kvm_clear_dirty_log_protect`.
    pub(crate) fn clear_dirty_log(&self, client: &dyn Client, log: &ClearDirtyLog) -> Result<(), Errno> {
        let &ClearDirtyLog { slot, num_pages, first_page, dirty_bitmap } = log;
        if self.has_dirty_rings() {
            return Err(Errno::ENXIO);
        }
        if !self.is_slot(slot) || first_page % 64 != 0 {
            return Err(Errno::EINVAL);
        }
        let _layout = self.layout.lock();
        let pages = {
            let slots = self.memory.slots_around(slot).map_err(errno)?;
            let slot = slots.by_id(slot).filter(|slot| slot.dirty().is_some()).ok_or(Errno::ENOENT)?;
            slot.len() / PAGE_BYTES
        };
        let (count, after) = (u64::from(num_pages), pages.checked_sub(first_page).ok_or(Errno::EINVAL)?);
        if count > after || count < after && count % 64 != 0 {
            return Err(Errno::EINVAL);
        }
        let mut bytes = vec![0; count.div_ceil(64) as usize * 8];
        client.read(dirty_bitmap, &mut bytes)?;
        let mask: Vec<u64> =
            bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes"))).collect();
        self.memory.clear_dirty(slot, (first_page / 64) as usize, &mask).map_err(errno)?;
        self.quiesce();
        Ok(())
    }

    /// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`. EINVAL: an unknown option, or one that needs the first.
    pub(crate) fn set_manual_dirty_log(&self, options: u64) -> Result<(), Errno> {
        let enable = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
        let allowed = if options & enable != 0 { u64::from(MANUAL_DIRTY_LOG) } else { enable };
        if options & !allowed != 0 {
            return Err(Errno::EINVAL);
        }
        self.manual_dirty_log.store(options as u32, Relaxed);
        Ok(())
    }

    /// Each vCPU has a dirty ring, and bitmaps are nobody's.
    fn has_dirty_rings(&self) -> bool {
        self.dirty_ring_bytes.load(Relaxed) != 0
    }

    /// `KVM_CAP_DIRTY_LOG_RING`: vCPUs get rings of that many bytes, the checks in the order of
    /// `kvm_vm_ioctl_enable_dirty_log_ring`. EINVAL: no power of two, too small, rings or vCPUs are there. E2BIG.
    pub(crate) fn set_dirty_ring(&self, bytes: u32) -> Result<(), Errno> {
        if !bytes.is_power_of_two() || bytes < MIN_DIRTY_RING_BYTES {
            return Err(Errno::EINVAL);
        }
        if bytes > MAX_DIRTY_RING_BYTES {
            return Err(Errno::E2BIG);
        }
        let vcpus = self.vcpus.lock();
        if self.has_dirty_rings() || !vcpus.is_empty() {
            return Err(Errno::EINVAL);
        }
        self.dirty_ring_bytes.store(bytes, Relaxed);
        Ok(())
    }

    /// `KVM_RESET_DIRTY_RINGS`: how many entries were reset, of all vCPUs. EINVAL: there are no rings.
    pub(crate) fn reset_dirty_rings(&self) -> Result<i32, Errno> {
        if !self.has_dirty_rings() {
            return Err(Errno::EINVAL);
        }
        let rings: Vec<_> = self.vcpus.lock().values().filter_map(|vcpu| vcpu.ring.clone()).collect();
        let _layout = self.layout.lock();
        let count = self.memory.reset_rings(&rings);
        if count > 0 {
            self.quiesce();
        }
        Ok(count.cast_signed())
    }

    /// Marks pages of a slot that logs, 64 to a word.
    fn mark_dirty(&self, slot: u32, words: &[u64]) {
        let Ok(slots) = self.memory.slots_around(slot) else { return };
        let Some(dirty) = slots.by_id(slot).and_then(mmu::Slot::dirty) else { return };
        for (at, word) in (0..).zip(words) {
            for bit in (0..64).filter(|bit| word >> bit & 1 != 0) {
                dirty.mark(64 * at + bit);
            }
        }
    }

    /// `KVM_SET_MEMORY_REGION` of 2007: zeroed RAM; the same size elsewhere moves it, size 0 frees it.
    pub(crate) fn set_memory_region(&self, region: &kvm_memory_region) -> Result<(), Errno> {
        let &kvm_memory_region { slot, flags, guest_phys_addr, memory_size } = region;
        let wraps = guest_phys_addr.checked_add(memory_size).is_none();
        if wraps || !aligned(&[memory_size, guest_phys_addr]) || slot >= NR_MEMSLOTS {
            return Err(Errno::EINVAL);
        }
        let layout = self.layout.lock();
        let slots = self.memory.slots();
        let old = slots.by_id(slot);
        if old.is_some_and(|old| memory_size != 0 && memory_size != old.len()) {
            return Err(Errno::EINVAL);
        }
        if memory_size == 0 {
            // A client that has touched its pages keeps those, and nobody the others.
            if old.is_some() {
                self.memory.delete_slot(slot).map_err(errno)?;
            }
        } else {
            let flags = SlotFlags { log_dirty: flags & KVM_MEM_LOG_DIRTY_PAGES != 0, readonly: false };
            let gpa = GuestPhysAddr(guest_phys_addr);
            // Another slot in the way comes before memory that is short.
            match slots.classify(slot, gpa, memory_size, flags, 0) {
                Err(SlotError::Invalid) if memory_size > MAX_REGION_BYTES => return Err(Errno::ENOMEM),
                change => change.map_err(errno)?,
            };
            let backing = match old {
                Some(old) => old.backing().clone(),
                None if memory_size > MAX_REGION_BYTES => return Err(Errno::ENOMEM),
                None => Backing::new(Mapping::create("kvm-vm", memory_size).map_err(|_| Errno::ENOMEM)?, 0),
            };
            let spec = SlotSpec { id: slot, gpa, len: memory_size, flags, userspace_addr: 0, backing };
            self.memory.set_slot(spec).map_err(errno)?;
        }
        self.quiesce();
        drop(layout);
        Ok(())
    }

    /// `KVM_SET_MEMORY_ALIAS` of 2007.
    pub(crate) fn set_memory_alias(&self, alias: &kvm_memory_alias) -> Result<(), Errno> {
        if alias.slot >= KVM_ALIAS_SLOTS {
            return Err(Errno::EINVAL);
        }
        let layout = self.layout.lock();
        let to = Alias {
            gpa: GuestPhysAddr(alias.guest_phys_addr),
            len: alias.memory_size,
            target: GuestPhysAddr(alias.target_phys_addr),
        };
        self.memory.set_alias(alias.slot, to).map_err(errno)?;
        self.quiesce();
        drop(layout);
        Ok(())
    }

    /// What mmap of a 2007 VM's file shows now: RAM at its guest-physical address, aliases first, and nothing elsewhere.
    /// Takes no lock that a slot change holds: a page fault of the client asks, and a change may wait for the client.
    pub(crate) fn ram_window(&self) -> Vec<WindowPiece> {
        let slots = self.memory.slots();
        // Where one thing may end and another begin: both ends of every slot and alias, and of every slot as aliases show it.
        let mut borders: Vec<u64> = slots.iter().flat_map(|slot| [slot.gpa().0, slot.gpa().0 + slot.len()]).collect();
        for alias in slots.aliases() {
            let (start, target) = (alias.gpa.0, alias.target.0 & PAGE_MASK);
            let shown = |border: &u64| border.checked_sub(target).filter(|&at| at < alias.len).map(|at| start + at);
            let inside: Vec<u64> = borders.iter().filter_map(shown).collect();
            borders.extend(inside.into_iter().chain([start, start + alias.len]));
        }
        borders.sort_unstable();
        borders.dedup();
        let piece = |pair: &[u64]| {
            let (slot, at) = slots.find(GuestPhysAddr(pair[0]))?;
            let (mapping, offset) = (slot.backing().mapping().clone(), slot.backing().offset() + at);
            Some(WindowPiece { gpa: pair[0], ram: SharedPiece { len: pair[1] - pair[0], mapping, offset } })
        };
        borders.windows(2).filter_map(piece).collect()
    }
}

/// One backing of the pieces that a range of client memory is made of.
fn backing(pieces: Vec<SharedPiece>) -> Result<Backing, Errno> {
    match <[SharedPiece; 1]>::try_from(pieces) {
        Ok([piece]) => Ok(Backing::new(piece.mapping, piece.offset)),
        Err(pieces) => {
            let pieces: Vec<Piece> =
                pieces.into_iter().map(|SharedPiece { len, mapping, offset }| Piece { mapping, offset, len }).collect();
            Ok(Backing::new(Mapping::join(&pieces).map_err(|_| Errno::ENOMEM)?, 0))
        }
    }
}
