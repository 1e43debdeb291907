//! The forms, and what is done to them.
#![expect(unsafe_code, reason = "mappings are made, replaced and discarded by hand: that is what is tested")]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::null_mut;
use std::time::{Duration, Instant};

use softkvm_tests::inside::inside;

use crate::guest::Probe;

const WITHIN: Duration = Duration::from_secs(120);
const PAGE: usize = 4096;
/// Each form is of so many pages.
const PAGES: usize = 16;
const LEN: usize = PAGES * PAGE;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const ANONYMOUS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

fn mmap(at: *mut u8, len: usize, prot: i32, flags: i32, file: Option<&File>) -> *mut u8 {
    // SAFETY: MAP_FIXED is only given for what a test itself mapped.
    let got = unsafe { libc::mmap(at.cast(), len, prot, flags, file.map_or(-1, AsRawFd::as_raw_fd), 0) };
    assert_ne!(got, libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
    got.cast()
}

fn memfd(len: usize) -> File {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"ram".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "memfd_create: {}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new, and nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len as u64).expect("ftruncate");
    file
}

/// A word of the VMM's own memory, as the VMM sees it.
fn peek(host: *mut u8, offset: usize) -> u32 {
    // SAFETY: tests stay inside what they mapped.
    unsafe { host.wrapping_add(offset).cast::<u32>().read_volatile() }
}

fn poke(host: *mut u8, offset: usize, value: u32) {
    // SAFETY: as above.
    unsafe { host.wrapping_add(offset).cast::<u32>().write_volatile(value) };
}

fn discard(host: *mut u8, offset: usize, len: usize) {
    // SAFETY: as above; what is there may go.
    let result = unsafe { libc::madvise(host.wrapping_add(offset).cast(), len, libc::MADV_DONTNEED) };
    assert_eq!(result, 0, "madvise: {}", std::io::Error::last_os_error());
}

/// Guest and VMM see the same word at the start of each page.
fn agree(probe: &mut Probe, host: *mut u8, when: &str) {
    for page in 0..PAGES {
        let (guest, own) = (probe.read(page * PAGE), peek(host, page * PAGE));
        assert_eq!(guest, own, "{when}, page {page}: left what the guest reads, right what the VMM does");
    }
}

/// What each writes the other sees.
fn shared(probe: &mut Probe, host: *mut u8, when: &str) {
    for page in 0..PAGES {
        let value = 0x1000_0000 + page as u32;
        poke(host, page * PAGE + 8, value);
        assert_eq!(probe.read(page * PAGE + 8), value, "{when}, page {page}: the VMM wrote");
        probe.write(page * PAGE + 12, !value);
        assert_eq!(peek(host, page * PAGE + 12), !value, "{when}, page {page}: the guest wrote");
    }
}

/// A form of RAM: where it is, and what keeps it.
struct Form {
    host: *mut u8,
    file: Option<File>,
}

fn anonymous() -> Form {
    Form { host: mmap(null_mut(), LEN, RW, ANONYMOUS | libc::MAP_NORESERVE, None), file: None }
}

/// In the middle of a reservation that is larger.
fn reservation() -> Form {
    let whole = mmap(null_mut(), 4 * LEN, libc::PROT_NONE, ANONYMOUS | libc::MAP_NORESERVE, None);
    Form { host: mmap(whole.wrapping_add(LEN), LEN, RW, ANONYMOUS | libc::MAP_FIXED, None), file: None }
}

/// Two areas of different rights once, now of the same.
fn memory_of_two_areas() -> Form {
    let host = mmap(null_mut(), LEN, RW, ANONYMOUS, None);
    mmap(host.wrapping_add(LEN / 2), LEN / 2, RW, libc::MAP_SHARED | libc::MAP_FIXED, Some(&memfd(LEN / 2)));
    Form { host, file: None }
}

fn shared_memfd() -> Form {
    let file = memfd(LEN);
    Form { host: mmap(null_mut(), LEN, RW, libc::MAP_SHARED, Some(&file)), file: Some(file) }
}

/// As a snapshot is restored.
fn private_file() -> Form {
    use std::os::unix::fs::FileExt;
    let path = std::env::temp_dir().join(format!("softkvm-ram-{}", std::process::id()));
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).expect("a file");
    std::fs::remove_file(&path).expect("it is ours");
    for page in 0..PAGES {
        file.write_all_at(&(0xf11e_0000 + page as u32).to_le_bytes(), (page * PAGE) as u64).expect("a page");
    }
    file.set_len(LEN as u64).expect("ftruncate");
    Form { host: mmap(null_mut(), LEN, RW, libc::MAP_PRIVATE, Some(&file)), file: Some(file) }
}

