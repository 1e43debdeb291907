//! The VMM's side of an ioctl: its memory, its descriptors, its signals.

pub mod guard;
pub mod inject;
pub mod install;
pub mod maps;
pub mod memory;
pub mod signal;
pub mod space;
pub mod stop;
pub mod view;
pub mod vm;
pub mod watch;
pub mod window;

use std::cell::{Cell, OnceCell, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use cuse_rs::{Answer, Bytes, Call, Ioctl};
use kvm::client::{AddressSpace, Client, File, FileKind, InterruptAction, Reply, SharedPiece, SignalMask};
use nix::errno::Errno;
use nix::unistd::Pid;

use self::inject::{Held, Seized};
use self::signal::Pending;
use self::space::Space;
use self::stop::Stopping;
use crate::file::Open;
use crate::front::Front;
use crate::sys;

const KVM_RUN: u32 = 0xae80;

/// A client's thread inside one ioctl.
///
/// Most ioctls are answered at the end, with a reply. One that needs the thread to run system calls for us is answered
/// at once; the thread then stands (`held`) until the end, and gets its result by way of its registers.
pub struct Caller<'a> {
    front: &'a Arc<Front>,
    call: &'a Call<'a>,
    open: &'a Arc<Open>,
    ioctl: Ioctl<'a>,
    space: OnceCell<Arc<Space>>,
    /// `None` inside: it was answered, but the thread is gone or cannot be held.
    held: OnceCell<Option<Held>>,
    /// While it runs under a mask of its own.
    masked: RefCell<Option<Masked>>,
}

/// A run under `KVM_SET_SIGNAL_MASK`.
struct Masked {
    mask: SignalMask,
    pending: Arc<Pending>,
    /// What was found at entry, until it is asked for: one look serves both.
    at_entry: Cell<Option<bool>>,
}

impl<'a> Caller<'a> {
    /// The caller of `ioctl` on `open`.
    pub fn new(front: &'a Arc<Front>, call: &'a Call<'a>, open: &'a Arc<Open>, ioctl: Ioctl<'a>) -> Self {
        let (space, held) = (OnceCell::new(), OnceCell::new());
        Self { front, call, open, ioctl, space, held, masked: RefCell::new(None) }
    }

    /// Runs the ioctl and answers it.
    pub fn serve(self) -> Answer {
        let call = self.call;
        let answer = self.serve_once();
        if !inject::has_dead() {
            return answer;
        }
        // One that died may still wait for this.
        if answer != Answer::Done
            && let Err(errno) = call.answer_now(&answer)
        {
            tracing::debug!(%errno, "nobody waits for the answer");
        }
        inject::collect_dead();
        Answer::Done
    }

    fn serve_once(self) -> Answer {
        if self.open.may_need_mapping() && self.map_in_place() {
            return self.repeat();
        }
        let file = Arc::clone(&self.open.shared.file);
        let is_run = self.ioctl.request == KVM_RUN && matches!(file.kind(), FileKind::Vcpu(_));
        let run = is_run.then(|| self.open.shared.place.enter(self.call.header.pid));
        let result = file.ioctl(&self, self.ioctl.request, self.ioctl.arg, self.ioctl.input);
        drop(run);
        if result.is_ok() && self.open.lacks_mapping() {
            self.replace_descriptor();
        }
        if self.open.has_window {
            if !self.owner_sees_the_same() {
                self.reshape();
            } else if let Ok(space) = self.space() {
                window::tidy(self.front, self.open, space, self.tid());
            }
        }
        self.finish(result)
    }

    fn tid(&self) -> Pid {
        Pid::from_raw(self.call.header.pid.cast_signed())
    }

    /// The thread, if its id still means it: while it waits for an answer it cannot go, once it has one it can die.
    fn living(&self) -> Result<Pid, Errno> {
        match self.held.get() {
            None => Ok(self.tid()),
            Some(Some(held)) if !held.ended() => Ok(self.tid()),
            Some(_) => Err(Errno::ESRCH),
        }
    }

    fn space(&self) -> Result<&Arc<Space>, Errno> {
        if let Some(space) = self.space.get() {
            return Ok(space);
        }
        let space = self.open.shared.space_of(self.call.header.pid, &self.front.spaces)?;
        Ok(self.space.get_or_init(|| space))
    }

