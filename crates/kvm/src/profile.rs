//! What `softkvm profile` shows: each running vCPU is asked for a sample again and again, and its counters are compared with
//! those of the beginning.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};
use std::time::{Duration, Instant};

use cpu_core::{Counts, Kick, Line, Place, Samples, disassemble, executed};
use serde::Serialize;

use crate::status::{Counters, Exits, VcpuStatus};
use crate::system::Kvm;

/// A vCPU in the guest answers within its quantum; one that does not is elsewhere.
const PATIENCE: Duration = Duration::from_millis(20);

/// What guests did for a while.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Profile {
    /// How long.
    pub seconds: f64,
    /// In order of creation.
    pub vms: Vec<VmProfile>,
}

/// One VM.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct VmProfile {
    /// Number, from 1, in order of creation.
    pub id: u64,
    /// Process that made it.
    pub owner_pid: u32,
    /// In order of id.
    pub vcpus: Vec<VcpuProfile>,
    /// Samples of all vCPUs.
    pub samples: u64,
    /// Samples of more places than are kept; part of no trace.
    pub lost: u64,
    /// Those with most samples, the hottest first.
    pub traces: Vec<HotTrace>,
    /// Those with the largest share, that first.
    pub mnemonics: Vec<HotMnemonic>,
}

/// One vCPU.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct VcpuProfile {
    /// As given to `KVM_CREATE_VCPU`.
    pub id: u32,
    /// How often it was asked for a sample.
    pub asked: u64,
    /// How often it was in the guest then, and told.
    pub samples: u64,
    /// Of its answers, part of what was asked.
    pub in_guest: f64,
    /// Millions of guest instructions a second.
    pub mips: f64,
    /// What the core counts.
    pub counts: BTreeMap<String, u64>,
    /// By basic exit reason of the SDM.
    pub vmx_exits: BTreeMap<String, u64>,
    /// By `kvm_run.exit_reason`.
    pub kvm_exits: BTreeMap<String, u64>,
}

/// A trace, or one instruction that ran by itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct HotTrace {
    /// Of all samples, 0 to 1.
    pub share: f64,
    /// How many.
    pub samples: u64,
    /// Linear address of the first instruction.
    pub address: String,
    /// Its offset in CS.
    pub ip: String,
    /// 16, 32 or 64.
    pub bitness: u32,
    /// Current privilege level.
    pub cpl: u8,
    /// Every CR3 that it was seen under.
    pub cr3: Vec<String>,
    /// One instruction, run by itself on the exact path.
    pub alone: bool,
    /// Instructions; 0 if its bytes are not known any more.
    pub instructions: usize,
    /// Their listing.
    pub code: Vec<CodeLine>,
}

/// One instruction of a trace.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct CodeLine {
    /// Offset in CS.
    pub ip: String,
    /// In hexadecimal.
    pub bytes: String,
    /// In Intel's notation.
    pub text: String,
    /// Its part of all samples, 0 to 1: those of the trace, spread evenly over what ran of it.
    pub share: f64,
}

/// All instructions of one name.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct HotMnemonic {
    /// The name.
    pub mnemonic: String,
    /// Of all samples, 0 to 1.
    pub share: f64,
}

/// A profile that is being taken; there is one at a time.
pub struct Profiler {
    kvm: Arc<Kvm>,
    vm: Option<u64>,
    watched: BTreeMap<(u64, u32), Watched>,
    started: Instant,
}

struct Watched {
    owner_pid: u32,
    kick: Arc<Kick>,
    counters: Arc<Counters>,
    before: Totals,
    asked: u64,
}

/// Counters at one moment.
#[derive(Clone, Copy, Default)]
struct Totals {
    core: Counts,
    exits: Exits,
}

impl Totals {
    fn of(counters: &Counters) -> Self {
        Self { core: counters.core.counts(), exits: counters.all_exits() }
    }
}

impl Profiler {
    /// Begins, with one VM or with all that there are and will be. `None`: somebody else is at it.
    pub fn start(kvm: &Arc<Kvm>, vm: Option<u64>) -> Option<Self> {
        kvm.profiled.compare_exchange(false, true, AcqRel, Acquire).ok()?;
        let mut new = Self { kvm: kvm.clone(), vm, watched: BTreeMap::new(), started: Instant::now() };
        new.look_for_vcpus();
        new.settle();
        for watched in new.watched.values_mut() {
            watched.before = Totals::of(&watched.counters);
            watched.counters.core.take_samples();
        }
        new.started = Instant::now();
        Some(new)
    }

