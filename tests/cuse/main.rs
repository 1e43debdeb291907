//! `softkvm serve` on a kernel that has CUSE, which the machines that run these tests mostly lack: Debian's, in a
//! virtual machine of QEMU's own JIT. That kernel has no FUSE passthrough either, so both ways without are tested too.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use assets::initramfs::Archive;
use assets::packages::{self, BUSYBOX, QEMU};
use assets::qemu::{Accel, Machine};
use assets::{Quiet, kernel};
use softkvm_tests::console::Console;
use softkvm_tests::foreign::test_program;
use softkvm_tests::softkvm;

const BOOT: Duration = Duration::from_secs(240);
const STEP: Duration = Duration::from_secs(240);

const INIT: &str = "\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
insmod /fuse.ko
insmod /cuse.ko
softkvm serve &
daemon=$!
while ! [ -c /dev/kvm ]; do sleep 0.1; done
echo DEVICE: $(stat -c %F /dev/kvm)
softkvm status
kvm_ioctls --exact --test-threads=1 ioctls::vcpu::tests::test_run_code ioctls::vcpu::tests::xsave_test
echo CUSE: $?
softkvm status
kill $daemon
wait $daemon
echo SERVE: $?
[ -e /dev/kvm ] && echo /dev/kvm is still there
softkvm run -- kvm_ioctls --exact --test-threads=1 ioctls::vcpu::tests::test_run_code
echo FUSE: $?
poweroff -f
";

/// A program and the libraries that it loads, at the places where it looks for them.
fn add_program(archive: &mut Archive, name: &str, program: &Path, libraries: &mut Vec<PathBuf>) {
    archive.file(&format!("bin/{name}"), 0o755, &fs::read(program).expect("the program can be read"));
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

fn initramfs(modules: &Path) -> Vec<u8> {
    let mut archive = Archive::new();
    for dir in ["bin", "dev", "proc", "sys", "run", "tmp", "lib", "lib/x86_64-linux-gnu", "lib64"] {
        archive.directory(dir);
    }
    archive.char_device("dev/console", 5, 1);
    let busybox = packages::find(BUSYBOX).expect("busybox is installed");
    archive.file("bin/busybox", 0o755, &fs::read(busybox).expect("busybox can be read"));
    for module in ["fuse.ko", "cuse.ko"] {
        let content = fs::read(modules.join("kernel/fs/fuse").join(module)).expect("the kernel has the module");
        archive.file(module, 0o644, &content);
    }
    let mut libraries = Vec::new();
    add_program(&mut archive, "softkvm", softkvm::binary().expect("softkvm builds"), &mut libraries);
    let client = test_program("kvm-ioctls", "0.25.1").expect("the suite builds");
    add_program(&mut archive, "kvm_ioctls", &client, &mut libraries);
    archive.file("init", 0o755, INIT.as_bytes());
    archive.finish()
}

#[test]
fn a_character_device_serves_clients() {
    packages::ensure(&[QEMU, BUSYBOX], &Quiet).expect("QEMU and busybox");
    let kernel = kernel::ensure(&Quiet).expect("the kernel");
    let path = std::env::temp_dir().join(format!("softkvm-cuse-{}.cpio", std::process::id()));
    fs::write(&path, initramfs(&kernel.modules())).expect("the image can be written");
    let machine = Machine::new(Accel::Tcg, 1024).linux(&kernel.image(), &path, "quiet");
    let mut console = Console::start(&mut machine.command()).expect("QEMU starts");
    let mut expect = |needle: &str, within| {
        let seen = console.expect(needle, within);
        assert!(seen.is_ok(), "no {needle:?}: {}", console.tail());
    };
    // The guest's shell and the daemon write when they get there: the device may be looked at before it is announced.
    expect("serves /dev/kvm by CUSE", BOOT);
    expect("CUSE: 0", STEP);
    expect("no VMs", STEP);
    expect("SERVE: 0", STEP);
    expect("FUSE: 0", STEP);
    console.finish(STEP).expect("the machine powers off");
    for needle in ["/dev/kvm is a CUSE character device", "DEVICE: character special file"] {
        assert!(console.text().contains(needle), "no {needle:?}: {}", console.tail());
    }
    assert!(!console.text().contains("is still there"), "{}", console.tail());
    fs::remove_file(&path).expect("the image is there");
}
