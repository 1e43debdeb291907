//! Guests that are noise. Whatever happens, the CPU comes back when it is called, nothing panics, and no byte outside of the
//! VM's slot changes.

mod noise;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use noise::{Guest, Noise};

/// How long a CPU may take to come back once it has been kicked; far above what a loaded machine needs.
const PATIENCE: Duration = Duration::from_secs(20);
/// What a guest gets.
const TIME: Duration = Duration::from_millis(20);

/// One guest: made from `seed`, run for some of its exits. How many instructions that were.
fn run(seed: u64) -> u64 {
    let mut guest = Guest::new(Noise::new(&[], seed), &[]);
    let kick = guest.cpu.kicker();
    let back = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let start = Instant::now();
            while !back.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_micros(500));
                kick.kick();
                if start.elapsed() > PATIENCE {
                    // The thread that hangs cannot be made to unwind.
                    eprintln!("SOFTKVM_FUZZ_SEED={seed:#x}: the CPU does not come back");
                    std::process::exit(101);
                }
            }
        });
        let start = Instant::now();
        guest.run(&mut || start.elapsed() > TIME);
        back.store(true, Ordering::Release);
    });
    assert!(guest.stayed_inside(), "seed {seed:#x}: a byte outside of the slot has changed");
    guest.cpu.instructions()
}

/// `SOFTKVM_TEST_LONG`: minutes instead of seconds. `SOFTKVM_FUZZ_SEED`: one guest only.
#[test]
fn noise_comes_back_and_stays_inside() {
    if let Ok(seed) = std::env::var("SOFTKVM_FUZZ_SEED") {
        run(u64::from_str_radix(seed.trim_start_matches("0x"), 16).expect("a hexadecimal seed"));
        return;
    }
    let long = std::env::var_os("SOFTKVM_TEST_LONG").is_some();
    let until = Instant::now() + Duration::from_secs(if long { 600 } else { 10 });
    let mut seed = if long { u64::from(std::process::id()) << 32 } else { 0 };
    let (mut guests, mut live) = (0u64, 0u64);
    while Instant::now() < until && (long || seed < 2000) {
        match std::panic::catch_unwind(|| run(seed)) {
            Ok(instructions) => (guests, live) = (guests + 1, live + u64::from(instructions >= 3)),
            Err(_) => panic!("SOFTKVM_FUZZ_SEED={seed:#x}"),
        }
        seed += 1;
    }
    assert!(live * 4 >= guests, "{live} of {guests} guests got to run");
}
