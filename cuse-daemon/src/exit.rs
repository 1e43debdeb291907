//! With what status softkvm ends, and why: whoever starts it, a service manager above all, may act on it.

use std::fmt::Display;

/// A status that tells what to do. The numbers are those of BSD's sysexits.h, which systemd knows by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// `EX_UNAVAILABLE`
    Unavailable = 69,
    /// `EX_TEMPFAIL`
    Taken = 75,
    /// `EX_NOPERM`
    NoPermission = 77,
    /// `EX_CONFIG`
    Configuration = 78,
    /// As `env` and `timeout` use it.
    RunFailed = 125,
}

/// What each status says, as the help shows it.
pub const STATUSES: &[(u8, &str)] = &[
    (0, "serve: ended by SIGINT, SIGTERM or SIGHUP. run: the command's own, 128 + N if signal N ended it"),
    (1, "something else failed; the message names the next step"),
    (2, "a wrong command line"),
    (Status::Unavailable as u8, "this kernel lacks something: FUSE, or the node /dev/fuse"),
    (Status::Taken as u8, "another softkvm serves the device"),
    (Status::NoPermission as u8, "started without root, or without CAP_SYS_ADMIN"),
    (Status::Configuration as u8, "there is no group of that name"),
    (Status::RunFailed as u8, "run: softkvm itself failed"),
    (126, "run: the command cannot be started"),
    (127, "run: there is no such command"),
];

/// The part of the help that lists them.
pub fn help() -> String {
    let row = |(status, what): &(u8, &str)| format!("  {status:<4} {what}\n");
    format!("Exit status:\n{}", STATUSES.iter().map(row).collect::<String>())
}

/// A reason not to start that has a status of its own.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// To end with.
    pub status: Status,
    message: String,
}

/// The error with that status. `message`: what is wrong, and the next step.
pub fn refuse(status: Status, message: impl Display) -> anyhow::Error {
    Refusal { status, message: message.to_string() }.into()
}

/// The status of an error, whatever context it was given on its way.
pub fn status_of(err: &anyhow::Error) -> u8 {
    err.downcast_ref::<Refusal>().map_or(1, |refusal| refusal.status as u8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn context_keeps_the_status() {
        let refused: Result<(), _> = Err(refuse(Status::Taken, "taken"));
        assert_eq!(status_of(&refused.context("in vain").unwrap_err()), 75);
        assert_eq!(status_of(&anyhow::anyhow!("something")), 1);
    }
}
