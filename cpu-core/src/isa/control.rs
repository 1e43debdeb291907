//! MOV to and from control and debug registers, LMSW SMSW CLTS, XGETBV XSETBV, RDPKRU WRPKRU, INVLPG INVPCID, WBINVD INVD.
//! SDM Vol. 2, the page of each mnemonic; Vol. 3 "Control Registers" and "Debug Registers" for what a write may hold.

use iced_x86::{Code as C, Mnemonic as M};
use x86_defs::cpuid::{self, Feature};
use x86_defs::{Cr0, Cr3, Cr4, Dr6, Dr7, Efer};

use super::{Row, codes, row};
use crate::cpu::{Cpu, Done, Stop, Then};
use crate::decode::digest::{Digest, Lowered, function, function_ends};
use crate::fault::{Fault, Origin};
use crate::op::Op;
use crate::state::{Gpr, Seg};

pub(super) const ROWS: &[Row] = &[
    codes(&[C::Mov_r32_cr, C::Mov_r64_cr], from_control),
    codes(&[C::Mov_cr_r32, C::Mov_cr_r64], function_ends(mov_to_cr)),
    codes(&[C::Mov_r32_dr, C::Mov_r64_dr], function_ends(mov_from_dr)),
    codes(&[C::Mov_dr_r32, C::Mov_dr_r64], function_ends(mov_to_dr)),
    row(M::Clts, function_ends(clts)),
    row(M::Lmsw, lmsw_row),
    row(M::Smsw, |d| super::table::to_rm(d, super::plain_handler(smsw))),
    row(M::Xgetbv, function(xgetbv)),
    row(M::Xsetbv, function_ends(xsetbv)),
    row(M::Rdpkru, function(rdpkru)),
    row(M::Wrpkru, function_ends(wrpkru)),
    row(M::Invlpg, function_ends(invlpg)),
    row(M::Invpcid, function_ends(invpcid)),
    row(M::Wbinvd, function_ends(write_back)),
    row(M::Wbnoinvd, function_ends(write_back)),
    row(M::Invd, function_ends(write_back)),
];

/// Bits of CR0 that exist.
const CR0_BITS: u64 = Cr0::all().bits();

/// CR4's bits and the feature that must be offered for each. SDM Vol. 3 "Control Registers".
const CR4_FEATURES: &[(Cr4, Feature)] = &[
    (Cr4::VME, cpuid::VME),
    (Cr4::PVI, cpuid::VME),
    (Cr4::TSD, cpuid::TSC),
    (Cr4::DE, cpuid::DE),
    (Cr4::PSE, cpuid::PSE),
    (Cr4::PAE, cpuid::PAE),
    (Cr4::PGE, cpuid::PGE),
    (Cr4::OSFXSR, cpuid::FXSR),
    (Cr4::OSXMMEXCPT, cpuid::SSE),
    (Cr4::UMIP, cpuid::UMIP),
    (Cr4::FSGSBASE, cpuid::FSGSBASE),
    (Cr4::PCIDE, cpuid::PCID),
    (Cr4::OSXSAVE, cpuid::XSAVE),
    (Cr4::SMEP, cpuid::SMEP),
    (Cr4::SMAP, cpuid::SMAP),
    (Cr4::PKE, cpuid::PKU),
    (Cr4::LA57, cpuid::LA57),
];
/// Bits that need no feature: machine checks and RDPMC may be enabled on any CPU that has them at all.
const CR4_ALWAYS: Cr4 = Cr4::MCE.union(Cr4::PCE);
/// Bits 10:0, see [`crate::Variant::ungated_controls`].
const CR4_UNGATED: Cr4 = Cr4::from_bits_retain(0x7ff);

/// Has CR4 bits only that this processor has, whatever its CPUID says? VMXE is always set where a guest runs.
pub(crate) fn cr4_exists(cr4: Cr4) -> bool {
    let all = CR4_FEATURES.iter().fold(CR4_UNGATED | Cr4::VMXE, |all, row| all | row.0);
    all.contains(cr4)
}

