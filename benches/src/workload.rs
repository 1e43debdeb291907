//! What is run in the guest, in the order in which it runs.

/// What a workload needs beside a CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Needs {
    Cpu,
    /// A disk or a network card on virtio, which Bochs lacks.
    Virtio,
}

/// A row of the table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Workload {
    /// As the guest and the command line call it.
    pub(crate) name: &'static str,
    pub(crate) needs: Needs,
}

/// From the moment that GRUB gives the machine to Linux to the first line of user space.
pub(crate) const BOOT: &str = "boot";

const fn cpu(name: &'static str) -> Workload {
    Workload { name, needs: Needs::Cpu }
}

const fn virtio(name: &'static str) -> Workload {
    Workload { name, needs: Needs::Virtio }
}

/// A boot, and the functions of these names in `guest/work.c`.
pub(crate) const ALL: &[Workload] = &[
    cpu(BOOT),
    cpu("crc"),
    cpu("sieve"),
    cpu("qsort"),
    cpu("switch"),
    cpu("matrix"),
    cpu("getppid"),
    cpu("fork"),
    cpu("faults"),
    cpu("memcpy"),
    cpu("pingpong"),
    virtio("disk"),
    virtio("tcp"),
    virtio("udp"),
];
