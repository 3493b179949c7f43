//! The index: where each chunk and tree is.
//!
//! Kept in memory while the repository is open, 48 bytes for a chunk ([`Places`]), and brought up to date from the
//! index files that are new. A chunk counts as there only if the pack that has it is there too; a backup
//! writes it again otherwise, so a lost pack heals as far as the bytes still exist.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use crate::crypto::SEAL_BYTES;
use crate::error::{Error, Unread};
use crate::id::{ById, Id};
use crate::pack::{BlobKind, PackedBlob};
use crate::places::{Entry, Places, of_map};
use crate::storage::FileKind;
use crate::store::Store;

/// Where a blob is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Location {
    pub(crate) pack: Id,
    pub(crate) offset: u32,
    pub(crate) len: u32,
    /// Before compression; zero if it is stored as it is.
    pub(crate) raw_len: u32,
    /// Whether the pack is there.
    pub(crate) present: bool,
}

impl Location {
    /// How long the blob is before compression.
    pub(crate) fn raw_bytes(&self) -> usize {
        match self.raw_len {
            0 => (self.len as usize).saturating_sub(SEAL_BYTES),
            raw_len => raw_len as usize,
        }
    }
}

struct PackState {
    id: Id,
    present: bool,
}

/// The index in memory.
#[derive(Default)]
pub(crate) struct Index {
    data: Places,
    trees: Places,
    packs: Vec<PackState>,
    loaded: HashSet<Id, ById>,
    /// Index files that could not be read, and why.
    damaged: Vec<(Id, String)>,
}

impl Index {
    /// Where a chunk is, if any index file names it.
    pub(crate) fn data(&self, id: &Id) -> Option<Location> {
        self.data.get(id).map(|entry| self.location(&entry))
    }

    /// Where a tree is.
    pub(crate) fn tree(&self, id: &Id) -> Option<Location> {
        self.trees.get(id).map(|entry| self.location(&entry))
    }

    /// Whether a chunk is there to be referred to.
    pub(crate) fn has_data(&self, id: &Id) -> bool {
        self.data.get(id).is_some_and(|entry| self.packs[entry.pack as usize].present)
    }

    /// About how much memory it takes up.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.data.memory_bytes()
            + self.trees.memory_bytes()
            + of_map(self.loaded.capacity(), size_of::<Id>())
            + self.packs.capacity() * size_of::<PackState>()
    }

    /// The packs that index files name, and whether they are there.
    pub(crate) fn packs(&self) -> impl Iterator<Item = (Id, bool)> {
        self.packs.iter().map(|pack| (pack.id, pack.present))
    }

    /// Index files that could not be read, and why.
    pub(crate) fn damaged(&self) -> &[(Id, String)] {
        &self.damaged
    }

    fn location(&self, entry: &Entry) -> Location {
        let pack = &self.packs[entry.pack as usize];
        Location {
            pack: pack.id,
            offset: entry.offset,
            len: entry.len,
            raw_len: entry.raw_len,
            present: pack.present,
        }
    }

    fn add(&mut self, pack: Id, present: bool, kind: BlobKind, blobs: impl Iterator<Item = PackedBlob>) {
        // More than 4 billion packs of 16 MiB do not exist.
        let Ok(number) = u32::try_from(self.packs.len()) else { return };
        self.packs.push(PackState { id: pack, present });
        let packs = &self.packs;
        let places = match kind {
            BlobKind::Data => &mut self.data,
            BlobKind::Tree => &mut self.trees,
        };
        for blob in blobs {
            let entry = Entry { pack: number, offset: blob.offset, len: blob.len, raw_len: blob.raw_len };
            places.add(blob.id, entry, |entry| packs[entry.pack as usize].present);
        }
    }

    /// Sorts what many additions have brought.
    fn settle(&mut self) {
        let packs = &self.packs;
        let present = |entry: &Entry| packs[entry.pack as usize].present;
        self.data.settle(present);
        self.trees.settle(present);
    }

    /// Takes in packs that were just written, and the index file that names them.
    pub(crate) fn add_written(&mut self, file: Id, packs: &[IndexedPack]) {
        for pack in packs {
            self.add(pack.id, true, pack.kind, pack.blobs.iter().copied());
        }
        self.loaded.insert(file);
        if self.data.is_unsettled() {
            self.settle();
        }
    }

    /// Brings the index up to date with the repository. A damaged index file is remembered, not fatal: what
    /// it names is simply not there.
    pub(crate) fn refresh(&mut self, store: &Store) -> Result<(), Error> {
        let packs: HashSet<Id, ById> = store.list(FileKind::Pack)?.into_iter().collect();
        let files: HashSet<Id, ById> = store.list(FileKind::Index)?.into_iter().collect();
        let vanished = self.loaded.iter().any(|file| !files.contains(file))
            || self.packs.iter().any(|pack| pack.present != packs.contains(&pack.id))
            || !self.damaged.is_empty();
        if vanished {
            *self = Self::default();
        }
        for file in files {
            if self.data.is_unsettled() {
                self.settle();
            }
            if self.loaded.contains(&file) {
                continue;
            }
            match read_index_file(store, &file) {
                Ok(contents) => {
                    for pack in contents.packs {
                        let kind = pack.kind();
                        self.add(pack.id, packs.contains(&pack.id), kind, pack.packed());
                    }
                    self.loaded.insert(file);
                }
                Err(unread) => {
                    let why = unread.damage()?;
                    tracing::warn!(%file, why, "an index file is damaged");
                    self.damaged.push((file, why));
                }
            }
        }
        self.settle();
        Ok(())
    }
}

