//! The pair of 8259A interrupt controllers of a PC, the second behind input 2 of the first. Data sheet "8259A
//! Programmable Interrupt Controller"; edge/level control registers as in the 82371SB's.
//!
//! Where a guest can tell, this follows KVM (i8259.c): ICW1's single and level bits are ignored (a PC has two, and ELCR
//! decides), and ICW3 is taken as wired.

/// Port of the first controller's A0 = 0; the second's is `PORTS[1]`. A0 = 1 is the port behind.
pub const PORTS: [u16; 2] = [0x20, 0xa0];
/// Ports of the edge/level control registers.
pub const ELCR_PORTS: [u16; 2] = [0x4d0, 0x4d1];
/// Inputs that may be level-triggered: not the timer, keyboard, cascade; not RTC and FPU.
const ELCR_MASKS: [u8; 2] = [0xf8, 0xde];
/// The input of the first controller that the second drives.
const CASCADE: u8 = 2;
/// What a controller answers when its request went away before the acknowledge.
const SPURIOUS: u8 = 7;
/// Inputs of both.
pub const PINS: u8 = 16;

/// Bits of the command words.
mod word {
    pub(super) const ICW1: u8 = 0x10;
    pub(super) const ICW1_IC4: u8 = 0x01;
    pub(super) const ICW4_AEOI: u8 = 0x02;
    pub(super) const ICW4_SFNM: u8 = 0x10;
    pub(super) const OCW3: u8 = 0x08;
    pub(super) const OCW3_RIS: u8 = 0x01;
    pub(super) const OCW3_RR: u8 = 0x02;
    pub(super) const OCW3_POLL: u8 = 0x04;
    pub(super) const OCW3_SMM: u8 = 0x20;
    pub(super) const OCW3_ESMM: u8 = 0x40;
}

/// Which initialisation word comes next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Expects {
    /// None: port 1 is the mask (OCW1).
    #[default]
    Ocw1 = 0,
    /// ICW2.
    Icw2 = 1,
    /// ICW3.
    Icw3 = 2,
    /// ICW4.
    Icw4 = 3,
}

/// One 8259A.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Controller {
    /// Level of each input, for edges.
    pub lines: u8,
    /// Interrupt request register.
    pub irr: u8,
    /// Interrupt mask register.
    pub imr: u8,
    /// In-service register.
    pub isr: u8,
    /// Input of the highest priority.
    pub first: u8,
    /// Vector of input 0.
    pub base: u8,
    /// Reads of port 0 show ISR, not IRR.
    pub reads_isr: bool,
    /// The next read polls.
    pub poll: bool,
    /// Special mask mode.
    pub special_mask: bool,
    /// Initialisation.
    pub expects: Expects,
    /// Automatic end of interrupt.
    pub auto_eoi: bool,
    /// Rotate in automatic EOI mode.
    pub rotate_on_auto_eoi: bool,
    /// Special fully nested mode.
    pub special_fully_nested: bool,
    /// ICW1 announced ICW4.
    pub wants_icw4: bool,
    /// Edge/level control: set bits are level-triggered.
    pub elcr: u8,
    /// Inputs that may be. Travels with the rest, as KVM's does.
    pub elcr_mask: u8,
}

impl Controller {
    /// Position of the highest of `inputs` in the present order of priority; 8 if there is none.
    fn priority(&self, inputs: u8) -> u8 {
        inputs.rotate_right(self.first.into()).trailing_zeros() as u8
    }

    fn input_at(&self, priority: u8) -> u8 {
        priority + self.first & 7
    }

    /// The input that INT is raised for. `master`: in special fully nested mode its cascade input may nest.
    fn request(&self, master: bool) -> Option<u8> {
        let wanted = self.priority(self.irr & !self.imr);
        let mut serving = self.isr;
        if self.special_mask {
            serving &= !self.imr;
        }
        if self.special_fully_nested && master {
            serving &= !(1 << CASCADE);
        }
        (wanted < self.priority(serving)).then(|| self.input_at(wanted))
    }

