//! Stops the other threads of a client for a moment.
//!
//! A thread of ours of its own does it, and lets them go by ending: the kernel then detaches everything that it traced,
//! also those that have not stopped yet because they are inside a system call. Threads inside a request to us cannot run
//! client code before we answer, so they are not waited for: some wait for locks that our caller holds. Nor are threads that
//! wait until the watcher has read of what they do: it reads when nobody has exclusive use of the space.

use std::collections::HashMap;
use std::fs;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::unistd::Pid;

use super::inject::is_dead;
use crate::sys;

/// A thread that does not stop within this time sleeps in a device driver. It writes to no memory of ours meanwhile.
const PATIENCE: Duration = Duration::from_secs(2);
/// What threads that stop others are called.
const NAME: &str = "stopper";
const POLL: Duration = Duration::from_micros(50);

/// While it lives no other thread goes on once it has stopped.
pub struct Stopping {
    release: Option<mpsc::Sender<()>>,
    stand: mpsc::Receiver<()>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Stopping {
    /// Returns when they stand, or all that ever will.
    pub fn wait(&self) {
        // Ends with an error where there is no thread that stops them.
        let _ = self.stand.recv();
    }
}

impl Drop for Stopping {
    fn drop(&mut self) {
        drop(self.release.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Tells all threads of process `tgid` except `keep` to stop before they run on in user space. `is_waiting`: is this
/// thread inside a request to us?
pub fn others(tgid: Pid, keep: Pid, is_waiting: impl Fn(u32) -> bool + Send + 'static) -> Stopping {
    let (told, wait_told) = mpsc::channel();
    let (stand, wait_stand) = mpsc::channel();
    let (release, wait_release) = mpsc::channel::<()>();
    // The held thread can make no other.
    if tasks(tgid).iter().all(|&tid| tid == keep) {
        return Stopping { release: None, stand: wait_stand, thread: None };
    }
    let body = move || {
        stop_all(tgid, keep, is_waiting, told);
        drop(stand);
        // Ends with an error when the other side lets go.
        let _ = wait_release.recv();
    };
    let thread = thread::Builder::new().name(NAME.into()).spawn(body);
    let thread = thread.inspect_err(|err| tracing::error!(%err, "cannot stop the client's threads")).ok();
    let _: Result<(), _> = wait_told.recv();
    Stopping { release: Some(release), stand: wait_stand, thread }
}

/// Drops `told` when all threads that there are have been told.
fn stop_all(tgid: Pid, keep: Pid, is_waiting: impl Fn(u32) -> bool, told: mpsc::Sender<()>) {
    let mut told = Some(told);
    let deadline = Instant::now() + PATIENCE;
    // True: stands, is dead, or is somebody else's.
    let mut threads = HashMap::from([(keep, true)]);
    loop {
        // Running threads make new ones until they stand.
        let mut new = false;
        for tid in tasks(tgid) {
            threads.entry(tid).or_insert_with(|| {
                new = true;
                attached(tid, || ptrace::seize(tid, Options::empty())).and_then(|()| ptrace::interrupt(tid)).is_err()
            });
        }
        if !new {
            drop(told.take());
        }
        for (&tid, stands) in threads.iter_mut().filter(|(_, stands)| !**stands) {
            let waits = is_waiting(tid.as_raw().cast_unsigned());
            *stands = waits
                || !matches!(sys::wait_for(tid, false), Ok(None))
                || waits_for_watcher(tgid, tid) == Some(true)
                || is_dead(tid);
        }
        if !new && threads.values().all(|stands| *stands) {
            return;
        }
        if Instant::now() > deadline {
            tracing::warn!(pid = tgid.as_raw(), "some threads of the client do not stop; going on without");
            return;
        }
        if !new {
            thread::sleep(POLL);
        }
    }
}

/// Does thread `tid` wait until the news of what it does to its memory are read? `None`: it runs, or this kernel does not say.
pub(super) fn waits_for_watcher(tgid: Pid, tid: Pid) -> Option<bool> {
    let place = fs::read_to_string(format!("/proc/{tgid}/task/{tid}/wchan")).unwrap_or_default();
    (!matches!(place.as_str(), "" | "0")).then(|| place.contains("userfault"))
}

/// Has `seize` attach to thread `tid`. `EPERM`: another tracer has it.
///
/// A stopper counts as joined when it gives up its memory, and detaches what it traced after that (`do_exit`: `exit_mm`, then
/// `exit_notify`). One that is on its way there is waited for.
pub(super) fn attached(tid: Pid, seize: impl Fn() -> Result<(), Errno>) -> Result<(), Errno> {
    let ends = |tracer: i32| {
        fs::read_to_string(format!("/proc/self/task/{tracer}/comm")).is_ok_and(|name| name.trim_end() == NAME)
    };
    let deadline = Instant::now() + PATIENCE;
    let mut alone = false;
    loop {
        match (seize(), alone) {
            (Err(Errno::EPERM), false) if Instant::now() < deadline => match tracer(tid) {
                Some(tracer) if ends(tracer) => thread::sleep(POLL),
                Some(_) => return Err(Errno::EPERM),
                // It may have gone just now.
                None => alone = true,
            },
            (result, _) => return result,
        }
    }
}

/// Who traces thread `tid`.
pub(super) fn tracer(tid: Pid) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default();
    let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"))?.trim().parse().ok()?;
    (tracer != 0).then_some(tracer)
}

/// The threads of process `tgid`, those included that have ended and nobody has collected.
pub(super) fn tasks(tgid: Pid) -> Vec<Pid> {
    let entries = fs::read_dir(format!("/proc/{tgid}/task")).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).map(Pid::from_raw).collect()
}
