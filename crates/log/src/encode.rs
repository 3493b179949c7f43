//! Writes a log.

use std::io::Write;

use crate::building::Building;
use crate::error::{Error, Result};
use crate::layout::{check_footer, check_header, encode_header, encode_seal};
use crate::record::EncodedRecord;
use crate::types::{DiskInfo, Footer, Header};
use crate::units::Units;

/// The index is written in parts of about this many bytes.
const INDEX_CHUNK_BYTES: usize = 64 * 1024;

/// A log in figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// The bytes of the log.
    pub total_bytes: u64,
    /// Bytes of disk that it holds as data.
    pub data_bytes: u64,
    /// Bytes of disk that it holds as zeros.
    pub zero_bytes: u64,
    /// Its records.
    pub records: u32,
    /// Their extents.
    pub extents: u32,
    /// BLAKE3 over everything before the hash itself.
    pub hash: [u8; 32],
}

/// Writes a log to `W`, front to back. Once a method has failed, the log is to be given up.
#[derive(Debug)]
pub struct Encoder<W> {
    out: Hashed<W>,
    disks: Vec<DiskInfo>,
    building: Building,
}

#[derive(Debug)]
struct Hashed<W> {
    inner: W,
    hasher: blake3::Hasher,
    position: u64,
}

impl<W: Write> Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.inner.write_all(bytes).map_err(|error| Error::io("write", self.position, error))?;
        self.hasher.update(bytes);
        self.position += bytes.len() as u64;
        Ok(())
    }
}

impl<W: Write> Encoder<W> {
    /// Begins a log: checks and writes its header.
    pub fn new(inner: W, header: &Header) -> Result<Self> {
        check_header(header).map_err(|kind| kind.at(0))?;
        let mut out = Hashed { inner, hasher: blake3::Hasher::new(), position: 0 };
        out.write(&encode_header(header))?;
        Ok(Self { out, disks: header.disks.clone(), building: Building::new(header.disks.len()) })
    }

    /// Writes a record.
    pub fn record(&mut self, record: EncodedRecord) -> Result<()> {
        let EncodedRecord { head, extents, prefix, payload } = record;
        self.building
            .check_head(&head, &self.disks)
            .and_then(|()| self.building.add(&head, extents.into_iter(), &self.disks))
            .map_err(|kind| kind.at(self.out.position))?;
        self.out.write(&prefix)?;
        self.out.write(&payload)
    }

    /// Where the bytes go. What is taken out of it is not needed again.
    pub const fn get_mut(&mut self) -> &mut W {
        &mut self.out.inner
    }

    /// Bytes of disk written as data so far.
    #[must_use]
    pub const fn raw_bytes(&self) -> u64 {
        self.building.data_bytes
    }

    /// Extents written so far.
    #[must_use]
    pub const fn extents(&self) -> usize {
        self.building.index.extents.len()
    }

    /// Writes the index, the footer and the seal.
    pub fn finish(mut self, footer: Footer) -> Result<(Summary, W)> {
        let index_position = self.out.position;
        self.building
            .check_disjoint(self.disks.len())
            .and_then(|()| check_footer(&footer))
            .map_err(|kind| kind.at(index_position))?;
        debug_assert_eq!(index_position, self.building.position);
        self.write_index()?;
        let part = self.building.footer(footer);
        let footer = part.encode();
        self.out.write(&footer)?;
        let hash = *self.out.hasher.finalize().as_bytes();
        self.out.write(&encode_seal(&footer, hash))?;
        self.out.inner.flush().map_err(|error| Error::io("write", self.out.position, error))?;
        Ok((part.summary(hash), self.out.inner))
    }

    fn write_index(&mut self) -> Result<()> {
        let Self { out, building, .. } = self;
        let mut chunk = building.head().encode().to_vec();
        let mut units = Units::default();
        let mut crc = 0;
        while let Some(unit) = units.next(&building.index) {
            chunk.extend_from_slice(&unit);
            if chunk.len() >= INDEX_CHUNK_BYTES {
                crc = crc32c::crc32c_append(crc, &chunk);
                out.write(&chunk)?;
                chunk.clear();
            }
        }
        crc = crc32c::crc32c_append(crc, &chunk);
        chunk.extend_from_slice(&crc.to_le_bytes());
        out.write(&chunk)
    }
}