    /// INTA for `input`. True: it is over at once (automatic EOI).
    fn acknowledge(&mut self, input: u8) -> bool {
        if self.elcr & 1 << input == 0 {
            self.irr &= !(1 << input);
        }
        if !self.auto_eoi {
            self.isr |= 1 << input;
            return false;
        }
        if self.rotate_on_auto_eoi {
            self.first = input + 1 & 7;
        }
        true
    }

    /// A new level of an input. False: the request was there already.
    fn set_line(&mut self, input: u8, level: bool) -> bool {
        let bit = 1 << input;
        let mut new = true;
        if self.elcr & bit != 0 {
            self.irr = if level { self.irr | bit } else { self.irr & !bit };
        } else if level && self.lines & bit == 0 {
            new = self.irr & bit == 0;
            self.irr |= bit;
        }
        self.lines = if level { self.lines | bit } else { self.lines & !bit };
        new
    }

    /// ICW1. Level inputs that stand stay requested; what was in service is returned.
    fn initialise(&mut self, icw1: u8) -> u8 {
        let ended = self.isr | self.irr & !self.elcr;
        *self = Self {
            lines: self.lines,
            irr: self.irr & self.elcr,
            first: 0,
            // i8259.c keeps what ICW1 does not reach until ICW2 to ICW4 come.
            base: self.base,
            elcr: self.elcr,
            elcr_mask: self.elcr_mask,
            expects: Expects::Icw2,
            wants_icw4: icw1 & word::ICW1_IC4 != 0,
            ..Self::default()
        };
        ended
    }

    /// OCW2: bits 7:5 are R, SL, EOI. Inputs whose service ended.
    fn ocw2(&mut self, value: u8) -> u8 {
        let named = value & 7;
        let (rotate, specific, eoi) = (value & 0x80 != 0, value & 0x40 != 0, value & 0x20 != 0);
        match (specific, eoi) {
            (false, false) => self.rotate_on_auto_eoi = rotate,
            (true, false) if rotate => self.first = named + 1 & 7,
            (true, false) => {}
            (_, true) => {
                let input = if specific {
                    named
                } else {
                    match self.priority(self.isr) {
                        8 => return 0,
                        priority => self.input_at(priority),
                    }
                };
                if rotate {
                    self.first = input + 1 & 7;
                }
                let ended = self.isr & 1 << input;
                self.isr &= !(1 << input);
                return ended;
            }
        }
        0
    }

    fn ocw3(&mut self, value: u8) {
        if value & word::OCW3_POLL != 0 {
            self.poll = true;
        }
        if value & word::OCW3_RR != 0 {
            self.reads_isr = value & word::OCW3_RIS != 0;
        }
        if value & word::OCW3_ESMM != 0 {
            self.special_mask = value & word::OCW3_SMM != 0;
        }
    }

    fn write_data(&mut self, value: u8) {
        match self.expects {
            Expects::Ocw1 => self.imr = value,
            Expects::Icw2 => {
                self.base = value & 0xf8;
                self.expects = Expects::Icw3;
            }
            Expects::Icw3 => self.expects = if self.wants_icw4 { Expects::Icw4 } else { Expects::Ocw1 },
            Expects::Icw4 => {
                self.special_fully_nested = value & word::ICW4_SFNM != 0;
                self.auto_eoi = value & word::ICW4_AEOI != 0;
                self.expects = Expects::Ocw1;
            }
        }
    }
}

/// Both controllers.
#[derive(Clone, Debug)]
pub struct Pic {
    chips: [Controller; 2],
    /// Level of the first one's INT.
    output: bool,
    /// Sources that hold each input, ORed.
    sources: [u32; PINS as usize],
    /// Inputs whose service has ended since somebody asked.
    ended: u16,
}

impl Default for Pic {
    fn default() -> Self {
        Self::new()
    }
}

impl Pic {
    /// After power-on.
    pub fn new() -> Self {
        let chips = ELCR_MASKS.map(|elcr_mask| Controller { elcr_mask, ..Controller::default() });
        Self { chips, output: false, sources: [0; PINS as usize], ended: 0 }
    }

    /// INTR towards the processor.
    pub fn output(&self) -> bool {
        self.output
    }

    /// Inputs whose service has ended since the last call: bit n is input n.
    pub fn take_ended(&mut self) -> u16 {
        std::mem::take(&mut self.ended)
    }

