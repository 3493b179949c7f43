//! Reads what a cycle ships, out of the fixed moment: changes from the dirty bitmap, and in a pass
//! (initial replication, resynchronization) the next stretch of disk.
//!
//! ```text
//! extents ─▶ read requests (many in flight, several connections) ─▶ batches of 256 KiB ─▶ zstd workers ─▶ queue
//! ```
//!
//! Memory is bounded by the requests in flight and the queue, whatever the disks' sizes.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt, stream};
use log::{Batcher, RawRecord};
use model::{CyclePlan, LogId, Progress, Purpose};
use nbd::{DirtyExtent, ReadRequest};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::ahead::ReadAhead;
use crate::compress::{Compress, Compression};
use crate::cover::DiskPart;
use crate::digests::{BLOCK_BYTES, Digests};
use crate::error::{Failure, FailureCode};
use crate::ports::{DiskReader, Remote, Which};

/// Read requests in flight per disk, of at most [`REQUEST_BYTES_MAX`] each.
const REQUESTS_IN_FLIGHT: usize = 8;
/// The largest read request, in bytes.
pub(crate) const REQUEST_BYTES_MAX: u64 = 512 * 1024;
/// Dirty blocks this near to each other are read in one request, in bytes: a request costs about as much as this.
pub(crate) const MERGE_GAP_BYTES: u64 = 16 * 1024;
/// Extents are asked for in stretches of this many bytes of disk.
pub(crate) const STRETCH_BYTES: u64 = 1 << 30;
/// A pass stops only between stretches of so many bytes: small ones keep its limits sharp.
const STRETCH_OF_PASS_BYTES: u64 = 64 << 20;
/// The same for a disk that joins: the changes of all others wait for it.
const JOIN_STRETCH_BYTES: u64 = 4 << 20;
/// Records being compressed or waiting to be sent.
pub(crate) const QUEUE_RECORDS: usize = 8;

/// What comes out of reading, in order.
pub(crate) enum Item {
    /// A record, possibly still being compressed.
    Record(Compression),
    /// What was read of the disks that join goes into logs of its own; of each of them so many bytes are covered now.
    Joined(Vec<u64>),
    /// Everything was read; the pass has come this far.
    End(Progress),
}

/// Where records go that are made already.
#[derive(Clone)]
pub struct RecordSink(mpsc::Sender<Item>);

impl RecordSink {
    pub(crate) const fn new(items: mpsc::Sender<Item>) -> Self {
        Self(items)
    }

    /// Takes a record, from a thread that may wait; false once nobody wants it any more.
    pub fn take(&self, record: log::EncodedRecord) -> bool {
        self.0.blocking_send(Item::Record(Compression::Done(record))).is_ok()
    }

    /// Everything that has changed was given.
    pub(crate) async fn end(&self, total_bytes: u64) -> Result<(), Failure> {
        let end = Item::End(Progress { covered_bytes: total_bytes, total_bytes });
        // The other end is dropped only when shipping has failed; its failure is the one that is shown.
        let sent = self.0.send(end).await;
        sent.map_err(|_| Failure::transient(FailureCode::Stopped, "the cycle was stopped"))
    }
}

/// When a pass, or the disks that join, have been read enough for one log: a log is shipped whole or not at all, so
/// this bounds what a lost link costs, and how long one moment stays fixed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PassLimits {
    /// Bytes of data read.
    pub data_bytes: u64,
    /// Time spent.
    pub time: Duration,
}

/// What a cycle has spent on what had never been read.
struct Spent {
    limits: PassLimits,
    stretches: u32,
    data_bytes: u64,
    started: Instant,
}

impl Spent {
    fn is_enough(&self) -> bool {
        // However slow it is, each cycle gets on by one stretch.
        self.stretches > 0
            && (self.data_bytes >= self.limits.data_bytes || self.started.elapsed() >= self.limits.time)
    }
}

pub(crate) struct Reader<'a, D, R> {
    pub disks: &'a [D],
    pub parts: Vec<DiskPart>,
    pub plan: CyclePlan,
    pub limits: PassLimits,
    pub compress: Compress,
    pub level: i32,
    pub digests: Digests<'a, R>,
    pub read_ahead: Option<ReadAhead>,
    pub items: mpsc::Sender<Item>,
}

