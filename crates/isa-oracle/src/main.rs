//! Command line of the oracle.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Parser, Subcommand};
use isa_oracle::host::Oracle;
use isa_oracle::record;

/// Asks the host CPU what instructions do.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Records vector files from the host CPU.
    Record {
        /// Where the files go.
        #[arg(long, default_value = "cpu-core/tests/isa")]
        directory: PathBuf,
        /// Mnemonics; all without any.
        mnemonics: Vec<String>,
    },
}

fn main() -> anyhow::Result<()> {
    match Args::parse().command {
        Command::Record { directory, mnemonics } => record_files(&directory, &mnemonics),
    }
}

fn record_files(directory: &std::path::Path, mnemonics: &[String]) -> anyhow::Result<()> {
    let mut oracle = Oracle::new()?;
    let all = record::mnemonics();
    for wanted in mnemonics {
        anyhow::ensure!(all.contains_key(wanted), "{wanted}: no instruction that tests may run");
    }
    std::fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    for (stem, forms) in all.iter().filter(|(stem, _)| mnemonics.is_empty() || mnemonics.contains(stem)) {
        let text = record::record(&mut oracle, stem, forms)?;
        let path = directory.join(format!("{stem}.vec"));
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
