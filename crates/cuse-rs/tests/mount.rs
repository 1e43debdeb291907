//! A session against the kernel: mounts a file system of one file and uses it. Needs root and `/dev/fuse`.
#![expect(unsafe_code, reason = "ioctl(2), fork-free signal delivery and mmap of the file under test")]

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use cuse_rs::layout::{Attr, AttrOut, EntryOut, OpenFlags, OpenOut, ROOT_ID, StatfsOut};
use cuse_rs::{Answer, Bytes, Call, Device, Kind, Operation, Service, Session};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

const FILE: u64 = 2;
/// Answers at once with the caller's four bytes reversed.
const REVERSE: u32 = 0xc004_7701;
/// Waits for a signal, then fails with `EINTR`.
const WAIT: u32 = 0x7702;
/// Waits until as many callers wait.
const MEET: u32 = 0x7703;

struct Fixture {
    backing: Option<File>,
    barrier: Barrier,
    waiting: AtomicUsize,
    released: AtomicBool,
    forgotten: AtomicU64,
    /// Workers, those that ended included.
    started: AtomicUsize,
}

fn attr(node: u64) -> Attr {
    let mode = if node == ROOT_ID { libc::S_IFDIR | 0o755 } else { libc::S_IFREG | 0o666 };
    Attr { ino: node, size: 8192, nlink: 1, mode, blksize: 4096, ..Attr::default() }
}

impl Service for Fixture {
    fn serve(&self, call: &Call<'_>, operation: Operation<'_>) -> Answer {
        let attr = attr(call.header.nodeid);
        match operation {
            Operation::Lookup(name) if name == c"file" => {
                Answer::Entry(EntryOut { nodeid: FILE, attr: self::attr(FILE), ..EntryOut::default() })
            }
            Operation::Lookup(_) => Answer::Error(Errno::ENOENT),
            Operation::Getattr(_) => Answer::Attr(AttrOut { attr, ..AttrOut::default() }),
            Operation::Statfs => Answer::Statfs(StatfsOut { bsize: 4096, namelen: 255, ..StatfsOut::default() }),
            Operation::Open(_) => {
                let mut open = OpenOut { fh: 5, open_flags: OpenFlags::NOFLUSH.bits(), backing_id: 0 };
                if let Some(file) = &self.backing {
                    open.backing_id = call.session.device().backing_open(file.as_fd()).unwrap().0;
                    open.open_flags |= OpenFlags::PASSTHROUGH.bits();
                }
                Answer::Open(open)
            }
            Operation::Release(release) => {
                assert_eq!(release.fh, 5);
                self.released.store(true, Ordering::SeqCst);
                Answer::Empty
            }
            Operation::Forget(forget) => {
                self.forgotten.fetch_add(forget.nlookup, Ordering::SeqCst);
                Answer::Done
            }
            Operation::BatchForget(list) => {
                self.forgotten.fetch_add(list.iter().map(|one| one.nlookup).sum(), Ordering::SeqCst);
                Answer::Done
            }
            Operation::Ioctl(ioctl) => match ioctl.request {
                REVERSE => Answer::Ioctl(7, ioctl.input.iter().rev().copied().collect::<Bytes>()),
                WAIT => {
                    let pair = Arc::new((Mutex::new(false), Condvar::new()));
                    let other = Arc::clone(&pair);
                    self.waiting.fetch_add(1, Ordering::SeqCst);
                    call.on_interrupt(Some(Arc::new(move || {
                        *other.0.lock().unwrap() = true;
                        other.1.notify_all();
                    })));
                    let guard = pair.0.lock().unwrap();
                    drop(pair.1.wait_while(guard, |done| !*done).unwrap());
                    assert!(call.interrupted());
                    call.on_interrupt(None);
                    Answer::Ioctl(-(Errno::EINTR as i32), Bytes::new())
                }
                MEET => {
                    self.barrier.wait();
                    Answer::Ioctl(0, Bytes::new())
                }
                _ => Answer::Error(Errno::ENOTTY),
            },
            _ => Answer::Error(Errno::ENOSYS),
        }
    }

