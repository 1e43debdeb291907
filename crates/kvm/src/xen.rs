//! Xen's hypercalls, for a VMM that answers them: `KVM_XEN_HVM_CONFIG` with interception. api.rst, and xen.c of Linux 6.1.
//!
//! The guest writes the address of a page to an MSR that the VMM names. The page's entries make the processor's hypercall, and each
//! ends `KVM_RUN` in `KVM_EXIT_XEN`. Pages that the VMM brings itself are not offered.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};

use kvm_abi::consts::KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL;
use kvm_abi::kvm_xen_hvm_config;
use mmu::View;
use nix::errno::Errno;
use x86_defs::{GuestPhysAddr, PAGE_BYTES, PAGE_MASK};

use crate::cpuid;

/// The answer for `KVM_CAP_XEN_HVM`.
pub(crate) const FLAGS: u32 = KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL;

/// Bytes of an entry of the page.
const ENTRY: u64 = 32;

/// What a VM has of it.
#[derive(Debug, Default)]
pub(crate) struct Xen {
    intercepts: AtomicBool,
    /// 0: none.
    msr: AtomicU32,
}

impl Xen {
    /// EINVAL: an unknown flag, or pages.
    pub(crate) fn configure(&self, config: &kvm_xen_hvm_config) -> Result<(), Errno> {
        let &kvm_xen_hvm_config { flags, msr, blob_addr_32, blob_addr_64, blob_size_32, blob_size_64, .. } = config;
        let has_pages = blob_addr_32 != 0 || blob_addr_64 != 0 || blob_size_32 != 0 || blob_size_64 != 0;
        if flags & !FLAGS != 0 || has_pages {
            return Err(Errno::EINVAL);
        }
        self.msr.store(msr, Relaxed);
        self.intercepts.store(flags & FLAGS != 0, Relaxed);
        Ok(())
    }

    /// Hypercalls are Xen's, and user space's to answer.
    pub(crate) fn intercepts(&self) -> bool {
        self.intercepts.load(Relaxed)
    }

    /// The guest names its page by this MSR.
    pub(crate) fn is_msr(&self, index: u32) -> bool {
        index != 0 && index == self.msr.load(Relaxed)
    }

    /// Fills the page at `value`. `None`: #GP(0), where there is none to fill, or no memory.
    pub(crate) fn write_page(&self, memory: &View, value: u64) -> Option<()> {
        if value & !PAGE_MASK != 0 || !self.intercepts() {
            return None;
        }
        memory.write(GuestPhysAddr(value), &entries()).ok()
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
