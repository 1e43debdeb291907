//! Has the linker put the functions of `layout.txt` side by side, in that order: the handlers of a guest's working set lie in few
//! cache lines' sets and pages then. `cargo xtask layout` makes the list. Names that are no more are passed over.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=layout.txt");
    let is = |name: &str, value: &str| env::var(name).is_ok_and(|is| is == value);
    // Rust links with LLD here since 1.90; no other linker knows the option.
    let chosen = env::var("CARGO_ENCODED_RUSTFLAGS").unwrap_or_default();
    let links_with_lld =
        is("TARGET", "x86_64-unknown-linux-gnu") && !["linker", "-fuse-ld"].iter().any(|of| chosen.contains(of));
    if is("PROFILE", "release") && links_with_lld {
        let list = format!("{}/layout.txt", env::var("CARGO_MANIFEST_DIR").expect("cargo sets it"));
        println!("cargo::rustc-link-arg-bin=softkvm=-Wl,--symbol-ordering-file={list}");
        println!("cargo::rustc-link-arg-bin=softkvm=-Wl,--no-warn-symbol-ordering");
    }
}
