//! Shared memory of the daemon and a client: guest RAM and `kvm_run` pages.
//!
//! A [`Mapping`] is a range of a file (a memfd of ours, or memory of the client's own) mapped shared into the daemon. It is
//! never executable, and the child of a fork does not inherit it. The client can truncate or punch a file of its own at any
//! time: `sigbus.rs` keeps the daemon alive.
#![expect(unsafe_code, reason = "mmap and munmap")]

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use x86_defs::PAGE_BYTES;

use crate::host::{HostPtr, Span};
use crate::sigbus;

/// Size of a transparent huge page; mappings at least this large are placed so that the host can use them.
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// What a mapping may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// Reads only: a file that the client itself has open for reading.
    Read,
    /// Reads and writes.
    ReadWrite,
}

/// A piece of a file for [`Mapping::join`].
#[derive(Clone, Debug)]
pub struct Piece {
    /// Where the bytes are.
    pub mapping: Arc<Mapping>,
    /// First byte, counted from the start of `mapping`.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// A shared, never executable mapping of a file. Unmapped on drop.
pub struct Mapping {
    span: Span,
    /// The files behind the bytes, in ascending order; more than one only after [`Mapping::join`].
    parts: Vec<Part>,
    sigbus: sigbus::Registration,
    _reservation: Reservation,
}

/// One file range behind a mapping.
struct Part {
    file: Arc<OwnedFd>,
    file_offset: u64,
    len: u64,
}

impl Mapping {
    /// Makes a zero-filled memfd of `len` bytes (rounded up to whole pages), seals its size and maps it.
    /// `name` shows in `/proc/PID/maps` of everyone who maps it.
    pub fn create(name: &str, len: u64) -> io::Result<Arc<Self>> {
        let len = len.checked_next_multiple_of(PAGE_BYTES).ok_or(Errno::EFBIG)?;
        let file = File::from(memfd(name)?);
        file.set_len(len)?;
        // A client that receives this file can change its contents, never its size: no access of ours can miss.
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL))?;
        Self::of_file(file.into(), 0, len, Protection::ReadWrite)
    }

    /// Maps `[offset, offset + len)` of `file`, both multiples of the file's page size. The file may be shorter.
    pub fn of_file(file: OwnedFd, offset: u64, len: u64, protection: Protection) -> io::Result<Arc<Self>> {
        Self::of_parts(vec![Part { file: Arc::new(file), file_offset: offset, len }], protection)
    }

    /// Maps the pieces one behind the other, so that a memory slot made of several files is one range of host addresses.
    /// Every piece is a multiple of its file's page size and starts on one. Writable if every piece is.
    pub fn join(pieces: &[Piece]) -> io::Result<Arc<Self>> {
        let mut parts = Vec::new();
        let mut protection = Protection::ReadWrite;
        for piece in pieces {
            if !piece.mapping.writable() {
                protection = Protection::Read;
            }
            let mut at = 0;
            let end =
                piece.offset.checked_add(piece.len).filter(|&end| end <= piece.mapping.len()).ok_or(Errno::EINVAL)?;
            for part in &piece.mapping.parts {
                let (start, stop) = (piece.offset.max(at), end.min(at + part.len));
                if start < stop {
                    let file_offset = part.file_offset + (start - at);
                    parts.push(Part { file: part.file.clone(), file_offset, len: stop - start });
                }
                at += part.len;
            }
        }
        Self::of_parts(parts, protection)
    }

    fn of_parts(parts: Vec<Part>, protection: Protection) -> io::Result<Arc<Self>> {
        let len = parts.iter().try_fold(0_u64, |sum, part| sum.checked_add(part.len)).ok_or(Errno::ENOMEM)?;
        let first = parts.first().ok_or(Errno::EINVAL)?;
        let mut page_bytes = PAGE_BYTES;
        for part in &parts {
            page_bytes = page_bytes.max(file_page_bytes(part.file.as_fd())?);
        }
        if len == 0 || parts.iter().any(|part| (part.len | part.file_offset) % page_bytes != 0) {
            return Err(Errno::EINVAL.into());
        }
        let reservation = Reservation::new(len, first.file_offset, page_bytes)?;
        let flags = match protection {
            Protection::Read => ProtFlags::PROT_READ,
            Protection::ReadWrite => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        };
        let mut at = 0;
        for part in &parts {
            reservation.place(at, part, flags)?;
            at += part.len;
        }
        reservation.advise(page_bytes);
        let registration = sigbus::register(reservation.base.as_ptr() as usize, len as usize, page_bytes as usize);
        // SAFETY: `place` mapped all of [base, base+len) with these rights; `reservation` lives as long as the span and
        // unmaps on drop only. Accesses beyond a file's end are answered by the SIGBUS handler.
        let span = unsafe { Span::new(reservation.base, len, protection == Protection::ReadWrite) };
        Ok(Arc::new(Self { span, parts, sigbus: registration, _reservation: reservation }))
    }

    /// Bytes mapped.
    pub fn len(&self) -> u64 {
        self.span.bytes()
    }

    /// Whether it maps nothing; never true.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the mapping may be written.
    pub fn writable(&self) -> bool {
        self.span.writable()
    }

    /// The file behind the first byte: behind all of them unless the mapping was joined.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.parts[0].file.as_fd()
    }

    /// What lies behind the bytes, in ascending order: where it begins, the file, where in that, and how many bytes.
    pub fn files(&self) -> impl Iterator<Item = (u64, BorrowedFd<'_>, u64, u64)> {
        self.parts.iter().scan(0, |at, part| {
            let start = *at;
            *at += part.len;
            Some((start, part.file.as_fd(), part.file_offset, part.len))
        })
    }

    /// There are several pieces of files behind it.
    pub fn is_joined(&self) -> bool {
        self.parts.len() > 1
    }

    /// Where in [`Mapping::file`] the first byte is.
    pub fn file_offset(&self) -> u64 {
        self.parts[0].file_offset
    }

    /// The host address of `offset`, if `[offset, offset + len)` is inside; good while this mapping lives.
    pub fn host(&self, offset: u64, len: u64) -> Option<HostPtr> {
        if len == 0 { None } else { self.span.part(offset, len).map(|part| part.host(0)) }
    }

    /// Copies out; `None`, and nothing copied, if it is not all inside.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Option<()> {
        self.span.read(offset, buf)
    }

    /// Copies in; `None`, and nothing copied, if it is not all inside or the mapping not writable.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Option<()> {
        self.span.write(offset, bytes)
    }

    /// Whether the file lost pages while the mapping was in use: those show zeros of the daemon's own from then on, even
    /// if the file grows again. Not to be used for another slot.
    pub fn is_torn(&self) -> bool {
        self.sigbus.filled() > 0
    }

    /// Gives `[offset, offset + len)` back to the host; it reads as zeros from then on, in every process that maps it.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.checked_add(len).filter(|&end| end <= self.len()).ok_or(Errno::EINVAL)?;
        let mut at = 0;
        for part in &self.parts {
            let (start, stop) = (offset.max(at), end.min(at + part.len));
            if start < stop {
                let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let from = part.file_offset + (start - at);
                fallocate(part.file.as_fd(), mode, from as libc::off_t, (stop - start) as libc::off_t)?;
            }
            at += part.len;
        }
        Ok(())
    }

    pub(crate) fn span(&self, offset: u64, len: u64) -> Option<Span> {
        self.span.part(offset, len)
    }
}

