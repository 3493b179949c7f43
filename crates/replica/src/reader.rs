//! Reads disks as they are at the end of some logs: through the logs, then the base.
//!
//! The reader has every log after the base and keeps all files open. So it reads the same bytes whatever
//! is folded into the base meanwhile, as long as that is nothing newer than its own newest log.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use chain::{Overlay, OverlayBuilder, Source};
use files::File;
use log::{Extent, RecordEntry};
use model::{DiskName, LogNumber, VmId};

use crate::cache::RecordCache;
use crate::changemap;
use crate::error::{Error, Result};
use crate::rows::DiskSize;
use crate::vm::{ChainLog, Indexed, OpenLog, State};

/// The files of a state of a VM, opened under its lock.
pub(crate) struct OpenFiles {
    vm: VmId,
    /// The logs after the base, oldest first.
    logs: Vec<OpenLog>,
    /// All disks of the chain, by their place.
    disks: Vec<BaseDisk>,
    /// The disks of the base's own point.
    base_disks: Vec<DiskSize>,
}

struct BaseDisk {
    name: DiskName,
    file: Arc<dyn File>,
    path: PathBuf,
    map: Option<Arc<dyn File>>,
    map_path: PathBuf,
    /// Its size in the base.
    bytes: u64,
}

/// Reads disks as they are at the end of some logs.
pub(crate) struct ChainReader {
    vm: VmId,
    overlay: Overlay,
    logs: BTreeMap<LogNumber, ReaderLog>,
    base: Vec<BaseDisk>,
    disks: Vec<ReaderDisk>,
    cache: RecordCache,
}

struct ReaderLog {
    log: OpenLog,
    records: Vec<RecordEntry>,
}

/// A disk that the VM has at the reader's moment.
pub(crate) struct ReaderDisk {
    pub name: DiskName,
    pub size_bytes: u64,
    /// Its place in the chain.
    place: usize,
}

impl OpenFiles {
    /// Opens what is needed to read the state after log `through`. Under the VM's lock: the list of logs
    /// and the base belong together, and no file is removed before it is open.
    pub fn open(state: &State, through: LogNumber) -> Result<Self> {
        let folder = state.folder();
        let logs: Vec<Arc<ChainLog>> = state.logs_through(through);
        let logs = logs.iter().map(|log| log.open(&folder)).collect::<Result<_>>()?;
        let base_disks = state.row.doc.base.disks.clone();
        let size =
            |name: &DiskName| base_disks.iter().find(|disk| disk.name == *name).map_or(0, |d| d.size_bytes);
        let disks = state.row.doc.disks.iter().map(|name| {
            let (path, map_path) = (folder.disk(name), folder.map(name));
            let map = folder.files.open_if_there(&map_path)?;
            Ok(BaseDisk {
                name: name.clone(),
                file: folder.files.open_to_read(&path)?,
                path,
                map,
                map_path,
                bytes: size(name),
            })
        });
        Ok(Self { vm: state.row.vm, logs, disks: disks.collect::<Result<_>>()?, base_disks })
    }

    /// Reads the logs' indexes, one at a time, and lays them over each other.
    pub fn into_reader(self, cache_bytes: usize) -> Result<ChainReader> {
        let names: Vec<DiskName> = self.disks.iter().map(|disk| disk.name.clone()).collect();
        let mut builder = OverlayBuilder::new(names.len());
        let mut logs = BTreeMap::new();
        let mut newest_disks = self.base_disks;
        for log in self.logs {
            let indexed = Indexed::read(log, &names)?;
            builder.push(&indexed.layer())?;
            newest_disks = indexed.sizes;
            logs.insert(indexed.log.number, ReaderLog { log: indexed.log, records: indexed.index.records });
        }
        let place = |name: &DiskName| names.iter().position(|known| known == name);
        let disks = newest_disks.into_iter().filter_map(|disk| {
            Some(ReaderDisk { place: place(&disk.name)?, name: disk.name, size_bytes: disk.size_bytes })
        });
        let disks = disks.collect();
        let cache = RecordCache::new(cache_bytes);
        Ok(ChainReader { vm: self.vm, overlay: builder.finish(), logs, base: self.disks, disks, cache })
    }
}

