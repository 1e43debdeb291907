//! Whole-system tests: the harness is this library, the cases are beside it.
//!
//! - [`softkvm`]: the program under test, as one command (`softkvm run`) or as a long-lived daemon
//! - [`console`]: reading and typing on a program's terminal
//! - [`inside`]: running the rest of a test in a process that sees our /dev/kvm
//! - [`foreign`]: tests of other crates, built unmodified and run as clients

pub mod console;
pub mod foreign;
pub mod inside;
pub mod softkvm;
pub mod summary;

/// True if the longer forms of tests are wanted: `cargo xtask test --long`.
pub fn long() -> bool {
    std::env::var_os("SOFTKVM_TEST_LONG").is_some_and(|v| v != "0")
}
