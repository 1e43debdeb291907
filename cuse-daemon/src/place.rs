//! Which CPU a vCPU's worker runs on.
//!
//! Of a client's thread and the worker that answers it only one ever runs. On one CPU they take turns in a few
//! microseconds; left alone, the scheduler sees an idle CPU beside and wakes that each time, which costs tens to
//! hundreds in a virtual machine. So while exits come thick, both belong on one CPU. While the guest computes, nothing
//! is to be gained, and two workers that happen to share a CPU would each run at half speed: then both are free.

use std::cell::OnceCell;
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread;
use std::time::{Duration, Instant};

use kvm::clock;
use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::unistd::{Pid, gettid};
use parking_lot::Mutex;

use crate::sys;

/// A run that takes longer has no use for a place.
const SHORT: Duration = Duration::from_micros(250);
/// A run that has taken so long is let go from its place while it goes on.
const LONG: Duration = Duration::from_millis(4);
/// Short runs before anything is done.
const STREAK: u32 = 64;
/// After so many the place is given up, and chosen anew where the scheduler has brought the client by then.
const TENURE: u32 = 4096;
/// So many short runs give the scheduler the occasion. Each takes a multiple of a placed one.
const FREE: u32 = 8;
/// How long the watchdog stays with nothing to watch.
const LINGER: Duration = Duration::from_secs(1);
/// What a thread of ours asks to run in one go. Who wakes runs before all whose slice ends later, so on a full machine an
/// ioctl does not wait until half of those that compute have had theirs. The kernel's least; our share of the CPU stays.
///
/// A worker that takes turns with its client alone is better off without: with slices like everybody's the client runs at once
/// when it is answered, and has asked again before the worker got to sleep. That is a twentieth of an exit.
const SLICE: Duration = Duration::from_micros(100);
/// Between two runs so long, of a client that is kept in its place: it thinks, or others have its CPU.
const LATE: Duration = Duration::from_micros(50);
/// So often in a tenure, and others have it; until a tenure passes where it is less often.
const CROWD: u32 = 8;
const NOWHERE: i32 = -1;

static IS_OFF: AtomicBool = AtomicBool::new(false);

/// Leaves all threads to the scheduler, to measure what that costs.
pub fn turn_off() {
    IS_OFF.store(true, Ordering::Relaxed);
}

/// Where a vCPU's thread is kept, if anywhere.
#[derive(Debug)]
pub struct Place {
    /// Short runs since the last long one.
    streak: AtomicU32,
    cpu: AtomicI32,
    /// The client's thread that is kept there.
    client: AtomicU32,
    /// Where that thread may run by itself.
    before: Mutex<CpuSet>,
    /// When the last run in that place ended, by [`clock`]; 0: there was none.
    ended: AtomicU64,
    /// How often the next one was [`LATE`].
    late: AtomicU32,
    /// Others have the CPU.
    crowded: AtomicBool,
}

impl Default for Place {
    fn default() -> Self {
        Self {
            streak: AtomicU32::new(0),
            cpu: AtomicI32::new(NOWHERE),
            client: AtomicU32::new(0),
            before: Mutex::new(CpuSet::new()),
            ended: AtomicU64::new(0),
            late: AtomicU32::new(0),
            crowded: AtomicBool::new(false),
        }
    }
}