    fn worker_started(&self) {
        self.started.fetch_add(1, Ordering::SeqCst);
    }
}

/// A mounted fixture. The mount is private to the thread that made it and to what that thread starts.
struct Mounted {
    session: Arc<Session>,
    fixture: Arc<Fixture>,
    dir: PathBuf,
}

impl Mounted {
    /// `None`, with the reason printed, where a test cannot mount.
    fn new(backing: Option<File>, meet: usize) -> Option<Self> {
        let device = match Device::open(Path::new("/dev/fuse")) {
            Ok(device) if nix::unistd::geteuid().is_root() => device,
            Ok(_) => return skip("not root"),
            Err(err) => return skip(&format!("/dev/fuse: {err}")),
        };
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&CStr>, "/", None::<&CStr>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&CStr>).unwrap();
        let dir = std::env::temp_dir().join(format!("cuse-rs-{:?}", thread::current().id()));
        std::fs::create_dir_all(&dir).unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_fd().as_raw_fd());
        let passthrough = backing.is_some();
        let fixture = Arc::new(Fixture {
            backing,
            barrier: Barrier::new(meet),
            waiting: AtomicUsize::new(0),
            released: AtomicBool::new(false),
            forgotten: AtomicU64::new(0),
            started: AtomicUsize::new(0),
        });
        mount(Some("cuse-rs-test"), &dir, Some("fuse"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some(options.as_str()))
            .unwrap();
        let session = Session::start(device, Kind::Fuse { passthrough }, fixture.clone()).unwrap();
        Some(Self { session, fixture, dir })
    }

    fn open(&self) -> File {
        OpenOptions::new().read(true).write(true).open(self.dir.join("file")).unwrap()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        umount2(&self.dir, MntFlags::MNT_DETACH).unwrap();
        std::fs::remove_dir(&self.dir).unwrap();
    }
}

fn skip(why: &str) -> Option<Mounted> {
    eprintln!("skipped: {why}");
    None
}

fn ioctl(file: &File, request: u32, arg: u64) -> Result<i32, Errno> {
    // SAFETY: `arg` is a value, or points to four bytes that outlive the call.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), request.into(), arg) })
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(10), "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn ioctl_moves_bytes_both_ways() {
    let Some(mounted) = Mounted::new(None, 1) else { return };
    let file = mounted.open();
    let mut bytes = *b"abcd";
    assert_eq!(ioctl(&file, REVERSE, bytes.as_mut_ptr().addr() as u64), Ok(7));
    assert_eq!(&bytes, b"dcba");
    assert_eq!(ioctl(&file, 0x1234, 0), Err(Errno::ENOTTY));
    assert_eq!(std::fs::metadata(mounted.dir.join("missing")).unwrap_err().raw_os_error(), Some(libc::ENOENT));
    nix::sys::statfs::statfs(&mounted.dir).unwrap();
    drop(file);
    eventually("release", || mounted.fixture.released.load(Ordering::SeqCst));
    assert_eq!(mounted.session.negotiated().unwrap().kernel.0, 7);
}

#[test]
fn signal_ends_a_blocked_ioctl() {
    let Some(mounted) = Mounted::new(None, 1) else { return };
    extern "C" fn handler(_: i32) {}
    // SAFETY: the handler does nothing, so it is safe at any point of any thread.
    unsafe { nix::sys::signal::signal(nix::sys::signal::SIGUSR2, nix::sys::signal::SigHandler::Handler(handler)) }
        .unwrap();
    let file = Arc::new(mounted.open());
    for round in 1..=20 {
        let (sender, receiver) = std::sync::mpsc::channel();
        let file = Arc::clone(&file);
        let waiter = thread::spawn(move || {
            sender.send(nix::sys::pthread::pthread_self()).unwrap();
            ioctl(&file, WAIT, 0)
        });
        let target = receiver.recv().unwrap();
        // The request reached its service; whether its action is registered yet is left to chance.
        eventually("wait", || mounted.fixture.waiting.load(Ordering::SeqCst) >= round);
        nix::sys::pthread::pthread_kill(target, nix::sys::signal::SIGUSR2).unwrap();
        assert_eq!(waiter.join().unwrap(), Err(Errno::EINTR));
    }
}

