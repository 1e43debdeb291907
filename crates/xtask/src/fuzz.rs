//! `cargo xtask fuzz`: random inputs against an oracle, for as long as you like.

use anyhow::Result;
use clap::Subcommand;

use crate::cargo::{program, succeeds, workspace};

/// Look for differences from an oracle with random inputs.
#[derive(clap::Args)]
#[command(arg_required_else_help = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Instructions, against the host's CPU
    ///
    /// What differs is made as plain as it goes, shown, and kept as vectors in target/isa-fuzz; with the difference
    /// understood, they belong beside those in cpu-core/tests/isa.
    Isa {
        /// How long
        #[arg(long, default_value_t = 1.0)]
        minutes: f64,
        /// Same seed, same cases
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Mnemonics and CPUID features, as iced-x86 names them (`add`, `sse2`) [default: all]
        filter: Vec<String>,
    },
}

/// True if nothing differs.
pub(crate) fn run(args: &Args) -> Result<bool> {
    let What::Isa { minutes, seed, filter } = &args.what;
    let mut command = program("isa-oracle");
    command.args(["fuzz".to_owned(), format!("--minutes={minutes}"), format!("--seed={seed}")]);
    command.arg("--corpus").arg(workspace().join("target/isa-fuzz"));
    if !filter.is_empty() {
        command.arg("--filter").args(filter);
    }
    succeeds(&mut command)
}