    /// The thread, standing. The caller has exclusive use of its space.
    fn hold(&self) -> Result<&Held, Errno> {
        if self.held.get().is_none() {
            let seized = Seized::new(self.tid()).inspect_err(|errno| self.explain(*errno))?;
            let answered = self.call.answer_now(&Answer::Ioctl(0, Bytes::new()));
            let held = answered.and_then(|()| seized.stopped());
            if let Err(errno) = held {
                self.explain(errno);
            }
            let _ = self.held.set(held.ok());
        }
        self.held.get().and_then(Option::as_ref).ok_or(Errno::ESRCH)
    }

    fn explain(&self, errno: Errno) {
        let (tid, kind) = (self.call.header.pid, self.open.shared.file.kind());
        match errno {
            Errno::EPERM if stop::tracer(self.tid()).is_some() => tracing::error!(
                tid,
                %kind,
                "cannot reach into the VMM: a debugger or strace has it. Run the VMM without, or trace softkvm instead"
            ),
            Errno::EPERM => tracing::error!(
                tid,
                %kind,
                "cannot reach into the VMM: not allowed to trace it. Run softkvm with CAP_SYS_PTRACE (docker: --cap-add SYS_PTRACE)"
            ),
            Errno::EACCES => tracing::error!(
                tid,
                %kind,
                "cannot reach into the VMM: its thread is under a seccomp filter, and we may not suspend it. Run softkvm with \
                 CAP_SYS_ADMIN and under no filter itself (docker: --security-opt seccomp=unconfined), or the VMM without filters"
            ),
            Errno::ENOEXEC => {
                tracing::error!(tid, %kind, "the VMM is no 64-bit program, or enters the kernel in an unusual way")
            }
            errno => tracing::debug!(tid, %kind, %errno, "the VMM's thread is gone"),
        }
    }

    fn finish(self, result: Result<Reply, Errno>) -> Answer {
        let Some(held) = self.held.get() else {
            return match result {
                Ok(reply) => Answer::Ioctl(reply.ret, reply.output),
                Err(errno) => Answer::Ioctl(-(errno as i32), Bytes::new()),
            };
        };
        if held.is_some() {
            let result = result.and_then(|reply| {
                if !reply.output.is_empty() {
                    self.write(self.ioctl.arg, &reply.output)?;
                }
                Ok(reply.ret)
            });
            // No thread may go on while another worker moves its memory.
            let space = self.space.get().cloned();
            let _exclusive = space.as_ref().map(|space| space.exclusive());
            if let Some(held) = self.held.into_inner().flatten() {
                held.finish(result.map_or_else(|errno| -(errno as i64), i64::from));
            }
        }
        Answer::Done
    }

    /// Lets the thread make its ioctl again, from the start.
    fn repeat(self) -> Answer {
        let space = self.space.get().cloned();
        let _exclusive = space.as_ref().map(|space| space.exclusive());
        if let Some(held) = self.held.into_inner().flatten() {
            held.repeat();
        }
        Answer::Done
    }

    /// Without passthrough, mmap of our files shows pages of the kernel's cache. Puts the real memory in their place;
    /// false if there is nothing to replace, or it cannot be.
    fn map_in_place(&self) -> bool {
        if self.open.shared.file.mapping().is_none() && !self.open.has_window {
            return false;
        }
        let Ok(range) = memory::mapped_from(self.tid(), self.front.device_number(), self.open.node) else {
            return false;
        };
        if range.is_empty() {
            return false;
        }
        let replaced = self.space().and_then(|space| {
            let _exclusive = space.exclusive();
            let stopping = self.open.has_window.then(|| self.stop_others(space));
            let held = self.hold()?;
            stopping.iter().for_each(Stopping::wait);
            window::show(self.front, self.open, space, held)
        });
        match replaced {
            Ok(()) => {}
            Err(errno) => tracing::error!(tid = self.call.header.pid, %errno, "the VMM cannot see its vCPU's pages"),
        }
        self.held.get().is_some_and(Option::is_some)
    }

    fn stop_others(&self, space: &Space) -> Stopping {
        let front = Arc::clone(self.front);
        stop::others(space.tgid, self.tid(), move |tid| front.is_waiting(tid))
    }

    /// Is what the client has in view of a 2007 VM's RAM still so, after this ioctl?
    fn owner_sees_the_same(&self) -> bool {
        self.space().map_or(true, |space| !window::is_stale(&self.open.shared, space.id))
    }

