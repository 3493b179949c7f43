//! One running site: its settings, its peers, the VMs protected here and the replicas kept here, the backup
//! jobs, and the two doors to it (the HTTPS port for peers, the control socket for the command line).
//!
//! What holds:
//! * disk bytes reach a repository only from a view or a hold that the gate has admitted (`source`);
//! * a job's every step is in the catalog before anything waits, so a killed site goes on where it was;
//! * a peer does only what its entry allows, asked at every request.
//!
//! What it does not do: decide (that is `model` and `chain`), move disk bytes (`primary`, `replica`,
//! `repository`), parse a command line (`cli`).

mod authority;
mod backup;
mod checks;
mod clock;
mod commands;
mod config;
mod control;
mod endpoint;
mod entry;
mod events;
mod exports;
mod extend;
mod failover;
mod failure;
mod fence;
mod groups;
mod identity;
mod init;
mod jobs;
mod known;
mod measurements;
mod media;
mod peers;
mod points;
mod policies;
mod random;
mod recovery;
mod relocate;
mod repositories;
mod request;
mod running;
mod seeds;
mod serve;
mod source;
mod status;
mod trials;
mod trust;
mod turn;
mod usage;

pub use clock::rfc3339;
pub use config::{Config, LOCAL_REPOSITORY};
pub use control::ask;
pub use entry::EntryChange;
pub use failure::{Code, Failure};
pub use fence::{Fenced, fence};
pub use init::{Made, init};
pub use model::Change;
pub use policies::template as policy_template;
pub use primary::Changes;
pub use recovery::find_backup;
pub use repositories::{RepositorySettings, named, open_repository};
pub use request::{
    BackupRequest, By, Check, Export, Exported, Extend, FailoverRequest, GroupFailover, GroupRequest, Line,
    PolicyRequest, Progress, Protect, Recover, RecoverRequest, Request, Reverse, SeedRequest,
};
pub use serve::serve;
pub use status::{CycleView, DiskView, PrimarySide, ReplicaSide, Side, VmView};
