//! Descriptor tables and segment registers: reading a descriptor, loading a register from it, and taking back a transfer
//! that faults half-way. SDM Vol. 3, chapter "Protection"; Vol. 2 "MOV—Move" for the checks of each register.

use x86_defs::descriptor::system_type;
use x86_defs::{AccessRights, Cr0, Descriptor, Rflags, Selector};

use crate::cpu::{Cpu, Stop};
use crate::fault::Fault;
use crate::flags::Flags;
use crate::state::{Gpr, Seg, Segment};

/// Makes the fault that reports a selector: `Fault::gp`, `Fault::ts`, `Fault::np`, `Fault::ss`.
pub(crate) type Report = fn(u32) -> Fault;

/// A descriptor and where it lies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    /// Its first eight bytes.
    pub(crate) raw: Descriptor,
    /// Linear address of its first byte.
    pub(crate) la: u64,
}

/// What a far transfer changes step by step, kept to be put back where a later step faults.
struct Before {
    seg: [Segment; 6],
    rsp: u64,
    rip: u64,
    rflags: u64,
    status: Flags,
    cpl: u8,
}

impl Cpu {
    /// Runs the steps of a transfer; a fault in any leaves registers as they were. Bounds are right afterwards.
    pub(crate) fn attempt<T>(&mut self, steps: impl FnOnce(&mut Self) -> Result<T, Stop>) -> Result<T, Stop> {
        let before = Before {
            seg: self.seg,
            rsp: self.reg(Gpr::Rsp),
            rip: self.rip,
            rflags: self.rflags,
            status: self.flags(),
            cpl: self.cpl,
        };
        let done = steps(self);
        if done.is_err() {
            self.seg = before.seg;
            self.set_reg(Gpr::Rsp, before.rsp);
            self.rip = before.rip;
            self.rflags = before.rflags;
            self.set_flags(before.status);
            self.cpl = before.cpl;
        }
        self.derive();
        done
    }

    // Implicit supervisor accesses

    /// A linear address of a descriptor table or TSS: 64 bits in IA-32e mode, compatibility mode included.
    pub(crate) fn system_address(&self, base: u64, offset: u64) -> u64 {
        let la = base.wrapping_add(offset);
        if self.is_long() { la } else { la & 0xffff_ffff }
    }

    /// `f` with the rights of the processor's own accesses, whatever CPL and RFLAGS.AC are.
    fn as_system<T>(&mut self, f: impl FnOnce(&mut Self) -> T) -> T {
        let (cpl, rflags) = (self.cpl, self.rflags);
        self.cpl = 0;
        self.rflags &= !Rflags::AC.bits();
        self.derive();
        let result = f(self);
        self.cpl = cpl;
        self.rflags = rflags;
        self.derive();
        result
    }

    /// Sets or clears a bit of a descriptor with a locked access, as a load of a segment or a task switch does.
    fn change_descriptor(&mut self, la: u64, set: u64, clear: u64) -> Result<(), Stop> {
        // All these bits lie in the sixth byte, which no alignment splits.
        let (set, clear) = ((set >> 40) as u8, (clear >> 40) as u8);
        let la = la.wrapping_add(5);
        self.as_system(|cpu| cpu.modify::<u8>(la, Seg::Ds, true, |old| Some(old & !clear | set)))?;
        Ok(())
    }

    /// Sets the accessed bit of a code or data descriptor that lacks it.
    pub(crate) fn mark_accessed(&mut self, found: &mut Found) -> Result<(), Stop> {
        if found.raw.0 & Descriptor::ACCESSED == 0 {
            self.change_descriptor(found.la, Descriptor::ACCESSED, 0)?;
            found.raw.0 |= Descriptor::ACCESSED;
        }
        Ok(())
    }

    /// Sets or clears the busy bit of the TSS descriptor at `la`.
    pub(crate) fn mark_busy(&mut self, la: u64, busy: bool) -> Result<(), Stop> {
        if busy {
            self.change_descriptor(la, Descriptor::BUSY, 0)
        } else {
            self.change_descriptor(la, 0, Descriptor::BUSY)
        }
    }

