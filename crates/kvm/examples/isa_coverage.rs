//! `cargo xtask isa`: what the core executes, what guests are told of, and the vectors that prove it.

use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use isa_oracle::coverage::Report;

#[derive(Parser)]
struct Args {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../cpu-core/tests/isa");
    let report = match Report::new(kvm::OFFERED_FEATURES, &vectors) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("{}: {error}", vectors.display());
            return ExitCode::FAILURE;
        }
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report).expect("names and numbers"));
    } else {
        print!("{}", report.text());
    }
    let problems = report.problems();
    for problem in &problems {
        eprintln!("{problem}");
    }
    if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