/// What an index of so many chunks, in packs of 21 (16 MiB at the usual length), takes up: for measuring.
pub(crate) fn simulated(chunks: u64) -> (usize, impl Fn(u64) -> bool) {
    let id = |number: u64| Id::of(&number.to_le_bytes());
    let mut index = Index::default();
    for first in (0..chunks).step_by(21) {
        let blob = |number: u64| PackedBlob {
            id: id(number),
            offset: u32::try_from((number - first) * 800_000).unwrap_or(u32::MAX),
            len: 800_000,
            raw_len: 1 << 20,
        };
        index.add(id(u64::MAX - first), true, BlobKind::Data, (first..(first + 21).min(chunks)).map(blob));
        if index.data.is_unsettled() {
            index.settle();
        }
    }
    index.settle();
    (index.memory_bytes(), move |number| index.has_data(&id(number)))
}

fn read_index_file(store: &Store, id: &Id) -> Result<FileJson, Unread> {
    let json = store.read_json_file(FileKind::Index, id)?;
    serde_json::from_slice(&json).map_err(|error| error.to_string().into())
}

/// A pack whose bytes are durable, kept until an index file names it.
pub(crate) struct IndexedPack {
    pub(crate) id: Id,
    pub(crate) kind: BlobKind,
    pub(crate) blobs: Vec<PackedBlob>,
}

/// Writes an index file that names these packs; durable when this returns.
pub(crate) fn write_index_file(store: &Store, packs: &[IndexedPack]) -> Result<Id, Error> {
    let file = FileJson {
        packs: packs
            .iter()
            .map(|pack| PackJson {
                id: pack.id,
                blobs: pack
                    .blobs
                    .iter()
                    .map(|blob| BlobJson {
                        id: blob.id,
                        kind: match pack.kind {
                            BlobKind::Data => KindJson::Data,
                            BlobKind::Tree => KindJson::Tree,
                        },
                        offset: blob.offset,
                        length: blob.len,
                        uncompressed_length: blob.raw_len,
                    })
                    .collect(),
            })
            .collect(),
    };
    let json =
        serde_json::to_vec(&file).map_err(|error| store.failed_here("cannot encode the index of", error))?;
    store.write_json_file(FileKind::Index, &json)
}

#[derive(Serialize, Deserialize)]
struct FileJson {
    packs: Vec<PackJson>,
}

#[derive(Serialize, Deserialize)]
struct PackJson {
    id: Id,
    blobs: Vec<BlobJson>,
}

impl PackJson {
    fn kind(&self) -> BlobKind {
        match self.blobs.first().map(|blob| &blob.kind) {
            Some(KindJson::Tree) => BlobKind::Tree,
            _ => BlobKind::Data,
        }
    }

    fn packed(self) -> impl Iterator<Item = PackedBlob> {
        self.blobs.into_iter().map(|blob| PackedBlob {
            id: blob.id,
            offset: blob.offset,
            len: blob.length,
            raw_len: blob.uncompressed_length,
        })
    }
}

#[derive(Serialize, Deserialize)]
struct BlobJson {
    id: Id,
    #[serde(rename = "type")]
    kind: KindJson,
    offset: u32,
    length: u32,
    #[serde(default, deserialize_with = "or_zero", skip_serializing_if = "is_zero")]
    uncompressed_length: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum KindJson {
    Data,
    Tree,
}

/// rustic writes `null` for what is not compressed, restic nothing.
fn or_zero<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(length: &u32) -> bool {
    *length == 0
}
