//! x87 loads, stores and register moves. Conversions are the host's; what only moves 80 bits is written out, and left to
//! the host where the stack faults. SDM Vol. 1 "Data Transfer Instructions"; Vol. 2, the page of each mnemonic.
#![expect(unsafe_code, reason = "rows expand to host instructions")]

use iced_x86::Code as C;

use super::run::{execute_whole, lower, select};
use super::{C1, CC};
use crate::cpu::{Cpu, Done, Then};
use crate::decode::digest::{Digest, Lowered};
use crate::host_x87::{X87, x87_asm, x87_impl, x87_pop, x87_push};
use crate::isa::{Row, codes, plain_handler};
use crate::op::Op;

/// As in `arith`.
macro_rules! x87 {
    ($($row:tt)*) => {{
        struct I;
        x87_impl!(I, $($row)*);
        select::<I>
    }};
}

#[rustfmt::skip]
pub(in crate::isa) const ROWS: &[Row] = &[
    codes(&[C::Fld_m32fp], x87!(0 => 1, St0, Load, C1, "fld dword ptr [{f} + 64]")),
    codes(&[C::Fld_m64fp], x87!(0 => 1, St0, Load, C1, "fld qword ptr [{f} + 64]")),
    codes(&[C::Fild_m16int], x87!(0 => 1, St0, Load, C1, "fild word ptr [{f} + 64]")),
    codes(&[C::Fild_m32int], x87!(0 => 1, St0, Load, C1, "fild dword ptr [{f} + 64]")),
    codes(&[C::Fild_m64int], x87!(0 => 1, St0, Load, C1, "fild qword ptr [{f} + 64]")),
    codes(&[C::Fbld_m80bcd], x87!(0 => 1, St0, Load, C1, "fbld tbyte ptr [{f} + 64]")),
    codes(&[C::Fst_m32fp], x87!(1 => 1, Nothing, Store, C1, "fst dword ptr [{f} + 64]")),
    codes(&[C::Fst_m64fp], x87!(1 => 1, Nothing, Store, C1, "fst qword ptr [{f} + 64]")),
    codes(&[C::Fist_m16int], x87!(1 => 1, Nothing, Store, C1, "fist word ptr [{f} + 64]")),
    codes(&[C::Fist_m32int], x87!(1 => 1, Nothing, Store, C1, "fist dword ptr [{f} + 64]")),
    codes(&[C::Fstp_m32fp], x87!(1 => 0, Nothing, Store, C1, "fstp dword ptr [{f} + 64]")),
    codes(&[C::Fstp_m64fp], x87!(1 => 0, Nothing, Store, C1, "fstp qword ptr [{f} + 64]")),
    codes(&[C::Fistp_m16int], x87!(1 => 0, Nothing, Store, C1, "fistp word ptr [{f} + 64]")),
    codes(&[C::Fistp_m32int], x87!(1 => 0, Nothing, Store, C1, "fistp dword ptr [{f} + 64]")),
    codes(&[C::Fistp_m64int], x87!(1 => 0, Nothing, Store, C1, "fistp qword ptr [{f} + 64]")),
    codes(&[C::Fisttp_m16int], x87!(1 => 0, Nothing, Store, C1, "fisttp word ptr [{f} + 64]")),
    codes(&[C::Fisttp_m32int], x87!(1 => 0, Nothing, Store, C1, "fisttp dword ptr [{f} + 64]")),
    codes(&[C::Fisttp_m64int], x87!(1 => 0, Nothing, Store, C1, "fisttp qword ptr [{f} + 64]")),
    codes(&[C::Fbstp_m80bcd], x87!(1 => 0, Nothing, Store, C1, "fbstp tbyte ptr [{f} + 64]")),
    codes(&[C::Fld_m80fp], |d| lower(d, plain_handler(fld_80))),
    codes(&[C::Fstp_m80fp], |d| lower(d, plain_handler(fstp_80))),
    codes(&[C::Fld_sti], |d| lower(d, plain_handler(fld_sti))),
    codes(&[C::Fst_sti], |d| lower(d, plain_handler(fst_sti::<FstSti, false>))),
    codes(&[C::Fstp_sti, C::Fstp_sti_DFD0, C::Fstp_sti_DFD8], |d| {
        lower(d, plain_handler(fst_sti::<FstpSti, true>))
    }),
    codes(&[C::Fstpnce_sti], |d| lower(d, plain_handler(fstpnce))),
    codes(&[C::Fxch_st0_sti, C::Fxch_st0_sti_DDC8, C::Fxch_st0_sti_DFC8], |d| lower(d, plain_handler(fxch))),
    codes(&[C::Ffree_sti], |d| lower(d, plain_handler(ffree::<false>))),
    codes(&[C::Ffreep_sti], |d| lower(d, plain_handler(ffree::<true>))),
    codes(&[C::Fincstp], |d| lower(d, plain_handler(turn::<1>))),
    codes(&[C::Fdecstp], |d| lower(d, plain_handler(turn::<7>))),
    codes(&[C::Fcmovb_st0_sti], fcmov::<2>),
    codes(&[C::Fcmovnb_st0_sti], fcmov::<3>),
    codes(&[C::Fcmove_st0_sti], fcmov::<4>),
    codes(&[C::Fcmovne_st0_sti], fcmov::<5>),
    codes(&[C::Fcmovbe_st0_sti], fcmov::<6>),
    codes(&[C::Fcmovnbe_st0_sti], fcmov::<7>),
    codes(&[C::Fcmovu_st0_sti], fcmov::<10>),
    codes(&[C::Fcmovnu_st0_sti], fcmov::<11>),
];

