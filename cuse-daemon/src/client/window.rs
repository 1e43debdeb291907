//! mmap of a 2007 VM's file: RAM at its guest-physical address, and SIGBUS where there is none.
//!
//! Linux 2.6.22 looked a page up when it was touched (`kvm_main.c`, `kvm_vm_nopage`). So do we: the file has no backing
//! file, a first touch anywhere in the mapping becomes a `FUSE_READ` of that page, and what cannot be read is a SIGBUS. A
//! page of RAM is answered with a copy, which only serves to let the thread out of the fault: it is stopped before it
//! runs on, and puts RAM itself in the place of the slot or alias around the page, the first time of all. Holes stay as they are, and are asked for
//! again at the next touch. From then on a touch of that RAM costs nothing, and both sides see the same pages.
//!
//! A system call that runs into the fault (read(2) into the mapping) writes to copies before its thread can be stopped.
//! So each copy is remembered, and what the kernel writes back when the copies are dropped is compared with it: bytes
//! that differ go to RAM. The same serves clients that cannot be stopped (strace has them).
//!
//! When a slot goes, the pages of it that were touched stay what they are, and no others. The whole part that showed it
//! becomes one mapping again, of a lot (`view.rs`): a range of the file beyond all guest-physical addresses, which stands for
//! this part alone and knows what had been touched. That costs the same however the pages lie, and is all for a client that
//! unmaps the part next.

use std::ops::Range;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cuse_rs::{Answer, Call};
use kvm::client::AddressSpace;
use mmu::Mapping;
use nix::errno::Errno;
use nix::unistd::Pid;

use super::inject::{self, Held, Seized};
use super::maps::{self, Area, Pagemap};
use super::memory::{Part, file_id, map_in_place, map_over};
use super::space::{Space, errno_of};
use super::view::{self, Seen, Shown};
use super::{install, stop};
use crate::file::{Open, Shared};
use crate::front::Front;

/// A fault waits so long for others in its process. Not for ever: a thread may hold the lock of its address space while it waits
/// for the answer, and who has exclusive use of the space may want that lock.
const PATIENCE: Duration = Duration::from_millis(100);

/// A page fault: answers the read of `len` bytes at `offset`.
pub fn fault(front: &Arc<Front>, call: &Call<'_>, open: &Arc<Open>, offset: u64, len: u64) -> Answer {
    let shared = &open.shared;
    let bytes = shared.file.ram_window().and_then(|window| shared.views.copy(&window, offset, len));
    let Some(bytes) = bytes else { return Answer::Error(Errno::EIO) };
    shared.views.lend(offset, &bytes);
    in_place(front, call, open, bytes)
}

/// A page fault that is answered with a copy: if possible the memory itself is there before the thread runs on.
pub fn in_place(front: &Arc<Front>, call: &Call<'_>, open: &Arc<Open>, bytes: Vec<u8>) -> Answer {
    // If nothing better comes of it, the next ioctl tries again.
    open.page_fault();
    let answer = place(front, call, open, bytes);
    if inject::has_dead() {
        inject::collect_dead();
    }
    answer
}

/// Puts memory in the place of the mapping, once the thread has its answer.
fn place(front: &Arc<Front>, call: &Call<'_>, open: &Arc<Open>, bytes: Vec<u8>) -> Answer {
    let tid = Pid::from_raw(call.header.pid.cast_signed());
    let plain = Answer::Data(bytes);
    // 0: of a pid namespace that is not ours. One of our own: it reads client memory for an ioctl.
    if tid.as_raw() == 0 || Path::new(&format!("/proc/self/task/{tid}")).exists() {
        return plain;
    }
    let Ok(space) = open.shared.space_of(call.header.pid, &front.spaces) else { return plain };
    // Somebody is at it: the thread will stand before it runs on, or finds the new mapping when it tries again. It may also be
    // the thread itself, whose system call goes on through further pages.
    if space.placing.load(Ordering::SeqCst) {
        return plain;
    }
    let Some(_exclusive) = space.exclusive_within(PATIENCE) else { return plain };
    space.placing.store(true, Ordering::SeqCst);
    let answer = place_exclusively(front, call, open, &space, plain);
    space.placing.store(false, Ordering::SeqCst);
    answer
}

