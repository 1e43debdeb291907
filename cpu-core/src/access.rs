//! Data accesses: segmentation, paging, RAM, memory that the VMM backs, and stores into decoded code.
//!
//! Everything here is exact at every alignment and page boundary. The hot path is one TLB compare and one host
//! instruction; all the rest is behind `#[cold]`.
#![expect(unsafe_code, reason = "TLB entries hold host addresses of guest RAM")]

use std::sync::{Mutex, PoisonError};

use mmu::{Access, AccessKind, Lookup, Paging};
use x86_defs::{GuestPhysAddr, LinearAddr, Rflags};

use crate::cpu::{Cpu, Stop};
use crate::decode::trace::Written;
use crate::fault::Fault;
use crate::host::{self, HostWord};
use crate::host_simd::{self, V};
use crate::op::Op;
use crate::state::{Breakpoints, Seg};
use crate::vmx::{Exit, Mmio};

/// Who accesses: the running code, or the processor on its own account (descriptor tables, TSS).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum By {
    /// Rights of CPL.
    Code,
    /// Supervisor rights, whatever CPL is ("implicit supervisor-mode access").
    System,
}

/// What lies behind a linear address.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    /// RAM at a host address. `code`: traces were decoded from its page.
    Ram { host: u64, code: bool },
    /// No slot, or a write to a read-only one.
    Device { gpa: u64 },
}

const PAGE: u64 = 0x1000;

/// Held for a locked access across a page end: such accesses of all CPUs exclude one another, as on a locked bus.
static BUS: Mutex<()> = Mutex::new(());

impl Cpu {
    // Effective and linear addresses

    /// Effective address of the memory operand, cut to the address size.
    #[inline(always)]
    pub(crate) fn ea(&self, op: &Op) -> u64 {
        let base = self.gpr[usize::from(op.base >> 3)];
        let index = self.gpr[usize::from(op.index >> 3)];
        base.wrapping_add(index.wrapping_mul(u64::from(op.scale))).wrapping_add(op.disp as u64) & op.address_mask()
    }

    /// Linear address of `size` bytes at `seg:offset`, checked as the mode demands.
    #[inline(always)]
    pub(crate) fn linear(&mut self, seg: Seg, offset: u64, size: u32, write: bool) -> Result<u64, Stop> {
        let bound = if write { &self.write_bound } else { &self.read_bound }[seg as usize];
        // Outside 64-bit mode offsets have 32 bits, so the sum cannot wrap; in 64-bit mode the bound is u64::MAX.
        if offset.wrapping_add(u64::from(size)) > bound {
            self.check_limit(seg, offset, size, write)?;
        }
        Ok(self.wrap_linear(self.seg_base[seg as usize].wrapping_add(offset)))
    }

    /// Linear addresses have 32 bits outside 64-bit mode.
    #[inline(always)]
    pub(crate) fn wrap_linear(&self, la: u64) -> u64 {
        if self.read_bound[Seg::Cs as usize] == u64::MAX { la } else { la & 0xffff_ffff }
    }

    /// The whole check of SDM Vol. 3 "Limit Checking" and "Type Checking", for what the bounds do not allow at once.
    #[cold]
    #[inline(never)]
    fn check_limit(&mut self, seg: Seg, offset: u64, size: u32, write: bool) -> Result<(), Stop> {
        let segment = self.seg[seg as usize];
        let fault = if seg == Seg::Ss { Fault::ss(0) } else { Fault::gp(0) };
        let real = self.is_real() || self.is_v86();
        if !real {
            if segment.unusable || !segment.present {
                return Err(self.fault(fault));
            }
            let allowed = if write { segment.is_writable() } else { segment.is_readable() };
            if !allowed {
                return Err(self.fault(Fault::gp(0)));
            }
        }
        let last = offset.wrapping_add(u64::from(size) - 1);
        let inside = if segment.is_expand_down() {
            let top = if segment.db { 0xffff_ffff } else { 0xffff };
            offset > u64::from(segment.limit) && last <= top
        } else {
            last <= u64::from(segment.limit)
        };
        if inside { Ok(()) } else { Err(self.fault(fault)) }
    }

