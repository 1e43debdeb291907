//! `cargo xtask bench`: the benchmark program, built as releases are.

use anyhow::Result;
use softkvm_tests::softkvm;

use crate::cargo::{program, succeeds};

/// Measure exits, start-up, speed and a boot, with QEMU's own JIT beside it.
///
/// Not a gate: numbers to compare with another run on the same machine. The machine should have nothing else to do.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only the rows whose name contains this
    #[arg(value_name = "NAME")]
    filter: Option<String>,
    /// Print JSON instead of a table: a list of {name, unit, softkvm, tcg}
    #[arg(long)]
    json: bool,
}

/// True if all could be measured.
pub(crate) fn run(args: &Args) -> Result<bool> {
    softkvm::require_host()?;
    let mut command = program("softkvm-benches");
    succeeds(command.args(args.json.then_some("--json")).args(&args.filter))
}
