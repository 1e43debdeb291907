//! Memory slots of both eras on top of `mmu::Memory`.
//!
//! Today's slots show memory of the client. 2007's were allocated by the kernel and reached through mmap of the VM file:
//! here one sparse file, indexed by guest-physical address, is behind both the slots and that mapping.

use std::sync::Arc;

use kvm_abi::consts::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY};
use kvm_abi::legacy::{KVM_ALIAS_SLOTS, kvm_memory_alias, kvm_memory_region};
use kvm_abi::{DirtyLog, kvm_userspace_memory_region};
use mmu::mapping::Piece;
use mmu::{Alias, Backing, Change, Mapping, SlotError, SlotFlags, SlotSpec};
use nix::errno::Errno;
use x86_defs::{GuestPhysAddr, PAGE_MASK};

use crate::caps::NR_MEMSLOTS;
use crate::client::{Client, SharedPiece};
use crate::vm::Vm;

/// Guest-physical addresses that the RAM window of a 2007 VM covers: 64 GiB, of which only touched pages cost memory.
const WINDOW_BYTES: u64 = 64 << 30;

/// First client address that no slot may reach: the kernel's half.
const CLIENT_END: u64 = 1 << 47;

/// State of slot changes; held locked during one.
#[derive(Default)]
pub(crate) struct Layout {
    /// RAM of a 2007 VM.
    window: Option<Arc<Mapping>>,
}

