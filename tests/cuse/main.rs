//! `softkvm serve` on a kernel that has CUSE, which the machines that run these tests mostly lack: Debian's, in a
//! virtual machine of QEMU's own JIT. That kernel has no FUSE passthrough either, so both ways without are tested too.
//!
//! Here with nothing but busybox, so that each step is one of ours; in `systemd.rs` as it is installed.

mod systemd;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use assets::Quiet;
use assets::initramfs::Archive;
use assets::kernel::{self, Kernel};
use assets::packages::{self, BUSYBOX, QEMU, SETPRIV};
use assets::qemu::{Accel, Machine};
use softkvm_tests::console::Console;
use softkvm_tests::foreign::test_program;
use softkvm_tests::softkvm;

const BOOT: Duration = Duration::from_secs(240);
const STEP: Duration = Duration::from_secs(240);

/// What an installation ships.
const RULES: &str = include_str!("../../packaging/65-softkvm.rules");
const UNIT: &str = include_str!("../../packaging/softkvm.service");

/// The group in the machine, and the numbers of its users: two are members, one is not.
const GROUP: u32 = 104;

/// `@WORD@` is filled in from the files above. There is no udev here: what its rule says is done by hand.
const INIT: &str = include_str!("plain.sh");

/// What the machine prints once each of these steps has gone well, in this order.
const STEPS: &[&str] = &[
    "CUSE: 0",
    "LEGACY: 0",
    "BEFORE: no no",
    "RULE: yes no",
    "USER: 0",
    "USER LEGACY: 0",
    "VICTIM: 1000 1",
    "OTHER: no",
    "OTHER MEMORY: no",
    // A descriptor of KVM's cannot be opened anew by anybody.
    "ROOT: no",
    "OTHER LEGACY: 0",
    "SERVE: 0",
    "GROUP: 660 root kvm yes no",
    "FUSE: 0",
    "FUSE LEGACY: 0",
];

/// The value of `KEY="value"` or `KEY==..` in the one rule that there is.
fn rule(key: &str) -> &'static str {
    let mut rules = RULES.lines().filter(|line| !line.starts_with('#'));
    let (rule, None) = (rules.next().expect("a rule"), rules.next()) else { panic!("one rule") };
    let value = rule.split(", ").find_map(|part| part.strip_prefix(key)?.trim_start_matches('=').strip_prefix('"'));
    value.and_then(|value| value.strip_suffix('"')).unwrap_or_else(|| panic!("no {key} in {rule}"))
}

/// The capabilities of the unit, as setpriv wants them.
fn capabilities() -> String {
    let list = UNIT.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).expect("the unit bounds them");
    let names = list.split_whitespace().map(|name| name.trim_start_matches("CAP_").to_lowercase());
    names.fold("-all".to_owned(), |all, name| all + ",+" + &name)
}

fn init() -> String {
    let filled = [
        ("@GROUP@", GROUP.to_string()),
        ("@RULE_GROUP@", rule("GROUP").to_owned()),
        ("@RULE_MODE@", rule("MODE").to_owned()),
        ("@CAPABILITIES@", capabilities()),
    ];
    filled.into_iter().fold(INIT.to_owned(), |script, (word, value)| script.replace(word, &value))
}

/// A program and the libraries that it loads, at the places where it looks for them.
fn add_program(archive: &mut Archive, name: &str, program: &Path, libraries: &mut Vec<PathBuf>) {
    archive.file(name, 0o755, &fs::read(program).expect("the program can be read"));
    let output = Command::new("ldd").arg(program).output().expect("ldd runs");
    let list = String::from_utf8_lossy(&output.stdout).into_owned();
    let paths = list.split_whitespace().filter(|word| word.starts_with('/'));
    for path in paths.map(PathBuf::from) {
        if !libraries.contains(&path) {
            let content = fs::read(&path).expect("a library can be read");
            let file = path.file_name().expect("a library has a name").to_string_lossy();
            let dir = if file.starts_with("ld-") { "lib64" } else { "lib/x86_64-linux-gnu" };
            archive.file(&format!("{dir}/{file}"), 0o755, &content);
            libraries.push(path);
        }
    }
}

