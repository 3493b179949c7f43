//! What can go wrong with a repository, each with what to do about it.

use std::path::{Path, PathBuf};

use model::{DiskName, LogNumber, VmId};

use crate::id::BackupId;
use crate::storage::{Trouble, TroubleKind};

/// The kinds of errors, for callers that decide by them. Stable; [`ErrorKind::code`] is for scripts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is no repository there.
    RepositoryMissing,
    /// There is one already, where one was to be made.
    RepositoryExists,
    /// No key of the repository opens with that password.
    WrongPassword,
    /// Bytes in the repository are not what was written.
    Damaged,
    /// No backup has that id.
    BackupNotFound,
    /// Several backups have ids that begin so.
    BackupAmbiguous,
    /// Somebody else works on the repository and excludes us.
    Locked,
    /// What was to be backed up could not be read.
    Source,
    /// What was being backed up may no longer be read: the pin or the hold is gone.
    Revoked,
    /// The caller asked to stop.
    Cancelled,
    /// No room left.
    NoSpace,
    /// A file that would be written is there already.
    FileExists,
    /// What would be written over is in use.
    TargetInUse,
    /// What would be written over cannot take the disk.
    TargetUnfit,
    /// A program that is needed is missing or failed.
    Program,
    /// The request makes no sense, or is not supported.
    Unsupported,
    /// The server that has the repository does not answer, is full, or cannot now.
    Unavailable,
    /// The server that has the repository does not let us in, or not do this.
    Denied,
    /// The file system refused.
    Io,
}

impl ErrorKind {
    /// The stable code.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::RepositoryMissing => "repository-missing",
            Self::RepositoryExists => "repository-exists",
            Self::WrongPassword => "wrong-password",
            Self::Damaged => "repository-damaged",
            Self::BackupNotFound => "backup-not-found",
            Self::BackupAmbiguous => "backup-ambiguous",
            Self::Locked => "repository-locked",
            Self::Source => "source-unreadable",
            Self::Revoked => "view-revoked",
            Self::Cancelled => "cancelled",
            Self::NoSpace => "no-space",
            Self::FileExists => "file-exists",
            Self::TargetInUse => "target-in-use",
            Self::TargetUnfit => "target-unfit",
            Self::Program => "program-missing",
            Self::Unsupported => "unsupported",
            Self::Unavailable => "repository-unavailable",
            Self::Denied => "repository-denied",
            Self::Io => "io-error",
        }
    }
}

