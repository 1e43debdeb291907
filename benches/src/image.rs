//! The disc that all peers boot: GRUB, Debian's cloud kernel, and a user space that is busybox and one program.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use assets::initramfs::Archive;
use assets::kernel::{self, Kernel};
use assets::packages::{self, BUSYBOX, GCC, LIBC};
use assets::{Progress, iso};
use softkvm_tests::softkvm::stripped;

use crate::workload::{self, Needs, Workload};

const INIT: &str = include_str!("../guest/init.sh");
const SOURCE: &str = include_str!("../guest/work.c");

/// In the order in which they are loaded: a disk and a network card on virtio.
const MODULES: &[&str] = &[
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci",
    "drivers/block/virtio_blk",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
];

/// Written by `init.sh` before anything else.
pub(crate) const USER_SPACE: &str = "USER SPACE";

/// A folder of the cache that is ours.
pub(crate) fn folder() -> Result<PathBuf> {
    let folder = assets::cache()?.join("bench");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}

/// A disc that runs `workloads`, at `scale` percent of their full size.
pub(crate) fn disc(workloads: &[Workload], scale: u32, progress: &dyn Progress) -> Result<PathBuf> {
    let kernel = kernel::ensure(progress)?;
    let initrd = initramfs(&kernel, progress)?;
    let path = folder()?.join("disc.iso");
    iso::create(&path, &kernel, &initrd, &options(workloads, scale), progress)?;
    Ok(path)
}

/// What Linux is told. The serial port is as fast as it can be said to be, for Bochs' takes its time over each character;
/// mitigations would depend on the vendor that each peer's CPU names.
fn options(workloads: &[Workload], scale: u32) -> String {
    let names = |needs| {
        let all = workloads.iter().filter(|w| w.needs == needs && w.name != workload::BOOT);
        all.map(|w| w.name).collect::<Vec<_>>().join(",")
    };
    format!(
        "console=ttyS0,115200 panic=-1 quiet mitigations=off scale={scale} cpu={} virtio={}",
        names(Needs::Cpu),
        names(Needs::Virtio)
    )
}

fn initramfs(kernel: &Kernel, progress: &dyn Progress) -> Result<PathBuf> {
    packages::ensure(&[BUSYBOX], progress)?;
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let mut archive = Archive::new();
    for dir in ["bin", "dev", "modules", "proc", "sys", "tmp"] {
        archive.directory(dir);
    }
    // Numbers: Linux's devices.txt.
    archive.char_device("dev/console", 5, 1);
    archive.file("bin/busybox", 0o755, &read(&packages::find(BUSYBOX).context("busybox is not in PATH")?)?);
    archive.file("bin/work", 0o755, &stripped(&compile(&folder()?, progress)?)?);
    archive.file("init", 0o755, INIT.as_bytes());
    for (number, module) in MODULES.iter().enumerate() {
        let content = read(&kernel.modules().join("kernel").join(module).with_extension("ko"))?;
        archive.file(&format!("modules/{number}"), 0o644, &content);
    }
    assets::store("initramfs-bench", "cpio", &archive.finish())
}

/// `guest/work.c` as one file without a library.
fn compile(folder: &Path, progress: &dyn Progress) -> Result<PathBuf> {
    packages::ensure(&[GCC, LIBC], progress)?;
    let (source, program) = (folder.join("work.c"), folder.join("work"));
    fs::write(&source, SOURCE).with_context(|| format!("cannot write {}", source.display()))?;
    let mut gcc = Command::new("gcc");
    gcc.args(["-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o"]).args([&program, &source]);
    let output = gcc.output().context("cannot start gcc")?;
    if !output.status.success() {
        bail!("{gcc:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(program)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::round::Lines;

    #[test]
    fn linux_is_told_what_to_run() {
        let options = options(workload::ALL, 10);
        assert!(options.contains(" scale=10 cpu=crc,sieve,"), "{options}");
        assert!(options.ends_with(" virtio=disk,tcp,udp"), "{options}");
        assert!(!options.contains(workload::BOOT), "{options}");
    }

    /// Each at the least of its sizes, on this machine's CPU, and the lines are what is looked for in a guest's console.
    #[test]
    fn every_workload_runs_and_tells_its_result() {
        let folder = std::env::temp_dir().join(format!("softkvm-bench-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a temporary folder");
        let program = compile(&folder, &assets::Quiet).expect("it compiles");
        let cpu = workload::ALL.iter().filter(|w| w.needs == Needs::Cpu && w.name != workload::BOOT);
        for workload in cpu {
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
