//! Arbitrary guests: the input's beginning decides about registers and tables, the rest is code. `cargo xtask fuzz guest`.
#![no_main]

#[path = "../../tests/noise/mod.rs"]
mod noise;

use libfuzzer_sys::fuzz_target;
use noise::{Guest, Noise};

/// Bytes that decide.
const DECISIONS: usize = 256;
/// How often a guest is asked whether it has had enough: each time after some ten thousand instructions at most.
const STRETCHES: u32 = 3;

fuzz_target!(|input: &[u8]| {
    let (decisions, code) = input.split_at(input.len().min(DECISIONS));
    let mut guest = Guest::new(Noise::new(decisions, input.len() as u64), code);
    let mut left = STRETCHES;
    guest.run(&mut || {
        left -= 1;
        left == 0
    });
    assert!(guest.stayed_inside());
});