/// What can go wrong with a repository.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no repository there.
    #[error("there is no repository at {at}: it has no file 'config'; check where it is, or make one first")]
    RepositoryMissing {
        /// Where.
        at: String,
    },
    /// There is one already.
    #[error("there is a repository at {at} already; open it, or choose an empty folder")]
    RepositoryExists {
        /// Where.
        at: String,
    },
    /// No key of the repository opens with that password.
    #[error("the password does not open the repository at {at}; check the password that is set for it")]
    WrongPassword {
        /// Where.
        at: String,
    },
    /// A file of the repository that everything depends on is damaged.
    #[error("the repository at {at} is damaged: {what}; {remedy}")]
    Damaged {
        /// Where.
        at: String,
        /// Which file, and what is wrong with it.
        what: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A backup's own description is damaged; its disks cannot be told apart.
    #[error(
        "backup {backup} is damaged: {what}; other backups are not affected ('afterimage verify' names them)"
    )]
    BackupDamaged {
        /// Which, by its short id.
        backup: String,
        /// What is wrong.
        what: String,
    },
    /// A chunk of a disk is damaged or missing.
    #[error(
        "backup {backup}: disk {disk} is damaged at offset {offset} ({len} bytes): {why}; '--keep-going' restores the rest and leaves zeros there"
    )]
    ChunkDamaged {
        /// Which backup, by its short id.
        backup: String,
        /// Which disk.
        disk: DiskName,
        /// Where on the disk.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// What is wrong.
        why: String,
    },
    /// No backup has that id.
    #[error("the repository at {at} has no backup {id:?}; 'afterimage backups' lists them")]
    BackupNotFound {
        /// Where.
        at: String,
        /// What was asked for.
        id: String,
    },
    /// Several backups have ids that begin so.
    #[error("{count} backups have ids that begin with {id:?} ({candidates}); give more digits")]
    BackupAmbiguous {
        /// What was asked for.
        id: String,
        /// How many there are.
        count: usize,
        /// The first of them.
        candidates: String,
    },
    /// Somebody else works on the repository and excludes us.
    #[error(
        "the repository at {at} is locked by {by}; wait until it is done, or, if that program is dead, run 'afterimage repository unlock'"
    )]
    Locked {
        /// Where.
        at: String,
        /// Who.
        by: String,
    },
    /// Our lock was taken away, so a prune may have removed what this backup builds on.
    #[error(
        "somebody removed our lock on the repository at {at} while this ran; nothing was listed or removed after that, run it again"
    )]
    LockLost {
        /// Where.
        at: String,
    },
    /// The admission is for another VM or point than the backup says.
    #[error(
        "the gate admitted VM {admitted_vm} at point {admitted_point}, not {vm} at {point}; no backup was made"
    )]
    NotAdmitted {
        /// What the admission is for.
        admitted_vm: VmId,
        /// What the admission is for.
        admitted_point: LogNumber,
        /// What the backup says.
        vm: VmId,
        /// What the backup says.
        point: LogNumber,
    },
    /// What was to be backed up could not be read.
    #[error("disk {disk} could not be read at offset {offset}: {source}; no backup was made")]
    Source {
        /// Which disk.
        disk: DiskName,
        /// Where.
        offset: u64,
        /// Why.
        source: std::io::Error,
    },
    /// What was being backed up may no longer be read.
    #[error("the recovery point is no longer safe to read: {why}; no backup was made")]
    Revoked {
        /// Why.
        why: String,
    },
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// No room left.
    #[error("no space left while writing {}; make room and try again", .path.display())]
    NoSpace {
        /// What was written.
        path: PathBuf,
    },
    /// A file that would be written is there already.
    #[error("{} is there already; choose another folder, or say that it may be overwritten", .path.display())]
    FileExists {
        /// Which.
        path: PathBuf,
    },
    /// A device, or a file with something in it, would be written over.
    #[error("what is on {} would be written over; if it may go, say so with --overwrite", .path.display())]
    TargetNotEmpty {
        /// Which.
        path: PathBuf,
    },
    /// What would be written over is in use.
    #[error("{} is in use by {by}; nothing was written. End that first, or restore to another place", .path.display())]
    TargetInUse {
        /// Which.
        path: PathBuf,
        /// By what.
        by: String,
    },
    /// What would be written over is too small.
    #[error("{} has {has_bytes} bytes, disk {disk} needs {needs_bytes}; make it larger, or restore to another place", .path.display())]
    TargetTooSmall {
        /// Which.
        path: PathBuf,
        /// The disk.
        disk: DiskName,
        /// Its size.
        has_bytes: u64,
        /// The disk's.
        needs_bytes: u64,
    },
    /// What would be written over must not be.
    #[error("disks cannot be restored onto {}: {why}", .path.display())]
    TargetUnfit {
        /// Which.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// A restore ended in the middle of a target.
    #[error("{} is a mix of what it was and of disk {disk} of the backup, do not use it: {source}. Run the same restore again; it goes on where it was", .path.display())]
    HalfWritten {
        /// Which.
        path: PathBuf,
        /// The disk.
        disk: DiskName,
        /// Why it ended.
        source: Box<Error>,
    },
    /// A program that is needed is missing.
    #[error("the program '{program}' is missing; install it with '{install}'")]
    ProgramMissing {
        /// Which.
        program: &'static str,
        /// How to get it.
        install: &'static str,
    },
    /// A program that is needed failed.
    #[error("'{program}' failed: {why}")]
    ProgramFailed {
        /// Which.
        program: &'static str,
        /// What it said.
        why: String,
    },
    /// The request makes no sense, or is not supported.
    #[error("{what}")]
    Unsupported {
        /// What, and what to do instead.
        what: String,
    },
    /// The server that has the repository does not answer, is full, or cannot now.
    #[error("{what} {at}: {why}; try again when it can")]
    Unavailable {
        /// What was being done.
        what: &'static str,
        /// To which file, where.
        at: String,
        /// Why not.
        why: String,
    },
    /// The server that has the repository does not let us in, or not do this.
    #[error("{what} {at}: {why}; check the credentials that are set for it, and what they may do there")]
    Denied {
        /// What was being done.
        what: &'static str,
        /// To which file, where.
        at: String,
        /// Why not.
        why: String,
    },
    /// The file system refused.
    #[error("{what} {}: {source}", .path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

impl Error {
    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::RepositoryMissing { .. } => ErrorKind::RepositoryMissing,
            Self::RepositoryExists { .. } => ErrorKind::RepositoryExists,
            Self::WrongPassword { .. } => ErrorKind::WrongPassword,
            Self::Damaged { .. } | Self::BackupDamaged { .. } | Self::ChunkDamaged { .. } => {
                ErrorKind::Damaged
            }
            Self::BackupNotFound { .. } => ErrorKind::BackupNotFound,
            Self::BackupAmbiguous { .. } => ErrorKind::BackupAmbiguous,
            Self::Locked { .. } | Self::LockLost { .. } => ErrorKind::Locked,
            Self::Source { .. } => ErrorKind::Source,
            Self::Revoked { .. } => ErrorKind::Revoked,
            Self::Cancelled => ErrorKind::Cancelled,
            Self::NoSpace { .. } => ErrorKind::NoSpace,
            Self::FileExists { .. } | Self::TargetNotEmpty { .. } => ErrorKind::FileExists,
            Self::TargetInUse { .. } => ErrorKind::TargetInUse,
            Self::TargetTooSmall { .. } | Self::TargetUnfit { .. } => ErrorKind::TargetUnfit,
            Self::HalfWritten { source, .. } => source.kind(),
            Self::ProgramMissing { .. } | Self::ProgramFailed { .. } => ErrorKind::Program,
            Self::NotAdmitted { .. } | Self::Unsupported { .. } => ErrorKind::Unsupported,
            Self::Unavailable { .. } => ErrorKind::Unavailable,
            Self::Denied { .. } => ErrorKind::Denied,
            Self::Io { .. } => ErrorKind::Io,
        }
    }

    pub(crate) fn target_unfit(path: &Path, why: impl Into<String>) -> Self {
        Self::TargetUnfit { path: path.to_owned(), why: why.into() }
    }

    /// An I/O error on `path`; a full disk is told apart.
    pub(crate) fn io(what: &'static str, path: &Path, source: std::io::Error) -> Self {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        match source.kind() {
            StorageFull | QuotaExceeded => Self::NoSpace { path: path.to_owned() },
            _ => Self::Io { what, path: path.to_owned(), source },
        }
    }

    /// What a storage met with a file of the repository.
    pub(crate) fn of_storage(what: &'static str, at: String, trouble: Trouble) -> Self {
        let Trouble { kind, why } = trouble;
        match kind {
            TroubleKind::NoSpace => Self::NoSpace { path: at.into() },
            TroubleKind::Unavailable => Self::Unavailable { what, at, why },
            TroubleKind::Denied => Self::Denied { what, at, why },
            TroubleKind::Missing | TroubleKind::Short | TroubleKind::Other => {
                Self::Io { what, path: at.into(), source: std::io::Error::other(why) }
            }
        }
    }
}

