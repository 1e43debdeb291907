//! One connection: its handshake, the workers that read it, and the requests under way.
//!
//! All workers read one descriptor. There is always one more in read(2) than is busy, so a request that blocks for
//! seconds holds up nobody, and neither does one that needs another to finish (a daemon that opens its own files).

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use parking_lot::{Condvar, Mutex, RwLock};
use thiserror::Error;
use tracing::{debug, error, trace, warn};
use zerocopy::IntoBytes;

use crate::device::Device;
use crate::layout::{
    CuseInitIn, CuseInitOut, InHeader, InitFlags, InitIn, InitOut, KERNEL_MINOR_VERSION, KERNEL_VERSION,
    MIN_READ_BUFFER, OutHeader, opcode,
};
use crate::reply::{Answer, inval_inode};
use crate::request::{Malformed, Operation, Request};

/// Workers in read(2) when nothing is to do. The kernel wakes the one that has waited longest, so all of them take turns, each with
/// a stack that the others have pushed out of the caches.
const SPARE_WORKERS: usize = 2;
/// How long one beyond these stays, for the next burst: it is quicker called than made.
const LINGER: Duration = Duration::from_secs(1);
/// Bytes of a write, and nearly those of the longest request: one ioctl argument has at most 16 KiB.
const MAX_WRITE: u32 = 32 * 1024;
const BUFFER: usize = MAX_WRITE as usize + MIN_READ_BUFFER;

/// What kind of connection to ask for.
#[derive(Clone, Debug)]
pub enum Kind {
    /// A file system; `passthrough`: use it where the kernel has it.
    Fuse {
        /// False: never, as on a kernel without it.
        passthrough: bool,
    },
    /// A character device `/dev/NAME`.
    Cuse {
        /// Its name.
        name: String,
    },
}

/// Answers requests. One value serves all workers of a session.
pub trait Service: Send + Sync + 'static {
    /// Answers one request; may block. Runs on the thread that received it.
    fn serve(&self, call: &Call<'_>, operation: Operation<'_>) -> Answer;

    /// Called on a new worker before it reads, for what the thread needs (priority, signal mask).
    fn worker_started(&self) {}

    /// Stack that a worker needs, bytes: memory is used as it is touched.
    fn stack_bytes(&self) -> usize {
        2 << 20
    }
}

/// Why a session cannot start.
#[derive(Debug, Error)]
pub enum SessionError {
    /// A worker thread cannot be made.
    #[error("no thread for a worker: {0}")]
    Thread(#[from] std::io::Error),
}

/// What ended the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The kernel's protocol, major and minor.
    pub kernel: (u32, u32),
    /// Files can be opened with a backing file.
    pub passthrough: bool,
}

/// A running connection.
pub struct Session {
    device: Device,
    kind: Kind,
    negotiated: OnceLock<Negotiated>,
    /// One per worker; scanned only when an interrupt comes.
    running: RwLock<Vec<Arc<Running>>>,
    idle: AtomicUsize,
    parked: Mutex<Parked>,
    called: Condvar,
    workers: AtomicUsize,
    names: AtomicU32,
    over: AtomicBool,
}

/// Workers that wait to be called, and calls that none has heard yet.
#[derive(Default)]
struct Parked {
    workers: usize,
    calls: usize,
}

/// The request that one worker serves.
#[derive(Default)]
struct Running(Mutex<State>);

#[derive(Default)]
struct State {
    /// 0: none.
    unique: u64,
    /// The thread that waits.
    pid: u32,
    interrupted: bool,
    action: Option<Action>,
}

/// What an interrupt does.
pub type Action = Arc<dyn Fn() + Send + Sync>;

/// A request under way, as its service sees it.
pub struct Call<'a> {
    /// The session it came by.
    pub session: &'a Session,
    /// Who asks.
    pub header: InHeader,
    running: &'a Running,
}

