//! From bytes to requests. The kernel is trusted to be well-meaning, not to be of our version: every length is checked.

use std::ffi::CStr;

use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::layout::{
    AccessIn, BatchForgetIn, CuseInitIn, FlushIn, ForgetIn, ForgetOne, GetattrIn, InHeader, InitFlags, InitIn,
    InterruptIn, IoctlFlags, IoctlIn, OpenIn, PollIn, ReadIn, ReleaseIn, WriteIn, opcode,
};

/// A message that cannot be a request.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Malformed {
    /// Not even a header; there is nobody to answer.
    #[error("{0} bytes are less than a header")]
    NoHeader(usize),
    /// The header is good, so an error can be sent.
    #[error("{} request: {has} bytes of arguments, too few or not as announced", opcode::name(*.opcode).unwrap_or("unknown"))]
    Body {
        /// Whom to answer.
        unique: u64,
        /// What was asked.
        opcode: u32,
        /// Bytes behind the header.
        has: usize,
    },
}

/// One request: who asks, and what.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Thread, user, node and the number to answer to.
    pub header: InHeader,
    /// What is asked.
    pub operation: Operation<'a>,
}

/// What is asked. Variants that this crate gives no type come as `Other`, to be answered with `ENOSYS`.
#[derive(Clone, Copy, Debug)]
pub enum Operation<'a> {
    /// The first message of a FUSE connection, with the flags of both halves.
    Init(InitIn, InitFlags),
    /// The first message of a CUSE connection.
    CuseInit(CuseInitIn),
    /// Unmount. No answer is needed.
    Destroy,
    /// A name in the directory `header.nodeid`.
    Lookup(&'a CStr),
    /// `nlookup` references to `header.nodeid` are gone. Never answered.
    Forget(ForgetIn),
    /// The same for many nodes. Never answered.
    BatchForget(Forgets<'a>),
    /// stat.
    Getattr(GetattrIn),
    /// open.
    Open(OpenIn),
    /// The last descriptor of an open file is closed.
    Release(ReleaseIn),
    /// opendir.
    Opendir(OpenIn),
    /// closedir.
    Releasedir(ReleaseIn),
    /// readdir.
    Readdir(ReadIn),
    /// One descriptor is closed.
    Flush(FlushIn),
    /// read, or a page fault on a cached file.
    Read(ReadIn),
    /// write, or write-back of a cached page.
    Write(WriteIn, &'a [u8]),
    /// statfs.
    Statfs,
    /// access.
    Access(AccessIn),
    /// ioctl, with the bytes behind `arg` that its number announces.
    Ioctl(Ioctl<'a>),
    /// poll.
    Poll(PollIn),
    /// The thread that waits for request `unique` has a signal. Answered only with `EAGAIN`: ask again.
    Interrupt(InterruptIn),
    /// Anything else.
    Other,
}

/// An ioctl.
#[derive(Clone, Copy, Debug)]
pub struct Ioctl<'a> {
    /// The handle that open gave.
    pub fh: u64,
    /// What kind of caller.
    pub flags: IoctlFlags,
    /// The request number.
    pub request: u32,
    /// The argument as the caller wrote it.
    pub arg: u64,
    /// The caller's bytes at `arg`, for numbers with `_IOC_WRITE`.
    pub input: &'a [u8],
    /// Bytes that may go back to `arg`.
    pub out_size: u32,
}

/// The list in a batch of forgets.
#[derive(Clone, Copy, Debug)]
pub struct Forgets<'a>(&'a [u8]);

impl Forgets<'_> {
    /// Node and count, one by one.
    pub fn iter(&self) -> impl Iterator<Item = ForgetOne> + '_ {
        self.0.chunks_exact(size_of::<ForgetOne>()).filter_map(|bytes| ForgetOne::read_from_bytes(bytes).ok())
    }
}