    /// Asks every vCPU for a sample.
    pub fn tick(&mut self) {
        self.look_for_vcpus();
        for watched in self.watched.values_mut() {
            watched.asked += 1;
            watched.kick.sample();
        }
    }

    /// Ends. `top`: how many traces and mnemonics of each VM.
    pub fn finish(self, top: usize) -> Profile {
        self.settle();
        let seconds = self.started.elapsed().as_secs_f64();
        let mut vms = BTreeMap::<u64, (VmProfile, Heat)>::new();
        for (&(id, vcpu), watched) in &self.watched {
            let (vm, heat) = vms.entry(id).or_default();
            (vm.id, vm.owner_pid) = (id, watched.owner_pid);
            let samples = watched.counters.core.take_samples();
            vm.vcpus.push(watched.profile(vcpu, &samples, seconds));
            heat.add(samples);
        }
        let whole = |(mut vm, heat): (VmProfile, Heat)| {
            (vm.samples, vm.lost) = (heat.samples, heat.lost);
            (vm.traces, vm.mnemonics) = heat.hottest(top);
            vm
        };
        Profile { seconds, vms: vms.into_values().map(whole).collect() }
    }

    /// Those of VMs that were made meanwhile begin with nothing.
    fn look_for_vcpus(&mut self) {
        for vm in self.kvm.vms().iter().filter(|vm| self.vm.is_none_or(|id| id == vm.id)) {
            for (&id, vcpu) in vm.vcpus.lock().iter() {
                self.watched.entry((vm.id, id)).or_insert_with(|| Watched {
                    owner_pid: vm.address_space.pid,
                    kick: vcpu.kick.clone(),
                    counters: vcpu.counters.clone(),
                    before: Totals::default(),
                    asked: 0,
                });
            }
        }
    }

