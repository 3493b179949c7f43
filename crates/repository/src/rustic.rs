//! The one module that knows rustic.
//!
//! rustic gives the repository itself: its config, keys and passwords, the form of snapshot files, and the prune.
//! What every backup's speed or safety depends on is ours: chunks, packs, trees and index files (`pack`, `tree`,
//! `index`), and all reading and writing of files (`storage`), which rustic does through [`Bridge`].

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use model::Timestamp;
use rustic_core::repofile::{SnapshotFile, SnapshotId, SnapshotSummary, StringList};
use rustic_core::{
    BytesList, ConfigOptions, Credentials, ErrorKind as RusticKind, FileType, Id as RusticId, KeyOptions,
    LimitOption, OpenStatus, PruneOptions, ReadBackend, RepositoryBackends, RepositoryOptions, RusticError,
    RusticResult, WriteBackend, jiff,
};
use steps::durable_step;

use crate::crypto::Cipher;
use crate::error::{Error, Unread};
use crate::id::{BackupId, Id};
use crate::lock::Lock;
use crate::owner::hostname;
use crate::storage::{FileKind, FileName, Storage, Trouble, TroubleKind};
use crate::store::Store;

/// A snapshot file of the repository, in our words.
#[derive(Debug, Clone)]
pub(crate) struct Snapshot {
    pub(crate) tree: Id,
    pub(crate) time: Timestamp,
    pub(crate) hostname: String,
    pub(crate) tags: Vec<String>,
    pub(crate) paths: Vec<String>,
    pub(crate) parent: Option<Id>,
    /// Ours: what the listing shows, as JSON. Programs that rewrite a snapshot may drop it.
    pub(crate) description: Option<String>,
}

/// What a run did, for the summary that restic and rustic show.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RunSummary {
    pub(crate) began: Timestamp,
    pub(crate) ended: Timestamp,
    pub(crate) disks: u64,
    pub(crate) disk_bytes: u64,
    pub(crate) raw_bytes_added: u64,
    pub(crate) packed_bytes_added: u64,
    pub(crate) chunks_added: u64,
}

/// A repository of rustic's, not yet opened.
type Closed = rustic_core::Repository<()>;

/// What rustic calls an open repository, and the way of its files.
pub(crate) struct Opened {
    repository: rustic_core::Repository<OpenStatus>,
    bridge: Arc<Bridge>,
}

impl Opened {
    /// The key that it was opened with.
    pub(crate) fn key_id(&self) -> Option<Id> {
        self.repository.key_id().as_ref().map(|id| from_rustic(**id))
    }

    /// Adds the master key once more, behind another password.
    pub(crate) fn add_key(&self, password: &str, user: &str) -> Result<Id, Error> {
        let options = KeyOptions::default().hostname(hostname()).username(user.to_owned()).with_created(true);
        let added = self.repository.add_key(password, &options);
        let id = added.map_err(|error| self.bridge.error("cannot add a key to", &error))?;
        Ok(from_rustic(*id))
    }

    /// Removes what no snapshot needs, as long as the lock is held. New packs and index files come first, and index
    /// files go before the packs that they name.
    pub(crate) fn prune(&self, lock: &Arc<Lock>, unused_percent: u8) -> Result<(), Error> {
        let failed = |error: Box<RusticError>| self.bridge.error("cannot prune", &error);
        let options = PruneOptions::default()
            .instant_delete(true)
            .keep_pack(jiff::Span::new())
            .keep_delete(jiff::Span::new())
            .max_repack(LimitOption::Unlimited)
            .max_unused(LimitOption::Percentage(unused_percent.into()));
        let plan = self.repository.prune_plan(&options).map_err(failed)?;
        // What was planned is right only as long as nobody else could have begun.
        lock.check()?;
        self.bridge.fence(Some(lock.clone()));
        let pruned = self.repository.prune(&options, plan);
        self.bridge.fence(None);
        // That our lock was taken away is the reason, whatever it was heard as.
        if pruned.is_err() {
            lock.check()?;
        }
        pruned.map_err(failed)
    }
}

