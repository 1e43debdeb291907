//! Request numbers and structure layouts, written out by hand from `include/linux/kvm.h` of Linux 2.6.22 and, for what
//! came later, from that of Linux 6.1 (x86-64).

use std::mem::offset_of;

use kvm_abi::legacy::*;
use kvm_abi::request::*;
use kvm_abi::*;

/// The 23 requests of 2.6.22.
const OF_2007: &[(u32, u32)] = &[
    (KVM_GET_API_VERSION, 0x0000_ae00),
    (KVM_CREATE_VM, 0x0000_ae01),
    (KVM_GET_MSR_INDEX_LIST, 0xc004_ae02),
    (KVM_CHECK_EXTENSION, 0x0000_ae03),
    (KVM_GET_VCPU_MMAP_SIZE, 0x0000_ae04),
    (KVM_SET_MEMORY_REGION, 0x4018_ae40),
    (KVM_CREATE_VCPU, 0x0000_ae41),
    (KVM_GET_DIRTY_LOG, 0x4010_ae42),
    (KVM_SET_MEMORY_ALIAS, 0x4020_ae43),
    (KVM_RUN, 0x0000_ae80),
    (KVM_GET_REGS, 0x8090_ae81),
    (KVM_SET_REGS, 0x4090_ae82),
    (KVM_GET_SREGS, 0x8138_ae83),
    (KVM_SET_SREGS, 0x4138_ae84),
    (KVM_TRANSLATE, 0xc018_ae85),
    (KVM_INTERRUPT, 0x4004_ae86),
    (KVM_DEBUG_GUEST, 0x4050_ae87),
    (KVM_GET_MSRS, 0xc008_ae88),
    (KVM_SET_MSRS, 0x4008_ae89),
    (KVM_SET_CPUID, 0x4008_ae8a),
    (KVM_SET_SIGNAL_MASK, 0x4004_ae8b),
    (KVM_GET_FPU, 0x81a0_ae8c),
    (KVM_SET_FPU, 0x41a0_ae8d),
];

/// What came later.
const OF_TODAY: &[(u32, u32)] = &[
    (KVM_GET_SUPPORTED_CPUID, 0xc008_ae05),
    (KVM_GET_EMULATED_CPUID, 0xc008_ae09),
    (KVM_GET_MSR_FEATURE_INDEX_LIST, 0xc004_ae0a),
    (KVM_SET_NR_MMU_PAGES, 0x0000_ae44),
    (KVM_GET_NR_MMU_PAGES, 0x0000_ae45),
    (KVM_SET_USER_MEMORY_REGION, 0x4020_ae46),
    (KVM_SET_TSS_ADDR, 0x0000_ae47),
    (KVM_SET_IDENTITY_MAP_ADDR, 0x4008_ae48),
    (KVM_CREATE_IRQCHIP, 0x0000_ae60),
    (KVM_IRQ_LINE, 0x4008_ae61),
    (KVM_GET_IRQCHIP, 0xc208_ae62),
    (KVM_SET_IRQCHIP, 0x8208_ae63),
    (KVM_IRQ_LINE_STATUS, 0xc008_ae67),
    (KVM_SET_GSI_ROUTING, 0x4008_ae6a),
    (KVM_REINJECT_CONTROL, 0x0000_ae71),
    (KVM_IRQFD, 0x4020_ae76),
    (KVM_CREATE_PIT2, 0x4040_ae77),
    (KVM_IOEVENTFD, 0x4040_ae79),
    (KVM_REGISTER_COALESCED_MMIO, 0x4010_ae67),
    (KVM_UNREGISTER_COALESCED_MMIO, 0x4010_ae68),
    (KVM_CLEAR_DIRTY_LOG, 0xc018_aec0),
    (KVM_RESET_DIRTY_RINGS, 0x0000_aec7),
    (KVM_GET_NESTED_STATE, 0xc080_aebe),
    (KVM_SET_NESTED_STATE, 0x4080_aebf),
    (KVM_SET_CLOCK, 0x4030_ae7b),
    (KVM_GET_CLOCK, 0x8030_ae7c),
    (KVM_KVMCLOCK_CTRL, 0x0000_aead),
    (KVM_GET_PIT2, 0x8070_ae9f),
    (KVM_SET_PIT2, 0x4070_aea0),
    (KVM_GET_LAPIC, 0x8400_ae8e),
    (KVM_SET_LAPIC, 0x4400_ae8f),
    (KVM_TPR_ACCESS_REPORTING, 0xc028_ae92),
    (KVM_SET_VAPIC_ADDR, 0x4008_ae93),
    (KVM_ENABLE_CAP, 0x4068_aea3),
    (KVM_SIGNAL_MSI, 0x4020_aea5),
    (KVM_SET_BOOT_CPU_ID, 0x0000_ae78),
    (KVM_X86_SET_MSR_FILTER, 0x4188_aec6),
    (KVM_GET_SREGS2, 0x8140_aecc),
    (KVM_SET_SREGS2, 0x4140_aecd),
    (KVM_GET_XSAVE2, 0x9000_aecf),
    (KVM_GET_SUPPORTED_HV_CPUID, 0xc008_aec1),
    (KVM_XEN_HVM_CONFIG, 0x4038_ae7a),
    (KVM_XEN_HVM_EVTCHN_SEND, 0x400c_aed0),
    (KVM_XEN_HVM_GET_ATTR, 0xc048_aec8),
    (KVM_XEN_HVM_SET_ATTR, 0x4048_aec9),
    (KVM_XEN_VCPU_GET_ATTR, 0xc048_aeca),
    (KVM_XEN_VCPU_SET_ATTR, 0x4048_aecb),
    (KVM_GET_STATS_FD, 0x0000_aece),
    (KVM_SET_DEVICE_ATTR, 0x4018_aee1),
    (KVM_GET_DEVICE_ATTR, 0x4018_aee2),
    (KVM_HAS_DEVICE_ATTR, 0x4018_aee3),
    (KVM_SET_CPUID2, 0x4008_ae90),
    (KVM_GET_CPUID2, 0xc008_ae91),
    (KVM_GET_MP_STATE, 0x8004_ae98),
    (KVM_SET_MP_STATE, 0x4004_ae99),
    (KVM_NMI, 0x0000_ae9a),
    (KVM_SET_GUEST_DEBUG, 0x4048_ae9b),
    (KVM_X86_SETUP_MCE, 0x4008_ae9c),
    (KVM_X86_GET_MCE_CAP_SUPPORTED, 0x8008_ae9d),
    (KVM_X86_SET_MCE, 0x4040_ae9e),
    (KVM_GET_VCPU_EVENTS, 0x8040_ae9f),
    (KVM_SET_VCPU_EVENTS, 0x4040_aea0),
    (KVM_GET_DEBUGREGS, 0x8080_aea1),
    (KVM_SET_DEBUGREGS, 0x4080_aea2),
    (KVM_SET_TSC_KHZ, 0x0000_aea2),
    (KVM_GET_TSC_KHZ, 0x0000_aea3),
    (KVM_GET_XSAVE, 0x9000_aea4),
    (KVM_SET_XSAVE, 0x5000_aea5),
    (KVM_GET_XCRS, 0x8188_aea6),
    (KVM_SET_XCRS, 0x4188_aea7),
    (KVM_CREATE_PIT, 0x0000_ae64),
    (KVM_GET_PIT, 0xc048_ae65),
    (KVM_SET_PIT, 0x8048_ae66),
    (KVM_SET_PMU_EVENT_FILTER, 0x4020_aeb2),
    (KVM_SMI, 0x0000_aeb7),
    (KVM_CREATE_DEVICE, 0xc00c_aee0),
];

