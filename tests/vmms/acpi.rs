//! What the guest is told of its machine.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Path, ResourceTemplate,
    Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use anyhow::{Context, Result};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::bus::{self, IOAPIC, SERIAL_IRQ, SERIAL_PORT};
use crate::style::{Style, Transport};

/// Where a BIOS has it: boot.rst and PVH tell the kernel, which would find it by itself.
const RSDP: u64 = 0xe_0000;
const TABLES: u64 = 0xe_0100;
const OEM: [u8; 6] = *b"SFTKVM";
const TABLE: [u8; 8] = *b"SFTKVMVM";

/// Writes the tables; where the first of them is.
pub fn write(style: &Style, memory: &GuestMemoryMmap<()>) -> Result<u64> {
    let mut next = TABLES;
    let mut put = |table: &dyn Aml| -> Result<u64> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let at = next;
        memory.write_slice(&bytes, GuestAddress(at)).context("an ACPI table")?;
        next = (at + bytes.len() as u64).next_multiple_of(16);
        Ok(at)
    };
    let mut code = Vec::new();
    devices(style, &mut code);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, 1);
    dsdt.append_slice(&code);
    let dsdt = put(&dsdt)?;
    let fadt = FADTBuilder::new(OEM, TABLE, 1).dsdt_64(dsdt).flag(Flags::HwReducedAcpi).flag(Flags::PwrButton);
    let fadt = put(&fadt.flag(Flags::SlpButton).finalize())?;
    let mut madt = MADT::new(OEM, TABLE, 1, LocalInterruptController::Address(0xfee0_0000));
    madt.add_structure(IoApic::new(0, IOAPIC as u32, 0));
    for cpu in 0..style.cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    let madt = put(&madt)?;
    let mut xsdt = XSDT::new(OEM, TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = put(&xsdt)?;
    let mut bytes = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut bytes);
    memory.write_slice(&bytes, GuestAddress(RSDP)).context("the RSDP")?;
    Ok(RSDP)
}

fn devices(style: &Style, code: &mut Vec<u8>) {
    let scope = |device: &dyn Aml, code: &mut Vec<u8>| Scope::new("_SB_".into(), vec![device]).to_aml_bytes(code);
    let edge = |number: u8| Interrupt::new(true, true, false, false, number.into());
    let serial = [
        &Name::new("_HID".into(), &EISAName::new("PNP0501")) as &dyn Aml,
        &Name::new("_UID".into(), &0_u8),
        &Name::new(
            "_CRS".into(),
            &ResourceTemplate::new(vec![&edge(SERIAL_IRQ), &IO::new(SERIAL_PORT, SERIAL_PORT, 1, 8)]),
        ),
    ];
    scope(&Device::new(Path::new("COM1"), serial.to_vec()), code);
    match style.transport {
        // Linux's virtio_mmio.c takes this name.
        Transport::Mmio => {
            let window = Memory32Fixed::new(true, bus::DISK as u32, 0x1000);
            let disk = [
                &Name::new("_HID".into(), &"LNRO0005") as &dyn Aml,
                &Name::new("_UID".into(), &0_u8),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&window, &edge(bus::DISK_IRQ)])),
            ];
            scope(&Device::new(Path::new("V000"), disk.to_vec()), code);
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
            scope(&Device::new(Path::new("PCI0"), bridge.to_vec()), code);
        }
    }
}