impl<D: DiskReader, R: Remote> Reader<'_, D, R> {
    /// Reads everything that the plan asks for.
    pub async fn run(mut self) -> Result<(), Failure> {
        let total_bytes = self.disks.iter().map(DiskReader::size_bytes).sum();
        let mut covered_bytes = match self.plan.purpose {
            Purpose::Changes => total_bytes,
            Purpose::Initial | Purpose::Resync => self.plan.covered_bytes.min(total_bytes),
        };
        let (joining, parts): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.parts).into_iter().partition(|part| part.joins);
        let mut spent = Spent { limits: self.limits, stretches: 0, data_bytes: 0, started: Instant::now() };
        if !joining.is_empty() {
            let mut covered = Vec::new();
            for part in joining {
                covered.push(
                    self.part(&part, JOIN_STRETCH_BYTES, &mut spent).await?.unwrap_or(part.covered.end),
                );
            }
            self.send(Item::Joined(covered)).await?;
        }
        for part in parts {
            if let Some(end) = self.part(&part, STRETCH_OF_PASS_BYTES, &mut spent).await? {
                covered_bytes = part.starts_at + end;
            }
        }
        self.send(Item::End(Progress { covered_bytes, total_bytes })).await
    }

    /// Reads a part of a disk. Gives how far it has come with what had never been read, if it read any of that.
    async fn part(
        &mut self,
        part: &DiskPart,
        stretch_bytes: u64,
        spent: &mut Spent,
    ) -> Result<Option<u64>, Failure> {
        let mut batcher = Batcher::new(u16::try_from(part.disk).expect("a VM has few disks"));
        if !part.covered.is_empty() && self.plan.base.is_some() {
            self.changes(part, &mut batcher).await?;
        }
        for stretch in by(STRETCH_BYTES, part.grown.clone()) {
            self.whole(&self.disks[part.disk], stretch, &mut batcher).await?;
        }
        let mut come = None;
        for stretch in by(stretch_bytes, part.ahead.clone()) {
            if spent.is_enough() {
                break;
            }
            spent.data_bytes += self.ahead(part, stretch.clone(), &mut batcher).await?;
            spent.stretches += 1;
            come = Some(stretch.end);
        }
        self.emit(batcher.finish()).await?;
        Ok(come)
    }

    /// What changed in the part already covered.
    async fn changes(&mut self, part: &DiskPart, batcher: &mut Batcher) -> Result<(), Failure> {
        let disk = &self.disks[part.disk];
        for stretch in by(STRETCH_BYTES, part.covered.clone()) {
            let extents = disk.extents(stretch.clone(), Which::Changed).await?;
            let (zeros, data): (Vec<_>, Vec<_>) = extents.into_iter().partition(|extent| extent.zero);
            let (kept, left) = match &self.read_ahead {
                Some(ahead) if !data.is_empty() => {
                    ahead.split(part.disk, &data, &disk.extents(stretch, Which::Again).await?)
                }
                _ => (Vec::new(), data),
            };
            let zeros = zeros.into_iter().map(|zero| (zero.offset, Ready::Zero(zero.len)));
            let kept = kept.into_iter().map(|(offset, bytes)| (offset, Ready::Data(bytes)));
            let mut ready: Vec<_> = zeros.chain(kept).collect();
            ready.sort_unstable_by_key(|(offset, _)| *offset);
            self.read(disk, &left, ready, batcher).await?;
        }
        Ok(())
    }

    /// The next stretch of a pass: all of its data in an initial replication (the replica starts as
    /// zeros), only what differs in a resynchronization. Returns the bytes of data read for it.
    async fn ahead(
        &mut self,
        part: &DiskPart,
        stretch: Range<u64>,
        batcher: &mut Batcher,
    ) -> Result<u64, Failure> {
        let disk = &self.disks[part.disk];
        if self.plan.purpose == Purpose::Resync {
            let extents = disk.extents(stretch.clone(), Which::Data).await?;
            return self.compare(disk, stretch, &extents, batcher).await;
        }
        // A replica that has nothing has zeros everywhere. Later it may have a part of a cycle that was never ended.
        if self.plan.predecessor != LogId::NONE {
            return self.whole(disk, stretch, batcher).await;
        }
        let mut extents = disk.extents(stretch, Which::Data).await?;
        extents.retain(|extent| !extent.zero);
        self.read(disk, &extents, Vec::new(), batcher).await?;
        Ok(extents.iter().map(|extent| extent.len).sum())
    }

    /// All of a stretch, whatever the replica has there: its data and its zeros. Returns the bytes of data read.
    async fn whole(&self, disk: &D, stretch: Range<u64>, batcher: &mut Batcher) -> Result<u64, Failure> {
        let mut extents = disk.extents(stretch.clone(), Which::Data).await?;
        extents.retain(|extent| !extent.zero);
        let mut zeros = Vec::new();
        let mut at = stretch.start;
        for extent in &extents {
            zeros.extend((at < extent.offset).then(|| (at, Ready::Zero(extent.offset - at))));
            at = extent.end();
        }
        zeros.extend((at < stretch.end).then(|| (at, Ready::Zero(stretch.end - at))));
        self.read(disk, &extents, zeros, batcher).await?;
        Ok(extents.iter().map(|extent| extent.len).sum())
    }

    /// Reads extents of data and joins what need not be read to them, in the order of the disk. Both are sorted.
    async fn read(
        &self,
        disk: &D,
        data: &[DirtyExtent],
        ready: Vec<(u64, Ready)>,
        batcher: &mut Batcher,
    ) -> Result<(), Failure> {
        let mut ready = ready.into_iter().peekable();
        let mut reads = reads(disk, nbd::read_plan(data, MERGE_GAP_BYTES, REQUEST_BYTES_MAX));
        while let Some((request, bytes)) = reads.try_next().await? {
            for &(skip, len) in &request.wanted {
                let at = request.offset + skip;
                while let Some((offset, piece)) = ready.next_if(|(offset, _)| *offset < at) {
                    self.emit(piece.into(offset, batcher)).await?;
                }
                self.emit(batcher.data(at, &bytes[skip as usize..(skip + len) as usize])).await?;
            }
        }
        for (offset, piece) in ready {
            self.emit(piece.into(offset, batcher)).await?;
        }
        Ok(())
    }

    /// Compares a stretch with the replica by digests, block by block, and takes what differs.
    async fn compare(
        &mut self,
        disk: &D,
        stretch: Range<u64>,
        extents: &[DirtyExtent],
        batcher: &mut Batcher,
    ) -> Result<u64, Failure> {
        let theirs = self.digests.of(disk.name(), stretch.clone()).await?;
        // Blocks without any data are zeros: compared without being read.
        let with_data = whole_blocks(extents.iter().filter(|extent| !extent.zero), BLOCK_BYTES, stretch.end);
        let mut shipped = 0;
        let mut at = stretch.start;
        let mut reads = reads(disk, nbd::read_plan(&with_data, 0, REQUEST_BYTES_MAX));
        loop {
            let next = reads.try_next().await?;
            let until = next.as_ref().map_or(stretch.end, |(request, _)| request.offset);
            for offset in (at..until).step_by(BLOCK_BYTES as usize) {
                let len = BLOCK_BYTES.min(stretch.end - offset);
                if !theirs.is_zero(offset, len) {
                    self.emit(batcher.zero(offset, len)).await?;
                }
            }
            let Some((request, bytes)) = next else { return Ok(shipped) };
            for (place, block) in
                (request.offset..).step_by(BLOCK_BYTES as usize).zip(bytes.chunks(BLOCK_BYTES as usize))
            {
                if !theirs.matches(place, block) {
                    shipped += block.len() as u64;
                    self.emit(batcher.data(place, block)).await?;
                }
            }
            at = request.offset + bytes.len() as u64;
        }
    }

    /// Hands batches to the compressors; waits while too many are on their way.
    async fn emit(&self, batches: Vec<RawRecord>) -> Result<(), Failure> {
        for batch in batches {
            self.send(Item::Record(self.compress.start(batch, self.level))).await?;
        }
        Ok(())
    }

    async fn send(&self, item: Item) -> Result<(), Failure> {
        // The other end is dropped only when shipping has failed; its failure is the one that is shown.
        self.items
            .send(item)
            .await
            .map_err(|_| Failure::transient(FailureCode::Stopped, "the cycle was stopped"))
    }
}

