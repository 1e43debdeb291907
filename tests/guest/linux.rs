//! Linux in Debian's QEMU: booted directly, from a CD by GRUB, and with somebody at its prompt.

use std::time::Duration;

use assets::qemu::{Accel, Irqchip, Machine};
use assets::{Quiet, initramfs, iso, kernel};
use softkvm_tests::{long, qemu};

const MEMORY_MIB: u32 = 256;
/// Generous: a loaded machine must not fail a test. What is slow is the benchmark's business.
const FIRMWARE: Duration = Duration::from_secs(120);
const KERNEL: Duration = Duration::from_secs(240);

/// What Linux says when it uses what KVM offers to a guest of several processors (arch/x86/kernel/kvm.c of 6.1). All of it
/// is behind CPUID bits that QEMU gives no guest by default, but one of `-cpu max`.
const PARAVIRTUAL: &[&str] = &[
    "kvm-guest: KVM setup pv remote TLB flush",
    "kvm-guest: setup PV sched yield",
    "kvm-guest: PV spinlocks enabled",
    "kvm-guest: setup PV IPIs",
];

/// `-kernel`: the shortest way to user space, and back out through ACPI.
#[test]
fn linux_reaches_user_space_and_powers_off() {
    let kernel = kernel::ensure(&Quiet).expect("the kernel");
    let initrd = initramfs::ensure(&Quiet).expect("the initramfs");
    let mut console =
        qemu::start(|accel| Machine::new(accel, MEMORY_MIB).linux(&kernel.image(), &initrd, "")).expect("QEMU starts");
    console.expect("Linux version", FIRMWARE).expect("the kernel's first line");
    console.expect("Run /init as init process", KERNEL).expect("the kernel's last line before user space");
    console.expect(initramfs::BOOTED, KERNEL).expect("user space");
    console.expect("reboot: Power down", KERNEL).expect("the way out");
    assert!(console.finish(FIRMWARE).expect("QEMU ends").success());
}

/// QEMU's default machine: all interrupt controllers in the kernel. Its processor has all that the host offers.
#[test]
fn linux_has_two_processors_with_interrupt_controllers_in_the_kernel() {
    let text = boots_two_processors(Irqchip::On, |mut machine| {
        machine.push(["-cpu", "max"]);
        machine
    });
    if qemu::accel() == Accel::Kvm {
        for line in PARAVIRTUAL {
            assert!(text.contains(line), "no {line:?}\n{text}");
        }
    }
}

/// Local APICs in the kernel, PIC, I/O APIC and PIT in QEMU, which hears of each EOI of a level-triggered line.
#[test]
fn linux_has_two_processors_with_split_interrupt_controllers() {
    boots_two_processors(Irqchip::Split, |machine| machine);
}

fn boots_two_processors(irqchip: Irqchip, with: impl Fn(Machine) -> Machine) -> String {
    let kernel = kernel::ensure(&Quiet).expect("the kernel");
    let initrd = initramfs::ensure(&Quiet).expect("the initramfs");
    let machine = |accel| Machine::new(accel, MEMORY_MIB).irqchip(irqchip).cpus(2).linux(&kernel.image(), &initrd, "");
    let mut console = qemu::start(|accel| with(machine(accel))).expect("QEMU starts");
    console.expect("Linux version", FIRMWARE).expect("the kernel's first line");
    console.expect("Brought up 1 node, 2 CPUs", KERNEL).expect("the second processor");
    console.expect(initramfs::BOOTED, KERNEL).expect("user space");
    console.expect("reboot: Power down", KERNEL).expect("the way out");
    assert!(console.finish(FIRMWARE).expect("QEMU ends").success());
    console.text()
}

/// An ISO through the BIOS: disk services, GRUB between real and protected mode, its menu as VGA text, the kernel from it.
/// The image is a CD and a hard disk at once; as a CD it costs an exit per two bytes, so that is the longer form.
#[test]
fn grub_shows_its_menu_and_boots_linux() {
    let kernel = kernel::ensure(&Quiet).expect("the kernel");
    let initrd = initramfs::ensure(&Quiet).expect("the initramfs");
    let iso = iso::ensure(&kernel, &initrd, &Quiet).expect("the ISO");
    boots_by_grub(|machine| machine.disk(&iso));
    if long() {
        boots_by_grub(|machine| machine.cdrom(&iso));
    }
}

fn boots_by_grub(with: impl Fn(Machine) -> Machine) {
    let mut console = qemu::start(|accel| with(Machine::new(accel, MEMORY_MIB))).expect("QEMU starts");
    console.expect("GNU GRUB", FIRMWARE).expect("the head of the menu");
    console.expect(iso::MENU_ENTRY, FIRMWARE).expect("the entry of the menu");
    console.expect("Linux version", KERNEL).expect("the kernel that GRUB loaded");
    console.expect(initramfs::BOOTED, KERNEL).expect("user space");
    console.expect("reboot: Power down", KERNEL).expect("the way out");
    assert!(console.finish(FIRMWARE).expect("QEMU ends").success());
}

/// The guest's shell answers what is typed: interrupts come in while the guest halts.
#[test]
fn the_shell_of_the_demo_answers() {
    let kernel = kernel::ensure(&Quiet).expect("the kernel");
    let initrd = initramfs::ensure(&Quiet).expect("the initramfs");
    let mut console =
        qemu::start(|accel| Machine::new(accel, MEMORY_MIB).linux(&kernel.image(), &initrd, initramfs::SHELL_OPTION))
            .expect("QEMU starts");
    console.expect("softkvm guest #", KERNEL).expect("the prompt");
    console.send("echo $((6 * 7)) is the answer\n").expect("typing");
    console.expect("42 is the answer", FIRMWARE).expect("the shell's answer");
    console.send("exit\n").expect("typing");
    console.expect("reboot: Power down", FIRMWARE).expect("the way out");
    assert!(console.finish(FIRMWARE).expect("QEMU ends").success());
}
