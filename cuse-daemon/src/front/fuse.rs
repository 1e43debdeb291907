//! Our file system: its connection, its mount, and the binding of its `kvm` over `/dev/kvm`.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use cuse_rs::{Device, Kind, Session};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;
use nix::sys::statfs::statfs;

use super::opener::Opener;
use super::{Access, FileSystem, Front};
use crate::exit::{self, Status};

/// What to mount, and where.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// Use passthrough where the kernel has it.
    pub passthrough: bool,
    /// What our `kvm` is bound over, if anything.
    pub over: Option<&'a Path>,
    /// Who may open it.
    pub access: Access,
}

/// Makes the file system and gives `front` its root. It is mounted on `dir` for a moment only: afterwards nobody but us
/// reaches it, except through what is bound from it before.
pub fn start(front: &Arc<Front>, dir: &Path, options: Options<'_>) -> Result<Option<Bound>> {
    let Options { passthrough, over, access } = options;
    front.access.set(access).map_err(|_| anyhow::anyhow!("the file system is served twice"))?;
    let opener = Opener::start()?;
    let device = Device::open(Path::new("/dev/fuse")).map_err(|err| explain_fuse(&err))?;
    let options = format!(
        "fd={},rootmode={:o},user_id=0,group_id=0,allow_other,default_permissions",
        device.as_fd().as_raw_fd(),
        libc::S_IFDIR | 0o700
    );
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    mount(Some("softkvm"), dir, Some("fuse"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some(options.as_str())).map_err(
        |errno| {
            let _ = fs::remove_dir(dir);
            explain_mount(errno, dir)
        },
    )?;
    let session = Session::start(device, Kind::Fuse { passthrough }, Arc::new(FileSystem(Arc::clone(front))));
    let bound = session.context("cannot serve the file system").and_then(|session| {
        let root = open(dir, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        front.mounted(session, root, opener).context("cannot use the new file system")?;
        over.map(|over| Bound::new(&dir.join("kvm"), over)).transpose()
    });
    // Open descriptors and what was bound from it keep the file system alive.
    umount2(dir, MntFlags::MNT_DETACH).with_context(|| format!("cannot unmount {}", dir.display()))?;
    fs::remove_dir(dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    bound
}

fn explain_fuse(err: &io::Error) -> anyhow::Error {
    let (status, next) = match err.kind() {
        io::ErrorKind::NotFound if Path::new("/sys/module/fuse").exists() => {
            (Status::Unavailable, "make it: mknod /dev/fuse c 10 229")
        }
        io::ErrorKind::NotFound => {
            (Status::Unavailable, "load the module: modprobe fuse (a container needs --device /dev/fuse)")
        }
        io::ErrorKind::PermissionDenied => {
            (Status::NoPermission, "run softkvm as root (a container needs --device /dev/fuse)")
        }
        _ => (Status::Unavailable, "see whether the kernel has FUSE: grep fuse /proc/filesystems"),
    };
    exit::refuse(status, format_args!("cannot open /dev/fuse: {err}. Next step: {next}"))
}

fn explain_mount(errno: Errno, dir: &Path) -> anyhow::Error {
    let (status, next) = match errno {
        Errno::EPERM => (
            Some(Status::NoPermission),
            "run softkvm as root with CAP_SYS_ADMIN (docker: --privileged, or --cap-add SYS_ADMIN)",
        ),
        Errno::ENODEV => (Some(Status::Unavailable), "load the module: modprobe fuse"),
        _ => (None, "look into the kernel's log: dmesg"),
    };
    let message = format!("cannot mount the file system on {}: {}. Next step: {next}", dir.display(), errno.desc());
    match status {
        Some(status) => exit::refuse(status, message),
        None => anyhow::anyhow!(message),
    }
}

/// Our `kvm` in the place of `/dev/kvm`, until dropped.
#[derive(Debug)]
pub struct Bound {
    over: PathBuf,
    /// Locked by everybody who uses a stand-in, so that the last one may remove it.
    stand_in: Option<Flock<File>>,
}

impl Bound {
    fn new(kvm: &Path, over: &Path) -> Result<Self> {
        clear_dead(over)?;
        let stand_in = if needs_stand_in(over)? { Some(stand_in(over)?) } else { None };
        // Owned from here on: an error removes the stand-in.
        let bound = Self { over: over.to_owned(), stand_in };
        mount(Some(kvm), over, None::<&Path>, MsFlags::MS_BIND, None::<&Path>).with_context(|| {
            format!("cannot bind over {}. Next step: see whether it is a plain file or device", over.display())
        })?;
        Ok(bound)
    }
}

/// A daemon that was killed leaves its mount behind; every access to it fails with `ENOTCONN`.
fn clear_dead(over: &Path) -> Result<()> {
    loop {
        // Not by stat(2), which the kernel may answer from its cache.
        match statfs(over) {
            Err(Errno::ENOTCONN) => {
                tracing::warn!(path = %over.display(), "removing what a killed softkvm left behind");
                umount2(over, MntFlags::MNT_DETACH).with_context(|| format!("cannot unmount {}", over.display()))?;
            }
            _ => return Ok(()),
        }
    }
}

fn needs_stand_in(over: &Path) -> Result<bool> {
    match fs::symlink_metadata(over) {
        // An empty file is one that another softkvm made.
        Ok(found) => {
            let parent = over.parent().and_then(|parent| fs::metadata(parent).ok());
            Ok(found.is_file() && found.len() == 0 && parent.is_some_and(|parent| parent.dev() == found.dev()))
        }
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(err) => bail!("cannot look at {}: {err}", over.display()),
    }
}

/// An empty file to bind over.
fn stand_in(over: &Path) -> Result<Flock<File>> {
    let file = fs::OpenOptions::new().create(true).truncate(false).append(true).open(over);
    let file =
        file.with_context(|| format!("there is no {0} and it cannot be made. Next step: touch {0}", over.display()))?;
    Flock::lock(file, FlockArg::LockSharedNonblock)
        .map_err(|(_, errno)| anyhow::anyhow!("cannot lock {}: {}. Next step: try again", over.display(), errno.desc()))
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Err(errno) = umount2(&self.over, MntFlags::MNT_DETACH)
            && errno != Errno::EINVAL
        {
            tracing::warn!(path = %self.over.display(), %errno, "cannot unmount");
        }
        // Others may have bound over the same stand-in, in namespaces of their own; removing it would unmount theirs.
        if let Some(lock) = self.stand_in.take()
            && let Ok(file) = lock.unlock()
            && let Ok(_only) = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            && let Err(err) = fs::remove_file(&self.over)
        {
            tracing::warn!(path = %self.over.display(), %err, "cannot remove the stand-in");
        }
    }
}
