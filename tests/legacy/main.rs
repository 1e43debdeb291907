//! A VMM of 2007: a client of /dev/kvm that knows nothing but the header of Linux 2.6.22, and what it has guests do.
//!
//! `legacy CASE…` runs cases; each prints what it measured, and the exit status is 0 if all are as expected. What is
//! expected comes from the header, from Linux 2.6.22's behaviour, and from the SDM; each case names it.

mod abi;
mod case;
mod guest;
mod kvmctl;
mod signal;
mod vmm;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;

/// A case: it gets the time that it may use for repeating itself.
type Case = fn(Duration) -> Result<()>;

/// All cases, by name.
const CASES: &[(&str, Case)] = &[
    ("header", case::header::all),
    ("guests", case::guests::all),
    ("smp", case::smp::repeatedly),
    ("display", case::display::redrawn),
    ("locked", case::locked::exact),
    ("signals", case::signals::all),
    ("reset", case::reset::between_exits),
    ("spin", case::endless::spins),
    ("churn", case::endless::churns),
    ("create", case::endless::creates),
];

fn main() -> ExitCode {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let mut time = Duration::from_secs(3);
    if args.first().is_some_and(|arg| arg == "--seconds") {
        let seconds = args.get(1).and_then(|seconds| seconds.parse().ok());
        time = Duration::from_secs(seconds.expect("--seconds N"));
        args.drain(..2);
    }
    let wanted = |name: &str| args.is_empty() || args.iter().any(|arg| arg == name);
    let chosen: Vec<_> = CASES.iter().filter(|(name, _)| wanted(name)).collect();
    if chosen.len() < args.len() {
        let names: Vec<_> = CASES.iter().map(|(name, _)| *name).collect();
        eprintln!("legacy [--seconds N] CASE…: the cases are {}", names.join(" "));
        return ExitCode::FAILURE;
    }
    let mut failed = false;
    for (name, case) in chosen {
        println!("legacy {name}: begins");
        let start = Instant::now();
        match case(time) {
            Ok(()) => println!("legacy {name}: ok, {:.1} s", start.elapsed().as_secs_f64()),
            Err(error) => {
                println!("legacy {name}: FAILED: {error:#}");
                failed = true;
            }
        }
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
