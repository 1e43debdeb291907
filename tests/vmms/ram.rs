//! Guest RAM, in the forms that VMMs give it.
#![expect(unsafe_code, reason = "mappings are made by hand: how they are made is what is tested")]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::Path;
use std::ptr::null_mut;

use anyhow::{Context, Result, bail};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::Elf;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// All of it is below the hole of devices, from guest-physical 0.
pub const SIZE: usize = 256 << 20;
const HUGE: usize = 2 << 20;
/// Where x86's Linux is linked to be, unless it is configured otherwise (`CONFIG_PHYSICAL_START`).
const KERNEL: u64 = 16 << 20;

/// How RAM is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Anonymous private pages at a multiple of 2 MiB inside a larger reservation.
    Reservation,
    /// Anonymous private pages that may be merged (`MADV_MERGEABLE`).
    Mergeable,
    /// Anonymous private pages, huge ones if there are any (`MADV_HUGEPAGE`).
    HugeAdvice,
    /// A memfd, shared.
    Memfd,
    /// A file, private: the file is filled first, by way of a shared mapping.
    PrivateFile,
    /// Anonymous private pages, and a private mapping of a file that holds the kernel in the middle of them.
    Bundle,
}

/// A part of it, contiguous here and in the guest: a memory slot.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Guest-physical.
    pub gpa: u64,
    /// Where it is in this process.
    pub host: *mut u8,
    /// Bytes.
    pub len: usize,
}

/// Guest RAM.
pub struct Ram {
    /// As the crates of rust-vmm see it.
    pub memory: GuestMemoryMmap<()>,
    /// What it consists of, in ascending order.
    pub parts: Vec<Part>,
    file: Option<File>,
}

const ANONYMOUS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

fn mmap(at: *mut u8, len: usize, prot: i32, flags: i32, file: Option<&File>) -> Result<*mut u8> {
    let fd = file.map_or(-1, AsRawFd::as_raw_fd);
    // SAFETY: without MAP_FIXED no mapping is replaced; callers that give it own what lies there.
    let got = unsafe { libc::mmap(at.cast(), len, prot, flags, fd, 0) };
    if got == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error()).context("mmap");
    }
    Ok(got.cast())
}

fn memfd(len: usize) -> Result<File> {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error()).context("memfd_create");
    }
    // SAFETY: the descriptor is new, and nobody else has it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len as u64).context("ftruncate")?;
    Ok(file)
}

fn advise(host: *mut u8, advice: i32) {
    // Advice that the kernel was built without is no loss to a VMM either.
    // SAFETY: neither MADV_HUGEPAGE nor MADV_MERGEABLE changes what the pages hold.
    unsafe { libc::madvise(host.cast(), SIZE, advice) };
}

impl Ram {
    /// Maps it.
    pub fn new(backing: Backing, vmlinux: &Path) -> Result<Self> {
        let shared = |file: &File, len| mmap(null_mut(), len, RW, libc::MAP_SHARED | libc::MAP_NORESERVE, Some(file));
        let (host, file) = match backing {
            Backing::Reservation => {
                let whole = mmap(null_mut(), SIZE + HUGE, libc::PROT_NONE, ANONYMOUS, None)?;
                let aligned = whole.wrapping_add(whole.align_offset(HUGE));
                (mmap(aligned, SIZE, RW, ANONYMOUS | libc::MAP_FIXED, None)?, None)
            }
            Backing::Mergeable | Backing::HugeAdvice => {
                let host = mmap(null_mut(), SIZE, RW, ANONYMOUS, None)?;
                let merge = backing == Backing::Mergeable;
                advise(host, if merge { libc::MADV_MERGEABLE } else { libc::MADV_HUGEPAGE });
                (host, None)
            }
            Backing::Memfd | Backing::PrivateFile => {
                let file = memfd(SIZE)?;
                (shared(&file, SIZE)?, Some(file))
            }
            Backing::Bundle => return Self::with_bundle(vmlinux),
        };
        Self::of(vec![Part { gpa: 0, host, len: SIZE }], file)
    }

    fn of(parts: Vec<Part>, file: Option<File>) -> Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let regions = parts.iter().map(|part| {
            // SAFETY: the mapping is of so many bytes, and lives until the process ends.
            let region = unsafe { MmapRegion::build_raw(part.host, part.len, RW, flags) }.context("a region of RAM")?;
            GuestRegionMmap::new(region, GuestAddress(part.gpa)).context("a region of RAM")
        });
        let regions = regions.collect::<Result<Vec<_>>>()?;
        let memory = GuestMemoryMmap::from_regions(regions).context("the guest's memory")?;
        Ok(Self { memory, parts, file })
    }

    /// The file's contents in a new mapping, private: what is written from here on the file never sees. As a VMM has its
    /// RAM that restores a snapshot.
    pub fn restored(&self) -> Result<Self> {
        let Some(file) = &self.file else { bail!("only a file can be mapped again") };
        let host = mmap(null_mut(), SIZE, RW, libc::MAP_PRIVATE | libc::MAP_NORESERVE, Some(file))?;
        Self::of(vec![Part { gpa: 0, host, len: SIZE }], None)
    }

    /// The kernel is a part by itself, in place where it runs: a private mapping of a file that holds it.
    fn with_bundle(vmlinux: &Path) -> Result<Self> {
        const MOST: usize = 128 << 20;
        let scratch = GuestAddress(KERNEL);
        let scratch: GuestMemoryMmap<()> = GuestMemoryMmap::from_ranges(&[(scratch, MOST)]).context("scratch RAM")?;
        let mut elf = File::open(vmlinux).with_context(|| format!("cannot read {}", vmlinux.display()))?;
        let loaded = Elf::load(&scratch, None, &mut elf, None).context("the ELF file")?;
        let len = (loaded.kernel_end - KERNEL).next_multiple_of(HUGE as u64) as usize;
        let mut file = memfd(len)?;
        scratch.write_all_volatile_to(GuestAddress(KERNEL), &mut file, len).context("the bundle")?;
        let bundle = mmap(null_mut(), len, RW, libc::MAP_PRIVATE, Some(&file))?;
        let end = KERNEL + len as u64;
        let anonymous = |gpa: u64, len: usize| Ok(Part { gpa, host: mmap(null_mut(), len, RW, ANONYMOUS, None)?, len });
        let parts: Result<Vec<Part>> = [
            anonymous(0, KERNEL as usize),
            Ok(Part { gpa: KERNEL, host: bundle, len }),
            anonymous(end, SIZE - end as usize),
        ]
        .into_iter()
        .collect();
        Self::of(parts?, None)
    }
}
