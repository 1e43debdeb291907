//! A user space of Debian's packages, for guests that need more than busybox. Downloaded, checked by apt, never installed on
//! this machine: packages become an archive that Linux unpacks at boot.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::initramfs::Archive;
use crate::packages::{self, output_of, require_apt, updating};
use crate::{Progress, cache, content_hash, lock};

/// Folders that no program of a guest reads.
const LEFT_OUT: &[&str] = &[
    "usr/share/doc/",
    "usr/share/man/",
    "usr/share/locale/",
    "usr/share/info/",
    "usr/share/lintian/",
    "usr/share/bash-completion/",
    "usr/lib/x86_64-linux-gnu/gconv/",
    "usr/lib/udev/hwdb.d/",
];

/// Top-level folders that are symbolic links into `usr`, as on every Debian since 12.
const MERGED: &[&str] = &["bin", "sbin", "lib", "lib64"];

/// The packages of these names and all that they depend on, as files in the cache. The archive is asked only when the cache
/// has none for these names: remove the folder `debs-…` of the cache to get newer ones.
pub fn ensure(names: &[&str], progress: &dyn Progress) -> Result<Vec<PathBuf>> {
    let cache = cache()?;
    let _one_at_a_time = lock(&cache, "debs")?;
    let folder = cache.join(format!("debs-{:016x}", content_hash(names)));
    if !folder.is_dir() {
        require_apt(&format!("packages ({})", names.join(" ")))?;
        progress.step("asking the archive for packages");
        let all = updating(|| closure(names))?;
        let part = folder.with_extension("part");
        if part.exists() {
            fs::remove_dir_all(&part).with_context(|| format!("cannot remove {}", part.display()))?;
        }
        fs::create_dir_all(&part).with_context(|| format!("cannot create {}", part.display()))?;
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        packages::download(&all, &part, progress)?;
        fs::rename(&part, &folder).with_context(|| format!("cannot rename to {}", folder.display()))?;
    }
    let mut debs = packages::debs(&folder);
    debs.sort();
    Ok(debs)
}

/// What apt would install on a machine that has nothing.
fn closure(names: &[&str]) -> Result<Vec<String>> {
    let mut line = vec!["--simulate", "--no-install-recommends", "-o", "Dir::State::status=/dev/null", "install"];
    line.extend(names);
    let all = installed_by(&output_of("apt-get", &line, Path::new("/"))?);
    if all.is_empty() {
        bail!("apt-get {} names no package", line.join(" "));
    }
    Ok(all)
}

/// `Inst NAME (VERSION …` for each.
fn installed_by(simulation: &str) -> Vec<String> {
    let name = |line: &str| Some(line.strip_prefix("Inst ")?.split(' ').next()?.to_owned());
    simulation.lines().filter_map(name).collect()
}

/// Begins a root with the folders that every system has.
pub fn begin(archive: &mut Archive) {
    for folder in ["dev", "etc", "proc", "root", "run", "sys", "tmp", "usr", "var"] {
        archive.directory(folder);
    }
    for folder in MERGED {
        archive.directory(&format!("usr/{folder}"));
        archive.symlink(folder, &format!("usr/{folder}"));
    }
}

/// dpkg-deb on its way to give the package's files, and the tar archive that it writes.
fn files_of(deb: &Path) -> Result<(Child, ChildStdout)> {
    let mut dpkg = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(deb)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start dpkg-deb")?;
    let stdout = dpkg.stdout.take().context("a pipe was asked for")?;
    Ok((dpkg, stdout))
}

/// Unpacks a package into the archive. All files are root's; maintainer scripts do not run.
pub fn unpack(archive: &mut Archive, deb: &Path) -> Result<()> {
    let (mut dpkg, stdout) = files_of(deb)?;
    let mut stream = tar::Archive::new(stdout);
    let added = add_all(archive, &mut stream).with_context(|| format!("cannot read {}", deb.display()));
    // To the end, or dpkg-deb fails by a closed pipe.
    let _ = std::io::copy(&mut stream.into_inner(), &mut std::io::sink());
    let status = dpkg.wait().context("waiting for dpkg-deb")?;
    added?;
    if !status.success() {
        bail!("dpkg-deb --fsys-tarfile {}: {status}", deb.display());
    }
    Ok(())
}

