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

/// How devices interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lines {
    /// By irqfds, all added when the device is made.
    Irqfd,
    /// By irqfds that are added with their route and removed with it.
    IrqfdWithRoute,
    /// `KVM_IRQ_LINE`.
    IrqLine,
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
    /// `KVM_SET_GSI_ROUTING` of the routes that `KVM_CREATE_IRQCHIP` made.
    Routes,
    /// `KVM_CAP_MAX_VCPUS`.
    MaxVcpus,
    /// Steps of all vCPUs; those that are not taken here each thread takes for its own.
    Vcpus(&'static [VcpuStep]),
    /// The serial port's interrupt, the disk's ioeventfd and interrupt, and whoever serves the disk.
    Devices,
    /// The filter of the thread that builds the VM.
    Filter,
}

/// A step of one vCPU.
#[derive(Clone, Copy, Debug)]
pub enum VcpuStep {
    /// `KVM_CREATE_VCPU`, and `kvm_run` is mapped.
    Create,
    /// `KVM_CAP_XSAVE2` and `KVM_CAP_XCRS` on the VM.
    Caps,
    /// `KVM_GET_TSC_KHZ`.
    TscKhz,
    /// `KVM_SET_CPUID2`.
    Cpuid,
    /// `KVM_SET_MSRS`, all in one.
    Msrs,
    /// `KVM_GET_MSRS` of MTRRcap, whose failure is no matter, and `KVM_SET_MSRS` for each MSR.
    MsrsOneByOne,
    /// `KVM_SET_REGS`.
    Regs,
    /// `KVM_GET_SREGS`, `KVM_SET_SREGS`.
    Sregs,
    /// `KVM_SET_FPU`.
    Fpu,
    /// `KVM_GET_LAPIC`, `KVM_SET_LAPIC`.
    Lapic,
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
    /// How interrupts are raised.
    pub lines: Lines,
    /// What it does until vCPUs run.
    pub order: &'static [Step],
    /// What each vCPU's thread does before that.
    pub on_thread: &'static [VcpuStep],
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

const FIRECRACKER_STATE: &[VcpuStep] =
    &[VcpuStep::Msrs, VcpuStep::Regs, VcpuStep::Fpu, VcpuStep::Sregs, VcpuStep::Lapic];

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
        lines: Lines::Irqfd,
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
            Step::Vcpus(&[VcpuStep::Create]),
            Step::Slots,
            Step::Load,
            Step::Devices,
            Step::Vcpus(&[VcpuStep::Cpuid]),
            Step::Vcpus(FIRECRACKER_STATE),
        ],
        on_thread: &[],
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
        lines: Lines::Irqfd,
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
            Step::Vcpus(&[VcpuStep::Create]),
            Step::Slots,
            Step::Devices,
            Step::Vcpus(&[VcpuStep::Cpuid]),
            Step::Vcpus(FIRECRACKER_STATE),
        ],
        on_thread: &[],
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
        lines: Lines::Irqfd,
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
            Step::Vcpus(&[VcpuStep::Create]),
            Step::Vcpus(&[VcpuStep::Cpuid]),
            Step::Vcpus(FIRECRACKER_STATE),
        ],
        on_thread: &[],
    },
    Style {
        name: "cloud-hypervisor",
        ram: Backing::HugeAdvice,
        entry: Entry::Pvh,
        chip: Chip::Split,
        transport: Transport::Pci,
        worker: Worker::Thread,
        kick: Kick::Resend,
        filter: Filter::CloudHypervisor,
        cpus: 2,
        lines: Lines::IrqfdWithRoute,
        order: &[
            Step::Open,
            Step::Filter,
            Step::Caps(&[
                Cap::AdjustClock,
                Cap::ExtCpuid,
                Cap::GetTscKhz,
                Cap::ImmediateExit,
                Cap::Ioeventfd,
                Cap::Irqchip,
                Cap::Irqfd,
                Cap::IrqRouting,
                Cap::MpState,
                Cap::SetIdentityMapAddr,
                Cap::SetTssAddr,
                Cap::SplitIrqchip,
                Cap::TscDeadlineTimer,
                Cap::UserMemory,
                Cap::UserNmi,
                Cap::VcpuEvents,
                Cap::Xsave,
            ]),
            Step::Vm,
            Step::MsrList,
            Step::IdentityMap(0xfffb_c000),
            Step::Tss(0xfffb_d000),
            Step::SplitIrqchip,
            Step::Ram,
            Step::MaxVcpus,
            Step::Cpuid,
            Step::Slots,
            Step::Load,
            Step::Vcpus(&[VcpuStep::Create, VcpuStep::Caps]),
            Step::Devices,
            Step::Vcpus(&[
                VcpuStep::TscKhz,
                VcpuStep::Cpuid,
                VcpuStep::Msrs,
                VcpuStep::Regs,
                VcpuStep::Sregs,
                VcpuStep::Fpu,
                VcpuStep::Lapic,
            ]),
        ],
        on_thread: &[],
    },
    Style {
        name: "crosvm",
        ram: Backing::Memfd,
        entry: Entry::Linux64,
        chip: Chip::Kernel,
        transport: Transport::Pci,
        worker: Worker::Process,
        kick: Kick::InHandler,
        filter: Filter::None,
        cpus: 2,
        lines: Lines::Irqfd,
        order: &[
            Step::Open,
            Step::Ram,
            Step::Vm,
            Step::Slots,
            Step::Irqchip,
            Step::Pit(0),
            Step::Routes,
            Step::IdentityMap(0xfffb_c000),
            Step::Tss(0xfffb_d000),
            Step::Load,
            Step::Devices,
            Step::Caps(&[Cap::UserMemory, Cap::ImmediateExit]),
            Step::Cpuid,
        ],
        on_thread: &[
            VcpuStep::Create,
            VcpuStep::Cpuid,
            VcpuStep::Regs,
            VcpuStep::Sregs,
            VcpuStep::Fpu,
            VcpuStep::MsrsOneByOne,
            VcpuStep::Lapic,
        ],
    },
    Style {
        name: "kvmtool",
        ram: Backing::Mergeable,
        entry: Entry::RealMode,
        chip: Chip::Kernel,
        transport: Transport::Pci,
        worker: Worker::Thread,
        kick: Kick::Restarting,
        filter: Filter::None,
        cpus: 1,
        lines: Lines::IrqLine,
        order: &[
            Step::Open,
            Step::Vm,
            Step::Caps(&[
                Cap::CoalescedMmio,
                Cap::SetTssAddr,
                Cap::Pit2,
                Cap::UserMemory,
                Cap::IrqRouting,
                Cap::Irqchip,
                Cap::Hlt,
                Cap::IrqInjectStatus,
                Cap::ExtCpuid,
            ]),
            Step::Tss(0xfffb_d000),
            Step::Ram,
            Step::Irqchip,
            Step::Pit(0),
            Step::Slots,
            Step::Load,
            Step::MaxVcpus,
            Step::Vcpus(&[VcpuStep::Create, VcpuStep::Lapic]),
            Step::Routes,
            Step::Devices,
            Step::Cpuid,
        ],
        on_thread: &[VcpuStep::Cpuid, VcpuStep::Sregs, VcpuStep::Regs, VcpuStep::Fpu, VcpuStep::Msrs],
    },
];
