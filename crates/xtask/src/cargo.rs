//! The cargo that runs us, pointed at the workspace that we belong to.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

/// The top of this checkout.
pub(crate) fn workspace() -> &'static Path {
    // Compiled in, so it holds wherever in the checkout `cargo xtask` was typed.
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("crates/xtask is two folders deep")
}

/// Where cargo puts what it builds.
pub(crate) fn target() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    workspace().join(target)
}

/// `cargo ARGS` in the workspace, with the toolchain that is running us.
pub(crate) fn cargo<I: IntoIterator<Item: AsRef<OsStr>>>(args: I) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from));
    command.args(args).current_dir(workspace());
    command
}

/// The program of `package`, built as releases are; its arguments are to follow.
pub(crate) fn program(package: &str) -> Command {
    cargo(["run", "--release", "--quiet", "--package", package, "--"])
}

/// True if the command of cargo's ended with status 0.
pub(crate) fn succeeds(command: &mut Command) -> Result<bool> {
    Ok(command.status().context("cannot start cargo")?.success())
}
