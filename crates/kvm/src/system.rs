//! The system file: what open("/dev/kvm") gives, and the list of VMs behind it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use mmu::Mapping;
use nix::errno::Errno;
use parking_lot::Mutex;

use crate::client::{Client, File, FileKind, Reply};
use crate::ioctl::{self, Call, Target};
use crate::processors::Processors;
use crate::status::{Status, VmStatus};
use crate::vm::Vm;

/// How many VMs that are gone `status` still tells of.
const ENDED_VMS: usize = 16;

/// The whole of KVM: one per daemon.
#[derive(Default)]
pub struct Kvm {
    vms: Mutex<Vec<Weak<Vm>>>,
    ended: Mutex<VecDeque<VmStatus>>,
    created: AtomicU64,
    /// What vCPUs run on.
    pub(crate) processors: Arc<Processors>,
    /// Somebody takes a profile.
    pub(crate) profiled: AtomicBool,
}

impl Kvm {
    /// No VM yet.
    pub fn new() -> Arc<Self> {
        // Measuring the host's counter takes a moment, which no VM should wait for.
        let measure = || _ = crate::machine::host_tsc_khz();
        if let Err(err) = std::thread::Builder::new().name("tsc".into()).spawn(measure) {
            tracing::debug!(%err, "the first VM measures the time-stamp counter");
        }
        Arc::default()
    }

    /// What there is now, and the last VMs that ended.
    pub fn status(&self) -> Status {
        Status {
            vms: self.vms().iter().map(|vm| vm.status()).collect(),
            ended: self.ended.lock().iter().cloned().collect(),
        }
    }

    /// The VMs that there are.
    pub(crate) fn vms(&self) -> Vec<Arc<Vm>> {
        self.vms.lock().iter().filter_map(Weak::upgrade).collect()
    }

    /// A number for a new VM, from 1.
    pub(crate) fn next_vm_id(&self) -> u64 {
        self.created.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Lists a VM as long as somebody holds it.
    pub(crate) fn register(&self, vm: &Arc<Vm>) {
        let mut vms = self.vms.lock();
        vms.retain(|vm| vm.strong_count() > 0);
        vms.push(Arc::downgrade(vm));
    }

    /// Keeps what is to be told of a VM that is gone.
    pub(crate) fn ended(&self, status: VmStatus) {
        let mut ended = self.ended.lock();
        if ended.len() == ENDED_VMS {
            ended.pop_front();
        }
        ended.push_back(status);
    }
}

/// One open of `/dev/kvm`.
pub(crate) struct System {
    pub(crate) kvm: Arc<Kvm>,
}

/// What open("/dev/kvm") gives.
pub fn system_file(kvm: &Arc<Kvm>) -> Arc<dyn File> {
    Arc::new(System { kvm: kvm.clone() })
}

impl File for System {
    fn ioctl(self: Arc<Self>, client: &dyn Client, request: u32, arg: u64, input: &[u8]) -> Result<Reply, Errno> {
        ioctl::dispatch(Target::System(&self), &Call { client, request, arg, input }).unwrap_or(Err(Errno::EINVAL))
    }

    fn mapping(&self) -> Option<Arc<Mapping>> {
        None
    }

    fn kind(&self) -> FileKind {
        FileKind::System
    }

    fn released(&self) {}
}
