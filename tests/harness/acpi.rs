//! What a guest without firmware is told of its machine by ACPI: processors, an I/O APIC, a serial port, and what the VMM
//! adds. There is no hardware of ACPI's.

use acpi_tables::Aml;
use acpi_tables::aml::{Device, EISAName, IO, Interrupt, Name, Path, ResourceTemplate, Scope};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use anyhow::{Context, Result};
use vm_memory::{Bytes, GuestAddress};

use crate::linux::Memory;

/// COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Its interrupt, edge-triggered.
pub const SERIAL_IRQ: u8 = 4;
/// The I/O APIC.
pub const IOAPIC: u64 = 0xfec0_0000;

/// Where a BIOS has it: boot.rst and PVH tell the kernel, which would find it by itself.
const RSDP: u64 = 0xe_0000;
const TABLES: u64 = 0xe_0100;
/// ACPI Specification "IA-PC Boot Architecture Flags": the guest shall not wait for a clock to answer at port 71H.
const NO_CMOS_RTC: u16 = 1 << 5;
const OEM: [u8; 6] = *b"SFTKVM";
const TABLE: [u8; 8] = *b"SFTKVMVM";

/// Writes the tables; where the first of them is. `devices`: AML of those that are there besides COM1.
pub fn write(memory: &Memory, cpus: u8, devices: Vec<u8>) -> Result<u64> {
    let mut next = TABLES;
    let mut put = |table: &dyn Aml| -> Result<u64> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let at = next;
        memory.write_slice(&bytes, GuestAddress(at)).context("an ACPI table")?;
        next = (at + bytes.len() as u64).next_multiple_of(16);
        Ok(at)
    };
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, 1);
    dsdt.append_slice(&[com1(), devices].concat());
    let dsdt = put(&dsdt)?;
    let mut fadt = FADTBuilder::new(OEM, TABLE, 1).dsdt_64(dsdt).flag(Flags::HwReducedAcpi).flag(Flags::PwrButton);
    fadt.iapc_boot_arch = NO_CMOS_RTC.into();
    let fadt = put(&fadt.flag(Flags::SlpButton).finalize())?;
    let mut madt = MADT::new(OEM, TABLE, 1, LocalInterruptController::Address(0xfee0_0000));
    madt.add_structure(IoApic::new(0, IOAPIC as u32, 0));
    for cpu in 0..cpus {
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

/// A device below `_SB_`.
pub fn scope(device: &dyn Aml) -> Vec<u8> {
    let mut code = Vec::new();
    Scope::new("_SB_".into(), vec![device]).to_aml_bytes(&mut code);
    code
}

/// An edge-triggered interrupt.
pub fn edge(number: u8) -> Interrupt {
    Interrupt::new(true, true, false, false, number.into())
}

/// The register of COM1 that is at `port`.
pub fn serial_register(port: u16) -> Option<u8> {
    port.checked_sub(SERIAL_PORT).filter(|offset| *offset < 8).map(|offset| offset as u8)
}

fn com1() -> Vec<u8> {
    let serial = [
        &Name::new("_HID".into(), &EISAName::new("PNP0501")) as &dyn Aml,
        &Name::new("_UID".into(), &0_u8),
        &Name::new(
            "_CRS".into(),
            &ResourceTemplate::new(vec![&edge(SERIAL_IRQ), &IO::new(SERIAL_PORT, SERIAL_PORT, 1, 8)]),
        ),
    ];
    scope(&Device::new(Path::new("COM1"), serial.to_vec()))
}
