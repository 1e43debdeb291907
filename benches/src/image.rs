//! What all peers boot: a disc with GRUB, or what it loads from there: Debian's cloud kernel, and a user space that is busybox
//! and one program; and a disk with Debian's programs for the guests that run those.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use assets::initramfs::Archive;
use assets::kernel::{self, Kernel};
use assets::packages::{self, BUSYBOX, GCC, LIBC, MKFS_EXT4};
use assets::{Progress, iso, root};
use softkvm_tests::softkvm::stripped;

use crate::workload::{By, Guest, Workload};

const INIT: &str = include_str!("../guest/init.sh");
const SOURCE: &str = include_str!("../guest/work.c");
const PROGRAMS: &str = include_str!("../guest/programs.sh");
const MAKEFILE: &str = include_str!("../guest/Makefile");

/// By the name of the list that the guest loads, in this order: a disk and a network card on virtio, and a disk on Bochs' PIIX.
const MODULES: &[(&str, &[&str])] = &[
    (
        "virtio",
        &[
            "drivers/virtio/virtio_ring",
            "drivers/virtio/virtio",
            "drivers/virtio/virtio_pci_legacy_dev",
            "drivers/virtio/virtio_pci_modern_dev",
            "drivers/virtio/virtio_pci",
            "drivers/block/virtio_blk",
            "net/core/failover",
            "drivers/net/net_failover",
            "drivers/net/virtio_net",
        ],
    ),
    (
        "ata",
        &[
            "drivers/scsi/scsi_common",
            "drivers/scsi/scsi_mod",
            "drivers/scsi/sd_mod",
            "drivers/ata/libata",
            "drivers/ata/ata_piix",
        ],
    ),
];

/// Of Debian, with all that they depend on.
const PACKAGES: &[&str] = &[
    "apt",
    "busybox-static",
    "coreutils",
    "dash",
    "gcc",
    "grep",
    "gzip",
    "libc6-dev",
    "make",
    "openssl",
    "python3",
    "sed",
    "sqlite3",
];
/// What apt resolves: the packages above, as an archive in a folder.
const SOURCES_LIST: &str = "deb [trusted=yes] file:/archive ./\n";
/// There are no users in the guest but root.
const APT_CONF: &str = "APT::Sandbox::User \"root\";\n";
/// Of the disk, in MiB: about twice what the files take.
const DISK_MIB: u32 = 1024;
/// By which `init.sh` finds it.
const LABEL: &str = "softkvm-bench";

/// Written by `init.sh` before anything else.
pub(crate) const USER_SPACE: &str = "USER SPACE";

/// What is booted.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    pub(crate) guest: Guest,
    /// With the three that follow.
    pub(crate) disc: PathBuf,
    /// The bzImage.
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
    /// All that Linux is told.
    pub(crate) options: String,
    /// Debian's programs. Not to be written.
    pub(crate) disk: Option<PathBuf>,
}

/// A folder of the cache that is ours.
pub(crate) fn folder() -> Result<PathBuf> {
    let folder = assets::cache()?.join("bench");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}

/// A guest that runs `workloads`, all of which are its own, at `scale` percent of their full size.
pub(crate) fn ensure(guest: Guest, workloads: &[Workload], scale: u32, progress: &dyn Progress) -> Result<Image> {
    let kernel = kernel::ensure(progress)?;
    let initrd = initramfs(&kernel, progress)?;
    let disc = folder()?.join(format!("{guest:?}.iso").to_lowercase());
    let options = options(workloads, scale);
    iso::create(&disc, &kernel, &initrd, &options, progress)?;
    let disk = guest.has_debian().then(|| debian(progress)).transpose()?;
    Ok(Image { guest, disc, kernel: kernel.image(), initrd, options, disk })
}

