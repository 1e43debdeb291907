//! Every case of `common/cases.rs` returns what was recorded from a Linux KVM.

#[path = "common/cases.rs"]
mod cases;
mod common;

use std::sync::Arc;

use common::{BASE, FakeClient};

impl cases::Backend for Arc<FakeClient> {
    fn memory(&self) -> u64 {
        BASE
    }

    fn value(&mut self, fd: i32, request: u32, arg: u64) -> Result<i32, String> {
        self.ioctl(fd, request, arg).map_err(|errno| format!("{errno:?}"))
    }

    fn bytes(&mut self, fd: i32, request: u32, bytes: &mut Vec<u8>) -> Result<i32, String> {
        let (ret, after) = self.ioctl_bytes(fd, request, bytes.clone()).map_err(|errno| format!("{errno:?}"))?;
        *bytes = after;
        Ok(ret)
    }

    fn system(&self) -> i32 {
        0
    }
}

#[test]
fn returns_are_those_of_linux() {
    let ours = cases::run(&mut FakeClient::new());
    let recorded = include_str!("returns.txt").lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    let mut wrong = Vec::new();
    let mut count = 0;
    for (ours, recorded) in ours.iter().zip(recorded) {
        count += 1;
        let (line, struck) = recorded.split_once("  # ").unwrap_or((recorded, ""));
        // A struck line gives Linux's answer after the recorded one, and why.
        let expected = match struck.strip_prefix("not so: ") {
            Some(correct) => {
                let name = line.rsplit_once(" = ").expect("a result").0;
                format!("{name} = {}", correct.split_once(", ").expect("a reason").0)
            }
            None => line.to_owned(),
        };
        if *ours != expected {
            wrong.push(format!("{ours}, not {expected}"));
        }
    }
    assert_eq!(count, ours.len(), "a recorded line for each case");
    assert!(wrong.is_empty(), "{wrong:#?}");
}