    /// #GP(0), or #SS(0) for the stack segment, where a 64-bit linear address is not canonical.
    fn check_canonical(&mut self, la: u64, seg: Seg) -> Result<(), Stop> {
        if !self.is_long() || self.is_canonical(la) {
            return Ok(());
        }
        Err(self.fault(if seg == Seg::Ss { Fault::ss(0) } else { Fault::gp(0) }))
    }

    /// As [`Self::check_canonical`], for every byte of an access: #GP or #SS comes before a #PF of its first page.
    pub(crate) fn check_span(&mut self, la: u64, size: u32, seg: Seg) -> Result<(), Stop> {
        self.check_canonical(la, seg)?;
        self.check_canonical(la.wrapping_add(u64::from(size) - 1), seg)
    }

    /// Bits 63 to 47 (56 with LA57) are all the same.
    pub(crate) fn is_canonical(&self, la: u64) -> bool {
        let bits = if self.cr4.contains(x86_defs::Cr4::LA57) { 57 } else { 48 };
        (la << (64 - bits)) as i64 >> (64 - bits) == la as i64
    }

    // Translation

    /// Control state as the page walker takes it.
    pub(crate) fn paging(&self) -> Paging {
        Paging {
            cr0: self.cr0,
            cr3: self.cr3,
            cr4: self.cr4,
            efer: self.efer,
            pdpte: self.pdpte,
            rflags_ac: self.rflags & Rflags::AC.bits() != 0,
            phys_bits: self.phys_bits,
            page_1gb: self.page_1gb,
            pkru: self.fpu.pkru,
        }
    }

    /// Walks for one access that lies in one page, and enters what it finds into the TLB.
    #[cold]
    #[inline(never)]
    pub(crate) fn target(&mut self, la: u64, write: bool, by: By, seg: Seg) -> Result<Target, Stop> {
        self.counts.data_walks += 1;
        self.check_canonical(la, seg)?;
        let access = Access {
            kind: if write { AccessKind::Write } else { AccessKind::Read },
            user: by == By::Code && self.cpl == 3,
            implicit: by == By::System,
        };
        let paging = self.paging();
        let walked = mmu::walk_cached(&self.view, &paging, LinearAddr(la), access, &mut self.tlb.structures);
        let found = match walked {
            Ok(found) => found,
            Err(fault) => return Err(self.fault(Fault::pf(fault.error_code.bits(), la))),
        };
        let gpa = found.gpa.0;
        let page = gpa & !(PAGE - 1);
        let (host, writable) = match self.view.page(GuestPhysAddr(page), write) {
            Lookup::Ram { ptr, writable, .. } => (ptr.as_ptr().addr() as u64, writable),
            Lookup::Readonly | Lookup::Hole => return Ok(Target::Device { gpa }),
        };
        let code = self.traces.is_code(host);
        // A watched page stays out of the TLB, so that every access to it comes through here. System accesses at CPL 3
        // would be entered under the wrong privilege.
        let watched = self.is_watched(la) || by == By::System && self.cpl == 3 || self.alignment_checked();
        if !watched {
            if write && writable && found.writable && !code {
                self.tlb.fill_write(la, host, &found);
            }
            if !write {
                self.tlb.fill_read(la, host, &found);
            }
        }
        Ok(Target::Ram { host: host + (gpa & (PAGE - 1)), code })
    }

    /// A DR7 breakpoint on data lies in the page of `la`.
    fn is_watched(&self, la: u64) -> bool {
        self.has_breakpoints() && self.breakpoints().db.iter().any(|b| b & !(PAGE - 1) == la & !(PAGE - 1))
    }

    /// Sets pending #DB causes for data breakpoints that `size` bytes at `la` hit (SDM Vol. 3 "Debug Registers").
    fn note_watch(&mut self, la: u64, size: u32, write: bool) {
        if !self.has_breakpoints() {
            return;
        }
        let Breakpoints { db, dr7 } = self.breakpoints();
        for i in 0..4 {
            let enabled = dr7 >> (2 * i) & 3 != 0;
            let rw = dr7 >> (16 + 4 * i) & 3;
            let len = [1, 2, 8, 4][(dr7 >> (18 + 4 * i) & 3) as usize];
            let start = db[i as usize] & !(len - 1);
            let hit = la < start + len && start < la + u64::from(size);
            if enabled && hit && (rw == 3 || rw == 1 && write) {
                self.debug_pending |= 1 << i;
                self.leave = true;
            }
        }
    }

