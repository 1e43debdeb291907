//! Clients of /dev/kvm that call it as today's VMMs do: one program, a row of a table for each of them.
//!
//! `vmms STYLE key=value…` boots a kernel in the manner of that VMM, with a disk on virtio, and ends with status 0 when the
//! guest has asked for a reset. What the guest writes to its serial port is on stdout.
//!
//! What a style does in which order is the VMM's own; the rows are in [`style`]. Where the guest's kernel lacks what the
//! VMM counts on, the row says so.

mod block;
mod boot;
mod bus;
mod devices;
mod filter;
mod ioapic;
mod kick;
mod machine;
mod mmio;
mod pci;
mod ram;
mod routes;
mod style;
mod vcpu;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

/// What to boot, from the command line.
#[derive(Debug, Default)]
struct Files {
    /// The kernel as an ELF file.
    vmlinux: PathBuf,
    /// The same as distributions ship it.
    bzimage: PathBuf,
    /// The archive with the first user space.
    initrd: PathBuf,
    /// The image of the disk.
    disk: PathBuf,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vmms: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let names: Vec<_> = style::STYLES.iter().map(|style| style.name).collect();
    let usage = || format!("vmms STYLE vmlinux=… bzimage=… initrd=… disk=…: the styles are {}", names.join(" "));
    let name = arguments.next().with_context(usage)?;
    let style = style::STYLES.iter().find(|style| style.name == name).with_context(usage)?;
    let mut files = Files::default();
    for argument in arguments {
        match argument.split_once('=').with_context(usage)? {
            ("vmlinux", path) => files.vmlinux = path.into(),
            ("bzimage", path) => files.bzimage = path.into(),
            ("initrd", path) => files.initrd = path.into(),
            ("disk", path) => files.disk = path.into(),
            (key, _) => bail!("{key}: {}", usage()),
        }
    }
    machine::run(style, &files)
}
