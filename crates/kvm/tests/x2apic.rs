//! `KVM_CAP_X2APIC_API`. What must happen is api.rst's: "7.7 KVM_CAP_X2APIC_API", `KVM_SET_GSI_ROUTING`, `KVM_SIGNAL_MSI` and
//! `KVM_GET_LAPIC`; errors are those of lapic.c and irq_comm.c.

mod common;

use std::sync::Arc;

use common::FakeClient;
use kvm_abi::consts::*;
use kvm_abi::request::*;
use kvm_abi::{Plain, kvm_cpuid_entry2, kvm_msi};
use nix::errno::Errno;

const APIC_BASE: u32 = 0x1b;
const WIDE: u32 = KVM_X2APIC_API_USE_32BIT_IDS;
const STRICT: u32 = KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
const VECTOR: u32 = 0x41;
/// Words of `struct kvm_lapic_state`.
const ID: usize = 0x20 / 4;
const LDR: usize = 0xd0 / 4;
const SVR: usize = 0xf0 / 4;
const IRR: usize = 0x200 / 4;

struct Machine {
    client: Arc<FakeClient>,
    vm: i32,
    vcpus: Vec<i32>,
}

impl Machine {
    /// vCPUs of these ids, their APICs enabled, in x2APIC mode or not.
    fn new(flags: u32, ids: &[u32], x2apic: bool) -> Self {
        let client = FakeClient::new();
        let vm = client.ioctl(0, KVM_CREATE_VM, 0).unwrap();
        let mut machine = Self { client, vm, vcpus: Vec::new() };
        machine.enable(flags.into()).unwrap();
        machine.client.ioctl(vm, KVM_CREATE_IRQCHIP, 0).unwrap();
        for &id in ids {
            let vcpu = machine.client.ioctl(vm, KVM_CREATE_VCPU, id.into()).unwrap();
            machine.vcpus.push(vcpu);
            if x2apic {
                let leaf = kvm_cpuid_entry2 { function: 1, ecx: 1 << 21, edx: 1 << 9, ..Plain::zeroed() };
                let list = [&1u64.to_le_bytes()[..], leaf.as_bytes()].concat();
                machine.client.ioctl_bytes(vcpu, KVM_SET_CPUID2, list).unwrap();
                let msr = [1, u64::from(APIC_BASE), 0xfee0_0c00].map(u64::to_le_bytes).concat();
                assert_eq!(machine.client.ioctl_bytes(vcpu, KVM_SET_MSRS, msr).unwrap().0, 1);
            }
            let mut page = machine.page(machine.vcpus.len() - 1).unwrap();
            page[SVR] |= 0x100;
            machine.client.set(vcpu, KVM_SET_LAPIC, &page).unwrap();
        }
        machine
    }

    fn enable(&self, flags: u64) -> Result<i32, Errno> {
        self.client.enable(self.vm, KVM_CAP_X2APIC_API, flags)
    }

    fn page(&self, vcpu: usize) -> Result<[u32; 256], Errno> {
        let mut page = [0; 256];
        self.client.ioctl_with(self.vcpus[vcpu], KVM_GET_LAPIC, &mut page).map(|_| page)
    }

    fn signal(&self, lo: u32, hi: u32) -> Result<i32, Errno> {
        let msi = kvm_msi { address_lo: 0xfee0_0000 | lo, address_hi: hi, data: VECTOR, ..Plain::zeroed() };
        self.client.set(self.vm, KVM_SIGNAL_MSI, &msi)
    }

    fn route(&self, lo: u32, hi: u32) -> Result<(), Errno> {
        let mut bytes = vec![1, 0, 0, 0, 0, 0, 0, 0];
        let entry = [5, KVM_IRQ_ROUTING_MSI, 0, 0, 0xfee0_0000 | lo, hi, VECTOR, 0, 0, 0, 0, 0];
        bytes.extend(entry.iter().flat_map(|word| word.to_le_bytes()));
        self.client.ioctl_bytes(self.vm, KVM_SET_GSI_ROUTING, bytes).map(drop)
    }

    fn has_vector(&self, vcpu: usize) -> bool {
        self.page(vcpu).unwrap()[IRR + 4 * (VECTOR as usize / 32)] >> (VECTOR % 32) & 1 != 0
    }
}

#[test]
fn both_flags_are_offered_and_no_other() {
    let machine = Machine::new(0, &[], false);
    let value = machine.client.ioctl(machine.vm, KVM_CHECK_EXTENSION, KVM_CAP_X2APIC_API.into()).unwrap();
    assert_eq!(value as u32, WIDE | STRICT);
    for flags in [4, WIDE as u64 | 1 << 32, u64::MAX] {
        assert_eq!(machine.enable(flags), Err(Errno::EINVAL));
    }
    for flags in [0, WIDE, STRICT, WIDE | STRICT] {
        assert_eq!(machine.enable(flags.into()), Ok(0));
    }
}

