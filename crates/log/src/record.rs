//! One record between disk bytes and log bytes.

use std::cell::RefCell;
use std::ops::Range;

use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe;

use crate::batch::RawRecord;
use crate::error::{Error, ErrorKind};
use crate::layout::{RECORD_HEAD_BYTES, RecordHead, decode_extents};
use crate::limits::RECORD_RAW_BYTES_MAX;
use crate::types::{Encoding, Extent, RecordEntry};

thread_local! {
    // Making a context costs more than compressing a record with it.
    static COMPRESSOR: RefCell<Option<(i32, Compressor<'static>)>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

/// A record as it goes into a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedRecord {
    pub(crate) head: RecordHead,
    pub(crate) extents: Vec<Extent>,
    /// Head and extents as bytes, with the CRC over these and the payload.
    pub(crate) prefix: Vec<u8>,
    pub(crate) payload: Vec<u8>,
}

impl EncodedRecord {
    /// How the payload is stored.
    #[must_use]
    pub const fn encoding(&self) -> Encoding {
        self.head.encoding
    }

    /// The bytes that it takes in the log.
    #[must_use]
    pub const fn log_bytes(&self) -> u64 {
        self.head.record_bytes()
    }
}

impl RawRecord {
    /// Compresses the record with zstd at this level; what does not get smaller is stored as it is. Takes
    /// CPU time, so it is made for worker threads; each keeps its own compression context.
    #[must_use]
    pub fn encode(self, level: i32) -> EncodedRecord {
        let Self { disk, extents, bytes } = self;
        // A batcher's record is within these by construction.
        let raw_bytes = bytes.len() as u32;
        let (encoding, payload) = if bytes.is_empty() {
            (Encoding::Zero, bytes)
        } else {
            match compress(&bytes, level) {
                Some(smaller) => (Encoding::Zstd, smaller),
                None => (Encoding::Stored, bytes),
            }
        };
        let stored_bytes = payload.len() as u32;
        let head = RecordHead { disk, encoding, extents: extents.len() as u32, stored_bytes, raw_bytes };
        let prefix = head.encode(&extents, &payload);
        EncodedRecord { head, extents, prefix, payload }
    }
}

/// The bytes as one zstd frame, if that is smaller.
fn compress(bytes: &[u8], level: i32) -> Option<Vec<u8>> {
    COMPRESSOR.with_borrow_mut(|slot| {
        let compressor = match slot {
            Some((current, compressor)) => {
                if *current != level {
                    compressor.set_compression_level(level).ok()?;
                    *current = level;
                }
                compressor
            }
            None => &mut slot.insert((level, Compressor::new(level).ok()?)).1,
        };
        // No room for anything that is not smaller: zstd gives up as soon as it sees that.
        let mut smaller = Vec::with_capacity(bytes.len() - 1);
        compressor.compress_to_buffer(bytes, &mut smaller).ok()?;
        Some(smaller)
    })
}

/// Decompresses one zstd frame to exactly `raw_bytes`, in `out`.
pub(crate) fn decompress(payload: &[u8], raw_bytes: u32, out: &mut Vec<u8>) -> Result<(), ErrorKind> {
    let wrong = ErrorKind::Decompress { raw_bytes };
    if raw_bytes as usize > RECORD_RAW_BYTES_MAX
        || zstd_safe::find_frame_compressed_size(payload) != Ok(payload.len())
    {
        return Err(wrong);
    }
    // Not cleared first: a buffer that is used again is not filled with zeros again.
    out.resize(raw_bytes as usize, 0);
    let written = DECOMPRESSOR.with_borrow_mut(|slot| {
        let decompressor = match slot {
            Some(decompressor) => decompressor,
            None => slot.insert(Decompressor::new().ok()?),
        };
        decompressor.decompress_to_buffer(payload, out.as_mut_slice()).ok()
    });
    if written == Some(raw_bytes as usize) { Ok(()) } else { Err(wrong) }
}

/// Decodes one record into `out`: the bytes of its extents one after the other, nothing for
/// [`Encoding::Zero`]. What was in `out` is lost, its memory is used again.
///
/// `record` has the bytes of the log at [`RecordEntry::file_range`], no more and no less.
pub fn decode_record(entry: &RecordEntry, record: &[u8], out: &mut Vec<u8>) -> Result<(), Error> {
    decode(entry, record, out).map_err(|kind| {
        out.clear();
        kind.at(entry.position)
    })
}

fn decode(entry: &RecordEntry, record: &[u8], out: &mut Vec<u8>) -> Result<(), ErrorKind> {
    let (head, rest) = checked(entry, record)?;
    let payload = &rest[head.extent_bytes()..];
    match head.encoding {
        Encoding::Zstd => return decompress(payload, head.raw_bytes, out),
        Encoding::Zero | Encoding::Stored if payload.len() != head.raw_bytes as usize => {
            return Err(ErrorKind::RecordLengths);
        }
        Encoding::Zero | Encoding::Stored => {
            out.clear();
            out.extend_from_slice(payload);
        }
    }
    Ok(())
}

/// Takes a record out of a log as it is: its payload stays compressed, and its checksum, which is verified here, goes
/// with it into the log that the record is put in. `record` is as for [`decode_record`].
pub fn lift_record(entry: &RecordEntry, record: &[u8]) -> Result<EncodedRecord, Error> {
    lift(entry, record).map_err(|kind| kind.at(entry.position))
}

fn lift(entry: &RecordEntry, record: &[u8]) -> Result<EncodedRecord, ErrorKind> {
    let (head, rest) = checked(entry, record)?;
    let (extents, payload) = rest.split_at(head.extent_bytes());
    let prefix = &record[..RECORD_HEAD_BYTES + head.extent_bytes()];
    Ok(EncodedRecord {
        head,
        extents: decode_extents(extents).collect(),
        prefix: prefix.to_vec(),
        payload: payload.to_vec(),
    })
}

/// The head of a record that is the one of the index, and what comes after it.
fn checked<'r>(entry: &RecordEntry, record: &'r [u8]) -> Result<(RecordHead, &'r [u8]), ErrorKind> {
    let range = entry.file_range();
    if (record.len() as u64) < range.end - range.start {
        return Err(ErrorKind::Truncated);
    }
    let (part, rest) = record.split_first_chunk::<RECORD_HEAD_BYTES>().ok_or(ErrorKind::Truncated)?;
    let (head, mut crc) = RecordHead::decode(part)?;
    crc.add(rest);
    crc.check()?;
    if head != RecordHead::of(entry) || record.len() as u64 != head.record_bytes() {
        return Err(ErrorKind::WrongRecord);
    }
    Ok((head, rest))
}

impl RecordEntry {
    /// The bytes of the log that [`decode_record`] needs: the record with its head and extents.
    #[must_use]
    pub fn file_range(&self) -> Range<u64> {
        self.position..self.position.saturating_add(RecordHead::of(self).record_bytes())
    }
}
