//! Several APICs and the chips, wired.

use std::sync::Arc;

use parking_lot::Mutex;
use x86_defs::msr::apic_base::{BSP, DEFAULT, EN};

use super::*;
use crate::Now;
use crate::lapic::{Wake, event};

struct Silent;
impl Wake for Silent {
    fn wake(&self) {}
}

#[derive(Default)]
struct Told {
    ended: Mutex<Vec<Route>>,
    eois: Mutex<Vec<u8>>,
    events: Mutex<Vec<(u32, u32)>>,
}

impl Listener for Arc<Told> {
    fn ended(&self, chip: Route) {
        self.ended.lock().push(chip);
    }

    fn eoi_for_user(&self, _: &Lapic, vector: u8) {
        self.eois.lock().push(vector);
    }

    fn event(&self, vcpu: u32, port: u32) -> i32 {
        self.events.lock().push((vcpu, port));
        port as i32 - 1
    }
}

const NOW: Now = Now { ns: 0, tsc: 0 };

fn machine(split: bool, count: u32) -> (Irqchip, Arc<Told>) {
    let told = Arc::<Told>::default();
    let chip = Irqchip::new(split.then_some(24), 64, Box::new(told.clone()));
    for id in 0..count {
        let base = DEFAULT | EN | if id == 0 { BSP } else { 0 };
        assert!(chip.add_lapic(Arc::new(Lapic::new(id, base, Arc::new(Silent)))));
        write(&chip, id, 0xf0, 0x1ff);
        write(&chip, id, 0xd0, 1 << (24 + id));
    }
    (chip, told)
}

fn write(chip: &Irqchip, id: u32, offset: u32, value: u32) {
    chip.lapic(id).unwrap().write(offset, 4, value, chip, NOW);
}

fn pending(chip: &Irqchip) -> Vec<Option<u8>> {
    (0..4).map(|id| chip.lapic(id).unwrap().pending()).collect()
}

#[test]
fn ids_are_taken_once() {
    let (chip, _) = machine(false, 1);
    let apic = |id| Arc::new(Lapic::new(id, DEFAULT | EN, Arc::new(Silent)));
    assert!(!chip.add_lapic(apic(0)) && !chip.add_lapic(apic(64)) && chip.add_lapic(apic(63)));
}

#[test]
fn shorthands_and_destinations_reach_whom_they_name() {
    for (high, low, expected) in [
        (2, 0x4041, [None, None, Some(0x41), None]),
        (0xff, 0x4041, [Some(0x41); 4]),
        (0x0a, 0x4841, [None, Some(0x41), None, Some(0x41)]),
        (0, 0x4_4041, [None, Some(0x41), None, None]),
        (0, 0x8_4041, [Some(0x41); 4]),
        (0, 0xc_4041, [Some(0x41), None, Some(0x41), Some(0x41)]),
    ] {
        let (chip, _) = machine(false, 4);
        write(&chip, 1, 0x310, high << 24);
        write(&chip, 1, 0x300, low);
        assert_eq!(pending(&chip), expected, "{high:#x} {low:#x}");
    }
}

#[test]
fn lowest_priority_goes_round() {
    let (chip, _) = machine(false, 4);
    for _ in 0..4 {
        assert_eq!(chip.signal_msi(0xfee0_f004, 0x0151), 1);
    }
    assert_eq!(pending(&chip), [Some(0x51); 4]);
}

#[test]
fn init_and_start_up_reach_the_other_processors() {
    let (chip, _) = machine(false, 4);
    write(&chip, 0, 0x300, 0xc_4500);
    write(&chip, 0, 0x300, 0xc_4608);
    for id in 0..4 {
        let events = chip.lapic(id).unwrap().events();
        assert_eq!(events, if id == 0 { 0 } else { event::INIT | event::START_UP });
    }
}

