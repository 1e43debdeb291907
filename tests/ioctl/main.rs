//! The ioctl table, seen from outside the crate that has it.

mod readme;
