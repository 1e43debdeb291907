//! What the core's rows cover of what the decoder knows: by family, by extension, and the vectors that prove them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use iced_x86::{Code, CpuidFeature, Mnemonic};
use x86_defs::cpuid::Feature;

use crate::generate;
use crate::record::{PER_MNEMONIC, file_stem};

/// The rows of one module of the core.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Family {
    /// The module's name.
    pub name: &'static str,
    /// Mnemonics that it has rows for.
    pub mnemonics: usize,
    /// Encodings of them.
    pub encodings: usize,
    /// Vectors of these mnemonics.
    pub vectors: usize,
}

/// The encodings that the decoder puts under one feature.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Extension {
    /// The decoder's name for it.
    pub name: String,
    /// Name of the CPUID bit that offers it, if one does.
    pub bit: Option<&'static str>,
    /// Guests are told of that bit.
    pub offered: bool,
    /// Encodings that a guest without a further feature may use.
    pub encodings: usize,
    /// Those of them that have no row.
    pub missing: Vec<String>,
}

/// A mnemonic that the core executes.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Row {
    /// In lower case, as its vector file is called.
    pub mnemonic: String,
    /// Vectors in that file, struck-out ones not counted.
    pub vectors: usize,
    /// Why there are fewer than [`PER_MNEMONIC`].
    pub exception: Option<&'static str>,
}

/// All of it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Report {
    /// In the core's order.
    pub families: Vec<Family>,
    /// In the decoder's order.
    pub extensions: Vec<Extension>,
    /// By mnemonic.
    pub rows: Vec<Row>,
}

/// Mnemonics that have fewer vectors than others, or none, beyond those that the generator leaves out, and why.
const FEW: &[(Mnemonic, &str)] = {
    use Mnemonic as M;
    const MPX: &str = "a reserved no-op to the decoder, which has vectors";
    const XSAVE: &str = "XCR0 and what is in use are the kernel's: tested in the core";
    const NO_HOST: &str = "no CPU to record it on: tested in the core";
    &[
        (M::Bndcl, MPX),
        (M::Bndcn, MPX),
        (M::Bndcu, MPX),
        (M::Bndldx, MPX),
        (M::Bndmk, MPX),
        (M::Bndmov, MPX),
        (M::Bndstx, MPX),
        (M::Gf2p8affineinvqb, NO_HOST),
        (M::Gf2p8affineqb, NO_HOST),
        (M::Gf2p8mulb, NO_HOST),
        (M::Movdiri, NO_HOST),
        (M::Movdir64b, NO_HOST),
        (M::Rdpkru, NO_HOST),
        (M::Wrpkru, NO_HOST),
        (M::Serialize, NO_HOST),
        (M::Rdsspd, "reads what CET's state says where the kernel has CET on, and is a no-op elsewhere"),
        (M::Rdsspq, "reads what CET's state says where the kernel has CET on, and is a no-op elsewhere"),
        (M::Vgf2p8affineinvqb, NO_HOST),
        (M::Vgf2p8affineqb, NO_HOST),
        (M::Vgf2p8mulb, NO_HOST),
        (M::Vmcall, "the hypervisor answers"),
        (M::Vmmcall, "the hypervisor answers"),
        (M::Xgetbv, XSAVE),
        (M::Xrstor, XSAVE),
        (M::Xrstor64, XSAVE),
        (M::Xsave, XSAVE),
        (M::Xsave64, XSAVE),
        (M::Xsavec, XSAVE),
        (M::Xsavec64, XSAVE),
        (M::Xsaveopt, XSAVE),
        (M::Xsaveopt64, XSAVE),
    ]
};

/// Encodings that an offered feature does not promise.
const FOREIGN: &[Code] = &[
    // Only the 8087 has these.
    Code::Feni,
    Code::Fdisi,
    // The 287XL's.
    Code::Fstdw_AX,
    Code::Fstsg_AX,
];

/// Features that are executed and not offered, and why.
const HIDDEN: &[(CpuidFeature, &str)] = &[
    (CpuidFeature::MONITOR, "no-ops for guests that are told of it, as in Linux"),
    (CpuidFeature::CET_IBT, "markers: the bit promises CR4.CET and its MSRs too"),
    (CpuidFeature::MPX, "no-ops: the bit promises bound registers too"),
    (CpuidFeature::PREFETCHWT1, "a hint that one line of processors had"),
    (CpuidFeature::PREFETCHITI, "hints: the bit stands in a sub-leaf that is not offered"),
];

impl Report {
    /// The core as it is. `offered`: the CPUID bits that guests are told of; `vectors`: the directory of the vector files.
    pub fn new(offered: &[Feature], vectors: &Path) -> std::io::Result<Self> {
        let counts = count_vectors(vectors)?;
        let count = |mnemonic: Mnemonic| {
            let stem = file_stem(mnemonic);
            [format!("{stem}.evex"), stem].iter().filter_map(|stem| counts.get(stem)).sum::<usize>()
        };
        let families = cpu_core::families().map(|(name, encodings)| {
            let mnemonics: BTreeSet<Mnemonic> = encodings.iter().map(|code| code.mnemonic()).collect();
            let vectors = mnemonics.iter().copied().map(count).sum();
            Family { name, mnemonics: mnemonics.len(), encodings: encodings.len(), vectors }
        });
        let executed: BTreeSet<Mnemonic> =
            Code::values().filter(|code| cpu_core::is_implemented(*code)).map(Code::mnemonic).collect();
        let rows = executed.into_iter().map(|mnemonic| {
            let vectors = count(mnemonic);
            let exception = if vectors < PER_MNEMONIC { exception(mnemonic) } else { None };
            Row { mnemonic: file_stem(mnemonic), vectors, exception }
        });
        Ok(Self { families: families.collect(), extensions: extensions(offered), rows: rows.collect() })
    }

