//! The VMM of 2007 on softkvm, with FUSE passthrough and without.

use std::time::Duration;

use softkvm_tests::console::Console;
use softkvm_tests::{long, softkvm};

/// A generous time for a case in its short form: a loaded machine must not fail it.
const WITHIN: Duration = Duration::from_secs(240);

/// What a case may use for repeating itself. CPUs that wake one another are what may hang once in a thousand runs.
fn seconds(name: &str) -> u64 {
    match (long(), name) {
        (false, _) => 3,
        (true, "smp") => 600,
        (true, _) => 60,
    }
}

fn case(options: &[&str], name: &str) {
    let seconds = seconds(name);
    let line = [env!("CARGO_BIN_EXE_legacy"), "--seconds", &seconds.to_string(), name];
    let mut console = Console::start(&mut softkvm::client(options, &line).expect("softkvm")).expect("it starts");
    let status = console.finish(WITHIN + Duration::from_secs(seconds)).expect("the case ends");
    assert!(status.success(), "{status}\n{}", console.tail());
    print!("{}", console.text());
}

macro_rules! cases {
    ($($name:ident)*) => {
        mod with_passthrough {
            $(#[test] fn $name() { super::case(&[], stringify!($name)); })*
        }
        /// Kernels before 6.9.
        mod without_passthrough {
            $(#[test] fn $name() { super::case(&["--no-passthrough"], stringify!($name)); })*
        }
    };
}

cases! { header guests smp display locked signals reset spin churn create }
