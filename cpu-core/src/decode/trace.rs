//! Traces: where decoded ops live, how they are found, and how they are kept true to memory.
//!
//! A trace belongs to one guest-physical page, one offset in CS and one mode. It is valid while the bytes it was decoded from
//! are in memory: guest stores of this CPU that hit them are noticed at once ([`Traces::written`]); what others write
//! becomes visible to fetches only at a new epoch, where the first entry compares the bytes ([`Cpu::trace_is_current`]).
#![expect(unsafe_code, reason = "the arena is raw memory: links point into it while its owner runs")]

use std::alloc::Layout;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::ptr::NonNull;

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};
use mmu::{Access, AccessKind, Lookup};
use x86_defs::{GuestPhysAddr, LinearAddr};

use super::Mode;
use super::digest::{Branch, Digest, FlagsOut, Lowered};
use crate::cpu::{Cpu, SLOT_WIDE};
use crate::host;
use crate::isa;
use crate::op::{Continue, CrossLink, Enter, Handler, Head, Machine, Op, Semantics, To, cross, handler, resolve};
use crate::state::Seg;

const PAGE: u64 = 0x1000;
/// Ops that the arena holds: 128 MiB of address space, touched as it fills. A quarter of that is not enough for a compiler:
/// it made all traces anew several times a second.
const ARENA_OPS: usize = 1 << 22;
/// Bytes at its beginning that come in pages of 4 KiB, all that a small guest needs. Behind it are large pages, where the host
/// has some: heads lie all over the arena, and a TLB of the host reaches 8 MiB of it otherwise.
const SMALL_BYTES: usize = 2 << 20;
/// Slots kept free for one trace (rest of a line, bytes, footing, head, ops with data and wide displacements, links: 244
/// at most).
const RESERVE: usize = 256;
/// Slots that one single instruction may take (displacement, op, data, end, three links of two: 10 at most).
const SINGLE_OPS: usize = 16;
/// Ops in a cache line of the host.
pub(crate) const OPS_PER_LINE: usize = 64 / size_of::<Op>();
/// Where the traces begin, behind the single instructions' slots.
const TRACES_AT: usize = SINGLES * SINGLE_OPS;
/// Most instructions of a trace.
const MAX_INSTRUCTIONS: usize = 32;
/// Most bytes of an instruction (SDM Vol. 2 "Instruction Format").
pub(crate) const MAX_INSTRUCTION_BYTES: usize = 15;

/// Multiplicative hash for keys that are addresses.
#[derive(Default)]
pub(crate) struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }
    fn write_u8(&mut self, value: u8) {
        self.write_u64(value.into());
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 32;
    }
}

/// What jump cache, return stack and links across pages hold for code of one privilege. MOV CR3 takes a process's; a
/// kernel's stay, which lie in global pages.
pub(crate) struct Links {
    /// Part of `Cpu::code_context`: what was found under another one is forgotten.
    generation: u64,
    /// Base and limit of CS that the offsets are for.
    window: (u64, u32),
    /// Where they lead, and perhaps some more pages: INVLPG elsewhere leaves them alone.
    pages: [u64; LINKED_BITS / 64],
    /// First and last address that they lead to.
    span: (u64, u64),
    /// Some lead to pages that are not global.
    local: bool,
}

/// Pages that are told apart, by the low bits of their numbers.
const LINKED_BITS: usize = 1 << 14;

impl Default for Links {
    fn default() -> Self {
        Self { generation: 1, window: (0, 0), pages: [0; LINKED_BITS / 64], span: (u64::MAX, 0), local: false }
    }
}

impl Links {
    fn place(la: u64) -> (usize, u64) {
        let page = (la / PAGE) as usize % LINKED_BITS;
        (page / 64, 1 << (page % 64))
    }

    fn enter(&mut self, la: u64, global: bool) {
        let (word, bit) = Self::place(la);
        self.pages[word] |= bit;
        self.span = (self.span.0.min(la & !(PAGE - 1)), self.span.1.max(la | (PAGE - 1)));
        self.local |= !global;
    }

    /// False: nothing leads to the page of `la`.
    fn may_hold(&self, la: u64) -> bool {
        let (word, bit) = Self::place(la);
        self.span.0 <= la && la <= self.span.1 && self.pages[word] & bit != 0
    }

    fn forget(&mut self) {
        *self = Self { generation: self.generation + 1, window: self.window, ..Self::default() };
    }
}

/// By addresses.
pub(crate) type Map<K, V> = HashMap<K, V, BuildHasherDefault<AddressHasher>>;

struct Trace {
    gpa: u64,
    key: (u64, u64, u8),
    head: At,
}

/// In the slot before a trace's head: what the trace stands on. The slots before it hold the bytes that it was decoded from, from
/// the first one's beginning. All of that is looked at with the head, so it shares lines of the host's cache.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct Footing {
    /// Host address of the trace's first byte, good while the picture of memory is `picture`.
    host: u64,
    picture: u64,
    /// Bytes.
    len: u16,
    dead: bool,
}

const _: () = assert!(size_of::<Footing>() == size_of::<Op>() && align_of::<Footing>() == align_of::<Op>());

