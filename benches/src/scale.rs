//! Many at once: vCPUs that share the processors, VMs that do nothing.

use std::fs;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kvm_bindings::{KVM_CAP_X86_DISABLE_EXITS, KVM_X86_DISABLE_EXITS_PAUSE, kvm_enable_cap};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use nix::errno::Errno;
use tiny_vmm::code_asm::*;
use tiny_vmm::{Alarm, Guest, Mode, assemble};

use crate::costs::repeat;
use crate::row::Row;

const PAIR: &str = "2 busy vCPUs, beside one";
const SLOWEST: &str = "16 busy vCPUs: the slowest beside the mean";
const LOCK: &str = "8 vCPUs at a ticket lock: takes of it";
const LOCK_KEPT: &str = "the same, without exits on PAUSE";
const IDLE_CPU: &str = "50 idle VMs of 128 MiB: daemon's CPU time";
const IDLE_MEMORY: &str = "50 idle VMs of 128 MiB: daemon's memory, each";
pub(crate) const NAMES: &[&str] = &[PAIR, SLOWEST, LOCK, LOCK_KEPT, IDLE_CPU, IDLE_MEMORY];

const RAM: usize = 2 << 20;
/// Behind code, stack and paging structures.
const DATA: u64 = 1 << 20;
const ITERATIONS: u32 = 400_000_000;
const ROUNDS: usize = 3;
const MANY: u64 = 16;
const AT_LOCK: u64 = 8;
const WATCHED: Duration = Duration::from_secs(5);
const IDLE_VMS: usize = 50;
const IDLE_RAM: usize = 128 << 20;

/// On the /dev/kvm that is there.
pub(crate) fn measure() -> Result<Vec<Row>> {
    let (cpu, memory) = idle()?;
    Ok(vec![
        Row::new(PAIR, "times", Some(pair()?), None),
        Row::new(SLOWEST, "%", Some(slowest()?), None),
        Row::new(LOCK, "per ms", Some(ticket_lock(0)?), None),
        Row::new(LOCK_KEPT, "per ms", Some(ticket_lock(KVM_X86_DISABLE_EXITS_PAUSE)?), None),
        Row::new(IDLE_CPU, "% of one", Some(cpu), None),
        Row::new(IDLE_MEMORY, "MiB", Some(memory), None),
    ])
}

/// One more vCPU, in the state that the first one starts in.
fn another(guest: &mut Guest, id: u64) -> Result<VcpuFd> {
    let (regs, sregs) = (guest.vcpu().get_regs()?, guest.vcpu().get_sregs()?);
    let vcpu = guest.vm().create_vcpu(id).context("KVM_CREATE_VCPU")?;
    vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
    vcpu.set_regs(&regs).context("KVM_SET_REGS")?;
    Ok(vcpu)
}

/// Work that two vCPUs of one VM do in the time in which one does a part of it: 2 is the most.
fn pair() -> Result<f64> {
    let code = assemble(Mode::Long, |a| {
        repeat(a, ITERATIONS, |_| Ok(()))?;
        a.hlt()
    })?;
    let mut guest = Guest::new(Mode::Long, RAM, &code)?;
    let mut vcpus = [another(&mut guest, 1)?, another(&mut guest, 2)?];
    let start = vcpus[0].get_regs()?;
    let mut seconds = |count: usize| -> Result<f64> {
        let barrier = Barrier::new(count + 1);
        thread::scope(|scope| {
            let running: Vec<_> = vcpus[..count]
                .iter_mut()
                .map(|vcpu| {
                    scope.spawn(|| -> Result<()> {
                        vcpu.set_regs(&start)?;
                        barrier.wait();
                        match vcpu.run().context("KVM_RUN")? {
                            VcpuExit::Hlt => Ok(()),
                            other => bail!("an unexpected exit: {other:?}"),
                        }
                    })
                })
                .collect();
            barrier.wait();
            let started = Instant::now();
            for thread in running {
                thread.join().expect("it does not panic")?;
            }
            Ok(started.elapsed().as_secs_f64())
        })
    };
    let mut best = [f64::INFINITY; 2];
    for _ in 0..ROUNDS {
        for count in [1, 2] {
            best[count - 1] = best[count - 1].min(seconds(count)?);
        }
    }
    Ok(2.0 * best[0] / best[1])
}

/// How far the slowest of many vCPUs of one VM comes, in percent of what they do on average.
fn slowest() -> Result<f64> {
    let code = assemble(Mode::Long, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(qword_ptr(rdi))?;
        a.jmp(again)
    })?;
    let mut guest = Guest::new(Mode::Long, RAM, &code)?;
    let vcpus: Vec<VcpuFd> = (1..=MANY).map(|id| another(&mut guest, id)).collect::<Result<_>>()?;
    thread::scope(|scope| {
        let running: Vec<_> = (0..)
            .zip(vcpus)
            .map(|(i, mut vcpu)| {
                scope.spawn(move || -> Result<()> {
                    let mut regs = vcpu.get_regs()?;
                    // A line of the cache each.
                    regs.rdi = DATA + 64 * i;
                    vcpu.set_regs(&regs)?;
                    until_interrupted(&mut vcpu, WATCHED)
                })
            })
            .collect();
        running.into_iter().try_for_each(|thread| thread.join().expect("it does not panic"))
    })?;
    let counts: Vec<f64> = (0..MANY as usize)
        .map(|i| {
            let bytes = &guest.ram()[DATA as usize + 64 * i..][..8];
            u64::from_le_bytes(bytes.try_into().expect("eight bytes")) as f64
        })
        .collect();
    let mean = counts.iter().sum::<f64>() / counts.len() as f64;
    Ok(counts.iter().copied().fold(f64::INFINITY, f64::min) * 100.0 / mean)
}

