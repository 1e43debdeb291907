//! A disk on virtio: "Virtual I/O Device (VIRTIO) Version 1.2", sections 4.2 (MMIO) and 5.2 (block device).

use std::fs::File;
use std::io::{Seek, SeekFrom};

use anyhow::{Context, Result, bail};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// Offset of QueueNotify, where the ioeventfd is.
pub const QUEUE_NOTIFY: u64 = 0x50;
const QUEUE_SIZE: u16 = 128;
const SECTOR: u64 = 512;

const DEVICE_BLOCK: u32 = 2;
/// `VIRTIO_F_VERSION_1`, in the second word of the features.
const VERSION_1: u32 = 1;

const STATUS_OK: u8 = 0;
const STATUS_UNSUPPORTED: u8 = 2;

/// Header of a request. Section 5.2.6.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Request {
    kind: u32,
    reserved: u32,
    sector: u64,
}

#[expect(unsafe_code, reason = "plain integers, read from guest RAM")]
// SAFETY: any bytes are a request; there is no padding.
unsafe impl ByteValued for Request {}

/// The disk and its registers.
pub struct Disk {
    memory: GuestMemoryMmap<()>,
    image: File,
    sectors: u64,
    queue: Queue,
    /// Signalled when buffers have been used.
    interrupt: EventFd,
    features_select: u32,
    interrupt_status: u32,
    status: u32,
    /// Requests served.
    pub requests: u64,
}

impl Disk {
    /// A disk with this image.
    pub fn new(memory: GuestMemoryMmap<()>, image: File, interrupt: EventFd) -> Result<Self> {
        let sectors = image.metadata().context("the disk's image")?.len() / SECTOR;
        let queue = Queue::new(QUEUE_SIZE).context("a queue")?;
        let (features_select, interrupt_status, status, requests) = (0, 0, 0, 0);
        Ok(Self { memory, image, sectors, queue, interrupt, features_select, interrupt_status, status, requests })
    }

    /// A register of section 4.2.2, or the device's own behind 0x100.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            0x000 => u32::from_le_bytes(*b"virt"),
            0x004 => 2,
            0x008 => DEVICE_BLOCK,
            0x010 => u32::from(self.features_select == 1) * VERSION_1,
            0x034 => QUEUE_SIZE.into(),
            0x044 => self.queue.ready().into(),
            0x060 => self.interrupt_status,
            0x070 => self.status,
            0x100.. => {
                let capacity = self.sectors.to_le_bytes();
                let bytes = capacity.iter().copied().chain(std::iter::repeat(0)).skip((offset - 0x100) as usize);
                data.iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte);
                return;
            }
            _ => 0,
        };
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(to, byte)| *to = byte);
    }

    /// The same for a write.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else { return Ok(()) };
        let value = u32::from_le_bytes(bytes);
        match offset {
            0x014 => self.features_select = value,
            0x038 => self.queue.set_size(value as u16),
            0x044 => self.queue.set_ready(value == 1),
            QUEUE_NOTIFY => bail!("QueueNotify exited, with an ioeventfd there"),
            0x064 => self.interrupt_status &= !value,
            0x070 => {
                self.status = value;
                if value == 0 {
                    self.queue.reset();
                }
            }
            0x080 => self.queue.set_desc_table_address(Some(value), None),
            0x084 => self.queue.set_desc_table_address(None, Some(value)),
            0x090 => self.queue.set_avail_ring_address(Some(value), None),
            0x094 => self.queue.set_avail_ring_address(None, Some(value)),
            0x0a0 => self.queue.set_used_ring_address(Some(value), None),
            0x0a4 => self.queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
        Ok(())
    }

    /// Serves what the guest has put into the queue.
    pub fn serve(&mut self) -> Result<()> {
        let memory = self.memory.clone();
        let mut done = Vec::new();
        for chain in self.queue.iter(&memory).context("the queue")? {
            let head = chain.head_index();
            let mut request = Request::default();
            let (mut at, mut written, mut status) = (0, 1, STATUS_OK);
            for (index, part) in chain.enumerate() {
                let (address, len) = (part.addr(), part.len() as usize);
                match (index, part.is_write_only(), len) {
                    (0, false, _) => {
                        request = memory.read_obj(address).context("a request")?;
                        at = request.sector * SECTOR;
                    }
                    (_, true, 1) => memory.write_obj(status, address).context("a status")?,
                    _ => {
                        // The kernel copies between the file and guest RAM.
                        let moved = move_data(&memory, &mut self.image, request.kind, at, address, len)?;
                        status = if moved { STATUS_OK } else { STATUS_UNSUPPORTED };
                        at += len as u64;
                        written += if part.is_write_only() { part.len() } else { 0 };
                    }
                }
            }
            done.push((head, written));
        }
        for (head, written) in &done {
            self.queue.add_used(&memory, *head, *written).context("the used ring")?;
        }
        if !done.is_empty() {
            self.requests += done.len() as u64;
            self.interrupt_status |= 1;
            self.interrupt.write(1).context("the interrupt")?;
        }
        Ok(())
    }
}

/// Section 5.2.6: IN is 0, OUT is 1. False: some other request.
fn move_data(
    memory: &GuestMemoryMmap<()>,
    image: &mut File,
    kind: u32,
    at: u64,
    address: GuestAddress,
    len: usize,
) -> Result<bool> {
    image.seek(SeekFrom::Start(at)).context("the disk's image")?;
    match kind {
        0 => memory.read_exact_volatile_from(address, image, len).context("reading the disk")?,
        1 => memory.write_all_volatile_to(address, image, len).context("writing the disk")?,
        _ => return Ok(false),
    }
    Ok(true)
}
