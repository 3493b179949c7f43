//! How format v1 lays out its parts. All integers are little endian, all reserved bytes zero.

use model::{Consistency, DiskName, LogClass, LogId, LogNumber, Progress, Purpose, Timestamp, VmId};

use crate::encode::Summary;
use crate::error::ErrorKind;
use crate::limits::{DISK_NAME_BYTES_MAX, DISKS_MAX};
use crate::types::{DiskInfo, Encoding, Extent, Footer, Header, RecordEntry};

const MAGIC: [u8; 8] = *b"\x89AFTLOG\n";
const VERSION: u16 = 1;
const RECORD_TAG: [u8; 4] = *b"RECD";
pub(crate) const INDEX_TAG: [u8; 4] = *b"INDX";
const FOOTER_TAG: [u8; 4] = *b"FOOT";
const END_MAGIC: [u8; 4] = *b"DONE";

pub(crate) const TAG_BYTES: usize = 4;
pub(crate) const CRC_BYTES: usize = 4;
/// The header without its disks and its CRC.
pub(crate) const HEADER_BYTES: usize = 80;
pub(crate) const DISK_BYTES: usize = 80;
pub(crate) const RECORD_HEAD_BYTES: usize = 24;
pub(crate) const EXTENT_BYTES: usize = 16;
/// What the index repeats of a record's head. The same as an extent, so that the index is a row of units.
pub(crate) const INDEX_ENTRY_BYTES: usize = 16;
pub(crate) const INDEX_HEAD_BYTES: usize = 16;
pub(crate) const FOOTER_BYTES: usize = 56;
pub(crate) const SEAL_BYTES: usize = 40;
/// Footer and seal: what a reader finds from the end.
pub(crate) const TRAILER_BYTES: usize = FOOTER_BYTES + SEAL_BYTES;

/// `N` bytes at a place of a part.
#[derive(Clone, Copy)]
struct Field<const N: usize> {
    at: usize,
}

impl<const N: usize> Field<N> {
    const FIRST: Self = Self { at: 0 };

    const fn after<const M: usize>(before: Field<M>) -> Self {
        Self { at: before.end() }
    }

    const fn end(self) -> usize {
        self.at + N
    }

    fn put(self, part: &mut [u8], value: [u8; N]) {
        part[self.at..self.end()].copy_from_slice(&value);
    }

    fn get(self, part: &[u8]) -> [u8; N] {
        let mut value = [0; N];
        value.copy_from_slice(&part[self.at..self.end()]);
        value
    }
}

mod header {
    use super::Field;
    pub(super) const MAGIC: Field<8> = Field::FIRST;
    pub(super) const VERSION: Field<2> = Field::after(MAGIC);
    pub(super) const DISKS: Field<2> = Field::after(VERSION);
    pub(super) const PURPOSE: Field<1> = Field::after(DISKS);
    pub(super) const RESERVED: Field<3> = Field::after(PURPOSE);
    pub(super) const VM: Field<16> = Field::after(RESERVED);
    pub(super) const ID: Field<16> = Field::after(VM);
    pub(super) const PREDECESSOR: Field<16> = Field::after(ID);
    pub(super) const NUMBER: Field<8> = Field::after(PREDECESSOR);
    pub(super) const MOMENT: Field<8> = Field::after(NUMBER);
    const _: () = assert!(MOMENT.end() == super::HEADER_BYTES);
}

mod disk {
    use super::{DISK_NAME_BYTES_MAX, Field};
    pub(super) const SIZE: Field<8> = Field::FIRST;
    pub(super) const NAME_BYTES: Field<1> = Field::after(SIZE);
    pub(super) const RESERVED: Field<7> = Field::after(NAME_BYTES);
    pub(super) const NAME: Field<DISK_NAME_BYTES_MAX> = Field::after(RESERVED);
    const _: () = assert!(NAME.end() == super::DISK_BYTES);
}

