//! Reads a log that is at rest: what it holds, and single records.

use std::io::{BufReader, Read, Seek, SeekFrom};

use crate::building::Building;
use crate::encode::Summary;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::{
    CRC_BYTES, FOOTER_BYTES, FooterPart, HEADER_BYTES, INDEX_ENTRY_BYTES, INDEX_HEAD_BYTES, IndexHead,
    RecordHead, SEAL_BYTES, TRAILER_BYTES, decode_extents, decode_header, decode_seal, header_bytes,
    header_disks, short_header,
};
use crate::record::decode_record;
use crate::types::{DiskInfo, Encoding, Extent, Footer, Header, Index, RecordEntry};

/// An index is read in parts of this many bytes.
const CHUNK_BYTES: usize = 64 * 1024;

/// What a log says of itself, read without its records. Its checksums are right, those of the records
/// and of the whole were not looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogMeta {
    /// Its header.
    pub header: Header,
    /// Its footer.
    pub footer: Footer,
    /// What it holds and where.
    pub index: Index,
    /// It in figures; the hash is the one that the log claims.
    pub summary: Summary,
}

/// Reads header, index and footer, however long the log is. The log is all that there is to read.
pub fn read_index(log: &mut (impl Read + Seek + ?Sized)) -> Result<LogMeta> {
    seek(log, SeekFrom::Start(0))?;
    let header = read_header(log)?;
    let log_bytes = seek(log, SeekFrom::End(0))?;
    let truncated = ErrorKind::Truncated.at(log_bytes);
    let Some(footer_position) = log_bytes.checked_sub(TRAILER_BYTES as u64) else { return Err(truncated) };
    seek(log, SeekFrom::Start(footer_position))?;
    let (footer, hash) = read_trailer(log).map_err(|kind| match kind {
        // There is something else where the end should be: most likely the log goes on there.
        Failed::Kind(ErrorKind::BadTag(_)) => truncated,
        Failed::Kind(kind) => kind.at(footer_position),
        Failed::Io(error) => Error::io("read", footer_position, error),
    })?;
    let disks = header.disks.len();
    if footer.total_bytes() != log_bytes || footer.index_position < header_bytes(disks) as u64 {
        return Err(ErrorKind::IndexMismatch.at(footer_position));
    }
    seek(log, SeekFrom::Start(footer.index_position))?;
    let index = read_units(log, &footer, &header.disks).map_err(|kind| match kind {
        Failed::Kind(kind) => kind.at(footer.index_position),
        Failed::Io(error) => Error::io("read", footer.index_position, error),
    })?;
    Ok(LogMeta { header, footer: footer.footer, index, summary: footer.summary(hash) })
}

/// A failure whose place is not known yet.
enum Failed {
    Kind(ErrorKind),
    Io(std::io::Error),
}

impl From<ErrorKind> for Failed {
    fn from(kind: ErrorKind) -> Self {
        Self::Kind(kind)
    }
}