    // Loads

    /// Loads from a linear address.
    #[inline(always)]
    pub(crate) fn load<W: HostWord>(&mut self, la: u64, seg: Seg) -> Result<W, Stop> {
        if let Some(host) = self.tlb.read(la, u64::from(W::BYTES)) {
            // SAFETY: a TLB hit names mapped RAM of a slot that `view` keeps alive, and the access ends in its page.
            return Ok(unsafe { W::load(host) });
        }
        self.load_slow(la, W::BYTES, By::Code, seg).map(W::of)
    }

    /// As [`Self::load`], on the processor's own account.
    pub(crate) fn load_system<W: HostWord>(&mut self, la: u64) -> Result<W, Stop> {
        if self.cpl != 3 {
            return self.load(la, Seg::Ds);
        }
        self.load_slow(la, W::BYTES, By::System, Seg::Ds).map(W::of)
    }

    /// Loads from `seg:offset`.
    #[inline(always)]
    pub(crate) fn read<W: HostWord>(&mut self, seg: Seg, offset: u64) -> Result<W, Stop> {
        let la = self.linear(seg, offset, W::BYTES, false)?;
        self.load(la, seg)
    }

    /// Loads the memory operand of `op`.
    pub(crate) fn read_operand<W: HostWord>(&mut self, op: &Op) -> Result<W, Stop> {
        self.read(op.segment(), self.ea(op))
    }

    /// One load of 1 to 8 bytes that missed the TLB.
    #[cold]
    #[inline(never)]
    pub(crate) fn load_slow(&mut self, la: u64, size: u32, by: By, seg: Seg) -> Result<u64, Stop> {
        self.check_span(la, size, seg)?;
        self.check_alignment(la, size, by)?;
        self.note_watch(la, size, false);
        let first = (PAGE - (la & (PAGE - 1))).min(u64::from(size)) as u32;
        let low = self.target(la, false, by, seg)?;
        if first == size {
            return self.load_target(low, size);
        }
        let high = self.target(self.wrap_linear(la.wrapping_add(u64::from(first))), false, by, seg)?;
        let low = self.load_target(low, first)?;
        let high = self.load_target(high, size - first)?;
        Ok(low | high << (8 * first))
    }

    /// Loads `size` bytes that lie in one page.
    fn load_target(&mut self, target: Target, size: u32) -> Result<u64, Stop> {
        match target {
            Target::Ram { host, .. } => {
                Ok(match size {
                    // SAFETY: `target` found these bytes inside a page of a slot that `view` keeps alive.
                    1 => unsafe { u8::load(host) }.into(),
                    // SAFETY: as above.
                    2 => unsafe { u16::load(host) }.into(),
                    // SAFETY: as above.
                    4 => unsafe { u32::load(host) }.into(),
                    // SAFETY: as above.
                    8 => unsafe { u64::load(host) },
                    _ => {
                        let mut bytes = [0; 8];
                        // SAFETY: as above.
                        unsafe { host::copy_out(host, &mut bytes[..size as usize]) };
                        u64::from_le_bytes(bytes)
                    }
                })
            }
            Target::Device { gpa } if self.variant.natural_mmio && !size.is_power_of_two() => {
                let mut value = 0;
                for (at, len) in natural_parts(gpa, size) {
                    value |= self.load_device(gpa + u64::from(at), len as u8)? << (8 * at);
                }
                Ok(value)
            }
            Target::Device { gpa } => self.load_device(gpa, size as u8),
        }
    }

    /// A read that the VMM answers: found in the log, or a reason to stop.
    fn load_device(&mut self, gpa: u64, len: u8) -> Result<u64, Stop> {
        if let Some(&(at, n, value)) = self.mmio.answered.get(self.mmio.used)
            && at == gpa
            && n == len
        {
            self.mmio.used += 1;
            return Ok(value);
        }
        self.mmio.waiting = Some((gpa, len));
        Err(self.exit(Exit::Mmio(Mmio { gpa, len, write: None })))
    }

    // Stores

