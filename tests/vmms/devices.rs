//! What ACPI tells the guest of the devices that are not in every machine.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Memory32Fixed, Name, Path, ResourceTemplate,
};
use softkvm_tests::acpi::{edge, scope};

use crate::bus;
use crate::style::Transport;

/// AML.
pub fn of(transport: Transport) -> Vec<u8> {
    match transport {
        // Linux's virtio_mmio.c takes this name.
        Transport::Mmio => {
            let window = Memory32Fixed::new(true, bus::DISK as u32, 0x1000);
            let disk = [
                &Name::new("_HID".into(), &"LNRO0005") as &dyn Aml,
                &Name::new("_UID".into(), &0_u8),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&window, &edge(bus::DISK_IRQ)])),
            ];
            scope(&Device::new(Path::new("V000"), disk.to_vec()))
        }
        Transport::Pci => {
            let (min, max) = (bus::DISK as u32, (bus::DISK + bus::PCI_LEN - 1) as u32);
            let memory = AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, min, max, None);
            let buses = AddressSpace::new_bus_number(0_u16, 0);
            let ports = IO::new(0xcf8, 0xcf8, 1, 8);
            let bridge = [
                &Name::new("_HID".into(), &EISAName::new("PNP0A03")) as &dyn Aml,
                &Name::new("_UID".into(), &0_u8),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&buses, &ports, &memory])),
            ];
            scope(&Device::new(Path::new("PCI0"), bridge.to_vec()))
        }
    }
}
