//! Against SDM Vol. 3, chapter "Advanced Programmable Interrupt Controller (APIC)".

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use parking_lot::Mutex;
use x86_defs::msr::apic_base::{BSP, DEFAULT, EN, EXTD};

use super::*;
use crate::Now;
use crate::reg::find;

#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(&self) {
        self.0.fetch_add(1, SeqCst);
    }
}

#[derive(Default)]
struct Wires {
    ipis: Mutex<Vec<(Shorthand, Message)>>,
    ended: Mutex<Vec<u8>>,
}

impl Bus for Wires {
    fn send_ipi(&self, _: &Lapic, shorthand: Shorthand, message: &Message) {
        self.ipis.lock().push((shorthand, *message));
    }

    fn end_of_interrupt(&self, _: &Lapic, vector: u8) {
        self.ended.lock().push(vector);
    }
}

struct Machine {
    apic: Lapic,
    woken: Arc<Woken>,
    wires: Wires,
    now: Now,
}

impl Machine {
    fn new(id: u32, base: u64) -> Self {
        let woken = Arc::new(Woken::default());
        let (wires, now) = (Wires::default(), Now { ns: 1_000_000, tsc: 5_000_000 });
        Self { apic: Lapic::new(id, base, woken.clone()), woken, wires, now }
    }

    /// xAPIC mode, enabled by software.
    fn enabled() -> Self {
        let machine = Self::new(3, DEFAULT | EN);
        machine.write(at::SVR, 0x1ff);
        machine
    }

    /// x2APIC mode, enabled by software.
    fn x2apic(id: u32) -> Self {
        let machine = Self::new(id, DEFAULT | EN);
        machine.apic.set_base(DEFAULT | EN | EXTD);
        machine.wrmsr(0x80f, 0x1ff).unwrap();
        machine
    }

    fn read(&self, offset: u32) -> u32 {
        self.apic.read(offset, 4, &self.wires, self.now)
    }

    fn write(&self, offset: u32, value: u32) {
        self.apic.write(offset, 4, value, &self.wires, self.now);
    }

    fn rdmsr(&self, index: u32) -> Option<u64> {
        self.apic.read_msr(index, &self.wires, self.now)
    }

    fn wrmsr(&self, index: u32, value: u64) -> Option<()> {
        self.apic.write_msr(index, value, &self.wires, self.now)
    }

    fn fixed(&self, vector: u8) -> bool {
        self.apic.accept(&message(DeliveryMode::Fixed, vector, false))
    }

    fn at(&mut self, ns: u64) -> &mut Self {
        self.now = Now { ns, tsc: 5 * ns };
        self.apic.advance(self.now);
        self
    }
}

fn message(mode: DeliveryMode, vector: u8, level: bool) -> Message {
    Message { vector, mode, dest: 3, logical: false, level, assert: true }
}

/// SDM Vol. 3 "Local APIC State After Power-Up or Reset".
#[test]
fn registers_after_reset() {
    let machine = Machine::new(3, DEFAULT | EN);
    for reg in REGS.iter().filter(|reg| !reg.msr_only && reg.offset != at::ID && machine.apic.has(reg)) {
        for n in 0..reg.count {
            assert_eq!(machine.read(reg.offset + n * STEP), reg.reset, "{}", reg.name);
        }
    }
    assert_eq!(machine.read(at::ID), 3 << 24);
    let manual = [(0x080, 0), (0x0e0, 0xffff_ffff), (0x0f0, 0xff), (0x320, 0x1_0000), (0x370, 0x1_0000), (0x3e0, 0)];
    for (offset, value) in manual {
        assert_eq!(machine.read(offset), value, "{offset:#x}");
    }
}

#[test]
fn writes_keep_reserved_bits() {
    let machine = Machine::enabled();
    for reg in REGS.iter().filter(|reg| !reg.msr_only && reg.written.is_none() && reg.shown.is_none()) {
        machine.write(reg.offset, 0xffff_ffff);
        let kept = reg.reset & !reg.writable | reg.writable;
        assert_eq!(machine.read(reg.offset), kept, "{}", reg.name);
    }
    for (offset, kept) in [(0x320, 0x7_00ff), (0x330, 0x1_07ff), (0x350, 0x1_a7ff), (0x370, 0x1_00ff), (0x3e0, 0xb)] {
        machine.write(offset, 0xffff_ffff);
        assert_eq!(machine.read(offset), kept, "{offset:#x}");
    }
}

