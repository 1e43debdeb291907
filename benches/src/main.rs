//! What softkvm costs, and beside it what QEMU's own JIT makes of the same image. Not a gate: numbers to compare with
//! yesterday's on the same machine. Run by `cargo xtask bench`.

mod bare;
mod boot;
mod row;
mod sector;
mod vmm;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use softkvm_tests::softkvm;

use row::Row;

/// Measure softkvm: exits, start-up, speed and a boot, with QEMU's JIT beside it.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Print JSON instead of a table: a list of {name, unit, softkvm, tcg}
    #[arg(long)]
    json: bool,
    /// Only the rows whose name contains this
    #[arg(value_name = "NAME")]
    filter: Option<String>,
    /// The part that needs a /dev/kvm, measured on the one that is there
    #[arg(long, hide = true)]
    inside: bool,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    if args.inside {
        return row::print_json(&vmm::measure()?);
    }
    softkvm::require_host()?;
    let wanted = |name: &str| args.filter.as_deref().is_none_or(|part| name.contains(part));
    let mut rows: Vec<Row> = Vec::new();
    for (names, measure) in GROUPS {
        if names.iter().any(|name| wanted(name)) {
            eprintln!("measuring: {}", names.join(", "));
            rows.extend(measure()?);
        }
    }
    rows.retain(|row| wanted(&row.name));
    if args.json {
        row::print_json(&rows)?;
    } else {
        row::print_table(&rows);
    }
    Ok(())
}

type Group = (&'static [&'static str], fn() -> Result<Vec<Row>>);

/// Rows that are measured together.
const GROUPS: &[Group] = &[
    (bare::NAMES, bare::measure),
    (vmm::NAMES, vmm::measure_inside_softkvm),
    (sector::NAMES, sector::measure),
    (boot::NAMES, boot::measure),
];
