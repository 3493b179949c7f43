//! One VM in memory: its chain, who reads it, and what goes on with it.
//!
//! Locks, in the order in which they may be taken: `work` (one apply, merge or move at a time), `layering` (the
//! layers of a failover are made or removed), `receiving` (one log arrives at a time), `state` (short; a change of the chain's state is committed to
//! the catalog under it). Whoever holds `state` sees a chain that does not change, so the gate's answer
//! and the pin that follows from it are one step.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use chain::{CompactRule, FEW_LOGS};
use files::File;
use log::{Index, LogMeta};
use model::group::GroupMoment;
use model::{ApplyState, DiskName, Health, LogId, LogNumber, Phase, PointInfo, Timestamp, VmId};

use crate::error::{Error, Result};
use crate::folder::Folder;
use crate::fs::Files;
use crate::reader::ChainReader;
use crate::receive::Incoming;
use crate::rows::{DiskSize, HoldRow, LogRow, VmRow};

/// One VM of the store.
pub(crate) struct Vm {
    pub id: VmId,
    pub work: Mutex<()>,
    pub receiving: Mutex<Option<Incoming>>,
    /// Held while the layers of a failover are made or removed.
    pub layering: Mutex<()>,
    state: Mutex<State>,
    /// Told when an apply has ended, a barrier was given back or a hold has ended.
    pub changed: Condvar,
}

/// What is true of a VM now. The row, logs and points are what the catalog has.
pub(crate) struct State {
    pub row: VmRow,
    /// The file system that the VM's folder is on.
    pub files: Files,
    pub logs: BTreeMap<LogNumber, Arc<ChainLog>>,
    pub points: BTreeMap<LogNumber, PointInfo>,
    /// What was announced of logs: the moment of the VM's group that each is of.
    pub moments: BTreeMap<LogNumber, (LogId, GroupMoment)>,
    /// The points that all members of the VM's group have, as last seen.
    pub shared: BTreeSet<LogNumber>,
    pub holds: Vec<HoldRow>,
    pub apply: ApplyState,
    /// How many read each point; what a person pins is in the row.
    pub pins: BTreeMap<LogNumber, usize>,
    /// Raised when all views that are open must end.
    pub epoch: u64,
    pub revoked: String,
    /// How many failovers have ended: a view of one is worth nothing after that.
    pub failovers: u64,
    /// When each barrier ends by itself.
    pub barriers: BTreeMap<u64, Timestamp>,
    pub barriers_made: u64,
    /// How many backups have replication paused.
    pub pauses: usize,
    /// When a failed apply is tried again by itself.
    pub retry_at: Timestamp,
    pub health: (Health, Timestamp),
    /// Groups of logs that were looked at and are not worth merging, by their first log.
    pub looked_at: BTreeMap<LogNumber, LookedAt>,
    /// The newest state, as the last call for digests read it.
    pub newest: Option<(LogNumber, Arc<ChainReader>)>,
    pub removed: bool,
}

/// A group of logs that was not worth merging: the answer changes only when the logs do.
pub(crate) struct LookedAt {
    pub logs: Vec<LogNumber>,
    pub raw_bytes: u64,
}

impl Vm {
    pub fn new(state: State) -> Arc<Self> {
        Arc::new(Self {
            id: state.row.vm,
            work: Mutex::new(()),
            receiving: Mutex::new(None),
            layering: Mutex::new(()),
            state: Mutex::new(state),
            changed: Condvar::new(),
        })
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks a VM that is still there.
    pub fn live(&self) -> Result<MutexGuard<'_, State>> {
        let state = self.lock();
        if state.removed { Err(Error::NoSuchVm(self.id)) } else { Ok(state) }
    }