#[test]
fn parts_can_be_read_and_only_whole_registers_written() {
    let machine = Machine::enabled();
    assert_eq!(machine.apic.read(0x32, 2, &machine.wires, machine.now), 5);
    assert_eq!(machine.apic.read(0x32, 4, &machine.wires, machine.now), 0);
    machine.apic.write(0x80, 1, 0x20, &machine.wires, machine.now);
    machine.apic.write(0x84, 4, 0x20, &machine.wires, machine.now);
    assert_eq!(machine.read(0x80), 0);
}

#[test]
fn highest_vector_above_the_priority_is_taken_first() {
    let machine = Machine::enabled();
    for vector in [0x31, 0x95, 0x40] {
        assert!(machine.fixed(vector));
    }
    assert_eq!(machine.apic.acknowledge(), Some(0x95));
    assert_eq!(machine.read(0xa0), 0x90, "PPR");
    assert!(machine.fixed(0x9f));
    assert_eq!(machine.apic.pending(), None, "the same class waits");
    assert!(machine.fixed(0xa0));
    assert_eq!(machine.apic.acknowledge(), Some(0xa0));
    machine.write(0xb0, 0);
    assert_eq!(machine.apic.pending(), None);
    machine.write(0xb0, 0);
    assert_eq!(machine.apic.acknowledge(), Some(0x9f));
    machine.write(0xb0, 0);
    machine.write(0x80, 0x40);
    assert_eq!(machine.apic.pending(), None, "TPR's class");
    machine.write(0x80, 0x3f);
    assert_eq!(machine.apic.pending(), Some(0x40));
    assert!(machine.apic.set_cr8(3) && !machine.apic.set_cr8(4));
    assert_eq!((machine.read(0x80), machine.apic.cr8()), (0x40, 4));
}

#[test]
fn every_acceptance_wakes_and_so_does_what_an_eoi_uncovers() {
    let machine = Machine::enabled();
    let wakes = || machine.woken.0.load(SeqCst);
    machine.fixed(0x50);
    assert_eq!(wakes(), 1);
    machine.apic.acknowledge();
    machine.fixed(0x40);
    assert_eq!(wakes(), 2);
    machine.write(0xb0, 0);
    assert_eq!(wakes(), 3);
}

#[test]
fn software_disable_masks_and_refuses() {
    let machine = Machine::enabled();
    machine.write(at::LVT_TIMER, 0x40);
    machine.write(at::SVR, 0xff);
    assert_eq!(machine.read(at::LVT_TIMER), 0x1_0040);
    machine.write(at::LVT_LINT0, 0x700);
    assert_eq!(machine.read(at::LVT_LINT0), 0x1_0700);
    assert!(!machine.fixed(0x50));
    assert!(machine.apic.accept(&message(DeliveryMode::Nmi, 0, false)), "NMI, SMI, INIT and SIPI come through");
    machine.write(at::SVR, 0x1ff);
    assert_eq!(machine.read(at::LVT_TIMER), 0x1_0040, "masks stay");
}

#[test]
fn eoi_of_levels_is_broadcast() {
    let machine = Machine::enabled();
    machine.apic.accept(&message(DeliveryMode::Fixed, 0x61, true));
    machine.fixed(0x62);
    assert_eq!([machine.read(0x180 + 0x30), machine.read(0x200 + 0x30)], [1 << 1, 0b110]);
    machine.apic.acknowledge();
    machine.write(0xb0, 0);
    machine.apic.acknowledge();
    machine.write(0xb0, 0);
    assert_eq!(*machine.wires.ended.lock(), [0x61]);
    // Bit 12 of SVR exists only where it is offered.
    machine.write(at::SVR, 0x11ff);
    assert_eq!((machine.read(at::SVR), machine.read(0x30)), (0x1ff, 0x5_0014));
    machine.apic.set_directed_eoi(true);
    machine.write(at::SVR, 0x11ff);
    assert_eq!((machine.read(at::SVR), machine.read(0x30)), (0x11ff, 0x105_0014));
    machine.apic.accept(&message(DeliveryMode::Fixed, 0x61, true));
    machine.apic.acknowledge();
    machine.write(0xb0, 0);
    assert_eq!(machine.wires.ended.lock().len(), 1, "suppressed");
}

