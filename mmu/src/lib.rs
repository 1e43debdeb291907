//! Guest-physical slots, page walks, TLB, access rights, dirty log.

mod mapping;

pub use mapping::Mapping;
