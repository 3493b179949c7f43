//! One run: the threads, and what they share.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::Progress;
use super::packer::Packer;
use super::plan::{DiskPlan, Work, cut};
use crate::error::Error;
use crate::id::Id;
use crate::pack::{PackBuilder, Sealer};
use crate::shape::{index_of, is_zero};
use crate::source::Source;

/// zstd's level for chunks. Measured (`examples/backup_speed.rs`): the fastest whose repository is no larger
/// than restic's.
const LEVEL: i32 = 3;
/// Packs are written by this many threads: while one waits for the disk, the other hashes.
const WRITERS: usize = 2;
/// How often progress is told and a cancellation noticed.
const TICK: Duration = Duration::from_millis(100);

/// What the threads of one backup share.
pub(crate) struct Run<'a> {
    source: &'a dyn Source,
    pub(crate) plans: &'a [DiskPlan],
    packer: &'a Packer<'a>,
    cancel: &'a AtomicBool,
    stop: AtomicBool,
    failure: Mutex<Option<Error>>,
    sealer: Mutex<Sealer>,
    done_bytes: AtomicU64,
    read_bytes: AtomicU64,
    chunks_read: AtomicU64,
    chunks_added: AtomicU64,
    total_bytes: u64,
}

/// What a run has read and stored.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Counts {
    pub(crate) read_bytes: u64,
    pub(crate) chunks_read: u64,
    pub(crate) chunks_added: u64,
}

/// What takes full packs.
type Full<'a> = &'a mut dyn FnMut(PackBuilder) -> Result<(), Error>;

impl<'a> Run<'a> {
    pub(crate) fn new(
        source: &'a dyn Source,
        plans: &'a [DiskPlan],
        packer: &'a Packer<'a>,
        cancel: &'a AtomicBool,
    ) -> Result<Self, Error> {
        Ok(Self {
            source,
            plans,
            packer,
            cancel,
            stop: AtomicBool::new(false),
            failure: Mutex::default(),
            sealer: Mutex::new(new_sealer(packer)?),
            done_bytes: AtomicU64::new(0),
            read_bytes: AtomicU64::new(0),
            chunks_read: AtomicU64::new(0),
            chunks_added: AtomicU64::new(0),
            total_bytes: plans.iter().map(DiskPlan::dirty_bytes).sum(),
        })
    }

