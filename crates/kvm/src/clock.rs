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
        let (before, began) = (now(), Instant::now());
        std::thread::sleep(Duration::from_millis(50));
        let (by_counter, by_system) = (nanoseconds(now() - before), began.elapsed().as_nanos() as u64);
        assert!(by_counter.abs_diff(by_system) < by_system / 10, "{by_counter} and {by_system} ns");
        let second = nanoseconds(counts(Duration::from_secs(1)));
        assert!(second.abs_diff(1_000_000_000) < 1_000, "{second} ns");
    }
}
