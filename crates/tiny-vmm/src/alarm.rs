//! A signal to the thread that runs the guest, the way every VMM gets a vCPU out of `KVM_RUN`.
#![expect(unsafe_code, reason = "sigaction(2) takes a function that must be safe in a signal handler")]

use std::sync::Once;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::pthread::{Pthread, pthread_kill, pthread_self};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Sends the thread that made it the signal that ends its `KVM_RUN`.
#[derive(Debug, Clone, Copy)]
pub struct Kick(Pthread);

impl Kick {
    /// Of the calling thread, which must outlive all that hold it.
    pub fn of_this_thread() -> Self {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(|| {
            // Without SA_RESTART: `KVM_RUN` must come back with EINTR.
            let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
            // SAFETY: the handler does nothing, which is safe at any moment; SIGUSR2 is nobody else's in a test.
            unsafe { sigaction(Signal::SIGUSR2, &action) }.expect("SIGUSR2 can be handled");
        });
        Self(pthread_self())
    }

    /// Now. It is lost if the thread is not in `KVM_RUN`.
    pub fn kick(self) {
        // A thread that is gone needs none.
        let _ = pthread_kill(self.0, Signal::SIGUSR2);
    }
}

/// Interrupts the thread that made it: first after `after`, then every 20 ms until dropped, since a signal that comes
/// just before the system call is lost.
pub struct Alarm {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

const AGAIN: Duration = Duration::from_millis(20);

extern "C" fn nothing(_signal: i32) {}

impl Alarm {
    /// For the calling thread.
    pub fn new(after: Duration) -> Self {
        let kick = Kick::of_this_thread();
        let (stop, stopped) = channel();
        let thread = std::thread::spawn(move || {
            let mut wait = after;
            while stopped.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                // The target outlives us: it joins this thread in drop.
                kick.kick();
                wait = AGAIN;
            }
        });
        Self { stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
