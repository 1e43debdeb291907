//! MOVS CMPS SCAS LODS STOS, alone and repeated. INS and OUTS are with the ports. SDM Vol. 2, the page of each mnemonic
//! and "REP/REPE/REPZ/REPNE/REPNZ".
//!
//! A repeated instruction commits its registers after each element, or after each run of elements that lie in RAM in one
//! page: a fault, a device or an interrupt finds the state that the SDM promises.
#![expect(unsafe_code, reason = "runs of elements are host string instructions on guest RAM")]

use iced_x86::{Code as C, Mnemonic as M};
use x86_defs::{Dr6, Rflags};

use super::{Row, codes, plain_handler, row};
use crate::cpu::{Cpu, Done, Stop, Then};
use crate::decode::digest::{Digest, FlagsOut, Lowered};
use crate::flags::{Flags, kind};
use crate::host::{self, HostWord};
use crate::op::Op;
use crate::state::{Gpr, Seg};

pub(super) const ROWS: &[Row] = &[
    row(M::Movsb, string::<Movs, u8>),
    row(M::Movsw, string::<Movs, u16>),
    codes(&[C::Movsd_m32_m32], string::<Movs, u32>),
    row(M::Movsq, string::<Movs, u64>),
    row(M::Cmpsb, string::<Cmps, u8>),
    row(M::Cmpsw, string::<Cmps, u16>),
    codes(&[C::Cmpsd_m32_m32], string::<Cmps, u32>),
    row(M::Cmpsq, string::<Cmps, u64>),
    row(M::Scasb, string::<Scas, u8>),
    row(M::Scasw, string::<Scas, u16>),
    row(M::Scasd, string::<Scas, u32>),
    row(M::Scasq, string::<Scas, u64>),
    row(M::Lodsb, string::<Lods, u8>),
    row(M::Lodsw, string::<Lods, u16>),
    row(M::Lodsd, string::<Lods, u32>),
    row(M::Lodsq, string::<Lods, u64>),
    row(M::Stosb, string::<Stos, u8>),
    row(M::Stosw, string::<Stos, u16>),
    row(M::Stosd, string::<Stos, u32>),
    row(M::Stosq, string::<Stos, u64>),
];

/// Bytes that a repeated instruction moves before it lets the loop look around.
const CHUNK: u64 = 0x1_0000;
const PAGE: u64 = 0x1000;
const RAX: u8 = Gpr::Rax as u8 * 8;

/// Offsets that the index registers hold, cut to the address size.
struct Offsets {
    si: u64,
    di: u64,
}

/// What happens to one element.
trait Element: 'static {
    /// SI moves.
    const SI: bool;
    /// DI moves.
    const DI: bool;
    /// Sets the flags, and REPE and REPNE look at ZF.
    const COMPARES: bool = false;
    /// One element, exactly; nothing changes if it stops. The flags, if it compares.
    fn once<W: HostWord>(cpu: &mut Cpu, op: &Op, at: &Offsets) -> Result<Flags, Stop>;
    /// Up to `most` elements that lie in RAM, in one page each way; how many were done.
    fn run<W: HostWord>(_: &mut Cpu, _: &Op, _: &Offsets, _most: u64, _down: bool) -> u64 {
        0
    }
}

/// `ES:[DI] ← seg:[SI]`. SDM Vol. 2 "MOVS".
struct Movs;
impl Element for Movs {
    const SI: bool = true;
    const DI: bool = true;
    fn once<W: HostWord>(cpu: &mut Cpu, op: &Op, at: &Offsets) -> Result<Flags, Stop> {
        let value: W = cpu.read(op.segment(), at.si)?;
        cpu.write(Seg::Es, at.di, value)?;
        Ok(cpu.flags())
    }
    fn run<W: HostWord>(cpu: &mut Cpu, op: &Op, at: &Offsets, most: u64, down: bool) -> u64 {
        let mask = op.address_mask();
        let Some((from, n)) = cpu.ram::<W>(op.segment(), at.si, mask, most, down, false) else { return 0 };
        let Some((to, n)) = cpu.ram::<W>(Seg::Es, at.di, mask, n, down, true) else { return 0 };
        if down {
            for i in 0..n {
                let back = i * u64::from(W::BYTES);
                // SAFETY: `ram` found `n` elements downwards from `from` in one page that the TLB holds.
                let value = unsafe { W::load(from - back) };
                // SAFETY: likewise from `to`, writable.
                unsafe { W::store(to - back, value) };
            }
        } else {
            // SAFETY: `ram` found `n` elements from `from` and from `to` on, in pages that the TLB holds.
            unsafe { host::copy_up::<W>(to, from, n) };
        }
        n
    }
}