/// How often vCPUs that take a lock in turn get it, in a millisecond of all.
fn ticket_lock(disabled_exits: u32) -> Result<f64> {
    let code = assemble(Mode::Long, |a| {
        let (mut again, mut wait, mut mine) = (a.create_label(), a.create_label(), a.create_label());
        a.set_label(&mut again)?;
        a.mov(eax, 1)?;
        a.lock().xadd(dword_ptr(rdi), eax)?;
        a.set_label(&mut wait)?;
        a.cmp(eax, dword_ptr(rdi + 64))?;
        a.je(mine)?;
        a.pause()?;
        a.jmp(wait)?;
        a.set_label(&mut mine)?;
        repeat(a, 100, |_| Ok(()))?;
        a.inc(dword_ptr(rdi + 64))?;
        repeat(a, 100, |_| Ok(()))?;
        a.jmp(again)
    })?;
    let mut guest = Guest::new(Mode::Long, RAM, &code)?;
    let mut cap = kvm_enable_cap { cap: KVM_CAP_X86_DISABLE_EXITS, ..Default::default() };
    cap.args[0] = disabled_exits.into();
    guest.vm().enable_cap(&cap).context("KVM_CAP_X86_DISABLE_EXITS")?;
    let vcpus: Vec<VcpuFd> = (1..=AT_LOCK).map(|id| another(&mut guest, id)).collect::<Result<_>>()?;
    thread::scope(|scope| {
        let running: Vec<_> = vcpus
            .into_iter()
            .map(|mut vcpu| {
                scope.spawn(move || -> Result<()> {
                    let mut regs = vcpu.get_regs()?;
                    regs.rdi = DATA;
                    vcpu.set_regs(&regs)?;
                    until_interrupted(&mut vcpu, WATCHED)
                })
            })
            .collect();
        running.into_iter().try_for_each(|thread| thread.join().expect("it does not panic"))
    })?;
    let takes = &guest.ram()[DATA as usize + 64..][..4];
    let takes = u32::from_le_bytes(takes.try_into().expect("four bytes"));
    Ok(f64::from(takes) / WATCHED.as_secs_f64() / 1e3)
}

fn until_interrupted(vcpu: &mut VcpuFd, time: Duration) -> Result<()> {
    let _alarm = Alarm::new(time);
    match vcpu.run().map(|exit| format!("{exit:?}")) {
        Err(error) if error.errno() == Errno::EINTR as i32 => Ok(()),
        other => bail!("an unexpected end: {other:?}"),
    }
}

/// VMs that wait in HLT: the daemon's CPU time in percent of one processor, and MiB of its own memory that each costs.
fn idle() -> Result<(f64, f64)> {
    let code = assemble(Mode::Long, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.hlt()?;
        a.jmp(again)
    })?;
    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    let daemon = Process::serving_us()?;
    // What comes once.
    drop(Guest::with_irqchip(&kvm, Mode::Long, IDLE_RAM, &code)?);
    let before = daemon.own_memory()?;
    let mut guests: Vec<Guest> =
        (0..IDLE_VMS).map(|_| Guest::with_irqchip(&kvm, Mode::Long, IDLE_RAM, &code)).collect::<Result<_>>()?;
    thread::scope(|scope| {
        let running: Vec<_> =
            guests.iter_mut().map(|guest| scope.spawn(|| until_interrupted(guest.vcpu(), 2 * WATCHED))).collect();
        thread::sleep(WATCHED / 2);
        let (cpu, started) = (daemon.cpu_time()?, Instant::now());
        thread::sleep(WATCHED);
        let used = (daemon.cpu_time()? - cpu) * 100.0 / started.elapsed().as_secs_f64();
        let memory = daemon.own_memory()? - before;
        running.into_iter().try_for_each(|thread| thread.join().expect("it does not panic"))?;
        Ok((used, memory / IDLE_VMS as f64))
    })
}

/// The daemon, as /proc shows it.
struct Process(u32);

impl Process {
    /// The child of `softkvm run`, whose child we are, that is the same program.
    fn serving_us() -> Result<Self> {
        let run = std::os::unix::process::parent_id();
        let program = |pid: u32| fs::read_link(format!("/proc/{pid}/exe"));
        let wanted = program(run).context("the program that started us")?;
        let processes =
            fs::read_dir("/proc").context("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        let mut served = processes.filter(|pid| {
            let parent = status(*pid, "PPid:").is_ok_and(|parent| parent == f64::from(run));
            parent && program(*pid).is_ok_and(|program| program == wanted)
        });
        served.next().map(Self).context("no daemon beside us: this part is measured under `softkvm run`")
    }

    /// MiB that nobody else has: guests' RAM is the VMM's.
    fn own_memory(&self) -> Result<f64> {
        Ok(status(self.0, "RssAnon:")? / 1024.0)
    }

    /// Seconds, of all threads.
    fn cpu_time(&self) -> Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0)).context("the daemon's times")?;
        // utime and stime, proc(5); the name in front may hold spaces.
        let fields = stat.rsplit_once(')').context("a stat without a name")?.1.split_whitespace().skip(11).take(2);
        let ticks: f64 = fields.filter_map(|field| field.parse::<f64>().ok()).sum();
        // USER_HZ is 100 on x86.
        Ok(ticks / 100.0)
    }
}

/// The number behind a key of /proc/PID/status.
fn status(pid: u32, key: &str) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).context("a process's status")?;
    let line = text.lines().find_map(|line| line.strip_prefix(key)).with_context(|| format!("no {key}"))?;
    line.split_whitespace()
        .next()
        .and_then(|number| number.parse().ok())
        .with_context(|| format!("{key} without a number"))
}
