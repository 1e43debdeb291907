//! What this machine must offer before softkvm can run on it, and what to do where it does not.

use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::Uid;

/// The user is root: the daemon mounts, traces its clients and registers backing files.
pub fn require_root() -> Result<()> {
    root(nix::unistd::geteuid())
}

fn root(user: Uid) -> Result<()> {
    if !user.is_root() {
        bail!("softkvm needs root (mount, ptrace, FUSE passthrough). Next step: run the same command as root");
    }
    Ok(())
}

/// /dev/fuse is there and opens.
pub fn require_fuse() -> Result<()> {
    fuse(Path::new("/dev/fuse"))
}

fn fuse(path: &Path) -> Result<()> {
    let name = path.display();
    if !path.exists() {
        bail!(
            "{name} is missing. Next step: `modprobe fuse`; in a container, start it with \
             `--device /dev/fuse --cap-add SYS_ADMIN --cap-add SYS_PTRACE`"
        );
    }
    if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open(path) {
        bail!(
            "{name} cannot be opened: {error}. Next step: in a container, start it with `--device /dev/fuse`; \
             elsewhere look at the rights of {name}"
        );
    }
    Ok(())
}

/// Makes `/` a mount point for this process and its children, where it is none: in a chroot. Only a mount point can be
/// kept from other namespaces (mount_namespaces(7)), so without this nothing below could mount in private.
///
/// `/` is bound over its own `/proc`, whose propagation can be ended first, and the process goes there: no other
/// namespace sees a thing. Must be called while the process has one thread.
pub fn make_root_a_mount() -> Result<()> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if !nix::unistd::geteuid().is_root() || has_root(&mounts) {
        return Ok(());
    }
    let cwd = std::env::current_dir().context("the current folder")?;
    unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| {
            mount(None::<&Path>, "/proc", None::<&Path>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&Path>)
        })
        .and_then(|()| mount(Some("/"), "/proc", None::<&Path>, MsFlags::MS_REC | MsFlags::MS_BIND, None::<&Path>))
        .and_then(|()| nix::unistd::chroot("/proc"))
        .and_then(|()| nix::unistd::chdir(&cwd))
        .context(
            "in this chroot `/` is no mount point, and it cannot be made one. Next step: mount /proc in it, or \
             `mount --bind DIR DIR` before `chroot DIR`",
        )
}

/// Does a `/proc/PID/mountinfo` show a mount at `/`? Its fifth field is the mount point (proc_pid_mountinfo(5)).
fn has_root(mountinfo: &str) -> bool {
    mountinfo.lines().any(|line| line.split(' ').nth(4) == Some("/"))
}

/// True on Debian; what is installed or downloaded here is named as Debian names it.
pub fn is_debian() -> bool {
    names_debian(&os_release())
}

fn os_release() -> String {
    std::fs::read_to_string("/etc/os-release").unwrap_or_default()
}

fn names_debian(os_release: &str) -> bool {
    os_release.lines().any(|line| line.trim() == "ID=debian")
}

/// What this distribution calls itself.
pub fn distribution() -> String {
    name_in(&os_release())
}

fn name_in(os_release: &str) -> String {
    os_release
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="))
        .map_or_else(|| "an unknown distribution".to_owned(), |name| name.trim_matches('"').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_the_next_step() {
        assert!(root(Uid::from_raw(0)).is_ok());
        let error = root(Uid::from_raw(1000)).expect_err("a user is not root").to_string();
        assert!(error.contains("needs root") && error.contains("Next step: run the same command as root"), "{error}");
        let error = fuse(Path::new("/nonexistent/fuse")).expect_err("it is not there").to_string();
        assert!(error.contains("/nonexistent/fuse is missing. Next step: `modprobe fuse`"), "{error}");
        // A folder cannot be opened for writing, whoever asks.
        let error = fuse(Path::new("/dev")).expect_err("a folder").to_string();
        assert!(error.contains("/dev cannot be opened") && error.contains("Next step"), "{error}");
    }

    #[test]
    fn a_chroot_is_told_by_its_mounts() {
        // Debian's host and the same in a chroot with /proc and /dev, as Linux 6.18 shows them.
        assert!(has_root("22 27 0:21 / /proc rw - proc proc rw\n27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"));
        assert!(!has_root("60 59 0:21 / /proc rw - proc proc rw\n62 59 0:6 / /dev rw - devtmpfs devtmpfs rw\n"));
    }

    /// os-release(5); contents as base-files of Debian 12 and of Ubuntu 24.04 have them, in part.
    #[test]
    fn distributions_are_told_apart() {
        let debian = "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nID=debian\n";
        let ubuntu = "PRETTY_NAME=\"Ubuntu 24.04.1 LTS\"\nID=ubuntu\nID_LIKE=debian\n";
        assert!(names_debian(debian) && !names_debian(ubuntu) && !names_debian(""));
        assert_eq!(name_in(ubuntu), "Ubuntu 24.04.1 LTS");
        assert_eq!(name_in(""), "an unknown distribution");
    }
}
