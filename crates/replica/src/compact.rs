//! Merges neighbouring logs into one.
//!
//! ```text
//! survivors ─▶ logs/<first>-<last>.merging, synced ─▶ renamed to logs/<first>-<last>.log, folder synced
//!   ─▶ the rows swapped in one transaction ─▶ the old files removed
//! ```
//!
//! The name of a merged log is never one of the logs that it replaces, so at every moment the catalog names
//! files that are whole; what it does not name is removed at the next start.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chain::{CompactPlan, CompactRule, apply_batches, merged_header};
use files::File;
use log::{Encoder, Verified};
use model::{DiskName, LogNumber};
use steps::durable_step;

use crate::error::{Error, Result, is_no_space};
use crate::folder::Folder;
use crate::fs::Files;
use crate::maintain::Step;
use crate::rows::{self, LogRow};
use crate::store::Store;
use crate::survivors::Survivors;
use crate::vm::{ChainLog, Indexed, OpenLog, Vm};

/// The merged log is asked to be written to the disk every this many bytes.
const WRITEBACK_BYTES: u64 = 8 << 20;

impl Store {
    /// Merges what is worth merging within a group of logs. Under the VM's `work` lock.
    pub(crate) fn compact(&self, vm: &Vm, group: &[LogNumber], rule: CompactRule) -> Result<Step> {
        let (folder, logs) = {
            let state = vm.live()?;
            let logs: Vec<_> = group.iter().filter_map(|number| state.logs.get(number).cloned()).collect();
            (state.folder(), logs)
        };
        durable_step("replica::compact::begin");
        let extents: Vec<_> = logs
            .iter()
            .map(|log| (log.row.number, usize::try_from(log.row.extents).unwrap_or(usize::MAX)))
            .collect();
        let (mut fewer, mut written_bytes) = (0, 0);
        for part in apply_batches(&extents, self.inner.config.plan_extents_max) {
            let part: Vec<_> = logs.iter().filter(|log| part.contains(&log.row.number)).cloned().collect();
            for (merged, bytes) in self.compact_part(vm, &folder, &part, rule)? {
                fewer += merged - 1;
                written_bytes += bytes;
            }
        }
        if fewer == 0 {
            vm.lock().has_looked_at(group);
            return Ok(Step::LeftAsItIs);
        }
        Ok(Step::Compacted { logs: fewer, written_bytes })
    }

    /// Each merge as how many logs it took and how many bytes it made.
    fn compact_part(
        &self,
        vm: &Vm,
        folder: &Folder,
        logs: &[Arc<ChainLog>],
        rule: CompactRule,
    ) -> Result<Vec<(usize, u64)>> {
        let mut done = Vec::new();
        let opened: Vec<OpenLog> = logs.iter().map(|log| log.open(folder)).collect::<Result<_>>()?;
        // Disks go by their place in the newest log's header, which the merged log takes over. Logs that
        // have other disks are not merged with it: a disk that is gone keeps its bytes.
        let names =
            |meta: &log::LogMeta| meta.header.disks.iter().map(|disk| disk.name.clone()).collect::<Vec<_>>();
        let mut runs: Vec<(Vec<DiskName>, Vec<Indexed>)> = Vec::new();
        for log in opened {
            let disks = names(&log.meta()?);
            match runs.last_mut() {
                Some((known, run)) if *known == disks => run.push(Indexed::read(log, known)?),
                _ => {
                    let indexed = Indexed::read(log, &disks)?;
                    runs.push((disks, vec![indexed]));
                }
            }
        }
        for (disks, run) in runs {
            let layers: Vec<_> = run.iter().map(Indexed::layer).collect();
            for plan in CompactPlan::choose(disks.len(), &layers, rule)? {
                self.check_space(folder, plan.live_bytes)?;
                let group: Vec<&Indexed> =
                    run.iter().filter(|log| plan.logs.contains(&log.log.number)).collect();
                let bytes = self.merge(vm, folder, &plan, &group)?;
                done.push((plan.log_count, bytes));
            }
        }
        Ok(done)
    }