impl Call<'_> {
    /// Sends the answer before the service returns; it then returns `Answer::Done`. An error says that nobody waits.
    pub fn answer_now(&self, answer: &Answer) -> Result<(), Errno> {
        self.session.send(self.header.unique, answer)
    }

    /// Has a signal come to the thread since the request began?
    pub fn interrupted(&self) -> bool {
        self.running.0.lock().interrupted
    }

    /// Sets what an interrupt does from now on; runs it at once if one has come. After `None` it runs no more.
    pub fn on_interrupt(&self, action: Option<Action>) {
        let mut state = self.running.0.lock();
        if let (true, Some(action)) = (state.interrupted, &action) {
            action();
        }
        state.action = action;
    }
}

impl Session {
    /// Starts the workers. The handshake happens as soon as the kernel sends it: for FUSE at mount, which therefore
    /// must come after this call or on another thread.
    pub fn start(device: Device, kind: Kind, service: Arc<dyn Service>) -> Result<Arc<Self>, SessionError> {
        let session = Arc::new(Self {
            device,
            kind,
            negotiated: OnceLock::new(),
            running: RwLock::new(Vec::new()),
            idle: AtomicUsize::new(0),
            parked: Mutex::default(),
            called: Condvar::new(),
            workers: AtomicUsize::new(0),
            names: AtomicU32::new(0),
            over: AtomicBool::new(false),
        });
        // The handshake comes first and alone: one worker reads until it is over, then the others follow.
        session.add_worker(&service)?;
        Ok(session)
    }

    /// The outcome of the handshake, once it is over.
    pub fn negotiated(&self) -> Option<Negotiated> {
        self.negotiated.get().copied()
    }

    /// The device, for its ioctls.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The connection has ended: unmounted, or aborted.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Threads that serve this session now.
    pub fn workers(&self) -> usize {
        self.workers.load(Ordering::Relaxed)
    }

    /// Drops what the kernel caches of node `ino`, pages included.
    pub fn invalidate(&self, ino: u64) -> Result<(), Errno> {
        inval_inode(ino, |pieces| self.device.send(pieces))
    }

    /// Is thread `pid` of a client inside a request? Then it runs no code of its own before that is answered.
    pub fn is_waiting(&self, pid: u32) -> bool {
        self.running.read().iter().any(|running| running.0.lock().pid == pid)
    }

    fn send(&self, unique: u64, answer: &Answer) -> Result<(), Errno> {
        answer.encode(unique, |pieces| self.device.send(pieces)).unwrap_or(Ok(()))
    }

    fn add_worker(self: &Arc<Self>, service: &Arc<dyn Service>) -> std::io::Result<()> {
        let (session, service) = (Arc::clone(self), Arc::clone(service));
        let name = format!("fuse-{}", self.names.fetch_add(1, Ordering::Relaxed));
        // Counted before it runs: two workers that start one each must not both see none.
        self.idle.fetch_add(1, Ordering::AcqRel);
        self.workers.fetch_add(1, Ordering::Relaxed);
        let worker = thread::Builder::new().name(name).stack_size(service.stack_bytes());
        worker.spawn(move || session.work(&service)).map(drop).inspect_err(|_| {
            self.idle.fetch_sub(1, Ordering::AcqRel);
            self.workers.fetch_sub(1, Ordering::Relaxed);
        })
    }

    /// The life of a worker. It is counted idle when it begins.
    fn work(self: &Arc<Self>, service: &Arc<dyn Service>) {
        service.worker_started();
        let running = Arc::new(Running::default());
        self.running.write().push(Arc::clone(&running));
        let mut buffer = vec![0; BUFFER];
        loop {
            let len = match self.device.receive(&mut buffer) {
                Ok(len) => len,
                // ENOENT: the request was withdrawn while it was read.
                Err(Errno::EINTR | Errno::EAGAIN | Errno::ENOENT) => continue,
                Err(errno) => {
                    self.idle.fetch_sub(1, Ordering::AcqRel);
                    self.ended(errno);
                    break;
                }
            };
            if self.idle.fetch_sub(1, Ordering::AcqRel) == 1 && self.negotiated.get().is_some() {
                self.replenish(service);
            }
            let answer = self.dispatch(&buffer[..len], &running, service);
            // Idle before the answer is out: it wakes a client that may ask again before this thread gets back to its read, which
            // nothing can keep it from. Were it busy until then, a thread would be made for that.
            let stays = self.idle.fetch_add(1, Ordering::AcqRel) < SPARE_WORKERS;
            if !stays {
                self.idle.fetch_sub(1, Ordering::AcqRel);
            }
            if let Some((unique, answer)) = answer {
                self.answer(unique, &answer);
            }
            if !stays && !self.park() {
                break;
            }
        }
        self.running.write().retain(|other| !Arc::ptr_eq(other, &running));
        self.workers.fetch_sub(1, Ordering::Relaxed);
    }

