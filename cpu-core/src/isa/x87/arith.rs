//! x87 arithmetic, comparisons, constants and transcendentals: one host instruction each. SDM Vol. 1 "x87 FPU Instruction
//! Set"; Vol. 2, the page of each mnemonic.
#![expect(unsafe_code, reason = "rows expand to host instructions")]

use iced_x86::Code as C;

use super::run::{select, select_flags};
use super::{C1, C2, CC};
use crate::host_x87::{x87_asm, x87_impl, x87_pop, x87_push};
use crate::isa::{Row, codes};

/// Registers read => registers left, which is written, memory, condition codes, text with the other register at st(1).
macro_rules! x87 {
    ($($row:tt)*) => {{
        struct I;
        x87_impl!(I, $($row)*);
        select::<I>
    }};
}

/// A comparison into ZF, PF and CF.
macro_rules! x87_flags {
    ($($row:tt)*) => {{
        struct I;
        x87_impl!(I, $($row)*);
        select_flags::<I>
    }};
}

#[rustfmt::skip]
pub(in crate::isa) const ROWS: &[Row] = &[
    // Basic arithmetic
    codes(&[C::Fadd_m32fp], x87!(1 => 1, St0, Load, C1, "fadd dword ptr [{f} + 64]")),
    codes(&[C::Fadd_m64fp], x87!(1 => 1, St0, Load, C1, "fadd qword ptr [{f} + 64]")),
    codes(&[C::Fadd_st0_sti], x87!(2 => 2, St0, None, C1, "fadd st(0), st(1)")),
    codes(&[C::Fadd_sti_st0], x87!(2 => 2, Sti, None, C1, "fadd st(1), st(0)")),
    codes(&[C::Faddp_sti_st0], x87!(2 => 1, Sti, None, C1, "faddp st(1), st(0)")),
    codes(&[C::Fiadd_m16int], x87!(1 => 1, St0, Load, C1, "fiadd word ptr [{f} + 64]")),
    codes(&[C::Fiadd_m32int], x87!(1 => 1, St0, Load, C1, "fiadd dword ptr [{f} + 64]")),
    codes(&[C::Fmul_m32fp], x87!(1 => 1, St0, Load, C1, "fmul dword ptr [{f} + 64]")),
    codes(&[C::Fmul_m64fp], x87!(1 => 1, St0, Load, C1, "fmul qword ptr [{f} + 64]")),
    codes(&[C::Fmul_st0_sti], x87!(2 => 2, St0, None, C1, "fmul st(0), st(1)")),
    codes(&[C::Fmul_sti_st0], x87!(2 => 2, Sti, None, C1, "fmul st(1), st(0)")),
    codes(&[C::Fmulp_sti_st0], x87!(2 => 1, Sti, None, C1, "fmulp st(1), st(0)")),
    codes(&[C::Fimul_m16int], x87!(1 => 1, St0, Load, C1, "fimul word ptr [{f} + 64]")),
    codes(&[C::Fimul_m32int], x87!(1 => 1, St0, Load, C1, "fimul dword ptr [{f} + 64]")),
    codes(&[C::Fsub_m32fp], x87!(1 => 1, St0, Load, C1, "fsub dword ptr [{f} + 64]")),
    codes(&[C::Fsub_m64fp], x87!(1 => 1, St0, Load, C1, "fsub qword ptr [{f} + 64]")),
    codes(&[C::Fsub_st0_sti], x87!(2 => 2, St0, None, C1, "fsub st(0), st(1)")),
    codes(&[C::Fsub_sti_st0], x87!(2 => 2, Sti, None, C1, "fsub st(1), st(0)")),
    codes(&[C::Fsubp_sti_st0], x87!(2 => 1, Sti, None, C1, "fsubp st(1), st(0)")),
    codes(&[C::Fisub_m16int], x87!(1 => 1, St0, Load, C1, "fisub word ptr [{f} + 64]")),
    codes(&[C::Fisub_m32int], x87!(1 => 1, St0, Load, C1, "fisub dword ptr [{f} + 64]")),
    codes(&[C::Fsubr_m32fp], x87!(1 => 1, St0, Load, C1, "fsubr dword ptr [{f} + 64]")),
    codes(&[C::Fsubr_m64fp], x87!(1 => 1, St0, Load, C1, "fsubr qword ptr [{f} + 64]")),
    codes(&[C::Fsubr_st0_sti], x87!(2 => 2, St0, None, C1, "fsubr st(0), st(1)")),
    codes(&[C::Fsubr_sti_st0], x87!(2 => 2, Sti, None, C1, "fsubr st(1), st(0)")),
    codes(&[C::Fsubrp_sti_st0], x87!(2 => 1, Sti, None, C1, "fsubrp st(1), st(0)")),
    codes(&[C::Fisubr_m16int], x87!(1 => 1, St0, Load, C1, "fisubr word ptr [{f} + 64]")),
    codes(&[C::Fisubr_m32int], x87!(1 => 1, St0, Load, C1, "fisubr dword ptr [{f} + 64]")),
    codes(&[C::Fdiv_m32fp], x87!(1 => 1, St0, Load, C1, "fdiv dword ptr [{f} + 64]")),
    codes(&[C::Fdiv_m64fp], x87!(1 => 1, St0, Load, C1, "fdiv qword ptr [{f} + 64]")),
    codes(&[C::Fdiv_st0_sti], x87!(2 => 2, St0, None, C1, "fdiv st(0), st(1)")),
    codes(&[C::Fdiv_sti_st0], x87!(2 => 2, Sti, None, C1, "fdiv st(1), st(0)")),
    codes(&[C::Fdivp_sti_st0], x87!(2 => 1, Sti, None, C1, "fdivp st(1), st(0)")),
    codes(&[C::Fidiv_m16int], x87!(1 => 1, St0, Load, C1, "fidiv word ptr [{f} + 64]")),
    codes(&[C::Fidiv_m32int], x87!(1 => 1, St0, Load, C1, "fidiv dword ptr [{f} + 64]")),
    codes(&[C::Fdivr_m32fp], x87!(1 => 1, St0, Load, C1, "fdivr dword ptr [{f} + 64]")),
    codes(&[C::Fdivr_m64fp], x87!(1 => 1, St0, Load, C1, "fdivr qword ptr [{f} + 64]")),
    codes(&[C::Fdivr_st0_sti], x87!(2 => 2, St0, None, C1, "fdivr st(0), st(1)")),
    codes(&[C::Fdivr_sti_st0], x87!(2 => 2, Sti, None, C1, "fdivr st(1), st(0)")),
    codes(&[C::Fdivrp_sti_st0], x87!(2 => 1, Sti, None, C1, "fdivrp st(1), st(0)")),
    codes(&[C::Fidivr_m16int], x87!(1 => 1, St0, Load, C1, "fidivr word ptr [{f} + 64]")),
    codes(&[C::Fidivr_m32int], x87!(1 => 1, St0, Load, C1, "fidivr dword ptr [{f} + 64]")),
    // Comparison; C0 to C3 hold the result
    codes(&[C::Fcom_m32fp], x87!(1 => 1, Nothing, Load, CC, "fcom dword ptr [{f} + 64]")),
    codes(&[C::Fcom_m64fp], x87!(1 => 1, Nothing, Load, CC, "fcom qword ptr [{f} + 64]")),
    codes(&[C::Fcomp_m32fp], x87!(1 => 0, Nothing, Load, CC, "fcomp dword ptr [{f} + 64]")),
    codes(&[C::Fcomp_m64fp], x87!(1 => 0, Nothing, Load, CC, "fcomp qword ptr [{f} + 64]")),
    codes(&[C::Ficom_m16int], x87!(1 => 1, Nothing, Load, CC, "ficom word ptr [{f} + 64]")),
    codes(&[C::Ficom_m32int], x87!(1 => 1, Nothing, Load, CC, "ficom dword ptr [{f} + 64]")),
    codes(&[C::Ficomp_m16int], x87!(1 => 0, Nothing, Load, CC, "ficomp word ptr [{f} + 64]")),
    codes(&[C::Ficomp_m32int], x87!(1 => 0, Nothing, Load, CC, "ficomp dword ptr [{f} + 64]")),
    codes(&[C::Fcom_st0_sti, C::Fcom_st0_sti_DCD0], x87!(2 => 2, Nothing, None, CC, "fcom st(1)")),
    codes(&[C::Fcomp_st0_sti, C::Fcomp_st0_sti_DCD8, C::Fcomp_st0_sti_DED0], x87!(2 => 1, Nothing, None, CC, "fcomp st(1)")),
    codes(&[C::Fcompp], x87!(2 => 0, Nothing, None, CC, "fcompp")),
    codes(&[C::Fucom_st0_sti], x87!(2 => 2, Nothing, None, CC, "fucom st(1)")),
    codes(&[C::Fucomp_st0_sti], x87!(2 => 1, Nothing, None, CC, "fucomp st(1)")),
    codes(&[C::Fucompp], x87!(2 => 0, Nothing, None, CC, "fucompp")),
    codes(&[C::Ftst], x87!(1 => 1, Nothing, None, CC, "ftst")),
    codes(&[C::Fxam], x87!(1 => 1, Nothing, None, CC, "fxam")),
    codes(&[C::Fcomi_st0_sti], x87_flags!(2 => 2, Nothing, None, 0, "fcomi st(0), st(1)\nsetz byte ptr [{f} + 86]\nsetp byte ptr [{f} + 87]\nsetb byte ptr [{f} + 88]")),
    codes(&[C::Fucomi_st0_sti], x87_flags!(2 => 2, Nothing, None, 0, "fucomi st(0), st(1)\nsetz byte ptr [{f} + 86]\nsetp byte ptr [{f} + 87]\nsetb byte ptr [{f} + 88]")),
    codes(&[C::Fcomip_st0_sti], x87_flags!(2 => 1, Nothing, None, 0, "fcomip st(0), st(1)\nsetz byte ptr [{f} + 86]\nsetp byte ptr [{f} + 87]\nsetb byte ptr [{f} + 88]")),
    codes(&[C::Fucomip_st0_sti], x87_flags!(2 => 1, Nothing, None, 0, "fucomip st(0), st(1)\nsetz byte ptr [{f} + 86]\nsetp byte ptr [{f} + 87]\nsetb byte ptr [{f} + 88]")),
    // Constants, roots, rounding, transcendentals
    codes(&[C::Fld1], x87!(0 => 1, St0, None, C1, "fld1")),
    codes(&[C::Fldl2t], x87!(0 => 1, St0, None, C1, "fldl2t")),
    codes(&[C::Fldl2e], x87!(0 => 1, St0, None, C1, "fldl2e")),
    codes(&[C::Fldpi], x87!(0 => 1, St0, None, C1, "fldpi")),
    codes(&[C::Fldlg2], x87!(0 => 1, St0, None, C1, "fldlg2")),
    codes(&[C::Fldln2], x87!(0 => 1, St0, None, C1, "fldln2")),
    codes(&[C::Fldz], x87!(0 => 1, St0, None, C1, "fldz")),
    codes(&[C::F2xm1], x87!(1 => 1, St0, None, C1, "f2xm1")),
    codes(&[C::Fsqrt], x87!(1 => 1, St0, None, C1, "fsqrt")),
    codes(&[C::Frndint], x87!(1 => 1, St0, None, C1, "frndint")),
    codes(&[C::Fabs], x87!(1 => 1, St0, None, C1, "fabs")),
    codes(&[C::Fchs], x87!(1 => 1, St0, None, C1, "fchs")),
    codes(&[C::Fsin], x87!(1 => 1, St0, None, C1 | C2, "fsin")),
    codes(&[C::Fcos], x87!(1 => 1, St0, None, C1 | C2, "fcos")),
    codes(&[C::Fyl2x], x87!(2 => 1, Sti, None, C1, "fyl2x")),
    codes(&[C::Fyl2xp1], x87!(2 => 1, Sti, None, C1, "fyl2xp1")),
    codes(&[C::Fpatan], x87!(2 => 1, Sti, None, C1, "fpatan")),
    codes(&[C::Fprem], x87!(2 => whole 2, St0, None, CC, "fprem")),
    codes(&[C::Fprem1], x87!(2 => whole 2, St0, None, CC, "fprem1")),
    codes(&[C::Fscale], x87!(2 => 2, St0, None, C1, "fscale")),
    codes(&[C::Fptan], x87!(1 => whole 2, St0, None, CC, "fptan")),
    codes(&[C::Fsincos], x87!(1 => whole 2, St0, None, CC, "fsincos")),
    codes(&[C::Fxtract], x87!(1 => whole 2, St0, None, CC, "fxtract")),
];