impl Cpu {
    /// The guest's CPUID offers `feature`. An empty table (nobody has set one) offers everything.
    pub(crate) fn offers(&self, feature: &Feature) -> bool {
        self.cpuid.is_empty()
            || self.cpuid.iter().any(|entry| {
                entry.function == feature.leaf
                    && entry.index.is_none_or(|index| index == feature.subleaf)
                    && feature.is_in(entry.regs)
            })
    }

    /// MOV to CR0 and LMSW: #GP(0) for what the SDM forbids, then PDPTEs, LMA and the TLB follow.
    pub(crate) fn write_cr0(&mut self, value: u64) -> Result<(), Stop> {
        if value >> 32 != 0 {
            return Err(self.fault(Fault::gp(0)));
        }
        let new = Cr0::from_bits_retain(value & CR0_BITS) | Cr0::ET;
        let old = self.cr0;
        let changed = old ^ new;
        let on = |bit: Cr0| new.contains(bit) && !old.contains(bit);
        let off = |bit: Cr0| !new.contains(bit) && old.contains(bit);
        let invalid = new.contains(Cr0::PG) && !new.contains(Cr0::PE)
            || new.contains(Cr0::NW) && !new.contains(Cr0::CD)
            || off(Cr0::PG) && (self.is_64bit() || self.cr4.contains(Cr4::PCIDE));
        let to_long = on(Cr0::PG) && self.efer.contains(Efer::LME);
        let cs = &self.seg[Seg::Cs as usize];
        let invalid_long = to_long && (!self.cr4.contains(Cr4::PAE) || cs.l);
        if invalid || invalid_long {
            return Err(self.fault(Fault::gp(0)));
        }
        let pae = new.contains(Cr0::PG) && self.cr4.contains(Cr4::PAE) && !self.efer.contains(Efer::LME);
        if pae && changed.intersects(Cr0::PG | Cr0::CD | Cr0::NW) {
            self.load_pdptes(self.cr3)?;
        }
        if to_long {
            self.efer |= Efer::LMA;
        } else if off(Cr0::PG) {
            self.efer &= !Efer::LMA;
        }
        self.cr0 = new;
        if changed.intersects(Cr0::PG | Cr0::WP | Cr0::PE | Cr0::AM) {
            self.flush_tlb();
        }
        self.derive();
        Ok(())
    }

    /// #GP(0) where a present PDPTE at `cr3` has a reserved bit.
    fn load_pdptes(&mut self, cr3: u64) -> Result<(), Stop> {
        match mmu::load_pdptes(&self.view, cr3, self.phys_bits) {
            Some(pdpte) => {
                self.pdpte = pdpte;
                Ok(())
            }
            None => Err(self.fault(Fault::gp(0))),
        }
    }

    /// PAE paging, the mode with PDPTE registers.
    fn is_pae(&self) -> bool {
        self.cr0.contains(Cr0::PG) && self.cr4.contains(Cr4::PAE) && !self.is_long()
    }

    pub(crate) fn write_cr3(&mut self, value: u64) -> Result<(), Stop> {
        let mut value = value;
        if self.is_long() {
            if self.cr4.contains(Cr4::PCIDE) {
                // Keeping the entries of that PCID is allowed, never demanded.
                value &= !Cr3::NO_FLUSH.bits();
            }
            if value >> self.phys_bits != 0 {
                return Err(self.fault(Fault::gp(0)));
            }
        } else if self.is_pae() {
            self.load_pdptes(value)?;
        }
        self.cr3 = value;
        self.flush_local();
        Ok(())
    }

    pub(crate) fn write_cr4(&mut self, value: u64) -> Result<(), Stop> {
        let new = Cr4::from_bits_retain(value);
        let old = self.cr4;
        let changed = old ^ new;
        let always = if self.variant.ungated_controls { CR4_UNGATED } else { CR4_ALWAYS };
        let offered = CR4_FEATURES.iter().filter(|row| self.offers(&row.1)).fold(always, |all, row| all | row.0);
        let on = |bit: Cr4| new.contains(bit) && !old.contains(bit);
        let long = self.is_long();
        let invalid = new.bits() & !offered.bits() != 0
            || long && (!new.contains(Cr4::PAE) || changed.contains(Cr4::LA57))
            || on(Cr4::PCIDE) && (!long || self.cr3 & 0xfff != 0);
        if invalid {
            return Err(self.fault(Fault::gp(0)));
        }
        let paging = Cr4::PSE | Cr4::PAE | Cr4::PGE | Cr4::SMEP;
        if self.cr0.contains(Cr0::PG) && new.contains(Cr4::PAE) && !long && changed.intersects(paging) {
            self.load_pdptes(self.cr3)?;
        }
        self.cr4 = new;
        if changed.intersects(paging | Cr4::PCIDE | Cr4::SMAP | Cr4::PKE | Cr4::LA57) {
            self.flush_tlb();
        }
        self.derive();
        Ok(())
    }
}

