//! API structures as bytes.
#![expect(unsafe_code, reason = "kvm-bindings' structures have no safe conversion; `plain!` proves what one needs")]

use kvm_bindings::*;

use crate::legacy::{kvm_breakpoint, kvm_debug_guest, kvm_memory_alias, kvm_memory_region};

/// A structure of integers without padding: any bytes are a value, any value is bytes.
///
/// # Safety
/// No byte of the type is padding, and every bit pattern is a valid value. `plain!` checks the first.
pub unsafe trait Plain: Copy + 'static {
    /// The structure whose bytes these are; `None` if the number of bytes is another.
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        (bytes.len() == size_of::<Self>()).then(|| {
            // SAFETY: the length was compared above, the read is unaligned, and by the trait's contract any bytes are a value.
            unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() }
        })
    }

    /// The structure's bytes in memory order.
    fn as_bytes(&self) -> &[u8] {
        // SAFETY: `self` is valid for its size, and by the trait's contract none of it is uninitialised padding.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(self).cast::<u8>(), size_of::<Self>()) }
    }

    /// All fields zero.
    fn zeroed() -> Self {
        // SAFETY: by the trait's contract zeros are a value.
        unsafe { std::mem::zeroed() }
    }
}

/// Size of the field that `_` reads; used to sum up a structure's fields.
const fn size_of_field<S, F>(_: fn(&S) -> &F) -> usize {
    size_of::<F>()
}

/// Implements [`Plain`] for a structure, all of whose fields are named: their sizes must add up to its own.
macro_rules! plain {
    ($($type:ident { $($field:ident),* $(,)? })*) => { $(
        const _: () = assert!(size_of::<$type>() == 0 $(+ size_of_field(|s: &$type| &s.$field))*);
        // SAFETY: every field is an integer, an array of them or another `Plain` structure, and the line above shows that
        // their sizes sum to the structure's: there is no padding.
        unsafe impl Plain for $type {}
    )* };
}

plain! {
    kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
    kvm_segment { base, limit, selector, type_, present, dpl, db, s, l, g, avl, unusable, padding }
    kvm_dtable { base, limit, padding }
    kvm_sregs { cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, cr0, cr2, cr3, cr4, cr8, efer, apic_base, interrupt_bitmap }
    kvm_sregs2 {
        cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, cr0, cr2, cr3, cr4, cr8, efer, apic_base, flags, pdptrs,
    }
    kvm_fpu { fpr, fcw, fsw, ftwx, pad1, last_opcode, last_ip, last_dp, xmm, mxcsr, pad2 }
    kvm_userspace_memory_region { slot, flags, guest_phys_addr, memory_size, userspace_addr }
    kvm_translation { linear_address, physical_address, valid, writeable, usermode, pad }
    kvm_interrupt { irq }
    kvm_guest_debug_arch { debugreg }
    kvm_guest_debug { control, pad, arch }
    kvm_clock_data { clock, flags, pad0, realtime, host_tsc, pad }
    kvm_create_device { type_, fd, flags }
    kvm_enable_cap { cap, flags, args, pad }
    kvm_mp_state { mp_state }
    kvm_vcpu_events__bindgen_ty_1 { injected, nr, has_error_code, pending, error_code }
    kvm_vcpu_events__bindgen_ty_2 { injected, nr, soft, shadow }
    kvm_vcpu_events__bindgen_ty_3 { injected, pending, masked, pad }
    kvm_vcpu_events__bindgen_ty_4 { smm, pending, smm_inside_nmi, latched_init }
    kvm_vcpu_events__bindgen_ty_5 { pending }
    kvm_vcpu_events {
        exception, interrupt, nmi, sipi_vector, flags, smi, triple_fault, reserved, exception_has_payload, exception_payload,
    }
    kvm_debugregs { db, dr6, dr7, flags, reserved }
    kvm_xcr { xcr, reserved, value }
    kvm_xcrs { nr_xcrs, flags, xcrs, padding }
    kvm_x86_mce { status, addr, misc, mcg_status, bank, pad1, pad2 }
    kvm_xen_hvm_config { flags, msr, blob_addr_32, blob_addr_64, blob_size_32, blob_size_64, pad2 }
    kvm_msr_entry { index, reserved, data }
    kvm_cpuid_entry { function, eax, ebx, ecx, edx, padding }
    kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, padding }
    kvm_msi { address_lo, address_hi, data, flags, devid, pad }
    kvm_memory_region { slot, flags, guest_phys_addr, memory_size }
    kvm_memory_alias { slot, flags, guest_phys_addr, memory_size, target_phys_addr }
    kvm_breakpoint { enabled, padding, address }
    kvm_debug_guest { enabled, pad, breakpoints, singlestep, pad2 }
}

// SAFETY: integers all the way, no padding.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: as above; `kvm_xsave` and other byte areas travel as this.
unsafe impl<const N: usize> Plain for [u32; N] {}

