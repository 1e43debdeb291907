//! What the guard is for: a killed daemon that waits for itself.

use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cuse_daemon::client::guard;
use cuse_rs::layout::{Attr, AttrOut};
use cuse_rs::{Answer, Call, Device, Kind, Operation, Service, Session};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, fstat, minor};

use crate::client::DEVICE;

/// A file system that answers nothing but what its folder is. Asked for a name it says so in a file, and never comes back.
struct Silent(PathBuf);

impl Service for Silent {
    fn serve(&self, _call: &Call<'_>, operation: Operation<'_>) -> Answer {
        if let Operation::Getattr(_) = operation {
            let attr = Attr { ino: 1, mode: libc::S_IFDIR | 0o700, nlink: 2, ..Attr::default() };
            return Answer::Attr(AttrOut { attr_valid: 1 << 30, attr, ..AttrOut::default() });
        }
        std::fs::write(&self.0, "asked").unwrap();
        loop {
            std::thread::sleep(Duration::from_secs(60));
        }
    }
}

/// A daemon that opens a file of its own, with /dev/fuse in its table of descriptors. Its device is where CUSE's would be:
/// bound nowhere.
pub fn asks_itself() {
    let place = PathBuf::from(std::env::var_os(DEVICE).unwrap());
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
    guard::start().unwrap();
    let folder = place.with_extension("mnt");
    std::fs::create_dir_all(&folder).unwrap();
    let device = Device::open("/dev/fuse".as_ref()).unwrap();
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_fd().as_raw_fd());
    mount(Some("silent"), &folder, Some("fuse"), MsFlags::empty(), Some(options.as_str())).unwrap();
    let _session = Session::start(device, Kind::Fuse { passthrough: false }, Arc::new(Silent(place))).unwrap();
    let flags = nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_CLOEXEC;
    let root = nix::fcntl::open(&folder, flags, Mode::empty()).unwrap();
    guard::serves(minor(fstat(&root).unwrap().st_dev));
    umount2(&folder, MntFlags::MNT_DETACH).unwrap();
    std::fs::remove_dir(&folder).unwrap();
    let open = move || nix::fcntl::openat(&root, "name", nix::fcntl::OFlag::O_RDWR, Mode::empty());
    // The thread that the guard hangs on must be able to end.
    let never = std::thread::spawn(open).join();
    panic!("{never:?}");
}
