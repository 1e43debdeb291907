//! QEMU as the VMM of a test.

use anyhow::Result;
use assets::packages::{self, QEMU};
use assets::qemu::{Accel, Machine};

use crate::console::Console;
use crate::softkvm;

/// What machines run on: softkvm, or with `SOFTKVM_TEST_ACCEL=tcg` in the environment QEMU's own JIT.
pub fn accel() -> Accel {
    let tcg = std::env::var_os("SOFTKVM_TEST_ACCEL").is_some_and(|accel| accel == "tcg");
    if tcg { Accel::Tcg } else { Accel::Kvm }
}

/// Starts the machine that `build` makes, on softkvm; its console is the returned one.
///
/// See [`accel`]: what fails on QEMU's own JIT as well is the test's fault.
pub fn start(build: impl FnOnce(Accel) -> Machine) -> Result<Console> {
    packages::ensure(&[QEMU], &assets::Quiet)?;
    let accel = accel();
    match accel {
        Accel::Tcg => Console::start(&mut build(accel).command()),
        Accel::Kvm => Console::start(&mut softkvm::run::<&str, _>(&[], &build(accel).command_line())?),
    }
}
