//! Boots the disks of a recovery point or of a backup in a QEMU that nothing gets out of, and waits for a sign that the
//! guest lives: the proof that a replica is more than bytes that compare equal. And starts a VM that was failed over, for
//! it to go on running here by itself ([`Live`]).
//!
//! ```text
//! what QEMU told of the VM ─▶ Machine ─┐
//! what this site's owner says ─▶ Local ─┴─▶ command line ─▶ QEMU ─▶ sign of life? ─▶ Evidence (time, console, PNG)
//! ```
//!
//! * A VM's definition comes from another site: nothing of it but numbers and names of known devices gets into a
//!   command line. Whatever else a VM needs to boot is named by this site's owner, in [`Local`].
//! * A guest that is booted for a look has no network, unless its sign of life is a TCP port; then it reaches nothing but the forwarded port.
//! * Its disks are NBD exports with a writable layer: what it writes is gone with them.
//! * A VM that goes on running gets the files of a failover, and only the networks that this site's owner gives it.
//!
//! What it does not do: show disks over NBD, or keep what it has found (both is `site`).

mod accelerator;
mod address;
mod command;
mod console;
mod error;
mod live;
mod machine;
mod network;
mod run;
mod sign;

pub use crate::accelerator::{Accelerator, works as kvm_works};
pub use crate::address::{Cidr, GuestSystem, IpSettings};
pub use crate::command::{BootDisk, Local, Order};
pub use crate::error::Error;
pub use crate::live::{Cabled, Live, LiveDisk, LiveOrder};
pub use crate::machine::{Bus, Firmware, Kind, Machine, boot_rank};
pub use crate::network::{Connection, Mac, NetworkMap, Nic, NicModel, connection};
pub use crate::run::{Evidence, Instance, boot, end_leftover};
pub use crate::sign::SignOfLife;