/// Makes a repository, with a new key behind `password`.
pub(crate) fn create(storage: Arc<dyn Storage>, password: &str) -> Result<Store, Error> {
    let at = storage.location().to_owned();
    let failed = |what| {
        let at = at.clone();
        move |trouble| Error::of_storage(what, at, trouble)
    };
    if storage.size(&FileName::CONFIG).map_err(failed("cannot look for a repository at"))?.is_some() {
        return Err(Error::RepositoryExists { at });
    }
    storage.create().map_err(failed("cannot make a repository at"))?;
    // A second key would open with the password as well as the first and fit nothing.
    if !storage.list(FileKind::Key).map_err(failed("cannot list the keys of"))?.is_empty() {
        return Err(Error::Damaged {
            at,
            what: "it has keys but no file 'config'".into(),
            remedy: "if it is left from an interrupted creation, delete all of it and try again; if it has held backups, put 'config' back from a copy",
        });
    }
    let (closed, bridge) = closed(&storage)?;
    let opened = closed
        .init(&Credentials::password(password), &KeyOptions::default(), &ConfigOptions::default())
        .map_err(|error| bridge.error("cannot make a repository at", &error))?;
    storage.settle_created().map_err(failed("cannot make durable"))?;
    store_of(storage, Opened { repository: opened, bridge })
}

/// Opens a repository.
pub(crate) fn open(storage: Arc<dyn Storage>, password: &str) -> Result<Store, Error> {
    let at = storage.location().to_owned();
    let config = storage.size(&FileName::CONFIG);
    if config.map_err(|trouble| Error::of_storage("cannot open", at.clone(), trouble))?.is_none() {
        return Err(Error::RepositoryMissing { at });
    }
    check_keys(&*storage)?;
    let (closed, bridge) = closed(&storage)?;
    let opened = closed.open(&Credentials::password(password)).map_err(|error| {
        if error.is_incorrect_password() {
            return Error::WrongPassword { at: at.clone() };
        }
        match bridge.error("cannot open", &error) {
            error if matches!(error, Error::Unavailable { .. } | Error::Denied { .. }) => error,
            _ => Error::Damaged {
                at: at.clone(),
                what: format!("its file 'config' cannot be read ({})", first_line(&error)),
                remedy: "put 'config' back from a copy; without it no backup can be read",
            },
        }
    })?;
    if opened.config().version != 2 {
        return Err(Error::Unsupported {
            what: format!(
                "the repository at {at} has format {}, which cannot be compressed; run 'restic migrate upgrade_repo_v2' on it first",
                opened.config().version
            ),
        });
    }
    store_of(storage, Opened { repository: opened, bridge })
}

fn store_of(storage: Arc<dyn Storage>, opened: Opened) -> Result<Store, Error> {
    let key = opened.repository.key();
    let cipher = Cipher::new(&key.encrypt, &key.mac.k, &key.mac.r).ok_or_else(|| Error::Damaged {
        at: storage.location().to_owned(),
        what: "its key has the wrong length".into(),
        remedy: "put the folder 'keys' back from a copy",
    })?;
    Ok(Store::new(storage, cipher, opened))
}

impl Store {
    /// Reads a snapshot file; else what is wrong with it.
    pub(crate) fn read_snapshot(&self, id: &Id) -> Result<Snapshot, Unread> {
        let json = self.read_json_file(FileKind::Snapshot, id)?;
        let file: SnapshotFile = serde_json::from_slice(&json).map_err(|error| error.to_string())?;
        Ok(Snapshot {
            tree: from_rustic(file.tree.into_inner()),
            time: Timestamp(file.time.timestamp().as_microsecond()),
            hostname: file.hostname,
            tags: file.tags.into_iter().cloned().collect(),
            paths: file.paths.into_iter().cloned().collect(),
            parent: file.parent.map(|id| from_rustic(id.into_inner())),
            description: file.description,
        })
    }

