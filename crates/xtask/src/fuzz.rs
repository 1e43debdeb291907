//! `cargo xtask fuzz`: random inputs against an oracle, for as long as you like.

use std::process::{Command, Stdio};

use anyhow::{Result, bail};
use clap::Subcommand;

use crate::cargo::{cargo, program, succeeds, workspace};

/// The version of cargo-fuzz that `guest` and `trace` were written with.
const CARGO_FUZZ: &str = "0.13.2";

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
    /// Arbitrary guests: registers, tables and memory that libFuzzer makes up
    ///
    /// The CPU comes back after its instructions, nothing panics, and no byte outside of the VM's slot changes. Corpus
    /// and findings are in cpu-core/fuzz; installs cargo-fuzz if it is missing.
    Guest(Libfuzzer),
    /// Arbitrary code, decoded to traces and run in each mode that decodes differently
    Trace(Libfuzzer),
}

#[derive(clap::Args)]
struct Libfuzzer {
    /// How long
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// Under AddressSanitizer, two to three times as slow
    #[arg(long)]
    asan: bool,
}

/// True if nothing was found.
pub(crate) fn run(args: &Args) -> Result<bool> {
    match &args.what {
        What::Isa { minutes, seed, filter } => isa(*minutes, *seed, filter),
        What::Guest(how) => libfuzzer("guest", how),
        What::Trace(how) => libfuzzer("trace", how),
    }
}

fn libfuzzer(target: &str, how: &Libfuzzer) -> Result<bool> {
    let known = cargo(["fuzz", "--version"]).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    if !known.success() {
        println!("installing cargo-fuzz {CARGO_FUZZ}");
        if !succeeds(&mut cargo(["install", "cargo-fuzz", "--locked", "--version", CARGO_FUZZ]))? {
            bail!("cargo-fuzz cannot be installed. Next step: `cargo install cargo-fuzz --locked` by hand");
        }
    }
    let mut command: Command = cargo(["fuzz", "run", target, "--sanitizer", if how.asan { "address" } else { "none" }]);
    // Seconds for one input: a guest that does not come back. -len_control=0: long inputs from the start.
    let seconds = format!("-max_total_time={}", (how.minutes * 60.0).ceil());
    command.args(["--", &seconds, "-timeout=20", "-len_control=0", "-max_len=4096"]);
    command.current_dir(workspace().join("cpu-core"));
    if how.asan {
        // Sanitizers are an unstable feature of every compiler.
        command.env("RUSTC_BOOTSTRAP", "1");
    }
    succeeds(&mut command)
}

fn isa(minutes: f64, seed: u64, filter: &[String]) -> Result<bool> {
    let mut command = program("isa-oracle");
    command.args(["fuzz".to_owned(), format!("--minutes={minutes}"), format!("--seed={seed}")]);
    command.arg("--corpus").arg(workspace().join("target/isa-fuzz"));
    if !filter.is_empty() {
        command.arg("--filter").args(filter);
    }
    succeeds(&mut command)
}
