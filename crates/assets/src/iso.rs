//! A CD that boots by BIOS: GRUB, its menu on the serial port and the screen, and Linux behind it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::kernel::Kernel;
use crate::packages::{self, GRUB_MKRESCUE, GRUB_PC, MTOOLS, XORRISO, output_of};
use crate::{Progress, cache, content_hash, lock, qemu};

/// The title of the one menu entry.
pub const MENU_ENTRY: &str = "Linux by GRUB";

/// The menu waits two seconds, so that a reader of the console can see it, and boots.
fn grub_cfg() -> String {
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

/// The image for this kernel and initramfs, in the cache.
pub fn ensure(kernel: &Kernel, initrd: &Path, progress: &dyn Progress) -> Result<PathBuf> {
    packages::ensure(&[GRUB_MKRESCUE, GRUB_PC, XORRISO, MTOOLS], progress)?;
    let cache = cache()?;
    let _one_at_a_time = lock(&cache, "iso")?;
    // The initramfs carries a hash of its content in its name, the kernel its release.
    let hash = content_hash(&(grub_cfg(), &kernel.release, initrd));
    let iso = cache.join(format!("grub-{hash:016x}.iso"));
    if iso.is_file() {
        return Ok(iso);
    }
    progress.step("making a bootable ISO with GRUB");
    let tree = cache.join("iso.part");
    if tree.exists() {
        fs::remove_dir_all(&tree).with_context(|| format!("cannot remove {}", tree.display()))?;
    }
    let boot = tree.join("boot");
    fs::create_dir_all(boot.join("grub")).with_context(|| format!("cannot create {}", boot.display()))?;
    fs::copy(kernel.image(), boot.join("vmlinuz")).context("cannot copy the kernel")?;
    fs::copy(initrd, boot.join("initrd")).context("cannot copy the initramfs")?;
    fs::write(boot.join("grub/grub.cfg"), grub_cfg()).context("cannot write grub.cfg")?;
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
            "--install-modules=normal linux serial terminal iso9660 biosdisk part_msdos",
            "--output",
            &out,
            &from,
        ],
        &cache,
    )?;
    fs::rename(&part, &iso).with_context(|| format!("cannot rename to {}", iso.display()))?;
    fs::remove_dir_all(&tree).with_context(|| format!("cannot remove {}", tree.display()))?;
    Ok(iso)
}
