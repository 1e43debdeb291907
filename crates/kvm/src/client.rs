//! The seam to the front ends: what the KVM objects see of a client, and what a front end sees of an open file.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use std::{fmt, fs};

use mmu::Mapping;
use nix::errno::Errno;
use smallvec::SmallVec;

/// The thread of a client that is inside an ioctl. Front ends implement it.
///
/// One value serves one ioctl; every method may block on the client and is called from the thread that serves it.
pub trait Client {
    /// Copies from client memory at `addr`. `EFAULT` where any byte is unreadable.
    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), Errno>;

    /// Copies to client memory at `addr`. `EFAULT` where any byte is unwritable.
    fn write(&self, addr: u64, buf: &[u8]) -> Result<(), Errno>;

    /// Makes `file` a new file descriptor of the client, open for reading and writing, and returns its number there.
    fn install(&self, file: Arc<dyn File>, cloexec: bool) -> Result<i32, Errno>;

    /// Another descriptor of what the client has open as `fd`. `EBADF`: nothing.
    fn descriptor(&self, fd: i32) -> Result<OwnedFd, Errno>;

    /// Makes client memory [`addr`, `addr` + `len`) shared with this process, contents kept.
    /// Both are multiples of 4 KiB. The pieces come in ascending order and cover the range.
    fn share(&self, addr: u64, len: u64) -> Result<Vec<SharedPiece>, Errno>;

    /// Whose memory the addresses above mean.
    fn address_space(&self) -> AddressSpace;

    /// The thread's id, as the daemon sees it.
    fn thread(&self) -> u32 {
        0
    }

    /// What the scheduler tells of the thread: its `schedstat` file (proc_pid_schedstat(5)). `None`: nothing.
    fn schedstat(&self) -> Option<fs::File> {
        None
    }

    /// Registers, or with `None` withdraws, what a signal to the thread does from now on. Called through
    /// `on_interrupt`. Once it returns from withdrawing, the action runs no more.
    fn set_interrupt_action(&self, action: Option<InterruptAction>);

    /// True when a signal that ends the ioctl is pending: any that the thread does not block, and while an action with a
    /// [`SignalMask`] is registered, any that this mask does not hold.
    fn interrupted(&self) -> bool;

    /// How often [`interrupted`](Self::interrupted) must be asked by whoever runs or waits under the registered action,
    /// because nothing runs it for signals that the thread blocks and the mask does not. `None`: the action tells of all.
    fn poll_interval(&self) -> Option<Duration>;
}

impl dyn Client + '_ {
    /// `run` is called, from any thread, when a signal comes for the client's thread while the guard lives, and at once
    /// if one is pending already. `mask`: blocked signals, in place of the thread's own (`KVM_SET_SIGNAL_MASK`); of some
    /// that it lets through only [`interrupted`](Client::interrupted) may tell, see [`poll_interval`](Client::poll_interval).
    pub fn on_interrupt(&self, run: Arc<dyn Fn() + Send + Sync>, mask: Option<SignalMask>) -> InterruptGuard<'_> {
        self.set_interrupt_action(Some(InterruptAction { run, mask }));
        InterruptGuard { client: self }
    }
}

/// What a signal to the client's thread does.
#[derive(Clone)]
pub struct InterruptAction {
    /// Cheap, does not block.
    pub run: Arc<dyn Fn() + Send + Sync>,
    /// Signals blocked meanwhile; `None`: those that the thread blocks.
    pub mask: Option<SignalMask>,
}

/// A kernel `sigset_t`: bit n−1 is signal n.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SignalMask(pub u64);

/// While it lives a signal to the client's thread runs the registered action.
#[must_use]
pub struct InterruptGuard<'a> {
    client: &'a dyn Client,
}

impl Drop for InterruptGuard<'_> {
    fn drop(&mut self) {
        self.client.set_interrupt_action(None);
    }
}

/// Identity of a client's memory. Two are equal while they mean the same `mm` of the kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AddressSpace {
    /// Process id, as the daemon sees it.
    pub pid: u32,
    /// Tells apart processes that had one pid, and a process before and after exec.
    pub generation: u64,
}