/// The data segment of this program file, as libkrun's kernel is that of a library: page-aligned, and not zero.
fn data_segment() -> Form {
    #[repr(C, align(4096))]
    struct Aligned([u32; LEN / 4]);
    static mut DATA: Aligned = Aligned([0xda7a_5e60; LEN / 4]);
    Form { host: (&raw mut DATA).cast(), file: None }
}

/// A name, and how it is made.
type Kind = (&'static str, fn() -> Form);

const FORMS: &[Kind] = &[
    ("anonymous", anonymous),
    ("in a reservation", reservation),
    ("of two areas", memory_of_two_areas),
    ("shared memfd", shared_memfd),
    ("private file", private_file),
    ("data segment", data_segment),
];

fn each(test: impl Fn(&str, &mut Probe, &Form)) {
    for (name, make) in FORMS {
        let form = make();
        for page in (0..PAGES).step_by(2) {
            poke(form.host, page * PAGE, 0xaaaa_0000 + page as u32);
        }
        let mut probe = Probe::new();
        probe.show(form.host, LEN);
        agree(&mut probe, form.host, name);
        test(name, &mut probe, &form);
    }
}

#[test]
fn guest_and_vmm_see_what_the_other_writes() {
    inside("forms::guest_and_vmm_see_what_the_other_writes", WITHIN, || {
        each(|name, probe, form| shared(probe, form.host, name));
    });
}

/// RAM that there was before /dev/kvm was opened is no other than RAM that came later.
#[test]
fn ram_may_be_older_than_the_device() {
    inside("forms::ram_may_be_older_than_the_device", WITHIN, || {
        let forms: Vec<_> = FORMS.iter().map(|(name, make)| (name, make())).collect();
        for (name, form) in &forms {
            let mut probe = Probe::new();
            probe.show(form.host, LEN);
            agree(&mut probe, form.host, name);
            shared(&mut probe, form.host, name);
        }
    });
}

/// madvise(2), `MADV_DONTNEED`: the next access finds zeros, or the file's contents; of shared memory what it held.
#[test]
fn discarded_pages_are_what_the_vmm_finds_there() {
    inside("forms::discarded_pages_are_what_the_vmm_finds_there", WITHIN, || {
        let expected: &[(&str, u32)] = &[
            ("anonymous", 0),
            ("in a reservation", 0),
            ("shared memfd", 0xbbbb_0003),
            ("private file", 0xf11e_0003),
            ("data segment", 0xda7a_5e60),
        ];
        each(|name, probe, form| {
            for page in 0..PAGES {
                probe.write(page * PAGE, 0xbbbb_0000 + page as u32);
            }
            discard(form.host, 2 * PAGE, 3 * PAGE);
            agree(probe, form.host, name);
            if let Some((_, value)) = expected.iter().find(|(of, _)| *of == name) {
                assert_eq!(probe.read(3 * PAGE), *value, "{name}: a page that was discarded");
            }
            assert_eq!(probe.read(5 * PAGE), 0xbbbb_0005, "{name}: a page that was not");
            shared(probe, form.host, name);
            // What is written at once afterwards stays.
            for round in 0..200 {
                discard(form.host, 4 * PAGE, PAGE);
                poke(form.host, 4 * PAGE, round);
                assert_eq!(peek(form.host, 4 * PAGE), round, "{name}: written behind a discard");
            }
            agree(probe, form.host, name);
        });
    });
}

/// As a balloon does by mmap: private pages over a part of a slot, without an ioctl afterwards.
#[test]
fn private_memory_mapped_over_a_slot_is_what_the_guest_sees() {
    inside("forms::private_memory_mapped_over_a_slot_is_what_the_guest_sees", WITHIN, || {
        each(|name, probe, form| {
            mmap(form.host.wrapping_add(2 * PAGE), 3 * PAGE, RW, ANONYMOUS | libc::MAP_FIXED, None);
            assert_eq!((probe.read(2 * PAGE), probe.read(4 * PAGE)), (0, 0), "{name}");
            agree(probe, form.host, name);
            shared(probe, form.host, name);
            // Again, over what is there now, and more of it.
            mmap(form.host.wrapping_add(PAGE), 5 * PAGE, RW, ANONYMOUS | libc::MAP_FIXED, None);
            agree(probe, form.host, name);
            shared(probe, form.host, name);
        });
    });
}

/// One thread changes slots, which has memory mapped in it for us, while another maps over a slot: neither waits for the other.
#[test]
fn a_thread_maps_over_a_slot_while_another_changes_slots() {
    inside("forms::a_thread_maps_over_a_slot_while_another_changes_slots", WITHIN, || {
        const ROUNDS: usize = 200;
        each(|name, probe, form| {
            let at = form.host.wrapping_add(2 * PAGE).expose_provenance();
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    let at = std::ptr::with_exposed_provenance_mut(at);
                    (0..ROUNDS).for_each(|_| _ = mmap(at, 3 * PAGE, RW, ANONYMOUS | libc::MAP_FIXED, None));
                });
                for _ in 0..ROUNDS {
                    let beside = mmap(null_mut(), 4 * PAGE, RW, ANONYMOUS, None);
                    probe.show_beside(beside, 4 * PAGE);
                    probe.show_beside(beside, 0);
                    // SAFETY: it was mapped just now, and nobody uses it.
                    assert_eq!(unsafe { libc::munmap(beside.cast(), 4 * PAGE) }, 0);
                }
            });
            agree(probe, form.host, name);
            shared(probe, form.host, name);
        });
    });
}

