//! A PCI bus of two functions, by configuration mechanism 1: a host bridge, and the disk with its interrupts by MSI-X.
//! PCI Local Bus Specification 3.0, sections 3.2.2.3.2, 6.1 and 6.8.2; VIRTIO 1.2, section 4.1.

use anyhow::{Result, bail};

use crate::block::Disk;
use crate::bus::{DISK, DISK_GSI};
use crate::routes::{Msi, Routes};

/// `CONFIG_ADDRESS` and the first of the four ports of `CONFIG_DATA`.
pub const ADDRESS: u16 = 0xcf8;
pub const DATA: u16 = 0xcfc;

const DISK_DEVICE: usize = 1;

// What the disk's BAR has where.
const BAR_LEN: u32 = 0x1_0000;
const COMMON: u32 = 0;
const NOTIFY: u32 = 0x1000;
const ISR: u32 = 0x2000;
const DEVICE: u32 = 0x3000;
const TABLE: u32 = 0x8000;
const PENDING: u32 = 0x8800;
/// Where the ioeventfd of queue 0 is.
pub const QUEUE_NOTIFY: u64 = NOTIFY as u64;

/// Vectors: one for changes of the configuration, one for the queue.
const VECTORS: u16 = 2;
const MSIX: usize = 0xb0;
const NO_VECTOR: u16 = 0xffff;

/// A function's configuration space, and which bits of it can be written.
struct Function {
    bytes: [u8; 256],
    writable: [u8; 256],
}

impl Function {
    fn new(vendor: u16, device: u16, class: u32, revision: u8) -> Self {
        let mut function = Self { bytes: [0; 256], writable: [0; 256] };
        function.set(0, &vendor.to_le_bytes());
        function.set(2, &device.to_le_bytes());
        function.set(8, &(class << 8 | u32::from(revision)).to_le_bytes());
        // Command: memory space, bus master, INTx disable.
        function.writable[4] = 0x06;
        function.writable[5] = 0x04;
        function
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn write(&mut self, at: usize, data: &[u8]) {
        for (at, byte) in (at..256).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | byte & mask;
        }
    }
}

/// The bus.
pub struct Pci {
    address: u32,
    functions: [Function; 2],
    table: [u8; VECTORS as usize * 16],
    queue_vector: u16,
    config_vector: u16,
    features_select: u32,
    routes: Routes,
}

impl Pci {
    /// The disk interrupts by GSI [`DISK_GSI`], which `routes` leads on.
    pub fn new(routes: Routes) -> Self {
        let bridge = Function::new(0x8086, 0x1237, 0x06_0000, 0);
        let mut disk = Function::new(0x1af4, 0x1042, 0x01_8000, 1);
        // Status: there are capabilities.
        disk.set(6, &[0x10]);
        disk.set(0x10, &(DISK as u32).to_le_bytes());
        disk.writable[0x10..0x14].copy_from_slice(&(!(BAR_LEN - 1)).to_le_bytes());
        disk.set(0x2c, &[0xf4, 0x1a, 2, 0]);
        disk.set(0x34, &[0x40]);
        let parts = [(1, COMMON, 0x38), (2, NOTIFY, 4), (3, ISR, 1), (4, DEVICE, 0x3c)];
        for (at, (kind, offset, len)) in (0x40..).step_by(0x18).zip(parts) {
            disk.set(at, &[0x09, (at + 0x18) as u8, if kind == 2 { 20 } else { 16 }, kind]);
            disk.set(at + 8, &u32::to_le_bytes(offset));
            disk.set(at + 12, &u32::to_le_bytes(len));
        }
        // The last of them leads to MSI-X.
        disk.set(0x40 + 3 * 0x18 + 1, &[MSIX as u8]);
        disk.set(MSIX, &[0x11, 0, (VECTORS - 1) as u8, 0]);
        // Enable and function mask.
        disk.writable[MSIX + 3] = 0xc0;
        disk.set(MSIX + 4, &TABLE.to_le_bytes());
        disk.set(MSIX + 8, &PENDING.to_le_bytes());
        let mut table = [0; VECTORS as usize * 16];
        table.chunks_mut(16).for_each(|entry| entry[12] = 1);
        let (queue_vector, config_vector) = (NO_VECTOR, NO_VECTOR);
        Self { address: 0, functions: [bridge, disk], table, queue_vector, config_vector, features_select: 0, routes }
    }