    /// `source` holds input `pin` high, or lets go. What `KVM_IRQ_LINE_STATUS` tells: −1: masked, 0: it was there already,
    /// 1: taken.
    pub fn set_line(&mut self, pin: u8, source: u8, level: bool) -> i32 {
        let held = &mut self.sources[usize::from(pin)];
        *held = if level { *held | 1 << source } else { *held & !(1 << source) };
        let level = *held != 0;
        let chip = &mut self.chips[usize::from(pin >> 3)];
        let new = chip.set_line(pin & 7, level);
        let masked = chip.imr & 1 << (pin & 7) != 0;
        self.update();
        if masked { -1 } else { new.into() }
    }

    /// Nothing of `source` holds any input.
    pub fn forget_source(&mut self, source: u8) {
        for pin in 0..PINS {
            if self.sources[usize::from(pin)] & 1 << source != 0 {
                self.set_line(pin, source, false);
            }
        }
    }

    /// Unless a service has ended: devices are told of that first, for a line that they let go then makes no request
    /// (`pic_clear_isr`). [`Self::update`] follows.
    fn settle(&mut self) {
        if self.ended == 0 {
            self.update();
        }
    }

    /// INTR is what the inputs say.
    pub fn update(&mut self) {
        let [first, second] = &mut self.chips;
        let slave = second.request(false).is_some();
        if slave {
            // The cascade is a line like any other, pulsed for every look.
            first.set_line(CASCADE, true);
            first.set_line(CASCADE, false);
        }
        self.output = first.request(true).is_some();
    }

    fn ended(&mut self, chip: usize, inputs: u8) {
        self.ended |= u16::from(inputs) << (8 * chip);
    }

    /// Two INTA cycles: the vector. A request that went away gives the spurious vector.
    pub fn acknowledge(&mut self) -> u8 {
        let input = self.chips[0].request(true);
        let vector = match input {
            None => self.chips[0].base + SPURIOUS,
            Some(CASCADE) => {
                let inner = self.chips[1].request(false);
                self.acknowledged(0, CASCADE);
                if let Some(inner) = inner {
                    self.acknowledged(1, inner);
                }
                self.chips[1].base + inner.unwrap_or(SPURIOUS)
            }
            Some(input) => {
                self.acknowledged(0, input);
                self.chips[0].base + input
            }
        };
        self.settle();
        vector
    }

    fn acknowledged(&mut self, chip: usize, input: u8) {
        if self.chips[chip].acknowledge(input) {
            self.ended(chip, 1 << input);
        }
    }

    /// OUT to `port` of [`PORTS`], the one behind it, or [`ELCR_PORTS`].
    pub fn write(&mut self, port: u16, value: u8) {
        if let Some(chip) = ELCR_PORTS.iter().position(|&p| p == port) {
            self.chips[chip].elcr = value & self.chips[chip].elcr_mask;
            return;
        }
        let chip = usize::from(port & !1 == PORTS[1]);
        let controller = &mut self.chips[chip];
        let ended = match port & 1 {
            1 => {
                controller.write_data(value);
                0
            }
            _ if value & word::ICW1 != 0 => controller.initialise(value),
            _ if value & word::OCW3 != 0 => {
                controller.ocw3(value);
                0
            }
            _ => controller.ocw2(value),
        };
        self.ended(chip, ended);
        self.settle();
    }

    /// IN from the same ports.
    pub fn read(&mut self, port: u16) -> u8 {
        if let Some(chip) = ELCR_PORTS.iter().position(|&p| p == port) {
            return self.chips[chip].elcr;
        }
        let chip = usize::from(port & !1 == PORTS[1]);
        if std::mem::take(&mut self.chips[chip].poll) {
            return self.poll(chip);
        }
        let controller = &self.chips[chip];
        match port & 1 {
            1 => controller.imr,
            _ if controller.reads_isr => controller.isr,
            _ => controller.irr,
        }
    }

    /// The read behind a poll command is an INTA: bit 7, a request was there; bits 2:0, which.
    fn poll(&mut self, chip: usize) -> u8 {
        let request = self.chips[chip].request(chip == 0);
        if let Some(input) = request {
            if chip == 1 {
                self.acknowledged(0, CASCADE);
            }
            self.acknowledged(chip, input);
        }
        self.settle();
        request.map_or(SPURIOUS, |input| 0x80 | input)
    }

