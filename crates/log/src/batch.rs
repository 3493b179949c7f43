//! Packs pieces of a disk into records.

use std::mem;

use crate::limits::{RECORD_EXTENTS_MAX, RECORD_RAW_BYTES_MAX, ZERO_BLOCK_BYTES};
use crate::types::Extent;

/// Collects pieces of one disk, in ascending order of their offsets, into records.
///
/// Neighbouring pieces are joined. Data that is zero in whole aligned blocks of [`ZERO_BLOCK_BYTES`] (or at the
/// end of a piece, from such a block's start on) becomes zero extents; these share records of their own. At
/// most one record of data and one of zeros is in memory; a record is given out once it is full. A piece out
/// of order is not lost, it starts a new record; bytes given twice are refused by the encoder.
#[derive(Debug)]
pub struct Batcher {
    disk: u16,
    data: Pending,
    zeros: Pending,
    full: Vec<RawRecord>,
}

#[derive(Debug, Default)]
struct Pending {
    extents: Vec<Extent>,
    bytes: Vec<u8>,
}

/// A record that is not encoded yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawRecord {
    pub(crate) disk: u16,
    pub(crate) extents: Vec<Extent>,
    /// The bytes of all extents, one after the other; empty for zeros.
    pub(crate) bytes: Vec<u8>,
}

impl RawRecord {
    /// The disk, by its place in the log's header.
    #[must_use]
    pub const fn disk(&self) -> u16 {
        self.disk
    }

    /// Its extents: sorted, disjoint, not adjacent.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// The bytes of all extents, one after the other; none if all extents read as zeros.
    #[must_use]
    pub fn bytes(&self) -> Option<&[u8]> {
        if self.bytes.is_empty() { None } else { Some(&self.bytes) }
    }
}

impl Batcher {
    /// A batcher for the disk at this place of the log's header.
    #[must_use]
    pub fn new(disk: u16) -> Self {
        Self { disk, data: Pending::default(), zeros: Pending::default(), full: Vec::new() }
    }

    /// Adds data. Gives the records that this has filled, if any.
    pub fn data(&mut self, offset: u64, bytes: &[u8]) -> Vec<RawRecord> {
        let mut at = 0;
        while at < bytes.len() {
            let len = run(offset.wrapping_add(at as u64), &bytes[at..]);
            match len {
                Run::Data(len) => {
                    self.push_data(offset.saturating_add(at as u64), &bytes[at..at + len]);
                    at += len;
                }
                Run::Zero(len) => {
                    self.push_zero(offset.saturating_add(at as u64), len as u64);
                    at += len;
                }
            }
        }
        mem::take(&mut self.full)
    }

    /// Adds a stretch that reads as zeros. Gives the records that this has filled, if any.
    pub fn zero(&mut self, offset: u64, len: u64) -> Vec<RawRecord> {
        if len > 0 {
            self.push_zero(offset, len);
        }
        mem::take(&mut self.full)
    }

    /// Gives what is left.
    #[must_use]
    pub fn finish(mut self) -> Vec<RawRecord> {
        self.flush_data();
        self.flush_zeros();
        self.full
    }

    fn push_data(&mut self, mut offset: u64, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.data.bytes.len() == RECORD_RAW_BYTES_MAX || !self.data.can_take(offset) {
                self.flush_data();
            }
            let pending = &mut self.data;
            if pending.bytes.capacity() == 0 {
                // Untouched pages cost nothing, growing step by step would copy.
                pending.bytes.reserve_exact(RECORD_RAW_BYTES_MAX);
            }
            let (now, later) = bytes.split_at(bytes.len().min(RECORD_RAW_BYTES_MAX - pending.bytes.len()));
            pending.push(offset, now.len() as u64);
            pending.bytes.extend_from_slice(now);
            offset = offset.saturating_add(now.len() as u64);
            bytes = later;
        }
    }

    fn push_zero(&mut self, offset: u64, len: u64) {
        if !self.zeros.can_take(offset) {
            self.flush_zeros();
        }
        self.zeros.push(offset, len);
    }

    fn flush_data(&mut self) {
        let pending = mem::take(&mut self.data);
        self.full.extend(pending.record(self.disk));
    }

    fn flush_zeros(&mut self) {
        let pending = mem::take(&mut self.zeros);
        self.full.extend(pending.record(self.disk));
    }
}

impl Pending {
    /// Whether a piece at `offset` may go into this record.
    fn can_take(&self, offset: u64) -> bool {
        match self.extents.last() {
            None => true,
            Some(last) => {
                let end = last.offset.saturating_add(last.len);
                end == offset || (end < offset && self.extents.len() < RECORD_EXTENTS_MAX)
            }
        }
    }

    fn push(&mut self, offset: u64, len: u64) {
        match self.extents.last_mut() {
            Some(last) if last.offset.saturating_add(last.len) == offset => {
                last.len = last.len.saturating_add(len)
            }
            _ => self.extents.push(Extent { offset, len }),
        }
    }

    fn record(self, disk: u16) -> Option<RawRecord> {
        if self.extents.is_empty() {
            return None;
        }
        Some(RawRecord { disk, extents: self.extents, bytes: self.bytes })
    }
}

enum Run {
    Data(usize),
    Zero(usize),
}

/// The longest run at the start of `bytes` that is all data or all zero blocks; `bytes` is not empty.
fn run(offset: u64, bytes: &[u8]) -> Run {
    let past_block = (offset % ZERO_BLOCK_BYTES as u64) as usize;
    if past_block != 0 {
        return Run::Data(bytes.len().min(ZERO_BLOCK_BYTES - past_block));
    }
    let first_is_zero = is_zero(&bytes[..bytes.len().min(ZERO_BLOCK_BYTES)]);
    let blocks = bytes.chunks(ZERO_BLOCK_BYTES);
    let len = blocks.take_while(|block| is_zero(block) == first_is_zero).map(<[u8]>::len).sum();
    if first_is_zero { Run::Zero(len) } else { Run::Data(len) }
}

/// Compared with zeros by the C library's vectorized comparison, which stops at the first difference.
fn is_zero(block: &[u8]) -> bool {
    static ZEROS: [u8; ZERO_BLOCK_BYTES] = [0; ZERO_BLOCK_BYTES];
    block == &ZEROS[..block.len()]
}
