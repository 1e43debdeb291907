//! Comparisons and micro-benchmarks.
