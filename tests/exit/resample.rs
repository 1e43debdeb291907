//! A level-triggered line of a device in a process of its own, as crosvm has it for INTx: one eventfd raises the line, another tells of
//! the guest's EOI, and the device raises it again while it has something left to say. api.rst "KVM_IRQFD", `KVM_IRQFD_FLAG_RESAMPLE`.
#![expect(unsafe_code, reason = "the device is forked: all that it does are system calls")]

use std::time::Duration;

use kvm_ioctls::Kvm;
use softkvm_tests::inside::inside;
use tiny_vmm::code_asm::*;
use tiny_vmm::{Alarm, CODE, Guest, Mode, VcpuExit, assemble};
use vmm_sys_util::eventfd::EventFd;

const WITHIN: Duration = Duration::from_secs(120);
const RAM: usize = 1 << 20;
/// IRQ 10, level-triggered, is input 2 of the second PIC, whose vectors begin here.
const GSI: u32 = 10;
const VECTORS: u16 = 0x28;
const HANDLER: usize = 0x2000;
/// Where the handler says that it runs.
const SERVES: u16 = 0x80;
const READY: u16 = 0x81;
const REQUESTS: u32 = 5;
/// No more comes within.
const QUIET: Duration = Duration::from_millis(300);

/// The process of the device: it has so many requests, and ends with the last of them served. 0: as it should be.
fn device(event: &EventFd, resample: &EventFd) -> i32 {
    for left in (0..REQUESTS).rev() {
        if event.write(1).is_err() || resample.read().ok() != Some(1) {
            return 1 + left as i32;
        }
    }
    0
}

#[test]
fn a_device_in_another_process_is_told_of_each_eoi() {
    inside("resample::a_device_in_another_process_is_told_of_each_eoi", WITHIN, || {
        let waits = assemble(Mode::Real, |a| {
            let mut again = a.create_label();
            // Both PICs: edges by default, the second at input 2; then its input 2 alone is open. The last is ELCR, bits 15:8.
            for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xfb)] {
                a.mov(al, value)?;
                a.out(port, al)?;
            }
            for (port, value) in [(0xa0, 0x11), (0xa1, i32::from(VECTORS)), (0xa1, 2), (0xa1, 1), (0xa1, 0xfb)] {
                a.mov(al, value)?;
                a.out(port, al)?;
            }
            a.mov(dx, 0x4d1)?;
            a.mov(al, 1 << (GSI - 8))?;
            a.out(dx, al)?;
            // What is requested while the PICs are set up is lost.
            a.out(u32::from(READY), al)?;
            a.sti()?;
            a.set_label(&mut again)?;
            a.hlt()?;
            a.jmp(again)
        });
        let handler = assemble(Mode::Real, |a| {
            a.out(u32::from(SERVES), al)?;
            a.mov(al, 0x20)?;
            a.out(0xa0, al)?;
            a.out(0x20, al)?;
            a.iret()
        });
        let kvm = Kvm::new().expect("/dev/kvm");
        let waits = waits.expect("it assembles");
        let mut guest = Guest::with_irqchip(&kvm, Mode::Real, RAM, &waits).expect("a guest");
        let handler = handler.expect("it assembles");
        guest.ram()[HANDLER..HANDLER + handler.len()].copy_from_slice(&handler);
        let entry = 4 * (usize::from(VECTORS) + GSI as usize - 8);
        guest.ram()[entry..entry + 4].copy_from_slice(&(HANDLER as u32).to_le_bytes());
        let mut sregs = guest.vcpu().get_sregs().expect("sregs");
        sregs.idt.limit = 0x3ff;
        guest.vcpu().set_sregs(&sregs).expect("sregs");
        assert!(waits.len() < HANDLER - CODE as usize);

        let [event, resample] = [(); 2].map(|()| EventFd::new(0).expect("an eventfd"));
        guest.vm().register_irqfd_with_resample(&event, &resample, GSI).expect("KVM_IRQFD");
        let ready = guest.run().expect("KVM_RUN");
        assert!(matches!(ready, VcpuExit::IoOut(READY, _)), "{ready:?}");
        // SAFETY: the child makes system calls, and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: no memory is involved. It does not outlive a test that fails.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            let status = device(&event, &resample);
            // SAFETY: ends the child.
            unsafe { libc::_exit(status) };
        }
        for request in 0..REQUESTS {
            match guest.run().expect("KVM_RUN") {
                VcpuExit::IoOut(SERVES, _) => {}
                other => panic!("request {request}: {other:?}"),
            }
        }
        // The last one's EOI, and silence.
        let alarm = Alarm::new(QUIET);
        let end = guest.run().map(|exit| format!("{exit:?}")).map_err(|error| error.errno());
        assert_eq!(end, Err(libc::EINTR));
        drop(alarm);
        let mut status = -1;
        // SAFETY: the child is ours.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0, "the device's process");
    });
}
