//! What a client does to its guest RAM without telling anybody: it maps something else there, or discards pages.
//!
//! The kernel's KVM looks memory up in the client's own page tables, so it sees both at once. We have the files behind, so
//! a userfaultfd of the client tells us. It is the client's because a thread of it made it, on its way out of an ioctl; the
//! descriptor is ours alone. The thread that changed something waits until we have read of it:
//!
//! - `MADV_DONTNEED`: memory that was private before we shared it must be what it was before the first write, zeros or the
//!   file behind. The kernel tells before it does anything, and the thread's arguments say which pages: they are made so
//!   before it goes on.
//! - mmap over RAM, mremap: the kernel tells when it is done. The thread is made to stop on its way out, and slots get what is
//!   there now, which for private memory means to share it first.
//!
//! Memory is registered for write protection, and none of it is ever protected: nothing faults, nothing gets slower. What
//! cannot be watched (a kernel before 5.19, a file before 6.7, memory for which the client has a userfaultfd of its own) is as it
//! was when its slot was made. So is what is unmapped by one call and mapped anew by another: of the latter nobody tells.

use std::cell::OnceCell;
use std::fs;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::Pid;
use parking_lot::Mutex;

use super::inject::{self, Held, Seized};
use super::maps::{self, Area, PAGE};
use super::space::{Origin, Space};
use super::{install, memory, stop};
use crate::front::Front;
use crate::sys::{self, UserfaultNews};

/// The watch over one address space; ends when dropped.
#[derive(Debug)]
pub struct Watch {
    news: Arc<News>,
    end: Arc<EventFd>,
}

#[derive(Debug)]
struct News {
    fd: OwnedFd,
    /// What is registered, or was.
    ranges: Mutex<Vec<Range<u64>>>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        // The thread waits for this as well.
        let _ = self.end.write(1);
    }
}

/// Watches over `range` of the client from here on. `hold` stops the thread that asks. The caller has exclusive use of
/// `space`.
pub fn over<'h>(
    front: &Arc<Front>,
    space: &Arc<Space>,
    range: &Range<u64>,
    hold: impl FnOnce() -> Result<&'h Held, Errno>,
) {
    let begin = || hold().and_then(|held| Watch::begin(front, space, held));
    let watch = space.watch.get_or_init(|| match begin() {
        Ok(watch) => Some(watch),
        Err(errno) => {
            tracing::debug!(pid = space.id.pid, %errno, "nobody tells what the VMM does to its RAM by itself");
            None
        }
    });
    if let Some(watch) = watch {
        watch.news.add(range);
    }
}

impl Watch {
    fn begin(front: &Arc<Front>, space: &Arc<Space>, held: &Held) -> Result<Self, Errno> {
        let number = held.syscall(libc::SYS_userfaultfd, [sys::USERFAULTFD_FLAGS, 0, 0, 0, 0, 0])? as i32;
        let taken =
            sys::pidfd_of_thread(held.tid(), space.tgid).and_then(|pidfd| sys::pidfd_getfd(pidfd.as_fd(), number));
        install::close(held, number)?;
        let fd = taken?;
        sys::userfault_begin(fd.as_fd())?;
        let news = Arc::new(News { fd, ranges: Mutex::default() });
        let end = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        let watch = Self { news, end };
        let (front, space) = (Arc::downgrade(front), Arc::downgrade(space));
        let (news, end) = (Arc::clone(&watch.news), Arc::clone(&watch.end));
        let body = move || listen(&front, &space, &news, &end);
        thread::Builder::new().name("watcher".into()).spawn(body).map_err(|_| Errno::EAGAIN)?;
        Ok(watch)
    }
}

/// The thread that reads the news.
fn listen(front: &Weak<Front>, space: &Weak<Space>, news: &News, end: &EventFd) {
    loop {
        let mut fds = [PollFd::new(news.fd.as_fd(), PollFlags::POLLIN), PollFd::new(end.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return,
        }
        if fds[1].revents().is_some_and(|what| !what.is_empty()) {
            return;
        }
        let (Some(front), Some(space)) = (front.upgrade(), space.upgrade()) else { return };
        news.attend(&front, &space);
        if inject::has_dead() {
            inject::collect_dead();
        }
    }
}

/// A system call that a thread is in.
struct Call {
    number: libc::c_long,
    arguments: [u64; 6],
}

impl Call {
    /// Of a thread that waits for news of it to be read.
    fn of_waiting(tgid: Pid, tid: Pid) -> Option<Self> {
        if !stop::waits_for_watcher(tgid, tid).unwrap_or(true) {
            return None;
        }
        Self::parse(&fs::read_to_string(format!("/proc/{tgid}/task/{tid}/syscall")).ok()?)
    }

    /// proc_pid_syscall(5): number, six arguments, stack pointer, program counter.
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace();
        let number = words.next()?.parse().ok()?;
        let mut arguments = [0; 6];
        for argument in &mut arguments {
            *argument = u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()?;
        }
        Some(Self { number, arguments })
    }

    /// Pages that it discards.
    fn discards(&self) -> Option<Range<u64>> {
        let [start, len, advice, ..] = self.arguments;
        let discards = matches!(advice as i32, libc::MADV_DONTNEED | libc::MADV_DONTNEED_LOCKED);
        (self.number == libc::SYS_madvise && discards).then(|| pages(start, len))
    }

    /// Pages where there is nothing after it.
    fn unmaps(&self) -> Option<Range<u64>> {
        let [start, len, ..] = self.arguments;
        (self.number == libc::SYS_munmap).then(|| pages(start, len))
    }

    /// Addresses where there may be something else after it.
    fn replaces(&self) -> Option<[Range<u64>; 2]> {
        let [first, second, third, _, fifth, _] = self.arguments;
        match self.number {
            libc::SYS_mmap => Some([pages(first, second), 0..0]),
            libc::SYS_mremap => Some([pages(first, second), pages(fifth, third)]),
            _ => None,
        }
    }
}

