//! What can go wrong in the store, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use model::gate::Refusal;
use model::{DiskName, LogId, LogNumber, PointName, UnknownPoint, VmId, VmName};

/// A refusal of something that a primary asked for, as it travels to the primary.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    /// The stable code: `no-space`, `wrong-number`, `failover`, ...
    pub code: &'static str,
    /// One sentence for a person: what, and what to do.
    pub message: String,
    /// Whether it may clear by itself.
    pub transient: bool,
    /// When to come again, if that is known.
    pub retry_after: Option<Duration>,
}

impl Refused {
    pub(crate) fn lasting(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), transient: false, retry_after: None }
    }

    pub(crate) fn transient(code: &'static str, message: impl Into<String>, retry_after: Duration) -> Self {
        Self { code, message: message.into(), transient: true, retry_after: Some(retry_after) }
    }

    pub(crate) fn no_space(path: &Path, detail: &str) -> Self {
        let message = format!(
            "there is no space for new logs at {} ({detail}); free some, replication goes on by itself",
            path.display()
        );
        Self::transient("no-space", message, Duration::from_secs(60))
    }
}

/// What can go wrong in the store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A primary's request was refused.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The gate refused a read.
    #[error(transparent)]
    Gate(#[from] Refusal),
    /// There is no replica of that VM here.
    #[error("there is no replica of VM {0} here; 'afterimage status' lists what there is")]
    NoSuchVm(VmId),
    /// The VM has no such disk.
    #[error("VM {vm} has no disk {disk} at that point; 'afterimage status' lists its disks")]
    NoSuchDisk {
        /// The VM.
        vm: VmId,
        /// The disk asked for.
        disk: String,
    },
    /// The VM has no such recovery point (any more).
    #[error("VM {vm} has no recovery point {point}; 'afterimage points' lists those it has")]
    NoSuchPoint {
        /// The VM.
        vm: VmId,
        /// The point asked for.
        point: LogNumber,
    },
    /// What a person calls a point means none, or several.
    #[error("VM {vm}: {source}")]
    UnknownPoint {
        /// The VM's name.
        vm: VmName,
        /// Which of the two.
        source: UnknownPoint,
    },
    /// A point has that name already.
    #[error("VM {vm} has a point named {name} already ({point}); choose another name, or unpin that one")]
    NameTaken {
        /// The VM's name.
        vm: VmName,
        /// The name.
        name: PointName,
        /// The point that has it.
        point: LogId,
    },
    /// It would end points that are pinned by hand.
    #[error("VM {vm}: {why}")]
    PinnedByHand {
        /// The VM.
        vm: VmId,
        /// Which, and what to do.
        why: String,
    },
    /// A hold was asked for at a point that the flat files do not equal.
    #[error(
        "the flat files of VM {vm} equal {}, not point {point}; hold that one, or read point {point} through a view",
        base.map_or("no point yet".to_owned(), |base| format!("point {base}"))
    )]
    NotTheBase {
        /// The VM.
        vm: VmId,
        /// The point asked for.
        point: LogNumber,
        /// The point that the flat files equal.
        base: Option<LogNumber>,
    },
    /// What was asked for cannot be done beside what goes on.
    #[error("VM {vm}: {why}")]
    Busy {
        /// The VM.
        vm: VmId,
        /// What goes on, and what to do.
        why: String,
    },
    /// A view or hold can no longer be trusted.
    #[error(
        "the recovery point {point} of VM {vm} can no longer be read: {why}; what was read so far must be thrown away"
    )]
    Revoked {
        /// The VM.
        vm: VmId,
        /// The point.
        point: LogNumber,
        /// What happened.
        why: String,
    },
    /// A file or folder could not be used.
    #[error("{what} {} failed: {source}{}", path.display(), advice(source))]
    Io {
        /// What was done: "writing", "syncing", ...
        what: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A log file is damaged.
    #[error("the log {} is damaged: {source}; it cannot be applied or read, the VM must be resynchronized", path.display())]
    Damaged {
        /// The log's file.
        path: PathBuf,
        /// What is wrong.
        source: log::Error,
    },
    /// A log's index is damaged.
    #[error(transparent)]
    Index(#[from] chain::IndexError),
    /// The catalog failed.
    #[error(transparent)]
    Catalog(#[from] catalog::Error),
    /// Another program failed.
    #[error("{program} failed: {why}; is it installed and does it know these options?")]
    Program {
        /// The program.
        program: &'static str,
        /// What it said.
        why: String,
    },
}

fn advice(error: &io::Error) -> &'static str {
    if is_no_space(error) { "; free some space there, it is tried again by itself" } else { "" }
}

pub(crate) fn is_no_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

impl Error {
    /// For `map_err`: `.map_err(Error::io("writing", &path))`.
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, path: path.to_path_buf(), source }
    }

    pub(crate) fn busy(vm: VmId, why: impl Into<String>) -> Self {
        Self::Busy { vm, why: why.into() }
    }

    pub(crate) fn no_disk(vm: VmId, disk: &DiskName) -> Self {
        Self::NoSuchDisk { vm, disk: disk.to_string() }
    }

    /// The stable code, for scripts and for the wire.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Refused(refused) => refused.code,
            Self::Gate(refusal) => refusal.condition.code(),
            Self::NoSuchVm(_) => "no-such-vm",
            Self::NoSuchDisk { .. } => "no-such-disk",
            Self::NoSuchPoint { .. } | Self::UnknownPoint { .. } => "no-such-point",
            Self::NameTaken { .. } => "name-taken",
            Self::PinnedByHand { .. } => "pinned-by-hand",
            Self::NotTheBase { .. } => "not-the-base",
            Self::Busy { .. } => "busy",
            Self::Revoked { .. } => "view-revoked",
            Self::Io { source, .. } if is_no_space(source) => "no-space",
            Self::Io { .. } => "io",
            Self::Damaged { .. } | Self::Index(_) => "damaged-log",
            Self::Catalog(error) if error.is_no_space() => "no-space",
            Self::Catalog(_) => "catalog",
            Self::Program { .. } => "program",
        }
    }

    /// Whether another try, later, may do without anybody's help.
    #[must_use]
    pub fn transient(&self) -> bool {
        match self {
            Self::Refused(refused) => refused.transient,
            Self::Gate(refusal) => refusal.transient,
            Self::Busy { .. } | Self::Io { .. } | Self::Catalog(_) => true,
            _ => false,
        }
    }

    /// The error as a primary hears it.
    #[must_use]
    pub fn into_refused(self) -> Refused {
        let (code, transient, message) = (self.code(), self.transient(), self.to_string());
        match self {
            Self::Refused(refused) => refused,
            _ if transient => Refused::transient(code, message, Duration::from_secs(30)),
            _ => Refused::lasting(code, message),
        }
    }
}

/// The outcome of what the store does.
pub type Result<T, E = Error> = std::result::Result<T, E>;
