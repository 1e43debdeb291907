//! Firmware in Debian's QEMU.

use std::time::Duration;

use assets::qemu::Machine;
use softkvm_tests::qemu;

/// Generous: a loaded machine must not fail a test. What is slow is the benchmark's business.
const FIRMWARE: Duration = Duration::from_secs(180);

/// SeaBIOS runs all its option ROMs, iPXE asks the network, and nothing is there. Real and big real mode, PCI, PAM: the
/// firmware moves itself to RAM under its own feet by deleting and adding memory slots.
#[test]
fn seabios_without_a_disk_says_no_bootable_device() {
    let mut console = qemu::start(|accel| Machine::new(accel, 128)).expect("QEMU starts");
    console.expect("SeaBIOS (version", FIRMWARE).expect("the firmware shows itself");
    console.expect("No bootable device", FIRMWARE).expect("the firmware gets to its end");
}
