//! A guest that reads and writes memory as it is told to.
#![expect(unsafe_code, reason = "KVM is handed a pointer to the memory under test")]

use kvm_bindings::kvm_userspace_memory_region;
use tiny_vmm::code_asm::*;
use tiny_vmm::{Guest, Mode, VcpuExit, assemble};

/// Guest-physical address of the memory under test.
const AT: u32 = 0x1000_0000;
/// And of other memory.
const BESIDE: u32 = 0x2000_0000;
const OWN_RAM: usize = 1 << 20;

// Ports: what to do, where, and what with.
const KIND: u32 = 0x10;
const ADDRESS: u32 = 0x14;
const VALUE: u32 = 0x18;
const READ: u32 = 0;
const WRITE: u32 = 1;

/// The guest, and the memory that it shows.
pub struct Probe {
    guest: Guest,
}

impl Probe {
    /// A guest without memory under test.
    pub fn new() -> Self {
        let code = assemble(Mode::Protected, |a| {
            let (mut again, mut write) = (a.create_label(), a.create_label());
            a.set_label(&mut again)?;
            a.in_(eax, KIND)?;
            a.mov(ecx, eax)?;
            a.in_(eax, ADDRESS)?;
            a.mov(ebx, eax)?;
            a.test(ecx, ecx)?;
            a.jne(write)?;
            a.mov(eax, dword_ptr(ebx))?;
            a.out(VALUE, eax)?;
            a.jmp(again)?;
            a.set_label(&mut write)?;
            a.in_(eax, VALUE)?;
            a.mov(dword_ptr(ebx), eax)?;
            a.jmp(again)
        });
        let guest = Guest::new(Mode::Protected, OWN_RAM, &code.expect("the loop assembles")).expect("a guest");
        Self { guest }
    }

    /// Shows `len` bytes from `host` on to the guest, as slot 1.
    pub fn show(&self, host: *mut u8, len: usize) {
        self.set_slot(1, AT, host, len);
    }

    /// Shows them as slot 2, where the guest does not look; 0 bytes: no more.
    pub fn show_beside(&self, host: *mut u8, len: usize) {
        self.set_slot(2, BESIDE, host, len);
    }

    fn set_slot(&self, slot: u32, address: u32, host: *mut u8, len: usize) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: address.into(),
            memory_size: len as u64,
            userspace_addr: host as u64,
        };
        // SAFETY: no reference into this memory exists; tests touch it by volatile accesses only.
        unsafe { self.guest.vm().set_user_memory_region(region) }.expect("KVM_SET_USER_MEMORY_REGION");
    }

    /// What the guest reads at byte `offset` of the memory.
    pub fn read(&mut self, offset: usize) -> u32 {
        self.ask(READ, offset, 0).expect("an answer to READ")
    }

    /// Has the guest write there.
    pub fn write(&mut self, offset: usize, value: u32) {
        self.ask(WRITE, offset, value);
        // The write has been carried out when the guest asks for more.
        self.read(offset);
    }

    fn ask(&mut self, kind: u32, offset: usize, value: u32) -> Option<u32> {
        let address = AT + u32::try_from(offset).expect("the memory is small");
        loop {
            match self.guest.run().expect("KVM_RUN") {
                VcpuExit::IoIn(port, data) => {
                    let answer = match u32::from(port) {
                        KIND => kind,
                        ADDRESS => address,
                        VALUE => value,
                        other => panic!("IN from {other:#x}"),
                    };
                    data.copy_from_slice(&answer.to_le_bytes());
                    if u32::from(port) == VALUE {
                        return None;
                    }
                }
                VcpuExit::IoOut(_, data) => return Some(u32::from_le_bytes(data.try_into().expect("four bytes"))),
                other => panic!("{other:?}"),
            }
        }
    }
}