/// mremap(2) from one slot into another: the kernel tells of what was there, and of where it came from.
#[test]
fn memory_moved_over_a_slot_is_what_the_guest_sees() {
    inside("forms::memory_moved_over_a_slot_is_what_the_guest_sees", WITHIN, || {
        each(|name, probe, form| {
            let beside = mmap(null_mut(), 4 * PAGE, RW, ANONYMOUS, None);
            poke(beside, 2 * PAGE, 0xcccc_0002);
            probe.show_beside(beside, 4 * PAGE);
            let (from, to) = (beside.wrapping_add(PAGE), form.host.wrapping_add(4 * PAGE));
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            // SAFETY: both ranges were mapped by this test, and nothing but volatile accesses uses them.
            let moved = unsafe { libc::mremap(from.cast(), 3 * PAGE, 3 * PAGE, flags, to) };
            assert_eq!(moved, to.cast(), "{name}: mremap");
            assert_eq!(probe.read(5 * PAGE), 0xcccc_0002, "{name}");
            agree(probe, form.host, name);
            shared(probe, form.host, name);
        });
    });
}

/// As virtio-fs does with DAX: a shared file over a part of a slot, and back.
#[test]
fn a_file_mapped_over_a_slot_is_what_the_guest_sees() {
    inside("forms::a_file_mapped_over_a_slot_is_what_the_guest_sees", WITHIN, || {
        use std::os::unix::fs::FileExt;
        let path = std::env::temp_dir().join(format!("softkvm-ram-dax-{}", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).expect("a file");
        std::fs::remove_file(&path).expect("it is ours");
        file.set_len(2 * PAGE as u64).expect("ftruncate");
        file.write_all_at(b"file", 0).expect("a word");
        each(|name, probe, form| {
            let at = form.host.wrapping_add(7 * PAGE);
            mmap(at, 2 * PAGE, RW, libc::MAP_SHARED | libc::MAP_FIXED, Some(&file));
            assert_eq!(probe.read(7 * PAGE).to_le_bytes(), *b"file", "{name}");
            shared(probe, form.host, name);
            probe.write(8 * PAGE, 0x1234_5678);
            let mut word = [0; 4];
            file.read_exact_at(&mut word, PAGE as u64).expect("a word");
            assert_eq!(u32::from_le_bytes(word), 0x1234_5678, "{name}: the file has what the guest wrote");
            mmap(at, 2 * PAGE, RW, ANONYMOUS | libc::MAP_FIXED, None);
            assert_eq!(probe.read(7 * PAGE), 0, "{name}: the file is gone from there");
            shared(probe, form.host, name);
            file.write_all_at(b"file", 0).expect("a word");
        });
    });
}

/// A process that helps shares a memfd with the VMM, and writes to it while the guest reads: as vhost-user does it.
#[test]
fn a_process_that_shares_the_memfd_writes_to_the_guest() {
    inside("forms::a_process_that_shares_the_memfd_writes_to_the_guest", WITHIN, || {
        let form = shared_memfd();
        let mut probe = Probe::new();
        probe.show(form.host, LEN);
        let file = form.file.as_ref().expect("it is a file");
        // SAFETY: the child makes system calls and touches memory of its own, and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let own = mmap(null_mut(), LEN, RW, libc::MAP_SHARED, Some(file));
            for round in 1..=100_000 {
                poke(own, 3 * PAGE, round);
            }
            poke(own, 4 * PAGE, 0xc41d);
            // SAFETY: ends the child.
            unsafe { libc::_exit(0) };
        }
        let begin = Instant::now();
        let mut last = 0;
        while probe.read(4 * PAGE) != 0xc41d {
            let now = probe.read(3 * PAGE);
            assert!(now >= last, "the guest saw {last}, then {now}");
            last = now;
            assert!(begin.elapsed() < WITHIN, "the child's last word never comes");
        }
        assert_eq!(probe.read(3 * PAGE), 100_000);
        // SAFETY: the child is ours.
        assert_eq!(unsafe { libc::waitpid(child, null_mut(), 0) }, child);
        shared(&mut probe, form.host, "afterwards");
    });
}

