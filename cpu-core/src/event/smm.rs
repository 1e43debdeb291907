//! System management mode: the way in by an SMI, and out by RSM. SDM Vol. 3, chapter "System Management Mode"; Vol. 2 "RSM".
//!
//! The state-save area has AMD's layouts, as Linux's KVM writes them (`enter_smm_save_state_64` in x86.c): that of AMD64 where
//! the guest's CPUID has long mode (APM Vol. 2 "SMRAM State-Save Area"), else that of SDM Vol. 3 "SMRAM State Save Map". As
//! there, no I/O instruction is restarted, HLT is not entered again, and CR2, DR0 to DR3 and x87 and vector state stay as they are.

use mmu::memory::SMM_SPACE;
use x86_defs::{AccessRights, Cr0, Cr4, Dr6, Dr7, Efer, GuestPhysAddr, Rflags, cpuid};

use crate::cpu::Cpu;
use crate::isa::{DR6_WRITABLE, DR7_WRITABLE};
use crate::state::{DebugRegs, DescriptorTable, Regs, Seg, Segment, Sregs};

/// SMBASE after reset. SDM Vol. 3 "SMRAM".
pub(crate) const SMBASE_RESET: u64 = 0x3_0000;
/// Where the handler starts, and what offsets in the area count from, above SMBASE.
const ENTRY: u64 = 0x8000;
/// The first offset of the area that is written.
const FIRST: usize = 0x7e00;
const BYTES: usize = 0x200;
/// SMM revision identifier of AMD64's layout, and of the other: SMBASE may be relocated.
const REVISION_64: u64 = 0x2_0064;
const REVISION_32: u64 = 0x2_0000;

/// What the area holds.
#[derive(Clone, Default)]
struct State {
    gpr: [u64; 16],
    rip: u64,
    rflags: u64,
    dr6: u64,
    dr7: u64,
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
    smbase: u64,
    revision: u64,
    /// ES, CS, SS, DS, FS, GS.
    segments: [Segment; 6],
    tr: Segment,
    ldt: Segment,
    gdt: DescriptorTable,
    idt: DescriptorTable,
}

/// The area on its way out or in: each layout is written once for both.
struct Area {
    bytes: [u8; BYTES],
    saves: bool,
}

impl Area {
    /// `len` bytes at `offset` are `value`, little-endian and zero-extended.
    fn field(&mut self, offset: usize, len: usize, value: &mut u64) {
        let at = &mut self.bytes[offset - FIRST..][..len];
        if self.saves {
            at.copy_from_slice(&value.to_le_bytes()[..len]);
        } else {
            let mut word = [0; 8];
            word[..len].copy_from_slice(at);
            *value = u64::from_le_bytes(word);
        }
    }

    fn u16(&mut self, offset: usize, value: &mut u16) {
        let mut word = u64::from(*value);
        self.field(offset, 2, &mut word);
        *value = word as u16;
    }

    fn u32(&mut self, offset: usize, value: &mut u32) {
        let mut word = u64::from(*value);
        self.field(offset, 4, &mut word);
        *value = word as u32;
    }

    /// A selector's place, and one each for attributes, which begin at bit `shift`, limit and base.
    fn segment(&mut self, segment: &mut Segment, at: [usize; 4], shift: u32, base_len: usize) {
        let [selector, attributes, limit, base] = at;
        self.u16(selector, &mut segment.selector);
        let mut rights = rights_of(segment);
        if shift == 0 {
            let mut word = rights as u16;
            self.u16(attributes, &mut word);
            rights = word.into();
        } else {
            let mut word = rights << shift;
            self.u32(attributes, &mut word);
            rights = word >> shift & 0xf0ff;
        }
        self.u32(limit, &mut segment.limit);
        self.field(base, base_len, &mut segment.base);
        if !self.saves {
            let Segment { selector, base, limit, .. } = *segment;
            *segment = segment_of(selector, base, limit, AccessRights(rights));
        }
    }

    fn table(&mut self, table: &mut DescriptorTable, limit: usize, base: usize, base_len: usize) {
        let mut size = u32::from(table.limit);
        self.u32(limit, &mut size);
        table.limit = size as u16;
        self.field(base, base_len, &mut table.base);
    }

    /// AMD64's layout. APM Vol. 2 "AMD64 SMM State-Save Area" counts its offsets from SMBASE: 8000H more.
    fn move_64(&mut self, state: &mut State) {
        for (n, value) in state.gpr.iter_mut().enumerate() {
            self.field(0x7ff8 - 8 * n, 8, value);
        }
        self.field(0x7f78, 8, &mut state.rip);
        self.field(0x7f70, 4, &mut state.rflags);
        self.field(0x7f68, 8, &mut state.dr6);
        self.field(0x7f60, 8, &mut state.dr7);
        self.field(0x7f58, 8, &mut state.cr0);
        self.field(0x7f50, 8, &mut state.cr3);
        self.field(0x7f48, 8, &mut state.cr4);
        self.field(0x7f00, 4, &mut state.smbase);
        self.field(0x7efc, 4, &mut state.revision);
        self.field(0x7ed0, 8, &mut state.efer);
        let mut segment = |segment: &mut Segment, at| self.segment(segment, [at, at + 2, at + 4, at + 8], 0, 8);
        segment(&mut state.tr, 0x7e90);
        segment(&mut state.ldt, 0x7e70);
        for (n, register) in state.segments.iter_mut().enumerate() {
            segment(register, 0x7e00 + 16 * n);
        }
        self.table(&mut state.idt, 0x7e84, 0x7e88, 8);
        self.table(&mut state.gdt, 0x7e64, 0x7e68, 8);
    }

