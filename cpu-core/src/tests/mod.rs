//! Behaviour of the whole CPU that no single module owns.

mod coherence;
mod control_words;