    fn reshape(&self) {
        let reshaped = self.space().and_then(|space| {
            let _exclusive = space.exclusive();
            let stopping = self.stop_others(space);
            let held = self.hold()?;
            stopping.wait();
            window::reshape(self.front, self.open, space, held)
        });
        if let Err(errno) = reshaped {
            tracing::warn!(tid = self.call.header.pid, %errno, "the VMM goes on to see RAM that it deleted");
        }
    }

    /// A VM of 2007 shows itself after its file was opened: only now mmap of it has something to show. Puts a new
    /// descriptor of the same VM in the place of the one that was used, and leaves it open over exec, as 2007's were. A client
    /// that had asked for close-on-exec in between, if there ever was one, has to ask again.
    fn replace_descriptor(&self) {
        let replaced = self.front.expose(&self.open.shared).and_then(|file| {
            let space = self.space()?;
            let _exclusive = space.exclusive();
            let held = self.hold()?;
            install::replace(held, space.tgid, file.as_fd(), held.ioctl_fd())
        });
        match replaced {
            Ok(()) => self.open.mapping_elsewhere(),
            Err(errno) => tracing::error!(tid = self.call.header.pid, %errno, "the VMM cannot map its VM's memory"),
        }
    }
}

impl Client for Caller<'_> {
    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), Errno> {
        vm::read(self.living()?, addr, buf)
    }

    fn write(&self, addr: u64, buf: &[u8]) -> Result<(), Errno> {
        vm::write(self.living()?, addr, buf)
    }

    fn install(&self, file: Arc<dyn File>, cloexec: bool) -> Result<i32, Errno> {
        let space = self.space()?;
        let shared = self.front.adopt(file, Some(space));
        let file = self.front.expose(&shared)?;
        // What is left of it is what the client and the kernel hold.
        drop(shared);
        let _exclusive = space.exclusive();
        install::give(self.hold()?, space.tgid, file.as_fd(), cloexec)
    }

    fn descriptor(&self, fd: i32) -> Result<OwnedFd, Errno> {
        let pidfd = sys::pidfd_of_thread(self.living()?, self.space()?.tgid)?;
        sys::pidfd_getfd(pidfd.as_fd(), fd)
    }

    fn share(&self, addr: u64, len: u64) -> Result<Vec<SharedPiece>, Errno> {
        let end = addr.checked_add(len).ok_or(Errno::EINVAL)?;
        let space = self.space()?;
        let _exclusive = space.exclusive();
        let shared = memory::share(self.tid(), space, &(addr..end), || self.hold(), || self.stop_others(space))?;
        watch::over(self.front, space, &(addr..end), || self.hold());
        Ok(shared)
    }

    fn address_space(&self) -> AddressSpace {
        // A thread that is gone is in no space of anybody's.
        self.space().map_or(AddressSpace { pid: 0, generation: u64::MAX }, |space| space.id)
    }

    fn thread(&self) -> u32 {
        self.call.header.pid
    }

    fn schedstat(&self) -> Option<std::fs::File> {
        std::fs::File::open(format!("/proc/{}/schedstat", self.call.header.pid)).ok()
    }

    fn set_interrupt_action(&self, action: Option<InterruptAction>) {
        self.masked.replace(None);
        let Some(InterruptAction { run, mask }) = action else { return self.call.on_interrupt(None) };
        let Some(mask) = mask else { return self.call.on_interrupt(Some(run)) };
        // A thread that is gone has been killed, and waits for nothing.
        let Some((pending, ends)) = self.open.shared.pending.enter(self.call.header.pid, mask) else {
            return self.call.on_interrupt(Some(run));
        };
        if ends {
            run();
        }
        // The kernel tells of signals that the thread does not block, also of those that the mask does block, and of the
        // first only.
        let of_interrupt = Arc::clone(&pending);
        self.call.on_interrupt(Some(Arc::new(move || {
            if of_interrupt.ends_run(mask) {
                run();
            }
        })));
        self.masked.replace(Some(Masked { mask, pending, at_entry: Cell::new(Some(ends)) }));
    }

    fn interrupted(&self) -> bool {
        match &*self.masked.borrow() {
            None => self.call.interrupted(),
            Some(masked) => masked.at_entry.take().unwrap_or_else(|| masked.pending.ends_run(masked.mask)),
        }
    }

    fn poll_interval(&self) -> Option<Duration> {
        self.masked.borrow().is_some().then_some(signal::PERIOD)
    }
}
