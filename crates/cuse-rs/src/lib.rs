//! The CUSE and FUSE wire protocol: requests, replies, interrupts, passthrough.
