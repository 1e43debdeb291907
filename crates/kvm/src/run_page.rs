//! The pages that a vCPU file's mmap shows: `kvm_run`, the data of port I/O, the ring of coalesced MMIO, and far behind them the
//! dirty ring, if the VM has such.
//!
//! The VMM may write any byte at any time, from any thread and from a signal handler: each field is one relaxed atomic
//! access, nothing read is trusted twice, and what a completion must rely on is kept on our side.

use std::io;
use std::mem::offset_of;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{
    AtomicU8, AtomicU16, AtomicU32, AtomicU64,
    Ordering::{Relaxed, Release},
};

use kvm_abi::consts::{KVM_DIRTY_LOG_PAGE_OFFSET, KVM_EXIT_XEN_HCALL, kvm_sync_regs};
use kvm_abi::{Plain, kvm_regs, kvm_run, kvm_sregs, kvm_vcpu_events};
use mmu::ring::ENTRY_BYTES;
use mmu::{DirtyRing, Mapping, Piece};

/// Bytes per page.
const PAGE: usize = 4096;
/// What `KVM_GET_VCPU_MMAP_SIZE` answers.
pub const SIZE: usize = 3 * PAGE;
/// Where the data of port I/O starts.
pub(crate) const PIO_DATA: usize = PAGE;
/// Where the ring of coalesced I/O starts, in pages, and `struct kvm_coalesced_mmio_ring`: first, last, entries of address,
/// length, whether it is a port, data.
pub(crate) const RING_PAGE: usize = 2;
const RING: usize = RING_PAGE * PAGE;
const RING_ENTRIES: u32 = ((PAGE - 8) / RING_ENTRY) as u32;
const RING_ENTRY: usize = 24;
/// Where the dirty ring starts.
const DIRTY_RING: u64 = KVM_DIRTY_LOG_PAGE_OFFSET as u64 * PAGE as u64;
/// Where `struct kvm_sync_regs` starts.
const SYNCED: usize = offset_of!(kvm_run, s);
/// First byte of the union of exits.
const EXIT: usize = offset_of!(kvm_run, __bindgen_anon_1);
const _: () = assert!(EXIT == 32 && size_of::<kvm_run>() <= PAGE);

/// Offsets are constants of the header, aligned and inside of the pages; the mapping is one we made, writable.
const INSIDE: &str = "a field of kvm_run is inside of the pages";

/// The shared pages of one vCPU.
pub(crate) struct RunPage {
    mapping: Arc<Mapping>,
}

/// `kvm_run.io` without its `data_offset`.
pub(crate) struct IoExit {
    /// `KVM_EXIT_IO_IN` or `KVM_EXIT_IO_OUT`.
    pub(crate) direction: u8,
    /// Bytes per element.
    pub(crate) size: u8,
    /// Port.
    pub(crate) port: u16,
    /// Elements.
    pub(crate) count: u32,
}

/// Getters and setters of `struct kvm_sync_regs`, whose parts are copied as a whole: user space does not run the vCPU while it
/// writes them.
macro_rules! synced {
    ($($get:ident $show:ident $field:ident $type:ident;)*) => {
        impl RunPage {$(
            pub(crate) fn $get(&self) -> $type {
                let mut bytes = [0; size_of::<$type>()];
                self.mapping.read((SYNCED + offset_of!(kvm_sync_regs, $field)) as u64, &mut bytes).expect(INSIDE);
                $type::from_bytes(&bytes).expect("as many bytes as it has")
            }

            pub(crate) fn $show(&self, value: &$type) {
                let at = SYNCED + offset_of!(kvm_sync_regs, $field);
                self.mapping.write(at as u64, value.as_bytes()).expect(INSIDE);
            }
        )*}
    };
}

synced! {
    synced_regs   show_regs   regs   kvm_regs;
    synced_sregs  show_sregs  sregs  kvm_sregs;
    synced_events show_events events kvm_vcpu_events;
}

impl RunPage {
    /// Fresh pages, all zero, but for the ring of coalesced I/O, which is that of `first`, the pages of an older vCPU.
    /// `ring_bytes`: size of the dirty ring, 0 without.
    pub(crate) fn new(ring_bytes: u32, first: Option<&Arc<Mapping>>) -> io::Result<Self> {
        let bytes = if ring_bytes == 0 { SIZE as u64 } else { DIRTY_RING + u64::from(ring_bytes) };
        let own = Mapping::create("kvm-vcpu", bytes)?;
        let Some(first) = first else { return Ok(Self { mapping: own }) };
        let (ring, behind) = (RING as u64, (RING + PAGE) as u64);
        let piece = |mapping: &Arc<Mapping>, range: Range<u64>| Piece {
            mapping: mapping.clone(),
            offset: range.start,
            len: range.end - range.start,
        };
        let mut pieces = vec![piece(&own, 0..ring), piece(first, ring..behind)];
        pieces.extend((behind < bytes).then(|| piece(&own, behind..own.len())));
        Ok(Self { mapping: Mapping::join(&pieces)? })
    }

