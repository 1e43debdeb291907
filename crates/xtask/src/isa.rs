//! `cargo xtask isa`: the instruction set, and what is missing of it.

use anyhow::Result;

use crate::cargo::{cargo, succeeds};

/// Show the instructions that the core executes: rows by family, what the decoder knows beyond them by extension, the CPUID
/// bits that guests are told of, and mnemonics with few test vectors.
///
/// Fails if an instruction of an offered feature has no row, if a feature is complete and not offered, or if a mnemonic has
/// fewer vectors than it should for no stated reason.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print JSON: {families, extensions, rows}
    #[arg(long)]
    json: bool,
}

/// True if nothing is missing.
pub(crate) fn run(args: &Args) -> Result<bool> {
    let mut command = cargo(["run", "--quiet", "--package", "kvm", "--example", "isa_coverage", "--"]);
    succeeds(command.args(args.json.then_some("--json")))
}
