//! The host CPU as an oracle: runs cases in a child process that holds nothing but the cases.

mod convert;
mod memory;
mod sandbox;
mod shared;
mod stub;

use std::mem::{offset_of, size_of};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use zerocopy::{FromZeros, IntoBytes};

use self::memory::SharedMemory;
use self::shared::{BASE, BATCH, Control, Image, Slot, at};
use crate::layout::{CODE_BYTES, readonly_page};
use crate::segments::LDT;
use crate::state::{Case, End, Outcome};

/// What stops the oracle from working at all.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The shared memory could not be made.
    #[error("cannot make the shared memory: {0}")]
    Memory(std::io::Error),
    /// No child.
    #[error("cannot fork: {0}")]
    Fork(std::io::Error),
    /// The child ended before its first case.
    #[error("the sandboxed child could not set itself up: {0}")]
    Setup(String),
}

/// How long a batch may take before its case counts as hung.
const PATIENCE: Duration = Duration::from_secs(3);

/// A sandboxed child, ready to run cases.
pub struct Oracle {
    memory: SharedMemory,
    child: Pid,
    batch: u32,
}

impl Oracle {
    /// Starts a child.
    pub fn new() -> Result<Self, Error> {
        let memory = SharedMemory::new(at::END).map_err(Error::Memory)?;
        let mut oracle = Self { memory, child: Pid::from_raw(0), batch: 0 };
        oracle.spawn()?;
        Ok(oracle)
    }

    /// Runs every case, in order. A case that takes the child with it is `End::Lost`; the rest go on in a new child.
    pub fn run(&mut self, cases: &[Case]) -> Result<Vec<Outcome>, Error> {
        let mut outcomes = Vec::with_capacity(cases.len());
        while outcomes.len() < cases.len() {
            let rest = &cases[outcomes.len()..];
            self.run_batch(&rest[..rest.len().min(BATCH)], &mut outcomes)?;
        }
        Ok(outcomes)
    }

    /// Runs one case.
    pub fn run_one(&mut self, case: &Case) -> Result<Outcome, Error> {
        Ok(self.run(std::slice::from_ref(case))?.remove(0))
    }

    /// Runs up to `BATCH` cases and appends their outcomes; stops behind the first that is lost.
    fn run_batch(&mut self, cases: &[Case], outcomes: &mut Vec<Outcome>) -> Result<(), Error> {
        for (i, case) in cases.iter().enumerate() {
            let image = convert::to_image(case);
            self.memory.write(slot(i) + offset_of!(Slot, input) as u64, image.as_bytes());
        }
        self.batch = self.batch.wrapping_add(1);
        self.memory.store(at::CONTROL + offset_of!(Control, count) as u64, cases.len() as u32);
        self.memory.store(at::CONTROL + offset_of!(Control, go) as u64, self.batch);
        self.memory.wake(at::CONTROL + offset_of!(Control, go) as u64);
        let lost = self.wait_until_done();
        let finished = match lost {
            None => cases.len(),
            Some(_) => self.memory.load(at::CONTROL + offset_of!(Control, index) as u64) as usize,
        };
        for (i, case) in cases[..finished].iter().enumerate() {
            let mut image = Box::new(Image::new_zeroed());
            self.memory.read(slot(i) + offset_of!(Slot, output) as u64, image.as_mut_bytes());
            outcomes.push(convert::outcome(case, &image));
        }
        if let Some(how) = lost {
            if let Some(case) = cases.get(finished) {
                outcomes.push(Outcome { end: End::Lost(how), state: case.state.clone() });
            }
            self.end_child();
            self.spawn()?;
        }
        Ok(())
    }

    /// Waits for the batch; says how the child was lost if it was.
    fn wait_until_done(&self) -> Option<&'static str> {
        let done = at::CONTROL + offset_of!(Control, done) as u64;
        let start = Instant::now();
        loop {
            let seen = self.memory.load(done);
            if seen == self.batch {
                return None;
            }
            if start.elapsed() > PATIENCE {
                return Some("hung");
            }
            if !self.memory.wait(done, seen, Duration::from_millis(50))
                && !matches!(waitpid(self.child, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::StillAlive))
            {
                return Some("killed");
            }
        }
    }

    fn spawn(&mut self) -> Result<(), Error> {
        let control = |offset: usize| BASE + at::CONTROL + offset as u64;
        let structures = sandbox::Structures {
            ldt: control(offset_of!(Control, ldt)),
            alt_stack: control(offset_of!(Control, alt_stack)),
            action: control(offset_of!(Control, action)),
            no_core: control(offset_of!(Control, no_core)),
            program: control(offset_of!(Control, program)),
        };
        let mut words = Box::new(Control::new_zeroed());
        for (to, step) in words.steps.iter_mut().zip(sandbox::steps(self.memory.fd(), memory::rseq(), &structures)) {
            to.as_mut_bytes().copy_from_slice(step.as_bytes());
        }
        words.ldt = std::array::from_fn(|n| LDT[n].user_desc(n));
        words.alt_stack = sandbox::alt_stack();
        words.action = sandbox::action();
        let filter = sandbox::filter();
        words.filter.as_mut_bytes()[..size_of_val(&filter[..])].copy_from_slice(filter.as_bytes());
        words.program = [filter.len() as u64, control(offset_of!(Control, filter))];
        words.current = BASE + at::SPARE_SLOT;
        words.index = u32::MAX;
        words.xsave_words = convert::xsave_words();
        self.batch = 1;
        words.go = self.batch;
        self.memory.write(at::CONTROL, words.as_bytes());
        self.memory.write(at::STUB, stub::bytes());
        self.memory.write(at::CODE, &[convert::INT3; CODE_BYTES]);
        self.memory.write(at::READONLY, &readonly_page());
        let pid = stub::fork_into(self.memory.fd());
        if pid < 0 {
            return Err(Error::Fork(std::io::Error::last_os_error()));
        }
        self.child = Pid::from_raw(pid);
        match self.wait_until_done() {
            None => Ok(()),
            Some(how) => {
                let failed: Vec<u64> = [offset_of!(Control, failed_step), offset_of!(Control, error)]
                    .map(|offset| {
                        let mut bytes = [0; 8];
                        self.memory.read(at::CONTROL + offset as u64, &mut bytes);
                        u64::from_le_bytes(bytes)
                    })
                    .to_vec();
                let step = failed[0].saturating_sub(control(offset_of!(Control, steps))) / 64;
                Err(Error::Setup(format!("{how} at step {step}, error {}", failed[1] as i64)))
            }
        }
    }

    fn end_child(&mut self) {
        // The child is ours until waited for, so the id cannot name another process. Both may fail if it has ended.
        let _ = kill(self.child, Signal::SIGKILL);
        let _ = waitpid(self.child, None);
    }
}

impl Drop for Oracle {
    fn drop(&mut self) {
        self.end_child();
    }
}

/// Offset of slot `i` in the shared memory.
fn slot(i: usize) -> u64 {
    at::SLOTS + (i * size_of::<Slot>()) as u64
}
