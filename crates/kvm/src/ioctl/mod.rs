//! Every ioctl: the table of rows, their copy plans, and the handlers by file kind.

mod attributes;
mod chip;
mod plan;
mod system;
mod table;
pub(crate) mod vcpu;
mod vm;
mod xen;

use std::ops::Deref;
use std::sync::Arc;

pub(crate) use plan::{Call, Fam};
pub(crate) use table::dispatch;
pub use table::{ROWS, Row, Support};

use crate::client::Client;
use crate::device::Device;
use crate::system::System;
use crate::vcpu::Vcpu;
use crate::vm::Vm;

/// The file that a request came to, as its handlers take it.
pub(crate) enum Target<'a> {
    /// `/dev/kvm`
    System(&'a Arc<System>),
    /// A VM.
    Vm(&'a Arc<Vm>),
    /// A vCPU, locked.
    Vcpu(&'a mut Vcpu),
    /// A device of `KVM_CREATE_DEVICE`.
    Device(&'a Arc<Device>),
}

/// A file and the thread that asks it.
pub(crate) struct Caller<'a, F> {
    /// The file.
    pub(crate) file: &'a Arc<F>,
    /// Who asks.
    pub(crate) client: &'a dyn Client,
}

impl<F> Deref for Caller<'_, F> {
    type Target = F;

    fn deref(&self) -> &F {
        self.file
    }
}
