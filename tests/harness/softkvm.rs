//! The program under test: where it is, how it is started.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};
use assets::host;

/// The top of this checkout.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is one folder deep")
}

/// Builds the release binary with cargo's own progress on stderr, and says where it is.
pub fn build() -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--release", "--package", "cuse-daemon"])
        .current_dir(workspace())
        .status()
        .context("cannot start cargo")?;
    if !status.success() {
        bail!("softkvm did not build. Next step: cargo build --release --package cuse-daemon");
    }
    Ok(target().join("release/softkvm"))
}

/// Programs of this workspace as one file each, without a library: their bytes, in the order of `names`. From the folder
/// `$SOFTKVM_STATIC`, else built now.
pub fn build_static(names: &[&str]) -> Result<Vec<Vec<u8>>> {
    if let Some(folder) = std::env::var_os("SOFTKVM_STATIC") {
        return names.iter().map(|name| stripped(&Path::new(&folder).join(name))).collect();
    }
    // With a target named, build scripts and procedural macros are built without the flag.
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let mut build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    build.args(["build", "--release", "--target", TARGET, "--package", "cuse-daemon", "--package", "softkvm-tests"]);
    for name in names {
        build.args(["--bin", name]);
    }
    build.env("RUSTFLAGS", "-C target-feature=+crt-static").current_dir(workspace());
    if !build.status().context("cannot start cargo")?.success() {
        bail!("no static programs. Next step: {build:?}");
    }
    let folder = target().join(TARGET).join("release");
    names.iter().map(|name| stripped(&folder.join(name))).collect()
}

/// The program's bytes without debug information.
pub fn stripped(program: &Path) -> Result<Vec<u8>> {
    let short = std::env::temp_dir().join(format!("softkvm-stripped-{}", std::process::id()));
    let strip = Command::new("strip").arg("-o").args([&short, program]).status();
    if !strip.context("cannot start strip. Next step: apt-get install binutils")?.success() {
        bail!("strip {} failed", program.display());
    }
    let bytes = std::fs::read(&short).with_context(|| format!("cannot read {}", short.display()));
    std::fs::remove_file(&short).context("the copy is ours")?;
    bytes
}

fn target() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from);
    workspace().join(target)
}

/// `$SOFTKVM`, else the release binary, built once per process.
pub fn binary() -> Result<&'static Path> {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    if let Some(path) = BINARY.get() {
        return Ok(path);
    }
    let path = match std::env::var_os("SOFTKVM") {
        Some(given) => PathBuf::from(given),
        None => build()?,
    };
    Ok(BINARY.get_or_init(|| path))
}

/// Fails where softkvm cannot run, naming what is missing and the next step.
pub fn require_host() -> Result<()> {
    host::require_root()?;
    host::require_fuse()
}

/// `softkvm run OPTIONS -- LINE`: the command sees our /dev/kvm, in a mount namespace of its own.
pub fn run<O: AsRef<OsStr>, L: AsRef<OsStr>>(options: &[O], line: &[L]) -> Result<Command> {
    require_host()?;
    let mut command = Command::new(binary()?);
    command.arg("run").args(options).arg("--").args(line);
    Ok(command)
}

/// The command that sees a /dev/kvm to be tested: `softkvm run OPTIONS -- LINE`, or with `SOFTKVM_TEST_HOST` in the
/// environment the line itself, on the host's own.
pub fn client<L: AsRef<OsStr>>(options: &[&str], line: &[L]) -> Result<Command> {
    if std::env::var_os("SOFTKVM_TEST_HOST").is_some() {
        let mut command = Command::new(&line[0]);
        command.args(&line[1..]);
        return Ok(command);
    }
    run(options, line)
}
