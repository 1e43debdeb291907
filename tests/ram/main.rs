//! Guest RAM in the forms that VMMs give it: guest and VMM see the same, whoever writes, and whatever the VMM does to its
//! mapping without telling anybody.
//!
//! What is expected is what the kernel's KVM does, which looks memory up in the VMM's own page tables: at all times the guest
//! sees what the VMM sees. So a test compares the two, and mmap(2) and madvise(2) say what that is.

mod forms;
mod guest;
mod huge;
