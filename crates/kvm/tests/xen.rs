//! Xen's interface to its guests. What must happen is said by api.rst, xen.c, irq.c and x86.c of Linux 6.1, and for layouts and numbers
//! include/xen/interface there; x86_64/xen_shinfo_test and xen_vmcall_test of its selftests are run by `tests/selftests`.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::{BASE, FakeClient, SCRATCH};
use iced_x86::code_asm::*;
use kvm_abi::consts::*;
use kvm_abi::request::*;
use kvm_abi::{
    Plain, XenAttr, kvm_clock_data, kvm_cpuid_entry2, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_xen_hvm_config,
};
use mmu::Mapping;
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

const RAM: u64 = 0x20_0000;
const TABLES: u64 = 0x1000;
const GDT: u64 = 0x5000;
const IDT: u64 = 0x6000;
const HANDLER: u64 = 0x8000;
/// Of vCPU n: 1000H further each.
const CODE: u64 = 0x9000;
const STACKS: u64 = 0x1_0000;
/// struct shared_info
const SHARED: u64 = 0x2_0000;
/// struct vcpu_info of vCPU n: 40H further each.
const INFO: u64 = 0x2_1000;
const CLOCK: u64 = 0x2_2000;
const RUNSTATE: u64 = 0x2_3ff0 - 48;
const PAGE: u64 = 0x2_5000;
const APIC: u64 = 0xfee0_0000;
/// Without memory.
const HOLE: u64 = 0x1000_0000;
const NOWHERE: u64 = u64::MAX;

const XEN_MSR: u32 = 0x4000_0200;
const VECTOR: u8 = 0x31;
/// KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL
const TWO_LEVELS: u32 = u32::MAX;
/// Bits of shared_info and vcpu_info, of 64-bit guests.
const PENDING: u64 = SHARED + 0x800;
const MASK: u64 = SHARED + 0xa00;
const SELECTOR: u64 = 8;
/// Ports of guests: the handler's, and of what is no number of vCPU n, n higher.
const HANDLED: u16 = 0x80;
const AT: u16 = 0x90;

const RUNNING: u64 = 0;
const BLOCKED: u64 = 2;
const OFFLINE: u64 = 3;

/// Long enough for a guest to sleep, and no limit to anything.
const MOMENT: Duration = Duration::from_millis(50);
const MOMENT_NS: u64 = 50_000_000;

type Code = Result<(), IcedError>;

/// A VM whose vCPUs run 64-bit code, with interrupt controllers if not said otherwise.
struct Machine {
    client: Arc<FakeClient>,
    vm: i32,
    vcpus: Vec<(i32, Arc<Mapping>)>,
}

fn attr(type_: u32, u: &[u64]) -> XenAttr {
    let mut attr = XenAttr { type_: type_ as u16, ..XenAttr::default() };
    attr.u[..u.len()].copy_from_slice(u);
    attr
}

fn wrmsr(a: &mut CodeAssembler, index: u32, value: u64) -> Code {
    a.mov(ecx, index)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()?;
    a.nop()
}

/// Says where it is.
fn here(a: &mut CodeAssembler) -> Code {
    a.mov(dx, u32::from(AT))?;
    a.out(dx, al)
}

impl Machine {
    fn new(codes: &[&dyn Fn(&mut CodeAssembler) -> Code]) -> Self {
        Self::with_chip(true, codes)
    }

    fn with_chip(chip: bool, codes: &[&dyn Fn(&mut CodeAssembler) -> Code]) -> Self {
        let client = FakeClient::new();
        let vm = client.vm_with_ram(RAM);
        if chip {
            client.ioctl(vm, KVM_CREATE_IRQCHIP, 0).unwrap();
        }
        let put = |at: u64, value: u64| client.memory.store_u64(at, value).unwrap();
        // The first two megabytes, and those of the APIC, where they are.
        put(TABLES, TABLES + 0x1003);
        put(TABLES + 0x1000, TABLES + 0x2003);
        put(TABLES + 0x1018, TABLES + 0x3003);
        put(TABLES + 0x2000, 0x83);
        put(TABLES + 0x3000 + 8 * 0x1f7, APIC | 0x93);
        put(GDT + 8, 0x00af_9b00_0000_ffff);
        put(GDT + 16, 0x00cf_9300_0000_ffff);
        for vector in 0..256 {
            put(IDT + 16 * vector, 0x0000_8e00_0008_0000 | HANDLER);
        }
        let assemble = |at: u64, code: &dyn Fn(&mut CodeAssembler) -> Code| {
            let mut a = CodeAssembler::new(64).unwrap();
            code(&mut a).unwrap();
            client.memory.write(at, &a.assemble(at).unwrap()).unwrap();
        };
        assemble(HANDLER, &|a| {
            a.out(u32::from(HANDLED), al)?;
            a.iretq()
        });
        let mut vcpus = Vec::new();
        for (id, code) in (0..).zip(codes) {
            assemble(CODE + 0x1000 * id, &|a| {
                a.mov(ebx, APIC as u32)?;
                if chip {
                    a.mov(dword_ptr(rbx + 0xf0), 0x1ff)?;
                }
                code(a)
            });
            let fd = client.ioctl(vm, KVM_CREATE_VCPU, id).unwrap();
            let mut sregs: kvm_sregs = client.get(fd, KVM_GET_SREGS);
            (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0011, TABLES, 0x20, 0x500);
            (sregs.gdt.base, sregs.gdt.limit, sregs.idt.base, sregs.idt.limit) = (GDT, 23, IDT, 0xfff);
            (sregs.cs.selector, sregs.cs.base, sregs.cs.limit) = (8, 0, 0xffff_ffff);
            (sregs.cs.type_, sregs.cs.l, sregs.cs.db, sregs.cs.g) = (11, 1, 0, 1);
            (sregs.ss.selector, sregs.ds.selector) = (16, 16);
            client.set(fd, KVM_SET_SREGS, &sregs).unwrap();
            let regs =
                kvm_regs { rip: CODE + 0x1000 * id, rsp: STACKS + 0x1000 * (id + 1), rflags: 2, ..Plain::zeroed() };
            client.set(fd, KVM_SET_REGS, &regs).unwrap();
            if chip {
                client.set(fd, KVM_SET_MP_STATE, &kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).unwrap();
            }
            vcpus.push((fd, client.map(fd)));
        }
        Self { client, vm, vcpus }
    }

    /// As [`Machine::new`], and Xen's, with 64-bit layouts and all that vCPUs share.
    fn with_xen(codes: &[&dyn Fn(&mut CodeAssembler) -> Code]) -> Self {
        Self::new(codes).share()
    }

    fn share(self) -> Self {
        self.configure(KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL | KVM_XEN_HVM_CONFIG_EVTCHN_SEND).unwrap();
        self.set(KVM_XEN_ATTR_TYPE_LONG_MODE, &[1]).unwrap();
        self.set(KVM_XEN_ATTR_TYPE_SHARED_INFO, &[SHARED >> 12]).unwrap();
        for id in 0..self.vcpus.len() {
            self.set_vcpu(id, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, &[INFO + 0x40 * id as u64]).unwrap();
        }
        self
    }

    fn configure(&self, flags: u32) -> Result<i32, Errno> {
        let config = kvm_xen_hvm_config { flags, msr: XEN_MSR, ..Plain::zeroed() };
        self.client.set(self.vm, KVM_XEN_HVM_CONFIG, &config)
    }

    fn set(&self, type_: u32, u: &[u64]) -> Result<i32, Errno> {
        self.client.set(self.vm, KVM_XEN_HVM_SET_ATTR, &attr(type_, u))
    }

    fn get(&self, type_: u32) -> Result<u64, Errno> {
        let mut attr = attr(type_, &[]);
        self.client.ioctl_with(self.vm, KVM_XEN_HVM_GET_ATTR, &mut attr).map(|_| attr.u[0])
    }

    fn set_vcpu(&self, vcpu: usize, type_: u32, u: &[u64]) -> Result<i32, Errno> {
        self.client.set(self.vcpus[vcpu].0, KVM_XEN_VCPU_SET_ATTR, &attr(type_, u))
    }

    fn get_vcpu(&self, vcpu: usize, type_: u32) -> Result<[u64; 8], Errno> {
        let mut attr = attr(type_, &[]);
        self.client.ioctl_with(self.vcpus[vcpu].0, KVM_XEN_VCPU_GET_ATTR, &mut attr).map(|_| attr.u)
    }

