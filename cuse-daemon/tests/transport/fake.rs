//! KVM objects that do nothing but exercise the transport, and a daemon in this process that serves them.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use cuse_daemon::client::guard;
use cuse_daemon::front::{Access, Front, OpenSystem, fuse};
use kvm::client::{Client, File, FileKind, Reply, SharedPiece, SignalMask, WindowPiece};
use mmu::Mapping;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;
use parking_lot::{Condvar, Mutex};

use crate::client;

/// Requests of the fake objects; the first three are KVM's.
pub mod request {
    pub const VERSION: u32 = 0xae00;
    pub const CREATE: u32 = 0xae01;
    pub const RUN: u32 = 0xae80;
    /// Two words: address and length. Shares memory; the number of pieces.
    pub const SHARE: u32 = 0x4010_ae46;
    /// The byte at an offset into what was shared, as the daemon sees it.
    pub const PEEK: u32 = 0xaef0;
    /// Two words: offset and byte. Writes it on the daemon's side.
    pub const POKE: u32 = 0x4010_aef1;
    /// A window of RAM appears behind the file.
    pub const WINDOW: u32 = 0xaef2;
    /// Increments each of the client's 8 words at the address in the argument, by way of its memory.
    pub const COPY: u32 = 0xaef3;
    /// `RUN`, with the argument as signal mask.
    pub const RUN_MASKED: u32 = 0xaef4;
    /// As CREATE, then fails: the descriptor stays, as the kernel would not have it, but nobody may hang.
    pub const PANIC: u32 = 0xaef5;
    /// Answers with 4 bytes after having run a system call in the client.
    pub const OUTPUT: u32 = 0x8004_aef6;
    /// Installs a file without close-on-exec.
    pub const CREATE_KEEP: u32 = 0xaef7;
    /// 1 if the caller's address space is that of the file's maker.
    pub const SAME_SPACE: u32 = 0xaef8;
}

/// What is alive.
#[derive(Default)]
pub struct Stats {
    pub alive: AtomicUsize,
    pub running: AtomicUsize,
    pub unreleased_drops: AtomicUsize,
}

pub struct Node {
    kind: FileKind,
    stats: Arc<Stats>,
    mapping: OnceLock<Arc<Mapping>>,
    window: OnceLock<Arc<Mapping>>,
    pieces: Mutex<Vec<SharedPiece>>,
    space: OnceLock<kvm::client::AddressSpace>,
    released: AtomicBool,
}

impl Node {
    pub fn new(kind: FileKind, stats: &Arc<Stats>) -> Arc<Self> {
        stats.alive.fetch_add(1, Ordering::SeqCst);
        let mapping = OnceLock::new();
        if matches!(kind, FileKind::Vcpu(_)) {
            let pages = Mapping::create("fake-vcpu", 3 * 4096).unwrap();
            pages.write(4096, b"page one").unwrap();
            mapping.set(pages).unwrap();
        }
        let (pieces, window, space) = (Mutex::default(), OnceLock::new(), OnceLock::new());
        Arc::new(Self { kind, stats: stats.clone(), mapping, window, pieces, space, released: AtomicBool::new(false) })
    }

    fn at(&self, offset: u64) -> Option<(Arc<Mapping>, u64)> {
        let mut begin = 0;
        for piece in self.pieces.lock().iter() {
            if offset < begin + piece.len {
                return Some((piece.mapping.clone(), piece.offset + offset - begin));
            }
            begin += piece.len;
        }
        None
    }

    fn run(&self, client: &dyn Client, mask: Option<SignalMask>) -> Result<Reply, Errno> {
        let pair = Arc::new((Mutex::new(false), Condvar::new()));
        let other = pair.clone();
        let kick = Arc::new(move || {
            *other.0.lock() = true;
            other.1.notify_all();
        });
        let _guard = client.on_interrupt(kick, mask);
        self.stats.running.fetch_add(1, Ordering::SeqCst);
        let mut done = pair.0.lock();
        while !*done {
            match client.poll_interval() {
                None => pair.1.wait(&mut done),
                Some(every) => {
                    pair.1.wait_for(&mut done, every);
                    *done |= client.interrupted();
                }
            }
        }
        self.stats.running.fetch_sub(1, Ordering::SeqCst);
        Err(Errno::EINTR)
    }

