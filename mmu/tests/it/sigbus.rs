//! A client truncates the file behind guest RAM.
#![expect(unsafe_code, reason = "one test maps a file on its own to fault outside of the daemon's mappings")]

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use mmu::{Mapping, Protection};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};

fn memfd(len: u64) -> File {
    let fd = nix::sys::memfd::memfd_create(c"client", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(len).unwrap();
    file
}

#[test]
fn a_truncated_file_reads_as_zeros() {
    let file = memfd(0x8000);
    let mapping = Mapping::of_file(file.try_clone().unwrap().into(), 0x2000, 0x4000, Protection::ReadWrite).unwrap();
    mapping.write(0x1ffc, b"contents").unwrap();
    file.set_len(0x3000).unwrap();
    assert!(!mapping.is_torn(), "nobody has noticed yet");
    let mut bytes = [0xff; 0x4000];
    mapping.read(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0), "gone, as the page it straddled");
    mapping.write(0x3000, b"still usable").unwrap();
    assert_eq!(mapping.load_u8(0x3000), Some(b's'));
    assert_eq!(mapping.load_u64(0x2000), Some(0));
    assert!(mapping.is_torn());
}

#[test]
fn a_file_that_was_always_too_short() {
    let mapping = Mapping::of_file(memfd(0x1000).into(), 0, 0x10_0000, Protection::Read).unwrap();
    assert_eq!(mapping.load_u64(0xf_0000), Some(0));
    assert_eq!(mapping.write(0, &[1]), None, "not writable");
}

#[test]
fn many_mappings_come_and_go() {
    let keep: Vec<_> = (0..200).map(|_| memfd(0x1000)).collect();
    for _ in 0..2 {
        let mappings: Vec<_> = keep
            .iter()
            .map(|file| Mapping::of_file(file.try_clone().unwrap().into(), 0, 0x3000, Protection::ReadWrite).unwrap())
            .collect();
        for mapping in mappings {
            assert_eq!(mapping.load_u32(0x2ffc), Some(0));
        }
    }
}

/// SIGBUS anywhere else is not ours: the process ends by it, as without us.
#[test]
fn other_sigbuses_stay_deadly() {
    const CHILD: &str = "MMU_TEST_FOREIGN_SIGBUS";
    if std::env::var_os(CHILD).is_some() {
        let _ours = Mapping::create("ours", 0x1000).unwrap();
        let (len, file) = (NonZeroUsize::new(0x1000).unwrap(), memfd(0));
        // SAFETY: a new mapping at an address of the kernel's choice.
        let page = unsafe { mmap(None, len, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, file, 0) }.unwrap();
        // SAFETY: mapped and readable, but the file has no such page: this is the SIGBUS that the test is about.
        let byte = unsafe { page.cast::<u8>().read_volatile() };
        println!("survived with {byte}");
        return;
    }
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "sigbus::other_sigbuses_stay_deadly"])
        .env(CHILD, "1")
        .output()
        .unwrap()
        .status;
    assert!(status.signal() == Some(libc::SIGBUS), "{status:?}");
}

#[test]
fn mappings_made_here_cannot_shrink() {
    let mapping = Mapping::create("sealed", 0x2345).unwrap();
    assert_eq!(mapping.len(), 0x3000);
    let file = File::from(mapping.file().try_clone_to_owned().unwrap());
    assert!(file.set_len(0x1000).is_err() && file.set_len(0x4000).is_err());
}

#[test]
fn large_mappings_are_placed_for_huge_pages() {
    let file = memfd(16 << 20);
    let mapping = Mapping::of_file(file.into(), 0x20_1000, 8 << 20, Protection::ReadWrite).unwrap();
    let address = mapping.host(0, 1).unwrap().as_ptr() as usize;
    assert_eq!(address % (2 << 20), 0x1000);
}

#[test]
fn impossible_mappings_are_errors() {
    let file = || memfd(0x1000).into();
    assert!(Mapping::of_file(file(), 0, 0, Protection::Read).is_err());
    assert!(Mapping::of_file(file(), 1, 0x1000, Protection::Read).is_err());
    assert!(Mapping::of_file(file(), 0, 0x1001, Protection::Read).is_err());
    assert!(Mapping::of_file(file(), 0, !0xfff, Protection::Read).is_err());
    assert!(Mapping::of_file(file(), !0xfff, 0x1000, Protection::Read).is_err());
    let read_only = File::open("/proc/self/exe").unwrap();
    assert!(Mapping::of_file(read_only.into(), 0, 0x1000, Protection::ReadWrite).is_err());
}
