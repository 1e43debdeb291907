//! Guests of random bytes under a client that answers at random: whatever they do, it is in the header of 2007.

use iced_x86::code_asm::CodeAssembler;
use kvm_abi::consts::KVM_EXIT_INTR;
use kvm_abi::legacy::EXIT_REASONS;
use nix::errno::Errno;

use crate::common::Random;
use crate::machine::{CODE, Machine, STACK};

/// Opcodes that find their way out of a guest, or into the tables: ports, strings, HLT, INT n, MOV CR, far calls, VMCALL.
const LIKELY: [&[u8]; 16] = [
    &[0xe4],
    &[0xe7],
    &[0xec],
    &[0xef],
    &[0xf3, 0x6c],
    &[0xf3, 0x6f],
    &[0xf3, 0xa5],
    &[0xf3, 0xaa],
    &[0xf4],
    &[0xcd],
    &[0x0f, 0x22],
    &[0x9a],
    &[0x0f, 0x01, 0xc1],
    &[0xfb],
    &[0x0f, 0x30],
    &[0x67, 0x66],
];

#[test]
fn any_guest_exits_as_the_header_says() {
    let mut seen = [0; EXIT_REASONS.len()];
    let nop = |a: &mut CodeAssembler| a.nop().unwrap();
    for seed in 1..=60u64 {
        let mut random = Random(0x9e37_79b9_7f4a_7c15u64.wrapping_mul(seed));
        let m = if seed.is_multiple_of(2) { Machine::real(nop) } else { Machine::long(nop) };
        for at in (0..0x8000).step_by(8) {
            m.ram.store_u64(at, random.next()).unwrap();
        }
        for at in (CODE..CODE + 0x200).step_by(6) {
            m.ram.write(at, LIKELY[random.next() as usize % LIKELY.len()]).unwrap();
        }
        // Bounds every run.
        m.client.raise();
        for _ in 0..40 {
            match m.run() {
                Ok(reason) => assert!(reason <= KVM_EXIT_INTR, "seed {seed}: exit {reason}"),
                Err(errno) => assert_eq!((errno, m.reason()), (Errno::EINTR, KVM_EXIT_INTR), "seed {seed}"),
            }
            seen[m.reason() as usize] += 1;
            m.run.store_u64(4096, random.next()).unwrap();
            m.run.store_u64(40, random.next()).unwrap();
            m.request_window(random.next().is_multiple_of(4));
            if random.next().is_multiple_of(4) {
                m.interrupt(random.next() as u32 % 256).unwrap();
            }
            if random.next().is_multiple_of(8) {
                m.set_regs(|regs| {
                    (regs.rip, regs.rsp) = (CODE + random.next() % 0x200, STACK);
                    (regs.rcx, regs.rsi, regs.rdi) = (random.number(), random.number(), random.number());
                });
            }
        }
    }
    for reason in ["EXCEPTION", "IO", "HYPERCALL", "HLT", "MMIO", "SHUTDOWN", "INTR"] {
        assert_ne!(seen[EXIT_REASONS.iter().position(|name| *name == reason).unwrap()], 0, "{reason} was never seen");
    }
}