/// What Linux is told. The serial port is as fast as it can be said to be, for Bochs' takes its time over each character;
/// mitigations would depend on the vendor that each peer's CPU names.
fn options(workloads: &[Workload], scale: u32) -> String {
    let names = |by| workloads.iter().filter(|w| w.by == by).map(|w| w.name).collect::<Vec<_>>().join(",");
    format!(
        "console=ttyS0,115200 panic=-1 quiet mitigations=off scale={scale} cpu={} virtio={} programs={}",
        names(By::Work),
        names(By::Virtio),
        names(By::Programs)
    )
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn write(path: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    fs::write(path, content).with_context(|| format!("cannot write {}", path.display()))
}

fn initramfs(kernel: &Kernel, progress: &dyn Progress) -> Result<PathBuf> {
    packages::ensure(&[BUSYBOX], progress)?;
    let mut archive = Archive::new();
    for dir in ["bin", "dev", "modules", "proc", "root", "sys", "tmp"] {
        archive.directory(dir);
    }
    // Numbers: Linux's devices.txt.
    archive.char_device("dev/console", 5, 1);
    archive.file("bin/busybox", 0o755, &read(&packages::find(BUSYBOX).context("busybox is not in PATH")?)?);
    archive.file("bin/work", 0o755, &stripped(&compile(&folder()?, progress)?)?);
    archive.file("init", 0o755, INIT.as_bytes());
    for (list, modules) in MODULES {
        let mut names = String::new();
        for module in *modules {
            let path = kernel.modules().join("kernel").join(module).with_extension("ko");
            let name = format!("{}.ko", module.rsplit('/').next().unwrap_or(module));
            archive.file(&format!("modules/{name}"), 0o644, &read(&path)?);
            names += &format!("{name}\n");
        }
        archive.file(&format!("modules/{list}"), 0o644, names.as_bytes());
    }
    assets::store("initramfs-bench", "cpio", &archive.finish())
}

/// A disk with Debian's programs, in the cache.
fn debian(progress: &dyn Progress) -> Result<PathBuf> {
    packages::ensure(&[MKFS_EXT4], progress)?;
    let debs = root::ensure(PACKAGES, progress)?;
    let cache = assets::cache()?;
    let _one_at_a_time = assets::lock(&cache, "bench-disk")?;
    let parts: (_, &[&str]) = (&debs, &[SOURCE, PROGRAMS, MAKEFILE, SOURCES_LIST, APT_CONF, LABEL]);
    let disk = folder()?.join(format!("debian-{:016x}.ext4", assets::content_hash(&parts)));
    if disk.is_file() {
        return Ok(disk);
    }
    progress.step("making a disk of Debian's programs");
    for old in fs::read_dir(folder()?).context("the folder was made just now")?.flatten() {
        if old.file_name().to_string_lossy().starts_with("debian-") {
            fs::remove_file(old.path()).with_context(|| format!("cannot remove {}", old.path().display()))?;
        }
    }
    let tree = folder()?.join("debian");
    if tree.exists() {
        fs::remove_dir_all(&tree).with_context(|| format!("cannot remove {}", tree.display()))?;
    }
    root::unpack_all(&debs, &tree)?;
    for dir in ["archive", "bench", "dev", "etc/apt", "proc", "root", "sys", "tmp", "var/lib/apt/lists/partial"] {
        fs::create_dir_all(tree.join(dir)).with_context(|| format!("cannot create {dir}"))?;
    }
    write(&tree.join("bench/work.c"), SOURCE)?;
    write(&tree.join("bench/Makefile"), MAKEFILE)?;
    write(&tree.join("bench/programs.sh"), PROGRAMS)?;
    write(&tree.join("archive/Packages"), index(&debs)?)?;
    write(&tree.join("etc/apt/sources.list"), SOURCES_LIST)?;
    write(&tree.join("etc/apt/apt.conf"), APT_CONF)?;
    write(&tree.join("var/lib/dpkg/status"), "")?;
    let part = disk.with_extension("part");
    if part.exists() {
        fs::remove_file(&part).with_context(|| format!("cannot remove {}", part.display()))?;
    }
    let mut mkfs = Command::new(packages::find(MKFS_EXT4).context("mkfs.ext4 was there just now")?);
    mkfs.args(["-q", "-L", LABEL, "-d"]).args([&tree, &part]).arg(format!("{DISK_MIB}M"));
    succeed(&mut mkfs)?;
    fs::rename(&part, &disk).with_context(|| format!("cannot rename to {}", disk.display()))?;
    fs::remove_dir_all(&tree).with_context(|| format!("cannot remove {}", tree.display()))?;
    Ok(disk)
}

/// The index of an archive of these packages. deb-control(5), and the fields that apt adds for itself.
fn index(debs: &[PathBuf]) -> Result<String> {
    let mut index = String::new();
    for deb in debs {
        let output = succeed(Command::new("dpkg-deb").arg("--field").arg(deb))?;
        let name = deb.file_name().context("a package has a name")?.to_string_lossy().into_owned();
        let size = fs::metadata(deb).with_context(|| format!("cannot read {}", deb.display()))?.len();
        index += &format!("{}\nFilename: ./{name}\nSize: {size}\n\n", output.trim_end());
    }
    Ok(index)
}

/// What it prints.
fn succeed(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// `guest/work.c` as one file without a library.
fn compile(folder: &Path, progress: &dyn Progress) -> Result<PathBuf> {
    packages::ensure(&[GCC, LIBC], progress)?;
    let (source, program) = (folder.join("work.c"), folder.join("work"));
    write(&source, SOURCE)?;
    let mut gcc = Command::new("gcc");
    gcc.args(["-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o"]).args([&program, &source]);
    succeed(&mut gcc)?;
    Ok(program)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::round::Lines;
    use crate::workload;

    #[test]
    fn linux_is_told_what_to_run() {
        let options = options(workload::ALL, 10);
        assert!(options.contains(" scale=10 cpu=crc,sieve,"), "{options}");
        assert!(options.contains(" virtio=disk,tcp,udp programs=python-start,"), "{options}");
        assert!(!options.contains(workload::BOOT), "{options}");
    }

    #[test]
    fn every_program_has_its_case() {
        for workload in workload::ALL.iter().filter(|w| w.by == By::Programs) {
            let case = |line: &str| {
                line.trim_start().split(')').next().is_some_and(|names| names.split(" | ").any(|n| n == workload.name))
            };
            assert!(PROGRAMS.lines().any(case), "{}", workload.name);
        }
    }

    /// Each at the least of its sizes, on this machine's CPU, and the lines are what is looked for in a guest's console.
    #[test]
    fn every_workload_runs_and_tells_its_result() {
        let folder = std::env::temp_dir().join(format!("softkvm-bench-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a temporary folder");
        let program = compile(&folder, &assets::Quiet).expect("it compiles");
        for workload in workload::ALL.iter().filter(|w| w.by == By::Work) {
            let mut results = Vec::new();
            for _ in 0..2 {
                let output = Command::new(&program).args(["0", workload.name]).output().expect("it starts");
                assert!(output.status.success(), "{}: {output:?}", workload.name);
                let text = String::from_utf8(output.stdout).expect("text");
                let lines = Lines::of(workload.name);
                assert!(text.contains(&lines.begin) && text.ends_with('\n'), "{text}");
                results.push(text.split(&lines.end).nth(1).expect("an end").trim().to_owned());
            }
            assert_eq!(results[0], results[1], "{}", workload.name);
            assert!(u64::from_str_radix(&results[0], 16).is_ok(), "{results:?}");
        }
        fs::remove_dir_all(&folder).expect("the folder is ours");
    }
}
