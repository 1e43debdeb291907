//! Tiny guests through the whole of `KVM_RUN`: what kvm-ioctls' own `test_run_code` does, and the rules around it.

mod common;

use std::sync::Arc;

use common::{BASE, FakeClient};
use kvm::Kvm;
use kvm_abi::consts::*;
use kvm_abi::request::*;
use kvm_abi::{DirtyLog, kvm_debugregs, kvm_guest_debug, kvm_regs, kvm_sregs};
use mmu::Mapping;
use nix::errno::Errno;

const RAM: u64 = 0x4000;

/// A VM with RAM at 1000H, logged, and a vCPU in flat real mode at its start.
struct Machine {
    kvm: Arc<Kvm>,
    client: Arc<FakeClient>,
    vm: i32,
    vcpu: i32,
    run: Arc<Mapping>,
}

impl Machine {
    fn new(code: &[u8]) -> Self {
        let kvm = Kvm::new();
        let client = FakeClient::with(&kvm);
        let vm = client.ioctl(0, KVM_CREATE_VM, 0).unwrap();
        client.slot(vm, (0, KVM_MEM_LOG_DIRTY_PAGES), 0x1000, RAM, 0).unwrap();
        client.memory.write(0, code).unwrap();
        let vcpu = client.ioctl(vm, KVM_CREATE_VCPU, 0).unwrap();
        let run = client.map(vcpu);
        let machine = Self { kvm, client, vm, vcpu, run };
        let mut sregs: kvm_sregs = machine.client.get(vcpu, KVM_GET_SREGS);
        assert_ne!((sregs.cs.base, sregs.cs.selector), (0, 0));
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        machine.client.set(vcpu, KVM_SET_SREGS, &sregs).unwrap();
        machine.set_regs(|regs| {
            (regs.rip, regs.rax, regs.rbx, regs.rflags) = (0x1000, 2, 3, 2);
        });
        machine
    }

    fn regs(&self) -> kvm_regs {
        self.client.get(self.vcpu, KVM_GET_REGS)
    }

    fn set_regs(&self, change: impl FnOnce(&mut kvm_regs)) {
        let mut regs = self.regs();
        change(&mut regs);
        self.client.set(self.vcpu, KVM_SET_REGS, &regs).unwrap();
    }

    fn run(&self) -> Result<u32, Errno> {
        self.client.ioctl(self.vcpu, KVM_RUN, 0)?;
        Ok(self.reason())
    }

    fn reason(&self) -> u32 {
        self.run.load_u32(8).unwrap()
    }

    fn bytes<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.run.read(offset, &mut bytes).unwrap();
        bytes
    }

    /// direction, size, port, count
    fn io(&self) -> (u8, u8, u16, u32) {
        let [direction, size, low, high] = self.bytes(32);
        (direction, size, u16::from_le_bytes([low, high]), self.run.load_u32(36).unwrap())
    }

    /// address, len, is_write
    fn mmio(&self) -> (u64, u32, bool) {
        (self.run.load_u64(32).unwrap(), self.run.load_u32(48).unwrap(), self.run.load_u8(52).unwrap() != 0)
    }

    fn dirty(&self) -> u64 {
        let bitmap = BASE + 0x10_0000;
        self.client.set(self.vm, KVM_GET_DIRTY_LOG, &DirtyLog { slot: 0, padding1: 0, dirty_bitmap: bitmap }).unwrap();
        self.client.memory.load_u64(bitmap - BASE).unwrap()
    }
}

/// The guest of kvm-ioctls' test: adds, stores, ports, memory without a slot, HLT.
const CODE: &[u8] = &[
    0xba, 0xf8, 0x03, // mov dx, 3f8h
    0x00, 0xd8, // add al, bl
    0x04, b'0', // add al, '0'
    0xee, // out dx, al
    0xec, // in al, dx
    0xc6, 0x06, 0x00, 0x80, 0x00, // mov byte [8000h], 0
    0x8a, 0x16, 0x00, 0x80, // mov dl, [8000h]
    0xc6, 0x06, 0x00, 0x20, 0x00, // mov byte [2000h], 0
    0xf4, // hlt
];