    /// State, entry, times.
    fn runstate(&self) -> [u64; 6] {
        let data = self.get_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA).unwrap();
        data[..6].try_into().unwrap()
    }

    /// Exit reason, and the port of an OUT.
    fn run(&self, vcpu: usize) -> Result<(u32, u16), Errno> {
        let (fd, page) = &self.vcpus[vcpu];
        self.client.ioctl(*fd, KVM_RUN, 0)?;
        Ok((page.load_u32(8).unwrap(), page.load_u16(34).unwrap()))
    }

    /// Runs to the next OUT.
    fn out(&self, vcpu: usize) -> u16 {
        let (reason, port) = self.run(vcpu).unwrap();
        assert_eq!(reason, KVM_EXIT_IO, "{:#x?}", self.regs(vcpu));
        port
    }

    fn regs(&self, vcpu: usize) -> kvm_regs {
        self.client.get(self.vcpus[vcpu].0, KVM_GET_REGS)
    }

    fn u64(&self, at: u64) -> u64 {
        self.client.memory.load_u64(at).unwrap()
    }

    fn u32(&self, at: u64) -> u32 {
        self.client.memory.load_u32(at).unwrap()
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.client.memory.write(at, bytes).unwrap();
    }

    fn send(&self, vcpu: u32, port: u32) -> Result<i32, Errno> {
        self.client.set(self.vm, KVM_XEN_HVM_EVTCHN_SEND, &[port, vcpu, TWO_LEVELS])
    }

    /// KVM_XEN_ATTR_TYPE_EVTCHN: port, type, flags; where it goes.
    fn port(&self, [port, type_, flags]: [u32; 3], to: [u32; 3]) -> Result<i32, Errno> {
        let mut attr = attr(KVM_XEN_ATTR_TYPE_EVTCHN, &[]);
        for (at, value) in [port, type_, flags].into_iter().chain(to).enumerate() {
            attr.set_word(at, value);
        }
        self.client.set(self.vm, KVM_XEN_HVM_SET_ATTR, &attr)
    }

    /// Global system interrupts from 40 on: type, flags, and the rest by type.
    fn route(&self, entries: &[(u32, u32, [u32; 3])]) -> Result<(), Errno> {
        let mut words = vec![entries.len() as u32, 0];
        for (gsi, &(type_, flags, [a, b, c])) in (40..).zip(entries) {
            words.extend([gsi, type_, flags, 0, a, b, c, 0, 0, 0, 0, 0]);
        }
        let bytes = words.into_iter().flat_map(u32::to_le_bytes).collect();
        self.client.ioctl_bytes(self.vm, KVM_SET_GSI_ROUTING, bytes).map(drop)
    }

    /// Words of channels that wait, and what vcpu_info tells of vCPU n; all is taken.
    fn take_events(&self, vcpu: u64) -> (Vec<(u64, u64)>, u64, u8) {
        let words = (0..64).map(|word| (word, self.u64(PENDING + 8 * word))).filter(|&(_, bits)| bits != 0).collect();
        let info = INFO + 0x40 * vcpu;
        let told = (words, self.u64(info + SELECTOR), self.client.memory.load_u8(info).unwrap());
        self.put(PENDING, &[0; 512]);
        self.put(info, &[0; 16]);
        told
    }

    /// KVM_XEN_VCPU_ATTR_TYPE_TIMER: port, and when.
    fn set_timer(&self, port: u32, expires: u64) {
        let port = u64::from(port) | u64::from(TWO_LEVELS) << 32;
        self.set_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_TIMER, &[port, expires]).unwrap();
    }

    fn timer(&self) -> (u32, u32, u64) {
        let [port, expires, ..] = self.get_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_TIMER).unwrap();
        (port as u32, (port >> 32) as u32, expires)
    }

    /// KVM_RUN, to an OUT; how long it took.
    fn timed_out(&self) -> Duration {
        let begin = Instant::now();
        assert_eq!(self.out(0), AT);
        begin.elapsed()
    }

    /// KVM_RUN, to an OUT, while somebody does something after 50 ms.
    fn out_while(&self, does: impl FnOnce() + Send) -> Duration {
        let begin = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(MOMENT);
                does();
            });
            self.timed_out();
            begin.elapsed()
        })
    }

    fn clock(&self) -> u64 {
        self.client.get::<kvm_clock_data>(self.vm, KVM_GET_CLOCK).clock
    }
}

/// `kvm_xen_hvm_set_attr`, `kvm_xen_hvm_get_attr`; `kvm_gfn_to_pfn_cache_refresh`.
#[test]
fn attributes_of_a_vm_are_kept_if_they_can_be() {
    let machine = Machine::new(&[]);
    let all = [KVM_XEN_ATTR_TYPE_LONG_MODE, KVM_XEN_ATTR_TYPE_SHARED_INFO, KVM_XEN_ATTR_TYPE_UPCALL_VECTOR];
    assert_eq!(all.map(|type_| machine.get(type_)), [Ok(0), Ok(NOWHERE), Ok(0)]);
    machine.set(KVM_XEN_ATTR_TYPE_LONG_MODE, &[0x7f02]).unwrap();
    machine.set(KVM_XEN_ATTR_TYPE_SHARED_INFO, &[SHARED >> 12]).unwrap();
    machine.set(KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, &[0x110]).unwrap();
    assert_eq!(all.map(|type_| machine.get(type_)), [Ok(1), Ok(SHARED >> 12), Ok(0x10)], "bytes are read as such");
    for vector in 1..0x10 {
        assert_eq!(machine.set(KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, &[vector]), Err(Errno::EINVAL));
    }
    assert_eq!(machine.get(KVM_XEN_ATTR_TYPE_UPCALL_VECTOR), Ok(0x10));
    machine.set(KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, &[0]).unwrap();
    machine.set(KVM_XEN_ATTR_TYPE_SHARED_INFO, &[NOWHERE]).unwrap();
    machine.set(KVM_XEN_ATTR_TYPE_LONG_MODE, &[0]).unwrap();
    assert_eq!(all.map(|type_| machine.get(type_)), [Ok(0), Ok(NOWHERE), Ok(0)]);
    // What is no memory, or is not to be written, is kept, and an error.
    machine.client.slot(machine.vm, (1, KVM_MEM_READONLY), HOLE << 1, 0x1000, 0).unwrap();
    for gfn in [HOLE >> 12, HOLE << 1 >> 12, NOWHERE >> 1] {
        assert_eq!(machine.set(KVM_XEN_ATTR_TYPE_SHARED_INFO, &[gfn]), Err(Errno::EFAULT));
        assert_eq!(machine.get(KVM_XEN_ATTR_TYPE_SHARED_INFO), Ok(gfn << 12 >> 12));
    }
    for type_ in [77, 0xffff] {
        assert_eq!((machine.set(type_, &[0]), machine.get(type_)), (Err(Errno::ENOENT), Err(Errno::ENOENT)));
    }
}

/// `kvm_xen_vcpu_set_attr`, `kvm_xen_vcpu_get_attr`.
#[test]
fn attributes_of_a_vcpu_are_kept_if_they_can_be() {
    let machine = Machine::new(&[&|a| a.nop()]);
    let areas = [
        (KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, INFO, 64, Ok(NOWHERE)),
        (KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO, CLOCK, 32, Ok(NOWHERE)),
        (KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, RUNSTATE, 48, Err(Errno::ENOENT)),
    ];
    for (type_, gpa, bytes, nowhere) in areas {
        let get = || machine.get_vcpu(0, type_).map(|u| u[0]);
        assert_eq!(get(), nowhere);
        for gpa in [gpa, gpa + 0x1000 - gpa % 0x1000 - bytes] {
            assert_eq!(machine.set_vcpu(0, type_, &[gpa]), Ok(0));
            assert_eq!(get(), Ok(gpa));
            assert_eq!(machine.set_vcpu(0, type_, &[gpa - gpa % 0x1000 + 0x1001 - bytes]), Err(Errno::EINVAL));
            assert_eq!(get(), Ok(gpa), "it must lie in one page");
        }
        assert_eq!(machine.set_vcpu(0, type_, &[HOLE]), Err(Errno::EFAULT));
        assert_eq!(get(), Ok(HOLE));
        assert_eq!(machine.set_vcpu(0, type_, &[NOWHERE]), Ok(0));
        assert_eq!(get(), nowhere);
    }
    assert_eq!(machine.get_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST), Err(Errno::EINVAL));
    assert_eq!(machine.get_vcpu(0, 77), Err(Errno::ENOENT));
    assert_eq!(machine.set_vcpu(0, 77, &[]), Err(Errno::ENOENT));
}

