//! `IA32_ARCH_CAPABILITIES`: faults of processors that the host's does not have, so that a guest need not work around them.
//! The guest's instructions end up as the host's, whose kernel knows; what it does not name is promised to nobody. SDM Vol. 4
//! "IA32_ARCH_CAPABILITIES".

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

/// What the kernel calls a fault (Documentation/ABI/testing/sysfs-devices-system-cpu, "vulnerabilities"), and the bits that say
/// that there is none.
const BITS: &[(&str, u64)] = &[
    ("meltdown", /* RDCL_NO */ 1 << 0),
    ("l1tf", /* SKIP_L1DFL_VMENTRY */ 1 << 3),
    ("spec_store_bypass", /* SSB_NO */ 1 << 4),
    ("mds", /* MDS_NO */ 1 << 5),
    ("itlb_multihit", /* IF_PSCHANGE_MC_NO */ 1 << 6),
    ("tsx_async_abort", /* TAA_NO */ 1 << 8),
    ("mmio_stale_data", /* SBDR_SSDP_NO, FBSDP_NO, PSDP_NO */ 0b111 << 13),
    ("gather_data_sampling", /* GDS_NO */ 1 << 26),
    ("reg_file_data_sampling", /* RFDS_NO */ 1 << 27),
];

/// The value for guests on this host.
pub(crate) fn value() -> u64 {
    static VALUE: LazyLock<u64> = LazyLock::new(|| read(Path::new("/sys/devices/system/cpu/vulnerabilities")));
    *VALUE
}

fn read(directory: &Path) -> u64 {
    let is_absent =
        |name: &str| fs::read_to_string(directory.join(name)).is_ok_and(|text| text.trim() == "Not affected");
    BITS.iter().filter(|(name, _)| is_absent(name)).map(|(_, bits)| bits).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_does_not_say_is_not_promised() {
        let directory = std::env::temp_dir().join(format!("softkvm-vulnerabilities-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        for (name, text) in
            [("meltdown", "Not affected\n"), ("mds", "Vulnerable\n"), ("mmio_stale_data", "Not affected\n")]
        {
            fs::write(directory.join(name), text).unwrap();
        }
        assert_eq!(read(&directory), 0xe001);
        fs::remove_dir_all(&directory).unwrap();
        assert_eq!(read(&directory), 0);
    }
}
