//! The same backups in a second repository, without reading a replica again.
//!
//! A copy has the same chunks, the same tree and the same moment under another key: only chunks that the second
//! repository lacks are read from the first, opened, held against their hashes and sealed anew. It is listed in the
//! order in which a backup is (`model::backup::close`), so a copy that is cut off leaves no backup there either, and
//! the next one uses what it has stored.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use model::backup::{Closing, close};
use serde::{Deserialize, Serialize};

use crate::backup::{Packer, Progress, seconds_since};
use crate::direct::Aligned;
use crate::error::{Error, Unread};
use crate::id::{BackupId, ById, Id};
use crate::info::BackupInfo;
use crate::lock::Lock;
use crate::pack::{BlobKind, PackBuilder, Sealer};
use crate::reader::Tools;
use crate::rustic::{RunSummary, Snapshot};
use crate::storage::FileKind;
use crate::tree::TreeFile;
use crate::{Repository, parallel};

/// A backup that is in both repositories now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copied {
    /// In the first repository.
    pub from: BackupId,
    /// In the second.
    pub to: BackupId,
}

/// What a copy came to.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct CopyReport {
    /// What was copied.
    pub copied: Vec<Copied>,
    /// What was there already.
    pub there: Vec<Copied>,
    /// What is damaged in the first repository and was not copied, and why.
    pub damaged: Vec<(BackupId, String)>,
    /// Bytes of chunks that were read, before compression.
    pub bytes_read: u64,
    /// Bytes that the second repository grew by.
    pub bytes_added: u64,
    /// How long it took.
    pub seconds: f64,
}

/// One backup on its way into another repository.
struct Copying<'a> {
    from: &'a Repository,
    to: &'a Repository,
    backup: &'a BackupInfo,
    /// The backup there that has its parent's chunks.
    parent: Option<Id>,
    packer: Packer<'a>,
    lock: &'a Lock,
    began: Instant,
    bytes_read: AtomicU64,
    chunks_added: AtomicU64,
    progress: &'a dyn Fn(Progress),
    cancel: &'a AtomicBool,
}

impl Repository {
    /// Copies backups, in the order in which they are given, to another repository. What is damaged here is passed
    /// over and told; any other error ends it.
    pub fn copy(
        &self,
        backups: &[BackupInfo],
        to: &Repository,
        progress: &dyn Fn(Progress),
        cancel: &AtomicBool,
    ) -> Result<CopyReport, Error> {
        let began = Instant::now();
        let _reading = self.lock_to_read()?;
        let lock = Lock::shared(&to.store)?;
        self.load_index()?;
        to.load_index()?;
        to.store.settle(FileKind::Index)?;
        let mut there = to.backups(None)?;
        let mut report = CopyReport::default();
        for backup in backups {
            if let Some(known) = there.iter().find(|known| is_copy(known, backup)) {
                report.there.push(Copied { from: backup.id, to: known.id });
                continue;
            }
            let parent = backup.parent.and_then(|parent| {
                let pairs = report.copied.iter().chain(&report.there);
                pairs.filter(|pair| pair.from == parent).map(|pair| pair.to.0).next()
            });
            let copying = Copying {
                from: self,
                to,
                backup,
                parent,
                packer: Packer::new(&to.store, &to.index),
                lock: &lock,
                began: Instant::now(),
                bytes_read: AtomicU64::new(0),
                chunks_added: AtomicU64::new(0),
                progress,
                cancel,
            };
            match close(copying) {
                Ok((made, bytes_read)) => {
                    report.bytes_read += bytes_read;
                    report.bytes_added += made.bytes_added;
                    report.copied.push(Copied { from: backup.id, to: made.id });
                    there.push(made);
                }
                Err(Unread::Damaged(why)) => report.damaged.push((backup.id, why)),
                Err(Unread::Failed(error)) => return Err(error),
            }
        }
        report.seconds = began.elapsed().as_secs_f64();
        Ok(report)
    }
}

/// Whether it is the same run's backup: made at that moment, of that point, with those very chunks.
fn is_copy(known: &BackupInfo, backup: &BackupInfo) -> bool {
    (known.tree, known.vm, known.point, known.made_at)
        == (backup.tree, backup.vm, backup.point, backup.made_at)
}

