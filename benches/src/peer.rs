//! Who runs the guest: softkvm, and whom it is compared with.

use std::fmt;
use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use assets::Progress;
use assets::packages::{self, BOCHS, BOCHS_BIOS, BOCHS_DISPLAY, Need, QEMU, VGA_BIOS};
use assets::qemu::{Accel, Irqchip, Machine};
use nix::unistd::Pid;
use serde_json::Value;
use softkvm_tests::console::Console;
use softkvm_tests::softkvm;

use crate::image::{self, Image};
use crate::plain;
use crate::workload::{By, Workload};

/// One who runs a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Peer {
    /// QEMU on softkvm's /dev/kvm
    Softkvm,
    /// The same guest on softkvm's /dev/kvm in a VMM with no devices but a serial port
    Plain,
    /// QEMU on another build of softkvm: `--parent`
    Parent,
    /// QEMU's own JIT
    Tcg,
    /// Bochs, Debian's build
    Bochs,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Peer::Softkvm => "softkvm",
            Peer::Plain => "plain",
            Peer::Parent => "parent",
            Peer::Tcg => "tcg",
            Peer::Bochs => "bochs",
        })
    }
}

/// TFTP serves it to the guest: as many blocks as `udp` in work.c takes, and more.
const UDP_FILE: (&str, usize) = ("udp", 16 << 20);
/// How fast Bochs believes that it is. Its clock counts instructions, so this decides how much of them the timer's interrupts
/// take; on a machine where it is about right, as much as elsewhere.
const BOCHS_IPS: u32 = 150_000_000;

impl Peer {
    /// Installs what it needs.
    pub(crate) fn ensure(self, progress: &dyn Progress) -> Result<()> {
        let needs: &[Need] = match self {
            Peer::Softkvm | Peer::Parent | Peer::Tcg => &[QEMU],
            Peer::Plain => &[],
            Peer::Bochs => &[BOCHS, BOCHS_DISPLAY, BOCHS_BIOS, VGA_BIOS],
        };
        packages::ensure(needs, progress)
    }

    /// The plain VMM has neither disk nor network card; Bochs has none on virtio, and Debian's build of it one CPU.
    pub(crate) fn runs(self, workload: &Workload) -> bool {
        match self {
            Peer::Softkvm | Peer::Parent | Peer::Tcg => true,
            Peer::Plain => matches!(workload.by, By::Boot | By::Work),
            Peer::Bochs => workload.by != By::Virtio && workload.guest.cpus() == 1,
        }
    }

    /// Boots a guest. `parent`: the other build of softkvm.
    pub(crate) fn start(self, image: &Image, parent: Option<&Path>) -> Result<Console> {
        let on = |softkvm: &Path| {
            let mut command = Command::new(softkvm);
            command.args(["run", "--"]).args(machine(Accel::Kvm, image)?.command_line());
            Console::start(&mut command)
        };
        match self {
            Peer::Softkvm => on(softkvm::binary()?),
            Peer::Plain => Console::start(&mut plain::command(image)?),
            Peer::Parent => on(parent.context("--parent names no build of softkvm")?),
            Peer::Tcg => Console::start(&mut machine(Accel::Tcg, image)?.command()),
            Peer::Bochs => bochs(image),
        }
    }
}

/// QEMU's PC with its default places of the interrupt controllers, and the same CPU for all accelerators.
fn machine(accel: Accel, image: &Image) -> Result<Machine> {
    let folder = image::folder()?;
    let served = folder.join(UDP_FILE.0);
    if fs::metadata(&served).map_or(0, |file| file.len()) != UDP_FILE.1 as u64 {
        fs::write(&served, vec![b'u'; UDP_FILE.1]).with_context(|| format!("cannot write {}", served.display()))?;
    }
    let guest = image.guest;
    let mut machine = Machine::new(accel, guest.memory_mib()).cpus(guest.cpus()).irqchip(Irqchip::On).disk(&image.disc);
    if let Some(disk) = &image.disk {
        machine.push(["-drive"]);
        machine.push([format!("if=virtio,format=raw,snapshot=on,file={}", disk.display())]);
    }
    machine.push(["-cpu", "qemu64", "-netdev"]);
    machine.push([format!(
        "user,id=net,tftp={},guestfwd=tcp:10.0.2.100:7-cmd:cat",
        folder.to_str().context("the path of the cache is no text")?
    )]);
    // Its option ROM would only look for somebody to boot from.
    machine.push(["-device", "virtio-net-pci,netdev=net,romfile="]);
    Ok(machine)
}

