//! Signals that are pending for a client's thread and blocked by it.
//!
//! An unblocked signal makes the kernel send `FUSE_INTERRUPT`. One that the thread blocks, but `KVM_SET_SIGNAL_MASK`
//! unblocks during `KVM_RUN`, does not: nothing tells about it but the thread's pending set, so while such a mask is in
//! force somebody has to look. Whoever runs the guest looks himself: one read of `/proc` takes 10 µs, and no other thread
//! has to be scheduled first, which takes milliseconds when the CPUs are busy.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use kvm::client::SignalMask;
use nix::sys::signal::Signal;
use parking_lot::Mutex;

/// How often the pending set is read: VMMs of 2007 kick their vCPUs this way, and reading takes a fiftieth of it.
pub const PERIOD: Duration = Duration::from_micros(500);

/// Ignored where nothing else is said: signal(7), "Ign".
const IGNORED_BY_DEFAULT: u64 =
    bit(Signal::SIGCHLD) | bit(Signal::SIGCONT) | bit(Signal::SIGURG) | bit(Signal::SIGWINCH);

const fn bit(signal: Signal) -> u64 {
    1 << (signal as i32 - 1)
}

/// What `/proc/TID/status` tells of signals; bit n−1 is signal n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sets {
    /// Of the thread and of its process: `SigPnd`, `ShdPnd`.
    pending: u64,
    /// Those that nobody hears of: `SigIgn`, and by default what is not in `SigCgt`.
    ignored: u64,
}

impl Sets {
    fn parse(status: &[u8]) -> Self {
        let (mut pending, mut ignored, mut caught) = (0, 0, 0);
        for line in status.split(|&byte| byte == b'\n') {
            let Some((name, digits)) = line.split_at_checked(8) else { continue };
            let sets: &mut u64 = match name {
                b"SigPnd:\t" | b"ShdPnd:\t" => &mut pending,
                b"SigIgn:\t" => &mut ignored,
                b"SigCgt:\t" => &mut caught,
                _ => continue,
            };
            *sets |= std::str::from_utf8(digits).ok().and_then(|text| u64::from_str_radix(text, 16).ok()).unwrap_or(0);
        }
        Self { pending, ignored: ignored | IGNORED_BY_DEFAULT & !caught }
    }
}

/// A thread's pending signals, as its runs under a mask see them.
#[derive(Debug)]
pub struct Pending {
    status: File,
    /// At the last look.
    seen: AtomicU64,
    /// Came during a run that would have taken them, and are ignored: the kernel drops such a signal as it is sent.
    /// Here the thread blocks them all the while, so they stay in its set.
    dropped: AtomicU64,
}

impl Pending {
    /// Of thread `tid`; `None` if it is gone.
    fn of(tid: u32) -> Option<Self> {
        let status = File::open(format!("/proc/{tid}/status")).ok()?;
        Some(Self { status, seen: AtomicU64::new(0), dropped: AtomicU64::new(0) })
    }

    /// A run begins: true if a signal is pending that `mask` does not block. `None`: the thread is gone, though its number
    /// may mean another by now.
    fn at_entry(&self, mask: SignalMask) -> Option<bool> {
        self.read().map(|sets| self.ends(sets, sets.pending, mask))
    }

    /// During a run: as above. Nothing is pending for a thread that is gone.
    pub fn ends_run(&self, mask: SignalMask) -> bool {
        self.read().is_some_and(|sets| self.ends(sets, self.seen.load(Relaxed), mask))
    }

    fn ends(&self, Sets { pending, ignored }: Sets, seen: u64, mask: SignalMask) -> bool {
        let taken = pending & !mask.0;
        let dropped = pending & self.dropped.load(Relaxed) | taken & !seen & ignored;
        self.dropped.store(dropped, Relaxed);
        self.seen.store(pending, Relaxed);
        taken & !dropped != 0
    }

