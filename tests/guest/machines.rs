//! An unmodified Debian on each of QEMU's machines: from a disk on virtio to the login prompt, a load, and off again.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use assets::debian::{self, Debian};
use assets::kernel::{self, Kernel};
use assets::qemu::{Board, Irqchip, Machine};
use assets::{Quiet, packages};
use softkvm_tests::{long, qemu};

const MEMORY_MIB: u32 = 512;
/// Generous: a loaded machine must not fail a test.
const BOOT: Duration = Duration::from_secs(600);
const ANSWER: Duration = Duration::from_secs(300);

/// One machine at a time: each takes all CPUs.
static ONE: Mutex<()> = Mutex::new(());

fn assets() -> (Kernel, Debian) {
    (kernel::ensure(&Quiet).expect("the kernel"), debian::ensure(&Quiet).expect("Debian"))
}

/// What `line` prints in the same system on this machine's CPU.
fn on_this_cpu(debian: &Debian, line: &[&str]) -> String {
    let output = debian.chroot(line).output().expect("chroot starts");
    assert!(output.status.success(), "{line:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("it is text")
}

fn boots_debian(board: Board, irqchip: Irqchip) {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (kernel, debian) = assets();
    let initrd = debian::initramfs(&kernel, &Quiet).expect("the initramfs");
    let version = on_this_cpu(&debian, &["apt-get", "--version"]);
    let mut console = qemu::start(|accel| {
        let machine = Machine::new(accel, MEMORY_MIB).board(board, irqchip).cpus(2);
        machine.linux(&kernel.image(), &initrd, "root=/dev/vda").scratch_disk(&debian.disk)
    })
    .expect("QEMU starts");
    let prompt = format!("root@{}:~# ", debian::HOST);
    console.expect("Brought up 1 node, 2 CPUs", BOOT).expect("the second processor");
    console.expect(&format!("{} login: ", debian::HOST), BOOT).expect("the login prompt");
    console.send("root\n").expect("typing");
    console.expect(&prompt, ANSWER).expect("the shell");

    // The echo of what is typed holds no number.
    console.send("apt-get --version; echo status=$?\n").expect("typing");
    console.expect("echo status=$?\r\n", ANSWER).expect("what was typed");
    let seen = console.expect("status=0\r\n", ANSWER).expect("apt-get ends well");
    assert_eq!(seen.replace('\r', ""), version + "status=0\n");

    let seconds = if long() { 30 } else { 5 };
    console
        .send(&format!(
            "stress-ng --verify --timeout {seconds} --cpu 2 --vm 1 --vm-bytes 32M --pipe 1 --timer 1; echo status=$?\n"
        ))
        .expect("typing");
    console.expect("successful run completed", ANSWER).expect("stress-ng finds no error");
    console.expect("status=0\r\n", ANSWER).expect("stress-ng ends well");

    console.send("poweroff\n").expect("typing");
    console.expect("reboot: Power down", ANSWER).expect("the way out");
    assert!(console.finish(ANSWER).expect("QEMU ends").success());
}

/// As QEMU has it by default: all interrupt controllers in the kernel.
#[test]
fn debian_on_q35() {
    boots_debian(Board::Q35, Irqchip::On);
}

/// As QEMU has it by default: only the local APICs are in the kernel. The disk interrupts through the second I/O APIC.
#[test]
fn debian_on_microvm() {
    boots_debian(Board::Microvm, Irqchip::Split);
}

/// The other places of the interrupt controllers, and the PC.
#[test]
fn debian_on_all_other_machines() {
    if long() {
        boots_debian(Board::Pc, Irqchip::On);
        boots_debian(Board::Pc, Irqchip::Split);
        boots_debian(Board::Q35, Irqchip::Split);
        boots_debian(Board::Microvm, Irqchip::On);
    }
}

/// UEFI in long mode, up to where somebody may type.
fn ovmf_reaches_its_shell_on(machine: impl FnOnce(Machine) -> Machine) {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let q35 = |accel| machine(Machine::new(accel, MEMORY_MIB).board(Board::Q35, Irqchip::On).cpus(2));
    let mut console = qemu::start(|accel| {
        let mut machine = q35(accel);
        machine.push(["-net", "none"]);
        machine
    })
    .expect("QEMU starts");
    console.expect("UEFI Interactive Shell", BOOT).expect("the shell shows itself");
    console.expect("Shell> ", BOOT).expect("the prompt");
    console.send("ver\r").expect("typing");
    console.expect("UEFI v2.", ANSWER).expect("the shell's answer");
    console.send("reset -s\r").expect("typing");
    assert!(console.finish(ANSWER).expect("QEMU ends").success());
}

#[test]
fn ovmf_reaches_its_shell() {
    if !long() {
        return;
    }
    packages::ensure(&[packages::OVMF], &Quiet).expect("OVMF");
    ovmf_reaches_its_shell_on(|mut machine| {
        machine.push(["-bios", packages::OVMF.file]);
        machine
    });
}

/// Its variables are in flash that only system management mode may write: without SMM it does not get far.
#[test]
fn ovmf_with_smm_reaches_its_shell() {
    if !long() {
        return;
    }
    packages::ensure(&[packages::OVMF_SECURE, packages::OVMF_VARIABLES], &Quiet).expect("OVMF");
    let variables = std::env::temp_dir().join(format!("softkvm-variables-{}", std::process::id()));
    std::fs::copy(packages::OVMF_VARIABLES.file, &variables).expect("room for variables");
    ovmf_reaches_its_shell_on(|mut machine| {
        machine.push(["-machine", "smm=on", "-global", "driver=cfi.pflash01,property=secure,value=on"]);
        let flash = |unit, file: &str, more| format!("if=pflash,format=raw,unit={unit},file={file}{more}");
        machine.push(["-drive", &flash(0, packages::OVMF_SECURE.file, ",readonly=on")]);
        machine.push(["-drive", &flash(1, &variables.to_string_lossy(), "")]);
        machine
    });
    std::fs::remove_file(variables).expect("it is ours");
}