    /// Writes a snapshot file: with this, and not before, the backup is listed. Gives its id.
    pub(crate) fn write_snapshot(&self, snapshot: Snapshot, run: RunSummary) -> Result<Id, Error> {
        let zoned = |at: Timestamp| {
            jiff::Timestamp::from_microsecond(at.0).unwrap_or_default().to_zoned(jiff::tz::TimeZone::UTC)
        };
        let mut summary = SnapshotSummary::default();
        summary.files_new = run.disks;
        summary.total_files_processed = run.disks;
        summary.total_bytes_processed = run.disk_bytes;
        summary.data_blobs = run.chunks_added;
        summary.data_added = run.raw_bytes_added;
        summary.data_added_packed = run.packed_bytes_added;
        summary.backup_start = zoned(run.began);
        summary.backup_end = zoned(run.ended);
        summary.backup_duration = run.ended.since(run.began).as_secs_f64();
        summary.total_duration = summary.backup_duration;
        let list = |texts: Vec<String>| {
            let mut list = StringList::default();
            texts.into_iter().for_each(|text| list.add(text));
            list
        };
        let file = SnapshotFile {
            time: zoned(snapshot.time),
            program_version: concat!("afterimage ", env!("CARGO_PKG_VERSION")).into(),
            parent: snapshot.parent.map(|id| SnapshotId::from(to_rustic(&id))),
            tree: rustic_core::TreeId::from(to_rustic(&snapshot.tree)),
            paths: list(snapshot.paths),
            hostname: snapshot.hostname,
            username: "afterimage".into(),
            tags: list(snapshot.tags),
            summary: Some(summary),
            description: snapshot.description,
            ..SnapshotFile::default()
        };
        let json = serde_json::to_vec(&file)
            .map_err(|error| self.failed_here("cannot encode a snapshot for", error))?;
        durable_step("repository::listing::writing");
        let id = self.write_json_file(FileKind::Snapshot, &json)?;
        durable_step("repository::listing::written");
        Ok(id)
    }
}

/// Every key file is named by its hash, so that a damaged one can be told from a wrong password.
fn check_keys(storage: &dyn Storage) -> Result<(), Error> {
    let failed =
        |trouble| Error::of_storage("cannot read the keys of", storage.location().to_owned(), trouble);
    for (id, _) in storage.list(FileKind::Key).map_err(failed)? {
        let key = match storage.read(&FileName::new(FileKind::Key, id)) {
            // Somebody has taken it away in between.
            Err(trouble) if trouble.kind == TroubleKind::Missing => continue,
            key => key.map_err(failed)?,
        };
        if Id::of(&key) != id {
            return Err(Error::Damaged {
                at: storage.location().to_owned(),
                what: format!("its key {} has changed", BackupId(id).short()),
                remedy: "put that file back from a copy, or remove it if there is another key",
            });
        }
    }
    Ok(())
}

fn closed(storage: &Arc<dyn Storage>) -> Result<(Closed, Arc<Bridge>), Error> {
    let bridge =
        Arc::new(Bridge { storage: storage.clone(), met: Mutex::default(), fence: Mutex::default() });
    let options = RepositoryOptions::default().no_cache(true);
    let closed = rustic_core::Repository::new(&options, &RepositoryBackends::new(bridge.clone(), None))
        .map_err(|error| bridge.error("cannot open", &error))?;
    Ok((closed, bridge))
}

/// rustic's errors are pages; the useful part is one line.
fn first_line(error: &RusticError) -> String {
    let log = error.display_log();
    log.strip_prefix("Error: ").unwrap_or(&log).lines().next().unwrap_or("unknown").to_owned()
}

fn to_rustic(id: &Id) -> RusticId {
    RusticId::new(id.0)
}

fn from_rustic(id: RusticId) -> Id {
    // 64 digits always parse.
    id.to_hex().as_str().parse().unwrap_or(Id([0; 32]))
}

/// A storage as rustic wants it. rustic's errors are texts; what the storage met is kept beside them.
struct Bridge {
    storage: Arc<dyn Storage>,
    met: Mutex<Option<Trouble>>,
    /// Without this lock nothing is removed, and when that was looked at last.
    fence: Mutex<Option<(Arc<Lock>, Instant)>>,
}