    fn create(&self, client: &dyn Client, id: u64, cloexec: bool) -> Result<i32, Errno> {
        let kind = if self.kind == FileKind::System { FileKind::Vm } else { FileKind::Vcpu(id as u32) };
        let node = Node::new(kind, &self.stats);
        node.space.set(client.address_space()).unwrap();
        client.install(node, cloexec)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stats.alive.fetch_sub(1, Ordering::SeqCst);
        if !self.released.load(Ordering::SeqCst) {
            self.stats.unreleased_drops.fetch_add(1, Ordering::SeqCst);
        }
    }
}

impl File for Node {
    fn ioctl(self: Arc<Self>, client: &dyn Client, request: u32, arg: u64, input: &[u8]) -> Result<Reply, Errno> {
        let words: Vec<u64> = input.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect();
        let ret = match (request, words.as_slice()) {
            (request::VERSION, _) => 12,
            (request::CREATE, _) => self.create(client, arg, true)?,
            (request::CREATE_KEEP, _) => self.create(client, arg, false)?,
            (request::RUN, _) => return self.run(client, None),
            (request::RUN_MASKED, _) => return self.run(client, Some(SignalMask(arg))),
            (request::SHARE, &[addr, len]) => {
                let pieces = client.share(addr, len)?;
                assert_eq!(pieces.iter().map(|piece| piece.len).sum::<u64>(), len);
                let count = pieces.len();
                *self.pieces.lock() = pieces;
                count as i32
            }
            (request::PEEK, _) => {
                let (mapping, offset) = self.at(arg).ok_or(Errno::EFAULT)?;
                mapping.load_u8(offset).ok_or(Errno::EFAULT)?.into()
            }
            (request::POKE, &[offset, byte]) => {
                let (mapping, offset) = self.at(offset).ok_or(Errno::EFAULT)?;
                mapping.store_u8(offset, byte as u8).ok_or(Errno::EFAULT)?;
                0
            }
            (request::WINDOW, _) => {
                let window = Mapping::create("fake-window", 1 << 20).unwrap();
                window.write(0x8000, b"window").unwrap();
                self.pieces.lock().push(SharedPiece { len: 1 << 20, mapping: window.clone(), offset: 0 });
                self.window.set(window).map_err(|_| Errno::EEXIST)?;
                0
            }
            (request::COPY, _) => {
                let mut bytes = [0; 64];
                client.read(arg, &mut bytes)?;
                bytes.iter_mut().for_each(|byte| *byte += 1);
                client.write(arg, &bytes)?;
                0
            }
            (request::PANIC, _) => panic!("asked for"),
            (request::OUTPUT, _) => {
                let fd = self.create(client, 0, true)?;
                return Ok(Reply { ret: fd, output: b"out!"[..].into() });
            }
            (request::SAME_SPACE, _) => i32::from(self.space.get() == Some(&client.address_space())),
            _ => return Err(Errno::EINVAL),
        };
        Ok(Reply::ret(ret))
    }

    fn mapping(&self) -> Option<Arc<Mapping>> {
        self.mapping.get().cloned()
    }

    fn ram_window(&self) -> Option<Vec<WindowPiece>> {
        let mapping = self.window.get()?.clone();
        Some(vec![WindowPiece { gpa: 0, ram: SharedPiece { len: mapping.len(), mapping, offset: 0 } }])
    }

    fn kind(&self) -> FileKind {
        self.kind
    }

    fn released(&self) {
        assert!(!self.released.swap(true, Ordering::SeqCst), "released once");
    }
}

/// A daemon in this process; its device is a file in a directory of its own, seen by this thread's children only.
pub struct Daemon {
    pub front: Arc<Front>,
    pub stats: Arc<Stats>,
    pub device: PathBuf,
    _bound: Option<fuse::Bound>,
}

impl Daemon {
    /// `None`, with the reason printed, where a daemon cannot run.
    pub fn start(passthrough: bool) -> Option<Self> {
        let stats = Arc::<Stats>::default();
        let of_system = stats.clone();
        Self::of(Box::new(move || Node::new(FileKind::System, &of_system)), stats, passthrough, false)
    }