/// Unpacks packages into a new folder. Maintainer scripts do not run.
pub fn unpack_all(debs: &[PathBuf], folder: &Path) -> Result<()> {
    for top in MERGED {
        let real = folder.join("usr").join(top);
        fs::create_dir_all(&real).with_context(|| format!("cannot create {}", real.display()))?;
        std::os::unix::fs::symlink(Path::new("usr").join(top), folder.join(top)).context("cannot link")?;
    }
    for deb in debs {
        // dpkg-deb itself would put a folder in the place of the link `bin`.
        let (mut dpkg, stdout) = files_of(deb)?;
        let mut tar = Command::new("tar");
        let left_out = LEFT_OUT.iter().map(|path| format!("--exclude=./{}", path.trim_end_matches('/')));
        tar.args(["--extract", "--keep-directory-symlink", "--directory"]).arg(folder).args(left_out).stdin(stdout);
        let extracted = tar.status().context("cannot start tar")?;
        let status = dpkg.wait().context("waiting for dpkg-deb")?;
        if !extracted.success() || !status.success() {
            bail!("cannot unpack {}: dpkg-deb {status}, tar {extracted}", deb.display());
        }
    }
    Ok(())
}

fn add_all(archive: &mut Archive, stream: &mut tar::Archive<impl Read>) -> Result<()> {
    for entry in stream.entries()? {
        let mut entry = entry?;
        let path = place(&entry.path()?.to_string_lossy());
        if path.is_empty() || LEFT_OUT.iter().any(|folder| format!("{path}/").starts_with(folder)) {
            continue;
        }
        let target = entry.link_name()?.map(|target| target.to_string_lossy().into_owned());
        match (entry.header().entry_type(), target) {
            (tar::EntryType::Directory, _) => archive.directory(&path),
            (tar::EntryType::Symlink, Some(target)) => archive.symlink(&path, &target),
            // Another name of a file in the same package.
            (tar::EntryType::Link, Some(target)) => archive.symlink(&path, &format!("/{}", place(&target))),
            (tar::EntryType::Regular, _) => {
                let mode = entry.header().mode()? & 0o7777;
                let mut content = Vec::new();
                entry.read_to_end(&mut content)?;
                archive.file(&path, mode, &content);
            }
            (kind, _) => bail!("{path} is a {kind:?}, which no package of use here has"),
        }
    }
    Ok(())
}

/// `./lib/x` → `usr/lib/x`: without dot and slashes at the ends, and where the merged folders really are.
fn place(path: &str) -> String {
    let path = path.trim_start_matches("./").trim_matches('/');
    let top = path.split('/').next().unwrap_or(path);
    if MERGED.contains(&top) { format!("usr/{path}") } else { path.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_lead_into_usr() {
        let places = ["./", "./lib/systemd/systemd", "./usr/bin/", "./sbin", "./library"].map(place);
        assert_eq!(places, ["", "usr/lib/systemd/systemd", "usr/bin", "usr/sbin", "library"]);
    }

    /// As apt-get of Debian 12 prints it.
    #[test]
    fn packages_are_read_from_a_simulation() {
        let text = "The following NEW packages will be installed:\n  kmod libc6\n\
                    Inst libc6 (2.36-9+deb12u14 Debian:12.15/oldstable [amd64]) []\n\
                    Inst kmod (30+20221128-1 Debian:12.15/oldstable [amd64])\nConf libc6 (2.36-9+deb12u14)\n";
        assert_eq!(installed_by(text), ["libc6", "kmod"]);
    }

    #[test]
    fn files_links_and_folders_of_a_package_are_taken_over() {
        let mut builder = tar::Builder::new(Vec::new());
        let mut add = |kind, path: &str, target: Option<&str>, content: &[u8]| {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_mode(0o755);
            header.set_size(content.len() as u64);
            match target {
                Some(target) => builder.append_link(&mut header, path, target).expect("in memory"),
                None => builder.append_data(&mut header, path, content).expect("in memory"),
            }
        };
        add(tar::EntryType::Directory, "./lib", None, b"");
        add(tar::EntryType::Regular, "./lib/one", None, b"content");
        add(tar::EntryType::Symlink, "./lib/two", Some("one"), b"");
        add(tar::EntryType::Regular, "./usr/share/doc/one/copyright", None, b"left out");
        let bytes = builder.into_inner().expect("in memory");
        let mut archive = Archive::new();
        add_all(&mut archive, &mut tar::Archive::new(&bytes[..])).expect("it is read");
        let text = String::from_utf8_lossy(&archive.finish()).into_owned();
        assert!(["usr/lib/one\0", "content", "usr/lib/two\0"].iter().all(|part| text.contains(part)), "{text}");
        assert!(!text.contains("left out"));
    }
}