mod record {
    use super::Field;
    pub(super) const TAG: Field<4> = Field::FIRST;
    /// What the index repeats.
    pub(super) const ENTRY: Field<{ super::INDEX_ENTRY_BYTES }> = Field::after(TAG);
    pub(super) const CRC: Field<4> = Field::after(ENTRY);
    const _: () = assert!(CRC.end() == super::RECORD_HEAD_BYTES);
}

mod entry {
    use super::Field;
    pub(super) const DISK: Field<2> = Field::FIRST;
    pub(super) const ENCODING: Field<1> = Field::after(DISK);
    pub(super) const RESERVED: Field<1> = Field::after(ENCODING);
    pub(super) const EXTENTS: Field<4> = Field::after(RESERVED);
    pub(super) const STORED_BYTES: Field<4> = Field::after(EXTENTS);
    pub(super) const RAW_BYTES: Field<4> = Field::after(STORED_BYTES);
    const _: () = assert!(RAW_BYTES.end() == super::INDEX_ENTRY_BYTES);
}

mod extent {
    use super::Field;
    pub(super) const OFFSET: Field<8> = Field::FIRST;
    pub(super) const LEN: Field<8> = Field::after(OFFSET);
    const _: () = assert!(LEN.end() == super::EXTENT_BYTES);
    const _: () = assert!(super::EXTENT_BYTES == super::INDEX_ENTRY_BYTES);
}

mod index {
    use super::Field;
    pub(super) const TAG: Field<4> = Field::FIRST;
    pub(super) const RECORDS: Field<4> = Field::after(TAG);
    pub(super) const EXTENTS: Field<4> = Field::after(RECORDS);
    pub(super) const RESERVED: Field<4> = Field::after(EXTENTS);
    const _: () = assert!(RESERVED.end() == super::INDEX_HEAD_BYTES);
}

mod footer {
    use super::Field;
    pub(super) const TAG: Field<4> = Field::FIRST;
    pub(super) const CLASS: Field<1> = Field::after(TAG);
    pub(super) const RESERVED: Field<3> = Field::after(CLASS);
    pub(super) const COVERED_BYTES: Field<8> = Field::after(RESERVED);
    pub(super) const TOTAL_BYTES: Field<8> = Field::after(COVERED_BYTES);
    pub(super) const INDEX_POSITION: Field<8> = Field::after(TOTAL_BYTES);
    pub(super) const DATA_BYTES: Field<8> = Field::after(INDEX_POSITION);
    pub(super) const ZERO_BYTES: Field<8> = Field::after(DATA_BYTES);
    pub(super) const RECORDS: Field<4> = Field::after(ZERO_BYTES);
    pub(super) const EXTENTS: Field<4> = Field::after(RECORDS);
    const _: () = assert!(EXTENTS.end() == super::FOOTER_BYTES);
}

mod seal {
    use super::Field;
    pub(super) const HASH: Field<32> = Field::FIRST;
    pub(super) const CRC: Field<4> = Field::after(HASH);
    pub(super) const END_MAGIC: Field<4> = Field::after(CRC);
    const _: () = assert!(END_MAGIC.end() == super::SEAL_BYTES);
}

/// A header's bytes, CRC included. The header was checked.
pub(crate) fn encode_header(header: &Header) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES];
    header::MAGIC.put(&mut bytes, MAGIC);
    header::VERSION.put(&mut bytes, VERSION.to_le_bytes());
    header::DISKS.put(&mut bytes, (header.disks.len() as u16).to_le_bytes());
    header::PURPOSE.put(&mut bytes, [purpose_code(header.purpose)]);
    header::VM.put(&mut bytes, *header.vm.as_bytes());
    header::ID.put(&mut bytes, *header.id.as_bytes());
    header::PREDECESSOR.put(&mut bytes, *header.predecessor.as_bytes());
    header::NUMBER.put(&mut bytes, header.number.0.to_le_bytes());
    header::MOMENT.put(&mut bytes, header.moment.0.to_le_bytes());
    for disk in &header.disks {
        let mut part = [0; DISK_BYTES];
        let name = disk.name.as_str().as_bytes();
        disk::SIZE.put(&mut part, disk.size_bytes.to_le_bytes());
        disk::NAME_BYTES.put(&mut part, [name.len() as u8]);
        part[disk::NAME.at..disk::NAME.at + name.len()].copy_from_slice(name);
        bytes.extend_from_slice(&part);
    }
    bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
    bytes
}

