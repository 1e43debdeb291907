//! From answers to bytes.

use std::io::IoSlice;

use nix::errno::Errno;
use zerocopy::IntoBytes;

use crate::layout::{
    AttrOut, EntryOut, IoctlOut, NotifyInvalInodeOut, OpenOut, OutHeader, PollOut, StatfsOut, WriteOut, notify,
};

/// What goes back to the kernel for one request.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "an ioctl's answer is the common case, and must not allocate")]
pub enum Answer {
    /// Nothing any more: the request wants no reply, or `Call::answer_now` has sent it.
    Done,
    /// The system call fails.
    Error(Errno),
    /// Success without data.
    Empty,
    /// To `Lookup`.
    Entry(EntryOut),
    /// To `Getattr`.
    Attr(AttrOut),
    /// To `Open` and `Opendir`.
    Open(OpenOut),
    /// To `Ioctl`: what ioctl(2) returns, which may be a negative errno and still carry bytes for `arg`.
    Ioctl(i32, Bytes),
    /// To `Read` and `Readdir`.
    Data(Vec<u8>),
    /// To `Write`.
    Written(u32),
    /// To `Statfs`.
    Statfs(StatfsOut),
    /// To `Poll`.
    Poll(PollOut),
}

/// Bytes of an ioctl's answer; short ones need no allocation.
pub type Bytes = smallvec::SmallVec<[u8; 512]>;

impl Answer {
    /// Calls `send` with the pieces of the message to request `unique`, not at all for `Done`.
    pub(crate) fn encode<R>(&self, unique: u64, send: impl FnOnce(&[IoSlice<'_>]) -> R) -> Option<R> {
        let (error, head, data): (i32, &[u8], &[u8]) = match self {
            Self::Done => return None,
            Self::Error(errno) => (-(*errno as i32), &[], &[]),
            Self::Empty => (0, &[], &[]),
            Self::Entry(entry) => (0, entry.as_bytes(), &[]),
            Self::Attr(attr) => (0, attr.as_bytes(), &[]),
            Self::Open(open) => (0, open.as_bytes(), &[]),
            Self::Ioctl(result, bytes) => {
                let out = IoctlOut { result: *result, ..IoctlOut::default() };
                return Some(message(0, unique, out.as_bytes(), bytes, send));
            }
            Self::Data(data) => (0, &[], data),
            Self::Written(size) => {
                let out = WriteOut { size: *size, padding: 0 };
                return Some(message(0, unique, out.as_bytes(), &[], send));
            }
            Self::Statfs(statfs) => (0, statfs.as_bytes(), &[]),
            Self::Poll(poll) => (0, poll.as_bytes(), &[]),
        };
        Some(message(error, unique, head, data, send))
    }
}

/// Calls `send` with the pieces of a notification that drops what the kernel caches of node `ino`.
pub(crate) fn inval_inode<R>(ino: u64, send: impl FnOnce(&[IoSlice<'_>]) -> R) -> R {
    let body = NotifyInvalInodeOut { ino, off: 0, len: 0 };
    message(notify::INVAL_INODE, 0, body.as_bytes(), &[], send)
}

fn message<R>(error: i32, unique: u64, head: &[u8], data: &[u8], send: impl FnOnce(&[IoSlice<'_>]) -> R) -> R {
    let len = (size_of::<OutHeader>() + head.len() + data.len()) as u32;
    let header = OutHeader { len, error, unique };
    send(&[IoSlice::new(header.as_bytes()), IoSlice::new(head), IoSlice::new(data)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromBytes;

    fn bytes(answer: &Answer) -> Option<Vec<u8>> {
        answer.encode(4, |pieces| pieces.concat_bytes())
    }

    trait Concat {
        fn concat_bytes(&self) -> Vec<u8>;
    }

    impl Concat for [IoSlice<'_>] {
        fn concat_bytes(&self) -> Vec<u8> {
            self.iter().flat_map(|piece| piece.to_vec()).collect()
        }
    }

    #[test]
    fn error_is_a_bare_header() {
        let message = bytes(&Answer::Error(Errno::ENOTTY)).unwrap();
        let header = OutHeader::read_from_bytes(&message).unwrap();
        assert_eq!(header, OutHeader { len: 16, error: -25, unique: 4 });
    }

    #[test]
    fn ioctl_result_and_bytes_travel_together() {
        let message = bytes(&Answer::Ioctl(-7, Bytes::from_slice(b"nent"))).unwrap();
        let (header, rest) = OutHeader::read_from_prefix(&message).unwrap();
        let (out, data) = IoctlOut::read_from_prefix(rest).unwrap();
        assert_eq!((header.len as usize, header.error), (message.len(), 0));
        assert_eq!((out.result, data), (-7, b"nent".as_slice()));
    }

    #[test]
    fn done_sends_nothing() {
        assert_eq!(bytes(&Answer::Done), None);
    }

    #[test]
    fn notification_has_no_unique() {
        let message = inval_inode(9, |pieces| pieces.concat_bytes());
        let (header, rest) = OutHeader::read_from_prefix(&message).unwrap();
        assert_eq!((header.error, header.unique), (notify::INVAL_INODE, 0));
        assert_eq!(NotifyInvalInodeOut::read_from_bytes(rest).unwrap().ino, 9);
    }
}
