//! The one module that knows rustic.
//!
//! rustic gives the repository itself: its layout and config, keys and passwords, the snapshot files, and a
//! backend to read from. What every backup's speed or safety depends on is ours: chunks, packs, trees and
//! index files (`pack`, `tree`, `index`), and the writing of files ([`Durable`]): rustic's local backend
//! syncs a file but not the folder that names it, so a power cut could take a pack away from under a backup
//! that was listed.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use model::Timestamp;
use rustic_backend::LocalBackend;
use rustic_core::repofile::{SnapshotFile, SnapshotId, SnapshotSummary, StringList};
use rustic_core::{
    BytesList, ConfigOptions, Credentials, ErrorKind as RusticKind, FileType, Id as RusticId, KeyOptions,
    OpenStatus, ReadBackend, RepositoryBackends, RepositoryOptions, RusticError, RusticResult, WriteBackend,
    jiff,
};
use steps::durable_step;

use crate::crypto::{Cipher, sealed};
use crate::direct::DirectFile;
use crate::error::Error;
use crate::id::Id;
use crate::partial;

/// The kinds of files that we list, read and write ourselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileKind {
    Pack,
    Index,
    Snapshot,
}

impl FileKind {
    fn rustic(self) -> FileType {
        match self {
            Self::Pack => FileType::Pack,
            Self::Index => FileType::Index,
            Self::Snapshot => FileType::Snapshot,
        }
    }
}

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

/// An open repository: its files, and the key to them.
pub(crate) struct Store {
    backend: Arc<Durable>,
    cipher: Cipher,
}

impl Store {
    /// Makes a repository at `path`, with a new key behind `password`.
    pub(crate) fn create(path: &Path, password: &str) -> Result<Self, Error> {
        if path.join("config").exists() {
            return Err(Error::RepositoryExists { path: path.to_owned() });
        }
        // A second key would open with the password as well as the first and fit nothing.
        if fs::read_dir(path.join("keys")).is_ok_and(|mut keys| keys.next().is_some()) {
            return Err(Error::Damaged {
                path: path.to_owned(),
                what: "it has keys but no file 'config'".into(),
                remedy: "if it is left from an interrupted creation, delete the folder and try again; if it has held backups, put 'config' back from a copy",
            });
        }
        let (closed, backend) = backends(path)?;
        fs::create_dir_all(path).map_err(|source| Error::io("cannot make the folder", path, source))?;
        let opened = closed
            .init(&Credentials::password(password), &KeyOptions::default(), &ConfigOptions::default())
            .map_err(|error| plain("cannot make a repository in", path, &error))?;
        let failed = |source| Error::io("cannot make the folders of", path, source);
        fs::create_dir_all(path.join("locks")).map_err(failed)?;
        durable_step("repository::create::made");
        // rustic syncs none of the folders that it makes, and `data` has one for each first byte of a pack.
        sync_folder(&path.join("data")).map_err(failed)?;
        durable_step("repository::create::folders");
        sync_folder(path).map_err(failed)?;
        durable_step("repository::create::settled");
        Self::of(&opened, backend)
    }

    /// Opens the repository at `path`.
    pub(crate) fn open(path: &Path, password: &str) -> Result<Self, Error> {
        if !path.join("config").exists() {
            return Err(Error::RepositoryMissing { path: path.to_owned() });
        }
        check_keys(path)?;
        let (closed, backend) = backends(path)?;
        let opened = closed.open(&Credentials::password(password)).map_err(|error| {
            if error.is_incorrect_password() {
                return Error::WrongPassword { path: path.to_owned() };
            }
            Error::Damaged {
                path: path.to_owned(),
                what: format!("its file 'config' cannot be read ({})", first_line(&error)),
                remedy: "put 'config' back from a copy; without it no backup can be read",
            }
        })?;
        if opened.config().version != 2 {
            return Err(Error::Unsupported {
                what: format!(
                    "the repository at {} has format {}, which cannot be compressed; run 'restic migrate upgrade_repo_v2' on it first",
                    path.display(),
                    opened.config().version
                ),
            });
        }
        Self::of(&opened, backend)
    }