#[test]
fn the_upper_half_of_an_address_counts_where_ids_are_wide() {
    let narrow = Machine::new(0, &[0x34, 0x134], true);
    assert_eq!(narrow.signal(0x3_4000, 0x1ff), Ok(1));
    assert_eq!((narrow.has_vector(0), narrow.has_vector(1)), (true, false), "address_hi is ignored");
    assert_eq!(narrow.route(0x3_4000, 0xff), Ok(()));

    let wide = Machine::new(WIDE, &[0x34, 0x134], true);
    assert_eq!(wide.signal(0x3_4000, 0x1ff), Err(Errno::EINVAL), "bits 7:0");
    assert_eq!(wide.route(0x3_4000, 1), Err(Errno::EINVAL));
    assert_eq!(wide.signal(0x3_4000, 0x100), Ok(1));
    assert_eq!((wide.has_vector(0), wide.has_vector(1)), (false, true));
    assert_eq!(wide.signal(0x3_4000, 0x200), Err(Errno::EPERM), "nobody is 234H");

    let routed = Machine::new(WIDE, &[0x34, 0x134], true);
    routed.route(0x3_4000, 0x100).unwrap();
    routed.client.set(routed.vm, KVM_IRQ_LINE, &[5u32, 1]).unwrap();
    assert_eq!((routed.has_vector(0), routed.has_vector(1)), (false, true));

    // A VM may ask for it when its chips are there; what is on stays on.
    let late = Machine::new(0, &[0x34], true);
    assert_eq!(late.signal(0x3_4000, 1), Ok(1));
    for flags in [WIDE, 0] {
        assert_eq!(late.enable(flags.into()), Ok(0));
        assert_eq!(late.signal(0x3_4000, 1), Err(Errno::EINVAL));
    }
}

/// A vCPU that is plugged in is in xAPIC mode (`kvm_apic_match_physical_addr`).
#[test]
fn a_wide_id_reaches_xapic_mode() {
    let machine = Machine::new(WIDE, &[0x34, 0x134], false);
    assert_eq!(machine.signal(0x3_4000, 0x100), Ok(1));
    assert_eq!((machine.has_vector(0), machine.has_vector(1)), (false, true));
}

/// `KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK`: FFH is all for a device, or the APIC of that id.
#[test]
fn broadcast_in_x2apic_mode() {
    for (flags, others) in [(0, true), (WIDE, true), (STRICT, false), (WIDE | STRICT, false)] {
        let machine = Machine::new(flags, &[0, 0xff], true);
        assert_eq!(machine.signal(0xf_f000, 0), Ok(if others { 2 } else { 1 }), "{flags}");
        assert_eq!((machine.has_vector(0), machine.has_vector(1)), (others, true), "{flags}");
    }
    let machine = Machine::new(WIDE | STRICT, &[0, 0xff], true);
    assert_eq!(machine.signal(0xf_f000, 0xffff_ff00), Ok(2), "x2APIC's own broadcast");
    let xapic = Machine::new(STRICT, &[0, 1], false);
    assert_eq!(xapic.signal(0xf_f000, 0), Ok(2), "in xAPIC mode it is the only one");
}

/// api.rst `KVM_GET_LAPIC`: the format of bytes 32 to 35.
#[test]
fn the_id_register_has_the_format_of_the_mode() {
    let narrow = Machine::new(0, &[0x34], true);
    assert_eq!(narrow.page(0).unwrap()[ID], 0x34 << 24);
    let xapic = Machine::new(WIDE, &[0x34], false);
    assert_eq!(xapic.page(0).unwrap()[ID], 0x34 << 24);
    let wide = Machine::new(WIDE, &[0x134], true);
    let mut page = wide.page(0).unwrap();
    assert_eq!((page[ID], page[LDR]), (0x134, 0x13 << 16 | 1 << 4));
    page[LDR] = 0;
    wide.client.set(wide.vcpus[0], KVM_SET_LAPIC, &page).unwrap();
    assert_eq!(wide.page(0).unwrap()[LDR], 0x13 << 16 | 1 << 4, "it follows from the id");
    page[ID] = 0x34;
    assert_eq!(wide.client.set(wide.vcpus[0], KVM_SET_LAPIC, &page), Err(Errno::EINVAL));
    assert_eq!(wide.page(0).unwrap()[ID], 0x134);
}
