//! The wire format: `include/uapi/linux/fuse.h`, protocol 7.45, and what CUSE adds to it.
//!
//! Field order and sizes are the kernel's. Every message is little more than plain integers, so the structures are read
//! and written as bytes, with no pointer casts.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Major version that both sides must speak.
pub const KERNEL_VERSION: u32 = 7;
/// The newest minor version that this crate knows. The kernel's own may be older or newer; the lower one is used.
pub const KERNEL_MINOR_VERSION: u32 = 41;
/// A read from the device needs a buffer of at least this many bytes, whatever `max_write` is.
pub const MIN_READ_BUFFER: usize = 8192;
/// Node id of the root of the file system.
pub const ROOT_ID: u64 = 1;
/// Set in the `unique` of a `FUSE_INTERRUPT` message; the rest is that of the interrupted request.
pub const INT_REQ_BIT: u64 = 1;

/// Defines the operation codes and the `Debug` name of each.
macro_rules! opcodes {
    ($($name:ident = $value:literal),* $(,)?) => {
        /// Operation codes: `fuse_in_header::opcode`.
        pub mod opcode {
            $(#[doc = concat!("`FUSE_", stringify!($name), "`")] pub const $name: u32 = $value;)*
            /// `CUSE_INIT`: the first message of a CUSE connection.
            pub const CUSE_INIT: u32 = 4096;
            /// The name as in the kernel's header, without its prefix.
            pub fn name(code: u32) -> Option<&'static str> {
                match code {
                    $($value => Some(stringify!($name)),)*
                    CUSE_INIT => Some("CUSE_INIT"),
                    _ => None,
                }
            }
        }
    };
}

opcodes! {
    LOOKUP = 1, FORGET = 2, GETATTR = 3, SETATTR = 4, READLINK = 5, SYMLINK = 6, MKNOD = 8, MKDIR = 9, UNLINK = 10,
    RMDIR = 11, RENAME = 12, LINK = 13, OPEN = 14, READ = 15, WRITE = 16, STATFS = 17, RELEASE = 18, FSYNC = 20,
    SETXATTR = 21, GETXATTR = 22, LISTXATTR = 23, REMOVEXATTR = 24, FLUSH = 25, INIT = 26, OPENDIR = 27, READDIR = 28,
    RELEASEDIR = 29, FSYNCDIR = 30, GETLK = 31, SETLK = 32, SETLKW = 33, ACCESS = 34, CREATE = 35, INTERRUPT = 36,
    BMAP = 37, DESTROY = 38, IOCTL = 39, POLL = 40, NOTIFY_REPLY = 41, BATCH_FORGET = 42, FALLOCATE = 43,
    READDIRPLUS = 44, RENAME2 = 45, LSEEK = 46, COPY_FILE_RANGE = 47, SETUPMAPPING = 48, REMOVEMAPPING = 49,
    SYNCFS = 50, TMPFILE = 51, STATX = 52,
}

/// Codes of messages that start with the daemon: they travel in `OutHeader::error`, with `unique` 0.
pub mod notify {
    /// Drop cached attributes and pages of one inode.
    pub const INVAL_INODE: i32 = 2;
    /// Forget one name of a directory.
    pub const INVAL_ENTRY: i32 = 3;
}

bitflags::bitflags! {
    /// What `FUSE_INIT` agrees on. Bits from 32 up travel in `flags2`, which counts only with `INIT_EXT`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct InitFlags: u64 {
        /// Requests larger than one page.
        const MAX_PAGES = 1 << 22;
        /// Reads after an abort tell so: `ECONNABORTED` in place of `ENODEV`.
        const ABORT_ERROR = 1 << 21;
        /// The 64-bit form of these flags is in use.
        const INIT_EXT = 1 << 30;
        /// Files may be opened with `OpenFlags::PASSTHROUGH`.
        const PASSTHROUGH = 1 << 37;
        const _ = !0;
    }
}

bitflags::bitflags! {
    /// `fuse_open_out::open_flags`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct OpenFlags: u32 {
        /// No page cache: reads and writes reach the daemon, shared mappings fail.
        const DIRECT_IO = 1 << 0;
        /// Pages cached by an earlier open stay.
        const KEEP_CACHE = 1 << 1;
        /// No `FUSE_FLUSH` at close.
        const NOFLUSH = 1 << 5;
        /// Reads, writes and mappings go to the backing file of `backing_id`.
        const PASSTHROUGH = 1 << 7;
    }
}

bitflags::bitflags! {
    /// `fuse_ioctl_in::flags`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct IoctlFlags: u32 {
        /// A 32-bit caller on a 64-bit kernel.
        const COMPAT = 1 << 0;
        /// CUSE only: the daemon may ask for other ranges than those that the number encodes.
        const UNRESTRICTED = 1 << 1;
        /// The caller's pointers are 32 bits wide.
        const BITS_32 = 1 << 3;
        /// On a directory.
        const DIR = 1 << 4;
        /// An x32 caller.
        const COMPAT_X32 = 1 << 5;
        const _ = !0;
    }
}

/// Defines wire structures: plain integers, no padding, read and written as bytes.
macro_rules! wire {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty),* $(,)? })*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
            #[repr(C)]
            #[expect(missing_docs, reason = "fields are those of the kernel's header, by name")]
            pub struct $name { $($(#[$field_doc])* pub $field: $type),* }
        )*
    };
}

