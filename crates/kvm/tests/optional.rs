//! What VMMs may ask for and can do without: coalesced I/O, feature MSRs, the empty state of nested guests, registers in
//! `kvm_run`, dirty logs that are cleared by hand. What must happen is
//! api.rst's, and virt/kvm/coalesced_mmio.c of Linux 6.1.

mod common;

use std::mem::offset_of;
use std::sync::Arc;

use common::{BASE, FakeClient};
use iced_x86::code_asm::*;
use kvm_abi::consts::*;
use kvm_abi::request::*;
use kvm_abi::{ClearDirtyLog, DirtyLog, Plain, kvm_coalesced_mmio_zone, kvm_regs, kvm_sregs};
use mmu::Mapping;
use nix::errno::Errno;

const CODE: u64 = 0x1000;
const DEVICE: u64 = 0x10_0000;
const RING: u64 = 0x2000;
/// `KVM_COALESCED_MMIO_MAX`
const ENTRIES: u32 = 170;

struct Machine {
    client: Arc<FakeClient>,
    vm: i32,
    vcpu: i32,
    page: Arc<Mapping>,
}

impl Machine {
    fn new(code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Self {
        let client = FakeClient::new();
        let vm = client.vm_with_ram(0x1_0000);
        let mut a = CodeAssembler::new(16).unwrap();
        code(&mut a).unwrap();
        client.memory.write(CODE, &a.assemble(CODE).unwrap()).unwrap();
        let vcpu = client.ioctl(vm, KVM_CREATE_VCPU, 0).unwrap();
        let mut sregs: kvm_sregs = client.get(vcpu, KVM_GET_SREGS);
        (sregs.cs.base, sregs.cs.selector, sregs.ds.limit, sregs.ds.g) = (0, 0, 0xffff_ffff, 1);
        client.set(vcpu, KVM_SET_SREGS, &sregs).unwrap();
        let regs = kvm_regs { rip: CODE, rflags: 2, rbx: DEVICE, ..Plain::zeroed() };
        client.set(vcpu, KVM_SET_REGS, &regs).unwrap();
        let page = client.map(vcpu);
        Self { client, vm, vcpu, page }
    }

    fn zone(&self, request: u32, addr: u64, size: u32, pio: u32) -> Result<i32, Errno> {
        self.client.set(self.vm, request, &kvm_coalesced_mmio_zone { addr, size, pio })
    }

    /// The exit's reason.
    fn run(&self) -> u32 {
        self.client.ioctl(self.vcpu, KVM_RUN, 0).unwrap();
        self.page.load_u32(8).unwrap()
    }

    fn mmio_address(&self) -> u64 {
        self.page.load_u64(32).unwrap()
    }

    /// `first` and `last`.
    fn ring(&self) -> (u32, u32) {
        (self.page.load_u32(RING).unwrap(), self.page.load_u32(RING + 4).unwrap())
    }

    /// Address, length, whether a port, data.
    fn entry(&self, index: u64) -> (u64, u32, u32, u64) {
        let at = RING + 8 + 24 * index;
        let [len, pio] = [8, 12].map(|field| self.page.load_u32(at + field).unwrap());
        (self.page.load_u64(at).unwrap(), len, pio, self.page.load_u64(at + 16).unwrap())
    }
}

#[test]
fn writes_inside_a_zone_wait_in_the_ring() {
    let machine = Machine::new(|a| {
        a.mov(word_ptr(ebx + 4), 0x1234)?;
        a.mov(al, 0x56)?;
        a.out(0x70, al)?;
        // Over the end of the zone, and a read.
        a.mov(word_ptr(ebx + 0xff), 0x789a)?;
        a.mov(al, byte_ptr(ebx + 4))?;
        a.out(0x71, al)
    });
    assert_eq!(machine.zone(KVM_REGISTER_COALESCED_MMIO, DEVICE, 0x100, 2), Err(Errno::EINVAL));
    assert_eq!(machine.zone(KVM_REGISTER_COALESCED_MMIO, DEVICE, 0x100, 0), Ok(0));
    assert_eq!(machine.zone(KVM_REGISTER_COALESCED_MMIO, 0x70, 1, 1), Ok(0));
    assert_eq!((machine.run(), machine.mmio_address()), (KVM_EXIT_MMIO, DEVICE + 0xff));
    assert_eq!(machine.ring(), (0, 2));
    assert_eq!(machine.entry(0), (DEVICE + 4, 2, 0, 0x1234));
    assert_eq!(machine.entry(1), (0x70, 1, 1, 0x56));
    assert_eq!((machine.run(), machine.mmio_address()), (KVM_EXIT_MMIO, DEVICE + 4));
    assert_eq!(machine.run(), KVM_EXIT_IO);
}

#[test]
fn a_full_ring_makes_writes_exit() {
    let machine = Machine::new(|a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.mov(dword_ptr(ebx), ecx)?;
        a.inc(ecx)?;
        a.jmp(top)
    });
    machine.zone(KVM_REGISTER_COALESCED_MMIO, DEVICE, 4, 0).unwrap();
    assert_eq!(machine.run(), KVM_EXIT_MMIO);
    assert_eq!(machine.ring(), (0, ENTRIES - 1), "one stays unused");
    assert_eq!(machine.entry(ENTRIES as u64 - 2).3, u64::from(ENTRIES - 2));
    // User space takes two, the next wraps.
    machine.page.store_u32(RING, 2).unwrap();
    assert_eq!(machine.run(), KVM_EXIT_MMIO);
    assert_eq!(machine.ring(), (2, 1));
}