    /// `bytes` of the descriptor that `selector` names; `None` outside its table.
    fn lookup(&mut self, selector: Selector, bytes: u64) -> Result<Option<Found>, Stop> {
        let (base, limit) = if selector.ti() {
            if self.ldt.unusable || !self.ldt.present {
                return Ok(None);
            }
            (self.ldt.base, u64::from(self.ldt.limit))
        } else {
            (self.gdt.base, u64::from(self.gdt.limit))
        };
        if selector.offset() + bytes - 1 > limit {
            return Ok(None);
        }
        let la = self.system_address(base, selector.offset());
        let raw = Descriptor(self.load_system::<u64>(la)?);
        Ok(Some(Found { raw, la }))
    }

    /// The descriptor of `selector` if it lies in its table.
    pub(crate) fn peek_descriptor(&mut self, selector: Selector) -> Result<Option<Found>, Stop> {
        self.lookup(selector, 8)
    }

    /// The descriptor of `selector`; `report(selector)` outside its table.
    pub(crate) fn descriptor(&mut self, selector: Selector, report: Report) -> Result<Found, Stop> {
        match self.lookup(selector, 8)? {
            Some(found) => Ok(found),
            None => Err(self.fault(report(selector.error_code()))),
        }
    }

    /// Second eight bytes of a 16-byte descriptor; `report(selector)` where they lie outside the table.
    pub(crate) fn upper_half(&mut self, selector: Selector, found: &Found, report: Report) -> Result<u64, Stop> {
        if self.lookup(selector, 16)?.is_none() {
            return Err(self.fault(report(selector.error_code())));
        }
        self.load_system::<u64>(self.system_address(found.la, 8))
    }

    /// `Err(report(selector))` unless `good`.
    pub(crate) fn require(&mut self, good: bool, report: Report, selector: Selector) -> Result<(), Stop> {
        if good { Ok(()) } else { Err(self.fault(report(selector.error_code()))) }
    }

    // Data and stack segments

    /// MOV, POP and LDS into DS, ES, FS, GS or SS, with every check of the mode.
    pub(crate) fn load_segment(&mut self, seg: Seg, selector: u16) -> Result<(), Stop> {
        if !self.is_protected() {
            self.load_real_segment(seg, selector);
        } else if seg == Seg::Ss {
            let segment = self.stack_segment(Selector(selector), self.cpl, Fault::gp)?;
            self.seg[Seg::Ss as usize] = segment;
        } else {
            let segment = self.data_segment(Selector(selector), self.cpl, Fault::gp)?;
            self.seg[seg as usize] = segment;
        }
        if matches!(seg, Seg::Cs | Seg::Ss) {
            self.derive();
        } else {
            self.derive_segment(seg);
        }
        Ok(())
    }

    /// Base from the selector. In real-address mode limit and rights stay what they were ("big real mode"); virtual-8086
    /// mode has fixed ones.
    pub(crate) fn load_real_segment(&mut self, seg: Seg, selector: u16) {
        if self.is_v86() {
            self.seg[seg as usize] = Segment::virtual_8086(selector);
            return;
        }
        let segment = &mut self.seg[seg as usize];
        if segment.unusable || !segment.present {
            *segment = Segment::real_mode(selector);
        }
        segment.selector = selector;
        segment.base = u64::from(selector) << 4;
        segment.dpl = 0;
    }

    /// SS for privilege level `cpl`. `report`: #GP for a load, #TS where a TSS named the selector.
    pub(crate) fn stack_segment(&mut self, selector: Selector, cpl: u8, report: Report) -> Result<Segment, Stop> {
        if selector.is_null() {
            // 64-bit mode runs on a null SS below CPL 3.
            if self.is_64bit() && cpl != 3 && selector.rpl() == cpl {
                return Ok(Segment { dpl: cpl, ..Segment::null(selector.0) });
            }
            return Err(self.fault(report(0)));
        }
        let mut found = self.descriptor(selector, report)?;
        let rights = found.raw.rights();
        let good = selector.rpl() == cpl && rights.is_writable_data() && rights.dpl() == cpl;
        self.require(good, report, selector)?;
        self.require(rights.p(), Fault::ss, selector)?;
        self.mark_accessed(&mut found)?;
        Ok(Segment::of(selector, found.raw))
    }

