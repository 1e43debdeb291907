//! What `KVM_CHECK_EXTENSION` answers, beside what clients make of it: QEMU 7.2's source (accel/kvm/kvm-all.c,
//! target/i386/kvm/kvm.c), and api.rst.

mod common;

use common::FakeClient;
use kvm::ioctl::ROWS;
use kvm_abi::consts::*;
use kvm_abi::request::*;

/// What it refuses to start without, and the least that it takes.
const REQUIRED: &[(u32, i32)] = &[
    (KVM_CAP_USER_MEMORY, 1),
    (KVM_CAP_DESTROY_MEMORY_REGION_WORKS, 1),
    (KVM_CAP_JOIN_MEMORY_REGIONS_WORKS, 1),
    (KVM_CAP_SET_TSS_ADDR, 1),
    (KVM_CAP_EXT_CPUID, 1),
    (KVM_CAP_MP_STATE, 1),
    // Also where it never routes anything.
    (KVM_CAP_IRQ_ROUTING, 1),
    // Without it every kick needs a signal mask.
    (KVM_CAP_IMMEDIATE_EXIT, 1),
    // Flash in memory that the guest cannot write.
    (KVM_CAP_READONLY_MEM, 1),
    // It sets up ten banks and fails if that does.
    (KVM_CAP_MCE, 10),
    (KVM_CAP_NR_VCPUS, 4),
    (KVM_CAP_NR_MEMSLOTS, 32),
    (KVM_CAP_VCPU_EVENTS, 1),
    (KVM_CAP_DEBUGREGS, 1),
    (KVM_CAP_XSAVE, 1),
    (KVM_CAP_XCRS, 1),
    (KVM_CAP_SET_GUEST_DEBUG, 1),
];

/// What it then uses and we lack: any answer but 0 would make it fail later.
const ABSENT: &[u32] = &[KVM_CAP_X86_NOTIFY_VMEXIT, KVM_CAP_HYPERV_SYNIC, KVM_CAP_HYPERV_VAPIC];

