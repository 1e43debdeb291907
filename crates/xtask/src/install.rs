//! `cargo xtask install`: the program, its unit, rule and documents, at the places where a host looks for them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cargo::{succeeds, target, workspace};

/// Install softkvm: program, systemd unit, udev rule, group, manual pages, completions.
///
/// Needs to be root for the usual prefixes. What was installed is listed; removing these files undoes it.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  cargo xtask install                                  below /usr/local\n  \
                        cargo xtask install --prefix /usr --destdir pkg      for a package\n\n\
                        Then, once: systemd-sysusers && udevadm control --reload && systemctl daemon-reload && \
                        systemctl enable --now softkvm")]
pub(crate) struct Args {
    /// Where the files will be used
    #[arg(long, value_name = "DIR", default_value = "/usr/local")]
    prefix: PathBuf,
    /// A folder to put in front of all paths, for packages [default: none]
    #[arg(long, value_name = "DIR")]
    destdir: Option<PathBuf>,
    /// Install this program instead of building one
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
}

/// What is copied: from the checkout, to below the prefix. `@PREFIX@` in it is filled in.
const TEXTS: &[(&str, &str)] = &[
    ("packaging/softkvm.service", "lib/systemd/system/softkvm.service"),
    ("packaging/65-softkvm.rules", "lib/udev/rules.d/65-softkvm.rules"),
    ("packaging/softkvm.sysusers", "lib/sysusers.d/softkvm.conf"),
    ("README.md", "share/doc/softkvm/README.md"),
    ("LICENSE-APACHE", "share/doc/softkvm/LICENSE-APACHE"),
    ("LICENSE-MIT", "share/doc/softkvm/LICENSE-MIT"),
];

const PROGRAM: &str = "sbin/softkvm";

/// True if all is in place.
pub(crate) fn run(args: &Args) -> Result<bool> {
    if !args.prefix.is_absolute() {
        bail!("--prefix {} is not absolute. Next step: --destdir takes relative paths", args.prefix.display());
    }
    let program = match &args.program {
        Some(program) => program.clone(),
        None => build()?,
    };
    let root = match &args.destdir {
        // `join` of an absolute path would forget what it is joined to.
        Some(destdir) => destdir.join(args.prefix.strip_prefix("/").context("absolute, as seen above")?),
        None => args.prefix.clone(),
    };
    let bytes = fs::read(&program).with_context(|| format!("cannot read {}", program.display()))?;
    put(&root.join(PROGRAM), &bytes, 0o755)?;
    for (from, to) in TEXTS {
        let from = workspace().join(from);
        let text = fs::read_to_string(&from).with_context(|| format!("cannot read {}", from.display()))?;
        put(&root.join(to), filled(&text, &args.prefix).as_bytes(), 0o644)?;
    }
    println!("{}/… (manual pages and completions)", root.join("share").display());
    succeeds(Command::new(&program).arg("documents").arg(&root))
}

fn build() -> Result<PathBuf> {
    let mut build = crate::cargo::cargo(["build", "--release", "--package", "cuse-daemon"]);
    if !succeeds(&mut build)? {
        bail!("softkvm did not build");
    }
    Ok(target().join("release/softkvm"))
}

fn filled(text: &str, prefix: &Path) -> String {
    text.replace("@PREFIX@", &prefix.to_string_lossy())
}

/// Written beside and renamed: a program that runs cannot be overwritten.
fn put(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    let folder = path.parent().context("a path below a prefix")?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let part = path.with_extension("part");
    fs::write(&part, content).with_context(|| format!("cannot write {}", part.display()))?;
    fs::set_permissions(&part, fs::Permissions::from_mode(mode)).context("cannot set permissions")?;
    fs::rename(&part, path).with_context(|| format!("cannot rename to {}", path.display()))?;
    println!("{}", path.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_there_and_no_blank_stays() {
        for (from, _) in TEXTS {
            let text = fs::read_to_string(workspace().join(from)).expect(from);
            assert!(!filled(&text, Path::new("/opt/x")).contains("@PREFIX@"), "{from}");
        }
        let unit = fs::read_to_string(workspace().join(TEXTS[0].0)).expect("the unit");
        assert!(filled(&unit, Path::new("/opt/x")).contains("ExecStart=/opt/x/sbin/softkvm serve"), "{unit}");
    }
}
