//! Guest RAM: memory of the client that it and the daemon see alike.
//!
//! The client's own mappings are the registry: what it maps as shared is shared, be it by its own choice or because we
//! changed it earlier, and what it maps as private is changed now. Nothing here goes stale when the client unmaps,
//! maps anew or forks.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use kvm::client::SharedPiece;
use mmu::{Mapping, Protection, file_page_bytes};
use nix::errno::Errno;
use nix::sys::stat::{fstat, major, minor};
use nix::unistd::Pid;

use super::inject::Held;
use super::maps::{self, Advice, Area, PAGE, Pagemap};
use super::space::{FileId, Origin, Space, errno_of};
use super::stop::Stopping;
use super::{install, vm};

const COPY: usize = 256 * 1024;

/// A part of a range to share.
#[derive(Debug)]
pub(super) struct Part<'a> {
    pub(super) range: Range<u64>,
    pub(super) area: &'a Area,
}

impl<'a> Part<'a> {
    /// With all of the pages that it begins and ends in: huge ones are only mapped over as a whole.
    fn of_whole_pages(&self, tid: Pid) -> Self {
        let Range { start, end } = self.range;
        let area = self.area;
        let page = if area.inode == 0 { PAGE } else { page_bytes(tid, area).unwrap_or(PAGE) };
        let range = start - (start - area.range.start) % page
            ..area.range.end.min(area.range.start + (end - area.range.start).next_multiple_of(page));
        Self { range, area }
    }
}

/// The size of an area's pages.
fn page_bytes(tid: Pid, area: &Area) -> io::Result<u64> {
    let file = File::open(format!("/proc/{tid}/map_files/{:x}-{:x}", area.range.start, area.range.end))?;
    file_page_bytes(file.as_fd())
}

/// What a range consists of. `EFAULT`: something of it is not mapped, or is not memory.
fn parts<'a>(areas: &'a [Area], range: &Range<u64>) -> Result<Vec<Part<'a>>, Errno> {
    let mut at = range.start;
    let mut parts = Vec::new();
    for area in areas {
        if area.range.start > at || area.is_special() {
            return Err(Errno::EFAULT);
        }
        let end = area.range.end.min(range.end);
        parts.push(Part { range: at..end, area });
        at = end;
    }
    if at < range.end { Err(Errno::EFAULT) } else { Ok(parts) }
}

/// Shares `range` of the client. `hold` stops the thread that asks, and `stop_others` the rest of its process; neither
/// is called when everything is shared already. The caller has exclusive use of `space`.
pub fn share<'h>(
    tid: Pid,
    space: &Space,
    range: &Range<u64>,
    hold: impl FnOnce() -> Result<&'h Held, Errno>,
    stop_others: impl FnOnce() -> Stopping,
) -> Result<Vec<SharedPiece>, Errno> {
    let areas = maps::areas(tid, range).map_err(|err| errno_of(&err))?;
    let parts = parts(&areas, range).inspect_err(|_| {
        tracing::warn!(pid = space.id.pid, ?range, "memory given to the guest is not mapped in the VMM");
    })?;
    let private: Vec<Part<'_>> =
        parts.iter().filter(|part| !part.area.shared).map(|part| part.of_whole_pages(tid)).collect();
    let own = if private.is_empty() { None } else { Some(replace(tid, space, &private, hold()?, stop_others)?) };
    let mut replaced = private.iter();

    let mut offset = 0;
    let mut pieces: Vec<SharedPiece> = Vec::with_capacity(parts.len());
    for part in &parts {
        let len = part.range.end - part.range.start;
        let piece = match &own {
            Some(own) if !part.area.shared => {
                let whole = &replaced.next().expect("one for each private part").range;
                let skipped = part.range.start - whole.start;
                let piece = SharedPiece { len, mapping: Arc::clone(own), offset: offset + skipped };
                offset += whole.end - whole.start;
                piece
            }
            _ => {
                let mapping = map_shared(tid, space, part.area)?;
                let at = part.area.offset + (part.range.start - part.area.range.start);
                SharedPiece { len, offset: at - mapping.file_offset(), mapping }
            }
        };
        match pieces.last_mut() {
            Some(last) if Arc::ptr_eq(&last.mapping, &piece.mapping) && last.offset + last.len == piece.offset => {
                last.len += len;
            }
            _ => pieces.push(piece),
        }
    }
    Ok(pieces)
}

