//! The thread that opens our own files.
//!
//! To open one is a request to ourselves. If the daemon is killed before the answer, whoever asked waits until the
//! connection ends (fs/fuse/dev.c, request_wait_answer: what has been read is waited out), and that is when the last
//! descriptor of /dev/fuse is closed. So whoever asks has none: this thread has a table of descriptors of its own, with
//! nothing in it but the socket by which it is told what to open.
#![expect(unsafe_code, reason = "a descriptor that means one file in two tables, and descriptors from messages")]

use std::ffi::{CStr, CString};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};
use nix::sys::stat::Mode;
use parking_lot::Mutex;

/// Longer than any name of ours, and than an errno.
const MESSAGE: usize = 256;

/// Opens files until dropped.
#[derive(Debug)]
pub struct Opener {
    /// Locked from a question to its answer.
    socket: Mutex<OwnedFd>,
}

impl Opener {
    /// Starts the thread.
    pub fn start() -> Result<Self> {
        let (socket, its) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .context("no socket for the opener")?;
        let number = its.as_raw_fd();
        let (tell, told) = mpsc::channel();
        let body = move || {
            let separate = unshare(CloneFlags::CLONE_FILES);
            let alone = separate.is_ok();
            if alone {
                close_all_but(number);
            }
            let _ = tell.send(separate);
            if alone {
                serve(&its);
            } else {
                // One table still, in which the other side closes it.
                std::mem::forget(its);
            }
        };
        thread::Builder::new().name("opener".into()).spawn(body).context("no thread for the opener")?;
        let separate = told.recv().context("the opener ended")?;
        // SAFETY: the other thread's owner is of the same number in another table; if there is no other, it has forgotten it.
        drop(unsafe { OwnedFd::from_raw_fd(number) });
        separate.context("no table of descriptors for the opener")?;
        Ok(Self { socket: Mutex::new(socket) })
    }

    /// Opens `name` in `folder`, for reading and writing. Close-on-exec.
    pub fn open(&self, folder: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
        let socket = self.socket.lock();
        send(&socket, name.to_bytes(), Some(folder.as_raw_fd()))?;
        let (answer, file) = receive(&socket)?;
        match (<[u8; 4]>::try_from(answer.as_slice()), file) {
            (Ok([0, 0, 0, 0]), Some(file)) => Ok(file),
            // No room in the table.
            (Ok([0, 0, 0, 0]), None) => Err(Errno::EMFILE),
            (Ok(errno), _) => Err(Errno::from_raw(i32::from_le_bytes(errno))),
            // It has ended.
            (Err(_), _) => Err(Errno::EPIPE),
        }
    }
}

/// Standard input, output and errors stay, lest their numbers come to mean something else.
fn close_all_but(keep: RawFd) {
    let keep = keep.cast_unsigned();
    for (first, last) in [(3, keep.saturating_sub(1)), (keep.saturating_add(1).max(3), u32::MAX)] {
        if first <= last {
            // SAFETY: the thread has a table of its own since a moment, and none of its numbers is anybody's.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
}

fn serve(socket: &OwnedFd) {
    loop {
        let (name, folder) = match receive(socket) {
            // An empty message is the end.
            Ok((name, Some(folder))) if !name.is_empty() => (name, folder),
            _ => return,
        };
        let opened = CString::new(name)
            .map_err(|_| Errno::EINVAL)
            .and_then(|name| openat(&folder, name.as_c_str(), OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()));
        let errno = opened.as_ref().err().map_or(0, |errno| *errno as i32);
        if send(socket, &errno.to_le_bytes(), opened.as_ref().ok().map(AsRawFd::as_raw_fd)).is_err() {
            return;
        }
    }
}

fn send(socket: &OwnedFd, bytes: &[u8], file: Option<RawFd>) -> Result<(), Errno> {
    let fds: Vec<RawFd> = file.into_iter().collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let rights = if fds.is_empty() { &rights[..0] } else { &rights[..] };
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], rights, MsgFlags::MSG_NOSIGNAL, None) {
            Err(Errno::EINTR) => {}
            result => return result.map(drop),
        }
    }
}

fn receive(socket: &OwnedFd) -> Result<(Vec<u8>, Option<OwnedFd>), Errno> {
    let mut bytes = [0; MESSAGE];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let (len, file) = loop {
        let mut pieces = [IoSliceMut::new(&mut bytes)];
        match recvmsg::<()>(socket.as_raw_fd(), &mut pieces, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
            Ok(message) => {
                let mut fds = message.cmsgs()?.filter_map(|part| match part {
                    ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
                    _ => None,
                });
                break (message.bytes, fds.next());
            }
        }
    };
    // SAFETY: the kernel has just put it into this thread's table, for us alone.
    let file = file.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    Ok((bytes[..len].to_vec(), file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn files_come_from_a_thread_that_has_no_other() {
        let before = std::fs::File::open("/dev/null").unwrap();
        let opener = Opener::start().unwrap();
        let folder = openat(nix::fcntl::AT_FDCWD, "/dev", OFlag::O_PATH, Mode::empty()).unwrap();
        let file = opener.open(folder.as_fd(), c"null").unwrap();
        assert_eq!(std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap(), *"/dev/null");
        assert_eq!(opener.open(folder.as_fd(), c"nothing of this name").unwrap_err(), Errno::ENOENT);
        let its = || -> Vec<_> {
            let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten().map(|task| task.path());
            let its =
                tasks.filter(|task| std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name == "opener\n"));
            its.flat_map(|task| std::fs::read_dir(task.join("fd")).into_iter().flatten().flatten()).collect()
        };
        // Standard descriptors and its socket, once it has let go of what it was asked with.
        let start = std::time::Instant::now();
        while its().len() > 4 {
            assert!(start.elapsed() < std::time::Duration::from_secs(10), "{:?}", its());
            std::thread::yield_now();
        }
        drop((before, opener));
    }
}
