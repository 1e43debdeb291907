//! The plain VMM against QEMU: on softkvm, the same kernel must see the same processor in both, or the benchmark's guests would
//! not run the same code.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use assets::initramfs::Archive;
use assets::packages::{self, BUSYBOX};
use assets::qemu::{Accel, Irqchip, LINUX_COMMAND_LINE, Machine};
use assets::{Quiet, kernel};
use softkvm_tests::console::Console;
use softkvm_tests::{qemu, softkvm};

/// Generous: a loaded machine must not fail it.
const WITHIN: Duration = Duration::from_secs(120);
const MEMORY_MIB: u32 = 256;

const INIT: &str = "\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
echo PROCESSOR
$b grep -Ev 'MHz|bogomips' /proc/cpuinfo
echo END
$b reboot -f
";

/// A file that goes when this does.
struct Initrd(PathBuf);

impl Initrd {
    fn new() -> Self {
        packages::ensure(&[BUSYBOX], &Quiet).expect("busybox");
        let busybox = fs::read(packages::find(BUSYBOX).expect("busybox was ensured")).expect("it can be read");
        let mut archive = Archive::new();
        for folder in ["bin", "dev", "proc"] {
            archive.directory(folder);
        }
        archive.char_device("dev/console", 5, 1);
        archive.file("bin/busybox", 0o755, &busybox);
        archive.file("init", 0o755, INIT.as_bytes());
        let path = std::env::temp_dir().join(format!("softkvm-plain-{}", std::process::id()));
        fs::write(&path, archive.finish()).expect("the initramfs");
        Self(path)
    }
}

impl Drop for Initrd {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// What the guest prints of its processor; then its VMM must end as the guest resets the machine.
fn processor(mut console: Console) -> String {
    console.expect("PROCESSOR\r\n", WITHIN).expect("user space");
    let text = console.expect("END", WITHIN).expect("/proc/cpuinfo");
    let status = console.finish(WITHIN).expect("the guest resets the machine");
    assert!(status.success(), "{status}\n{}", console.tail());
    text
}

fn in_the_plain_vmm(kernel: &Path, initrd: &Path, options: &str) -> Console {
    let (program, memory) = (env!("CARGO_BIN_EXE_softkvm-bench"), MEMORY_MIB.to_string());
    let line = [Path::new(program), Path::new("--plain"), kernel, initrd, Path::new(&memory), Path::new(options)];
    Console::start(&mut softkvm::run::<&str, _>(&[], &line).expect("softkvm")).expect("it starts")
}

#[test]
fn the_guest_has_the_same_processor_as_in_qemu() {
    let kernel = kernel::ensure(&Quiet).expect("the kernel").image();
    let initrd = Initrd::new();
    let expected = qemu::start(|_| {
        let mut machine = Machine::new(Accel::Kvm, MEMORY_MIB).irqchip(Irqchip::On).linux(&kernel, &initrd.0, "quiet");
        machine.push(["-cpu", "qemu64", "-no-reboot"]);
        machine
    });
    let expected = processor(expected.expect("QEMU starts"));
    assert!(expected.contains("QEMU Virtual CPU") && expected.contains("flags"), "{expected}");
    let options = format!("{LINUX_COMMAND_LINE} quiet");
    assert_eq!(processor(in_the_plain_vmm(&kernel, &initrd.0, &options)), expected);
}