    pub fn work(&self) -> MutexGuard<'_, ()> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    pub fn new(row: VmRow, files: Files, now: Timestamp) -> Self {
        Self {
            row,
            files,
            logs: BTreeMap::new(),
            points: BTreeMap::new(),
            moments: BTreeMap::new(),
            shared: BTreeSet::new(),
            holds: Vec::new(),
            apply: ApplyState::Idle,
            pins: BTreeMap::new(),
            epoch: 0,
            revoked: String::new(),
            failovers: 0,
            barriers: BTreeMap::new(),
            barriers_made: 0,
            pauses: 0,
            retry_at: Timestamp::default(),
            health: (Health::Normal, now),
            looked_at: BTreeMap::new(),
            newest: None,
            removed: false,
        }
    }

    pub fn folder(&self) -> Folder {
        Folder { files: self.files.clone(), path: self.row.folder.clone() }
    }

    pub fn applied(&self) -> LogNumber {
        self.row.doc.base.applied
    }

    pub fn is_held(&self, now: Timestamp) -> bool {
        self.holds.iter().any(|hold| hold.expires_at > now)
    }

    pub fn is_barred(&self, now: Timestamp) -> bool {
        self.barriers.values().any(|ends_at| *ends_at > now)
    }

    pub fn in_failover(&self) -> bool {
        matches!(self.row.doc.phase, Phase::Failover { .. })
    }

    /// Whether it was failed over for good: what is written to it now is in no log.
    pub fn is_completing(&self) -> bool {
        self.row.doc.failover.as_ref().is_some_and(|failover| failover.completing)
    }

    /// The points that a person has pinned.
    pub fn pinned(&self) -> Vec<LogNumber> {
        self.row.doc.pinned.iter().map(|pin| pin.number).collect()
    }

    /// The points after which logs are kept for a third site.
    pub fn marks_kept(&self) -> Vec<LogNumber> {
        let doc = &self.row.doc;
        if doc.forwarded.is_empty() {
            return Vec::new();
        }
        let marks: Vec<LogNumber> = doc.forwarded.iter().map(|mark| mark.at).collect();
        if doc.relocating.is_some() {
            return marks; // each point is to arrive there; if they fill the disk, logs are refused
        }
        let logs: Vec<(LogNumber, u64)> =
            self.logs.iter().map(|(number, log)| (*number, log.row.bytes)).collect();
        chain::marks_kept(&marks, &logs, doc.offered.iter().map(|disk| disk.size_bytes).sum())
    }

    /// What is asked of a merge of these logs: what a point pinned by hand keeps from the base is merged for its
    /// number too.
    pub fn compact_rule(&self, group: &[LogNumber]) -> CompactRule {
        let oldest_pin = self.row.doc.pinned.iter().map(|pin| pin.number).min();
        match oldest_pin.zip(group.first()) {
            Some((pin, first)) if pin < *first => CompactRule::Few,
            _ => CompactRule::Halve,
        }
    }

    /// Whether these logs are to be looked at for a merge. A group that grows log by log above a point pinned by
    /// hand is looked at again only when it has grown by so much that the answer may be another.
    pub fn is_to_be_looked_at(&self, group: &[LogNumber]) -> bool {
        let Some(before) = group.first().and_then(|first| self.looked_at.get(first)) else { return true };
        let grown_by = match group.strip_prefix(&before.logs[..]) {
            Some(newer) => newer.len(),
            None => return true,
        };
        match self.compact_rule(group) {
            CompactRule::Halve => grown_by > 0,
            CompactRule::Few => {
                grown_by >= FEW_LOGS
                    || grown_by > 0 && self.raw_bytes(group) > before.raw_bytes + before.raw_bytes / 2
            }
        }
    }

    /// Remembers that a group is not worth merging.
    pub fn has_looked_at(&mut self, group: &[LogNumber]) {
        let Some(first) = group.first() else { return };
        let looked_at = LookedAt { logs: group.to_vec(), raw_bytes: self.raw_bytes(group) };
        self.forget_looked_at();
        self.looked_at.insert(*first, looked_at);
    }

    /// Forgets the groups that are no longer there.
    pub fn forget_looked_at(&mut self) {
        let Self { logs, looked_at, .. } = self;
        looked_at.retain(|_, group| group.logs.iter().all(|number| logs.contains_key(number)));
    }

    fn raw_bytes(&self, group: &[LogNumber]) -> u64 {
        group.iter().filter_map(|number| self.logs.get(number)).map(|log| log.row.raw_bytes).sum()
    }

    /// The point that the flat files equal, if they equal one.
    pub fn base_point(&self) -> Option<PointInfo> {
        let quiet = self.row.doc.applying.is_none();
        self.points.get(&self.applied()).filter(|_| quiet).copied()
    }

    /// The logs of the chain after the base, up to and including `through`.
    pub fn logs_through(&self, through: LogNumber) -> Vec<Arc<ChainLog>> {
        let applied = self.applied();
        self.logs
            .range(..=through)
            .filter(|(number, _)| **number > applied)
            .map(|(_, log)| log.clone())
            .collect()
    }

    /// Ends every view that is open: its bytes are about to change.
    pub fn revoke_views(&mut self, why: &str) {
        self.epoch += 1;
        self.revoked = why.to_owned();
        self.pins.clear();
        self.newest = None;
    }

    pub fn unpin(&mut self, epoch: u64, point: LogNumber) {
        if self.epoch != epoch {
            return;
        }
        if let Some(count) = self.pins.get_mut(&point) {
            *count -= 1;
            if *count == 0 {
                self.pins.remove(&point);
            }
        }
    }
}