/// `kvm_xen_vcpu_set_attr`: what does not add up, or is to come, is EINVAL.
#[test]
fn run_states_are_loaded_and_moved() {
    let machine = Machine::new(&[&|a| a.nop()]);
    let data = |u: &[u64]| machine.set_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA, u);
    let adjust = |u: &[u64]| machine.set_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST, u);
    let current = |state| machine.set_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT, &[state]);
    assert_eq!(machine.runstate(), [0; 6]);
    machine.client.set(machine.vm, KVM_SET_CLOCK, &kvm_clock_data { clock: 1 << 40, ..Plain::zeroed() }).unwrap();
    assert_eq!(data(&[BLOCKED, 1000, 400, 300, 200, 100]), Ok(0));
    assert_eq!(machine.runstate(), [BLOCKED, 1000, 400, 300, 200, 100]);
    for wrong in [[4, 1000, 400, 300, 200, 100], [0, 1000, 400, 300, 200, 101], [0, 1 << 50, 1 << 50, 0, 0, 0]] {
        assert_eq!((data(&wrong), adjust(&wrong)), (Err(Errno::EINVAL), Err(Errno::EINVAL)));
    }
    assert_eq!(data(&[u64::MAX, 0, 0, 0, 0, 0]), Err(Errno::EINVAL));
    assert_eq!(adjust(&[u64::MAX, 10, 0u64.wrapping_sub(100), 50, 30, 30]), Ok(0));
    assert_eq!(machine.runstate(), [BLOCKED, 1010, 300, 350, 230, 130]);
    assert_eq!(current(4), Err(Errno::EINVAL));
    assert_eq!(current(OFFLINE), Ok(0));
    let [state, entry, times @ ..] = machine.runstate();
    assert_eq!((state, entry), (OFFLINE, times.iter().sum()));
    assert_eq!(machine.get_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT).unwrap()[0], OFFLINE);
    assert!(entry >= 1 << 40 && entry <= machine.clock());
    assert_eq!([times[0], times[1], times[3]], [300, 350, 130], "it was blocked");
    assert_eq!(adjust(&[RUNNING, 0, 0, 0, 0, 0]), Ok(0));
    let now = machine.runstate();
    assert!(now[0] == RUNNING && now[1] > entry && now[5] == 130 + (now[1] - entry), "{now:?}");
}

/// `kvm_xen_update_runstate_guest`: each KVM_RUN begins it anew, and what the scheduler lets the vCPU's thread wait is its own state.
/// Layouts: struct vcpu_runstate_info, compat_vcpu_runstate_info.
#[test]
fn run_states_are_shown() {
    for (long, times_at) in [(1, 8), (0, 4)] {
        let machine = Machine::with_xen(&[&|a| {
            for _ in 0..4 {
                here(a)?;
            }
            Ok(())
        }]);
        machine.set(KVM_XEN_ATTR_TYPE_LONG_MODE, &[long]).unwrap();
        machine.set_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, &[RUNSTATE]).unwrap();
        let shown = || {
            let at = |n: u64| {
                let mut bytes = [0; 8];
                machine.client.memory.read(RUNSTATE + times_at + 8 * n, &mut bytes).unwrap();
                u64::from_le_bytes(bytes)
            };
            [self::Machine::u32(&machine, RUNSTATE).into(), at(0), at(1), at(2), at(3), at(4)]
        };
        machine.client.set_waited(1_000_000);
        machine.out(0);
        let first = shown();
        assert_eq!(first, machine.runstate());
        assert_eq!((first[0], first[1], first[4]), (RUNNING, first[2..].iter().sum(), 0));
        assert_ne!(first[5], 0, "it was offline");
        std::thread::sleep(Duration::from_millis(5));
        machine.client.set_waited(2_500_000);
        machine.out(0);
        let second = shown();
        assert_eq!(second[1], second[2..].iter().sum());
        assert!(second[3] >= 1_500_000 && second[2] >= 2_000_000, "{second:?}");
        machine.set_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT, &[BLOCKED]).unwrap();
        assert_eq!(shown(), second, "the guest sees it when it runs");
        std::thread::sleep(Duration::from_millis(5));
        machine.out(0);
        let third = shown();
        assert!(third[4] >= 5_000_000, "{third:?}");
        assert_eq!((third[0], third[1]), (RUNNING, third[2..].iter().sum()));
        // Memory that is gone, and none.
        machine.set_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, &[HOLE]).unwrap_err();
        machine.out(0);
        assert_eq!(shown(), third);
    }
}

/// x86_64/xen_shinfo_test looks whether the vCPU has waited at all since its state was loaded. With Linux's KVM the thread does not for
/// the ioctl itself, which takes it off its CPU here.
#[test]
fn loading_a_run_state_costs_the_guest_nothing() {
    let machine = Machine::with_xen(&[&|a| {
        here(a)?;
        here(a)
    }]);
    let load_and_wait = |ns: u64, arrivals| {
        machine.set_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA, &[RUNNING, 1000, 1000, 0, 0, 0]).unwrap();
        std::thread::sleep(2 * MOMENT);
        machine.client.set_schedstat(ns, arrivals);
        machine.out(0);
        machine.runstate()[3]
    };
    machine.client.set_schedstat(MOMENT_NS, 10);
    // What our own thread waited in KVM_RUN is there, too.
    assert!(load_and_wait(2 * MOMENT_NS, 12) < MOMENT_NS);
    assert!(load_and_wait(3 * MOMENT_NS, 15) >= MOMENT_NS, "it has slept or waited by itself");
}

/// `kvm_xen_shared_info_init`: struct shared_info's wall clock, of 64-bit guests and of others.
#[test]
fn the_wall_clock_is_written_where_the_mode_has_it() {
    for (long, [clock, upper]) in [(1, [0xc00, 0xc0c]), (0, [0x900, 0x924])] {
        let machine = Machine::new(&[]);
        machine.set(KVM_XEN_ATTR_TYPE_LONG_MODE, &[long]).unwrap();
        machine.put(SHARED + clock, &[7, 0, 0, 0]);
        machine.put(SHARED + upper, &[0xff; 4]);
        machine.set(KVM_XEN_ATTR_TYPE_SHARED_INFO, &[SHARED >> 12]).unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
        let [version, seconds, ns] = [0, 4, 8].map(|at| machine.u32(SHARED + clock + at));
        assert_eq!((version, machine.u32(SHARED + upper)), (10, (now / 1_000_000_000 >> 32) as u32));
        let told = u64::from(seconds) * 1_000_000_000 + u64::from(ns) + machine.clock();
        assert!(told.abs_diff(now) < 1_000_000_000, "{told} {now}");
    }
}

/// `kvm_guest_time_update`: in vcpu_info and beside it, the same line.
#[test]
fn clocks_are_in_two_places() {
    let machine = Machine::with_xen(&[&|a| {
        here(a)?;
        here(a)
    }]);
    machine.out(0);
    assert_eq!(machine.u32(CLOCK), 0);
    assert_eq!(machine.u32(INFO + 32), 2);
    machine.put(INFO + 32 + 29, &[2]);
    machine.set_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO, &[CLOCK]).unwrap();
    machine.out(0);
    assert_eq!([machine.u32(INFO + 32), machine.u32(CLOCK)], [4, 2]);
    let [tsc, ns, scale] = [8, 16, 24].map(|at| machine.u64(CLOCK + at));
    assert_ne!((tsc, scale & 0xffff_ffff), (0, 0));
    assert_eq!([8, 16, 24].map(|at| machine.u64(INFO + 32 + at)), [tsc, ns, scale]);
    // Stable; and stopped, as the guest was told and has not cleared.
    assert_eq!(scale >> 40, 3);
}