impl Place {
    /// A run for thread `client` begins on the calling worker.
    pub fn enter(&self, client: u32) -> Run<'_> {
        if self.streak.load(Ordering::Relaxed) == STREAK && !IS_OFF.load(Ordering::Relaxed) {
            self.settle(client);
        }
        if self.cpu.load(Ordering::Relaxed) != NOWHERE && self.client.load(Ordering::Relaxed) != client {
            self.leave();
        }
        let cpu = self.cpu.load(Ordering::Relaxed);
        WORKER.with(|worker| {
            let worker = worker.get_or_init(Worker::register);
            worker.move_to(cpu);
            let begin = clock::now();
            if cpu != NOWHERE {
                worker.since.store(begin, Ordering::SeqCst);
                WATCHDOG.wake();
            }
            worker.wake_early(cpu == NOWHERE || self.is_crowded(begin));
            Run { place: self, begin, worker: Arc::clone(worker) }
        })
    }

    /// Do others compute where the client and its worker are? A run begins there.
    fn is_crowded(&self, begin: u64) -> bool {
        let ended = self.ended.load(Ordering::Relaxed);
        if ended != 0 && begin.saturating_sub(ended) > clock::counts(LATE) {
            let late = self.late.fetch_add(1, Ordering::Relaxed) + 1;
            self.crowded.fetch_or(late >= CROWD, Ordering::Relaxed);
        }
        self.crowded.load(Ordering::Relaxed)
    }

    /// Exits come thick: keep the client's thread where it is now. One that is bound to a CPU by its VMM has it better already.
    fn settle(&self, client: u32) {
        let thread = Pid::from_raw(client.cast_signed());
        let Some((cpu, before)) = last_cpu(client).zip(sched_getaffinity(thread).ok()) else { return };
        let here = only(cpu);
        if before == here || sched_setaffinity(thread, &here).is_ok() {
            *self.before.lock() = before;
            self.client.store(client, Ordering::Relaxed);
            self.cpu.store(cpu, Ordering::Relaxed);
            tracing::trace!(client, cpu, "placed");
        }
    }

    /// The thread may go where it likes again, unless somebody moved it meanwhile.
    fn leave(&self) {
        self.streak.store(0, Ordering::Relaxed);
        self.ended.store(0, Ordering::Relaxed);
        let late = self.late.swap(0, Ordering::Relaxed);
        self.crowded.store(late >= CROWD, Ordering::Relaxed);
        let cpu = self.cpu.swap(NOWHERE, Ordering::Relaxed);
        if cpu != NOWHERE {
            let client = Pid::from_raw(self.client.load(Ordering::Relaxed).cast_signed());
            let before = *self.before.lock();
            if before != only(cpu) && sched_getaffinity(client) == Ok(only(cpu)) {
                let _ = sched_setaffinity(client, &before);
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
    }
}

/// A run under way.
pub struct Run<'a> {
    place: &'a Place,
    begin: u64,
    worker: Arc<Worker>,
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        self.worker.since.store(0, Ordering::Release);
        let end = clock::now();
        let took = end.saturating_sub(self.begin);
        self.place.ended.store(end, Ordering::Relaxed);
        if took < clock::counts(SHORT) {
            if self.place.streak.fetch_add(1, Ordering::Relaxed) > TENURE {
                self.place.leave();
                self.place.streak.store(STREAK - FREE, Ordering::Relaxed);
            }
        } else if took > clock::counts(LONG) {
            self.place.leave();
        }
    }
}

/// One of our threads.
#[derive(Debug)]
struct Worker {
    tid: Pid,
    /// Held while the thread is moved: the watchdog does so, too.
    cpu: Mutex<i32>,
    /// When the run that keeps it on `cpu` began, by [`clock`]; 0: none.
    since: AtomicU64,
    /// Its slices are short.
    wakes_early: AtomicBool,
}

thread_local! {
    static WORKER: OnceCell<Arc<Worker>> = const { OnceCell::new() };
}

impl Worker {
    fn register() -> Arc<Self> {
        let (cpu, since) = (Mutex::new(NOWHERE), AtomicU64::new(0));
        let worker = Arc::new(Self { tid: gettid(), cpu, since, wakes_early: AtomicBool::new(true) });
        WATCHDOG.workers.lock().push(Arc::downgrade(&worker));
        worker
    }

    /// Of the calling thread: see [`SLICE`].
    fn wake_early(&self, early: bool) {
        if self.wakes_early.load(Ordering::Relaxed) != early {
            self.wakes_early.store(early, Ordering::Relaxed);
            ask_for_slices(if early { SLICE } else { Duration::ZERO });
        }
    }

    fn move_to(&self, cpu: i32) {
        let mut now = self.cpu.lock();
        if *now != cpu {
            *now = cpu;
            let set = if cpu == NOWHERE { *everywhere() } else { only(cpu) };
            if let Err(errno) = sched_setaffinity(self.tid, &set) {
                tracing::debug!(%errno, cpu, "the worker stays where it is");
            }
        }
    }
}

/// Lets go of workers whose run takes long. Its thread exists while there are placed runs.
struct Watchdog {
    workers: Mutex<Vec<Weak<Worker>>>,
    is_awake: AtomicBool,
}

static WATCHDOG: Watchdog = Watchdog { workers: Mutex::new(Vec::new()), is_awake: AtomicBool::new(false) };