#[test]
fn moved_ids_are_found() {
    let (chip, _) = machine(false, 4);
    write(&chip, 1, 0x20, 0x2000_0000);
    write(&chip, 0, 0x310, 0x2000_0000);
    write(&chip, 0, 0x300, 0x4041);
    assert_eq!(pending(&chip), [None, Some(0x41), None, None]);
}

#[test]
fn default_routes_reach_both_chips() {
    let (chip, _) = machine(false, 1);
    chip.with_ioapic(|ioapic| {
        ioapic.write(0, 0x10 + 2 * 4, &chip);
        ioapic.write(0x10, 0x34, &chip);
    });
    assert_eq!(chip.set_gsi(4, SOURCE_USER, true), 2);
    assert_eq!(chip.lapic(0).unwrap().pending(), Some(0x34));
    assert!(chip.pic_output());
    assert_eq!(chip.set_gsi(200, SOURCE_USER, true), -1);
}

#[test]
fn level_is_told_of_its_end_and_comes_again() {
    let (chip, told) = machine(false, 1);
    chip.with_ioapic(|ioapic| {
        ioapic.write(0, 0x10 + 2 * 20, &chip);
        ioapic.write(0x10, 0x8034, &chip);
    });
    chip.set_gsi(20, SOURCE_USER, true);
    let apic = chip.lapic(0).unwrap();
    assert_eq!(apic.acknowledge(), Some(0x34));
    write(&chip, 0, 0xb0, 0);
    assert_eq!(*told.ended.lock(), [Route::IoApic(20)]);
    assert_eq!(apic.acknowledge(), Some(0x34), "still high");
    chip.set_gsi(20, SOURCE_USER, false);
    write(&chip, 0, 0xb0, 0);
    assert_eq!(apic.pending(), None);
}

#[test]
fn split_tells_user_space_of_levels() {
    let (chip, told) = machine(true, 2);
    assert!(chip.is_split() && !chip.pic_output());
    chip.set_routes(vec![(3, Route::Msi { address: 0xfee0_0000, data: 0x8045 })]);
    assert_eq!(chip.set_gsi(3, SOURCE_USER, true), 1);
    assert_eq!(chip.set_gsi(3, SOURCE_USER, false), -1, "a message has no low");
    assert_eq!(chip.lapic(0).unwrap().acknowledge(), Some(0x45));
    write(&chip, 0, 0xb0, 0);
    assert_eq!(*told.eois.lock(), [0x45]);
}

/// `kvm_set_irq`, `evtchn_set_fn`
#[test]
fn events_are_the_listeners() {
    let (chip, told) = machine(false, 1);
    chip.set_routes([0, 1, 2].map(|port| (30 + port, Route::Event { vcpu: 7, port })).to_vec());
    assert_eq!([30, 31, 32].map(|gsi| chip.set_gsi(gsi, SOURCE_USER, true)), [-1, 0, 1]);
    assert_eq!(*told.events.lock(), [(7, 0), (7, 1), (7, 2)]);
    assert_eq!(chip.set_gsi(31, SOURCE_USER, false), -1, "an event has no low");
    assert_eq!(told.events.lock().len(), 3);
}

#[test]
fn timer_ticks_on_input_0() {
    let (chip, _) = machine(false, 1);
    assert!(chip.add_pit(Pit::new()) && !chip.add_pit(Pit::new()));
    for (port, value) in [(0x43, 0x34), (0x40, 0), (0x40, 0x10)] {
        chip.with_pit(|pit| pit.write(port, value, 0));
    }
    let next = chip.with_pit(|pit| pit.next()).unwrap().unwrap();
    assert!(!chip.pic_output());
    let later = chip.advance_pit(next).unwrap();
    assert!(chip.pic_output() && later > next);
    chip.advance_pit(later);
    assert_eq!(chip.with_pic(|pic| (pic.acknowledge(), pic.output())), Some((0, false)));
    chip.with_pic(|pic| pic.write(0x20, 0x20));
    assert!(!chip.pic_output());
    chip.gsi_ended(0);
    assert!(chip.pic_output(), "the tick that waited");
}