/// The ioctls that api.rst puts under a capability.
const IOCTLS: &[(u32, &[u32])] = &[
    (KVM_CAP_USER_MEMORY, &[KVM_SET_USER_MEMORY_REGION]),
    (KVM_CAP_SET_TSS_ADDR, &[KVM_SET_TSS_ADDR]),
    (KVM_CAP_EXT_CPUID, &[KVM_GET_SUPPORTED_CPUID, KVM_SET_CPUID2, KVM_GET_CPUID2]),
    (KVM_CAP_MP_STATE, &[KVM_GET_MP_STATE, KVM_SET_MP_STATE]),
    (KVM_CAP_USER_NMI, &[KVM_NMI]),
    (KVM_CAP_X86_SMM, &[KVM_SMI]),
    (KVM_CAP_DEVICE_CTRL, &[KVM_CREATE_DEVICE, KVM_SET_DEVICE_ATTR, KVM_GET_DEVICE_ATTR, KVM_HAS_DEVICE_ATTR]),
    (KVM_CAP_SET_GUEST_DEBUG, &[KVM_SET_GUEST_DEBUG]),
    (
        KVM_CAP_IRQCHIP,
        &[KVM_CREATE_IRQCHIP, KVM_IRQ_LINE, KVM_GET_IRQCHIP, KVM_SET_IRQCHIP, KVM_GET_LAPIC, KVM_SET_LAPIC],
    ),
    (KVM_CAP_IRQ_INJECT_STATUS, &[KVM_IRQ_LINE_STATUS]),
    (KVM_CAP_IRQ_ROUTING, &[KVM_SET_GSI_ROUTING]),
    (KVM_CAP_IRQFD, &[KVM_IRQFD]),
    (KVM_CAP_IOEVENTFD, &[KVM_IOEVENTFD]),
    (KVM_CAP_PIT2, &[KVM_CREATE_PIT2]),
    (KVM_CAP_PIT_STATE2, &[KVM_GET_PIT2, KVM_SET_PIT2]),
    (KVM_CAP_REINJECT_CONTROL, &[KVM_REINJECT_CONTROL]),
    (KVM_CAP_SIGNAL_MSI, &[KVM_SIGNAL_MSI]),
    (KVM_CAP_ENABLE_CAP, &[KVM_ENABLE_CAP]),
    (KVM_CAP_ENABLE_CAP_VM, &[KVM_ENABLE_CAP]),
    (KVM_CAP_VAPIC, &[KVM_TPR_ACCESS_REPORTING, KVM_SET_VAPIC_ADDR]),
    (KVM_CAP_SPLIT_IRQCHIP, &[KVM_ENABLE_CAP, KVM_SET_GSI_ROUTING]),
    (KVM_CAP_MCE, &[KVM_X86_GET_MCE_CAP_SUPPORTED, KVM_X86_SETUP_MCE, KVM_X86_SET_MCE]),
    (KVM_CAP_SET_IDENTITY_MAP_ADDR, &[KVM_SET_IDENTITY_MAP_ADDR]),
    (KVM_CAP_VCPU_EVENTS, &[KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS]),
    (KVM_CAP_DEBUGREGS, &[KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS]),
    (KVM_CAP_XSAVE, &[KVM_GET_XSAVE, KVM_SET_XSAVE]),
    (KVM_CAP_XCRS, &[KVM_GET_XCRS, KVM_SET_XCRS]),
    (KVM_CAP_TSC_CONTROL, &[KVM_SET_TSC_KHZ]),
    (KVM_CAP_GET_TSC_KHZ, &[KVM_GET_TSC_KHZ]),
    (KVM_CAP_EXT_EMUL_CPUID, &[KVM_GET_EMULATED_CPUID]),
    (KVM_CAP_ADJUST_CLOCK, &[KVM_GET_CLOCK, KVM_SET_CLOCK]),
    (KVM_CAP_KVMCLOCK_CTRL, &[KVM_KVMCLOCK_CTRL]),
    (KVM_CAP_COALESCED_MMIO, &[KVM_REGISTER_COALESCED_MMIO, KVM_UNREGISTER_COALESCED_MMIO]),
    (KVM_CAP_GET_MSR_FEATURES, &[KVM_GET_MSR_FEATURE_INDEX_LIST, KVM_GET_MSRS]),
    (KVM_CAP_NESTED_STATE, &[KVM_GET_NESTED_STATE, KVM_SET_NESTED_STATE]),
    (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, &[KVM_CLEAR_DIRTY_LOG, KVM_ENABLE_CAP]),
    (KVM_CAP_DIRTY_LOG_RING, &[KVM_RESET_DIRTY_RINGS, KVM_ENABLE_CAP]),
    (KVM_CAP_DIRTY_LOG_RING_ACQ_REL, &[KVM_RESET_DIRTY_RINGS, KVM_ENABLE_CAP]),
    (KVM_CAP_CHECK_EXTENSION_VM, &[KVM_CHECK_EXTENSION]),
    (KVM_CAP_MMU_SHADOW_CACHE_CONTROL, &[KVM_SET_NR_MMU_PAGES, KVM_GET_NR_MMU_PAGES]),
    (KVM_CAP_SET_BOOT_CPU_ID, &[KVM_SET_BOOT_CPU_ID]),
    (KVM_CAP_DISABLE_QUIRKS, &[KVM_ENABLE_CAP]),
    (KVM_CAP_DISABLE_QUIRKS2, &[KVM_ENABLE_CAP]),
    (KVM_CAP_MSR_PLATFORM_INFO, &[KVM_ENABLE_CAP]),
    (KVM_CAP_X86_USER_SPACE_MSR, &[KVM_ENABLE_CAP]),
    (KVM_CAP_X86_MSR_FILTER, &[KVM_X86_SET_MSR_FILTER]),
    (KVM_CAP_VCPU_ATTRIBUTES, &[KVM_SET_DEVICE_ATTR, KVM_GET_DEVICE_ATTR, KVM_HAS_DEVICE_ATTR]),
    (KVM_CAP_SYS_ATTRIBUTES, &[KVM_GET_DEVICE_ATTR, KVM_HAS_DEVICE_ATTR]),
    (KVM_CAP_SREGS2, &[KVM_GET_SREGS2, KVM_SET_SREGS2]),
    (KVM_CAP_XSAVE2, &[KVM_GET_XSAVE2, KVM_SET_XSAVE]),
    (KVM_CAP_BINARY_STATS_FD, &[KVM_GET_STATS_FD]),
    (KVM_CAP_HYPERV_CPUID, &[KVM_GET_SUPPORTED_HV_CPUID]),
    (KVM_CAP_SYS_HYPERV_CPUID, &[KVM_GET_SUPPORTED_HV_CPUID]),
    (KVM_CAP_HYPERV_ENFORCE_CPUID, &[KVM_ENABLE_CAP]),
    (
        KVM_CAP_XEN_HVM,
        &[
            KVM_XEN_HVM_CONFIG,
            KVM_XEN_HVM_EVTCHN_SEND,
            KVM_XEN_HVM_GET_ATTR,
            KVM_XEN_HVM_SET_ATTR,
            KVM_XEN_VCPU_GET_ATTR,
            KVM_XEN_VCPU_SET_ATTR,
        ],
    ),
    (KVM_CAP_VM_TSC_CONTROL, &[KVM_SET_TSC_KHZ, KVM_GET_TSC_KHZ]),
];