/// A range of client memory that both sides now see.
#[derive(Clone, Debug)]
pub struct SharedPiece {
    /// Bytes, a multiple of 4 KiB.
    pub len: u64,
    /// The file behind it, mapped here.
    pub mapping: Arc<Mapping>,
    /// Where in `mapping` the piece starts, bytes.
    pub offset: u64,
}

/// A piece of guest RAM where mmap of a 2007 VM's file shows it.
#[derive(Clone, Debug)]
pub struct WindowPiece {
    /// Guest-physical address, which is the offset in the file.
    pub gpa: u64,
    /// What is there.
    pub ram: SharedPiece,
}

/// One open file: system, VM, vCPU or device. Every descriptor that dup, fork or `SCM_RIGHTS` make of it is the same file.
pub trait File: Send + Sync {
    /// Answers one ioctl. `input`: the `_IOC_SIZE(request)` bytes at `arg` of an `_IOC_WRITE` request, else empty.
    /// `Reply::output` goes to `arg`, at most `_IOC_SIZE(request)` bytes of an `_IOC_READ` request.
    /// What lies beyond (entries after a count) is fetched and stored through `client`.
    fn ioctl(self: Arc<Self>, client: &dyn Client, request: u32, arg: u64, input: &[u8]) -> Result<Reply, Errno>;

    /// What mmap of the file shows, from file offset 0: the `kvm_run` pages of a vCPU. With neither this nor a
    /// [`ram_window`](File::ram_window), mmap fails with `ENODEV`.
    fn mapping(&self) -> Option<Arc<Mapping>>;

    /// What mmap of a 2007 VM shows at the moment, in ascending order; what no piece covers is a SIGBUS to who touches it.
    /// May become `Some` as ioctls turn a VM legacy, never the other way round. Waits for nobody.
    fn ram_window(&self) -> Option<Vec<WindowPiece>> {
        None
    }

    /// What read(2) gives: up to `len` bytes from `offset` on, none at the end. `None`: the file has no read.
    fn read(&self, offset: u64, len: usize) -> Option<Vec<u8>> {
        let _ = (offset, len);
        None
    }

    /// The client has put other memory at some of its addresses `range`, without telling by an ioctl: what lies there is RAM
    /// of guests. `share` is [`Client::share`], by way of a thread of that address space.
    fn remapped(&self, space: AddressSpace, range: &Range<u64>, share: &mut Share<'_>) {
        let _ = (space, range, share);
    }

    /// For names in `/proc/PID/fd`, status and logs.
    fn kind(&self) -> FileKind;

    /// The last descriptor is closed, or its last holder died. Called once, with no ioctl of this file under way.
    fn released(&self);
}

/// [`Client::share`] where there is no ioctl.
pub type Share<'a> = dyn FnMut(u64, u64) -> Result<Vec<SharedPiece>, Errno> + 'a;

/// Which of the API's file kinds a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// `/dev/kvm` itself.
    System,
    /// What `KVM_CREATE_VM` returns.
    Vm,
    /// What `KVM_CREATE_VCPU` returns, with the id it was given.
    Vcpu(u32),
    /// What `KVM_CREATE_DEVICE` returns.
    Device,
    /// What `KVM_GET_STATS_FD` returns, of a VM.
    VmStats,
    /// The same of a vCPU, with its id.
    VcpuStats(u32),
}

impl fmt::Display for FileKind {
    /// The name in brackets that Linux shows as `anon_inode:[kvm-vm]`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::System => f.write_str("kvm"),
            Self::Vm => f.write_str("kvm-vm"),
            Self::Vcpu(id) => write!(f, "kvm-vcpu:{id}"),
            Self::Device => f.write_str("kvm-device"),
            Self::VmStats => f.write_str("kvm-vm-stats"),
            Self::VcpuStats(id) => write!(f, "kvm-vcpu-stats:{id}"),
        }
    }
}

/// Bytes for the client; up to the size of `kvm_fpu` they need no allocation.
pub type Output = SmallVec<[u8; 512]>;

/// A successful ioctl.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// What ioctl(2) returns: 0, a count, a new descriptor.
    pub ret: i32,
    /// Bytes for `arg`.
    pub output: Output,
}

impl Reply {
    /// No bytes for the client.
    pub fn ret(ret: i32) -> Self {
        Self { ret, output: Output::new() }
    }
}
