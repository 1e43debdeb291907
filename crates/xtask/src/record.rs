//! `cargo xtask record`: expectations from something that is not our code.

use anyhow::Result;
use clap::Subcommand;

use crate::cargo::{program, succeeds};

/// Record the expected side of tests from an oracle.
#[derive(clap::Args)]
#[command(arg_required_else_help = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Instruction vectors, from the host's CPU, into cpu-core/tests/isa
    Isa {
        /// Mnemonics in lower case [default: all that have a vector file or could have one]
        mnemonics: Vec<String>,
    },
}

/// True if all was recorded.
pub(crate) fn run(args: &Args) -> Result<bool> {
    let What::Isa { mnemonics } = &args.what;
    succeeds(program("isa-oracle").arg("record").args(mnemonics))
}
