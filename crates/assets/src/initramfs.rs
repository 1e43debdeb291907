//! The guest's first user space: busybox and two scripts, in a cpio archive written here.
//!
//! Written here and not by cpio(1), because an archive may name device nodes that only root could make as files.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::kernel::Kernel;
use crate::packages::{self, BUSYBOX};
use crate::{Progress, store};

/// Printed by `/init`, then the uptime in seconds.
pub const BOOTED: &str = "BOOTED";

/// Proves user space and powers off.
const INIT: &str = "\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
read up idle < /proc/uptime
echo \"BOOTED after $up s of guest time: $($b uname -s -r -m)\"
$b poweroff -f
";

/// `rdinit=/shell`: the same up to a prompt; the guest powers off when the shell ends.
const SHELL: &str = "\
#!/bin/busybox sh
b=/bin/busybox
$b --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
read up idle < /proc/uptime
echo \"BOOTED after $up s of guest time: $(uname -s -r -m)\"
echo 'A shell of busybox. `exit` powers the guest off; Ctrl-A X ends QEMU at once.'
export PATH=/bin HOME=/ PS1='softkvm guest # '
setsid cttyhack sh
poweroff -f
";

/// Drivers of disks on virtio, each behind those that it needs. The file systems are in Debian's cloud kernel.
const VIRTIO: &[&str] = &[
    "virtio/virtio_ring",
    "virtio/virtio",
    "virtio/virtio_pci_modern_dev",
    "virtio/virtio_pci_legacy_dev",
    "virtio/virtio_pci",
    "virtio/virtio_mmio",
    "block/virtio_blk",
];

/// Before what uses the disk. It shows up some time after its driver.
const DISK: &str = "\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
while read module; do $b insmod $module; done < /modules
until [ -b /dev/vda ]; do $b usleep 20000; done
";

/// A kernel command line option that starts the shell instead of `/init`.
pub const SHELL_OPTION: &str = "rdinit=/shell";

/// The image, in the cache.
pub fn ensure(progress: &dyn Progress) -> Result<PathBuf> {
    let mut archive = with_busybox(progress)?;
    archive.file("init", 0o755, INIT.as_bytes());
    archive.file("shell", 0o755, SHELL.as_bytes());
    store("initramfs", "cpio", &archive.finish())
}

/// An image whose `init` begins once the first disk on virtio is there, as `/dev/vda`. It is a script for busybox, which is
/// `$b`; proc, sysfs and devtmpfs are mounted. In the cache.
pub fn with_disk(kernel: &Kernel, init: &str, progress: &dyn Progress) -> Result<PathBuf> {
    let mut archive = with_busybox(progress)?;
    let mut list = String::new();
    for (index, driver) in VIRTIO.iter().enumerate() {
        let module = kernel.modules().join(format!("kernel/drivers/{driver}.ko"));
        let content = fs::read(&module).with_context(|| format!("cannot read {}", module.display()))?;
        archive.file(&format!("{index}.ko"), 0o644, &content);
        list.push_str(&format!("/{index}.ko\n"));
    }
    archive.file("modules", 0o644, list.as_bytes());
    archive.file("init", 0o755, format!("{DISK}{init}").as_bytes());
    store("initramfs-disk", "cpio", &archive.finish())
}

fn with_busybox(progress: &dyn Progress) -> Result<Archive> {
    packages::ensure(&[BUSYBOX], progress)?;
    let path = packages::find(BUSYBOX).context("busybox is not in PATH")?;
    let busybox = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut archive = Archive::new();
    for dir in ["bin", "dev", "proc", "sys", "tmp", "root", "etc"] {
        archive.directory(dir);
    }
    // The kernel opens it for /init before anything can be mounted. Numbers: Linux's devices.txt.
    archive.char_device("dev/console", 5, 1);
    archive.file("bin/busybox", 0o755, &busybox);
    Ok(archive)
}

/// A cpio archive in the format that Linux unpacks: "newc", described in the kernel's
/// `Documentation/driver-api/early-userspace/buffer-format.rst`.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

const S_IFREG: u32 = 0o100_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFLNK: u32 = 0o120_000;

impl Archive {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// A folder with mode 0755. Parents first.
    pub fn directory(&mut self, path: &str) {
        self.entry(path, S_IFDIR | 0o755, (0, 0), &[]);
    }

    /// A file of root's. `mode`: the permission bits.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entry(path, S_IFREG | mode, (0, 0), content);
    }

    /// A symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.entry(path, S_IFLNK | 0o777, (0, 0), target.as_bytes());
    }

    /// A character device with mode 0600.
    pub fn char_device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, S_IFCHR | 0o600, (major, minor), &[]);
    }

    /// The archive's bytes.
    pub fn finish(mut self) -> Vec<u8> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        self.inode += 1;
        let size = u32::try_from(content.len()).expect("the format ends at 4 GiB, and so does busybox");
        let name_size = u32::try_from(path.len() + 1).expect("paths here are short");
        // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    /// Headers and contents begin at multiples of 4 bytes.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_print_the_marker() {
        for script in [INIT, SHELL] {
            assert!(script.contains(&format!("echo \"{BOOTED} after")));
        }
    }

    #[test]
    fn entries_are_aligned_and_end_with_the_trailer() {
        let mut archive = Archive::new();
        archive.file("a", 0o644, b"12345");
        let bytes = archive.finish();
        // Header 110, name 2 → 112; content 5 → 117, padded to 120; trailer header 110, name 11 → 241, padded.
        assert_eq!(bytes.len(), 244);
        assert_eq!(&bytes[112..117], b"12345");
        assert!(bytes[120..].starts_with(b"070701"));
    }
}
