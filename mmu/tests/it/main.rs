//! Tests of the public interface, by chapter of what it promises.

mod common;
mod fuzz;
mod paging_flags;
mod paging_formats;
mod paging_rights;
mod quiesce;
mod ring;
mod sigbus;
mod slots;
mod tlb;
