//! Folds logs into the base.
//!
//! ```text
//! "applying through N" committed ─▶ change maps raised and synced ─▶ sizes, zeros, survivors written (each once)
//!   ─▶ base files synced ─▶ "applied N", rows of the logs gone: one transaction ─▶ log files removed
//! ```
//!
//! A crash anywhere leaves "applying through N": it is run again from its start, with the same outcome.
//! Everything that is folded in is in every view that is open, so no view notices.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use chain::{ApplyPlan, Overlay, OverlayBuilder, RecordWork, apply_batches};
use files::File;
use log::RecordEntry;
use model::{ApplyState, DiskName, LogNumber, ReplicaTally};
use steps::durable_step;

use crate::changemap::ChangeMap;
use crate::error::{Error, Result};
use crate::folder::Folder;
use crate::maintain::Step;
use crate::rows::{self, Applying, Base};
use crate::store::Store;
use crate::vm::{ChainLog, Indexed, OpenLog, State, Vm};

/// A worker takes this many records at once: 4 MiB, read in one go where they lie side by side.
const RUN_RECORDS: usize = 16;
/// Pieces that follow each other on the disk are gathered into writes of up to this size.
const WRITE_BYTES: usize = 4 << 20;
/// Writeback is begun early only for writes of at least this size: small ones are better gathered by the system.
const EARLY_WRITEBACK_BYTES: usize = 1 << 20;

/// An apply that has been written down.
pub(crate) struct ApplyJob {
    through: LogNumber,
    logs: Vec<Arc<ChainLog>>,
    folder: Folder,
    disks: Vec<DiskName>,
    base: Base,
}

/// A log of a batch, reduced to what the writing needs.
struct BatchLog {
    log: OpenLog,
    records: Vec<RecordEntry>,
}

/// The flat file of a disk that the batch touches.
struct Target {
    file: Arc<dyn File>,
    path: PathBuf,
}

impl Store {
    /// Writes down that the logs up to `through` are about to be folded in. From here on the base equals
    /// nothing until the job has ended well. Under the VM's lock, in one transaction with the points that go.
    pub(crate) fn begin_apply(
        &self,
        state: &mut State,
        through: LogNumber,
        drop: Vec<LogNumber>,
    ) -> Result<ApplyJob> {
        durable_step("replica::apply::begin");
        let now = self.now();
        let mut row = state.row.clone();
        let before = row.doc.applying.take();
        row.doc.applying = Some(Applying {
            through,
            since: before.as_ref().map_or(now, |before| before.since),
            failed: before.and_then(|before| before.failed),
        });
        let (vm, gone) = (row.vm, drop.clone());
        self.commit(state, row, move |tx| rows::remove_points(tx, vm, &gone))?;
        state.points.retain(|number, _| !drop.contains(number));
        if state.apply == ApplyState::Idle {
            state.apply = ApplyState::Running { since: now };
        }
        durable_step("replica::apply::marked");
        Ok(ApplyJob {
            through,
            logs: state.logs_through(through),
            folder: state.folder(),
            disks: state.row.doc.disks.clone(),
            base: state.row.doc.base.clone(),
        })
    }

    /// Carries a job out. Under the VM's `work` lock.
    pub(crate) fn run_apply(&self, vm: &Vm, job: ApplyJob) -> Result<Step> {
        durable_step("replica::apply::noting");
        let described = crate::rebuild::describe(&vm.lock());
        let outcome = described.and_then(|()| {
            durable_step("replica::apply::noted");
            self.fold(&job)
        });
        let outcome = outcome.and_then(|(base, bytes)| self.end_apply(vm, &job, base).map(|()| bytes));
        if let Err(error) = &outcome {
            self.fail_apply(vm, error);
        }
        vm.changed.notify_all();
        outcome.map(|written_bytes| Step::Applied { through: job.through, written_bytes })
    }

    fn fail_apply(&self, vm: &Vm, error: &Error) {
        let mut state = vm.lock();
        let now = self.now();
        if self.inner.workers.is_stopping() {
            state.apply = ApplyState::Interrupted { since: now };
            return;
        }
        let since = match state.apply {
            ApplyState::Failed { since, .. } => since,
            _ => now,
        };
        let text = error.to_string();
        tracing::error!(vm = %state.row.name, error = %text, "an apply failed");
        let config = &self.inner.config;
        // To try again costs little where only room was missing, and backups wait for it.
        let wait = if error.code() == "no-space" { config.tick } else { config.retry_failed_after };
        state.retry_at = now.plus(wait);
        state.apply = ApplyState::Failed { since, error: text.clone() };
        let mut row = state.row.clone();
        if let Some(applying) = &mut row.doc.applying {
            applying.failed = Some((since, text));
        }
        let tally = ReplicaTally { applies_failed: 1, ..ReplicaTally::default() };
        row.doc.measured.note(&tally, now, config.health.window);
        // If even this fails (a full disk), the next start finds an apply that was interrupted: as good.
        durable_step("replica::apply::failing");
        if let Err(error) = self.commit_row(&mut state, row) {
            tracing::error!(%error, "that the apply failed could not be written down");
        }
        durable_step("replica::apply::failed");
    }

