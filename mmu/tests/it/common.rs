//! A VM's memory for tests: one slot from guest-physical address 0.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mmu::{Backing, Mapping, Memory, SlotFlags, SlotSpec, View};
use x86_defs::GuestPhysAddr;

/// A slot over all of a new mapping.
pub(crate) fn spec(id: u32, gpa: u64, len: u64, flags: SlotFlags) -> SlotSpec {
    let mapping = Mapping::create("test", len.max(4096)).expect("a memfd");
    SlotSpec { id, gpa: GuestPhysAddr(gpa), len, flags, userspace_addr: 0x7000_0000, backing: Backing::new(mapping, 0) }
}

/// Memory with one slot of `len` bytes at 0, and a view of it.
pub(crate) fn ram(len: u64) -> (Arc<Memory>, View) {
    let memory = Arc::new(Memory::new());
    memory.set_slot(spec(0, 0, len, SlotFlags::default())).expect("the first slot");
    let view = View::new(&memory);
    (memory, view)
}

/// Ends the loops of a test's other threads, also when the test fails: a scope waits for them.
pub(crate) struct Stop<'a>(pub(crate) &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Numbers without a pattern that a mistake could share.
pub(crate) fn numbers() -> impl Iterator<Item = u64> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    })
}
