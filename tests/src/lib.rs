//! Whole-system tests: the harness as this library, the cases in `tests/`.

pub mod softkvm;
pub mod summary;
