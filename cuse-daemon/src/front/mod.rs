//! Requests in, replies out: the files that clients and the kernel see.
//!
//! Our file system is a directory that no client ever sees, with `kvm` in it, which is bound over `/dev/kvm`. The files
//! of VMs and vCPUs have names there only while the daemon itself opens them, to hand the descriptor to the client.

pub mod cuse;
pub mod fuse;
mod opener;

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use cuse_rs::layout::{Attr, AttrOut, EntryOut, IoctlFlags, OpenFlags, OpenOut, PollOut, ROOT_ID, StatfsOut};
use cuse_rs::{Answer, BackingId, Call, Ioctl, Operation, Service, Session};
use kvm::client::{File, FileKind, Share};
use nix::errno::Errno;
use nix::sys::stat::{fstat, major, minor};
use parking_lot::{Mutex, RwLock};

use self::opener::Opener;
use crate::client::space::{Space, Spaces};
use crate::client::{Caller, view, window};
use crate::file::{Open, Shared};
use crate::place;

/// The node behind `/dev/kvm`.
const KVM_ID: u64 = 2;
/// Names and attributes never change behind the kernel's back.
const FOREVER: u64 = 1 << 30;

/// Makes what open("/dev/kvm") gives.
pub type OpenSystem = dyn Fn() -> Arc<dyn File> + Send + Sync;

/// Everything between the kernel's requests and the KVM objects.
pub struct Front {
    system: Box<OpenSystem>,
    /// Address spaces of clients.
    pub spaces: Spaces,
    files: Files,
    access: OnceLock<Access>,
    mounted: OnceLock<Mounted>,
    device: OnceLock<Arc<Session>>,
}

/// Who may open `/dev/kvm`.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl Access {
    /// Everybody.
    pub const ALL: Self = Self { mode: 0o666, uid: 0, gid: 0 };

    /// The daemon alone.
    const OWN: Self = Self { mode: 0o600, uid: 0, gid: 0 };

    /// Whoever may open the device at `path`; everybody if there is none.
    pub fn as_before(path: &Path) -> Self {
        let device = fs::symlink_metadata(path).ok().filter(|found| found.file_type().is_char_device());
        device.map_or(Self::ALL, |found| Self { mode: found.mode() & 0o777, uid: found.uid(), gid: found.gid() })
    }
}

/// The file system's own side.
struct Mounted {
    session: Arc<Session>,
    root: OwnedFd,
    opener: Opener,
    /// As `/proc/PID/maps` shows it.
    device: u64,
}

#[derive(Default)]
struct Files {
    /// By handle.
    open: RwLock<HashMap<u64, Arc<Open>>>,
    /// Nodes that are being opened, by name, and what the kernel is to be told of them.
    exposed: Mutex<HashMap<CString, Exposed>>,
    next: AtomicU64,
}

#[derive(Clone)]
struct Exposed {
    node: u64,
    shared: Arc<Shared>,
    backing: Option<BackingId>,
}

impl Front {
    /// Files of `system`, not yet reachable by anybody.
    pub fn new(system: Box<OpenSystem>) -> Arc<Self> {
        let files = Files { next: AtomicU64::new(KVM_ID + 1), ..Files::default() };
        Arc::new(Self {
            system,
            spaces: Spaces::default(),
            files,
            access: OnceLock::new(),
            mounted: OnceLock::new(),
            device: OnceLock::new(),
        })
    }

    /// Clients of this front may have descriptors from now on: `root` is the directory of our file system.
    fn mounted(&self, session: Arc<Session>, root: OwnedFd, opener: Opener) -> Result<(), Errno> {
        let number = fstat(&root)?.st_dev;
        let device = major(number) << 32 | minor(number);
        self.mounted.set(Mounted { session, root, opener, device }).map_err(|_| Errno::EBUSY)
    }

    /// The number of the file system that VM and vCPU files lie on.
    pub fn device_number(&self) -> u64 {
        self.mounted.get().map_or(0, |mounted| mounted.device)
    }

