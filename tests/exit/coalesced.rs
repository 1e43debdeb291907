//! Coalesced I/O as a VMM of several vCPUs maps it: one ring for all. api.rst "KVM_(UN)REGISTER_COALESCED_MMIO", and
//! `kvm_vcpu_fault` of virt/kvm/kvm_main.c.

use std::time::Duration;

use kvm_ioctls::{IoEventAddress, VcpuExit, VcpuFd};
use softkvm_tests::inside::inside;
use tiny_vmm::code_asm::*;
use tiny_vmm::{Guest, Mode, assemble};

const WITHIN: Duration = Duration::from_secs(120);
const RAM: usize = 1 << 20;
const PORT: u16 = 0x70;
/// Behind RAM.
const DEVICE: u64 = 0x1000_0000;

fn runs_to_hlt(vcpu: &mut VcpuFd) {
    match vcpu.run().expect("KVM_RUN") {
        VcpuExit::Hlt => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn vcpus_share_the_ring() {
    inside("coalesced::vcpus_share_the_ring", WITHIN, || {
        let code = assemble(Mode::Long, |a| {
            a.mov(dword_ptr(rdi), eax)?;
            a.out(u32::from(PORT), al)?;
            a.hlt()
        });
        let mut guest = Guest::new(Mode::Long, RAM, &code.expect("it assembles")).expect("a guest");
        let (regs, sregs) = (guest.vcpu().get_regs().expect("regs"), guest.vcpu().get_sregs().expect("sregs"));
        let mut others: Vec<VcpuFd> = (1..3).map(|id| guest.vm().create_vcpu(id).expect("a vCPU")).collect();
        guest.vm().register_coalesced_mmio(IoEventAddress::Mmio(DEVICE), 64).expect("a zone of memory");
        guest.vm().register_coalesced_mmio(IoEventAddress::Pio(PORT.into()), 1).expect("a zone of ports");
        for (id, vcpu) in (1..).zip(&mut others) {
            vcpu.set_sregs(&sregs).expect("sregs");
            let regs = kvm_bindings::kvm_regs { rax: 0x50 + id, rdi: DEVICE + 8 * id, ..regs };
            vcpu.set_regs(&regs).expect("regs");
            vcpu.map_coalesced_mmio_ring().expect("the ring");
        }
        guest.vcpu().map_coalesced_mmio_ring().expect("the ring");
        runs_to_hlt(&mut others[1]);
        runs_to_hlt(&mut others[0]);
        // Each takes what another's vCPU has written.
        let mut seen = Vec::new();
        let mut take = |vcpu: &mut VcpuFd| {
            let entry = vcpu.coalesced_mmio_read().expect("a ring").expect("an entry");
            seen.push((entry.phys_addr, entry.len, entry.data[0]));
        };
        take(&mut others[0]);
        take(guest.vcpu());
        take(&mut others[1]);
        take(&mut others[0]);
        let port = u64::from(PORT);
        assert_eq!(seen, [(DEVICE + 16, 4, 0x52), (port, 1, 0x52), (DEVICE + 8, 4, 0x51), (port, 1, 0x51)]);
        for vcpu in others.iter_mut().chain([guest.vcpu()]) {
            assert!(vcpu.coalesced_mmio_read().expect("a ring").is_none(), "all of it is taken");
        }
    });
}
