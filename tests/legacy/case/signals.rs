//! Signals and `KVM_RUN` in 2.6.22: the guest is entered even with one pending, `KVM_SET_SIGNAL_MASK` governs the call, and
//! nobody but sigwait takes what only the mask lets through.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use iced_x86::code_asm::*;
use nix::errno::Errno;

use super::same;
use crate::guest::{Image, assemble, at};
use crate::kvmctl::Machine;
use crate::signal;
use crate::vmm::{Exit, Kvm};

/// A kick must come through within this. It says nothing of speed: the machine may be loaded.
const LATEST: Duration = Duration::from_secs(5);
const KICKS: usize = 200;

/// Real mode, straight from the reset vector: counts for ever at `SCRATCH`, and never exits.
pub(super) fn counting() -> Image {
    let mut image = Image::default();
    image.data(
        at::BIOS,
        &assemble(16, 0, |a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.inc(dword_ptr(at::SCRATCH))?;
            a.jmp(again)
        }),
    );
    image.data(at::BIOS + 0xfff0, &assemble(16, 0xfff0, |a| a.jmp_far(0xf000, 0)));
    image
}

pub(crate) fn all(_time: Duration) -> Result<()> {
    let kvm = Kvm::open()?;
    let (machine, plain) = (Machine::new(&kvm, &counting())?, Machine::new(&kvm, &counting())?);
    signal::handle(signal::ipi());
    signal::handle(signal::other());
    // A thread of its own, whose signal mask ends with it.
    std::thread::scope(|scope| {
        scope.spawn(|| unmasked(&machine).context("no mask")).join().expect("no panic")?;
        scope.spawn(|| pending(&machine).context("a pending signal")).join().expect("no panic")?;
        held(&machine).context("a signal that the mask holds")?;
        latency(&machine).context("kicks")?;
        price(&plain, &machine).context("a guest that computes")
    })?;
    same!(signal::BOO.load(Relaxed), 0, "boo: runs of the IPI signal's handler");
    Ok(())
}

/// A signal that the thread takes: its handler runs, `KVM_RUN` is not restarted.
fn unmasked(machine: &Machine) -> Result<()> {
    let (thread, taken) = (signal::thread(), signal::TAKEN.load(Acquire));
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // Again and again: one that comes just before the call is lost.
            while signal::TAKEN.load(Acquire) < taken + 3 {
                std::thread::sleep(Duration::from_millis(20));
                signal::send(thread, signal::other());
            }
        });
        while signal::TAKEN.load(Acquire) < taken + 3 {
            same!(machine.vcpu0().run(), Err(Errno::EINTR), "KVM_RUN");
            same!(machine.vcpu0().exit(), Exit::Intr, "exit reason");
        }
        Ok(())
    })
}

/// kvmctl calls again and again, and takes the signal only when the guest halts: the guest must get there.
fn pending(machine: &Machine) -> Result<()> {
    let (vcpu, count) = (machine.vcpu0(), machine.ram.u32(at::SCRATCH));
    let before = signal::block(signal::ipi());
    vcpu.set_signal_mask(before & !signal::bit(signal::ipi())).context("KVM_SET_SIGNAL_MASK")?;
    signal::send(signal::thread(), signal::ipi());
    let mut last = count.load(Acquire);
    for round in 0..100 {
        same!(vcpu.run(), Err(Errno::EINTR), "KVM_RUN {round}");
        same!(vcpu.exit(), Exit::Intr, "exit reason {round}");
        ensure!(signal::is_pending(signal::ipi()), "round {round}: somebody has taken the signal");
        let now = count.load(Acquire);
        ensure!(now != last, "round {round}: the guest has not gone on");
        last = now;
    }
    signal::wait(signal::ipi());
    Ok(())
}

/// Ends by the signal that the mask lets through, not by the one that it holds, though the thread would take that.
fn held(machine: &Machine) -> Result<()> {
    let (sender, receiver) = channel();
    std::thread::scope(|scope| {
        let runner = scope.spawn(move || -> Result<_> {
            let before = signal::block(signal::ipi());
            let mask = before & !signal::bit(signal::ipi()) | signal::bit(signal::other());
            machine.vcpu0().set_signal_mask(mask).context("KVM_SET_SIGNAL_MASK")?;
            signal::unblock(signal::other());
            sender.send(signal::thread())?;
            let result = machine.vcpu0().run();
            let end = Instant::now();
            signal::wait(signal::ipi());
            Ok((result, end))
        });
        let thread = receiver.recv()?;
        std::thread::sleep(Duration::from_millis(50));
        let taken = signal::TAKEN.load(Acquire);
        signal::send(thread, signal::other());
        std::thread::sleep(Duration::from_millis(50));
        let sent = Instant::now();
        signal::send(thread, signal::ipi());
        let (result, end) = runner.join().expect("no panic")?;
        same!(result, Err(Errno::EINTR), "KVM_RUN");
        ensure!(end >= sent, "the signal that the mask holds ended KVM_RUN");
        same!(signal::TAKEN.load(Acquire), taken + 1, "runs of the handler, once the mask was gone");
        Ok(())
    })
}

