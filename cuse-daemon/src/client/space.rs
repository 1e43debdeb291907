//! Address spaces of clients: which threads share one, and what the daemon knows of each.

use std::collections::HashMap;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use kvm::client::AddressSpace;
use mmu::{Mapping, file_page_bytes};
use nix::errno::Errno;
use nix::unistd::Pid;
use parking_lot::{Mutex, MutexGuard};

use super::maps::PAGE;
use super::watch::Watch;
use crate::sys;

/// One address space, for as long as a VM of it or a request from it lives.
#[derive(Debug)]
pub struct Space {
    /// What the KVM objects compare.
    pub id: AddressSpace,
    /// The process it was first seen with.
    pub tgid: Pid,
    /// `/proc/PID/mem`, which stays with the address space when the process leaves it by exec or death.
    memory: File,
    exclusive: Mutex<()>,
    /// RAM is being put in the place of its mappings of a 2007 VM.
    pub placing: AtomicBool,
    /// Its shared files, as far as they are mapped here.
    pub mapped: Mapped,
    /// Files of ours that it has where its private memory was.
    pub own: Own,
    /// Tells of what it does to guest RAM by itself. `None` inside: this kernel does not.
    pub watch: OnceLock<Option<Watch>>,
}

/// Memory that was private until we put a file in its place, and what it showed before it was written: zeros, or a file.
#[derive(Debug, Default)]
pub struct Own(Mutex<HashMap<FileId, Vec<Origin>>>);

/// A part of a file of ours that was a private mapping of another one.
#[derive(Clone, Debug)]
pub struct Origin {
    /// Bytes of ours.
    pub range: Range<u64>,
    /// The other one.
    pub file: Arc<File>,
    /// Where in it the range begins.
    pub offset: u64,
}

impl Own {
    /// Adds a file.
    pub fn add(&self, file: FileId, origins: Vec<Origin>) {
        self.0.lock().insert(file, origins);
    }

    /// What parts of `file` were; `None`: it is none of these.
    pub fn origins(&self, file: FileId) -> Option<Vec<Origin>> {
        self.0.lock().get(&file).cloned()
    }
}

/// Device and inode.
pub type FileId = (u64, u64);

/// Files of a client that are mapped here. Only a cache: firmware has slots deleted and made again dozens of times.
#[derive(Debug, Default)]
pub struct Mapped(Mutex<Vec<Cached>>);

#[derive(Debug)]
struct Cached {
    file: FileId,
    used: Instant,
    mapping: Weak<Mapping>,
    /// Keeps it for a while when no slot uses it. Not of huge pages, which are few: who gives them up is to have them back.
    keeper: Option<Arc<Mapping>>,
}

impl Cached {
    fn is_used(&self) -> bool {
        self.mapping.strong_count() > usize::from(self.keeper.is_some())
    }
}

/// How long a mapping that no slot uses is kept.
const KEEP: Duration = Duration::from_secs(10);

impl Mapped {
    /// A mapping of bytes `range` of `file`.
    pub fn find(&self, file: FileId, range: &Range<u64>) -> Option<Arc<Mapping>> {
        let covers = |mapping: &Mapping| {
            mapping.file_offset() <= range.start && range.end <= mapping.file_offset() + mapping.len()
        };
        let mut list = self.0.lock();
        let usable = |mapping: &Mapping| covers(mapping) && !mapping.is_torn();
        list.iter_mut().filter(|cached| cached.file == file).find_map(|cached| {
            let mapping = cached.mapping.upgrade().filter(|mapping| usable(mapping))?;
            cached.used = Instant::now();
            Some(mapping)
        })
    }

    /// Adds one, and drops those that are no longer of use.
    pub fn keep(&self, file: FileId, mapping: &Arc<Mapping>) {
        let mut list = self.0.lock();
        list.retain(|cached| cached.is_used() || cached.keeper.is_some() && cached.used.elapsed() < KEEP);
        let is_huge = file_page_bytes(mapping.file()).is_ok_and(|bytes| bytes > PAGE);
        let keeper = (!is_huge).then(|| Arc::clone(mapping));
        list.push(Cached { file, used: Instant::now(), mapping: Arc::downgrade(mapping), keeper });
    }
}

impl Space {
    /// Somebody still runs in it.
    pub fn is_alive(&self) -> bool {
        // Nothing is mapped at 0; a dead space reads as the end of the file instead.
        !matches!(self.memory.read_at(&mut [0], 0), Ok(0))
    }