/// `kvm_xen_has_interrupt`, `kvm_cpu_get_extint`: while vcpu_info says so, and not through the local APIC.
#[test]
fn the_vector_comes_while_vcpu_info_says_so() {
    let machine = Machine::with_xen(&[&|a| {
        here(a)?;
        a.sti()?;
        a.nop()?;
        a.nop()?;
        here(a)?;
        a.hlt()?;
        here(a)?;
        here(a)
    }]);
    assert_eq!(machine.out(0), AT);
    machine.put(INFO, &[1]);
    assert_eq!(machine.out(0), AT, "there is no vector");
    machine.set(KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, &[VECTOR.into()]).unwrap();
    assert_eq!([machine.out(0), machine.out(0)], [HANDLED; 2], "again and again");
    let irr: [u32; 256] = machine.client.get(machine.vcpus[0].0, KVM_GET_LAPIC);
    assert!((0x100 / 4..0x280 / 4).all(|at| irr[at] == 0), "no interrupt of the APIC's");
    machine.put(INFO, &[0]);
    // It sleeps in HLT. What user space stores there wakes nobody, and is seen by the next KVM_RUN.
    let client = machine.client.clone();
    let ends = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        client.raise();
    });
    assert_eq!(machine.run(0), Err(Errno::EINTR));
    ends.join().unwrap();
    machine.client.consume_signal();
    machine.put(INFO, &[1]);
    assert_eq!(machine.out(0), HANDLED);
    machine.put(INFO, &[0]);
    assert_eq!(machine.out(0), AT, "behind the HLT");
    machine.put(INFO, &[0x80]);
    assert_eq!(machine.out(0), HANDLED);
    // Memory that is gone says nothing.
    machine.set_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, &[HOLE]).unwrap_err();
    assert_eq!(machine.out(0), AT);
}

/// With interrupts off it waits for the instruction behind STI.
#[test]
fn the_vector_waits_for_the_guest() {
    let machine = Machine::with_xen(&[&|a| {
        here(a)?;
        a.sti()?;
        a.nop()?;
        a.nop()?;
        here(a)
    }]);
    machine.set(KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, &[VECTOR.into()]).unwrap();
    machine.put(INFO, &[1]);
    assert_eq!([machine.out(0), machine.out(0)], [AT, HANDLED]);
    let behind_sti = machine.u64(STACKS + 0x1000 - 40);
    assert_eq!(machine.client.memory.load_u8(behind_sti - 2).unwrap(), 0xfb, "STI, NOP");
}

/// `kvm_xen_write_hypercall_page`: a page of user space's, by mode and number; the mode that counts from then on.
#[test]
fn user_space_brings_pages_of_hypercalls() {
    let blobs = BASE + 0x80_0000;
    let machine = Machine::new(&[&|a| {
        wrmsr(a, XEN_MSR, PAGE | 1)?;
        here(a)?;
        wrmsr(a, XEN_MSR, PAGE | 2)?;
        wrmsr(a, XEN_MSR, HOLE)?;
        here(a)
    }]);
    for page in 0..4u8 {
        machine.put(0x80_0000 + 0x1000 * u64::from(page), &[page + 1; 4096]);
    }
    let config = kvm_xen_hvm_config {
        msr: XEN_MSR,
        blob_addr_32: blobs,
        blob_addr_64: blobs + 0x1000,
        blob_size_32: 1,
        blob_size_64: 2,
        ..Plain::zeroed()
    };
    machine.client.set(machine.vm, KVM_XEN_HVM_CONFIG, &config).unwrap();
    assert_eq!(machine.out(0), AT);
    let mut page = [0; 4096];
    machine.client.memory.read(PAGE, &mut page).unwrap();
    assert_eq!(page, [3; 4096], "the second of those for 64 bits");
    assert_eq!(machine.get(KVM_XEN_ATTR_TYPE_LONG_MODE), Ok(1));
    // The handler has an error code where it expects none, and says where it is before that matters.
    let set = |value| {
        let entry = kvm_msr_entry { index: XEN_MSR, data: value, ..Plain::zeroed() };
        let bytes = [&[1, 0, 0, 0, 0, 0, 0, 0], entry.as_bytes()].concat();
        machine.client.ioctl_bytes(machine.vcpus[0].0, KVM_SET_MSRS, bytes).unwrap().0
    };
    assert_eq!([PAGE | 2, HOLE, PAGE].map(set), [0, 0, 1], "user space writes it too");
    machine.client.memory.read(PAGE, &mut page).unwrap();
    assert_eq!(page, [2; 4096]);
    assert_eq!(machine.out(0), HANDLED, "#GP: there are two pages");
    // User space may want to hear of it.
    let machine = Machine::new(&[&|a| {
        wrmsr(a, XEN_MSR, PAGE | 2)?;
        wrmsr(a, XEN_MSR, PAGE)
    }]);
    machine.client.set(machine.vm, KVM_XEN_HVM_CONFIG, &config).unwrap();
    machine.client.enable(machine.vm, KVM_CAP_X86_USER_SPACE_MSR, u64::from(KVM_MSR_EXIT_REASON_INVAL)).unwrap();
    assert_eq!(machine.run(0).unwrap().0, KVM_EXIT_X86_WRMSR);
    // User space's page is not there: KVM_RUN says so, and RIP stays.
    let missing = kvm_xen_hvm_config { blob_addr_64: 0x1000, ..config };
    machine.client.set(machine.vm, KVM_XEN_HVM_CONFIG, &missing).unwrap();
    assert_eq!(machine.run(0), Err(Errno::EFAULT));
    let rip = machine.regs(0).rip;
    assert_eq!(machine.run(0), Err(Errno::EFAULT));
    assert_eq!(machine.regs(0).rip, rip);
    assert_eq!(machine.client.memory.load_u16(rip).unwrap(), 0x300f, "WRMSR");
    assert_eq!(set_bad(&machine), 0);
}

fn set_bad(machine: &Machine) -> i32 {
    let entry = kvm_msr_entry { index: XEN_MSR, data: PAGE, ..Plain::zeroed() };
    let bytes = [&[1, 0, 0, 0, 0, 0, 0, 0], entry.as_bytes()].concat();
    machine.client.ioctl_bytes(machine.vcpus[0].0, KVM_SET_MSRS, bytes).unwrap().0
}

/// EVTCHNSTAT_…
const UNBOUND: u32 = 1;
const INTERDOMAIN: u32 = 2;
const IPI: u32 = 5;

/// A 64-bit guest's hypercall: number and parameters.
fn hypercall(a: &mut CodeAssembler, number: u32, params: [u64; 3]) -> Code {
    a.mov(eax, number)?;
    a.mov(rdi, params[0])?;
    a.mov(rsi, params[1])?;
    a.mov(rdx, params[2])?;
    a.vmcall()
}

/// `kvm_xen_set_evtchn_fast`: the bit in shared_info, that of its word in vcpu_info, and the byte that says so.
#[test]
fn an_event_sets_bits_of_two_levels() {
    let machine = Machine::with_xen(&[&here, &here]);
    assert_eq!([machine.send(1, 1), machine.send(1, 4095), machine.send(1, 64 * 5)], [Ok(0); 3]);
    assert_eq!(machine.u64(INFO + SELECTOR), 0, "the other vCPU's");
    let all = vec![(0, 2), (5, 1), (63, 1 << 63)];
    assert_eq!(machine.take_events(1), (all, 1 | 1 << 5 | 1 << 63, 1));
    // One that waits already, and one that is masked.
    machine.put(PENDING, &[0b100]);
    machine.put(MASK, &[0b1000]);
    assert_eq!([machine.send(0, 2), machine.send(0, 3)], [Ok(0); 2]);
    assert_eq!(machine.take_events(0), (vec![(0, 0b1100)], 0, 0));
    // A word that vcpu_info tells of: the byte is the guest's business.
    machine.put(INFO + SELECTOR, &[1]);
    assert_eq!(machine.send(0, 5), Ok(0));
    assert_eq!(machine.take_events(0), (vec![(0, 0b10_0000)], 1, 0));
    // 32-bit guests: 32 words of 32 bits.
    machine.set(KVM_XEN_ATTR_TYPE_LONG_MODE, &[0]).unwrap();
    assert_eq!([machine.send(0, 1023), machine.send(0, 1024)], [Ok(0), Err(Errno::EINVAL)]);
    assert_eq!(machine.u32(SHARED + 0x800 + 4 * 31), 1 << 31);
    assert_eq!([machine.u32(INFO), machine.u32(INFO + 4)], [1, 1 << 31]);
    machine.put(SHARED + 0x880, &[2]);
    machine.put(INFO, &[0]);
    machine.send(0, 1).unwrap();
    assert_eq!([machine.u32(SHARED + 0x800), machine.u32(INFO)], [2, 0], "masked");
}