/// The head of a trace: a slot of the arena, with the trace's footing before it and the bytes before that.
#[derive(Clone, Copy)]
pub(crate) struct At(NonNull<Op>);

impl At {
    /// # Safety
    /// `head` is a head that [`Cpu::build`] made in an arena that outlives all use of this.
    // SAFETY: that is all that the methods rely on.
    pub(crate) unsafe fn new(head: *const Op) -> Self {
        // SAFETY: the caller's: a slot of the arena.
        Self(unsafe { NonNull::new_unchecked(head.cast_mut()) })
    }

    fn as_ptr(self) -> *const Op {
        self.0.as_ptr()
    }

    fn place(self) -> *mut Footing {
        // SAFETY: a slot of the arena is before it.
        unsafe { self.0.as_ptr().sub(1) }.cast()
    }

    /// A copy.
    fn footing(self) -> Footing {
        // SAFETY: a footing is there, and nobody has a reference to it.
        unsafe { self.place().read() }
    }

    fn set_footing(self, footing: Footing) {
        // SAFETY: as in `footing`.
        unsafe { self.place().write(footing) };
    }

    /// What the trace was decoded from: `len` bytes, as its footing says.
    fn bytes(&self, len: u16) -> &[u8] {
        let len = usize::from(len);
        // SAFETY: so many slots before the footing hold the bytes.
        let bytes = unsafe { self.place().sub(slots(len)) }.cast::<u8>();
        // SAFETY: as above; they are written once, before anything leads to the head.
        unsafe { std::slice::from_raw_parts(bytes, len) }
    }

    fn stamp(self) -> u64 {
        // SAFETY: a head is there.
        unsafe { (*self.0.as_ptr().cast::<Head>()).stamp }
    }

    fn set_stamp(self, stamp: u64) {
        // SAFETY: a head is there, and nobody has a reference to it.
        unsafe { (*self.0.as_ptr().cast::<Head>()).stamp = stamp };
    }
}

/// Slots for the bytes of a trace.
const fn slots(len: usize) -> usize {
    len.div_ceil(size_of::<Op>())
}

/// Which line of 64 bytes of its page an address lies in.
fn line_of(address: u64) -> u64 {
    (address & (PAGE - 1)) >> 6
}

#[derive(Default)]
struct CodePage {
    /// Bit n: bytes 64 n to 64 n + 63 hold decoded code.
    lines: u64,
    traces: Vec<u32>,
    /// Of those lines, the ones that were stored to since the last trace came, and how many lines all stores there had.
    rewritten: u64,
    stored: u32,
}

/// Stores to every line of code of a page, and to so many lines in all, tell that it holds data now. Fewer may be a variable
/// beside a loop's code.
const LINES_OF_DATA: u32 = 32;

/// What a store did to traces.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Written {
    /// Nothing.
    Nothing,
    /// It hit decoded bytes, so the running trace must be left.
    Code,
    /// As [`Written::Code`], and the page's traces are all gone: the caller forgets what leads to them.
    Page,
}

/// The traces of one CPU.
pub(crate) struct Traces {
    arena: NonNull<Op>,
    used: usize,
    list: Vec<Trace>,
    by_address: Map<(u64, u64, u8), u32>,
    /// By host address, so that it does not matter by which guest-physical address a store comes (aliases of 2007).
    pages: Map<u64, CodePage>,
    singles: Vec<Option<Single>>,
    /// Traces that were dropped one by one.
    pub(crate) dropped: u64,
    /// What is being decoded; kept for its memory.
    lowered: Vec<Lowered>,
}

/// An instruction that was executed by itself, kept by its bytes; its ops lie in the arena, in slots of their own.
#[derive(Clone, Copy)]
struct Single {
    ip: u64,
    mode: Mode,
    bytes: [u8; MAX_INSTRUCTION_BYTES],
    len: u8,
    /// A predicted return may lead into its ops.
    is_call: bool,
}

/// Entries of the cache of single instructions.
const SINGLES: usize = 256;

fn single_index(ip: u64) -> usize {
    (ip ^ ip >> 8) as usize % SINGLES
}

// SAFETY: the arena is owned, and reached only through its owner.
unsafe impl Send for Traces {}

const ARENA_BYTES: usize = ARENA_OPS * size_of::<Op>();

/// Zeroed memory for the arena, from the kernel itself: it gives pages as they are touched. An allocator asked for more
/// than its usual alignment writes the zeros by hand, and so many of them take longer than all else about a new vCPU.
fn map_arena() -> NonNull<Op> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), ARENA_BYTES, prot, flags, -1, 0) };
    match NonNull::new(at.cast::<Op>()) {
        Some(arena) if at != libc::MAP_FAILED => {
            // SAFETY: inside the mapping.
            let large = unsafe { arena.byte_add(SMALL_BYTES) };
            // A kernel without large pages refuses, and all is as before.
            // SAFETY: the rest of the mapping; advice changes no contents.
            let _ = unsafe { libc::madvise(large.as_ptr().cast(), ARENA_BYTES - SMALL_BYTES, libc::MADV_HUGEPAGE) };
            arena
        }
        _ => std::alloc::handle_alloc_error(Layout::new::<[Op; ARENA_OPS]>()),
    }
}