impl<'a> Request<'a> {
    /// Parses one message as it was read from the device.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let (header, body) = InHeader::read_from_prefix(bytes).map_err(|_| Malformed::NoHeader(bytes.len()))?;
        let malformed = Malformed::Body { unique: header.unique, opcode: header.opcode, has: body.len() };
        if header.len as usize != bytes.len() {
            return Err(malformed);
        }
        let extensions = usize::from(header.total_extlen) * 8;
        let body = body.len().checked_sub(extensions).map(|len| &body[..len]).ok_or(malformed)?;
        let operation = Operation::parse(header.opcode, body).ok_or(malformed)?;
        Ok(Self { header, operation })
    }
}

impl<'a> Operation<'a> {
    fn parse(code: u32, body: &'a [u8]) -> Option<Self> {
        Some(match code {
            opcode::INIT => {
                let (init, rest) = prefix::<InitIn>(body)?;
                let low = InitFlags::from_bits_retain(init.flags.into());
                let high =
                    prefix::<u32>(rest).filter(|_| low.contains(InitFlags::INIT_EXT)).map_or(0, |(high, _)| high);
                Self::Init(init, low | InitFlags::from_bits_retain(u64::from(high) << 32))
            }
            opcode::CUSE_INIT => Self::CuseInit(prefix(body)?.0),
            opcode::DESTROY => Self::Destroy,
            opcode::LOOKUP => Self::Lookup(CStr::from_bytes_until_nul(body).ok()?),
            opcode::FORGET => Self::Forget(prefix(body)?.0),
            opcode::BATCH_FORGET => {
                let (head, rest) = prefix::<BatchForgetIn>(body)?;
                let len = usize::try_from(head.count).ok()?.checked_mul(size_of::<ForgetOne>())?;
                Self::BatchForget(Forgets(rest.get(..len)?))
            }
            // Before 7.9 GETATTR had no arguments; the answer does not depend on them.
            opcode::GETATTR => Self::Getattr(prefix(body).map_or_else(GetattrIn::default, |(getattr, _)| getattr)),
            opcode::OPEN => Self::Open(prefix(body)?.0),
            opcode::RELEASE => Self::Release(prefix(body)?.0),
            opcode::OPENDIR => Self::Opendir(prefix(body)?.0),
            opcode::RELEASEDIR => Self::Releasedir(prefix(body)?.0),
            opcode::READDIR => Self::Readdir(prefix(body)?.0),
            opcode::FLUSH => Self::Flush(prefix(body)?.0),
            opcode::READ => Self::Read(prefix(body)?.0),
            opcode::WRITE => {
                let (write, data) = prefix::<WriteIn>(body)?;
                Self::Write(write, data.get(..write.size as usize)?)
            }
            opcode::STATFS => Self::Statfs,
            opcode::ACCESS => Self::Access(prefix(body)?.0),
            opcode::IOCTL => {
                let (ioctl, data) = prefix::<IoctlIn>(body)?;
                Self::Ioctl(Ioctl {
                    fh: ioctl.fh,
                    flags: IoctlFlags::from_bits_retain(ioctl.flags),
                    request: ioctl.cmd,
                    arg: ioctl.arg,
                    input: data.get(..ioctl.in_size as usize)?,
                    out_size: ioctl.out_size,
                })
            }
            opcode::POLL => Self::Poll(prefix(body)?.0),
            opcode::INTERRUPT => Self::Interrupt(prefix(body)?.0),
            _ => Self::Other,
        })
    }
}

