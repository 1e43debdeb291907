//! A client's memory, copied. process_vm_readv(2) reaches what the client itself could, and nothing else.

use std::io::{IoSlice, IoSliceMut};

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;

/// Reads all of `bytes` at `address`; `EFAULT` if any is out of reach.
pub fn read(tid: Pid, address: u64, bytes: &mut [u8]) -> Result<(), Errno> {
    let len = bytes.len();
    whole(len, read_some(tid, address, bytes))
}

/// Reads as far as memory goes; less than asked at the first page that is out of reach.
pub fn read_some(tid: Pid, address: u64, bytes: &mut [u8]) -> Result<usize, Errno> {
    let remote = RemoteIoVec { base: address as usize, len: bytes.len() };
    process_vm_readv(tid, &mut [IoSliceMut::new(bytes)], &[remote])
}

/// Writes all of `bytes` at `address`; `EFAULT` if any is out of reach (a part may have been written).
pub fn write(tid: Pid, address: u64, bytes: &[u8]) -> Result<(), Errno> {
    let remote = RemoteIoVec { base: address as usize, len: bytes.len() };
    whole(bytes.len(), process_vm_writev(tid, &[IoSlice::new(bytes)], &[remote]))
}

fn whole(wanted: usize, done: Result<usize, Errno>) -> Result<(), Errno> {
    match done {
        Ok(done) if done == wanted => Ok(()),
        Ok(_) => Err(Errno::EFAULT),
        Err(errno) => Err(errno),
    }
}
