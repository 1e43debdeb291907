//! `cargo xtask layout`: which functions are hot, for the linker.
//!
//! A build that counts runs the benchmark's workloads; what was entered often goes into `cuse-daemon/layout.txt`, the hottest
//! first, and `cuse-daemon/build.rs` has the linker put these side by side. Names stay as long as the compiler and the types do.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use softkvm_tests::softkvm;

use crate::cargo::{cargo, program, succeeds, target, workspace};

/// Of a function that is taken in, the hottest block was entered at least so often.
const LEAST: u64 = 10_000;

/// Find out which functions are hot, and write the list that releases are linked by.
///
/// Takes ten minutes, and wants LLVM's tools (`rustup component add llvm-tools`). To be done when instructions were added or
/// written anew, or the compiler changed: names of the old list that are no more have no effect.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The workloads' size in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 10)]
    scale: u32,
    /// Only these workloads [default: two thirds of them, where system calls, exits and all kinds of programs are]
    #[arg(value_name = "NAME")]
    names: Vec<String>,
}

/// True if the list was written.
pub(crate) fn run(args: &Args) -> Result<bool> {
    softkvm::require_host()?;
    let profdata = llvm_profdata()?;
    let own = target().join("layout");
    let counts = own.join("counts");
    // Of an earlier time.
    if counts.exists() {
        fs::remove_dir_all(&counts)?;
    }
    let build = ["build", "--release", "--quiet", "--package", "cuse-daemon"];
    let flags = format!("-Cprofile-generate={}", counts.display());
    if !succeeds(cargo(build).env("RUSTFLAGS", flags).env("CARGO_TARGET_DIR", &own))? {
        return Ok(false);
    }
    let counting = own.join("release/softkvm");
    let scale = args.scale.to_string();
    let mut bench = program("softkvm-benches");
    bench.args(["--rounds", "1", "--peers", "parent", "--discard", "--scale", &scale, "--parent"]).arg(counting);
    let names: Vec<&str> = match args.names.as_slice() {
        [] => WORKLOADS.to_vec(),
        names => names.iter().map(String::as_str).collect(),
    };
    if !succeeds(bench.args(names))? {
        return Ok(false);
    }
    let merged = own.join("counts.profdata");
    done(Command::new(&profdata).arg("merge").arg("-o").arg(&merged).arg(&counts))?;
    let shown = done(Command::new(&profdata).args(["show", "--all-functions", "--counts"]).arg(&merged))?;
    let shown = String::from_utf8_lossy(&shown);
    let hot = hottest_first(&shown);
    ensure!(!hot.is_empty(), "nothing was counted: {} has no function in it", counts.display());
    let list = workspace().join("cuse-daemon/layout.txt");
    fs::write(&list, hot.join("\n") + "\n")?;
    println!("{} functions in {}", hot.len(), list.display());
    Ok(true)
}

/// Those where handlers, exits and the kernel's paths get their share.
const WORKLOADS: &[&str] = &[
    "boot",
    "getppid",
    "fork",
    "faults",
    "pingpong",
    "udp",
    "disk",
    "python-loop",
    "sha256",
    "gzip",
    "sqlite",
    "gcc",
    "apt",
    "matrix",
    "switch",
];

fn llvm_profdata() -> Result<PathBuf> {
    let libraries = done(Command::new("rustc").args(["--print", "target-libdir"]).current_dir(workspace()))?;
    let libraries = String::from_utf8(libraries)?;
    let tool = Path::new(libraries.trim()).with_file_name("bin").join("llvm-profdata");
    if !tool.exists() {
        bail!("{} is not there. Next step: rustup component add llvm-tools", tool.display());
    }
    Ok(tool)
}

/// What `command` prints.
fn done(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}

/// Names of hot functions, from `llvm-profdata show --all-functions --counts`.
fn hottest_first(shown: &str) -> Vec<&str> {
    let mut found: Vec<(u64, &str)> = Vec::new();
    let mut name = "";
    for line in shown.lines() {
        if let Some(counts) = line.trim_start().strip_prefix("Block counts: [") {
            let counts = counts.trim_end_matches(']').split(", ").filter_map(|count| count.parse().ok());
            let most = counts.max().unwrap_or(0);
            if most >= LEAST {
                found.push((most, name));
            }
        } else if let Some(function) = line.strip_prefix("  ").and_then(|line| line.strip_suffix(':'))
            && !function.starts_with(' ')
        {
            // One that other files of the program cannot see has the name of its own before it.
            name = function.rsplit(';').next().unwrap_or(function);
        }
    }
    found.sort_unstable_by_key(|&(most, name)| (std::cmp::Reverse(most), name));
    found.dedup_by_key(|&mut (_, name)| name);
    found.into_iter().map(|(_, name)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hottest_come_first_and_the_cold_not_at_all() {
        let shown = "Counters:\n  warm:\n    Hash: 0x1\n    Counters: 2\n    Block counts: [20000, 3]\n  cold:\n    \
                     Block counts: [9]\n  unit.1-cgu.0;hot:\n    Block counts: [1, 90000]\nInstrumentation level: IR\n";
        assert_eq!(hottest_first(shown), ["hot", "warm"]);
    }
}
