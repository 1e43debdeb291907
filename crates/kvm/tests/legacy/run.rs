//! `KVM_RUN`: the fields that every return shows, and what stays as it was.

use iced_x86::code_asm::*;
use kvm_abi::consts::*;
use kvm_abi::request::*;
use nix::errno::Errno;

use crate::machine::{CODE, DEVICE, Machine};

#[test]
fn run_takes_no_argument() {
    let m = Machine::real(|a| a.hlt().unwrap());
    assert_eq!(m.client.ioctl(m.vcpu, KVM_RUN, 1), Err(Errno::EINVAL));
    assert_eq!(m.regs().rip, CODE);
    assert_eq!(m.client.ioctl(m.vcpu, KVM_RUN, 0), Ok(0));
}

#[test]
fn every_return_shows_if_flag_cr8_apic_base_and_ready() {
    let m = Machine::long(|a| {
        let mut top = a.create_label();
        a.sti().unwrap();
        a.nop().unwrap();
        a.out(0x10, al).unwrap();
        a.cli().unwrap();
        a.hlt().unwrap();
        a.mov(byte_ptr(DEVICE as u32), al).unwrap();
        a.set_label(&mut top).unwrap();
        a.jmp(top).unwrap();
    });
    let spoil = || m.run.write(12, &[0x66, 0x77, 0, 0]).unwrap();
    m.run.store_u64(16, 5).unwrap();
    let shown = || (m.ready_and_if(), m.run.load_u64(16).unwrap(), m.run.load_u64(24).unwrap());
    spoil();
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(shown(), ((1, 1), 5, 0xfee0_0900));
    spoil();
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!(shown(), ((1, 0), 5, 0xfee0_0900));
    spoil();
    assert_eq!(m.run(), Ok(KVM_EXIT_MMIO));
    assert_eq!(shown(), ((1, 0), 5, 0xfee0_0900));
    spoil();
    m.client.raise();
    assert_eq!(m.run(), Err(Errno::EINTR));
    assert_eq!(shown(), ((1, 0), 5, 0xfee0_0900));
}

#[test]
fn nothing_of_kvm_run_is_cleared() {
    let m = Machine::real(|a| {
        a.out(0x10, al).unwrap();
        a.hlt().unwrap();
    });
    m.run.write(1, &[0xaa; 7]).unwrap();
    m.run.write(14, &[0xaa; 2]).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!(m.io_union(), (1, 1, 0x10), "the last exit's union stays");
    for at in (1..8).chain(14..16) {
        assert_eq!(m.run.load_u8(at), Some(0xaa), "byte {at}, which today is immediate_exit or flags");
    }
}

/// An exit for user space returns 0 although a signal is pending.
#[test]
fn an_exit_goes_before_a_signal() {
    let m = Machine::real(|a| {
        a.hlt().unwrap();
        a.mov(byte_ptr(0x10).es(), al).unwrap();
        a.in_(al, 0x10).unwrap();
    });
    m.set_sregs(|sregs| sregs.es.base = DEVICE);
    m.client.raise();
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!(m.run(), Ok(KVM_EXIT_MMIO), "a device write is reported before anything else runs");
    assert_eq!(m.regs().rip, CODE + 1 + 4);
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
}
