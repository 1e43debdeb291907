//! Every raw system call that has no safe wrapper elsewhere.
#![expect(unsafe_code, reason = "system calls that neither std nor nix wraps")]

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::Pid;

const PR_SET_MDWE: libc::c_int = 65;
const PR_MDWE_REFUSE_EXEC_GAIN: libc::c_ulong = 1;
/// `O_EXCL`: the descriptor means one thread (6.9).
const PIDFD_THREAD: libc::c_uint = 0x80;
const KCMP_VM: libc::c_long = 1;
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;

/// From here on, memory that was writable never becomes executable. prctl(2) `PR_SET_MDWE`; `EINVAL` before Linux 6.3.
pub fn deny_write_exec() -> Result<(), Errno> {
    // SAFETY: takes integers only; affects what later mmap and mprotect calls of this process may ask for.
    Errno::result(unsafe {
        libc::prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0 as libc::c_ulong, 0 as libc::c_ulong, 0 as libc::c_ulong)
    })
    .map(drop)
}

/// Has the command's process get `signal` when this one ends, however that happens, and start with the blocked signals
/// of `mask` (std has it inherit ours).
pub fn prepare_child(command: &mut Command, signal: Signal, mask: SigSet) {
    let parent = nix::unistd::getpid();
    let body = move || {
        nix::sys::prctl::set_pdeathsig(signal)?;
        mask.thread_set_mask()?;
        // It may have ended before that.
        if nix::unistd::getppid() == parent { Ok(()) } else { Err(Errno::ESRCH.into()) }
    };
    // SAFETY: runs in the child between fork and exec and makes three system calls, no more.
    unsafe { command.pre_exec(body) };
}

/// Has the command's process stop in exec, for the thread that spawns it.
pub fn trace_child(command: &mut Command) {
    // SAFETY: runs in the child between fork and exec and makes one system call.
    unsafe { command.pre_exec(|| Ok(nix::sys::ptrace::traceme()?)) };
}

/// A pidfd for thread `tid`: of the thread itself where the kernel can (6.9), else of its process `tgid`.
pub fn pidfd_of_thread(tid: Pid, tgid: Pid) -> Result<OwnedFd, Errno> {
    pidfd_open(tid, PIDFD_THREAD).or_else(|_| pidfd_open(tgid, 0))
}

fn pidfd_open(pid: Pid, flags: libc::c_uint) -> Result<OwnedFd, Errno> {
    // SAFETY: takes integers only.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), flags) })?;
    // SAFETY: the kernel just gave this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// A duplicate of descriptor `fd` of the process behind `pidfd`. Close-on-exec.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: takes integers only.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) })?;
    // SAFETY: the kernel just gave this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// The root of a file system of this type that needs no options, at no path (Linux 5.2). `EPERM` without `CAP_SYS_ADMIN`.
pub fn mounted_nowhere(kind: &CStr) -> Result<OwnedFd, Errno> {
    let owned = |fd: libc::c_long| {
        // SAFETY: both callers pass what the kernel just gave to us alone.
        unsafe { OwnedFd::from_raw_fd(fd as RawFd) }
    };
    // SAFETY: `kind` is a string that outlives the call.
    let context =
        Errno::result(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) }).map(owned)?;
    let none = ptr::null::<libc::c_void>();
    // SAFETY: this command takes neither key nor value.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), FSCONFIG_CMD_CREATE, none, none, 0)
    })?;
    // SAFETY: takes integers only.
    Errno::result(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, 0) }).map(owned)
}

/// Do two processes use one address space? False also where the kernel cannot tell.
pub fn same_address_space(a: Pid, b: Pid) -> bool {
    // SAFETY: takes integers only.
    unsafe { libc::syscall(libc::SYS_kcmp, a.as_raw(), b.as_raw(), KCMP_VM, 0, 0) == 0 }
}

/// userfaultfd(2), by system call: for whoever waits in user space only, which needs no privilege.
pub const USERFAULTFD_FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64 | 1;

/// linux/userfaultfd.h
mod userfault {
    pub(super) const API: u64 = 0xaa;
    pub(super) const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
    pub(super) const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
    pub(super) const REGISTER_MODE_WP: u64 = 1 << 1;
    /// `EVENT_REMOVE`, `EVENT_UNMAP`.
    pub(super) const EVENTS: u64 = 1 << 3 | 1 << 6;
    /// `PAGEFAULT_FLAG_WP`, `WP_HUGETLBFS_SHMEM` (5.19): shared memory can be registered.
    pub(super) const SHARED: u64 = 1 | 1 << 12;
    /// `WP_ASYNC` (6.7): any memory can be.
    pub(super) const ANY: u64 = 1 << 15;
    pub(super) const EVENT_REMOVE: u8 = 0x15;
    pub(super) const EVENT_UNMAP: u8 = 0x16;
    pub(super) const MESSAGE: usize = 32;
}