    /// One beyond those that stay waits to be called, and is counted idle then. False: nobody did.
    fn park(&self) -> bool {
        let until = Instant::now() + LINGER;
        let mut parked = self.parked.lock();
        parked.workers += 1;
        while parked.calls == 0 && !self.is_over() && !self.called.wait_until(&mut parked, until).timed_out() {}
        parked.workers -= 1;
        let is_called = parked.calls > 0;
        parked.calls -= usize::from(is_called);
        is_called
    }

    /// Calls one that is parked. False: there is none.
    fn call(&self) -> bool {
        let mut parked = self.parked.lock();
        let is_there = parked.workers > parked.calls;
        if is_there {
            parked.calls += 1;
            self.idle.fetch_add(1, Ordering::AcqRel);
            self.called.notify_one();
        }
        is_there
    }

    fn replenish(self: &Arc<Self>, service: &Arc<dyn Service>) {
        if self.call() {
            return;
        }
        if let Err(err) = self.add_worker(service) {
            error!(%err, workers = self.workers(), "no thread for another worker: requests wait for each other");
        }
    }

    fn ended(&self, errno: Errno) {
        if !self.over.swap(true, Ordering::AcqRel) {
            // Who looked before is asleep when the lock is free.
            drop(self.parked.lock());
            self.called.notify_all();
            match errno {
                Errno::ENODEV | Errno::ECONNABORTED => debug!("connection closed"),
                errno => error!(%errno, "cannot read from the FUSE device; this connection ends"),
            }
        }
    }

    /// Serves one message. What is left to answer, and to which request.
    fn dispatch(
        self: &Arc<Self>,
        bytes: &[u8],
        running: &Running,
        service: &Arc<dyn Service>,
    ) -> Option<(u64, Answer)> {
        let request = match Request::parse(bytes) {
            Ok(request) => request,
            Err(err) => {
                warn!(%err, "malformed message");
                return match err {
                    Malformed::Body { unique, opcode, .. }
                        if !matches!(opcode, opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT) =>
                    {
                        Some((unique, Answer::Error(Errno::EIO)))
                    }
                    _ => None,
                };
            }
        };
        trace!(?request);
        let unique = request.header.unique;
        match request.operation {
            Operation::Init(init, flags) => self.handshake(unique, &init, flags, service),
            Operation::CuseInit(init) => self.handshake_cuse(unique, &init, service),
            Operation::Interrupt(interrupt) => return self.interrupt(unique, interrupt.unique),
            operation => {
                {
                    let mut state = running.0.lock();
                    state.unique = unique;
                    state.pid = request.header.pid;
                }
                let call = Call { session: self, header: request.header, running };
                // A bug in the service must not leave its caller waiting for ever, nor cost us a worker.
                let answer = catch_unwind(AssertUnwindSafe(|| service.serve(&call, operation)));
                let answer = answer.unwrap_or(Answer::Error(Errno::EIO));
                // Before the reply: once it is out, the number may come again.
                *running.0.lock() = State::default();
                return Some((unique, answer));
            }
        }
        None
    }

    fn answer(&self, unique: u64, answer: &Answer) {
        match self.send(unique, answer) {
            // ENOENT: the caller died or the connection was aborted meanwhile.
            Ok(()) | Err(Errno::ENOENT | Errno::ENODEV | Errno::ECONNABORTED) => {}
            Err(errno) => warn!(%errno, ?answer, "reply refused"),
        }
    }

    /// `interrupted`: the request whose thread has a signal. A worker may have read it and not yet said so, or have
    /// answered it already: "try again" makes the kernel repeat the interrupt for as long as the request exists.
    fn interrupt(&self, unique: u64, interrupted: u64) -> Option<(u64, Answer)> {
        for running in self.running.read().iter() {
            let mut state = running.0.lock();
            if state.unique == interrupted {
                state.interrupted = true;
                if let Some(action) = &state.action {
                    action();
                }
                return None;
            }
        }
        thread::yield_now();
        Some((unique, Answer::Error(Errno::EAGAIN)))
    }