/// Reading a control register changes nothing that the trace hangs on.
fn from_control(d: &Digest<'_>) -> Option<Lowered> {
    super::segment::calm(d, mov_from_cr)
}

/// SDM Vol. 2 "MOV—Move to/from Control Registers".
fn mov_from_cr(cpu: &mut Cpu, op: &Op) -> Done {
    let value = match op.src {
        0 => cpu.cr0.bits(),
        2 => cpu.cr2,
        3 => cpu.cr3,
        4 => cpu.cr4.bits(),
        8 => cpu.cr8,
        _ => return Err(cpu.undefined()),
    };
    cpu.require_cpl0()?;
    cpu.put_native(op.dst, value);
    Ok(Then::Next)
}

fn mov_to_cr(cpu: &mut Cpu, op: &Op) -> Done {
    if !matches!(op.dst, 0 | 2 | 3 | 4 | 8) {
        return Err(cpu.undefined());
    }
    cpu.require_cpl0()?;
    let value = cpu.get_native(op.src);
    match op.dst {
        0 => cpu.write_cr0(value)?,
        2 => cpu.cr2 = value,
        3 => cpu.write_cr3(value)?,
        4 => cpu.write_cr4(value)?,
        _ => {
            if value & !0xf != 0 {
                return Err(cpu.fault(Fault::gp(0)));
            }
            let old = std::mem::replace(&mut cpu.cr8, value);
            if cpu.platform.cr8_written(old, value) {
                let Stop = cpu.exit(crate::vmx::Exit::CrAccess);
            }
            return Ok(Then::Leave);
        }
    }
    cpu.serialize();
    Ok(Then::Leave)
}

impl Cpu {
    /// A register of the mode's native width: 64 bits in 64-bit mode, 32 elsewhere.
    fn get_native(&self, slot: u8) -> u64 {
        if self.is_64bit() { self.get::<u64>(slot) } else { self.get::<u32>(slot).into() }
    }

    fn put_native(&mut self, slot: u8, value: u64) {
        if self.is_64bit() { self.put(slot, value) } else { self.put(slot, value as u32) }
    }

    /// DR number, DR4 and DR5 resolved: #UD, #GP and the #DB of DR7.GD, in that order.
    fn debug_register(&mut self, number: u8) -> Result<u8, Stop> {
        let number = match number {
            4 | 5 if self.cr4.contains(Cr4::DE) => return Err(self.undefined()),
            4 | 5 => number + 2,
            0..=7 => number,
            _ => return Err(self.undefined()),
        };
        self.require_cpl0()?;
        if self.breakpoints().dr7 & Dr7::GD.bits() != 0 {
            return Err(self.fault(Fault::db(Dr6::BD.bits(), Origin::Fault)));
        }
        Ok(number)
    }
}

/// SDM Vol. 2 "MOV—Move to/from Debug Registers".
fn mov_from_dr(cpu: &mut Cpu, op: &Op) -> Done {
    let value = match cpu.debug_register(op.src)? {
        6 => cpu.debug.dr6,
        7 => cpu.debug.dr7,
        number => cpu.debug.db[usize::from(number & 3)],
    };
    cpu.put_native(op.dst, value);
    Ok(Then::Leave)
}

/// Bits of DR6 and DR7 that software may set.
pub(crate) const DR6_WRITABLE: u64 = Dr6::B.bits() | Dr6::BD.bits() | Dr6::BS.bits() | Dr6::BT.bits();
pub(crate) const DR7_WRITABLE: u64 = 0xffff_23ff;

