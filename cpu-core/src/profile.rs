//! Where guest instructions go: counters of what is slow anyway, and samples of the trace that runs.
//!
//! Nothing here lies on the way from op to op. A sample is asked for as everything else is, by the stamp that each head
//! compares; at the next head the CPU leaves for its loop, and [`SLOT_TRACE_IP`] still names the trace that ran when somebody
//! asked. So a sample is of a whole trace, and the time that the loop, a walk or the decoder takes is of the trace behind
//! which it was spent. Where in the trace it was, a sample does not tell: see [`executed`].

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use iced_x86::{Decoder, DecoderOptions, FlowControl, Formatter, Instruction, IntelFormatter};
use mmu::{Access, AccessKind, Paging};
use x86_defs::LinearAddr;

use crate::cpu::{Cpu, SLOT_TRACE_IP};
use crate::decode::Mode;
use crate::decode::trace::followed;
use crate::state::Seg;

/// Places that a CPU keeps samples of between two looks of whoever takes them.
const MOST_PLACES: usize = 8192;

macro_rules! counts {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        /// What a CPU has done since it was created.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Counts { $($(#[$doc])* pub $name: u64),* }

        /// [`Counts`] as others read them while the CPU runs.
        #[derive(Debug, Default)]
        struct Published { $($name: AtomicU64),* }

        impl Published {
            fn store(&self, now: &Counts) {
                $(self.$name.store(now.$name, Relaxed);)*
            }

            fn load(&self) -> Counts {
                Counts { $($name: self.$name.load(Relaxed)),* }
            }
        }

        impl Counts {
            /// The names, and what was counted.
            pub fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name)),*].into_iter()
            }

            /// What came since `before`.
            pub fn since(&self, before: &Self) -> Self {
                Self { $($name: self.$name.wrapping_sub(before.$name)),* }
            }
        }
    };
}

counts! {
    /// Instructions completed.
    instructions;
    /// Instructions run by themselves on the exact path: devices, page ends, pages with code, single steps.
    single_instructions;
    /// Data accesses whose page was not in the TLB, or cannot be.
    data_walks;
    /// Fetches whose page was not in the TLB.
    fetch_walks;
    /// All translations dropped.
    tlb_flushes;
    /// The translations of one page dropped.
    page_flushes;
    /// Looks for a trace that the jump cache did not have.
    jump_cache_misses;
    /// Traces decoded.
    traces_decoded;
    /// Traces dropped, for their bytes or their memory have changed.
    traces_dropped;
    /// Stores of this CPU into bytes that were decoded.
    code_writes;
    /// Times that the arena of traces was full, and emptied.
    arena_resets;
    /// External interrupts delivered.
    interrupts;
    /// NMIs delivered.
    nmis;
    /// Exceptions delivered.
    exceptions;
}

/// What ran when a sample was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// Offset in CS of the first instruction of the trace.
    pub ip: u64,
    /// Its linear address.
    pub linear: u64,
    /// RIP behind the trace: where it was left for.
    pub next: u64,
    /// CR3.
    pub cr3: u64,
    /// Current privilege level.
    pub cpl: u8,
    /// What code was decoded as: 16, 32 or 64.
    pub bitness: u32,
    /// No trace but one instruction, run by itself.
    pub alone: bool,
}

/// Samples of one place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sampled {
    /// How many.
    pub count: u64,
    /// Guest bytes that the trace was decoded from; none where it was gone before the first sample was taken.
    pub bytes: Vec<u8>,
}

/// Samples since somebody took them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Samples {
    /// By place.
    pub places: HashMap<Place, Sampled>,
    /// Samples of more places than are kept.
    pub lost: u64,
}

/// What a CPU tells of itself to other threads.
#[derive(Debug, Default)]
pub struct Profile {
    counts: Published,
    samples: Mutex<Samples>,
}

impl Profile {
    /// As of the last return from the guest, or the last sample.
    pub fn counts(&self) -> Counts {
        self.counts.load()
    }

    /// Of [`Counts::instructions`].
    pub fn instructions(&self) -> u64 {
        self.counts.instructions.load(Relaxed)
    }

    /// Samples since the last call.
    pub fn take_samples(&self) -> Samples {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Samples> {
        self.samples.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, place: Place, bytes: impl FnOnce() -> Vec<u8>) {
        let mut samples = self.lock();
        if !samples.places.contains_key(&place) && samples.places.len() == MOST_PLACES {
            samples.lost += 1;
            return;
        }
        let sampled = samples.places.entry(place).or_default();
        sampled.count += 1;
        if sampled.bytes.is_empty() {
            sampled.bytes = bytes();
        }
    }
}

/// What the loop entered last: what a trace depends on besides its offset.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ran {
    mode: Mode,
    cpl: u8,
    cr3: u64,
    base: u64,
    alone: bool,
}