    /// One controller, 0 or 1.
    pub fn controller(&self, chip: usize) -> Controller {
        self.chips[chip]
    }

    /// Loads one controller, 0 or 1.
    pub fn set_controller(&mut self, chip: usize, controller: Controller) {
        self.chips[chip] = controller;
        self.settle();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Initialised as a PC's firmware does: bases 08H and 70H, 8086 mode.
    fn pc() -> Pic {
        let mut pic = Pic::new();
        init(&mut pic, 0x01);
        pic
    }

    fn init(pic: &mut Pic, icw4: u8) {
        for (port, words) in [(0x20, [0x11, 0x08, 0x04, icw4]), (0xa0, [0x11, 0x70, 0x02, icw4])] {
            pic.write(port, words[0]);
            for word in &words[1..] {
                pic.write(port + 1, *word);
            }
        }
    }

    fn pulse(pic: &mut Pic, pin: u8) {
        pic.set_line(pin, 0, true);
        pic.set_line(pin, 0, false);
    }

    #[test]
    fn vectors_come_in_the_order_of_priority_and_nest() {
        let mut pic = pc();
        pulse(&mut pic, 4);
        assert_eq!(pic.acknowledge(), 0x0c);
        pulse(&mut pic, 5);
        assert!(!pic.output(), "lower priority waits");
        pulse(&mut pic, 1);
        assert_eq!(pic.acknowledge(), 0x09, "higher priority nests");
        pic.write(0x20, 0x20);
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), 0x0d);
        assert_eq!(pic.take_ended(), 1 << 1 | 1 << 4);
    }

    #[test]
    fn second_controller_answers_through_the_cascade() {
        let mut pic = pc();
        pulse(&mut pic, 14);
        assert!(pic.output());
        assert_eq!(pic.acknowledge(), 0x76);
        assert_eq!((pic.controller(0).isr, pic.controller(1).isr), (1 << 2, 1 << 6));
        pulse(&mut pic, 3);
        assert!(!pic.output(), "behind input 2");
        pic.write(0xa0, 0x20);
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), 0x0b);
    }

    #[test]
    fn a_request_that_went_away_is_spurious() {
        let mut pic = pc();
        assert_eq!(pic.acknowledge(), 0x0f);
        assert_eq!(pic.controller(0).isr, 0, "and is not in service");
        pic.write(0x4d1, 0x02);
        pic.set_line(9, 0, true);
        pic.set_line(9, 0, false);
        assert_eq!(pic.acknowledge(), 0x77, "spurious of the second");
        assert_eq!((pic.controller(0).isr, pic.controller(1).isr), (1 << 2, 0));
    }

    #[test]
    fn mask_holds_requests_back() {
        let mut pic = pc();
        pic.write(0x21, 0x10);
        assert_eq!(pic.set_line(4, 0, true), -1);
        assert!(!pic.output());
        assert_eq!(pic.read(0x21), 0x10);
        assert_eq!(pic.read(0x20), 0x10, "IRR");
        pic.write(0x21, 0);
        assert_eq!(pic.acknowledge(), 0x0c);
        pic.write(0x20, 0x0b);
        assert_eq!(pic.read(0x20), 0x10, "ISR");
    }

    #[test]
    fn edges_count_once_and_levels_come_again() {
        let mut pic = pc();
        assert_eq!(pic.set_line(3, 0, true), 1);
        assert_eq!(pic.acknowledge(), 0x0b);
        pic.write(0x20, 0x20);
        assert!(!pic.output(), "still high, no new edge");
        pic.write(0x4d1, 0xff);
        assert_eq!(pic.read(0x4d1), 0xde);
        pic.set_line(10, 0, true);
        assert_eq!(pic.acknowledge(), 0x72);
        pic.take_ended();
        pic.write(0xa0, 0x62);
        told(&mut pic, 1 << 10);
        pic.write(0x20, 0x62);
        told(&mut pic, 1 << CASCADE);
        assert!(pic.output(), "still high");
        pic.set_line(10, 0, false);
        assert!(pic.output(), "the cascade's edge was latched");
    }

    /// Devices have been told of what ended.
    fn told(pic: &mut Pic, ended: u16) {
        assert_eq!(pic.take_ended(), ended);
        pic.update();
    }

    /// `pic_clear_isr`: who lets its line go when it is told of the end leaves no request at the cascade.
    #[test]
    fn a_line_that_goes_low_at_the_end_of_its_service_requests_nothing() {
        let mut pic = pc();
        pic.write(0x4d1, 4);
        pic.set_line(10, 0, true);
        assert_eq!(pic.acknowledge(), 0x72);
        pic.take_ended();
        pic.write(0xa0, 0x62);
        pic.set_line(10, 0, false);
        told(&mut pic, 1 << 10);
        pic.write(0x20, 0x62);
        told(&mut pic, 1 << CASCADE);
        assert!(!pic.output());
    }

    #[test]
    fn sources_of_one_input_are_ored() {
        let mut pic = pc();
        pic.write(0x4d0, 0x20);
        pic.set_line(5, 0, true);
        pic.set_line(5, 1, true);
        pic.set_line(5, 0, false);
        assert!(pic.output());
        pic.forget_source(1);
        assert!(!pic.output());
    }

    #[test]
    fn rotation_moves_the_lowest_priority() {
        let mut pic = pc();
        pulse(&mut pic, 4);
        assert_eq!(pic.acknowledge(), 0x0c);
        pic.write(0x20, 0xa0);
        for pin in [4, 5] {
            pulse(&mut pic, pin);
        }
        assert_eq!(pic.acknowledge(), 0x0d, "4 is the lowest now");
        pic.write(0x20, 0xe5);
        assert_eq!(pic.acknowledge(), 0x0c);
        pic.write(0x20, 0x64);
        pic.write(0x20, 0xc1);
        for pin in [0, 1] {
            pulse(&mut pic, pin);
        }
        pulse(&mut pic, 3);
        assert_eq!(pic.acknowledge(), 0x0b, "priority was set: 2, 3, … 1");
    }

    #[test]
    fn automatic_eoi_leaves_nothing_in_service() {
        let mut pic = Pic::new();
        init(&mut pic, 0x03);
        pic.write(0x20, 0x80);
        pulse(&mut pic, 6);
        assert_eq!(pic.acknowledge(), 0x0e);
        assert_eq!(pic.controller(0).isr, 0);
        assert_eq!(pic.controller(0).first, 7, "rotates");
        assert_eq!(pic.take_ended(), 1 << 6);
    }

    #[test]
    fn special_mask_lets_lower_priorities_in() {
        let mut pic = pc();
        pulse(&mut pic, 1);
        pic.acknowledge();
        pulse(&mut pic, 6);
        assert!(!pic.output());
        pic.write(0x20, 0x68);
        pic.write(0x21, 0x02);
        assert_eq!(pic.acknowledge(), 0x0e);
    }

    #[test]
    fn special_fully_nested_mode_nests_within_the_second() {
        for (icw4, nests) in [(0x01, false), (0x11, true)] {
            let mut pic = Pic::new();
            init(&mut pic, icw4);
            pulse(&mut pic, 12);
            pic.acknowledge();
            pulse(&mut pic, 8);
            assert_eq!(pic.output(), nests, "{icw4:#x}");
        }
    }

    #[test]
    fn poll_is_an_acknowledge() {
        let mut pic = pc();
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20) & 0x80, 0);
        pulse(&mut pic, 3);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0x83);
        assert_eq!(pic.controller(0).isr, 1 << 3);
        assert!(!pic.output());
    }

    #[test]
    fn initialisation_clears_the_mask_and_what_is_in_service() {
        let mut pic = pc();
        pic.write(0x21, 0xff);
        pulse(&mut pic, 2);
        init(&mut pic, 0x01);
        let chip = pic.controller(0);
        assert_eq!((chip.imr, chip.isr, chip.irr, chip.base), (0, 0, 0, 8));
        // Without ICW4 in ICW1 the third word ends it.
        pic.write(0x20, 0x10);
        pic.write(0x21, 0x40);
        pic.write(0x21, 0x04);
        pic.write(0x21, 0xfe);
        assert_eq!((pic.controller(0).imr, pic.controller(0).base), (0xfe, 0x40));
    }
}
