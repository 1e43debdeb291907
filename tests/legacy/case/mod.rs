//! What the guests must do, and what the VMM must see.

pub(crate) mod display;
pub(crate) mod endless;
pub(crate) mod guests;
pub(crate) mod header;
pub(crate) mod locked;
pub(crate) mod reset;
pub(crate) mod signals;
pub(crate) mod smp;

/// `ensure!` for two values that must be the same, and says both if they are not.
macro_rules! same {
    ($found:expr, $expected:expr, $($what:tt)+) => {{
        let (found, expected) = (&$found, &$expected);
        anyhow::ensure!(found == expected, "{}: {found:x?} is not {expected:x?}", format!($($what)+));
    }};
}
pub(crate) use same;
