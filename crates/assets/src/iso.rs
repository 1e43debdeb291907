//! A CD that boots by BIOS: GRUB, its menu on the serial port and the screen, and Linux behind it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::kernel::Kernel;
use crate::packages::{self, GRUB_MKRESCUE, GRUB_PC, MTOOLS, XORRISO, output_of};
use crate::{Progress, cache, content_hash, lock, qemu};

/// The title of the one menu entry.
pub const MENU_ENTRY: &str = "Linux by GRUB";

/// Written to the serial port in the moment that GRUB gives the machine to Linux.
pub const ENTERING: &str = "ENTERING LINUX";

/// The menu waits two seconds, so that a reader of the console can see it, and boots.
fn with_menu() -> String {
    format!(
        "serial --unit=0 --speed=115200\n\
         terminal_input serial console\n\
         terminal_output serial console\n\
         set timeout=2\n\
         menuentry '{MENU_ENTRY}' {{\n\
         \tlinux /boot/vmlinuz {}\n\
         \tinitrd /boot/initrd\n\
         }}\n",
        qemu::LINUX_COMMAND_LINE
    )
}

/// Nothing is asked and nothing but [`ENTERING`] is said. `options` are all that Linux is told.
fn at_once(options: &str) -> String {
    format!(
        "serial --unit=0 --speed=115200\n\
         terminal_output serial\n\
         linux /boot/vmlinuz {options}\n\
         initrd /boot/initrd\n\
         echo '{ENTERING}'\n\
         boot\n"
    )
}

/// The image for this kernel and initramfs, in the cache.
pub fn ensure(kernel: &Kernel, initrd: &Path, progress: &dyn Progress) -> Result<PathBuf> {
    let menu = with_menu();
    // The initramfs carries a hash of its content in its name, the kernel its release.
    let hash = content_hash(&(&menu, &kernel.release, initrd));
    let iso = cache()?.join(format!("grub-{hash:016x}.iso"));
    if !iso.is_file() {
        make(&iso, kernel, initrd, &menu, progress)?;
    }
    Ok(iso)
}

/// Writes `iso`, which boots this kernel and initramfs at once. `options` are all that Linux is told.
pub fn create(iso: &Path, kernel: &Kernel, initrd: &Path, options: &str, progress: &dyn Progress) -> Result<()> {
    make(iso, kernel, initrd, &at_once(options), progress)
}

fn make(iso: &Path, kernel: &Kernel, initrd: &Path, grub_cfg: &str, progress: &dyn Progress) -> Result<()> {
    packages::ensure(&[GRUB_MKRESCUE, GRUB_PC, XORRISO, MTOOLS], progress)?;
    let cache = cache()?;
    let _one_at_a_time = lock(&cache, "iso")?;
    progress.step("making a bootable ISO with GRUB");
    let tree = cache.join("iso.part");
    if tree.exists() {
        fs::remove_dir_all(&tree).with_context(|| format!("cannot remove {}", tree.display()))?;
    }
    let boot = tree.join("boot");
    fs::create_dir_all(boot.join("grub")).with_context(|| format!("cannot create {}", boot.display()))?;
    fs::copy(kernel.image(), boot.join("vmlinuz")).context("cannot copy the kernel")?;
    fs::copy(initrd, boot.join("initrd")).context("cannot copy the initramfs")?;
    fs::write(boot.join("grub/grub.cfg"), grub_cfg).context("cannot write grub.cfg")?;
    let part = iso.with_extension("part");
    let (out, from) = (part.to_string_lossy(), tree.to_string_lossy());
    // Only the modules that the menu uses: a CD is slow to read, byte by byte through the BIOS.
    output_of(
        "grub-mkrescue",
        &[
            "--directory=/usr/lib/grub/i386-pc",
            "--compress=no",
            "--locales=",
            "--fonts=",
            "--themes=",
            "--install-modules=normal linux serial terminal echo iso9660 biosdisk part_msdos",
            "--output",
            &out,
            &from,
        ],
        &cache,
    )?;
    fs::rename(&part, iso).with_context(|| format!("cannot rename to {}", iso.display()))?;
    fs::remove_dir_all(&tree).with_context(|| format!("cannot remove {}", tree.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linux_is_told_the_options_and_no_menu_waits() {
        let text = at_once("quiet bench=crc");
        assert!(text.contains("linux /boot/vmlinuz quiet bench=crc\n") && !text.contains("timeout"));
        // What is written last is what the reader of the console waits for.
        assert!(text.ends_with(&format!("echo '{ENTERING}'\nboot\n")));
    }
}
