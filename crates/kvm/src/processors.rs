//! Processors of the host, and how many vCPUs want one: a vCPU that spins while there are too few gives its own to another.
//!
//! sched_yield(2) would give it to anybody, and charge the vCPU a whole slice of time for each: on a host with other work the guest
//! stands then. So those that spin wait in a queue of our own, and as many vCPUs stay in the guest as there are processors.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use irqchip::Wake;
use parking_lot::Mutex;

use crate::chip::Waker;

/// A vCPU waits so long for its turn. Others may run for long without a PAUSE.
const PATIENCE: Duration = Duration::from_micros(500);

/// Of one daemon.
pub(crate) struct Processors {
    /// Those that the daemon may use, by its affinity and its control group, as it began.
    available: usize,
    in_guest: AtomicUsize,
    /// Who waits for a turn, longest first.
    queue: Mutex<VecDeque<Arc<Waker>>>,
    /// How many these are.
    waiting: AtomicUsize,
}

impl Default for Processors {
    fn default() -> Self {
        let available = thread::available_parallelism().map_or(1, usize::from);
        Self { available, in_guest: AtomicUsize::new(0), queue: Mutex::default(), waiting: AtomicUsize::new(0) }
    }
}

/// A vCPU is in the guest until this is dropped.
pub(crate) struct InGuest<'a>(&'a Processors);

impl Drop for InGuest<'_> {
    fn drop(&mut self) {
        self.0.in_guest.fetch_sub(1, Relaxed);
    }
}

impl Processors {
    /// A vCPU enters the guest.
    pub(crate) fn enter(&self) -> InGuest<'_> {
        self.in_guest.fetch_add(1, Relaxed);
        InGuest(self)
    }

    /// More vCPUs want to be in the guest than there are processors.
    pub(crate) fn are_short(&self) -> bool {
        self.in_guest.load(Relaxed) > self.available || self.waiting.load(Relaxed) > 0
    }

    /// The vCPU that `waker` calls has left the guest, where it only spun: it waits while others run. Returns when it is its turn
    /// again, or somebody called it.
    pub(crate) fn give_way(&self, waker: &Arc<Waker>) {
        let has_room = self.has_room();
        let next = self.change(|queue| {
            let next = if has_room { Some(queue.pop_front()?) } else { None };
            queue.push_back(waker.clone());
            Some(next)
        });
        // There is room, and nobody waits for it.
        let Some(next) = next else { return };
        if let Some(next) = next {
            next.wake();
        }
        waker.sleep(Some(PATIENCE));
        self.change(|queue| queue.retain(|other| !Arc::ptr_eq(other, waker)));
    }

    /// A vCPU is not going to run for a while: whoever waits longest may.
    pub(crate) fn offer(&self) {
        if self.waiting.load(Relaxed) == 0 || !self.has_room() {
            return;
        }
        if let Some(next) = self.change(VecDeque::pop_front) {
            next.wake();
        }
    }

    fn change<R>(&self, change: impl FnOnce(&mut VecDeque<Arc<Waker>>) -> R) -> R {
        let mut queue = self.queue.lock();
        let result = change(&mut queue);
        self.waiting.store(queue.len(), Relaxed);
        result
    }

    fn has_room(&self) -> bool {
        self.in_guest.load(Relaxed) < self.available
    }
}