impl Cpu {
    /// The loop enters a trace, or one instruction alone, at RIP.
    pub(crate) fn note_entry(&mut self, alone: bool) {
        let base = self.seg_base[Seg::Cs as usize];
        self.ran = Some(Ran { mode: self.mode(), cpl: self.cpl, cr3: self.cr3, base, alone });
        self.gpr[usize::from(SLOT_TRACE_IP / 8)] = self.rip;
    }

    /// What others may read of this CPU.
    pub fn profile(&self) -> std::sync::Arc<Profile> {
        self.profile.clone()
    }

    /// Shows others what has been counted.
    pub(crate) fn publish(&mut self) {
        self.counts.instructions = self.instructions;
        self.counts.traces_dropped = self.traces.dropped;
        self.profile.counts.store(&self.counts);
    }

    /// Takes a sample. Between traces, with RIP where the guest goes on.
    pub(crate) fn sample(&self) {
        let Some(ran) = self.ran else { return };
        let ip = self.gpr[usize::from(SLOT_TRACE_IP / 8)];
        let linear = ran.base.wrapping_add(ip) & if ran.mode.is_64bit() { u64::MAX } else { 0xffff_ffff };
        let Ran { mode, cpl, cr3, alone, .. } = ran;
        let place = Place { ip, linear, next: self.rip, cr3, cpl, bitness: mode.bitness(), alone };
        self.profile.note(place, || self.bytes_of(&place, mode).unwrap_or_default().to_vec());
    }

    /// The bytes that ran at `place` were decoded from, if they are still known. A look that the guest cannot see: its
    /// paging structures stay as they are.
    fn bytes_of(&self, place: &Place, mode: Mode) -> Option<&[u8]> {
        if place.alone {
            return self.traces.single_bytes(place.ip, mode);
        }
        let access = Access { kind: AccessKind::Fetch, user: place.cpl == 3, implicit: false };
        let paging = Paging { cr3: place.cr3, ..self.paging() };
        let found = mmu::translate_only(&self.view, &paging, LinearAddr(place.linear), access).ok()?;
        self.traces.bytes_at(found.gpa.0, place.ip, mode)
    }
}

/// One instruction of a trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Offset in CS.
    pub ip: u64,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// As Intel's manuals write it.
    pub text: String,
    /// The first word of it, prefixes left out.
    pub mnemonic: String,
    /// Where it may branch to.
    target: Option<u64>,
}

/// The instructions of a trace: `bytes` from offset `ip` on, jumps that the trace follows left behind.
pub fn disassemble(bytes: &[u8], ip: u64, bitness: u32) -> Vec<Line> {
    let mut decoder = Decoder::with_ip(bitness, bytes, ip, DecoderOptions::NONE);
    let mut formatter = IntelFormatter::new();
    formatter.options_mut().set_branch_leading_zeros(false);
    let mut lines = Vec::new();
    let mut ins = Instruction::default();
    while decoder.can_decode() {
        let at = decoder.position();
        decoder.decode_out(&mut ins);
        let (mut text, mut mnemonic) = (String::new(), String::new());
        formatter.format(&ins, &mut text);
        let plain = iced_x86::FormatMnemonicOptions::NO_PREFIXES;
        formatter.format_mnemonic_options(&ins, &mut mnemonic, plain);
        let flow = ins.flow_control();
        let branches =
            matches!(flow, FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch | FlowControl::Call);
        let target = (branches && !ins.is_call_far() && !ins.is_jmp_far()).then(|| ins.near_branch_target());
        let end = decoder.position();
        lines.push(Line { ip: ins.ip(), bytes: bytes[at..end].to_vec(), text, mnemonic, target });
        if let (FlowControl::UnconditionalBranch, Some(target)) = (flow, target)
            && let Some(on) = followed(target.wrapping_sub(ip), end, bytes.len())
        {
            decoder.set_ip(target);
            decoder.set_position(on).expect("inside the bytes");
        }
    }
    lines
}