impl From<std::io::Error> for Failed {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

fn seek(log: &mut (impl Seek + ?Sized), to: SeekFrom) -> Result<u64> {
    log.seek(to).map_err(|error| Error::io("seek in", 0, error))
}

fn read_header(log: &mut (impl Read + ?Sized)) -> Result<Header> {
    let mut bytes = Vec::new();
    let mut fill = |bytes: &mut Vec<u8>, wanted: usize| {
        let missing = (wanted - bytes.len()) as u64;
        (&mut *log).take(missing).read_to_end(bytes).map_err(|error| Error::io("read", 0, error))
    };
    fill(&mut bytes, HEADER_BYTES)?;
    let Some(fixed) = bytes.first_chunk() else { return Err(short_header(&bytes).at(0)) };
    let wanted = header_bytes(header_disks(fixed).map_err(|kind| kind.at(0))?);
    fill(&mut bytes, wanted)?;
    if bytes.len() < wanted {
        return Err(ErrorKind::Truncated.at(bytes.len() as u64));
    }
    decode_header(&bytes).map_err(|kind| kind.at(0))
}

fn read_trailer(log: &mut (impl Read + ?Sized)) -> Result<(FooterPart, [u8; 32]), Failed> {
    let (mut footer, mut seal) = ([0; FOOTER_BYTES], [0; SEAL_BYTES]);
    log.read_exact(&mut footer)?;
    log.read_exact(&mut seal)?;
    let hash = decode_seal(&footer, &seal)?;
    Ok((FooterPart::decode(&footer)?, hash))
}

fn read_units(
    log: &mut (impl Read + ?Sized),
    footer: &FooterPart,
    disks: &[DiskInfo],
) -> Result<Index, Failed> {
    let mut bytes = Checked { inner: BufReader::with_capacity(CHUNK_BYTES, log), crc: 0, left: 0 };
    let mut part = [0; INDEX_HEAD_BYTES];
    bytes.left = footer.index.index_bytes() - CRC_BYTES as u64;
    bytes.read(&mut part)?;
    let outcome = match IndexHead::decode(&part) {
        Ok(head) if head == footer.index => parse_units(&mut bytes, disks),
        Ok(_) => Err(ErrorKind::IndexMismatch.into()),
        Err(kind) => Err(kind.into()),
    };
    if matches!(outcome, Err(Failed::Io(_))) {
        return outcome.map(|building| building.index);
    }
    // If the CRC is wrong too, that is the better explanation.
    bytes.skip()?;
    let mut crc = [0; CRC_BYTES];
    bytes.inner.read_exact(&mut crc)?;
    if crc != bytes.crc.to_le_bytes() {
        return Err(ErrorKind::IndexCrc.into());
    }
    let building = outcome?;
    if *footer != building.footer(footer.footer) {
        return Err(ErrorKind::IndexMismatch.into());
    }
    Ok(building.index)
}

fn parse_units(bytes: &mut Checked<impl Read>, disks: &[DiskInfo]) -> Result<Building, Failed> {
    let mut building = Building::new(disks.len());
    let mut extents = Vec::new();
    while bytes.left > 0 {
        let mut part = [0; INDEX_ENTRY_BYTES];
        bytes.read(&mut part)?;
        let head = RecordHead::decode_entry(&part)?;
        building.check_head(&head, disks)?;
        extents.resize(head.extent_bytes(), 0);
        bytes.read(&mut extents)?;
        building.add(&head, decode_extents(&extents), disks)?;
    }
    building.index.records.shrink_to_fit();
    building.index.extents.shrink_to_fit();
    Ok(building)
}

/// The bytes of an index up to its CRC.
struct Checked<R> {
    inner: R,
    crc: u32,
    left: u64,
}

impl<R: Read> Checked<R> {
    fn read(&mut self, part: &mut [u8]) -> Result<(), Failed> {
        self.left = self.left.checked_sub(part.len() as u64).ok_or(ErrorKind::IndexMismatch)?;
        self.inner.read_exact(part)?;
        self.crc = crc32c::crc32c_append(self.crc, part);
        Ok(())
    }

    fn skip(&mut self) -> Result<(), Failed> {
        let mut chunk = [0; INDEX_ENTRY_BYTES * 64];
        while self.left > 0 {
            let now = self.left.min(chunk.len() as u64) as usize;
            self.read(&mut chunk[..now])?;
        }
        Ok(())
    }
}

/// Reads a log's records one by one, in any order. For inspection and tests; whoever reads many at once does
/// better with [`RecordEntry::file_range`] and [`decode_record`].
#[derive(Debug)]
pub struct RecordReader<R> {
    log: R,
    meta: LogMeta,
    stored: Vec<u8>,
    data: Vec<u8>,
}

/// One record of a log, decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// As the index lists it.
    pub entry: &'a RecordEntry,
    /// What it covers.
    pub extents: &'a [Extent],
    /// The bytes of its extents, one after the other; empty for zeros.
    pub data: &'a [u8],
}

impl<R: Read + Seek> RecordReader<R> {
    /// Reads the log's index.
    pub fn open(mut log: R) -> Result<Self> {
        let meta = read_index(&mut log)?;
        Ok(Self { log, meta, stored: Vec::new(), data: Vec::new() })
    }

    /// What the log says of itself.
    pub const fn meta(&self) -> &LogMeta {
        &self.meta
    }

    /// The record at this place of the index; none past the last one.
    pub fn record(&mut self, place: usize) -> Result<Option<Record<'_>>> {
        let Some(entry) = self.meta.index.records.get(place) else { return Ok(None) };
        let range = entry.file_range();
        seek(&mut self.log, SeekFrom::Start(range.start))?;
        self.stored.clear();
        self.log
            .by_ref()
            .take(range.end - range.start)
            .read_to_end(&mut self.stored)
            .map_err(|error| Error::io("read", range.start, error))?;
        decode_record(entry, &self.stored, &mut self.data)?;
        Ok(Some(Record { entry, extents: self.meta.index.extents_of(entry), data: &self.data }))
    }
}

impl<'a> Record<'a> {
    /// Its extents with their bytes; without, if they read as zeros.
    pub fn pieces(&self) -> impl Iterator<Item = (Extent, Option<&'a [u8]>)> + use<'a> {
        let zero = self.entry.encoding == Encoding::Zero;
        let mut rest = self.data;
        self.extents.iter().map(move |&extent| {
            if zero {
                return (extent, None);
            }
            // The index was checked: they add up.
            let (now, later) = rest.split_at(rest.len().min(extent.len as usize));
            rest = later;
            (extent, Some(now))
        })
    }
}