/// Reads a `T` from the front of `bytes`, which may be unaligned.
fn prefix<T: FromBytes + IntoBytes + Immutable + KnownLayout>(bytes: &[u8]) -> Option<(T, &[u8])> {
    T::read_from_prefix(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(code: u32, body: &[u8]) -> Vec<u8> {
        let len = (size_of::<InHeader>() + body.len()) as u32;
        let header = InHeader { len, opcode: code, unique: 6, nodeid: 3, pid: 77, ..InHeader::default() };
        [header.as_bytes(), body].concat()
    }

    #[test]
    fn ioctl_carries_its_input() {
        let head = IoctlIn { fh: 9, flags: 0, cmd: 0x4008_ae89, arg: 0x7000, in_size: 8, out_size: 0 };
        let bytes = message(opcode::IOCTL, &[head.as_bytes(), b"01234567"].concat());
        let request = Request::parse(&bytes).unwrap();
        let Operation::Ioctl(ioctl) = request.operation else { panic!("{request:?}") };
        assert_eq!((request.header.pid, ioctl.fh, ioctl.request, ioctl.arg), (77, 9, 0x4008_ae89, 0x7000));
        assert_eq!(ioctl.input, b"01234567");
    }

    #[test]
    fn init_joins_both_halves_of_the_flags() {
        let init = InitIn { major: 7, minor: 45, max_readahead: 0, flags: 1 << 30 };
        let bytes = message(opcode::INIT, &[init.as_bytes(), &(1u32 << 5).to_le_bytes(), &[0; 44]].concat());
        let Operation::Init(_, flags) = Request::parse(&bytes).unwrap().operation else { panic!() };
        assert!(flags.contains(InitFlags::PASSTHROUGH | InitFlags::INIT_EXT));

        let init = InitIn { flags: 0, ..init };
        let bytes = message(opcode::INIT, &[init.as_bytes(), &(1u32 << 5).to_le_bytes()].concat());
        let Operation::Init(_, flags) = Request::parse(&bytes).unwrap().operation else { panic!() };
        assert!(!flags.contains(InitFlags::PASSTHROUGH), "flags2 counts only with INIT_EXT");
    }

    #[test]
    fn batch_forget_lists_its_nodes() {
        let one = ForgetOne { nodeid: 5, nlookup: 2 };
        let two = ForgetOne { nodeid: 6, nlookup: 1 };
        let head = BatchForgetIn { count: 2, dummy: 0 };
        let bytes = message(opcode::BATCH_FORGET, &[head.as_bytes(), one.as_bytes(), two.as_bytes()].concat());
        let Operation::BatchForget(list) = Request::parse(&bytes).unwrap().operation else { panic!() };
        assert_eq!(list.iter().collect::<Vec<_>>(), [one, two]);
    }

    #[test]
    fn announced_lengths_are_not_believed() {
        let head = IoctlIn { in_size: u32::MAX, ..IoctlIn::default() };
        assert!(Request::parse(&message(opcode::IOCTL, head.as_bytes())).is_err());
        let head = BatchForgetIn { count: u32::MAX, dummy: 0 };
        assert!(Request::parse(&message(opcode::BATCH_FORGET, head.as_bytes())).is_err());
        assert!(Request::parse(&message(opcode::LOOKUP, b"no end")).is_err());
        let mut bytes = message(opcode::LOOKUP, b"kvm\0");
        bytes[0] += 1;
        assert!(Request::parse(&bytes).is_err(), "length in the header differs from what was read");
    }

    /// Every opcode, with every length up to that of the largest fixed part, of two fill patterns.
    #[test]
    fn no_bytes_panic() {
        for code in (0..60).chain([opcode::CUSE_INIT, u32::MAX]) {
            for len in 0..96 {
                for fill in [0x00, 0xff] {
                    let bytes = message(code, &vec![fill; len]);
                    if let Ok(Request { operation: Operation::BatchForget(list), .. }) = Request::parse(&bytes) {
                        assert!(list.iter().count() <= len);
                    }
                    for cut in 0..bytes.len() {
                        assert!(Request::parse(&bytes[..cut]).is_err());
                    }
                }
            }
        }
    }

    #[test]
    fn extensions_behind_the_arguments_are_left_out() {
        let mut bytes = message(opcode::LOOKUP, b"kvm\0\0\0\0\0extended");
        bytes[36] = 1;
        let Operation::Lookup(name) = Request::parse(&bytes).unwrap().operation else { panic!() };
        assert_eq!(name, c"kvm");
        bytes[36] = 0xff;
        assert!(Request::parse(&bytes).is_err());
    }
}