    /// The same as stat(2) shows it.
    pub fn st_dev(&self) -> u64 {
        self.mounted.get().and_then(|mounted| fstat(&mounted.root).ok()).map_or(0, |stat| stat.st_dev)
    }

    /// What the kernel calls the connection of VM and vCPU files; 0 before there is one.
    pub fn connection(&self) -> u64 {
        minor(self.st_dev())
    }

    /// Sees mmap of a file the object's own memory?
    pub fn has_passthrough(&self) -> bool {
        self.session().and_then(|session| session.negotiated()).is_some_and(|agreed| agreed.passthrough)
    }

    fn session(&self) -> Option<&Arc<Session>> {
        self.mounted.get().map(|mounted| &mounted.session)
    }

    /// Files that clients hold open, `/dev/kvm` included.
    pub fn open_files(&self) -> usize {
        self.files.open.read().len()
    }

    /// Threads that answer requests.
    pub fn workers(&self) -> usize {
        self.session().into_iter().chain(self.device.get()).map(|session| session.workers()).sum()
    }

    /// Is this thread of a client inside a request to us?
    pub fn is_waiting(&self, tid: u32) -> bool {
        self.session().into_iter().chain(self.device.get()).any(|session| session.is_waiting(tid))
    }

    /// The client of `space` has other memory at `range`: its VMs are told. `share` as [`File::remapped`] has it.
    pub fn remapped(&self, space: &Arc<Space>, range: &Range<u64>, share: &mut Share<'_>) {
        let open = self.files.open.read();
        let vms: Vec<_> = open.values().filter(|open| open.shared.file.kind() == FileKind::Vm).cloned().collect();
        drop(open);
        vms.iter().for_each(|open| open.shared.file.remapped(space.id, range, share));
    }

    /// Takes a new KVM object in.
    pub fn adopt(&self, file: Arc<dyn File>, owner: Option<&Arc<Space>>) -> Arc<Shared> {
        Shared::new(file, owner)
    }

    /// Opens a file of ours that leads to `shared`. The kernel asks us for it meanwhile, on other threads.
    pub fn expose(&self, shared: &Arc<Shared>) -> Result<OwnedFd, Errno> {
        let mounted = self.mounted.get().ok_or(Errno::ENODEV)?;
        let node = self.files.next.fetch_add(1, Ordering::Relaxed);
        let name = CString::new(format!("{}.{node}", shared.file.kind())).map_err(|_| Errno::EINVAL)?;
        let device = mounted.session.device();
        // The kernel passes on to one file.
        let mapping = shared.file.mapping().filter(|mapping| self.has_passthrough() && !mapping.is_joined());
        let backing = mapping.and_then(|mapping| match device.backing_open(mapping.file()) {
            Ok(backing) => Some(backing),
            Err(errno) => {
                tracing::debug!(%errno, "no passthrough for this file; its mappings are replaced instead");
                None
            }
        });
        let exposed = Exposed { node, shared: Arc::clone(shared), backing };
        self.files.exposed.lock().insert(name.clone(), exposed);
        let opened = mounted.opener.open(mounted.root.as_fd(), &name);
        self.files.exposed.lock().remove(&name);
        // The open file keeps its backing file; the number is of no more use.
        if let Some(backing) = backing {
            device.backing_close(backing)?;
        }
        opened
    }

    /// Has the kernel drop its cache of what was mapped in place.
    pub fn forget_pages(&self, open: &Open) {
        open.mapping_done();
        if let Some(session) = self.session()
            && let Err(errno) = session.invalidate(open.node)
        {
            tracing::debug!(%errno, node = open.node, "nothing cached");
        }
    }

    fn find(&self, name: &CStr) -> Option<Exposed> {
        self.files.exposed.lock().get(name).cloned()
    }

    fn find_node(&self, node: u64) -> Option<Exposed> {
        self.files.exposed.lock().values().find(|exposed| exposed.node == node).cloned()
    }

