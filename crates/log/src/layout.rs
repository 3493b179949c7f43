//! How format v1 lays out its parts. All integers are little endian, all reserved bytes zero.
//!
//! `docs/format/log-v1.md` says the same in words. The fields of a part follow one another without gaps; that
//! they add up to the part's size is asserted when this is compiled.

mod header;
mod record;
mod tail;

pub(crate) use header::{
    check_header, decode_header, encode_header, header_bytes, header_disks, short_header,
};
pub(crate) use record::{RecordCrc, RecordHead, decode_extents, encode_extent};
pub(crate) use tail::{FooterPart, IndexHead, check_footer, decode_seal, encode_seal};

use crate::error::ErrorKind;

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
pub(super) struct Field<const N: usize> {
    pub at: usize,
}

impl<const N: usize> Field<N> {
    pub const FIRST: Self = Self { at: 0 };

    pub const fn after<const M: usize>(before: Field<M>) -> Self {
        Self { at: before.end() }
    }

    pub const fn end(self) -> usize {
        self.at + N
    }

    pub fn put(self, part: &mut [u8], value: [u8; N]) {
        part[self.at..self.end()].copy_from_slice(&value);
    }

    pub fn get(self, part: &[u8]) -> [u8; N] {
        let mut value = [0; N];
        value.copy_from_slice(&part[self.at..self.end()]);
        value
    }
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
