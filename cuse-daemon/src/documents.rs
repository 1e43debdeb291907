//! Manual pages and shell completions, from the definition of the command line: what an installation has beside the program.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};
use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use crate::cli::Cli;
use crate::exit::STATUSES;

/// Programs for the administrator.
const SECTION: &str = "8";

/// Where each shell looks, below a prefix.
const COMPLETIONS: &[(Shell, &str)] = &[
    (Shell::Bash, "share/bash-completion/completions/softkvm"),
    (Shell::Zsh, "share/zsh/site-functions/_softkvm"),
    (Shell::Fish, "share/fish/vendor_completions.d/softkvm.fish"),
];

const FILES: &[(&str, &str)] = &[
    ("/dev/kvm", "the device"),
    ("/dev/cuse, /dev/fuse", "what it is served by"),
    ("/run/softkvm/PID.sock", "a running daemon; softkvm status asks it"),
    ("/run/softkvm/PID.profile", "the same, for softkvm profile"),
];

/// Writes them all to where they lie below the prefix `prefix`.
pub fn write(prefix: &Path) -> Result<()> {
    let mut all = Cli::command();
    all.build();
    // The hidden subcommands are nobody's to call; clap's own help explains itself.
    let shown = all.get_subcommands().filter(|sub| !sub.is_hide_set() && sub.get_name() != "help");
    for command in std::iter::once(&all).chain(shown) {
        let name = command.get_display_name().unwrap_or_else(|| command.get_name());
        let mut page = Vec::new();
        manual(command, name, &mut page).context("making a manual page")?;
        put(&prefix.join(format!("share/man/man{SECTION}/{name}.{SECTION}")), &page)?;
    }
    for (shell, path) in COMPLETIONS {
        let mut script = Vec::new();
        clap_complete::generate(*shell, &mut Cli::command(), "softkvm", &mut script);
        put(&prefix.join(path), &script)?;
    }
    Ok(())
}

fn manual(command: &Command, name: &str, page: &mut Vec<u8>) -> std::io::Result<()> {
    let man = Man::new(command.clone()).title(name.to_uppercase()).section(SECTION);
    man.render_title(page)?;
    man.render_name_section(page)?;
    man.render_synopsis_section(page)?;
    man.render_description_section(page)?;
    man.render_options_section(page)?;
    if command.get_subcommands().any(|sub| !sub.is_hide_set()) {
        man.render_subcommands_section(page)?;
    }
    let mut rest = Roff::new();
    let mut list = |title: &str, rows: &mut dyn Iterator<Item = (String, &str)>| {
        rest.control("SH", [title]);
        for (term, what) in rows {
            rest.control("TP", []);
            rest.text([bold(term)]).text([roman(what)]);
        }
    };
    list("EXIT STATUS", &mut STATUSES.iter().map(|(status, what)| (status.to_string(), *what)));
    list("FILES", &mut FILES.iter().map(|(path, what)| ((*path).to_owned(), *what)));
    rest.to_writer(page)
}

fn put(path: &Path, content: &[u8]) -> Result<()> {
    let folder = path.parent().context("a path below a prefix")?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let write = |mut file: File| std::io::Write::write_all(&mut file, content);
    File::create(path).and_then(write).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_that_help_shows_has_its_page() {
        let prefix = std::env::temp_dir().join(format!("softkvm-documents-{}", std::process::id()));
        write(&prefix).unwrap();
        let pages = ["softkvm", "softkvm-run", "softkvm-serve", "softkvm-status", "softkvm-profile"];
        let folder = prefix.join("share/man/man8");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), pages.len());
        for page in pages {
            let text = fs::read_to_string(folder.join(format!("{page}.8"))).unwrap();
            for part in [&format!(".TH {} 8", page.to_uppercase()), ".SH SYNOPSIS", ".SH \"EXIT STATUS\"", ".SH FILES"]
            {
                assert!(text.contains(part), "no {part} in {text}");
            }
        }
        for (_, path) in COMPLETIONS {
            let script = fs::read_to_string(prefix.join(path)).unwrap();
            assert!(script.contains("no-passthrough"), "{path}");
        }
        fs::remove_dir_all(prefix).unwrap();
    }
}