    /// The same, for being killed.
    pub fn start_guarded() -> Option<Self> {
        let stats = Arc::<Stats>::default();
        let of_system = stats.clone();
        Self::of(Box::new(move || Node::new(FileKind::System, &of_system)), stats, true, true)
    }

    /// The same with the KVM objects that softkvm serves.
    pub fn start_kvm(passthrough: bool) -> Option<Self> {
        Self::of(cuse_daemon::objects::kvm().system, Arc::default(), passthrough, false)
    }

    fn of(system: Box<OpenSystem>, stats: Arc<Stats>, passthrough: bool, guarded: bool) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() || !std::path::Path::new("/dev/fuse").exists() {
            eprintln!("skipped: needs root and /dev/fuse");
            return None;
        }
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        let dir = std::env::temp_dir().join(format!("softkvm-transport-{}", nix::unistd::gettid()));
        std::fs::create_dir_all(&dir).unwrap();
        let front = Front::new(system);
        let device = dir.join("kvm");
        if guarded {
            guard::start().unwrap();
        }
        let options = fuse::Options { passthrough, over: Some(&device), access: Access::ALL };
        let bound = fuse::start(&front, &dir.join("mnt"), options).unwrap();
        assert!(device.exists());
        guard::serves(front.connection());
        if passthrough && !front.has_passthrough() {
            eprintln!("skipped: the kernel has no FUSE passthrough");
            return None;
        }
        Some(Self { front, stats, device, _bound: bound })
    }

    /// This test program again, as the client `case`.
    pub fn client(&self, case: &str) -> Command {
        // Not by its path, which in a chroot is another one since this thread left the namespace of its start.
        let mut command = Command::new("/proc/self/exe");
        command.args(["--exact", "client::client", "--nocapture", "--test-threads=1"]);
        command.env(client::CASE, case).env(client::DEVICE, &self.device).stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    /// Runs client `case` to its end, which must be success, and waits until everything of it is gone.
    pub fn run(&self, case: &str) {
        self.run_by(&[], case);
    }

    /// The same, started by `launcher`.
    pub fn run_by(&self, launcher: &[&str], case: &str) {
        let mut child = launched(launcher, self.client(case)).spawn().unwrap();
        let status = wait(&mut child, Duration::from_secs(30));
        assert!(matches!(status, WaitStatus::Exited(_, 0)), "client {case}: {status:?}");
        self.settles();
    }

    /// Nothing of a client's is left.
    pub fn settles(&self) {
        let nothing = || self.stats.alive.load(Ordering::SeqCst) == 0 && self.front.open_files() == 0;
        eventually("everything is released", nothing);
        eventually("workers end", || self.front.workers() <= 5);
        assert_eq!(self.stats.unreleased_drops.load(Ordering::SeqCst), 0);
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self._bound.take());
        let _ = std::fs::remove_dir(self.device.parent().unwrap());
    }
}

/// `command`, which is this program, started by `launcher`, whose own /proc/self/exe would be another.
pub fn launched(launcher: &[&str], command: Command) -> Command {
    if launcher.is_empty() {
        return command;
    }
    let own = std::env::current_exe().unwrap();
    let line: Vec<_> = launcher.iter().map(OsStr::new).chain([own.as_os_str()]).chain(command.get_args()).collect();
    let mut launched = Command::new(line[0]);
    launched.args(&line[1..]).envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    launched.stdin(Stdio::null()).stdout(Stdio::null());
    launched
}

/// Waits for the end of a child. Not by std's way: the daemon's threads trace the child, and a wait in the same process
/// that does more than look would take their news from them.
pub fn wait(child: &mut Child, patience: Duration) -> WaitStatus {
    let pid = Pid::from_raw(child.id().cast_signed());
    let flags = WaitPidFlag::WNOHANG | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
    let start = Instant::now();
    loop {
        if matches!(waitid(Id::Pid(pid), flags).unwrap(), WaitStatus::Exited(..) | WaitStatus::Signaled(..)) {
            return waitpid(pid, None).unwrap();
        }
        if start.elapsed() > patience {
            child.kill().unwrap();
            panic!("the client hangs");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(10), "not in time: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
