//! What was measured, where and of what: kept as JSON, shown as a table, compared with an earlier one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use softkvm_tests::softkvm;

use crate::peer::Peer;
use crate::round::Sample;
use crate::row::Row;

/// A whole result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Report {
    /// The commit of softkvm; `-changed` behind it where the checkout has changes.
    pub(crate) commit: String,
    /// UTC.
    pub(crate) date: String,
    pub(crate) machine: Machine,
    /// Percent of the full size.
    pub(crate) scale: u32,
    pub(crate) workloads: Vec<Workload>,
    pub(crate) micro: Vec<Row>,
}

/// Where it was measured, and with which versions of what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) cpu: String,
    pub(crate) cpus: usize,
    pub(crate) memory_mib: u64,
    pub(crate) kernel: String,
    pub(crate) guest_kernel: String,
    pub(crate) versions: BTreeMap<String, String>,
    /// `/proc/loadavg`'s first at the begin and the end: well above 1, and the machine had something else to do.
    pub(crate) load: [f64; 2],
}

/// A workload on all who ran it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Workload {
    pub(crate) name: String,
    /// Guest instructions as softkvm counted them: the median of the rounds.
    pub(crate) instructions: Option<u64>,
    /// By peer, in the order of the rounds.
    pub(crate) seconds: BTreeMap<String, Vec<f64>>,
    #[serde(skip)]
    counts: Vec<u64>,
    /// What it computes, the same for all.
    pub(crate) result: String,
}

impl Machine {
    /// This one.
    pub(crate) fn here(guest_kernel: &str, peers: &[Peer]) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
            line.split_once(':').map_or_else(String::new, |(_, value)| value.trim().to_owned())
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        let mut versions = BTreeMap::from([("gcc".to_owned(), first_line("gcc", &["--version"], ""))]);
        versions.insert("rustc".to_owned(), first_line("rustc", &["--version"], ""));
        versions.insert("qemu".to_owned(), first_line("qemu-system-x86_64", &["--version"], "version"));
        if peers.contains(&Peer::Bochs) {
            versions.insert("bochs".to_owned(), first_line("bochs-bin", &["--help"], "Bochs x86 Emulator"));
        }
        Self {
            cpu: field(&read("/proc/cpuinfo"), "model name"),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: memory.split(' ').next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) / 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            guest_kernel: guest_kernel.to_owned(),
            versions,
            load: [load(), 0.0],
        }
    }
}

/// The load of the last minute.
pub(crate) fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0)
}

/// The first line that a program prints with `part` in it; empty where it does not run.
fn first_line(program: &str, args: &[&str], part: &str) -> String {
    let output = Command::new(program).args(args).current_dir(softkvm::workspace()).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().find(|line| line.contains(part)).unwrap_or_default().trim().to_owned()
}

fn commit() -> String {
    let commit = first_line("git", &["rev-parse", "--short=12", "HEAD"], "");
    let changed = first_line("git", &["status", "--porcelain", "--untracked-files=no"], "");
    if changed.is_empty() { commit } else { format!("{commit}-changed") }
}

impl Report {
    /// With nothing measured yet.
    pub(crate) fn new(machine: Machine, scale: u32) -> Self {
        let date = first_line("date", &["--utc", "+%Y-%m-%dT%H%M%SZ"], "");
        Self { commit: commit(), date, machine, scale, workloads: Vec::new(), micro: Vec::new() }
    }

    /// Adds what a guest took. Fails if it computed something else than others did.
    pub(crate) fn add(&mut self, peer: Peer, samples: Vec<Sample>) -> Result<()> {
        for sample in samples {
            let at = self.workloads.iter().position(|w| w.name == sample.name).unwrap_or(self.workloads.len());
            if at == self.workloads.len() {
                self.workloads.push(Workload::new(&sample));
            }
            let workload = &mut self.workloads[at];
            anyhow::ensure!(
                workload.result == sample.result,
                "{} gives {} on {peer}, and gave {} before",
                sample.name,
                sample.result,
                workload.result
            );
            workload.seconds.entry(peer.to_string()).or_default().push(sample.seconds);
            if let (Peer::Softkvm, Some(count)) = (peer, sample.instructions) {
                workload.counts.push(count);
                workload.counts.sort_unstable();
                workload.instructions = Some(workload.counts[workload.counts.len() / 2]);
            }
        }
        Ok(())
    }

