//! Records vectors: cases of every encoding of a mnemonic, and what the host CPU made of them.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use iced_x86::{Code, EncodingKind, Mnemonic};

use crate::compare::differences;
use crate::generate::{self, Breadth, Generator};
use crate::host::{Error, Oracle};
use crate::state::{Case, End, Mode};
use crate::vector::{self, Vector};
use crate::vendor::Vendor;
use crate::{decode, vendor};

/// Vectors of each encoding.
const PER_FORM: usize = 11;
/// Vectors of a mnemonic at least; [`crate::coverage`] names those that have no fifty cases, and why.
pub const PER_MNEMONIC: usize = 50;

/// Mnemonics that have vectors, with their encodings.
pub fn mnemonics() -> BTreeMap<String, Vec<(Code, Mode)>> {
    let mut found: BTreeMap<String, Vec<(Code, Mode)>> = BTreeMap::new();
    let mut put = |mode: Mode, keep: &dyn Fn(Code) -> bool| {
        for code in generate::all(mode, keep) {
            found.entry(stem_of(code)).or_default().push((code, mode));
        }
    };
    put(Mode::Bits64, &|_| true);
    // Compatibility mode for what 64-bit mode has not, and for what vendors do not agree on there.
    put(Mode::Bits32, &|code| !generate::is_tested(code, Mode::Bits64) || matches!(code, Code::Iretw | Code::Retfw));
    put(Mode::Bits16, &|code| code.op_code().address_size() == 16);
    found
}

/// Stem of the file with vectors of `code`: EVEX encodings, most of which share their mnemonic, have a file beside it.
pub fn stem_of(code: Code) -> String {
    let evex = code.op_code().encoding() == EncodingKind::EVEX;
    format!("{}{}", file_stem(code.mnemonic()), if evex { ".evex" } else { "" })
}

/// `add` for ADD.
pub fn file_stem(mnemonic: Mnemonic) -> String {
    format!("{mnemonic:?}").to_lowercase()
}

/// The text of one vector file.
pub fn record(oracle: &mut Oracle, stem: &str, forms: &[(Code, Mode)]) -> Result<String, Error> {
    let seed = stem.bytes().fold(0u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
    let mut generator = Generator::new(seed, Breadth::Used);
    let mut lines = String::new();
    let mut cases: Vec<Vec<Case>> = vec![Vec::new(); forms.len()];
    let mut per_form = PER_FORM.max(PER_MNEMONIC.div_ceil(forms.len()));
    let mut written = 0;
    // Some forms give fewer than others: further rounds make up for them, as long as they give any.
    loop {
        let before = written;
        for ((code, mode), cases) in forms.iter().zip(&mut cases) {
            let known = cases.len();
            add_distinct(&mut generator, *code, *mode, per_form, cases);
            written += write(oracle, &cases[known..], &mut lines)?;
        }
        if written >= PER_MNEMONIC || written == before {
            break;
        }
        per_form += (PER_MNEMONIC - written).div_ceil(forms.len());
    }
    Ok(format!("{}{lines}", header(stem, forms)))
}

/// Runs `cases` and writes the lines of those that can be compared; how many these are.
fn write(oracle: &mut Oracle, cases: &[Case], lines: &mut String) -> Result<usize, Error> {
    let mut written = 0;
    for (case, outcome) in cases.iter().zip(oracle.run(cases)?) {
        if matches!(outcome.end, End::Lost(_)) {
            continue;
        }
        let vector = Vector { case: case.clone(), expected: outcome, vendor: Vendor::host() };
        let line = vector::line(&vector);
        let read_back = vector::parse(&line).expect("a written line is a line");
        let lost = differences(vector.vendor, case, &vector.expected, &read_back[0].expected);
        assert!(lost.is_empty(), "the format keeps what is compared: {line}: {lost:?}");
        let _ = writeln!(lines, "{line}");
        written += 1;
    }
    Ok(written)
}

fn header(stem: &str, forms: &[(Code, Mode)]) -> String {
    let mut out = format!(
        "# {} · recorded on {}, `cargo xtask record isa {stem}` · undefined flags are masked by the decoder's own fact\n",
        stem.to_uppercase(),
        host_cpu()
    );
    if let Some((code, _)) = forms.first() {
        for note in vendor::notes(code.mnemonic()) {
            let _ = writeln!(out, "# vendor: {note}");
        }
        if vendor::is_approximate(code.mnemonic()) {
            let _ =
                writeln!(out, "# vendor: the last bits differ from CPU to CPU: compared on the CPU named above only");
        }
    }
    out
}

/// Adds cases of `code` until there are `count`, no two alike. Fewer where the encoding has fewer.
fn add_distinct(generator: &mut Generator, code: Code, mode: Mode, count: usize, cases: &mut Vec<Case>) {
    for _ in 0..count * 200 {
        if cases.len() >= count {
            break;
        }
        let Some(case) = generator.case(code, mode) else { continue };
        let new = |other: &Case| other.bytes != case.bytes || other.state != case.state;
        if decode(&case).code() == code && cases.iter().all(new) {
            cases.push(case);
        }
    }
}

/// `AuthenticAMD 1a-02-01`: vendor, family, model, stepping of the CPU this runs on.
pub fn host_cpu() -> String {
    use std::arch::x86_64::__cpuid;
    let leaf = __cpuid(0);
    let vendor: Vec<u8> = [leaf.ebx, leaf.edx, leaf.ecx].iter().flat_map(|word| word.to_le_bytes()).collect();
    let eax = __cpuid(1).eax;
    let base_family = eax >> 8 & 0xf;
    let family = if base_family == 0xf { base_family + (eax >> 20 & 0xff) } else { base_family };
    let model = if matches!(base_family, 6 | 0xf) { eax >> 12 & 0xf0 | eax >> 4 & 0xf } else { eax >> 4 & 0xf };
    format!("{} {family:02x}-{model:02x}-{:02x}", String::from_utf8_lossy(&vendor), eax & 0xf)
}
