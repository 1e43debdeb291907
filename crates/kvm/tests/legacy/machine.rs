//! A VM of 2007 with one vCPU: RAM from 0 to A0000H, the memory of devices above.

use std::sync::Arc;

use iced_x86::code_asm::CodeAssembler;
use kvm::Kvm;
use kvm_abi::consts::*;
use kvm_abi::legacy::{kvm_memory_alias, kvm_memory_region};
use kvm_abi::request::*;
use kvm_abi::*;
use mmu::Mapping;
use nix::errno::Errno;

use crate::common::{BASE, FakeClient, Ram};

/// Where [`Machine::real`] and [`Machine::long`] put code.
pub const CODE: u64 = 0x1000;
/// Top of the stack.
pub const STACK: u64 = 0x8000;
/// First address of devices; RAM ends here.
pub const DEVICE: u64 = 0xa_0000;
/// Paging structures of [`Machine::long`], three pages: the first GiB, one to one.
pub const TABLES: u64 = 0x9_0000;
/// Where [`Machine::dirty`] lets the log be put, in client memory.
const BITMAP: u64 = BASE + 0x1000;

pub struct Machine {
    pub kvm: Arc<Kvm>,
    pub client: Arc<FakeClient>,
    pub vm: i32,
    pub vcpu: i32,
    /// The pages of the vCPU file.
    pub run: Arc<Mapping>,
    /// What mmap of the VM file shows.
    pub ram: Ram,
}

/// A VM without memory.
pub fn empty() -> (Arc<FakeClient>, i32) {
    let client = FakeClient::new();
    let vm = client.ioctl(0, KVM_CREATE_VM, 0).unwrap();
    (client, vm)
}

pub fn region(client: &FakeClient, vm: i32, slot: u32, flags: u32, gpa: u64, size: u64) -> Result<i32, Errno> {
    let region = kvm_memory_region { slot, flags, guest_phys_addr: gpa, memory_size: size };
    client.set(vm, KVM_SET_MEMORY_REGION, &region)
}

pub fn alias(client: &FakeClient, vm: i32, slot: u32, gpa: u64, size: u64, target: u64) -> Result<i32, Errno> {
    let alias = kvm_memory_alias { slot, flags: 0, guest_phys_addr: gpa, memory_size: size, target_phys_addr: target };
    client.set(vm, KVM_SET_MEMORY_ALIAS, &alias)
}

impl Machine {
    /// A fresh vCPU.
    pub fn new() -> Self {
        let kvm = Kvm::new();
        let client = FakeClient::with(&kvm);
        let vm = client.ioctl(0, KVM_CREATE_VM, 0).unwrap();
        region(&client, vm, 0, KVM_MEM_LOG_DIRTY_PAGES, 0, DEVICE).unwrap();
        let vcpu = client.ioctl(vm, KVM_CREATE_VCPU, 0).unwrap();
        let (run, ram) = (client.map(vcpu), client.ram(vm));
        Self { kvm, client, vm, vcpu, run, ram }
    }

    /// Real mode, all bases 0.
    pub fn real(code: impl FnOnce(&mut CodeAssembler)) -> Self {
        let machine = Self::new();
        machine.set_sregs(|sregs| (sregs.cs.base, sregs.cs.selector) = (0, 0));
        machine.load(16, code)
    }

    /// 64-bit mode, CPL 0, without an IDT.
    pub fn long(code: impl FnOnce(&mut CodeAssembler)) -> Self {
        let machine = Self::new();
        machine.enter_long();
        machine.load(64, code)
    }

    pub fn enter_long(&self) {
        self.ram.store_u64(TABLES, TABLES + 0x1003).unwrap();
        self.ram.store_u64(TABLES + 0x1000, TABLES + 0x2003).unwrap();
        (0..512).for_each(|i| self.ram.store_u64(TABLES + 0x2000 + 8 * i, i << 21 | 0x83).unwrap());
        self.set_sregs(|sregs| {
            (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0011, TABLES, 0x20, 0x500);
            let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..Plain::zeroed() };
            sregs.cs = kvm_segment { selector: 8, type_: 11, l: 1, ..flat };
            let data = kvm_segment { selector: 16, type_: 3, db: 1, ..flat };
            (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
            sregs.idt.limit = 0;
        });
    }

    fn load(self, bits: u32, code: impl FnOnce(&mut CodeAssembler)) -> Self {
        self.ram.write(CODE, &assemble(bits, CODE, code)).unwrap();
        self.set_regs(|regs| (regs.rip, regs.rsp, regs.rdx) = (CODE, STACK, 0));
        self
    }

    /// A real-mode handler at `vector` × 100H + 2000H that tells its number on port 10H and returns.
    pub fn handler(&self, vector: u8) {
        let at = 0x2000 + 0x100 * u64::from(vector & 0x3f);
        let code = assemble(16, at, |a| {
            use iced_x86::code_asm::*;
            a.push(ax).unwrap();
            a.mov(al, u32::from(vector)).unwrap();
            a.out(0x10, al).unwrap();
            a.pop(ax).unwrap();
            a.iret().unwrap();
        });
        self.ram.write(at, &code).unwrap();
        self.ram.store_u32(4 * u64::from(vector), at as u32).unwrap();
    }

    pub fn get<T: Plain>(&self, request: u32) -> T {
        self.client.get(self.vcpu, request)
    }

