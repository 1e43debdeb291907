//! mmap of a 2007 VM's file: RAM at its guest-physical address, and SIGBUS where there is none.
//!
//! Linux 2.6.22 looked a page up when it was touched (`kvm_main.c`, `kvm_vm_nopage`). So do we: the file has no backing
//! file, a first touch anywhere in the mapping becomes a `FUSE_READ` of that page, and what cannot be read is a SIGBUS. A
//! page of RAM is answered with a copy, which only serves to let the thread out of the fault: it is stopped before it
//! runs on, and puts the RAM itself in the place of all parts of its mapping that have some. Holes stay as they are, and are asked
//! for again at the next touch. From then on a touch of RAM costs nothing, and both sides see the same pages.
//!
//! A system call that runs into the fault (read(2) into the mapping) writes to copies before its thread can be stopped.
//! So each copy is remembered, and what the kernel writes back when the copies are dropped is compared with it: bytes
//! that differ go to RAM. The same serves clients that cannot be stopped (strace has them).

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cuse_rs::{Answer, Call};
use kvm::client::{AddressSpace, WindowPiece};
use nix::errno::Errno;
use nix::unistd::Pid;
use parking_lot::Mutex;

use super::inject::{self, Held, Seized};
use super::maps::{self, Area, Pagemap};
use super::memory::{Part, file_id, map_in_place, mapped_from};
use super::space::{FileId, Space, errno_of};
use super::{install, stop};
use crate::file::{Open, Shared};
use crate::front::Front;

/// Size of the file: all addresses that a processor can have.
pub const BYTES: u64 = 1 << 52;

const PAGE: u64 = 4096;
/// A fault waits so long for others in its process. Not for ever: a thread may hold the lock of its address space while it waits
/// for the answer, and who has exclusive use of the space may want that lock.
const PATIENCE: Duration = Duration::from_millis(100);
/// More pieces than this are not cut out of a deleted slot: the kernel allows a process some 65 000 mappings.
const MAX_RUNS: usize = 4096;

/// What clients have of one VM's window.
#[derive(Debug, Default)]
pub struct Shows {
    /// Copies in the kernel's page cache, by offset, as they were handed out.
    lent: Mutex<HashMap<u64, Vec<u8>>>,
    shown: Mutex<Vec<Shown>>,
}

/// A part of a client's mapping that is RAM itself.
#[derive(Clone, Debug)]
struct Shown {
    space: AddressSpace,
    /// Client addresses.
    at: Range<u64>,
    gpa: u64,
    /// What was put there, and from where in it.
    file: FileId,
    offset: u64,
}

/// The bytes from `offset` on. `None`: some of them are not RAM.
fn copy(window: &[WindowPiece], offset: u64, len: u64) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(len as usize);
    for page in (offset..offset + len).step_by(PAGE as usize) {
        let piece = window.iter().find(|piece| page.wrapping_sub(piece.gpa) < piece.ram.len)?;
        let mut buffer = [0; PAGE as usize];
        piece.ram.mapping.read(piece.ram.offset + (page - piece.gpa), &mut buffer)?;
        bytes.extend_from_slice(&buffer);
    }
    Some(bytes)
}

/// A page fault: answers the read of `len` bytes at `offset`.
pub fn fault(front: &Arc<Front>, call: &Call<'_>, open: &Arc<Open>, offset: u64, len: u64) -> Answer {
    let shared = &open.shared;
    let bytes = shared.file.ram_window().and_then(|window| copy(&window, offset, len));
    let Some(bytes) = bytes else { return Answer::Error(Errno::EIO) };
    {
        let mut lent = shared.window.lent.lock();
        lent.extend((offset..).step_by(PAGE as usize).zip(bytes.chunks(PAGE as usize).map(<[u8]>::to_vec)));
    }
    // If nothing better comes of it, the next ioctl tries again.
    open.page_fault();
    let answer = place(front, call, open, bytes);
    if inject::has_dead() {
        inject::collect_dead();
    }
    answer
}

