//! The CUSE and FUSE wire protocol: requests, replies, interrupts, passthrough.
//!
//! A [`Session`] reads `/dev/fuse` or `/dev/cuse` with as many threads as its requests need and hands
//! each, typed, to a [`Service`]. Unlike path-based libraries it treats `FUSE_INTERRUPT` as what it
//! is for (a blocked ioctl ends when its caller gets a signal), speaks both protocols, and lets a service answer a
//! request before it is done with it.

pub mod device;
pub mod layout;
pub mod reply;
pub mod request;
pub mod session;

pub use device::{BackingId, Device};
pub use reply::{Answer, Bytes};
pub use request::{Ioctl, Operation, Request};
pub use session::{Call, Kind, Negotiated, Service, Session};
