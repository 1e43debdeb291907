//! How a vCPU is called: out of the guest, or out of its sleep in HLT.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::time::Duration;

use cpu_core::Kick;
use irqchip::Wake;
use parking_lot::{Condvar, Mutex};

/// One per vCPU. Any thread may [`Wake::wake`]; the thread in `KVM_RUN` clears, looks at everything, then runs or sleeps:
/// what comes after the clearing is seen by one of the two.
pub(crate) struct Waker {
    kick: Arc<Kick>,
    called: AtomicBool,
    sleeping: AtomicBool,
    /// Held for a moment around going to sleep, and by who wakes a sleeper.
    bed: Mutex<()>,
    wakes: Condvar,
    /// The alarm has rung: it is not set any more.
    pub(crate) rung: AtomicBool,
    /// A vector whose EOI user space is to hear of, plus [`EOI_WAITS`].
    eoi: AtomicU32,
}

const EOI_WAITS: u32 = 0x100;

impl Waker {
    pub(crate) fn new(kick: Arc<Kick>) -> Arc<Self> {
        Arc::new(Self {
            kick,
            called: AtomicBool::new(false),
            sleeping: AtomicBool::new(false),
            bed: Mutex::new(()),
            wakes: Condvar::new(),
            rung: AtomicBool::new(false),
            eoi: AtomicU32::new(0),
        })
    }

    /// Whoever called before this needs not call again: everything is looked at now.
    pub(crate) fn clear(&self) {
        self.called.store(false, SeqCst);
        self.kick.clear();
    }

    /// Sleeps until somebody calls, at most `timeout`. Returns at once if somebody did since [`Self::clear`].
    pub(crate) fn sleep(&self, timeout: Option<Duration>) {
        let mut bed = self.bed.lock();
        self.sleeping.store(true, SeqCst);
        if !self.called.load(SeqCst) {
            match timeout {
                Some(timeout) => _ = self.wakes.wait_for(&mut bed, timeout),
                None => self.wakes.wait(&mut bed),
            }
        }
        self.sleeping.store(false, SeqCst);
    }

    /// User space is to hear of this vector's EOI.
    pub(crate) fn put_eoi(&self, vector: u8) {
        self.eoi.store(EOI_WAITS | u32::from(vector), SeqCst);
        self.wake();
    }

    pub(crate) fn take_eoi(&self) -> Option<u8> {
        let eoi = self.eoi.swap(0, SeqCst);
        (eoi & EOI_WAITS != 0).then_some(eoi as u8)
    }
}

impl Wake for Waker {
    fn wake(&self) {
        self.kick.kick();
        self.called.store(true, SeqCst);
        if self.sleeping.load(SeqCst) {
            // The sleeper holds this until it waits.
            let _bed = self.bed.lock();
            self.wakes.notify_one();
        }
    }
}
