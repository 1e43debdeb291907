//! Whole-system tests: harness as the library, cases beside it.
