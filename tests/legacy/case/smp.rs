//! Four vCPUs through real mode, protected mode and long mode, woken by signals: again and again, none may hang.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::same;
use crate::guest;
use crate::kvmctl::{MAX_CPUS, Machine};
use crate::vmm::Kvm;

/// The lines of one run with `cpus` vCPUs.
pub(crate) fn once(cpus: usize) -> Result<()> {
    let kvm = Kvm::open()?;
    let lines = Machine::new(&kvm, &guest::smp())?.run(cpus, || Ok(()))?;
    // The others' own lines may be anywhere.
    let (mut others, ordered): (Vec<_>, Vec<_>) = lines.into_iter().partition(|line| line.contains("smp main"));
    others.sort();
    let expected: Vec<_> = (1..cpus).map(|cpu| format!("GUEST: smp main {cpu}")).collect();
    same!(others, expected, "lines of the other CPUs");
    let mut expected = vec![format!("GUEST: found {cpus} cpus")];
    expected.extend((0..cpus).map(|cpu| format!("GUEST: ipi called, cpu {cpu}")));
    same!(ordered, expected, "lines of {cpus} CPUs");
    Ok(())
}

pub(crate) fn repeatedly(time: Duration) -> Result<()> {
    let start = Instant::now();
    let (mut runs, mut slowest) = (0, Duration::ZERO);
    while start.elapsed() < time || runs < MAX_CPUS {
        let begin = Instant::now();
        once(MAX_CPUS - runs % MAX_CPUS)?;
        slowest = slowest.max(begin.elapsed());
        runs += 1;
    }
    println!("smp: {runs} runs in {:.1} s, the slowest {slowest:?}", start.elapsed().as_secs_f64());
    ensure!(slowest < Duration::from_secs(60), "a run was stuck for {slowest:?}");
    Ok(())
}
