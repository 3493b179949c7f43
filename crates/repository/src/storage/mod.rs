//! Where the files of a repository are: in a local folder or on a server.
//!
//! Every storage keeps to the same: a file is whole or absent under its name; when `write` has returned it is
//! durable, as far as the server keeps its word; a list that could not be read to its end is an error, never a
//! shorter list. What each protocol can promise is in `docs/repositories.md`, and why we speak them ourselves
//! in `docs/decisions/0028-repositories-on-servers.md`.

mod http;
mod local;
mod rest;
mod s3;
mod sftp;
mod signature;
mod ssh;
mod trouble;

use std::fmt;
use std::sync::Arc;

use crate::error::Error;
use crate::id::Id;
use crate::location::{Location, Place};

pub(crate) use local::LocalStorage;
pub(crate) use trouble::{Trouble, TroubleKind};

/// The kinds of files in a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum FileKind {
    Config,
    Key,
    Lock,
    Snapshot,
    Index,
    Pack,
}

impl FileKind {
    /// All kinds that have a folder of their own.
    pub(crate) const WITH_FOLDER: [Self; 5] =
        [Self::Key, Self::Lock, Self::Snapshot, Self::Index, Self::Pack];

    /// The folder, as restic has it; of the config, its name.
    pub(crate) fn folder(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::Key => "keys",
            Self::Lock => "locks",
            Self::Snapshot => "snapshots",
            Self::Index => "index",
            Self::Pack => "data",
        }
    }
}

/// One file of a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct FileName {
    pub(crate) kind: FileKind,
    /// The SHA-256 of its bytes; of the config, which has none, zeros.
    pub(crate) id: Id,
}

impl FileName {
    /// The file that makes a folder a repository.
    pub(crate) const CONFIG: Self = Self { kind: FileKind::Config, id: Id([0; 32]) };

    pub(crate) fn new(kind: FileKind, id: Id) -> Self {
        Self { kind, id }
    }

    /// Its path within the repository, in restic's default layout.
    pub(crate) fn path(&self) -> String {
        let (folder, id) = (self.kind.folder(), self.id);
        match self.kind {
            FileKind::Config => folder.to_owned(),
            FileKind::Pack => format!("{folder}/{}/{id}", hex::encode(&id.0[..1])),
            _ => format!("{folder}/{id}"),
        }
    }
}

/// The files of one repository. Used from many threads at once.
pub(crate) trait Storage: fmt::Debug + Send + Sync {
    /// Where it is, for messages; there is no secret in it.
    fn location(&self) -> &str;

    /// Makes the folders of a new repository.
    fn create(&self) -> Result<(), Trouble>;

    /// Makes durable what `create` has made.
    fn settle_created(&self) -> Result<(), Trouble> {
        Ok(())
    }

    /// The files of one kind and their sizes in bytes. What has no proper name (a file half written) is left out.
    fn list(&self, kind: FileKind) -> Result<Vec<(Id, u64)>, Trouble>;

    /// How long a file is, in bytes; none if it is not there.
    fn size(&self, file: &FileName) -> Result<Option<u64>, Trouble>;

    /// A whole file.
    fn read(&self, file: &FileName) -> Result<Vec<u8>, Trouble>;

    /// Fills `into` with the bytes of a file from `offset`.
    fn read_at(&self, file: &FileName, offset: u64, into: &mut [u8]) -> Result<(), Trouble>;

    /// Writes a file; it is whole and durable when this returns, and after an error it may be there or not.
    fn write(&self, file: &FileName, bytes: &[u8]) -> Result<(), Trouble>;

    /// Removes a file; one that is not there is no error.
    fn remove(&self, file: &FileName) -> Result<(), Trouble>;

    /// Makes the names of the files of one kind durable: whoever wrote them may have died, or failed, before.
    fn settle(&self, _kind: FileKind) -> Result<(), Trouble> {
        Ok(())
    }

    /// Whether a lock is there that a dead process of this machine had half written: it may have left more.
    fn has_half_written(&self) -> bool {
        false
    }

    /// Removes what processes of this machine that are dead had half written; nothing depends on it.
    fn sweep(&self) {}

    /// How many packs are written at the same time.
    fn writers(&self) -> usize;
}

/// Opens the way to a repository's files. A server may not be asked anything yet.
pub(crate) fn connect(location: &Location) -> Result<Arc<dyn Storage>, Error> {
    let at = location.to_string();
    Ok(match location.place() {
        Place::Local(path) => Arc::new(LocalStorage::new(path.clone())),
        Place::Rest(base) => Arc::new(rest::RestStorage::new(at, base, location.access())?),
        Place::S3(bucket) => Arc::new(s3::S3Storage::new(at, bucket, location.access())?),
        Place::Sftp(host) => Arc::new(sftp::SftpStorage::new(at, host, location.access())),
    })
}

/// An id in a file's name, if it is one.
fn id_of(name: &str) -> Option<Id> {
    name.parse().ok()
}