    /// Stores to a linear address. The instruction leaves its trace afterwards if `self.leave` is set.
    #[inline(always)]
    pub(crate) fn store<W: HostWord>(&mut self, la: u64, value: W, seg: Seg) -> Result<(), Stop> {
        if let Some(host) = self.tlb.write(la, u64::from(W::BYTES)) {
            // SAFETY: a TLB hit names mapped, writable RAM of a slot that `view` keeps alive.
            unsafe { W::store(host, value) };
            return Ok(());
        }
        self.store_slow(la, value.zext(), W::BYTES, By::Code, seg)
    }

    /// As [`Self::store`], on the processor's own account.
    pub(crate) fn store_system<W: HostWord>(&mut self, la: u64, value: W) -> Result<(), Stop> {
        if self.cpl != 3 {
            return self.store(la, value, Seg::Ds);
        }
        self.store_slow(la, value.zext(), W::BYTES, By::System, Seg::Ds)
    }

    /// Stores to `seg:offset`.
    #[inline(always)]
    pub(crate) fn write<W: HostWord>(&mut self, seg: Seg, offset: u64, value: W) -> Result<(), Stop> {
        let la = self.linear(seg, offset, W::BYTES, true)?;
        self.store(la, value, seg)
    }

    /// Stores the memory operand of `op`.
    pub(crate) fn write_operand<W: HostWord>(&mut self, op: &Op, value: W) -> Result<(), Stop> {
        self.write(op.segment(), self.ea(op), value)
    }

    /// One store of 1 to 8 bytes that missed the TLB. Both pages are checked before either is written.
    #[cold]
    #[inline(never)]
    pub(crate) fn store_slow(&mut self, la: u64, value: u64, size: u32, by: By, seg: Seg) -> Result<(), Stop> {
        self.check_span(la, size, seg)?;
        self.check_alignment(la, size, by)?;
        let first = (PAGE - (la & (PAGE - 1))).min(u64::from(size)) as u32;
        let low = self.target(la, true, by, seg)?;
        if first == size {
            self.store_target(low, value, size);
        } else {
            let high = self.target(self.wrap_linear(la.wrapping_add(u64::from(first))), true, by, seg)?;
            self.store_target(low, value & (u64::MAX >> (64 - 8 * first)), first);
            self.store_target(high, value >> (8 * first), size - first);
        }
        self.note_watch(la, size, true);
        Ok(())
    }

    /// Stores `size` bytes that lie in one page.
    fn store_target(&mut self, target: Target, value: u64, size: u32) {
        match target {
            Target::Ram { host, code } => {
                match size {
                    // SAFETY: `target` found these bytes inside a writable page of a slot that `view` keeps alive.
                    1 => unsafe { u8::store(host, value as u8) },
                    // SAFETY: as above.
                    2 => unsafe { u16::store(host, value as u16) },
                    // SAFETY: as above.
                    4 => unsafe { u32::store(host, value as u32) },
                    // SAFETY: as above.
                    8 => unsafe { u64::store(host, value) },
                    _ => {
                        for (i, byte) in value.to_le_bytes()[..size as usize].iter().enumerate() {
                            // SAFETY: as above.
                            unsafe { u8::store(host + i as u64, *byte) };
                        }
                    }
                }
                if code {
                    self.code_written(host, size);
                }
            }
            Target::Device { gpa } if self.variant.natural_mmio && !size.is_power_of_two() => {
                for (at, len) in natural_parts(gpa, size) {
                    let part = value >> (8 * at) & ((1 << (8 * len)) - 1);
                    self.mmio.writes.push_back(Mmio { gpa: gpa + u64::from(at), len: len as u8, write: Some(part) });
                }
                self.leave = true;
            }
            Target::Device { gpa } => {
                self.mmio.writes.push_back(Mmio { gpa, len: size as u8, write: Some(value) });
                self.leave = true;
            }
        }
    }

    /// A guest store at host address `host` hit a page that traces were decoded from.
    pub(crate) fn code_written(&mut self, host: u64, size: u32) {
        let written = self.traces.written(host, size);
        if written != Written::Nothing {
            self.counts.code_writes += 1;
            self.leave = true;
        }
        if written == Written::Page {
            self.forget_jumps();
        }
    }