#[test]
fn events_of_each_delivery_mode() {
    let machine = Machine::new(3, DEFAULT | EN);
    let send = |mode, vector, level, assert| machine.apic.accept(&Message { assert, ..message(mode, vector, level) });
    assert!(send(DeliveryMode::Init, 0, true, true));
    assert!(!send(DeliveryMode::Init, 0, true, false), "INIT level de-assert");
    assert!(send(DeliveryMode::StartUp, 0x9a, false, true));
    assert!(send(DeliveryMode::Nmi, 0, false, true));
    assert!(send(DeliveryMode::Smi, 0, false, true));
    assert!(!send(DeliveryMode::ExtInt, 0, false, true));
    assert_eq!(machine.apic.start_up_vector(), 0x9a);
    assert_eq!(machine.apic.take_events(event::INIT | event::START_UP), event::INIT | event::START_UP);
    assert_eq!(machine.apic.events(), event::NMI | event::SMI);
    assert!(send(DeliveryMode::StartUp, 1, false, true));
    assert!(send(DeliveryMode::Init, 0, false, true));
    assert_eq!(machine.apic.events() & event::START_UP, 0, "INIT drops a start-up IPI before it");
}

#[test]
fn icr_sends_what_its_fields_say() {
    let machine = Machine::enabled();
    machine.write(0x310, 0x0700_0000);
    machine.write(0x300, 0x0000_4841);
    machine.write(0x300, 0x000c_4500);
    machine.write(0x300, 0x0004_0022);
    machine.write(0x300, 0x0008_4400);
    let sent = std::mem::take(&mut *machine.wires.ipis.lock());
    let fixed = Message { vector: 0x41, logical: true, dest: 7, ..message(DeliveryMode::Fixed, 0, false) };
    assert_eq!(sent[0], (Shorthand::None, fixed));
    assert_eq!((sent[1].0, sent[1].1.mode), (Shorthand::Others, DeliveryMode::Init));
    assert_eq!((sent[2].0, sent[2].1.vector), (Shorthand::ToSelf, 0x22));
    assert_eq!((sent[3].0, sent[3].1.mode), (Shorthand::All, DeliveryMode::Nmi));
    machine.write(0x300, 0x0000_0300);
    assert!(machine.wires.ipis.lock().is_empty(), "a reserved delivery mode");
}

/// SDM Vol. 3 "Error Handling".
#[test]
fn errors_show_after_a_write_of_esr() {
    let machine = Machine::enabled();
    machine.write(at::LVT_ERROR, 0xfe);
    machine.write(0x300, 0x0000_0005);
    assert!(machine.wires.ipis.lock().is_empty());
    assert_eq!(machine.apic.pending(), Some(0xfe));
    assert!(!machine.fixed(0x0f));
    machine.read(0x40);
    assert_eq!(machine.read(at::ESR), 0);
    machine.write(at::ESR, 0);
    assert_eq!(machine.read(at::ESR), 0xe0);
    machine.write(at::ESR, 0);
    assert_eq!(machine.read(at::ESR), 0);
}

/// SDM Vol. 3 "Determining IPI Destination".
#[test]
fn destinations() {
    let machine = Machine::enabled();
    let is = |dest, logical| machine.apic.is_addressed(dest, logical, true);
    assert!(is(3, false) && !is(4, false) && is(0xff, false));
    machine.write(at::LDR, 0x2200_0000);
    assert!(is(0x02, true) && is(0x21, true) && !is(0x11, true) && is(0xff, true), "flat model");
    machine.write(at::DFR, 0x0fff_ffff);
    assert!(is(0x22, true) && is(0x23, true) && !is(0x24, true) && !is(0x12, true) && is(0xff, true), "cluster model");
    machine.write(at::ID, 0x0900_0000);
    assert!(is(9, false) && !is(3, false));

    let machine = Machine::x2apic(0x123);
    let is = |dest, logical| machine.apic.is_addressed(dest, logical, true);
    assert!(is(0x123, false) && !is(0x23, false) && is(0xffff_ffff, false) && !is(0xff, false));
    assert_eq!(machine.rdmsr(0x80d), Some(0x0012_0008), "cluster 12H, bit 3");
    assert!(is(0x0012_0008, true) && is(0x0012_ffff, true) && !is(0x0012_0004, true) && !is(0x0013_0008, true));
    assert!(machine.apic.is_addressed(0xff, false, false), "a device's broadcast");
}