    /// The dirty ring, if there is one. `full` is called when the vCPU must leave the guest.
    pub(crate) fn dirty_ring(&self, full: impl Fn() + Send + Sync + 'static) -> Option<DirtyRing> {
        let bytes = self.mapping.len().checked_sub(DIRTY_RING)?;
        Some(DirtyRing::new(self.mapping.clone(), DIRTY_RING, (bytes / ENTRY_BYTES) as u32, full))
    }

    /// For the client to map.
    pub(crate) fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    fn u8(&self, offset: usize) -> &AtomicU8 {
        self.mapping.atomic_u8(offset as u64).expect(INSIDE)
    }

    fn u16(&self, offset: usize) -> &AtomicU16 {
        self.mapping.atomic_u16(offset as u64).expect(INSIDE)
    }

    fn u32(&self, offset: usize) -> &AtomicU32 {
        self.mapping.atomic_u32(offset as u64).expect(INSIDE)
    }

    fn u64(&self, offset: usize) -> &AtomicU64 {
        self.mapping.atomic_u64(offset as u64).expect(INSIDE)
    }

    // What user space tells us.

    pub(crate) fn request_interrupt_window(&self) -> bool {
        self.u8(offset_of!(kvm_run, request_interrupt_window)).load(Relaxed) != 0
    }

    pub(crate) fn immediate_exit(&self) -> bool {
        self.u8(offset_of!(kvm_run, immediate_exit)).load(Relaxed) != 0
    }

    pub(crate) fn cr8(&self) -> u64 {
        self.u64(offset_of!(kvm_run, cr8)).load(Relaxed)
    }

    pub(crate) fn exit_reason(&self) -> u32 {
        self.u32(offset_of!(kvm_run, exit_reason)).load(Relaxed)
    }

    /// `kvm_valid_regs` and `kvm_dirty_regs`.
    pub(crate) fn sync_regs(&self) -> (u64, u64) {
        let field = |offset| self.u64(offset).load(Relaxed);
        (field(offset_of!(kvm_run, kvm_valid_regs)), field(offset_of!(kvm_run, kvm_dirty_regs)))
    }

    /// User space's changes of a field have been taken.
    pub(crate) fn synced(&self, field: u32) {
        self.u64(offset_of!(kvm_run, kvm_dirty_regs)).fetch_and(!u64::from(field), Relaxed);
    }

    /// `mmio.data` as a little-endian number.
    pub(crate) fn mmio_data(&self) -> u64 {
        self.u64(EXIT + 8).load(Relaxed)
    }

