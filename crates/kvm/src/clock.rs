//! Time by the host's time-stamp counter: an exit reads it five times, and the system's clock takes some 25 ns more each time. To
//! 10 ppm, and only as good as the counters of two CPUs agree: for what decides how something is done, never what.

use std::time::Duration;

use crate::machine::{host_tsc, host_tsc_khz};

/// Counts now; never 0.
pub fn now() -> u64 {
    host_tsc().max(1)
}

/// Counts that `time` takes, rounded down. Hours at most.
pub fn counts(time: Duration) -> u64 {
    time.as_nanos() as u64 / 1_000 * u64::from(host_tsc_khz()) / 1_000
}

/// What `counts` take, ns.
pub fn nanoseconds(counts: u64) -> u64 {
    (u128::from(counts) * 1_000_000 / u128::from(host_tsc_khz().max(1))) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn agrees_with_the_systems_clock() {
        // The system's clock around the counter and inside: a thread may lose its CPU between any two of these.
        let around = Instant::now();
        let before = now();
        let inside = Instant::now();
        std::thread::sleep(Duration::from_millis(50));
        let least = inside.elapsed();
        let by_counter = Duration::from_nanos(nanoseconds(now() - before));
        let most = around.elapsed();
        let range = least.mul_f64(0.999)..=most.mul_f64(1.001);
        assert!(range.contains(&by_counter), "{by_counter:?} is not in {range:?}");
        let second = nanoseconds(counts(Duration::from_secs(1)));
        assert!(second.abs_diff(1_000_000_000) < 1_000, "{second} ns");
    }
}
