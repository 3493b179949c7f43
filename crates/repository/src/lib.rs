//! Backups in restic format.
//!
//! A [`Repository`] is a standard restic repository: stock `restic` lists, checks, dumps and restores what is
//! in it, without us. A backup is one recovery point of one VM, with all its disks, its definition and a
//! manifest (`docs/format/backup-v1.md`). rustic keeps the repository, its keys and its config (all of that in
//! `rustic`); the path that speed depends on is ours: [`Repository::backup`] takes over the parent's list of
//! chunks and reads, hashes, compresses, encrypts and packs only what has changed, on all cores, in bounded
//! memory.
//!
//! Invariants:
//! * only a [`Source`] with an admission from the gate can be backed up;
//! * everything that a backup needs is durable before it is listed; a run that fails, is killed or loses
//!   its view leaves no backup, only packs that nothing refers to, which the next run uses again if it can;
//! * a restore gives the bytes that were backed up, or says which it could not give.
//!
//! What it does not do: know views, holds or chains; schedule; decide what is to be forgotten. All of it blocks: call it on
//! a thread that may.

mod backup;
mod check;
mod copy;
mod crypto;
mod cutter;
mod direct;
mod error;
#[doc(hidden)]
pub mod fuzzing;
mod id;
mod index;
mod info;
mod keys;
mod list;
mod location;
mod lock;
mod maintain;
mod manifest;
mod owner;
mod pack;
mod parallel;
mod partial;
mod places;
mod reader;
mod restore;
mod rustic;
mod source;
mod storage;
mod store;
mod tree;
mod verify;
mod zeros;

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

pub use backup::{BackupMeta, BackupReport, Progress};
pub use check::{CheckReport, Found};
pub use copy::{Copied, CopyReport};
pub use error::{Error, ErrorKind};
pub use id::BackupId;
pub use info::BackupInfo;
pub use keys::KeyInfo;
pub use location::{Access, Location, Secret};
pub use lock::Unlocked;
pub use maintain::{PruneOptions, PruneReport};
pub use manifest::BackupDisk;
pub use reader::BackupReader;
pub use restore::{
    DamagedRange, Format, Onto, OntoDisk, OntoOptions, OntoReport, RestoreOptions, RestoreReport,
    RestoredDisk,
};
pub use source::{Source, SourceDisk};
pub use verify::{Damage, VerifyOptions, VerifyReport};

use error::Unread;
use id::Id;
use index::Index;
use list::Chunk;
use manifest::DEFINITION_FILE;
use pack::Opener;
use reader::Tools;
use store::Store;
use tree::TreeFile;

/// An open repository. Its functions can be called from several threads at once; several backups can
/// run into it at once, of one process or of several.
pub struct Repository {
    store: Arc<Store>,
    location: Location,
    index: RwLock<Index>,
}

impl Repository {
    /// Makes a repository there: a local one gets its folder, one of S3 its bucket, if there is none.
    pub fn create(location: impl Into<Location>, password: &str) -> Result<Self, Error> {
        let location = location.into();
        let store = rustic::create(storage::connect(&location)?, password)?;
        Ok(Self::of(store, location))
    }

    /// Opens the repository there. Takes some tenths of a second: passwords are meant to be slow to try.
    pub fn open(location: impl Into<Location>, password: &str) -> Result<Self, Error> {
        let location = location.into();
        let store = rustic::open(storage::connect(&location)?, password)?;
        Ok(Self::of(store, location))
    }

    fn of(store: Store, location: Location) -> Self {
        Self { store: Arc::new(store), location, index: RwLock::default() }
    }

    /// Where it is.
    #[must_use]
    pub fn location(&self) -> &Location {
        &self.location
    }

    /// Whether it is still there.
    pub fn is_there(&self) -> Result<bool, Error> {
        self.store.has(storage::FileKind::Config, &Id([0; 32]))
    }

    /// Removes locks whose owners are dead; with `all`, every lock: then nobody else may be using it.
    pub fn unlock(&self, all: bool) -> Result<Unlocked, Error> {
        lock::unlock(&self.store, all)
    }

    fn at(&self) -> &str {
        self.store.at()
    }

