//! `/proc/PID/maps`, `smaps` and `pagemap` of a client: what lies where in its memory.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use nix::unistd::Pid;

/// Bytes of a page of the client's, unless it is a huge one.
pub(super) const PAGE: u64 = 4096;

/// One mapping of a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Area {
    /// Addresses.
    pub range: Range<u64>,
    /// `PROT_*`.
    pub prot: i32,
    /// `MAP_SHARED`.
    pub shared: bool,
    /// Where in its file it begins.
    pub offset: u64,
    /// Device of the file, major and minor together, as `maps` shows it.
    pub device: u64,
    /// Inode number; 0: anonymous.
    pub inode: u64,
    /// `[heap]`, a path, or nothing.
    pub name: String,
}

impl Area {
    /// Pages of a device or of the kernel's own, not memory that could be moved.
    pub fn is_special(&self) -> bool {
        matches!(self.name.as_str(), "[vvar]" | "[vdso]" | "[vsyscall]" | "[vvar_vclock]")
            || self.name.starts_with("/dev/vfio")
    }

    /// Private memory with no file behind it.
    pub fn is_anonymous(&self) -> bool {
        !self.shared && self.inode == 0
    }

    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.splitn(6, ' ');
        let (start, end) = fields.next()?.split_once('-')?;
        let flags = fields.next()?.as_bytes();
        let offset = hex(fields.next()?)?;
        let (major, minor) = fields.next()?.split_once(':')?;
        let inode = fields.next()?.parse().ok()?;
        let bit = |at: usize, letter, prot| if flags.get(at) == Some(&letter) { prot } else { 0 };
        Some(Self {
            range: hex(start)?..hex(end)?,
            prot: bit(0, b'r', libc::PROT_READ) | bit(1, b'w', libc::PROT_WRITE) | bit(2, b'x', libc::PROT_EXEC),
            shared: flags.get(3) == Some(&b's'),
            offset,
            device: hex(major)? << 32 | hex(minor)?,
            inode,
            name: fields.next().unwrap_or_default().trim_start().to_owned(),
        })
    }
}

fn hex(digits: &str) -> Option<u64> {
    u64::from_str_radix(digits, 16).ok()
}

/// The areas that overlap `range`, in ascending order.
pub fn areas(tid: Pid, range: &Range<u64>) -> io::Result<Vec<Area>> {
    let text = fs::read_to_string(format!("/proc/{tid}/maps"))?;
    let overlaps = |area: &Area| area.range.start < range.end && range.start < area.range.end;
    Ok(text.lines().filter_map(Area::parse).filter(overlaps).collect())
}

/// What madvise(2) and mlock(2) left on an area, and a new mapping in its place must get too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Advice {
    /// `MADV_DONTFORK`.
    pub dont_fork: bool,
    /// `MADV_DONTDUMP`.
    pub dont_dump: bool,
    /// `MADV_HUGEPAGE`.
    pub huge_page: bool,
    /// `MADV_NOHUGEPAGE`.
    pub no_huge_page: bool,
    /// mlock(2).
    pub locked: bool,
    /// `MAP_NORESERVE`.
    pub no_reserve: bool,
    /// mprotect(2) could make it writable: the client may write the file behind.
    pub may_write: bool,
}

impl Advice {
    fn parse(flags: &str) -> Self {
        let has = |name| flags.split_ascii_whitespace().any(|flag| flag == name);
        Self {
            dont_fork: has("dc"),
            dont_dump: has("dd"),
            huge_page: has("hg"),
            no_huge_page: has("nh"),
            locked: has("lo"),
            no_reserve: has("nr"),
            may_write: has("mw"),
        }
    }
}

/// The advice on each of `areas`, from `smaps`.
pub fn advice(tid: Pid, areas: &[&Area]) -> io::Result<Vec<Advice>> {
    parse_advice(BufReader::new(File::open(format!("/proc/{tid}/smaps"))?), areas)
}

