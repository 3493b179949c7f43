//! The header: who the log is, and its disks.

use model::{DISK_BYTES_MAX, DiskName, LogId, LogNumber, Purpose, Timestamp, VM_BYTES_MAX, VmId};

use super::{CRC_BYTES, DISK_BYTES, HEADER_BYTES, MAGIC, VERSION, check_limit, reserved};
use crate::error::ErrorKind;
use crate::limits::DISKS_MAX;
use crate::types::{DiskInfo, Header};

mod fixed {
    use crate::layout::Field;
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
    use crate::layout::Field;
    use crate::limits::DISK_NAME_BYTES_MAX;
    pub(super) const SIZE: Field<8> = Field::FIRST;
    pub(super) const NAME_BYTES: Field<1> = Field::after(SIZE);
    pub(super) const RESERVED: Field<7> = Field::after(NAME_BYTES);
    pub(super) const NAME: Field<DISK_NAME_BYTES_MAX> = Field::after(RESERVED);
    const _: () = assert!(NAME.end() == super::DISK_BYTES);
}

/// A header's bytes, CRC included. The header was checked.
pub(crate) fn encode_header(header: &Header) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES];
    fixed::MAGIC.put(&mut bytes, MAGIC);
    fixed::VERSION.put(&mut bytes, VERSION.to_le_bytes());
    fixed::DISKS.put(&mut bytes, (header.disks.len() as u16).to_le_bytes());
    fixed::PURPOSE.put(&mut bytes, [purpose_code(header.purpose)]);
    fixed::VM.put(&mut bytes, *header.vm.as_bytes());
    fixed::ID.put(&mut bytes, *header.id.as_bytes());
    fixed::PREDECESSOR.put(&mut bytes, *header.predecessor.as_bytes());
    fixed::NUMBER.put(&mut bytes, header.number.0.to_le_bytes());
    fixed::MOMENT.put(&mut bytes, header.moment.0.to_le_bytes());
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
    if fixed::MAGIC.get(fixed) != MAGIC {
        return Err(ErrorKind::BadMagic);
    }
    match u16::from_le_bytes(fixed::VERSION.get(fixed)) {
        VERSION => {}
        0 => return Err(ErrorKind::Field("version")),
        other => return Err(ErrorKind::Version(other)),
    }
    let disks = usize::from(u16::from_le_bytes(fixed::DISKS.get(fixed)));
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
    reserved(&fixed::RESERVED.get(fields))?;
    let header = Header {
        vm: VmId::from_bytes(fixed::VM.get(fields)),
        id: LogId::from_bytes(fixed::ID.get(fields)),
        number: LogNumber(u64::from_le_bytes(fixed::NUMBER.get(fields))),
        predecessor: LogId::from_bytes(fixed::PREDECESSOR.get(fields)),
        moment: Timestamp(i64::from_le_bytes(fixed::MOMENT.get(fields))),
        purpose: purpose(fixed::PURPOSE.get(fields)[0])?,
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
        check_bytes("bytes of a disk", disk.size_bytes, DISK_BYTES_MAX)?;
    }
    let sum = header.disks.iter().map(|disk| disk.size_bytes).fold(0, u64::saturating_add);
    check_bytes("bytes of a VM's disks", sum, VM_BYTES_MAX)?;
    Ok(())
}

fn check_bytes(what: &'static str, found: u64, max: u64) -> Result<(), ErrorKind> {
    if found > max { Err(ErrorKind::Limit { what, found, max }) } else { Ok(()) }
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
