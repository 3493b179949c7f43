//! A file system that loses what was not synced, for crash tests.
//!
//! It is mounted by FUSE over a backing folder and passes everything on at once, so that programs run on it as
//! they do anywhere. Beside that it remembers what a disk would still have: for each block written since the
//! file's last `fsync` the bytes from before (`unsynced`), for each name made, removed or renamed since the
//! folder's last `fsync` how it was (`names`). [`Mount::lose_power`] takes a part of that back, chosen by a
//! seed, and the backing folder is what a machine finds after a power cut. A program that was killed without
//! a power cut finds everything it had written, as on any other file system.
//!
//! What it is strict about, because POSIX promises no more: an `fsync` of a file does not make its name
//! durable; an `fsync` of a folder does not make the folder's own name durable; a rename or a length can be
//! durable without the bytes. What it takes for granted, because every journal gives it: one change of a name
//! is whole or absent, a rename too; a change never outlives one to the same name that it rests on.
//!
//! What it does not do: hard links, symbolic links, extended attributes; several versions of one block
//! between two syncs (it is the old one, the newest, or torn from both).

mod chance;
mod faults;
mod fs;
mod mount;
mod names;
mod shared;
mod tree;
mod unsynced;

pub use faults::Faults;
pub use mount::{Lost, Mount};