/// SDM Vol. 3 "x2APIC Register Address Space", table of MSRs.
#[test]
fn x2apic_registers_fault_where_the_manual_says() {
    let machine = Machine::x2apic(5);
    assert_eq!(machine.rdmsr(0x802), Some(5));
    for read_only in [0x802, 0x803, 0x80a, 0x80d, 0x810, 0x818, 0x820, 0x839] {
        assert!(machine.rdmsr(read_only).is_some() && machine.wrmsr(read_only, 0).is_none(), "{read_only:#x}");
    }
    for absent in [0x800, 0x809, 0x80c, 0x80e, 0x831, 0x840, 0x8ff] {
        assert!(machine.rdmsr(absent).is_none() && machine.wrmsr(absent, 0).is_none(), "{absent:#x}");
    }
    for write_only in [0x80b, 0x83f] {
        assert!(machine.rdmsr(write_only).is_none(), "{write_only:#x}");
    }
    assert!(machine.wrmsr(0x80b, 0).is_some() && machine.wrmsr(0x80b, 1).is_none());
    assert!(machine.wrmsr(0x828, 0).is_some() && machine.wrmsr(0x828, 1).is_none());
    for (register, value) in [(0x808, 0x100), (0x80f, 0x1_0000), (0x832, 0x8_0000), (0x83e, 0x10), (0x838, 1 << 32)] {
        assert!(machine.wrmsr(register, value).is_none(), "{register:#x} has reserved bits");
    }
    machine.wrmsr(0x830, 0x1234_5678_0000_0041).unwrap();
    assert_eq!(machine.rdmsr(0x830), Some(0x1234_5678_0000_0041));
    machine.wrmsr(0x83f, 0x42).unwrap();
    let sent = machine.wires.ipis.lock();
    assert_eq!((sent[0].1.dest, sent[0].1.vector), (0x1234_5678, 0x41));
    assert_eq!((sent[1].0, sent[1].1.vector), (Shorthand::ToSelf, 0x42));
    // Status bits are no reserved bits: Linux writes them on its way out.
    machine.wrmsr(0x835, 0x5700).unwrap();
    assert_eq!(machine.rdmsr(0x835), Some(0x700));
    let other = Machine::enabled();
    assert!(other.rdmsr(0x808).is_none(), "no MSRs in xAPIC mode");
}

#[test]
fn every_register_of_the_table_is_an_msr_or_says_not() {
    let machine = Machine::x2apic(5);
    machine.apic.set_cmci(true);
    for reg in REGS {
        let index = 0x800 + reg.offset / STEP;
        assert_eq!(machine.rdmsr(index).is_some(), !reg.memory_only && !reg.write_only, "{}", reg.name);
        assert!(find(REGS, STEP, reg.offset).is_some());
    }
}

/// `kvm_apic_after_set_mcg_cap`.
#[test]
fn the_entry_of_corrected_machine_checks_is_there_if_it_is_offered() {
    let machine = Machine::enabled();
    assert_eq!(machine.read(0x030), VERSION);
    machine.write(0x2f0, 0x40);
    assert_eq!((machine.read(0x2f0), machine.apic.corrected_machine_check()), (0, false));
    machine.apic.set_cmci(true);
    assert_eq!((machine.read(0x2f0), machine.read(0x030)), (0x1_0000, 0x0006_0014));
    assert!(!machine.apic.corrected_machine_check(), "masked");
    machine.write(0x2f0, 0x40);
    assert!(machine.apic.corrected_machine_check());
    assert_eq!(machine.apic.pending(), Some(0x40));
    // Software disables the APIC.
    machine.write(0x0f0, 0xff);
    assert_eq!(machine.read(0x2f0), 0x1_0040);
}

