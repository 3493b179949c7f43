//! A writer whose every state can be recognised.
//!
//! A [`Script`] is an endless sequence of numbered writes over the disks of a VM, made by a seed. A
//! writer that performs them one after the other, never with two outstanding, takes the disks through
//! states 0, 1, 2, ... Each data block names the write that put it there, so [`Checker`] can tell
//! from the disks alone which state they show, or that they show none: a torn write, a lost one, or
//! disks from two different moments.
//!
//! That is the prefix property: crash consistency over all disks together. The crate is pure; who
//! writes and reads is the caller's matter.

mod check;
mod script;

pub use check::{Checker, Violation};
pub use script::{Action, Random, Region, Script, Write};

/// Writes are whole blocks of this many bytes.
pub const BLOCK_BYTES: u64 = 4096;
