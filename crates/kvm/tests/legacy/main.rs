//! The API of 2007, as Linux 2.6.22 and 2.6.23 had it: a test for every ioctl, every errno, every exit reason, and every rule
//! that clients of that time rely on. `kvm::header` names the tests beside the lines of the header that they show.
//!
//! What is expected comes from the kernels' source, `drivers/kvm` of 2.6.22.19 and 2.6.23.17 on Intel's CPUs.

#[path = "../common/mod.rs"]
mod common;
mod debug;
mod dirty;
mod entry;
mod errno;
mod exits;
mod guests;
mod interrupts;
mod io;
mod machine;
mod memory;
mod mmio;
mod msr;
mod rules;
mod run;
mod state;
mod system;