#[test]
fn one_shot_timer_counts_down_once() {
    let mut machine = Machine::enabled();
    machine.write(at::LVT_TIMER, 0x50);
    machine.write(at::DIVIDE, 0x3);
    machine.write(at::INITIAL_COUNT, 1000);
    assert_eq!(machine.apic.deadline(), Deadline::Ns(1_016_000));
    machine.at(1_008_000);
    assert_eq!((machine.read(at::CURRENT_COUNT), machine.apic.pending()), (500, None));
    machine.at(1_016_000);
    assert_eq!((machine.read(at::CURRENT_COUNT), machine.apic.acknowledge()), (0, Some(0x50)));
    machine.write(0xb0, 0);
    machine.at(9_000_000);
    assert_eq!((machine.apic.pending(), machine.apic.deadline()), (None, Deadline::Never));
}

#[test]
fn periodic_timer_goes_on_and_zero_stops_it() {
    let mut machine = Machine::enabled();
    machine.write(at::LVT_TIMER, 0x2_0050);
    machine.write(at::DIVIDE, 0xb);
    machine.write(at::INITIAL_COUNT, 1_000_000);
    for ns in [2_000_000, 3_100_000, 7_500_000] {
        machine.at(ns);
        assert_eq!(machine.apic.acknowledge(), Some(0x50), "{ns}");
        machine.write(0xb0, 0);
        machine.at(ns + 1);
        assert_eq!(machine.apic.pending(), None);
    }
    assert_eq!((machine.apic.deadline(), machine.read(at::CURRENT_COUNT)), (Deadline::Ns(8_000_000), 499_999));
    machine.write(at::INITIAL_COUNT, 0);
    assert_eq!(machine.apic.deadline(), Deadline::Never);
}

#[test]
fn tsc_deadline_fires_by_the_counter() {
    let mut machine = Machine::enabled();
    machine.apic.set_tsc_deadline(9_000_000);
    assert_eq!(machine.apic.tsc_deadline(), 0, "not in this mode");
    machine.write(at::INITIAL_COUNT, 1000);
    machine.write(at::LVT_TIMER, 0x4_0051);
    assert_eq!(machine.apic.deadline(), Deadline::Never, "a change of mode disarms");
    machine.write(at::INITIAL_COUNT, 1000);
    assert_eq!(machine.read(at::INITIAL_COUNT), 0);
    machine.apic.set_tsc_deadline(10_000_000);
    assert_eq!(machine.apic.deadline(), Deadline::Tsc(10_000_000));
    machine.at(1_999_999);
    assert_eq!(machine.apic.pending(), None);
    machine.at(2_000_000);
    assert_eq!((machine.apic.pending(), machine.apic.tsc_deadline()), (Some(0x51), 0));
}

#[test]
fn masked_timer_runs_without_an_interrupt() {
    let mut machine = Machine::enabled();
    machine.write(at::LVT_TIMER, 0x1_0050);
    machine.write(at::INITIAL_COUNT, 1000);
    machine.at(5_000_000);
    assert_eq!((machine.apic.pending(), machine.apic.deadline()), (None, Deadline::Never));
}

#[test]
fn pic_comes_through_lint0() {
    let bsp = Machine::new(0, DEFAULT | EN | BSP);
    assert!(bsp.apic.accepts_pic());
    let machine = Machine::enabled();
    assert!(!machine.apic.accepts_pic());
    machine.write(at::LVT_LINT0, 0x700);
    assert!(machine.apic.accepts_pic());
    machine.write(at::LVT_LINT0, 0x1_0700);
    assert!(!machine.apic.accepts_pic());
    machine.apic.set_base(DEFAULT);
    assert!(machine.apic.accepts_pic(), "a disabled APIC is a wire");
}

#[test]
fn lint1_delivers_as_its_entry_says() {
    let machine = Machine::enabled();
    assert!(!machine.apic.lint1(), "masked");
    machine.write(at::LVT_LINT1, 0x400);
    assert!(machine.apic.lint1());
    assert_eq!(machine.apic.take_events(event::NMI), event::NMI);
}