/// From tgkill to the return of `KVM_RUN`, and beside it to the return of sigwait while something else keeps a CPU busy,
/// as the guest does: what the host itself takes to wake a thread.
fn latency(machine: &Machine) -> Result<()> {
    let vcpu = machine.vcpu0();
    let run = kicks(
        |before| let_through(machine, before),
        || {
            same!(vcpu.run(), Err(Errno::EINTR), "KVM_RUN");
            let end = Instant::now();
            signal::wait(signal::ipi());
            Ok(end)
        },
    )?;
    let stop = AtomicBool::new(false);
    let host = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                std::hint::spin_loop();
            }
        });
        let host = kicks(
            |_| Ok(()),
            || {
                signal::wait(signal::ipi());
                Ok(Instant::now())
            },
        );
        stop.store(true, Relaxed);
        host
    })?;
    for (what, took) in [("KVM_RUN", run), ("sigwait", host)] {
        let late = took.iter().filter(|took| **took > Duration::from_millis(2)).count();
        println!(
            "signals: tgkill to the end of {what}, {KICKS} times: median {:?}, 95 % {:?}, most {:?}, over 2 ms: {late}",
            took[KICKS / 2],
            took[KICKS * 95 / 100],
            took[KICKS - 1]
        );
    }
    Ok(())
}

fn let_through(machine: &Machine, before: u64) -> Result<()> {
    machine.vcpu0().set_signal_mask(before & !signal::bit(signal::ipi())).context("KVM_SET_SIGNAL_MASK")
}

/// How long [`KICKS`] signals take to end `wait`, in a thread of its own that blocks them; ascending.
/// `prepare` gets the mask that was in force there.
fn kicks(
    prepare: impl FnOnce(u64) -> Result<()> + Send,
    wait: impl Fn() -> Result<Instant> + Send,
) -> Result<Vec<Duration>> {
    let (to_main, from_runner) = channel();
    std::thread::scope(|scope| {
        let runner = scope.spawn(move || -> Result<()> {
            prepare(signal::block(signal::ipi()))?;
            to_main.send((signal::thread(), Instant::now()))?;
            for _ in 0..KICKS {
                to_main.send((0, wait()?))?;
            }
            Ok(())
        });
        let (thread, _) = from_runner.recv()?;
        let took: Result<Vec<_>> = (0..KICKS as u64)
            .map(|n| {
                std::thread::sleep(Duration::from_micros(1000 + n % 7 * 300));
                let sent = Instant::now();
                signal::send(thread, signal::ipi());
                let (_, end) = from_runner.recv_timeout(LATEST).context("KVM_RUN does not come back")?;
                Ok(end.saturating_duration_since(sent))
            })
            .collect();
        runner.join().expect("no panic")?;
        let mut took = took?;
        took.sort_unstable();
        Ok(took)
    })
}

/// What the mask costs a guest that computes: somebody has to look for signals all the while. Beside it one without.
fn price(plain: &Machine, masked: &Machine) -> Result<()> {
    let mut rates = [0.0, 0.0];
    for _ in 0..3 {
        rates[0] += rate(plain, signal::other(), |_| Ok(()))?;
        rates[1] += rate(masked, signal::ipi(), |before| let_through(masked, before))?;
    }
    println!("signals: a guest under a mask runs at {:.3} of the speed without", rates[1] / rates[0]);
    Ok(())
}

/// What the guest counts in a second. `kick` ends it.
fn rate(machine: &Machine, kick: i32, prepare: impl FnOnce(u64) -> Result<()> + Send) -> Result<f64> {
    let (vcpu, count, (sender, receiver)) = (machine.vcpu0(), machine.ram.u32(at::SCRATCH), channel());
    std::thread::scope(|scope| {
        let runner = scope.spawn(move || -> Result<()> {
            prepare(signal::block(signal::ipi()))?;
            sender.send(signal::thread())?;
            same!(vcpu.run(), Err(Errno::EINTR), "KVM_RUN");
            if signal::is_pending(signal::ipi()) {
                signal::wait(signal::ipi());
            }
            Ok(())
        });
        let thread = receiver.recv()?;
        std::thread::sleep(Duration::from_millis(50));
        let (start, first) = (Instant::now(), count.load(Acquire));
        std::thread::sleep(Duration::from_millis(200));
        let rate = f64::from(count.load(Acquire).wrapping_sub(first)) / start.elapsed().as_secs_f64();
        signal::send(thread, kick);
        runner.join().expect("no panic").map(|()| rate)
    })
}