/// What need not be read any more.
enum Ready {
    Zero(u64),
    Data(Bytes),
}

impl Ready {
    fn into(self, offset: u64, batcher: &mut Batcher) -> Vec<RawRecord> {
        match self {
            Self::Zero(len) => batcher.zero(offset, len),
            Self::Data(bytes) => batcher.data(offset, &bytes),
        }
    }
}

/// The bytes of each request, in the plan's order, several requests ahead.
fn reads<D: DiskReader>(
    disk: &D,
    plan: Vec<ReadRequest>,
) -> BoxStream<'static, Result<(ReadRequest, Bytes), Failure>> {
    let disk = disk.clone();
    let read = move |request: ReadRequest| {
        let disk = disk.clone();
        async move {
            let bytes = disk.read(request.offset, request.len).await?;
            Ok((request, bytes))
        }
    };
    stream::iter(plan).map(read).buffered(REQUESTS_IN_FLIGHT).boxed()
}

pub(crate) fn by(step: u64, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    (range.start..range.end).step_by(step as usize).map(move |start| start..range.end.min(start + step))
}

/// Rounds extents outwards to whole blocks and merges them.
fn whole_blocks<'e>(
    extents: impl Iterator<Item = &'e DirtyExtent>,
    block: u64,
    end: u64,
) -> Vec<DirtyExtent> {
    let mut out: Vec<DirtyExtent> = Vec::new();
    for extent in extents {
        let from = extent.offset / block * block;
        let to = (extent.offset + extent.len).next_multiple_of(block).min(end);
        match out.last_mut() {
            Some(last) if from <= last.offset + last.len => {
                last.len = to.max(last.offset + last.len) - last.offset
            }
            _ => out.push(DirtyExtent { offset: from, len: to - from, zero: false }),
        }
    }
    out
}