fn place_exclusively(front: &Arc<Front>, call: &Call<'_>, open: &Open, space: &Arc<Space>, plain: Answer) -> Answer {
    let tid = Pid::from_raw(call.header.pid.cast_signed());
    let waiting = Arc::clone(front);
    let stopping = stop::others(space.tgid, tid, move |tid| waiting.is_waiting(tid));
    let seized = match Seized::new(tid) {
        Ok(seized) => seized,
        Err(errno) => {
            tracing::warn!(%tid, %errno, "a page is copied, not shared, until the VMM's next ioctl");
            return plain;
        }
    };
    // Others may wait for this very page, so they stand only after the answer.
    let held = call.answer_now(&plain).and_then(|()| seized.stopped_in_fault());
    let shown = held.as_ref().map_err(|errno| *errno).and_then(|held| {
        stopping.wait();
        show(front, open, space, held)
    });
    if let Err(errno) = shown {
        tracing::debug!(%tid, %errno, "memory is not shown");
    }
    // Before anybody goes on: the next fault is to be answered in full again.
    space.placing.store(false, Ordering::SeqCst);
    drop(held);
    Answer::Done
}

/// Puts what `open` leads to in the place of what the client's mappings of it show: pages of the kernel's cache.
pub fn show(front: &Front, open: &Open, space: &Arc<Space>, held: &Held) -> Result<(), Errno> {
    let Some(mapping) = open.shared.file.mapping() else { return show_ram(front, open, space, held) };
    map_over(held, space, &own_areas(front, open, held)?, &mapping, open.first_mapping())?;
    front.forget_pages(open);
    Ok(())
}

/// Maps RAM over the parts of the client's mappings of `open` that are wanted. Nobody of the process runs meanwhile.
fn show_ram(front: &Front, open: &Open, space: &Arc<Space>, held: &Held) -> Result<(), Errno> {
    let views = &open.shared.views;
    let window = open.shared.file.ram_window().unwrap_or_default();
    let areas = own_areas(front, open, held)?;
    let areas: Vec<&Area> = areas.iter().filter(|area| area.shared).collect();
    let advice = maps::advice(held.tid(), &areas).map_err(|err| errno_of(&err))?;
    let mut fds: Vec<(Arc<Mapping>, i32)> = Vec::new();
    let mut map = || {
        for seen in views.wanted(&window, space.id) {
            for (area, advice) in areas.iter().zip(&advice) {
                let Some((part, skipped)) = overlap(area, &seen) else { continue };
                let fd = match fds.iter().find(|(known, _)| Arc::ptr_eq(known, &seen.ram)) {
                    Some((_, fd)) => *fd,
                    None => {
                        let fd = install::give(held, space.tgid, seen.ram.file().as_fd(), true)?;
                        fds.push((Arc::clone(&seen.ram), fd));
                        fd
                    }
                };
                let offset = seen.offset + skipped;
                map_in_place(held, &part, fd, seen.ram.file_offset() + offset, *advice)?;
                // What is nowhere in the VM any more stays as it is.
                views.shown.lock().extend(seen.gpa.map(|gpa| {
                    let (space, ram) = (Arc::clone(space), Arc::clone(&seen.ram));
                    Shown { space, at: part.range, gpa: gpa + skipped, ram, offset }
                }));
            }
        }
        Ok(())
    };
    let mapped = map();
    for (_, fd) in fds {
        install::close(held, fd)?;
    }
    mapped?;
    // What was written to copies comes by way of `written_back` before this returns.
    front.forget_pages(open);
    views.lent.lock().clear();
    Ok(())
}

/// Where the client maps the window that `open` is.
fn own_areas(front: &Front, open: &Open, held: &Held) -> Result<Vec<Area>, Errno> {
    super::memory::mapped_from(held.tid(), front.device_number(), open.node)
}

/// The part of `area` where `seen` shows, and how much of `seen` lies before it.
fn overlap<'a>(area: &'a Area, seen: &Seen) -> Option<(Part<'a>, u64)> {
    let (start, end) = (area.offset.max(seen.at.start), view::end(area).min(seen.at.end));
    let address = |offset: u64| area.range.start + (offset - area.offset);
    (start < end).then(|| (Part { range: address(start)..address(end), area }, start - seen.at.start))
}

