//! Entries into the system and back: INT n INT3 INTO INT1 BOUND, SYSCALL SYSRET, SYSENTER SYSEXIT, SWAPGS, RDFSBASE and its like.
//! SDM Vol. 2, the Operation section of each mnemonic.

use iced_x86::{Code as C, Mnemonic as M};
use x86_defs::{Cr0, Cr4, Efer, Rflags, vector};

use super::{Row, codes, row};
use crate::cpu::{Cpu, Done, Stop, Then};
use crate::decode::digest::{function, function_ends};
use crate::event::{self, Source};
use crate::fault::Fault;
use crate::flags::OF;
use crate::host::HostWord;
use crate::op::Op;
use crate::state::{Gpr, Seg, Segment};
use crate::vmx::Exit;
use crate::word::Word;

pub(super) const ROWS: &[Row] = &[
    row(M::Int, function_ends(int)),
    row(M::Int3, function_ends(int3)),
    row(M::Into, function_ends(into)),
    row(M::Int1, function_ends(int1)),
    codes(&[C::Bound_r16_m1616], function(bound::<u16>)),
    codes(&[C::Bound_r32_m3232], function(bound::<u32>)),
    row(M::Syscall, function_ends(syscall)),
    codes(&[C::Sysretd], function_ends(sysret::<u32>)),
    codes(&[C::Sysretq], function_ends(sysret::<u64>)),
    row(M::Sysenter, function_ends(sysenter)),
    codes(&[C::Sysexitd], function_ends(sysexit::<u32>)),
    codes(&[C::Sysexitq], function_ends(sysexit::<u64>)),
    row(M::Swapgs, function(swapgs)),
    codes(&[C::Rdfsbase_r32], function(read_base::<u32, { Seg::Fs as u8 }>)),
    codes(&[C::Rdfsbase_r64], function(read_base::<u64, { Seg::Fs as u8 }>)),
    codes(&[C::Rdgsbase_r32], function(read_base::<u32, { Seg::Gs as u8 }>)),
    codes(&[C::Rdgsbase_r64], function(read_base::<u64, { Seg::Gs as u8 }>)),
    codes(&[C::Wrfsbase_r32], function(write_base::<u32, { Seg::Fs as u8 }>)),
    codes(&[C::Wrfsbase_r64], function(write_base::<u64, { Seg::Fs as u8 }>)),
    codes(&[C::Wrgsbase_r32], function(write_base::<u32, { Seg::Gs as u8 }>)),
    codes(&[C::Wrgsbase_r64], function(write_base::<u64, { Seg::Gs as u8 }>)),
];

fn int(cpu: &mut Cpu, op: &Op) -> Done {
    software(cpu, op, op.imm as u8, Source::Software)
}

/// #BP; a debugger that wants it finds RIP at the instruction, as a VM exit leaves it.
fn int3(cpu: &mut Cpu, op: &Op) -> Done {
    if cpu.intercepts >> vector::BP & 1 != 0 {
        return Err(cpu.exit(Exit::Exception { vector: vector::BP, dr6: 0 }));
    }
    software(cpu, op, vector::BP, Source::Trap)
}

fn into(cpu: &mut Cpu, op: &Op) -> Done {
    if cpu.flags().bits() & OF == 0 {
        return Ok(Then::Leave);
    }
    software(cpu, op, vector::OF, Source::Trap)
}

/// #DB that no condition of DR6 explains.
fn int1(cpu: &mut Cpu, op: &Op) -> Done {
    if cpu.intercepts >> vector::DB & 1 != 0 {
        return Err(cpu.exit(Exit::Exception { vector: vector::DB, dr6: 0 }));
    }
    software(cpu, op, vector::DB, Source::Hardware)
}

fn software(cpu: &mut Cpu, op: &Op, vector: u8, source: Source) -> Done {
    let back = cpu.next_ip(op);
    event::software(cpu, vector, source, back)?;
    Ok(Then::Jump)
}

