//! RAM in huge pages of hugetlbfs, as VMMs have it by MFD_HUGETLB, by a file on a mount, and by MAP_HUGETLB.
//! Documentation/admin-guide/mm/hugetlbpage.rst.
#![expect(unsafe_code, reason = "mappings are made and discarded by hand: that is what is tested")]

use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::PathBuf;
use std::ptr::null_mut;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use softkvm_tests::inside::inside;

use crate::guest::Probe;

const WITHIN: Duration = Duration::from_secs(120);
const PAGE: usize = 4096;
const HUGE: usize = 2 << 20;
/// Each form is of so many huge pages.
const LEN: usize = 3 * HUGE;
/// A border of two slots that is none of huge pages: QEMU's RAM ends there below the frame buffer of a VGA.
const BORDER: usize = 0xa_0000;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// How many huge pages the kernel keeps.
const KEPT: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages that the kernel keeps for these tests, until dropped.
struct Kept {
    before: u64,
    /// Each test is a process of its own.
    _one: Flock<File>,
}

impl Kept {
    /// `None`: there are none to be had.
    fn new() -> Option<Self> {
        let lock = File::create(std::env::temp_dir().join("softkvm-huge.lock")).expect("a file");
        let one = Flock::lock(lock, FlockArg::LockExclusive).expect("its lock");
        let now = || fs::read_to_string(KEPT).ok()?.trim().parse().ok();
        let Some(before) = now() else {
            println!("not tested: the kernel has no huge pages");
            return None;
        };
        // Private ones are copied before they are given up.
        let wanted = before + 4 * (LEN / HUGE) as u64;
        let kept = Self { before, _one: one };
        let raised = fs::write(KEPT, wanted.to_string()).is_ok();
        if !raised || now().is_none_or(|got: u64| got < wanted) {
            println!("not tested: {KEPT} cannot be raised from {before} to {wanted}");
            return None;
        }
        Some(kept)
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        fs::write(KEPT, self.before.to_string()).expect("what could be raised can be put back");
    }
}

/// RAM, and the file that is behind it.
struct Form {
    host: *mut u8,
    file: Option<File>,
}

impl Form {
    fn of(flags: i32, file: Option<File>) -> Self {
        let fd = file.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let host = unsafe { libc::mmap(null_mut(), LEN, RW, flags, fd, 0) };
        assert_ne!(host, libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        Self { host: host.cast(), file }
    }

    fn peek(&self, offset: usize) -> u32 {
        // SAFETY: inside of the mapping.
        unsafe { self.host.wrapping_add(offset).cast::<u32>().read_volatile() }
    }

    fn poke(&self, offset: usize, value: u32) {
        // SAFETY: as above.
        unsafe { self.host.wrapping_add(offset).cast::<u32>().write_volatile(value) };
    }

    /// madvise(2): whole huge pages only.
    fn discard(&self, offset: usize) {
        // SAFETY: as above; what is there may go.
        let result = unsafe { libc::madvise(self.host.wrapping_add(offset).cast(), HUGE, libc::MADV_DONTNEED) };
        assert_eq!(result, 0, "madvise: {}", std::io::Error::last_os_error());
    }

    /// Its pages are the kernel's huge ones still.
    fn is_huge(&self) -> bool {
        let smaps = fs::read_to_string("/proc/self/smaps").expect("smaps");
        let start = format!("{:x}-", self.host as usize);
        let area = smaps.lines().skip_while(|line| !line.starts_with(&start));
        let size = area.skip(1).find(|line| line.starts_with("KernelPageSize:")).expect("it is mapped");
        size.contains(" 2048 kB")
    }
}

impl Drop for Form {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no guest of a test lives longer.
        let result = unsafe { libc::munmap(self.host.cast(), LEN) };
        assert_eq!(result, 0, "munmap: {}", std::io::Error::last_os_error());
    }
}

fn memfd() -> Form {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"ram".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_HUGETLB) };
    assert!(fd >= 0, "memfd_create: {}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new, and nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(LEN as u64).expect("ftruncate");
    Form::of(libc::MAP_SHARED, Some(file))
}