/// The kernel writes copies back.
pub fn written_back(shared: &Shared, offset: u64, data: &[u8]) {
    if let Some(window) = shared.file.ram_window() {
        shared.views.take_back(&window, offset, data);
    }
}

/// Slots or aliases have changed: does a client of space `id` have something in view that is no longer so?
pub fn is_stale(shared: &Shared, id: AddressSpace) -> bool {
    shared.views.is_stale(id, || shared.file.ram_window().unwrap_or_default())
}

/// Now and then: gives up what was kept for mappings of the client that it has no more.
pub fn tidy(front: &Front, open: &Open, space: &Space, tid: Pid) {
    // A lot may be made meanwhile, and its mapping would not be among these: reshaping has the space for itself.
    if open.shared.views.lots.lock().is_due()
        && let Some(_exclusive) = space.exclusive_within(Duration::ZERO)
        && let Ok(areas) = maps::areas(tid, &(0..u64::MAX))
    {
        forget_lots(front, open, space, &areas);
    }
}

fn forget_lots(front: &Front, open: &Open, space: &Space, areas: &[Area]) {
    let of_window = |area: &&Area| (area.device, area.inode) == (front.device_number(), open.node);
    open.shared.views.lots.lock().forget(space, areas.iter().filter(of_window));
}

/// Takes out of the client's view what is no longer so and was not touched: the next touch asks again. Pages that were touched stay
/// what they are, as with Linux. The client's descriptor of the window is that of its ioctl.
pub fn reshape(front: &Front, open: &Open, space: &Arc<Space>, held: &Held) -> Result<(), Errno> {
    let views = &open.shared.views;
    let window = open.shared.file.ram_window().unwrap_or_default();
    let areas = maps::areas(held.tid(), &(0..u64::MAX)).map_err(|err| errno_of(&err))?;
    forget_lots(front, open, space, &areas);
    let mut shown = views.shown.lock();
    let (own, others): (Vec<_>, Vec<_>) = shown.drain(..).partition(|shown| shown.space.id == space.id);
    shown.extend(others.into_iter().filter(|shown| shown.space.is_alive()));
    for part in own {
        let mut at = part.gpa;
        for range in part.gone(&window) {
            shown.extend((at < range.start).then(|| part.part(&(at..range.start))));
            at = range.end;
            hide(open, held, &areas, &part.part(&range))?;
        }
        let end = part.gpa + (part.at.end - part.at.start);
        shown.extend((at < end).then(|| part.part(&(at..end))));
    }
    Ok(())
}

/// The untouched pages of `part`, as far as the client still has it there, show the window again.
fn hide(open: &Open, held: &Held, areas: &[Area], part: &Shown) -> Result<(), Errno> {
    let file = file_id(part.ram.file()).map_err(|err| errno_of(&err))?;
    let first = part.ram.file_offset() + part.offset;
    let overlaps = |area: &&Area| area.range.start < part.at.end && part.at.start < area.range.end;
    for area in areas.iter().filter(overlaps) {
        let range = area.range.start.max(part.at.start)..area.range.end.min(part.at.end);
        let there = area.offset + (range.start - area.range.start) == first + (range.start - part.at.start);
        if (area.device, area.inode) != file || !there {
            continue;
        }
        let Some(offset) = offset_of(open, held, part, &range)? else {
            tracing::debug!(?range, "a deleted slot stays in view: the file is not large enough");
            continue;
        };
        let advice = maps::advice(held.tid(), &[area]).map_err(|err| errno_of(&err))?[0];
        map_in_place(held, &Part { range, area }, held.ioctl_fd(), offset, advice)?;
    }
    Ok(())
}

/// What to map at addresses `range` of `part`: its place in the window, or a lot if something of it was touched.
fn offset_of(open: &Open, held: &Held, part: &Shown, range: &Range<u64>) -> Result<Option<u64>, Errno> {
    let touched = Pagemap::of(held.tid()).and_then(|pagemap| pagemap.resident(range)).map_err(|err| errno_of(&err))?;
    if touched.is_empty() {
        return Ok(Some(part.gpa + (range.start - part.at.start)));
    }
    Ok(open.shared.views.lots.lock().add(part, range, &touched))
}
