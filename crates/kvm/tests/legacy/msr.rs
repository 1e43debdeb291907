//! `KVM_GET_MSRS` and `KVM_SET_MSRS`, RDMSR and WRMSR.

use iced_x86::code_asm::*;
use kvm_abi::consts::*;
use kvm_abi::request::*;

use crate::machine::{CODE, Machine, STACK};
use crate::system::OF_2007;

#[test]
fn get_msrs_returns_how_many_and_copies_all_back() {
    let m = Machine::new();
    let (done, data) = m.msrs(KVM_GET_MSRS, &[(0xfe, 1), (0x4747_4747, 2), (0x174, 3)]).unwrap();
    assert_eq!((done, &data[1..]), (1, &[2, 3][..]), "up to the first that does not exist");
    assert_eq!(m.msrs(KVM_GET_MSRS, &[(0x4747_4747, 2)]), Ok((0, vec![2])));
}

#[test]
fn set_msrs_returns_how_many() {
    let m = Machine::new();
    assert_eq!(m.msrs(KVM_SET_MSRS, &[(0x174, 7), (0x4747_4747, 0), (0x175, 9)]).unwrap().0, 1);
    assert_eq!(m.msrs(KVM_GET_MSRS, &[(0x174, 0), (0x175, 0)]), Ok((2, vec![7, 0])));
    assert_eq!(m.msrs(KVM_SET_MSRS, &[(0x4747_4747, 0)]).unwrap().0, 0);
}

/// The nine that qemu of 2007 saves and loads, in its order, and what they are at first.
#[test]
fn msrs_that_clients_save_come_back() {
    let m = Machine::new();
    let nine =
        [0x174, 0x175, 0x176, 0xc000_0081, 0x10, 0xc000_0083, 0xc000_0102, 0xc000_0084, 0xc000_0082].map(|i| (i, 0));
    let (done, fresh) = m.msrs(KVM_GET_MSRS, &nine).unwrap();
    assert_eq!(done, 9);
    assert!(fresh.iter().enumerate().all(|(at, value)| at == 4 || *value == 0), "{fresh:x?}");
    let values = nine.map(|(index, _)| (index, if index == 0x10 { 1 << 50 } else { u64::from(index & 0xfff) }));
    assert_eq!(m.msrs(KVM_SET_MSRS, &values).unwrap().0, 9);
    let (_, loaded) = m.msrs(KVM_GET_MSRS, &nine).unwrap();
    for (at, (index, value)) in values.into_iter().enumerate() {
        assert!(loaded[at] == value || index == 0x10 && loaded[at] > value, "{index:x} {:x}", loaded[at]);
    }
    assert_eq!(m.msrs(KVM_GET_MSRS, &OF_2007.map(|index| (index, 0))).unwrap().0, 10);
    assert_eq!(m.msrs(KVM_GET_MSRS, &[(0x1a0, 9)]), Ok((1, vec![0])));
}

/// The time-stamp counter starts at 0.
#[test]
fn a_fresh_counter_starts_at_0() {
    let m = Machine::new();
    let (_, tsc) = m.msrs(KVM_GET_MSRS, &[(0x10, 0)]).unwrap();
    let khz = m.client.ioctl(m.vcpu, KVM_GET_TSC_KHZ, 0).unwrap() as u64;
    assert!(tsc[0] < khz * 60_000, "within a minute of now");
}

#[test]
fn a_bad_efer_counts_as_done_and_is_the_guests_fault() {
    let m = Machine::real(|a| a.hlt().unwrap());
    m.handler(13);
    for bad in [0x501 | 1 << 13, 1 << 63] {
        assert_eq!(m.msrs(KVM_SET_MSRS, &[(0xc000_0080, bad), (0x174, 5)]).unwrap().0, 2);
        assert_eq!(m.sregs().efer, 0);
        m.set_sregs(|_| ());
        assert_eq!(m.run(), Ok(KVM_EXIT_IO));
        assert_eq!(m.io_data(1), [13], "#GP at the next entry");
        m.set_regs(|regs| (regs.rip, regs.rsp) = (CODE, STACK));
    }
    assert_eq!(m.msrs(KVM_SET_MSRS, &[(0xc000_0080, 0x901)]).unwrap().0, 1);
    assert_eq!(m.sregs().efer, 0x901, "whatever CPUID says");
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
}

/// A change of LME under paging is bad too, and LMA is the processor's own.
#[test]
fn lme_does_not_change_under_paging() {
    let m = Machine::long(|a| a.hlt().unwrap());
    assert_eq!(m.msrs(KVM_SET_MSRS, &[(0xc000_0080, 0)]).unwrap().0, 1);
    assert_eq!(m.sregs().efer, 0x500);
    assert_eq!(m.run(), Ok(KVM_EXIT_SHUTDOWN), "#GP without an IDT");
}

/// `kvm_get_msr_common` and `vmx_get_msr` of 2.6.23; all else is #GP.
#[test]
fn rdmsr_knows_what_2007_knew() {
    let known = [
        0x10,
        0x174,
        0x175,
        0x176,
        0x1b,
        0x1a0,
        0xc000_0080,
        0xc000_0081,
        0xc000_0082,
        0xc000_0083,
        0xc000_0084,
        0xc000_0100,
        0xc000_0101,
        0xc000_0102,
    ];
    let constant = [
        0,
        1,
        0x17,
        0x8b,
        0xfe,
        0x179,
        0x17a,
        0x198,
        0x200,
        0x210,
        0x250,
        0x277,
        0x2ff,
        0x400,
        0x403,
        0x407,
        0x40b,
        0x40f,
        0x413,
        0xc001_0010,
        0xc001_0015,
        0x2a,
        0xcd,
    ];
    let m = Machine::new();
    for index in known.into_iter().chain(constant) {
        assert_eq!(m.msrs(KVM_GET_MSRS, &[(index, 0)]).unwrap().0, 1, "{index:#x}");
    }
    assert_eq!(m.msrs(KVM_GET_MSRS, &[(0xcd, 0)]), Ok((1, vec![3])));
    for index in [0x79, 0x8b, 0x17a, 0x210, 0x2fe, 0x401] {
        assert_eq!(m.msrs(KVM_SET_MSRS, &[(index, 0)]).unwrap().0, 1, "{index:#x}: taken and forgotten");
    }
    let m = Machine::real(|a| {
        a.mov(ecx, 0x8765_5678u32).unwrap(); // the paravirtual one: left out
        a.rdmsr().unwrap();
    });
    m.handler(13);
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io_data(1), [13]);
}
