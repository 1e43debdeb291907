//! An open file of a client's, and how it ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvm::client::{File, FileKind};
use kvm::clock;
use nix::errno::Errno;
use parking_lot::Mutex;

use crate::client::signal::LastPending;
use crate::client::space::{Space, Spaces};
use crate::client::view::Views;
use crate::place::Place;

/// A thread that was in its owner's address space at a moment.
#[derive(Clone, Copy)]
struct Seen {
    tid: u32,
    /// By [`clock`].
    at: u64,
}

/// For so long nobody looks again. No thread gets another address space in less: it would have to come out of its ioctl, exec, and
/// come back from the new program; nor does its id come round to another.
const FRESH: Duration = Duration::from_micros(20);

/// One KVM object, however many files of ours lead to it.
pub struct Shared {
    /// The object.
    pub file: Arc<dyn File>,
    /// The client that made it; none for `/dev/kvm`, which everybody opens for himself.
    owner: Option<Arc<Space>>,
    /// Who is known to be a thread of the owner's.
    seen: Mutex<Option<Seen>>,
    /// Somebody has its memory mapped already.
    mapped: AtomicBool,
    /// Where a vCPU's thread and its workers run.
    pub place: Place,
    /// Signals of the thread that runs a vCPU under a mask.
    pub pending: LastPending,
    /// What clients see of a 2007 VM's RAM.
    pub views: Views,
}

impl Shared {
    /// A new object of `owner`'s.
    pub fn new(file: Arc<dyn File>, owner: Option<&Arc<Space>>) -> Arc<Self> {
        Arc::new(Self {
            file,
            owner: owner.cloned(),
            seen: Mutex::new(None),
            mapped: AtomicBool::new(false),
            place: Place::default(),
            pending: LastPending::default(),
            views: Views::default(),
        })
    }

    /// The address space of `tid`; quick for the thread that asked last.
    pub fn space_of(&self, tid: u32, spaces: &Spaces) -> Result<Arc<Space>, Errno> {
        if let Some(owner) = self.owner.as_ref().filter(|owner| self.asks_again(owner, tid)) {
            return Ok(Arc::clone(owner));
        }
        let space = spaces.of_thread(tid)?;
        if self.owner.as_ref().is_some_and(|owner| Arc::ptr_eq(owner, &space)) {
            *self.seen.lock() = Some(Seen { tid, at: clock::now() });
        }
        Ok(space)
    }

    /// Is `tid` the thread of the owner's that asked last, and the owner's still?
    fn asks_again(&self, owner: &Space, tid: u32) -> bool {
        let now = clock::now();
        let mut seen = self.seen.lock();
        let Some(last) = seen.as_mut().filter(|last| last.tid == tid) else { return false };
        // A counter that is behind says nothing.
        if now.checked_sub(last.at).is_some_and(|age| age < clock::counts(FRESH)) {
            return true;
        }
        let is_alive = owner.is_alive();
        if is_alive {
            last.at = now;
        }
        is_alive
    }
}

impl Drop for Shared {
    /// Ioctls hold a reference, so none is under way, also none that was answered before its end.
    fn drop(&mut self) {
        tracing::debug!(kind = %self.file.kind(), "closed");
        self.file.released();
    }
}

/// What the kernel has open: one `struct file`, shared by all descriptors that dup, fork or `SCM_RIGHTS` made of it.
pub struct Open {
    /// What it leads to.
    pub shared: Arc<Shared>,
    /// The node of our file system that was opened.
    pub node: u64,
    /// mmap of it may show the page cache instead of the object's memory, and nobody has looked since.
    unmapped: AtomicBool,
    /// mmap of it fails though the object has memory to show by now.
    lacks: AtomicBool,
    /// mmap of it shows RAM of a 2007 VM.
    pub has_window: bool,
}

impl Open {
    /// `passthrough`: mmap shows the object's memory by itself.
    pub fn new(shared: Arc<Shared>, node: u64, passthrough: bool) -> Self {
        let has_mapping = shared.file.mapping().is_some();
        let has_window = shared.file.ram_window().is_some();
        let lacks = !has_window && shared.file.kind() == FileKind::Vm;
        let unmapped = AtomicBool::new(has_mapping && !passthrough);
        Self { shared, node, unmapped, lacks: AtomicBool::new(lacks), has_window }
    }

    /// True until [`mapping_done`](Self::mapping_done), and again after a page fault on it.
    pub fn may_need_mapping(&self) -> bool {
        self.unmapped.load(Ordering::Relaxed)
    }

    /// The client has touched a mapping that shows the page cache.
    pub fn page_fault(&self) {
        self.unmapped.store(true, Ordering::Relaxed);
    }

    /// All mappings there are show the real memory.
    pub fn mapping_done(&self) {
        self.unmapped.store(false, Ordering::Relaxed);
    }

    /// True the first time the object's memory is mapped.
    pub fn first_mapping(&self) -> bool {
        !self.shared.mapped.swap(true, Ordering::Relaxed)
    }

    /// Some mapping of the object's memory is in place: who maps it anew is not at the beginning.
    pub fn has_mapping(&self) -> bool {
        self.shared.mapped.load(Ordering::Relaxed)
    }

    /// A VM whose memory became mappable after this file was opened.
    pub fn lacks_mapping(&self) -> bool {
        self.lacks.load(Ordering::Relaxed) && self.shared.file.ram_window().is_some()
    }

    /// A newer file shows it.
    pub fn mapping_elsewhere(&self) {
        self.lacks.store(false, Ordering::Relaxed);
    }
}
