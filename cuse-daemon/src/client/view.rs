//! What the file of a 2007 VM shows at which offset, and what clients have of it.
//!
//! Up to `LOTS` an offset is a guest-physical address. What lies beyond belongs to `Lot`s.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm::client::{AddressSpace, WindowPiece};
use mmu::Mapping;
use parking_lot::Mutex;

use super::maps::{Area, PAGE};
use super::space::Space;

/// Where guest-physical addresses end: no processor has more of them.
const LOTS: u64 = 1 << 52;
/// Size of the file.
pub const BYTES: u64 = 1 << 62;

/// What clients have of one VM's file.
#[derive(Debug, Default)]
pub struct Views {
    /// Copies in the kernel's page cache, by offset, as they were handed out.
    pub lent: Mutex<BTreeMap<u64, Vec<u8>>>,
    /// RAM itself, in the place of parts of clients' mappings.
    pub shown: Mutex<Vec<Shown>>,
    /// What they keep of RAM that is gone.
    pub lots: Mutex<Lots>,
}

/// A part of a client's mapping that is RAM itself.
#[derive(Clone, Debug)]
pub struct Shown {
    /// Whose mapping.
    pub space: Arc<Space>,
    /// Client addresses.
    pub at: Range<u64>,
    /// Guest-physical address of its beginning.
    pub gpa: u64,
    /// What was put there.
    pub ram: Arc<Mapping>,
    /// Where in `ram` it begins.
    pub offset: u64,
}

/// A part of the file behind which there is one run of RAM.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Offsets in the file.
    pub at: Range<u64>,
    /// Where the guest has it; `None`: nowhere any more.
    pub gpa: Option<u64>,
    /// What is there.
    pub ram: Arc<Mapping>,
    /// Where in `ram` it begins.
    pub offset: u64,
}

/// A part of a client's mapping that showed RAM which the VM does not have there any more.
#[derive(Debug)]
struct Lot {
    /// Offsets in the file.
    at: Range<u64>,
    /// Guest-physical address of its beginning.
    gpa: u64,
    ram: Arc<Mapping>,
    /// Where in `ram` it begins.
    offset: u64,
    /// Offsets in the file that the client has touched: they stay what they were.
    kept: Vec<Range<u64>>,
    space: Arc<Space>,
}

/// All lots of a VM.
#[derive(Debug, Default)]
pub struct Lots {
    /// In ascending order.
    all: Vec<Lot>,
    /// When it was last seen who shows them.
    looked: Option<Instant>,
}

/// The kernel does not tell that a client has unmapped a lot, so it is looked for; RAM that nobody shows is kept no longer.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

impl Lots {
    /// It is time to [`forget`](Self::forget) some.
    pub fn is_due(&self) -> bool {
        !self.all.is_empty() && self.looked.is_none_or(|looked| looked.elapsed() > LOOK_AGAIN)
    }

    /// A lot for addresses `at` of `part`, of which `touched` are kept, and what offset they get. `None`: offsets have run out.
    pub fn add(&mut self, part: &Shown, at: &Range<u64>, touched: &[Range<u64>]) -> Option<u64> {
        let start = self.all.last().map_or(LOTS, |last| last.at.end);
        let end = start.checked_add(at.end - at.start).filter(|&end| end <= BYTES)?;
        let kept = touched.iter().map(|run| start + (run.start - at.start)..start + (run.end - at.start)).collect();
        let skipped = at.start - part.at.start;
        let (gpa, offset) = (part.gpa + skipped, part.offset + skipped);
        let (ram, space) = (Arc::clone(&part.ram), Arc::clone(&part.space));
        self.all.push(Lot { at: start..end, gpa, ram, offset, kept, space });
        Some(start)
    }