/// A file on a hugetlbfs that nobody sees any more.
fn file_on_a_mount() -> File {
    let folder: PathBuf = std::env::temp_dir().join(format!("softkvm-huge-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder");
    let none = None::<&str>;
    nix::mount::mount(Some("none"), &folder, Some("hugetlbfs"), nix::mount::MsFlags::empty(), none).expect("mount");
    let path = folder.join("ram");
    let file = File::options().read(true).write(true).create_new(true).open(&path);
    fs::remove_file(&path).expect("it is ours");
    nix::mount::umount2(&folder, nix::mount::MntFlags::MNT_DETACH).expect("umount");
    fs::remove_dir(&folder).expect("it is ours");
    let file = file.expect("a file");
    file.set_len(LEN as u64).expect("ftruncate");
    file
}

fn shared_file() -> Form {
    Form::of(libc::MAP_SHARED, Some(file_on_a_mount()))
}

fn private_file() -> Form {
    Form::of(libc::MAP_PRIVATE, Some(file_on_a_mount()))
}

fn anonymous() -> Form {
    Form::of(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB, None)
}

fn shared_anonymous() -> Form {
    Form::of(libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB, None)
}

/// A name, how it is made, and whether a discarded page still holds what it did.
type Kind = (&'static str, fn() -> Form, bool);

const FORMS: &[Kind] = &[
    ("memfd", memfd, true),
    ("file, shared", shared_file, true),
    ("anonymous, shared", shared_anonymous, true),
    ("file, private", private_file, false),
    ("anonymous, private", anonymous, false),
];

/// Offsets at ends of small and huge pages, and beside the border.
const LOOKS: [usize; 8] = [0, PAGE, BORDER - 4, BORDER, HUGE - PAGE, HUGE, 2 * HUGE + 5 * PAGE, LEN - PAGE];

/// What each writes the other sees.
fn shared(probe: &mut Probe, form: &Form, shown: usize, when: &str) {
    for offset in LOOKS.into_iter().filter(|offset| *offset < shown) {
        let value = 0x1000_0000 + offset as u32;
        form.poke(offset, value);
        assert_eq!(probe.read(offset), value, "{when}, {offset:x}: the VMM wrote");
        probe.write(offset, !value);
        assert_eq!(form.peek(offset), !value, "{when}, {offset:x}: the guest wrote");
    }
}

#[test]
fn guest_and_vmm_see_what_the_other_writes() {
    inside("huge::guest_and_vmm_see_what_the_other_writes", WITHIN, || {
        let Some(_kept) = Kept::new() else { return };
        for (name, make, is_shared) in FORMS {
            let form = make();
            form.poke(HUGE + PAGE, 0xaaaa_0001);
            let mut probe = Probe::new();
            probe.show(form.host, LEN);
            assert_eq!(probe.read(HUGE + PAGE), 0xaaaa_0001, "{name}: from before");
            shared(&mut probe, &form, LEN, name);
            if *is_shared {
                assert!(form.is_huge(), "{name}");
            }
        }
    });
}

/// A slot of a part that ends within a huge page.
#[test]
fn a_slot_may_end_within_a_huge_page() {
    inside("huge::a_slot_may_end_within_a_huge_page", WITHIN, || {
        let Some(_kept) = Kept::new() else { return };
        for (name, make, _) in FORMS {
            let form = make();
            form.poke(BORDER, 0xaaaa_0002);
            let mut probe = Probe::new();
            probe.show(form.host, BORDER);
            shared(&mut probe, &form, BORDER, name);
            assert_eq!(form.peek(BORDER), 0xaaaa_0002, "{name}: behind the slot");
        }
    });
}

/// madvise(2), `MADV_DONTNEED`: what is shared stays what it was, what is private is zeros again, or the file's.
#[test]
fn discarded_pages_are_what_the_vmm_finds_there() {
    inside("huge::discarded_pages_are_what_the_vmm_finds_there", WITHIN, || {
        let Some(_kept) = Kept::new() else { return };
        for (name, make, keeps) in FORMS {
            let form = make();
            let mut probe = Probe::new();
            probe.show(form.host, LEN);
            for offset in LOOKS {
                probe.write(offset, 0xbbbb_0000 + offset as u32);
            }
            form.discard(HUGE);
            for offset in LOOKS {
                let gone = !keeps && (HUGE..2 * HUGE).contains(&offset);
                let expected = if gone { 0 } else { 0xbbbb_0000 + offset as u32 };
                assert_eq!((form.peek(offset), probe.read(offset)), (expected, expected), "{name}, {offset:x}");
            }
            shared(&mut probe, &form, LEN, name);
        }
    });
}

/// As a balloon does with shared RAM: fallocate(2), `FALLOC_FL_PUNCH_HOLE`.
#[test]
fn holes_in_the_file_are_zeros_for_both() {
    inside("huge::holes_in_the_file_are_zeros_for_both", WITHIN, || {
        let Some(_kept) = Kept::new() else { return };
        for (name, make, _) in FORMS {
            let form = make();
            let Some(file) = form.file.as_ref().filter(|_| !name.contains("private")) else { continue };
            let mut probe = Probe::new();
            probe.show(form.host, LEN);
            probe.write(HUGE, 0xcccc_0001);
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            // SAFETY: the descriptor is the form's.
            let result = unsafe { libc::fallocate(file.as_raw_fd(), mode, HUGE as i64, HUGE as i64) };
            assert_eq!(result, 0, "{name}");
            assert_eq!((form.peek(HUGE), probe.read(HUGE)), (0, 0), "{name}");
            shared(&mut probe, &form, LEN, name);
        }
    });
}