    /// The function that `CONFIG_ADDRESS` names, and the register.
    fn selected(&mut self, port: u16) -> Option<(&mut Function, usize)> {
        let (enabled, bus, function) = (self.address >> 31, self.address >> 16 & 0xff, self.address >> 8 & 7);
        let device = (self.address >> 11 & 0x1f) as usize;
        let at = (self.address & 0xfc) as usize + usize::from(port - DATA);
        let found = (enabled, bus, function) == (1, 0, 0);
        self.functions.get_mut(device).filter(|_| found).map(|function| (function, at))
    }

    /// IN from one of the eight ports.
    pub fn port_read(&mut self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if port < DATA {
            let address = self.address.to_le_bytes();
            data.iter_mut().zip(&address[usize::from(port - ADDRESS)..]).for_each(|(to, byte)| *to = *byte);
        } else if let Some((function, at)) = self.selected(port) {
            data.iter_mut().zip(&function.bytes[at..]).for_each(|(to, byte)| *to = *byte);
        }
    }

    /// OUT to one of them.
    pub fn port_write(&mut self, port: u16, data: &[u8]) -> Result<()> {
        if port < DATA {
            if let (ADDRESS, Ok(word)) = (port, data.try_into()) {
                self.address = u32::from_le_bytes(word);
            }
            return Ok(());
        }
        if let Some((function, at)) = self.selected(port) {
            function.write(at, data);
        }
        self.route()
    }

    /// A load from the disk's BAR.
    pub fn read(&mut self, disk: &mut Disk, offset: u64, data: &mut [u8]) {
        let offset = offset as u32;
        let value: u64 = match offset {
            0x00 => self.features_select.into(),
            0x04 => Disk::features(self.features_select).into(),
            0x10 => self.config_vector.into(),
            0x12 => 1,
            0x14 => disk.status.into(),
            0x18 => disk.queue_size().into(),
            0x1a => self.queue_vector.into(),
            0x1c => disk.is_ready().into(),
            ISR => disk.take_interrupt_status().into(),
            DEVICE..TABLE => return disk.read_config((offset - DEVICE) as usize, data),
            TABLE..PENDING => {
                let entries = self.table.iter().skip((offset - TABLE) as usize);
                return data.iter_mut().zip(entries).for_each(|(to, byte)| *to = *byte);
            }
            _ => 0,
        };
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(to, byte)| *to = byte);
    }

    /// A store there.
    pub fn write(&mut self, disk: &mut Disk, offset: u64, data: &[u8]) -> Result<()> {
        let offset = offset as u32;
        let mut bytes = [0; 8];
        bytes.iter_mut().zip(data).for_each(|(to, byte)| *to = *byte);
        let value = u64::from_le_bytes(bytes);
        let word = value as u32;
        match offset {
            0x00 => self.features_select = word,
            0x10 => self.config_vector = word as u16,
            0x14 => disk.set_status(word)?,
            0x18 => disk.set_queue_size(word as u16),
            0x1a => self.queue_vector = word as u16,
            0x1c => disk.set_ready(word == 1),
            0x20..0x38 => {
                let halves = [Some(word), (data.len() == 8).then_some((value >> 32) as u32)];
                for (at, half) in (offset..).step_by(4).zip(halves.into_iter().flatten()) {
                    disk.set_address((at - 0x20) / 8, at % 8 == 4, half);
                }
            }
            NOTIFY..ISR => bail!("a notification exited, with an ioeventfd there"),
            TABLE..PENDING => {
                for (at, byte) in ((offset - TABLE) as usize..self.table.len()).zip(data) {
                    self.table[at] = *byte;
                }
            }
            _ => {}
        }
        self.route()
    }

    /// Has the queue's interrupt go where its entry of the table says.
    fn route(&mut self) -> Result<()> {
        let enabled = self.functions[DISK_DEVICE].bytes[MSIX + 3] >> 6 == 0b10;
        let entry = self.table.chunks(16).nth(self.queue_vector.into()).filter(|_| enabled);
        let word = |entry: &[u8], at: usize| entry[at..].first_chunk().map_or(0, |word| u32::from_le_bytes(*word));
        let msi = entry.filter(|entry| entry[12] & 1 == 0).map(|entry| Msi {
            address: u64::from(word(entry, 4)) << 32 | u64::from(word(entry, 0)),
            data: word(entry, 8),
        });
        self.routes.set(DISK_GSI, msi)
    }
}