    fn end_apply(&self, vm: &Vm, job: &ApplyJob, base: Base) -> Result<()> {
        let mut state = vm.lock();
        let mut row = state.row.clone();
        row.doc.base = base;
        row.doc.applying = None;
        let tally = ReplicaTally { applies: 1, ..ReplicaTally::default() };
        row.doc.measured.note(&tally, self.now(), self.inner.config.health.window);
        durable_step("replica::apply::describing");
        crate::rebuild::describe_row(&row, &state)?;
        durable_step("replica::apply::described");
        let (id, through) = (vm.id, job.through);
        self.commit(&mut state, row, move |tx| rows::remove_logs(tx, id, LogNumber::ZERO, through))?;
        durable_step("replica::apply::committed");
        state.logs.retain(|number, _| *number > through);
        state.apply = ApplyState::Idle;
        state.forget_looked_at();
        drop(state);
        for log in &job.logs {
            // Views that have it open go on reading it. What stays for now is removed at the next start.
            if let Err(error) = job.folder.files.remove_file(&job.folder.log(&log.row.file)) {
                tracing::warn!(%error, "an applied log's file stays for now");
            }
        }
        durable_step("replica::apply::unlinked");
        Ok(())
    }

    /// Does the writing. Gives the base as it is then, and the bytes written.
    fn fold(&self, job: &ApplyJob) -> Result<(Base, u64)> {
        let numbers: Vec<(LogNumber, usize)> = job
            .logs
            .iter()
            .map(|log| (log.row.number, usize::try_from(log.row.extents).unwrap_or(usize::MAX)))
            .collect();
        let size = |name: &DiskName| {
            job.base.disks.iter().find(|disk| disk.name == *name).map_or(0, |disk| disk.size_bytes)
        };
        let mut sizes: Vec<u64> = job.disks.iter().map(size).collect();
        let mut base = job.base.clone();
        let mut written = 0;
        let mut targets: BTreeMap<usize, Target> = BTreeMap::new();
        for batch in apply_batches(&numbers, self.inner.config.plan_extents_max) {
            let logs = job.logs.iter().filter(|log| batch.contains(&log.row.number));
            let (overlay, logs) = self.overlay_of(job, logs, &mut base)?;
            raise_maps(job, &overlay, &sizes)?;
            durable_step("replica::apply::mapped");
            let plan = ApplyPlan::from_overlay(overlay);
            set_sizes(job, &plan, &mut sizes, &mut targets)?;
            durable_step("replica::apply::sized");
            written += self.write(&plan, &logs, &targets)?;
        }
        durable_step("replica::apply::written");
        for target in targets.values() {
            target.file.sync_all().map_err(Error::io("syncing", &target.path))?;
            durable_step("replica::apply::flushed");
        }
        job.folder.files.sync_folder(&job.folder.disks())?;
        durable_step("replica::apply::synced");
        base.applied = job.through;
        Ok((base, written))
    }

    fn overlay_of<'a>(
        &self,
        job: &ApplyJob,
        logs: impl Iterator<Item = &'a Arc<ChainLog>>,
        base: &mut Base,
    ) -> Result<(Overlay, BTreeMap<LogNumber, BatchLog>)> {
        let mut builder = OverlayBuilder::new(job.disks.len());
        let mut kept = BTreeMap::new();
        for log in logs {
            let indexed = Indexed::read(log.open(&job.folder)?, &job.disks)?;
            builder.push(&indexed.layer())?;
            (base.id, base.disks) = (log.row.id, indexed.sizes);
            kept.insert(log.row.number, BatchLog { log: indexed.log, records: indexed.index.records });
        }
        Ok((builder.finish(), kept))
    }

    /// Writes a plan's zeros and survivors, on several threads.
    fn write(
        &self,
        plan: &ApplyPlan,
        logs: &BTreeMap<LogNumber, BatchLog>,
        targets: &BTreeMap<usize, Target>,
    ) -> Result<u64> {
        for (disk, extent) in &plan.zeros {
            let target = &targets[disk];
            target.file.make_zero(extent.offset, extent.len).map_err(Error::io("writing", &target.path))?;
        }
        let work: Vec<RecordWork<'_>> = plan.records().collect();
        let runs: Vec<&[RecordWork<'_>]> = work.chunks(RUN_RECORDS).collect();
        let shared = Shared {
            store: self,
            logs,
            targets,
            runs,
            next: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            written: AtomicU64::new(0),
            failed: Mutex::new(None),
        };
        let threads = self.inner.config.apply_threads.clamp(1, 16).min(shared.runs.len());
        std::thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(|| shared.work());
            }
            shared.work();
        });
        match shared.failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(shared.written.into_inner()),
        }
    }
}

/// Raises the change maps for a batch, durably, before the base is touched.
fn raise_maps(job: &ApplyJob, overlay: &Overlay, sizes: &[u64]) -> Result<()> {
    for (place, name) in job.disks.iter().enumerate() {
        if overlay.disk_size(place).is_none() {
            continue;
        }
        let mut map =
            ChangeMap::open(&job.folder.files, &job.folder.map(name), sizes[place], job.base.applied)?;
        for (chunks, log) in overlay.changes(place, sizes[place]) {
            map.raise(chunks, log)?;
        }
        durable_step("replica::apply::raising");
        map.sync()?;
        durable_step("replica::apply::raised");
    }
    Ok(())
}