/// Whether these first bytes of something can be the start of a log of this version; then its disks.
pub(crate) fn header_disks(fixed: &[u8; HEADER_BYTES]) -> Result<usize, ErrorKind> {
    if header::MAGIC.get(fixed) != MAGIC {
        return Err(ErrorKind::BadMagic);
    }
    match u16::from_le_bytes(header::VERSION.get(fixed)) {
        VERSION => {}
        0 => return Err(ErrorKind::Field("version")),
        other => return Err(ErrorKind::Version(other)),
    }
    let disks = usize::from(u16::from_le_bytes(header::DISKS.get(fixed)));
    check_limit("disks", disks, DISKS_MAX)?;
    Ok(disks)
}

/// What is wrong with something that ends before a header does.
pub(crate) fn short_header(bytes: &[u8]) -> ErrorKind {
    if bytes.iter().zip(MAGIC).all(|(&found, expected)| found == expected) {
        ErrorKind::Truncated
    } else {
        ErrorKind::BadMagic
    }
}

/// The bytes of a whole header with this many disks.
pub(crate) const fn header_bytes(disks: usize) -> usize {
    HEADER_BYTES + disks * DISK_BYTES + CRC_BYTES
}

/// Decodes a whole header; `bytes` has [`header_bytes`].
pub(crate) fn decode_header(bytes: &[u8]) -> Result<Header, ErrorKind> {
    let (fields, crc) = bytes.split_at(bytes.len() - CRC_BYTES);
    if crc32c::crc32c(fields).to_le_bytes() != crc {
        return Err(ErrorKind::HeaderCrc);
    }
    reserved(&header::RESERVED.get(fields))?;
    let header = Header {
        vm: VmId::from_bytes(header::VM.get(fields)),
        id: LogId::from_bytes(header::ID.get(fields)),
        number: LogNumber(u64::from_le_bytes(header::NUMBER.get(fields))),
        predecessor: LogId::from_bytes(header::PREDECESSOR.get(fields)),
        moment: Timestamp(i64::from_le_bytes(header::MOMENT.get(fields))),
        purpose: purpose(header::PURPOSE.get(fields)[0])?,
        disks: fields[HEADER_BYTES..].chunks_exact(DISK_BYTES).map(decode_disk).collect::<Result<_, _>>()?,
    };
    check_header(&header)?;
    Ok(header)
}

/// What both sides demand of a header.
pub(crate) fn check_header(header: &Header) -> Result<(), ErrorKind> {
    check_limit("disks", header.disks.len(), DISKS_MAX)?;
    if header.number == LogNumber::ZERO {
        return Err(ErrorKind::Field("log's number"));
    }
    for (place, disk) in header.disks.iter().enumerate() {
        if header.disks[..place].iter().any(|before| before.name == disk.name) {
            return Err(ErrorKind::DuplicateDisk(disk.name.to_string()));
        }
    }
    Ok(())
}

fn decode_disk(part: &[u8]) -> Result<DiskInfo, ErrorKind> {
    reserved(&disk::RESERVED.get(part))?;
    let name = disk::NAME.get(part);
    let len = usize::from(disk::NAME_BYTES.get(part)[0]);
    let wrong = ErrorKind::Field("disk's name");
    let (name, padding) = name.split_at_checked(len).ok_or(wrong.clone())?;
    reserved(padding)?;
    let name: Option<DiskName> = std::str::from_utf8(name).ok().and_then(|name| name.parse().ok());
    let size_bytes = u64::from_le_bytes(disk::SIZE.get(part));
    Ok(DiskInfo { name: name.ok_or(wrong)?, size_bytes })
}

const fn purpose_code(purpose: Purpose) -> u8 {
    match purpose {
        Purpose::Initial => 1,
        Purpose::Changes => 2,
        Purpose::Resync => 3,
    }
}

