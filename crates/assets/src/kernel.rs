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

    /// `lib/modules/RELEASE` of the package; `modules.dep` is not made.
    pub fn modules(&self) -> PathBuf {
        self.root.join(format!("lib/modules/{}", self.release))
    }
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
    fn releases_sort_by_number() {
        assert!(numbers("6.1.0-9-cloud-amd64") < numbers("6.1.0-56-cloud-amd64"));
        assert!(numbers("6.1.0-56-cloud-amd64") < numbers("6.12.1-1-cloud-amd64"));
    }
}
