//! What KVM means: VM and vCPU objects, every ioctl, every exit reason.

pub mod client;
