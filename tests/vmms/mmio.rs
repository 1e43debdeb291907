//! The disk's registers by virtio-mmio: VIRTIO 1.2, section 4.2.2.

use anyhow::{Result, bail};

use crate::block::Disk;

/// Offset of QueueNotify, where the ioeventfd is.
pub const QUEUE_NOTIFY: u64 = 0x50;

const DEVICE_BLOCK: u32 = 2;
const QUEUE_SIZE_MAX: u32 = 128;

/// What the registers keep beside the disk.
#[derive(Debug, Default)]
pub struct Mmio {
    features_select: u32,
}

impl Mmio {
    /// A load.
    pub fn read(&self, disk: &Disk, offset: u64, data: &mut [u8]) {
        let value = match offset {
            0x000 => u32::from_le_bytes(*b"virt"),
            0x004 => 2,
            0x008 => DEVICE_BLOCK,
            0x010 => Disk::features(self.features_select),
            0x034 => QUEUE_SIZE_MAX,
            0x044 => disk.is_ready().into(),
            0x060 => disk.interrupt_status(),
            0x070 => disk.status,
            0x100.. => return disk.read_config((offset - 0x100) as usize, data),
            _ => 0,
        };
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(to, byte)| *to = byte);
    }

    /// A store.
    pub fn write(&mut self, disk: &mut Disk, offset: u64, data: &[u8]) -> Result<()> {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else { return Ok(()) };
        match offset {
            0x014 => self.features_select = value,
            0x038 => disk.set_queue_size(value as u16),
            0x044 => disk.set_ready(value == 1),
            QUEUE_NOTIFY => bail!("QueueNotify exited, with an ioeventfd there"),
            0x064 => disk.acknowledge(value),
            0x070 => disk.set_status(value)?,
            0x080 | 0x084 => disk.set_address(0, offset == 0x084, value),
            0x090 | 0x094 => disk.set_address(1, offset == 0x094, value),
            0x0a0 | 0x0a4 => disk.set_address(2, offset == 0x0a4, value),
            _ => {}
        }
        Ok(())
    }
}