impl Drop for Traces {
    fn drop(&mut self) {
        // SAFETY: mapped by `map_arena` with this length, and nobody's any more; ops have no destructor.
        unsafe { libc::munmap(self.arena.as_ptr().cast(), ARENA_BYTES) };
    }
}

impl Traces {
    pub(crate) fn new() -> Self {
        Self {
            arena: map_arena(),
            used: TRACES_AT,
            list: Vec::new(),
            by_address: Map::default(),
            pages: Map::default(),
            singles: vec![None; SINGLES],
            dropped: 0,
            lowered: Vec::new(),
        }
    }

    /// No room for another trace.
    fn is_full(&self) -> bool {
        self.used + RESERVE > ARENA_OPS
    }

    /// Empties the arena. No trace may be running, and the caller drops what points into it.
    fn clear(&mut self) {
        self.used = TRACES_AT;
        self.list.clear();
        self.by_address.clear();
        self.pages.clear();
    }

    /// When an instruction was last executed by itself at offset `ip`, it went over the end of its page.
    fn crosses_page(&self, gpa: u64, ip: u64, mode: Mode) -> bool {
        self.singles[single_index(ip)].is_some_and(|known| {
            known.ip == ip && known.mode == mode && (gpa & (PAGE - 1)) + u64::from(known.len) > PAGE
        })
    }

    /// The bytes that the trace there was decoded from, if there is one.
    pub(crate) fn bytes_at(&self, gpa: u64, ip: u64, mode: Mode) -> Option<&[u8]> {
        let trace = &self.list[*self.by_address.get(&(gpa, ip, mode.bits()))? as usize];
        Some(trace.head.bytes(trace.head.footing().len))
    }

    /// The bytes of the instruction that was last executed by itself at offset `ip`, if they are still known.
    pub(crate) fn single_bytes(&self, ip: u64, mode: Mode) -> Option<&[u8]> {
        let known = self.singles[single_index(ip)].as_ref()?;
        (known.ip == ip && known.mode == mode).then(|| &known.bytes[..known.len.into()])
    }

    /// Traces were decoded from the page at host address `page`.
    pub(crate) fn is_code(&self, page: u64) -> bool {
        self.pages.contains_key(&page)
    }

    /// Pages that stores look at traces in.
    #[cfg(test)]
    pub(crate) fn code_pages(&self) -> usize {
        self.pages.len()
    }

    /// Enters a trace into the page that its host address lies in. True: the page had none.
    fn enter_page(&mut self, index: u32) -> bool {
        let Footing { host, len, .. } = self.list[index as usize].head.footing();
        let (from, to) = (line_of(host), line_of(host + u64::from(len) - 1));
        let page = self.pages.entry(host & !(PAGE - 1)).or_default();
        let new = page.lines == 0;
        page.lines |= (u64::MAX << from) & (u64::MAX >> (63 - to));
        page.traces.push(index);
        (page.rewritten, page.stored) = (0, 0);
        new
    }

    fn leave_page(&mut self, index: u32) {
        if let Some(page) = self.pages.get_mut(&(self.list[index as usize].head.footing().host & !(PAGE - 1))) {
            page.traces.retain(|&other| other != index);
        }
    }

    /// A store of `size` bytes at host address `host` happened.
    pub(crate) fn written(&mut self, host: u64, size: u32) -> Written {
        let key = host & !(PAGE - 1);
        let Some(page) = self.pages.get_mut(&key) else { return Written::Nothing };
        let first = line_of(host);
        let last = ((host & (PAGE - 1)) + u64::from(size) - 1).min(PAGE - 1) >> 6;
        let touched = (u64::MAX << first) & (u64::MAX >> (63 - last));
        page.rewritten |= page.lines & touched;
        page.stored = page.stored.saturating_add(touched.count_ones());
        if page.rewritten == page.lines && page.stored >= LINES_OF_DATA {
            for index in self.pages.remove(&key).map(|page| page.traces).unwrap_or_default() {
                self.kill(index);
            }
            return Written::Page;
        }
        let mut hit = Written::Nothing;
        if page.lines & touched == 0 {
            return hit;
        }
        for &index in &page.traces {
            let trace = &self.list[index as usize];
            let footing = trace.head.footing();
            if host < footing.host + u64::from(footing.len) && footing.host < host + u64::from(size) {
                trace.head.set_stamp(0);
                hit = Written::Code;
            }
        }
        hit
    }

    /// Forgets a trace whose bytes have changed. Its ops stay where they are: links may lead there, to be sent away.
    fn kill(&mut self, index: u32) {
        self.dropped += 1;
        let trace = &self.list[index as usize];
        trace.head.set_footing(Footing { dead: true, ..trace.head.footing() });
        trace.head.set_stamp(0);
        if self.by_address.get(&trace.key) == Some(&index) {
            self.by_address.remove(&trace.key);
        }
        self.leave_page(index);
    }

