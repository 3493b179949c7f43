//! Checking backups without restoring them.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use model::{DiskName, LogNumber, VmId, VmName};
use serde::{Deserialize, Serialize};

use crate::backup::Progress;
use crate::error::{Error, Unread};
use crate::id::{BackupId, ById, Id};
use crate::info::BackupInfo;
use crate::list::{Chunk, index_of};
use crate::manifest::{BackupDisk, DEFINITION_FILE, MANIFEST_FILE};
use crate::restore::{DamagedRange, joined};
use crate::storage::FileKind;
use crate::{Repository, parallel, reader};

/// What to check.
#[derive(Debug, Clone, Copy, Default)]
pub struct VerifyOptions {
    /// Only backups of this VM.
    pub vm: Option<VmId>,
    /// Only this backup.
    pub backup: Option<BackupId>,
    /// Read every chunk and compare its hash, not only whether it is there.
    pub read_data: bool,
}

/// Something that is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage {
    /// The backup; none for what belongs to no single one (an index file).
    pub backup: Option<BackupId>,
    /// Its VM, unless the backup's own description is damaged.
    pub vm: Option<VmId>,
    /// The VM's name.
    pub vm_name: Option<VmName>,
    /// Its recovery point.
    pub point: Option<LogNumber>,
    /// The disk; none if the whole backup is affected.
    pub disk: Option<DiskName>,
    /// Where on the disk.
    pub offset: u64,
    /// How many bytes of the disk.
    pub len: u64,
    /// What is wrong.
    pub why: String,
}

/// What a check came to.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct VerifyReport {
    /// Backups that were checked.
    pub backups: usize,
    /// Different chunks that were checked.
    pub chunks: u64,
    /// Bytes of chunks that were read, before compression.
    pub bytes_read: u64,
    /// What is damaged.
    pub damaged: Vec<Damage>,
    /// How long it took.
    pub seconds: f64,
}

/// What is known of chunks so far; one that several backups have is checked once.
#[derive(Default)]
struct Checked {
    seen: HashSet<Id, ById>,
    bad: Mutex<HashMap<Id, String, ById>>,
    bytes_read: AtomicU64,
    /// How long each pack is.
    packs: HashMap<Id, u64, ById>,
}

impl Repository {
    /// Checks backups. Damage is in the report; an error means that the check itself could not be done.
    pub fn verify(
        &self,
        options: &VerifyOptions,
        progress: &dyn Fn(Progress),
        cancel: &AtomicBool,
    ) -> Result<VerifyReport, Error> {
        let began = Instant::now();
        let _lock = self.lock_to_read()?;
        self.load_index()?;
        let mut report = VerifyReport::default();
        let damaged_index = |(file, why): &(Id, String)| {
            let file = BackupId(*file).short();
            whole(None, None, format!("index file {file} is damaged: {why}; 'restic rebuild-index' mends it"))
        };
        report.damaged.extend(self.index().damaged().iter().map(damaged_index));
        let mut checked = Checked {
            packs: self.store.list_with_size(FileKind::Pack)?.into_iter().collect(),
            ..Checked::default()
        };
        let backups = self.backups_to_verify(options, &mut report)?;
        let total_bytes = backups.iter().map(BackupInfo::disk_bytes).fold(0, u64::saturating_add);
        let mut done_bytes = 0;
        for backup in &backups {
            let tell = |read_bytes| {
                progress(Progress { done_bytes, total_bytes, read_bytes, added_bytes: 0 });
            };
            self.verify_backup(backup, options.read_data, &mut checked, &mut report, &tell, cancel)?;
            done_bytes += backup.disk_bytes();
        }
        report.backups += backups.len();
        report.chunks = checked.seen.len() as u64;
        report.bytes_read = checked.bytes_read.into_inner();
        report.seconds = began.elapsed().as_secs_f64();
        Ok(report)
    }

    fn backups_to_verify(
        &self,
        options: &VerifyOptions,
        report: &mut VerifyReport,
    ) -> Result<Vec<BackupInfo>, Error> {
        let mut found = Vec::new();
        for id in self.store.list(FileKind::Snapshot)? {
            if options.backup.is_some_and(|backup| backup.0 != id) {
                continue;
            }
            match self.backup_info(&id) {
                Ok(Some(info)) if options.vm.is_none_or(|vm| vm == info.vm) => found.push(info),
                Ok(_) => {}
                // Whose it is cannot be told; it is counted, whatever VM was asked for.
                Err(unread) => {
                    report.backups += 1;
                    report.damaged.push(whole(Some(BackupId(id)), None, unread.damage()?));
                }
            }
        }
        match options.backup {
            Some(id) if found.is_empty() && report.damaged.iter().all(|damage| damage.backup != Some(id)) => {
                Err(Error::BackupNotFound { at: self.at().to_owned(), id: id.to_string() })
            }
            _ => Ok(found),
        }
    }

