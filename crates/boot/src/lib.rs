//! Boots the disks of a recovery point or of a backup in a QEMU that nothing gets out of, and waits for a sign that the
//! guest lives: the proof that a replica is more than bytes that compare equal.
//!
//! ```text
//! what QEMU told of the VM ─▶ Machine ─┐
//! what this site's owner says ─▶ Local ─┴─▶ command line ─▶ QEMU ─▶ sign of life? ─▶ Evidence (time, console, PNG)
//! ```
//!
//! * A VM's definition comes from another site: nothing of it but numbers and names of known devices gets into a
//!   command line. Whatever else a VM needs to boot is named by this site's owner, in [`Local`].
//! * The guest has no network, unless its sign of life is a TCP port; then it reaches nothing but the forwarded port.
//! * Disks are NBD exports with a writable layer: what the guest writes is gone with them.
//!
//! What it does not do: show disks over NBD, or keep what it has found (both is `site`).

mod accelerator;
mod command;
mod console;
mod error;
mod machine;
mod run;
mod sign;

pub use crate::accelerator::{Accelerator, works as kvm_works};
pub use crate::command::{BootDisk, Local, Order};
pub use crate::error::Error;
pub use crate::machine::{Bus, Firmware, Kind, Machine, boot_rank};
pub use crate::run::{Evidence, Instance, boot, end_leftover};
pub use crate::sign::SignOfLife;