    /// Points the branch in front of `stub` to `target`: for good within the page of the running trace, under `context`
    /// across pages.
    pub(crate) fn link(&mut self, stub: *const Op, target: *const Op, trace_ip: u64, context: u64) {
        let stub = stub.cast_mut();
        // SAFETY: `stub` is a stub of the arena, written by nobody else; copied out.
        let at = unsafe { *stub };
        // SAFETY: `target` is a head.
        let ip = unsafe { (*target.cast::<Head>()).ip };
        let same_page = at.seg == LINKS_WITHIN_PAGE && (ip ^ trace_ip) & !(PAGE - 1) == 0;
        if same_page {
            // SAFETY: `disp` was made by `build`: the distance to the link of the branch that owns this stub.
            let link = unsafe { stub.cast::<u8>().offset(at.disp as isize).cast::<u64>() };
            // SAFETY: as above.
            unsafe { link.write(target as u64) };
            return;
        }
        // SAFETY: a stub is followed by a slot of its own.
        let data = unsafe { stub.add(1) };
        // SAFETY: as above.
        unsafe { data.cast::<CrossLink>().write(CrossLink { target, context, unused: [0; 2] }) };
        // SAFETY: as above.
        unsafe { (*stub).handler = cross };
    }

    /// What follows `ahead` more ops begins a line of the host's cache: a head has the first instruction beside it.
    fn begin_line(&mut self, ahead: usize) {
        while !(self.used + ahead).is_multiple_of(OPS_PER_LINE) {
            self.push(blank(handler::<Enter>));
        }
    }

    /// Appends an op and returns where it is.
    fn push(&mut self, op: Op) -> *mut Op {
        assert!(self.used < ARENA_OPS, "`build` reserves room for a whole trace");
        // SAFETY: inside the arena.
        let at = unsafe { self.arena.as_ptr().add(self.used) };
        // SAFETY: as above.
        unsafe { at.write(op) };
        self.used += 1;
        at
    }
}

/// In a stub's `seg`: CS's base is page-aligned, so offsets in one page are addresses in one page.
const LINKS_WITHIN_PAGE: u8 = 1;

fn blank(handler: Handler) -> Op {
    Op {
        handler,
        imm: 0,
        disp: 0,
        dst: 0,
        src: 0,
        base: 0,
        index: 0,
        scale: 1,
        seg: 0,
        len: 0,
        aux: 0,
        off: 0,
        left: 0,
    }
}

impl Cpu {
    /// The bytes that a trace was decoded from are still there. Otherwise, or if attention is asked for, false.
    pub(crate) fn trace_is_current(&mut self, index: u32) -> bool {
        if self.kick.asked() {
            return false;
        }
        let picture = self.view.picture();
        let trace = &self.traces.list[index as usize];
        let (head, footing) = (trace.head, trace.head.footing());
        if footing.dead {
            return false;
        }
        if footing.picture != picture {
            let Lookup::Ram { ptr, .. } = self.view.page(GuestPhysAddr(trace.gpa & !(PAGE - 1)), false) else {
                self.drop_trace(index);
                return false;
            };
            self.settle_trace(index, ptr.as_ptr().addr() as u64, picture);
        }
        if !self.stands(head) {
            self.drop_trace(index);
            return false;
        }
        true
    }

    /// Notes that the bytes that the trace of `head`, one of this CPU's, was decoded from are still there. False: they are not,
    /// or somebody must look where they are now.
    #[inline(always)]
    pub(crate) fn stands(&mut self, head: At) -> bool {
        let Footing { host, picture, len, dead } = head.footing();
        if dead || picture != self.view.picture() {
            return false;
        }
        // SAFETY: `host` was looked up in this picture of memory, and a trace does not leave its page.
        if !unsafe { host::equals(host, head.bytes(len)) } {
            return false;
        }
        head.set_stamp(self.kick.epoch());
        true
    }

    /// A new picture of memory has the page of a trace at host address `page`.
    fn settle_trace(&mut self, index: u32, page: u64, picture: u64) {
        let head = self.traces.list[index as usize].head;
        let footing = Footing { picture, ..head.footing() };
        head.set_footing(footing);
        if footing.host & !(PAGE - 1) == page {
            return;
        }
        self.traces.leave_page(index);
        head.set_footing(Footing { host: page | footing.host & (PAGE - 1), ..footing });
        if self.traces.enter_page(index) {
            self.tlb.protect(page);
        }
    }

    /// Empties the arena if it is full. Called between traces.
    pub(crate) fn make_room_for_traces(&mut self) {
        if self.traces.is_full() {
            self.traces.clear();
            self.counts.arena_resets += 1;
            self.forget_jumps();
        }
    }

    fn drop_trace(&mut self, index: u32) {
        self.traces.kill(index);
        self.forget_jumps();
    }

    /// Drops the jump cache, return stack and links across pages.
    pub(crate) fn forget_jumps(&mut self) {
        self.links.iter_mut().for_each(Links::forget);
        self.enter_links();
    }

    /// The same for what leads to pages that are not global, after MOV CR3.
    pub(crate) fn forget_local_jumps(&mut self) {
        self.links.iter_mut().filter(|links| links.local).for_each(Links::forget);
        self.enter_links();
    }

    /// INVLPG: does anything lead to the page of `la`?
    pub(crate) fn is_linked(&self, la: u64) -> bool {
        self.links.iter().any(|links| links.may_hold(la))
    }

