//! Command line of the oracle.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{Parser, Subcommand};
use isa_oracle::fuzz::{self, Plan};
use isa_oracle::host::Oracle;
use isa_oracle::interpreter::Interpreter;
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
    /// Compares the interpreter with the host CPU on random instructions.
    Fuzz {
        /// How long.
        #[arg(long, default_value_t = 1.0)]
        minutes: f64,
        /// Same seed, same cases.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Mnemonics and CPUID features to draw from, as iced-x86 names them (`add`, `sse2`, `fpu`); all without any.
        #[arg(long, num_args = 1..)]
        filter: Vec<String>,
        /// Failures to show of each mnemonic.
        #[arg(long, default_value_t = 3)]
        show: usize,
        /// At most this many cases.
        #[arg(long, default_value_t = u64::MAX)]
        cases: u64,
    },
}

fn main() -> anyhow::Result<()> {
    match Args::parse().command {
        Command::Record { directory, mnemonics } => record_files(&directory, &mnemonics),
        Command::Fuzz { minutes, seed, filter, show, cases } => {
            let time = Duration::from_secs_f64(minutes * 60.0);
            fuzz_interpreter(&Plan { seed, filter, cases, time, keep: show })
        }
    }
}

fn fuzz_interpreter(plan: &Plan) -> anyhow::Result<()> {
    let mut oracle = Oracle::new()?;
    let mut interpreter = Interpreter::new();
    let mut told = Instant::now();
    let mut progress = |cases: u64, different: u64| {
        if told.elapsed() > Duration::from_secs(10) {
            told = Instant::now();
            eprintln!("{cases} cases, {different} differ");
        }
    };
    let report = fuzz::run(&mut oracle, &mut interpreter, plan, &mut progress)?;
    for failure in report.tallies.values().flat_map(|tally| &tally.failures) {
        println!("{}", failure.text());
    }
    let mut different = 0;
    for (stem, tally) in report.tallies.iter().filter(|(_, tally)| tally.different + tally.missing > 0) {
        println!(
            "{stem:<16} {:>9} compared {:>9} differ {:>9} missing",
            tally.compared, tally.different, tally.missing
        );
        different += tally.different;
    }
    let rate = report.cases as f64 / report.time.as_secs_f64();
    println!("seed {}: {} cases, {different} differ, {rate:.0}/s on {}", plan.seed, report.cases, record::host_cpu());
    anyhow::ensure!(different == 0, "{different} cases differ");
    Ok(())
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
