//! Guests that are noise: random bytes everywhere, in every mode, under random control registers.

use std::sync::Arc;

use cpu_core::{Cpu, DescriptorTable, Exit, HostPlatform, Poll, Regs, Segment, Sregs};
use mmu::{Backing, Mapping, Memory, SlotFlags, SlotSpec};
use x86_defs::{Cr0, Cr4, Efer, GuestPhysAddr};

/// Bytes of RAM, and of what must stay as it is on both sides of it.
const RAM: u64 = 1 << 18;
const CANARY: u64 = 1 << 16;
/// RFLAGS bits that a guest may start with: all but RF, VM, VIF and VIP.
const RFLAGS: u64 = 0x24_7fd5;
/// Where the tables of most guests lie.
const GDT: u64 = 0xf000;
const IDT: u64 = 0xe000;
const TSS: u64 = 0xd000;
/// Exits that a guest is answered.
const EXITS: u32 = 200;

/// Decisions: first those that a fuzzer made, then SplitMix64's, from a seed that a failure can be repeated with.
pub struct Noise<'a> {
    given: &'a [u8],
    seed: u64,
}

impl<'a> Noise<'a> {
    pub fn new(given: &'a [u8], seed: u64) -> Self {
        Self { given, seed }
    }

    pub fn next(&mut self) -> u64 {
        if let Some((first, rest)) = self.given.split_first_chunk() {
            self.given = rest;
            return u64::from_le_bytes(*first);
        }
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.seed;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// Openings of instructions that plain noise rarely hits: 0F, VEX and FPU maps, strings, segment loads, far transfers.
const OPENINGS: &[&[u8]] = &[
    &[0x0f],
    &[0x0f, 0x38],
    &[0x0f, 0x3a],
    &[0x66, 0x0f],
    &[0xf3, 0x0f],
    &[0xf2, 0x0f],
    &[0x48, 0x0f],
    &[0xc4, 0xe2],
    &[0xc5],
    &[0xd9],
    &[0xdb],
    &[0xdd],
    &[0xf3, 0xa4],
    &[0xf3, 0x48, 0xab],
    &[0x8e],
    &[0xff],
    &[0x9a],
    &[0xcf],
    &[0xcd],
    &[0xf0],
    &[0x0f, 0x01],
    &[0x0f, 0x22],
    &[0x0f, 0x23],
    &[0x0f, 0xae],
    &[0x0f, 0xc7],
    &[0x67],
];

fn memory_of(noise: &mut Noise<'_>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(RAM as usize);
    while bytes.len() < RAM as usize {
        match noise.below(8) {
            0..=3 => bytes.extend_from_slice(OPENINGS[noise.below(OPENINGS.len() as u64) as usize]),
            4 => bytes.push(noise.next() as u8),
            // Entries of tables that are present and lead into RAM.
            5 => {
                bytes.extend_from_slice(&(noise.next() & (RAM - 0x1000) & !0xfff | noise.below(256) | 1).to_le_bytes())
            }
            // Descriptors of code and data.
            6 => bytes.extend_from_slice(
                &(0x00cf_9a00_0000_ffffu64 ^ noise.below(32) << 41 ^ noise.below(4) << 53).to_le_bytes(),
            ),
            _ => bytes.extend_from_slice(&noise.next().to_le_bytes()[..1 + noise.below(8) as usize]),
        }
    }
    bytes.truncate(RAM as usize);
    bytes
}

/// A mode that real guests are in, and now and then anything at all.
fn sregs_of(noise: &mut Noise<'_>, reset: Sregs) -> Sregs {
    let mut sregs = reset;
    let (mut cr0, mut cr4, mut efer) = (Cr0::ET | Cr0::NE, Cr4::empty(), Efer::empty());
    let mode = noise.below(5);
    if mode >= 1 {
        cr0 |= Cr0::PE;
    }
    if mode >= 2 {
        cr0 |= Cr0::PG;
        cr4 |= Cr4::PSE;
    }
    if mode >= 3 {
        cr4 |= Cr4::PAE;
    }
    if mode == 4 {
        efer |= Efer::LME | Efer::LMA | Efer::SCE;
    }
    if noise.one_in(2) {
        // Not those that VM entry refuses.
        let absent = Cr4::SMXE | Cr4::KL | Cr4::CET | Cr4::PKS | Cr4::UINTR | Cr4::LASS | Cr4::LAM_SUP;
        cr4 |= Cr4::from_bits_truncate(noise.next()) & !(absent | Cr4::VMXE | Cr4::PAE | Cr4::PCIDE);
    }
    cr4 |= Cr4::OSFXSR;
    if !noise.one_in(4) {
        // All pages are the user's.
        cr4 &= !(Cr4::SMEP | Cr4::SMAP);
    }
    if noise.one_in(4) {
        efer |= Efer::NXE;
    }
    let (wide, long) = (noise.one_in(2), mode == 4 && !noise.one_in(4));
    let cpl = if mode == 0 { 0 } else { [0, 0, 3][noise.below(3) as usize] };
    for (i, segment) in sregs.segments.iter_mut().enumerate() {
        let code = i == 1;
        *segment = Segment {
            selector: (noise.below(64) << 3) as u16 | u16::from(cpl),
            base: if mode == 0 || noise.one_in(12) { noise.below(RAM) & !0xf } else { 0 },
            limit: if mode == 0 { 0xffff } else { 0xffff_ffff },
            type_: if code { 0xb } else { 3 },
            s: true,
            dpl: cpl,
            present: true,
            l: code && long,
            db: wide && !(code && long) && mode != 0,
            g: mode != 0,
            ..*segment
        };
        if mode == 0 {
            segment.selector = (segment.base >> 4) as u16;
        }
    }
    sregs.gdt = DescriptorTable { base: noise.below(RAM), limit: 0xffff };
    sregs.idt = DescriptorTable { base: noise.below(RAM), limit: if noise.one_in(4) { 0 } else { 0xffff } };
    sregs.cr0 = cr0;
    sregs.cr3 = noise.below(RAM) & !0xfff;
    sregs.cr4 = cr4;
    sregs.efer = efer;
    sregs
}

/// Identity-mapping tables at the root that CR3 names, so that most guests get to run at all.
fn map(noise: &mut Noise<'_>, bytes: &mut [u8], sregs: &mut Sregs) {
    if !sregs.cr0.contains(Cr0::PG) || noise.one_in(5) {
        return;
    }
    let mut put = |at: u64, value: u64| bytes[at as usize..at as usize + 8].copy_from_slice(&value.to_le_bytes());
    sregs.cr3 = 0x8000;
    let long = sregs.efer.contains(Efer::LMA);
    if !sregs.cr4.contains(Cr4::PAE) {
        return put(0x8000, 0x87);
    }
    if long {
        for (i, table) in
            [0x8000u64, 0x9000, 0xa000].into_iter().take(2 + usize::from(sregs.cr4.contains(Cr4::LA57))).enumerate()
        {
            put(table, 0x9007 + 0x1000 * i as u64);
        }
        put(0x9000 + 0x1000 * u64::from(sregs.cr4.contains(Cr4::LA57)), 0xb007);
    } else {
        put(0x8000, 0xb001);
    }
    put(0xb000, 0x87);
}

/// A GDT of flat segments, and an IDT whose gates lead anywhere in RAM, so that most faults have handlers: more noise.
fn tables(noise: &mut Noise<'_>, bytes: &mut [u8], sregs: &mut Sregs) {
    if noise.one_in(5) {
        return;
    }
    let long = sregs.efer.contains(Efer::LMA);
    let mut put = |at: u64, value: u64| bytes[at as usize..at as usize + 8].copy_from_slice(&value.to_le_bytes());
    for i in 1..32u64 {
        let rights = if i % 2 == 1 { 0x9b } else { 0x93 } | noise.below(2) * 0x60;
        let flags = if long && i % 2 == 1 { 0xa } else { 0xc };
        put(GDT + 8 * i, 0x000f_0000_0000_ffff | rights << 40 | flags << 52);
    }
    let step = if long { 16 } else { 8 };
    for vector in 0..64 {
        let offset = noise.below(RAM);
        put(IDT + step * vector, offset & 0xffff | 8 << 16 | (0xee | vector & 1) << 40 | (offset & 0xffff_0000) << 32);
        if long {
            put(IDT + step * vector + 8, 0);
        }
    }
    if sregs.cr0.contains(Cr0::PE) {
        sregs.gdt = DescriptorTable { base: GDT, limit: 0xff };
        sregs.idt = DescriptorTable { base: IDT, limit: 0x3ff };
        sregs.tr.base = TSS;
        // Stacks for level 0; of a 32-bit TSS, SS0 as well.
        let stack = RAM - 0x1000;
        put(TSS + 4, if long { stack } else { stack | 0x10 << 32 });
    } else {
        sregs.idt = DescriptorTable { base: 0, limit: 0x3ff };
    }
}

/// A VM with one slot and one CPU.
pub struct Guest<'a> {
    pub cpu: Box<Cpu>,
    mapping: Arc<Mapping>,
    noise: Noise<'a>,
}

impl<'a> Guest<'a> {
    /// Made from `noise`, with `code` where it starts.
    pub fn new(mut noise: Noise<'a>, code: &[u8]) -> Self {
        let mapping = Mapping::create("noise", RAM + 2 * CANARY).expect("a memfd");
        let canary = vec![0xa5; CANARY as usize];
        mapping.write(0, &canary).expect("inside");
        mapping.write(CANARY + RAM, &canary).expect("inside");
        let memory = Arc::new(Memory::new());
        let mut cpu = Cpu::new(memory.clone(), Box::new(HostPlatform::default()), 40);
        // x87, SSE and AVX state.
        cpu.set_xcr0(7);
        let mut sregs = sregs_of(&mut noise, cpu.sregs());
        let gpr = std::array::from_fn(|i| if i == 4 || noise.one_in(2) { noise.below(RAM) } else { noise.next() });
        let window = if sregs.cr0.contains(Cr0::PE) { RAM } else { 0x1_0000 };
        let regs = Regs { gpr, rip: noise.below(window), rflags: noise.next() & RFLAGS | 2 };
        let mut bytes = memory_of(&mut noise);
        map(&mut noise, &mut bytes, &mut sregs);
        tables(&mut noise, &mut bytes, &mut sregs);
        // Where most guests' first fetch leads: mappings are mostly the identity.
        let start = (sregs.segments[1].base.wrapping_add(regs.rip) % RAM) as usize;
        let place = &mut bytes[start..];
        let len = code.len().min(place.len());
        place[..len].copy_from_slice(&code[..len]);
        mapping.write(CANARY, &bytes).expect("inside");
        let backing = Backing::new(mapping.clone(), CANARY);
        let flags = SlotFlags::default();
        let spec = SlotSpec { id: 0, gpa: GuestPhysAddr(0), len: RAM, flags, userspace_addr: 0, backing };
        memory.set_slot(spec).expect("an empty VM takes a slot");
        cpu.set_sregs(&sregs);
        cpu.set_regs(&regs);
        Self { cpu, mapping, noise }
    }