    /// Copies what user space put there for IN or INS.
    pub(crate) fn read_pio_data(&self, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.u8(PIO_DATA + i).load(Relaxed);
        }
    }

    /// Copies what OUTS hands over; at most a page.
    pub(crate) fn write_pio_data(&self, data: &[u8]) {
        for (i, byte) in data.iter().take(PAGE).enumerate() {
            self.u8(PIO_DATA + i).store(*byte, Relaxed);
        }
    }

    /// Puts a write into the ring. False: it is full, or user space has written nonsense there.
    pub(crate) fn put_in_ring(&self, addr: u64, len: u8, value: u64, pio: bool) -> bool {
        let (first, last) = (self.u32(RING).load(Relaxed), self.u32(RING + 4));
        let insert = last.load(Relaxed);
        // One entry is always unused.
        if insert >= RING_ENTRIES || (insert + 1) % RING_ENTRIES == first {
            return false;
        }
        let entry = RING + 8 + insert as usize * RING_ENTRY;
        self.u64(entry).store(addr, Relaxed);
        self.u32(entry + 8).store(len.into(), Relaxed);
        self.u32(entry + 12).store(pio.into(), Relaxed);
        self.u64(entry + 16).store(value, Relaxed);
        // Whoever sees the entry sees what is in it.
        last.store((insert + 1) % RING_ENTRIES, Release);
        true
    }

    /// `msr.error`, and `msr.data`.
    pub(crate) fn msr_answer(&self) -> (bool, u64) {
        (self.u8(EXIT).load(Relaxed) != 0, self.u64(EXIT + 16).load(Relaxed))
    }

    /// `hypercall.ret`
    pub(crate) fn hypercall_ret(&self) -> u64 {
        self.u64(EXIT + 56).load(Relaxed)
    }

    /// Return value of a 2007 hypercall.
    pub(crate) fn legacy_hypercall_ret(&self) -> u64 {
        self.u64(kvm_abi::legacy::hypercall::RET).load(Relaxed)
    }

    // What we tell user space.

    pub(crate) fn set_exit_reason(&self, reason: u32) {
        self.u32(offset_of!(kvm_run, exit_reason)).store(reason, Relaxed);
    }

    pub(crate) fn set_flags(&self, flags: u16) {
        self.u16(offset_of!(kvm_run, flags)).store(flags, Relaxed);
    }

    /// What every return from `KVM_RUN` shows.
    pub(crate) fn set_state(&self, ready: bool, if_flag: bool, cr8: u64, apic_base: u64) {
        self.u8(offset_of!(kvm_run, ready_for_interrupt_injection)).store(ready.into(), Relaxed);
        self.u8(offset_of!(kvm_run, if_flag)).store(if_flag.into(), Relaxed);
        self.u64(offset_of!(kvm_run, cr8)).store(cr8, Relaxed);
        self.u64(offset_of!(kvm_run, apic_base)).store(apic_base, Relaxed);
    }

    /// `hw`: `KVM_EXIT_UNKNOWN`.
    pub(crate) fn set_hw(&self, hardware_exit_reason: u64) {
        self.u64(EXIT).store(hardware_exit_reason, Relaxed);
    }

    /// `ex`: `KVM_EXIT_EXCEPTION`.
    pub(crate) fn set_ex(&self, exception: u32, error_code: u32) {
        self.u32(EXIT).store(exception, Relaxed);
        self.u32(EXIT + 4).store(error_code, Relaxed);
    }

    /// `fail_entry`: `KVM_EXIT_FAIL_ENTRY`.
    pub(crate) fn set_fail_entry(&self, reason: u64, cpu: u32) {
        self.u64(EXIT).store(reason, Relaxed);
        self.u32(EXIT + 8).store(cpu, Relaxed);
    }

    /// `io`: `KVM_EXIT_IO`, with up to four bytes of data.
    pub(crate) fn set_io(&self, io: &IoExit, data: u32) {
        self.u32(PIO_DATA).store(data, Relaxed);
        self.u8(EXIT).store(io.direction, Relaxed);
        self.u8(EXIT + 1).store(io.size, Relaxed);
        self.u16(EXIT + 2).store(io.port, Relaxed);
        self.u32(EXIT + 4).store(io.count, Relaxed);
        self.u64(EXIT + 8).store(PIO_DATA as u64, Relaxed);
    }

    /// `debug.arch`: `KVM_EXIT_DEBUG`.
    pub(crate) fn set_debug(&self, exception: u32, pc: u64, dr6: u64, dr7: u64) {
        self.u32(EXIT).store(exception, Relaxed);
        self.u64(EXIT + 8).store(pc, Relaxed);
        self.u64(EXIT + 16).store(dr6, Relaxed);
        self.u64(EXIT + 24).store(dr7, Relaxed);
    }

    /// `mmio`: `KVM_EXIT_MMIO`. `data` is `None` for a read, whose stale bytes stay.
    pub(crate) fn set_mmio(&self, gpa: u64, len: u32, data: Option<u64>) {
        self.u64(EXIT).store(gpa, Relaxed);
        if let Some(data) = data {
            self.u64(EXIT + 8).store(data, Relaxed);
        }
        self.u32(EXIT + 16).store(len, Relaxed);
        self.u8(EXIT + 20).store(data.is_some().into(), Relaxed);
    }

    /// `tpr_access`: `KVM_EXIT_TPR_ACCESS`.
    pub(crate) fn set_tpr_access(&self, rip: u64, is_write: bool) {
        self.u64(EXIT).store(rip, Relaxed);
        self.u32(EXIT + 8).store(is_write.into(), Relaxed);
    }

    /// `eoi`: `KVM_EXIT_IOAPIC_EOI`.
    pub(crate) fn set_ioapic_eoi(&self, vector: u8) {
        self.u8(EXIT).store(vector, Relaxed);
    }

    /// `internal`: `KVM_EXIT_INTERNAL_ERROR`. At most 16 words of data.
    pub(crate) fn set_internal(&self, suberror: u32, data: &[u64]) {
        self.u32(EXIT).store(suberror, Relaxed);
        self.u32(EXIT + 4).store(data.len() as u32, Relaxed);
        for (word, &value) in data.iter().take(16).enumerate() {
            self.u64(EXIT + 8 + 8 * word).store(value, Relaxed);
        }
    }

    /// `msr`: error, padding, reason, index, data.
    pub(crate) fn set_msr(&self, reason: u32, index: u32, data: u64) {
        self.u64(EXIT).store(0, Relaxed);
        self.u32(EXIT + 8).store(reason, Relaxed);
        self.u32(EXIT + 12).store(index, Relaxed);
        self.u64(EXIT + 16).store(data, Relaxed);
    }

    /// `system_event`: type, and no data.
    pub(crate) fn set_system_event(&self, event: u32) {
        self.u32(EXIT).store(event, Relaxed);
        self.u32(EXIT + 4).store(0, Relaxed);
    }

    /// `xen.u.hcall`, of type `KVM_EXIT_XEN_HCALL`: mode, level, number, and six parameters. The result is user space's.
    pub(crate) fn set_xen_hypercall(&self, longmode: bool, cpl: u8, input: u64, params: &[u64; 6]) {
        self.u32(EXIT).store(KVM_EXIT_XEN_HCALL, Relaxed);
        self.u32(EXIT + 8).store(longmode.into(), Relaxed);
        self.u32(EXIT + 12).store(cpl.into(), Relaxed);
        self.u64(EXIT + 16).store(input, Relaxed);
        for (word, &value) in params.iter().enumerate() {
            self.u64(EXIT + 32 + 8 * word).store(value, Relaxed);
        }
    }

    /// `xen.u.hcall.result`
    pub(crate) fn xen_result(&self) -> u64 {
        self.u64(EXIT + 24).load(Relaxed)
    }

    /// `hypercall`: number, six arguments, result, flags.
    pub(crate) fn set_hypercall(&self, number: u64, args: &[u64], longmode: bool) {
        self.u64(EXIT).store(number, Relaxed);
        for (word, &value) in args.iter().take(6).enumerate() {
            self.u64(EXIT + 8 + 8 * word).store(value, Relaxed);
        }
        self.u64(EXIT + 56).store(0, Relaxed);
        self.u32(EXIT + 64).store(longmode.into(), Relaxed);
    }

    /// 2007's `hypercall`.
    pub(crate) fn set_legacy_hypercall(&self, args: &[u64; 6], longmode: bool) {
        use kvm_abi::legacy::hypercall;
        for (word, &value) in args.iter().enumerate() {
            self.u64(hypercall::ARGS + 8 * word).store(value, Relaxed);
        }
        self.u64(hypercall::RET).store(u64::MAX, Relaxed);
        self.u32(hypercall::LONGMODE).store(longmode.into(), Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_abi::Plain;

    /// The bytes at `offset` as the VMM's mapping shows them.
    fn bytes(page: &RunPage, offset: usize, len: usize) -> Vec<u8> {
        (offset..offset + len).map(|at| page.u8(at).load(Relaxed)).collect()
    }

    #[test]
    fn io_has_the_layout_of_the_header() {
        let page = RunPage::new(0, None).unwrap();
        page.set_io(&IoExit { direction: 1, size: 2, port: 0x3f8, count: 1 }, 0xdead_beef);
        let io: [u32; 4] = Plain::from_bytes(&bytes(&page, 32, 16)).unwrap();
        assert_eq!(io, [0x03f8_0201, 1, 4096, 0]);
        let mut data = [0; 4];
        page.read_pio_data(&mut data);
        assert_eq!(data, 0xdead_beef_u32.to_le_bytes());
    }

    #[test]
    fn mmio_has_the_layout_of_the_header() {
        let page = RunPage::new(0, None).unwrap();
        page.set_mmio(0xfee0_0020, 4, Some(0x1122_3344));
        assert_eq!(bytes(&page, 32, 8), 0xfee0_0020_u64.to_le_bytes());
        assert_eq!(page.mmio_data(), 0x1122_3344);
        assert_eq!(bytes(&page, 48, 5), [4, 0, 0, 0, 1]);
        page.set_mmio(0x1000, 1, None);
        assert_eq!(page.mmio_data(), 0x1122_3344, "a read leaves stale data, as Linux does");
        assert_eq!(bytes(&page, 48, 5), [1, 0, 0, 0, 0]);
    }

    #[test]
    fn internal_error_and_debug_follow_the_header() {
        let page = RunPage::new(0, None).unwrap();
        page.set_internal(1, &[7, 8]);
        assert_eq!(bytes(&page, 32, 8), [1, 0, 0, 0, 2, 0, 0, 0]);
        assert_eq!(bytes(&page, 40, 1), [7]);
        page.set_debug(1, 0x1003, 0xffff_4ff0, 0x400);
        let debug: [u32; 8] = Plain::from_bytes(&bytes(&page, 32, 32)).unwrap();
        assert_eq!(debug, [1, 2, 0x1003, 0, 0xffff_4ff0, 0, 0x400, 0]);
    }
}