    /// The layout of processors without long mode. SDM Vol. 3 "SMRAM State Save Map"; the descriptors' places, which it reserves,
    /// and CR4's are `enter_smm_save_state_32`'s.
    fn move_32(&mut self, state: &mut State) {
        self.field(0x7ffc, 4, &mut state.cr0);
        self.field(0x7ff8, 4, &mut state.cr3);
        self.field(0x7ff4, 4, &mut state.rflags);
        self.field(0x7ff0, 4, &mut state.rip);
        for (n, value) in state.gpr[..8].iter_mut().enumerate() {
            self.field(0x7fd0 + 4 * n, 4, value);
        }
        self.field(0x7fcc, 4, &mut state.dr6);
        self.field(0x7fc8, 4, &mut state.dr7);
        self.field(0x7f14, 4, &mut state.cr4);
        self.field(0x7efc, 4, &mut state.revision);
        self.field(0x7ef8, 4, &mut state.smbase);
        let mut segment =
            |segment: &mut Segment, selector, at| self.segment(segment, [selector, at, at + 4, at + 8], 8, 4);
        segment(&mut state.tr, 0x7fc4, 0x7f5c);
        segment(&mut state.ldt, 0x7fc0, 0x7f78);
        for (n, register) in state.segments.iter_mut().enumerate() {
            let at = if n < 3 { 0x7f84 + 12 * n } else { 0x7f2c + 12 * (n - 3) };
            segment(register, 0x7fa8 + 4 * n, at);
        }
        self.table(&mut state.gdt, 0x7f70, 0x7f74, 4);
        self.table(&mut state.idt, 0x7f54, 0x7f58, 4);
    }
}

fn rights_of(segment: &Segment) -> u32 {
    let bit = |set: bool, bit: u32| if set { bit } else { 0 };
    u32::from(segment.type_ & 15)
        | u32::from(segment.dpl & 3) << 5
        | bit(segment.s, AccessRights::S)
        | bit(segment.present, AccessRights::P)
        | bit(segment.avl, AccessRights::AVL)
        | bit(segment.l, AccessRights::L)
        | bit(segment.db, AccessRights::DB)
        | bit(segment.g, AccessRights::G)
}

/// One that is not present is unusable, as `emulator_set_segment` has it.
fn segment_of(selector: u16, base: u64, limit: u32, rights: AccessRights) -> Segment {
    Segment { unusable: !rights.p(), ..Segment::with_rights(selector, base, limit, rights) }
}

impl Cpu {
    /// In system management mode.
    pub fn is_in_smm(&self) -> bool {
        self.events.smm
    }

    /// Queues an SMI; another one that waits is the same.
    pub fn queue_smi(&mut self) {
        self.events.smi_pending = true;
    }

    /// An SMI waits that would be taken now.
    pub fn has_smi(&self) -> bool {
        self.events.smi_pending && !self.events.smm
    }

    /// SMRAM is seen in SMM only: what was found in the other address space is another's.
    pub(crate) fn set_smm(&mut self, smm: bool) {
        if std::mem::replace(&mut self.events.smm, smm) == smm {
            return;
        }
        self.view.select(if smm { SMM_SPACE } else { 0 });
        self.flush_tlb();
        self.serialize();
    }

    /// The guest's CPUID has long mode: the area has AMD64's layout.
    fn saves_64(&self) -> bool {
        self.offers(&cpuid::LM)
    }

    fn save_area_at(&self) -> GuestPhysAddr {
        GuestPhysAddr(self.msrs.smbase.wrapping_add(ENTRY + FIRST as u64))
    }