/// `kvm_xen_hvm_evtchn_send`
#[test]
fn events_that_cannot_be_are_errors() {
    let machine = Machine::with_xen(&[&here]);
    let send = |words: [u32; 3]| machine.client.set(machine.vm, KVM_XEN_HVM_EVTCHN_SEND, &words);
    for words in [[0, 0, TWO_LEVELS], [4096, 0, TWO_LEVELS], [1, 0, 0], [1, 7, TWO_LEVELS]] {
        assert_eq!(send(words), Err(Errno::EINVAL), "{words:?}");
    }
    machine.set_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, &[NOWHERE]).unwrap();
    assert_eq!(machine.send(0, 1), Err(Errno::EINVAL));
    machine.set_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, &[INFO]).unwrap();
    machine.set(KVM_XEN_ATTR_TYPE_SHARED_INFO, &[HOLE >> 12]).unwrap_err();
    assert_eq!(machine.send(0, 1), Err(Errno::EFAULT));
    machine.client.slot(machine.vm, (1, 0), HOLE, 0x1000, 0x30_0000).unwrap();
    assert_eq!(machine.send(0, 1), Ok(0), "memory has come");
    assert_eq!(machine.client.memory.load_u8(0x30_0800).unwrap(), 2);
    machine.set(KVM_XEN_ATTR_TYPE_SHARED_INFO, &[NOWHERE]).unwrap();
    assert_eq!(machine.send(0, 1), Err(Errno::EINVAL));
    assert_eq!(machine.take_events(0), (vec![], 1, 1));
}

/// `kvm_xen_inject_pending_events`: what came while vcpu_info was away is told of once it is back, and HLT does not keep the vCPU.
#[test]
fn events_wait_for_vcpu_info() {
    let machine = Machine::with_xen(&[&|a| {
        a.hlt()?;
        here(a)?;
        here(a)
    }]);
    machine.set_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, &[HOLE]).unwrap_err();
    assert_eq!([machine.send(0, 70), machine.send(0, 130)], [Ok(0); 2]);
    assert_eq!(machine.out(0), AT);
    machine.client.slot(machine.vm, (1, 0), HOLE, 0x1000, 0x30_0000).unwrap();
    assert_eq!(machine.out(0), AT);
    assert_eq!(machine.client.memory.load_u64(0x30_0008).unwrap(), 0b110);
    assert_eq!(machine.client.memory.load_u8(0x30_0000).unwrap(), 1);
}

/// Two vCPUs sleep in HLT: the one that an event is for wakes. By the VM's vector, and by one of the vCPU's own, which is its APIC's.
#[test]
fn an_event_wakes_its_vcpu_alone() {
    for own in [false, true] {
        let halts = |a: &mut CodeAssembler| {
            a.sti()?;
            a.hlt()?;
            here(a)
        };
        let machine = Machine::with_xen(&[&halts, &halts]);
        if own {
            machine.set_vcpu(1, KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR, &[VECTOR.into()]).unwrap();
        } else {
            machine.set(KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, &[VECTOR.into()]).unwrap();
        }
        std::thread::scope(|scope| {
            let run = |vcpu: usize| {
                let (thread, machine) = (machine.client.thread(), &machine);
                let by = thread.clone();
                (thread, scope.spawn(move || by.ioctl(machine.vcpus[vcpu].0, KVM_RUN, 0)))
            };
            let ((first, sleeps), (_, wakes)) = (run(0), run(1));
            std::thread::sleep(Duration::from_millis(50));
            machine.send(1, 77).unwrap();
            assert_eq!(wakes.join().unwrap(), Ok(0));
            assert_eq!(machine.vcpus[1].1.load_u16(34).unwrap(), HANDLED);
            std::thread::sleep(Duration::from_millis(20));
            assert!(!sleeps.is_finished());
            first.raise();
            assert_eq!(sleeps.join().unwrap(), Err(Errno::EINTR));
        });
        let page: [u32; 256] = machine.client.get(machine.vcpus[1].0, KVM_GET_LAPIC);
        let isr = page[(0x100 + 0x10 * usize::from(VECTOR / 32)) / 4];
        assert_eq!(isr != 0, own, "{isr:#x}");
        assert_eq!(machine.take_events(1), (vec![(1, 1 << 13)], 2, 1));
    }
}

/// A vCPU that computes is interrupted. Ports that are masked, or wait already, do not interrupt.
#[test]
fn an_event_interrupts_a_guest_that_runs() {
    let machine = Machine::with_xen(&[&|a| {
        a.sti()?;
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.jmp(top)
    }]);
    machine.set(KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, &[VECTOR.into()]).unwrap();
    machine.put(MASK, &[2]);
    std::thread::scope(|scope| {
        let runs = scope.spawn(|| machine.client.ioctl(machine.vcpus[0].0, KVM_RUN, 0));
        std::thread::sleep(Duration::from_millis(50));
        machine.send(0, 1).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert!(!runs.is_finished(), "masked");
        machine.send(0, 9).unwrap();
        assert_eq!(runs.join().unwrap(), Ok(0));
    });
    assert_eq!(machine.vcpus[0].1.load_u16(34).unwrap(), HANDLED);
}

/// `kvm_xen_sw_enable_lapic`: what was told of while software had the APIC off, by a write of memory, of an MSR or of all registers.
#[test]
fn the_vcpus_own_vector_waits_for_its_apic() {
    let off = |a: &mut CodeAssembler| a.mov(dword_ptr(rbx + 0xf0), 0xff);
    let then = |a: &mut CodeAssembler| {
        a.sti()?;
        here(a)?;
        here(a)
    };
    let by_memory = |a: &mut CodeAssembler| {
        off(a)?;
        here(a)?;
        a.mov(dword_ptr(rbx + 0xf0), 0x1ff)?;
        then(a)
    };
    let by_msr = |a: &mut CodeAssembler| {
        wrmsr(a, 0x1b, APIC | 0xd00)?;
        wrmsr(a, 0x80f, 0xff)?;
        here(a)?;
        wrmsr(a, 0x80f, 0x1ff)?;
        then(a)
    };
    let by_user = |a: &mut CodeAssembler| {
        off(a)?;
        here(a)?;
        then(a)
    };
    let codes: [&dyn Fn(&mut CodeAssembler) -> Code; 3] = [&by_memory, &by_msr, &by_user];
    for (which, code) in codes.into_iter().enumerate() {
        let machine = Machine::with_xen(&[code]);
        let table = [kvm_cpuid_entry2 { function: 1, ecx: 1 << 21, edx: 1 << 9, ..Plain::zeroed() }];
        let bytes = [[1u32, 0].map(u32::to_le_bytes).concat(), table[0].as_bytes().to_vec()].concat();
        machine.client.ioctl_bytes(machine.vcpus[0].0, KVM_SET_CPUID2, bytes).unwrap();
        machine.set_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR, &[VECTOR.into()]).unwrap();
        assert_eq!(machine.out(0), AT);
        machine.send(0, 1).unwrap();
        if which == 2 {
            let mut page: [u32; 256] = machine.client.get(machine.vcpus[0].0, KVM_GET_LAPIC);
            page[0xf0 / 4] = 0x1ff;
            machine.client.set(machine.vcpus[0].0, KVM_SET_LAPIC, &page).unwrap();
        }
        assert_eq!([machine.out(0), machine.out(0)], [HANDLED, AT], "{which}");
    }
}

/// `kvm_xen_setup_evtchn`, `evtchn_set_fn`: by KVM_IRQ_LINE_STATUS, which tells what became of it, and by an eventfd.
#[test]
fn events_are_routes_too() {
    let machine = Machine::with_xen(&[&here]);
    let route = |port, vcpu| (KVM_IRQ_ROUTING_XEN_EVTCHN, 0, [port, vcpu, TWO_LEVELS]);
    let good = [route(1, 0), route(9, 7), route(5000, 0)];
    assert_eq!(machine.route(&good), Ok(()), "there may be such a vCPU and channel once");
    for wrong in [(KVM_IRQ_ROUTING_XEN_EVTCHN, 1, [1, 0, TWO_LEVELS]), (KVM_IRQ_ROUTING_XEN_EVTCHN, 0, [1, 0, 0])] {
        assert_eq!(machine.route(&[wrong]), Err(Errno::EINVAL));
    }
    let line = |gsi, level| {
        let mut line = [gsi, level];
        machine.client.ioctl_with(machine.vm, KVM_IRQ_LINE_STATUS, &mut line).unwrap();
        line[0] as i32
    };
    // Told of, there already, no low; and no such vCPU or channel.
    assert_eq!([line(40, 1), line(40, 1), line(40, 0), line(41, 1), line(42, 1)], [1, 0, -1, -1, -1]);
    assert_eq!(machine.take_events(0), (vec![(0, 2)], 1, 1));
    machine.put(MASK, &[2]);
    assert_eq!(line(40, 1), -1, "masked");
    assert_eq!(machine.take_events(0), (vec![(0, 2)], 0, 0));
    machine.put(MASK, &[0]);
    let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
    let irqfd = [machine.client.adopt(&event) as u32, 40, 0, 0, 0, 0, 0, 0];
    machine.client.set(machine.vm, KVM_IRQFD, &irqfd).unwrap();
    event.write(1).unwrap();
    let until = Instant::now() + Duration::from_secs(10);
    while machine.client.memory.load_u8(INFO).unwrap() == 0 {
        assert!(Instant::now() < until);
        std::thread::yield_now();
    }
    assert_eq!(machine.take_events(0), (vec![(0, 2)], 1, 1));
}

