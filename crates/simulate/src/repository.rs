//! A repository in miniature: chunks in packs, an index, listings, each durable in its own step on a disk that
//! may lose what was not synced.
//!
//! It stands for `repository`, whose threads and ciphers have no place in a deterministic world. What a backup may
//! build on and the order in which it comes into the list are the product's own (`model::backup`).

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use files::{FileSystem, Open};
use model::{DiskName, PointInfo, VmId};
use serde::{Deserialize, Serialize};

use crate::disk::SimDisk;

/// Disks are cut every this many bytes.
pub const CHUNK_BYTES: u64 = 16 * 1024;
/// A pack has at most so many chunks.
const PACK_CHUNKS: usize = 4;

/// The hash that a chunk is known by.
pub type ChunkId = String;

/// A disk of a backup.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ListedDisk {
    /// Its name.
    pub name: DiskName,
    /// Its size.
    pub size_bytes: u64,
    /// Its chunks, in order.
    pub chunks: Vec<ChunkId>,
}

/// A backup that is listed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Listed {
    /// The VM.
    pub vm: VmId,
    /// Its recovery point.
    pub point: PointInfo,
    /// Its disks.
    pub disks: Vec<ListedDisk>,
}

/// An open repository.
pub struct SimRepository {
    disk: SimDisk,
    root: PathBuf,
    /// Where each chunk is: pack, offset, length.
    index: BTreeMap<ChunkId, (String, u64, u64)>,
}

/// Chunks on their way into packs.
#[derive(Default)]
pub struct Packing {
    open: Vec<(ChunkId, Vec<u8>)>,
    /// What is in durable packs and not in the index yet.
    packed: BTreeMap<ChunkId, (String, u64, u64)>,
}

impl SimRepository {
    /// Opens it, making it where there is none; only what is in the index is known.
    pub fn open(disk: &SimDisk, root: &Path) -> io::Result<Self> {
        for folder in ["packs", "index", "listed"] {
            disk.create_dir_all(&root.join(folder))?;
        }
        disk.sync_dir(root)?;
        disk.sync_dir(Path::new("/"))?;
        let mut repository = Self { disk: disk.clone(), root: root.to_path_buf(), index: BTreeMap::new() };
        for file in repository.names("index")? {
            let part: BTreeMap<ChunkId, (String, u64, u64)> = repository.read_json("index", &file)?;
            repository.index.extend(part);
        }
        Ok(repository)
    }

    /// What is found in the index is built on, and whoever wrote it may have failed before it was durable.
    pub fn settle(&self) -> io::Result<()> {
        self.disk.sync_dir(&self.root.join("index"))
    }

    /// The names of the files of a kind; what was not renamed to its end is no file.
    fn names(&self, kind: &str) -> io::Result<Vec<String>> {
        let entries = self.disk.read_dir(&self.root.join(kind))?;
        let names = entries.into_iter().filter_map(|entry| entry.name.into_string().ok());
        Ok(names.filter(|name| !name.ends_with(".new")).collect())
    }

    fn read(&self, kind: &str, name: &str) -> io::Result<Vec<u8>> {
        let file = self.disk.open(&self.root.join(kind).join(name), Open::Read)?;
        let mut bytes = vec![0; usize::try_from(file.len()?).unwrap_or(0)];
        file.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    fn read_json<T: serde::de::DeserializeOwned>(&self, kind: &str, name: &str) -> io::Result<T> {
        serde_json::from_slice(&self.read(kind, name)?).map_err(io::Error::other)
    }

    /// Writes a file under its hash; it is durable when this returns.
    fn put(&self, kind: &str, bytes: &[u8]) -> io::Result<String> {
        let name = blake3::hash(bytes).to_hex().to_string();
        let folder = self.root.join(kind);
        let (fresh, path) = (folder.join(format!("{name}.new")), folder.join(&name));
        let file = self.disk.open(&fresh, Open::Create)?;
        file.set_len(0)?;
        file.write_all_at(bytes, 0)?;
        file.sync_all()?;
        self.disk.rename(&fresh, &path)?;
        self.disk.sync_dir(&folder)?;
        Ok(name)
    }

    /// Takes a chunk, unless it is there already.
    pub fn add(&self, packing: &mut Packing, bytes: &[u8]) -> io::Result<ChunkId> {
        let id = blake3::hash(bytes).to_hex().to_string();
        let known = self.index.contains_key(&id)
            || packing.packed.contains_key(&id)
            || packing.open.iter().any(|(open, _)| *open == id);
        if !known {
            packing.open.push((id.clone(), bytes.to_vec()));
            if packing.open.len() >= PACK_CHUNKS {
                self.flush(packing)?;
            }
        }
        Ok(id)
    }

    /// Makes what was taken durable.
    pub fn flush(&self, packing: &mut Packing) -> io::Result<()> {
        let open = std::mem::take(&mut packing.open);
        if open.is_empty() {
            return Ok(());
        }
        let pack: Vec<u8> = open.iter().flat_map(|(_, bytes)| bytes.iter().copied()).collect();
        let name = self.put("packs", &pack)?;
        let mut offset = 0;
        for (id, bytes) in open {
            packing.packed.insert(id, (name.clone(), offset, bytes.len() as u64));
            offset += bytes.len() as u64;
        }
        Ok(())
    }

    /// Makes the index of what was packed durable; from here on it is known.
    pub fn write_index(&mut self, packing: &mut Packing) -> io::Result<()> {
        if packing.packed.is_empty() {
            return Ok(());
        }
        self.put("index", &serde_json::to_vec(&packing.packed).map_err(io::Error::other)?)?;
        self.index.append(&mut packing.packed);
        Ok(())
    }

    /// Lists a backup.
    pub fn list_backup(&self, backup: &Listed) -> io::Result<()> {
        self.put("listed", &serde_json::to_vec(backup).map_err(io::Error::other)?).map(drop)
    }

    /// All backups that are listed.
    pub fn backups(&self) -> io::Result<Vec<Listed>> {
        self.names("listed")?.iter().map(|name| self.read_json("listed", name)).collect()
    }

    /// The bytes of a chunk, from the pack that the index on the disk names.
    pub fn chunk(&self, id: &ChunkId) -> io::Result<Vec<u8>> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, format!("chunk {id} is not in the index"));
        let (pack, offset, len) = self.index.get(id).ok_or_else(missing)?;
        let file = self.disk.open(&self.root.join("packs").join(pack), Open::Read)?;
        let mut bytes = vec![0; usize::try_from(*len).unwrap_or(0)];
        file.read_exact_at(&mut bytes, *offset)?;
        if blake3::hash(&bytes).to_hex().as_str() != id {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("chunk {id} has other bytes")));
        }
        Ok(bytes)
    }
}

impl std::fmt::Display for Listed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the backup of point {} of VM {}", self.point.number, self.vm)
    }
}