/// How many of a trace's instructions ran before it was left for `next`: up to the branch that leads there. A trace may
/// also be left behind an instruction that does not branch; what leaves for elsewhere (a return, an exception) counts as
/// its last.
pub fn executed(lines: &[Line], next: u64) -> usize {
    let leaves = |line: &&Line| line.target == Some(next);
    let behind = |line: &&Line| line.ip.wrapping_add(line.bytes.len() as u64) == next;
    let left = lines.iter().rfind(leaves).or_else(|| lines.iter().find(behind));
    left.and_then(|left| lines.iter().position(|line| line.ip == left.ip)).map_or(lines.len(), |at| at + 1)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use iced_x86::code_asm::*;

    use super::*;
    use crate::testing::{CODE, Machine};
    use crate::vmx::Exit;

    fn texts(lines: &[Line]) -> Vec<&str> {
        lines.iter().map(|line| line.text.as_str()).collect()
    }

    /// Runs a guest that never ends until so many samples of it have been taken.
    fn sampled(machine: &mut Machine, times: u64) -> Samples {
        let (kick, profile) = (machine.cpu.kicker(), machine.cpu.profile());
        let sampler = std::thread::spawn(move || {
            let mut all = Samples::default();
            while all.places.values().map(|sampled| sampled.count).sum::<u64>() < times {
                kick.sample();
                std::thread::sleep(Duration::from_millis(1));
                for (place, more) in profile.take_samples().places {
                    let sampled = all.places.entry(place).or_default();
                    sampled.count += more.count;
                    sampled.bytes = more.bytes;
                }
            }
            kick.kick();
            all
        });
        assert_eq!(machine.cpu.run(), Exit::ExternalInterrupt);
        sampler.join().expect("no panic")
    }

    /// The long trace takes nearly all of the time, though attention is seen as often behind the one as behind the other.
    #[test]
    fn a_sample_is_of_the_trace_that_ran_not_of_the_one_behind() {
        let mut machine = Machine::new_64bit(|a| {
            let (mut long, mut short) = (a.create_label(), a.create_label());
            a.set_label(&mut long).unwrap();
            for _ in 0..10 {
                a.imul_2(rax, rax).unwrap();
                a.fsin().unwrap();
            }
            a.jmp(short).unwrap();
            a.db(&[0; 100]).unwrap();
            a.set_label(&mut short).unwrap();
            a.jmp(long).unwrap();
        });
        let samples = sampled(&mut machine, 200);
        let of_long: u64 = samples.places.iter().filter(|(at, _)| at.ip == CODE).map(|(_, of)| of.count).sum();
        assert!(of_long > 150, "{of_long} of {samples:?}");
        let (place, long) = samples.places.iter().find(|(place, _)| place.ip == CODE).expect("it was seen");
        assert_eq!((place.linear, place.bitness, place.cpl, place.cr3), (CODE, 64, 0, 0x8_0000));
        let lines = disassemble(&long.bytes, place.ip, 64);
        assert_eq!(texts(&lines)[..3], ["imul rax,rax", "fsin", "imul rax,rax"]);
        assert_eq!((lines.len(), lines[20].mnemonic.as_str()), (21, "jmp"));
    }

    #[test]
    fn a_trace_is_listed_over_the_jumps_that_it_follows() {
        // jmp over one byte; inc eax; jz elsewhere; ret
        let bytes = [0xeb, 0x01, 0xcc, 0xff, 0xc0, 0x74, 0x40, 0xc3];
        let lines = disassemble(&bytes, 0x1000, 64);
        assert_eq!(texts(&lines), ["jmp short 1003h", "inc eax", "je short 1047h", "ret"]);
        assert_eq!(executed(&lines, 0x1047), 3);
        assert_eq!(executed(&lines, 0x5555), 4);
    }

    /// `B` can be reached from `C`, and from the trace's own start.
    #[test]
    fn a_branch_tells_more_than_what_lies_behind_an_instruction() {
        // inc eax; inc ecx (1002H); dec edx; jne 1002H; ret
        let bytes = [0xff, 0xc0, 0xff, 0xc1, 0xff, 0xca, 0x75, 0xfa, 0xc3];
        let lines = disassemble(&bytes, 0x1000, 64);
        assert_eq!(executed(&lines, 0x1002), 4);
        assert_eq!(executed(&lines, 0x1008), 4, "not taken, and left there");
    }

    #[test]
    fn what_is_slow_is_counted() {
        const END: [u8; 2] = [0x0f, 0x37];
        let mut machine = Machine::new_64bit(|a| {
            let (mut top, mut target) = (a.create_label(), a.create_label());
            a.mov(ecx, 10).unwrap();
            a.mov(rax, cr3).unwrap();
            a.set_label(&mut top).unwrap();
            a.mov(cr3, rax).unwrap();
            a.invlpg(ptr(0x40_0000)).unwrap();
            a.lea(rsi, ptr(target)).unwrap();
            a.mov(byte_ptr(rsi + 1), cl).unwrap();
            a.set_label(&mut target).unwrap();
            a.mov(ebx, 1).unwrap();
            a.dec(ecx).unwrap();
            a.jne(top).unwrap();
            a.db(&END).unwrap();
        });
        let before = machine.cpu.profile().counts();
        assert_eq!(before, Counts::default());
        assert!(matches!(machine.cpu.run(), Exit::Unimplemented { .. }));
        let counts = machine.cpu.profile().counts();
        assert_eq!(counts.instructions, 2 + 10 * 7);
        assert!(counts.tlb_flushes >= 10, "{counts:?}");
        assert_eq!(counts.page_flushes, 10);
        // The first store comes before its target has been decoded by itself or with what lies before it, or after.
        assert!((9..=10).contains(&counts.code_writes), "{counts:?}");
        assert!(counts.traces_dropped >= 9 && counts.traces_decoded > counts.traces_dropped, "{counts:?}");
        assert!(counts.fetch_walks >= 10 && counts.data_walks >= 10, "{counts:?}");
        assert_eq!((counts.interrupts, counts.nmis, counts.exceptions), (0, 0, 0));
    }
}
