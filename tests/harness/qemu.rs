//! QEMU as the VMM of a test.

use anyhow::Result;
use assets::packages::{self, QEMU};
use assets::qemu::{Accel, Machine};

use crate::console::Console;
use crate::softkvm;

/// Starts the machine that `build` makes, on softkvm; its console is the returned one.
///
/// With `SOFTKVM_TEST_ACCEL=tcg` in the environment it runs on QEMU's own JIT instead: what fails there as well is the
/// test's fault.
pub fn start(build: impl FnOnce(Accel) -> Machine) -> Result<Console> {
    packages::ensure(&[QEMU], &assets::Quiet)?;
    if std::env::var_os("SOFTKVM_TEST_ACCEL").is_some_and(|accel| accel == "tcg") {
        return Console::start(&mut build(Accel::Tcg).command());
    }
    Console::start(&mut softkvm::run::<&str, _>(&[], &build(Accel::Kvm).command_line())?)
}
