//! Eventfds of a client: told apart, signalled, and emptied without ever waiting for anybody.
#![expect(unsafe_code, reason = "preadv2 has no safe wrapper that takes RWF_NOWAIT")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// A duplicate of a client's eventfd.
pub(crate) struct EventFd {
    fd: OwnedFd,
    /// The kernel's number for it: two descriptors of one eventfd have the same.
    id: u64,
}

impl EventFd {
    /// EINVAL: `fd` is something else.
    pub(crate) fn new(fd: OwnedFd) -> Result<Self, Errno> {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap_or_default();
        let id = info.lines().find_map(|line| line.strip_prefix("eventfd-id:")?.trim().parse().ok());
        Ok(Self { fd, id: id.ok_or(Errno::EINVAL)? })
    }

    /// Both are one eventfd.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.id == other.id
    }

    /// Adds 1. A counter that is full says what it would say anyway, so nothing is added there, as in the kernel.
    pub(crate) fn signal(&self) {
        let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLOUT)];
        if poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready == 1)
            && let Err(errno) = nix::unistd::write(&self.fd, &1u64.to_ne_bytes())
        {
            tracing::debug!(%errno, "an eventfd cannot be signalled");
        }
    }

    /// Empties the counter. True: it was not empty. The client may read it too, so this must not wait for a value.
    pub(crate) fn take(&self) -> bool {
        let mut count = [0u8; 8];
        let iov = libc::iovec { iov_base: count.as_mut_ptr().cast(), iov_len: count.len() };
        // SAFETY: `iov` is one buffer of eight bytes that lives until the call returns, and the kernel writes no more than
        // its length; offset −1 means a file without a position.
        let read = unsafe { libc::preadv2(self.fd.as_raw_fd(), &iov, 1, -1, libc::RWF_NOWAIT) };
        read == 8
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::eventfd::EfdFlags;

    fn new() -> nix::sys::eventfd::EventFd {
        nix::sys::eventfd::EventFd::from_flags(EfdFlags::EFD_CLOEXEC).unwrap()
    }

    fn ours(of: impl AsFd) -> Result<EventFd, Errno> {
        EventFd::new(of.as_fd().try_clone_to_owned().unwrap())
    }

    #[test]
    fn signals_arrive_once_and_taking_never_waits() {
        let theirs = new();
        let event = ours(&theirs).unwrap();
        assert!(!event.take());
        event.signal();
        event.signal();
        assert_eq!(theirs.read(), Ok(2));
        theirs.write(5).unwrap();
        assert!(event.take() && !event.take());
        theirs.write(u64::MAX - 1).unwrap();
        event.signal();
        assert!(event.take(), "a full counter stops nobody");
    }

    #[test]
    fn identity_is_that_of_the_eventfd() {
        let (one, other) = (new(), new());
        assert!(ours(&one).unwrap().is_same(&ours(&one).unwrap()));
        assert!(!ours(&one).unwrap().is_same(&ours(&other).unwrap()));
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(ours(file).err(), Some(Errno::EINVAL));
    }
}
