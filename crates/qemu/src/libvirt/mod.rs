//! A VM that runs under libvirt. Libvirt keeps QEMU's monitor and the guest agent's socket for itself and hands on
//! what is said to them: this is a client of its daemon, so that [`crate::Qmp`] and [`crate::GuestAgent`] work over it.
//!
//! ```text
//!  Qmp ──lines──▶ monitor ─┐                      ┌─▶ QEMU's monitor
//!  GuestAgent ───▶ agent ──┼─▶ Domain ─▶ Rpc ══▶ libvirt's daemon (unix socket)
//!  disks, labels ◀── xml ──┘                      └─▶ the guest's agent
//! ```
//!
//! * What is asked of libvirt: the domain's XML and state, its lifecycle events, and the two doors above. Nothing that
//!   changes the domain's definition, its jobs, its snapshots or its checkpoints.
//! * A [`Domain`] is one life of a domain: once that QEMU has ended it stays gone, however soon another one starts.
//! * A disk is found by its target (`vda`) and the alias of its device: node names change from start to start.
//!
//! What it does not do: start or stop domains, or speak to a libvirt on another machine (disks are read here).

mod agent;
mod domain;
mod error;
mod monitor;
mod place;
mod reach;
mod rpc;
mod xdr;
mod xml;

pub use crate::libvirt::domain::{Domain, DomainAddress, Found, find};
pub use crate::libvirt::error::Error;
pub(crate) use crate::libvirt::reach::{explain, make_folder};
pub(crate) use crate::libvirt::xml::network_sources;
pub use crate::libvirt::xml::{Description, TargetDisk};
