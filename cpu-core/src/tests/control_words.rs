//! The guest's x87 control word and MXCSR against those of the host and of other CPUs: none may show through. What a division
//! gives under each rounding is IEEE 754's; that host code sees its own defaults is asked of Rust's own arithmetic.

use std::hint::black_box;

use iced_x86::code_asm::*;

use crate::state::Gpr;
use crate::testing::Machine;
use crate::vmx::Exit;

/// Rounding control of x87 and SSE: nearest, down, up, towards zero; the bits of 1/3 in double precision.
const ROUNDINGS: [(u16, u64); 4] =
    [(0, 0x3fd5_5555_5555_5555), (1, 0x3fd5_5555_5555_5555), (2, 0x3fd5_5555_5555_5556), (3, 0x3fd5_5555_5555_5555)];
const DATA: u64 = 0x6_0000;
const FTZ_AND_DAZ: u32 = 1 << 15 | 1 << 6;

/// Computes 1/3 by SSE and by x87, and half of the least normal number, again and again; stops at the first that differs
/// from the round before. RAX, RBX: the quotients. RDX: the half. R8, R9: the flags of MXCSR and FSW. RCX: rounds left.
fn dividing(rounding: u16, flush: bool) -> Machine {
    let mut machine = Machine::new_64bit(|a| {
        let (mut top, mut differs) = (a.create_label(), a.create_label());
        let mut body = |a: &mut CodeAssembler| {
            a.mov(ecx, 1000)?;
            a.fldcw(word_ptr(DATA + 0x20))?;
            a.ldmxcsr(dword_ptr(DATA + 0x24))?;
            a.xor(r10d, r10d)?;
            a.set_label(&mut top)?;
            a.movsd_2(xmm0, qword_ptr(DATA))?;
            a.divsd(xmm0, qword_ptr(DATA + 8))?;
            a.movq(rax, xmm0)?;
            a.fld(qword_ptr(DATA))?;
            a.fdiv(qword_ptr(DATA + 8))?;
            a.fstp(qword_ptr(DATA + 0x28))?;
            a.mov(rbx, qword_ptr(DATA + 0x28))?;
            a.movsd_2(xmm1, qword_ptr(DATA + 0x10))?;
            a.mulsd(xmm1, qword_ptr(DATA + 0x18))?;
            a.movq(rdx, xmm1)?;
            a.lea(rsi, ptr(rax + rbx))?;
            a.add(rsi, rdx)?;
            a.test(r10, r10)?;
            a.cmove(r10, rsi)?;
            a.cmp(r10, rsi)?;
            a.jne(differs)?;
            a.dec(ecx)?;
            a.jne(top)?;
            a.set_label(&mut differs)?;
            a.stmxcsr(dword_ptr(DATA + 0x30))?;
            a.mov(r8d, dword_ptr(DATA + 0x30))?;
            a.fnstsw(ax)?;
            a.movzx(r9d, ax)?;
            a.movq(rax, xmm0)?;
            a.fnstcw(word_ptr(DATA + 0x34))?;
            a.hlt()
        };
        body(a).expect("encodable");
    });
    let quads = [1f64.to_bits(), 3f64.to_bits(), f64::MIN_POSITIVE.to_bits(), 0.5f64.to_bits()];
    for (i, quad) in quads.into_iter().enumerate() {
        machine.write(DATA + 8 * i as u64, &quad.to_le_bytes());
    }
    let control = 0x27f & !0xc00 | rounding << 10;
    let mxcsr = 0x1f80 | u32::from(rounding) << 13 | if flush { FTZ_AND_DAZ } else { 0 };
    machine.write(DATA + 0x20, &control.to_le_bytes());
    machine.write(DATA + 0x24, &mxcsr.to_le_bytes());
    machine
}

