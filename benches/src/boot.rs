//! The demo's boot: Debian's cloud kernel to user space and off again.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use assets::qemu::{Accel, Machine};
use assets::{Quiet, initramfs, kernel, packages};
use softkvm_tests::console::Console;
use softkvm_tests::softkvm;
use softkvm_tests::summary::Summary;

use crate::row::Row;

const WALL: &str = "boot to user space and off";
const MIPS: &str = "speed of the boot";
const COUNT: &str = "guest instructions of the boot";
pub(crate) const NAMES: &[&str] = &[WALL, MIPS, COUNT];

pub(crate) fn measure() -> Result<Vec<Row>> {
    packages::ensure(&[packages::QEMU], &Quiet)?;
    let (kernel, initrd) = (kernel::ensure(&Quiet)?, initramfs::ensure(&Quiet)?);
    let machine = |accel| Machine::new(accel, 256).linux(&kernel.image(), &initrd, "");
    let report = assets::cache()?.join(format!("bench-{}.json", std::process::id()));
    let options = ["--summary".as_ref(), report.as_os_str()];
    let ours = boot(Console::start(&mut softkvm::run(&options, &machine(Accel::Kvm).command_line())?)?)?;
    let summary = Summary::read(&report)?;
    std::fs::remove_file(&report)?;
    let tcg = boot(Console::start(&mut machine(Accel::Tcg).command())?)?;
    Ok(vec![
        Row::new(WALL, "s", Some(ours.as_secs_f64()), Some(tcg.as_secs_f64())),
        Row::new(MIPS, "MIPS", Some(summary.mips()), None),
        Row::new(COUNT, "millions", Some(summary.instructions as f64 / 1e6), None),
    ])
}

fn boot(mut console: Console) -> Result<Duration> {
    const LIMIT: Duration = Duration::from_secs(300);
    let started = Instant::now();
    let status = console.finish(LIMIT)?;
    let took = started.elapsed();
    if !status.success() || !console.text().contains(initramfs::BOOTED) {
        bail!("the boot failed ({status})\n{}", console.tail());
    }
    Ok(took)
}
