//! What this machine must offer before softkvm can run on it, and what to do where it does not.

use std::path::Path;

use anyhow::{Result, bail};

/// The user is root: the daemon mounts, traces its clients and registers backing files.
pub fn require_root() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("softkvm needs root (mount, ptrace, FUSE passthrough). Next step: run the same command as root");
    }
    Ok(())
}

/// /dev/fuse is there and opens.
pub fn require_fuse() -> Result<()> {
    let path = Path::new("/dev/fuse");
    if !path.exists() {
        bail!(
            "/dev/fuse is missing. Next step: `modprobe fuse`; in a container, start it with \
             `--device /dev/fuse --cap-add SYS_ADMIN --cap-add SYS_PTRACE`"
        );
    }
    if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open(path) {
        bail!(
            "/dev/fuse cannot be opened: {error}. Next step: in a container, start it with `--device /dev/fuse`; \
             elsewhere look at the rights of /dev/fuse"
        );
    }
    Ok(())
}

/// True on Debian; what is installed or downloaded here is named as Debian names it.
pub fn is_debian() -> bool {
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    release.lines().any(|line| line.trim() == "ID=debian")
}

/// What this distribution calls itself.
pub fn distribution() -> String {
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    release
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="))
        .map_or_else(|| "an unknown distribution".to_owned(), |name| name.trim_matches('"').to_owned())
}