    /// Forgets lots of `space` that none of its mappings of the file, `areas`, shows any more, and those of the dead.
    pub fn forget<'a>(&mut self, space: &Space, areas: impl Iterator<Item = &'a Area> + Clone) {
        let shows = |area: &Area, lot: &Lot| area.offset < lot.at.end && lot.at.start < end(area);
        self.looked = Some(Instant::now());
        self.all.retain(|lot| match lot.space.id == space.id {
            true => areas.clone().any(|area| shows(area, lot)),
            false => lot.space.is_alive(),
        });
    }

    /// What is at `offset`, with the VM's RAM as `window` says. `None`: a hole.
    pub fn look(&self, window: &[WindowPiece], offset: u64) -> Option<Seen> {
        let piece = |gpa: u64| window.iter().find(|piece| gpa.wrapping_sub(piece.gpa) < piece.ram.len);
        if offset < LOTS {
            let WindowPiece { gpa, ram } = piece(offset)?;
            let (at, gpa) = (*gpa..gpa + ram.len, Some(*gpa));
            return Some(Seen { at, gpa, ram: Arc::clone(&ram.mapping), offset: ram.offset });
        }
        let lot = &self.all[self.all.partition_point(|lot| lot.at.end <= offset)..].first()?;
        if offset < lot.at.start {
            return None;
        }
        let next = lot.kept.partition_point(|run| run.end <= offset);
        if let Some(run) = lot.kept.get(next).filter(|run| run.contains(&offset)) {
            let from = lot.offset + (run.start - lot.at.start);
            return Some(Seen { at: run.clone(), gpa: None, ram: Arc::clone(&lot.ram), offset: from });
        }
        // Between kept pages the VM's RAM shows as it is now.
        let first = next.checked_sub(1).map_or(lot.at.start, |before| lot.kept[before].end);
        let last = lot.kept.get(next).map_or(lot.at.end, |after| after.start);
        let gpa = |offset: u64| lot.gpa + (offset - lot.at.start);
        let WindowPiece { gpa: piece_at, ram } = piece(gpa(offset))?;
        let (start, end) = (gpa(first).max(*piece_at), gpa(last).min(piece_at + ram.len));
        let at = lot.at.start + (start - lot.gpa)..lot.at.start + (end - lot.gpa);
        let offset = ram.offset + (start - piece_at);
        Some(Seen { at, gpa: Some(start), ram: Arc::clone(&ram.mapping), offset })
    }
}

impl Views {
    /// The bytes from `offset` on, whole pages. `None`: some of them are holes.
    pub fn copy(&self, window: &[WindowPiece], offset: u64, len: u64) -> Option<Vec<u8>> {
        let lots = self.lots.lock();
        let mut bytes = Vec::with_capacity(len as usize);
        for page in (offset..offset + len).step_by(PAGE as usize) {
            let seen = lots.look(window, page)?;
            let mut buffer = [0; PAGE as usize];
            seen.ram.read(seen.offset + (page - seen.at.start), &mut buffer)?;
            bytes.extend_from_slice(&buffer);
        }
        Some(bytes)
    }

    /// Remembers copies that go to the kernel.
    pub fn lend(&self, offset: u64, bytes: &[u8]) {
        let pages = bytes.chunks(PAGE as usize).map(<[u8]>::to_vec);
        self.lent.lock().extend((offset..).step_by(PAGE as usize).zip(pages));
    }

    /// What is to be shown to `space`: what lies around the copies that the kernel has, each once. The first time all RAM that
    /// there is: to show more of it later takes a stop of the process, which ends `KVM_RUN`s under way.
    pub fn wanted(&self, window: &[WindowPiece], space: AddressSpace) -> Vec<Seen> {
        let first = !self.shown.lock().iter().any(|shown| shown.space.id == space);
        let lots = self.lots.lock();
        let mut offsets: Vec<u64> = self.lent.lock().keys().copied().collect();
        if first {
            offsets.extend(window.iter().map(|piece| piece.gpa));
            offsets.sort_unstable();
        }
        let mut found: Vec<Seen> = Vec::new();
        for offset in offsets {
            if found.last().is_none_or(|last| last.at.end <= offset) {
                found.extend(lots.look(window, offset));
            }
        }
        found
    }

