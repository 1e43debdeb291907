//! The KVM objects that the daemon serves.

use kvm::profile::Profiler;
use kvm::{Kvm, system_file};
use serde_json::json;

use crate::daemon::Objects;

/// What the program serves: one KVM.
pub fn kvm() -> Objects {
    let kvm = Kvm::new();
    let (of_status, of_profile) = (kvm.clone(), kvm.clone());
    Objects {
        system: Box::new(move || system_file(&kvm)),
        profiler: Box::new(move |vm| Profiler::start(&of_profile, vm)),
        status: Box::new(move || serde_json::to_value(of_status.status()).unwrap_or_else(|_| json!({}))),
    }
}