    /// What the jump cache has for the mode, privilege and CS of now is good from here on.
    pub(crate) fn enter_links(&mut self) {
        let cs = self.seg[Seg::Cs as usize];
        // Offsets in CS name the same code only under the same base and limit.
        let window = if self.is_64bit() { (0, u32::MAX) } else { (cs.base, cs.limit) };
        let links = &mut self.links[usize::from(self.cpl == 3)];
        if window != links.window {
            links.window = window;
            links.generation += 1;
        }
        self.code_context = links.generation << 8 | u64::from(self.mode().bits());
    }

    /// The trace at offset `ip` of CS may be linked to from now on.
    pub(crate) fn may_link(&mut self, ip: u64) {
        let la = self.wrap_linear(self.seg_base[Seg::Cs as usize].wrapping_add(ip));
        self.links[usize::from(self.cpl == 3)].enter(la, self.tlb.fetch_is_global(la));
    }

    /// Finds or decodes the trace at offset `ip` of CS. Null where the loop must take one instruction by itself.
    pub(crate) fn trace_at(&mut self, ip: u64) -> *const Op {
        const NONE: *const Op = std::ptr::null();
        let cs = self.seg[Seg::Cs as usize];
        let mode = self.mode();
        if mode.is_64bit() {
            if !self.is_canonical(ip) {
                return NONE;
            }
        } else if ip > u64::from(cs.limit) {
            return NONE;
        }
        let la = self.wrap_linear(self.seg_base[Seg::Cs as usize].wrapping_add(ip));
        let Some(gpa) = self.fetch_address(la) else { return NONE };
        let key = (gpa, ip, mode.bits());
        if let Some(&index) = self.traces.by_address.get(&key) {
            let head = self.traces.list[index as usize].head;
            if head.stamp() == self.kick.epoch() || self.trace_is_current(index) {
                return head.as_ptr();
            }
            if self.kick.asked() {
                return NONE;
            }
        }
        if self.traces.crosses_page(gpa, ip, mode) { NONE } else { self.build(gpa, ip, mode) }
    }

    /// Guest-physical address that a fetch at `la` reads; `None` for a fault, which the loop finds again.
    fn fetch_address(&mut self, la: u64) -> Option<u64> {
        if let Some(gpa) = self.tlb.fetch(la) {
            return Some(gpa);
        }
        self.translate_fetch(la).ok()
    }

    /// Walks for a fetch of one byte at `la`.
    pub(crate) fn translate_fetch(&mut self, la: u64) -> Result<u64, mmu::PageFault> {
        self.counts.fetch_walks += 1;
        let access = Access { kind: AccessKind::Fetch, user: self.cpl == 3, implicit: false };
        let paging = self.paging();
        let found = mmu::walk_cached(&self.view, &paging, LinearAddr(la), access, &mut self.tlb.structures)?;
        self.tlb.fill_fetch(la, &found);
        Ok(found.gpa.0)
    }

    /// Decodes a trace. Null where not even the first instruction ends in the page, or it is not RAM.
    fn build(&mut self, gpa: u64, ip: u64, mode: Mode) -> *const Op {
        const NONE: *const Op = std::ptr::null();
        let page = gpa & !(PAGE - 1);
        if self.traces.is_full() {
            // Ops of the running trace are still in use: the loop empties the arena.
            return NONE;
        }
        let Lookup::Ram { ptr, .. } = self.view.page(GuestPhysAddr(page), false) else { return NONE };
        let host = ptr.as_ptr().addr() as u64 + (gpa & (PAGE - 1));
        let mut bytes = [0; MAX_INSTRUCTIONS * MAX_INSTRUCTION_BYTES];
        let mut available = ((PAGE - (gpa & (PAGE - 1))) as usize).min(bytes.len());
        if !mode.is_64bit() {
            let limit = u64::from(self.seg[Seg::Cs as usize].limit);
            available = available.min((limit + 1).saturating_sub(ip) as usize);
        }
        // SAFETY: `available` bytes from `gpa` on lie in one page of a slot that `view` keeps alive.
        unsafe { host::copy_out(host, &mut bytes[..available]) };
        let mut lowered = std::mem::take(&mut self.traces.lowered);
        let len = lower_all(&bytes[..available], ip, mode, MAX_INSTRUCTIONS, &mut lowered);
        let head =
            if lowered.is_empty() { NONE } else { self.write_trace(gpa, ip, mode, host, &bytes[..len], &lowered) };
        self.traces.lowered = lowered;
        if !head.is_null() && self.traces.enter_page(self.traces.list.len() as u32 - 1) {
            // From now on stores to this page take the slow path, whatever address they use.
            self.tlb.protect(ptr.as_ptr().addr() as u64);
        }
        head
    }

