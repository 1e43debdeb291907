//! What no exit can be cheaper than: an ioctl of a FUSE file that is answered at once. A VMM is a process of its own, so who
//! asks here is one as well; what the change of address space takes shows beside it, in a row where it is not.
#![expect(unsafe_code, reason = "ioctl(2)")]

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, ensure};
use cuse_rs::layout::{Attr, AttrOut, EntryOut, OpenFlags, OpenOut, ROOT_ID};
use cuse_rs::{Answer, Bytes, Call, Device, Kind, Operation, Service, Session};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, unshare};
use nix::unistd::Pid;

use crate::row::Row;
use crate::undisturbed::micros_each;

const ONE: &str = "bare FUSE ioctl, both sides on one CPU";
const SAME: &str = "bare FUSE ioctl, both sides in one process on one CPU";
const FREE: &str = "bare FUSE ioctl, left to the scheduler";
pub(crate) const NAMES: &[&str] = &[ONE, SAME, FREE];

/// `_IO('w', 1)`
const NOTHING: libc::c_ulong = 0x7701;
const FILE: u64 = 2;

/// A directory with one file, whose ioctl does nothing.
struct Bare {
    pinned: bool,
}

impl Service for Bare {
    fn serve(&self, call: &Call<'_>, operation: Operation<'_>) -> Answer {
        let attr = |node| {
            let mode = if node == ROOT_ID { libc::S_IFDIR | 0o700 } else { libc::S_IFREG | 0o600 };
            Attr { ino: node, nlink: 1, mode, blksize: 4096, ..Attr::default() }
        };
        match operation {
            Operation::Lookup(name) if name == c"file" => {
                Answer::Entry(EntryOut { nodeid: FILE, attr: attr(FILE), ..EntryOut::default() })
            }
            Operation::Getattr(_) => Answer::Attr(AttrOut { attr: attr(call.header.nodeid), ..AttrOut::default() }),
            Operation::Open(_) => {
                Answer::Open(OpenOut { fh: 1, open_flags: OpenFlags::DIRECT_IO.bits(), ..OpenOut::default() })
            }
            Operation::Ioctl(_) => Answer::Ioctl(0, Bytes::new()),
            Operation::Release(_) => Answer::Empty,
            Operation::Forget(_) | Operation::BatchForget(_) => Answer::Done,
            _ => Answer::Error(Errno::ENOSYS),
        }
    }

    fn worker_started(&self) {
        if self.pinned {
            pin();
        }
    }
}

/// To the first CPU that there is; without effect where there is none to choose.
fn pin() {
    let mut set = CpuSet::new();
    let _ = set.set(0).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
}

pub(crate) fn measure() -> Result<Vec<Row>> {
    let row = |name: &'static str, pinned, client: fn(&Path) -> Result<f64>| {
        // A thread of its own: its namespace and its CPU go with it.
        let measured = thread::spawn(move || round_trip(pinned, client)).join().expect("no panic of ours");
        Ok::<_, anyhow::Error>(Row::new(name, "µs", Some(measured?), None))
    };
    Ok(vec![row(ONE, true, in_process_of_its_own)?, row(SAME, true, each)?, row(FREE, false, in_process_of_its_own)?])
}

/// Serves a file that `client` makes ioctls of, and gives what it says.
fn round_trip(pinned: bool, client: fn(&Path) -> Result<f64>) -> Result<f64> {
    if pinned {
        pin();
    }
    let device = Device::open(Path::new("/dev/fuse")).context("cannot open /dev/fuse")?;
    unshare(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace")?;
    mount(None::<&Path>, "/", None::<&Path>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&Path>)?;
    let dir = std::env::temp_dir().join(format!("softkvm-bare-{}", std::process::id()));
    fs::create_dir_all(&dir)?;
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_fd().as_raw_fd());
    mount(Some("bare"), &dir, Some("fuse"), MsFlags::empty(), Some(options.as_str())).context("cannot mount")?;
    let session = Session::start(device, Kind::Fuse { passthrough: false }, Arc::new(Bare { pinned }))?;
    let each = client(&dir.join("file"));
    umount2(&dir, MntFlags::MNT_DETACH)?;
    fs::remove_dir(&dir)?;
    drop(session);
    each
}

/// This program with `--bare-client FILE`.
fn in_process_of_its_own(file: &Path) -> Result<f64> {
    let me = std::env::current_exe().context("our own path")?;
    let output = Command::new(me).arg("--bare-client").arg(file).stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "the measuring process ended with {}", output.status);
    String::from_utf8_lossy(&output.stdout).trim().parse().context("the measuring process printed no number")
}

/// Microseconds that an ioctl of `file` takes.
pub(crate) fn each(file: &Path) -> Result<f64> {
    let file = OpenOptions::new().read(true).open(file).context("cannot open the file")?;
    micros_each(|count| repeat(&file, count))
}

fn repeat(file: &File, count: u32) -> Result<()> {
    for _ in 0..count {
        // SAFETY: the request carries no data, and its server looks at none.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), NOTHING, 0) };
        ensure!(result == 0, "ioctl: {}", Errno::last());
    }
    Ok(())
}
