//! QEMU as Afterimage sees it: its monitor (QMP), dirty bitmaps, one moment fixed over all disks, and the
//! guest agent.
//!
//! [`Vm`] drives QEMU ≥ 7.2 and `qemu-storage-daemon` alike, by their QMP socket alone or through [`libvirt`]. What
//! holds:
//!
//! * Everything made in QEMU carries the VM's own prefix ([`Names`]), so that leftovers of a run that was
//!   killed are recognised and removed, and nothing of anybody else is ever touched.
//! * Bitmap *k* holds every change since the moment of log *k*. At each instant, over any failure between
//!   any two commands, the bitmaps that exist hold at least the changes since the last acknowledged
//!   moment, or [`Vm::inspect`] says that they do not.
//! * A [`Capture`] that is dropped, cancelled or that failed half-way takes itself out of QEMU.
//! * Every wait has a limit and every line that is read a bound.
//!
//! ```text
//!                      guest writes
//!                           │
//!  filter (copy-before-write, the job's) ──before-images──▶ overlay (qcow2, scratch file)
//!                           │                                  │ backing      ▲
//!                      disk's node ◀───────────────────────────┘              └── NBD export, with bitmap `base`
//!                      bitmaps: `base` (frozen), `next` (recording)
//! ```
//!
//! What it does not do: read the data (that is `nbd` and `primary`), decide what a cycle does (`model`).

mod agent;
mod ahead;
mod bitmaps;
mod capture;
mod definition;
mod dialogue;
mod disks;
mod error;
mod freeze;
mod graph;
pub mod libvirt;
mod lines;
mod meeting;
mod names;
mod nbd_server;
mod others;
mod power;
mod qmp;
mod relocate;
mod rest;
mod scratch;
mod sweep;
mod vm;

pub use crate::agent::{AgentAddress, AgentError, GuestAgent, thaw_if_frozen};
pub use crate::ahead::Ahead;
pub use crate::capture::{Capture, CaptureRequest, CapturedDisk, Timings};
pub use crate::disks::{Disk, Image};
pub use crate::error::{Error, ErrorClass};
pub use crate::freeze::{Freeze, FreezeLimits};
pub use crate::graph::Bitmap;
pub use crate::libvirt::DomainAddress;
pub use crate::meeting::{Meeting, Seat};
pub use crate::names::Names;
pub use crate::qmp::{Command, Event, Qmp, Version};
pub use crate::relocate::{Moving, move_disk};
pub use crate::rest::{Layer, rest_layers};
pub use crate::scratch::remove_scratch;
pub use crate::vm::{Monitor, NbdAccess, Vm, VmAddress};
