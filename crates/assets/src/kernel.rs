//! Debian's own cloud kernel: downloaded, checked by apt, unpacked into the cache. Never installed on this machine.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::packages::{self, output_of, require_apt, updating};
use crate::{Progress, cache, lock};

/// The package whose dependency is the kernel.
const META: &str = "linux-image-cloud-amd64";

/// An unpacked kernel package.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// As `uname -r` says: `6.1.0-56-cloud-amd64`.
    pub release: String,
    /// The root of the unpacked package: `boot/`, `lib/modules/`.
    pub root: PathBuf,
}

impl Kernel {
    /// The bzImage.
    pub fn image(&self) -> PathBuf {
        self.root.join(format!("boot/vmlinuz-{}", self.release))
    }

    /// The ELF file that the bzImage unpacks itself to. It stays beside the image.
    pub fn vmlinux(&self) -> Result<PathBuf> {
        let path = self.root.join(format!("boot/vmlinux-{}", self.release));
        let _one_at_a_time = lock(&cache()?, "vmlinux")?;
        if !path.is_file() {
            let image = fs::read(self.image()).context("the kernel is in the cache")?;
            let elf = payload(&image).with_context(|| format!("{} holds no kernel", self.image().display()))?;
            let part = path.with_extension("part");
            fs::write(&part, elf).with_context(|| format!("cannot write {}", part.display()))?;
            fs::rename(&part, &path).with_context(|| format!("cannot rename to {}", path.display()))?;
        }
        Ok(path)
    }

    /// `lib/modules/RELEASE` of the package; `modules.dep` is not made.
    pub fn modules(&self) -> PathBuf {
        self.root.join(format!("lib/modules/{}", self.release))
    }
}

/// What is packed in a bzImage. Linux's boot.rst "The Real-Mode Kernel Header": setup_sects, payload_offset, payload_length.
fn payload(image: &[u8]) -> Result<Vec<u8>> {
    let word = |at: usize| {
        let bytes = image.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u32::from_le_bytes).context("it ends early")
    };
    let setup = (usize::from(image[0x1f1]) + 1) * 512;
    let begin = setup + word(0x248)? as usize;
    let packed = image.get(begin..begin + word(0x24c)? as usize).context("it ends early")?;
    unpack_lz4(packed)
}

/// The legacy frame of lz4's "LZ4 Frame Format Description", as Debian's kernels have it: blocks of at most 8 MiB, and behind
/// them the unpacked size, which the kernel's build adds.
fn unpack_lz4(packed: &[u8]) -> Result<Vec<u8>> {
    const MAGIC: [u8; 4] = 0x184c_2102_u32.to_le_bytes();
    const BLOCK: usize = 8 << 20;
    let Some(mut rest) = packed.strip_prefix(&MAGIC) else { bail!("it is packed by something else than lz4") };
    let mut unpacked = Vec::new();
    while let Some((size, blocks)) = rest.split_first_chunk::<4>() {
        let size = u32::from_le_bytes(*size) as usize;
        if blocks.is_empty() {
            anyhow::ensure!(size == unpacked.len(), "it unpacks to {} bytes, not {size}", unpacked.len());
            return Ok(unpacked);
        }
        let (block, next) = blocks.split_at_checked(size).context("it ends early")?;
        unpacked.extend(lz4_flex::block::decompress(block, BLOCK).context("a block of lz4")?);
        rest = next;
    }
    bail!("it ends early")
}

/// The cached kernel, or the archive's current one, downloaded now. The archive is asked only when the cache is empty:
/// remove the folder `kernel` of the cache to get a newer one.
pub fn ensure(progress: &dyn Progress) -> Result<Kernel> {
    let cache = cache()?;
    let kernels = cache.join("kernel");
    fs::create_dir_all(&kernels).with_context(|| format!("cannot create {}", kernels.display()))?;
    let _one_at_a_time = lock(&cache, "kernel")?;
    if let Some(kernel) = cached(&kernels)? {
        return Ok(kernel);
    }
    require_apt(&format!("the kernel ({META})"))?;
    progress.step("asking the archive for the kernel");
    let package = updating(real_package)?;
    download(&package, &kernels, progress)?;
    match cached(&kernels)? {
        Some(kernel) => Ok(kernel),
        None => bail!("{package} holds no boot/vmlinuz; look at {}", kernels.display()),
    }
}

/// The newest kernel that is wholly unpacked.
fn cached(kernels: &Path) -> Result<Option<Kernel>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(kernels).with_context(|| format!("cannot read {}", kernels.display()))? {
        let root = entry?.path();
        let Some(name) = root.file_name().and_then(|n| n.to_str()) else { continue };
        let Some(release) = name.strip_prefix("linux-image-") else { continue };
        let kernel = Kernel { release: release.to_owned(), root: root.clone() };
        if kernel.image().is_file() {
            found.push(kernel);
        }
    }
    found.sort_by_key(|k| numbers(&k.release));
    Ok(found.pop())
}

/// `6.1.0-56-cloud-amd64` → 6, 1, 0, 56: newest last.
fn numbers(release: &str) -> Vec<u64> {
    release.split(['.', '-']).map_while(|part| part.parse().ok()).collect()
}

/// `linux-image-6.1.0-56-cloud-amd64`, what the meta package depends on.
fn real_package() -> Result<String> {
    let depends = output_of("apt-cache", &["depends", "--no-recommends", "--no-suggests", META], Path::new("/"))?;
    depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .map(str::to_owned)
        .with_context(|| format!("the archive's {META} names no kernel; is Debian's main archive in the apt sources?"))
}

/// Downloads and unpacks to `kernels/PACKAGE`.
fn download(package: &str, kernels: &Path, progress: &dyn Progress) -> Result<()> {
    let work = kernels.join(format!("{package}.part"));
    if work.exists() {
        fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))?;
    }
    let unpacked = work.join("unpacked");
    fs::create_dir_all(&unpacked).with_context(|| format!("cannot create {}", unpacked.display()))?;

    packages::download(&[package], &work, progress)?;
    progress.step(&format!("unpacking {package}"));
    let deb = packages::debs(&work).pop().with_context(|| format!("apt-get download {package} left no .deb"))?;
    output_of("dpkg-deb", &["-x", &deb.to_string_lossy(), &unpacked.to_string_lossy()], &work)?;
    let target = kernels.join(package);
    fs::rename(&unpacked, &target).with_context(|| format!("cannot rename to {}", target.display()))?;
    fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lz4_frames_unpack_to_what_was_packed() {
        let (one, two) = (vec![7; 100_000], b"another block".to_vec());
        let mut frame = 0x184c_2102_u32.to_le_bytes().to_vec();
        for block in [&one, &two] {
            let packed = lz4_flex::block::compress(block);
            frame.extend((packed.len() as u32).to_le_bytes());
            frame.extend(packed);
        }
        let len = one.len() + two.len();
        frame.extend((len as u32).to_le_bytes());
        assert_eq!(unpack_lz4(&frame).unwrap(), [one, two].concat());
        frame.pop();
        assert!(unpack_lz4(&frame).is_err());
    }

    #[test]
    fn releases_sort_by_number() {
        assert!(numbers("6.1.0-9-cloud-amd64") < numbers("6.1.0-56-cloud-amd64"));
        assert!(numbers("6.1.0-56-cloud-amd64") < numbers("6.12.1-1-cloud-amd64"));
    }
}
