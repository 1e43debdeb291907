//! What KVM means: VM and vCPU objects, every ioctl, every exit reason.
//!
//! A front end hands [`system_file`] to whoever opens `/dev/kvm`, brings requests to [`client::File`] objects, and shows
//! the client as a [`client::Client`]. Everything else is inside.

mod arch_capabilities;
mod caps;
mod chip;
pub mod client;
pub mod clock;
mod coalesced;
mod cpuid;
mod debug;
mod device;
mod era;
mod eventfd;
pub mod exit;
pub mod header;
mod hyperv;
mod interrupt;
pub mod ioctl;
mod ioeventfd;
mod kvmclock;
mod machine;
mod mce;
mod memory;
mod msr;
mod msr_filter;
mod nested;
mod options;
mod paravirt;
mod processors;
pub mod profile;
mod run;
mod run_page;
mod state;
mod stats;
pub mod status;
mod steal;
mod sync_regs;
mod system;
mod vcpu;
mod vm;
mod xen;
mod xsave;

pub use caps::Capability;
pub use cpu_core::STACK_BYTES as VCPU_STACK_BYTES;
pub use cpuid::OFFERED as OFFERED_FEATURES;
pub use run_page::SIZE as VCPU_MMAP_SIZE;
pub use system::{Kvm, system_file};