#[test]
fn many_requests_block_at_once() {
    const CALLERS: usize = 24;
    let Some(mounted) = Mounted::new(None, CALLERS) else { return };
    let file = mounted.open();
    thread::scope(|scope| {
        for _ in 0..CALLERS {
            scope.spawn(|| assert_eq!(ioctl(&file, MEET, 0), Ok(0)));
        }
    });
    eventually("idle workers end", || mounted.session.workers() <= 5);
    let mut bytes = *b"wxyz";
    assert_eq!(ioctl(&file, REVERSE, bytes.as_mut_ptr().addr() as u64), Ok(7));
}

#[test]
fn one_caller_makes_no_workers() {
    let Some(mounted) = Mounted::new(None, 1) else { return };
    let file = mounted.open();
    let started = || mounted.fixture.started.load(Ordering::SeqCst);
    eventually("two workers", || started() == 2 && mounted.session.workers() == 2);
    for _ in 0..5_000 {
        assert_eq!(ioctl(&file, 0x1234, 0), Err(Errno::ENOTTY));
    }
    assert_eq!(started(), 2);
}

#[test]
fn a_burst_is_served_by_the_workers_of_the_one_before() {
    const CALLERS: usize = 8;
    let Some(mounted) = Mounted::new(None, CALLERS) else { return };
    let file = mounted.open();
    let makes_workers = || {
        let before = mounted.fixture.started.load(Ordering::SeqCst);
        thread::scope(|scope| {
            for _ in 0..CALLERS {
                scope.spawn(|| assert_eq!(ioctl(&file, MEET, 0), Ok(0)));
            }
        });
        mounted.fixture.started.load(Ordering::SeqCst) > before
    };
    assert!(makes_workers());
    // One that has not yet got to where it waits is not found there.
    assert!((0..20).any(|_| {
        thread::sleep(Duration::from_millis(20));
        !makes_workers()
    }));
}

#[test]
fn passthrough_shares_the_backing_file() {
    let memfd = nix::sys::memfd::memfd_create(c"backing", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
    let mut backing = File::from(memfd);
    backing.set_len(8192).unwrap();
    let Some(mounted) = Mounted::new(Some(backing.try_clone().unwrap()), 1) else { return };
    let file = mounted.open();
    if !mounted.session.negotiated().unwrap().passthrough {
        eprintln!("skipped: the kernel has no FUSE passthrough");
        return;
    }
    let flags = nix::sys::mman::ProtFlags::PROT_READ | nix::sys::mman::ProtFlags::PROT_WRITE;
    // SAFETY: a fresh mapping at an address of the kernel's choice; it is unmapped by the end of the process only.
    let map = unsafe {
        nix::sys::mman::mmap(None, 8192.try_into().unwrap(), flags, nix::sys::mman::MapFlags::MAP_SHARED, &file, 0)
    }
    .unwrap()
    .cast::<u8>();
    backing.seek(SeekFrom::Start(4096)).unwrap();
    backing.write_all(b"seen").unwrap();
    // SAFETY: inside the mapping of 8192 bytes made above.
    let at = unsafe { map.add(4098) };
    // SAFETY: as above.
    assert_eq!(unsafe { at.read_volatile() }, b'e');
    // SAFETY: as above.
    unsafe { map.write_volatile(b'!') };
    backing.rewind().unwrap();
    let mut byte = [0];
    backing.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"!");
    assert_eq!(ioctl(&file, 0x1234, 0), Err(Errno::ENOTTY), "ioctls still reach the service");
}

#[test]
fn unmount_ends_the_session() {
    let Some(mounted) = Mounted::new(None, 1) else { return };
    drop(mounted.open());
    let session = Arc::clone(&mounted.session);
    drop(mounted);
    eventually("session over", || session.is_over() && session.workers() == 0);
}
