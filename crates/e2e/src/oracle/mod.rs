//! Judges what disks show by QEMU's own record of what was written to them.
//!
//! QEMU's driver `blklogwrites`, put below a VM's disk, writes down every write, write of zeros, discard and
//! flush that reaches it, in their order ([`WriteLog`]). Replaying it gives every state that the disk went
//! through ([`Prefixes`]): a recovery point or a backup is right if it is one of them. Over several disks it is
//! right if one moment gives all of them; which moments there were is known where the guest had one write
//! outstanding at any time, from the order in which it made them ([`CommonOrder`]).
//!
//! Nothing of the product takes part in it: no format, no checksum, no reader.

mod dice;
mod guest;
mod image;
mod order;
mod prefixes;
mod write_log;

pub use dice::Dice;
pub use guest::{Act, Guest, Step};
pub use image::Image;
pub use order::CommonOrder;
pub use prefixes::{Closest, Prefixes};
pub use write_log::{Entry, Kind, WriteLog};

/// The unit in which `blklogwrites` records and disks are compared.
pub const SECTOR_BYTES: u64 = 512;