#[test]
fn a_guest_sees_ports_memory_and_halt() {
    let m = Machine::new(CODE);
    let debug = kvm_guest_debug { control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP, ..Default::default() };
    m.client.set(m.vcpu, KVM_SET_GUEST_DEBUG, &debug).unwrap();
    for pc in [0x1003, 0x1005, 0x1007] {
        assert_eq!(m.run(), Ok(KVM_EXIT_DEBUG));
        assert_eq!(m.run.load_u32(32), Some(1), "exception");
        assert_eq!(m.run.load_u64(40), Some(pc));
        assert_eq!(m.run.load_u64(48).unwrap() & 0xffff, 0x4ff0, "DR6");
        assert_eq!(m.run.load_u64(56), Some(0x400), "DR7");
        assert_eq!(m.regs().rflags & 0x100, 0, "the debugger's TF is hidden");
    }
    m.client.set(m.vcpu, KVM_SET_GUEST_DEBUG, &kvm_guest_debug::default()).unwrap();

    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io(), (KVM_EXIT_IO_OUT as u8, 1, 0x3f8, 1));
    assert_eq!(m.run.load_u64(40), Some(4096), "data_offset");
    assert_eq!(m.run.load_u8(4096), Some(b'5'));
    assert_eq!(m.regs().rip, 0x1007, "RIP moves when KVM_RUN completes the OUT");

    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io(), (KVM_EXIT_IO_IN as u8, 1, 0x3f8, 1));
    m.run.store_u8(4096, b'!').unwrap();

    assert_eq!(m.run(), Ok(KVM_EXIT_MMIO));
    assert_eq!(m.mmio(), (0x8000, 1, true));
    assert_eq!(m.run.load_u64(40), Some(0));
    assert_eq!(m.regs().rax & 0xff, u64::from(b'!'));

    assert_eq!(m.run(), Ok(KVM_EXIT_MMIO));
    assert_eq!(m.mmio(), (0x8000, 1, false));
    m.run.store_u8(40, 0xee).unwrap();

    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!(m.regs().rdx & 0xff, 0xee);
    assert_eq!(m.regs().rip, 0x1000 + CODE.len() as u64);
    assert_eq!(m.dirty().count_ones(), 2, "the page written and the page executed");
    assert_eq!(m.dirty(), 0, "reading the log clears it");
}

#[test]
fn a_completion_comes_before_immediate_exit() {
    let m = Machine::new(CODE);
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    m.run.store_u8(4096, 0x77).unwrap();
    m.run.store_u8(1, 1).unwrap();
    assert_eq!(m.run(), Err(Errno::EINTR));
    assert_eq!(m.reason(), KVM_EXIT_IO, "immediate_exit leaves exit_reason alone");
    assert_eq!((m.regs().rax & 0xff, m.regs().rip), (0x77, 0x1009));
    assert_eq!(m.run(), Err(Errno::EINTR));
    assert_eq!(m.regs().rip, 0x1009);
}

#[test]
fn user_space_that_moves_rip_completes_nothing() {
    let m = Machine::new(CODE);
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    m.run.store_u8(4096, 0x77).unwrap();
    m.set_regs(|regs| (regs.rip, regs.rax) = (0x1000 + CODE.len() as u64 - 1, 1));
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!(m.regs().rax, 1);
}

#[test]
fn a_signal_ends_a_loop_with_eintr() {
    let m = Machine::new(&[0xeb, 0xfe]); // jmp $
    let client = m.client.clone();
    let raiser = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(20));
        client.raise();
    });
    assert_eq!(m.run(), Err(Errno::EINTR));
    assert_eq!(m.reason(), KVM_EXIT_INTR);
    raiser.join().unwrap();
    // Still pending: nothing runs.
    m.set_regs(|regs| regs.rip = 0x1000);
    m.client.memory.write(0, &[0xf4]).unwrap();
    assert_eq!(m.run(), Err(Errno::EINTR));
    assert_eq!(m.regs().rip, 0x1000);
    m.client.consume_signal();
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
}

/// Nobody calls, as under `KVM_SET_SIGNAL_MASK`: the run itself asks, whatever the guest does.
#[test]
fn a_signal_that_only_asking_shows_ends_every_kind_of_loop() {
    let loops: [(&str, &[u8]); 3] = [
        ("jmp $", &[0xeb, 0xfe]),
        ("mov cx, 800h; mov di, 1800h; rep stosb; jmp $-8", &[0xb9, 0, 8, 0xbf, 0, 0x18, 0xf3, 0xaa, 0xeb, 0xf6]),
        ("sti; cli; jmp $-2", &[0xfb, 0xfa, 0xeb, 0xfc]),
    ];
    for (name, code) in loops {
        let m = Machine::new(code);
        m.client.silent.store(true, std::sync::atomic::Ordering::SeqCst);
        let client = m.client.clone();
        let raiser = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            client.raise();
        });
        assert_eq!(m.run(), Err(Errno::EINTR), "{name}");
        assert_eq!(m.reason(), KVM_EXIT_INTR, "{name}");
        raiser.join().unwrap();
    }
}

#[test]
fn every_return_shows_interrupt_state() {
    let m = Machine::new(&[0xfb, 0x90, 0xe4, 0x10, 0xfa, 0xf4]); // sti, nop, in al 10h, cli, hlt
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!((m.run.load_u8(12), m.run.load_u8(13)), (Some(1), Some(1)), "ready, IF");
    assert_eq!(m.run.load_u64(24), Some(0xfee0_0900), "APIC base");
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!((m.run.load_u8(12), m.run.load_u8(13)), (Some(0), Some(0)));
}

