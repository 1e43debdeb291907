//! A client of QEMU's machine protocol (QEMU's "QMP Protocol Specification"): lines of JSON on a socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::eventually;

/// For an answer. The longest work is a snapshot of the whole machine.
const ANSWER: Duration = Duration::from_secs(300);

/// A connection that takes commands.
pub struct Qmp {
    lines: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to `-qmp unix:PATH,server=on,wait=off` of a QEMU that has just been started.
    pub fn connect(path: &Path, within: Duration) -> Result<Self> {
        let mut stream = None;
        eventually(within, || {
            stream = UnixStream::connect(path).ok();
            stream.is_some()
        });
        let stream = stream.with_context(|| format!("nobody listens at {} after {within:?}", path.display()))?;
        stream.set_read_timeout(Some(ANSWER)).context("a time limit for answers")?;
        let mut qmp = Self { lines: BufReader::new(stream) };
        qmp.receive("QMP")?;
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// What the command returns. Events are passed over.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments }).to_string() + "\n";
        self.lines.get_mut().write_all(line.as_bytes()).with_context(|| format!("sending {command}"))?;
        self.receive("return").context(line)
    }

    /// A command of the human monitor, which answers only when something went wrong.
    pub fn human(&mut self, line: &str) -> Result<()> {
        let said = self.execute("human-monitor-command", &json!({ "command-line": line }))?;
        match said.as_str() {
            Some("") => Ok(()),
            _ => bail!("{line}: {said}"),
        }
    }

    /// The value of this key in the next message that has it, or is an error.
    fn receive(&mut self, key: &str) -> Result<Value> {
        loop {
            let mut line = String::new();
            if self.lines.read_line(&mut line).context("waiting for an answer of QEMU's")? == 0 {
                bail!("QEMU closed the connection");
            }
            let mut message: Value = serde_json::from_str(&line).context("QEMU sends no JSON")?;
            if let Some(error) = message.get("error") {
                bail!("QEMU answers {error}");
            }
            if let Some(value) = message.get_mut(key) {
                return Ok(value.take());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn events_are_passed_over_and_errors_are_errors() {
        let path = std::env::temp_dir().join(format!("softkvm-qmp-{}", std::process::id()));
        let listener = UnixListener::bind(&path).expect("a socket");
        let server = std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("a client");
            let mut lines = BufReader::new(stream);
            let mut say = |text: &str| lines.get_mut().write_all(text.as_bytes()).expect("it listens");
            say(
                "{\"QMP\": {\"version\": {}}}\n{\"return\": {}}\n{\"event\": \"STOP\"}\n{\"return\": {\"status\": \"paused\"}}\n",
            );
            say("{\"error\": {\"class\": \"GenericError\", \"desc\": \"no such thing\"}}\n");
            let mut sent = String::new();
            for _ in 0..3 {
                lines.read_line(&mut sent).expect("a command");
            }
            sent
        });
        let mut qmp = Qmp::connect(&path, ANSWER).expect("it is greeted");
        assert_eq!(qmp.execute("query-status", &json!({})).expect("an answer")["status"], "paused");
        assert!(format!("{:?}", qmp.human("x").expect_err("an error")).contains("no such thing"));
        let sent = server.join().expect("it ends");
        assert!(sent.starts_with("{\"arguments\":{},\"execute\":\"qmp_capabilities\"}\n"), "{sent}");
        std::fs::remove_file(path).expect("the socket is there");
    }
}