/// Debian's Bochs has a debugger, which is told to continue, and no `nogui`: the display is VNC's, which nobody looks at.
/// The disc is a CD on its IDE controller; the first serial port is its stdout.
fn bochs(image: &Image) -> Result<Console> {
    let folder = image::folder()?;
    let (settings, debugger) = (folder.join("bochsrc"), folder.join("bochs-debugger"));
    let write =
        |path: &PathBuf, text: &str| fs::write(path, text).with_context(|| format!("cannot write {}", path.display()));
    write(&settings, &bochsrc(image))?;
    write(&debugger, "continue\n")?;
    let program = packages::find(BOCHS).unwrap_or_else(|| PathBuf::from(BOCHS.file));
    Console::start(Command::new(program).args(["-q", "-unlock", "-f"]).arg(settings).arg("-rc").arg(debugger))
}

fn bochsrc(image: &Image) -> String {
    let disk = image.disk.as_ref().map_or_else(String::new, |disk| {
        // Writes go to a file of its own that Bochs forgets.
        format!("ata0-slave: type=disk, path={}, mode=volatile\n", disk.display())
    });
    format!(
        "display_library: rfb, options=\"timeout=0\"\n\
         romimage: file={bios}\n\
         vgaromimage: file={vga}\n\
         cpu: model=core2_penryn_t9600, count={cpus}, ips={BOCHS_IPS}\n\
         memory: guest={memory}, host={memory}\n\
         ata0: enabled=1\n\
         ata0-master: type=cdrom, path={disc}, status=inserted\n\
         {disk}\
         boot: cdrom\n\
         clock: sync=none\n\
         com1: enabled=1, mode=file, dev=/dev/stdout\n\
         log: /dev/null\n\
         panic: action=fatal\n\
         error: action=ignore\n\
         info: action=ignore\n",
        bios = BOCHS_BIOS.file,
        vga = VGA_BIOS.file,
        cpus = image.guest.cpus(),
        memory = image.guest.memory_mib(),
        disc = image.disc.display(),
    )
}

/// Counts of the daemon below a `softkvm run`.
pub(crate) struct Counter(PathBuf);

impl Counter {
    /// `run`: the process of `softkvm run`.
    pub(crate) fn of(run: Pid) -> Result<Self> {
        for entry in fs::read_dir("/run/softkvm").context("no daemon of softkvm's answers")? {
            let path = entry?.path();
            let daemon = path.file_stem().and_then(|pid| pid.to_str()?.parse().ok()).map(Pid::from_raw);
            if path.extension().is_some_and(|kind| kind == "sock") && daemon.and_then(parent_of) == Some(run) {
                return Ok(Self(path));
            }
        }
        bail!("no daemon below process {run} answers")
    }

    /// Guest instructions, as of each vCPU's last exit.
    pub(crate) fn instructions(&self) -> Result<u64> {
        let mut text = String::new();
        UnixStream::connect(&self.0)
            .and_then(|mut socket| socket.read_to_string(&mut text))
            .with_context(|| format!("asking {}", self.0.display()))?;
        let status: Value = serde_json::from_str(&text).context("the daemon's status is no JSON")?;
        let vcpus = status["vms"].as_array().into_iter().flatten().filter_map(|vm| vm["vcpus"].as_array()).flatten();
        Ok(vcpus.filter_map(|vcpu| vcpu["instructions"].as_u64()).sum())
    }
}

/// Field 4 of proc_pid_stat(5), behind the name in parentheses.
fn parent_of(pid: Pid) -> Option<Pid> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok().map(Pid::from_raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parent_of_a_process_is_found() {
        assert_eq!(parent_of(nix::unistd::getpid()), Some(nix::unistd::getppid()));
    }

    #[test]
    fn peers_are_called_as_on_the_command_line() {
        use clap::ValueEnum;
        for peer in Peer::value_variants() {
            assert_eq!(peer.to_possible_value().expect("none is hidden").get_name(), peer.to_string());
        }
    }
}
