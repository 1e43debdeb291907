//! The guest's console on its way to ours: shown at once, watched for what proves that the boot went through.

use std::io::{Read, Write};

use anyhow::{Context, Result};
use softkvm_tests::console::Plain;

/// Lines that were looked for.
#[derive(Default)]
pub(crate) struct Seen {
    /// The initramfs reached user space.
    pub(crate) booted: bool,
    /// The kernel's last words before it turns the machine off.
    pub(crate) powered_off: bool,
}

/// `kernel_power_off` in Linux' kernel/reboot.c prints it.
const POWER_DOWN: &str = "reboot: Power down";

/// Copies `guest` to `screen` until it ends. `verbatim` leaves escape sequences in: a firmware clears the screen and
/// turns off line wrap, which is right under a user's shell and wrong in the middle of a log.
pub(crate) fn show(guest: &mut impl Read, screen: &mut impl Write, verbatim: bool) -> Result<Seen> {
    let mut seen = Seen::default();
    let mut line = Vec::new();
    let mut plain = Plain::default();
    let mut buffer = [0; 4096];
    loop {
        let n = guest.read(&mut buffer).context("reading the guest's console")?;
        if n == 0 {
            return Ok(seen);
        }
        let mut text = Vec::with_capacity(n);
        for &byte in &buffer[..n] {
            if plain.keeps(byte) {
                text.push(byte);
                line.push(byte);
            }
            if byte == b'\n' {
                seen.look_at(&String::from_utf8_lossy(&line));
                line.clear();
            }
        }
        // Nobody may be reading us any more; the guest is still worth waiting for.
        let _ = screen.write_all(if verbatim { &buffer[..n] } else { &text }).and_then(|()| screen.flush());
    }
}

impl Seen {
    fn look_at(&mut self, line: &str) {
        self.booted |= line.trim_start().starts_with(assets::initramfs::BOOTED);
        self.powered_off |= line.contains(POWER_DOWN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(guest: &str, verbatim: bool) -> (String, Seen) {
        let mut screen = Vec::new();
        let seen = show(&mut guest.as_bytes(), &mut screen, verbatim).expect("memory does not fail");
        (String::from_utf8(screen).expect("text went in"), seen)
    }

    #[test]
    fn escape_sequences_are_left_out_of_a_log() {
        assert_eq!(shown("\x1bc\x1b[?7l\x1b[2JSeaBIOS\r\n", false).0, "SeaBIOS\r\n");
        assert_eq!(shown("\x1b[2Jx", true).0, "\x1b[2Jx");
    }

    #[test]
    fn both_marks_are_needed_and_found() {
        let seen = shown("BOOTED after 1.2 s\r\n[ 2.0] reboot: Power down\r\n", true).1;
        assert!(seen.booted && seen.powered_off);
        let seen = shown("+ echo BOOTED\r\n[ 2.0] reboot: Restarting system\r\n", true).1;
        assert!(!seen.booted && !seen.powered_off);
    }
}
