//! Guests in which no instruction boundary comes: each delivery of an exception makes the next one. Processors hang so (SDM Vol. 3
//! "Notify VM Exit" is for that); an interpreter must not.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::{long, protected};
use crate::testing::Machine;
use crate::vmx::Exit;

/// The guest comes back when it is kicked.
fn comes_back(name: &str, mut machine: Machine) {
    let kick = machine.cpu.kicker();
    let (done, exits) = mpsc::channel();
    thread::spawn(move || done.send(machine.cpu.run()));
    thread::sleep(Duration::from_millis(50));
    kick.kick();
    assert_eq!(exits.recv_timeout(Duration::from_secs(20)), Ok(Exit::ExternalInterrupt), "{name}");
}

#[test]
fn a_breakpoint_on_the_stack_of_its_own_handler() {
    comes_back("#DB", long::debugger_on_its_own_stack());
}

#[test]
fn an_alignment_check_at_the_stack_of_its_own_handler() {
    comes_back("#AC", protected::alignment_check_at_level_3());
}