macro_rules! typed {
    ($($load:ident $store:ident $reference:ident $atomic:ident $value:ty;)*) => {
        impl Mapping {$(
            /// One load at a byte offset; `None` if misaligned or not inside.
            #[inline]
            pub fn $load(&self, offset: u64) -> Option<$value> {
                self.span.$load(offset)
            }

            /// One store at a byte offset; `None` if misaligned, not inside, or the mapping is not writable.
            #[inline]
            pub fn $store(&self, offset: u64, value: $value) -> Option<()> {
                self.span.$store(offset, value)
            }

            /// The value at a byte offset as an atomic; `None` if misaligned, not inside, or the mapping not writable.
            #[inline]
            pub fn $reference(&self, offset: u64) -> Option<&$atomic> {
                if self.writable() { self.span.$reference(offset) } else { None }
            }
        )*}
    };
}

typed! {
    load_u8  store_u8  atomic_u8  AtomicU8  u8;
    load_u16 store_u16 atomic_u16 AtomicU16 u16;
    load_u32 store_u32 atomic_u32 AtomicU32 u32;
    load_u64 store_u64 atomic_u64 AtomicU64 u64;
}

impl std::fmt::Debug for Mapping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let fds: Vec<_> = self.parts.iter().map(|part| part.file.as_raw_fd()).collect();
        write!(f, "Mapping {{ bytes: {:#x}, fds: {fds:?}, file_offset: {:#x} }}", self.len(), self.file_offset())
    }
}