    /// What must not be: a line each.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for extension in &self.extensions {
            let Extension { name, bit, missing, .. } = extension;
            match (extension.offered, bit, missing.is_empty()) {
                (true, _, false) => problems.push(format!("{name} is offered without {}", missing.join(", "))),
                (false, Some(bit), true) if extension.encodings != 0 && !is_hidden(name) => {
                    problems.push(format!("{name} is all there, and {bit} is not offered"));
                }
                _ => {}
            }
        }
        for row in self.rows.iter().filter(|row| row.vectors < PER_MNEMONIC && row.exception.is_none()) {
            problems.push(format!("{} has {} vectors, fewer than {PER_MNEMONIC}", row.mnemonic, row.vectors));
        }
        problems
    }

    /// Tables for a reader.
    pub fn text(&self) -> String {
        let mut out = format!("{:<18} {:>9} {:>9} {:>9}\n", "family", "mnemonics", "encodings", "vectors");
        for Family { name, mnemonics, encodings, vectors } in &self.families {
            let _ = writeln!(out, "{name:<18} {mnemonics:>9} {encodings:>9} {vectors:>9}");
        }
        let _ = writeln!(
            out,
            "\n{:<20} {:<20} {:<8} {:>9} {:>8}",
            "extension", "CPUID bit", "offered", "encodings", "missing"
        );
        for Extension { name, bit, offered, encodings, missing } in &self.extensions {
            let offered = if *offered { "yes" } else { "no" };
            let bit = bit.unwrap_or("-");
            let _ = writeln!(out, "{name:<20} {bit:<20} {offered:<8} {encodings:>9} {:>8}", missing.len());
        }
        out.push_str("\nfewer vectors than others:\n");
        for row in self.rows.iter().filter(|row| row.vectors < PER_MNEMONIC) {
            let reason = row.exception.unwrap_or("NO REASON");
            let _ = writeln!(out, "{:<18} {:>4}  {reason}", row.mnemonic, row.vectors);
        }
        let total: usize = self.rows.iter().map(|row| row.vectors).sum();
        let _ = writeln!(out, "\n{} mnemonics, {total} vectors", self.rows.len());
        out
    }
}

fn is_hidden(name: &str) -> bool {
    HIDDEN.iter().any(|(feature, _)| format!("{feature:?}") == name)
}

/// Why a mnemonic has fewer vectors than others.
fn exception(mnemonic: Mnemonic) -> Option<&'static str> {
    let listed = |list: &[(Mnemonic, &'static str)]| list.iter().find(|row| row.0 == mnemonic).map(|row| row.1);
    let executed: Vec<Code> =
        Code::values().filter(|code| code.mnemonic() == mnemonic && cpu_core::is_implemented(*code)).collect();
    let all = |what: fn(Code) -> bool| executed.iter().all(|code| what(*code));
    listed(FEW).or_else(|| listed(generate::EXCLUDED)).or(if all(|code| code.op_code().is_privileged()) {
        Some("privileged: tested in the core")
    } else if all(|code| code.op_code().fwait()) {
        Some("two instructions, WAIT first, and both have vectors")
    } else {
        None
    })
}

/// Vectors by file stem.
fn count_vectors(directory: &Path) -> std::io::Result<BTreeMap<String, usize>> {
    let mut counts = BTreeMap::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let Some(stem) = path.file_stem().and_then(|stem| stem.to_str()) else { continue };
        let text = std::fs::read_to_string(&path)?;
        let is_vector = |line: &&str| !line.is_empty() && !line.starts_with(['#', '-']);
        counts.insert(stem.to_owned(), text.lines().filter(is_vector).count());
    }
    Ok(counts)
}

/// Every feature of the decoder's that some encoding has.
fn extensions(offered: &[Feature]) -> Vec<Extension> {
    let bit_of =
        |wanted: CpuidFeature| cpu_core::FEATURES.iter().find(|(feature, _)| *feature == wanted).map(|(_, bit)| *bit);
    let is_promised =
        |code: &Code| !FOREIGN.contains(code) && !code.op_code().fwait() && code.op_code().is_instruction();
    CpuidFeature::values()
        .filter_map(|feature| {
            let bit = bit_of(feature);
            let encodings: Vec<Code> = Code::values()
                .filter(|code| is_promised(code) && code.cpuid_features().contains(&feature))
                // Those that need another feature too stand under that one.
                .filter(|code| {
                    let mut others = code.cpuid_features().iter().filter(|other| **other != feature);
                    others.all(|other| bit_of(*other).is_none_or(|bit| offered.contains(&bit)))
                })
                .collect();
            let missing = encodings.iter().filter(|code| !cpu_core::is_implemented(**code));
            let extension = Extension {
                name: format!("{feature:?}"),
                bit: bit.map(|bit| bit.name),
                offered: bit.is_some_and(|bit| offered.contains(&bit)),
                encodings: encodings.len(),
                missing: missing.map(|code| format!("{code:?}")).collect(),
            };
            (!encodings.is_empty()).then_some(extension)
        })
        .collect()
}
