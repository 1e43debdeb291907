//! Binary statistics of a VM or a vCPU: what read(2) of the file of `KVM_GET_STATS_FD` gives. api.rst `KVM_GET_STATS_FD`: a header, the
//! name, descriptors, values. Names are Linux's where it counts the same.

use std::sync::Arc;

use kvm_abi::consts::{
    KVM_EXIT_INTR, KVM_EXIT_MMIO, KVM_STATS_BASE_POW10, KVM_STATS_TYPE_CUMULATIVE, KVM_STATS_TYPE_INSTANT,
    KVM_STATS_UNIT_BOOLEAN, KVM_STATS_UNIT_BYTES, KVM_STATS_UNIT_NONE, KVM_STATS_UNIT_SECONDS,
};
use mmu::Mapping;
use nix::errno::Errno;

use crate::client::{Client, File, FileKind, Reply};
use crate::exit::Reason;
use crate::status::Counters;
use crate::vm::Vm;

/// `KVM_STATS_NAME_SIZE`
const NAME_BYTES: usize = 48;
/// `struct kvm_stats_header`: flags, name size, descriptors, and where name, descriptors and values begin.
const HEADER_BYTES: usize = 24;
/// `struct kvm_stats_desc`: flags, exponent, values, offset, bucket size, name.
const DESCRIPTOR_BYTES: usize = 16 + NAME_BYTES;

/// One statistic of `S`.
struct Statistic<S: ?Sized> {
    name: &'static str,
    /// `KVM_STATS_TYPE_…`
    kind: u32,
    /// `KVM_STATS_UNIT_…`
    unit: u32,
    /// Of ten.
    exponent: i16,
    value: fn(&S) -> u64,
}

const fn count<S: ?Sized>(name: &'static str, value: fn(&S) -> u64) -> Statistic<S> {
    Statistic { name, kind: KVM_STATS_TYPE_CUMULATIVE, unit: KVM_STATS_UNIT_NONE, exponent: 0, value }
}

const fn instant<S: ?Sized>(name: &'static str, unit: u32, value: fn(&S) -> u64) -> Statistic<S> {
    Statistic { name, kind: KVM_STATS_TYPE_INSTANT, unit, exponent: 0, value }
}

const OF_VM: &[Statistic<Vm>] = &[
    instant("memory_slots", KVM_STATS_UNIT_NONE, |vm| vm.status().slots as u64),
    instant("memory_bytes", KVM_STATS_UNIT_BYTES, |vm| vm.status().memory_bytes),
    instant("vcpus", KVM_STATS_UNIT_NONE, |vm| vm.vcpus.lock().len() as u64),
];

const OF_VCPU: &[Statistic<Counters>] = &[
    count("exits", Counters::exits),
    count("io_exits", |counters| counters.vmx_exits(Reason::IoInstruction)),
    count("mmio_exits", |counters| counters.kvm_exits(KVM_EXIT_MMIO)),
    count("signal_exits", |counters| counters.kvm_exits(KVM_EXIT_INTR)),
    count("irq_window_exits", |counters| counters.vmx_exits(Reason::InterruptWindow)),
    count("irq_exits", |counters| counters.vmx_exits(Reason::ExternalInterrupt)),
    count("halt_exits", |counters| counters.vmx_exits(Reason::Hlt)),
    count("hypercalls", |counters| counters.vmx_exits(Reason::Vmcall)),
    count("insn_emulation_fail", |counters| counters.vmx_exits(Reason::Unimplemented)),
    instant("guest_mode", KVM_STATS_UNIT_BOOLEAN, |counters| counters.is_running().into()),
    count("instructions", Counters::instructions),
    Statistic {
        name: "guest_time",
        kind: KVM_STATS_TYPE_CUMULATIVE,
        unit: KVM_STATS_UNIT_SECONDS,
        exponent: -9,
        value: Counters::run_ns,
    },
];

/// What the statistics are of. It lives as long as the file.
enum Source {
    Vm(Arc<Vm>),
    Vcpu { vm: Arc<Vm>, id: u32, counters: Arc<Counters> },
}

/// The file of `KVM_GET_STATS_FD`.
pub(crate) struct StatsFile(Source);

impl StatsFile {
    /// Statistics of a VM.
    pub(crate) fn of_vm(vm: &Arc<Vm>) -> Arc<Self> {
        Arc::new(Self(Source::Vm(vm.clone())))
    }

    /// Statistics of a vCPU.
    pub(crate) fn of_vcpu(vm: &Arc<Vm>, id: u32, counters: &Arc<Counters>) -> Arc<Self> {
        Arc::new(Self(Source::Vcpu { vm: vm.clone(), id, counters: counters.clone() }))
    }

    fn content(&self) -> Vec<u8> {
        match &self.0 {
            Source::Vm(vm) => content(&format!("kvm-{}", vm.address_space.pid), OF_VM, vm),
            Source::Vcpu { vm, id, counters } => {
                content(&format!("kvm-{}/vcpu-{id}", vm.address_space.pid), OF_VCPU, counters)
            }
        }
    }
}

fn content<S>(name: &str, statistics: &[Statistic<S>], of: &S) -> Vec<u8> {
    let (descriptors, count) = (HEADER_BYTES + NAME_BYTES, statistics.len());
    let values = descriptors + count * DESCRIPTOR_BYTES;
    let header = [0, NAME_BYTES, count, HEADER_BYTES, descriptors, values];
    let mut bytes: Vec<u8> = header.iter().flat_map(|&word| (word as u32).to_le_bytes()).collect();
    bytes.extend(padded(name));
    for (offset, Statistic { name, kind, unit, exponent, .. }) in (0u32..).step_by(8).zip(statistics) {
        bytes.extend((kind | unit | KVM_STATS_BASE_POW10).to_le_bytes());
        bytes.extend(exponent.to_le_bytes());
        // One value, at this offset of the values; no histogram.
        bytes.extend(1u16.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(padded(name));
    }
    bytes.extend(statistics.iter().flat_map(|statistic| (statistic.value)(of).to_le_bytes()));
    bytes
}

fn padded(name: &str) -> [u8; NAME_BYTES] {
    let mut bytes = [0; NAME_BYTES];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    bytes
}

impl File for StatsFile {
    fn ioctl(self: Arc<Self>, _: &dyn Client, _: u32, _: u64, _: &[u8]) -> Result<Reply, Errno> {
        Err(Errno::ENOTTY)
    }

    fn mapping(&self) -> Option<Arc<Mapping>> {
        None
    }

    fn read(&self, offset: u64, len: usize) -> Option<Vec<u8>> {
        let content = self.content();
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(content.len());
        Some(content[from..].iter().take(len).copied().collect())
    }

    fn kind(&self) -> FileKind {
        match self.0 {
            Source::Vm(_) => FileKind::VmStats,
            Source::Vcpu { id, .. } => FileKind::VcpuStats(id),
        }
    }

    fn released(&self) {}
}