/// A memfd that cannot be made executable, where the kernel knows that flag (6.3).
fn memfd(name: &str) -> io::Result<OwnedFd> {
    let name = std::ffi::CString::new(name)?;
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let no_exec = MFdFlags::from_bits_retain(flags.bits() | libc::MFD_NOEXEC_SEAL);
    match memfd_create(name.as_c_str(), no_exec) {
        Err(Errno::EINVAL) => Ok(memfd_create(name.as_c_str(), flags)?),
        result => Ok(result?),
    }
}

/// The page size of the file: that of its hugetlbfs, otherwise 4096.
pub fn file_page_bytes(file: BorrowedFd<'_>) -> io::Result<u64> {
    let info = fstatfs(file)?;
    Ok(if info.filesystem_type() == HUGETLBFS_MAGIC { info.block_size() as u64 } else { PAGE_BYTES })
}

/// A range of addresses that is ours until drop.
struct Reservation {
    base: NonNull<u8>,
    len: NonZeroUsize,
}

// SAFETY: owning an address range is not tied to a thread.
unsafe impl Send for Reservation {}
// SAFETY: no method touches the memory through `&self` once the mapping is made.
unsafe impl Sync for Reservation {}

impl Reservation {
    /// `len` bytes of address space such that a huge page of the file can be a huge page here: base and `file_offset` are
    /// equal modulo the huge-page size.
    fn new(len: u64, file_offset: u64, page_bytes: u64) -> io::Result<Self> {
        let align = if len >= HUGE_PAGE_BYTES { page_bytes.max(HUGE_PAGE_BYTES) } else { page_bytes };
        let slack = if align == PAGE_BYTES { 0 } else { align };
        let length = |bytes: u64| NonZeroUsize::new(bytes as usize).ok_or(Errno::EINVAL);
        let total = length(len.checked_add(slack).ok_or(Errno::ENOMEM)?)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new range at an address of the kernel's choice, without access rights.
        let start = unsafe { mmap_anonymous(None, total, ProtFlags::PROT_NONE, flags) }?.cast::<u8>();
        let (low, high) = (start.as_ptr() as u64, start.as_ptr() as u64 + total.get() as u64);
        let base = low + (file_offset.wrapping_sub(low) & if slack == 0 { 0 } else { align - 1 });
        let trim = |from: u64, to: u64| {
            if let (Some(at), true) = (NonNull::new(from as *mut libc::c_void), from < to) {
                // SAFETY: [from, to) is an end of the range made above, which nobody uses yet.
                unsafe { munmap(at, (to - from) as usize) }?;
            }
            Ok::<_, Errno>(())
        };
        trim(low, base)?;
        trim(base + len, high)?;
        let base = NonNull::new(base as *mut u8).ok_or(Errno::ENOMEM)?;
        Ok(Self { base, len: length(len)? })
    }

    /// Maps `part` at `at` bytes from the start.
    fn place(&self, at: u64, part: &Part, protection: ProtFlags) -> io::Result<()> {
        let address = NonZeroUsize::new(self.base.as_ptr() as usize + at as usize);
        let len = NonZeroUsize::new(part.len as usize).ok_or(Errno::EINVAL)?;
        let offset = libc::off_t::try_from(part.file_offset).map_err(|_| Errno::EOVERFLOW)?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED | MapFlags::MAP_NORESERVE;
        // SAFETY: replaces a piece of this reservation (`of_parts` summed the lengths), which nobody uses yet.
        unsafe { mmap(address, len, protection, flags, part.file.as_fd(), offset) }?;
        Ok(())
    }

    /// Hints, whose failure changes nothing but speed and what a fork copies.
    fn advise(&self, page_bytes: u64) {
        let advise = |advice| {
            // SAFETY: neither advice changes contents or access rights of this range of ours.
            let _ = unsafe { madvise(self.base.cast(), self.len.get(), advice) };
        };
        advise(MmapAdvise::MADV_DONTFORK);
        if self.len.get() as u64 >= HUGE_PAGE_BYTES && page_bytes == PAGE_BYTES {
            advise(MmapAdvise::MADV_HUGEPAGE);
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the range is ours, and the owner of this reservation, hence every span into it, is gone.
        let _ = unsafe { munmap(self.base.cast(), self.len.get()) };
    }
}