    /// Keeps it in `benches/results`, under its date and commit.
    pub(crate) fn keep(&self) -> Result<PathBuf> {
        let folder = softkvm::workspace().join("benches/results");
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let path = folder.join(format!("{}-{}.json", self.date, self.commit));
        fs::write(&path, self.json()? + "\n").with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    pub(crate) fn json(&self) -> Result<String> {
        serde_json::to_string_pretty(self).context("numbers print as JSON")
    }

    /// What an earlier run kept.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is no result of this benchmark", path.display()))
    }
}

impl Workload {
    fn new(sample: &Sample) -> Self {
        Self {
            name: sample.name.to_owned(),
            instructions: None,
            seconds: BTreeMap::new(),
            counts: Vec::new(),
            result: sample.result.clone(),
        }
    }

    /// The median of a peer's rounds.
    fn median(&self, peer: &str) -> Option<f64> {
        self.seconds.get(peer).map(|all| Spread::of(all).median)
    }
}

/// A median, and between what it lies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// `values`: at least one.
    pub(crate) fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (lower, upper) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        Self { median: (lower + upper) / 2.0, min: sorted[0], max: sorted[sorted.len() - 1] }
    }
}

fn geometric_mean(values: &[f64]) -> Option<f64> {
    let sum: f64 = values.iter().map(|value| value.ln()).sum();
    (!values.is_empty()).then(|| (sum / values.len() as f64).exp())
}

const NAME: usize = 13;

/// The table: for each peer seconds with their spread and MIPS; then how many times as fast as each other softkvm is, round by
/// round.
pub(crate) fn table(report: &Report, peers: &[Peer]) -> String {
    let softkvm = Peer::Softkvm.to_string();
    let others: Vec<String> = peers.iter().map(Peer::to_string).filter(|peer| *peer != softkvm).collect();
    let compared = peers.contains(&Peer::Softkvm);
    let mut text = format!("{:NAME$}", "");
    for peer in peers {
        text += &format!(" {:>24} {:>6}", format!("{peer}, s"), "MIPS");
    }
    for other in others.iter().filter(|_| compared) {
        text += &format!(" {:>22}", format!("to {other}"));
    }
    text += "\n";
    let mut ratios: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for workload in &report.workloads {
        text += &format!("{:NAME$}", workload.name);
        for peer in peers {
            let Some(seconds) = workload.seconds.get(&peer.to_string()) else {
                text += &format!(" {:>24} {:>6}", "-", "-");
                continue;
            };
            let spread = Spread::of(seconds);
            let mips = workload.instructions.map(|count| format!("{:.0}", count as f64 / spread.median / 1e6));
            let cell = format!("{:.3} ({:.3}–{:.3})", spread.median, spread.min, spread.max);
            text += &format!(" {cell:>24} {:>6}", mips.as_deref().unwrap_or("-"));
        }
        for other in others.iter().filter(|_| compared) {
            let cell = match (workload.seconds.get(&softkvm), workload.seconds.get(other)) {
                (Some(ours), Some(theirs)) => {
                    let each: Vec<f64> = ours.iter().zip(theirs).map(|(ours, theirs)| theirs / ours).collect();
                    let spread = Spread::of(&each);
                    ratios.entry(other).or_default().push(spread.median);
                    format!("{:.2} ({:.2}–{:.2})", spread.median, spread.min, spread.max)
                }
                _ => "-".to_owned(),
            };
            text += &format!(" {cell:>22}");
        }
        text += "\n";
    }
    for other in others.iter().filter(|_| compared) {
        if let Some(mean) = ratios.get(other.as_str()).and_then(|all| geometric_mean(all)) {
            let factor = format!("softkvm is {mean:.2} times as fast as {other}");
            text +=
                &format!("{:NAME$} {factor}, the geometric mean of {} workloads\n", "", ratios[other.as_str()].len());
        }
    }
    text
}

