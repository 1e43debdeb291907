//! Runs single instructions on the host CPU in a sandboxed child, records vectors, fuzzes the interpreter against it.

pub mod compare;
pub mod coverage;
pub mod fuzz;
pub mod generate;
pub mod host;
pub mod interpreter;
pub mod layout;
pub mod record;
mod segments;
pub mod state;
mod stop;
pub mod vector;
pub mod vendor;

pub use stop::decode;