/// Reads no further than it must: the kernel makes the text as it is read, and looks at every page for it.
fn parse_advice(smaps: impl BufRead, areas: &[&Area]) -> io::Result<Vec<Advice>> {
    let mut advice = vec![Advice::default(); areas.len()];
    let (mut current, mut missing) = (None, areas.len());
    let mut lines = smaps.lines();
    while missing > 0
        && let Some(line) = lines.next().transpose()?
    {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if let Some(index) = current.take() {
                advice[index] = Advice::parse(flags);
                missing -= 1;
            }
        } else if line.starts_with(|first: char| first.is_ascii_digit() || first.is_ascii_lowercase())
            && let Some(area) = Area::parse(&line)
        {
            current = areas.iter().position(|wanted| wanted.range == area.range);
        }
    }
    Ok(advice)
}

/// `/proc/PID/pagemap`.
pub struct Pagemap(File);

/// Bits 63 and 62 of an entry, seen in its top byte: in RAM, or swapped out.
const PRESENT: u8 = 0b1100_0000;

impl Pagemap {
    /// Of thread `tid`.
    pub fn of(tid: Pid) -> io::Result<Self> {
        File::open(format!("/proc/{tid}/pagemap")).map(Self)
    }

    /// The pages of `range` that were ever touched, as runs.
    pub fn resident(&self, range: &Range<u64>) -> io::Result<Vec<Range<u64>>> {
        const CHUNK: u64 = 64 * 1024 * PAGE;
        let mut runs: Vec<Range<u64>> = Vec::new();
        let mut bytes = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(at + CHUNK);
            bytes.resize(((end - at) / PAGE * 8) as usize, 0);
            self.0.read_exact_at(&mut bytes, at / PAGE * 8)?;
            let pages = (at..end).step_by(PAGE as usize).zip(bytes.chunks_exact(8));
            for (page, _) in pages.filter(|(_, entry)| entry[7] & PRESENT != 0) {
                match runs.last_mut() {
                    Some(run) if run.end == page => run.end += PAGE,
                    _ => runs.push(page..page + PAGE),
                }
            }
            at = end;
        }
        Ok(runs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: &str = "\
7f0000000000-7f0008000000 rw-p 00000000 00:00 0 
7f0008000000-7f0008003000 rw-s 00001000 00:01 1234                       /memfd:ram (deleted)
7ffe00000000-7ffe00021000 r-xp 00000000 fe:10 42                         /usr/lib/with space.so";

    #[test]
    fn lines_become_areas() {
        let areas: Vec<_> = LINES.lines().map(|line| Area::parse(line).unwrap()).collect();
        assert!(areas[0].is_anonymous());
        assert_eq!(areas[1].name, "/memfd:ram (deleted)");
        assert_eq!((areas[1].shared, areas[1].offset, areas[1].inode, areas[1].device), (true, 0x1000, 1234, 1));
        assert_eq!(areas[2].prot, libc::PROT_READ | libc::PROT_EXEC);
        assert_eq!(areas[2].device, 0xfe << 32 | 0x10);
        assert_eq!(areas[2].name, "/usr/lib/with space.so");
        assert_eq!(Area::parse("Rss:     12 kB"), None);
    }

    #[test]
    fn vmflags_become_advice() {
        let areas: Vec<_> = LINES.lines().map(|line| Area::parse(line).unwrap()).collect();
        let smaps = "7f0000000000-7f0008000000 rw-p 00000000 00:00 0 \nRss: 0 kB\nVmFlags: rd wr mr dc hg nr \n\
                     7f0008000000-7f0008003000 rw-s 00001000 00:01 1234 /x\nVmFlags: rd lo dd\n";
        let advice = parse_advice(smaps.as_bytes(), &[&areas[1], &areas[0]]).unwrap();
        assert_eq!(advice[0], Advice { locked: true, dont_dump: true, ..Advice::default() });
        assert_eq!(advice[1], Advice { dont_fork: true, huge_page: true, no_reserve: true, ..Advice::default() });
    }

    #[test]
    fn own_memory_shows_as_resident() {
        let page = Box::new([1u8; 8192]);
        let start = page.as_ptr().addr() as u64 & !(PAGE - 1);
        let range = start..start + 2 * PAGE;
        let runs = Pagemap::of(nix::unistd::getpid()).unwrap().resident(&range).unwrap();
        assert_eq!((runs.len(), &runs[0]), (1, &range));
        let found = areas(nix::unistd::getpid(), &range).unwrap();
        assert!(found[0].range.contains(&start));
    }
}