    /// Makes those in the guest publish what they have counted.
    fn settle(&self) {
        let running = || self.watched.values().filter(|watched| watched.counters.is_running());
        running().for_each(|watched| watched.kick.sample());
        let until = Instant::now() + PATIENCE;
        while running().any(|watched| watched.kick.owes_sample()) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Profiler {
    fn drop(&mut self) {
        self.kvm.profiled.store(false, Release);
    }
}

impl Watched {
    fn profile(&self, id: u32, samples: &Samples, seconds: f64) -> VcpuProfile {
        let now = Totals::of(&self.counters);
        let core = now.core.since(&self.before.core);
        let VcpuStatus { vmx_exits, kvm_exits, .. } = now.exits.since(&self.before.exits).named();
        let answered = samples.lost + samples.places.values().map(|sampled| sampled.count).sum::<u64>();
        // Asked once more for its counters at the end.
        let asked = self.asked.max(answered);
        VcpuProfile {
            id,
            asked,
            samples: answered,
            in_guest: share(answered, asked),
            mips: core.instructions as f64 / seconds / 1e6,
            counts: core.named().map(|(name, count)| (name.to_owned(), count)).collect(),
            vmx_exits,
            kvm_exits,
        }
    }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// Samples of the same code come together, whatever address space and vCPU they are of.
#[derive(Default)]
struct Heat {
    samples: u64,
    lost: u64,
    traces: HashMap<Code, Hot>,
}

#[derive(PartialEq, Eq, Hash)]
struct Code {
    linear: u64,
    ip: u64,
    bitness: u32,
    cpl: u8,
    alone: bool,
    bytes: Vec<u8>,
}

#[derive(Default)]
struct Hot {
    samples: u64,
    cr3: BTreeSet<u64>,
    lines: Vec<Line>,
    /// Samples of each line.
    spread: Vec<f64>,
}

impl Heat {
    fn add(&mut self, samples: Samples) {
        self.lost += samples.lost;
        self.samples += samples.lost;
        for (place, sampled) in samples.places {
            let Place { ip, linear, next, cr3, cpl, bitness, alone } = place;
            let lines = || disassemble(&sampled.bytes, ip, bitness);
            let code = Code { linear, ip, bitness, cpl, alone, bytes: sampled.bytes.clone() };
            let hot = self.traces.entry(code).or_insert_with(|| {
                let lines = lines();
                Hot { spread: vec![0.0; lines.len()], lines, ..Hot::default() }
            });
            self.samples += sampled.count;
            hot.samples += sampled.count;
            hot.cr3.insert(cr3);
            let ran = executed(&hot.lines, next);
            for part in &mut hot.spread[..ran] {
                *part += sampled.count as f64 / ran as f64;
            }
        }
    }

    fn hottest(self, top: usize) -> (Vec<HotTrace>, Vec<HotMnemonic>) {
        let all = self.samples.max(1) as f64;
        let mut by_mnemonic = BTreeMap::<String, f64>::new();
        let mut traces: Vec<(Code, Hot)> = self.traces.into_iter().collect();
        for (_, hot) in &traces {
            for (line, part) in hot.lines.iter().zip(&hot.spread) {
                *by_mnemonic.entry(line.mnemonic.clone()).or_default() += part / all;
            }
        }
        traces.sort_by_key(|(code, hot)| (std::cmp::Reverse(hot.samples), code.linear, code.ip));
        traces.truncate(top);
        let mut mnemonics: Vec<HotMnemonic> =
            by_mnemonic.into_iter().map(|(mnemonic, share)| HotMnemonic { mnemonic, share }).collect();
        mnemonics.sort_by(|a, b| b.share.total_cmp(&a.share));
        mnemonics.truncate(top);
        (traces.into_iter().map(|(code, hot)| listed(code, hot, all)).collect(), mnemonics)
    }
}

fn listed(code: Code, hot: Hot, all: f64) -> HotTrace {
    let hex = |value: u64| format!("{value:#x}");
    let lines = hot.lines.into_iter().zip(&hot.spread).map(|(line, part)| CodeLine {
        ip: hex(line.ip),
        bytes: line.bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
        text: line.text,
        share: part / all,
    });
    HotTrace {
        share: hot.samples as f64 / all,
        samples: hot.samples,
        address: hex(code.linear),
        ip: hex(code.ip),
        bitness: code.bitness,
        cpl: code.cpl,
        cr3: hot.cr3.into_iter().map(hex).collect(),
        alone: code.alone,
        instructions: hot.spread.len(),
        code: lines.collect(),
    }
}

#[cfg(test)]
mod tests {
    use cpu_core::Sampled;

    use super::*;

    fn sample(cr3: u64, next: u64, count: u64) -> (Place, Sampled) {
        // inc eax; jz 1010H; dec ecx; ret
        let bytes = vec![0xff, 0xc0, 0x74, 0x0c, 0xff, 0xc9, 0xc3];
        let place = Place { ip: 0x1000, linear: 0x1000, next, cr3, cpl: 3, bitness: 64, alone: false };
        (place, Sampled { count, bytes })
    }

    #[test]
    fn code_of_several_address_spaces_is_one_trace_and_its_samples_go_to_what_ran() {
        let samples = Samples { places: [sample(0x1000, 0x1010, 6), sample(0x2000, 0x7777, 4)].into(), lost: 0 };
        let mut heat = Heat::default();
        heat.add(samples);
        assert_eq!(heat.samples, 10);
        let (traces, mnemonics) = heat.hottest(3);
        let [trace] = &traces[..] else { panic!("{traces:?}") };
        assert_eq!((trace.share, trace.instructions, trace.cr3.len()), (1.0, 4, 2));
        // Six samples over two instructions, four over four.
        let shares: Vec<_> = trace.code.iter().map(|line| (line.share * 1e3).round()).collect();
        assert_eq!(shares, [400.0, 400.0, 100.0, 100.0]);
        let names: Vec<_> = mnemonics.iter().map(|hot| hot.mnemonic.as_str()).collect();
        assert_eq!((names.len(), mnemonics[0].share), (3, trace.code[0].share));
        assert!(names[..2].contains(&"inc") && names[..2].contains(&"je"), "{names:?}");
    }

    #[test]
    fn one_profile_is_taken_at_a_time() {
        let kvm = Kvm::new();
        let first = Profiler::start(&kvm, None).expect("nobody is at it");
        assert!(Profiler::start(&kvm, None).is_none());
        assert_eq!(first.finish(1).vms, []);
        assert!(Profiler::start(&kvm, None).is_some());
    }
}