/// SDM Vol. 2 "BOUND": signed, both bounds inclusive.
fn bound<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let at = cpu.ea(op);
    let behind = at.wrapping_add(W::BYTES.into()) & op.address_mask();
    let lower = cpu.read::<W>(op.segment(), at)?;
    let upper = cpu.read::<W>(op.segment(), behind)?;
    let index = cpu.get::<W>(op.dst);
    if index.signed_lt(lower) || upper.signed_lt(index) {
        return Err(cpu.fault(Fault::plain(vector::BR)));
    }
    Ok(Then::Next)
}

/// Flat code and stack segments, as SYSCALL and SYSENTER load them without looking at descriptors.
fn flat(selector: u64, code: bool, dpl: u8, long: bool) -> Segment {
    Segment {
        selector: selector as u16,
        base: 0,
        limit: u32::MAX,
        type_: if code { 11 } else { 3 },
        s: true,
        dpl,
        present: true,
        avl: false,
        l: code && long,
        db: !(code && long),
        g: true,
        unusable: false,
    }
}

impl Cpu {
    fn enter_flat(&mut self, cs: u64, ss: u64, cpl: u8, long: bool) {
        self.seg[Seg::Cs as usize] = flat(cs, true, cpl, long);
        self.seg[Seg::Ss as usize] = flat(ss, false, cpl, long);
        self.cpl = cpl;
    }
}

const IF: u64 = Rflags::IF.bits();
const RF: u64 = Rflags::RF.bits();
const TF: u64 = Rflags::TF.bits();
const VM: u64 = Rflags::VM.bits();

/// SDM Vol. 2 "SYSCALL". Intel's needs 64-bit mode; AMD's (APM Vol. 3 "SYSCALL") works from compatibility mode, to CSTAR, and in
/// legacy mode, to the EIP in STAR.
fn syscall(cpu: &mut Cpu, op: &Op) -> Done {
    let legal = cpu.is_64bit() || cpu.is_amd() && cpu.is_protected();
    if !cpu.efer.contains(Efer::SCE) || !legal {
        return Err(cpu.undefined());
    }
    let back = cpu.next_ip(op);
    let star = cpu.msrs.star;
    let cs = star >> 32 & 0xfffc;
    let long = cpu.is_long();
    if long {
        let target = if cpu.is_64bit() { cpu.msrs.lstar } else { cpu.msrs.cstar };
        let rflags = cpu.rflags() & !RF;
        cpu.set_reg(Gpr::Rcx, back);
        cpu.set_reg(Gpr::R11, rflags);
        cpu.set_rflags(rflags & !(cpu.msrs.fmask & 0xffff_ffff));
        cpu.rip = target;
    } else {
        cpu.set_reg(Gpr::Rcx, back & 0xffff_ffff);
        cpu.set_rflags(cpu.rflags() & !(VM | IF | RF));
        cpu.rip = star & 0xffff_ffff;
    }
    cpu.enter_flat(cs, cs + 8, 0, long);
    cpu.derive();
    // A handler whose mask clears TF is not single-stepped into.
    cpu.suppress_step = cpu.rflags & TF == 0;
    Ok(Then::Jump)
}

/// SDM Vol. 2 "SYSRET": `u64` returns to 64-bit mode, `u32` to compatibility mode (AMD: also in legacy mode).
fn sysret<W: Word>(cpu: &mut Cpu, _: &Op) -> Done {
    let legal = cpu.is_64bit() || cpu.is_amd() && cpu.is_protected();
    if !cpu.efer.contains(Efer::SCE) || !legal {
        return Err(cpu.undefined());
    }
    cpu.require_cpl0()?;
    let star = cpu.msrs.star >> 48;
    let wide = W::BYTES == 8;
    let target = W::of(cpu.reg(Gpr::Rcx)).zext();
    if wide && !cpu.is_canonical(target) {
        return Err(cpu.fault(Fault::gp(0)));
    }
    if cpu.is_long() {
        let rflags = cpu.reg(Gpr::R11) & 0x3c_7fd7 | 2;
        cpu.set_rflags(rflags);
    } else {
        cpu.set_rflags(cpu.rflags() | IF);
    }
    let cs = if wide { star + 16 } else { star } | 3;
    cpu.enter_flat(cs, (star + 8) | 3, 3, wide);
    cpu.rip = target;
    cpu.derive();
    Ok(Then::Jump)
}

