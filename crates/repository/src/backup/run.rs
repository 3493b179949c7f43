//! One run: the threads, and what they share.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::Progress;
use super::packer::Packer;
use super::plan::{DiskPlan, Work, hand_out, within};
use crate::cutter::Cut;
use crate::error::Error;
use crate::id::Id;
use crate::list::{CHUNK_BYTES_MAX, Chunk, index_of};
use crate::pack::{PackBuilder, Sealer};
use crate::source::Source;
use crate::zeros::zero_chunks;

/// So much is read at a time, and more while a chunk may be longer than what is there.
const READ_BYTES: usize = 1 << 20;
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

/// What a worker has of its own.
struct Tools {
    sealer: Sealer,
    /// Bytes that are read and not cut yet.
    window: Vec<u8>,
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
            total_bytes: plans.iter().map(DiskPlan::bytes_to_read).sum(),
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
            for _ in 0..self.packer.writers() {
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
            hand_out(self.source, disk, plan, &mut send)
                .map_err(|source| self.unreadable(disk, 0, source))?;
        }
        Ok(())
    }

    /// Takes work until there is none; once stopped, takes it without doing it, so that no sender waits.
    fn work(
        &self,
        to_do: &Mutex<Receiver<Work>>,
        full: &SyncSender<PackBuilder>,
        sealer: Sealer,
    ) -> Result<(), Error> {
        let mut tools = Tools { sealer, window: Vec::new() };
        let mut send = |pack| full.send(pack).map_err(|_| Error::Cancelled);
        while let Some(piece) = next(to_do) {
            if self.stopped() {
                continue;
            }
            if let Err(error) = self.work_on(&piece, &mut tools, &mut send) {
                self.fail(error);
            }
        }
        Ok(())
    }

    /// Reads a stretch piece by piece, cuts it, and stores what is new.
    fn work_on(&self, work: &Work, tools: &mut Tools, full: Full<'_>) -> Result<(), Error> {
        let plan = &self.plans[work.disk];
        if work.is_chunk {
            return self.work_on_chunk(work, tools, full);
        }
        let mut chunks = Vec::new();
        let mut zeros = 0;
        let (mut start, mut filled, mut read_to) = (0, 0, work.bytes.start);
        tools.window.resize(plan.cutter.longest() + READ_BYTES, 0);
        loop {
            if self.stopped() {
                return Ok(());
            }
            let at_end = read_to == work.bytes.end;
            match plan.cutter.first(&tools.window[start..filled], at_end) {
                _ if start == filled && at_end => break,
                Cut::Zeros(len) => {
                    zeros += len as u64;
                    start += len;
                    self.done_bytes.fetch_add(len as u64, Ordering::Relaxed);
                }
                Cut::Data(len) => {
                    chunks.extend(zero_chunks(std::mem::take(&mut zeros)));
                    let id = self.store_chunk(&tools.window[start..start + len], &mut tools.sealer, full)?;
                    chunks.push(Chunk::data(id, u32::try_from(len).unwrap_or(u32::MAX)));
                    start += len;
                    self.chunks_read.fetch_add(1, Ordering::Relaxed);
                    self.done_bytes.fetch_add(len as u64, Ordering::Relaxed);
                }
                Cut::More => {
                    tools.window.copy_within(start..filled, 0);
                    (start, filled) = (0, filled - start);
                    let room = (tools.window.len() - filled) as u64;
                    let next = read_to..work.bytes.end.min(read_to + room);
                    read_to = next.end;
                    let end = filled + index_of(next.end - next.start);
                    self.read(work, &next, &mut tools.window[filled..end])?;
                    filled = end;
                }
            }
        }
        chunks.extend(zero_chunks(zeros));
        plan.note(work.bytes.start, chunks);
        Ok(())
    }

    /// Reads one chunk and stores it as it is.
    fn work_on_chunk(&self, work: &Work, tools: &mut Tools, full: Full<'_>) -> Result<(), Error> {
        let len = index_of(work.bytes.end - work.bytes.start);
        tools.window.resize(len, 0);
        self.read(work, &work.bytes, &mut tools.window)?;
        let id = self.store_chunk(&tools.window, &mut tools.sealer, full)?;
        self.chunks_read.fetch_add(1, Ordering::Relaxed);
        self.done_bytes.fetch_add(len as u64, Ordering::Relaxed);
        let chunk = Chunk::data(id, u32::try_from(len).unwrap_or(u32::MAX));
        self.plans[work.disk].note(work.bytes.start, vec![chunk]);
        Ok(())
    }

    /// Reads bytes of a stretch: what has data from the source, the rest is zero.
    fn read(&self, work: &Work, bytes: &Range<u64>, buffer: &mut [u8]) -> Result<(), Error> {
        let mut filled = 0;
        for place in work.data.iter().filter_map(|extent| within(extent, bytes)) {
            buffer[filled..place.start].fill(0);
            let offset = bytes.start + place.start as u64;
            self.source
                .read_at(work.disk, offset, &mut buffer[place.clone()])
                .map_err(|source| self.unreadable(work.disk, offset, source))?;
            self.read_bytes.fetch_add(place.len() as u64, Ordering::Relaxed);
            filled = place.end;
        }
        buffer[filled..].fill(0);
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

    /// Stores a small file's bytes, and gives its content.
    pub(crate) fn store_file(&self, raw: &[u8], full: Full<'_>) -> Result<Vec<Id>, Error> {
        let mut sealer = self.sealer.lock().unwrap_or_else(PoisonError::into_inner);
        let blobs = raw.chunks(CHUNK_BYTES_MAX as usize);
        blobs.map(|blob| Ok(self.store(blob, &mut sealer, full)?.0)).collect()
    }

    /// Chunks of zeros are nobody's work; each of them that is in use is stored once.
    pub(crate) fn store_zeros(&self, list: &[Chunk], full: Full<'_>) -> Result<(), Error> {
        let mut sealer = self.sealer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut last = 0;
        for chunk in list.iter().filter(|chunk| chunk.is_zero()) {
            if chunk.bytes() != std::mem::replace(&mut last, chunk.bytes()) && self.packer.lacks(&chunk.id) {
                self.store_chunk(&vec![0; index_of(chunk.bytes())], &mut sealer, full)?;
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
    Sealer::new(packer.cipher().clone()).map_err(cannot_compress)
}

fn cannot_compress(source: io::Error) -> Error {
    Error::io("cannot compress for", std::path::Path::new("a pack"), source)
}
