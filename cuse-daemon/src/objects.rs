//! The KVM objects that the daemon serves.

use kvm::{Kvm, system_file};
use serde_json::json;

use crate::daemon::Objects;

/// What the program serves: one KVM.
pub fn kvm() -> Objects {
    let kvm = Kvm::new();
    let of_status = kvm.clone();
    Objects {
        system: Box::new(move || system_file(&kvm)),
        status: Box::new(move || serde_json::to_value(of_status.status()).unwrap_or_else(|_| json!({}))),
    }
}