    /// About how much memory it takes up between two uses, in bytes: its index.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.index().memory_bytes()
    }

    /// The VM's definition as it was when the backup was made.
    pub fn definition(&self, backup: &BackupInfo) -> Result<serde_json::Value, Error> {
        let unread = |unread: Unread| unread.of_backup(backup.id);
        self.load_index()?;
        let files = self.read_tree(&backup.tree).map_err(unread)?;
        let json = self.read_small_file(&files, DEFINITION_FILE).map_err(unread)?;
        serde_json::from_slice(&json)
            .map_err(|error| unread(format!("its definition is not JSON: {error}").into()))
    }

    fn index(&self) -> RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn index_mut(&self) -> RwLockWriteGuard<'_, Index> {
        self.index.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings the index in memory up to date.
    fn load_index(&self) -> Result<(), Error> {
        self.index_mut().refresh(&self.store)
    }

    /// A tree's files.
    fn read_tree(&self, id: &Id) -> Result<Vec<TreeFile>, Unread> {
        let json = self.read_tree_json(id)?;
        tree::decode(&json).map_err(|why| format!("its list of files is damaged: {why}").into())
    }

    /// A tree as it was written.
    fn read_tree_json(&self, id: &Id) -> Result<Vec<u8>, Unread> {
        let location = self.index().tree(id);
        let location = location.ok_or_else(|| self.not_indexed("its list of files"))?;
        let (mut stored, mut json) = (Vec::new(), vec![0; location.raw_bytes()]);
        self.store.read_pack(&location.pack, location.offset, location.len, &mut stored)?;
        Opener::new(self.store.cipher().clone())
            .map_err(|error| error.to_string())?
            .open(id, location.raw_len, &mut stored, &mut json)
            .map_err(|why| format!("its list of files is damaged: {why}"))?;
        Ok(json)
    }

    /// How long a chunk is; else what is wrong with it.
    fn chunk_bytes(&self, id: &Id) -> Result<usize, String> {
        let location = self.index().data(id);
        location.map(|location| location.raw_bytes()).ok_or_else(|| self.not_indexed("the chunk"))
    }

    /// One chunk into `raw`, which it fills.
    fn read_chunk(&self, tools: &mut Tools, id: &Id, raw: &mut [u8]) -> Result<(), Unread> {
        let location = self.index().data(id);
        let location = location.ok_or_else(|| self.not_indexed("the chunk"))?;
        let Tools { opener, stored } = tools;
        self.store.read_pack(&location.pack, location.offset, location.len, stored)?;
        opener
            .open(id, location.raw_len, stored, raw)
            .map_err(|why| format!("pack {} is damaged: {why}", BackupId(location.pack).short()).into())
    }

    /// A disk's list of chunks, checked against the manifest; the disk's content is taken out of `files`.
    fn disk_list(&self, files: &mut [TreeFile], disk: &BackupDisk) -> Result<Vec<Chunk>, Unread> {
        let lengths = self.read_small_file(files, &disk.lengths_file());
        let name = disk.raw_file();
        let file = files.iter_mut().find(|file| file.name == name);
        let ids = std::mem::take(&mut file.ok_or_else(|| format!("it has no file {name}"))?.content);
        // The index has the lengths too, as long as it has all chunks.
        let lengths = match lengths {
            Err(Unread::Damaged(why)) => self.indexed_lengths(&ids).ok_or(why)?,
            lengths => lengths?,
        };
        Ok(list_of(disk, &ids, &lengths)?)
    }

    /// The lengths of these chunks as the index has them.
    fn indexed_lengths(&self, ids: &[Id]) -> Option<Vec<u8>> {
        let index = self.index();
        let chunk = |id: &Id| {
            let bytes = u32::try_from(index.data(id)?.raw_bytes()).ok()?;
            let zeros = zeros::zero_chunks(bytes.into()).next().filter(|zeros| zeros.id == *id);
            Some(zeros.unwrap_or(Chunk::data(*id, bytes)))
        };
        Some(list::encode_lengths(&ids.iter().map(chunk).collect::<Option<Vec<_>>>()?))
    }

    fn not_indexed(&self, what: &str) -> String {
        match self.index().damaged().first() {
            Some((file, _)) => format!(
                "{what} is not in the index, of which file {} is damaged (run 'restic rebuild-index')",
                BackupId(*file).short()
            ),
            None => format!("{what} is not in the index"),
        }
    }

    /// The content of a small file of a backup.
    fn read_small_file(&self, files: &[TreeFile], name: &str) -> Result<Vec<u8>, Unread> {
        let file =
            files.iter().find(|file| file.name == name).ok_or_else(|| format!("it has no file {name}"))?;
        let mut tools = Tools::new(self.store.cipher()).map_err(|error| error.to_string())?;
        let mut whole = Vec::new();
        for id in &file.content {
            let damaged = |why: String| format!("its file {name}: {why}");
            let start = whole.len();
            whole.resize(start + self.chunk_bytes(id).map_err(damaged)?, 0);
            self.read_chunk(&mut tools, id, &mut whole[start..]).map_err(|unread| unread.damaged(damaged))?;
        }
        Ok(whole)
    }
}

/// A disk's chunks from the two halves of their list; else what is wrong with it.
fn list_of(disk: &BackupDisk, ids: &[Id], lengths: &[u8]) -> Result<Vec<Chunk>, String> {
    let list = list::decode(ids, lengths, disk.size_bytes)
        .map_err(|why| format!("the list of chunks of disk {} is damaged: {why}", disk.name))?;
    if list::digest(disk.size_bytes, &list) != disk.digest {
        return Err(format!("the list of chunks of disk {} has not the manifest's digest", disk.name));
    }
    Ok(list)
}

impl std::fmt::Debug for Repository {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Repository").field("at", &self.at()).finish_non_exhaustive()
    }
}