/// AMD's SYSENTER and SYSEXIT do not exist in long mode (APM Vol. 3 "SYSENTER").
fn require_sysenter(cpu: &mut Cpu) -> Result<u64, Stop> {
    if cpu.is_long() && cpu.is_amd() {
        return Err(cpu.undefined());
    }
    let cs = cpu.msrs.sysenter_cs & 0xffff;
    if !cpu.cr0.contains(Cr0::PE) || cs & 0xfffc == 0 {
        return Err(cpu.fault(Fault::gp(0)));
    }
    Ok(cs)
}

/// SDM Vol. 2 "SYSENTER".
fn sysenter(cpu: &mut Cpu, _: &Op) -> Done {
    let cs = require_sysenter(cpu)? & 0xfffc;
    let long = cpu.is_long();
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.set_rflags(cpu.rflags() & !(VM | IF | RF));
    cpu.set_reg(Gpr::Rsp, cpu.msrs.sysenter_esp & mask);
    cpu.rip = cpu.msrs.sysenter_eip & mask;
    cpu.enter_flat(cs, cs + 8, 0, long);
    cpu.derive();
    Ok(Then::Jump)
}

/// SDM Vol. 2 "SYSEXIT": `u64` to 64-bit mode.
fn sysexit<W: Word>(cpu: &mut Cpu, _: &Op) -> Done {
    let cs = require_sysenter(cpu)?;
    cpu.require_cpl0()?;
    let wide = W::BYTES == 8;
    let (rip, rsp) = (W::of(cpu.reg(Gpr::Rdx)).zext(), W::of(cpu.reg(Gpr::Rcx)).zext());
    if wide && !(cpu.is_canonical(rip) && cpu.is_canonical(rsp)) {
        return Err(cpu.fault(Fault::gp(0)));
    }
    let cs = cs + if wide { 32 } else { 16 };
    cpu.set_reg(Gpr::Rsp, rsp);
    cpu.rip = rip;
    cpu.enter_flat(cs | 3, (cs + 8) | 3, 3, wide);
    cpu.derive();
    Ok(Then::Jump)
}

/// SDM Vol. 2 "SWAPGS".
fn swapgs(cpu: &mut Cpu, _: &Op) -> Done {
    cpu.require_cpl0()?;
    let base = &mut cpu.seg[Seg::Gs as usize].base;
    std::mem::swap(base, &mut cpu.msrs.kernel_gs_base);
    cpu.seg_base[Seg::Gs as usize] = cpu.seg[Seg::Gs as usize].base;
    Ok(Then::Next)
}

fn require_fsgsbase(cpu: &mut Cpu) -> Result<(), Stop> {
    if cpu.cr4.contains(Cr4::FSGSBASE) { Ok(()) } else { Err(cpu.undefined()) }
}

/// SDM Vol. 2 "RDFSBASE/RDGSBASE".
fn read_base<W: HostWord, const SEG: u8>(cpu: &mut Cpu, op: &Op) -> Done {
    require_fsgsbase(cpu)?;
    let base = cpu.seg[usize::from(SEG)].base;
    cpu.put(op.dst, W::of(base));
    Ok(Then::Next)
}

/// SDM Vol. 2 "WRFSBASE/WRGSBASE".
fn write_base<W: HostWord, const SEG: u8>(cpu: &mut Cpu, op: &Op) -> Done {
    require_fsgsbase(cpu)?;
    let base = cpu.get::<W>(op.dst).zext();
    if !cpu.is_canonical(base) {
        return Err(cpu.fault(Fault::gp(0)));
    }
    cpu.seg[usize::from(SEG)].base = base;
    cpu.derive();
    Ok(Then::Next)
}