    // Wide accesses

    /// Loads `out.len()` bytes from `seg:offset`; nothing is copied unless all can be. At most two pages.
    pub(crate) fn read_bytes(&mut self, seg: Seg, offset: u64, out: &mut [u8]) -> Result<(), Stop> {
        let la = self.linear(seg, offset, out.len() as u32, false)?;
        if out.len() == 16
            && let Some(host) = self.tlb.read(la, 16)
        {
            // SAFETY: a TLB hit names mapped RAM, and the access ends in its page.
            out.copy_from_slice(&unsafe { host::load_16(host) });
            return Ok(());
        }
        if let Some(host) = self.tlb.read(la, out.len() as u64) {
            // SAFETY: as above.
            unsafe { host::copy_out(host, out) };
            return Ok(());
        }
        self.read_bytes_slow(la, out, seg)
    }

    #[cold]
    fn read_bytes_slow(&mut self, la: u64, out: &mut [u8], seg: Seg) -> Result<(), Stop> {
        self.check_span(la, out.len() as u32, seg)?;
        self.check_alignment(la, wide_alignment(out.len()), By::Code)?;
        self.note_watch(la, out.len() as u32, false);
        let mut at = 0;
        while at < out.len() {
            let la = self.wrap_linear(la.wrapping_add(at as u64));
            let n = ((PAGE - (la & (PAGE - 1))) as usize).min(out.len() - at).min(8);
            let target = self.target(la, false, By::Code, seg)?;
            let value = self.load_target(target, n as u32)?;
            out[at..at + n].copy_from_slice(&value.to_le_bytes()[..n]);
            at += n;
        }
        Ok(())
    }

    /// Stores `bytes` to `seg:offset`; nothing is stored unless all can be. At most two pages.
    pub(crate) fn write_bytes(&mut self, seg: Seg, offset: u64, bytes: &[u8]) -> Result<(), Stop> {
        let la = self.linear(seg, offset, bytes.len() as u32, true)?;
        if let (parts, []) = bytes.as_chunks::<16>()
            && let Some(host) = self.tlb.write(la, bytes.len() as u64)
        {
            for (host, part) in (host..).step_by(16).zip(parts) {
                // SAFETY: a TLB hit names mapped, writable RAM, and the access ends in its page.
                unsafe { host::store_16(host, *part) };
            }
            return Ok(());
        }
        self.write_bytes_slow(la, bytes, seg)
    }

    #[cold]
    fn write_bytes_slow(&mut self, la: u64, bytes: &[u8], seg: Seg) -> Result<(), Stop> {
        self.check_span(la, bytes.len() as u32, seg)?;
        self.check_alignment(la, wide_alignment(bytes.len()), By::Code)?;
        self.probe_write(la, bytes.len() as u32, seg)?;
        let mut at = 0;
        while at < bytes.len() {
            let la = self.wrap_linear(la.wrapping_add(at as u64));
            let n = ((PAGE - (la & (PAGE - 1))) as usize).min(bytes.len() - at).min(8);
            let mut value = [0; 8];
            value[..n].copy_from_slice(&bytes[at..at + n]);
            let target = self.target(la, true, By::Code, seg)?;
            self.store_target(target, u64::from_le_bytes(value), n as u32);
            at += n;
        }
        self.note_watch(la, bytes.len() as u32, true);
        Ok(())
    }

    /// Faults as a write of `size` bytes at linear address `la` would; at most two pages.
    pub(crate) fn probe_write(&mut self, la: u64, size: u32, seg: Seg) -> Result<(), Stop> {
        if self.tlb.write(la, u64::from(size)).is_some() {
            return Ok(());
        }
        self.check_span(la, size, seg)?;
        self.target(la, true, By::Code, seg)?;
        let last = self.wrap_linear(la.wrapping_add(u64::from(size) - 1));
        if last & !(PAGE - 1) != la & !(PAGE - 1) {
            self.target(last & !(PAGE - 1), true, By::Code, seg)?;
        }
        Ok(())
    }

