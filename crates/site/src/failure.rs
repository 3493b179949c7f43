//! What a command can be refused with: one shape for the command line, the control socket and the API.

use std::path::Path;

use model::gate::{Condition, Refusal};
use primary::FailureCode;
use serde::{Deserialize, Serialize};

/// The kind of a failure. Stable: scripts depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// The command was not used as it is meant.
    Usage,
    /// There is no site in the folder.
    NoSite,
    /// The folder has a site already.
    SiteExists,
    /// The site is not running.
    NotRunning,
    /// The site is running already.
    AlreadyRunning,
    /// The settings cannot be used.
    Config,
    /// A file could not be read or written.
    Io,
    /// The catalog.
    Catalog,
    /// No VM of that name here.
    NoSuchVm,
    /// No group of that name here, or no such moment of one.
    NoSuchGroup,
    /// No policy of that name here, or one that cannot be used.
    NoSuchPolicy,
    /// Something of that name exists already.
    Exists,
    /// No peer of that name.
    NoSuchPeer,
    /// An invite that cannot be used.
    Invite,
    /// The other site could not be reached, or did not accept.
    Peer,
    /// A cycle failed.
    Cycle,
    /// What was asked for does not fit where the relationship stands.
    Unfit,
    /// A resynchronization rests: by its policy, or because a person has cancelled it.
    Rests,
    /// The media of an initial replication are not there, are others, or have no room.
    Media,
    /// There is no such recovery point, or none at all.
    NoSuchPoint,
    /// The gate refused; `condition` says which of its eight conditions holds.
    Refused,
    /// A backup was refused until its attempts or its window ended.
    GaveUp,
    /// No repository of that name.
    NoSuchRepository,
    /// The repository: wrong password, missing, damaged.
    Repository,
    /// What was to be restored over is in use, or cannot take it.
    Target,
    /// No backup of that id.
    NoSuchBackup,
    /// What was read is damaged.
    Damaged,
    /// A file within a disk that is not there, or cannot be read.
    Files,
    /// No export of that id.
    NoSuchExport,
    /// No hold of that id, or it had run out.
    Hold,
    /// The replica's store refused or failed.
    Replica,
    /// A failover that cannot be done in this state.
    Failover,
    /// A guest could not be booted.
    Boot,
    /// Stopped by a person, or because the site ends.
    Stopped,
    /// A defect of this program.
    Internal,
}

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.serialize(f)
    }
}

/// A refusal or an error, for a person and for a script.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct Failure {
    /// The kind.
    pub code: Code,
    /// What happened, to what, and what to do.
    pub message: String,
    /// Whether it may clear by itself.
    pub transient: bool,
    /// When another try makes sense, in seconds.
    pub retry_after_s: Option<u64>,
    /// The gate's condition, if the gate refused.
    pub condition: Option<Condition>,
}

impl Failure {
    /// A failure that waiting does not mend.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), transient: false, retry_after_s: None, condition: None }
    }

    /// A failure that may clear by itself.
    pub fn transient(code: Code, message: impl Into<String>) -> Self {
        Self { transient: true, ..Self::new(code, message) }
    }

    /// A file that could not be used.
    pub fn io(what: &str, path: &Path, error: &std::io::Error) -> Self {
        Self::new(Code::Io, format!("cannot {what} {}: {error}", path.display()))
    }

    /// The exit status that a command ends with: 75 if it is worth coming again, 64 for wrong usage.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self { code: Code::Usage, .. } => 64,
            Self { condition: Some(_), .. } => 75,
            Self { transient: true, .. } => 75,
            _ => 1,
        }
    }
}

impl From<boot::Error> for Failure {
    fn from(error: boot::Error) -> Self {
        Self::new(Code::Boot, error.to_string())
    }
}

impl From<&Refusal> for Failure {
    fn from(refusal: &Refusal) -> Self {
        Self {
            code: Code::Refused,
            message: refusal.message.clone(),
            transient: refusal.transient,
            retry_after_s: Some(refusal.retry_after.as_secs()),
            condition: Some(refusal.condition),
        }
    }
}

impl From<catalog::Error> for Failure {
    fn from(error: catalog::Error) -> Self {
        Self::new(Code::Catalog, error.to_string())
    }
}

impl From<repository::Error> for Failure {
    fn from(error: repository::Error) -> Self {
        use repository::ErrorKind as Kind;
        let message = error.to_string();
        match error.kind() {
            Kind::BackupNotFound | Kind::BackupAmbiguous => Self::new(Code::NoSuchBackup, message),
            Kind::Damaged => Self::new(Code::Damaged, message),
            Kind::Locked | Kind::Revoked | Kind::Unavailable => Self::transient(Code::Repository, message),
            Kind::Cancelled => Self::new(Code::Stopped, message),
            Kind::NoSpace | Kind::FileExists | Kind::Io => Self::new(Code::Io, message),
            Kind::TargetInUse | Kind::TargetUnfit => Self::new(Code::Target, message),
            Kind::Source => Self::new(Code::Replica, message),
            _ => Self::new(Code::Repository, message),
        }
    }
}

impl From<replica::Error> for Failure {
    fn from(error: replica::Error) -> Self {
        let message = error.to_string();
        match &error {
            replica::Error::Gate(refusal) => refusal.into(),
            replica::Error::Refused(refused) => Self {
                transient: refused.transient,
                retry_after_s: refused.retry_after.map(|after| after.as_secs()),
                ..Self::new(Code::Replica, message)
            },
            replica::Error::NoSuchVm(_) => Self::new(Code::NoSuchVm, message),
            replica::Error::NoSuchPoint { .. } | replica::Error::UnknownPoint { .. } => {
                Self::new(Code::NoSuchPoint, message)
            }
            replica::Error::NameTaken { .. } => Self::new(Code::Exists, message),
            replica::Error::PinnedByHand { .. } => Self::new(Code::Failover, message),
            _ => Self::new(Code::Replica, message),
        }
    }
}

impl From<primary::Error> for Failure {
    fn from(error: primary::Error) -> Self {
        let message = error.to_string();
        match error {
            primary::Error::NoSuchVm(_) => Self::new(Code::NoSuchVm, message),
            primary::Error::NoSuchGroup(_) => Self::new(Code::NoSuchGroup, message),
            primary::Error::Exists(_) | primary::Error::Taken(_) => Self::new(Code::Exists, message),
            primary::Error::Setting(_) => Self::new(Code::Usage, message),
            primary::Error::Failure(failure) => {
                let code = match failure.code {
                    FailureCode::Unfit => Code::Unfit,
                    FailureCode::Rests => Code::Rests,
                    FailureCode::Media | FailureCode::MediaFull | FailureCode::MediaAwaited => Code::Media,
                    _ => Code::Cycle,
                };
                Self { transient: failure.transient, ..Self::new(code, message) }
            }
            primary::Error::Catalog(error) => error.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_statuses_follow_the_contract() {
        assert_eq!(Failure::new(Code::Usage, "").exit_status(), 64);
        assert_eq!(Failure::new(Code::Damaged, "").exit_status(), 1);
        assert_eq!(Failure::transient(Code::Cycle, "").exit_status(), 75);
        let failed = Failure { condition: Some(Condition::ApplyFailed), ..Failure::new(Code::Refused, "") };
        assert_eq!(failed.exit_status(), 75);
    }
}
