//! What can go wrong in a cycle, and whether waiting helps.

use serde::{Deserialize, Serialize};

/// What kind of thing went wrong; the code is stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureCode {
    /// The replica's site cannot be reached, or the link broke.
    Link,
    /// The replica answered that it cannot take the log now.
    ReplicaRefused,
    /// The replica's certificate is not the one that was pinned, or it does not accept ours.
    Certificate,
    /// This site is not allowed to replicate that VM there.
    NotAuthorized,
    /// The peer is not known (any more).
    UnknownPeer,
    /// QEMU cannot be reached, or died.
    QemuGone,
    /// QEMU refused a command, or a read of the fixed moment failed.
    Qemu,
    /// The replica here, which is passed on to a third site, cannot be read.
    Replica,
    /// Another program does something to the VM that must not be disturbed: a backup, a copy, a migration.
    InTheWay,
    /// The scratch reached its bound; the cycle was given up before a guest write could fail.
    ScratchFull,
    /// Both sides must be compared; the next cycle begins with that.
    ResyncRequired,
    /// A disk cannot be added or removed.
    Disks,
    /// What was read could not be put into a log.
    Encode,
    /// The catalog of this site.
    Catalog,
    /// What was asked for does not fit where the relationship stands.
    Unfit,
    /// The resynchronization rests: by its policy, or because a person has cancelled it.
    Rests,
    /// The initial replication waits for images at the replica's site.
    SeedAwaited,
    /// The media that the initial replication is written to cannot be used, or are not there.
    Media,
    /// There is no room left on them.
    MediaFull,
    /// The media are written, and wait to be imported at the replica's site.
    MediaAwaited,
    /// The cycle was stopped by a person or by the site's shutdown.
    Stopped,
}

/// Why a cycle failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct Failure {
    /// The kind.
    pub code: FailureCode,
    /// What happened, to which VM or disk, and what to do.
    pub message: String,
    /// Whether it may clear by itself. What may not is shown and not tried again blindly.
    pub transient: bool,
}

impl Failure {
    /// One that may clear by itself.
    pub fn transient(code: FailureCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), transient: true }
    }

    /// One that stays until somebody does something.
    pub fn lasting(code: FailureCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), transient: false }
    }
}

impl From<catalog::Error> for Failure {
    fn from(error: catalog::Error) -> Self {
        Self::transient(FailureCode::Catalog, error.to_string())
    }
}

/// What an operation on a protected VM can be refused with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No VM of that name is protected here.
    #[error("no VM named {0} is protected by this site; 'afterimage status' lists them")]
    NoSuchVm(model::VmName),
    /// A VM of that name is protected already.
    #[error("a VM named {0} is already protected; choose another name with --name, or unprotect it first")]
    Exists(model::VmName),
    /// No group of that name.
    #[error("this site has no group {0}; 'afterimage group list' lists them")]
    NoSuchGroup(model::GroupName),
    /// There is such a group already, or a VM is in another.
    #[error("{0}")]
    Taken(String),
    /// A setting is out of its range.
    #[error("{0}")]
    Setting(String),
    /// What was asked for did not work.
    #[error(transparent)]
    Failure(#[from] Failure),
    /// The catalog did not take the change.
    #[error(transparent)]
    Catalog(#[from] catalog::Error),
}
