//! README.md has the tables of ioctls and of the header of 2007 as the code has them.

use std::fs;

use kvm::header::{LINES, Part};
use kvm::ioctl::{ROWS, Support};

const WIDTH: usize = 118;

/// The names by file, wrapped; then what is partial, and why.
fn list() -> String {
    let mut text = String::from("\n");
    for file in ["System", "Vm", "Vcpu", "Device"] {
        let mut line = format!("    {file:<7}");
        for row in ROWS.iter().filter(|row| row.file == file) {
            let name = row.name.strip_prefix("KVM_").unwrap_or(row.name);
            if line.len() + 1 + name.len() > WIDTH {
                text += &line;
                text.push('\n');
                line = " ".repeat(11);
            }
            line.push(' ');
            line += name;
        }
        text += &line;
        text.push('\n');
    }
    let mut partial = ROWS.iter().filter_map(|row| match row.support {
        Support::Partial(missing) => Some(format!("- `{}` is partial: {missing}\n", row.name)),
        Support::Full => None,
    });
    if let Some(first) = partial.next() {
        text.push('\n');
        text += &first;
        text.extend(partial);
    }
    text + "\n"
}

/// A table for each part of the header: how much there is, and the test that shows it.
fn header() -> String {
    let mut text = String::new();
    let parts = [
        (Part::Ioctl, "ioctl"),
        (Part::Exit, "exit reason"),
        (Part::Run, "field of `kvm_run`"),
        (Part::Type, "structure or constant"),
    ];
    for (part, title) in parts {
        text += &format!("\n| {title} | support | shown by |\n|---|---|---|\n");
        for line in LINES.iter().filter(|line| line.part == part) {
            let support = match line.support() {
                Support::Full => "full".to_owned(),
                Support::Partial(missing) => format!("partial: {missing}"),
            };
            let differs = if line.differs.is_empty() { String::new() } else { format!("; {}", line.differs) };
            let others = match line.shown_by.len() - 1 {
                0 => String::new(),
                others => format!(" and {others} more"),
            };
            text += &format!("| `{}` | {support}{differs} | `{}`{others} |\n", line.name, line.shown_by[0]);
        }
    }
    text + "\n"
}

/// Compares, or replaces, what stands between two comments of README.md.
fn check(blocks: &[(&str, String)]) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../README.md");
    let mut readme = fs::read_to_string(path).expect("README.md is there");
    let update = std::env::var_os("SOFTKVM_TEST_UPDATE").is_some();
    for (name, new) in blocks {
        let begin = format!("<!-- {name}: SOFTKVM_TEST_UPDATE=1 cargo test -p kvm --test readme -->\n");
        let end = format!("<!-- end of {name} -->\n");
        let (head, rest) = readme.split_once(&begin).expect("the block's begin is marked");
        let (old, tail) = rest.split_once(&end).expect("the block's end is marked");
        assert!(update || old == new, "run it with SOFTKVM_TEST_UPDATE=1 to bring README.md up to the {name}");
        readme = format!("{head}{begin}{new}{end}{tail}");
    }
    if update {
        fs::write(path, readme).expect("README.md can be written");
    }
}

#[test]
fn readme_has_the_tables_of_the_code() {
    check(&[("ioctls", list()), ("header of 2007", header())]);
}