/// softkvm's medians beside those of an earlier result.
pub(crate) fn comparison(new: &Report, old: &Report) -> String {
    let softkvm = Peer::Softkvm.to_string();
    let mut text = format!(
        "{:NAME$} {:>10} {:>10} {:>8}   softkvm now and at {}\n",
        "", "now, s", "then, s", "faster", old.commit
    );
    if (old.scale, &old.machine.cpu) != (new.scale, &new.machine.cpu) {
        text += "another size or another CPU: these cannot be compared\n";
    }
    let mut ratios = Vec::new();
    for workload in &new.workloads {
        let then = old.workloads.iter().find(|w| w.name == workload.name).and_then(|w| w.median(&softkvm));
        if let (Some(now), Some(then)) = (workload.median(&softkvm), then) {
            ratios.push(then / now);
            text += &format!("{:NAME$} {now:>10.3} {then:>10.3} {:>8.3}\n", workload.name, then / now);
        }
    }
    for row in &new.micro {
        let then = old.micro.iter().find(|r| (&r.name, &r.unit) == (&row.name, &row.unit)).and_then(|r| r.softkvm);
        if let (Some(now), Some(then)) = (row.softkvm, then) {
            text += &format!("{}: {now:.2} {}, was {then:.2}\n", row.name, row.unit);
        }
    }
    if let Some(mean) = geometric_mean(&ratios) {
        text += &format!("{:NAME$} {mean:.3} times as fast, the geometric mean of {} workloads\n", "", ratios.len());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(seconds: f64, instructions: Option<u64>, result: &str) -> Vec<Sample> {
        vec![Sample { name: "crc", seconds, instructions, result: result.to_owned() }]
    }

    fn report() -> Report {
        let machine = Machine::here("6.1.0-1-cloud-amd64", &[]);
        let mut report = Report::new(machine, 100);
        for (ours, theirs) in [(2.0, 1.0), (4.0, 1.0), (2.0, 2.0)] {
            report.add(Peer::Softkvm, sample(ours, Some(1_000_000_000), "1f")).expect("the same result");
            report.add(Peer::Tcg, sample(theirs, None, "1f")).expect("the same result");
        }
        report
    }

    #[test]
    fn the_table_has_medians_spreads_speeds_and_ratios() {
        let text = table(&report(), &[Peer::Softkvm, Peer::Tcg, Peer::Bochs]);
        let line = text.lines().find(|line| line.starts_with("crc")).expect("a row");
        let cells: Vec<&str> = line.split_whitespace().collect();
        // Ratios round by round: 0.5, 0.25, 1.
        assert_eq!(
            cells,
            [
                "crc",
                "2.000",
                "(2.000–4.000)",
                "500",
                "1.000",
                "(1.000–2.000)",
                "1000",
                "-",
                "-",
                "0.50",
                "(0.25–1.00)",
                "-"
            ]
        );
        assert!(text.contains("softkvm is 0.50 times as fast as tcg"), "{text}");
        assert!(!text.contains("as fast as bochs"), "{text}");
    }

    #[test]
    fn another_result_is_an_error() {
        let error = report().add(Peer::Bochs, sample(9.0, None, "20")).expect_err("1f was right").to_string();
        assert_eq!(error, "crc gives 20 on bochs, and gave 1f before");
    }

    #[test]
    fn a_kept_report_can_be_read_and_compared() {
        let old = report();
        let read: Report = serde_json::from_str(&old.json().expect("JSON")).expect("it is what was written");
        assert_eq!(read.workloads[0].seconds, old.workloads[0].seconds);
        assert_eq!(read.machine, old.machine);
        let mut new = report();
        new.workloads[0].seconds.insert("softkvm".to_owned(), vec![1.0]);
        let text = comparison(&new, &read);
        assert!(text.contains("1.000      2.000    2.000"), "{text}");
        assert!(text.contains("2.000 times as fast"), "{text}");
    }

    #[test]
    fn medians_of_even_counts_lie_between() {
        assert_eq!(Spread::of(&[4.0, 1.0, 2.0, 3.0]), Spread { median: 2.5, min: 1.0, max: 4.0 });
        assert_eq!(geometric_mean(&[2.0, 8.0]).map(f64::round), Some(4.0));
        assert_eq!(geometric_mean(&[]), None);
    }
}
