//! A disk on virtio, whichever way its registers are found: VIRTIO 1.2, sections 2.7 (queues) and 5.2 (block device).

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};

use anyhow::{Context, Result};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};
use vm_superio::Trigger;

use crate::routes::Interrupt;

const QUEUE_SIZE: u16 = 128;
const SECTOR: u64 = 512;

/// `VIRTIO_F_VERSION_1`, in the second word of the features.
const VERSION_1: u32 = 1;
/// `DRIVER_OK` of the device status.
const DRIVER_OK: u32 = 4;

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

/// The disk, its queue and what its registers have in common.
pub struct Disk {
    memory: GuestMemoryMmap<()>,
    image: File,
    sectors: u64,
    queue: Queue,
    /// Raised when buffers have been used.
    interrupt: Interrupt,
    /// Who serves the queue, if it is another process: it is told where the queue is.
    server: Option<File>,
    interrupt_status: u32,
    /// As the driver wrote it.
    pub status: u32,
    /// Requests served.
    pub requests: u64,
}

impl Disk {
    /// A disk with this image.
    pub fn new(memory: GuestMemoryMmap<()>, image: File, interrupt: Interrupt) -> Result<Self> {
        let sectors = image.metadata().context("the disk's image")?.len() / SECTOR;
        let queue = Queue::new(QUEUE_SIZE).context("a queue")?;
        Ok(Self { memory, image, sectors, queue, interrupt, server: None, interrupt_status: 0, status: 0, requests: 0 })
    }

    /// Somebody behind this pipe serves the queue.
    pub fn served_by(&mut self, server: File) {
        self.server = Some(server);
    }

    /// A word of the features that there are.
    pub fn features(select: u32) -> u32 {
        u32::from(select == 1) * VERSION_1
    }

    /// Of the device's own configuration: the capacity, and zeros.
    pub fn read_config(&self, offset: usize, data: &mut [u8]) {
        let capacity = self.sectors.to_le_bytes();
        let bytes = capacity.iter().copied().chain(std::iter::repeat(0)).skip(offset);
        data.iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte);
    }

    /// Entries of the queue.
    pub fn queue_size(&self) -> u16 {
        self.queue.size()
    }

    /// The driver wants another size.
    pub fn set_queue_size(&mut self, size: u16) {
        self.queue.set_size(size);
    }

    /// Is the queue in use?
    pub fn is_ready(&self) -> bool {
        self.queue.ready()
    }

    /// The driver says so.
    pub fn set_ready(&mut self, ready: bool) {
        self.queue.set_ready(ready);
    }

    /// Half of the address of the descriptors (0), of the driver's ring (1) or of the device's (2).
    pub fn set_address(&mut self, which: u32, upper: bool, half: u32) {
        let (low, high) = if upper { (None, Some(half)) } else { (Some(half), None) };
        match which {
            0 => self.queue.set_desc_table_address(low, high),
            1 => self.queue.set_avail_ring_address(low, high),
            _ => self.queue.set_used_ring_address(low, high),
        }
    }

    /// The driver writes the device status.
    pub fn set_status(&mut self, status: u32) -> Result<()> {
        let starts = (status & !self.status) & DRIVER_OK != 0;
        self.status = status;
        if status == 0 {
            self.queue.reset();
        }
        if let (true, Some(server)) = (starts, &mut self.server) {
            let queue = &self.queue;
            let words = [queue.size().into(), queue.desc_table(), queue.avail_ring(), queue.used_ring()];
            server.write_all(&words.map(u64::to_le_bytes).concat()).context("the disk's process")?;
        }
        Ok(())
    }

    /// In the other process: waits until the queue is there.
    pub fn learn_queue(&mut self, from: &mut File) -> Result<()> {
        let mut bytes = [0; 32];
        from.read_exact(&mut bytes).context("the queue's addresses")?;
        let mut words = bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")));
        let mut next = || words.next().expect("four of them");
        self.queue.set_size(next() as u16);
        for which in 0..3 {
            let address = next();
            self.set_address(which, false, address as u32);
            self.set_address(which, true, (address >> 32) as u32);
        }
        self.queue.set_ready(true);
        Ok(())
    }

    /// Why there was an interrupt.
    pub fn interrupt_status(&self) -> u32 {
        self.interrupt_status
    }

    /// The driver has seen these bits of it.
    pub fn acknowledge(&mut self, bits: u32) {
        self.interrupt_status &= !bits;
    }

    /// The same by reading.
    pub fn take_interrupt_status(&mut self) -> u32 {
        std::mem::take(&mut self.interrupt_status)
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
            self.interrupt.trigger().context("the interrupt")?;
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
