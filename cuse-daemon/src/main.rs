//! The softkvm program: command line, CUSE and FUSE front ends, memory and fd sharing with clients.

fn main() {}
