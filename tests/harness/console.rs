//! A program whose terminal we read and type on, in the manner of expect(1).

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

/// Takes ECMA-48 escape sequences (`ESC c`, `ESC [ … final`) out of a stream of bytes.
#[derive(Debug, Default)]
pub enum Plain {
    /// Between sequences.
    #[default]
    Text,
    /// Behind ESC.
    Escape,
    /// Behind ESC [.
    Control,
}

impl Plain {
    /// True if the byte is text.
    pub fn keeps(&mut self, byte: u8) -> bool {
        match (&self, byte) {
            (Plain::Text, 0x1b) => *self = Plain::Escape,
            (Plain::Text, _) => return true,
            (Plain::Escape, b'[') => *self = Plain::Control,
            (Plain::Escape, _) | (Plain::Control, 0x40..=0x7e) => *self = Plain::Text,
            (Plain::Control, _) => {}
        }
        false
    }
}

/// What the program has written so far, escape sequences left out.
#[derive(Default)]
struct Written {
    text: String,
    errors: String,
    /// Streams that have not ended.
    open: u32,
}

impl Written {
    /// The last lines, for the message of a failure.
    fn tail(&self) -> String {
        format!("--- stdout\n{}\n--- stderr\n{}\n---", tail(&self.text), tail(&self.errors))
    }
}

#[derive(Clone, Copy)]
enum Stream {
    Stdout,
    Stderr,
}

#[derive(Default)]
struct Shared {
    written: Mutex<Written>,
    more: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running program. It and everything that it started in its process group is killed when this is dropped.
pub struct Console {
    child: Child,
    stdin: Option<ChildStdin>,
    shared: Arc<Shared>,
    readers: Vec<JoinHandle<()>>,
    /// Bytes of the text that an earlier `expect` has consumed.
    seen: usize,
}

impl Console {
    /// Starts `command` with stdin, stdout and stderr on us, as the leader of a process group of its own.
    pub fn start(command: &mut Command) -> Result<Self> {
        let name = format!("{command:?}");
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let shared = Arc::new(Shared::default());
        shared.lock().open = 2;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().map(|s| reader(s, Stream::Stdout, shared.clone()));
        let stderr = child.stderr.take().map(|s| reader(s, Stream::Stderr, shared.clone()));
        Ok(Self { child, stdin, shared, readers: stdout.into_iter().chain(stderr).collect(), seen: 0 })
    }

    /// The process that was started.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().try_into().expect("process ids are positive i32"))
    }

    /// Waits until `needle` shows up on stdout behind what was found before, and returns the text up to and with it.
    pub fn expect(&mut self, needle: &str, within: Duration) -> Result<String> {
        let deadline = Instant::now() + within;
        let mut written = self.shared.lock();
        loop {
            if let Some(at) = written.text[self.seen..].find(needle) {
                let end = self.seen + at + needle.len();
                let found = written.text[self.seen..end].to_owned();
                self.seen = end;
                return Ok(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if written.open == 0 {
                bail!("the program ended before it wrote {needle:?}. Its output:\n{}", written.tail());
            }
            if left.is_zero() {
                bail!("no {needle:?} within {within:?}. The output so far:\n{}", written.tail());
            }
            written = self.shared.more.wait_timeout(written, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Types.
    pub fn send(&mut self, text: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("stdin is closed")?;
        stdin.write_all(text.as_bytes()).and_then(|()| stdin.flush()).context("typing on the console")
    }

    /// Everything written to stdout so far.
    pub fn text(&self) -> String {
        self.shared.lock().text.clone()
    }

    /// Everything written to stderr so far.
    pub fn errors(&self) -> String {
        self.shared.lock().errors.clone()
    }

    /// The last lines of both, for the message of a failure.
    pub fn tail(&self) -> String {
        self.shared.lock().tail()
    }

    /// Waits for the end of the program.
    pub fn wait(&mut self, within: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait().context("waiting for the program")? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!("the program did not end within {within:?}. Its output:\n{}", self.shared.lock().tail());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends the program's input, waits for its end and for all of its output.
    pub fn finish(&mut self, within: Duration) -> Result<ExitStatus> {
        self.stdin = None;
        let status = self.wait(within)?;
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        Ok(status)
    }

    /// Kills the started process alone with SIGKILL.
    pub fn kill(&self) {
        // Gone already is as good.
        let _ = kill(self.pid(), Signal::SIGKILL);
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = killpg(self.pid(), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

fn reader(mut from: impl Read + Send + 'static, stream: Stream, shared: Arc<Shared>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut plain = Plain::default();
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            let text: Vec<u8> = buffer[..n].iter().copied().filter(|&b| plain.keeps(b)).collect();
            let text = String::from_utf8_lossy(&text);
            let mut written = shared.lock();
            match stream {
                Stream::Stdout => written.text.push_str(&text),
                Stream::Stderr => written.errors.push_str(&text),
            }
            drop(written);
            shared.more.notify_all();
        }
        shared.lock().open -= 1;
        shared.more.notify_all();
    })
}

/// The last lines, enough to see what went wrong.
pub fn tail(text: &str) -> String {
    const LINES: usize = 60;
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn finds_text_in_order_and_without_escapes() {
        let mut console = Console::start(Command::new("printf").arg("one \x1b[2Jtwo\nthree")).expect("printf starts");
        console.expect("one two", SOON).expect("it was written");
        assert!(console.expect("one", SOON).is_err(), "consumed");
        console.expect("three", SOON).expect("it follows");
        assert!(console.finish(SOON).expect("printf ends").success());
    }

    #[test]
    fn types_and_reads_the_answer() {
        let mut console = Console::start(&mut Command::new("cat")).expect("cat starts");
        console.send("hello\n").expect("cat reads");
        console.expect("hello\n", SOON).expect("cat answers");
        assert!(console.finish(SOON).expect("cat ends at the end of its input").success());
    }

    #[test]
    fn a_silent_program_is_an_error_in_time() {
        let mut console = Console::start(Command::new("sleep").arg("100")).expect("sleep starts");
        let error = console.expect("anything", Duration::from_millis(50)).expect_err("it writes nothing");
        assert!(error.to_string().contains("no \"anything\" within 50ms"));
    }
}
