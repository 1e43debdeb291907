//! README.md names every ioctl that the table has, as the table has it.

use std::fs;

use kvm::ioctl::{ROWS, Support};

const BEGIN: &str = "<!-- ioctls: SOFTKVM_TEST_UPDATE=1 cargo test -p kvm --test readme -->\n";
const END: &str = "<!-- end of ioctls -->\n";
const WIDTH: usize = 118;

/// The names by file, wrapped; then what is partial, and why.
fn list() -> String {
    let mut text = String::from("\n");
    for file in ["System", "Vm", "Vcpu"] {
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

#[test]
fn readme_lists_the_ioctls_of_the_table() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../README.md");
    let readme = fs::read_to_string(path).expect("README.md is there");
    let (head, rest) = readme.split_once(BEGIN).expect("the list's begin is marked");
    let (old, tail) = rest.split_once(END).expect("the list's end is marked");
    if std::env::var_os("SOFTKVM_TEST_UPDATE").is_some() {
        fs::write(path, format!("{head}{BEGIN}{}{END}{tail}", list())).expect("README.md can be written");
    } else {
        assert_eq!(old, list(), "run it with SOFTKVM_TEST_UPDATE=1 to bring README.md up to the table");
    }
}
