//! `KVM_DEBUG_GUEST`.

use iced_x86::code_asm::*;
use kvm_abi::consts::*;
use kvm_abi::legacy::{kvm_breakpoint, kvm_debug_guest};
use kvm_abi::request::*;

use crate::machine::{CODE, Machine};

/// TF and RF.
const STEP_FLAGS: u64 = 0x1_0100;

fn debug(m: &Machine, singlestep: u32, breakpoints: &[u64]) {
    let mut debug = kvm_debug_guest { enabled: 1, singlestep, ..Default::default() };
    for (slot, &address) in debug.breakpoints.iter_mut().zip(breakpoints) {
        *slot = kvm_breakpoint { enabled: 1, padding: 0, address };
    }
    assert_eq!(m.set(KVM_DEBUG_GUEST, &debug), Ok(0));
}

fn off(m: &Machine) {
    assert_eq!(m.set(KVM_DEBUG_GUEST, &kvm_debug_guest::default()), Ok(0));
}

fn five_nops() -> Machine {
    Machine::real(|a| {
        for _ in 0..5 {
            a.nop().unwrap();
        }
        a.hlt().unwrap();
    })
}

#[test]
fn debug_guest_steps_and_hides_tf_and_rf() {
    let m = five_nops();
    debug(&m, 1, &[]);
    for rip in 1..4 {
        assert_eq!(m.run(), Ok(KVM_EXIT_DEBUG));
        assert_eq!(m.regs().rip, CODE + rip, "the next instruction");
        assert_eq!(m.regs().rflags & STEP_FLAGS, 0);
        m.set_regs(|_| ());
    }
    off(&m);
    assert_eq!(m.regs().rflags & STEP_FLAGS, 0);
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
}

#[test]
fn debug_guest_has_four_breakpoints() {
    let m = five_nops();
    debug(&m, 0, &[CODE + 1, CODE + 2, CODE + 4, CODE + 3]);
    assert_eq!(m.run(), Ok(KVM_EXIT_DEBUG));
    assert_eq!(m.regs().rip, CODE + 1, "the instruction itself has not run");
    assert_eq!(m.run(), Ok(KVM_EXIT_DEBUG));
    assert_eq!(m.regs().rip, CODE + 1, "and does not, as long as the breakpoint is there");
    for rip in 2..5 {
        m.set_regs(|regs| regs.rflags |= 0x1_0000); // RF
        assert_eq!(m.run(), Ok(KVM_EXIT_DEBUG));
        assert_eq!(m.regs().rip, CODE + rip);
    }
    off(&m);
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
}

/// TF and RF are set at every entry: a step gets past a breakpoint.
#[test]
fn a_step_gets_past_a_breakpoint() {
    let m = five_nops();
    debug(&m, 1, &[CODE, CODE + 1]);
    for rip in 1..4 {
        assert_eq!(m.run(), Ok(KVM_EXIT_DEBUG));
        assert_eq!(m.regs().rip, CODE + rip);
    }
}

#[test]
fn a_step_over_a_port_comes_after_its_exit() {
    let m = Machine::real(|a| {
        a.out(0x10, al).unwrap();
        a.in_(al, 0x10).unwrap();
        a.hlt().unwrap();
    });
    debug(&m, 1, &[]);
    for rip in [2, 4] {
        assert_eq!(m.run(), Ok(KVM_EXIT_IO));
        assert_eq!(m.run(), Ok(KVM_EXIT_DEBUG));
        assert_eq!(m.regs().rip, CODE + rip);
    }
}

#[test]
fn a_breakpoint_that_is_not_enabled_is_none() {
    let m = five_nops();
    let mut request = kvm_debug_guest { enabled: 1, ..Default::default() };
    request.breakpoints[0] = kvm_breakpoint { enabled: 0, padding: 1, address: CODE + 1 };
    assert_eq!(m.set(KVM_DEBUG_GUEST, &request), Ok(0));
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
}

/// The guest's own #DB goes to the guest while nobody debugs it.
#[test]
fn without_debug_guest_the_guests_traps_are_its_own() {
    let m = Machine::real(|a| {
        a.pushf().unwrap();
        a.pop(ax).unwrap();
        a.or(ax, 0x100).unwrap();
        a.push(ax).unwrap();
        a.popf().unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    m.handler(1);
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io_data(1), [1]);
}