impl ChainReader {
    /// Reads every disk that the chain ever had, not only those of the newest moment. A disk that is gone
    /// keeps its bytes here; should it come back, they are what its logs are laid over.
    pub fn with_all_disks(mut self) -> Result<Self> {
        for (place, base) in self.base.iter().enumerate() {
            if !self.disks.iter().any(|disk| disk.place == place) {
                let file_bytes = base.file.len().map_err(Error::io("reading", &base.path))?;
                let size_bytes = self.overlay.disk_size(place).unwrap_or(file_bytes);
                self.disks.push(ReaderDisk { name: base.name.clone(), size_bytes, place });
            }
        }
        Ok(self)
    }

    pub fn disks(&self) -> &[ReaderDisk] {
        &self.disks
    }

    fn disk(&self, name: &DiskName) -> Result<(&ReaderDisk, &BaseDisk)> {
        let disk = self.disks.iter().find(|disk| disk.name == *name);
        disk.map(|disk| (disk, &self.base[disk.place])).ok_or_else(|| Error::no_disk(self.vm, name))
    }

    /// Fills `buf` with the disk's bytes from `offset`; beyond its end they are zeros.
    pub fn read_at(&self, disk: &DiskName, offset: u64, buf: &mut [u8]) -> Result<()> {
        let (disk, base) = self.disk(disk)?;
        let end = offset.saturating_add(buf.len() as u64);
        let inside = usize::try_from(end.min(disk.size_bytes).saturating_sub(offset)).unwrap_or(0);
        let (mut rest, beyond) = buf.split_at_mut(inside);
        beyond.fill(0);
        for piece in self.overlay.resolve(disk.place, offset..offset + inside as u64) {
            let len = usize::try_from(piece.range.end - piece.range.start).unwrap_or(0);
            let (now, later) = rest.split_at_mut(len);
            match piece.source {
                Source::Zero => now.fill(0),
                Source::Base => {
                    let read = base.file.read_or_zeros(now, piece.range.start);
                    read.map_err(Error::io("reading", &base.path))?;
                }
                Source::Record { log, record, skip } => self.read_record(log, record, skip as usize, now)?,
            }
            rest = later;
        }
        Ok(())
    }

    fn read_record(&self, number: LogNumber, record: u32, skip: usize, buf: &mut [u8]) -> Result<()> {
        let payload = match self.cache.get((number, record)) {
            Some(payload) => payload,
            None => self.decode(number, record)?,
        };
        // The overlay was checked against the index: a piece lies within its record.
        buf.copy_from_slice(&payload[skip..skip + buf.len()]);
        Ok(())
    }

    fn decode(&self, number: LogNumber, record: u32) -> Result<Arc<Vec<u8>>> {
        let ReaderLog { log, records } = &self.logs[&number];
        let (mut stored, mut payload) = (Vec::new(), Vec::new());
        log.record(&records[record as usize], &mut stored, &mut payload)?;
        payload.shrink_to_fit();
        let payload = Arc::new(payload);
        self.cache.put((number, record), payload.clone());
        Ok(payload)
    }

    /// What of a range is not certainly zeros, in order and joined.
    pub fn data_extents(&self, disk: &DiskName, range: Range<u64>) -> Result<Vec<Range<u64>>> {
        let (disk, base) = self.disk(disk)?;
        let mut found: Vec<Range<u64>> = Vec::new();
        let mut add = |range: Range<u64>| match found.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => found.push(range),
        };
        for piece in self.overlay.resolve(disk.place, range.start..range.end.min(disk.size_bytes)) {
            match piece.source {
                Source::Zero => {}
                Source::Record { .. } => add(piece.range),
                Source::Base => base
                    .file
                    .data_ranges(piece.range)
                    .map_err(Error::io("reading", &base.path))?
                    .into_iter()
                    .for_each(&mut add),
            }
        }
        Ok(found)
    }

    /// Where the disk may differ from what it was at the end of log `after`, which is one of this chain.
    pub fn changed_since(&self, disk: &DiskName, after: LogNumber) -> Result<Vec<Range<u64>>> {
        let (disk, base) = self.disk(disk)?;
        let known = base.bytes.min(disk.size_bytes);
        let folded = changemap::changed_after(base.map.as_deref(), &base.map_path, after, known)?;
        let logged = self.overlay.changed_since(disk.place, base.bytes, after);
        // A disk that has no log over its base keeps the base's size; the other way round, growth is the overlay's.
        let inside = |extent: Extent| {
            let end = extent.end().min(disk.size_bytes);
            (extent.offset < end).then_some(extent.offset..end)
        };
        Ok(chain::union(&folded, &logged).into_iter().filter_map(inside).collect())
    }
}