/// `kvm_coalesced_mmio_zone` with its union as the one number that it holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct kvm_coalesced_mmio_zone {
    /// First address or port.
    pub addr: u64,
    /// Bytes.
    pub size: u32,
    /// 1: ports.
    pub pio: u32,
}
const _: () = assert!(size_of::<kvm_coalesced_mmio_zone>() == size_of::<kvm_bindings::kvm_coalesced_mmio_zone>());
plain! { kvm_coalesced_mmio_zone { addr, size, pio } }

/// `kvm_dirty_log` with the pointer as the number that it is to us.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct DirtyLog {
    /// Slot in bits 15:0, address space above.
    pub slot: u32,
    /// Not looked at.
    pub padding1: u32,
    /// Client address of the bitmap.
    pub dirty_bitmap: u64,
}
const _: () = assert!(size_of::<DirtyLog>() == size_of::<kvm_dirty_log>());
plain! { DirtyLog { slot, padding1, dirty_bitmap } }

/// `kvm_clear_dirty_log` likewise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ClearDirtyLog {
    /// As in [`DirtyLog`].
    pub slot: u32,
    /// How many pages the bitmap is for.
    pub num_pages: u32,
    /// The first of them.
    pub first_page: u64,
    /// Client address of the bitmap.
    pub dirty_bitmap: u64,
}
const _: () = assert!(size_of::<ClearDirtyLog>() == size_of::<kvm_clear_dirty_log>());
plain! { ClearDirtyLog { slot, num_pages, first_page, dirty_bitmap } }

/// `kvm_device_attr`, with the address as a number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct DeviceAttr {
    /// None are known.
    pub flags: u32,
    /// What kind of attribute.
    pub group: u32,
    /// Which.
    pub attr: u64,
    /// Client address of its value.
    pub addr: u64,
}
const _: () = assert!(size_of::<DeviceAttr>() == size_of::<kvm_device_attr>());
plain! { DeviceAttr { flags, group, attr, addr } }

/// `kvm_xen_hvm_attr` and `kvm_xen_vcpu_attr`, with the union as the quadwords that it covers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct XenAttr {
    /// `KVM_XEN_ATTR_TYPE_…`, `KVM_XEN_VCPU_ATTR_TYPE_…`
    pub type_: u16,
    /// Not looked at.
    pub pad: [u16; 3],
    /// By type.
    pub u: [u64; 8],
}
const _: () = assert!(size_of::<XenAttr>() == size_of::<kvm_xen_hvm_attr>());
const _: () = assert!(size_of::<XenAttr>() == size_of::<kvm_xen_vcpu_attr>());
plain! { XenAttr { type_, pad, u } }

impl XenAttr {
    /// Doubleword `index` of the union.
    pub fn word(&self, index: usize) -> u32 {
        (self.u[index / 2] >> (32 * (index % 2))) as u32
    }

    /// See [`Self::word`].
    pub fn set_word(&mut self, index: usize, value: u32) {
        let shift = 32 * (index % 2);
        let quad = &mut self.u[index / 2];
        *quad = *quad & !(0xffff_ffff << shift) | u64::from(value) << shift;
    }

    /// The first byte of the union.
    pub fn set_byte(&mut self, value: u8) {
        self.u[0] = self.u[0] & !0xff | u64::from(value);
    }
}

/// `kvm_msr_filter_range`, with the pointer as a number and the padding before it named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct MsrFilterRange {
    /// `KVM_MSR_FILTER_READ`, `KVM_MSR_FILTER_WRITE`
    pub flags: u32,
    /// How many MSRs.
    pub nmsrs: u32,
    /// The first of them.
    pub base: u32,
    /// Not looked at.
    pub padding: u32,
    /// Client address of a bit for each.
    pub bitmap: u64,
}
const _: () = assert!(size_of::<MsrFilterRange>() == size_of::<kvm_msr_filter_range>());
plain! { MsrFilterRange { flags, nmsrs, base, padding, bitmap } }

/// `kvm_msr_filter` likewise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct MsrFilter {
    /// `KVM_MSR_FILTER_DEFAULT_DENY`
    pub flags: u32,
    /// Not looked at.
    pub padding: u32,
    /// Those without MSRs do not count.
    pub ranges: [MsrFilterRange; KVM_MSR_FILTER_MAX_RANGES as usize],
}
const _: () = assert!(size_of::<MsrFilter>() == size_of::<kvm_msr_filter>());
plain! { MsrFilter { flags, padding, ranges } }

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_round_trip() {
        let segment = kvm_segment { base: 0x1122_3344_5566_7788, limit: 0xffff, selector: 0xf000, ..Plain::zeroed() };
        let bytes = segment.as_bytes().to_vec();
        assert_eq!(&bytes[..8], &0x1122_3344_5566_7788u64.to_le_bytes());
        assert_eq!(kvm_segment::from_bytes(&bytes), Some(segment));
    }

    #[test]
    fn another_length_is_no_structure() {
        assert!(kvm_regs::from_bytes(&[0; 143]).is_none());
        assert!(kvm_regs::from_bytes(&[0; 145]).is_none());
    }
}