    /// Writes the trace of some instructions, whose bytes at `gpa` the host has at `host`.
    fn write_trace(
        &mut self,
        gpa: u64,
        ip: u64,
        mode: Mode,
        host: u64,
        bytes: &[u8],
        lowered: &[Lowered],
    ) -> *const Op {
        let len = bytes.len();
        let index = self.traces.list.len() as u32;
        self.traces.begin_line(slots(len) + 1);
        let copy = self.traces.push(blank(handler::<Enter>));
        for _ in 1..slots(len) {
            self.traces.push(blank(handler::<Enter>));
        }
        // SAFETY: that many slots were pushed just now, one behind the other.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), copy.cast(), len) };
        let footing = self.traces.push(blank(handler::<Enter>));
        let first = self.traces.push(blank(handler::<Enter>));
        debug_assert!(first.addr().is_multiple_of(OPS_PER_LINE * size_of::<Op>()), "a head begins a line");
        let aligned = self.seg_base[Seg::Cs as usize] & (PAGE - 1) == 0;
        self.traces.emit(lowered, ip, ip.wrapping_add(len as u64), aligned, resolve, NonNull::new(first));
        let head = Head {
            // SAFETY: `first` was pushed just now.
            handler: unsafe { (*first).handler },
            stamp: self.kick.epoch(),
            ip,
            trace: index,
            mark: Head::MARK,
            count: lowered.len() as u16,
        };
        // SAFETY: `first` was pushed just now; `Head` has the size and alignment of `Op`.
        unsafe { first.cast::<Head>().write(head) };

        let standing = Footing { host, picture: self.view.picture(), len: len as u16, dead: false };
        // SAFETY: `footing` was pushed just now; `Footing` has the size and alignment of `Op`.
        unsafe { footing.cast::<Footing>().write(standing) };
        let key = (gpa, ip, mode.bits());
        self.traces.list.push(Trace { gpa, key, head: At(NonNull::new(first).expect("inside the arena")) });
        self.traces.by_address.insert(key, index);
        self.counts.traces_decoded += 1;
        first
    }

    /// Ops for the first instruction of `bytes`, outside any trace: whatever it does, control comes back when run with no
    /// budget. Good until the next call. `None`: the instruction needs more bytes.
    pub(crate) fn single(&mut self, bytes: &[u8], ip: u64) -> Option<*const Op> {
        let mode = self.mode();
        let at = single_index(ip);
        // SAFETY: inside the arena; `build` keeps traces below the slots of single instructions.
        let first = unsafe { self.traces.arena.as_ptr().add(at * SINGLE_OPS) };
        let old = self.traces.singles[at];
        let known = old.is_some_and(|known| {
            let len = usize::from(known.len);
            known.ip == ip && known.mode == mode && bytes.len() >= len && bytes[..len] == known.bytes[..len]
        });
        if !known {
            let len = lower_all(bytes, ip, mode, 1, &mut self.traces.lowered);
            let lowered = *self.traces.lowered.first()?;
            if old.is_some_and(|old| old.is_call) {
                self.forget_jumps();
            }
            let mut kept = [0; MAX_INSTRUCTION_BYTES];
            kept[..len].copy_from_slice(&bytes[..len]);
            let is_call = matches!(lowered.branch, Some(Branch::Call(_) | Branch::CallIndirect));
            self.traces.singles[at] = Some(Single { ip, mode, bytes: kept, len: len as u8, is_call });
            let next = ip.wrapping_add(len as u64) & self.ip_mask();
            let used = std::mem::replace(&mut self.traces.used, at * SINGLE_OPS);
            self.traces.emit(&[lowered], ip, next, false, stop_at, None);
            debug_assert!(self.traces.used <= (at + 1) * SINGLE_OPS);
            self.traces.used = used;
        }
        self.gpr[17] = ip;
        Some(first)
    }
}

/// Stub of a single instruction: control has reached offset `imm`.
///
/// # Safety
/// That of a [`Handler`], with a stub for an op.
unsafe fn stop_at(cpu: *mut Cpu, op: *const Op, fa: u64, fb: u64, budget: i64) {
    // SAFETY: `cpu` is the running CPU; no other reference to it is alive while a handler runs.
    let cpu = unsafe { &mut *cpu };
    cpu.fa = fa;
    cpu.fb = fb;
    cpu.budget = budget;
    // SAFETY: `op` is the current op.
    cpu.rip = unsafe { (*op).imm };
}

/// Loads [`SLOT_WIDE`], for a displacement that has no room in the op behind.
struct SetWide;
impl Semantics for SetWide {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let value = m.op().imm;
        m.put(SLOT_WIDE, value);
        To::Next
    }
}