    fn of(repository: &rustic_core::Repository<OpenStatus>, backend: Arc<Durable>) -> Result<Self, Error> {
        let key = repository.key();
        let cipher = Cipher::new(&key.encrypt, &key.mac.k, &key.mac.r).ok_or_else(|| Error::Damaged {
            path: backend.path.clone(),
            what: "its key has the wrong length".into(),
            remedy: "put the folder 'keys' back from a copy",
        })?;
        Ok(Self { backend, cipher })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.backend.path
    }

    /// The master key.
    pub(crate) fn cipher(&self) -> &Cipher {
        &self.cipher
    }

    /// Where a file of the repository is, for messages.
    pub(crate) fn path_of(&self, kind: FileKind, id: &Id) -> PathBuf {
        self.backend.path_of(kind.rustic(), &id.to_string())
    }

    /// The files of one kind. What has no proper name (a file half written) is not listed.
    pub(crate) fn list(&self, kind: FileKind) -> Result<Vec<Id>, Error> {
        let ids = self.backend.list(kind.rustic()).map_err(|error| self.failed("cannot list", &error))?;
        Ok(ids.into_iter().map(from_rustic).collect())
    }

    /// Makes the names of the files of one kind durable. Whoever wrote them may have died, or failed, before.
    pub(crate) fn settle(&self, kind: FileKind) -> Result<(), Error> {
        let folder = self.backend.path.join(kind.rustic().dirname());
        durable_step("repository::backup::settling");
        sync_folder(&folder).map_err(|source| Error::io("cannot sync", &folder, source))?;
        durable_step("repository::backup::found");
        Ok(())
    }

    /// The files of one kind and their sizes.
    pub(crate) fn list_with_size(&self, kind: FileKind) -> Result<Vec<(Id, u32)>, Error> {
        let ids =
            self.backend.list_with_size(kind.rustic()).map_err(|error| self.failed("cannot list", &error))?;
        Ok(ids.into_iter().map(|(id, size)| (from_rustic(id), size)).collect())
    }