    /// Loads 16 bytes from a linear address; alignment is the caller's.
    #[inline(always)]
    pub(crate) fn load_16(&mut self, la: u64, seg: Seg) -> Result<V, Stop> {
        if let Some(host) = self.tlb.read(la, 16) {
            // SAFETY: a TLB hit names mapped RAM of a slot that `view` keeps alive, and the access ends in its page.
            return Ok(unsafe { host_simd::load(host) });
        }
        let mut bytes = [0; 16];
        self.read_bytes_slow(la, &mut bytes, seg)?;
        Ok(host_simd::from_u128(u128::from_le_bytes(bytes)))
    }

    /// Loads a vector from a linear address, wherever it leads.
    #[inline(never)]
    pub(crate) fn load_bytes(&mut self, la: u64, out: &mut [u8], seg: Seg) -> Result<(), Stop> {
        self.read_bytes_slow(la, out, seg)
    }

    /// Stores a vector to a linear address, wherever it leads. `self.leave` as for [`Self::store`].
    #[inline(never)]
    pub(crate) fn store_bytes(&mut self, la: u64, bytes: &[u8], seg: Seg) -> Result<(), Stop> {
        self.write_bytes_slow(la, bytes, seg)
    }

    /// Stores 16 bytes to a linear address; alignment is the caller's. `self.leave` as for [`Self::store`].
    #[inline(always)]
    pub(crate) fn store_16(&mut self, la: u64, value: V, seg: Seg) -> Result<(), Stop> {
        if let Some(host) = self.tlb.write(la, 16) {
            // SAFETY: a TLB hit names mapped, writable RAM of a slot that `view` keeps alive.
            unsafe { host_simd::store(host, value) };
            return Ok(());
        }
        self.write_bytes_slow(la, &host_simd::to_u128(value).to_le_bytes(), seg)
    }

    // Read-modify-write

    /// `[la] ← f([la])`, the read and the write checked as one write. Returns the old value. With `lock`, atomic for
    /// other CPUs and for the VMM; `f` may then run more than once. `None` from `f` writes the old value back.
    #[inline(always)]
    pub(crate) fn modify<W: HostWord>(
        &mut self,
        la: u64,
        seg: Seg,
        lock: bool,
        mut f: impl FnMut(W) -> Option<W>,
    ) -> Result<W, Stop> {
        let Some(host) = self.tlb.write(la, u64::from(W::BYTES)) else {
            return self.modify_slow(la, seg, lock, &mut f);
        };
        if lock {
            return Ok(modify_locked(host, &mut f));
        }
        // SAFETY: a TLB hit names mapped, writable RAM of a slot that `view` keeps alive.
        let old = unsafe { W::load(host) };
        // SAFETY: as above.
        unsafe { W::store(host, f(old).unwrap_or(old)) };
        Ok(old)
    }

    #[cold]
    #[inline(never)]
    fn modify_slow<W: HostWord>(
        &mut self,
        la: u64,
        seg: Seg,
        lock: bool,
        f: &mut dyn FnMut(W) -> Option<W>,
    ) -> Result<W, Stop> {
        self.check_span(la, W::BYTES, seg)?;
        self.check_alignment(la, W::BYTES, By::Code)?;
        let crosses = (la & (PAGE - 1)) + u64::from(W::BYTES) > PAGE;
        let target = self.target(la, true, By::Code, seg)?;
        if let Target::Ram { host, code } = target
            && !crosses
        {
            let old = if lock {
                modify_locked(host, &mut |old| f(old))
            } else {
                // SAFETY: `target` found these bytes inside a writable page of a slot that `view` keeps alive.
                let old = unsafe { W::load(host) };
                // SAFETY: as above.
                unsafe { W::store(host, f(old).unwrap_or(old)) };
                old
            };
            if code {
                self.code_written(host, W::BYTES);
            }
            self.note_watch(la, W::BYTES, true);
            return Ok(old);
        }
        if crosses {
            self.probe_write(la, W::BYTES, seg)?;
        }
        // Hardware locks the bus for an operand across a page end. Where the pages are neighbours in host memory too, one
        // host instruction does the same. Where they are not, CPUs of ours exclude one another; what else writes to one
        // of the halves alone is not kept out. A device has no atomic accesses (KVM: "emulating exchange as write").
        let _bus = (lock && crosses).then(|| BUS.lock().unwrap_or_else(PoisonError::into_inner));
        if lock && crosses {
            let bytes = PAGE - (la & (PAGE - 1));
            let next = self.target(self.wrap_linear(la.wrapping_add(bytes)), true, By::Code, seg)?;
            if let Target::Ram { host, code } = target
                && let Target::Ram { host: next_host, code: next_code } = next
                && host + bytes == next_host
            {
                let old = modify_locked(host, &mut |old| f(old));
                if code {
                    self.code_written(host, bytes as u32);
                }
                if next_code {
                    self.code_written(next_host, W::BYTES - bytes as u32);
                }
                self.note_watch(la, W::BYTES, true);
                return Ok(old);
            }
        }
        let old = W::of(self.load_slow(la, W::BYTES, By::Code, seg)?);
        let new = f(old).unwrap_or(old);
        self.store_slow(la, new.zext(), W::BYTES, By::Code, seg)?;
        Ok(old)
    }