wire! {
    /// `fuse_in_header`: starts every request.
    InHeader {
        len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32,
        /// The calling thread as the pid namespace of the mounter sees it; 0: invisible there.
        pid: u32,
        /// Length of extensions behind the arguments, in units of 8 bytes.
        total_extlen: u16, padding: u16,
    }
    /// `fuse_out_header`: starts every reply. `error` is 0 or −errno.
    OutHeader { len: u32, error: i32, unique: u64 }
    /// `fuse_attr`. `mode` holds the file type too.
    Attr {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64, atimensec: u32, mtimensec: u32,
        ctimensec: u32, mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32, blksize: u32, flags: u32,
    }
    /// `fuse_init_in` up to 7.35; later fields are flags.
    InitIn { major: u32, minor: u32, max_readahead: u32, flags: u32 }
    /// `fuse_init_out`.
    InitOut {
        major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16, congestion_threshold: u16,
        max_write: u32, time_gran: u32, max_pages: u16, map_alignment: u16, flags2: u32, max_stack_depth: u32,
        request_timeout: u16, unused: [u16; 11],
    }
    /// `cuse_init_in`.
    CuseInitIn { major: u32, minor: u32, unused: u32, flags: u32 }
    /// `cuse_init_out`; `DEVNAME=…` and a NUL follow. `dev_major` 0: the kernel chooses.
    CuseInitOut {
        major: u32, minor: u32, unused: u32, flags: u32, max_read: u32, max_write: u32, dev_major: u32, dev_minor: u32,
        spare: [u32; 10],
    }
    /// `fuse_entry_out`.
    EntryOut {
        nodeid: u64, generation: u64, entry_valid: u64, attr_valid: u64, entry_valid_nsec: u32, attr_valid_nsec: u32,
        attr: Attr,
    }
    /// `fuse_forget_in`.
    ForgetIn { nlookup: u64 }
    /// `fuse_forget_one`.
    ForgetOne { nodeid: u64, nlookup: u64 }
    /// `fuse_batch_forget_in`; `count` × `ForgetOne` follow.
    BatchForgetIn { count: u32, dummy: u32 }
    /// `fuse_getattr_in`. `fh` counts only if `getattr_flags` bit 0 is set.
    GetattrIn { getattr_flags: u32, dummy: u32, fh: u64 }
    /// `fuse_attr_out`.
    AttrOut { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attr }
    /// `fuse_open_in`.
    OpenIn { flags: u32, open_flags: u32 }
    /// `fuse_open_out`.
    OpenOut { fh: u64, open_flags: u32, backing_id: i32 }
    /// `fuse_release_in`.
    ReleaseIn { fh: u64, flags: u32, release_flags: u32, lock_owner: u64 }
    /// `fuse_flush_in`.
    FlushIn { fh: u64, unused: u32, padding: u32, lock_owner: u64 }
    /// `fuse_read_in`.
    ReadIn { fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32 }
    /// `fuse_write_in`; `size` bytes follow.
    WriteIn { fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32, padding: u32 }
    /// `fuse_write_out`.
    WriteOut { size: u32, padding: u32 }
    /// `fuse_statfs_out`.
    StatfsOut {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64, bsize: u32, namelen: u32, frsize: u32,
        padding: u32, spare: [u32; 6],
    }
    /// `fuse_access_in`.
    AccessIn { mask: u32, padding: u32 }
    /// `fuse_interrupt_in`.
    InterruptIn { unique: u64 }
    /// `fuse_ioctl_in`; `in_size` bytes follow.
    IoctlIn { fh: u64, flags: u32, cmd: u32, arg: u64, in_size: u32, out_size: u32 }
    /// `fuse_ioctl_out`; the bytes for the caller follow. `result` is what ioctl(2) gives, −errno included.
    IoctlOut { result: i32, flags: u32, in_iovs: u32, out_iovs: u32 }
    /// `fuse_poll_in`.
    PollIn { fh: u64, kh: u64, flags: u32, events: u32 }
    /// `fuse_poll_out`.
    PollOut { revents: u32, padding: u32 }
    /// `fuse_notify_inval_inode_out`. `off` < 0: attributes only; `len` ≤ 0: to the end.
    NotifyInvalInodeOut { ino: u64, off: i64, len: i64 }
    /// `fuse_backing_map`: argument of `FUSE_DEV_IOC_BACKING_OPEN`.
    BackingMap { fd: i32, flags: u32, padding: u64 }
}

/// Sizes as the kernel's header has them: a field added by mistake does not compile.
const _: () = {
    assert!(size_of::<InHeader>() == 40);
    assert!(size_of::<OutHeader>() == 16);
    assert!(size_of::<Attr>() == 88);
    assert!(size_of::<InitOut>() == 64);
    assert!(size_of::<CuseInitOut>() == 72);
    assert!(size_of::<EntryOut>() == 128);
    assert!(size_of::<AttrOut>() == 104);
    assert!(size_of::<OpenOut>() == 16);
    assert!(size_of::<ReadIn>() == 40);
    assert!(size_of::<StatfsOut>() == 80);
    assert!(size_of::<IoctlIn>() == 32);
    assert!(size_of::<IoctlOut>() == 16);
    assert!(size_of::<BackingMap>() == 16);
};
