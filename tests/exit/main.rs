//! How guests leave guest mode, seen by a VMM of our own.

mod coalesced;
mod ends;
mod profile;
mod resample;