/// Maps here the file behind a shared area, unless a mapping that covers it is at hand.
fn map_shared(tid: Pid, space: &Space, area: &Area) -> Result<Arc<Mapping>, Errno> {
    let len = area.range.end - area.range.start;
    let file = (area.device, area.inode);
    if let Some(mapping) = space.mapped.find(file, &(area.offset..area.offset + len)) {
        return Ok(mapping);
    }
    let opened = open_shared(tid, area)
        .and_then(|(file, protection)| Mapping::of_file(file.into(), area.offset, len, protection));
    let mapping = opened.map_err(|err| {
        tracing::warn!(pid = space.id.pid, name = area.name, %err, "cannot map memory that the VMM shares");
        errno_of(&err)
    })?;
    // A file may be mapped for reading first and for writing later.
    if mapping.writable() {
        space.mapped.keep(file, &mapping);
    }
    Ok(mapping)
}

/// Opens the file behind a shared area with the rights that the client has, and no more: we are root, it may not be.
fn open_shared(tid: Pid, area: &Area) -> io::Result<(File, Protection)> {
    let path = format!("/proc/{tid}/map_files/{:x}-{:x}", area.range.start, area.range.end);
    // The kernel maps a file shared and writable only for who has it open for writing.
    let writable = area.prot & libc::PROT_WRITE != 0 || maps::advice(tid, &[area])?[0].may_write;
    let (file, protection) = match writable.then(|| OpenOptions::new().read(true).write(true).open(&path)) {
        Some(Ok(file)) => (file, Protection::ReadWrite),
        _ => (File::open(&path)?, Protection::Read),
    };
    // Between the look at the area and the opening the client may have mapped something else there.
    if file_id(&file)? != (area.device, area.inode) {
        return Err(Errno::EFAULT.into());
    }
    Ok((file, protection))
}

/// Device and inode of a file, as `maps` shows them.
pub fn file_id(file: impl AsFd) -> io::Result<FileId> {
    let stat = fstat(file)?;
    Ok((major(stat.st_dev) << 32 | minor(stat.st_dev), stat.st_ino))
}

