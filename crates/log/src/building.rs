//! An index while its records come by: in the encoder as they are written, in the verifier as they arrive,
//! in a reader as the index lists them. So all three demand the same of a record.

use crate::error::ErrorKind;
use crate::layout::{FooterPart, IndexHead, RecordHead, check_limit, header_bytes};
use crate::limits::{
    EXTENTS_MAX, RECORD_EXTENTS_MAX, RECORD_RAW_BYTES_MAX, RECORD_STORED_BYTES_MAX, RECORDS_MAX,
};
use crate::types::{DiskInfo, Encoding, Extent, Footer, Index, RecordEntry};

#[derive(Debug)]
pub(crate) struct Building {
    pub index: Index,
    /// Where the next record starts in the file.
    pub position: u64,
    pub data_bytes: u64,
    pub zero_bytes: u64,
}

impl Building {
    pub fn new(disks: usize) -> Self {
        let position = header_bytes(disks) as u64;
        Self { index: Index::default(), position, data_bytes: 0, zero_bytes: 0 }
    }

    pub const fn head(&self) -> IndexHead {
        // Both are within limits far below 2^32.
        IndexHead { records: self.index.records.len() as u32, extents: self.index.extents.len() as u32 }
    }

    /// Whether one more record with this head may come. To be asked before its extents are there.
    pub fn check_head(&self, head: &RecordHead, disks: &[DiskInfo]) -> Result<(), ErrorKind> {
        if usize::from(head.disk) >= disks.len() {
            return Err(ErrorKind::NoSuchDisk(head.disk));
        }
        check_limit("extents in one record", head.extents as usize, RECORD_EXTENTS_MAX)?;
        check_limit("bytes in one record", head.raw_bytes as usize, RECORD_RAW_BYTES_MAX)?;
        check_limit("bytes stored in one record", head.stored_bytes as usize, RECORD_STORED_BYTES_MAX)?;
        check_limit("records", self.index.records.len() + 1, RECORDS_MAX)?;
        check_limit("extents", self.index.extents.len() + head.extents as usize, EXTENTS_MAX)?;
        let (raw, stored) = (head.raw_bytes, head.stored_bytes);
        let fits = match head.encoding {
            Encoding::Zero => raw == 0 && stored == 0,
            Encoding::Stored => raw > 0 && stored == raw,
            Encoding::Zstd => stored > 0 && stored < raw,
        };
        if fits && head.extents > 0 { Ok(()) } else { Err(ErrorKind::RecordLengths) }
    }

    /// Adds a record whose head was checked.
    pub fn add(
        &mut self,
        head: &RecordHead,
        extents: impl Iterator<Item = Extent>,
        disks: &[DiskInfo],
    ) -> Result<(), ErrorKind> {
        let start = self.index.extents.len();
        self.index.extents.extend(extents);
        let bytes =
            check_extents(head, &self.index.extents[start..], disks[usize::from(head.disk)].size_bytes)?;
        let total = match head.encoding {
            Encoding::Zero => &mut self.zero_bytes,
            Encoding::Stored | Encoding::Zstd => &mut self.data_bytes,
        };
        *total = total.saturating_add(bytes);
        self.index.records.push(RecordEntry {
            disk: head.disk,
            encoding: head.encoding,
            position: self.position,
            stored_bytes: head.stored_bytes,
            raw_bytes: head.raw_bytes,
            extents: start as u32..self.index.extents.len() as u32,
        });
        self.position += head.record_bytes();
        Ok(())
    }

    /// The footer of a log that has these records.
    pub const fn footer(&self, footer: Footer) -> FooterPart {
        let Self { position, data_bytes, zero_bytes, .. } = *self;
        FooterPart { footer, index_position: position, data_bytes, zero_bytes, index: self.head() }
    }

    /// Whether no byte of a disk is in two records.
    ///
    /// Sorts the extents' places, 4 bytes each, rather than a second copy of them. Logs consist of a few
    /// sorted runs, which the sort finds and merges.
    pub fn check_disjoint(&self, disks: usize) -> Result<(), ErrorKind> {
        let mut places = vec![Vec::new(); disks];
        for record in &self.index.records {
            places[usize::from(record.disk)].extend(record.extents.clone());
        }
        let extent = |place: u32| self.index.extents[place as usize];
        for (disk, mut places) in places.into_iter().enumerate() {
            places.sort_by_key(|&place| extent(place).offset);
            let mut pairs = places.windows(2).map(|pair| (extent(pair[0]), extent(pair[1])));
            if let Some((_, second)) = pairs.find(|(first, second)| first.end() > second.offset) {
                return Err(ErrorKind::Overlap { disk: disk as u16, offset: second.offset });
            }
        }
        Ok(())
    }
}

/// Checks a record's extents among themselves, against the disk and the record's length; gives their sum.
fn check_extents(head: &RecordHead, extents: &[Extent], size_bytes: u64) -> Result<u64, ErrorKind> {
    let (mut end, mut sum) = (0, 0_u64);
    for (place, &Extent { offset, len }) in extents.iter().enumerate() {
        if len == 0 || (place > 0 && offset < end) {
            return Err(ErrorKind::ExtentOrder { offset });
        }
        end = match offset.checked_add(len) {
            Some(end) if end <= size_bytes => end,
            _ => return Err(ErrorKind::BeyondDisk { disk: head.disk, offset }),
        };
        // They are disjoint and within the disk: the sum is within its size.
        sum += len;
    }
    let fits = head.encoding == Encoding::Zero || sum == u64::from(head.raw_bytes);
    if fits && extents.len() == head.extents as usize { Ok(sum) } else { Err(ErrorKind::RecordLengths) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_has_an_end() {
        let disks = [DiskInfo { name: "vda".parse().unwrap(), size_bytes: u64::MAX }];
        let head =
            RecordHead { disk: 0, encoding: Encoding::Zero, extents: 1, stored_bytes: 0, raw_bytes: 0 };
        let entry = RecordEntry {
            disk: 0,
            encoding: Encoding::Zero,
            position: 0,
            stored_bytes: 0,
            raw_bytes: 0,
            extents: 0..1,
        };
        let mut building = Building::new(1);
        building.index.extents = vec![Extent { offset: 0, len: 0 }; EXTENTS_MAX - 1];
        building.index.records = vec![entry; RECORDS_MAX - 1];
        assert_eq!(building.check_head(&head, &disks), Ok(()));
        let two = RecordHead { extents: 2, ..head };
        let limit = |what, max| Err(ErrorKind::Limit { what, found: max + 1, max });
        assert_eq!(building.check_head(&two, &disks), limit("extents", EXTENTS_MAX as u64));
        building.add(&head, std::iter::once(Extent { offset: 5, len: 1 }), &disks).unwrap();
        assert_eq!(building.check_head(&head, &disks), limit("records", RECORDS_MAX as u64));
    }
}