#[test]
fn an_interrupt_window_opens_after_sti_and_one_instruction() {
    let m = Machine::new(&[0xfb, 0x90, 0x90, 0xf4]); // sti, nop, nop, hlt
    m.run.store_u8(0, 1).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_IRQ_WINDOW_OPEN));
    assert_eq!(m.regs().rip, 0x1002);
    // The vector goes in at once: its IVT entry points to memory that no slot has.
    m.run.store_u8(0, 0).unwrap();
    m.client.set(m.vcpu, KVM_INTERRUPT, &0x21u32).unwrap();
    let sregs: kvm_sregs = m.client.get(m.vcpu, KVM_GET_SREGS);
    assert_eq!(sregs.interrupt_bitmap, [1 << 0x21, 0, 0, 0]);
}

#[test]
fn a_missing_instruction_shows_its_bytes() {
    // GETSEC, for which the core has no row.
    const CODE: [u8; 2] = [0x0f, 0x37];
    let m = Machine::new(&CODE);
    let mut sregs: kvm_sregs = m.client.get(m.vcpu, KVM_GET_SREGS);
    sregs.cr0 |= 1;
    sregs.cs.db = 1;
    m.client.set(m.vcpu, KVM_SET_SREGS, &sregs).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_INTERNAL_ERROR));
    assert_eq!(m.run.load_u32(32), Some(KVM_INTERNAL_ERROR_EMULATION));
    assert_eq!(m.run.load_u32(36), Some(8), "ndata: flags, two words of instruction, five of debugging");
    assert_eq!(m.run.load_u64(40), Some(1), "flags");
    assert!(m.run.load_u8(48).unwrap() >= 2, "insn_size");
    assert_eq!(m.bytes::<2>(49), CODE);
}

#[test]
fn breakpoints_of_both_kinds_exit() {
    let m = Machine::new(&[0x90, 0x90, 0xcc, 0x90, 0xf4]); // nop, nop, int3, nop, hlt
    let mut debug = kvm_guest_debug {
        control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP | KVM_GUESTDBG_USE_SW_BP,
        ..Default::default()
    };
    (debug.arch.debugreg[0], debug.arch.debugreg[7]) = (0x1001, 0x402);
    let guests: kvm_debugregs = m.client.get(m.vcpu, KVM_GET_DEBUGREGS);
    m.client.set(m.vcpu, KVM_SET_GUEST_DEBUG, &debug).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_DEBUG));
    assert_eq!((m.run.load_u32(32), m.run.load_u64(40)), (Some(1), Some(0x1001)));
    assert_eq!(m.run.load_u64(48).unwrap() & 0xf, 1, "DR6: breakpoint 0");
    let during: kvm_debugregs = m.client.get(m.vcpu, KVM_GET_DEBUGREGS);
    assert_eq!((during.db, during.dr7), (guests.db, guests.dr7), "the guest's own registers show");
    debug.arch.debugreg[7] = 0x400;
    m.client.set(m.vcpu, KVM_SET_GUEST_DEBUG, &debug).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_DEBUG));
    assert_eq!((m.run.load_u32(32), m.run.load_u64(40)), (Some(3), Some(0x1002)), "pc is the INT3");
    assert_eq!(m.regs().rip, 0x1002);
    m.set_regs(|regs| regs.rip = 0x1003);
    m.client.set(m.vcpu, KVM_SET_GUEST_DEBUG, &kvm_guest_debug::default()).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
}

#[test]
fn no_memory_at_all_is_an_internal_error() {
    let client = FakeClient::new();
    let vm = client.ioctl(0, KVM_CREATE_VM, 0).unwrap();
    let vcpu = client.ioctl(vm, KVM_CREATE_VCPU, 0).unwrap();
    client.ioctl(vcpu, KVM_RUN, 0).unwrap();
    assert_eq!(client.map(vcpu).load_u32(8), Some(KVM_EXIT_INTERNAL_ERROR));
}

#[test]
fn slots_change_under_a_running_vcpu() {
    let m = Machine::new(&[0xeb, 0xfe]); // jmp $
    std::thread::scope(|scope| {
        let runner = scope.spawn(|| m.run());
        while !m.kvm.status().vms[0].vcpus[0].running {
            std::thread::yield_now();
        }
        for _ in 0..50 {
            m.client.slot(m.vm, (7, 0), 0x10_0000, 0x2000, 0x20_0000).unwrap();
            m.client.slot(m.vm, (7, 0), 0x10_0000, 0, 0x20_0000).unwrap();
        }
        m.client.raise();
        assert_eq!(runner.join().unwrap(), Err(Errno::EINTR));
    });
}