    fn merge(&self, vm: &Vm, folder: &Folder, plan: &CompactPlan, group: &[&Indexed]) -> Result<u64> {
        let (Some(oldest), Some(newest)) = (group.first(), group.last()) else { return Ok(0) };
        let first = vm.live()?.logs.get(plan.logs.start()).map_or(*plan.logs.start(), |log| log.row.first);
        let name = format!("{first}-{}.log", plan.logs.end());
        let target = folder.log(&name);
        let fresh = target.with_extension("merging");
        let written = write_merged(&folder.files, &fresh, plan, group, self.inner.config.merge_level);
        let verified = match written {
            Ok((summary, footer)) => Verified {
                header: merged_header(&oldest.header, &newest.header),
                footer,
                index: log::Index::default(),
                summary,
            },
            Err(error) => {
                folder.files.remove_file(&fresh)?;
                return Err(error);
            }
        };
        durable_step("replica::compact::synced");
        // A commit that failed may have named a file of this name.
        self.catalog().settle()?;
        folder.files.rename(&fresh, &target)?;
        durable_step("replica::compact::named");
        folder.files.sync_folder(&folder.logs())?;
        durable_step("replica::compact::renamed");
        let mut row = LogRow::from_verified(&verified, first, name);
        row.extents = u64::from(verified.summary.extents);
        let bytes = row.bytes;
        let replaced = self.swap(vm, plan, row)?;
        durable_step("replica::compact::committed");
        for log in replaced {
            if let Err(error) = folder.files.remove_file(&folder.log(&log.row.file)) {
                tracing::warn!(%error, "a merged log's file stays for now");
            }
        }
        durable_step("replica::compact::unlinked");
        Ok(bytes)
    }

    /// Puts the merged log in the place of those that it is made of.
    fn swap(&self, vm: &Vm, plan: &CompactPlan, row: LogRow) -> Result<Vec<Arc<ChainLog>>> {
        let mut state = vm.live()?;
        let (id, first, last, saved) = (vm.id, *plan.logs.start(), *plan.logs.end(), row.clone());
        durable_step("replica::compact::swapping");
        self.catalog().write(move |tx| {
            rows::remove_logs(tx, id, first, last)?;
            rows::add_log(tx, id, &saved)
        })?;
        durable_step("replica::compact::swapped");
        let gone: Vec<LogNumber> = state.logs.range(plan.logs.clone()).map(|(number, _)| *number).collect();
        let gone = gone.into_iter().filter_map(|number| state.logs.remove(&number)).collect();
        state.logs.insert(row.number, ChainLog::new(row));
        Ok(gone)
    }
}

/// Writes the survivors of some logs as one log, synced.
fn write_merged(
    files: &Files,
    path: &Path,
    plan: &CompactPlan,
    group: &[&Indexed],
    level: i32,
) -> Result<(log::Summary, log::Footer)> {
    let (oldest, newest) = (group[0], group[group.len() - 1]);
    let footer = newest.log.meta()?.footer;
    let file = files.open_empty(path)?;
    let out =
        BufWriter::with_capacity(1 << 20, WriteBack { file, path: path.to_path_buf(), written: 0, begun: 0 });
    let encoder = Encoder::new(out, &merged_header(&oldest.header, &newest.header));
    let mut encoder = encoder.map_err(|error| encode_error(path, error))?;
    let take = |record| encoder.record(record).map(|()| true).map_err(|error| encode_error(path, error));
    Survivors { lifts: false, level, take }.of(&plan.survivors, group)?;
    let (summary, out) = encoder.finish(footer).map_err(|e| encode_error(path, e))?;
    let out = out.into_inner().map_err(|error| Error::io("writing", path)(error.into_error()))?;
    durable_step("replica::compact::written");
    out.file.sync_all().map_err(Error::io("syncing", path))?;
    durable_step("replica::compact::flushed");
    Ok((summary, footer))
}

fn encode_error(path: &Path, error: log::Error) -> Error {
    let source = std::error::Error::source(&error).and_then(|source| source.downcast_ref::<std::io::Error>());
    match source {
        Some(io) if is_no_space(io) => Error::io("writing", path)(std::io::ErrorKind::StorageFull.into()),
        _ => Error::Damaged { path: path.to_path_buf(), source: error },
    }
}

/// A file that begins to be written to the disk while it grows.
struct WriteBack {
    file: Arc<dyn File>,
    path: PathBuf,
    /// How much has been written: where the next bytes go.
    written: u64,
    begun: u64,
}

impl Write for WriteBack {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        let written = self.file.write_at(buf, self.written)?;
        self.written += written as u64;
        if self.written - self.begun >= WRITEBACK_BYTES {
            self.file.start_writeback(self.begun, self.written - self.begun);
            self.begun = self.written;
        }
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl std::fmt::Debug for WriteBack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.path.display())
    }
}