impl Traces {
    /// Writes the ops of a trace behind its head, its links last. `end` is the offset behind the last instruction, `alone` an
    /// op that may take the first one over, as neighbours do: the head.
    fn emit(
        &mut self,
        lowered: &[Lowered],
        ip: u64,
        end: u64,
        aligned: bool,
        stub: Handler,
        mut alone: Option<NonNull<Op>>,
    ) {
        let total = lowered.len() as u16;
        let mut live = true;
        let mut quiet = [false; MAX_INSTRUCTIONS];
        for (i, one) in lowered.iter().enumerate().rev() {
            quiet[i] = !live && one.quiet.is_some();
            let replaces = matches!(one.flags, FlagsOut::Kind(_));
            live = one.reads_flags || one.barrier || live && !replaces;
        }
        let mut links: [Option<(NonNull<u64>, u64)>; 2 * MAX_INSTRUCTIONS + 1] = [None; 2 * MAX_INSTRUCTIONS + 1];
        let mut count = 0;
        let mut want = |op: *mut Op, target: u64| {
            // SAFETY: `op` was pushed by this function; `imm` is inside it.
            let link = unsafe { &raw mut (*op).imm };
            links[count] = NonNull::new(link).map(|link| (link, target));
            count += 1;
        };
        let mut taken_over = false;
        for (i, one) in lowered.iter().enumerate() {
            let left = total - i as u16;
            if one.idle {
                continue;
            }
            if let Some(wide) = one.wide {
                self.push(Op { imm: wide, left, ..blank(handler::<SetWide>) });
                alone = None;
            }
            let mut op = Op { left, ..one.op };
            if quiet[i]
                && let Some(handler) = one.quiet
            {
                op.handler = handler;
            }
            let fused = lowered.get(i + 1).and_then(|next| (one.fused)(next.condition?));
            if let Some(handler) = fused {
                // The branch's op stays behind this one: it holds the link, and what the branch gives back.
                op.handler = handler;
            }
            let next = ip.wrapping_add(u64::from(op.off)).wrapping_add(u64::from(op.len));
            let at = self.push(op);
            alone = match alone {
                _ if std::mem::replace(&mut taken_over, fused.is_some()) => None,
                Some(first) if take_over(first, at) => None,
                _ => NonNull::new(at),
            };
            let data = one.data.then(|| self.push(blank(stub)));
            match (one.branch, data) {
                (Some(Branch::Conditional(target) | Branch::Always(target)), _) => want(at, target),
                (Some(Branch::Call(target)), Some(data)) => {
                    want(at, target);
                    want(data, next);
                }
                (Some(Branch::CallIndirect), Some(data)) => want(data, next),
                (Some(Branch::Call(_) | Branch::CallIndirect), None) => unreachable!("calls have a data slot"),
                (None, _) => {}
            }
        }
        let last = self.push(blank(handler::<Continue>));
        want(last, end);
        for (link, target) in links.into_iter().flatten() {
            let at = self.push(blank(stub));
            // SAFETY: both lie in the arena.
            let distance = unsafe { link.as_ptr().cast::<u8>().offset_from(at.cast::<u8>()) };
            let op = Op { imm: target, disp: distance as i32, seg: u8::from(aligned), ..blank(stub) };
            // SAFETY: `at` was pushed just now.
            unsafe { at.write(op) };
            // SAFETY: `link` is the `imm` of an op pushed above.
            unsafe { link.as_ptr().write(at as u64) };
            self.push(blank(stub));
        }
    }
}

/// Gives the op at `first` a handler that does the one at `second` as well, if they are neighbours and there is such.
fn take_over(first: NonNull<Op>, second: *mut Op) -> bool {
    if first.as_ptr().wrapping_add(1) != second {
        return false;
    }
    // SAFETY: pushed for the trace that is being written; it holds an op.
    let second = unsafe { (*second).handler };
    // SAFETY: likewise; an op, or the place of a head.
    let handler = unsafe { &raw mut (*first.as_ptr()).handler };
    // SAFETY: as above.
    let Some(both) = isa::pair(unsafe { *handler }, second) else { return false };
    // SAFETY: as above.
    unsafe { *handler = both };
    true
}

/// Decodes and lowers up to `max` instructions that lie wholly in `bytes`. Puts them into `all`, and returns their length in bytes.
fn lower_all(bytes: &[u8], ip: u64, mode: Mode, max: usize, all: &mut Vec<Lowered>) -> usize {
    all.clear();
    let mut decoder = Decoder::with_ip(mode.bitness(), bytes, ip, DecoderOptions::NONE);
    let mut ins = Instruction::default();
    let mut known_flags = None;
    let mut len = 0;
    while all.len() < max && decoder.can_decode() {
        decoder.decode_out(&mut ins);
        let at = len;
        let no_more = ins.is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes;
        if no_more && bytes.len() - at < MAX_INSTRUCTION_BYTES {
            break;
        }
        let digest = Digest {
            ins: &ins,
            bytes: &bytes[at..decoder.position()],
            mode,
            trace_ip: ip,
            exact: max == 1,
            known_flags,
        };
        let mut lowered = isa::lower(&digest, no_more);
        if !ins.is_invalid() && !digest.displacement_fits() {
            lowered.wide = Some(ins.memory_displacement64());
            lowered.op.base = SLOT_WIDE;
            lowered.op.disp = 0;
        }
        lowered.op.off = at as u16;
        len = decoder.position();
        known_flags = match lowered.flags {
            FlagsOut::Kept => known_flags,
            FlagsOut::Kind(kind) => Some(kind),
            FlagsOut::Unknown => None,
        };
        let target = match lowered.branch {
            Some(Branch::Always(target)) if max > 1 => followed(target.wrapping_sub(ip), len, bytes.len()),
            _ => None,
        };
        if let Some(target) = target {
            // The trace goes on there; what lies between counts as its bytes.
            lowered = Lowered { idle: true, branch: None, ends: false, ..lowered };
            decoder.set_ip(ip.wrapping_add(target as u64));
            decoder.set_position(target).expect("inside the bytes");
            len = target;
        }
        // By itself, an instruction that does nothing still has to be executed.
        lowered.idle &= max > 1;
        let ends = lowered.ends;
        all.push(lowered);
        if ends {
            break;
        }
    }
    len
}