impl Watchdog {
    fn wake(&'static self) {
        if self.is_awake.load(Ordering::SeqCst) || self.is_awake.swap(true, Ordering::SeqCst) {
            return;
        }
        let spawned = thread::Builder::new().name("placement".into()).spawn(|| self.watch());
        if spawned.is_err() {
            self.is_awake.store(false, Ordering::SeqCst);
        }
    }

    fn watch(&self) {
        let mut used = Instant::now();
        loop {
            thread::sleep(LONG);
            if self.look() {
                used = Instant::now();
            } else if used.elapsed() > LINGER {
                self.is_awake.store(false, Ordering::SeqCst);
                // A run that began before that store saw it awake; one that begins later wakes it.
                if !self.look() || self.is_awake.swap(true, Ordering::SeqCst) {
                    return;
                }
            }
        }
    }

    /// Is there a placed run?
    fn look(&self) -> bool {
        let mut workers = self.workers.lock();
        workers.retain(|worker| worker.strong_count() > 0);
        let mut placed = false;
        for worker in workers.iter().filter_map(Weak::upgrade) {
            let since = worker.since.load(Ordering::SeqCst);
            placed |= since != 0;
            if since != 0 && clock::now().saturating_sub(since) > clock::counts(LONG) {
                worker.since.store(0, Ordering::Release);
                worker.move_to(NOWHERE);
            }
        }
        placed
    }
}

/// Has this thread and those that it starts wake before what computes beside them, unless [`turn_off`] was called before.
pub fn wake_early() {
    ask_for_slices(SLICE);
}

fn ask_for_slices(slice: Duration) {
    if !IS_OFF.load(Ordering::Relaxed)
        && let Err(errno) = sys::ask_for_slices(slice)
    {
        tracing::debug!(%errno, "slices stay as they are");
    }
}

/// A new worker is not bound to the CPU of the one that made it.
pub fn worker_started() {
    let _ = sched_setaffinity(gettid(), everywhere());
}

/// While it lives, a client's thread that takes turns with this one does so on this one's CPU, if it may run there.
///
/// Each step of an injection is a switch to the thread and back. Woken on another CPU it may find that busy, with a guest
/// that computes, and wait for a time slice each time.
#[derive(Debug)]
pub struct Beside {
    tid: Pid,
    here: CpuSet,
    before: CpuSet,
}

impl Beside {
    /// Thread `tid`, which waits or stands. `None`: it stays where it is.
    pub fn new(tid: Pid) -> Option<Self> {
        if IS_OFF.load(Ordering::Relaxed) {
            return None;
        }
        let here = sched_getcpu().ok()?;
        let before = sched_getaffinity(tid).ok()?;
        let may = before.is_set(here).unwrap_or(false);
        let here = only(i32::try_from(here).ok()?);
        (may && before != here && sched_setaffinity(tid, &here).is_ok()).then_some(Self { tid, here, before })
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        if sched_getaffinity(self.tid) == Ok(self.here) {
            let _ = sched_setaffinity(self.tid, &self.before);
        }
    }
}

/// Where the daemon, and a client that nobody placed, may run.
fn everywhere() -> &'static CpuSet {
    static EVERYWHERE: OnceLock<CpuSet> = OnceLock::new();
    EVERYWHERE.get_or_init(|| sched_getaffinity(Pid::from_raw(std::process::id().cast_signed())).unwrap_or_default())
}

fn only(cpu: i32) -> CpuSet {
    let mut set = CpuSet::new();
    // A number past the end of the set stays out; setting an empty affinity then fails, and nothing is placed.
    let _ = set.set(cpu.unsigned_abs() as usize);
    set
}

/// The CPU that thread `tid` ran on last.
fn last_cpu(tid: u32) -> Option<i32> {
    stat_field(tid, 39)?.parse().ok()
}

