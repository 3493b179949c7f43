//! Disks as plain byte arrays, logs as lists of writes: what the crate's plans are held against.
#![allow(dead_code, reason = "each test file uses its part")]

use chain::{ApplyPlan, Layer, LayerDisk, Overlay, Source};
use log::{Encoding, Extent, Index, RecordEntry};
use model::LogNumber;
use proptest::prelude::*;

/// How many disks the chain has.
pub const DISKS: usize = 2;
/// No disk is larger, in bytes.
pub const SIZE_MAX: u64 = 96;

/// The disks of a VM.
pub type Disks = Vec<Vec<u8>>;

/// One write of a log: `None` writes zeros. What ends beyond the disk is cut off.
#[derive(Debug, Clone)]
pub struct Write {
    pub disk: usize,
    pub offset: u64,
    pub len: u64,
    pub data: bool,
}

/// A log in memory, with a disk that the chain does not have and an order of its own.
#[derive(Debug, Clone)]
pub struct MemLog {
    pub number: LogNumber,
    pub index: Index,
    pub payloads: Vec<Vec<u8>>,
    pub disks: Vec<LayerDisk>,
}

/// What a random log is made from.
#[derive(Debug, Clone)]
pub struct Draft {
    pub writes: Vec<Write>,
    pub sizes: [u64; DISKS],
    pub per_record: usize,
    pub reversed: bool,
    /// Whether the log has something of a disk that the chain does not have.
    pub foreign: bool,
}

pub fn write() -> impl Strategy<Value = Write> {
    (0..DISKS, 0..SIZE_MAX, 1_u64..24, prop::bool::weighted(0.8))
        .prop_map(|(disk, offset, len, data)| Write { disk, offset, len, data })
}

pub fn draft() -> impl Strategy<Value = Draft> {
    let size = || prop_oneof![6 => Just(64_u64), 1 => 0..=SIZE_MAX];
    (prop::collection::vec(write(), 0..8), [size(), size()], 1_usize..4, any::<bool>(), any::<bool>())
        .prop_map(|(writes, sizes, per_record, reversed, foreign)| Draft {
            writes,
            sizes,
            per_record,
            reversed,
            foreign,
        })
}

impl MemLog {
    /// The log of a draft. Each byte it writes tells the log and the place, as far as a byte can.
    pub fn new(number: u64, draft: &Draft) -> Self {
        // The log's own order: a disk that is not ours, then ours backwards.
        let mut disks = vec![LayerDisk { disk: None, size_bytes: 1 << 20 }];
        disks.extend(
            (0..DISKS).rev().map(|disk| LayerDisk { disk: Some(disk), size_bytes: draft.sizes[disk] }),
        );
        let mut log =
            Self { number: LogNumber(number), index: Index::default(), payloads: Vec::new(), disks };
        if draft.foreign {
            log.add_record(0, &[(Extent { offset: 3, len: 5 }, Some(vec![0xee; 5]))]);
        }
        for disk in 0..DISKS {
            let mut extents = paint(number, disk, draft);
            if draft.reversed {
                extents.reverse();
            }
            let (data, zeros): (Vec<_>, Vec<_>) = extents.into_iter().partition(|(_, data)| data.is_some());
            for kind in [zeros, data] {
                for record in kind.chunks(draft.per_record) {
                    let mut record = record.to_vec();
                    record.sort_by_key(|(extent, _)| extent.offset);
                    log.add_record(DISKS - disk, &record);
                }
            }
        }
        log
    }

    /// Adds a record for a disk of the log's own list.
    pub fn add_record(&mut self, disk: usize, extents: &[(Extent, Option<Vec<u8>>)]) {
        let payload: Vec<u8> = extents.iter().filter_map(|(_, data)| data.clone()).flatten().collect();
        let first = u32::try_from(self.index.extents.len()).unwrap();
        self.index.extents.extend(extents.iter().map(|(extent, _)| *extent));
        let raw_bytes = u32::try_from(payload.len()).unwrap();
        self.index.records.push(RecordEntry {
            disk: u16::try_from(disk).unwrap(),
            encoding: if payload.is_empty() { Encoding::Zero } else { Encoding::Stored },
            position: 0,
            stored_bytes: raw_bytes,
            raw_bytes,
            extents: first..u32::try_from(self.index.extents.len()).unwrap(),
        });
        self.payloads.push(payload);
    }

    pub fn layer(&self) -> Layer<'_> {
        Layer { number: self.number, index: &self.index, disks: &self.disks }
    }

    /// The raw bytes that writing the log costs.
    pub fn raw_bytes(&self) -> u64 {
        self.payloads.iter().map(|payload| payload.len() as u64).sum()
    }

    /// Writes the log over `disks` as anybody would.
    pub fn apply_naively(&self, disks: &mut Disks) {
        for named in &self.disks {
            if let Some(disk) = named.disk {
                disks[disk].resize(usize::try_from(named.size_bytes).unwrap(), 0);
            }
        }
        for (record, payload) in self.index.records.iter().zip(&self.payloads) {
            let Some(disk) = self.disks[usize::from(record.disk)].disk else { continue };
            let mut payload = payload.iter();
            for extent in self.index.extents_of(record) {
                for byte in &mut disks[disk][bytes(extent.offset..extent.end())] {
                    *byte = if record.encoding == Encoding::Zero { 0 } else { *payload.next().unwrap() };
                }
            }
        }
    }
}

