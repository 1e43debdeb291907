//! What softkvm costs, and beside it what others make of the same guest. Not a gate: numbers to compare with the parent's on
//! the same machine. Run by `cargo xtask bench`.

mod bare;
mod costs;
mod image;
mod latency;
mod peer;
mod plain;
mod report;
mod round;
mod row;
mod scale;
mod sector;
mod undisturbed;
mod vmm;
mod workload;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use assets::Progress;
use assets::progress::Bar;
use clap::Parser;
use softkvm_tests::softkvm;

use peer::Peer;
use report::{Machine, Report};
use row::Row;
use vmm::Part;
use workload::Guest;

/// Measure softkvm: a guest's workloads beside others who run the same guest, and single costs.
#[derive(Parser)]
#[command(version, bin_name = "cargo xtask bench")]
struct Args {
    /// Only workloads and single costs whose name contains one of these
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// How often each peer boots the guest, in turn
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: u32,
    /// In how many of the rounds, from the first, Bochs runs, which takes most of the time [default: all]
    #[arg(long, value_name = "N")]
    bochs_rounds: Option<u32>,
    /// Who runs the guest
    #[arg(long, value_enum, value_delimiter = ',', default_value = "softkvm,plain,tcg,bochs")]
    peers: Vec<Peer>,
    /// Another build of softkvm, as the peer `parent`
    #[arg(long, value_name = "PROGRAM")]
    parent: Option<PathBuf>,
    /// The workloads' size in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 100)]
    scale: u32,
    /// Print the whole result as JSON instead of tables
    #[arg(long)]
    json: bool,
    /// Keep no result
    #[arg(long)]
    discard: bool,
    /// An earlier result, from `benches/results`, to compare with
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// The part that needs a /dev/kvm, measured on the one that is there
    #[arg(long, value_enum, hide = true)]
    inside: Option<Part>,
    /// The plain VMM, on the /dev/kvm that is there
    #[arg(long, num_args = 4, value_names = ["KERNEL", "INITRD", "MIB", "OPTIONS"], allow_hyphen_values = true, hide = true)]
    plain: Option<Vec<String>>,
    /// The part of a client of the bare FUSE file
    #[arg(long, value_name = "FILE", hide = true)]
    bare_client: Option<PathBuf>,
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
    if let Some(part) = args.inside {
        return row::print_json(&match part {
            Part::Exits => vmm::measure()?,
            Part::Costs => costs::measure()?,
            Part::Latency => latency::measure()?,
            Part::Scale => scale::measure()?,
        });
    }
    if let Some(arguments) = &args.plain {
        return plain::run(arguments);
    }
    if let Some(file) = &args.bare_client {
        println!("{}", bare::each(file)?);
        return Ok(());
    }
    softkvm::require_host()?;
    let earlier = args.compare.as_deref().map(Report::read).transpose()?;
    let wanted = |name: &str| args.names.is_empty() || args.names.iter().any(|part| selects(part, name));
    let workloads: Vec<_> = workload::ALL.iter().copied().filter(|w| wanted(w.name)).collect();
    let groups: Vec<_> = GROUPS.iter().filter(|(names, _)| names.iter().any(|name| wanted(name))).collect();
    if workloads.is_empty() && groups.is_empty() {
        bail!("nothing is called like {}", args.names.join(" or "));
    }
    let mut peers = args.peers.clone();
    if args.parent.is_some() && !peers.contains(&Peer::Parent) {
        peers.push(Peer::Parent);
    }
    softkvm::binary()?;

    let bar = Bar::new();
    for peer in &peers {
        peer.ensure(&bar)?;
    }
    let mut report = Report::new(Machine::here(&assets::kernel::ensure(&bar)?.release, &peers), args.scale);
    let mut guests = Vec::new();
    for guest in Guest::ALL {
        let own: Vec<_> = workloads.iter().copied().filter(|w| w.guest == *guest).collect();
        if !own.is_empty() {
            guests.push((image::ensure(*guest, &own, args.scale, &bar)?, own));
        }
    }
    for round in 0..args.rounds as usize {
        for (image, own) in &guests {
            // Whoever is first in one round is last in the next.
            for turn in 0..peers.len() {
                let peer = peers[(turn + round) % peers.len()];
                let left_out = peer == Peer::Bochs && args.bochs_rounds.is_some_and(|rounds| round >= rounds as usize);
                if left_out || !own.iter().any(|workload| peer.runs(workload)) {
                    continue;
                }
                let what = format!("round {} of {}: {peer}", round + 1, args.rounds);
                bar.step(&what);
                let progress = |name: &str| bar.detail(&format!("{what}: {name}"));
                let samples = round::run(peer, image, args.parent.as_deref(), own, progress)?;
                report.add(peer, samples)?;
            }
        }
        // What there is, should the next round not come to its end.
        if !args.discard && !guests.is_empty() {
            report.keep().context("the result is not kept")?;
        }
    }
    for (names, measure) in groups {
        bar.step(&format!("measuring: {}", names.join(", ")));
        report.micro.extend(measure()?);
    }
    report.micro.retain(|row| wanted(&row.name));
    report.machine.load[1] = report::load();
    bar.finish();

    if args.json {
        println!("{}", report.json()?);
    } else {
        if !workloads.is_empty() {
            print!("{}", report::table(&report, &peers));
        }
        if !report.micro.is_empty() {
            row::print_table(&report.micro);
        }
        if let Some(earlier) = &earlier {
            print!("{}", report::comparison(&report, earlier));
        }
    }
    if !args.discard {
        let path = report.keep().context("the result is not kept")?;
        eprintln!("kept as {}", path.display());
    }
    Ok(())
}

/// The name of a workload selects that one alone, anything else all whose name it is a part of.
fn selects(part: &str, name: &str) -> bool {
    if workload::ALL.iter().any(|w| w.name == part) { part == name } else { name.contains(part) }
}

type Group = (&'static [&'static str], fn() -> Result<Vec<Row>>);

/// Single costs that are measured together.
const GROUPS: &[Group] = &[
    (bare::NAMES, bare::measure),
    (vmm::NAMES, vmm::measure_inside_softkvm),
    (costs::NAMES, || vmm::inside(&[], Part::Costs)),
    (latency::NAMES, || vmm::inside(&[], Part::Latency)),
    (scale::NAMES, || vmm::inside(&[], Part::Scale)),
    (sector::NAMES, sector::measure),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_select() {
        assert!(selects("boot", "boot") && !selects("boot", "tight loop, boot sector in QEMU"));
        assert!(selects("exit", "exit round trip, OUT, tiny VMM") && !selects("exit", "boot"));
    }
}