    fn handshake(self: &Arc<Self>, unique: u64, init: &InitIn, offered: InitFlags, service: &Arc<dyn Service>) {
        if init.major != KERNEL_VERSION {
            // The protocol's way to say "this one": the kernel asks again, or fails the mount.
            let out = InitOut { major: KERNEL_VERSION, minor: KERNEL_MINOR_VERSION, ..InitOut::default() };
            return self.raw(unique, &[out.as_bytes()]);
        }
        let mut wanted = InitFlags::MAX_PAGES | InitFlags::ABORT_ERROR | InitFlags::INIT_EXT;
        if matches!(self.kind, Kind::Fuse { passthrough: true }) {
            wanted |= InitFlags::PASSTHROUGH;
        }
        let mut flags = wanted & offered;
        if !flags.contains(InitFlags::INIT_EXT) {
            flags.remove(InitFlags::PASSTHROUGH);
        }
        let passthrough = flags.contains(InitFlags::PASSTHROUGH);
        let out = InitOut {
            major: KERNEL_VERSION,
            minor: KERNEL_MINOR_VERSION.min(init.minor),
            max_readahead: 0,
            flags: flags.bits() as u32,
            flags2: (flags.bits() >> 32) as u32,
            max_background: 64,
            congestion_threshold: 48,
            max_write: MAX_WRITE,
            time_gran: 1,
            max_pages: (MAX_WRITE / 4096) as u16,
            // A backing file may lie on a file system that stacks on nothing itself.
            max_stack_depth: u32::from(passthrough),
            ..InitOut::default()
        };
        // Before the reply, since it lets the first requests through; the mount then finds the outcome here.
        self.agreed(init.major, init.minor, passthrough);
        // Before 7.23 the reply was shorter; the kernel refuses one longer than it knows.
        let bytes = out.as_bytes();
        self.raw(unique, &[if init.minor < 23 { &bytes[..24] } else { bytes }]);
        self.replenish_to_spare(service);
    }

    fn handshake_cuse(self: &Arc<Self>, unique: u64, init: &CuseInitIn, service: &Arc<dyn Service>) {
        let Kind::Cuse { name } = &self.kind else {
            return self.answer(unique, &Answer::Error(Errno::EPROTO));
        };
        let info = format!("DEVNAME={name}\0");
        let out = CuseInitOut {
            major: KERNEL_VERSION,
            minor: KERNEL_MINOR_VERSION.min(init.minor),
            max_read: MAX_WRITE,
            max_write: MAX_WRITE,
            ..CuseInitOut::default()
        };
        self.agreed(init.major, init.minor, false);
        self.raw(unique, &[out.as_bytes(), info.as_bytes()]);
        self.replenish_to_spare(service);
    }

    fn agreed(&self, major: u32, minor: u32, passthrough: bool) {
        let negotiated = Negotiated { kernel: (major, minor), passthrough };
        if self.negotiated.set(negotiated).is_ok() {
            debug!(?negotiated, kind = ?self.kind, "connected");
        }
    }

    fn replenish_to_spare(self: &Arc<Self>, service: &Arc<dyn Service>) {
        // The caller is about to be idle, too.
        while self.idle.load(Ordering::Acquire) + 1 < SPARE_WORKERS {
            if let Err(err) = self.add_worker(service) {
                warn!(%err, "fewer workers than wanted");
                break;
            }
        }
    }

    fn raw(&self, unique: u64, parts: &[&[u8]]) {
        let body = parts.concat();
        let len = (size_of::<OutHeader>() + body.len()) as u32;
        let header = OutHeader { len, error: 0, unique };
        let pieces = [std::io::IoSlice::new(header.as_bytes()), std::io::IoSlice::new(&body)];
        if let Err(errno) = self.device.send(&pieces) {
            error!(%errno, "handshake refused");
        }
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("kind", &self.kind)
            .field("negotiated", &self.negotiated())
            .field("workers", &self.workers())
            .finish_non_exhaustive()
    }
}
