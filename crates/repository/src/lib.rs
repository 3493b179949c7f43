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
//! What it does not do: know views, holds or chains; schedule; forget and prune. All of it blocks: call it on
//! a thread that may.

mod backup;
mod crypto;
mod cutter;
mod direct;
mod error;
#[doc(hidden)]
pub mod fuzzing;
mod id;
mod index;
mod info;
mod list;
mod lock;
mod manifest;
mod pack;
mod parallel;
mod partial;
mod reader;
mod restore;
mod rustic;
mod source;
mod tree;
mod verify;
mod zeros;

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

pub use backup::{BackupMeta, BackupReport, Progress};
pub use error::{Error, ErrorKind};
pub use id::BackupId;
pub use info::BackupInfo;
pub use manifest::BackupDisk;
pub use reader::BackupReader;
pub use restore::{
    DamagedRange, Format, Onto, OntoDisk, OntoOptions, OntoReport, RestoreOptions, RestoreReport,
    RestoredDisk,
};
pub use source::{Source, SourceDisk};
pub use verify::{Damage, VerifyOptions, VerifyReport};

use id::Id;
use index::Index;
use list::Chunk;
use manifest::DEFINITION_FILE;
use pack::Opener;
use reader::Tools;
use rustic::Store;
use tree::TreeFile;

/// An open repository. Its functions can be called from several threads at once; several backups can
/// run into it at once, of one process or of several.
pub struct Repository {
    store: Arc<Store>,
    index: RwLock<Index>,
}

impl Repository {
    /// Makes a repository at `path`, which gets the folder if there is none.
    pub fn create(path: impl AsRef<Path>, password: &str) -> Result<Self, Error> {
        Store::create(path.as_ref(), password).map(Self::of)
    }

    /// Opens the repository at `path`. Takes some tenths of a second: passwords are meant to be slow to try.
    pub fn open(path: impl AsRef<Path>, password: &str) -> Result<Self, Error> {
        Store::open(path.as_ref(), password).map(Self::of)
    }

    fn of(store: Store) -> Self {
        Self { store: Arc::new(store), index: RwLock::default() }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.store.path()
    }

    /// About how much memory it takes up between two uses, in bytes: its index.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.index().memory_bytes()
    }

    /// The VM's definition as it was when the backup was made.
    pub fn definition(&self, backup: &BackupInfo) -> Result<serde_json::Value, Error> {
        let damaged = |what| Error::BackupDamaged { backup: backup.id.short(), what };
        self.load_index()?;
        let files = self.read_tree(&backup.tree).map_err(damaged)?;
        let json = self.read_small_file(&files, DEFINITION_FILE).map_err(damaged)?;
        serde_json::from_slice(&json).map_err(|error| damaged(format!("its definition is not JSON: {error}")))
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

    /// A tree's files; else what is wrong with it.
    fn read_tree(&self, id: &Id) -> Result<Vec<TreeFile>, String> {
        let location = self.index().tree(id);
        let location = location.ok_or_else(|| self.not_indexed("its list of files"))?;
        let (mut stored, mut json) = (Vec::new(), vec![0; location.raw_bytes()]);
        self.store.read_pack(&location.pack, location.offset, location.len, &mut stored)?;
        Opener::new(self.store.cipher().clone())
            .map_err(|error| error.to_string())?
            .open(id, location.raw_len, &mut stored, &mut json)
            .map_err(|why| format!("its list of files is damaged: {why}"))?;
        drop(stored);
        tree::decode(&json).map_err(|why| format!("its list of files is damaged: {why}"))
    }

    /// How long a chunk is; else what is wrong with it.
    fn chunk_bytes(&self, id: &Id) -> Result<usize, String> {
        let location = self.index().data(id);
        location.map(|location| location.raw_bytes()).ok_or_else(|| self.not_indexed("the chunk"))
    }

    /// One chunk into `raw`, which it fills; else what is wrong with it.
    fn read_chunk(&self, tools: &mut Tools, id: &Id, raw: &mut [u8]) -> Result<(), String> {
        let location = self.index().data(id);
        let location = location.ok_or_else(|| self.not_indexed("the chunk"))?;
        let Tools { opener, stored } = tools;
        self.store.read_pack(&location.pack, location.offset, location.len, stored)?;
        opener
            .open(id, location.raw_len, stored, raw)
            .map_err(|why| format!("pack {} is damaged: {why}", BackupId(location.pack).short()))
    }

    /// A disk's list of chunks, checked against the manifest; the disk's content is taken out of `files`.
    fn disk_list(&self, files: &mut [TreeFile], disk: &BackupDisk) -> Result<Vec<Chunk>, String> {
        let lengths = self.read_small_file(files, &disk.lengths_file());
        let name = disk.raw_file();
        let file = files.iter_mut().find(|file| file.name == name);
        let ids = std::mem::take(&mut file.ok_or_else(|| format!("it has no file {name}"))?.content);
        // The index has the lengths too, as long as it has all chunks.
        let lengths = lengths.or_else(|why| self.indexed_lengths(&ids).ok_or(why))?;
        list_of(disk, &ids, &lengths)
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
    fn read_small_file(&self, files: &[TreeFile], name: &str) -> Result<Vec<u8>, String> {
        let file =
            files.iter().find(|file| file.name == name).ok_or_else(|| format!("it has no file {name}"))?;
        let mut tools = Tools::new(self.store.cipher()).map_err(|error| error.to_string())?;
        let mut whole = Vec::new();
        for id in &file.content {
            let damaged = |why| format!("its file {name}: {why}");
            let start = whole.len();
            whole.resize(start + self.chunk_bytes(id).map_err(damaged)?, 0);
            self.read_chunk(&mut tools, id, &mut whole[start..]).map_err(damaged)?;
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
        f.debug_struct("Repository").field("path", &self.path()).finish_non_exhaustive()
    }
}
