//! Tests of crates that were never written for softkvm, from crates.io, unmodified, as clients of its /dev/kvm.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The library test program of `name` at `version`, built now or found in the cache.
pub fn test_program(name: &str, version: &str) -> Result<PathBuf> {
    let cache = assets::cache()?;
    let _one_at_a_time = assets::lock(&cache, name)?;
    let source = source(&cache, name, version)?;
    let output = cargo()
        .args(["test", "--lib", "--no-run", "--message-format=json", "--manifest-path"])
        .arg(source.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(cache.join("foreign-target"))
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        bail!("{name} {version} does not build:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["profile"]["test"] == true)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .with_context(|| format!("cargo named no test program of {name}"))
}

/// A program made of `source`, which uses crates as `dependencies` (lines of a manifest) says: built now or found in the cache.
pub fn program(name: &str, dependencies: &str, source: &str) -> Result<PathBuf> {
    let cache = assets::cache()?;
    let _one_at_a_time = assets::lock(&cache, name)?;
    let folder = cache.join(format!("foreign/{name}"));
    fs::create_dir_all(folder.join("src")).with_context(|| format!("cannot create {}", folder.display()))?;
    let manifest =
        format!("[package]\nname = \"{name}\"\nedition = \"2024\"\n[workspace]\n[dependencies]\n{dependencies}\n");
    fs::write(folder.join("Cargo.toml"), manifest).context("cannot write a manifest")?;
    fs::write(folder.join("src/main.rs"), source).context("cannot write a source file")?;
    let target = cache.join("foreign-target");
    let mut build = cargo();
    build.args(["build", "--release", "--manifest-path"]).arg(folder.join("Cargo.toml"));
    let output = build.arg("--target-dir").arg(&target).output().context("cannot start cargo")?;
    if !output.status.success() {
        bail!("{name} does not build:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(target.join("release").join(name))
}

/// A copy of the registry's source. cargo has checked its hash; the copy makes it a package of its own.
fn source(cache: &Path, name: &str, version: &str) -> Result<PathBuf> {
    let copy = cache.join(format!("foreign/{name}-{version}"));
    if copy.join("Cargo.toml").is_file() {
        return Ok(copy);
    }
    let asking = cache.join(format!("foreign/asking-for-{name}"));
    fs::create_dir_all(asking.join("src")).with_context(|| format!("cannot create {}", asking.display()))?;
    let manifest = format!(
        "[package]\nname = \"asking\"\nedition = \"2021\"\n[workspace]\n[dependencies]\n{name} = \"={version}\"\n"
    );
    fs::write(asking.join("Cargo.toml"), manifest).context("cannot write a manifest")?;
    fs::write(asking.join("src/lib.rs"), "").context("cannot write a source file")?;
    let output = cargo()
        .args(["metadata", "--format-version=1", "--manifest-path"])
        .arg(asking.join("Cargo.toml"))
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        bail!("cannot fetch {name} {version}:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata is no JSON")?;
    let manifest = metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|package| package["name"] == name && package["version"] == version)
        .and_then(|package| package["manifest_path"].as_str())
        .with_context(|| format!("cargo metadata does not name {name} {version}"))?;
    let original = Path::new(manifest).parent().context("a manifest lies in a folder")?;
    let part = copy.with_extension("part");
    copy_tree(original, &part)?;
    fs::rename(&part, &copy).with_context(|| format!("cannot rename to {}", copy.display()))?;
    Ok(copy)
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot create {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_tree(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target).with_context(|| format!("cannot copy {}", entry.path().display()))?;
        }
    }
    Ok(())
}

/// cargo without what the cargo that runs us has set for this workspace.
fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (variable, _) in std::env::vars_os() {
        let name = variable.to_string_lossy();
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST") || name == "CARGO_TARGET_DIR" {
            command.env_remove(&variable);
        }
    }
    command.current_dir("/");
    command
}

/// What libtest says about each test: `test NAME ... ok`, in the order of names.
pub fn results(output: &str) -> BTreeMap<String, String> {
    output
        .lines()
        .filter_map(|line| line.strip_prefix("test ")?.split_once(" ... "))
        .map(|(name, result)| {
            // `test a - should panic ... ok`; `ignored, because`
            let name = name.split(" - ").next().unwrap_or(name);
            let result = result.split(',').next().unwrap_or(result);
            (name.trim().to_owned(), result.trim().to_owned())
        })
        // `test a ... ` and then nothing: it did not come back.
        .filter(|(_, result)| !result.is_empty())
        .collect()
}

/// `NAME  reason`, one per line; `#` begins a comment. For tests that are known to fail.
pub fn expected_failures(table: &str) -> BTreeMap<&str, &str> {
    table
        .lines()
        .filter(|line| !line.trim_start().starts_with('#') && !line.trim().is_empty())
        .map(|line| {
            let (name, reason) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
            assert!(!reason.trim().is_empty(), "a line of expected-failures.txt gives no reason: {line}");
            (name, reason.trim())
        })
        .collect()
}

/// Compares results with the table: what failed unexpectedly, what passes although it is listed, what is listed and was
/// not run. Empty: all as expected.
pub fn surprises(results: &BTreeMap<String, String>, expected: &BTreeMap<&str, &str>) -> Vec<String> {
    let mut found = Vec::new();
    for (name, result) in results {
        match (result.as_str(), expected.get(name.as_str())) {
            ("ok", Some(_)) => found.push(format!("{name} passes now: take it off the list")),
            ("ok" | "ignored", _) => {}
            (_, Some(_)) => {}
            (other, None) => found.push(format!("{name}: {other}")),
        }
    }
    found.extend(
        expected.keys().filter(|n| !results.contains_key(**n)).map(|n| format!("{n} is listed and did not run")),
    );
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "running 4 tests\ntest a::one ... ok\ntest a::two ... FAILED\n\
                          test a::three - should panic ... ok\ntest a::four ... ignored, needs SEV\ntest a::six ... ";

    #[test]
    fn results_are_read_by_name() {
        let results = results(OUTPUT);
        assert_eq!(results["a::one"], "ok");
        assert_eq!(results["a::two"], "FAILED");
        assert_eq!(results["a::three"], "ok");
        assert_eq!(results["a::four"], "ignored");
        assert!(!results.contains_key("a::six"));
    }

    #[test]
    fn both_directions_of_a_surprise_are_found() {
        let results = results(OUTPUT);
        assert!(surprises(&results, &expected_failures("a::two  not yet\n")).is_empty());
        assert_eq!(surprises(&results, &expected_failures("# none\n")), ["a::two: FAILED"]);
        let both = expected_failures("a::two not yet\na::one old\na::five gone\n");
        assert_eq!(
            surprises(&results, &both),
            ["a::one passes now: take it off the list", "a::five is listed and did not run"]
        );
    }
}