    /// What the client changed in copies goes to RAM.
    pub fn take_back(&self, window: &[WindowPiece], offset: u64, data: &[u8]) {
        let (lots, lent) = (self.lots.lock(), self.lent.lock());
        for (page, now) in (offset..).step_by(PAGE as usize).zip(data.chunks(PAGE as usize)) {
            let (Some(before), Some(seen)) = (lent.get(&page), lots.look(window, page)) else { continue };
            let base = seen.offset + (page - seen.at.start);
            for (at, (_, byte)) in (0..).zip(before.iter().zip(now)).filter(|(_, (before, now))| before != now) {
                // Inside the part, of memory that we made writable.
                let _ = seen.ram.store_u8(base + at, *byte);
            }
        }
    }

    /// Slots or aliases have changed: does a client of space `id` have something in view that is no longer so?
    pub fn is_stale(&self, id: AddressSpace, window: impl FnOnce() -> Vec<WindowPiece>) -> bool {
        let mut shown = self.shown.lock();
        if shown.is_empty() {
            return false;
        }
        // Before exec it was another.
        shown.retain(|shown| shown.space.id == id || shown.space.id.pid != id.pid);
        let window = window();
        shown.iter().filter(|shown| shown.space.id == id).any(|shown| !shown.gone(&window).is_empty())
    }
}

