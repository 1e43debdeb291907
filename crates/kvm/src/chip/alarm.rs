//! The thread of a VM with interrupt controllers: it wakes for the next timer that is due, and for eventfds that interrupt.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Weak};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use parking_lot::Mutex;

use super::Chip;

const NS_PER_S: u64 = 1_000_000_000;
/// What epoll tells of the timer, and of the end; above, eventfds by their keys.
const TIMER: u64 = 0;
const STOP: u64 = 1;
/// First key of an eventfd.
pub(super) const FIRST_KEY: u64 = 2;

/// CLOCK_MONOTONIC, ns.
pub(crate) fn monotonic_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).expect("every Linux has this clock");
    now.tv_sec() as u64 * NS_PER_S + now.tv_nsec() as u64
}

/// Whose timer it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Who {
    /// A local APIC's, by vCPU id.
    Vcpu(u32),
    /// That of a guest of Xen's, by vCPU id.
    Xen(u32),
    /// Counter 0's.
    Pit,
}

#[derive(Default)]
struct Due {
    at: BTreeMap<Who, u64>,
    /// What the timer is set to, ns; 0: off.
    set: u64,
}

/// Timers of a VM by one timerfd.
pub(crate) struct Alarm {
    epoll: Epoll,
    timer: TimerFd,
    stop: EventFd,
    due: Mutex<Due>,
}

impl Alarm {
    pub(super) fn new() -> Result<Self, Errno> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
        epoll.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, TIMER))?;
        epoll.add(&stop, EpollEvent::new(EpollFlags::EPOLLIN, STOP))?;
        Ok(Self { epoll, timer, stop, due: Mutex::default() })
    }

    /// Starts the thread. It ends after [`Alarm::stop`].
    pub(super) fn start(self: &Arc<Self>, chip: Weak<Chip>) -> Result<(), Errno> {
        let alarm = self.clone();
        let run = move || alarm.run(&chip);
        std::thread::Builder::new().name("kvm-irq".into()).spawn(run).map(drop).map_err(|_| Errno::EAGAIN)
    }

    pub(super) fn stop(&self) {
        if let Err(errno) = self.stop.write(1) {
            tracing::error!(%errno, "the thread of an ended VM goes on");
        }
    }

    pub(super) fn watch(&self, event: BorrowedFd<'_>, key: u64) -> Result<(), Errno> {
        self.epoll.add(event, EpollEvent::new(EpollFlags::EPOLLIN, key))
    }

    pub(super) fn forget(&self, event: BorrowedFd<'_>) {
        if let Err(errno) = self.epoll.delete(event) {
            tracing::debug!(%errno, "an eventfd was not watched");
        }
    }

    /// Rings for `who` at `at` ns, or not any more.
    pub(crate) fn set(&self, who: Who, at: Option<u64>) {
        let mut due = self.due.lock();
        match at {
            Some(at) => due.at.insert(who, at),
            None => due.at.remove(&who),
        };
        self.set_timer(&mut due);
    }

    fn set_timer(&self, due: &mut Due) {
        let first = due.at.values().copied().min().unwrap_or(0);
        if first == due.set {
            return;
        }
        due.set = first;
        let result = match first {
            0 => self.timer.unset(),
            ns => {
                let at = TimeSpec::new((ns / NS_PER_S) as i64, (ns % NS_PER_S) as i64);
                self.timer.set(Expiration::OneShot(at), TimerSetTimeFlags::TFD_TIMER_ABSTIME)
            }
        };
        if let Err(errno) = result {
            tracing::error!(%errno, "a guest's timer cannot be set");
        }
    }

    /// Takes out whose time has come.
    fn take_due(&self) -> Vec<Who> {
        let now = monotonic_ns();
        let mut due = self.due.lock();
        due.set = 0;
        let ready: Vec<Who> = due.at.iter().filter(|(_, at)| **at <= now).map(|(who, _)| *who).collect();
        for who in &ready {
            due.at.remove(who);
        }
        self.set_timer(&mut due);
        ready
    }

    fn run(&self, chip: &Weak<Chip>) {
        let mut events = [EpollEvent::empty(); 16];
        loop {
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(errno) => return tracing::error!(%errno, "a VM's timers and eventfds are dead"),
            };
            let Some(chip) = chip.upgrade() else { return };
            for event in &events[..count] {
                match event.data() {
                    STOP => return,
                    TIMER => {
                        // The next setting makes it unreadable too; a read that finds nothing is no error.
                        let _ = self.timer.wait();
                        for who in self.take_due() {
                            chip.ring(who);
                        }
                    }
                    key => chip.eventfd_signalled(key),
                }
            }
        }
    }
}