const fn purpose(code: u8) -> Result<Purpose, ErrorKind> {
    Ok(match code {
        1 => Purpose::Initial,
        2 => Purpose::Changes,
        3 => Purpose::Resync,
        _ => return Err(ErrorKind::Field("purpose")),
    })
}

/// A record without its extents and payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RecordHead {
    pub disk: u16,
    pub encoding: Encoding,
    pub extents: u32,
    pub stored_bytes: u32,
    pub raw_bytes: u32,
}

impl RecordHead {
    pub fn of(entry: &RecordEntry) -> Self {
        Self {
            disk: entry.disk,
            encoding: entry.encoding,
            extents: entry.extents.end.wrapping_sub(entry.extents.start),
            stored_bytes: entry.stored_bytes,
            raw_bytes: entry.raw_bytes,
        }
    }

    /// The bytes of its extents in the file.
    pub const fn extent_bytes(&self) -> usize {
        self.extents as usize * EXTENT_BYTES
    }

    /// The bytes of the whole record in the file.
    pub const fn record_bytes(&self) -> u64 {
        (RECORD_HEAD_BYTES + self.extent_bytes()) as u64 + self.stored_bytes as u64
    }

    /// As the index has it.
    pub fn encode_entry(&self) -> [u8; INDEX_ENTRY_BYTES] {
        let mut part = [0; INDEX_ENTRY_BYTES];
        let encoding = match self.encoding {
            Encoding::Zero => 0,
            Encoding::Stored => 1,
            Encoding::Zstd => 2,
        };
        entry::DISK.put(&mut part, self.disk.to_le_bytes());
        entry::ENCODING.put(&mut part, [encoding]);
        entry::EXTENTS.put(&mut part, self.extents.to_le_bytes());
        entry::STORED_BYTES.put(&mut part, self.stored_bytes.to_le_bytes());
        entry::RAW_BYTES.put(&mut part, self.raw_bytes.to_le_bytes());
        part
    }

    pub fn decode_entry(part: &[u8; INDEX_ENTRY_BYTES]) -> Result<Self, ErrorKind> {
        reserved(&entry::RESERVED.get(part))?;
        let encoding = match entry::ENCODING.get(part)[0] {
            0 => Encoding::Zero,
            1 => Encoding::Stored,
            2 => Encoding::Zstd,
            _ => return Err(ErrorKind::Field("encoding")),
        };
        Ok(Self {
            disk: u16::from_le_bytes(entry::DISK.get(part)),
            encoding,
            extents: u32::from_le_bytes(entry::EXTENTS.get(part)),
            stored_bytes: u32::from_le_bytes(entry::STORED_BYTES.get(part)),
            raw_bytes: u32::from_le_bytes(entry::RAW_BYTES.get(part)),
        })
    }

    /// A record's bytes up to its payload, with the CRC over all of it.
    pub fn encode(&self, extents: &[Extent], payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; RECORD_HEAD_BYTES];
        record::TAG.put(&mut bytes, RECORD_TAG);
        record::ENTRY.put(&mut bytes, self.encode_entry());
        bytes.extend(extents.iter().flat_map(encode_extent));
        let crc = crc32c::crc32c(&bytes[..record::CRC.at]);
        let crc = crc32c::crc32c_append(crc, &bytes[RECORD_HEAD_BYTES..]);
        record::CRC.put(&mut bytes, crc32c::crc32c_append(crc, payload).to_le_bytes());
        bytes
    }

    /// Decodes a record's head; also the CRC it claims and the CRC of the head itself, to be continued
    /// over extents and payload.
    pub fn decode(part: &[u8; RECORD_HEAD_BYTES]) -> Result<(Self, RecordCrc), ErrorKind> {
        if record::TAG.get(part) != RECORD_TAG {
            return Err(ErrorKind::BadTag("record"));
        }
        let claimed = u32::from_le_bytes(record::CRC.get(part));
        let crc = RecordCrc { claimed, found: crc32c::crc32c(&part[..record::CRC.at]) };
        Ok((Self::decode_entry(&record::ENTRY.get(part))?, crc))
    }
}

