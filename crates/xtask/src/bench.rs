//! `cargo xtask bench`: the benchmark program, built as releases are.

use std::ffi::OsString;

use anyhow::Result;
use softkvm_tests::softkvm;

use crate::cargo::{program, succeeds};

/// Measure softkvm below QEMU and below a plain VMM, and beside it QEMU's JIT and Bochs on the same guest.
///
/// Not a gate: numbers to compare with another run on the same machine, which should have nothing else to do. What was
/// measured is kept in `benches/results`.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Args {
    /// Those of the benchmark: `cargo xtask bench --help`
    #[arg(value_name = "ARGUMENTS", trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<OsString>,
}

/// True if all could be measured.
pub(crate) fn run(args: &Args) -> Result<bool> {
    if !args.rest.iter().any(|arg| arg == "--help" || arg == "-h") {
        softkvm::require_host()?;
    }
    succeeds(program("softkvm-benches").args(&args.rest))
}
