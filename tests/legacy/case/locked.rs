//! Locked instructions are atomic between vCPUs, and against the VMM's own threads. SDM Vol. 3 "Locked Atomic
//! Operations": also where an operand crosses a cache line or a page.

use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::same;
use crate::guest::{self, ADDENDS, FAR_HALVES, locked_rounds, race};
use crate::kvmctl::{MAX_CPUS, Machine};
use crate::vmm::{Kvm, Ram};

/// Threads of the VMM that add.
const THREADS: u64 = 2;
/// For all CPUs to come to the barrier.
const ARRIVAL: Duration = Duration::from_secs(60);

pub(crate) fn exact(_time: Duration) -> Result<()> {
    for cpus in [MAX_CPUS, 2] {
        once(cpus).with_context(|| format!("{cpus} CPUs"))?;
    }
    Ok(())
}

fn once(cpus: usize) -> Result<()> {
    let machine = Machine::new(&Kvm::open()?, &guest::locked())?;
    let lines = machine.run(cpus, || {
        let start = Instant::now();
        while machine.ram.u32(race::ARRIVED).load(Acquire) < cpus as u32 {
            ensure!(start.elapsed() < ARRIVAL, "not all CPUs are there");
            std::thread::yield_now();
        }
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| add(&machine.ram));
            }
        });
        println!("{} of {cpus} CPUs finished before the VMM's threads", machine.ram.u32(race::FINISHED).load(Acquire));
        Ok(())
    })?;
    same!(lines, Vec::<String>::new(), "lines");
    let wrong: Vec<_> = ADDENDS
        .iter()
        .filter_map(|addend| {
            let rounds = locked_rounds() * (cpus as u64 + if addend.shared { THREADS } else { 0 });
            let (found, expected) = (u64::from_le_bytes(machine.ram.read(addend.at)), rounds * addend.by);
            (found != expected).then(|| format!("{}: {found} is not {expected}", addend.name))
        })
        .collect();
    same!(wrong, Vec::<String>::new(), "sums");
    let [low, high] = FAR_HALVES.map(|at| u64::from(u32::from_le_bytes(machine.ram.read(at))));
    same!(low | high << 32, cpus as u64 * locked_rounds(), "LOCK INC across two frames");
    Ok(())
}

fn add(ram: &Ram) {
    for _ in 0..locked_rounds() {
        for addend in ADDENDS.iter().filter(|addend| addend.shared) {
            match (addend.at % 8, addend.name) {
                (0, "LOCK CMPXCHG") => {
                    let word = ram.u64(addend.at);
                    let mut old = word.load(Relaxed);
                    while let Err(found) = word.compare_exchange_weak(old, old + addend.by, Relaxed, Relaxed) {
                        old = found;
                    }
                }
                (0, _) => drop(ram.u64(addend.at).fetch_add(addend.by, Relaxed)),
                _ => ram.locked_add(addend.at, addend.by),
            }
        }
    }
}
