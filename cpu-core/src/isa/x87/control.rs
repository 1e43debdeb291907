//! x87 control: initialisation, control and status words, environments, the whole state. SDM Vol. 1 "x87 FPU Control
//! Instructions" and "x87 FPU Instruction and Data (Operand) Pointers".

use iced_x86::{Code as C, Mnemonic as M};

use crate::cpu::{Cpu, Done, Stop, Then, fp_gate};
use crate::fault::Fault;
use crate::host_x87::forget_flags;
use crate::isa::simd::keeps;
use crate::isa::x87::{BUSY, ES, EXCEPTIONS};
use crate::isa::{Row, codes, plain_handler, row};
use crate::op::Op;
use crate::state::{Fpu, Gpr};

pub(in crate::isa) const ROWS: &[Row] = &[
    row(M::Wait, |d| keeps(d, plain_handler(wait))),
    row(M::Fninit, |d| keeps(d, plain_handler(fninit))),
    row(M::Fnclex, |d| keeps(d, plain_handler(fnclex))),
    row(M::Fnop, |d| keeps(d, plain_handler(fnop))),
    row(M::Fnstcw, |d| keeps(d, plain_handler(fnstcw))),
    row(M::Fldcw, |d| keeps(d, plain_handler(fldcw))),
    codes(&[C::Fnstsw_AX], |d| keeps(d, plain_handler(fnstsw_ax))),
    codes(&[C::Fnstsw_m2byte], |d| keeps(d, plain_handler(fnstsw))),
    codes(&[C::Fnstenv_m14byte], |d| keeps(d, plain_handler(fnstenv::<Narrow>))),
    codes(&[C::Fnstenv_m28byte], |d| keeps(d, plain_handler(fnstenv::<Wide>))),
    codes(&[C::Fldenv_m14byte], |d| keeps(d, plain_handler(fldenv::<Narrow>))),
    codes(&[C::Fldenv_m28byte], |d| keeps(d, plain_handler(fldenv::<Wide>))),
    codes(&[C::Fnsave_m94byte], |d| keeps(d, plain_handler(fnsave::<Narrow>))),
    codes(&[C::Fnsave_m108byte], |d| keeps(d, plain_handler(fnsave::<Wide>))),
    codes(&[C::Frstor_m94byte], |d| keeps(d, plain_handler(frstor::<Narrow>))),
    codes(&[C::Frstor_m108byte], |d| keeps(d, plain_handler(frstor::<Wide>))),
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
    forget_flags();
    Ok(Then::Next)
}

fn fnclex(cpu: &mut Cpu, _: &Op) -> Done {
    cpu.require_x87()?;
    // SF goes with the exceptions, the condition codes and TOP stay.
    cpu.fpu.fsw &= !(EXCEPTIONS | 1 << 6 | ES | BUSY);
    forget_flags();
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

// Environments. SDM Vol. 1 "Saving the x87 FPU's State with FSTENV/FNSTENV and FSAVE/FNSAVE", with its four figures.

/// Width of an environment's fields, by operand size.
trait Format: 'static {
    /// Bytes of the environment.
    const BYTES: usize;
    /// Bytes of a field.
    const FIELD: usize = Self::BYTES / 7;
}
/// 16-bit operand size.
struct Narrow;
impl Format for Narrow {
    const BYTES: usize = 14;
}
/// 32-bit operand size.
struct Wide;
impl Format for Wide {
    const BYTES: usize = 28;
}

/// Environment and registers, the larger format.
type Image = [u8; 108];

impl Fpu {
    /// The full tag word: valid, zero, special, empty for each of R0 to R7.
    fn tag_word(&self) -> u16 {
        (0..8).fold(0, |word, n| {
            let value = u128::from_le_bytes(self.st[n]);
            let (significand, exponent) = (value as u64, (value >> 64) as u16 & 0x7fff);
            let tag = match (self.ftw >> n & 1, exponent, significand) {
                (0, ..) => 3,
                (_, 0, 0) => 1,
                (_, 0 | 0x7fff, _) => 2,
                _ if significand >> 63 == 0 => 2,
                _ => 0,
            };
            word | tag << (2 * n)
        })
    }

    fn load_tag_word(&mut self, word: u16) {
        self.ftw = (0..8).fold(0, |ftw, n| ftw | u8::from(word >> (2 * n) & 3 != 3) << n);
    }
}

