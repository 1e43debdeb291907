//! The softkvm program: command line, CUSE and FUSE front ends, memory and fd sharing with clients.

pub mod claim;
pub mod cli;
pub mod client;
pub mod daemon;
pub mod documents;
pub mod exit;
pub mod file;
pub mod front;
pub mod manager;
pub mod objects;
pub mod place;
pub mod profile;
pub mod run;
pub mod status;
pub mod sys;
