//! Guests that cannot go on end as KVM ends them, and never take the daemon along.

use std::time::Duration;

use kvm_bindings::KVM_INTERNAL_ERROR_EMULATION;
use softkvm_tests::inside::inside;
use softkvm_tests::long;
use tiny_vmm::code_asm::*;
use tiny_vmm::{CODE, End, Guest, Mode, assemble};

const RAM: usize = 2 << 20;
/// A guest that is stuck for so long will not end.
const LIMIT: Duration = Duration::from_secs(10);
const WITHIN: Duration = Duration::from_secs(120);

fn end_of(mode: Mode, code: &[u8]) -> End {
    Guest::new(mode, RAM, code).expect("a guest").run_until_end(LIMIT)
}

/// An exception finds an IDT of limit 0, so does the #GP for that, so does the #DF. SDM Vol. 3 "Interrupt 8 — Double
/// Fault Exception (#DF)": the processor enters shutdown, exit reason 2, `KVM_EXIT_SHUTDOWN`.
#[test]
fn triple_fault_is_shutdown_in_every_mode() {
    inside("ends::triple_fault_is_shutdown_in_every_mode", WITHIN, || {
        for mode in Mode::ALL {
            let ud2 = assemble(mode, |a| a.ud2()).expect("UD2 assembles");
            assert_eq!(end_of(mode, &ud2), End::Shutdown, "{mode:?}");
            let int3 = assemble(mode, |a| a.int3()).expect("INT3 assembles");
            assert_eq!(end_of(mode, &int3), End::Shutdown, "{mode:?}");
        }
    });
}

/// Code that runs over the last byte of RAM fetches from nowhere. kvm-intel tries to emulate the instruction, cannot read
/// it and gives up: `handle_emulation_failure` in x86.c, at CPL 0 `KVM_INTERNAL_ERROR_EMULATION`.
#[test]
fn running_off_the_end_of_ram_is_an_emulation_failure() {
    inside("ends::running_off_the_end_of_ram_is_an_emulation_failure", WITHIN, || {
        for mode in [Mode::Protected, Mode::Long] {
            let end = RAM as u64;
            let mut guest = Guest::new(
                mode,
                RAM,
                &assemble(mode, |a| {
                    a.mov(eax, u32::try_from(end - 64).expect("RAM ends below 4 GiB"))?;
                    if mode == Mode::Long { a.jmp(rax) } else { a.jmp(eax) }
                })
                .expect("a jump assembles"),
            )
            .expect("a guest");
            const NOP: u8 = 0x90;
            guest.ram()[RAM - 64..].fill(NOP);
            match guest.run_until_end(LIMIT) {
                End::InternalError(error) => assert_eq!(error.suberror, KVM_INTERNAL_ERROR_EMULATION, "{mode:?}"),
                other => panic!("{mode:?}: {other:?}"),
            }
            let rip = guest.vcpu().get_regs().expect("the vCPU still answers").rip;
            assert_eq!(rip, end, "{mode:?}: RIP is at the instruction that could not be fetched");
        }
    });
}

/// The same when the very first fetch fails: there is nothing at all at the reset vector.
#[test]
fn a_vm_without_memory_is_an_emulation_failure() {
    inside("ends::a_vm_without_memory_is_an_emulation_failure", WITHIN, || {
        let mut guest = Guest::new(Mode::Protected, RAM, &[]).expect("a guest");
        let mut regs = guest.vcpu().get_regs().expect("KVM_GET_REGS");
        regs.rip = 0xffff_fff0;
        guest.vcpu().set_regs(&regs).expect("KVM_SET_REGS");
        match guest.run_until_end(LIMIT) {
            End::InternalError(error) => assert_eq!(error.suberror, KVM_INTERNAL_ERROR_EMULATION),
            other => panic!("{other:?}"),
        }
    });
}

/// Handlers go from one to the next by jumps as far as the compiler makes them; what it leaves as calls, as in these, holds a
/// stack frame for each instruction until the quantum ends.
#[test]
fn long_loops_do_not_fill_the_stack() {
    inside("ends::long_loops_do_not_fill_the_stack", WITHIN, || {
        let code = assemble(Mode::Long, |a| {
            let mut top = a.create_label();
            a.mov(rax, cr4)?;
            a.or(eax, 0x600)?; // OSFXSR, OSXMMEXCPT
            a.mov(cr4, rax)?;
            a.mov(ecx, 2_000_000)?;
            a.set_label(&mut top)?;
            a.bt(rax, rcx)?;
            a.ror(rbx, 3)?;
            a.setb(byte_ptr(0x9000))?;
            a.roundss(xmm0, xmm1, 1)?;
            a.cmpps(xmm2, xmm1, 3)?;
            a.dec(ecx)?;
            a.jne(top)?;
            a.hlt()
        })
        .expect("a loop assembles");
        assert_eq!(end_of(Mode::Long, &code), End::Hlt);
    });
}

/// Random bytes end in some exit that the API knows, or go on until they are interrupted; the VM answers afterwards, and
/// so does the next one.
#[test]
fn garbage_ends_in_an_exit_that_the_api_knows() {
    inside("ends::garbage_ends_in_an_exit_that_the_api_knows", WITHIN, || {
        let rounds: u64 = if long() { 2000 } else { 60 };
        for seed in 1..=rounds {
            let mode = Mode::ALL[usize::try_from(seed % 3).expect("below 3")];
            let mut guest = Guest::new(mode, RAM, &garbage(seed, 4096)).expect("a guest");
            let end = guest.run_until_end(Duration::from_millis(50));
            assert!(!matches!(end, End::Errno(_) | End::Other(_)), "seed {seed}, {mode:?}: {end:?}");
            guest.vcpu().get_regs().unwrap_or_else(|e| panic!("seed {seed}, {mode:?}: KVM_GET_REGS: {e}"));
        }
        let hlt = assemble(Mode::Long, |a| a.hlt()).expect("HLT assembles");
        assert_eq!(end_of(Mode::Long, &hlt), End::Hlt, "the next VM is as good as the first");
    });
}

/// A loop is left by a signal, within the time that a VMM can wait, and goes on where it was.
#[test]
fn an_endless_loop_is_interrupted_and_goes_on() {
    inside("ends::an_endless_loop_is_interrupted_and_goes_on", WITHIN, || {
        for mode in Mode::ALL {
            let code = assemble(mode, |a| {
                let mut again = a.create_label();
                a.set_label(&mut again)?;
                a.inc(ecx)?;
                a.jmp(again)
            })
            .expect("a loop assembles");
            let mut guest = Guest::new(mode, RAM, &code).expect("a guest");
            // On a loaded machine a signal may come before the first instruction does.
            let (mut last, mut times) = (0, 0);
            for _ in 0..200 {
                assert_eq!(guest.run_until_end(Duration::from_millis(5)), End::Interrupted, "{mode:?}");
                let regs = guest.vcpu().get_regs().expect("KVM_GET_REGS");
                assert!((CODE..CODE + code.len() as u64).contains(&regs.rip), "{mode:?}: RIP {:#x}", regs.rip);
                times += u32::from(regs.rcx != last);
                last = regs.rcx;
                if times == 5 {
                    break;
                }
            }
            assert_eq!(times, 5, "{mode:?}: the loop has not gone on");
        }
    });
}

/// xorshift64, so that a seed names its bytes for ever.
fn garbage(seed: u64, bytes: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x.to_le_bytes()[3]
    };
    (0..bytes).map(|_| next()).collect()
}