/// The seven fields of an environment.
fn environment(cpu: &Cpu) -> [u32; 7] {
    let fpu = &cpu.fpu;
    let words = [fpu.fcw, fpu.fsw, fpu.tag_word()].map(|word| 0xffff_0000 | u32::from(word));
    let (fip, fdp, fop) = (fpu.fip as u32, fpu.fdp as u32, u32::from(fpu.fop));
    let pointers = if cpu.is_protected() {
        [fip, u32::from(fpu.fcs) | fop << 16, fdp, 0xffff_0000 | u32::from(fpu.fds)]
    } else {
        // Linear addresses, bits 31:16 beside the opcode.
        let fip = fip.wrapping_add(u32::from(fpu.fcs) << 4);
        let fdp = fdp.wrapping_add(u32::from(fpu.fds) << 4);
        [fip & 0xffff, fip >> 16 << 12 | fop, fdp & 0xffff, fdp >> 16 << 12]
    };
    let [a, b, c] = words;
    let [d, e, f, g] = pointers;
    [a, b, c, d, e, f, g]
}

fn put_environment<F: Format>(cpu: &Cpu, image: &mut Image) {
    for (i, field) in environment(cpu).into_iter().enumerate() {
        image[F::FIELD * i..][..F::FIELD].copy_from_slice(&field.to_le_bytes()[..F::FIELD]);
    }
}

fn load_environment<F: Format>(cpu: &mut Cpu, image: &Image) {
    let field = |i: usize| {
        let mut bytes = [0; 4];
        bytes[..F::FIELD].copy_from_slice(&image[F::FIELD * i..][..F::FIELD]);
        u32::from_le_bytes(bytes)
    };
    let protected = cpu.is_protected();
    let fpu = &mut cpu.fpu;
    fpu.set_fcw(field(0) as u16);
    fpu.fsw = field(1) as u16;
    fpu.load_tag_word(field(2) as u16);
    if protected {
        fpu.fip = field(3).into();
        fpu.fcs = field(4) as u16;
        fpu.fop = if F::FIELD == 4 { (field(4) >> 16) as u16 & 0x7ff } else { 0 };
        fpu.fdp = field(5).into();
        fpu.fds = field(6) as u16;
    } else {
        fpu.fip = u64::from(field(3) & 0xffff | field(4) >> 12 << 16);
        fpu.fcs = 0;
        fpu.fop = field(4) as u16 & 0x7ff;
        fpu.fdp = u64::from(field(5) & 0xffff | field(6) >> 12 << 16);
        fpu.fds = 0;
    }
    fpu.settle_summary();
    forget_flags();
}

fn fnstenv<F: Format>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_x87()?;
    let mut image = [0; 108];
    put_environment::<F>(cpu, &mut image);
    cpu.large_operand(op, F::BYTES as u32, F::FIELD as u32, 1, true)?;
    cpu.write_bytes(op.segment(), cpu.ea(op), &image[..F::BYTES])?;
    // Masked, so that the handler which saved it may compute.
    cpu.fpu.fcw |= EXCEPTIONS;
    cpu.fpu.settle_summary();
    Ok(Then::Next)
}

fn fldenv<F: Format>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.wait_x87()?;
    let image = load::<F>(cpu, op, F::BYTES)?;
    load_environment::<F>(cpu, &image);
    Ok(Then::Next)
}

fn load<F: Format>(cpu: &mut Cpu, op: &Op, bytes: usize) -> Result<Image, Stop> {
    let mut image = [0; 108];
    cpu.large_operand(op, bytes as u32, F::FIELD as u32, 1, false)?;
    cpu.read_bytes(op.segment(), cpu.ea(op), &mut image[..bytes])?;
    Ok(image)
}

fn fnsave<F: Format>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_x87()?;
    let mut image = [0; 108];
    put_environment::<F>(cpu, &mut image);
    for i in 0..8 {
        let value = cpu.fpu.st[cpu.fpu.physical(i)];
        image[F::BYTES + 10 * usize::from(i)..][..10].copy_from_slice(&value[..10]);
    }
    cpu.large_operand(op, F::BYTES as u32 + 80, F::FIELD as u32, 1, true)?;
    cpu.write_bytes(op.segment(), cpu.ea(op), &image[..F::BYTES + 80])?;
    cpu.fpu.init_x87();
    forget_flags();
    Ok(Then::Next)
}

fn frstor<F: Format>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.wait_x87()?;
    let image = load::<F>(cpu, op, F::BYTES + 80)?;
    load_environment::<F>(cpu, &image);
    for i in 0..8 {
        let mut value = [0; 16];
        value[..10].copy_from_slice(&image[F::BYTES + 10 * usize::from(i)..][..10]);
        let register = cpu.fpu.physical(i);
        cpu.fpu.st[register] = value;
    }
    Ok(Then::Next)
}