    /// Runs the guest for some of its exits, or until `stop` says so, which is asked between stretches of instructions.
    pub fn run(&mut self, stop: &mut dyn FnMut() -> bool) {
        for _ in 0..EXITS {
            let mut stopped = false;
            let mut ask = || {
                stopped |= stop();
                stopped
            };
            let exit = self.cpu.run_polled(Poll { every: std::time::Duration::ZERO, stop: &mut ask });
            if stopped {
                break;
            }
            match exit {
                Exit::Io(io) if io.input => {
                    let data: Vec<u8> = (0..io.count * u32::from(io.size)).map(|_| self.noise.next() as u8).collect();
                    self.cpu.complete_io_in(&data);
                }
                Exit::Io(_) => self.cpu.complete_io_out(),
                Exit::Mmio(mmio) if mmio.write.is_none() => self.cpu.complete_mmio_read(self.noise.next()),
                Exit::Hlt | Exit::Vmcall | Exit::ExternalInterrupt | Exit::Mmio(_) => {}
                Exit::Unimplemented { len, .. } => {
                    let mut regs = self.cpu.regs();
                    regs.rip = regs.rip.wrapping_add(u64::from(len.max(1)));
                    self.cpu.set_regs(&regs);
                }
                _ => break,
            }
        }
    }

    /// No byte outside of the slot has changed.
    pub fn stayed_inside(&self) -> bool {
        let mut side = vec![0; CANARY as usize];
        [0, CANARY + RAM].into_iter().all(|at| {
            self.mapping.read(at, &mut side).expect("inside");
            side.iter().all(|byte| *byte == 0xa5)
        })
    }
}