/// Opens the flat files of the disks that a batch has and gives them the batch's sizes.
fn set_sizes(
    job: &ApplyJob,
    plan: &ApplyPlan,
    sizes: &mut [u64],
    targets: &mut BTreeMap<usize, Target>,
) -> Result<()> {
    for (place, size) in plan.disk_sizes.iter().enumerate() {
        let Some(size) = *size else { continue };
        let target = match targets.entry(place) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => {
                let path = job.folder.disk(&job.disks[place]);
                entry.insert(Target { file: job.folder.files.open_or_create(&path)?, path })
            }
        };
        target.file.set_len(size).map_err(Error::io("resizing", &target.path))?;
        sizes[place] = size;
    }
    Ok(())
}

/// What the writing threads share.
struct Shared<'a> {
    store: &'a Store,
    logs: &'a BTreeMap<LogNumber, BatchLog>,
    targets: &'a BTreeMap<usize, Target>,
    runs: Vec<&'a [RecordWork<'a>]>,
    next: AtomicUsize,
    stop: AtomicBool,
    written: AtomicU64,
    failed: Mutex<Option<Error>>,
}

impl Shared<'_> {
    fn work(&self) {
        let mut writer = Writer { targets: self.targets, pending: Vec::new(), at: None, written: 0 };
        let mut buffers = (Vec::new(), Vec::new());
        while !self.stop.load(Ordering::Relaxed) {
            let Some(run) = self.runs.get(self.next.fetch_add(1, Ordering::Relaxed)) else { break };
            let outcome = self.run(run, &mut writer, &mut buffers).and_then(|()| writer.flush());
            durable_step("replica::apply::writing");
            if let Err(error) = outcome {
                self.stop.store(true, Ordering::Relaxed);
                self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        }
        self.written.fetch_add(writer.written, Ordering::Relaxed);
    }

    fn run(
        &self,
        run: &[RecordWork<'_>],
        writer: &mut Writer<'_>,
        buffers: &mut (Vec<u8>, Vec<u8>),
    ) -> Result<()> {
        if self.store.inner.workers.is_stopping() {
            let path = self.store.inner.config.dir.clone();
            return Err(Error::io("applying to", &path)(std::io::ErrorKind::Interrupted.into()));
        }
        for side_by_side in run.chunk_by(|a, b| self.follows(a, b)) {
            let [first, ..] = side_by_side else { continue };
            let BatchLog { log, records } = &self.logs[&first.log];
            let range = |work: &RecordWork<'_>| records[work.record as usize].file_range();
            let (start, end) = (range(first).start, side_by_side.last().map_or(0, |last| range(last).end));
            let (stored, raw) = (&mut buffers.0, &mut buffers.1);
            stored.resize(usize::try_from(end - start).unwrap_or(0), 0);
            crate::vm::read_exact(&*log.file, &log.path, stored, start)?;
            for work in side_by_side {
                let (from, to) = (range(work).start - start, range(work).end - start);
                let part = &stored[usize::try_from(from).unwrap_or(0)..usize::try_from(to).unwrap_or(0)];
                log::decode_record(&records[work.record as usize], part, raw).map_err(|e| log.damaged(e))?;
                for piece in work.pieces {
                    let bytes = &raw[piece.skip as usize..piece.skip as usize + piece.len as usize];
                    writer.put(work.disk, piece.disk_offset, bytes)?;
                }
            }
        }
        Ok(())
    }

    /// Whether record `b` begins in the log's file where `a` ends.
    fn follows(&self, a: &RecordWork<'_>, b: &RecordWork<'_>) -> bool {
        let records = &self.logs[&a.log].records;
        a.log == b.log
            && records[a.record as usize].file_range().end == records[b.record as usize].file_range().start
    }
}

/// Gathers pieces that follow each other into large writes.
struct Writer<'a> {
    targets: &'a BTreeMap<usize, Target>,
    pending: Vec<u8>,
    /// Where the pending bytes go: disk and offset.
    at: Option<(usize, u64)>,
    written: u64,
}

impl Writer<'_> {
    fn put(&mut self, disk: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        let goes_on =
            self.at.is_some_and(|(to, start)| to == disk && start + self.pending.len() as u64 == offset);
        if !goes_on || self.pending.len() + bytes.len() > WRITE_BYTES {
            self.flush()?;
            self.at = Some((disk, offset));
        }
        self.pending.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if let Some((disk, offset)) = self.at.take() {
            let Target { file, path } = &self.targets[&disk];
            file.forget_cached(offset, self.pending.len() as u64);
            file.write_all_at(&self.pending, offset).map_err(Error::io("writing", path))?;
            self.written += self.pending.len() as u64;
            if self.pending.len() >= EARLY_WRITEBACK_BYTES {
                file.start_writeback(offset, self.pending.len() as u64);
            }
        }
        self.pending.clear();
        Ok(())
    }
}
