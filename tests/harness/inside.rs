//! The rest of a test in a process of its own that sees our /dev/kvm.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::console::Console;
use crate::softkvm;

/// Set in the inner process.
const MARK: &str = "SOFTKVM_TEST_INSIDE";

/// Runs `body` with our /dev/kvm in place: starts this test program again as `softkvm run -- PROGRAM --exact NAME`,
/// where the same call then runs `body`. `name` is the path of the calling test, as libtest prints it.
///
/// With `SOFTKVM_TEST_HOST` in the environment `body` runs at once, on whatever /dev/kvm the host has: that is how a
/// test's expectations are compared with the kernel's own.
pub fn inside(name: &str, within: Duration, body: impl FnOnce()) {
    if std::env::var_os(MARK).is_some() || std::env::var_os("SOFTKVM_TEST_HOST").is_some() {
        return body();
    }
    let mut inner = again(name).expect("the inner process must start");
    let status = inner.finish(within).expect("the inner process must end");
    assert!(inner.text().contains("1 passed"), "{name} inside: {status}\n{}", inner.tail());
}

fn again(name: &str) -> Result<Console> {
    let me = std::env::current_exe().context("our own path")?;
    let line = [me.as_os_str(), "--exact".as_ref(), name.as_ref(), "--nocapture".as_ref()];
    // It need not build again what was built to start it.
    Console::start(softkvm::run::<&str, _>(&[], &line)?.env(MARK, "1").env("SOFTKVM", softkvm::binary()?))
}
