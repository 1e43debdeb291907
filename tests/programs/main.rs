//! Programs of Debian's archive, unmodified, in a guest and on the machine's own CPU: every line that they print is the same.
//!
//! They choose their code by CPUID, and the guest is told of all that the core executes (`-cpu max`), so what is compared is
//! AES, SHA, AVX2, FMA, BMI2 and ADX arithmetic as real software uses it. Both run from the same packages; on this machine
//! they run under chroot(1).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use assets::initramfs::Archive;
use assets::qemu::Machine;
use assets::{Quiet, kernel, root};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use softkvm_tests::{long, qemu};

/// What the short form runs.
const PACKAGES: &[&str] =
    &["busybox-static", "coreutils", "dash", "gzip", "openssl", "sed", "sqlite3", "diffutils", "xz-utils", "zstd"];
/// What the long form runs besides.
const MORE_PACKAGES: &[&str] = &["gcc", "libc6-dev", "libpython3.11-testsuite", "libstb-dev", "python3"];

const SCRIPT: &str = include_str!("programs.sh");
const SOURCES: &[(&str, &str)] = &[("library.c", include_str!("library.c")), ("main.c", include_str!("main.c"))];

const INIT: &str = "\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
$b grep -m 1 flags /proc/cpuinfo
/programs/programs.sh $($b sed -n 's/.*programs=//p' /proc/cmdline)
$b poweroff -f
";

/// Private keys of these names, made anew each time.
const KEYS: &[(&str, &[&str])] = &[
    ("rsa", &["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"]),
    ("ed25519", &["-algorithm", "ED25519"]),
    ("ed448", &["-algorithm", "ED448"]),
    ("x25519", &["-algorithm", "X25519"]),
    ("x25519-2", &["-algorithm", "X25519"]),
    ("x448", &["-algorithm", "X448"]),
    ("x448-2", &["-algorithm", "X448"]),
    ("p256", &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"]),
    ("p256-2", &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"]),
    ("p384", &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"]),
    ("p384-2", &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"]),
    ("p521", &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-521"]),
    ("p521-2", &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-521"]),
];

/// Generous: a loaded machine must not fail a test.
fn patience() -> Duration {
    Duration::from_secs(if long() { 5400 } else { 900 })
}

/// A folder that goes when this does.
struct Root(PathBuf);

impl Drop for Root {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The packages as a folder, with scripts, sources and keys, for this machine's CPU.
fn unpacked(debs: &[PathBuf]) -> Root {
    let root = Root(std::env::temp_dir().join(format!("softkvm-programs-{}", std::process::id())));
    for folder in ["dev", "tmp", "programs", "keys"] {
        fs::create_dir_all(root.0.join(folder)).expect("a temporary folder");
    }
    root::unpack_all(debs, &root.0).expect("the packages are unpacked");
    let put = |name: &str, content: &[u8]| fs::write(root.0.join(name), content).expect("a file");
    for (name, minor) in [("null", 3), ("zero", 5)] {
        let (kind, mode) = (SFlag::S_IFCHR, Mode::from_bits_truncate(0o666));
        mknod(&root.0.join("dev").join(name), kind, mode, makedev(1, minor)).expect("a device node, as root");
    }
    put("programs/programs.sh", SCRIPT.as_bytes());
    for (name, source) in SOURCES {
        put(&format!("programs/{name}"), source.as_bytes());
    }
    for (name, how) in KEYS {
        let path = format!("/keys/{name}.pem");
        let mut openssl = chroot(&root);
        openssl.args(["/usr/bin/openssl", "genpkey"]).args(*how).args(["-quiet", "-out", &path]);
        let output = openssl.output().expect("chroot");
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    }
    root
}

fn chroot(root: &Root) -> Command {
    let mut command = Command::new("chroot");
    command.arg(&root.0);
    command
}

fn archive(debs: &[PathBuf], keys: &Path) -> Vec<u8> {
    let mut archive = Archive::new();
    root::begin(&mut archive);
    for folder in ["programs", "keys"] {
        archive.directory(folder);
    }
    archive.char_device("dev/console", 5, 1);
    for deb in debs {
        root::unpack(&mut archive, deb).expect("a package");
    }
    archive.file("init", 0o755, INIT.as_bytes());
    archive.file("programs/programs.sh", 0o755, SCRIPT.as_bytes());
    for (name, source) in SOURCES {
        archive.file(&format!("programs/{name}"), 0o644, source.as_bytes());
    }
    for (name, _) in KEYS {
        let key = fs::read(keys.join(name).with_extension("pem")).expect("a key");
        archive.file(&format!("keys/{name}.pem"), 0o600, &key);
    }
    archive.finish()
}

/// What stands between BEGIN and END.
fn results(text: &str) -> Vec<&str> {
    let lines = text.lines().map(str::trim_end).skip_while(|line| *line != "BEGIN").skip(1);
    lines.take_while(|line| *line != "END").collect()
}

#[test]
fn programs_give_what_they_give_on_this_cpu() {
    let long = long();
    let mut packages = PACKAGES.to_vec();
    if long {
        packages.extend(MORE_PACKAGES);
    }
    let debs = root::ensure(&packages, &Quiet).expect("the packages");
    let folder = unpacked(&debs);
    let argument = if long { "long" } else { "" };
    let begin = Instant::now();
    let host = chroot(&folder).args(["/usr/bin/dash", "/programs/programs.sh", argument]).output().expect("chroot");
    let host_took = begin.elapsed();
    let text = String::from_utf8_lossy(&host.stdout);
    let expected = results(&text);
    assert!(expected.len() > 60, "the programs do not run here:\n{text}{}", String::from_utf8_lossy(&host.stderr));

    let kernel = kernel::ensure(&Quiet).expect("the kernel");
    let image = folder.0.with_extension("cpio");
    fs::write(&image, archive(&debs, &folder.0.join("keys"))).expect("the archive");
    let memory = if long { 3072 } else { 1024 };
    let begin = Instant::now();
    let mut console = qemu::start(|accel| {
        let mut machine = Machine::new(accel, memory);
        machine.push(["-cpu", "max"]);
        machine.linux(&kernel.image(), &image, &format!("quiet programs={argument}"))
    })
    .expect("QEMU starts");
    console.expect("BEGIN", patience()).expect("user space");
    console.expect("END", patience()).expect("the last program");
    let took = begin.elapsed();
    let _ = fs::remove_file(&image);
    println!("{}", expected.join("\n"));
    let text = console.text();
    let has_avx512 = std::arch::is_x86_feature_detected!("avx512bw");
    assert_eq!(text.contains(" avx512bw "), has_avx512, "the guest has AVX-512 where this CPU has it");
    let actual = results(&text);
    println!("{} results; this CPU took {host_took:.1?}, the guest {took:.1?} with its boot", expected.len());
    for (expected, actual) in expected.iter().zip(&actual) {
        assert_eq!(expected, actual, "left: on this machine's CPU, right: in the guest");
    }
    assert_eq!(expected.len(), actual.len());
}