/// Has a userfaultfd tell of memory that is unmapped or discarded. `EINVAL`: a kernel before 5.19.
pub fn userfault_begin(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let begin = |features| {
        let mut api = [userfault::API, features, 0];
        // SAFETY: the kernel reads and writes the 24 bytes of `api`, which outlives the call.
        Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), userfault::UFFDIO_API, &raw mut api) }).map(drop)
    };
    let least = userfault::EVENTS | userfault::SHARED;
    begin(least | userfault::ANY).or_else(|_| begin(least))
}

/// Adds a range of its process. No page is ever write-protected, so nothing faults. `EINVAL`: not all of it is memory that this
/// kernel can watch. `EBUSY`: another userfaultfd has it.
pub fn userfault_register(fd: BorrowedFd<'_>, range: &Range<u64>) -> Result<(), Errno> {
    let mut register = [range.start, range.end - range.start, userfault::REGISTER_MODE_WP, 0];
    // SAFETY: the kernel reads and writes the 32 bytes of `register`, which outlives the call.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), userfault::UFFDIO_REGISTER, &raw mut register) }).map(drop)
}

/// What a userfaultfd told of.
#[derive(Debug)]
pub enum UserfaultNews {
    /// Discarded; it may not have come to that yet.
    Removed(Range<u64>),
    /// Unmapped.
    Unmapped(Range<u64>),
}

/// The oldest of its news, for which a thread waits: this lets it go on.
pub fn userfault_read(fd: BorrowedFd<'_>) -> Option<UserfaultNews> {
    let mut message = [0; userfault::MESSAGE];
    while nix::unistd::read(fd, &mut message) == Ok(userfault::MESSAGE) {
        let word = |at: usize| message[at..].first_chunk().copied().map_or(0, u64::from_ne_bytes);
        let range = word(8)..word(16);
        match message[0] {
            userfault::EVENT_REMOVE => return Some(UserfaultNews::Removed(range)),
            userfault::EVENT_UNMAP => return Some(UserfaultNews::Unmapped(range)),
            // None that was asked for.
            _ => {}
        }
    }
    None
}

/// Waits for a change of traced thread `tid` and returns the raw status; `None`: with `block` off, nothing happened yet.
/// Raw because real-time signals have no name in nix.
pub fn wait_for(tid: Pid, block: bool) -> Result<Option<i32>, Errno> {
    let flags = libc::__WALL | if block { 0 } else { libc::WNOHANG };
    loop {
        let mut status = 0;
        // SAFETY: `status` outlives the call.
        match Errno::result(unsafe { libc::waitpid(tid.as_raw(), &mut status, flags) }) {
            Ok(0) => return Ok(None),
            Ok(_) => return Ok(Some(status)),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Asks for slices of `slice` for the calling thread and those that it starts: the runtime of a task under a fair policy is its
/// slice, 0 the system's (sched(7), `kernel/sched/syscalls.c`; Linux 6.12, before that it is ignored). All else stays as it is.
pub fn ask_for_slices(slice: Duration) -> Result<(), Errno> {
    let mut attr = MaybeUninit::<libc::sched_attr>::zeroed();
    // SAFETY: the kernel writes no more than the size it is given to `attr`, which outlives the call.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_sched_getattr, 0, attr.as_mut_ptr(), size_of::<libc::sched_attr>(), 0)
    })?;
    // SAFETY: all fields are integers, and all bytes are initialised.
    let mut attr = unsafe { attr.assume_init() };
    if ![libc::SCHED_OTHER, libc::SCHED_BATCH].contains(&attr.sched_policy.cast_signed()) {
        return Ok(());
    }
    attr.sched_runtime = slice.as_nanos() as u64;
    // SAFETY: the kernel reads `attr`, which has the size that it says and outlives the call.
    Errno::result(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) }).map(drop)
}

/// The blocked signals of a stopped tracee. ptrace(2) `PTRACE_GETSIGMASK`.
pub fn blocked_signals(tid: Pid) -> Result<u64, Errno> {
    let mut mask = 0u64;
    // SAFETY: the kernel writes the 8 bytes named by `addr` to `mask`, which outlives the call.
    Errno::result(unsafe { libc::ptrace(PTRACE_GETSIGMASK, tid.as_raw(), size_of::<u64>(), &raw mut mask) })?;
    Ok(mask)
}

/// Replaces the blocked signals of a stopped tracee. ptrace(2) `PTRACE_SETSIGMASK`.
pub fn set_blocked_signals(tid: Pid, mask: u64) -> Result<(), Errno> {
    // SAFETY: the kernel reads the 8 bytes named by `addr` from `mask`, which outlives the call.
    Errno::result(unsafe { libc::ptrace(PTRACE_SETSIGMASK, tid.as_raw(), size_of::<u64>(), &raw const mask) }).map(drop)
}

/// Resumes a stopped tracee up to its next system-call entry or exit, with `signal` (0: none) delivered.
/// Raw for the same reason as [`wait_for`].
pub fn resume_to_syscall(tid: Pid, signal: i32) -> Result<(), Errno> {
    let none = ptr::null_mut::<libc::c_void>();
    // SAFETY: `PTRACE_SYSCALL` ignores `addr` and takes the signal number in `data`.
    Errno::result(unsafe { libc::ptrace(libc::PTRACE_SYSCALL, tid.as_raw(), none, signal as libc::c_long) }).map(drop)
}
