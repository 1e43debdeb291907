//! A descriptor of ours becomes one of the client's, with no path that both would have to see.
//!
//! The client makes a socket pair, we take one end (`pidfd_getfd`) and send the file over it (`SCM_RIGHTS`). The client
//! closes that end, which had the lowest free number, and receives the file there from the other one.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::Pid;

use super::inject::Held;
use super::vm;
use crate::sys;

/// Where things lie in the scratch page.
mod at {
    pub(super) const PAIR: u64 = 0;
    pub(super) const MSGHDR: u64 = 64;
    pub(super) const IOVEC: u64 = 128;
    pub(super) const BYTE: u64 = 192;
    pub(super) const CONTROL: u64 = 256;
}
/// `CMSG_SPACE(sizeof(int))` and where in it the descriptor lies.
const CONTROL_LEN: u64 = 24;
const CONTROL_DATA: u64 = 16;

/// Gives the client a descriptor of `file` and returns its number. `tgid`: the process that the held thread is of.
pub fn give(held: &Held, tgid: Pid, file: BorrowedFd<'_>, cloexec: bool) -> Result<i32, Errno> {
    let scratch = held.scratch()?;
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
    held.syscall(libc::SYS_socketpair, [libc::AF_UNIX as u64, kind as u64, 0, scratch + at::PAIR, 0, 0])?;
    let mut pair = [0; 8];
    vm::read(held.tid(), scratch + at::PAIR, &mut pair)?;
    let first = i32::from_le_bytes([pair[0], pair[1], pair[2], pair[3]]);
    let second = i32::from_le_bytes([pair[4], pair[5], pair[6], pair[7]]);

    let sent = send(held.tid(), tgid, first, file);
    close(held, first)?;
    let received = sent.and_then(|()| receive(held, scratch, second, cloexec));
    close(held, second)?;
    received
}

/// Puts `file` in the place of the client's descriptor `fd`, open over exec.
pub fn replace(held: &Held, tgid: Pid, file: BorrowedFd<'_>, fd: i32) -> Result<(), Errno> {
    let new = give(held, tgid, file, true)?;
    let placed = held.syscall(libc::SYS_dup2, [new as u64, fd as u64, 0, 0, 0, 0]);
    close(held, new)?;
    placed.map(drop)
}

/// Closes descriptor `fd` of the client.
pub fn close(held: &Held, fd: i32) -> Result<(), Errno> {
    held.syscall(libc::SYS_close, [fd as u64, 0, 0, 0, 0, 0]).map(drop)
}

fn send(tid: Pid, tgid: Pid, socket: i32, file: BorrowedFd<'_>) -> Result<(), Errno> {
    let pidfd = sys::pidfd_of_thread(tid, tgid)?;
    let socket = sys::pidfd_getfd(pidfd.as_fd(), socket)?;
    let fds = [file.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(b".")], &rights, MsgFlags::MSG_NOSIGNAL, None).map(drop)
}

fn receive(held: &Held, scratch: u64, socket: i32, cloexec: bool) -> Result<i32, Errno> {
    // struct msghdr: name, namelen, iov, iovlen, control, controllen, flags.
    let header = [0, 0, scratch + at::IOVEC, 1, scratch + at::CONTROL, CONTROL_LEN, 0];
    held.poke(scratch + at::MSGHDR, &words(&header))?;
    held.poke(scratch + at::IOVEC, &words(&[scratch + at::BYTE, 1]))?;
    let flags = libc::MSG_DONTWAIT | if cloexec { libc::MSG_CMSG_CLOEXEC } else { 0 };
    held.syscall(libc::SYS_recvmsg, [socket as u64, scratch + at::MSGHDR, flags as u64, 0, 0, 0])?;
    let mut control = [0; CONTROL_LEN as usize];
    vm::read(held.tid(), scratch + at::CONTROL, &mut control)?;
    let [len, .., a, b, c, d, _, _, _, _] = control;
    // No room in the descriptor table: the kernel dropped the rights and left the header empty.
    if u64::from(len) < CONTROL_DATA + 4 {
        return Err(Errno::EMFILE);
    }
    Ok(i32::from_le_bytes([a, b, c, d]))
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
