//! Debian 12 as debootstrap(8) makes it: a folder for chroot(8), and a disk with the same files.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::kernel::Kernel;
use crate::packages::{self, DEBOOTSTRAP, MKFS_EXT4, UNSHARE, output_of, require_apt, updating};
use crate::{Progress, cache, content_hash, initramfs, lock};

/// Debian 12.
const SUITE: &str = "bookworm";
/// Beside what every Debian has, apt among them: systemd as init, the devices that it waits for, and a load.
const PACKAGES: &str = "--include=systemd-sysv,udev,stress-ng";
/// The name of the machine, which its login prompt shows.
pub const HOST: &str = "debian";
/// Of the disk. The files take a third of it.
const SIZE: &str = "640M";

/// Downloaded once; nobody needs it again.
const LEFT_OUT: &[&str] = &["var/cache/apt/archives", "var/lib/apt/lists"];

/// Mounts the disk and goes there. What the kernel was told stays on its command line for systemd.
const INIT: &str = "\
$b mount -t ext4 /dev/vda /root
for folder in proc sys; do $b umount /$folder; done
$b mount --move /dev /root/dev
exec $b switch_root /root /sbin/init
";

/// The system, twice. Root has no password.
#[derive(Debug, Clone)]
pub struct Debian {
    /// Its files.
    pub root: PathBuf,
    /// The same as an ext4 file system without partitions. Not to be written.
    pub disk: PathBuf,
}

impl Debian {
    /// `line`, run on this machine as the system's root.
    pub fn chroot(&self, line: &[&str]) -> Command {
        let mut command = Command::new("chroot");
        command.arg(&self.root).args(line).env_clear();
        command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command
    }
}

/// The cached system, or one made now from the archive that apt uses, which takes root and a minute or two.
pub fn ensure(progress: &dyn Progress) -> Result<Debian> {
    packages::ensure(&[DEBOOTSTRAP, MKFS_EXT4, UNSHARE], progress)?;
    let cache = cache()?;
    let _one_at_a_time = lock(&cache, "debian")?;
    let name = format!("debian-{:016x}", content_hash(&(SUITE, PACKAGES, HOST, SIZE, LEFT_OUT)));
    let debian = Debian { root: cache.join(&name), disk: cache.join(format!("{name}.ext4")) };
    if !debian.root.is_dir() {
        let part = debian.root.with_extension("part");
        remove(&part)?;
        make_root(&part, progress)?;
        fs::rename(&part, &debian.root).with_context(|| format!("cannot rename to {}", debian.root.display()))?;
    }
    if !debian.disk.is_file() {
        progress.step("making a disk of Debian");
        let part = debian.disk.with_extension("part");
        if part.exists() {
            fs::remove_file(&part).with_context(|| format!("cannot remove {}", part.display()))?;
        }
        let mkfs = packages::find(MKFS_EXT4).context("mkfs.ext4 was there just now")?;
        let (program, root, disk) = (mkfs.to_string_lossy(), debian.root.to_string_lossy(), part.to_string_lossy());
        output_of(&program, &["-q", "-d", &root, &disk, SIZE], Path::new("/"))?;
        fs::rename(&part, &debian.disk).with_context(|| format!("cannot rename to {}", debian.disk.display()))?;
    }
    Ok(debian)
}

/// The initramfs that starts the system from its disk, which must be the first on virtio.
pub fn initramfs(kernel: &Kernel, progress: &dyn Progress) -> Result<PathBuf> {
    initramfs::with_disk(kernel, INIT, progress)
}

fn make_root(root: &Path, progress: &dyn Progress) -> Result<()> {
    require_apt("Debian's packages")?;
    progress.step("making a Debian by debootstrap");
    let archive = updating(archive)?;
    let folder = root.to_string_lossy();
    // What it mounts in the folder is seen, and goes, with its own mount namespace.
    let mut line = vec!["--mount", "--propagation", "private", "--", "debootstrap", "--variant=minbase", PACKAGES];
    line.extend([SUITE, &folder, &archive]);
    output_of("unshare", &line, Path::new("/"))?;
    for folder in LEFT_OUT {
        let folder = root.join(folder);
        remove(&folder)?;
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    fs::write(root.join("etc/hostname"), format!("{HOST}\n")).context("cannot write etc/hostname")?;
    let shadow = root.join("etc/shadow");
    let text = fs::read_to_string(&shadow).with_context(|| format!("cannot read {}", shadow.display()))?;
    fs::write(&shadow, without_root_password(&text)).with_context(|| format!("cannot write {}", shadow.display()))
}

/// shadow(5): the second field of a line is the password; an empty one asks for none.
fn without_root_password(shadow: &str) -> String {
    let line = |line: &str| match line.strip_prefix("root:").and_then(|rest| rest.split_once(':')) {
        Some((_, rest)) => format!("root::{rest}\n"),
        None => format!("{line}\n"),
    };
    shadow.lines().map(line).collect()
}

/// Where apt gets this Debian's main packages from; the archive's usual address where apt is set up for another Debian.
fn archive() -> Result<String> {
    let line = ["indextargets", "--format", "$(CODENAME) $(REPO_URI)", "Created-By: Packages", "Component: main"];
    let targets = output_of("apt-get", &line, Path::new("/"))?;
    Ok(archive_in(&targets).unwrap_or("http://deb.debian.org/debian/").to_owned())
}

fn archive_in(targets: &str) -> Option<&str> {
    targets.lines().find_map(|line| line.strip_prefix(SUITE)?.strip_prefix(' '))
}

fn remove(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As apt-get of Debian 12 prints it.
    #[test]
    fn the_archive_is_that_of_the_suite() {
        let targets = "bookworm-security http://deb.debian.org/debian-security/\nbookworm http://example.org/debian/\n";
        assert_eq!(archive_in(targets), Some("http://example.org/debian/"));
        assert_eq!(archive_in("trixie http://example.org/debian/\n"), None);
    }

    /// As Debian 12 has it.
    #[test]
    fn only_roots_password_goes() {
        let shadow = "root:*:20423:0:99999:7:::\ndaemon:*:20423:0:99999:7:::\n";
        let expected = "root::20423:0:99999:7:::\ndaemon:*:20423:0:99999:7:::\n";
        assert_eq!(without_root_password(shadow), expected);
    }
}