    fn read(&self) -> Option<Sets> {
        let mut text = [0; 4096];
        let len = self.status.read_at(&mut text, 0).ok().filter(|&len| len > 0)?;
        Some(Sets::parse(&text[..len]))
    }
}

/// The thread that ran a vCPU last. It runs it again and again, and opening takes longer than reading.
#[derive(Debug, Default)]
pub struct LastPending(Mutex<Option<(u32, Arc<Pending>)>>);

impl LastPending {
    /// Thread `tid` begins a run under `mask`: its signals, and whether one ends the run at once. `None` if it is gone.
    pub fn enter(&self, tid: u32, mask: SignalMask) -> Option<(Arc<Pending>, bool)> {
        let mut last = self.0.lock();
        if let Some((of, pending)) = &*last
            && *of == tid
            && let Some(ends) = pending.at_entry(mask)
        {
            return Some((Arc::clone(pending), ends));
        }
        let pending = Arc::new(Pending::of(tid)?);
        let ends = pending.at_entry(mask)?;
        *last = Some((tid, Arc::clone(&pending)));
        Some((pending, ends))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: SignalMask = SignalMask(0);

    fn fresh() -> Pending {
        Pending::of(std::process::id()).unwrap()
    }

    #[test]
    fn both_pending_sets_count() {
        let status = b"Name:\tcat\nSigQ:\t1/95\nSigPnd:\t0000000000000200\nShdPnd:\t8000000000000000\nSigBlk:\tffff\n";
        assert_eq!(Sets::parse(status).pending, 0x8000_0000_0000_0200);
        assert_eq!(Sets::parse(b"SigPnd:\tjunk\n"), Sets::parse(b""));
    }

    /// SIGCHLD is 17, SIGWINCH 28, SIGUSR1 10.
    #[test]
    fn ignored_are_the_set_and_the_defaults_that_nobody_catches() {
        let default = Sets::parse(b"SigIgn:\t0000000000000000\nSigCgt:\t0000000000000000\n").ignored;
        assert_eq!(default, 1 << 16 | 1 << 17 | 1 << 22 | 1 << 27);
        let sets = Sets::parse(b"SigIgn:\t0000000000000200\nSigCgt:\t0000000008010000\n");
        assert_eq!(sets.ignored, 1 << 9 | 1 << 17 | 1 << 22);
    }

    #[test]
    fn an_ignored_signal_counts_only_if_it_was_there_before() {
        let thread = fresh();
        let sets = |pending| Sets { pending, ignored: 0b01 };
        assert!(!thread.ends(sets(0b00), 0, ALL));
        assert!(!thread.ends(sets(0b01), thread.seen.load(Relaxed), ALL), "dropped as it comes");
        assert!(!thread.ends(sets(0b01), 0b01, ALL), "nor does the next run know of it");
        assert!(thread.ends(sets(0b11), thread.seen.load(Relaxed), ALL), "another one counts");
        assert!(!thread.ends(sets(0b00), thread.seen.load(Relaxed), ALL));
        assert!(thread.ends(sets(0b01), 0b01, ALL), "pending before the run");
    }

    #[test]
    fn what_the_mask_blocks_is_not_dropped() {
        let thread = fresh();
        let sets = Sets { pending: 0b01, ignored: 0b01 };
        assert!(!thread.ends(sets, 0, SignalMask(0b01)));
        assert!(thread.ends(sets, thread.seen.load(Relaxed), ALL), "it was pending when the other run began");
    }

    #[test]
    fn a_thread_that_is_gone_is_not_taken_for_the_next() {
        let last = LastPending::default();
        let (mine, _) = last.enter(std::process::id(), ALL).unwrap();
        assert!(Arc::ptr_eq(&mine, &last.enter(std::process::id(), ALL).unwrap().0));
        let other = std::thread::spawn(|| nix::unistd::gettid().as_raw().cast_unsigned()).join().unwrap();
        // Its entry may outlive the join by a moment.
        while last.enter(other, ALL).is_some() {
            std::thread::yield_now();
        }
    }
}