/// The draft's writes of one disk, the later over the earlier, as disjoint extents in order.
fn paint(number: u64, disk: usize, draft: &Draft) -> Vec<(Extent, Option<Vec<u8>>)> {
    let size = draft.sizes[disk];
    let mut cells: Vec<Option<bool>> = vec![None; usize::try_from(size).unwrap()];
    for write in draft.writes.iter().filter(|write| write.disk == disk && write.offset < size) {
        cells[bytes(write.offset..(write.offset + write.len).min(size))].fill(Some(write.data));
    }
    let mut extents = Vec::new();
    let mut start = 0;
    for run in cells.chunk_by(|a, b| a == b) {
        let extent = Extent { offset: start, len: run.len() as u64 };
        start = extent.end();
        if let Some(data) = run[0] {
            let byte = |at: u64| u8::try_from((number * 31 + at * 7) % 255 + 1).unwrap();
            extents.push((extent, data.then(|| (extent.offset..extent.end()).map(byte).collect())));
        }
    }
    extents
}

pub fn bytes(range: std::ops::Range<u64>) -> std::ops::Range<usize> {
    usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()
}

/// A log with this number.
pub fn find(logs: &[MemLog], number: LogNumber) -> &MemLog {
    logs.iter().find(|log| log.number == number).unwrap()
}

/// The bytes of `range` of a disk, read through an overlay as a view would.
pub fn read(
    overlay: &Overlay,
    base: &Disks,
    logs: &[MemLog],
    disk: usize,
    range: std::ops::Range<u64>,
) -> Vec<u8> {
    let mut read = Vec::new();
    let mut at = range.start;
    for piece in overlay.resolve(disk, range.clone()) {
        assert_eq!(piece.range.start, at, "pieces follow each other");
        assert!(piece.range.end > at, "no piece is empty");
        at = piece.range.end;
        let len = piece.range.end - piece.range.start;
        match piece.source {
            Source::Base => {
                read.extend(piece.range.map(|at| {
                    usize::try_from(at).ok().and_then(|at| base[disk].get(at)).copied().unwrap_or(0)
                }))
            }
            Source::Zero => read.resize(read.len() + usize::try_from(len).unwrap(), 0),
            Source::Record { log, record, skip } => {
                let payload = &find(logs, log).payloads[record as usize];
                read.extend(&payload[bytes(u64::from(skip)..u64::from(skip) + len)]);
            }
        }
    }
    assert_eq!(at, range.end.max(range.start), "pieces cover the range");
    read
}

/// All disks through an overlay.
pub fn view(overlay: &Overlay, base: &Disks, logs: &[MemLog]) -> Disks {
    (0..DISKS)
        .map(|disk| {
            let size = overlay.disk_size(disk).unwrap_or(base[disk].len() as u64);
            read(overlay, base, logs, disk, 0..size)
        })
        .collect()
}

/// One write of a plan, with its bytes.
#[derive(Debug, Clone)]
pub struct PlannedWrite {
    pub disk: usize,
    pub offset: u64,
    pub data: Vec<u8>,
}

/// The writes of a plan, in its order: zeros, then records.
pub fn planned_writes(plan: &ApplyPlan, logs: &[MemLog]) -> Vec<PlannedWrite> {
    let zeros = plan.zeros.iter().map(|&(disk, extent)| PlannedWrite {
        disk,
        offset: extent.offset,
        data: vec![0; usize::try_from(extent.len).unwrap()],
    });
    let records = plan.records().flat_map(|work| {
        let payload = &find(logs, work.log).payloads[work.record as usize];
        work.pieces.iter().map(move |piece| PlannedWrite {
            disk: work.disk,
            offset: piece.disk_offset,
            data: payload[piece.skip as usize..(piece.skip + piece.len) as usize].to_vec(),
        })
    });
    zeros.chain(records).collect()
}

/// Gives the base the sizes that a plan says.
pub fn set_sizes(plan: &ApplyPlan, base: &mut Disks) {
    for (disk, size) in base.iter_mut().zip(&plan.disk_sizes) {
        if let Some(size) = size {
            disk.resize(usize::try_from(*size).unwrap(), 0);
        }
    }
}

/// Carries out one write.
pub fn put(base: &mut Disks, write: &PlannedWrite) {
    let end = write.offset + write.data.len() as u64;
    base[write.disk][bytes(write.offset..end)].copy_from_slice(&write.data);
}