/// Puts one new file in place of private memory of the client, contents, protections and advice kept. The parts lie in
/// the file one after the other.
fn replace(
    tid: Pid,
    space: &Space,
    parts: &[Part<'_>],
    held: &Held,
    stop_others: impl FnOnce() -> Stopping,
) -> Result<Arc<Mapping>, Errno> {
    let len: u64 = parts.iter().map(|part| part.range.end - part.range.start).sum();
    let mapping = Mapping::create("softkvm-ram", len).map_err(|err| errno_of(&err))?;
    let areas: Vec<&Area> = parts.iter().map(|part| part.area).collect();
    let advice = maps::advice(tid, &areas).map_err(|err| errno_of(&err))?;
    let origins = origins(tid, parts);

    // From the copy until the new mappings are in place nobody may write to the old ones.
    let stopping = stop_others();
    stopping.wait();
    let pagemap = Pagemap::of(tid).map_err(|err| errno_of(&err))?;
    copy(tid, &contents(&pagemap, parts)?, &mapping)?;
    let fd = install::give(held, space.tgid, mapping.file(), true)?;
    let mut offset = 0;
    let mapped = parts.iter().zip(&advice).try_for_each(|(part, advice)| {
        map_in_place(held, part, fd, offset, *advice)?;
        offset += part.range.end - part.range.start;
        Ok(())
    });
    install::close(held, fd)?;
    drop(stopping);
    mapped?;
    tracing::debug!(pid = space.id.pid, ?parts, len, "guest memory is now shared");
    let id = file_id(mapping.file()).map_err(|err| errno_of(&err))?;
    space.own.add(id, origins);
    space.mapped.keep(id, &mapping);
    Ok(mapping)
}

/// Files behind private memory, where in ours they will show. One that cannot be opened is gone with its mapping.
fn origins(tid: Pid, parts: &[Part<'_>]) -> Vec<Origin> {
    let mut origins = Vec::new();
    let mut begin = 0;
    for part in parts {
        let range = begin..begin + (part.range.end - part.range.start);
        begin = range.end;
        if part.area.inode == 0 {
            continue;
        }
        let path = format!("/proc/{tid}/map_files/{:x}-{:x}", part.area.range.start, part.area.range.end);
        match File::open(path) {
            Ok(file) => {
                let offset = part.area.offset + (part.range.start - part.area.range.start);
                origins.push(Origin { range, file: Arc::new(file), offset });
            }
            Err(err) => tracing::debug!(%err, name = part.area.name, "the file behind private memory cannot be opened"),
        }
    }
    origins
}

/// Pages that hold something: where they are in the client, and where they go in the new file.
fn contents(pagemap: &Pagemap, parts: &[Part<'_>]) -> Result<Vec<(Range<u64>, u64)>, Errno> {
    let mut runs = Vec::new();
    let mut begin = 0;
    for part in parts {
        if part.area.is_anonymous() {
            let resident = pagemap.resident(&part.range).map_err(|err| errno_of(&err))?;
            runs.extend(resident.into_iter().map(|run| (run.clone(), begin + (run.start - part.range.start))));
        } else {
            // Pages of a private file mapping hold the file's data before they are touched.
            runs.push((part.range.clone(), begin));
        }
        begin += part.range.end - part.range.start;
    }
    Ok(runs)
}

/// Copies client memory. Pages of zeros stay holes, as do pages that cannot be read (beyond the end of a mapped file):
/// the client would get a signal there, so they hold nothing.
fn copy(tid: Pid, runs: &[(Range<u64>, u64)], to: &Mapping) -> Result<(), Errno> {
    let mut buffer = vec![0; COPY];
    for (run, offset) in runs {
        let mut at = run.start;
        while at < run.end {
            let want = ((run.end - at) as usize).min(COPY);
            let got = match vm::read_some(tid, at, &mut buffer[..want]) {
                Ok(got) => got & !(PAGE as usize - 1),
                Err(Errno::EFAULT) => 0,
                Err(errno) => return Err(errno),
            };
            for (page, bytes) in (at..).step_by(PAGE as usize).zip(buffer[..got].chunks(PAGE as usize)) {
                if bytes.iter().any(|&byte| byte != 0) {
                    to.write(offset + (page - run.start), bytes).ok_or(Errno::EFAULT)?;
                }
            }
            at += (got as u64).max(PAGE);
        }
    }
    Ok(())
}

/// Maps `fd` from `offset` on in place of `part`, which keeps its protection and advice.
pub(super) fn map_in_place(held: &Held, part: &Part<'_>, fd: i32, offset: u64, advice: Advice) -> Result<(), Errno> {
    let (start, len) = (part.range.start, part.range.end - part.range.start);
    let reserve = if advice.no_reserve { libc::MAP_NORESERVE } else { 0 };
    let flags = libc::MAP_SHARED | libc::MAP_FIXED | reserve;
    let at = held.syscall(libc::SYS_mmap, [start, len, part.area.prot as u64, flags as u64, fd as u64, offset])?;
    debug_assert_eq!(at, start, "MAP_FIXED");
    let wanted = [
        (advice.dont_fork, libc::MADV_DONTFORK),
        (advice.dont_dump, libc::MADV_DONTDUMP),
        (advice.huge_page, libc::MADV_HUGEPAGE),
        (advice.no_huge_page, libc::MADV_NOHUGEPAGE),
    ];
    for (_, advice) in wanted.iter().filter(|(wanted, _)| *wanted) {
        // Advice that the kernel was built without is no loss.
        let _ = held.syscall(libc::SYS_madvise, [start, len, *advice as u64, 0, 0, 0]);
    }
    if advice.locked {
        held.syscall(libc::SYS_mlock, [start, len, 0, 0, 0, 0])?;
    }
    Ok(())
}

/// Where the client maps node `node` of our file system on `device`: addresses, file offset and protection.
pub fn mapped_from(tid: Pid, device: u64, node: u64) -> Result<Vec<Area>, Errno> {
    let areas = maps::areas(tid, &(0..u64::MAX)).map_err(|err| errno_of(&err))?;
    Ok(areas.into_iter().filter(|area| (area.device, area.inode) == (device, node)).collect())
}

/// Replaces mappings of one of our files that show the kernel's page cache by `mapping` itself. `first`: the client may
/// have written there before anybody else did, and that must stay.
pub fn map_over(held: &Held, space: &Space, areas: &[Area], mapping: &Mapping, first: bool) -> Result<(), Errno> {
    if first {
        for area in areas.iter().filter(|area| area.prot & libc::PROT_WRITE != 0) {
            let len = mapping.len().saturating_sub(area.offset).min(area.range.end - area.range.start);
            let pagemap = Pagemap::of(held.tid()).map_err(|err| errno_of(&err))?;
            let range = area.range.start..area.range.start + len;
            let touched = pagemap.resident(&range).map_err(|err| errno_of(&err))?;
            // What is of another object's file was there before.
            let own = |file: BorrowedFd<'_>| file.as_raw_fd() == mapping.file().as_raw_fd();
            for (at, _, _, len) in mapping.files().filter(|(_, file, ..)| own(*file)) {
                let at = at..at + len;
                let clip = |run: &Range<u64>| {
                    let offset = |address: u64| area.offset + (address - range.start);
                    let (start, end) = (offset(run.start).max(at.start), offset(run.end).min(at.end));
                    let address = |offset: u64| range.start + (offset - area.offset);
                    (start < end).then(|| (address(start)..address(end), start))
                };
                copy(held.tid(), &touched.iter().filter_map(clip).collect::<Vec<_>>(), mapping)?;
            }
        }
    }
    mapping.files().try_for_each(|(at, file, file_offset, len)| {
        let fd = install::give(held, space.tgid, file, true)?;
        // Behind the end there is nothing, whichever file shows it.
        let end = if at + len == mapping.len() { u64::MAX } else { at + len };
        let mapped = areas.iter().try_for_each(|area| map_file_over(held, area, at..end, fd, file_offset));
        install::close(held, fd)?;
        mapped
    })
}

/// The part of `area` that shows bytes `bytes` of its object: these are in `fd` from `file_offset` on.
fn map_file_over(held: &Held, area: &Area, bytes: Range<u64>, fd: i32, file_offset: u64) -> Result<(), Errno> {
    let end = area.offset + (area.range.end - area.range.start);
    let (start, end) = (area.offset.max(bytes.start), end.min(bytes.end));
    if start >= end {
        return Ok(());
    }
    let address = |offset: u64| area.range.start + (offset - area.offset);
    let part = Part { range: address(start)..address(end), area };
    map_in_place(held, &part, fd, file_offset + (start - bytes.start), Advice::default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(range: Range<u64>, shared: bool) -> Area {
        Area { range, prot: 3, shared, offset: 0, device: 0, inode: u64::from(shared), name: String::new() }
    }

    #[test]
    fn a_range_is_cut_at_the_borders_of_areas() {
        let areas = [area(0x1000..0x3000, false), area(0x3000..0x9000, true)];
        let found = parts(&areas, &(0x2000..0x5000)).unwrap();
        let ranges: Vec<_> = found.iter().map(|part| (part.range.clone(), part.area.shared)).collect();
        assert_eq!(ranges, [(0x2000..0x3000, false), (0x3000..0x5000, true)]);
    }

    #[test]
    fn a_hole_is_a_fault() {
        let areas = [area(0x1000..0x3000, false), area(0x4000..0x9000, true)];
        for range in [0x0..0x2000, 0x2000..0x5000, 0x8000..0xa000, 0x9000..0xa000] {
            let areas: Vec<_> = areas
                .iter()
                .filter(|area| area.range.start < range.end && range.start < area.range.end)
                .cloned()
                .collect();
            assert_eq!(parts(&areas, &range).unwrap_err(), Errno::EFAULT, "{range:x?}");
        }
    }
}