    fn attributes(&self, node: u64) -> Attr {
        let access = if node == KVM_ID { self.access.get().copied().unwrap_or(Access::ALL) } else { Access::OWN };
        let (mode, size) = match node {
            ROOT_ID => (libc::S_IFDIR | 0o700, 0),
            KVM_ID => (libc::S_IFREG | access.mode, 0),
            node => {
                // Its name is gone when it is open.
                let is_open =
                    || self.files.open.read().values().find(|open| open.node == node).map(|o| o.shared.clone());
                let shared = self.find_node(node).map(|exposed| exposed.shared).or_else(is_open);
                (libc::S_IFREG | 0o600, shared.map_or(0, |shared| mappable(&shared)))
            }
        };
        Attr { ino: node, size, mode, nlink: 1, uid: access.uid, gid: access.gid, blksize: 4096, ..Attr::default() }
    }

    fn lookup(&self, parent: u64, name: &CStr) -> Answer {
        let node = match (parent, name) {
            (ROOT_ID, name) if name == c"kvm" => KVM_ID,
            (ROOT_ID, name) => match self.find(name) {
                Some(exposed) => exposed.node,
                None => return Answer::Error(Errno::ENOENT),
            },
            _ => return Answer::Error(Errno::ENOTDIR),
        };
        let attr = self.attributes(node);
        // The kernel is to forget an exposed name, and with the last descriptor the node.
        let entry_valid = if node == KVM_ID { FOREVER } else { 0 };
        Answer::Entry(EntryOut { nodeid: node, entry_valid, attr_valid: FOREVER, attr, ..EntryOut::default() })
    }

    fn open(&self, node: u64) -> Answer {
        let (open, flags, backing) = if node == KVM_ID {
            // Threads of earlier clients may be gone and their ids in use again.
            self.spaces.forget_threads();
            let shared = self.adopt((self.system)(), None);
            (Open::new(shared, node, false), OpenFlags::DIRECT_IO, None)
        } else {
            // Reached by /proc/PID/fd: as little possible as with the kernel's own.
            let Some(exposed) = self.find_node(node) else { return Answer::Error(Errno::ENXIO) };
            let flags = match exposed.backing {
                Some(_) => OpenFlags::PASSTHROUGH,
                None if mappable(&exposed.shared) > 0 => OpenFlags::KEEP_CACHE,
                None => OpenFlags::DIRECT_IO,
            };
            (Open::new(exposed.shared, node, exposed.backing.is_some()), flags, exposed.backing)
        };
        let fh = self.files.next.fetch_add(1, Ordering::Relaxed);
        self.files.open.write().insert(fh, Arc::new(open));
        let open_flags = (flags | OpenFlags::NOFLUSH).bits();
        Answer::Open(OpenOut { fh, open_flags, backing_id: backing.map_or(0, |id| id.0) })
    }

    fn by_handle(&self, fh: u64) -> Option<Arc<Open>> {
        self.files.open.read().get(&fh).cloned()
    }

    fn ioctl(self: &Arc<Self>, call: &Call<'_>, ioctl: Ioctl<'_>) -> Answer {
        let Some(open) = self.by_handle(ioctl.fh) else { return Answer::Error(Errno::EBADF) };
        if call.header.pid == 0 {
            tracing::error!("an ioctl from a pid namespace that is not below softkvm's: run softkvm outside of it");
            return Answer::Error(Errno::ESRCH);
        }
        if ioctl.flags.intersects(IoctlFlags::COMPAT | IoctlFlags::BITS_32 | IoctlFlags::COMPAT_X32) {
            // What a kernel without CONFIG_KVM_COMPAT answers.
            let tid = call.header.pid;
            tracing::error!(
                tid,
                "the VMM is a 32-bit program; softkvm serves 64-bit ones only. Use a 64-bit build of it"
            );
            return Answer::Error(Errno::EINVAL);
        }
        Caller::new(self, call, &open, ioctl).serve()
    }

