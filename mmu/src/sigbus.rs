//! A client may truncate the file behind guest RAM while the daemon uses it; the access then raises SIGBUS.
//!
//! The handler puts an anonymous zero page over the hole, so the guest goes on with zeros there and the daemon with its
//! other VMs. Everything that the handler does is async-signal-safe: it scans a list of registered ranges that only ever
//! grows, without a lock, and makes one system call. Addresses that are not ours go to the handler that was there before.
#![expect(unsafe_code, reason = "a signal handler, and mmap over the faulting page")]

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Once, OnceLock};

use parking_lot::Mutex;

/// Ranges in one link of the list. A VM has a few mappings, a daemon a few VMs.
const LINK_RANGES: usize = 64;

/// One registered range. `start` is written last on registration and first on release, 0 means unused.
struct Range {
    start: AtomicUsize,
    end: AtomicUsize,
    page_bytes: AtomicUsize,
    /// Holes filled so far.
    filled: AtomicUsize,
}

impl Range {
    const fn unused() -> Self {
        Self {
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            page_bytes: AtomicUsize::new(0),
            filled: AtomicUsize::new(0),
        }
    }
}

/// One link of the list.
struct Link {
    ranges: [Range; LINK_RANGES],
    next: AtomicPtr<Link>,
}

impl Link {
    const fn new() -> Self {
        Self { ranges: [const { Range::unused() }; LINK_RANGES], next: AtomicPtr::new(ptr::null_mut()) }
    }

    fn next(&self) -> Option<&'static Link> {
        // SAFETY: the pointer is null or a link that `register` leaked, which is never freed nor moved.
        unsafe { self.next.load(Ordering::Acquire).as_ref() }
    }
}

static HEAD: Link = Link::new();
static WRITER: Mutex<()> = Mutex::new(());
static INSTALL: Once = Once::new();
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// A range is registered for as long as this lives.
pub(crate) struct Registration(&'static Range);

/// Registers the mapping `[start, start + len)`, whose file has pages of `page_bytes`; the first one installs the handler.
pub(crate) fn register(start: usize, len: usize, page_bytes: usize) -> Registration {
    INSTALL.call_once(install);
    let _writer = WRITER.lock();
    let mut link = &HEAD;
    loop {
        if let Some(range) = link.ranges.iter().find(|range| range.start.load(Ordering::Relaxed) == 0) {
            range.end.store(start + len, Ordering::Relaxed);
            range.page_bytes.store(page_bytes, Ordering::Relaxed);
            range.filled.store(0, Ordering::Relaxed);
            range.start.store(start, Ordering::Release);
            return Registration(range);
        }
        link = link.next().unwrap_or_else(|| {
            let new: &'static Link = Box::leak(Box::new(Link::new()));
            link.next.store(ptr::from_ref(new).cast_mut(), Ordering::Release);
            new
        });
    }
}

impl Registration {
    /// Pages of the range that show zeros of our own, no longer the file.
    pub(crate) fn filled(&self) -> usize {
        self.0.filled.load(Ordering::Acquire)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let _writer = WRITER.lock();
        self.0.start.store(0, Ordering::Release);
    }
}

/// The registered mapping that holds `address`. A thread faults inside a mapping that it keeps alive, so
/// the range it looks for stands still; one that changes meanwhile is another, and `start` read twice rules it out.
fn range_of(address: usize) -> Option<&'static Range> {
    let mut link = Some(&HEAD);
    while let Some(here) = link {
        for range in &here.ranges {
            let start = range.start.load(Ordering::Acquire);
            let inside = start != 0 && (start..range.end.load(Ordering::Acquire)).contains(&address);
            if inside && range.start.load(Ordering::Acquire) == start {
                return Some(range);
            }
        }
        link = here.next();
    }
    None
}

fn install() {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    let mut previous = MaybeUninit::<libc::sigaction>::zeroed();
    let action = action.as_mut_ptr();
    // SAFETY: a zeroed sigaction is a valid one: default action, empty mask.
    let action = unsafe { &mut *action };
    action.sa_sigaction = on_sigbus as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
    // SAFETY: both point to whole structures; the handler is async-signal-safe.
    let failed = unsafe { libc::sigaction(libc::SIGBUS, action, previous.as_mut_ptr()) };
    assert_eq!(failed, 0, "SIGBUS takes a handler");
    // SAFETY: the call above filled it in; zeroed is valid as well.
    let previous = unsafe { previous.assume_init() };
    let _ = PREVIOUS.set(previous);
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a whole siginfo to an SA_SIGINFO handler, and nobody else knows of it.
    let details = unsafe { &*info };
    let code = details.si_code;
    // SAFETY: SIGBUS has an address in its siginfo; for a code without one the lookup fails.
    let address = unsafe { details.si_addr() } as usize;
    // BUS_ADRERR: the file has no such page. The other codes are machine checks, which zeros must not hide.
    if code == libc::BUS_ADRERR
        && let Some(range) = range_of(address)
        && fill_hole(range, address)
    {
        return;
    }
    // 0 and below: somebody's kill(), not an access.
    chain(signal, info, context, code <= 0);
}

/// Maps anonymous zeros over one page. A system call and little else; errno is restored for the code interrupted.
fn fill_hole(range: &Range, address: usize) -> bool {
    let page_bytes = range.page_bytes.load(Ordering::Acquire);
    let page = address & !(page_bytes - 1);
    range.filled.fetch_add(1, Ordering::AcqRel);
    // SAFETY: glibc's errno of this thread.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above; a plain integer of this thread.
    let saved = unsafe { *errno };
    // SAFETY: the page lies in a mapping that the faulting thread keeps alive, and its contents are gone anyway. Other
    // threads see zeros or come here themselves, and then find their access done by mapping zeros once more.
    let at = unsafe {
        libc::mmap(
            page as *mut libc::c_void,
            page_bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    // SAFETY: as above.
    unsafe { *errno = saved };
    at != libc::MAP_FAILED
}

/// Does what would have happened without us.
fn chain(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void, sent: bool) {
    let previous = PREVIOUS.get();
    match previous.map(|action| (action.sa_sigaction, action.sa_flags)) {
        Some((handler, flags)) if handler != libc::SIG_DFL && handler != libc::SIG_IGN => {
            if flags & libc::SA_SIGINFO != 0 {
                // SAFETY: a non-default sa_sigaction with SA_SIGINFO is a function of this type.
                let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                    unsafe { std::mem::transmute(handler) };
                handler(signal, info, context);
            } else {
                // SAFETY: without SA_SIGINFO it is a function of this type.
                let handler: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(handler) };
                handler(signal);
            }
        }
        Some((libc::SIG_IGN, _)) if sent => {}
        _ => {
            // SAFETY: async-signal-safe.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
            if sent {
                // SAFETY: as above. The handler does not block the signal, so this one ends the process.
                unsafe { libc::raise(signal) };
            }
            // Otherwise the faulting instruction runs again and now ends the process as SIGBUS does.
        }
    }
}