// What the host does where the software paths below find a stack fault.
struct Fld80;
x87_impl!(Fld80, 0 => 1, St0, Load, C1, "fld tbyte ptr [{f} + 64]");
struct Fstp80;
x87_impl!(Fstp80, 1 => 0, Nothing, Store, C1, "fstp tbyte ptr [{f} + 64]");
struct FldSti;
x87_impl!(FldSti, 1 => whole 2, St0, None, C1, "fld st(1)");
struct FstSti;
x87_impl!(FstSti, 1 => 1, Sti, None, C1, "fst st(1)");
struct FstpSti;
x87_impl!(FstpSti, 1 => 0, Sti, None, C1, "fstp st(1)");
struct Fxch;
x87_impl!(Fxch, 2 => 2, Both, None, C1, "fxch st(1)");
struct FcmovTaken;
x87_impl!(FcmovTaken, 2 => 2, St0, None, CC, "cmp {f}, {f}\nfcmove st(0), st(1)");
struct FcmovNot;
x87_impl!(FcmovNot, 2 => 2, St0, None, CC, "cmp {f}, {f}\nfcmovne st(0), st(1)");

fn fld_80(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.wait_x87()?;
    if cpu.fpu.is_full(7) {
        return execute_whole::<Fld80>(cpu, op);
    }
    let value = cpu.load_x87(op)?;
    push(cpu, value);
    cpu.note_x87(op, true);
    Ok(Then::Next)
}

fn fstp_80(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.wait_x87()?;
    if !cpu.fpu.is_full(0) {
        return execute_whole::<Fstp80>(cpu, op);
    }
    let value = cpu.fpu.st_at(0);
    cpu.store_x87(op, &value)?;
    cpu.fpu.fsw &= !C1;
    cpu.fpu.pop();
    cpu.note_x87(op, true);
    Ok(Then::Next)
}

fn push(cpu: &mut Cpu, value: [u8; 16]) {
    cpu.fpu.fsw &= !C1;
    cpu.fpu.move_top(7);
    cpu.fpu.set_st(0, value);
}

fn fld_sti(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.wait_x87()?;
    if cpu.fpu.is_full(7) || !cpu.fpu.is_full(op.src) {
        return execute_whole::<FldSti>(cpu, op);
    }
    push(cpu, cpu.fpu.st_at(op.src));
    cpu.note_x87(op, false);
    Ok(Then::Next)
}

fn fst_sti<I: X87, const POP: bool>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.wait_x87()?;
    if !cpu.fpu.is_full(0) {
        return execute_whole::<I>(cpu, op);
    }
    let value = cpu.fpu.st_at(0);
    cpu.fpu.fsw &= !C1;
    cpu.fpu.set_st(op.src, value);
    if POP {
        cpu.fpu.pop();
    }
    cpu.note_x87(op, false);
    Ok(Then::Next)
}

/// An alias of FSTP without stack faults: an empty register is not copied.
fn fstpnce(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.wait_x87()?;
    cpu.fpu.fsw &= !C1;
    if cpu.fpu.is_full(0) {
        let value = cpu.fpu.st_at(0);
        cpu.fpu.set_st(op.src, value);
    }
    cpu.fpu.pop();
    cpu.note_x87(op, false);
    Ok(Then::Next)
}

fn fxch(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.wait_x87()?;
    if !cpu.fpu.is_full(0) || !cpu.fpu.is_full(op.src) {
        return execute_whole::<Fxch>(cpu, op);
    }
    let (a, b) = (cpu.fpu.physical(0), cpu.fpu.physical(op.src));
    cpu.fpu.fsw &= !C1;
    cpu.fpu.st.swap(a, b);
    cpu.note_x87(op, false);
    Ok(Then::Next)
}

fn ffree<const POP: bool>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.wait_x87()?;
    cpu.fpu.set_full(op.src, false);
    cpu.fpu.fsw &= !C1;
    if POP {
        cpu.fpu.pop();
    }
    cpu.note_x87(op, false);
    Ok(Then::Next)
}

/// FINCSTP and FDECSTP: TOP moves, tags stay.
fn turn<const BY: u8>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.wait_x87()?;
    cpu.fpu.fsw &= !C1;
    cpu.fpu.move_top(BY);
    cpu.note_x87(op, false);
    Ok(Then::Next)
}

fn fcmov<const CONDITION: u8>(d: &Digest<'_>) -> Option<Lowered> {
    fn run<const CONDITION: u8>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.wait_x87()?;
        let holds = cpu.flags().condition(CONDITION);
        if !cpu.fpu.is_full(0) || !cpu.fpu.is_full(op.src) {
            return if holds { execute_whole::<FcmovTaken>(cpu, op) } else { execute_whole::<FcmovNot>(cpu, op) };
        }
        if holds {
            let value = cpu.fpu.st_at(op.src);
            cpu.fpu.set_st(0, value);
        }
        cpu.note_x87(op, false);
        Ok(Then::Next)
    }
    let lowered = lower(d, plain_handler(run::<CONDITION>))?;
    Some(Lowered { reads_flags: true, ..lowered })
}