    /// CMPXCHG16B's access: `la` is 16-byte aligned. Returns the value found.
    pub(crate) fn compare_exchange_16(&mut self, la: u64, seg: Seg, old: u128, new: u128) -> Result<u128, Stop> {
        let (host, code) = match self.tlb.write(la, 16) {
            Some(host) => (host, false),
            None => match self.target(la, true, By::Code, seg)? {
                Target::Ram { host, code } => (host, code),
                Target::Device { gpa } => {
                    let low = self.load_device(gpa, 8)?;
                    let high = self.load_device(gpa + 8, 8)?;
                    let found = u128::from(low) | u128::from(high) << 64;
                    let value = if found == old { new } else { found };
                    self.store_target(Target::Device { gpa }, value as u64, 8);
                    self.store_target(Target::Device { gpa: gpa + 8 }, (value >> 64) as u64, 8);
                    return Ok(found);
                }
            },
        };
        // SAFETY: 16 aligned bytes cannot leave the writable page that the TLB or `target` found.
        let found = match unsafe { host::compare_exchange_16(host, old, new) } {
            Ok(found) | Err(found) => found,
        };
        if code {
            self.code_written(host, 16);
        }
        Ok(found)
    }

    /// #AC(0) where CR0.AM and RFLAGS.AC ask for it at CPL 3 (SDM Vol. 3 "Alignment Check Exception").
    pub(crate) fn check_alignment(&mut self, la: u64, size: u32, by: By) -> Result<(), Stop> {
        if by == By::Code && self.alignment_checked() && la & (u64::from(size) - 1) != 0 {
            return Err(self.fault(Fault::AC));
        }
        Ok(())
    }

    /// Misaligned data accesses raise #AC.
    pub(crate) fn alignment_checked(&self) -> bool {
        self.cpl == 3 && self.cr0.contains(x86_defs::Cr0::AM) && self.rflags & Rflags::AC.bits() != 0
    }
}

/// Offset and bytes of the pieces that `size` bytes, below 8, at `gpa` are made of: powers of two, each at a multiple of itself.
fn natural_parts(gpa: u64, size: u32) -> impl Iterator<Item = (u32, u32)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let left = (size - at).checked_ilog2()?;
        let part = (at, 1 << left.min((gpa + u64::from(at)).trailing_zeros()));
        at += part.1;
        Some(part)
    })
}

/// What #AC asks of a vector, or of an x87 environment or image (SDM Vol. 3 "Alignment Requirements by Data Type"). The SDM
/// leaves vectors of unaligned loads to the processor; the host's wants 16 bytes of them, also of 32 (AMD family 19h).
fn wide_alignment(bytes: usize) -> u32 {
    match bytes {
        14 | 94 => 2,
        16 | 32 => 16,
        28 | 108 => 4,
        _ => 1,
    }
}

#[inline(always)]
fn modify_locked<W: HostWord>(host: u64, f: &mut impl FnMut(W) -> Option<W>) -> W {
    // SAFETY: the caller found `host` in the TLB or through `target`: mapped, writable guest RAM.
    let mut old = unsafe { W::load(host) };
    loop {
        let new = f(old).unwrap_or(old);
        // SAFETY: as above.
        match unsafe { W::compare_exchange(host, old, new) } {
            Ok(old) => return old,
            Err(found) => old = found,
        }
    }
}