    pub fn set<T: Plain>(&self, request: u32, value: &T) -> Result<i32, Errno> {
        self.client.set(self.vcpu, request, value)
    }

    pub fn regs(&self) -> kvm_regs {
        self.get(KVM_GET_REGS)
    }

    pub fn set_regs(&self, change: impl FnOnce(&mut kvm_regs)) {
        let mut regs = self.regs();
        change(&mut regs);
        self.set(KVM_SET_REGS, &regs).unwrap();
    }

    pub fn sregs(&self) -> kvm_sregs {
        self.get(KVM_GET_SREGS)
    }

    pub fn set_sregs(&self, change: impl FnOnce(&mut kvm_sregs)) {
        let mut sregs = self.sregs();
        change(&mut sregs);
        self.set(KVM_SET_SREGS, &sregs).unwrap();
    }

    /// `exit_reason` behind a `KVM_RUN` that returns 0.
    pub fn run(&self) -> Result<u32, Errno> {
        self.client.ioctl(self.vcpu, KVM_RUN, 0)?;
        Ok(self.reason())
    }

    pub fn reason(&self) -> u32 {
        self.run.load_u32(8).unwrap()
    }

    /// `ready_for_interrupt_injection` and `if_flag`.
    pub fn ready_and_if(&self) -> (u8, u8) {
        (self.run.load_u8(12).unwrap(), self.run.load_u8(13).unwrap())
    }

    pub fn request_window(&self, on: bool) {
        self.run.store_u8(0, on.into()).unwrap();
    }

    pub fn interrupt(&self, irq: u32) -> Result<i32, Errno> {
        self.set(KVM_INTERRUPT, &kvm_interrupt { irq })
    }

    /// `io`: direction, size, port, count.
    pub fn io(&self) -> (u8, u8, u16, u32) {
        assert_eq!(self.reason(), KVM_EXIT_IO);
        assert_eq!(self.run.load_u64(40), Some(4096), "data_offset");
        let port = self.run.load_u16(34).unwrap();
        (self.run.load_u8(32).unwrap(), self.run.load_u8(33).unwrap(), port, self.run.load_u32(36).unwrap())
    }

    /// `io` without a look at the reason: direction, size, port.
    pub fn io_union(&self) -> (u8, u8, u16) {
        (self.run.load_u8(32).unwrap(), self.run.load_u8(33).unwrap(), self.run.load_u16(34).unwrap())
    }

    /// The data page of port I/O.
    pub fn io_data(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.run.read(4096, &mut bytes).unwrap();
        bytes
    }

    /// `mmio`: address, bytes that count, `is_write`.
    pub fn mmio(&self) -> (u64, Vec<u8>, bool) {
        assert_eq!(self.reason(), KVM_EXIT_MMIO);
        let mut data = vec![0; 8];
        self.run.read(40, &mut data).unwrap();
        data.truncate(self.run.load_u32(48).unwrap() as usize);
        (self.run.load_u64(32).unwrap(), data, self.run.load_u8(52).unwrap() != 0)
    }

    /// The log of a slot, as numbers of pages.
    pub fn dirty(&self, slot: u32) -> Result<Vec<u64>, Errno> {
        self.client.memory.write(BITMAP - BASE, &[0; 64]).unwrap();
        let log = DirtyLog { slot, padding1: 0, dirty_bitmap: BITMAP };
        self.client.set(self.vm, KVM_GET_DIRTY_LOG, &log)?;
        let bit = |page: u64| self.client.memory.load_u8(BITMAP - BASE + page / 8).unwrap() >> (page % 8) & 1 != 0;
        Ok((0..512).filter(|&page| bit(page)).collect())
    }

    /// MSRs as entries; how many were done.
    pub fn msrs(&self, request: u32, entries: &[(u32, u64)]) -> Result<(i32, Vec<u64>), Errno> {
        let mut bytes = [entries.len() as u32, 0].map(u32::to_le_bytes).concat();
        for &(index, data) in entries {
            bytes.extend(kvm_msr_entry { index, reserved: 0, data }.as_bytes());
        }
        let (done, bytes) = self.client.ioctl_bytes(self.vcpu, request, bytes)?;
        let entries = bytes[8..].chunks_exact(16).filter_map(kvm_msr_entry::from_bytes);
        Ok((done, entries.map(|entry| entry.data).collect()))
    }

    pub fn set_cpuid(&self, table: &[kvm_cpuid_entry]) -> Result<i32, Errno> {
        let mut bytes = [table.len() as u32, 0].map(u32::to_le_bytes).concat();
        bytes.extend(table.iter().flat_map(|entry| entry.as_bytes()));
        Ok(self.client.ioctl_bytes(self.vcpu, KVM_SET_CPUID, bytes)?.0)
    }
}

/// Lets a guest that waits for 1 in the word at 200H go on when it is dropped, so that a test that fails ends.
pub struct Release<'a>(pub &'a Machine);

impl Drop for Release<'_> {
    fn drop(&mut self) {
        self.0.ram.store_u16(0x200, 1).unwrap();
        self.0.ram.store_u16(0x202, 1).unwrap();
    }
}

pub fn assemble(bits: u32, at: u64, code: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).expect("16, 32 or 64");
    code(&mut a);
    a.assemble(at).expect("instructions that exist")
}