impl Layout {
    /// What mmap of the VM file shows.
    pub(crate) fn window(&self) -> Option<Arc<Mapping>> {
        self.window.clone()
    }
}

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
    /// `KVM_SET_USER_MEMORY_REGION`, the checks in the order of `__kvm_set_memory_region`.
    pub(crate) fn set_user_memory_region(
        &self,
        client: &dyn Client,
        region: &kvm_userspace_memory_region,
    ) -> Result<(), Errno> {
        let &kvm_userspace_memory_region { slot, flags, guest_phys_addr, memory_size, userspace_addr } = region;
        let user_end = userspace_addr.checked_add(memory_size);
        if slot >= NR_MEMSLOTS
            || flags & !(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY) != 0
            || !aligned(&[memory_size, guest_phys_addr, userspace_addr])
            || user_end.is_none_or(|end| end > CLIENT_END)
        {
            return Err(Errno::EINVAL);
        }
        let layout = self.layout.lock();
        if memory_size == 0 {
            self.memory.delete_slot(slot).map_err(errno)?;
        } else {
            let flags =
                SlotFlags { log_dirty: flags & KVM_MEM_LOG_DIRTY_PAGES != 0, readonly: flags & KVM_MEM_READONLY != 0 };
            let gpa = GuestPhysAddr(guest_phys_addr);
            let slots = self.memory.slots();
            let backing = match slots.classify(slot, gpa, memory_size, flags, userspace_addr).map_err(errno)? {
                Change::Nothing => return Ok(()),
                Change::Create => backing(client.share(userspace_addr, memory_size)?)?,
                Change::Move | Change::Flags => {
                    slots.by_id(slot).expect("only an existing slot changes").backing().clone()
                }
            };
            let spec = SlotSpec { id: slot, gpa, len: memory_size, flags, userspace_addr, backing };
            self.memory.set_slot(spec).map_err(errno)?;
        }
        self.quiesce();
        drop(layout);
        Ok(())
    }

    /// `KVM_GET_DIRTY_LOG`: bit n of byte n / 8 is page n of the slot; whole 64-bit words. Cleared by being read, and only
    /// by that: what cannot be stored is kept.
    pub(crate) fn get_dirty_log(&self, client: &dyn Client, log: &DirtyLog) -> Result<(), Errno> {
        if log.slot >= NR_MEMSLOTS {
            return Err(Errno::EINVAL);
        }
        let layout = self.layout.lock();
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

    /// Marks pages of a slot that logs, 64 to a word.
    fn mark_dirty(&self, slot: u32, words: &[u64]) {
        let slots = self.memory.slots();
        let Some(dirty) = slots.by_id(slot).and_then(mmu::Slot::dirty) else { return };
        for (at, word) in (0..).zip(words) {
            (0..64).filter(|bit| word >> bit & 1 != 0).for_each(|bit| dirty.mark(64 * at + bit));
        }
    }

    /// `KVM_SET_MEMORY_REGION` of 2007: zeroed RAM; the same size elsewhere moves it, size 0 frees it.
    pub(crate) fn set_memory_region(&self, region: &kvm_memory_region) -> Result<(), Errno> {
        let &kvm_memory_region { slot, flags, guest_phys_addr, memory_size } = region;
        let end = guest_phys_addr.checked_add(memory_size).ok_or(Errno::EINVAL)?;
        if !aligned(&[memory_size, guest_phys_addr]) || slot >= NR_MEMSLOTS {
            return Err(Errno::EINVAL);
        }
        let mut layout = self.layout.lock();
        let slots = self.memory.slots();
        let old = slots.by_id(slot);
        if old.is_some_and(|old| memory_size != 0 && memory_size != old.len()) {
            return Err(Errno::EINVAL);
        }
        if end > WINDOW_BYTES {
            return Err(Errno::ENOMEM);
        }
        let window = match &layout.window {
            Some(window) => window.clone(),
            None => Mapping::create("kvm-vm", WINDOW_BYTES).map_err(|_| Errno::ENOMEM)?,
        };
        layout.window = Some(window.clone());

        let Some(old) = old else {
            if memory_size != 0 {
                self.put_region(&window, slot, guest_phys_addr, memory_size, flags)?;
            }
            return Ok(());
        };
        let (old_gpa, old_len) = (old.gpa().0, old.len());
        if memory_size != 0 && old_gpa == guest_phys_addr {
            return self.put_region(&window, slot, guest_phys_addr, memory_size, flags);
        }
        let free = |gpa: u64, len| slots.iter().all(|other| other.id() == slot || !overlaps(other, gpa, len));
        if memory_size != 0 && !free(guest_phys_addr, memory_size) {
            return Err(Errno::EEXIST);
        }
        self.memory.delete_slot(slot).map_err(errno)?;
        self.quiesce();
        if memory_size != 0 {
            copy(&window, old_gpa, guest_phys_addr, old_len).ok_or(Errno::ENOMEM)?;
            self.put_region(&window, slot, guest_phys_addr, memory_size, flags)?;
            // A log that goes on keeps what it has.
            let logged = slots.by_id(slot).and_then(mmu::Slot::dirty).map(|log| log.take());
            self.mark_dirty(slot, &logged.unwrap_or_default());
        }
        // What the new place does not cover goes back to the host, and reads as zero when it is RAM again.
        let kept = guest_phys_addr..guest_phys_addr + memory_size;
        let (first, last) = (old_gpa, old_gpa + old_len);
        let before = first..last.min(kept.start.max(first));
        let after = first.max(kept.end.min(last))..last;
        for gone in if memory_size == 0 { [first..last, last..last] } else { [before, after] } {
            if !gone.is_empty() {
                window.discard(gone.start, gone.end - gone.start).map_err(|_| Errno::ENOMEM)?;
            }
        }
        Ok(())
    }

    /// Makes or changes a slot of 2007 whose RAM is where its address says.
    fn put_region(&self, window: &Arc<Mapping>, id: u32, gpa: u64, len: u64, flags: u32) -> Result<(), Errno> {
        let flags = SlotFlags { log_dirty: flags & KVM_MEM_LOG_DIRTY_PAGES != 0, readonly: false };
        let backing = Backing::new(window.clone(), gpa);
        let spec = SlotSpec { id, gpa: GuestPhysAddr(gpa), len, flags, userspace_addr: 0, backing };
        self.memory.set_slot(spec).map_err(errno)?;
        self.quiesce();
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
}

fn overlaps(slot: &mmu::Slot, gpa: u64, len: u64) -> bool {
    slot.gpa().0 < gpa + len && gpa < slot.gpa().0 + slot.len()
}

/// Moves RAM inside the window; the ranges may overlap.
fn copy(window: &Mapping, from: u64, to: u64, len: u64) -> Option<()> {
    const STEP: u64 = 1 << 20;
    let mut buffer = vec![0; STEP as usize];
    let steps = len.div_ceil(STEP);
    for step in 0..steps {
        // Upwards the last piece goes first, so that none is overwritten before it is read.
        let at = STEP * if to > from { steps - 1 - step } else { step };
        let bytes = &mut buffer[..STEP.min(len - at) as usize];
        window.read(from + at, bytes)?;
        window.write(to + at, bytes)?;
    }
    Some(())
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
