//! Programs from Debian's archive: what we run, which package has it, and installing what is missing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::{Progress, host};

/// A file that we need and the package of Debian 12 that brings it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// A program to be found by PATH, or an absolute path.
    pub file: &'static str,
    /// Debian's name of the package.
    pub package: &'static str,
}

const fn need(file: &'static str, package: &'static str) -> Need {
    Need { file, package }
}

/// The VMM of the demo.
pub const QEMU: Need = need("qemu-system-x86_64", "qemu-system-x86");
/// Everything that runs in the guest's user space, linked statically.
pub const BUSYBOX: Need = need("busybox", "busybox-static");
/// Makes the bootable ISO.
pub const GRUB_MKRESCUE: Need = need("grub-mkrescue", "grub-common");
/// What the ISO boots: GRUB for PC BIOS.
pub const GRUB_PC: Need = need("/usr/lib/grub/i386-pc/boot_hybrid.img", "grub-pc-bin");
/// grub-mkrescue writes the ISO with it.
pub const XORRISO: Need = need("xorriso", "xorriso");
/// grub-mkrescue makes an EFI image with it where GRUB's EFI half is installed.
pub const MTOOLS: Need = need("mformat", "mtools");
/// Mount namespaces for the tests.
pub const UNSHARE: Need = need("unshare", "util-linux");
/// Users and capabilities for the tests.
pub const SETPRIV: Need = need("setpriv", "util-linux");
/// Compiles what guests of the benchmark run.
pub const GCC: Need = need("gcc", "gcc");
/// What it is linked with.
pub const LIBC: Need = need("/usr/lib/x86_64-linux-gnu/libc.a", "libc6-dev");
/// The other interpreter of the benchmark.
pub const BOCHS: Need = need("bochs-bin", "bochs");
/// A display of Bochs', which Debian's package wants one of. The one that is used comes with Bochs itself.
pub const BOCHS_DISPLAY: Need = need("/usr/lib/x86_64-linux-gnu/bochs/plugins/libbx_term_gui.so", "bochs-term");
/// Its firmware.
pub const BOCHS_BIOS: Need = need("/usr/share/bochs/BIOS-bochs-latest", "bochsbios");
/// Its graphics card's.
pub const VGA_BIOS: Need = need("/usr/share/vgabios/vgabios.bin", "vgabios");

/// Makes a Debian in a folder.
pub const DEBOOTSTRAP: Need = need("debootstrap", "debootstrap");
/// Makes a disk of a folder.
pub const MKFS_EXT4: Need = need("mkfs.ext4", "e2fsprogs");
/// Makes disks that hold snapshots.
pub const QEMU_IMG: Need = need("qemu-img", "qemu-utils");
/// UEFI firmware for QEMU.
pub const OVMF: Need = need("/usr/share/ovmf/OVMF.fd", "ovmf");
/// The same for flash that only system management mode may write, and what that holds at first.
pub const OVMF_SECURE: Need = need("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd", "ovmf");
/// See [`OVMF_SECURE`].
pub const OVMF_VARIABLES: Need = need("/usr/share/OVMF/OVMF_VARS_4M.fd", "ovmf");

/// All that the tests need.
pub const ALL: &[Need] =
    &[QEMU, BUSYBOX, GRUB_MKRESCUE, GRUB_PC, XORRISO, MTOOLS, UNSHARE, SETPRIV, DEBOOTSTRAP, MKFS_EXT4, QEMU_IMG, OVMF];

/// Where the file is, if it is there.
pub fn find(need: Need) -> Option<PathBuf> {
    if need.file.starts_with('/') {
        return Some(PathBuf::from(need.file)).filter(|p| p.exists());
    }
    // /sbin and /usr/sbin are not in everybody's PATH.
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(need.file))
        .find(|file| file.is_file())
}

