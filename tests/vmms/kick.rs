//! How VMMs get a vCPU's thread out of `KVM_RUN`.
#![expect(unsafe_code, reason = "signal handlers, and kvm_run through a mapping of our own")]

use std::cell::Cell;
use std::os::fd::AsRawFd;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;

/// What the sender and the handler do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kick {
    /// The sender sets `immediate_exit`, through a second mapping of a duplicate descriptor; the handler does nothing.
    SecondMapping,
    /// The handler does nothing. A signal that comes before `KVM_RUN` is lost, so it is sent again every 10 ms.
    Resend,
    /// The handler sets `immediate_exit` of its own thread's vCPU.
    InHandler,
    /// As by signal(2) of old: restarts system calls, which `KVM_RUN` must not be. The exit reason tells.
    Restarting,
}

/// Who answers slower than this has not been kicked. Cloud Hypervisor's own limit is a second.
const PATIENCE: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_millis(10);

thread_local! {
    /// `kvm_run` of this thread's vCPU, for the handler.
    static OWN: Cell<*mut kvm_run> = const { Cell::new(null_mut()) };
}

/// Sets `immediate_exit`.
///
/// # Safety
///
/// `run` is mapped and writable.
unsafe fn ask_for_exit(run: *mut kvm_run) {
    let field = run.wrapping_byte_add(std::mem::offset_of!(kvm_run, immediate_exit)).cast::<u8>();
    // SAFETY: the caller's word; the field is inside. The vCPU's thread and the daemon read it at any time: it is one byte.
    unsafe { field.write_volatile(1) };
}

extern "C" fn nothing(_: libc::c_int) {}

extern "C" fn set_immediate_exit(_: libc::c_int) {
    let run = OWN.get();
    if !run.is_null() {
        // SAFETY: `enter` put it there, and `leave` takes it away before the vCPU goes.
        unsafe { ask_for_exit(run) };
    }
}

impl Kick {
    /// The first real-time signal, as all of them have it.
    fn signal() -> i32 {
        libc::SIGRTMIN()
    }

    /// Installs the handler.
    pub fn install(self) -> Result<()> {
        let handler = if self == Kick::InHandler { set_immediate_exit } else { nothing };
        // SAFETY: all bytes zero are a valid `sigaction`.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as extern "C" fn(libc::c_int) as usize;
        action.sa_flags = if self == Kick::Restarting { libc::SA_RESTART } else { 0 };
        // SAFETY: the handlers touch atomics and a thread-local alone.
        match unsafe { libc::sigaction(Self::signal(), &action, null_mut()) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()).context("sigaction"),
        }
    }
}

/// The thread of one vCPU, for whoever kicks it.
#[derive(Debug, Default)]
pub struct Target {
    thread: AtomicU64,
    /// `kvm_run`, mapped a second time.
    second: AtomicPtr<kvm_run>,
    asked: AtomicU32,
    answered: AtomicU32,
}

impl Target {
    /// Maps `kvm_run` a second time, by a duplicate of the descriptor.
    pub fn map_second(&self, vcpu: &VcpuFd, size: usize) -> Result<()> {
        const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: takes an integer only. The duplicate stays until the process ends.
        let again = unsafe { libc::dup(vcpu.as_raw_fd()) };
        // SAFETY: a new mapping, which stays as long.
        let page = unsafe { libc::mmap(null_mut(), size, RW, libc::MAP_SHARED, again, 0) };
        if page == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error()).context("the second mapping of kvm_run");
        }
        self.second.store(page.cast(), Ordering::Release);
        Ok(())
    }

    /// This thread runs the vCPU from here on.
    pub fn enter(&self, vcpu: &mut VcpuFd) {
        OWN.set(vcpu.get_kvm_run());
        // SAFETY: no argument can be wrong.
        self.thread.store(unsafe { libc::pthread_self() }, Ordering::Release);
    }

    /// It does so no more.
    pub fn leave(&self) {
        self.thread.store(0, Ordering::Release);
        OWN.set(null_mut());
    }

    /// `KVM_RUN` was interrupted.
    pub fn interrupted(&self, kick: Kick, vcpu: &mut VcpuFd) -> Result<()> {
        // kvmtool looks at the exit reason and not at the result.
        let reason = vcpu.get_kvm_run().exit_reason;
        if kick == Kick::Restarting && reason != kvm_bindings::KVM_EXIT_INTR {
            bail!("KVM_RUN was interrupted, and the exit reason is {reason}");
        }
        vcpu.set_kvm_immediate_exit(0);
        self.answered.store(self.asked.load(Ordering::Acquire), Ordering::Release);
        Ok(())
    }

    fn send(&self, kick: Kick) {
        if kick == Kick::SecondMapping {
            let run = self.second.load(Ordering::Acquire);
            // SAFETY: `map_second` mapped it for good.
            unsafe { ask_for_exit(run) };
            fence(Ordering::SeqCst);
        }
        let thread = self.thread.load(Ordering::Acquire);
        if thread != 0 {
            // SAFETY: the thread is joined only after the last kick.
            unsafe { libc::pthread_kill(thread, Kick::signal()) };
        }
    }

    /// Gets the thread out of the guest and waits until it says so.
    pub fn kick(&self, kick: Kick) -> Result<()> {
        let wanted = self.asked.fetch_add(1, Ordering::AcqRel) + 1;
        let begin = Instant::now();
        self.send(kick);
        let mut sent = Instant::now();
        while self.answered.load(Ordering::Acquire) != wanted && self.thread.load(Ordering::Acquire) != 0 {
            if begin.elapsed() > PATIENCE {
                bail!("a vCPU does not answer its signal");
            }
            // The second mapping and the handler's cannot be lost: nobody sends those again.
            if kick != Kick::SecondMapping && kick != Kick::InHandler && sent.elapsed() > AGAIN {
                self.send(kick);
                sent = Instant::now();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}
