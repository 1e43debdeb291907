//! The bare API, by a VMM of our own: what an exit costs, and a VM.

use std::ffi::OsStr;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use kvm_ioctls::Kvm;
use softkvm_tests::softkvm;
use tiny_vmm::code_asm::*;
use tiny_vmm::{Guest, Mode, VcpuExit, assemble};

use crate::costs::repeat;
use crate::row::Row;
use crate::undisturbed::micros_each;

const OUT: &str = "exit round trip, OUT, tiny VMM";
const IN: &str = "exit round trip, IN, tiny VMM";
const MMIO: &str = "exit round trip, MMIO read, tiny VMM";
const MMIO_WRITE: &str = "exit round trip, MMIO write, tiny VMM";
const HLT: &str = "exit round trip, HLT, tiny VMM";
/// Behind the names of the rows measured without placement.
const UNPLACED: &str = ", unplaced";
const FIRST: &str = "KVM_CREATE_VM to the first instruction";
const LOOP: &str = "tight loop, tiny VMM";
pub(crate) const NAMES: &[&str] = &[OUT, IN, MMIO, MMIO_WRITE, HLT, FIRST, LOOP];

const RAM: usize = 2 << 20;
const ITERATIONS: u32 = 200_000_000;

/// Measures in a process that sees softkvm's /dev/kvm; exits once more with all threads left to the scheduler.
pub(crate) fn measure_inside_softkvm() -> Result<Vec<Row>> {
    let mut rows = inside(&[], Part::Exits)?;
    let unplaced =
        inside(&["--no-placement"], Part::Exits)?.into_iter().filter(|row| [OUT, MMIO].contains(&row.name.as_str()));
    rows.extend(unplaced.map(|row| Row { name: row.name + UNPLACED, ..row }));
    Ok(rows)
}

/// What is measured together in a process of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Part {
    Exits,
    Costs,
    Latency,
    Scale,
}

/// The rows of a process that sees softkvm's /dev/kvm: this program with `--inside PART`.
pub(crate) fn inside(options: &[&str], part: Part) -> Result<Vec<Row>> {
    let part = part.to_possible_value().expect("none is hidden");
    let part: &OsStr = part.get_name().as_ref();
    let me = std::env::current_exe().context("our own path")?;
    let output = softkvm::run(options, &[me.as_os_str(), "--inside".as_ref(), part])?
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start softkvm")?;
    if !output.status.success() {
        bail!("the measuring process under softkvm ended with {}", output.status);
    }
    serde_json::from_slice(&output.stdout).context("the measuring process printed no rows")
}

/// Measures on the /dev/kvm that is there.
pub(crate) fn measure() -> Result<Vec<Row>> {
    Ok(vec![
        Row::new(OUT, "µs", Some(round_trip(|a| a.out(dx, al))?), None),
        Row::new(IN, "µs", Some(round_trip(|a| a.in_(al, dx))?), None),
        Row::new(MMIO, "µs", Some(round_trip(|a| a.mov(al, byte_ptr(rbx)))?), None),
        Row::new(MMIO_WRITE, "µs", Some(round_trip(|a| a.mov(byte_ptr(rbx), al))?), None),
        Row::new(HLT, "µs", Some(round_trip(|a| a.hlt())?), None),
        Row::new(FIRST, "µs", Some(first_instruction()?), None),
        Row::new(LOOP, "MIPS", Some(tight_loop()?), None),
    ])
}

/// Microseconds per turn of a loop whose body exits once.
fn round_trip(body: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Result<f64> {
    let code = assemble(Mode::Long, |a| {
        let mut again = a.create_label();
        // A port and a page that are nobody's: the page is just behind RAM.
        a.mov(edx, 0x80)?;
        a.mov(ebx, u32::try_from(RAM).expect("RAM ends below 4 GiB"))?;
        a.set_label(&mut again)?;
        body(a)?;
        a.jmp(again)
    })?;
    let mut guest = Guest::new(Mode::Long, RAM, &code)?;
    micros_each(|count| exits(&mut guest, count))
}

fn exits(guest: &mut Guest, count: u32) -> Result<()> {
    for _ in 0..count {
        match guest.run().context("KVM_RUN")? {
            VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..) | VcpuExit::Hlt => {}
            VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data) => data.fill(0),
            other => bail!("an unexpected exit: {other:?}"),
        }
    }
    Ok(())
}

/// Microseconds from `KVM_CREATE_VM` to the exit of a guest whose first instruction is HLT; the median of several.
fn first_instruction() -> Result<f64> {
    const ROUNDS: usize = 21;
    let code = assemble(Mode::Long, |a| a.hlt())?;
    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    let mut times = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let started = Instant::now();
        let mut guest = Guest::on(&kvm, Mode::Long, RAM, &code)?;
        match guest.run().context("KVM_RUN")? {
            VcpuExit::Hlt => times.push(micros(started.elapsed())),
            other => bail!("an unexpected exit: {other:?}"),
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[ROUNDS / 2])
}

/// Guest instructions per microsecond in `dec; jnz`.
fn tight_loop() -> Result<f64> {
    let code = assemble(Mode::Long, |a| {
        repeat(a, ITERATIONS, |_| Ok(()))?;
        a.hlt()
    })?;
    let mut guest = Guest::new(Mode::Long, RAM, &code)?;
    let started = Instant::now();
    match guest.run().context("KVM_RUN")? {
        VcpuExit::Hlt => Ok(2.0 * f64::from(ITERATIONS) / micros(started.elapsed())),
        other => bail!("an unexpected exit: {other:?}"),
    }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
