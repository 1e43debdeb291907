//! KVM's layouts of the chips. `struct kvm_pic_state`, `kvm_ioapic_state` and `kvm_pit_state2` of the header.

use irqchip::ioapic::{self, IoApic};
use irqchip::pic::{Controller, Expects};
use irqchip::pit::{Access, Counter};
use irqchip::{Pit, router};
use kvm_abi::consts::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_FLAGS_HPET_LEGACY,
    KVM_PIT_FLAGS_SPEAKER_DATA_ON,
};
use nix::errno::Errno;

use super::Chip;
use super::alarm::monotonic_ns;

/// `struct kvm_irqchip`: chip_id, padding, 512 bytes.
pub(crate) type Irqchip = [u32; 130];
/// First byte of the union.
const CHIP: usize = 8;
/// `struct kvm_pit_state2`: three channels of six words, flags, padding.
pub(crate) type PitState = [u32; 28];
const CHANNEL_WORDS: usize = 6;
const FLAGS: usize = 18;

fn bytes_of(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn set_bytes(words: &mut [u32], at: usize, bytes: &[u8]) {
    for (i, &byte) in bytes.iter().enumerate() {
        let (word, shift) = ((at + i) / 4, 8 * ((at + i) % 4));
        words[word] = words[word] & !(0xff << shift) | u32::from(byte) << shift;
    }
}

fn pic_bytes(chip: &Controller) -> [u8; 16] {
    [
        chip.lines,
        chip.irr,
        chip.imr,
        chip.isr,
        chip.first,
        chip.base,
        chip.reads_isr.into(),
        chip.poll.into(),
        chip.special_mask.into(),
        chip.expects as u8,
        chip.auto_eoi.into(),
        chip.rotate_on_auto_eoi.into(),
        chip.special_fully_nested.into(),
        chip.wants_icw4.into(),
        chip.elcr,
        chip.elcr_mask,
    ]
}

fn pic_of(bytes: &[u8]) -> Controller {
    Controller {
        lines: bytes[0],
        irr: bytes[1],
        imr: bytes[2],
        isr: bytes[3],
        first: bytes[4] & 7,
        base: bytes[5],
        reads_isr: bytes[6] != 0,
        poll: bytes[7] != 0,
        special_mask: bytes[8] != 0,
        expects: match bytes[9] {
            1 => Expects::Icw2,
            2 => Expects::Icw3,
            3 => Expects::Icw4,
            _ => Expects::Ocw1,
        },
        auto_eoi: bytes[10] != 0,
        rotate_on_auto_eoi: bytes[11] != 0,
        special_fully_nested: bytes[12] != 0,
        wants_icw4: bytes[13] != 0,
        elcr: bytes[14],
        elcr_mask: bytes[15],
    }
}

fn ioapic_bytes(apic: &IoApic) -> Vec<u8> {
    let state = apic.state();
    let mut bytes = state.base.to_le_bytes().to_vec();
    for word in [state.select.into(), state.id.into(), state.irr, 0u32] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(state.entries.iter().flat_map(|entry| entry.to_le_bytes()));
    bytes
}

fn ioapic_of(bytes: &[u8]) -> ioapic::State {
    let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
    let double = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
    ioapic::State {
        base: double(0),
        select: word(8) as u8,
        id: word(12) as u8,
        irr: word(16),
        entries: std::array::from_fn(|pin| double(24 + 8 * pin)),
    }
}

impl Chip {
    /// `KVM_GET_IRQCHIP`. EINVAL: no such chip.
    pub(crate) fn get_irqchip(&self, argument: &mut Irqchip) -> Result<(), Errno> {
        let bytes = match argument[0] {
            id @ (KVM_IRQCHIP_PIC_MASTER | KVM_IRQCHIP_PIC_SLAVE) => {
                self.wires.with_pic(|pic| pic_bytes(&pic.controller(id as usize)).to_vec())
            }
            KVM_IRQCHIP_IOAPIC => self.wires.with_ioapic(|apic| ioapic_bytes(apic)),
            _ => None,
        };
        set_bytes(argument, CHIP, &bytes.ok_or(Errno::EINVAL)?);
        Ok(())
    }

    /// `KVM_SET_IRQCHIP`. EINVAL: no such chip.
    pub(crate) fn set_irqchip(&self, argument: &Irqchip) -> Result<(), Errno> {
        let bytes = bytes_of(&argument[CHIP / 4..]);
        let done = match argument[0] {
            id @ (KVM_IRQCHIP_PIC_MASTER | KVM_IRQCHIP_PIC_SLAVE) => {
                self.wires.with_pic(|pic| pic.set_controller(id as usize, pic_of(&bytes)))
            }
            KVM_IRQCHIP_IOAPIC => self.wires.with_ioapic(|apic| apic.set_state(&ioapic_of(&bytes), &self.wires)),
            _ => None,
        };
        done.ok_or(Errno::EINVAL)
    }

    /// `KVM_GET_PIT2`. ENXIO: there is no timer.
    pub(crate) fn get_pit(&self) -> Result<PitState, Errno> {
        let mut state: PitState = [0; 28];
        let fill = |pit: &mut Pit| {
            for (index, channel) in state.chunks_exact_mut(CHANNEL_WORDS).take(3).enumerate() {
                channel_of(&pit.counter(index), channel);
            }
            let hpet = if pit.hpet_legacy { KVM_PIT_FLAGS_HPET_LEGACY } else { 0 };
            state[FLAGS] = hpet | if pit.speaker_data { KVM_PIT_FLAGS_SPEAKER_DATA_ON } else { 0 };
        };
        self.wires.with_pit(fill).ok_or(Errno::ENXIO)?;
        Ok(state)
    }

    /// `KVM_SET_PIT2`. ENXIO: there is no timer.
    pub(crate) fn set_pit(&self, state: &PitState) -> Result<(), Errno> {
        let now = monotonic_ns();
        let load = |pit: &mut Pit| {
            pit.hpet_legacy = state[FLAGS] & KVM_PIT_FLAGS_HPET_LEGACY != 0;
            pit.speaker_data = state[FLAGS] & KVM_PIT_FLAGS_SPEAKER_DATA_ON != 0;
            pit.set_counters(std::array::from_fn(|index| counter_of(&state[index * CHANNEL_WORDS..])), now);
        };
        self.wires.with_pit(load).ok_or(Errno::ENXIO)?;
        self.arm_pit();
        Ok(())
    }

    /// `KVM_IRQ_LINE_STATUS`: what became of it.
    pub(crate) fn set_line(&self, gsi: u32, level: bool) -> i32 {
        self.wires.set_gsi(gsi, router::SOURCE_USER, level)
    }
}

/// Mode of a counter that no control word has come for, as `kvm_pit_reset` has it: it is accessed like one of mode 0, waits
/// for its count, and has the one that 0 means.
const NO_MODE: u8 = 0xff;
const POWER_UP_COUNT: u32 = 0x1_0000;

/// `struct kvm_pit_channel_state`. A counter that has no count yet travels with 0, which no count is.
fn channel_of(counter: &Counter, words: &mut [u32]) {
    let fresh = counter.waits && counter.mode == 0 && counter.access == Access::Both && counter.count == POWER_UP_COUNT;
    words[0] = if counter.waits && !fresh { 0 } else { counter.count };
    let (access, mode) = if fresh { (0, NO_MODE) } else { (counter.access as u8, counter.mode) };
    let [latched_low, latched_high] = counter.latched_count.to_le_bytes();
    let bytes = [
        latched_low,
        latched_high,
        counter.count_latched,
        counter.status_latched.into(),
        counter.status,
        counter.read_high.into(),
        counter.write_high.into(),
        counter.write_latch,
        access,
        mode,
        counter.bcd.into(),
        counter.gate.into(),
    ];
    set_bytes(words, 4, &bytes);
    set_bytes(words, 16, &counter.loaded_ns.to_le_bytes());
}

fn counter_of(words: &[u32]) -> Counter {
    let bytes = bytes_of(&words[1..4]);
    Counter {
        count: words[0],
        latched_count: u16::from_le_bytes([bytes[0], bytes[1]]),
        count_latched: bytes[2] & 3,
        status_latched: bytes[3] != 0,
        status: bytes[4],
        read_high: bytes[5] != 0,
        write_high: bytes[6] != 0,
        write_latch: bytes[7],
        access: match bytes[8] {
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        },
        mode: if bytes[9] == NO_MODE { 0 } else { bytes[9] & 7 },
        bcd: bytes[10] != 0,
        gate: bytes[11] != 0,
        waits: words[0] == 0 || bytes[9] == NO_MODE,
        ..Counter::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pic_has_the_layout_of_the_header() {
        let bytes: [u8; 16] = [1, 2, 3, 4, 5, 0x68, 1, 1, 1, 2, 1, 1, 1, 1, 0x80, 0xf8];
        assert_eq!(pic_bytes(&pic_of(&bytes)), bytes);
    }

    #[test]
    fn ioapic_has_the_layout_of_the_header() {
        let mut apic = IoApic::new();
        apic.write(0, 0x12, &Nobody);
        let bytes = ioapic_bytes(&apic);
        assert_eq!(bytes.len(), 24 + 24 * 8);
        assert_eq!(bytes[..12], [0, 0, 0xc0, 0xfe, 0, 0, 0, 0, 0x12, 0, 0, 0]);
        assert_eq!(bytes[24..32], [0, 0, 1, 0, 0, 0, 0, 0]);
        assert_eq!(ioapic_of(&bytes), apic.state());
    }

    #[test]
    fn channel_has_the_layout_of_the_header() {
        let words = [0x1234, 0x0103_5678, 0x0101_0107, 0x0101_0303, 0, 0];
        let counter = counter_of(&words);
        assert_eq!((counter.count, counter.latched_count, counter.count_latched), (0x1234, 0x5678, 3));
        let mut again = [0; 6];
        channel_of(&counter, &mut again);
        assert_eq!(again[..4], [0x1234, 0x0103_5678, 0x0101_0107, 0x0101_0303]);
    }

    /// Read from Linux after KVM_CREATE_PIT2.
    #[test]
    fn channel_is_power_up_as_linux_shows_it() {
        let pit = Pit::new();
        for (index, gate) in [1, 1, 0].into_iter().enumerate() {
            let mut words = [0; 6];
            channel_of(&pit.counter(index), &mut words);
            assert_eq!(words, [0x1_0000, 0, 0, 0xff00 | gate << 24, 0, 0]);
            assert!(counter_of(&words).waits);
        }
    }

    struct Nobody;
    impl ioapic::Target for Nobody {
        fn send(&self, _: &irqchip::Message) -> bool {
            false
        }
    }
}
