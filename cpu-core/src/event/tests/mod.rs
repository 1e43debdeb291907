//! What each load, gate, return and task switch does, with the SDM's error codes.

mod extensions;
mod long;
mod protected;