/// Puts RAM in the place of the mapping, once the thread has its answer.
fn place(front: &Arc<Front>, call: &Call<'_>, open: &Arc<Open>, bytes: Vec<u8>) -> Answer {
    let tid = Pid::from_raw(call.header.pid.cast_signed());
    let plain = Answer::Data(bytes);
    // 0: of a pid namespace that is not ours. One of our own: it reads client memory for an ioctl.
    if tid.as_raw() == 0 || std::path::Path::new(&format!("/proc/self/task/{tid}")).exists() {
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

fn place_exclusively(front: &Arc<Front>, call: &Call<'_>, open: &Open, space: &Space, plain: Answer) -> Answer {
    let tid = Pid::from_raw(call.header.pid.cast_signed());
    let waiting = Arc::clone(front);
    let stopping = stop::others(space.tgid, tid, move |tid| waiting.is_waiting(tid));
    let seized = match Seized::new(tid) {
        Ok(seized) => seized,
        Err(errno) => {
            tracing::warn!(%tid, %errno, "a page of guest RAM is copied, not shared, until the VMM's next ioctl");
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
        tracing::debug!(%tid, %errno, "guest RAM is not shown");
    }
    // Before anybody goes on: the next fault is to be answered in full again.
    space.placing.store(false, Ordering::SeqCst);
    drop(held);
    Answer::Done
}

/// Maps RAM over all parts of the client's mappings of `open` that have some. Nobody of the process runs meanwhile.
pub fn show(front: &Front, open: &Open, space: &Space, held: &Held) -> Result<(), Errno> {
    let shared = &open.shared;
    let window = shared.file.ram_window().unwrap_or_default();
    let areas = mapped_from(held.tid(), front.device_number(), open.node)?;
    let areas: Vec<&Area> = areas.iter().filter(|area| area.shared).collect();
    let advice = maps::advice(held.tid(), &areas).map_err(|err| errno_of(&err))?;
    let mut fds: Vec<(FileId, i32)> = Vec::new();
    let mut map = || {
        for (area, advice) in areas.iter().zip(&advice) {
            for (part, gpa, piece) in overlaps(area, &window) {
                let (mapping, file) = (&piece.ram.mapping, piece.ram.mapping.file());
                let id = file_id(file).map_err(|err| errno_of(&err))?;
                let fd = match fds.iter().find(|(known, _)| *known == id) {
                    Some((_, fd)) => *fd,
                    None => {
                        let fd = install::give(held, space.tgid, file.as_fd(), true)?;
                        fds.push((id, fd));
                        fd
                    }
                };
                let offset = mapping.file_offset() + piece.ram.offset + (gpa - piece.gpa);
                map_in_place(held, &part, fd, offset, *advice)?;
                let shown = Shown { space: space.id, at: part.range, gpa, file: id, offset };
                shared.window.shown.lock().push(shown);
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
    shared.window.lent.lock().clear();
    Ok(())
}

/// The parts of `area` that show RAM: each with its guest-physical address.
fn overlaps<'a>(area: &'a Area, window: &'a [WindowPiece]) -> impl Iterator<Item = (Part<'a>, u64, &'a WindowPiece)> {
    window.iter().filter_map(move |piece| {
        let start = area.offset.max(piece.gpa);
        let end = (area.offset + (area.range.end - area.range.start)).min(piece.gpa + piece.ram.len);
        let address = |gpa: u64| area.range.start + (gpa - area.offset);
        (start < end).then(|| (Part { range: address(start)..address(end), area }, start, piece))
    })
}

/// The kernel writes copies back: what the client changed in them goes to RAM.
pub fn written_back(shared: &Shared, offset: u64, data: &[u8]) {
    let Some(window) = shared.file.ram_window() else { return };
    let lent = shared.window.lent.lock();
    for (page, now) in (offset..).step_by(PAGE as usize).zip(data.chunks(PAGE as usize)) {
        let piece = window.iter().find(|piece| page.wrapping_sub(piece.gpa) < piece.ram.len);
        let (Some(before), Some(piece)) = (lent.get(&page), piece) else { continue };
        let base = piece.ram.offset + (page - piece.gpa);
        for (at, (_, byte)) in (0..).zip(before.iter().zip(now)).filter(|(_, (before, now))| before != now) {
            // Inside the piece, of memory that we made writable.
            let _ = piece.ram.mapping.store_u8(base + at, *byte);
        }
    }
}

/// Slots or aliases have changed: does a client of space `id` have something in view that is no longer so?
pub fn is_stale(shared: &Shared, id: AddressSpace) -> bool {
    let mut shown = shared.window.shown.lock();
    if shown.is_empty() {
        return false;
    }
    shown.retain(|shown| shown.space == id || shown.space.pid != id.pid);
    let window = shared.file.ram_window().unwrap_or_default();
    shown.iter().filter(|shown| shown.space == id).any(|shown| !gone(shown, &window).is_empty())
}

/// The guest-physical ranges of `shown` that show something else by now.
fn gone(shown: &Shown, window: &[WindowPiece]) -> Vec<Range<u64>> {
    let end = shown.gpa + (shown.at.end - shown.at.start);
    let mut at = shown.gpa;
    let mut gone = Vec::new();
    let same = |piece: &&WindowPiece| {
        let offset = |gpa: u64| piece.ram.mapping.file_offset() + piece.ram.offset + (gpa - piece.gpa);
        let first = piece.gpa.max(shown.gpa);
        first < end
            && first < piece.gpa + piece.ram.len
            && file_id(piece.ram.mapping.file()).is_ok_and(|id| id == shown.file)
            && offset(first) == shown.offset + (first - shown.gpa)
    };
    for piece in window.iter().filter(same) {
        let first = piece.gpa.max(shown.gpa);
        if at < first {
            gone.push(at..first);
        }
        at = end.min(piece.gpa + piece.ram.len);
    }
    if at < end {
        gone.push(at..end);
    }
    gone
}

/// Takes out of the client's view what is no longer so and was not touched: the next touch asks again. Pages that were touched stay
/// what they are, as with Linux. `fd`: the client's descriptor of the window.
pub fn reshape(shared: &Shared, space: &Space, held: &Held, fd: i32) -> Result<(), Errno> {
    let window = shared.file.ram_window().unwrap_or_default();
    let pagemap = Pagemap::of(held.tid()).map_err(|err| errno_of(&err))?;
    let mut shown = shared.window.shown.lock();
    let (own, others): (Vec<_>, Vec<_>) = shown.drain(..).partition(|shown| shown.space == space.id);
    *shown = others;
    for part in own {
        let gone = gone(&part, &window);
        let mut at = part.gpa;
        let address = |gpa: u64| part.at.start + (gpa - part.gpa);
        let mut keep = |from: u64, to: u64| {
            if from < to {
                let offset = part.offset + (from - part.gpa);
                shown.push(Shown { at: address(from)..address(to), gpa: from, offset, ..part.clone() });
            }
        };
        for range in &gone {
            keep(at, range.start);
            at = range.end;
            let addresses = address(range.start)..address(range.end);
            let offset = part.offset + (range.start - part.gpa);
            hide(held, fd, &pagemap, (&addresses, part.file, offset), range.start)?;
        }
        keep(at, part.gpa + (part.at.end - part.at.start));
    }
    Ok(())
}

/// The untouched pages of `addresses`, as far as the client still maps `file` there, show the window again.
fn hide(
    held: &Held,
    fd: i32,
    pagemap: &Pagemap,
    (addresses, file, offset): (&Range<u64>, FileId, u64),
    gpa: u64,
) -> Result<(), Errno> {
    for area in maps::areas(held.tid(), addresses).map_err(|err| errno_of(&err))? {
        let range = area.range.start.max(addresses.start)..area.range.end.min(addresses.end);
        let there = area.offset + (range.start - area.range.start) == offset + (range.start - addresses.start);
        if (area.device, area.inode) != file || !there {
            continue;
        }
        let touched = pagemap.resident(&range).map_err(|err| errno_of(&err))?;
        if touched.len() > MAX_RUNS {
            tracing::debug!(runs = touched.len(), "a deleted slot stays in view: it would take too many mappings");
            continue;
        }
        let advice = maps::advice(held.tid(), &[&area]).map_err(|err| errno_of(&err))?[0];
        let starts = std::iter::once(range.start).chain(touched.iter().map(|run| run.end));
        let ends = touched.iter().map(|run| run.start).chain(std::iter::once(range.end));
        for (start, end) in starts.zip(ends).filter(|(start, end)| start < end) {
            let part = Part { range: start..end, area: &area };
            map_in_place(held, &part, fd, gpa + (start - addresses.start), advice)?;
        }
    }
    Ok(())
}