impl Shown {
    /// The guest-physical ranges that show something else by now.
    pub fn gone(&self, window: &[WindowPiece]) -> Vec<Range<u64>> {
        let end = self.gpa + (self.at.end - self.at.start);
        let mut at = self.gpa;
        let mut gone = Vec::new();
        let same = |piece: &&WindowPiece| {
            let first = piece.gpa.max(self.gpa);
            first < end
                && first < piece.gpa + piece.ram.len
                && Arc::ptr_eq(&piece.ram.mapping, &self.ram)
                && piece.ram.offset + (first - piece.gpa) == self.offset + (first - self.gpa)
        };
        for piece in window.iter().filter(same) {
            let first = piece.gpa.max(self.gpa);
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

    /// The part of it at guest-physical addresses `range`.
    pub fn part(&self, range: &Range<u64>) -> Self {
        let skipped = range.start - self.gpa;
        let at = self.at.start + skipped..self.at.start + (range.end - self.gpa);
        Self { at, gpa: range.start, offset: self.offset + skipped, ..self.clone() }
    }
}

/// Where in its file an area ends.
pub fn end(area: &Area) -> u64 {
    area.offset + (area.range.end - area.range.start)
}

#[cfg(test)]
mod tests {
    use kvm::client::SharedPiece;

    use super::super::space::Spaces;
    use super::*;

    fn ram() -> Arc<Mapping> {
        Mapping::create("ram", 16 * PAGE).unwrap()
    }

    fn piece(gpa: u64, ram: &Arc<Mapping>, pages: u64, offset: u64) -> WindowPiece {
        WindowPiece { gpa, ram: SharedPiece { len: pages * PAGE, mapping: Arc::clone(ram), offset } }
    }

    fn shown(gpa: u64, ram: &Arc<Mapping>) -> Shown {
        let space = Spaces::default().of_thread(std::process::id()).unwrap();
        Shown { space, at: 0x7000_0000..0x7000_0000 + 8 * PAGE, gpa, ram: Arc::clone(ram), offset: 2 * PAGE }
    }

    /// Offsets, guest-physical address, and where in which RAM.
    fn found(lots: &Lots, window: &[WindowPiece], offset: u64) -> Option<(Range<u64>, Option<u64>, u64)> {
        lots.look(window, offset).map(|seen| (seen.at, seen.gpa, seen.offset))
    }

    #[test]
    fn an_offset_is_a_guest_physical_address() {
        let (ram, lots) = (ram(), Lots::default());
        let window = [piece(0, &ram, 2, 0), piece(4 * PAGE, &ram, 4, 3 * PAGE)];
        assert_eq!(found(&lots, &window, PAGE), Some((0..2 * PAGE, Some(0), 0)));
        assert_eq!(found(&lots, &window, 2 * PAGE), None);
        assert_eq!(found(&lots, &window, 7 * PAGE), Some((4 * PAGE..8 * PAGE, Some(4 * PAGE), 3 * PAGE)));
        assert_eq!(found(&lots, &window, LOTS), None);
    }

    #[test]
    fn a_lot_keeps_what_was_touched_and_shows_the_window_between() {
        let (old, new) = (ram(), ram());
        let part = shown(0x10 * PAGE, &old);
        let start = part.at.start;
        let mut lots = Lots::default();
        let touched = [start + 2 * PAGE..start + 3 * PAGE, start + 5 * PAGE..start + 6 * PAGE];
        let lot = lots.add(&part, &(start + PAGE..start + 7 * PAGE), &touched).unwrap();
        let second = lots.add(&part, &part.at, &[]).unwrap();
        assert_eq!((lot, second), (LOTS, LOTS + 6 * PAGE));
        // The RAM begins at its third page, and the lot at the second of the part.
        assert_eq!(found(&lots, &[], lot + PAGE), Some((lot + PAGE..lot + 2 * PAGE, None, 4 * PAGE)));
        assert_eq!(found(&lots, &[], lot + 4 * PAGE), Some((lot + 4 * PAGE..lot + 5 * PAGE, None, 7 * PAGE)));
        for hole in [0, 2, 3, 5, 6] {
            assert_eq!(found(&lots, &[], lot + hole * PAGE), None, "page {hole}");
        }
        // New RAM from page 13H on, which is the third of the lot.
        let window = [piece(0x13 * PAGE, &new, 16, 0)];
        assert_eq!(found(&lots, &window, lot), None);
        let between = Some((lot + 2 * PAGE..lot + 4 * PAGE, Some(0x13 * PAGE), 0));
        assert_eq!(found(&lots, &window, lot + 2 * PAGE), between);
        assert_eq!(found(&lots, &window, lot + 3 * PAGE), between);
        assert_eq!(found(&lots, &window, lot + 4 * PAGE).unwrap().1, None, "kept");
        assert_eq!(
            found(&lots, &window, lot + 5 * PAGE),
            Some((lot + 5 * PAGE..lot + 6 * PAGE, Some(0x16 * PAGE), 3 * PAGE))
        );
    }

    #[test]
    fn a_lot_that_nobody_shows_is_forgotten() {
        let ram = ram();
        let part = shown(0, &ram);
        let mut lots = Lots::default();
        let offsets = [(); 2].map(|()| lots.add(&part, &part.at, &[]).unwrap());
        let area = Area {
            range: 0..PAGE,
            prot: 3,
            shared: true,
            offset: offsets[1] + PAGE,
            device: 1,
            inode: 1,
            name: String::new(),
        };
        lots.forget(&part.space, [&area].into_iter());
        assert_eq!(lots.all.iter().map(|lot| lot.at.start).collect::<Vec<_>>(), [offsets[1]]);
        assert_eq!(found(&lots, &[piece(0, &ram, 16, 0)], offsets[0]), None);
        lots.forget(&part.space, std::iter::empty());
        assert!(lots.all.is_empty() && !lots.is_due());
    }

    fn one(range: &Range<u64>) -> Vec<Range<u64>> {
        std::slice::from_ref(range).to_vec()
    }

    #[test]
    fn what_has_moved_or_is_another_is_gone() {
        let (ram, other) = (ram(), ram());
        let part = shown(0x10 * PAGE, &ram);
        let all = 0x10 * PAGE..0x18 * PAGE;
        assert_eq!(part.gone(&[]), one(&all));
        assert_eq!(part.gone(&[piece(0x10 * PAGE, &ram, 8, 2 * PAGE)]), []);
        assert_eq!(part.gone(&[piece(0x10 * PAGE, &ram, 8, 3 * PAGE)]), one(&all));
        assert_eq!(part.gone(&[piece(0x10 * PAGE, &other, 8, 2 * PAGE)]), one(&all));
        // An alias over its middle.
        let cut =
            [piece(0xe * PAGE, &ram, 4, 0), piece(0x12 * PAGE, &other, 2, 0), piece(0x14 * PAGE, &ram, 8, 6 * PAGE)];
        assert_eq!(part.gone(&cut), one(&(0x12 * PAGE..0x14 * PAGE)));
        let middle = part.part(&(0x12 * PAGE..0x14 * PAGE));
        assert_eq!((middle.at.start, middle.gpa, middle.offset), (0x7000_2000, 0x12 * PAGE, 4 * PAGE));
    }
}