/// Threads that wait for news of them to be read. One that has told may be about to sleep still.
fn waiting(tgid: Pid) -> Vec<(Pid, Call)> {
    const LOOKS: u32 = 20;
    for _ in 0..LOOKS {
        let waits = |tid: Pid| Some((tid, Call::of_waiting(tgid, tid)?));
        let found: Vec<_> = stop::tasks(tgid).into_iter().filter_map(waits).collect();
        if !found.is_empty() {
            return found;
        }
        thread::sleep(Duration::from_micros(50));
    }
    Vec::new()
}

fn pages(start: u64, len: u64) -> Range<u64> {
    start..start.saturating_add(len).checked_next_multiple_of(PAGE).unwrap_or(start)
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl News {
    fn add(&self, range: &Range<u64>) {
        match sys::userfault_register(self.fd.as_fd(), range) {
            Ok(()) => {}
            Err(errno) => tracing::debug!(?range, %errno, "nobody tells what the VMM does here by itself"),
        }
        let mut ranges = self.ranges.lock();
        if !ranges.contains(range) {
            ranges.push(range.clone());
        }
    }

    fn is_watched(&self, range: &Range<u64>) -> bool {
        self.ranges.lock().iter().any(|watched| overlap(watched, range))
    }

    /// There are news.
    fn attend(&self, front: &Arc<Front>, space: &Arc<Space>) {
        let (held, unmapped) = self.hold_who_waits(space);
        let anyone = OnceCell::new();
        let hold = || match held.first() {
            Some(held) => Ok(held),
            None => anyone.get_or_init(|| hold_anyone(front, space)).as_ref().ok_or(Errno::ESRCH),
        };
        unmapped.iter().for_each(|range| self.follow(front, space, &hold, range));
        // No thread may go on while another worker moves its memory.
        let _exclusive = space.exclusive();
        drop((held, anyone));
    }

    /// Reads the news, and stops threads that have mapped something on their way out. What they unmapped.
    ///
    /// All under exclusive use, so that nobody else stops threads or copies memory at the same time: what a thread discards is
    /// gone before that or after it, and who maps is stopped by us, and goes on when slots have followed.
    fn hold_who_waits(&self, space: &Space) -> (Vec<Held>, Vec<Range<u64>>) {
        let _exclusive = space.exclusive();
        let waiting = waiting(space.tgid);
        let (mut stopping, mut discarded) = (Vec::new(), Vec::new());
        for (tid, call) in &waiting {
            if let Some(range) = call.discards() {
                discard(space, *tid, &range);
                discarded.push(range);
            }
            if call.replaces().is_some_and(|ranges| ranges.iter().any(|range| self.is_watched(range))) {
                match Seized::new(*tid) {
                    Ok(seized) => stopping.push(seized),
                    Err(errno) => tracing::warn!(%tid, %errno, "RAM that the VMM maps anew is not seen"),
                }
            }
        }
        let (mut removed, mut unmapped) = (Vec::new(), Vec::new());
        let mut read_one = || match sys::userfault_read(self.fd.as_fd()) {
            Some(UserfaultNews::Removed(range)) => removed.push(range),
            Some(UserfaultNews::Unmapped(range)) => unmapped.push(range),
            None => {}
        };
        // The oldest are read first. Who begins to wait meanwhile is seen next time.
        (0..waiting.len().max(1)).for_each(|_| read_one());
        let stand = |seized: Seized| {
            let tid = seized.tid();
            // mremap tells of two ranges one after the other; and of those that were read one may not have been seen to wait.
            seized.stopped_while(&mut || {
                if stop::waits_for_watcher(space.tgid, tid) == Some(true) {
                    read_one();
                }
            })
        };
        let held = stopping.into_iter().map(stand).filter_map(Result::ok).collect();
        // Of somebody who was not seen to wait. It may have written to these pages since, but that is unlikely.
        let is_done =
            |range: &Range<u64>| discarded.iter().any(|done| done.start <= range.start && range.end <= done.end);
        removed.iter().filter(|range| !is_done(range)).for_each(|range| discard(space, space.tgid, range));
        // Plain munmap leaves nothing that could be followed.
        let leaves_nothing = |range: &Range<u64>| waiting.iter().any(|(_, call)| call.unmaps().as_ref() == Some(range));
        unmapped.retain(|range| self.is_watched(range) && !leaves_nothing(range));
        (held, unmapped)
    }

    /// Guests see what the client has at `range` now.
    fn follow<'h>(
        &self,
        front: &Arc<Front>,
        space: &Arc<Space>,
        hold: &dyn Fn() -> Result<&'h Held, Errno>,
        range: &Range<u64>,
    ) {
        front.remapped(space, range, &mut |addr, len| {
            let wanted = addr..addr.checked_add(len).ok_or(Errno::EINVAL)?;
            let _exclusive = space.exclusive();
            let waiting = Arc::clone(front);
            let held = hold()?;
            let stop_others = || stop::others(space.tgid, held.tid(), move |tid| waiting.is_waiting(tid));
            let shared = memory::share(held.tid(), space, &wanted, || Ok(held), stop_others)?;
            self.add(&wanted);
            Ok(shared)
        });
    }
}