    pub(crate) fn counts(&self) -> Counts {
        Counts {
            read_bytes: self.read_bytes.load(Ordering::Relaxed),
            chunks_read: self.chunks_read.load(Ordering::Relaxed),
            chunks_added: self.chunks_added.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn check_cancel(&self) -> Result<(), Error> {
        if self.cancel.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Runs planner, workers and writers until all chunks are packed; then `last` packs what is small. When
    /// this returns, every pack is durable.
    pub(crate) fn execute<T>(
        &self,
        progress: &dyn Fn(Progress),
        last: &dyn Fn(&Self, Full<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let workers = thread::available_parallelism().map_or(1, usize::from);
        let sealers = (0..workers).map(|_| new_sealer(self.packer)).collect::<Result<Vec<_>, _>>()?;
        let result = thread::scope(|scope| {
            let (work, to_do) = sync_channel::<Work>(2 * workers);
            let (full, to_write) = sync_channel::<PackBuilder>(0);
            let (finished, wait) = channel::<()>();
            let (to_do, to_write) = (Arc::new(Mutex::new(to_do)), Arc::new(Mutex::new(to_write)));
            scope.spawn({
                let finished = finished.clone();
                move || self.guard(finished, || self.plan(work))
            });
            for sealer in sealers {
                let (finished, full, to_do) = (finished.clone(), full.clone(), to_do.clone());
                scope.spawn(move || self.guard(finished, || self.work(&to_do, &full, sealer)));
            }
            drop(finished);
            let (written, all_written) = channel::<()>();
            for _ in 0..WRITERS {
                let (written, to_write) = (written.clone(), to_write.clone());
                scope.spawn(move || self.guard(written, || self.write(&to_write)));
            }
            drop(written);
            self.watch(&wait, progress);
            let result = self.finish(last, &full);
            drop(full);
            self.watch(&all_written, progress);
            result
        });
        match self.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(failure) => Err(failure),
            None => result,
        }
    }

    /// What is left after the chunks: the small files, the tree, and the last pack.
    fn finish<T>(
        &self,
        last: &dyn Fn(&Self, Full<'_>) -> Result<T, Error>,
        full: &SyncSender<PackBuilder>,
    ) -> Result<T, Error> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        let mut send = |pack| full.send(pack).map_err(|_| Error::Cancelled);
        let result = last(self, &mut send)?;
        self.packer.take_rest().map_or(Ok(()), &mut send)?;
        Ok(result)
    }

    /// Waits for all senders of `wait` to be gone.
    fn watch(&self, wait: &Receiver<()>, progress: &dyn Fn(Progress)) {
        loop {
            let ended = wait.recv_timeout(TICK) != Err(RecvTimeoutError::Timeout);
            if self.cancel.load(Ordering::Relaxed) {
                self.fail(Error::Cancelled);
            }
            progress(Progress {
                done_bytes: self.done_bytes.load(Ordering::Relaxed),
                total_bytes: self.total_bytes,
                read_bytes: self.read_bytes.load(Ordering::Relaxed),
                added_bytes: self.packer.bytes_added(),
            });
            if ended {
                return;
            }
        }
    }

    /// Runs one thread's part; its error stops the others. `_alive` is dropped at its end.
    fn guard(&self, _alive: Sender<()>, part: impl FnOnce() -> Result<(), Error>) {
        if let Err(error) = part() {
            self.fail(error);
        }
    }

    /// The first failure is the one that is told.
    fn fail(&self, error: Error) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.stop.store(true, Ordering::Relaxed);
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn plan(&self, work: SyncSender<Work>) -> Result<(), Error> {
        for (disk, plan) in self.plans.iter().enumerate() {
            let mut send = |piece: Option<Work>, skipped: u64| {
                self.done_bytes.fetch_add(skipped, Ordering::Relaxed);
                piece.is_none_or(|piece| work.send(piece).is_ok()) && !self.stopped()
            };
            cut(self.source, disk, plan, &mut send).map_err(|source| self.unreadable(disk, 0, source))?;
        }
        Ok(())
    }

    /// Takes work until there is none; once stopped, takes it without doing it, so that no sender waits.
    fn work(
        &self,
        to_do: &Mutex<Receiver<Work>>,
        full: &SyncSender<PackBuilder>,
        mut sealer: Sealer,
    ) -> Result<(), Error> {
        let mut buffer = Vec::new();
        let mut send = |pack| full.send(pack).map_err(|_| Error::Cancelled);
        while let Some(piece) = next(to_do) {
            if self.stopped() {
                continue;
            }
            if let Err(error) = self.work_on(&piece, &mut buffer, &mut sealer, &mut send) {
                self.fail(error);
            }
        }
        Ok(())
    }

    fn work_on(
        &self,
        piece: &Work,
        buffer: &mut Vec<u8>,
        sealer: &mut Sealer,
        full: Full<'_>,
    ) -> Result<(), Error> {
        let plan = &self.plans[piece.disk];
        let mut ids = Vec::with_capacity(16);
        for chunk in piece.chunks.clone() {
            let bytes = plan.shape.bytes_of(&(chunk..chunk + 1));
            self.read(piece, bytes.start, bytes.end, buffer)?;
            let id = if is_zero(buffer) {
                plan.shape.zero_id(chunk)
            } else {
                self.store_chunk(buffer, sealer, full)?
            };
            ids.push(id);
            self.done_bytes.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        }
        self.chunks_read.fetch_add(ids.len() as u64, Ordering::Relaxed);
        plan.set_ids(piece.chunks.start, &ids);
        Ok(())
    }

    /// Reads a chunk: its stretches with data from the source, the rest is zero.
    fn read(&self, piece: &Work, start: u64, end: u64, buffer: &mut Vec<u8>) -> Result<(), Error> {
        let place = |offset: u64| index_of(offset - start);
        buffer.resize(place(end), 0);
        let data = piece
            .data
            .iter()
            .map(|extent| extent.start.max(start)..extent.end.min(end))
            .filter(|extent| extent.start < extent.end);
        let mut filled = start;
        for extent in data {
            buffer[place(filled)..place(extent.start)].fill(0);
            self.source
                .read_at(piece.disk, extent.start, &mut buffer[place(extent.start)..place(extent.end)])
                .map_err(|source| self.unreadable(piece.disk, extent.start, source))?;
            self.read_bytes.fetch_add(extent.end - extent.start, Ordering::Relaxed);
            filled = extent.end;
        }
        buffer[place(filled)..].fill(0);
        Ok(())
    }

    /// Stores bytes unless the repository has them; says whether it did.
    fn store(&self, raw: &[u8], sealer: &mut Sealer, full: Full<'_>) -> Result<(Id, bool), Error> {
        let id = Id::of(raw);
        if !self.packer.claim(&id) {
            return Ok((id, false));
        }
        let blob = sealer.seal(id, raw).map_err(cannot_compress)?;
        self.packer.add(&blob, raw.len()).map_or(Ok(()), full)?;
        Ok((id, true))
    }

    fn store_chunk(&self, raw: &[u8], sealer: &mut Sealer, full: Full<'_>) -> Result<Id, Error> {
        let (id, new) = self.store(raw, sealer, full)?;
        self.chunks_added.fetch_add(u64::from(new), Ordering::Relaxed);
        Ok(id)
    }

    /// Stores a small file's bytes.
    pub(crate) fn store_file(&self, raw: &[u8], full: Full<'_>) -> Result<Id, Error> {
        let mut sealer = self.sealer.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(self.store(raw, &mut sealer, full)?.0)
    }

    /// Chunks of zeros are nobody's work; each of them that is in use is stored once.
    pub(crate) fn store_zeros(&self, full: Full<'_>) -> Result<(), Error> {
        let mut sealer = self.sealer.lock().unwrap_or_else(PoisonError::into_inner);
        for plan in self.plans {
            let Some(last) = plan.shape.chunk_count().checked_sub(1) else { continue };
            for chunk in [0, last] {
                let bytes = plan.shape.bytes_of(&(chunk..chunk + 1));
                if plan.uses(&plan.shape.zero_id(chunk)) {
                    self.store_chunk(&vec![0; index_of(bytes.end - bytes.start)], &mut sealer, full)?;
                }
            }
        }
        Ok(())
    }

    fn write(&self, to_write: &Mutex<Receiver<PackBuilder>>) -> Result<(), Error> {
        while let Some(pack) = next(to_write) {
            if self.stopped() {
                continue;
            }
            if let Err(error) = self.packer.write(pack) {
                self.fail(error);
            }
        }
        Ok(())
    }

    fn unreadable(&self, disk: usize, offset: u64, source: io::Error) -> Error {
        Error::Source { disk: self.source.disks()[disk].name.clone(), offset, source }
    }
}

fn next<T>(queue: &Mutex<Receiver<T>>) -> Option<T> {
    queue.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
}

fn new_sealer(packer: &Packer<'_>) -> Result<Sealer, Error> {
    Sealer::new(packer.cipher().clone(), LEVEL).map_err(cannot_compress)
}

fn cannot_compress(source: io::Error) -> Error {
    Error::io("cannot compress for", std::path::Path::new("a pack"), source)
}