    fn verify_backup(
        &self,
        backup: &BackupInfo,
        read_data: bool,
        checked: &mut Checked,
        report: &mut VerifyReport,
        progress: &dyn Fn(u64),
        cancel: &AtomicBool,
    ) -> Result<(), Error> {
        let of_backup = |why| whole(Some(backup.id), Some(backup), why);
        let mut files = match self.read_tree(&backup.tree) {
            Ok(files) => files,
            Err(unread) => {
                report.damaged.push(of_backup(unread.damage()?));
                return Ok(());
            }
        };
        for name in [MANIFEST_FILE, DEFINITION_FILE] {
            if let Err(unread) = self.read_small_file(&files, name) {
                report.damaged.push(of_backup(unread.damage()?));
            }
        }
        for disk in &backup.disks {
            match self.disk_list(&mut files, disk) {
                Ok(list) => {
                    self.verify_chunks(&list, read_data, checked, progress, cancel)?;
                    report.damaged.extend(damage_of(backup, disk, &list, checked));
                }
                Err(unread) => {
                    let why = unread.damage()?;
                    report.damaged.push(Damage { disk: Some(disk.name.clone()), ..of_backup(why) });
                }
            }
        }
        Ok(())
    }

    fn verify_chunks(
        &self,
        list: &[Chunk],
        read_data: bool,
        checked: &mut Checked,
        progress: &dyn Fn(u64),
        cancel: &AtomicBool,
    ) -> Result<(), Error> {
        let new: Vec<Chunk> = list.iter().filter(|chunk| checked.seen.insert(chunk.id)).copied().collect();
        let checked = &*checked;
        let work = |(tools, raw): &mut (reader::Tools, Vec<u8>), chunk: &Chunk| {
            let result = self.is_placed(chunk, checked).map_err(Unread::from).and_then(|()| {
                if read_data {
                    raw.resize(index_of(chunk.bytes()), 0);
                    self.read_chunk(tools, &chunk.id, raw)?;
                }
                Ok(())
            });
            match result {
                Ok(()) => {
                    checked.bytes_read.fetch_add(raw.len() as u64, Ordering::Relaxed);
                }
                Err(unread) => {
                    let why = unread.damage()?;
                    checked.bad.lock().unwrap_or_else(PoisonError::into_inner).insert(chunk.id, why);
                }
            }
            Ok(())
        };
        let tools = (0..parallel::threads())
            .map(|_| Ok((reader::Tools::new(self.store.cipher())?, Vec::new())))
            .collect::<std::io::Result<Vec<_>>>()
            .map_err(|error| self.store.failed_here("cannot read", error))?;
        let tick = || progress(checked.bytes_read.load(Ordering::Relaxed));
        parallel::for_each(&new, tools, &work, &tick, cancel)
    }

    /// Whether the index has the chunk, in a pack that is there and long enough.
    fn is_placed(&self, chunk: &Chunk, checked: &Checked) -> Result<(), String> {
        let location = self.index().data(&chunk.id);
        let location = location.ok_or_else(|| self.not_indexed("the chunk"))?;
        let pack = BackupId(location.pack).short();
        match checked.packs.get(&location.pack) {
            None => Err(format!("pack {pack} is missing")),
            Some(bytes) if u64::from(location.offset) + u64::from(location.len) > *bytes => {
                Err(format!("pack {pack} is too short"))
            }
            Some(_) if location.raw_bytes() as u64 != chunk.bytes() => {
                Err("the chunk has another length than its place".into())
            }
            Some(_) => Ok(()),
        }
    }
}

fn damage_of(backup: &BackupInfo, disk: &BackupDisk, list: &[Chunk], checked: &Checked) -> Vec<Damage> {
    let bad = checked.bad.lock().unwrap_or_else(PoisonError::into_inner);
    if bad.is_empty() {
        return Vec::new();
    }
    let mut next = 0;
    let ranges = list.iter().filter_map(|chunk| {
        let offset = next;
        next += chunk.bytes();
        let why = bad.get(&chunk.id)?.clone();
        Some(DamagedRange { disk: disk.name.clone(), offset, len: chunk.bytes(), why })
    });
    joined(ranges.collect())
        .into_iter()
        .map(|range| Damage {
            disk: Some(range.disk),
            offset: range.offset,
            len: range.len,
            ..whole(Some(backup.id), Some(backup), range.why)
        })
        .collect()
}

fn whole(id: Option<BackupId>, backup: Option<&BackupInfo>, why: String) -> Damage {
    Damage {
        backup: id,
        vm: backup.map(|backup| backup.vm),
        vm_name: backup.map(|backup| backup.vm_name.clone()),
        point: backup.map(|backup| backup.point.number),
        disk: None,
        offset: 0,
        len: 0,
        why,
    }
}
