//! The signals by which a VMM of 2007 gets a vCPU out of `KVM_RUN`: real-time ones, which nix has no names for.
#![expect(unsafe_code, reason = "real-time signals are reached by libc alone")]

use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;

/// What kvmctl used: `SIGRTMIN+4`.
pub(crate) fn ipi() -> i32 {
    libc::SIGRTMIN() + 4
}

/// How often the handler of the IPI signal ran. kvmctl's printed "boo": the signal is blocked in every vCPU thread,
/// let through by `KVM_RUN` alone, and taken by sigwait.
pub(crate) static BOO: AtomicU32 = AtomicU32::new(0);

/// How often the handler of any other signal ran.
pub(crate) static TAKEN: AtomicU32 = AtomicU32::new(0);

/// Another signal: `SIGRTMIN+5`.
pub(crate) fn other() -> i32 {
    libc::SIGRTMIN() + 5
}

extern "C" fn boo(signal: i32) {
    let count = if signal == ipi() { &BOO } else { &TAKEN };
    count.fetch_add(1, Ordering::Relaxed);
}

fn set_of(signal: i32) -> libc::sigset_t {
    // SAFETY: sigset_t is plain bits, for which zero is a value.
    let mut set = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is ours.
    let failed = unsafe { libc::sigemptyset(&mut set) };
    assert_eq!(failed, 0);
    // SAFETY: as above.
    let failed = unsafe { libc::sigaddset(&mut set, signal) };
    assert_eq!(failed, 0, "{signal} is no signal");
    set
}

/// Gives `signal` its handler: system calls are not restarted after it.
pub(crate) fn handle(signal: i32) {
    // SAFETY: sigaction is plain data, for which zero is a value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = boo as *const () as libc::sighandler_t;
    // SAFETY: the handler counts and does nothing else, which is safe at any moment.
    let failed = unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) };
    assert_eq!(failed, 0);
}

/// Blocks `signal` in this thread and its children; the mask that was in force, as the kernel's `sigset_t`.
pub(crate) fn block(signal: i32) -> u64 {
    change(libc::SIG_BLOCK, signal)
}

/// The opposite.
pub(crate) fn unblock(signal: i32) -> u64 {
    change(libc::SIG_UNBLOCK, signal)
}

fn change(how: i32, signal: i32) -> u64 {
    let (set, mut before) = (set_of(signal), set_of(signal));
    // SAFETY: both sets are ours.
    let failed = unsafe { libc::pthread_sigmask(how, &set, &mut before) };
    assert_eq!(failed, 0);
    // SAFETY: libc's sigset_t begins with the kernel's 64 bits.
    unsafe { (&raw const before).cast::<u64>().read() }
}

/// Bit of `signal` in the kernel's `sigset_t`.
pub(crate) fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// Waits for `signal`, which this thread blocks, and takes it.
pub(crate) fn wait(signal: i32) {
    let mut got = 0;
    // SAFETY: set and result are ours.
    let failed = unsafe { libc::sigwait(&set_of(signal), &mut got) };
    assert_eq!((failed, got), (0, signal));
}

/// Is `signal` pending for this thread?
pub(crate) fn is_pending(signal: i32) -> bool {
    let mut set = set_of(signal);
    // SAFETY: the set is ours.
    let failed = unsafe { libc::sigpending(&mut set) };
    assert_eq!(failed, 0);
    // SAFETY: as above.
    unsafe { libc::sigismember(&set, signal) == 1 }
}

/// This thread, for [`send`].
pub(crate) fn thread() -> i32 {
    nix::unistd::gettid().as_raw()
}

/// tgkill(2) to a thread of this process. Nothing happens if it has ended meanwhile, as vCPU threads do when the run is over.
pub(crate) fn send(thread: i32, signal: i32) {
    // SAFETY: no pointers are passed.
    let sent = Errno::result(unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), thread, signal) });
    assert!(matches!(sent, Ok(_) | Err(Errno::ESRCH)), "signal {signal} to thread {thread}: {sent:?}");
}