#[test]
fn request_numbers_are_the_headers() {
    for &(ours, header) in OF_2007.iter().chain(OF_TODAY) {
        assert_eq!(ours, header, "{ours:#010x} {header:#010x}");
    }
    assert_eq!(NAMES.len(), OF_2007.len() + OF_TODAY.len());
    let of_2007: Vec<u32> = OF_2007.iter().map(|&(_, header)| header).collect();
    assert_eq!(REQUESTS.map(|(_, requests)| requests).concat(), of_2007);
}

#[test]
fn structures_have_the_sizes_of_2007() {
    assert_eq!(size_of::<kvm_memory_region>(), 24);
    assert_eq!(size_of::<kvm_memory_alias>(), 32);
    assert_eq!(size_of::<kvm_regs>(), 144);
    assert_eq!(size_of::<kvm_segment>(), 24);
    assert_eq!(size_of::<kvm_dtable>(), 16);
    assert_eq!(size_of::<kvm_sregs>(), 312);
    assert_eq!(size_of::<kvm_translation>(), 24);
    assert_eq!(size_of::<kvm_debug_guest>(), 80);
    assert_eq!(size_of::<kvm_fpu>(), 416);
    assert_eq!(size_of::<kvm_msr_entry>(), 16);
    assert_eq!(size_of::<kvm_cpuid_entry>(), 24);
    assert_eq!(size_of::<kvm_cpuid_entry2>(), 40);
    assert_eq!(size_of::<kvm_dirty_log>(), 16);
}

#[test]
fn fields_are_where_the_header_has_them() {
    assert_eq!(offset_of!(kvm_debug_guest, breakpoints), 8);
    assert_eq!(offset_of!(kvm_debug_guest, singlestep), 72);
    assert_eq!(offset_of!(kvm_sregs, tr), 144);
    assert_eq!(offset_of!(kvm_sregs, gdt), 192);
    assert_eq!(offset_of!(kvm_sregs, cr0), 224);
    assert_eq!(offset_of!(kvm_sregs, apic_base), 272);
    assert_eq!(offset_of!(kvm_sregs, interrupt_bitmap), 280);
    assert_eq!(offset_of!(kvm_fpu, xmm), 152);
    assert_eq!(offset_of!(kvm_fpu, mxcsr), 408);
    assert_eq!(offset_of!(kvm_run, exit_reason), 8);
    assert_eq!(offset_of!(kvm_run, ready_for_interrupt_injection), 12);
    assert_eq!(offset_of!(kvm_run, if_flag), 13);
    assert_eq!(offset_of!(kvm_run, cr8), 16);
    assert_eq!(offset_of!(kvm_run, apic_base), 24);
}

#[test]
fn exit_reasons_of_2007_kept_their_numbers() {
    use kvm_abi::consts::*;
    let reasons = [
        KVM_EXIT_UNKNOWN,
        KVM_EXIT_EXCEPTION,
        KVM_EXIT_IO,
        KVM_EXIT_HYPERCALL,
        KVM_EXIT_DEBUG,
        KVM_EXIT_HLT,
        KVM_EXIT_MMIO,
        KVM_EXIT_IRQ_WINDOW_OPEN,
        KVM_EXIT_SHUTDOWN,
        KVM_EXIT_FAIL_ENTRY,
        KVM_EXIT_INTR,
    ];
    assert!(reasons.iter().zip(0..).all(|(&reason, number)| reason == number));
    assert_eq!(EXIT_REASONS.len(), reasons.len());
}