    /// DS, ES, FS or GS for code of privilege level `cpl`.
    pub(crate) fn data_segment(&mut self, selector: Selector, cpl: u8, report: Report) -> Result<Segment, Stop> {
        if selector.is_null() {
            return Ok(Segment::null(selector.0));
        }
        let mut found = self.descriptor(selector, report)?;
        let rights = found.raw.rights();
        let visible = rights.is_conforming() || (selector.rpl() <= rights.dpl() && cpl <= rights.dpl());
        self.require(rights.is_readable() && visible, report, selector)?;
        self.require(rights.p(), Fault::np, selector)?;
        self.mark_accessed(&mut found)?;
        Ok(Segment::of(selector, found.raw))
    }

    /// A return to an outer level leaves no register that its code could not have loaded (SDM Vol. 2 "RET", "IRET").
    pub(crate) fn drop_inner_segments(&mut self) {
        for seg in [Seg::Es, Seg::Fs, Seg::Gs, Seg::Ds] {
            let segment = &mut self.seg[seg as usize];
            let conforming = segment.is_code() && segment.type_ & 4 != 0;
            if !segment.unusable && segment.dpl < self.cpl && !conforming {
                // The base of FS and GS survives: code at the outer level reaches it as IA32_FS_BASE.
                *segment = Segment { base: segment.base, ..Segment::null(0) };
            }
        }
    }

    // Code segments

    /// CS from a descriptor that the caller has checked, running at `cpl`; sets the accessed bit.
    pub(crate) fn load_cs(&mut self, selector: Selector, mut found: Found, cpl: u8) -> Result<(), Stop> {
        self.mark_accessed(&mut found)?;
        self.seg[Seg::Cs as usize] = Segment::of(selector.with_rpl(cpl), found.raw);
        self.cpl = cpl;
        Ok(())
    }

    /// The descriptor may be executed: code, and in IA-32e mode not L and D at once.
    pub(crate) fn is_code_descriptor(&self, raw: Descriptor) -> bool {
        raw.rights().is_code() && !(self.is_long() && raw.rights().l() && raw.rights().db())
    }

    /// RIP, which CS as it is now must hold: #GP(0) otherwise. Outside 64-bit mode it has 32 bits, and what a 64-bit operand
    /// has above them is left out before the limit is looked at: measured on Intel's CPUs.
    pub(crate) fn far_target(&mut self, ip: u64) -> Result<(), Stop> {
        self.near_jump(if self.is_64bit() { ip } else { ip & 0xffff_ffff })
    }

    /// CR0.TS, which every task switch sets.
    pub(crate) fn set_task_switched(&mut self) {
        self.cr0 |= Cr0::TS;
    }
}

impl Segment {
    /// The register that a descriptor makes.
    pub(crate) fn of(selector: Selector, raw: Descriptor) -> Self {
        Self::with_rights(selector.0, raw.base().into(), raw.limit(), raw.rights())
    }

    /// One that is usable.
    pub(crate) fn with_rights(selector: u16, base: u64, limit: u32, rights: AccessRights) -> Self {
        Self {
            selector,
            base,
            limit,
            type_: rights.typ(),
            s: rights.s(),
            dpl: rights.dpl(),
            present: rights.p(),
            avl: rights.avl(),
            l: rights.l(),
            db: rights.db(),
            g: rights.g(),
            unusable: false,
        }
    }

    /// What virtual-8086 mode puts behind a selector.
    pub(crate) fn virtual_8086(selector: u16) -> Self {
        Self { dpl: 3, ..Self::real_mode(selector) }
    }
}

/// Types of an available TSS: 16- and 32-bit ones, only the 64-bit one in IA-32e mode.
pub(crate) fn is_available_tss(typ: u8, long: bool) -> bool {
    typ == system_type::TSS32_AVAILABLE || typ == system_type::TSS16_AVAILABLE && !long
}