/// `ES:[DI] ← A`. SDM Vol. 2 "STOS".
struct Stos;
impl Element for Stos {
    const SI: bool = false;
    const DI: bool = true;
    fn once<W: HostWord>(cpu: &mut Cpu, _: &Op, at: &Offsets) -> Result<Flags, Stop> {
        let value = cpu.get::<W>(RAX);
        cpu.write(Seg::Es, at.di, value)?;
        Ok(cpu.flags())
    }
    fn run<W: HostWord>(cpu: &mut Cpu, op: &Op, at: &Offsets, most: u64, down: bool) -> u64 {
        let value = cpu.get::<W>(RAX);
        let Some((to, n)) = cpu.ram::<W>(Seg::Es, at.di, op.address_mask(), most, down, true) else { return 0 };
        let first = if down { to - (n - 1) * u64::from(W::BYTES) } else { to };
        // SAFETY: `ram` found `n` writable elements there, in a page that the TLB holds.
        unsafe { host::fill_up(first, value, n) };
        n
    }
}

/// `A ← seg:[SI]`. SDM Vol. 2 "LODS".
struct Lods;
impl Element for Lods {
    const SI: bool = true;
    const DI: bool = false;
    fn once<W: HostWord>(cpu: &mut Cpu, op: &Op, at: &Offsets) -> Result<Flags, Stop> {
        let value: W = cpu.read(op.segment(), at.si)?;
        cpu.put(RAX, value);
        Ok(cpu.flags())
    }
}

/// Flags of `seg:[SI] − ES:[DI]`. SDM Vol. 2 "CMPS".
struct Cmps;
impl Element for Cmps {
    const SI: bool = true;
    const DI: bool = true;
    const COMPARES: bool = true;
    fn once<W: HostWord>(cpu: &mut Cpu, op: &Op, at: &Offsets) -> Result<Flags, Stop> {
        let first: W = cpu.read(op.segment(), at.si)?;
        let second: W = cpu.read(Seg::Es, at.di)?;
        Ok(Flags::of_difference(first, second))
    }
}

/// Flags of `A − ES:[DI]`. SDM Vol. 2 "SCAS".
struct Scas;
impl Element for Scas {
    const SI: bool = false;
    const DI: bool = true;
    const COMPARES: bool = true;
    fn once<W: HostWord>(cpu: &mut Cpu, _: &Op, at: &Offsets) -> Result<Flags, Stop> {
        let element: W = cpu.read(Seg::Es, at.di)?;
        Ok(Flags::of_difference(cpu.get::<W>(RAX), element))
    }
}

/// In `aux`: go on while ZF is this.
const WHILE_EQUAL: u8 = 1;
const WHILE_NOT_EQUAL: u8 = 0;

fn string<E: Element, W: HostWord>(d: &Digest<'_>) -> Option<Lowered> {
    let repeated = d.ins.has_rep_prefix() || d.ins.has_repne_prefix();
    let mut lowered = if repeated {
        // A count of 0 leaves the flags of a comparison alone.
        d.lower(plain_handler(repeat::<E, W>))
    } else {
        Lowered {
            flags: FlagsOut::Kind(kind::SUB + W::LOG2),
            reads_flags: false,
            ..d.lower(plain_handler(once::<E, W>))
        }
    };
    if !E::COMPARES {
        lowered = Lowered { reads_flags: false, ..lowered.keeps_flags() };
    }
    lowered.op.aux = if d.ins.has_repne_prefix() { WHILE_NOT_EQUAL } else { WHILE_EQUAL };
    Some(lowered)
}

