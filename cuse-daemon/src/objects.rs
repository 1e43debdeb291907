//! The KVM objects that the daemon serves.

use std::sync::Arc;

use kvm::client::{Client, File, FileKind, Reply};
use mmu::Mapping;
use nix::errno::Errno;
use serde_json::json;

use crate::daemon::Objects;

/// What the program serves.
pub fn kvm() -> Objects {
    Objects { system: Box::new(|| Arc::new(VersionOnly)), status: Box::new(|| json!({ "vms": [], "ended": [] })) }
}

/// Answers `KVM_GET_API_VERSION` and nothing else.
struct VersionOnly;

impl File for VersionOnly {
    fn ioctl(self: Arc<Self>, _client: &dyn Client, request: u32, _arg: u64, _input: &[u8]) -> Result<Reply, Errno> {
        if request == 0xae00 { Ok(Reply::ret(12)) } else { Err(Errno::EINVAL) }
    }

    fn mapping(&self) -> Option<Arc<Mapping>> {
        None
    }

    fn kind(&self) -> FileKind {
        FileKind::System
    }

    fn released(&self) {}
}