/// What it issues at the least.
const ISSUED: &[u32] = &[
    KVM_GET_API_VERSION,
    KVM_CHECK_EXTENSION,
    KVM_CREATE_VM,
    KVM_GET_MSR_INDEX_LIST,
    KVM_SET_TSS_ADDR,
    KVM_GET_SUPPORTED_CPUID,
    KVM_CREATE_VCPU,
    KVM_GET_VCPU_MMAP_SIZE,
    KVM_SET_USER_MEMORY_REGION,
    KVM_GET_DIRTY_LOG,
    KVM_SET_CPUID2,
    KVM_GET_MSRS,
    KVM_SET_MSRS,
    KVM_GET_REGS,
    KVM_SET_REGS,
    KVM_GET_SREGS,
    KVM_SET_SREGS,
    KVM_GET_FPU,
    KVM_SET_FPU,
    KVM_GET_MP_STATE,
    KVM_SET_MP_STATE,
    KVM_INTERRUPT,
    KVM_NMI,
    KVM_RUN,
];

/// The answer on `/dev/kvm` and on a VM, which is the same.
fn answers() -> impl Fn(u32) -> i32 {
    let client = FakeClient::new();
    let vm = client.ioctl(0, KVM_CREATE_VM, 0).unwrap();
    move |cap| {
        let [system, vm] = [0, vm].map(|fd| client.ioctl(fd, KVM_CHECK_EXTENSION, cap.into()).unwrap());
        assert_eq!(system, vm, "{cap}");
        system
    }
}

#[test]
fn qemu_finds_what_it_refuses_to_start_without() {
    let value = answers();
    for &(cap, least) in REQUIRED {
        assert!(value(cap) >= least, "{cap}");
    }
    assert!(ISSUED.iter().all(|request| ROWS.iter().any(|row| row.request == *request)));
}

#[test]
fn what_is_absent_is_not_offered() {
    let value = answers();
    for &cap in ABSENT {
        assert_eq!(value(cap), 0, "{cap}");
    }
}

#[test]
fn all_that_a_capability_stands_for_is_there() {
    let value = answers();
    for &(cap, requests) in IOCTLS {
        assert_ne!(value(cap), 0, "{cap}");
        for request in requests {
            assert!(ROWS.iter().any(|row| row.request == *request), "{cap} {request:#x}");
        }
    }
}