/// A log of the chain. Its file is opened when it is needed, and shared by all that read it.
pub(crate) struct ChainLog {
    pub row: LogRow,
    opened: Mutex<Option<Weak<dyn File>>>,
}

impl ChainLog {
    pub fn new(row: LogRow) -> Arc<Self> {
        Arc::new(Self { row, opened: Mutex::new(None) })
    }

    /// The log's file, which stays readable after it was removed from its folder.
    pub fn open(self: &Arc<Self>, folder: &Folder) -> Result<OpenLog> {
        let path = folder.log(&self.row.file);
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        let file = match opened.as_ref().and_then(Weak::upgrade) {
            Some(file) => file,
            None => {
                let file = folder.files.open_read(&path)?;
                *opened = Some(Arc::downgrade(&file));
                file
            }
        };
        Ok(OpenLog { number: self.row.number, file, path })
    }
}

/// A log whose file is open.
#[derive(Debug, Clone)]
pub(crate) struct OpenLog {
    pub number: LogNumber,
    pub file: Arc<dyn File>,
    pub path: PathBuf,
}

impl OpenLog {
    /// What the log holds, read from the end of its file.
    pub fn meta(&self) -> Result<LogMeta> {
        let meta = log::read_index(&mut At::start(&*self.file)).map_err(|source| self.damaged(source))?;
        Ok(meta)
    }

    pub fn damaged(&self, source: log::Error) -> Error {
        Error::Damaged { path: self.path.clone(), source }
    }

    /// Reads and decodes one record of it.
    pub fn record(&self, entry: &log::RecordEntry, stored: &mut Vec<u8>, out: &mut Vec<u8>) -> Result<()> {
        let range = entry.file_range();
        stored.resize(usize::try_from(range.end - range.start).unwrap_or(0), 0);
        read_exact(&*self.file, &self.path, stored, range.start)?;
        log::decode_record(entry, stored, out).map_err(|source| self.damaged(source))
    }

    /// Reads one record of it as it is, with its checksum.
    pub fn lift(&self, entry: &log::RecordEntry, stored: &mut Vec<u8>) -> Result<log::EncodedRecord> {
        let range = entry.file_range();
        stored.resize(usize::try_from(range.end - range.start).unwrap_or(0), 0);
        read_exact(&*self.file, &self.path, stored, range.start)?;
        log::lift_record(entry, stored).map_err(|source| self.damaged(source))
    }
}

pub(crate) fn read_exact(file: &dyn File, path: &Path, buf: &mut [u8], offset: u64) -> Result<()> {
    file.read_exact_at(buf, offset).map_err(Error::io("reading", path))
}

/// Logs with their indexes, matched to the chain's disks.
pub(crate) struct Indexed {
    pub log: OpenLog,
    pub index: Index,
    pub disks: Vec<chain::LayerDisk>,
    pub sizes: Vec<DiskSize>,
    pub header: log::Header,
}

impl Indexed {
    pub fn read(log: OpenLog, chain: &[DiskName]) -> Result<Self> {
        let meta = log.meta()?;
        let disks = chain::match_disks(&meta.header, chain);
        let sizes = meta.header.disks.iter().map(DiskSize::from).collect();
        Ok(Self { log, index: meta.index, disks, sizes, header: meta.header })
    }

    pub fn layer(&self) -> chain::Layer<'_> {
        chain::Layer { number: self.log.number, index: &self.index, disks: &self.disks }
    }
}

/// A reader with a position of its own: the file's is shared by all that have it open.
pub(crate) struct At<'a> {
    file: &'a dyn File,
    position: u64,
}

impl<'a> At<'a> {
    pub const fn start(file: &'a dyn File) -> Self {
        Self { file, position: 0 }
    }
}

impl Read for At<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buf, self.position)?;
        self.position += read as u64;
        Ok(read)
    }
}

impl Seek for At<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
            SeekFrom::End(by) => self.file.len()?.checked_add_signed(by),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}