impl Copying<'_> {
    /// The chunks that the second repository lacks, each once.
    fn missing(&self, files: &[TreeFile]) -> Vec<Id> {
        let mut seen: HashSet<Id, ById> = HashSet::default();
        let all = files.iter().flat_map(|file| &file.content);
        all.filter(|id| self.packer.lacks(id) && seen.insert(**id)).copied().collect()
    }

    fn copy_chunks(&self, missing: &[Id]) -> Result<(), Unread> {
        let damage = Mutex::new(None);
        // Progress is told on this thread alone; the others share the rest.
        let Self { from, to, packer, bytes_read, chunks_added, .. } = self;
        let work = |(tools, sealer, raw): &mut (Tools, Sealer, Vec<u8>), id: &Id| {
            let read = (|| {
                raw.resize(from.chunk_bytes(id)?, 0);
                from.read_chunk(tools, id, raw)
            })();
            if let Err(unread) = read {
                let why = unread.damage()?;
                damage.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
                return Err(Error::Cancelled);
            }
            bytes_read.fetch_add(raw.len() as u64, Ordering::Relaxed);
            if packer.claim(id) {
                let blob = sealer
                    .seal(*id, raw)
                    .map_err(|error| to.store.failed_here("cannot compress for", error))?;
                chunks_added.fetch_add(1, Ordering::Relaxed);
                if let Some(full) = packer.add(&blob, raw.len()) {
                    packer.write(full)?;
                }
            }
            Ok(())
        };
        let tools = (0..parallel::threads().max(packer.writers()))
            .map(|_| {
                let tools = Tools::new(from.store.cipher())?;
                Ok((tools, Sealer::new(to.store.cipher().clone())?, Vec::new()))
            })
            .collect::<std::io::Result<Vec<_>>>()
            .map_err(|error| to.store.failed_here("cannot compress for", error))?;
        let total_bytes = self.backup.disk_bytes();
        let tick = || {
            (self.progress)(Progress {
                done_bytes: self.bytes_read.load(Ordering::Relaxed),
                total_bytes,
                read_bytes: self.bytes_read.load(Ordering::Relaxed),
                added_bytes: self.packer.bytes_added(),
            });
        };
        let done = parallel::for_each(missing, tools, &work, &tick, self.cancel);
        match damage.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(why) => Err(why.into()),
            None => Ok(done?),
        }
    }

    /// The tree as it is, under the other key.
    fn copy_tree(&self) -> Result<(), Unread> {
        let tree = self.backup.tree;
        if self.to.index().tree(&tree).is_some_and(|location| location.present) {
            return Ok(());
        }
        let json = self.from.read_tree_json(&tree)?;
        let compress = |error| self.to.store.failed_here("cannot compress for", error);
        let mut sealer = Sealer::new(self.to.store.cipher().clone()).map_err(compress)?;
        let mut pack = PackBuilder::new(BlobKind::Tree, Aligned::default());
        pack.add(&sealer.seal(tree, &json).map_err(compress)?);
        Ok(self.packer.write(pack)?)
    }
}

impl Closing for Copying<'_> {
    type Error = Unread;
    type Listed = (BackupInfo, u64);

    fn store(&mut self) -> Result<(), Unread> {
        let files = self.from.read_tree(&self.backup.tree)?;
        self.copy_chunks(&self.missing(&files))?;
        if let Some(rest) = self.packer.take_rest() {
            self.packer.write(rest)?;
        }
        self.copy_tree()
    }

    fn index(&mut self) -> Result<(), Unread> {
        Ok(self.packer.write_index()?)
    }

    /// What was read was held against its hashes.
    fn check_source(&mut self) -> Result<(), Unread> {
        Ok(())
    }

    fn check_run(&mut self) -> Result<(), Unread> {
        if self.cancel.load(Ordering::Relaxed) {
            return Err(Error::Cancelled.into());
        }
        Ok(self.lock.check()?)
    }

    fn list(self) -> Result<(BackupInfo, u64), Unread> {
        let from = self.from.store.read_snapshot(&self.backup.id.0)?;
        let bytes_read = self.bytes_read.into_inner();
        let mut made = BackupInfo {
            parent: self.parent.map(BackupId),
            bytes_read,
            bytes_added: self.packer.bytes_added(),
            seconds: seconds_since(self.began),
            ..self.backup.clone()
        };
        let summary = RunSummary {
            began: made.made_at,
            ended: model::Timestamp::from(std::time::SystemTime::now()),
            disks: made.disks.len() as u64,
            disk_bytes: made.disk_bytes(),
            raw_bytes_added: self.packer.raw_bytes_added(),
            packed_bytes_added: self.packer.bytes_added(),
            chunks_added: self.chunks_added.into_inner(),
        };
        let description = from.description.clone().map_or_else(|| self.from.describe(&made), Ok)?;
        let snapshot = Snapshot { parent: self.parent, description: Some(description), ..from };
        made.id = BackupId(self.to.store.write_snapshot(snapshot, summary)?);
        Ok((made, bytes_read))
    }
}