impl Cpu {
    /// Moves a register that addresses or counts: only the address size of it changes, 32 bits clear the rest.
    fn put_address(&mut self, register: Gpr, mask: u64, value: u64) {
        let kept = if mask == 0xffff { self.reg(register) & !mask } else { 0 };
        self.set_reg(register, kept | value & mask);
    }

    fn move_indices<E: Element>(&mut self, mask: u64, by: u64) {
        if E::SI {
            self.put_address(Gpr::Rsi, mask, self.reg(Gpr::Rsi).wrapping_add(by));
        }
        if E::DI {
            self.put_address(Gpr::Rdi, mask, self.reg(Gpr::Rdi).wrapping_add(by));
        }
    }

    fn offsets(&self, mask: u64) -> Offsets {
        Offsets { si: self.reg(Gpr::Rsi) & mask, di: self.reg(Gpr::Rdi) & mask }
    }

    /// Host address of the element at `seg:offset`, and how many of `most` from there on (downwards: from there back) lie
    /// in its page, inside the segment, and in the TLB. `None`: not even one for certain.
    fn ram<W: HostWord>(
        &self,
        seg: Seg,
        offset: u64,
        mask: u64,
        most: u64,
        down: bool,
        write: bool,
    ) -> Option<(u64, u64)> {
        let size = u64::from(W::BYTES);
        let bound = if write { &self.write_bound } else { &self.read_bound }[seg as usize];
        let inside = bound.checked_sub(offset)? / size;
        let la = self.wrap_linear(self.seg_base[seg as usize].wrapping_add(offset));
        let host = if write { self.tlb.write(la, size) } else { self.tlb.read(la, size) }?;
        let in_page = la & (PAGE - 1);
        let n = if down {
            (inside.min(1) * (in_page / size + 1)).min(offset / size + 1)
        } else {
            inside.min((PAGE - in_page) / size).min((mask - offset) / size)
        };
        let n = n.min(most);
        (n > 0).then_some((host, n))
    }
}

/// Distance from one element to the next, as DF says.
fn step<W: HostWord>(cpu: &Cpu) -> u64 {
    let size = u64::from(W::BYTES);
    if cpu.rflags & Rflags::DF.bits() != 0 { size.wrapping_neg() } else { size }
}

fn once<E: Element, W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let mask = op.address_mask();
    let flags = E::once::<W>(cpu, op, &cpu.offsets(mask))?;
    cpu.move_indices::<E>(mask, step::<W>(cpu));
    if E::COMPARES {
        cpu.set_flags(flags);
    }
    Ok(Then::Next)
}

fn repeat<E: Element, W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    let mask = op.address_mask();
    let mut count = cpu.reg(Gpr::Rcx) & mask;
    if count == 0 {
        return Ok(Then::Next);
    }
    let step = step::<W>(cpu);
    let down = step > PAGE;
    let stepped = cpu.rflags & Rflags::TF.bits() != 0;
    let mut chunk = CHUNK / u64::from(W::BYTES);
    let (then, flags) = loop {
        let at = cpu.offsets(mask);
        let most = if stepped { 0 } else { count.min(chunk) };
        let mut flags = cpu.flags();
        let mut done = E::run::<W>(cpu, op, &at, most, down);
        if done == 0 {
            // Flags of earlier elements are dropped if this one stops, as the SDM has it: they have not been set yet.
            flags = E::once::<W>(cpu, op, &at)?;
            done = 1;
            cpu.forget_answers();
        }
        cpu.move_indices::<E>(mask, step.wrapping_mul(done));
        count -= done;
        chunk = chunk.saturating_sub(done);
        cpu.put_address(Gpr::Rcx, mask, count);
        let over = E::COMPARES && flags.condition(4) != (op.aux == WHILE_EQUAL);
        if count == 0 || over {
            break (Then::Next, flags);
        }
        if chunk == 0 || stepped || cpu.leave || cpu.kick.asked() {
            break (Then::Again, flags);
        }
    };
    if E::COMPARES {
        cpu.set_flags(flags);
    }
    if stepped && then == Then::Again {
        cpu.debug_pending |= Dr6::BS.bits();
    }
    Ok(then)
}
