//! The store of chains: receives logs, keeps recovery points, shows them byte for byte.
//!
//! A replica is a *base* (a flat file per disk) and the *logs* after it; [`Store`] keeps any number of them.
//! What is decided is decided by the pure crates (`chain`: what to apply, merge and keep; `model`: the gate, the
//! phases); here it is carried out on files, with the catalog as the place where a chain's state changes in
//! one transaction.
//!
//! ```text
//! <dir>/vms/<vm-id>/disks/<disk>.raw       base, sparse
//!                   logs/<number>.log      immutable; merged ones are <first>-<last>.log
//!                   incoming/<number>-<id>.partial
//!                   changes/<disk>.map     which log changed each 256 KiB of the base last
//!                   failover/<disk>.qcow2  while a failover lasts, and after it was completed
//!                   released.json          its failover was completed: the folder is a running VM's
//!                   vm.json                what is needed to do without the catalog
//! <dir>/seeds/ready/<vm>/<disk>.raw        images that a replica is to begin with
//! ```
//!
//! Invariants:
//! * a log is acknowledged only when its file, its name and its row are durable; a log is whole or absent;
//! * the base is never taken past the oldest point that is shown, read or pinned by hand, and what is folded in is in
//!   every open view: a view's bytes never change, whatever is received, applied or merged;
//! * an apply that was cut off anywhere is run again from its start before the base is read or changed otherwise;
//! * between the gate's answer and the pin nothing happens: both are one step under the VM's lock;
//! * each changed byte is written at most twice (log, base or merge: `docs/decisions/0004`), but above a point pinned by
//!   hand (`docs/decisions/0015`);
//! * what is lost is said: the chain ends before it, and the VM must be resynchronized.
//!
//! All files are reached through `Config::files`, time and chance through the config's: with `workers: 0` and
//! `apply_threads: 1` the store has no thread of its own, and the same calls do the same to the same files.
//!
//! What it does not do: talk to sites (`wire`), choose the point or the time of a backup (`site`), write
//! backups (`repository`). Everything blocks; [`Store::run`] is for async callers.

mod apply;
mod cache;
mod changemap;
mod compact;
mod completion;
mod config;
mod digests;
mod error;
mod failover;
mod folder;
mod forward;
mod fs;
mod gate;
mod groups;
mod hold;
mod import;
mod layers;
mod maintain;
mod migrate;
mod pinned;
mod reader;
mod rebuild;
mod receive;
mod recover;
mod relationship;
mod relocate;
mod rewrite;
mod rows;
mod seed;
mod staging;
mod store;
mod survivors;
mod view;
mod vm;
mod worker;

pub use completion::ReleasedVm;
pub use config::{Chance, Clock, Config};
pub use error::{Error, Refused, Result};
pub use failover::{FailoverDisk, FailoverStatus, FailoverView, failover_export};
pub use forward::{Forward, Forwardable};
pub use gate::{Admitted, KeptPoint, ReplicaStatus, VmFacts};
pub use groups::ReplicaGroup;
pub use hold::{BarrierGuard, HeldDisk, Hold, PauseGuard};
pub use import::{AwaitedMedia, Imported};
pub use layers::Layers;
pub use maintain::Step;
pub use pinned::{LogRun, ShownPlan, ShownPoint};
pub use rebuild::rebuild;
pub use receive::UploadState;
pub use relationship::{InStep, Offer, Standing};
pub use relocate::RelocationStatus;
pub use rows::{Awaited, DiskSize, Fence, Reported};
pub use seed::Seed;
pub use store::Store;
pub use view::ConsistentView;
