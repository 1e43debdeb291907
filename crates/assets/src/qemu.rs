//! The QEMU command lines that are used everywhere, so that demo, tests and benchmarks boot the same machine.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::packages::{self, QEMU};

/// What executes the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// /dev/kvm: softkvm, when QEMU is started by `softkvm run`.
    Kvm,
    /// QEMU's own JIT, for comparison.
    Tcg,
}

/// Where a machine on KVM has its interrupt controllers and timers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Irqchip {
    /// In QEMU.
    Off,
    /// In the kernel, as QEMU's default has it.
    On,
    /// Local APICs in the kernel, the rest in QEMU.
    Split,
}

/// QEMU's machine types for x86.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Board {
    /// A PC of 1996: i440FX, PCI.
    Pc,
    /// A PC of 2009: PCI Express.
    Q35,
    /// Without PCI: devices on virtio-mmio.
    Microvm,
}

/// QEMU's PC without display: the first serial port is on stdin and stdout (multiplexed with the monitor, Ctrl-A C).
#[derive(Debug, Clone)]
pub struct Machine {
    accel: Accel,
    /// QEMU's name of a disk on virtio.
    disk: &'static str,
    args: Vec<std::ffi::OsString>,
}

/// What every boot of Linux here is told. `panic=-1` reboots at once on a panic, which `-no-reboot` makes the end of
/// QEMU: a guest that dies never hangs the caller.
pub const LINUX_COMMAND_LINE: &str = "console=ttyS0 panic=-1";

impl Machine {
    /// A PC with `memory_mib` of RAM and nothing to boot from. All interrupt controllers and timers are QEMU's.
    pub fn new(accel: Accel, memory_mib: u32) -> Self {
        let mut machine = Self { accel, disk: "virtio-blk-pci", args: Vec::new() };
        match accel {
            Accel::Kvm => machine.push(["-accel", "kvm", "-machine", "pc,kernel-irqchip=off"]),
            Accel::Tcg => machine.push(["-accel", "tcg", "-machine", "pc"]),
        }
        machine.push(["-m", &memory_mib.to_string(), "-nographic", "-no-reboot"]);
        machine
    }

    /// Adds arguments.
    pub fn push<I: IntoIterator<Item: AsRef<std::ffi::OsStr>>>(&mut self, args: I) {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
    }

    /// Interrupt controllers elsewhere than [`Machine::new`] has them. QEMU's own JIT knows no difference.
    pub fn irqchip(mut self, irqchip: Irqchip) -> Self {
        let place = match irqchip {
            Irqchip::Off => "kernel-irqchip=off",
            Irqchip::On => "kernel-irqchip=on",
            Irqchip::Split => "kernel-irqchip=split",
        };
        if self.accel == Accel::Kvm {
            self.push(["-machine", place]);
        }
        self
    }

    /// Another machine than the PC of [`Machine::new`].
    ///
    /// A microvm has its disk on a second I/O APIC, which is QEMU's own wherever the first one is. With all others in the
    /// kernel it never hears that a level-triggered interrupt has ended, and delivers no second one: KVM tells of that
    /// only where the controllers are split (`kvm_ioapic_send_eoi` in Linux's lapic.c). So there is no second one then.
    pub fn board(mut self, board: Board, irqchip: Irqchip) -> Self {
        let name = match board {
            Board::Pc => "pc",
            Board::Q35 => "q35",
            Board::Microvm if irqchip == Irqchip::On => "microvm,ioapic2=off",
            Board::Microvm => "microvm",
        };
        if board == Board::Microvm {
            self.disk = "virtio-blk-device";
        }
        self.push(["-machine", name]);
        self.irqchip(irqchip)
    }

    /// Pages that the guest writes are told in rings of `entries`, one for each processor. QEMU's own JIT has none.
    pub fn dirty_rings(mut self, entries: u32) -> Self {
        if self.accel == Accel::Kvm {
            let kvm = self.args.iter_mut().find(|arg| *arg == "kvm").expect("the accelerator that `new` put there");
            *kvm = format!("kvm,dirty-ring-size={entries}").into();
        }
        self
    }

    /// That many processors.
    pub fn cpus(mut self, count: u32) -> Self {
        self.push(["-smp", &count.to_string()]);
        self
    }

    /// Boots `kernel` and `initrd` without a boot loader. `options` go behind [`LINUX_COMMAND_LINE`].
    pub fn linux(mut self, kernel: &Path, initrd: &Path, options: &str) -> Self {
        let append = format!("{LINUX_COMMAND_LINE} {options}");
        self.push(["-kernel".as_ref(), kernel.as_os_str(), "-initrd".as_ref(), initrd.as_os_str()]);
        self.push(["-append", append.trim_end()]);
        self
    }

    /// A CD in the drive.
    pub fn cdrom(mut self, iso: &Path) -> Self {
        self.push(["-cdrom".as_ref(), iso.as_os_str()]);
        self
    }

    /// The image as a hard disk on virtio, which moves by DMA what a CD moves by port I/O.
    pub fn disk(mut self, image: &Path) -> Self {
        self.push(["-drive"]);
        self.push([format!("if=virtio,format=raw,readonly=on,file={}", image.display())]);
        self
    }

    /// The raw image as a disk on virtio. What the guest writes is forgotten with QEMU. Not before [`Machine::board`].
    pub fn scratch_disk(self, image: &Path) -> Self {
        self.drive(&format!("format=raw,snapshot=on,file={}", image.display()))
    }

    /// A disk on virtio that keeps what the guest writes, and snapshots of the machine. Not before [`Machine::board`].
    pub fn qcow2_disk(self, image: &Path) -> Self {
        self.drive(&format!("format=qcow2,file={}", image.display()))
    }

    fn drive(mut self, options: &str) -> Self {
        let device = format!("{},drive=disk", self.disk);
        self.push(["-drive", &format!("if=none,id=disk,{options}"), "-device", &device]);
        self
    }

    /// Program and arguments.
    pub fn command_line(&self) -> Vec<std::ffi::OsString> {
        let program = packages::find(QEMU).unwrap_or_else(|| PathBuf::from(QEMU.file));
        std::iter::once(program.into_os_string()).chain(self.args.iter().cloned()).collect()
    }

    /// The machine as a process of its own, without softkvm.
    pub fn command(&self) -> Command {
        let line = self.command_line();
        let mut command = Command::new(&line[0]);
        command.args(&line[1..]);
        command
    }
}
