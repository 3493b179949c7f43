//! Partition tables: MBR with its logical partitions, and GPT.

use std::ops::Range;

use crate::source::{ReadAt, bytes_at, le16, le32, le64};

/// Logical partitions that are followed; Linux knows no more than 60.
const LOGICAL_MAX: u32 = 60;
/// Entries of a GPT that are read; 128 are usual.
const ENTRIES_MAX: u32 = 1024;
const MBR_ENTRIES: usize = 446;

/// The partitions of a disk, by their numbers. None where there is no table.
pub(crate) fn partitions(disk: &dyn ReadAt) -> Vec<(u32, Range<u64>)> {
    let Some(sector) = boot_record(disk, 0) else { return Vec::new() };
    let entries = records(&sector);
    let mut found = match entries.iter().any(|entry| entry.kind == 0xee) {
        true => [512, 4096].iter().find_map(|&sector| gpt(disk, sector)).unwrap_or_default(),
        false => mbr(disk, &entries),
    };
    let size_bytes = disk.size_bytes();
    found.retain(|(_, bytes)| bytes.start < bytes.end && bytes.end <= size_bytes && bytes.start > 0);
    found
}

/// An entry of an MBR.
struct Record {
    kind: u8,
    start: u64,
    sectors: u64,
}

impl Record {
    const fn is_extended(&self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }

    /// Its bytes, if it begins so many sectors behind `base`.
    fn bytes(&self, base: u64) -> Range<u64> {
        let start = (base + self.start) * 512;
        start..start + self.sectors * 512
    }
}

fn boot_record(disk: &dyn ReadAt, sector: u64) -> Option<[u8; 512]> {
    bytes_at::<512>(disk, sector * 512).filter(|bytes| le16(bytes, 510) == 0xaa55)
}

fn records(sector: &[u8; 512]) -> Vec<Record> {
    let entries = sector[MBR_ENTRIES..510].chunks_exact(16);
    entries
        .map(|entry| Record { kind: entry[4], start: le32(entry, 8).into(), sectors: le32(entry, 12).into() })
        .collect()
}

fn mbr(disk: &dyn ReadAt, entries: &[Record]) -> Vec<(u32, Range<u64>)> {
    let mut found = Vec::new();
    for (number, entry) in (1..).zip(entries) {
        if entry.kind == 0 || entry.sectors == 0 {
            continue;
        }
        if entry.is_extended() {
            found.extend(logical(disk, entry.start));
        } else {
            found.push((number, entry.bytes(0)));
        }
    }
    found.sort_by_key(|(number, _)| *number);
    found
}

/// The logical partitions of an extended one: a chain of tables, which may be a circle.
fn logical(disk: &dyn ReadAt, extended: u64) -> Vec<(u32, Range<u64>)> {
    let (mut found, mut at) = (Vec::new(), extended);
    for number in (5..).take(LOGICAL_MAX as usize) {
        let Some(sector) = boot_record(disk, at) else { break };
        let entries = records(&sector);
        if let Some(entry) = entries.iter().find(|entry| entry.kind != 0 && !entry.is_extended()) {
            found.push((number, entry.bytes(at)));
        }
        match entries.iter().find(|entry| entry.is_extended() && entry.start > 0) {
            Some(next) => at = extended + next.start,
            None => break,
        }
    }
    found
}

fn gpt(disk: &dyn ReadAt, sector_bytes: u64) -> Option<Vec<(u32, Range<u64>)>> {
    let header = bytes_at::<92>(disk, sector_bytes).filter(|bytes| bytes.starts_with(b"EFI PART"))?;
    let (table, count, entry_bytes) = (le64(&header, 72), le32(&header, 80), le32(&header, 84));
    let is_sane = count <= ENTRIES_MAX && (128..=4096).contains(&entry_bytes);
    let table = is_sane.then(|| table.checked_mul(sector_bytes)).flatten()?;
    let mut found = Vec::new();
    for number in 0..count {
        let place = table.checked_add(u64::from(number) * u64::from(entry_bytes))?;
        let entry = bytes_at::<128>(disk, place)?;
        if entry[..16] == [0; 16] {
            continue;
        }
        let (first, last) = (le64(&entry, 32), le64(&entry, 40));
        let bytes = |sector: u64| sector.checked_mul(sector_bytes);
        if let (Some(start), Some(end)) = (bytes(first), last.checked_add(1).and_then(bytes)) {
            found.push((number + 1, start..end));
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: u8, start: u32, sectors: u32) -> [u8; 16] {
        let mut entry = [0; 16];
        entry[4] = kind;
        entry[8..12].copy_from_slice(&start.to_le_bytes());
        entry[12..].copy_from_slice(&sectors.to_le_bytes());
        entry
    }

    fn table(disk: &mut [u8], sector: usize, entries: &[[u8; 16]]) {
        for (place, entry) in entries.iter().enumerate() {
            let at = sector * 512 + MBR_ENTRIES + place * 16;
            disk[at..at + 16].copy_from_slice(entry);
        }
        disk[sector * 512 + 510..][..2].copy_from_slice(&[0x55, 0xaa]);
    }

    #[test]
    fn logical_partitions_are_found_and_a_circle_ends() {
        let mut disk = vec![0; 1 << 20];
        table(&mut disk, 0, &[entry(0x83, 8, 8), entry(5, 100, 500)]);
        table(&mut disk, 100, &[entry(0x83, 2, 10), entry(5, 50, 20)]);
        table(&mut disk, 150, &[entry(0x83, 2, 12)]);
        let found = partitions(&disk);
        assert_eq!(found, [(1, 4096..8192), (5, 52_224..57_344), (6, 77_824..83_968)]);
        table(&mut disk, 150, &[entry(0x83, 2, 12), entry(5, 50, 20)]);
        assert_eq!(partitions(&disk).len(), 1 + LOGICAL_MAX as usize);
    }

    #[test]
    fn nonsense_is_no_partition() {
        let mut disk = vec![0; 1 << 20];
        assert_eq!(partitions(&disk), []);
        table(&mut disk, 0, &[entry(0x83, 8, u32::MAX), entry(0x83, u32::MAX, 8), entry(0x83, 0, 8)]);
        assert_eq!(partitions(&disk), []);
        table(&mut disk, 0, &[entry(0xee, 1, u32::MAX)]);
        disk[512..520].copy_from_slice(b"EFI PART");
        for (count, bytes, table) in [(u32::MAX, 128, 2), (128, 1, 2), (128, u32::MAX, 2), (4, 128, u64::MAX)]
        {
            disk[584..592].copy_from_slice(&u64::to_le_bytes(table));
            disk[592..596].copy_from_slice(&u32::to_le_bytes(count));
            disk[596..600].copy_from_slice(&u32::to_le_bytes(bytes));
            assert_eq!(partitions(&disk), []);
        }
        assert_eq!(partitions(&Vec::<u8>::new()), []);
    }
}
