//! cargo xtask: demo, test, bench and what they install.

fn main() {}