/// A thread of the process, standing, where the one that mapped was not seen to wait. The caller has exclusive use of `space`.
fn hold_anyone(front: &Front, space: &Space) -> Option<Held> {
    tracing::debug!(pid = space.id.pid, "the thread that mapped over RAM was not seen to wait");
    let idle = |tid: &Pid| {
        !front.is_waiting(tid.as_raw().cast_unsigned()) && stop::waits_for_watcher(space.tgid, *tid) != Some(true)
    };
    let threads = stop::tasks(space.tgid).into_iter().filter(idle);
    threads.filter_map(|tid| Seized::new(tid).ok()?.stopped_in_fault().ok()).next()
}

/// Pages `range`, as far as they are files of ours, become what they were before anybody wrote to them.
fn discard(space: &Space, tid: Pid, range: &Range<u64>) {
    let areas = maps::areas(tid, range).unwrap_or_default();
    for area in areas.iter().filter(|area| area.shared) {
        let Some(origins) = space.own.origins((area.device, area.inode)) else { continue };
        let (start, end) = (range.start.max(area.range.start), range.end.min(area.range.end));
        let offset = |address: u64| area.offset + (address - area.range.start);
        if let Err(err) = discard_in_file(tid, area, &(offset(start)..offset(end)), &origins) {
            tracing::warn!(%tid, %err, "pages that the VMM discards keep what they hold");
        }
    }
}

fn discard_in_file(tid: Pid, area: &Area, range: &Range<u64>, origins: &[Origin]) -> std::io::Result<()> {
    let path = format!("/proc/{tid}/map_files/{:x}-{:x}", area.range.start, area.range.end);
    let ours = fs::OpenOptions::new().read(true).write(true).open(path)?;
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&ours, mode, range.start as libc::off_t, (range.end - range.start) as libc::off_t)?;
    for origin in origins.iter().filter(|origin| overlap(&origin.range, range)) {
        let (start, end) = (range.start.max(origin.range.start), range.end.min(origin.range.end));
        let mut page = [0; PAGE as usize];
        for at in (start..end).step_by(PAGE as usize) {
            // Beyond the end of the file there was nothing to read.
            let got = origin.file.read_at(&mut page, origin.offset + (at - origin.range.start))?;
            if page[..got].iter().any(|&byte| byte != 0) {
                ours.write_all_at(&page[..got], at)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threads_system_call_tells_what_it_does() {
        let call = |text: &str| Call::parse(text);
        let discards = call("28 0x7f0000001000 0x1800 0x4 0x0 0x0 0x0 0x7ffc00000000 0x7f0000000002").unwrap();
        assert_eq!(discards.discards(), Some(0x7f00_0000_1000..0x7f00_0000_3000));
        assert!(discards.replaces().is_none());
        let other = call("28 0x7f0000001000 0x1000 0xe 0x0 0x0 0x0 0x7ffc00000000 0x7f0000000002").unwrap();
        assert_eq!(other.discards(), None);
        let maps = call("9 0x7f0000001000 0x1000 0x3 0x32 0xffffffffffffffff 0x0 0x7ffc00000000 0x1").unwrap();
        assert_eq!(maps.replaces(), Some([0x7f00_0000_1000..0x7f00_0000_2000, 0..0]));
        assert!(call("running").is_none());
    }
}