/// `kvm_xen_setattr_evtchn`
#[test]
fn ports_are_bound_once() {
    let machine = Machine::with_xen(&[&here]);
    let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
    let fd = machine.client.adopt(&event) as u32;
    let null = machine.client.adopt(std::fs::File::open("/dev/null").unwrap()) as u32;
    let (deassign, update, reset) = (KVM_XEN_EVTCHN_DEASSIGN, KVM_XEN_EVTCHN_UPDATE, KVM_XEN_EVTCHN_RESET);
    let cases = [
        ([0, IPI, 0], [0, 0, TWO_LEVELS], Err(Errno::EINVAL)),
        ([4096, IPI, 0], [4096, 0, TWO_LEVELS], Err(Errno::EINVAL)),
        ([9, UNBOUND, 0], [9, 0, TWO_LEVELS], Err(Errno::EINVAL)),
        ([9, IPI, 0], [8, 0, TWO_LEVELS], Err(Errno::EINVAL)),
        ([9, IPI, 0], [9, 0, 0], Err(Errno::EINVAL)),
        ([9, INTERDOMAIN, 0], [4096, 0, TWO_LEVELS], Err(Errno::EINVAL)),
        ([9, INTERDOMAIN, 0], [0, 5, 0], Err(Errno::EBADF)),
        ([9, INTERDOMAIN, 0], [0, null, 0], Err(Errno::EINVAL)),
        ([9, IPI, deassign | update], [9, 0, TWO_LEVELS], Err(Errno::EINVAL)),
        ([9, IPI, deassign], [9, 0, TWO_LEVELS], Err(Errno::ENOENT)),
        ([9, IPI, update], [9, 0, TWO_LEVELS], Err(Errno::ENOENT)),
        ([9, IPI, 0], [9, 7, TWO_LEVELS], Ok(0)),
        ([9, IPI, 0], [9, 0, TWO_LEVELS], Err(Errno::EEXIST)),
        ([9, INTERDOMAIN, update], [9, 0, TWO_LEVELS], Err(Errno::EINVAL)),
        ([9, IPI, update], [8, 0, TWO_LEVELS], Err(Errno::EINVAL)),
        ([9, IPI, update], [9, 0, 1], Err(Errno::EINVAL)),
        ([9, IPI, update], [9, 0, TWO_LEVELS], Ok(0)),
        ([10, INTERDOMAIN, 0], [0, fd, 0], Ok(0)),
        ([10, INTERDOMAIN, update], [0, fd, TWO_LEVELS], Err(Errno::EINVAL)),
        ([9, 0, deassign], [0, 0, 0], Ok(0)),
        ([9, 0, deassign], [0, 0, 0], Err(Errno::ENOENT)),
        ([0, 0, reset], [0, 0, 0], Ok(0)),
        ([10, 0, deassign], [0, 0, 0], Err(Errno::ENOENT)),
    ];
    for (port, to, expected) in cases {
        assert_eq!(machine.port(port, to), expected, "{port:?} {to:?}");
    }
    assert_eq!(machine.get(KVM_XEN_ATTR_TYPE_EVTCHN), Err(Errno::ENOENT));
}

/// `kvm_xen_hcall_evtchn_send`: to a vCPU, to an eventfd; else it is user space's.
#[test]
fn a_guest_sends_without_user_space() {
    const PORT: u64 = 0x2_6000;
    let machine = Machine::with_xen(&[
        &|a| {
            for at in [PORT, PORT + 4, PORT + 8, PORT + 12, HOLE, 0] {
                hypercall(a, 32, [4, at, 0])?;
                a.push(rax)?;
            }
            here(a)?;
            hypercall(a, 17, [0, 0, 0])?;
            a.push(rax)?;
            hypercall(a, 17, [1, 0, 0])?;
            here(a)
        },
        &here,
    ]);
    let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
    for (at, port) in [(0, 40u32), (4, 41), (8, 42), (12, 43)] {
        machine.put(PORT + at, &port.to_le_bytes());
    }
    machine.port([40, INTERDOMAIN, 0], [70, 1, TWO_LEVELS]).unwrap();
    machine.port([41, INTERDOMAIN, 0], [0, machine.client.adopt(&event) as u32, 0]).unwrap();
    machine.port([42, INTERDOMAIN, 0], [70, 9, TWO_LEVELS]).unwrap();
    machine.set(KVM_XEN_ATTR_TYPE_XEN_VERSION, &[0x4_000a]).unwrap();
    assert_eq!(machine.get(KVM_XEN_ATTR_TYPE_XEN_VERSION), Ok(0x4_000a));
    // No such vCPU, and no such port.
    for port in [42, 43] {
        assert_eq!(machine.run(0).unwrap().0, KVM_EXIT_XEN, "{port}");
        let page = &machine.vcpus[0].1;
        assert_eq!(
            [12, 16, 32, 40].map(|at| page.load_u32(32 + at).unwrap()),
            [0, 32, 4, PORT as u32 + 4 * (port - 40)]
        );
        page.store_u64(32 + 24, u64::from(port)).unwrap();
    }
    assert_eq!(machine.out(0), AT);
    let stack = machine.regs(0).rsp;
    let results: Vec<_> = (0..6).rev().map(|at| machine.u64(stack + 8 * at) as i64).collect();
    assert_eq!(results, [0, 0, 42, 43, -14, -14], "EFAULT: nothing is mapped, nothing at 0");
    assert_eq!(machine.take_events(1), (vec![(1, 1 << 6)], 2, 1));
    assert_eq!(event.read(), Ok(1));
    // XENVER_version, and another.
    assert_eq!(machine.run(0).unwrap().0, KVM_EXIT_XEN);
    assert_eq!(machine.u64(machine.regs(0).rsp), 0x4_000a);
    assert_eq!(machine.vcpus[0].1.load_u64(32 + 32).unwrap(), 1);
}

/// A guest may have any number of interrupts under way while shared pages come and go: no thread waits for another.
#[test]
fn shared_pages_may_go_at_any_time() {
    let machine = Machine::with_xen(&[&|a| {
        a.sti()?;
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.hlt()?;
        a.jmp(top)
    }]);
    machine.set(KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, &[VECTOR.into()]).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let thread = machine.client.thread();
        let by = thread.clone();
        let (machine, done) = (&machine, &done);
        scope.spawn(move || {
            while !done.load(Relaxed) {
                if by.ioctl(machine.vcpus[0].0, KVM_RUN, 0).is_err() {
                    return;
                }
                machine.put(INFO, &[0; 16]);
            }
        });
        scope.spawn(move || {
            // Arguments where no other thread has its own.
            let [nowhere, somewhere] = [(0x8000, NOWHERE), (0x9000, SHARED >> 12)].map(|(at, gfn)| {
                let attr = attr(KVM_XEN_ATTR_TYPE_SHARED_INFO, &[gfn]);
                machine.put(SCRATCH - BASE + at, attr.as_bytes());
                SCRATCH + at
            });
            while !done.load(Relaxed) {
                for at in [nowhere, somewhere] {
                    machine.client.ioctl(machine.vm, KVM_XEN_HVM_SET_ATTR, at).unwrap();
                }
            }
        });
        let (mut sent, until) = (0, Instant::now() + Duration::from_millis(300));
        while Instant::now() < until {
            machine.put(PENDING, &[0; 512]);
            match machine.send(0, 1 + sent % 4000) {
                Ok(_) => sent += 1,
                Err(errno) => assert_eq!(errno, Errno::EINVAL),
            }
        }
        done.store(true, Relaxed);
        thread.raise();
        assert!(sent > 0);
    });
}