/// `kvm_vcpu_fault` shows the VM's one ring in the mapping of each vCPU, and `coalesced_mmio_write` puts one write at a time into it.
#[test]
fn all_vcpus_write_into_one_ring() {
    const WRITES: u32 = 20_000;
    const VCPUS: u64 = 3;
    let machine = Machine::new(|a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        // Each to an address of its own, which EBX has.
        a.mov(dword_ptr(ebx), ecx)?;
        a.inc(ecx)?;
        a.cmp(ecx, WRITES as i32)?;
        a.jne(top)?;
        a.hlt()
    });
    machine.zone(KVM_REGISTER_COALESCED_MMIO, DEVICE, 4 * VCPUS as u32, 0).unwrap();
    let (client, vm) = (&machine.client, machine.vm);
    let sregs: kvm_sregs = client.get(machine.vcpu, KVM_GET_SREGS);
    let mut vcpus = vec![(machine.vcpu, machine.page.clone())];
    for id in 1..VCPUS {
        let vcpu = client.ioctl(vm, KVM_CREATE_VCPU, id).unwrap();
        client.set(vcpu, KVM_SET_SREGS, &sregs).unwrap();
        let regs = kvm_regs { rip: CODE, rflags: 2, rbx: DEVICE + 4 * id, ..Plain::zeroed() };
        client.set(vcpu, KVM_SET_REGS, &regs).unwrap();
        vcpus.push((vcpu, client.map(vcpu)));
    }
    // One thread takes entries out, through the mappings of all in turn.
    let mut taken = vec![Vec::new(); VCPUS as usize];
    let mut take = |turn: usize| {
        let page = &vcpus[turn % vcpus.len()].1;
        let (first, last) = (page.load_u32(RING).unwrap(), page.load_u32(RING + 4).unwrap());
        if first == last {
            return false;
        }
        let at = RING + 8 + 24 * u64::from(first);
        let (address, data) = (page.load_u64(at).unwrap(), page.load_u32(at + 16).unwrap());
        taken[((address - DEVICE) / 4) as usize].push(data);
        page.store_u32(RING, (first + 1) % ENTRIES).unwrap();
        true
    };
    let exited = std::thread::scope(|scope| {
        let run = |(vcpu, page): &(i32, Arc<Mapping>)| {
            let (vcpu, page, client) = (*vcpu, page.clone(), client.thread());
            scope.spawn(move || {
                let mut exited = Vec::new();
                loop {
                    client.ioctl(vcpu, KVM_RUN, 0).unwrap();
                    match page.load_u32(8) {
                        Some(KVM_EXIT_HLT) => return exited,
                        // The ring was full.
                        Some(KVM_EXIT_MMIO) => exited.push(page.load_u32(40).unwrap()),
                        other => panic!("{other:?}"),
                    }
                }
            })
        };
        let running: Vec<_> = vcpus.iter().map(run).collect();
        let mut turn = 0;
        while !running.iter().all(|thread| thread.is_finished()) {
            take(turn);
            turn += 1;
        }
        (turn..).take_while(|&turn| take(turn)).for_each(drop);
        running.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    for (id, (mut taken, exited)) in taken.into_iter().zip(exited).enumerate() {
        assert!(!taken.is_empty(), "vCPU {id}");
        assert!(taken.is_sorted(), "vCPU {id}: in its order");
        taken.extend(exited);
        taken.sort_unstable();
        assert!(taken.into_iter().eq(0..WRITES), "vCPU {id}: each write once");
    }
}

#[test]
fn zones_are_removed_by_a_range_inside() {
    let machine = Machine::new(|a| {
        a.mov(byte_ptr(ebx), 1)?;
        a.mov(byte_ptr(ebx), 2)
    });
    machine.zone(KVM_REGISTER_COALESCED_MMIO, DEVICE, 0x100, 0).unwrap();
    // Another bus, then beyond it: it stays.
    for (addr, pio) in [(DEVICE, 1), (DEVICE + 0x100, 0)] {
        assert_eq!(machine.zone(KVM_UNREGISTER_COALESCED_MMIO, addr, 4, pio), Ok(0));
    }
    machine.zone(KVM_UNREGISTER_COALESCED_MMIO, DEVICE + 8, 4, 0).unwrap();
    assert_eq!(machine.run(), KVM_EXIT_MMIO);
    assert_eq!(machine.ring(), (0, 0));
}

#[test]
fn what_user_space_writes_into_the_ring_harms_nobody() {
    let machine = Machine::new(|a| a.mov(byte_ptr(ebx), 1));
    machine.zone(KVM_REGISTER_COALESCED_MMIO, DEVICE, 4, 0).unwrap();
    machine.page.store_u32(RING + 4, 0xffff_fff0).unwrap();
    assert_eq!(machine.run(), KVM_EXIT_MMIO);
    assert_eq!(machine.ring(), (0, 0xffff_fff0));
}

#[test]
fn feature_msrs_are_listed_and_read() {
    let client = FakeClient::new();
    let mut list = vec![0; 4 + 4 * 16];
    assert_eq!(client.ioctl_bytes(0, KVM_GET_MSR_FEATURE_INDEX_LIST, list.clone()).err(), Some(Errno::E2BIG));
    list[0] = 16;
    let list = client.ioctl_bytes(0, KVM_GET_MSR_FEATURE_INDEX_LIST, list).unwrap().1;
    let words: Vec<u32> = list.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
    let indices = &words[1..=words[0] as usize];
    assert!(indices.contains(&0x8b) && indices.contains(&0x10a) && indices.contains(&0x345));
    // The last is none.
    let mut msrs = vec![indices.len() as u8 + 1, 0, 0, 0, 0, 0, 0, 0];
    for index in indices.iter().chain([&0x1234_5678]) {
        msrs.extend([*index, 0, 0, 0].iter().flat_map(|word| word.to_le_bytes()));
    }
    let (read, msrs) = client.ioctl_bytes(0, KVM_GET_MSRS, msrs).unwrap();
    assert_eq!(read, indices.len() as i32);
    // RDCL_NO is the kernel's word about this host.
    let at = 8 + 16 * indices.iter().position(|index| *index == 0x10a).unwrap() + 8;
    let meltdown = std::fs::read_to_string("/sys/devices/system/cpu/vulnerabilities/meltdown").unwrap_or_default();
    assert_eq!(msrs[at] & 1 != 0, meltdown == "Not affected\n");
}

#[test]
fn nested_state_is_a_header_that_says_off() {
    let machine = Machine::new(|a| a.hlt());
    let mut state = [0u32; 32];
    assert_eq!(machine.client.ioctl_with(machine.vcpu, KVM_GET_NESTED_STATE, &mut state), Err(Errno::E2BIG));
    state[1] = 4096;
    assert_eq!(machine.client.ioctl_with(machine.vcpu, KVM_GET_NESTED_STATE, &mut state), Ok(0));
    assert_eq!(state[1], 128);
    assert_eq!(machine.client.set(machine.vcpu, KVM_SET_NESTED_STATE, &state), Ok(0));
    // A VMXON region.
    (state[2], state[3]) = (0x1000, 0);
    assert_eq!(machine.client.set(machine.vcpu, KVM_SET_NESTED_STATE, &state), Err(Errno::EINVAL));
}

#[test]
fn registers_travel_in_kvm_run() {
    let machine = Machine::new(|a| {
        a.inc(eax)?;
        a.hlt()
    });
    let (valid, dirty) = (offset_of!(kvm_run, kvm_valid_regs) as u64, offset_of!(kvm_run, kvm_dirty_regs) as u64);
    let synced = offset_of!(kvm_run, s) as u64;
    let sregs_at = synced + offset_of!(kvm_sync_regs, sregs) as u64;
    for field in [valid, dirty] {
        machine.page.store_u64(field, 1 << 3).unwrap();
        assert_eq!(machine.client.ioctl(machine.vcpu, KVM_RUN, 0), Err(Errno::EINVAL));
        machine.page.store_u64(field, 0).unwrap();
    }
    // Nobody wants them: they stay as they are.
    machine.page.store_u64(synced, 0x1234).unwrap();
    assert_eq!(machine.run(), KVM_EXIT_HLT);
    assert_eq!(machine.page.load_u64(synced), Some(0x1234));
    // What is changed goes in, and all that is wanted comes out.
    let regs = kvm_regs { rip: CODE, rflags: 2, rax: 0x10, ..machine.client.get(machine.vcpu, KVM_GET_REGS) };
    machine.page.write(synced, regs.as_bytes()).unwrap();
    machine.page.store_u64(valid, u64::from(KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS)).unwrap();
    machine.page.store_u64(dirty, KVM_SYNC_X86_REGS.into()).unwrap();
    assert_eq!(machine.run(), KVM_EXIT_HLT);
    assert_eq!(machine.page.load_u64(dirty), Some(0));
    assert_eq!(machine.page.load_u64(synced), Some(0x11), "RAX is the first");
    let mut sregs = vec![0; size_of::<kvm_sregs>()];
    machine.page.read(sregs_at, &mut sregs).unwrap();
    assert_eq!(sregs, machine.client.get::<kvm_sregs>(machine.vcpu, KVM_GET_SREGS).as_bytes());
    // What KVM_SET_SREGS refuses.
    machine.page.write(sregs_at, &[0xff; size_of::<kvm_sregs>()]).unwrap();
    machine.page.store_u64(dirty, KVM_SYNC_X86_SREGS.into()).unwrap();
    assert_eq!(machine.client.ioctl(machine.vcpu, KVM_RUN, 0), Err(Errno::EINVAL));
}

#[test]
fn a_dirty_log_can_be_cleared_by_hand() {
    let machine = Machine::new(|a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.inc(byte_ptr(0x3000))?;
        a.hlt()?;
        a.jmp(top)
    });
    let enable = |options| machine.client.enable(machine.vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, options);
    for (options, result) in [(2, Err(Errno::EINVAL)), (4, Err(Errno::EINVAL)), (0, Ok(0)), (3, Ok(0))] {
        assert_eq!(enable(options), result, "{options}");
    }
    let bitmap = BASE + 0x10_0000;
    let log = DirtyLog { dirty_bitmap: bitmap, ..Plain::zeroed() };
    let get = || {
        machine.client.set(machine.vm, KVM_GET_DIRTY_LOG, &log).unwrap();
        machine.client.memory.load_u64(bitmap - BASE).unwrap()
    };
    let clear = |first_page, num_pages, bits| {
        machine.client.memory.store_u64(bitmap - BASE, bits).unwrap();
        let argument = ClearDirtyLog { slot: 0, num_pages, first_page, dirty_bitmap: bitmap };
        machine.client.set(machine.vm, KVM_CLEAR_DIRTY_LOG, &argument)
    };
    assert_eq!(clear(0, 16, 0), Err(Errno::ENOENT), "it does not log yet");
    machine.client.slot(machine.vm, (0, KVM_MEM_LOG_DIRTY_PAGES), 0, 0x1_0000, 0).unwrap();
    assert_eq!((get(), get()), (0xffff, 0xffff), "all are, until they are cleared");
    for (first, count) in [(1, 15), (0, 17), (64, 1), (0, 8)] {
        assert_eq!(clear(first, count, 0), Err(Errno::EINVAL), "{first} {count}");
    }
    assert_eq!(clear(0, 16, 0xfff0), Ok(0));
    assert_eq!(get(), 0x000f);
    assert_eq!(clear(0, 16, u64::MAX), Ok(0), "bits beyond the slot mean nothing");
    for _ in 0..3 {
        assert_eq!(machine.run(), KVM_EXIT_HLT);
        assert_eq!(get() & 1 << 3, 1 << 3);
        assert_eq!(clear(0, 16, 1 << 3), Ok(0));
        assert_eq!(get() & 1 << 3, 0);
    }
}
