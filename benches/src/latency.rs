//! How long it takes until somebody else's word reaches a vCPU: a signal to its thread, an eventfd to its guest.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kvm_ioctls::Kvm;
use nix::errno::Errno;
use tiny_vmm::code_asm::*;
use tiny_vmm::{Alarm, Guest, Kick, Mode, VcpuExit, assemble};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::costs::handle;
use crate::report::Spread;
use crate::row::Row;

const KICK: &str = "signal to the end of KVM_RUN, the guest runs";
const RUNNING: &str = "irqfd to the OUT of the guest's handler, the guest runs";
const HALTED: &str = "irqfd to the OUT of the guest's handler, the guest halts";
pub(crate) const NAMES: &[&str] = &[KICK, RUNNING, HALTED];

const RAM: usize = 2 << 20;
const ROUNDS: usize = 200;
/// So long before each word, that the vCPU is where it is meant to be.
const PAUSE: Duration = Duration::from_millis(2);

/// On the /dev/kvm that is there.
pub(crate) fn measure() -> Result<Vec<Row>> {
    let row = |name: &str, times: Vec<f64>| Row::new(name, "µs", Some(Spread::of(&times).median), None);
    Ok(vec![row(KICK, kicks()?), row(RUNNING, irqfd(false)?), row(HALTED, irqfd(true)?)])
}

/// Gives the word each time that it is asked, and says when that was.
fn speaker(asked: &Receiver<()>, spoken: &Sender<Instant>, word: impl Fn()) {
    while asked.recv().is_ok() {
        thread::sleep(PAUSE);
        let at = Instant::now();
        word();
        if spoken.send(at).is_err() {
            return;
        }
    }
}

fn kicks() -> Result<Vec<f64>> {
    let code = assemble(Mode::Long, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.jmp(again)
    })?;
    let mut guest = Guest::new(Mode::Long, RAM, &code)?;
    let kick = Kick::of_this_thread();
    let ((ask, asked), (spoken, heard)) = (channel(), channel());
    thread::scope(|scope| {
        scope.spawn(move || speaker(&asked, &spoken, || kick.kick()));
        let mut times = Vec::with_capacity(ROUNDS);
        for _ in 0..ROUNDS {
            ask.send(()).context("the other thread waits")?;
            // A signal that comes before `KVM_RUN` is lost, and the next one counts.
            let _alarm = Alarm::new(PAUSE * 50);
            let ended = guest.run().map(|exit| format!("{exit:?}"));
            let now = Instant::now();
            match ended {
                Err(error) if error.errno() == Errno::EINTR as i32 => {}
                other => bail!("an unexpected end: {other:?}"),
            }
            let at = heard.recv().context("the other thread speaks")?;
            times.push(now.saturating_duration_since(at).as_secs_f64() * 1e6);
        }
        drop(ask);
        Ok(times)
    })
}

/// GSI 4 is input 4 of the first 8259, whose vectors begin at 20H.
fn irqfd(halted: bool) -> Result<Vec<f64>> {
    const GSI: u32 = 4;
    const VECTORS: u32 = 0x20;
    let code = assemble(Mode::Protected, |a| {
        // Intel 8259A, ICW1 to ICW4, and a mask that leaves this input.
        for (port, value) in [(0x20, 0x11), (0x21, VECTORS), (0x21, 4), (0x21, 1), (0x21, !(1 << GSI) & 0xff)] {
            a.mov(al, value)?;
            a.out(port, al)?;
        }
        let mut again = a.create_label();
        a.sti()?;
        a.set_label(&mut again)?;
        if halted {
            a.hlt()?;
        }
        a.jmp(again)
    })?;
    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    let mut guest = Guest::with_irqchip(&kvm, Mode::Protected, RAM, &code)?;
    handle(&mut guest, (VECTORS + GSI) as u8, |a| {
        a.out(0x80, al)?;
        a.mov(al, 0x20)?;
        a.out(0x20, al)?;
        a.iretd()
    })?;
    let event = EventFd::new(EFD_NONBLOCK).context("no eventfd")?;
    guest.vm().register_irqfd(&event, GSI).context("KVM_IRQFD")?;
    let ((ask, asked), (spoken, heard)) = (channel(), channel());
    thread::scope(|scope| {
        scope.spawn(|| {
            let (asked, spoken) = (asked, spoken);
            speaker(&asked, &spoken, || drop(event.write(1)));
        });
        let mut times = Vec::with_capacity(ROUNDS);
        for _ in 0..ROUNDS {
            ask.send(()).context("the other thread waits")?;
            match guest.run().context("KVM_RUN")? {
                VcpuExit::IoOut(0x80, _) => {}
                other => bail!("an unexpected exit: {other:?}"),
            }
            let now = Instant::now();
            let at: Instant = heard.recv().context("the other thread speaks")?;
            times.push(now.saturating_duration_since(at).as_secs_f64() * 1e6);
        }
        drop(ask);
        Ok(times)
    })
}
