//! One guest from its boot to its last workload, timed by when its lines arrive here.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use assets::iso;
use softkvm_tests::console::Console;

use crate::image::{Image, USER_SPACE};
use crate::peer::{Counter, Peer};
use crate::workload::{self, By, Workload};

/// What a workload was once seen to take.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sample {
    pub(crate) name: &'static str,
    pub(crate) seconds: f64,
    /// Guest instructions, from who counts them.
    pub(crate) instructions: Option<u64>,
    /// What the workload computed; nothing for a boot.
    pub(crate) result: String,
}

/// The lines around a workload.
pub(crate) struct Lines {
    pub(crate) begin: String,
    /// Its result follows.
    pub(crate) end: String,
}

impl Lines {
    pub(crate) fn of(name: &str) -> Self {
        Self { begin: format!("BEGIN {name}"), end: format!("END {name} ") }
    }
}

/// Nothing of one guest takes longer, even on Bochs and on a machine that has more to do.
const LIMIT: Duration = Duration::from_secs(1800);

/// Boots a guest and runs those of its workloads that the peer can; tells `progress` of each that begins.
pub(crate) fn run(
    peer: Peer,
    image: &Image,
    parent: Option<&Path>,
    workloads: &[Workload],
    progress: impl Fn(&str),
) -> Result<Vec<Sample>> {
    let mut console = peer.start(image, parent)?;
    samples(&mut console, peer, workloads, progress).with_context(|| format!("a guest on {peer}"))
}

fn samples(console: &mut Console, peer: Peer, workloads: &[Workload], progress: impl Fn(&str)) -> Result<Vec<Sample>> {
    progress("firmware");
    console.expect(iso::ENTERING, LIMIT)?;
    progress(workload::BOOT);
    let entered = Instant::now();
    let counter = match peer {
        Peer::Softkvm | Peer::Plain | Peer::Parent => Some(Counter::of(console.pid())?),
        Peer::Tcg | Peer::Bochs => None,
    };
    let count = || counter.as_ref().map(Counter::instructions).transpose();
    let mut before = count()?;
    // The guest waits behind each workload, so that its count is complete.
    let mut executed = || -> Result<Option<u64>> {
        let now = count()?;
        let since = now.zip(before).map(|(now, before)| now - before);
        before = now;
        Ok(since)
    };
    let mut samples = Vec::new();
    console.expect(USER_SPACE, LIMIT)?;
    let seconds = entered.elapsed().as_secs_f64();
    samples.push(Sample { name: workload::BOOT, seconds, instructions: executed()?, result: String::new() });
    for workload in workloads.iter().filter(|w| w.by != By::Boot && peer.runs(w)) {
        let lines = Lines::of(workload.name);
        console.expect(&lines.begin, LIMIT)?;
        let began = Instant::now();
        progress(workload.name);
        executed()?;
        console.expect(&lines.end, LIMIT)?;
        let seconds = began.elapsed().as_secs_f64();
        let result = console.expect("\n", LIMIT)?.trim().to_owned();
        samples.push(Sample { name: workload.name, seconds, instructions: executed()?, result });
    }
    samples.retain(|sample| workloads.iter().any(|w| w.name == sample.name));
    Ok(samples)
}
