//! End to end: real processes, real disks, real kills. The tests are in `tests/`; what they are made of is `rig`.
//!
//! Beside them, here: the [`oracle`] that judges recovery points and backups by a record of the guest's writes
//! that is not ours, the [`foreign`] programs that read and write what we show, and an
//! [`exerciser`] of files.

pub mod exerciser;
pub mod foreign;
pub mod oracle;