/// The kernel writes to guest RAM too: read(2) into it, as a disk's and a network's VMM does.
#[test]
fn what_the_kernel_copies_into_ram_the_guest_sees() {
    inside("forms::what_the_kernel_copies_into_ram_the_guest_sees", WITHIN, || {
        use std::os::unix::fs::FileExt;
        let source = memfd(LEN);
        each(|name, probe, form| {
            for page in 0..PAGES {
                source.write_all_at(&(0xd15c_0000 + page as u32).to_le_bytes(), (page * PAGE) as u64).expect("a word");
            }
            // SAFETY: the range is the form's.
            let got = unsafe { libc::pread(source.as_raw_fd(), form.host.cast(), LEN, 0) };
            assert_eq!(got, LEN as isize, "{name}");
            assert_eq!(probe.read(9 * PAGE), 0xd15c_0009, "{name}");
            probe.write(9 * PAGE, 0x0000_0bac);
            // SAFETY: as above.
            let got = unsafe { libc::pwrite(source.as_raw_fd(), form.host.cast(), LEN, 0) };
            assert_eq!(got, LEN as isize, "{name}");
            let mut word = [0; 4];
            source.read_exact_at(&mut word, 9 * PAGE as u64).expect("a word");
            assert_eq!(u32::from_le_bytes(word), 0x0000_0bac, "{name}: the kernel copies what the guest wrote");
        });
    });
}

/// A VMM whose thread may do next to nothing any more adds RAM: filters are for it, not for what is done on its behalf.
#[test]
fn a_filtered_thread_adds_and_remaps_ram() {
    inside("forms::a_filtered_thread_adds_and_remaps_ram", WITHIN, || {
        use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
        let form = anonymous();
        poke(form.host, 0, 0x0000_f117);
        let allowed = [
            libc::SYS_ioctl,
            libc::SYS_mmap,
            libc::SYS_munmap,
            libc::SYS_madvise,
            libc::SYS_mprotect,
            libc::SYS_write,
            libc::SYS_futex,
            libc::SYS_rt_sigprocmask,
            libc::SYS_sigaltstack,
            libc::SYS_timer_create,
            libc::SYS_close,
            libc::SYS_fcntl,
            libc::SYS_exit,
            libc::SYS_exit_group,
            libc::SYS_brk,
        ];
        let rules = allowed.into_iter().map(|number| (number, Vec::new())).collect();
        let filter = SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64);
        let program: BpfProgram = filter.expect("a filter").try_into().expect("a program");
        let mut probe = Probe::new();
        seccompiler::apply_filter(&program).expect("seccomp");
        probe.show(form.host, LEN);
        assert_eq!(probe.read(0), 0x0000_f117);
        shared(&mut probe, form.host, "under a filter");
        mmap(form.host, PAGE, RW, ANONYMOUS | libc::MAP_FIXED, None);
        assert_eq!(probe.read(0), 0);
        discard(form.host, 8 * PAGE, PAGE);
        agree(&mut probe, form.host, "under a filter");
    });
}