fn mov_to_dr(cpu: &mut Cpu, op: &Op) -> Done {
    let number = cpu.debug_register(op.dst)?;
    let value = cpu.get_native(op.src);
    if number >= 6 && value >> 32 != 0 {
        return Err(cpu.fault(Fault::gp(0)));
    }
    match number {
        6 => cpu.debug.dr6 = value & DR6_WRITABLE | Dr6::FIXED_1,
        7 => cpu.debug.dr7 = value & DR7_WRITABLE | Dr7::FIXED.bits(),
        _ => cpu.debug.db[usize::from(number)] = value,
    }
    // Watched pages are kept out of the TLB.
    cpu.flush_tlb();
    cpu.serialize();
    Ok(Then::Leave)
}

/// SDM Vol. 2 "CLTS".
fn clts(cpu: &mut Cpu, _: &Op) -> Done {
    cpu.require_cpl0()?;
    cpu.cr0 &= !Cr0::TS;
    cpu.derive();
    Ok(Then::Leave)
}

fn lmsw_row(d: &Digest<'_>) -> Option<Lowered> {
    let mut lowered = d.lower(super::plain_handler(lmsw)).ends();
    lowered.op.aux = u8::from(d.is_mem(0));
    Some(lowered)
}

/// SDM Vol. 2 "LMSW": PE, MP, EM and TS; PE can only be set.
fn lmsw(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_cpl0()?;
    let source = if op.aux != 0 { cpu.read_operand::<u16>(op)? } else { cpu.get::<u16>(op.dst) };
    let pe = cpu.cr0.bits() & 1;
    cpu.write_cr0(cpu.cr0.bits() & !0xf | u64::from(source) & 0xf | pe)?;
    cpu.serialize();
    Ok(Then::Leave)
}

/// SDM Vol. 2 "SMSW": a register takes as much of CR0 as it holds.
fn smsw(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.check_umip()?;
    cpu.put_rm(op, cpu.cr0.bits())?;
    Ok(Then::Next)
}

/// SDM Vol. 2 "XGETBV". Index 1 shows which of the enabled components are in use.
fn xgetbv(cpu: &mut Cpu, _: &Op) -> Done {
    if !cpu.cr4.contains(Cr4::OSXSAVE) {
        return Err(cpu.undefined());
    }
    let index = cpu.reg(Gpr::Rcx) as u32;
    if index > 1 || index == 1 && !cpu.offers(&cpuid::XGETBV_ECX_1) {
        return Err(cpu.fault(Fault::gp(0)));
    }
    let shown = if index == 1 { cpu.fpu.xcr0 & cpu.in_use() } else { cpu.fpu.xcr0 };
    cpu.put_pair(shown);
    Ok(Then::Next)
}

/// SDM Vol. 2 "XSETBV".
fn xsetbv(cpu: &mut Cpu, _: &Op) -> Done {
    if !cpu.cr4.contains(Cr4::OSXSAVE) {
        return Err(cpu.undefined());
    }
    cpu.require_cpl0()?;
    let value = cpu.pair();
    if cpu.reg(Gpr::Rcx) as u32 != 0 || !cpu.is_valid_xcr0(value) {
        return Err(cpu.fault(Fault::gp(0)));
    }
    cpu.set_xcr0(value);
    cpu.serialize();
    Ok(Then::Leave)
}

impl Cpu {
    /// #UD without CR4.PKE, #GP(0) unless ECX is 0.
    fn require_pkru(&mut self) -> Result<(), Stop> {
        if !self.cr4.contains(Cr4::PKE) {
            return Err(self.undefined());
        }
        if self.reg(Gpr::Rcx) as u32 == 0 { Ok(()) } else { Err(self.fault(Fault::gp(0))) }
    }
}

/// SDM Vol. 2 "RDPKRU".
fn rdpkru(cpu: &mut Cpu, _: &Op) -> Done {
    cpu.require_pkru()?;
    cpu.put_pair(cpu.fpu.pkru.into());
    Ok(Then::Next)
}

