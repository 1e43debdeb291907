//! Guests as users have them, in Debian's QEMU: firmware, boot loader, kernel.

mod boot;