/// Installs what is missing of `needs`. Nothing runs, and nobody needs to be root, when all is there.
pub fn ensure(needs: &[Need], progress: &dyn Progress) -> Result<()> {
    let mut missing: Vec<&str> = needs.iter().filter(|n| find(**n).is_none()).map(|n| n.package).collect();
    missing.sort_unstable();
    missing.dedup();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    require_apt(&format!("the package(s) {list}"))?;
    if !nix::unistd::geteuid().is_root() {
        bail!("{list}: not installed. Next step: `sudo apt-get install {list}`, or run the same command as root");
    }
    progress.step("updating the package lists");
    apt(&["update"], Path::new("/"))?;
    progress.step(&format!("installing {list}"));
    let mut args = vec!["install", "--yes", "--no-install-recommends"];
    args.extend(&missing);
    apt(&args, Path::new("/"))?;
    match needs.iter().find(|n| find(**n).is_none()) {
        Some(still) => bail!("{} was installed, but {} is still not there", still.package, still.file),
        None => Ok(()),
    }
}

/// Says what to do where there is no apt of Debian's.
pub(crate) fn require_apt(what: &str) -> Result<()> {
    if !host::is_debian() || find(need("apt-get", "apt")).is_none() {
        bail!(not_debian(what, &host::distribution()));
    }
    Ok(())
}

fn not_debian(what: &str, distribution: &str) -> String {
    format!(
        "{what}: comes from Debian's archive, and this is {distribution}. Next step: run in a Debian 12 machine or \
         container (`docker run -it --privileged debian:12`), or put it in place by hand"
    )
}

/// Runs apt-get without questions. What it said is shown only when it fails.
pub(crate) fn apt(args: &[&str], dir: &Path) -> Result<()> {
    let output = Command::new("apt-get")
        .args(["-q", "-o", "Dpkg::Use-Pty=0", "-o", "DPkg::Lock::Timeout=300"])
        .args(args)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .current_dir(dir)
        .stdin(Stdio::null())
        .output()
        .context("cannot start apt-get")?;
    if !output.status.success() {
        bail!(
            "apt-get {} failed ({}). Next step: run it by hand; it said:\n{}{}",
            args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

/// Asks the archive; where it does not know, asks again with its current lists.
pub(crate) fn updating<T>(ask: impl Fn() -> Result<T>) -> Result<T> {
    ask().or_else(|_| {
        apt(&["update"], Path::new("/"))?;
        ask()
    })
}

/// Downloads packages into `folder`: the versions that apt would install.
pub(crate) fn download(names: &[&str], folder: &Path, progress: &dyn Progress) -> Result<()> {
    // A line each: 'URI' name size hash
    let uris = output_of("apt-get", &[&["download", "--print-uris"], names].concat(), folder)?;
    let sizes = uris.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok());
    let total = sizes.sum();
    progress.step(&match names {
        [name] => format!("downloading {name}"),
        names => format!("downloading {} packages", names.len()),
    });
    let finished = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !finished.load(Ordering::Relaxed) {
                progress.bytes(size_of_debs(folder), total);
                std::thread::park_timeout(Duration::from_millis(100));
            }
        });
        let downloaded = apt(&[&["download"], names].concat(), folder);
        finished.store(true, Ordering::Relaxed);
        downloaded
    })
}

/// The packages in a folder.
pub(crate) fn debs(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|e| e.path()).filter(|p| p.extension().is_some_and(|x| x == "deb")).collect()
}

fn size_of_debs(folder: &Path) -> u64 {
    debs(folder).iter().filter_map(|p| fs::metadata(p).ok()).map(|m| m.len()).sum()
}

/// What a program prints, as text. Fails with what it said to stderr.
pub(crate) fn output_of(program: &str, args: &[&str], dir: &Path) -> Result<String> {
    let output = Command::new(program)
        .args(args)
        .current_dir(dir)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        bail!("{program} {}: {}\n{}", args.join(" "), output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_distribution_is_named_with_the_next_step() {
        let message = not_debian("the package(s) busybox-static", "Fedora Linux 43");
        for part in ["busybox-static", "this is Fedora Linux 43", "Next step: run in a Debian 12 machine"] {
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn what_is_there_needs_no_package() {
        let sh = need("sh", "no-such-package");
        assert!(find(sh).is_some_and(|path| path.is_absolute()));
        ensure(&[sh], &crate::Quiet).expect("nothing is installed");
        assert!(find(need("/nonexistent/file", "no-such-package")).is_none());
    }
}