    /// A part of a pack, as it is stored, into `stored`; else what is wrong with the pack.
    pub(crate) fn read_pack(
        &self,
        pack: &Id,
        offset: u32,
        len: u32,
        stored: &mut Vec<u8>,
    ) -> Result<(), String> {
        stored.resize(len as usize, 0);
        fs::File::open(self.path_of(FileKind::Pack, pack))
            .and_then(|file| file.read_exact_at(stored, offset.into()))
            .map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => format!("pack {} is missing", short(pack)),
                io::ErrorKind::UnexpectedEof => format!("pack {} is too short", short(pack)),
                _ => format!("pack {} cannot be read: {error}", short(pack)),
            })
    }

    /// Writes a file under its hash; it is durable when this returns.
    pub(crate) fn write(&self, kind: FileKind, id: &Id, bytes: &[u8]) -> Result<(), Error> {
        let path = self.path_of(kind, id);
        self.backend.put(&path, bytes).map_err(|source| Error::io("cannot write", &path, source))
    }

    /// An index or snapshot file: sealed JSON, usually compressed. Else what is wrong with it.
    pub(crate) fn read_json_file(&self, kind: FileKind, id: &Id) -> Result<Vec<u8>, String> {
        let stored = self
            .backend
            .read_full(kind.rustic(), &to_rustic(id))
            .map(Vec::from)
            .map_err(|error| first_line(&error))?;
        if Id::of(&stored) != *id {
            return Err("its bytes have another hash than its name".into());
        }
        self.unsealed_json(stored)
    }

    /// Writes an index or snapshot file; it is durable when this returns.
    pub(crate) fn write_json_file(&self, kind: FileKind, json: &[u8]) -> Result<Id, Error> {
        let mut plain = vec![2];
        zstd::stream::copy_encode(json, &mut plain, 3)
            .map_err(|source| Error::io("cannot compress", self.path(), source))?;
        let stored = sealed(&self.cipher, &plain);
        let id = Id::of(&stored);
        self.write(kind, &id, &stored)?;
        Ok(id)
    }

    /// Reads a snapshot file; else what is wrong with it.
    pub(crate) fn read_snapshot(&self, id: &Id) -> Result<Snapshot, String> {
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
            .map_err(|error| Error::io("cannot encode", self.path(), io::Error::other(error)))?;
        durable_step("repository::listing::writing");
        let id = self.write_json_file(FileKind::Snapshot, &json)?;
        durable_step("repository::listing::written");
        Ok(id)
    }

    /// Where locks are; rustic has none, restic has.
    pub(crate) fn lock_folder(&self) -> PathBuf {
        self.path().join("locks")
    }

    /// Writes a lock file; `before` is told its path before anybody can see it.
    pub(crate) fn write_lock(&self, json: &[u8], before: impl FnOnce(&Path)) -> Result<PathBuf, Error> {
        let stored = sealed(&self.cipher, json);
        let path = self.lock_folder().join(Id::of(&stored).to_string());
        before(&path);
        durable_step("repository::lock::writing");
        self.backend
            .put(&path, &stored)
            .map_err(|source| Error::io("cannot write the lock", &path, source))?;
        durable_step("repository::lock::written");
        Ok(path)
    }

    /// What a lock file says; none if it is gone or none of this repository.
    pub(crate) fn read_lock(&self, path: &Path) -> Option<Vec<u8>> {
        self.unsealed_json(fs::read(path).ok()?).ok()
    }

    fn unsealed_json(&self, mut stored: Vec<u8>) -> Result<Vec<u8>, String> {
        let plain = self.cipher.open(&mut stored).map_err(|_| "the MAC does not fit")?;
        match plain.split_first() {
            Some((2, packed)) => zstd::decode_all(packed).map_err(|error| error.to_string()),
            _ => Ok(plain.to_vec()),
        }
    }

    fn failed(&self, what: &'static str, error: &RusticError) -> Error {
        plain(what, self.path(), error)
    }
}

/// Every key file is named by its hash, so that a damaged one can be told from a wrong password.
fn check_keys(path: &Path) -> Result<(), Error> {
    let folder = path.join("keys");
    let failed = |path: &Path, source| Error::io("cannot read", path, source);
    for entry in fs::read_dir(&folder).map_err(|source| failed(&folder, source))? {
        let key = entry.map_err(|source| failed(&folder, source))?.path();
        let named = key.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse::<Id>().ok());
        let Some(id) = named else { continue };
        if Id::of(&fs::read(&key).map_err(|source| failed(&key, source))?) != id {
            return Err(Error::Damaged {
                path: path.to_owned(),
                what: format!("its key {} has changed", short(&id)),
                remedy: "put that file back from a copy, or remove it if there is another key",
            });
        }
    }
    Ok(())
}

fn backends(path: &Path) -> Result<(rustic_core::Repository<()>, Arc<Durable>), Error> {
    let text = path.to_str().ok_or_else(|| Error::Unsupported {
        what: format!("the path {} is not UTF-8; choose another for the repository", path.display()),
    })?;
    let inner = LocalBackend::new(text, []).map_err(|error| plain("cannot open", path, &error))?;
    let backend = Arc::new(Durable { path: path.to_owned(), inner });
    let options = RepositoryOptions::default().no_cache(true);
    let closed = rustic_core::Repository::new(&options, &RepositoryBackends::new(backend.clone(), None))
        .map_err(|error| plain("cannot open", path, &error))?;
    Ok((closed, backend))
}

