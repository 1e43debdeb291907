//! What the demo, the tests and the benchmarks boot, and the programs that make and run it.
//!
//! Everything comes from Debian's archive and is kept in one cache folder, so that whoever asks second starts at once.
//! Nothing here knows softkvm: it ends at a QEMU command line.

pub mod debian;
pub mod host;
pub mod initramfs;
pub mod iso;
pub mod kernel;
pub mod packages;
pub mod progress;
pub mod qemu;
pub mod root;
pub mod selftests;

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// How the work is going, for whoever shows it to a human.
pub trait Progress: Sync {
    /// A piece of work begins, named in the present participle: "downloading the kernel".
    fn step(&self, what: &str);
    /// Bytes of the current step that are there, of how many.
    fn bytes(&self, done: u64, total: u64);
}

/// Shows nothing.
pub struct Quiet;

impl Progress for Quiet {
    fn step(&self, _what: &str) {}
    fn bytes(&self, _done: u64, _total: u64) {}
}

/// The cache folder: `$SOFTKVM_CACHE`, else `$XDG_CACHE_HOME/softkvm`, else `~/.cache/softkvm`. Created if missing.
pub fn cache() -> Result<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let path = match (var("SOFTKVM_CACHE"), var("XDG_CACHE_HOME"), var("HOME")) {
        (Some(own), _, _) => own,
        (None, Some(xdg), _) => xdg.join("softkvm"),
        (None, None, Some(home)) => home.join(".cache/softkvm"),
        (None, None, None) => anyhow::bail!("neither HOME nor SOFTKVM_CACHE is set; set SOFTKVM_CACHE to a folder"),
    };
    fs::create_dir_all(&path).with_context(|| format!("cannot create the cache folder {}", path.display()))?;
    Ok(path)
}

/// Serialises the making of one asset over all processes that share the cache; released when dropped.
pub fn lock(cache: &Path, name: &str) -> Result<File> {
    let path = cache.join(format!("{name}.lock"));
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

/// Puts `bytes` into the cache under a name that is theirs alone: `stem-HASH.extension`.
pub fn store(stem: &str, extension: &str, bytes: &[u8]) -> Result<PathBuf> {
    let path = cache()?.join(format!("{stem}-{:016x}.{extension}", content_hash(bytes)));
    if !path.exists() {
        // Written beside and renamed, so that nobody ever boots half a file.
        let part = path.with_extension(format!("{extension}.{}.part", std::process::id()));
        fs::write(&part, bytes).with_context(|| format!("cannot write {}", part.display()))?;
        fs::rename(&part, &path).with_context(|| format!("cannot rename to {}", path.display()))?;
    }
    Ok(path)
}

/// A number that tells contents apart, the same for the same build of Rust.
pub fn content_hash<T: Hash + ?Sized>(content: &T) -> u64 {
    let mut hasher = DefaultHasher::new();
    content.hash(&mut hasher);
    hasher.finish()
}