/// SDM Vol. 3 "Local Vector Table", delivery mode 010. An entry without one is fixed.
#[test]
fn entries_with_a_delivery_mode_deliver_smis() {
    type Fire = fn(&Lapic) -> bool;
    let machine = Machine::enabled();
    let sources: [(u32, Fire); 3] = [
        (at::LVT_LINT0, Lapic::lint0),
        (at::LVT_LINT1, Lapic::lint1),
        (at::LVT_PERFORMANCE, Lapic::performance_interrupt),
    ];
    for (entry, fire) in sources {
        machine.write(entry, 0x1_0200);
        assert!(!fire(&machine.apic), "{entry:x}: masked");
        machine.write(entry, 0x200);
        assert!(fire(&machine.apic), "{entry:x}");
        assert_eq!(machine.apic.take_events(u32::MAX), event::SMI, "{entry:x}");
        assert_eq!(machine.apic.pending(), None, "{entry:x}: no vector");
    }
    assert!(!machine.apic.performance_interrupt(), "it masked itself");
}

#[test]
fn page_travels() {
    let mut machine = Machine::enabled();
    machine.write(at::LVT_TIMER, 0x2_0050);
    machine.write(at::INITIAL_COUNT, 1_000_000);
    machine.fixed(0x77);
    machine.at(1_500_000);
    let page = machine.apic.page(machine.now, false).unwrap();
    assert_eq!((page[0x20 / 4], page[0x390 / 4]), (3 << 24, 750_000));
    let other = Machine::new(3, DEFAULT | EN);
    other.apic.load_page(&page, Now { ns: 100, tsc: 0 }, false).unwrap();
    assert_eq!(other.apic.pending(), Some(0x77));
    assert_eq!(other.apic.deadline(), Deadline::Ns(100 + 1_500_000));
    let mut again = other.apic.page(Now { ns: 100, tsc: 0 }, false).unwrap();
    again[0x390 / 4] = page[0x390 / 4];
    assert_eq!(again, page);
    let machine = Machine::x2apic(0x21);
    let page = machine.apic.page(machine.now, false).unwrap();
    assert_eq!((page[0x20 / 4], page[0xd0 / 4]), (0x21 << 24, 0x0002_0002));
}

/// What `set_target_expiration` in lapic.c makes of the current count when `KVM_SET_LAPIC` loads it.
#[test]
fn a_loaded_timer_that_ran_out_unseen_fires_at_once() {
    let mut machine = Machine::enabled();
    machine.write(at::LVT_TIMER, 0x50);
    machine.write(at::DIVIDE, 0xb);
    machine.write(at::INITIAL_COUNT, 1000);
    // Its time passes while the vCPU does not run, so nobody has asked for the interrupt when the page is read.
    machine.now.ns += 5000;
    let mut page = machine.apic.page(machine.now, false).unwrap();
    assert_eq!((page[0x390 / 4], machine.apic.pending()), (0, None));
    let load = |page: &[u32; 256]| {
        let other = Machine::new(3, DEFAULT | EN);
        other.apic.load_page(page, Now { ns: 100, tsc: 0 }, false).unwrap();
        other
    };
    let other = load(&page);
    assert_eq!(other.apic.deadline(), Deadline::Ns(100));
    other.apic.advance(Now { ns: 100, tsc: 0 });
    assert_eq!((other.apic.acknowledge(), other.apic.deadline()), (Some(0x50), Deadline::Never));
    // More than the initial count is the initial count.
    page[0x390 / 4] = 4000;
    assert_eq!(load(&page).apic.deadline(), Deadline::Ns(100 + 1000));
    // A periodic one begins a period, a stopped one stays so.
    page[0x320 / 4] = 0x2_0050;
    (page[0x380 / 4], page[0x390 / 4]) = (1_000_000, 0);
    assert_eq!(load(&page).apic.deadline(), Deadline::Ns(100 + 1_000_000));
    page[0x380 / 4] = 0;
    assert_eq!(load(&page).apic.deadline(), Deadline::Never);
}

#[test]
fn init_keeps_the_id_and_drops_the_rest() {
    let machine = Machine::enabled();
    machine.write(at::INITIAL_COUNT, 1000);
    machine.fixed(0x50);
    machine.apic.init(true);
    assert_eq!((machine.read(at::ID), machine.read(at::SVR), machine.read(0x220)), (3 << 24, 0xff, 0));
    assert_eq!(machine.apic.deadline(), Deadline::Never);
}
