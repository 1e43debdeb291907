//! Signals that are pending for a client's thread and blocked by it.
//!
//! An unblocked signal makes the kernel send `FUSE_INTERRUPT`. One that the thread blocks, but `KVM_SET_SIGNAL_MASK`
//! unblocks during `KVM_RUN`, does not: nothing tells about it but the thread's pending set, so while such a mask is in
//! force somebody has to look. That is one thread for all, which exists only while there is something to watch.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use kvm::client::SignalMask;
use parking_lot::{Condvar, Mutex};

/// How late a watched signal may be seen: VMMs of 2007 kick their vCPUs this way.
const PERIOD: Duration = Duration::from_micros(500);
/// How long the watcher stays with nothing to watch: `KVM_RUN` is called again and again.
const LINGER: Duration = Duration::from_secs(2);

/// The signals pending for a thread, its own and those of its process; bit n−1 is signal n.
#[derive(Debug)]
pub struct Pending(File);

impl Pending {
    /// Of thread `tid`; `None` if it is gone.
    pub fn of(tid: u32) -> Option<Self> {
        File::open(format!("/proc/{tid}/status")).ok().map(Self)
    }

    /// Pending signals that `mask` does not block; none for a thread that is gone.
    pub fn outside(&self, mask: SignalMask) -> u64 {
        self.read().unwrap_or(0) & !mask.0
    }

    fn read(&self) -> Option<u64> {
        let mut text = [0; 4096];
        let len = self.0.read_at(&mut text, 0).ok().filter(|&len| len > 0)?;
        Some(pending(&text[..len]))
    }
}

/// The set that was asked for last. A thread asks again and again, and opening takes longer than reading.
#[derive(Debug, Default)]
pub struct LastPending(Mutex<Option<(u32, Arc<Pending>)>>);

impl LastPending {
    /// Of thread `tid`; `None` if it is gone.
    pub fn of(&self, tid: u32) -> Option<Arc<Pending>> {
        let mut last = self.0.lock();
        // The file means the thread it was opened for, also when its number means another.
        let known = last.as_ref().filter(|(of, pending)| *of == tid && pending.read().is_some());
        if let Some((_, pending)) = known {
            return Some(Arc::clone(pending));
        }
        *last = Pending::of(tid).map(|pending| (tid, Arc::new(pending)));
        last.as_ref().map(|(_, pending)| Arc::clone(pending))
    }
}

/// `SigPnd` and `ShdPnd` of `/proc/PID/status`, together.
fn pending(status: &[u8]) -> u64 {
    let field = |line: &[u8], name: &[u8]| {
        let digits = std::str::from_utf8(line.strip_prefix(name)?).ok()?;
        u64::from_str_radix(digits.trim(), 16).ok()
    };
    status
        .split(|&byte| byte == b'\n')
        .filter_map(|line| field(line, b"SigPnd:").or_else(|| field(line, b"ShdPnd:")))
        .fold(0, |all, set| all | set)
}

type Run = Arc<dyn Fn() + Send + Sync>;

struct Watch {
    id: u64,
    pending: Arc<Pending>,
    mask: SignalMask,
    run: Run,
}

/// Who is watched, for the whole daemon.
#[derive(Default)]
pub struct Watcher {
    watches: Mutex<Watches>,
    added: Condvar,
    ids: AtomicU64,
}

#[derive(Default)]
struct Watches {
    list: Vec<Watch>,
    thread: bool,
}

impl Watcher {
    /// Calls `run`, perhaps repeatedly, once a signal outside `mask` is in `pending`.
    /// Returns what [`remove`](Self::remove) wants.
    pub fn add(self: &Arc<Self>, pending: Arc<Pending>, mask: SignalMask, run: Run) -> u64 {
        let id = self.ids.fetch_add(1, Ordering::Relaxed);
        let mut watches = self.watches.lock();
        watches.list.push(Watch { id, pending, mask, run });
        if !watches.thread {
            let watcher = Arc::clone(self);
            let spawned = thread::Builder::new().name("signals".into()).spawn(move || watcher.watch());
            watches.thread = spawned.inspect_err(|err| tracing::error!(%err, "nobody watches for signals")).is_ok();
        }
        self.added.notify_one();
        id
    }

    /// Once this returns, the watch's `run` is not called any more.
    pub fn remove(&self, id: u64) {
        self.watches.lock().list.retain(|watch| watch.id != id);
    }

    fn watch(&self) {
        let mut watches = self.watches.lock();
        loop {
            if watches.list.is_empty()
                && self.added.wait_for(&mut watches, LINGER).timed_out()
                && watches.list.is_empty()
            {
                watches.thread = false;
                return;
            }
            for watch in &watches.list {
                if watch.pending.outside(watch.mask) != 0 {
                    (watch.run)();
                }
            }
            parking_lot::MutexGuard::unlocked(&mut watches, || thread::sleep(PERIOD));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_pending_sets_count() {
        let status = b"Name:\tcat\nSigQ:\t1/95\nSigPnd:\t0000000000000200\nShdPnd:\t8000000000000000\nSigBlk:\tffff\n";
        assert_eq!(pending(status), 0x8000_0000_0000_0200);
        assert_eq!(pending(b"SigPnd:\tjunk\n"), 0);
        assert_eq!(pending(b""), 0);
    }

    #[test]
    fn watcher_ends_with_nothing_to_watch() {
        let watcher = Arc::new(Watcher::default());
        let pending = LastPending::default().of(std::process::id()).unwrap();
        let id = watcher.add(pending, SignalMask(!0), Arc::new(|| panic!("everything is masked")));
        assert!(watcher.watches.lock().thread);
        watcher.remove(id);
        let start = std::time::Instant::now();
        while watcher.watches.lock().thread {
            assert!(start.elapsed() < LINGER * 5);
            thread::sleep(PERIOD * 50);
        }
    }
}
