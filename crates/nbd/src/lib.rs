//! The NBD protocol: a pure codec, a client and a server.
//!
//! The primary reads a cycle's fixed moment through the [`Client`] (several connections make a [`Pool`]);
//! [`dirty_extents`] says what changed and [`read_plan`] how to read it. The replica shows points, and the
//! failover disks, through the server.
//!
//! What holds:
//! - The other side is not trusted. Every length is checked before anything is allocated, no bytes make
//!   it panic, and a reply that does not fit its request ends the connection with
//!   [`ErrorKind::Protocol`].
//! - A read is whole or an error: chunks that leave a gap, overlap or lie outside are never handed on.
//! - What a client can hold of our server is bounded ([`Limits`]), and it holds nothing once it is gone. When
//!   an export has been removed, nothing touches its disk any more.
//! - When a server dies, every request in flight and every later one fails at once, with the reason.
//!
//! What it does not do: TLS (both sides take any stream, so it can be put underneath), extended headers,
//! the oldest negotiation, reconnecting (who reads a fixed moment has to know that it is still the same).

pub mod codec;

mod client;
mod dirty;
mod disk;
mod error;
mod plan;
mod server;

pub use client::{Client, Pool};
pub use codec::{BlockSizes, Errno, ExportFlags, StatusExtent};
pub use dirty::{BASE_ALLOCATION, DirtyExtent, DirtyScan, dirty_extents};
pub use disk::{CowDisk, Disk, FileDisk};
pub use error::{Error, ErrorKind, Result};
pub use plan::{ReadRequest, read_plan};
pub use server::{Limits, Server};
