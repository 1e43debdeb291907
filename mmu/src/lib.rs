//! Guest-physical slots, page walks, TLB, access rights, dirty log.
//!
//! A VM has one [`Memory`]; every vCPU has a [`View`] of it. Guest RAM is memory shared with the VMM, which writes it at any
//! time and without telling us: no reference into it is ever made, see [`host`].

pub mod dirty;
pub mod entry;
pub mod host;
pub mod mapping;
pub mod memory;
pub mod rights;
pub mod ring;
mod sigbus;
pub mod slot;
pub mod structures;
pub mod tlb;
pub mod view;
pub mod walk;

pub use host::HostPtr;
pub use mapping::{Mapping, Piece, Protection, file_page_bytes};
pub use memory::Memory;
pub use rights::{Access, AccessKind};
pub use ring::DirtyRing;
pub use slot::{Alias, Backing, Change, Lookup, Slot, SlotError, SlotFlags, SlotSpec, Slots};
pub use structures::Structures;
pub use view::{AccessError, View};
pub use walk::{Mode, PageFault, Paging, Translation, load_pdptes, translate_only, walk, walk_cached};