/// Parameters of hypercalls.
const PARAMETER: u64 = 0x2_6000;

/// `kvm_xen_vcpu_set_attr`
#[test]
fn a_vcpu_has_a_number_and_a_timer() {
    let machine = Machine::with_xen(&[&here, &here]);
    let id = |vcpu| machine.get_vcpu(vcpu, KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID).unwrap()[0];
    assert_eq!([id(0), id(1)], [0, 1], "in the order of creation");
    let set = |id| machine.set_vcpu(1, KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID, &[id]);
    assert_eq!([set(1023), set(1024)], [Ok(0), Err(Errno::EINVAL)]);
    assert_eq!(id(1), 1023);
    assert_eq!(machine.timer(), (0, TWO_LEVELS, 0));
    assert_eq!(machine.set_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_TIMER, &[5, 0]), Err(Errno::EINVAL), "priority 0");
    assert_eq!(machine.set_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_TIMER, &[0, 1 << 60]), Ok(0));
    assert_eq!(machine.timer(), (0, TWO_LEVELS, 0), "it has no port");
    machine.set_timer(5, 1 << 60);
    assert_eq!(machine.timer(), (5, TWO_LEVELS, 1 << 60));
    machine.set_timer(6, 0);
    assert_eq!(machine.timer(), (6, TWO_LEVELS, 0));
}

/// `kvm_xen_start_timer`, `kvm_xen_inject_timer_irqs`: once, when it is due or was before; the vCPU may sleep or compute, and is told by
/// its own thread.
#[test]
fn the_timer_sends_an_event() {
    let sleeps = |a: &mut CodeAssembler| {
        a.sti()?;
        a.hlt()?;
        here(a)
    };
    let computes = |a: &mut CodeAssembler| {
        a.sti()?;
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.jmp(top)
    };
    let codes: [&dyn Fn(&mut CodeAssembler) -> Code; 2] = [&sleeps, &computes];
    for code in codes {
        for left in [MOMENT_NS as i64, -1_000_000] {
            let machine = Machine::with_xen(&[code]);
            machine.set(KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, &[VECTOR.into()]).unwrap();
            machine
                .client
                .set(machine.vm, KVM_SET_CLOCK, &kvm_clock_data { clock: 1 << 40, ..Plain::zeroed() })
                .unwrap();
            let expires = machine.clock().wrapping_add_signed(left);
            machine.set_timer(5, expires);
            assert_eq!(machine.timer(), (5, TWO_LEVELS, expires));
            assert_eq!(machine.out(0), HANDLED);
            // The host's two clocks run apart by some millionths.
            assert!(machine.clock() + MOMENT_NS / 10 >= expires);
            assert_eq!(machine.timer(), (5, TWO_LEVELS, 0));
            assert_eq!(machine.take_events(0), (vec![(0, 1 << 5)], 1, 1));
        }
    }
}

/// Nobody has an interrupt to bring then, but the bits are set.
#[test]
fn the_timer_needs_no_interrupt_controllers() {
    let machine = Machine::with_chip(
        false,
        &[&|a| {
            let mut top = a.create_label();
            a.set_label(&mut top)?;
            a.cmp(byte_ptr(INFO), 0)?;
            a.je(top)?;
            here(a)
        }],
    )
    .share();
    machine.set(KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, &[VECTOR.into()]).unwrap();
    machine.set_timer(5, machine.clock() + MOMENT_NS);
    assert!(machine.timed_out() >= MOMENT / 2);
    assert_eq!(machine.take_events(0), (vec![(0, 1 << 5)], 1, 1));
    // One that never rings.
    machine.set_timer(5, u64::MAX >> 1);
    let regs = machine.regs(0);
    machine.client.set(machine.vcpus[0].0, KVM_SET_REGS, &kvm_regs { rip: CODE, ..regs }).unwrap();
    machine.out_while(|| machine.put(INFO, &[1]));
    assert_eq!(machine.timer().2, u64::MAX >> 1);
}

/// `kvm_xen_hcall_set_timer_op`, `kvm_xen_hcall_vcpu_op`; user space's where it has kept the timer.
#[test]
fn a_guest_sets_its_timer() {
    let hole = HOLE;
    let machine = Machine::with_xen(&[&|a| {
        for params in [[1 << 60, 0, 0], [0, 0, 0], [1 << 63, 0, 0], [u64::MAX >> 1, 0, 0]] {
            hypercall(a, 15, params)?;
            here(a)?;
        }
        for params in [[9, 7, 0], [8, 6, PARAMETER], [8, 7, hole], [8, 7, PARAMETER], [9, 7 | 1 << 32, 0], [7, 7, 0]] {
            hypercall(a, 24, params)?;
            here(a)?;
        }
        Ok(())
    }]);
    let answered = || {
        assert_eq!(machine.out(0), AT);
        machine.regs(0).rax as i64
    };
    let is_user_spaces = || {
        let (reason, _) = machine.run(0).unwrap();
        machine.vcpus[0].1.store_u64(32 + 24, 99).unwrap();
        reason == KVM_EXIT_XEN
    };
    assert!(is_user_spaces());
    assert_eq!(answered(), 99);
    machine.set_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID, &[7]).unwrap();
    machine.set_timer(5, 1 << 60);
    assert_eq!((answered(), machine.timer().2), (0, 0), "0 stops it");
    // What is past by far, and in 292 years: in 100 ms.
    for _ in 0..2 {
        let before = machine.clock();
        assert_eq!(answered(), 0);
        let soon = machine.timer().2 - 100_000_000;
        assert!((before..=machine.clock()).contains(&soon), "{soon}");
    }
    assert_eq!((answered(), machine.timer().2), (0, 0), "stopped");
    machine.put(PARAMETER, &(1u64 << 60).to_le_bytes());
    machine.put(PARAMETER + 8, &[0; 8]);
    assert_eq!(answered(), -22, "EINVAL: another vCPU's");
    assert_eq!(answered(), -14, "EFAULT");
    assert_eq!((answered(), machine.timer().2), (0, 1 << 60));
    assert_eq!((answered(), machine.timer().2), (0, 0), "a number has 32 bits");
    assert!(is_user_spaces(), "a periodic timer");
}

/// VCPU_SSHOTTMR_future; what must be there of the structure.
#[test]
fn a_single_shot_may_have_to_be_in_the_future() {
    let end = RAM - 12;
    let machine = Machine::with_xen(&[&|a| {
        for at in [PARAMETER, PARAMETER, end] {
            hypercall(a, 24, [8, 0, at])?;
            here(a)?;
        }
        Ok(())
    }]);
    let answered = || {
        assert_eq!(machine.out(0), AT);
        machine.regs(0).rax as i64
    };
    machine.set_timer(5, 0);
    machine.put(PARAMETER, &1u64.to_le_bytes());
    machine.put(PARAMETER + 8, &[1]);
    assert_eq!((answered(), machine.timer().2), (-62, 0), "ETIME");
    machine.put(PARAMETER + 8, &[0]);
    assert_eq!(answered(), 0);
    assert_eq!(answered(), -14, "EFAULT: the padding of 64-bit guests is not in memory");
    assert_eq!(machine.take_events(0), (vec![(0, 1 << 5)], 1, 1), "it was due at once");
}

/// SCHEDOP_poll: ports from `PARAMETER` + 40H on, so many of them, and a timeout, ns.
fn poll(machine: &Machine, ports: &[u32], timeout: u64) {
    machine.put(PARAMETER, &(PARAMETER + 0x40).to_le_bytes());
    machine.put(PARAMETER + 8, &(ports.len() as u32).to_le_bytes());
    machine.put(PARAMETER + 16, &timeout.to_le_bytes());
    for (at, port) in (0..).zip(ports) {
        machine.put(PARAMETER + 0x40 + 4 * at, &port.to_le_bytes());
    }
}

fn polls(a: &mut CodeAssembler) -> Code {
    let mut top = a.create_label();
    a.set_label(&mut top)?;
    hypercall(a, 29, [3, PARAMETER, 0])?;
    here(a)?;
    a.jmp(top)
}