/// A record's checksum while it is computed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RecordCrc {
    claimed: u32,
    found: u32,
}

impl RecordCrc {
    pub fn add(&mut self, bytes: &[u8]) {
        self.found = crc32c::crc32c_append(self.found, bytes);
    }

    pub fn check(self) -> Result<(), ErrorKind> {
        if self.claimed == self.found { Ok(()) } else { Err(ErrorKind::RecordCrc) }
    }
}

pub(crate) fn encode_extent(extent: &Extent) -> [u8; EXTENT_BYTES] {
    let mut part = [0; EXTENT_BYTES];
    extent::OFFSET.put(&mut part, extent.offset.to_le_bytes());
    extent::LEN.put(&mut part, extent.len.to_le_bytes());
    part
}

/// The extents in these bytes, whose length is a multiple of [`EXTENT_BYTES`].
pub(crate) fn decode_extents(bytes: &[u8]) -> impl Iterator<Item = Extent> {
    bytes.chunks_exact(EXTENT_BYTES).map(|part| Extent {
        offset: u64::from_le_bytes(extent::OFFSET.get(part)),
        len: u64::from_le_bytes(extent::LEN.get(part)),
    })
}

/// The start of an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct IndexHead {
    pub records: u32,
    pub extents: u32,
}

impl IndexHead {
    /// The bytes between the index's head and its CRC.
    pub const fn unit_bytes(&self) -> u64 {
        (self.records as u64 + self.extents as u64) * EXTENT_BYTES as u64
    }

    /// The bytes of the whole index.
    pub const fn index_bytes(&self) -> u64 {
        (INDEX_HEAD_BYTES + CRC_BYTES) as u64 + self.unit_bytes()
    }

    pub fn encode(&self) -> [u8; INDEX_HEAD_BYTES] {
        let mut part = [0; INDEX_HEAD_BYTES];
        index::TAG.put(&mut part, INDEX_TAG);
        index::RECORDS.put(&mut part, self.records.to_le_bytes());
        index::EXTENTS.put(&mut part, self.extents.to_le_bytes());
        part
    }

    pub fn decode(part: &[u8; INDEX_HEAD_BYTES]) -> Result<Self, ErrorKind> {
        if index::TAG.get(part) != INDEX_TAG {
            return Err(ErrorKind::BadTag("index"));
        }
        reserved(&index::RESERVED.get(part))?;
        Ok(Self {
            records: u32::from_le_bytes(index::RECORDS.get(part)),
            extents: u32::from_le_bytes(index::EXTENTS.get(part)),
        })
    }
}

/// What the footer says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FooterPart {
    pub footer: Footer,
    pub index_position: u64,
    pub data_bytes: u64,
    pub zero_bytes: u64,
    pub index: IndexHead,
}

impl FooterPart {
    pub fn encode(&self) -> [u8; FOOTER_BYTES] {
        let mut part = [0; FOOTER_BYTES];
        let class = match self.footer.class {
            LogClass::Partial => 0,
            LogClass::Point(Consistency::Crash) => 1,
            LogClass::Point(Consistency::Application) => 2,
        };
        footer::TAG.put(&mut part, FOOTER_TAG);
        footer::CLASS.put(&mut part, [class]);
        footer::COVERED_BYTES.put(&mut part, self.footer.progress.covered_bytes.to_le_bytes());
        footer::TOTAL_BYTES.put(&mut part, self.footer.progress.total_bytes.to_le_bytes());
        footer::INDEX_POSITION.put(&mut part, self.index_position.to_le_bytes());
        footer::DATA_BYTES.put(&mut part, self.data_bytes.to_le_bytes());
        footer::ZERO_BYTES.put(&mut part, self.zero_bytes.to_le_bytes());
        footer::RECORDS.put(&mut part, self.index.records.to_le_bytes());
        footer::EXTENTS.put(&mut part, self.index.extents.to_le_bytes());
        part
    }