/// SDM Vol. 2 "WRPKRU".
fn wrpkru(cpu: &mut Cpu, _: &Op) -> Done {
    cpu.require_pkru()?;
    let value = cpu.pair();
    if value >> 32 != 0 {
        return Err(cpu.fault(Fault::gp(0)));
    }
    cpu.set_pkru(value as u32);
    Ok(Then::Leave)
}

impl Cpu {
    /// EDX:EAX.
    pub(super) fn pair(&self) -> u64 {
        self.reg(Gpr::Rax) & 0xffff_ffff | self.reg(Gpr::Rdx) << 32
    }

    /// EDX:EAX ← `value`, upper halves cleared.
    pub(super) fn put_pair(&mut self, value: u64) {
        self.put_gpr(Gpr::Rax, value as u32);
        self.put_gpr(Gpr::Rdx, (value >> 32) as u32);
    }

    /// What XSETBV accepts: x87 always, AVX with SSE, the three AVX-512 components together and with AVX, and nothing that
    /// CPUID leaf 0DH does not offer (SDM Vol. 1 "Enabling the XSAVE Feature Set and XSAVE-Enabled Features").
    pub fn is_valid_xcr0(&self, value: u64) -> bool {
        use x86_defs::XCr0;
        let bits = XCr0::from_bits_retain(value);
        let avx512 = XCr0::OPMASK | XCr0::ZMM_HI256 | XCr0::HI16_ZMM;
        let offered = self
            .cpuid
            .iter()
            .find(|entry| entry.function == 0xd && entry.index.is_none_or(|index| index == 0))
            .map(|entry| u64::from(entry.regs[0]) | u64::from(entry.regs[3]) << 32)
            .unwrap_or(if self.cpuid.is_empty() { 7 } else { 3 });
        bits.contains(XCr0::X87)
            && (!bits.contains(XCr0::AVX) || bits.contains(XCr0::SSE))
            && (!bits.intersects(avx512) || bits.contains(avx512 | XCr0::AVX))
            && value & !offered == 0
    }
}

/// SDM Vol. 2 "INVLPG". The address is not checked; one that is not canonical names no page.
fn invlpg(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_cpl0()?;
    let la = cpu.seg_base[op.segment() as usize].wrapping_add(cpu.ea(op));
    cpu.flush_page(cpu.wrap_linear(la));
    cpu.serialize();
    Ok(Then::Leave)
}

/// SDM Vol. 2 "INVPCID". `dst`: the type, memory: PCID in bits 11:0 and a linear address in bits 127:64.
fn invpcid(cpu: &mut Cpu, op: &Op) -> Done {
    if !cpu.offers(&cpuid::INVPCID) {
        return Err(cpu.undefined());
    }
    if cpu.is_v86() {
        return Err(cpu.fault(Fault::gp(0)));
    }
    cpu.require_cpl0()?;
    let kind = cpu.get_native(op.dst);
    let mut descriptor = [0; 16];
    let at = cpu.ea(op);
    cpu.read_bytes(op.segment(), at, &mut descriptor)?;
    let descriptor = u128::from_le_bytes(descriptor);
    let (pcid, la) = (descriptor as u64, (descriptor >> 64) as u64);
    let names_pcid = kind <= 1;
    let invalid = kind > 3
        || names_pcid && pcid >> 12 != 0
        || names_pcid && pcid != 0 && !cpu.cr4.contains(Cr4::PCIDE)
        || kind == 0 && !cpu.is_canonical(la);
    if invalid {
        return Err(cpu.fault(Fault::gp(0)));
    }
    // The TLB holds one PCID's entries and global ones, so more goes than must. Only type 2 is for those as well.
    match kind {
        0 if pcid == cpu.cr3 & 0xfff && cpu.cr4.contains(Cr4::PCIDE) => cpu.flush_page(la),
        2 => cpu.flush_tlb(),
        _ => cpu.flush_local(),
    }
    cpu.serialize();
    Ok(Then::Leave)
}

/// WBINVD, WBNOINVD, INVD: caches are not modelled; they serialise.
fn write_back(cpu: &mut Cpu, _: &Op) -> Done {
    cpu.require_cpl0()?;
    cpu.serialize();
    Ok(Then::Leave)
}
