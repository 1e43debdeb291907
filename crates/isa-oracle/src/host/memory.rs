#![expect(unsafe_code, reason = "memory that another process writes, and futexes in it")]
//! The shared memory as the harness sees it: copied in and out, never borrowed, since the child writes it.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use memmap2::MmapRaw;
use nix::sys::memfd::{MFdFlags, memfd_create};

/// A memfd and our mapping of it.
pub(super) struct SharedMemory {
    fd: OwnedFd,
    map: MmapRaw,
}

impl SharedMemory {
    pub(super) fn new(bytes: u64) -> std::io::Result<Self> {
        let fd = memfd_create(c"isa-oracle", MFdFlags::MFD_CLOEXEC)?;
        nix::unistd::ftruncate(&fd, bytes as i64)?;
        let map = MmapRaw::map_raw(&fd)?;
        Ok(Self { fd, map })
    }

    pub(super) fn fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }

    fn pointer(&self, offset: u64, bytes: usize) -> *mut u8 {
        let offset = offset as usize;
        assert!(offset + bytes <= self.map.len(), "inside the shared memory");
        self.map.as_mut_ptr().wrapping_add(offset)
    }

    pub(super) fn write(&self, offset: u64, bytes: &[u8]) {
        let to = self.pointer(offset, bytes.len());
        // SAFETY: `pointer` checked the range; `bytes` is no part of the mapping, which is never borrowed. The child does
        // not look at it before the futex hand-over.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    pub(super) fn read(&self, offset: u64, bytes: &mut [u8]) {
        let from = self.pointer(offset, bytes.len());
        // SAFETY: `pointer` checked the range, and `bytes` is no part of it; the child is done with the batch, or gone.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
    }

    fn word(&self, offset: u64) -> &AtomicU32 {
        let pointer = self.pointer(offset, 4).cast::<u32>();
        assert!(pointer.is_aligned(), "futex words are aligned");
        // SAFETY: in range, aligned, lives as long as `self`, and both sides access it atomically.
        unsafe { AtomicU32::from_ptr(pointer) }
    }

    pub(super) fn load(&self, offset: u64) -> u32 {
        self.word(offset).load(Ordering::Acquire)
    }

    pub(super) fn store(&self, offset: u64, value: u32) {
        self.word(offset).store(value, Ordering::Release);
    }

    /// Wakes the child waiting on the word.
    pub(super) fn wake(&self, offset: u64) {
        // SAFETY: FUTEX_WAKE only takes the word's address, which is valid.
        unsafe { libc::syscall(libc::SYS_futex, self.word(offset).as_ptr(), libc::FUTEX_WAKE, 1) };
    }

    /// Waits while the word is `seen`; false when `limit` passed.
    pub(super) fn wait(&self, offset: u64, seen: u32, limit: Duration) -> bool {
        let limit = libc::timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
        // SAFETY: the word and the timeout are valid for the call, which keeps neither.
        let result =
            unsafe { libc::syscall(libc::SYS_futex, self.word(offset).as_ptr(), libc::FUTEX_WAIT, seen, &limit) };
        result == 0 || std::io::Error::last_os_error().raw_os_error() != Some(libc::ETIMEDOUT)
    }
}

/// Address and size of the calling thread's rseq area, where the C library (glibc 2.35 and later) registered one.
pub(super) fn rseq() -> super::sandbox::Rseq {
    // SAFETY: looks a name up, nothing more.
    let offset = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()) };
    // SAFETY: as above.
    let size = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_size".as_ptr()) };
    if offset.is_null() || size.is_null() {
        return None;
    }
    // SAFETY: glibc documents `__rseq_offset` as a constant `ptrdiff_t`.
    let offset = unsafe { offset.cast::<isize>().read() };
    // SAFETY: and `__rseq_size` as a constant `unsigned int`.
    let size = unsafe { size.cast::<u32>().read() };
    let thread: u64;
    // SAFETY: on x86-64 the first word of the thread control block holds its own address.
    unsafe { std::arch::asm!("mov {}, fs:[0]", out(reg) thread, options(nostack, readonly, preserves_flags)) };
    Some((thread.wrapping_add_signed(offset as i64), u64::from(size)))
}
