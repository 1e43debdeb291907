//! Vectors as text: one instruction per line, what differs from the default state before it, what it changed.
//!
//! ```text
//! # ADD · recorded on AuthenticAMD 1a-02-01, `cargo xtask record isa add` · …
//! 48 01 d8      rax=7fffffffffffffff rbx=1  =>  rax=8000000000000000 of=1 sf=1 zf=0 af=1 pf=1 cf=0
//! f0 48 01 d8                               =>  #UD
//! 32: 27        rax=9a                      =>  rax=0 …
//! ```
//!
//! Left: bytes, then state where it is not the default (a line that starts with `32:` or `16:` runs in compatibility mode).
//! Right: the exception if any, the flags that the instruction defines, and everything else that changed; what is not
//! named is unchanged, RIP is behind the instruction. Numbers are hexadecimal. `[address]=` gives memory bytes in order.
//! A line that starts with `-` is struck out; its reason follows in the next comment.

use std::fmt::Write as _;

use crate::compare::{defined_flags, end_text, parse_exception, undefined_flags};
use crate::decode;
use crate::layout::DATA_BASE;
use crate::state::{Case, End, GPR_NAMES, Mode, Outcome, SEG_NAMES, State, flag};
use crate::vendor::Vendor;

/// One line of a vector file.
#[derive(Clone, Debug)]
pub struct Vector {
    /// What is run.
    pub case: Case,
    /// What the oracle answered.
    pub expected: Outcome,
    /// Whose CPU it was.
    pub vendor: Vendor,
}

/// A line that is no vector.
#[derive(Debug, thiserror::Error)]
#[error("line {line}: {problem}: {token:?}")]
pub struct ParseError {
    /// Line number from 1.
    pub line: usize,
    /// What is wrong.
    pub problem: &'static str,
    /// Where.
    pub token: String,
}

/// Reads a vector file. A comment that names a vendor says whose CPU gave the vectors below it.
pub fn parse(text: &str) -> Result<Vec<Vector>, ParseError> {
    let mut vendor = Vendor::Intel;
    let mut vectors = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.is_empty() && !line.starts_with('-')) {
        if let Some(comment) = line.strip_prefix('#') {
            vendor = Vendor::named(comment).unwrap_or(vendor);
            continue;
        }
        let vector = parse_line(line, vendor);
        vectors.push(vector.map_err(|(problem, token)| ParseError { line: number + 1, problem, token })?);
    }
    Ok(vectors)
}

type LineError = (&'static str, String);

fn parse_line(line: &str, vendor: Vendor) -> Result<Vector, LineError> {
    let (left, right) = line.split_once("=>").ok_or(("no =>", line.to_owned()))?;
    let (mode, left) = match (left.strip_prefix("32:"), left.strip_prefix("16:")) {
        (Some(rest), _) => (Mode::Bits32, rest),
        (_, Some(rest)) => (Mode::Bits16, rest),
        _ => (Mode::Bits64, left),
    };
    let mut tokens = left.split_whitespace().peekable();
    let mut bytes = Vec::new();
    while let Some(token) = tokens.next_if(|token| token.len() == 2) {
        bytes.push(u8::from_str_radix(token, 16).map_err(|_| ("no byte", token.to_owned()))?);
    }
    let mut case = Case::in_mode(mode, &bytes);
    for token in tokens {
        assign(&mut case.state, token)?;
    }
    let mut expected = Outcome { end: End::Done, state: case.state.clone() };
    expected.state.rip += bytes.len() as u64;
    for token in right.split_whitespace() {
        if token.starts_with('#') {
            let exception = parse_exception(token).ok_or(("no exception", token.to_owned()))?;
            expected.end = End::Exception(exception);
            expected.state.rip = case.state.rip;
        } else {
            assign(&mut expected.state, token)?;
        }
    }
    Ok(Vector { case, expected, vendor })
}

fn assign(state: &mut State, token: &str) -> Result<(), LineError> {
    let fail = |problem| (problem, token.to_owned());
    let (name, value) = token.split_once('=').ok_or_else(|| fail("no ="))?;
    if let Some(address) = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')) {
        let address = u64::from_str_radix(address, 16).map_err(|_| fail("no address"))?;
        for (i, digits) in value.as_bytes().chunks(2).enumerate() {
            let digits = std::str::from_utf8(digits).map_err(|_| fail("no bytes"))?;
            let byte = u8::from_str_radix(digits, 16).map_err(|_| fail("no bytes"))?;
            let at = address.wrapping_sub(DATA_BASE) as usize + i;
            *state.memory.get_mut(at).ok_or_else(|| fail("outside the data pages"))? = byte;
        }
        return Ok(());
    }
    let value = u128::from_str_radix(value, 16).map_err(|_| fail("no number"))?;
    let register = |prefix: &str, count: usize| {
        name.strip_prefix(prefix).and_then(|number| number.parse::<usize>().ok()).filter(|number| *number < count)
    };
    if let Some(at) = GPR_NAMES.iter().position(|gpr| *gpr == name) {
        state.gpr[at] = value as u64;
    } else if let Some((_, bit)) = flag::NAMES.iter().find(|(flag, _)| *flag == name) {
        state.rflags = state.rflags & !bit | if value != 0 { *bit } else { 0 };
    } else if let Some(at) = SEG_NAMES.iter().position(|segment| *segment == name) {
        state.seg[at] = value as u16;
    } else if let Some(at) = register("xmm", 16) {
        state.ymm[at][0] = value;
    } else if let Some(at) = register("ymmh", 16) {
        state.ymm[at][1] = value;
    } else if let Some(at) = register("k", 8) {
        state.avx512.k[at] = value as u64;
    } else if let Some(lane) = zmm_lane(state, name) {
        *lane = value;
    } else if let Some(at) = register("st", 8) {
        state.x87.st[at] = value;
    } else {
        match name {
            "rip" => state.rip = value as u64,
            "fsbase" => state.fs_base = value as u64,
            "gsbase" => state.gs_base = value as u64,
            "mxcsr" => state.mxcsr = value as u32,
            "fcw" => state.x87.fcw = value as u16,
            "fsw" => state.x87.fsw = value as u16,
            "ftw" => state.x87.ftw = value as u8,
            _ => return Err(fail("unknown name")),
        }
    }
    Ok(())
}