/// rustic's errors are pages; the useful part is one line.
fn first_line(error: &RusticError) -> String {
    let log = error.display_log();
    log.strip_prefix("Error: ").unwrap_or(&log).lines().next().unwrap_or("unknown").to_owned()
}

fn plain(what: &'static str, path: &Path, error: &RusticError) -> Error {
    Error::io(what, path, io::Error::other(first_line(error)))
}

fn short(id: &Id) -> String {
    hex::encode(&id.0[..4])
}

fn to_rustic(id: &Id) -> RusticId {
    RusticId::new(id.0)
}

fn from_rustic(id: RusticId) -> Id {
    // 64 digits always parse.
    id.to_hex().as_str().parse().unwrap_or(Id([0; 32]))
}

/// A repository in a local folder, whose files are durable once they are written: temporary name, fsync,
/// rename, fsync of the folder. rustic writes through this too.
#[derive(Debug)]
struct Durable {
    path: PathBuf,
    inner: LocalBackend,
}

impl Durable {
    fn path_of(&self, kind: FileType, hex: &str) -> PathBuf {
        match kind {
            FileType::Config => self.path.join("config"),
            FileType::Pack => self.path.join("data").join(&hex[..2]).join(hex),
            _ => self.path.join(kind.dirname()).join(hex),
        }
    }

    fn put(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let folder = path.parent().unwrap_or(&self.path);
        let temporary = partial::name(path);
        let written = (|| -> io::Result<()> {
            let file = match DirectFile::create(&temporary) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    fs::create_dir_all(folder)?;
                    durable_step("repository::folder::made");
                    sync_folder(folder.parent().unwrap_or(&self.path))?;
                    durable_step("repository::folder::settled");
                    DirectFile::create(&temporary)?
                }
                created => created?,
            };
            file.write_all_at(bytes, 0)?;
            durable_step("repository::file::written");
            file.sync_all()?;
            durable_step("repository::file::synced");
            fs::rename(&temporary, path)?;
            durable_step("repository::file::renamed");
            Ok(())
        })();
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        written?;
        sync_folder(folder)?;
        durable_step("repository::file::settled");
        Ok(())
    }
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    fs::File::open(folder)?.sync_all()
}

impl ReadBackend for Durable {
    fn location(&self) -> String {
        self.inner.location()
    }
    fn list_with_size(&self, kind: FileType) -> RusticResult<Vec<(RusticId, u32)>> {
        self.inner.list_with_size(kind)
    }
    fn list(&self, kind: FileType) -> RusticResult<Vec<RusticId>> {
        self.inner.list(kind)
    }
    fn read_full(&self, kind: FileType, id: &RusticId) -> RusticResult<Bytes> {
        self.inner.read_full(kind, id)
    }
    fn read_partial(
        &self,
        kind: FileType,
        id: &RusticId,
        cacheable: bool,
        offset: u32,
        length: u32,
    ) -> RusticResult<Bytes> {
        self.inner.read_partial(kind, id, cacheable, offset, length)
    }
    fn warmup_path(&self, kind: FileType, id: &RusticId) -> String {
        self.inner.warmup_path(kind, id)
    }
}

impl WriteBackend for Durable {
    fn create(&self) -> RusticResult<()> {
        self.inner.create()
    }
    fn write_bytes(
        &self,
        kind: FileType,
        id: &RusticId,
        _cacheable: bool,
        content: BytesList,
    ) -> RusticResult<()> {
        let path = self.path_of(kind, id.to_hex().as_str());
        self.put(&path, &content.slice().concat()).map_err(|error| {
            let what = format!("cannot write {}: {error}", path.display());
            RusticError::with_source(RusticKind::InputOutput, what, error)
        })
    }
    fn remove(&self, kind: FileType, id: &RusticId, cacheable: bool) -> RusticResult<()> {
        self.inner.remove(kind, id, cacheable)
    }
}
