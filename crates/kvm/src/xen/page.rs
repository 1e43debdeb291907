//! The page of hypercalls, which the guest names by writing its address to an MSR of user space's choice. `kvm_xen_write_hypercall_page`.
//!
//! Its entries make the processor's hypercall where these are intercepted; otherwise it is a page of user space's. That has to be
//! fetched by way of its thread, so the instruction always leaves the guest.

use std::sync::atomic::Ordering::Relaxed;

use nix::errno::Errno;
use x86_defs::{Efer, GuestPhysAddr, PAGE_BYTES, PAGE_MASK};

use crate::client::Client;
use crate::cpuid;
use crate::vcpu::Vcpu;

/// Bytes of an entry of the page.
const ENTRY: u64 = 32;

impl Vcpu {
    /// The MSR is written: an address, and in its lowest bits which of user space's pages. The shared pages have the layout of the
    /// mode that the vCPU is in. False: #GP(0), for there is no such page, or no memory. EFAULT: not user space's either.
    pub(crate) fn write_xen_page(&mut self, client: &dyn Client, value: u64) -> Result<bool, Errno> {
        let xen = &self.vm.options.xen;
        let long = self.cpu.sregs().efer.contains(Efer::LMA);
        xen.long_mode.store(long, Relaxed);
        let number = value & !PAGE_MASK;
        let page = if xen.intercepts() {
            if number != 0 {
                return Ok(false);
            }
            entries()
        } else {
            let config = *xen.config.lock();
            let (address, pages) = match long {
                true => (config.blob_addr_64, config.blob_size_64),
                false => (config.blob_addr_32, config.blob_size_32),
            };
            if number >= pages.into() {
                return Ok(false);
            }
            let mut page = vec![0; PAGE_BYTES as usize];
            client.read(address.wrapping_add(number * PAGE_BYTES), &mut page)?;
            page
        };
        Ok(self.machine.memory().write(GuestPhysAddr(value & PAGE_MASK), &page).is_ok())
    }
}

/// Entry n: MOV EAX, n; the processor's hypercall; RET; INT3 up to the next.
fn entries() -> Vec<u8> {
    let own = if cpuid::host_is_amd() { 0xd9 } else { 0xc1 };
    let entry = |n: u64| {
        let mut bytes = [0xcc; ENTRY as usize];
        bytes[0] = 0xb8;
        bytes[1..5].copy_from_slice(&(n as u32).to_le_bytes());
        bytes[5..9].copy_from_slice(&[0x0f, 0x01, own, 0xc3]);
        bytes
    };
    (0..PAGE_BYTES / ENTRY).flat_map(entry).collect()
}
