//! Random reads of a backup's disks, without restoring them.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use crate::Repository;
use crate::crypto::Cipher;
use crate::error::{Error, Unread};
use crate::id::Id;
use crate::info::BackupInfo;
use crate::list::{Chunk, index_of};
use crate::lock::Lock;
use crate::manifest::BackupDisk;
use crate::pack::Opener;

/// What a thread needs to read chunks.
pub(crate) struct Tools {
    pub(crate) opener: Opener,
    pub(crate) stored: Vec<u8>,
}

impl Tools {
    pub(crate) fn new(cipher: &Cipher) -> io::Result<Self> {
        Ok(Self { opener: Opener::new(cipher.clone())?, stored: Vec::new() })
    }
}

/// Chunks that were read last are kept, up to this many bytes.
const CACHE_BYTES: usize = 32 << 20;

struct ReadDisk {
    disk: BackupDisk,
    list: Vec<Chunk>,
    /// Where each chunk begins.
    starts: Vec<u64>,
}

impl ReadDisk {
    /// The place in the list of the chunk with this byte of the disk.
    fn first_at(&self, offset: u64) -> usize {
        self.starts.partition_point(|start| *start <= offset).saturating_sub(1)
    }
}

/// The disks of one backup, to be read at any place. It holds a lock: what it reads is not pruned.
pub struct BackupReader {
    repository: Arc<Repository>,
    backup: BackupInfo,
    disks: Vec<ReadDisk>,
    cache: Mutex<Cache>,
    _lock: Option<Lock>,
}

#[derive(Default)]
struct Cache {
    chunks: VecDeque<(Id, Arc<Vec<u8>>)>,
    bytes: usize,
}

impl Cache {
    fn get(&mut self, id: &Id) -> Option<Arc<Vec<u8>>> {
        let place = self.chunks.iter().position(|(known, _)| known == id)?;
        let found = self.chunks.remove(place)?;
        self.chunks.push_back(found.clone());
        Some(found.1)
    }

    fn put(&mut self, id: Id, chunk: Arc<Vec<u8>>) {
        self.bytes += chunk.len();
        self.chunks.push_back((id, chunk));
        while self.bytes > CACHE_BYTES && self.chunks.len() > 1 {
            self.bytes -= self.chunks.pop_front().map_or(0, |(_, oldest)| oldest.len());
        }
    }
}

impl Repository {
    /// Opens a backup's disks for reading.
    pub fn reader(self: &Arc<Self>, backup: &BackupInfo) -> Result<BackupReader, Error> {
        let unread = |unread: Unread| unread.of_backup(backup.id);
        let lock = self.lock_to_read()?;
        self.load_index()?;
        let mut files = self.read_tree(&backup.tree).map_err(unread)?;
        let disks = backup.disks.iter().map(|disk| {
            let list = self.disk_list(&mut files, disk)?;
            let starts =
                list.iter().scan(0, |next, chunk| Some(std::mem::replace(next, *next + chunk.bytes())));
            Ok(ReadDisk { disk: disk.clone(), starts: starts.collect(), list })
        });
        Ok(BackupReader {
            disks: disks.collect::<Result<_, Unread>>().map_err(unread)?,
            repository: self.clone(),
            backup: backup.clone(),
            cache: Mutex::default(),
            _lock: lock,
        })
    }
}

impl BackupReader {
    /// The backup.
    #[must_use]
    pub fn backup(&self) -> &BackupInfo {
        &self.backup
    }

    /// What of a disk is not zero: in order, disjoint, within `range`.
    #[must_use]
    pub fn data_extents(&self, disk: usize, range: Range<u64>) -> Vec<Range<u64>> {
        let Some(disk) = self.disks.get(disk) else { return Vec::new() };
        let mut extents: Vec<Range<u64>> = Vec::new();
        let first = disk.first_at(range.start);
        for (chunk, start) in disk.list[first..].iter().zip(&disk.starts[first..]) {
            let bytes = (*start).max(range.start)..(start + chunk.bytes()).min(range.end);
            if *start >= range.end {
                break;
            }
            match extents.last_mut() {
                _ if chunk.is_zero() || bytes.is_empty() => {}
                Some(last) if last.end == bytes.start => last.end = bytes.end,
                _ => extents.push(bytes),
            }
        }
        extents
    }

    /// Fills `buffer` with the bytes of a disk (by its place in the backup's list) from `offset`.
    pub fn read_at(&self, disk: usize, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        let unsupported =
            || Error::Unsupported { what: "the read is not within a disk of the backup".into() };
        let disk = self.disks.get(disk).ok_or_else(unsupported)?;
        let end = offset.checked_add(buffer.len() as u64).filter(|end| *end <= disk.disk.size_bytes);
        let end = end.ok_or_else(unsupported)?;
        let first = disk.first_at(offset);
        for (chunk, start) in disk.list.iter().zip(&disk.starts).skip(first) {
            if *start >= end {
                break;
            }
            let chunk_end = start + chunk.bytes();
            let piece = offset.max(*start)..end.min(chunk_end);
            let out = &mut buffer[index_of(piece.start - offset)..index_of(piece.end - offset)];
            if chunk.is_zero() {
                out.fill(0);
                continue;
            }
            let raw = self.chunk(chunk).map_err(|unread| match unread {
                Unread::Failed(error) => error,
                Unread::Damaged(why) => Error::ChunkDamaged {
                    backup: self.backup.id.short(),
                    disk: disk.disk.name.clone(),
                    offset: *start,
                    len: chunk.bytes(),
                    why,
                },
            })?;
            out.copy_from_slice(&raw[index_of(piece.start - start)..index_of(piece.end - start)]);
        }
        Ok(())
    }

    fn chunk(&self, chunk: &Chunk) -> Result<Arc<Vec<u8>>, Unread> {
        if let Some(known) = self.cache.lock().unwrap_or_else(PoisonError::into_inner).get(&chunk.id) {
            return Ok(known);
        }
        let mut tools = Tools::new(self.repository.store.cipher()).map_err(|error| error.to_string())?;
        let mut raw = vec![0; index_of(chunk.bytes())];
        self.repository.read_chunk(&mut tools, &chunk.id, &mut raw)?;
        let raw = Arc::new(raw);
        self.cache.lock().unwrap_or_else(PoisonError::into_inner).put(chunk.id, raw.clone());
        Ok(raw)
    }
}

impl std::fmt::Debug for BackupReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BackupReader").field("backup", &self.backup.id).finish_non_exhaustive()
    }
}
