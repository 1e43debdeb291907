//! Ports and addresses that exit to the VMM, and who answers them.

use std::io::{Stdout, stdout};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use softkvm_tests::acpi::{IOAPIC, serial_register};
use vm_superio::Serial;
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::EventFd;

use crate::block::Disk;
use crate::ioapic::Ioapic;
use crate::mmio::Mmio;
use crate::pci::{self, Pci};
use crate::routes::Interrupt;

/// The disk's registers: those of virtio-mmio, or the first BAR.
pub const DISK: u64 = 0xd000_0000;
pub const DISK_LEN: u64 = 0x1_0000;
/// Its interrupt by virtio-mmio.
pub const DISK_IRQ: u8 = 5;
/// And by MSI-X: the first GSI that is no pin of an I/O APIC.
pub const DISK_GSI: u32 = 24;
/// What the PCI host bridge passes on.
pub const PCI_LEN: u64 = 0x10_0000;
const IOAPIC_END: u64 = IOAPIC + 0x20;

/// The keyboard controller, as far as a driver looks for one and resets the machine with it.
#[derive(Debug, Default)]
struct Keyboard {
    /// The command byte, from RAM address 0.
    control: u8,
    /// What port 60h gives next.
    output: Option<u8>,
    /// The byte that is written next is the command byte.
    takes_control: bool,
}

const KEYBOARD_DATA: u16 = 0x60;
const KEYBOARD_COMMAND: u16 = 0x64;

impl Keyboard {
    fn read(&mut self, port: u16) -> u8 {
        // Status: bit 0, there is output.
        if port == KEYBOARD_DATA { self.output.take().unwrap_or(0) } else { self.output.is_some().into() }
    }

    /// True: the reset line is pulled.
    fn write(&mut self, port: u16, byte: u8) -> bool {
        match (port, byte) {
            (KEYBOARD_DATA, control) if std::mem::take(&mut self.takes_control) => self.control = control,
            (KEYBOARD_COMMAND, 0x20) => self.output = Some(self.control),
            (KEYBOARD_COMMAND, 0x60) => self.takes_control = true,
            (KEYBOARD_COMMAND, 0xfe) => return true,
            _ => {}
        }
        false
    }
}

/// How the disk's registers are found.
pub enum Registers {
    Mmio(Mmio),
    Pci(Box<Pci>),
}

/// Everything that exits lead to.
pub struct Bus {
    serial: Mutex<Serial<Interrupt, NoEvents, Stdout>>,
    /// The disk.
    pub disk: Arc<Mutex<Disk>>,
    registers: Mutex<Registers>,
    ioapic: Option<Mutex<Ioapic>>,
    keyboard: Mutex<Keyboard>,
    /// Written when the guest asks for a reset.
    pub reset: EventFd,
}

impl Bus {
    /// A bus of one disk and one serial port, which interrupts by `serial`.
    pub fn new(
        serial: Interrupt,
        disk: Arc<Mutex<Disk>>,
        registers: Registers,
        ioapic: Option<Ioapic>,
        reset: EventFd,
    ) -> Self {
        let (serial, keyboard) = (Mutex::new(Serial::new(serial, stdout())), Mutex::default());
        Self { serial, disk, registers: Mutex::new(registers), ioapic: ioapic.map(Mutex::new), keyboard, reset }
    }

    /// IN.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if is_pci(port) {
            if let Registers::Pci(pci) = &mut *locked(&self.registers) {
                pci.port_read(port, data);
            }
            return;
        }
        let [byte] = data else { return };
        match (serial_register(port), port) {
            (Some(offset), _) => *byte = locked(&self.serial).read(offset),
            (_, KEYBOARD_DATA | KEYBOARD_COMMAND) => *byte = locked(&self.keyboard).read(port),
            _ => {}
        }
    }

    /// OUT.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Result<()> {
        if is_pci(port)
            && let Registers::Pci(pci) = &mut *locked(&self.registers)
        {
            return pci.port_write(port, data);
        }
        let [byte] = data else { return Ok(()) };
        match (serial_register(port), port) {
            (Some(offset), _) => {
                let written = locked(&self.serial).write(offset, *byte);
                written.map_err(|err| anyhow::anyhow!("the serial port: {err:?}"))?;
            }
            (_, KEYBOARD_DATA | KEYBOARD_COMMAND) if locked(&self.keyboard).write(port, *byte) => {
                self.reset.write(1)?
            }
            _ => {}
        }
        Ok(())
    }

    /// A load from where no RAM is.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(offset) = address.checked_sub(DISK).filter(|offset| *offset < DISK_LEN) {
            match &mut *locked(&self.registers) {
                Registers::Mmio(mmio) => mmio.read(&locked(&self.disk), offset, data),
                Registers::Pci(pci) => pci.read(&mut locked(&self.disk), offset, data),
            }
        } else if let (Some(ioapic), IOAPIC..IOAPIC_END) = (&self.ioapic, address) {
            locked(ioapic).read(address - IOAPIC, data);
        }
    }

    /// A store to where no RAM is.
    pub fn write(&self, address: u64, data: &[u8]) -> Result<()> {
        if let Some(offset) = address.checked_sub(DISK).filter(|offset| *offset < DISK_LEN) {
            return match &mut *locked(&self.registers) {
                Registers::Mmio(mmio) => mmio.write(&mut locked(&self.disk), offset, data),
                Registers::Pci(pci) => pci.write(&mut locked(&self.disk), offset, data),
            };
        }
        if let (Some(ioapic), IOAPIC..IOAPIC_END) = (&self.ioapic, address) {
            locked(ioapic).write(address - IOAPIC, data)?;
        }
        Ok(())
    }
}

fn is_pci(port: u16) -> bool {
    (pci::ADDRESS..pci::DATA + 4).contains(&port)
}

/// The lock; what a thread left that panicked is as good as anything.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