    /// Decodes a footer whose CRC is right.
    pub fn decode(part: &[u8; FOOTER_BYTES]) -> Result<Self, ErrorKind> {
        if footer::TAG.get(part) != FOOTER_TAG {
            return Err(ErrorKind::BadTag("footer"));
        }
        reserved(&footer::RESERVED.get(part))?;
        let class = match footer::CLASS.get(part)[0] {
            0 => LogClass::Partial,
            1 => LogClass::Point(Consistency::Crash),
            2 => LogClass::Point(Consistency::Application),
            _ => return Err(ErrorKind::Field("class")),
        };
        let progress = Progress {
            covered_bytes: u64::from_le_bytes(footer::COVERED_BYTES.get(part)),
            total_bytes: u64::from_le_bytes(footer::TOTAL_BYTES.get(part)),
        };
        let footer = Footer { class, progress };
        check_footer(&footer)?;
        Ok(Self {
            footer,
            index_position: u64::from_le_bytes(footer::INDEX_POSITION.get(part)),
            data_bytes: u64::from_le_bytes(footer::DATA_BYTES.get(part)),
            zero_bytes: u64::from_le_bytes(footer::ZERO_BYTES.get(part)),
            index: IndexHead {
                records: u32::from_le_bytes(footer::RECORDS.get(part)),
                extents: u32::from_le_bytes(footer::EXTENTS.get(part)),
            },
        })
    }
}

impl FooterPart {
    /// The bytes of the whole log.
    pub const fn total_bytes(&self) -> u64 {
        self.index_position.saturating_add(self.index.index_bytes() + TRAILER_BYTES as u64)
    }

    /// The log in figures.
    pub const fn summary(&self, hash: [u8; 32]) -> Summary {
        Summary {
            total_bytes: self.total_bytes(),
            data_bytes: self.data_bytes,
            zero_bytes: self.zero_bytes,
            records: self.index.records,
            extents: self.index.extents,
            hash,
        }
    }
}

/// What both sides demand of a footer.
pub(crate) const fn check_footer(footer: &Footer) -> Result<(), ErrorKind> {
    if footer.progress.covered_bytes > footer.progress.total_bytes {
        return Err(ErrorKind::Field("progress"));
    }
    Ok(())
}

/// The last bytes of a log.
pub(crate) fn encode_seal(footer: &[u8; FOOTER_BYTES], hash: [u8; 32]) -> [u8; SEAL_BYTES] {
    let mut part = [0; SEAL_BYTES];
    seal::HASH.put(&mut part, hash);
    seal::CRC.put(&mut part, seal_crc(footer, &hash));
    seal::END_MAGIC.put(&mut part, END_MAGIC);
    part
}

/// Checks a seal's own checksum and gives the hash that it claims for the whole.
pub(crate) fn decode_seal(
    footer: &[u8; FOOTER_BYTES],
    part: &[u8; SEAL_BYTES],
) -> Result<[u8; 32], ErrorKind> {
    let hash = seal::HASH.get(part);
    if seal::END_MAGIC.get(part) != END_MAGIC {
        return Err(ErrorKind::BadTag("end"));
    }
    if seal::CRC.get(part) != seal_crc(footer, &hash) {
        return Err(ErrorKind::FooterCrc);
    }
    Ok(hash)
}

fn seal_crc(footer: &[u8; FOOTER_BYTES], hash: &[u8; 32]) -> [u8; 4] {
    crc32c::crc32c_append(crc32c::crc32c(footer), hash).to_le_bytes()
}

fn reserved(bytes: &[u8]) -> Result<(), ErrorKind> {
    if bytes.iter().all(|&byte| byte == 0) { Ok(()) } else { Err(ErrorKind::Field("reserved part")) }
}

pub(crate) fn check_limit(what: &'static str, found: usize, max: usize) -> Result<(), ErrorKind> {
    if found > max {
        return Err(ErrorKind::Limit { what, found: found as u64, max: max as u64 });
    }
    Ok(())
}
