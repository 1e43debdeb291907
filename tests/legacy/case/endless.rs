//! What lasts until somebody ends it: a guest that never exits, and VMs that come and go. Where the daemon is killed
//! meanwhile both end with an error, and with the thread's signals as they were.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};

use super::same;
use super::signals::counting;
use crate::kvmctl::Machine;
use crate::signal;
use crate::vmm::Kvm;

/// For what a killed daemon leaves to be put right.
const PATIENCE: Duration = Duration::from_secs(10);

/// Some time inside one `KVM_RUN`, which a signal ends.
pub(crate) fn spins(time: Duration) -> Result<()> {
    let machine = Machine::new(&Kvm::open()?, &counting())?;
    signal::handle(signal::other());
    let thread = signal::thread();
    unharmed(|| {
        std::thread::scope(|scope| {
            let (ended, end) = channel::<()>();
            scope.spawn(move || {
                let mut wait = time;
                // Again and again: one that comes just before the call is lost.
                while end.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                    signal::send(thread, signal::other());
                    wait = Duration::from_millis(20);
                }
            });
            let run = machine.vcpu0().run();
            drop(ended);
            same!(run, Err(Errno::EINTR), "KVM_RUN");
            Ok(())
        })
    })
}

/// VMs with RAM and two vCPUs, one after the other.
pub(crate) fn churns(time: Duration) -> Result<()> {
    vms_of(time, |kvm| {
        let machine = Machine::new(kvm, &counting())?;
        machine.vm.create_vcpu(1)?;
        Ok(())
    })
}

/// VMs without anything, one after the other: opening their files is most of what is done for them.
pub(crate) fn creates(time: Duration) -> Result<()> {
    vms_of(time, |kvm| kvm.create_vm().map(drop))
}

/// One after the other, for some time. They leave no descriptor.
fn vms_of(time: Duration, life: impl Fn(&Kvm) -> Result<()>) -> Result<()> {
    let descriptors = || std::fs::read_dir("/proc/self/fd").map(Iterator::count).context("/proc/self/fd");
    let kvm = Kvm::open()?;
    let (start, before) = (Instant::now(), descriptors()?);
    let mut vms = 0;
    unharmed(|| {
        while start.elapsed() < time {
            life(&kvm)?;
            vms += 1;
        }
        Ok(())
    })?;
    println!("{vms} VMs in {:.1} s", start.elapsed().as_secs_f64());
    same!(descriptors()?, before, "open descriptors");
    Ok(())
}

/// Passes the result on, once this thread's signals are as they were.
fn unharmed(body: impl FnOnce() -> Result<()>) -> Result<()> {
    // Those that have names: what an injection blocks is all of them.
    let blocked = || SigSet::thread_get_mask().map(|mask| Signal::iterator().filter(|s| mask.contains(*s)).count());
    let before = blocked()?;
    let result = body();
    let start = Instant::now();
    while blocked()? != before {
        ensure!(start.elapsed() < PATIENCE, "signals stay blocked behind {result:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
    result
}