fn initramfs(kernel: &Kernel) -> Vec<u8> {
    let mut archive = Archive::new();
    for dir in ["bin", "sbin", "dev", "etc", "proc", "sys", "run", "tmp", "lib", "lib/x86_64-linux-gnu", "lib64"] {
        archive.directory(dir);
    }
    archive.char_device("dev/console", 5, 1);
    let busybox = packages::find(BUSYBOX).expect("busybox is installed");
    archive.file("bin/busybox", 0o755, &fs::read(busybox).expect("busybox can be read"));
    for module in ["fuse.ko", "cuse.ko"] {
        let content =
            fs::read(kernel.modules().join("kernel/fs/fuse").join(module)).expect("the kernel has the module");
        archive.file(module, 0o644, &content);
    }
    let mut libraries = Vec::new();
    let programs = softkvm::build_static(&["softkvm", "legacy"]).expect("static programs");
    for (name, program) in ["softkvm", "legacy"].into_iter().zip(programs) {
        archive.file(&format!("bin/{name}"), 0o755, &program);
    }
    let setpriv = packages::find(SETPRIV).expect("setpriv is installed");
    add_program(&mut archive, "sbin/setpriv", &setpriv, &mut libraries);
    let client = test_program("kvm-ioctls", "0.25.1").expect("the suite builds");
    add_program(&mut archive, "bin/kvm_ioctls", &client, &mut libraries);
    archive.file("etc/group", 0o644, format!("root:x:0:\nkvm:x:{GROUP}:\n").as_bytes());
    archive.file("etc/passwd", 0o644, b"root:x:0:0::/:/bin/sh\n");
    archive.file("init", 0o755, init().as_bytes());
    archive.finish()
}

/// A path of this process's own, which nobody has made yet.
fn temporary(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("softkvm-cuse-{name}-{}", std::process::id()))
}

/// One machine at a time: each takes all CPUs.
static ONE: Mutex<()> = Mutex::new(());

/// A machine that has begun to boot.
struct Booting {
    console: Console,
    image: PathBuf,
    _one: MutexGuard<'static, ()>,
}

impl Drop for Booting {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.image);
    }
}

fn boot(name: &str, image: impl FnOnce(&Kernel) -> Vec<u8>, options: &str) -> Booting {
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    packages::ensure(&[QEMU, BUSYBOX, SETPRIV], &Quiet).expect("QEMU, busybox and setpriv");
    let kernel = kernel::ensure(&Quiet).expect("the kernel");
    let path = temporary(name);
    fs::write(&path, image(&kernel)).expect("the image can be written");
    let mut machine = Machine::new(Accel::Tcg, 1024).linux(&kernel.image(), &path, options);
    // vCPUs in parallel.
    machine.push(["-smp", "2"]);
    let console = Console::start(&mut machine.command()).expect("QEMU starts");
    Booting { console, image: path, _one: one }
}

#[test]
fn a_character_device_serves_clients() {
    let mut machine = boot("plain", initramfs, "quiet");
    let console = &mut machine.console;
    let mut expect = |needle: &str, within| {
        let seen = console.expect(needle, within);
        assert!(seen.is_ok(), "no {needle:?}: {}", console.tail());
    };
    // The guest's shell and the daemon write when they get there: the device may be looked at before it is announced.
    expect("serves /dev/kvm by CUSE", BOOT);
    for step in STEPS {
        expect(&format!("{step}\r\n"), STEP);
    }
    console.finish(STEP).expect("the machine powers off");
    let subsystem = format!("SUBSYSTEM: {}", rule("SUBSYSTEM"));
    for needle in ["/dev/kvm is a CUSE character device", "DEVICE: character special file", &subsystem, "no VMs"] {
        assert!(console.text().contains(needle), "no {needle:?}: {}", console.tail());
    }
    assert!(!console.text().contains("is still there"), "{}", console.tail());
}