/// A lock may be found gone so much later at the most.
const FENCE: Duration = Duration::from_secs(5);

impl Bridge {
    /// rustic's error in our words: what the storage met, if it met anything.
    fn error(&self, what: &'static str, error: &RusticError) -> Error {
        let at = self.storage.location().to_owned();
        let met = self.met.lock().unwrap_or_else(PoisonError::into_inner).take();
        Error::of_storage(what, at, met.unwrap_or_else(|| Trouble::other(first_line(error))))
    }

    /// From here on files are removed only as long as this lock is held.
    fn fence(&self, lock: Option<Arc<Lock>>) {
        let looked_at = Instant::now();
        *self.fence.lock().unwrap_or_else(PoisonError::into_inner) = lock.map(|lock| (lock, looked_at));
    }

    fn check_fence(&self) -> Result<(), Trouble> {
        let mut fence = self.fence.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((lock, looked_at)) = fence.as_mut()
            && looked_at.elapsed() > FENCE
        {
            lock.check().map_err(|error| Trouble::other(error.to_string()))?;
            *looked_at = Instant::now();
        }
        Ok(())
    }

    fn told<T>(&self, result: Result<T, Trouble>) -> RusticResult<T> {
        result.map_err(|trouble| {
            *self.met.lock().unwrap_or_else(PoisonError::into_inner) = Some(trouble.clone());
            RusticError::new(RusticKind::Backend, trouble.why)
        })
    }
}

fn name_of(kind: FileType, id: &RusticId) -> FileName {
    match kind {
        FileType::Config => FileName::CONFIG,
        kind => FileName::new(kind_of(kind), from_rustic(*id)),
    }
}

fn kind_of(kind: FileType) -> FileKind {
    match kind {
        FileType::Config => FileKind::Config,
        FileType::Key => FileKind::Key,
        FileType::Snapshot => FileKind::Snapshot,
        FileType::Index => FileKind::Index,
        FileType::Pack => FileKind::Pack,
    }
}

impl ReadBackend for Bridge {
    fn location(&self) -> String {
        self.storage.location().to_owned()
    }
    fn list_with_size(&self, kind: FileType) -> RusticResult<Vec<(RusticId, u32)>> {
        if kind == FileType::Config {
            let size = self.told(self.storage.size(&FileName::CONFIG))?;
            return Ok(size.map(|size| (RusticId::default(), shown_size(size))).into_iter().collect());
        }
        let files = self.told(self.storage.list(kind_of(kind)))?;
        Ok(files.into_iter().map(|(id, size)| (to_rustic(&id), shown_size(size))).collect())
    }
    fn read_full(&self, kind: FileType, id: &RusticId) -> RusticResult<Bytes> {
        self.told(self.storage.read(&name_of(kind, id))).map(Bytes::from)
    }
    fn read_partial(
        &self,
        kind: FileType,
        id: &RusticId,
        _cacheable: bool,
        offset: u32,
        length: u32,
    ) -> RusticResult<Bytes> {
        let mut part = vec![0; length as usize];
        self.told(self.storage.read_at(&name_of(kind, id), offset.into(), &mut part))?;
        Ok(part.into())
    }
    fn warmup_path(&self, kind: FileType, id: &RusticId) -> String {
        name_of(kind, id).path()
    }
}

/// No file of a repository is longer than 4 GiB.
fn shown_size(size: u64) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}

impl WriteBackend for Bridge {
    fn create(&self) -> RusticResult<()> {
        // We have done so, to hear what went wrong.
        Ok(())
    }
    fn write_bytes(
        &self,
        kind: FileType,
        id: &RusticId,
        _cacheable: bool,
        content: BytesList,
    ) -> RusticResult<()> {
        self.told(self.storage.write(&name_of(kind, id), &content.slice().concat()))
    }
    fn remove(&self, kind: FileType, id: &RusticId, _cacheable: bool) -> RusticResult<()> {
        self.told(self.check_fence().and_then(|()| self.storage.remove(&name_of(kind, id))))
    }
}