    /// Held while threads of the space are moved about: by one worker at a time, and no thread that a worker holds may
    /// go on meanwhile. Nothing is waited for under it but client threads that run user code.
    pub fn exclusive(&self) -> MutexGuard<'_, ()> {
        self.exclusive.lock()
    }

    /// The same, unless it takes too long.
    pub fn exclusive_within(&self, patience: Duration) -> Option<MutexGuard<'_, ()>> {
        self.exclusive.try_lock_for(patience)
    }
}

/// The address spaces of all clients.
#[derive(Debug, Default)]
pub struct Spaces {
    known: Mutex<Known>,
    generations: AtomicU64,
}

#[derive(Debug, Default)]
struct Known {
    by_thread: HashMap<u32, Weak<Space>>,
    by_process: HashMap<i32, Weak<Space>>,
}

impl Spaces {
    /// The space of thread `tid`. `ESRCH` if it is gone.
    pub fn of_thread(&self, tid: u32) -> Result<Arc<Space>, Errno> {
        let mut known = self.known.lock();
        if let Some(space) = known.by_thread.get(&tid).and_then(Weak::upgrade).filter(|space| space.is_alive()) {
            return Ok(space);
        }
        let tgid = thread_group(tid)?;
        let found = known.by_process.get(&tgid.as_raw()).and_then(Weak::upgrade).filter(|space| space.is_alive());
        let space = match found.or_else(|| known.shared_with(tgid)) {
            Some(space) => space,
            None => {
                known.forget_dead();
                let space = Arc::new(self.create(tgid)?);
                known.by_process.insert(tgid.as_raw(), Arc::downgrade(&space));
                space
            }
        };
        known.by_thread.insert(tid, Arc::downgrade(&space));
        Ok(space)
    }

    /// Thread ids may have been given anew: processes come and go between opens of the device.
    pub fn forget_threads(&self) {
        self.known.lock().by_thread.clear();
    }

    fn create(&self, tgid: Pid) -> Result<Space, Errno> {
        let memory = File::open(format!("/proc/{tgid}/mem")).map_err(|err| errno_of(&err))?;
        let generation = self.generations.fetch_add(1, Ordering::Relaxed);
        let id = AddressSpace { pid: tgid.as_raw().cast_unsigned(), generation };
        let (exclusive, placing) = (Mutex::new(()), AtomicBool::new(false));
        let (mapped, own, watch) = (Mapped::default(), Own::default(), OnceLock::new());
        Ok(Space { id, tgid, memory, exclusive, placing, mapped, own, watch })
    }
}

impl Known {
    /// A space that another process made and `tgid` runs in as well (`CLONE_VM`).
    fn shared_with(&self, tgid: Pid) -> Option<Arc<Space>> {
        let mut spaces = self.by_process.values().filter_map(Weak::upgrade);
        spaces.find(|space| space.is_alive() && sys::same_address_space(space.tgid, tgid))
    }

    fn forget_dead(&mut self) {
        self.by_process.retain(|_, space| space.strong_count() > 0);
        self.by_thread.retain(|_, space| space.strong_count() > 0);
    }
}

/// The process that thread `tid` is of.
pub fn thread_group(tid: u32) -> Result<Pid, Errno> {
    let status = fs::read_to_string(format!("/proc/{tid}/status")).map_err(|_| Errno::ESRCH)?;
    let tgid = status.lines().find_map(|line| line.strip_prefix("Tgid:")).and_then(|tgid| tgid.trim().parse().ok());
    tgid.map(Pid::from_raw).ok_or(Errno::ESRCH)
}

/// The errno behind an error of std's.
pub fn errno_of(err: &std::io::Error) -> Errno {
    err.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_of_a_process_are_one_space_and_a_child_is_another() {
        let spaces = Spaces::default();
        let own = spaces.of_thread(std::process::id()).unwrap();
        let other = std::thread::scope(|scope| {
            scope.spawn(|| spaces.of_thread(nix::unistd::gettid().as_raw() as u32).unwrap()).join().unwrap()
        });
        assert!(Arc::ptr_eq(&own, &other));
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let childs = spaces.of_thread(child.id()).unwrap();
        assert_ne!(childs.id, own.id);
        assert!(childs.is_alive());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!childs.is_alive());
        assert_eq!(spaces.of_thread(child.id()).unwrap_err(), Errno::ESRCH);
    }

    #[test]
    fn exec_changes_the_space() {
        let mut child = std::process::Command::new("sh")
            .args(["-c", "read x; exec sleep 60"])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let spaces = Spaces::default();
        let before = spaces.of_thread(child.id()).unwrap();
        drop(child.stdin.take());
        let start = std::time::Instant::now();
        while before.is_alive() {
            assert!(start.elapsed().as_secs() < 10);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert_ne!(spaces.of_thread(child.id()).unwrap().id, before.id);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
