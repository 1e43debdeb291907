//! The descriptor of `/dev/fuse` or `/dev/cuse`: whole messages in, whole messages out, and the ioctls it takes.
#![expect(unsafe_code, reason = "ioctl(2) on the device has no safe wrapper")]

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;

use nix::errno::Errno;

use crate::layout::BackingMap;

mod ioctl {
    use super::BackingMap;
    nix::ioctl_write_ptr!(backing_open, 229, 1, BackingMap);
    nix::ioctl_write_ptr!(backing_close, 229, 2, u32);
}

/// An open `/dev/fuse` or `/dev/cuse`. Any number of threads may read and write it.
#[derive(Debug)]
pub struct Device(File);

/// A file that the kernel knows as backing of passthrough files, by the number it gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackingId(pub i32);

impl Device {
    /// Opens `path`. Children do not inherit the descriptor: while one lives, so does the connection.
    pub fn open(path: &Path) -> io::Result<Self> {
        OpenOptions::new().read(true).write(true).open(path).map(Self)
    }

    /// Reads one message. `ENODEV` and `ECONNABORTED`: the connection is over.
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        nix::unistd::read(&self.0, buffer)
    }

    /// Writes one message.
    pub(crate) fn send(&self, pieces: &[IoSlice<'_>]) -> Result<(), Errno> {
        nix::sys::uio::writev(&self.0, pieces).map(drop)
    }

    /// Registers `file` as a backing file for `OpenFlags::PASSTHROUGH`. Needs `CAP_SYS_ADMIN`.
    pub fn backing_open(&self, file: BorrowedFd<'_>) -> Result<BackingId, Errno> {
        let map = BackingMap { fd: file.as_raw_fd(), flags: 0, padding: 0 };
        // SAFETY: `map` is a live `fuse_backing_map`, which the kernel only reads during the call.
        unsafe { ioctl::backing_open(self.0.as_raw_fd(), &map) }.map(BackingId)
    }

    /// Takes a backing file back. Files already opened with it keep it.
    pub fn backing_close(&self, id: BackingId) -> Result<(), Errno> {
        let id = id.0.cast_unsigned();
        // SAFETY: the kernel reads one u32 during the call.
        unsafe { ioctl::backing_close(self.0.as_raw_fd(), &id) }.map(drop)
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
