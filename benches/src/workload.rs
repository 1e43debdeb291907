//! What is run in guests, in the order in which it runs.

/// A guest: what it has. One boots for each that is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Guest {
    /// Busybox and `work.c`.
    Small,
    /// Debian's programs on a disk.
    Debian,
    /// The same with two vCPUs.
    Two,
}

impl Guest {
    pub(crate) const ALL: &[Guest] = &[Guest::Small, Guest::Debian, Guest::Two];

    pub(crate) fn cpus(self) -> u32 {
        if self == Guest::Two { 2 } else { 1 }
    }

    pub(crate) fn memory_mib(self) -> u32 {
        if self == Guest::Small { 256 } else { 1024 }
    }

    pub(crate) fn has_debian(self) -> bool {
        self != Guest::Small
    }
}

/// What runs a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum By {
    /// Nobody: it is the boot of the small guest.
    Boot,
    /// A function of this name in `guest/work.c`.
    Work,
    /// The same, with a disk or a network card on virtio.
    Virtio,
    /// A case in `guest/programs.sh`.
    Programs,
}

/// A row of the table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Workload {
    /// As the guest and the command line call it.
    pub(crate) name: &'static str,
    pub(crate) guest: Guest,
    pub(crate) by: By,
}

/// From the moment that GRUB gives the machine to Linux to the first line of user space.
pub(crate) const BOOT: &str = "boot";

const fn row(name: &'static str, guest: Guest, by: By) -> Workload {
    Workload { name, guest, by }
}

/// In the order of the guests, and in each as its scripts run them.
pub(crate) const ALL: &[Workload] = &[
    row(BOOT, Guest::Small, By::Boot),
    row("crc", Guest::Small, By::Work),
    row("sieve", Guest::Small, By::Work),
    row("qsort", Guest::Small, By::Work),
    row("switch", Guest::Small, By::Work),
    row("matrix", Guest::Small, By::Work),
    row("getppid", Guest::Small, By::Work),
    row("fork", Guest::Small, By::Work),
    row("faults", Guest::Small, By::Work),
    row("memcpy", Guest::Small, By::Work),
    row("pingpong", Guest::Small, By::Work),
    row("disk", Guest::Small, By::Virtio),
    row("tcp", Guest::Small, By::Virtio),
    row("udp", Guest::Small, By::Virtio),
    row("python-start", Guest::Debian, By::Programs),
    row("python-loop", Guest::Debian, By::Programs),
    row("gzip", Guest::Debian, By::Programs),
    row("sha256", Guest::Debian, By::Programs),
    row("sqlite", Guest::Debian, By::Programs),
    row("gcc", Guest::Debian, By::Programs),
    row("apt", Guest::Debian, By::Programs),
    row("make", Guest::Two, By::Programs),
];
