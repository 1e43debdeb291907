//! Guest-physical slots, page walks, TLB, access rights, dirty log.
