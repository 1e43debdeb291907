//! What a daemon that was killed cannot do any more, done by a process of its own, forked before anything is opened.
//!
//! It aborts the connection that VM and vCPU files belong to. The kernel does so by itself when /dev/fuse is closed, but a
//! daemon asks itself: a worker may be inside a request to another one, which is dead. It then waits in the kernel for ever,
//! with /dev/fuse open, and with it all clients. /dev/cuse needs nobody: no request by it comes from the daemon, so its last
//! thread is gone with those that wait for /dev/fuse, and closing it ends the device (fs/fuse/cuse.c, cuse_channel_release).
//!
//! And it gives signals back to client threads that were held. Those have all signals blocked, or a handler would run in the
//! middle of an injection. A killed tracer's tracees go on by themselves, but with that mask. What cannot be brought back
//! is the result of the ioctl that such a thread was in: it goes on with that of the system call that ran instead. One that was
//! in a page fault of the 2007 ABI's RAM, which has no result, ends by SIGSEGV, as the next touch would have by SIGBUS. And it
//! stays on the CPU that it was given meanwhile (`place.rs`).
#![expect(unsafe_code, reason = "fork, and memory shared with the child")]

use std::num::NonZeroUsize;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::Mode;
use nix::unistd::{ForkResult, Pid, fork, getpid, write};

use super::inject::is_dead;
use super::stop::tasks;
use crate::sys;

/// Injections at one time that are looked after.
const SLOTS: usize = 256;
/// Looks, and the time between: for the dead daemon to let a thread go, and for the thread to stop.
const LOOKS: u32 = 1000;
const POLL: Duration = Duration::from_millis(1);
/// SIGKILL and SIGSTOP, which nothing blocks.
const NEVER_BLOCKED: u64 = 1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1);

/// What the guard knows of the daemon.
#[repr(C)]
struct Table {
    /// The connection's number; 0: none.
    served: AtomicU64,
    held: [Slot; SLOTS],
}

/// A held thread; zeroes: none.
#[repr(C)]
#[derive(Debug)]
struct Slot {
    tid: AtomicI32,
    blocked: AtomicU64,
}

static TABLE: OnceLock<&'static Table> = OnceLock::new();

/// Starts the guard. Before any device is opened, which it would keep open, and from the thread that is the daemon's last.
pub fn start() -> Result<(), Errno> {
    let len = NonZeroUsize::new(size_of::<Table>()).ok_or(Errno::EINVAL)?;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let table =
        unsafe { mmap_anonymous(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED) }?;
    // SAFETY: page-aligned, zeroed, as long as the table, never unmapped; all of it is atomics, for the other process, too.
    let table: &'static Table = unsafe { table.cast().as_ref() };
    let daemon = getpid();
    // SAFETY: glibc lets the child allocate; it needs nothing else that another thread may have locked.
    match unsafe { fork() }? {
        ForkResult::Child => watch(daemon, table),
        ForkResult::Parent { .. } => {
            let _ = TABLE.set(table);
            Ok(())
        }
    }
}

/// Clients may come, by this connection: the number of its file system's device. 0: no more.
pub fn serves(connection: u64) {
    if let Some(table) = TABLE.get() {
        table.served.store(connection, Ordering::Release);
    }
}

/// The life of the guard.
fn watch(daemon: Pid, table: &Table) -> ! {
    // SAFETY: descriptors of this process, whose owners never run here.
    unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) };
    let news = SigSet::from(Signal::SIGTERM);
    // From here on the daemon's end is a SIGTERM that pends; before, it shows below.
    let told = news.thread_block().and_then(|()| set_pdeathsig(Signal::SIGTERM));
    while told.is_ok() && !is_dead(daemon) {
        let _ = news.wait();
    }
    let served = table.served.load(Ordering::Acquire);
    if served != 0 {
        let _ = abort(daemon, served);
    }
    for slot in &table.held {
        let tid = slot.tid.load(Ordering::Acquire);
        if tid > 0 {
            let _ = restore(Pid::from_raw(tid), slot.blocked.load(Ordering::Relaxed));
        }
    }
    // SAFETY: ends this process, and runs nothing of the daemon's.
    unsafe { libc::_exit(0) }
}

/// Ends the connection by FUSE's control file system, which knows every mounted one by number, be it bound over a device,
/// or reached by CUSE's alone (fs/fuse/control.c).
fn abort(daemon: Pid, connection: u64) -> Result<(), Errno> {
    let control = sys::mounted_nowhere(c"fusectl")?;
    let name = format!("{connection}/abort");
    let file = openat(&control, name.as_str(), OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    // A thread that is left keeps the connection, and so its number. With none left the kernel has ended it, and the number
    // may mean another one; so what was opened counts only if somebody is left afterwards.
    if tasks(daemon).into_iter().all(is_dead) {
        return Ok(());
    }
    write(&file, b"1").map(drop)
}

/// Gives the thread its mask back, if it has the one that we gave it.
fn restore(tid: Pid, blocked: u64) -> Result<(), Errno> {
    repeatedly(|| match ptrace::seize(tid, Options::empty()) {
        // The dead daemon's still.
        Err(Errno::EPERM) => Ok(None),
        result => result.map(Some),
    })?;
    ptrace::interrupt(tid)?;
    repeatedly(|| sys::wait_for(tid, false))?;
    if sys::blocked_signals(tid)? | NEVER_BLOCKED == !0 {
        sys::set_blocked_signals(tid, blocked)?;
    }
    ptrace::detach(tid, None)
}

fn repeatedly<T>(mut look: impl FnMut() -> Result<Option<T>, Errno>) -> Result<T, Errno> {
    for _ in 0..LOOKS {
        if let Some(found) = look()? {
            return Ok(found);
        }
        std::thread::sleep(POLL);
    }
    Err(Errno::ETIMEDOUT)
}

/// While it lives the guard knows of a held thread.
#[derive(Debug)]
pub struct Note(&'static Slot);

impl Note {
    /// Thread `tid` is about to be held, and blocked `blocked` before. `None`: nobody guards.
    pub fn of(tid: Pid, blocked: u64) -> Option<Self> {
        let free = |slot: &&Slot| {
            // -1: taken, and not yet to be looked at.
            slot.tid.compare_exchange(0, -1, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        };
        let slot = TABLE.get()?.held.iter().find(free)?;
        slot.blocked.store(blocked, Ordering::Relaxed);
        slot.tid.store(tid.as_raw(), Ordering::Release);
        Some(Self(slot))
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        self.0.tid.store(0, Ordering::Release);
    }
}