/// Where a jump that lies before byte `len` goes, if the trace should go on there: `distance` bytes from its start,
/// forward, not far, in what was fetched.
pub(crate) fn followed(distance: u64, len: usize, fetched: usize) -> Option<usize> {
    /// Bytes between a jump and its target that a trace takes along.
    const GAP: usize = 64;
    let target = usize::try_from(distance).ok()?;
    (target >= len && target <= len + GAP && target < fetched).then_some(target)
}

#[cfg(test)]
mod tests {
    use iced_x86::code_asm::*;

    use super::{ARENA_BYTES, Traces};
    use crate::state::Regs;
    use crate::testing::Machine;
    use crate::vmx::Exit;

    /// mincore(2) tells which pages exist.
    #[test]
    fn a_new_arena_costs_no_memory() {
        let traces = Traces::new();
        let mut pages = vec![0u8; ARENA_BYTES / 4096];
        // SAFETY: the arena is mapped, and the vector has a byte for each of its pages.
        let done = unsafe { libc::mincore(traces.arena.as_ptr().cast(), ARENA_BYTES, pages.as_mut_ptr()) };
        assert_eq!((done, pages.iter().filter(|&&page| page & 1 != 0).count()), (0, 0));
    }

    /// Comparisons, branches and jumps over little, NOPs between, calls, the stack, memory that the TLB has not seen: all
    /// that a trace takes together. Ends in GETSEC, which no core has.
    fn program(a: &mut CodeAssembler, mut seed: u64) -> Result<(), iced_x86::IcedError> {
        let mut next = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        let registers = [rax, rcx, rdx, rbx, rdi, r8];
        let narrow = [eax, ecx, edx, ebx, edi, r8d];
        let mut top = a.create_label();
        a.mov(rsi, 0x20_0ff8u64)?;
        a.mov(r15, 20u64)?;
        a.set_label(&mut top)?;
        for _ in 0..60 {
            let (i, j, imm) = (next(6) as usize, next(6) as usize, next(256) as i32 - 128);
            match next(16) {
                12 => {
                    a.push(registers[i])?;
                    a.push(registers[j])?;
                    a.mov(registers[i], registers[j])?;
                    a.pop(registers[j])?;
                    a.pop(registers[i])?;
                }
                13 => {
                    a.mov(qword_ptr(rsi + imm * 64), registers[i])?;
                    a.mov(narrow[j], dword_ptr(rsi + imm * 64 + 4))?;
                }
                14 => {
                    a.mov(narrow[i], narrow[j])?;
                    a.mov(registers[j], qword_ptr(rsi + imm * 64))?;
                }
                15 => {
                    let (mut function, mut behind) = (a.create_label(), a.create_label());
                    a.call(function)?;
                    a.jmp(behind)?;
                    a.set_label(&mut function)?;
                    a.push(registers[j])?;
                    a.mov(registers[i], registers[j])?;
                    a.pop(registers[j])?;
                    a.ret()?;
                    a.set_label(&mut behind)?;
                }
                0 => a.cmp(registers[i], registers[j])?,
                1 => a.cmp(narrow[i], imm)?,
                2 => a.test(registers[i], registers[j])?,
                3 => a.sub(registers[i], imm)?,
                4 => a.and(narrow[i], narrow[j])?,
                5 => a.dec(narrow[i])?,
                6 => a.inc(registers[i])?,
                7 => a.cmp(dword_ptr(rsi + imm * 64), narrow[j])?,
                8 => a.cmp(registers[i], qword_ptr(rsi + imm * 64))?,
                9 => a.test(byte_ptr(rsi + imm * 64), imm)?,
                10 => a.add(qword_ptr(rsi + imm * 64), registers[j])?,
                _ => a.endbr64()?,
            }
            let mut over = a.create_label();
            match next(18) {
                0 => a.jb(over)?,
                1 => a.jae(over)?,
                2 => a.je(over)?,
                3 => a.jne(over)?,
                4 => a.jbe(over)?,
                5 => a.ja(over)?,
                6 => a.js(over)?,
                7 => a.jns(over)?,
                8 => a.jl(over)?,
                9 => a.jge(over)?,
                10 => a.jle(over)?,
                11 => a.jg(over)?,
                12 => a.jp(over)?,
                13 => a.jmp(over)?,
                _ => continue,
            }
            a.adc(registers[j], imm)?;
            a.nop()?;
            a.set_label(&mut over)?;
            a.rol(registers[i], 7)?;
        }
        a.dec(r15)?;
        a.jnz(top)?;
        a.db(&[0x0f, 0x37])
    }

    fn end_of(seed: u64, run: impl Fn(&mut Machine) -> Exit) -> (Regs, u64, [u8; 4096]) {
        let mut machine = Machine::new_64bit(|a| program(a, seed).expect("encodable"));
        let exit = run(&mut machine);
        assert!(matches!(exit, Exit::Unimplemented { .. }), "{exit:?}");
        (machine.cpu.regs(), machine.cpu.instructions(), machine.read(0x20_0800))
    }

    #[test]
    fn traces_do_what_single_instructions_do() {
        for seed in 0..40 {
            let traced = end_of(seed, |machine| machine.cpu.run());
            let stepped = end_of(seed, |machine| {
                loop {
                    if let Some(exit) = machine.cpu.step() {
                        return exit;
                    }
                }
            });
            assert_eq!(traced, stepped, "seed {seed}");
        }
    }
}
