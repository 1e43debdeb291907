//! A file that clients map too, mapped here: guest RAM and `kvm_run` pages.

use std::ffi::CStr;
use std::fs::File;
use std::io;

use memmap2::{MmapOptions, MmapRaw};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// A shared mapping of a file, read and written by others at any time.
#[derive(Debug)]
pub struct Mapping {
    file: File,
    map: MmapRaw,
}

impl Mapping {
    /// A new memfd of `len` bytes, all zero. `name` shows in `/proc/PID/maps`.
    pub fn create(name: &CStr, len: usize) -> io::Result<Self> {
        let file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC)?);
        file.set_len(len as u64)?;
        Self::of_file(file, len)
    }

    /// The first `len` bytes of `file`, which must be readable, writable and that long.
    pub fn of_file(file: File, len: usize) -> io::Result<Self> {
        let map = MmapOptions::new().len(len).map_raw(&file)?;
        Ok(Self { file, map })
    }

    /// Bytes mapped.
    pub fn size(&self) -> usize {
        self.map.len()
    }

    /// The first byte. Valid for `size()` bytes while `self` lives. Others write there: no reference may be made of it.
    pub fn as_ptr(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// The file behind, to hand to a client or to the kernel.
    pub fn file(&self) -> &File {
        &self.file
    }
}
