//! A boot sector as the common image: the same loops in QEMU on softkvm and in QEMU on its JIT.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use assets::qemu::{Accel, Machine};
use assets::{Quiet, packages};
use iced_x86::IcedError;
use softkvm_tests::console::Console;
use softkvm_tests::softkvm;
use tiny_vmm::code_asm::*;

use crate::row::Row;

const LOOP: &str = "tight loop, boot sector in QEMU";
const OUT: &str = "OUT to port 0x80, boot sector in QEMU";
const MMIO: &str = "MMIO read of VGA, boot sector in QEMU";
pub(crate) const NAMES: &[&str] = &[LOOP, OUT, MMIO];

const ITERATIONS: u32 = 100_000_000;
const EXITS: u32 = 100_000;
/// Where the BIOS puts the sector.
const ORIGIN: u64 = 0x7c00;
const SECTOR: usize = 512;
const SERIAL: u32 = 0x3f8;

pub(crate) fn measure() -> Result<Vec<Row>> {
    packages::ensure(&[packages::QEMU], &Quiet)?;
    let image = image()?;
    let ours = run(Accel::Kvm, &image)?;
    let tcg = run(Accel::Tcg, &image)?;
    let instructions = 2.0 * f64::from(ITERATIONS);
    let mips = |time: Duration| instructions / (time.as_secs_f64() * 1e6);
    let each = |time: Duration| time.as_secs_f64() * 1e6 / f64::from(EXITS);
    Ok(vec![
        Row::new(LOOP, "MIPS", Some(mips(ours[0])), Some(mips(tcg[0]))),
        Row::new(OUT, "µs", Some(each(ours[1])), Some(each(tcg[1]))),
        Row::new(MMIO, "µs", Some(each(ours[2])), Some(each(tcg[2]))),
    ])
}

/// The time of each phase: between the marks that the guest writes to its serial port.
fn run(accel: Accel, image: &Path) -> Result<[Duration; 3]> {
    const LIMIT: Duration = Duration::from_secs(120);
    let mut machine = Machine::new(accel, 64);
    machine.push(["-nic", "none", "-drive"]);
    machine.push([format!("format=raw,file={}", image.display())]);
    let mut command = match accel {
        Accel::Tcg => machine.command(),
        Accel::Kvm => softkvm::run::<&str, _>(&[], &machine.command_line())?,
    };
    let mut console = Console::start(&mut command)?;
    let mut last = Instant::now();
    let mut times = [Duration::ZERO; 4];
    for (time, mark) in times.iter_mut().zip(MARKS) {
        console.expect(mark, LIMIT)?;
        let now = Instant::now();
        *time = now - last;
        last = now;
    }
    Ok([times[1], times[2], times[3]])
}

/// The first one ends the boot, each other ends a phase.
const MARKS: [&str; 4] = ["<0>", "<1>", "<2>", "<3>"];

fn image() -> Result<PathBuf> {
    let mut sector = code().context("the boot sector does not assemble")?;
    assert!(sector.len() <= SECTOR - 2, "the code must leave room for the signature");
    sector.resize(SECTOR, 0);
    sector[SECTOR - 2..].copy_from_slice(&[0x55, 0xaa]);
    // QEMU wants a drive to be more than a sector.
    sector.resize(1 << 20, 0);
    let path = assets::cache()?.join("bench-sector.img");
    fs::write(&path, sector).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

fn code() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(16)?;
    a.cli()?;
    mark(&mut a, MARKS[0])?;
    repeat(&mut a, ITERATIONS, |_| Ok(()))?;
    mark(&mut a, MARKS[1])?;
    repeat(&mut a, EXITS, |a| a.out(0x80, al))?;
    mark(&mut a, MARKS[2])?;
    // In text mode the first half of VGA's window answers with nothing, and not from RAM.
    a.mov(ax, 0xa000)?;
    a.mov(ds, ax)?;
    repeat(&mut a, EXITS, |a| a.mov(al, byte_ptr(0)))?;
    mark(&mut a, MARKS[3])?;
    let mut end = a.create_label();
    a.set_label(&mut end)?;
    a.hlt()?;
    a.jmp(end)?;
    a.assemble(ORIGIN)
}

fn mark(a: &mut CodeAssembler, text: &str) -> Result<(), IcedError> {
    a.mov(dx, SERIAL)?;
    for byte in text.bytes() {
        a.mov(al, u32::from(byte))?;
        a.out(dx, al)?;
    }
    Ok(())
}

fn repeat(
    a: &mut CodeAssembler,
    times: u32,
    body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.mov(ecx, times)?;
    a.set_label(&mut again)?;
    body(a)?;
    a.dec(ecx)?;
    a.jnz(again)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_fits_into_a_sector() {
        assert!(code().expect("it assembles").len() <= SECTOR - 2);
    }
}