    /// SDM Vol. 3 "SMM Handler Execution Environment", in the order of Linux's `enter_smm`. Where there is no RAM for the area it
    /// is lost.
    pub(crate) fn enter_smm(&mut self) {
        let Regs { gpr, rip, rflags } = self.regs();
        let sregs = self.sregs();
        let long = self.saves_64();
        let mut state = State {
            gpr,
            rip,
            rflags,
            dr6: self.debug.dr6,
            dr7: self.debug.dr7,
            cr0: sregs.cr0.bits(),
            cr3: sregs.cr3,
            cr4: sregs.cr4.bits(),
            efer: sregs.efer.bits(),
            smbase: self.msrs.smbase,
            revision: if long { REVISION_64 } else { REVISION_32 },
            segments: sregs.segments,
            tr: sregs.tr,
            ldt: sregs.ldt,
            gdt: sregs.gdt,
            idt: sregs.idt,
        };
        let mut area = Area { bytes: [0; BYTES], saves: true };
        if long {
            area.move_64(&mut state)
        } else {
            area.move_32(&mut state)
        }

        self.events.smi_pending = false;
        self.msrs.smi_count = self.msrs.smi_count.wrapping_add(1);
        self.set_smm(true);
        let _lost = self.view.write(self.save_area_at(), &area.bytes);
        self.events.smm_inside_nmi = self.events.nmi_masked;
        self.events.nmi_masked = true;

        self.set_rflags(Rflags::FIXED.bits());
        self.rip = ENTRY;
        self.debug.dr7 = Dr7::FIXED.bits();
        let flat = Segment { limit: u32::MAX, g: true, ..Segment::real_mode(0) };
        let code = Segment { selector: (self.msrs.smbase >> 4) as u16, base: self.msrs.smbase, ..flat };
        let mut segments = [flat; 6];
        segments[Seg::Cs as usize] = code;
        self.set_sregs(&Sregs {
            segments,
            cr0: sregs.cr0 - (Cr0::PE | Cr0::EM | Cr0::TS | Cr0::PG),
            cr4: Cr4::empty(),
            efer: if long { Efer::empty() } else { sregs.efer },
            idt: DescriptorTable::default(),
            ..sregs
        });
    }

    /// What RSM does once the area has been read. False: the area holds what the processor cannot be in, and it shuts down. The
    /// modes change in the order of Linux's `em_rsm`, under the checks of the instructions that would do the same.
    fn leave_smm(&mut self, area: [u8; BYTES]) -> bool {
        let mut state = State::default();
        let mut area = Area { bytes: area, saves: false };
        let long = self.saves_64();
        if long {
            area.move_64(&mut state)
        } else {
            area.move_32(&mut state)
        }
        if !self.events.smm_inside_nmi {
            self.events.nmi_masked = false;
        }
        self.events.smm_inside_nmi = false;
        self.set_smm(false);
        self.msrs.smbase = state.smbase;

        // Back to real mode, from where every mode can be reached.
        self.cr0 -= Cr0::PG | Cr0::PE;
        self.cr4 -= Cr4::PCIDE | Cr4::PAE;
        if long {
            self.efer = Efer::empty();
        }
        self.seg[Seg::Cs as usize].l = false;
        self.derive();
        if self.load_controls(&state, long).is_none() {
            self.stop = None;
            return false;
        }
        self.debug = DebugRegs {
            dr6: state.dr6 & DR6_WRITABLE | Dr6::FIXED_1,
            dr7: state.dr7 & DR7_WRITABLE | Dr7::FIXED.bits(),
            ..self.debug
        };
        let mut regs = Regs { gpr: state.gpr, rip: state.rip, rflags: state.rflags | Rflags::FIXED.bits() };
        if !long {
            regs.gpr[8..].copy_from_slice(&self.gpr[8..16]);
        }
        self.set_regs(&regs);
        let State { segments, tr, ldt, gdt, idt, .. } = state;
        self.set_sregs(&Sregs { segments, tr, ldt, gdt, idt, ..self.sregs() });
        true
    }

    /// `rsm_enter_protected_mode`. `None`: shutdown.
    fn load_controls(&mut self, state: &State, long: bool) -> Option<()> {
        if (state.dr6 | state.dr7) >> 32 != 0 || state.cr3 >> self.phys_bits != 0 {
            return None;
        }
        if long {
            self.write_efer(state.efer & !Efer::LMA.bits())?;
        }
        let pcide = Cr4::PCIDE.bits();
        let pcid = if state.cr4 & pcide != 0 { 0xfff } else { 0 };
        self.write_cr3(state.cr3 & !pcid).ok()?;
        self.write_cr4(state.cr4 & !pcide).ok()?;
        self.write_cr0(state.cr0).ok()?;
        if state.cr4 & pcide != 0 {
            self.write_cr4(state.cr4).ok()?;
            self.write_cr3(state.cr3).ok()?;
        }
        Some(())
    }
}

/// How [`rsm`] ended.
pub(crate) enum Resumed {
    /// In the interrupted program.
    Guest,
    /// In a state that VM entry refuses.
    Refused,
    /// The area held what the processor cannot be in.
    Shutdown,
    /// There is no RAM where the area would be.
    NoArea,
}

/// RSM in SMM.
pub(crate) fn rsm(cpu: &mut Cpu) -> Resumed {
    let mut area = [0; BYTES];
    if cpu.view.read(cpu.save_area_at(), &mut area).is_err() {
        return Resumed::NoArea;
    }
    if !cpu.leave_smm(area) {
        return Resumed::Shutdown;
    }
    // What waited for the end of SMM, an INIT for one, is the KVM layer's to see.
    cpu.kick.kick();
    if cpu.entry_check().is_some() { Resumed::Refused } else { Resumed::Guest }
}
