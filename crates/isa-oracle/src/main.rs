//! Command line of the oracle.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{Parser, Subcommand};
use isa_oracle::fuzz::{self, Event, Failure, Plan};
use isa_oracle::host::Oracle;
use isa_oracle::interpreter::Interpreter;
use isa_oracle::{record, vector};

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
        /// Where the vectors of what differs are added, a file a mnemonic: ready to go beside the recorded ones.
        #[arg(long)]
        corpus: Option<PathBuf>,
    },
}

fn main() -> anyhow::Result<()> {
    match Args::parse().command {
        Command::Record { directory, mnemonics } => record_files(&directory, &mnemonics),
        Command::Fuzz { minutes, seed, filter, show, cases, corpus } => {
            let time = Duration::from_secs_f64(minutes * 60.0);
            fuzz_interpreter(&Plan { seed, filter, cases, time, keep: show }, corpus.as_deref())
        }
    }
}

fn fuzz_interpreter(plan: &Plan, corpus: Option<&Path>) -> anyhow::Result<()> {
    let mut oracle = Oracle::new()?;
    let mut interpreter = Interpreter::new();
    let mut told = Instant::now();
    let mut kept = Ok(());
    let mut tell = |event: Event<'_>| match event {
        Event::Progress(cases, different) => {
            if told.elapsed() > Duration::from_secs(10) {
                told = Instant::now();
                eprintln!("{cases} cases, {different} differ");
            }
        }
        Event::Failure(failure) => {
            println!("{}", failure.text());
            if let (Some(directory), Ok(())) = (corpus, &kept) {
                kept = keep(directory, failure);
            }
        }
    };
    let report = fuzz::run(&mut oracle, &mut interpreter, plan, &mut tell)?;
    kept?;
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

/// Adds the failure's vector to the file of its mnemonic, unless the file has it.
fn keep(directory: &Path, failure: &Failure) -> anyhow::Result<()> {
    std::fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let path = directory.join(format!("{}.vec", failure.stem()));
    let line = vector::line(&failure.vector);
    let old = std::fs::read_to_string(&path).unwrap_or_default();
    if old.lines().any(|known| known == line) {
        return Ok(());
    }
    let text = format!("{old}# found by `cargo xtask fuzz isa` on {}\n{line}\n", record::host_cpu());
    std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn record_files(directory: &Path, mnemonics: &[String]) -> anyhow::Result<()> {
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