/// Field `number`, from 3 on, of `/proc/PID/stat` (proc_pid_stat(5)).
fn stat_field(tid: u32, number: usize) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{tid}/stat")).ok()?;
    // The name, field 2, may hold anything but ends with the last parenthesis.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(number - 3).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_cpu_is_one_of_ours() {
        let tid = gettid().as_raw().cast_unsigned();
        let cpu = last_cpu(tid).unwrap();
        assert!(everywhere().is_set(cpu as usize).unwrap());
    }

    /// What the kernel says of a thread that woke early: its slice (where `/proc/TID/sched` shows it, Linux 6.12), the rest as
    /// before, and the same of one that it starts.
    #[test]
    fn slices_are_short_and_inherited() {
        let of_this_one = || {
            let tid = gettid();
            let sched = fs::read_to_string(format!("/proc/{tid}/sched")).unwrap_or_default();
            let slice =
                sched.lines().find_map(|line| line.strip_prefix("se.slice")?.rsplit(':').next()?.trim().parse().ok());
            let nice_and_policy = [19, 41].map(|number| stat_field(tid.as_raw().cast_unsigned(), number).unwrap());
            (slice, nice_and_policy)
        };
        let wakes_early = move || {
            let (slice, rest): (Option<u128>, _) = of_this_one();
            wake_early();
            for (now, rest_now) in [of_this_one(), thread::spawn(of_this_one).join().unwrap()] {
                assert_eq!(now, slice.map(|_| SLICE.as_nanos()));
                assert_eq!(rest_now, rest);
            }
        };
        thread::spawn(wakes_early).join().unwrap();
    }

    #[test]
    fn who_comes_late_again_and_again_is_in_a_crowd() {
        let place = Place::default();
        let now = clock::now();
        assert!(!place.is_crowded(now), "the first run is not late");
        place.ended.store(now - clock::counts(LATE) / 2, Ordering::Relaxed);
        assert!((0..2 * CROWD).all(|_| !place.is_crowded(now)));
        place.ended.store(now - 2 * clock::counts(LATE), Ordering::Relaxed);
        assert_eq!((0..2 * CROWD).filter(|_| place.is_crowded(now)).count() as u32, CROWD + 1);
        place.leave();
        assert!(place.is_crowded(now), "the next tenure begins so");
        place.leave();
        assert!(!place.is_crowded(now), "and if it is none, the one after that does not");
    }

    /// The whole way, on threads of this process: short runs bring client and worker together, a long one frees both. The client
    /// can say where it may run.
    fn thick_exits_then_a_long_run(bound: Option<i32>) {
        let place = Place::default();
        let (sender, receiver) = std::sync::mpsc::channel();
        let (end, wait) = std::sync::mpsc::channel::<()>();
        let client = thread::spawn(move || {
            if let Some(cpu) = bound {
                sched_setaffinity(gettid(), &only(cpu)).unwrap();
            }
            sender.send(gettid()).unwrap();
            let _ = wait.recv();
        });
        let tid = receiver.recv().unwrap();
        let its = sched_getaffinity(tid).unwrap();
        let client_id = tid.as_raw().cast_unsigned();
        // A loaded machine may make a short run long; a few more then do it.
        for _ in 0..100 * STREAK {
            drop(place.enter(client_id));
            if place.cpu.load(Ordering::Relaxed) != NOWHERE {
                break;
            }
        }
        let cpu = place.cpu.load(Ordering::Relaxed);
        assert_eq!(cpu, bound.unwrap_or(last_cpu(client_id).unwrap()));
        assert_eq!(sched_getaffinity(tid).unwrap(), only(cpu));
        let run = place.enter(client_id);
        let deadline = Instant::now() + Duration::from_secs(5);
        while sched_getaffinity(gettid()).unwrap() != *everywhere() {
            assert!(Instant::now() < deadline, "a long run is let go while it lasts");
            thread::sleep(Duration::from_millis(1));
        }
        drop(run);
        assert_eq!(sched_getaffinity(tid).unwrap(), its, "and its client afterwards");
        drop(end);
        client.join().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while WATCHDOG.is_awake.load(Ordering::SeqCst) {
            assert!(Instant::now() < deadline, "the watchdog ends with nothing to watch");
            thread::sleep(LONG);
        }
    }

    #[test]
    fn thick_exits_share_a_cpu_and_long_runs_do_not() {
        if thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1) {
            thick_exits_then_a_long_run(None);
        }
    }

    #[test]
    fn who_is_bound_to_a_cpu_has_the_worker_come_there() {
        if thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1) {
            for cpu in (0..CpuSet::count()).filter(|&cpu| everywhere().is_set(cpu) == Ok(true)).take(2) {
                thick_exits_then_a_long_run(Some(i32::try_from(cpu).unwrap()));
            }
        }
    }
}
