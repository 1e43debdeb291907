//! x87 control: initialisation, control and status words, environments, the whole state. SDM Vol. 1 "x87 FPU Control
//! Instructions" and "x87 FPU Instruction and Data (Operand) Pointers".

use iced_x86::{Code as C, Mnemonic as M};

use crate::cpu::{Cpu, Done, Then, fp_gate};
use crate::fault::Fault;
use crate::isa::simd::keeps;
use crate::isa::x87::{BUSY, ES, EXCEPTIONS};
use crate::isa::{Row, codes, plain_handler, row};
use crate::op::Op;
use crate::state::Gpr;

pub(in crate::isa) const ROWS: &[Row] = &[
    row(M::Wait, |d| keeps(d, plain_handler(wait))),
    row(M::Fninit, |d| keeps(d, plain_handler(fninit))),
    row(M::Fnclex, |d| keeps(d, plain_handler(fnclex))),
    row(M::Fnop, |d| keeps(d, plain_handler(fnop))),
    row(M::Fnstcw, |d| keeps(d, plain_handler(fnstcw))),
    row(M::Fldcw, |d| keeps(d, plain_handler(fldcw))),
    codes(&[C::Fnstsw_AX], |d| keeps(d, plain_handler(fnstsw_ax))),
    codes(&[C::Fnstsw_m2byte], |d| keeps(d, plain_handler(fnstsw))),
    // Of the 8087 and the 287; nothing since.
    row(M::Fneni, |d| keeps(d, plain_handler(nothing))),
    row(M::Fndisi, |d| keeps(d, plain_handler(nothing))),
    row(M::Fnsetpm, |d| keeps(d, plain_handler(nothing))),
];

fn nothing(cpu: &mut Cpu, _: &Op) -> Done {
    cpu.require_x87()?;
    Ok(Then::Next)
}

/// #NM only where MP joins TS; EM does not matter.
fn wait(cpu: &mut Cpu, _: &Op) -> Done {
    let both = fp_gate::TS | fp_gate::MP;
    if cpu.fp_gate & both == both {
        return Err(cpu.fault(Fault::NM));
    }
    if cpu.fpu.fsw & ES != 0 {
        return Err(cpu.fault(Fault::MF));
    }
    Ok(Then::Next)
}

fn fninit(cpu: &mut Cpu, _: &Op) -> Done {
    cpu.require_x87()?;
    cpu.fpu.init_x87();
    Ok(Then::Next)
}

fn fnclex(cpu: &mut Cpu, _: &Op) -> Done {
    cpu.require_x87()?;
    // SF goes with the exceptions, the condition codes and TOP stay.
    cpu.fpu.fsw &= !(EXCEPTIONS | 1 << 6 | ES | BUSY);
    Ok(Then::Next)
}

fn fnop(cpu: &mut Cpu, _: &Op) -> Done {
    cpu.wait_x87()?;
    Ok(Then::Next)
}

fn fnstcw(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_x87()?;
    cpu.write_operand(op, cpu.fpu.fcw)?;
    Ok(Then::Next)
}

fn fldcw(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.wait_x87()?;
    let value = cpu.read_operand(op)?;
    cpu.fpu.set_fcw(value);
    cpu.fpu.settle_summary();
    Ok(Then::Next)
}

fn fnstsw_ax(cpu: &mut Cpu, _: &Op) -> Done {
    cpu.require_x87()?;
    cpu.put_gpr(Gpr::Rax, cpu.fpu.fsw);
    Ok(Then::Next)
}

fn fnstsw(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_x87()?;
    cpu.write_operand(op, cpu.fpu.fsw)?;
    Ok(Then::Next)
}