fn check(machine: &Machine, rounding: u16, flush: bool) {
    let expected = ROUNDINGS[usize::from(rounding)].1;
    let cpu = &machine.cpu;
    assert_eq!((cpu.reg(Gpr::Rcx), cpu.reg(Gpr::Rax), cpu.reg(Gpr::Rbx)), (0, expected, expected), "RC {rounding}");
    let half = if flush { 0 } else { 1 << 51 };
    assert_eq!(cpu.reg(Gpr::Rdx), half, "the half of the least normal number, flushed: {flush}");
    // PE from the quotient; UE too where a tiny result is flushed.
    assert_eq!(cpu.reg(Gpr::R8) & 0x3f, if flush { 0x30 } else { 0x20 });
    assert_eq!(cpu.reg(Gpr::R9) & 0x3f, 0x20);
}

/// Host arithmetic rounds to nearest and keeps denormals.
fn assert_host_is_itself() {
    let third = black_box(1f64) / black_box(3f64);
    let above = black_box(1f64) + black_box(f64::EPSILON * 0.75);
    let half = black_box(f64::MIN_POSITIVE) * black_box(0.5);
    assert_eq!((third.to_bits(), above.to_bits(), half.to_bits()), (ROUNDINGS[0].1, 1f64.to_bits() + 1, 1 << 51));
}

#[test]
fn cpus_on_threads_of_their_own_keep_their_control_words() {
    std::thread::scope(|scope| {
        for (rounding, _) in ROUNDINGS {
            for flush in [false, true] {
                scope.spawn(move || {
                    for _ in 0..4 {
                        let mut machine = dividing(rounding, flush);
                        assert_eq!(machine.cpu.run(), Exit::Hlt);
                        check(&machine, rounding, flush);
                        assert_host_is_itself();
                    }
                });
            }
        }
        for _ in 0..200 {
            assert_host_is_itself();
        }
    });
}

#[test]
fn cpus_that_take_turns_on_one_thread_keep_their_control_words() {
    let mut machines: Vec<_> = ROUNDINGS
        .iter()
        .flat_map(|(rounding, _)| [(*rounding, false), (*rounding, true)])
        .map(|(r, f)| (dividing(r, f), r, f))
        .collect();
    // One instruction each, and host arithmetic in between that raises flags of its own.
    let mut running = machines.len();
    while running > 0 {
        running = 0;
        for (machine, _, _) in &mut machines {
            if machine.cpu.reg(Gpr::Rcx) > 900 || machine.cpu.instructions() < 10 {
                assert_eq!(machine.cpu.step(), None);
                running += 1;
            }
            assert_host_is_itself();
        }
    }
    for (machine, rounding, flush) in &mut machines {
        assert_eq!(machine.cpu.run(), Exit::Hlt);
        check(machine, *rounding, *flush);
    }
}

/// Flags that host arithmetic raises are not the guest's, nor do its own come back after it has cleared them.
#[test]
fn flags_of_the_host_stay_with_the_host() {
    for mxcsr in [0x1f80u32, 0x7f80] {
        let mut machine = Machine::new_64bit(|a| {
            let body = |a: &mut CodeAssembler| {
                a.fninit()?;
                a.ldmxcsr(dword_ptr(DATA))?;
                a.hlt()?;
                a.stmxcsr(dword_ptr(DATA + 8))?;
                a.fnstsw(word_ptr(DATA + 16))?;
                a.hlt()
            };
            body(a).expect("encodable");
        });
        machine.write(DATA, &mxcsr.to_le_bytes());
        assert_eq!(machine.cpu.run(), Exit::Hlt);
        // Inexact, divided by zero, invalid, overflow, underflow: all of them.
        for (a, b) in [(1f64, 3f64), (1.0, 0.0), (0.0, 0.0), (f64::MIN_POSITIVE, 1e300), (f64::MAX, 1e-300)] {
            let _ = black_box(black_box(a) / black_box(b));
        }
        assert_eq!(machine.cpu.run(), Exit::Hlt);
        assert_eq!(machine.read::<4>(DATA + 8), mxcsr.to_le_bytes());
        assert_eq!(machine.read::<2>(DATA + 16), [0, 0]);
    }
}
