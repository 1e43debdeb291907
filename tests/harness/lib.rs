//! Whole-system tests: the harness is this library, the cases are beside it.
//!
//! - [`softkvm`]: the program under test, as one command: `softkvm run`
//! - [`service`]: the same as a daemon that outlives its clients: `softkvm serve`, and what it holds on to
//! - [`console`]: reading and typing on a program's terminal
//! - [`inside`]: running the rest of a test in a process that sees our /dev/kvm
//! - [`qemu`]: QEMU as the VMM; [`qmp`]: its machine protocol
//! - [`linux`]: Linux in a VMM of our own, without firmware; [`acpi`]: what it is told of its machine
//! - [`foreign`]: tests of other crates, built unmodified and run as clients

use std::time::{Duration, Instant};

pub mod acpi;
pub mod console;
pub mod foreign;
pub mod inside;
pub mod linux;
pub mod qemu;
pub mod qmp;
pub mod service;
pub mod softkvm;
pub mod summary;

/// Asks `done` until it says yes, for at most `within`. For states that no event announces.
pub fn eventually(within: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + within;
    while !done() {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

/// True if the longer forms of tests are wanted: `cargo xtask test --long`.
pub fn long() -> bool {
    std::env::var_os("SOFTKVM_TEST_LONG").is_some_and(|v| v != "0")
}