    /// A page fault on a file without passthrough, or read(2), which of KVM's files only those of statistics have.
    fn read(self: &Arc<Self>, call: &Call<'_>, fh: u64, offset: u64, size: u32) -> Answer {
        let Some(open) = self.by_handle(fh) else { return Answer::Error(Errno::EBADF) };
        if open.has_window {
            return window::fault(self, call, &open, offset, size.into());
        }
        if let Some(content) = open.shared.file.read(offset, size as usize) {
            return Answer::Data(content);
        }
        let Some(mapping) = open.shared.file.mapping() else { return Answer::Error(Errno::EINVAL) };
        open.page_fault();
        let len = mapping.len().saturating_sub(offset).min(size.into());
        let mut bytes = vec![0; len as usize];
        match mapping.read(offset, &mut bytes) {
            None if len > 0 => Answer::Error(Errno::EIO),
            // Not with the next ioctl, which may be that of another file: dirty rings are reset by their VM's.
            _ if open.has_mapping() => window::in_place(self, call, &open, bytes),
            _ => Answer::Data(bytes),
        }
    }

    fn serve(self: &Arc<Self>, call: &Call<'_>, operation: Operation<'_>) -> Answer {
        let node = call.header.nodeid;
        match operation {
            Operation::Ioctl(ioctl) => self.ioctl(call, ioctl),
            Operation::Lookup(name) => self.lookup(node, name),
            Operation::Getattr(_) => {
                Answer::Attr(AttrOut { attr_valid: FOREVER, attr: self.attributes(node), ..AttrOut::default() })
            }
            Operation::Open(_) => self.open(node),
            Operation::Release(release) => {
                let open = self.files.open.write().remove(&release.fh);
                // Outside the lock: a VM's end takes time.
                drop(open);
                Answer::Empty
            }
            Operation::Read(read) => self.read(call, read.fh, read.offset, read.size),
            // Write-back of a page that was replaced, or is about to be.
            Operation::Write(write, data) => {
                if let Some(open) = self.by_handle(write.fh).filter(|open| open.has_window) {
                    window::written_back(&open.shared, write.offset, data);
                }
                Answer::Written(write.size)
            }
            Operation::Statfs => {
                Answer::Statfs(StatfsOut { bsize: 4096, namelen: 255, frsize: 4096, ..StatfsOut::default() })
            }
            Operation::Opendir(_) | Operation::Releasedir(_) | Operation::Access(_) | Operation::Flush(_) => {
                Answer::Empty
            }
            Operation::Readdir(_) => Answer::Data(Vec::new()),
            Operation::Poll(_) => Answer::Poll(PollOut { revents: POLL_ALWAYS, padding: 0 }),
            Operation::Forget(_) | Operation::BatchForget(_) => Answer::Done,
            Operation::Destroy => Answer::Empty,
            _ => Answer::Error(Errno::ENOSYS),
        }
    }
}

/// Bytes of the file that mmap shows; 0: mmap fails.
fn mappable(shared: &Shared) -> u64 {
    let window = shared.file.ram_window().map(|_| view::BYTES);
    window.unwrap_or_else(|| shared.file.mapping().map_or(0, |mapping| mapping.len()))
}

/// What poll(2) says of a file without a poll method.
const POLL_ALWAYS: u32 = (libc::POLLIN | libc::POLLOUT | libc::POLLRDNORM | libc::POLLWRNORM) as u32;

/// The file system's requests.
struct FileSystem(Arc<Front>);

impl Service for FileSystem {
    fn serve(&self, call: &Call<'_>, operation: Operation<'_>) -> Answer {
        self.0.serve(call, operation)
    }

    fn worker_started(&self) {
        place::worker_started();
    }

    fn stack_bytes(&self) -> usize {
        kvm::VCPU_STACK_BYTES
    }
}

/// The requests of the character device: all of them mean `/dev/kvm`.
struct CharacterDevice(Arc<Front>);

impl Service for CharacterDevice {
    fn serve(&self, call: &Call<'_>, operation: Operation<'_>) -> Answer {
        match operation {
            Operation::Open(_) => self.0.open(KVM_ID),
            operation => self.0.serve(call, operation),
        }
    }

    fn worker_started(&self) {
        place::worker_started();
    }

    fn stack_bytes(&self) -> usize {
        kvm::VCPU_STACK_BYTES
    }
}
