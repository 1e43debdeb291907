//! VMMs of today, by what they ask of /dev/kvm: each boots Debian's kernel to user space, reads and writes its disk there, and
//! ends when the guest asks for a reset.
//!
//! What is expected is the disk's own bytes: the guest prints the sum of what it reads, and copies the first half of the
//! disk over the second.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use assets::initramfs::Archive;
use assets::kernel::Kernel;
use assets::packages::{self, BUSYBOX};
use assets::{Quiet, kernel};
use softkvm_tests::console::Console;
use softkvm_tests::{foreign, long, softkvm};

/// Generous: a loaded machine must not fail a style.
const WITHIN: Duration = Duration::from_secs(180);

const DISK: usize = 1 << 20;

/// Modules without which Debian's kernel sees no disk, in the order that they need one another.
const MODULES: &[&str] = &[
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_mmio",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci",
    "drivers/block/virtio_blk",
];

const INIT: &str = "\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
for module in $($b cat /modules/order); do $b insmod /modules/$module.ko; done
i=0
while [ ! -b /dev/vda ] && [ $i -lt 100 ]; do $b usleep 50000; i=$((i+1)); done
echo \"PROCESSORS $($b nproc)\"
echo \"BEFORE $($b sha256sum < /dev/vda)\"
$b dd if=/dev/vda of=/tmp/half bs=64k count=8 2>/dev/null
$b dd if=/tmp/half of=/dev/vda bs=64k seek=8 conv=fsync 2>/dev/null
echo 3 > /proc/sys/vm/drop_caches
echo \"AFTER $($b sha256sum < /dev/vda)\"
$b grep -E 'virtio|ttyS0|LOC|CPU0' /proc/interrupts
$b reboot -f
";

fn initramfs(kernel: &Kernel) -> Vec<u8> {
    packages::ensure(&[BUSYBOX], &Quiet).expect("busybox");
    let mut archive = Archive::new();
    for folder in ["bin", "dev", "proc", "sys", "tmp", "modules"] {
        archive.directory(folder);
    }
    archive.char_device("dev/console", 5, 1);
    archive.file("bin/busybox", 0o755, &read(&packages::find(BUSYBOX).expect("busybox was ensured")));
    archive.file("init", 0o755, INIT.as_bytes());
    let names = MODULES.iter().map(|path| path.rsplit('/').next().expect("a path has a last part"));
    archive.file("modules/order", 0o644, names.clone().collect::<Vec<_>>().join(" ").as_bytes());
    for (path, name) in MODULES.iter().zip(names) {
        let module = kernel.modules().join("kernel").join(path).with_extension("ko");
        archive.file(&format!("modules/{name}.ko"), 0o644, &read(&module));
    }
    archive.finish()
}

fn read(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|err| panic!("{}: {err}", path.display()))
}

/// A folder that goes when this does.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// As busybox prints it in the guest, by coreutils here.
fn sha256(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().expect("sha256sum");
    assert!(output.status.success(), "sha256sum {}", path.display());
    String::from_utf8(output.stdout).expect("digits").split_whitespace().next().expect("a sum").to_owned()
}

fn boots(style: &str, processors: u32) {
    // One after the other: each has the machine for itself, and its time means something.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = Folder(std::env::temp_dir().join(format!("softkvm-vmms-{style}-{}", std::process::id())));
    fs::create_dir_all(&folder.0).expect("a temporary folder");
    let kernel = kernel::ensure(&Quiet).expect("the kernel");
    let (initrd, disk) = (folder.0.join("initramfs"), folder.0.join("disk"));
    fs::write(&initrd, initramfs(&kernel)).expect("the initramfs");
    // No two sectors are alike.
    let words = (0..DISK as u64 / 8).map(|word| (word + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mut image: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
    fs::write(&disk, &image).expect("the disk");
    let before = sha256(&disk);

    let file = |key: &str, path: &Path| format!("{key}={}", path.display());
    let line = [
        env!("CARGO_BIN_EXE_vmms").to_owned(),
        style.to_owned(),
        file("vmlinux", &kernel.vmlinux().expect("the kernel's ELF file")),
        file("bzimage", &kernel.image()),
        file("initrd", &initrd),
        file("disk", &disk),
    ];
    let begin = Instant::now();
    let mut console = Console::start(&mut softkvm::client(&[], &line).expect("softkvm")).expect("it starts");
    let status = console.finish(WITHIN).expect("the guest asks for a reset");
    let took = begin.elapsed();
    let text = console.text();
    assert!(status.success(), "{style}: {status}\n{}", console.tail());
    println!("{style}: {took:.1?}\n{text}");

    let said = |what: &str| {
        let line = text.lines().find_map(|line| line.trim_end().strip_prefix(what));
        line.and_then(|rest| rest.split_whitespace().next()).unwrap_or_else(|| panic!("no {what}\n{}", console.tail()))
    };
    assert_eq!(said("PROCESSORS "), processors.to_string());
    assert_eq!(said("BEFORE "), before, "the guest read something else than the disk holds");
    let (first, second) = image.split_at_mut(DISK / 2);
    second.copy_from_slice(first);
    assert!(read(&disk) == image, "the guest wrote something else than it read");
    assert_eq!(said("AFTER "), sha256(&disk), "the guest read something else than it wrote");
}

/// libkrun itself, from crates.io, with Debian's kernel in the place of its own: that one is a shared object which is not
/// there. Debian's kernel finds none of libkrun's devices but the serial port, so it reads no disk.
#[test]
fn the_real_libkrun() {
    if !long() {
        println!("skipped: the long form builds libkrun");
        return;
    }
    const LIBKRUN: &str = "libkrun = { version = \"=1.19.7\", default-features = false }";
    let program = foreign::program("krun-client", LIBKRUN, include_str!("foreign/krun.rs")).expect("libkrun builds");
    let folder = Folder(std::env::temp_dir().join(format!("softkvm-vmms-krun-{}", std::process::id())));
    fs::create_dir_all(&folder.0).expect("a temporary folder");
    let kernel = kernel::ensure(&Quiet).expect("the kernel");
    let initrd = assets::initramfs::ensure(&Quiet).expect("the initramfs");
    let vmlinux = kernel.vmlinux().expect("the kernel's ELF file");
    let line = [program.as_os_str(), vmlinux.as_os_str(), initrd.as_os_str()];
    let mut console = Console::start(&mut softkvm::client(&[], &line).expect("softkvm")).expect("it starts");
    console.expect(assets::initramfs::BOOTED, WITHIN).expect("user space");
    println!("{}", console.text());
}

macro_rules! styles {
    ($($test:ident $name:literal $processors:literal;)*) => {
        $(#[test] fn $test() { boots($name, $processors); })*
    };
}

styles! {
    firecracker "firecracker" 2;
    firecracker_restored "firecracker-restored" 1;
    libkrun "libkrun" 2;
    cloud_hypervisor "cloud-hypervisor" 2;
    crosvm "crosvm" 2;
    kvmtool "kvmtool" 1;
}