/// `kvm_xen_schedop_poll`, with interrupts off.
#[test]
fn a_poll_sleeps_until_its_channel_has_an_event() {
    let machine = Machine::with_xen(&[&polls]);
    machine.put(MASK, &[0xff; 512]);
    let result = || machine.regs(0).rax as i64;
    // It has one, or there is nothing that could say so.
    machine.send(0, 70).unwrap();
    poll(&machine, &[70], 0);
    machine.timed_out();
    machine.set(KVM_XEN_ATTR_TYPE_SHARED_INFO, &[NOWHERE]).unwrap();
    poll(&machine, &[71], 0);
    machine.timed_out();
    machine.set(KVM_XEN_ATTR_TYPE_SHARED_INFO, &[SHARED >> 12]).unwrap();
    // A masked event of the channel; of another it is not, unless several or none are named.
    assert!(machine.out_while(|| _ = machine.send(0, 71)) >= MOMENT);
    machine.take_events(0);
    assert!(
        machine.out_while(|| {
            machine.send(0, 72).unwrap();
            std::thread::sleep(MOMENT);
            machine.send(0, 71).unwrap();
        }) >= 2 * MOMENT
    );
    machine.take_events(0);
    for ports in [&[80, 81][..], &[]] {
        poll(&machine, ports, 0);
        assert!(machine.out_while(|| _ = machine.send(0, 90)) >= MOMENT);
        machine.take_events(0);
    }
    poll(&machine, &[71], 0);
    // One that is not masked, of any channel.
    machine.put(MASK, &[0; 512]);
    assert!(machine.out_while(|| _ = machine.send(0, 3)) >= MOMENT);
    assert_eq!(machine.take_events(0), (vec![(0, 8)], 1, 1));
    // Time; as much as there can be is for ever.
    poll(&machine, &[71], u64::MAX);
    assert!(machine.out_while(|| _ = machine.send(0, 71)) >= MOMENT);
    machine.take_events(0);
    poll(&machine, &[71], MOMENT_NS);
    assert!(machine.timed_out() >= MOMENT);
    assert_eq!(result(), 0);
    // The timer, whatever it sends.
    poll(&machine, &[71], 0);
    machine.put(MASK, &[0xff; 512]);
    machine.set_timer(5, machine.clock() + MOMENT_NS);
    assert!(machine.timed_out() >= MOMENT / 2);
    assert_eq!(machine.take_events(0), (vec![(0, 1 << 5)], 0, 0));
    // What cannot be read.
    for (ports, timeout, error) in [(&[4096][..], 1, -22), (&[1; 129], 1, -22), (&[4095], 1, 0), (&[1; 128], 1, 0)] {
        poll(&machine, ports, timeout);
        machine.timed_out();
        assert_eq!(result(), error);
    }
    machine.put(PARAMETER, &HOLE.to_le_bytes());
    machine.timed_out();
    assert_eq!(result(), -14);
}

/// A signal ends it, and the guest goes on; so does an interrupt that it may take.
#[test]
fn a_poll_ends_with_what_ends_hlt() {
    let machine = Machine::with_xen(&[&|a| {
        a.sti()?;
        polls(a)
    }]);
    poll(&machine, &[71], 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(MOMENT);
            machine.client.raise();
        });
        assert_eq!(machine.run(0), Err(Errno::EINTR));
    });
    machine.client.consume_signal();
    let state: kvm_mp_state = machine.client.get(machine.vcpus[0].0, KVM_GET_MP_STATE);
    assert_eq!(state.mp_state, KVM_MP_STATE_RUNNABLE);
    let regs = machine.regs(0);
    assert_eq!((regs.rax, machine.client.memory.load_u8(regs.rip - 3).unwrap()), (0, 0x0f), "behind the hypercall");
    assert_eq!(machine.out(0), AT);
    // An interrupt of the APIC's: its handler runs first.
    let msi = [0xfee0_0000u32, 0, u32::from(VECTOR), 0, 0, 0, 0, 0];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(MOMENT);
            machine.client.set(machine.vm, KVM_SIGNAL_MSI, &msi).unwrap();
        });
        assert_eq!(machine.out(0), HANDLED);
    });
    assert_eq!(machine.out(0), AT);
}

/// `kvm_xen_hcall_sched_op`: it yields where user space may send events past the kernel.
#[test]
fn a_poll_that_could_miss_events_is_none() {
    let machine = Machine::with_xen(&[&polls]);
    machine.configure(KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL).unwrap();
    poll(&machine, &[71], 0);
    machine.timed_out();
    assert_eq!(machine.regs(0).rax, 0);
}

/// `kvm_xen_hypercall`: above CPL 0, and all that is not known, is user space's; SCHEDOP_yield is not.
#[test]
fn other_hypercalls_are_user_spaces() {
    let machine = Machine::with_xen(&[&|a| {
        hypercall(a, 29, [0, 0, 0])?;
        here(a)?;
        hypercall(a, 29, [1, 0, 0])?;
        hypercall(a, 32, [5, 0, 0])?;
        hypercall(a, 34, [0, 0, 0])
    }]);
    assert_eq!(machine.out(0), AT);
    for number in [29, 32, 34] {
        assert_eq!(machine.run(0).unwrap().0, KVM_EXIT_XEN);
        assert_eq!(machine.vcpus[0].1.load_u64(32 + 16).unwrap(), number);
    }
}

/// Parameters are 32 bits then, a time is two of them, structures have no padding, and a poll yields. Compatibility mode.
#[test]
fn guests_of_32_bits_have_other_parameters() {
    let machine = Machine::with_xen(&[&here]);
    let mut a = CodeAssembler::new(32).unwrap();
    let end = (RAM - 12) as u32;
    for (number, params) in [(15, [7, 1 << 20, 0]), (24, [8, 0, end]), (29, [3, PARAMETER as u32, 0]), (34, [1, 2, 3])]
    {
        let mut call = || {
            a.mov(eax, number)?;
            a.mov(ebx, params[0])?;
            a.mov(ecx, params[1])?;
            a.mov(edx, params[2])?;
            a.vmcall()?;
            here(&mut a)
        };
        call().unwrap();
    }
    machine.put(CODE, &a.assemble(CODE).unwrap());
    let vcpu = machine.vcpus[0].0;
    let mut sregs: kvm_sregs = machine.client.get(vcpu, KVM_GET_SREGS);
    (sregs.cs.l, sregs.cs.db) = (0, 1);
    machine.client.set(vcpu, KVM_SET_SREGS, &sregs).unwrap();
    machine.set_timer(5, 0);
    machine.put(RAM - 12, &(3u64 << 40).to_le_bytes());
    machine.put(RAM - 4, &[0; 4]);
    for expires in [1 << 52 | 7, 3 << 40, 3 << 40] {
        let before = machine.clock();
        machine.out(0);
        assert_eq!(machine.regs(0).rax, 0);
        let set = machine.timer().2;
        // So far away that it is soon.
        let is_soon = (before..=machine.clock()).contains(&(set - 100_000_000));
        assert!(if expires >> 50 != 0 { is_soon } else { set == expires }, "{set:#x}");
    }
    assert_eq!(machine.run(0).unwrap().0, KVM_EXIT_XEN);
    let page = &machine.vcpus[0].1;
    assert_eq!([8, 32, 40, 48].map(|at| page.load_u64(32 + at).unwrap()), [0, 1, 2, 3]);
}

/// api.rst, "KVM_XEN_ATTR_TYPE_SHARED_INFO", "KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO": events mark no page as dirty, and hide no other mark.
#[test]
fn events_are_no_part_of_the_dirty_log() {
    let machine = Machine::with_xen(&[&|a| {
        a.mov(byte_ptr(SHARED), 1)?;
        here(a)
    }]);
    machine.client.slot(machine.vm, (0, KVM_MEM_LOG_DIRTY_PAGES), 0, RAM, 0).unwrap();
    machine.send(0, 1).unwrap();
    machine.set(KVM_XEN_ATTR_TYPE_SHARED_INFO, &[SHARED >> 12]).unwrap();
    let has_page = |gpa: u64| {
        let bitmap = SCRATCH + 0x8000;
        let log = [[0, 0].map(u32::to_le_bytes).concat(), bitmap.to_le_bytes().to_vec()].concat();
        machine.client.ioctl_bytes(machine.vm, KVM_GET_DIRTY_LOG, log).unwrap();
        machine.u64(bitmap - BASE + gpa / 0x1000 / 64 * 8) >> (gpa / 0x1000 % 64) & 1 != 0
    };
    assert!(!has_page(SHARED));
    machine.send(0, 2).unwrap();
    assert!(!has_page(INFO));
    machine.out(0);
    assert!(has_page(SHARED), "the guest's own store");
}
