//! The installation under systemd: Debian's packages of it and of udev as the machine's user space, and beside them only
//! what `cargo xtask install` puts in place, two clients and the script of the test.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use assets::initramfs::Archive;
use assets::kernel::Kernel;
use assets::packages::{self, BUSYBOX};
use assets::{Quiet, root};
use softkvm_tests::foreign::test_program;
use softkvm_tests::{long, softkvm};

use super::{boot, temporary};

/// Generous: a loaded machine must not fail it. The long form kills for much longer.
const WITHIN: Duration = Duration::from_secs(480);
const WITHIN_LONG: Duration = Duration::from_secs(3600);

/// libgcc_s is what the program loads beside libc.
const PACKAGES: &[&str] = &["systemd", "udev", "kmod", "util-linux", "libgcc-s1"];

/// Makes what a package's installation would: names of programs, dependencies of modules.
const INIT: &str = "\
#!/bin/busybox sh
/bin/busybox --install -s /usr/bin 2>/dev/null
/usr/sbin/depmod
exec /lib/systemd/systemd
";

const SCRIPT: &str = include_str!("systemd.sh");

/// How often the daemon is killed at each moment, and the cases of the legacy client. The rest of them run in the other
/// machine in any case.
const SHORT: (&str, &str) = ("1", "header reset spin churn");
const LONG: (&str, &str) = ("20", "header smp display locked signals reset spin churn");

/// Nothing but what the test is about is wanted behind the basic system.
const TARGET: &str = "\
[Unit]
Requires=basic.target test.service
After=basic.target test.service
";

const SERVICE: &str = "\
[Service]
Type=oneshot
StandardInput=tty
StandardOutput=tty
StandardError=tty
TTYPath=/dev/console
ExecStart=/bin/busybox sh /test.sh
";

/// Ordinary users: one may use the device.
const USERS: &str = "\
u member 2000
u stranger 2001
m member kvm
";

/// Modules of the kernel package, and the folder in the machine: what is in `/kvm` nothing there finds by itself.
const MODULES: &[(&str, Option<&str>)] = &[
    ("kernel/fs/fuse/fuse.ko", None),
    ("kernel/fs/fuse/cuse.ko", None),
    ("kernel/virt/lib/irqbypass.ko", Some("kvm")),
    ("kernel/arch/x86/kvm/kvm.ko", Some("kvm")),
    ("kernel/arch/x86/kvm/kvm-amd.ko", Some("kvm")),
];

fn image(kernel: &Kernel) -> Vec<u8> {
    let mut archive = Archive::new();
    root::begin(&mut archive);
    archive.char_device("dev/console", 5, 1);
    for deb in root::ensure(PACKAGES, &Quiet).expect("systemd's packages") {
        root::unpack(&mut archive, &deb).expect("a package is read");
    }
    let busybox = packages::find(BUSYBOX).expect("busybox is installed");
    archive.file("usr/bin/busybox", 0o755, &fs::read(busybox).expect("busybox can be read"));
    add_modules(&mut archive, kernel);
    add_installation(&mut archive);

    let legacy = softkvm::build_static(&["softkvm", "legacy"]).expect("static programs").remove(1);
    archive.file("usr/bin/legacy", 0o755, &legacy);
    let modern = test_program("kvm-ioctls", "0.25.1").expect("the suite builds");
    archive.file("usr/bin/kvm_ioctls", 0o755, &softkvm::stripped(&modern).expect("strip"));

    archive.directory("etc/sysusers.d");
    let (rounds, cases) = if long() { LONG } else { SHORT };
    let script = SCRIPT.replace("@ROUNDS@", rounds).replace("@CASES@", cases);
    for (path, mode, text) in [
        ("init", 0o755, INIT),
        ("test.sh", 0o644, &script),
        ("etc/systemd/system/test.target", 0o644, TARGET),
        ("etc/systemd/system/test.service", 0o644, SERVICE),
        ("etc/sysusers.d/test.conf", 0o644, USERS),
        ("etc/os-release", 0o644, "ID=debian\nPRETTY_NAME=Test\n"),
        // Not the first boot, at which systemd asks questions.
        ("etc/machine-id", 0o444, "0123456789abcdef0123456789abcdef\n"),
    ] {
        archive.file(path, mode, text.as_bytes());
    }
    archive.finish()
}

fn add_modules(archive: &mut Archive, kernel: &Kernel) {
    let lib = format!("usr/lib/modules/{}", kernel.release);
    for folder in ["usr/lib/modules", &lib, &format!("{lib}/kernel"), &format!("{lib}/kernel/fs"), "kvm"] {
        archive.directory(folder);
    }
    archive.directory(&format!("{lib}/kernel/fs/fuse"));
    let read = |name: &str| fs::read(kernel.modules().join(name)).unwrap_or_else(|err| panic!("{name}: {err}"));
    for list in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
        archive.file(&format!("{lib}/{list}"), 0o644, &read(list));
    }
    for (module, folder) in MODULES {
        let name = module.rsplit('/').next().unwrap_or(module);
        let path = folder.map_or_else(|| format!("{lib}/{module}"), |folder| format!("{folder}/{name}"));
        archive.file(&path, 0o644, &read(module));
    }
}

/// What `cargo xtask install` installs, as it installs it.
fn add_installation(archive: &mut Archive) {
    let place = temporary("installation");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut install = Command::new(cargo);
    install.args(["run", "--quiet", "--package", "xtask", "--", "install", "--program"]);
    install.arg(softkvm::binary().expect("softkvm")).arg("--destdir").arg(&place);
    let output = install.current_dir(softkvm::workspace()).output().expect("cargo starts");
    assert!(output.status.success(), "{install:?}: {}", String::from_utf8_lossy(&output.stderr));
    for page in ["softkvm.8", "softkvm-serve.8"] {
        assert!(place.join("usr/local/share/man/man8").join(page).exists(), "no {page}");
    }
    add_folder(archive, &place, "");
    fs::remove_dir_all(place).expect("the installation is there");
}

fn add_folder(archive: &mut Archive, folder: &Path, name: &str) {
    for entry in fs::read_dir(folder).expect("a folder of the installation") {
        let entry = entry.expect("an entry");
        let (from, to) = (entry.path(), format!("{name}{}", entry.file_name().to_string_lossy()));
        if from.is_dir() {
            archive.directory(&to);
            add_folder(archive, &from, &format!("{to}/"));
        } else {
            let mode = fs::metadata(&from).expect("a file").permissions().mode() & 0o7777;
            let is_program = to.ends_with("sbin/softkvm");
            let content = if is_program { softkvm::stripped(&from) } else { Ok(fs::read(&from).expect("a file")) };
            archive.file(&to, mode, &content.expect("strip"));
        }
    }
}

#[test]
fn the_unit_and_the_rule_work_under_systemd_and_udevd() {
    let options = "quiet systemd.unit=test.target systemd.show_status=no";
    let mut machine = boot("systemd", image, options);
    let within = if long() { WITHIN_LONG } else { WITHIN };
    let ended = machine.console.expect("ALL STEPS OK", within);
    // All of it: what went wrong stands where the step failed.
    assert!(ended.is_ok(), "{}", machine.console.text());
    machine.console.finish(WITHIN).expect("the machine powers off");
    print!("{}", machine.console.text());
}
