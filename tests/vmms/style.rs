//! The table: what each VMM does, in its order.

use crate::filter::Filter;
use crate::kick::Kick;
use crate::ram::Backing;
use kvm_ioctls::Cap;

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// `startup_64` of the ELF file, in 64-bit mode with paging. Linux's boot.rst "64-bit Boot Protocol".
    Linux64,
    /// The ELF file's PVH entry, in 32-bit mode without paging. Xen's "x86/HVM direct boot ABI".
    Pvh,
    /// The first sector of the bzImage's setup, in real mode. Linux's boot.rst "Running the Kernel".
    RealMode,
}

/// Where the interrupt controllers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chip {
    /// All in the kernel, and the PIT.
    Kernel,
    /// Local APICs in the kernel, the I/O APIC here, nothing else.
    Split,
}

/// How the guest finds its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// virtio-mmio, named by ACPI.
    Mmio,
    /// virtio-pci, interrupts by MSI-X.
    Pci,
}

/// Who serves the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Worker {
    /// The one thread of the VMM that is no vCPU's.
    Main,
    /// A thread of its own.
    Thread,
    /// A process of its own, forked before the vCPUs are made.
    Process,
}

/// A step of the main thread.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// Guest RAM is mapped.
    Ram,
    /// The kernel and what it is told are written to RAM.
    Load,
    /// RAM is mapped anew, private, from the file that was filled.
    Restore,
    /// /dev/kvm is opened; its version.
    Open,
    /// Capabilities on /dev/kvm, all of which the VMM insists on.
    Caps(&'static [Cap]),
    /// `arch_prctl(ARCH_GET_XCOMP_SUPP)`.
    Xcomp,
    /// `KVM_GET_SUPPORTED_CPUID`.
    Cpuid,
    /// `KVM_CREATE_VM`.
    Vm,
    /// `KVM_CAP_NR_MEMSLOTS` and `KVM_CAP_XSAVE2`.
    Limits,
    /// `KVM_GET_MSR_INDEX_LIST`.
    MsrList,
    /// `KVM_SET_TSS_ADDR`.
    Tss(usize),
    /// `KVM_SET_IDENTITY_MAP_ADDR`.
    IdentityMap(u64),
    /// `KVM_CREATE_IRQCHIP`.
    Irqchip,
    /// `KVM_CREATE_PIT2` with these flags.
    Pit(u32),
    /// `KVM_ENABLE_CAP` of `KVM_CAP_SPLIT_IRQCHIP`.
    SplitIrqchip,
    /// `KVM_SET_USER_MEMORY_REGION`.
    Slots,
    /// `KVM_CREATE_VCPU` for all, here; without this step each thread makes its own.
    Vcpus,
    /// `KVM_SET_CPUID2` for all, here.
    SetCpuid,
    /// Registers of all, here.
    State,
    /// The serial port's irqfd, the disk's ioeventfd and irqfd.
    Devices,
}

/// A VMM.
#[derive(Debug)]
pub struct Style {
    /// What the command line calls it.
    pub name: &'static str,
    /// Its RAM.
    pub ram: Backing,
    /// Its entry into the kernel.
    pub entry: Entry,
    /// Its interrupt controllers.
    pub chip: Chip,
    /// Its disk.
    pub transport: Transport,
    /// Who serves the disk.
    pub worker: Worker,
    /// How it gets vCPUs out of the guest.
    pub kick: Kick,
    /// What its threads are forbidden.
    pub filter: Filter,
    /// Its processors.
    pub cpus: u8,
    /// What it does until vCPUs run.
    pub order: &'static [Step],
}

/// What Firecracker asks of /dev/kvm before it goes on.
const FIRECRACKER_CAPS: &[Cap] = &[
    Cap::Irqchip,
    Cap::Ioeventfd,
    Cap::Irqfd,
    Cap::UserMemory,
    Cap::SetTssAddr,
    Cap::Pit2,
    Cap::PitState2,
    Cap::AdjustClock,
    Cap::Debugregs,
    Cap::MpState,
    Cap::VcpuEvents,
    Cap::Xcrs,
    Cap::Xsave,
    Cap::ExtCpuid,
];

/// All of them.
pub const STYLES: &[Style] = &[
    Style {
        name: "firecracker",
        ram: Backing::Reservation,
        entry: Entry::Linux64,
        chip: Chip::Kernel,
        transport: Transport::Mmio,
        worker: Worker::Main,
        kick: Kick::SecondMapping,
        filter: Filter::Firecracker,
        cpus: 2,
        order: &[
            Step::Ram,
            Step::Open,
            Step::Caps(FIRECRACKER_CAPS),
            Step::Xcomp,
            Step::Cpuid,
            Step::Vm,
            Step::Limits,
            Step::MsrList,
            Step::Tss(0xfffb_d000),
            Step::Irqchip,
            Step::Pit(kvm_bindings::KVM_PIT_SPEAKER_DUMMY),
            Step::Vcpus,
            Step::Slots,
            Step::Load,
            Step::Devices,
            Step::SetCpuid,
            Step::State,
        ],
    },
    // A snapshot's RAM is a private mapping of its file. What is restored here is a guest that has not run yet.
    Style {
        name: "firecracker-restored",
        ram: Backing::PrivateFile,
        entry: Entry::Pvh,
        chip: Chip::Kernel,
        transport: Transport::Mmio,
        worker: Worker::Main,
        kick: Kick::SecondMapping,
        filter: Filter::Firecracker,
        cpus: 1,
        order: &[
            Step::Ram,
            Step::Load,
            Step::Restore,
            Step::Open,
            Step::Caps(FIRECRACKER_CAPS),
            Step::Xcomp,
            Step::Cpuid,
            Step::Vm,
            Step::Limits,
            Step::MsrList,
            Step::Tss(0xfffb_d000),
            Step::Irqchip,
            Step::Pit(kvm_bindings::KVM_PIT_SPEAKER_DUMMY),
            Step::Vcpus,
            Step::Slots,
            Step::Devices,
            Step::SetCpuid,
            Step::State,
        ],
    },
    // libkrun names its disks on the command line, which Debian's kernel does not read (`VIRTIO_MMIO_CMDLINE_DEVICES`).
    Style {
        name: "libkrun",
        ram: Backing::Bundle,
        entry: Entry::Linux64,
        chip: Chip::Kernel,
        transport: Transport::Mmio,
        worker: Worker::Thread,
        kick: Kick::InHandler,
        filter: Filter::None,
        cpus: 2,
        order: &[
            Step::Ram,
            Step::Load,
            Step::Open,
            Step::Caps(&[Cap::Irqchip, Cap::Ioeventfd, Cap::Irqfd, Cap::UserMemory, Cap::SetTssAddr]),
            Step::Vm,
            Step::Cpuid,
            Step::MsrList,
            Step::Slots,
            Step::Tss(0xfffb_d000),
            Step::Irqchip,
            Step::Pit(kvm_bindings::KVM_PIT_SPEAKER_DUMMY),
            Step::Devices,
            Step::Vcpus,
            Step::SetCpuid,
            Step::State,
        ],
    },
];