/// Why a part of a backup could not be read.
#[derive(Debug)]
pub(crate) enum Unread {
    /// It is damaged or missing: this is wrong with it.
    Damaged(String),
    /// It may be whole; it could not be asked for.
    Failed(Error),
}

impl Unread {
    /// The error of a backup that has this part.
    pub(crate) fn of_backup(self, backup: BackupId) -> Error {
        match self {
            Self::Damaged(what) => Error::BackupDamaged { backup: backup.short(), what },
            Self::Failed(error) => error,
        }
    }

    /// The same with more said of the damage.
    pub(crate) fn damaged(self, more: impl FnOnce(String) -> String) -> Self {
        match self {
            Self::Damaged(what) => Self::Damaged(more(what)),
            failed => failed,
        }
    }

    /// What is damaged; or that nothing can be told.
    pub(crate) fn damage(self) -> Result<String, Error> {
        match self {
            Self::Damaged(what) => Ok(what),
            Self::Failed(error) => Err(error),
        }
    }
}

impl From<String> for Unread {
    fn from(damage: String) -> Self {
        Self::Damaged(damage)
    }
}

impl From<&str> for Unread {
    fn from(damage: &str) -> Self {
        Self::Damaged(damage.to_owned())
    }
}

impl From<Error> for Unread {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl std::fmt::Display for Unread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Damaged(what) => f.write_str(what),
            Self::Failed(error) => error.fmt(f),
        }
    }
}