/// `zmm3.2`: bits 383:256 of ZMM3. Of ZMM0 to 15 the lower two lanes are XMM's and YMM's.
fn zmm_lane<'a>(state: &'a mut State, name: &str) -> Option<&'a mut u128> {
    let (number, lane) = name.strip_prefix("zmm")?.split_once('.')?;
    let (number, lane): (usize, usize) = (number.parse().ok()?, lane.parse().ok()?);
    match number {
        0..16 => state.avx512.upper[number].get_mut(lane.checked_sub(2)?),
        16..32 => state.avx512.high[number - 16].get_mut(lane),
        _ => None,
    }
}

/// Writes a line.
pub fn line(vector: &Vector) -> String {
    let Vector { case, expected, .. } = vector;
    let mut left = String::new();
    let default = Case::in_mode(case.mode, &[]).state;
    if case.mode != Mode::Bits64 {
        let _ = write!(left, "{}: ", case.mode.bitness());
    }
    for (i, byte) in case.bytes.iter().enumerate() {
        let space = if i == 0 { "" } else { " " };
        let _ = write!(left, "{space}{byte:02x}");
    }
    left = format!("{left:<20}");
    changes(&mut left, &default, &case.state);
    let mut right = String::new();
    let instruction = decode(case);
    let mut from = case.state.clone();
    match expected.end {
        End::Done => from.rip += case.bytes.len() as u64,
        end => {
            let _ = write!(right, " {}", end_text(end));
        }
    }
    // Flags that it defines are shown whether or not they changed; those that it leaves undefined are not.
    let defined = if expected.end == End::Done { defined_flags(&instruction) & flag::STATUS } else { 0 };
    let open = if expected.end == End::Done { undefined_flags(&instruction) } else { 0 };
    from.rflags = from.rflags & !defined | !expected.state.rflags & defined;
    from.rflags = from.rflags & !open | expected.state.rflags & open;
    changes(&mut right, &from, &expected.state);
    format!("{left:<50} =>{right}").trim_end().to_owned()
}

/// Appends what distinguishes `to` from `from`. FOP, FIP and FDP are left out: vendors differ.
fn changes(out: &mut String, from: &State, to: &State) {
    let mut put = |name: &str, from: u128, to: u128| {
        if from != to {
            let _ = write!(out, " {name}={to:x}");
        }
    };
    for (at, name) in GPR_NAMES.iter().enumerate() {
        put(name, from.gpr[at].into(), to.gpr[at].into());
    }
    put("rip", from.rip.into(), to.rip.into());
    for (at, name) in SEG_NAMES.iter().enumerate() {
        put(name, from.seg[at].into(), to.seg[at].into());
    }
    put("fsbase", from.fs_base.into(), to.fs_base.into());
    put("gsbase", from.gs_base.into(), to.gs_base.into());
    put("fcw", from.x87.fcw.into(), to.x87.fcw.into());
    put("fsw", from.x87.fsw.into(), to.x87.fsw.into());
    put("ftw", from.x87.ftw.into(), to.x87.ftw.into());
    for at in 0..8 {
        put(&format!("st{at}"), from.x87.st[at], to.x87.st[at]);
    }
    put("mxcsr", from.mxcsr.into(), to.mxcsr.into());
    for at in 0..16 {
        put(&format!("xmm{at}"), from.ymm[at][0], to.ymm[at][0]);
        put(&format!("ymmh{at}"), from.ymm[at][1], to.ymm[at][1]);
    }
    if from.avx512 != to.avx512 {
        for at in 0..16 {
            for lane in 0..2 {
                let name = format!("zmm{at}.{}", lane + 2);
                put(&name, from.avx512.upper[at][lane], to.avx512.upper[at][lane]);
            }
        }
        for at in 0..16 {
            for lane in 0..4 {
                put(&format!("zmm{}.{lane}", at + 16), from.avx512.high[at][lane], to.avx512.high[at][lane]);
            }
        }
        for at in 0..8 {
            put(&format!("k{at}"), from.avx512.k[at].into(), to.avx512.k[at].into());
        }
    }
    for (name, bit) in flag::NAMES {
        put(name, (from.rflags & bit != 0).into(), (to.rflags & bit != 0).into());
    }
    memory_changes(out, &from.memory[..], &to.memory[..]);
}

/// Runs of changed bytes; a gap of up to three unchanged ones is cheaper to repeat than to skip.
fn memory_changes(out: &mut String, from: &[u8], to: &[u8]) {
    let differs: Vec<usize> = (0..to.len()).filter(|i| from[*i] != to[*i]).collect();
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for at in differs {
        match runs.last_mut() {
            Some((_, end)) if at <= *end + 3 => *end = at + 1,
            _ => runs.push((at, at + 1)),
        }
    }
    for (start, end) in runs {
        let _ = write!(out, " [{:x}]=", DATA_BASE + start as u64);
        for byte in &to[start..end] {
            let _ = write!(out, "{byte:02x}");
        }
    }
}
