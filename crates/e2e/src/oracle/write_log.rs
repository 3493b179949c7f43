//! Reads the log that QEMU's driver `blklogwrites` keeps.
//!
//! The format is that of Linux' dm-log-writes, all numbers little-endian. The first sector is the superblock:
//! magic (64 bits), version (64), number of entries (64), bytes of a sector (32). Then the entries follow, each
//! in a sector of its own: first sector, number of sectors, flags, length of a mark's text (64 bits each); after
//! it, unless it is a discard, that many sectors of data (zeros for a write of zeros). QEMU brings the number of
//! entries up to date with every flush.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;

/// What the guest did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It wrote data, or zeros.
    Write,
    /// It said that it needs the range no longer; in the raw files here it reads as zeros afterwards.
    Discard,
    /// It asked for stable storage.
    Flush,
}

/// One thing that the guest did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// What.
    pub kind: Kind,
    /// From which byte of the disk.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
    data_at: u64,
}

/// The log of one disk, up to its last flush.
#[derive(Debug)]
pub struct WriteLog {
    file: File,
    entries: Vec<Entry>,
}

impl WriteLog {
    /// Reads the log of a disk of `disk_bytes`; an error if it is none, or has what QEMU does not write.
    pub fn open(path: &Path, disk_bytes: u64) -> io::Result<Self> {
        let file = File::open(path)?;
        let mut superblock = [0; 28];
        file.read_exact_at(&mut superblock, 0)?;
        let (magic, version, count) =
            (number(&superblock, 0), number(&superblock, 8), number(&superblock, 16));
        let sector_bytes = u64::from(u32::from_le_bytes(superblock[24..].try_into().expect("four bytes")));
        if magic != MAGIC || version != VERSION || !matches!(sector_bytes, 512..=65536) {
            let what = format!("no log of writes: magic {magic:#x}, version {version}, {sector_bytes} bytes");
            return Err(wrong(path, 0, &what));
        }
        let mut entries = Vec::new();
        let mut at = sector_bytes;
        for _ in 0..count {
            let entry = read_entry(&file, at, sector_bytes).map_err(|error| wrong(path, at, &error))?;
            if entry.offset.checked_add(entry.len).is_none_or(|end| end > disk_bytes) {
                return Err(wrong(path, at, &"an entry past the end of the disk"));
            }
            at += sector_bytes + if entry.kind == Kind::Write { entry.len } else { 0 };
            entries.push(entry);
        }
        Ok(Self { file, entries })
    }

    /// What happened, in its order.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// What a write wrote.
    pub fn data(&self, write: &Entry) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; write.len as usize];
        self.file.read_exact_at(&mut bytes, write.data_at)?;
        Ok(bytes)
    }
}

fn read_entry(file: &File, at: u64, sector_bytes: u64) -> io::Result<Entry> {
    let mut header = [0; 32];
    file.read_exact_at(&mut header, at)?;
    let [sector, sectors, flags, text_len] = [0, 8, 16, 24].map(|place| number(&header, place));
    let bytes = |sectors: u64| sectors.checked_mul(sector_bytes);
    let kind = match flags & !FUA {
        0 => Kind::Write,
        DISCARD => Kind::Discard,
        FLUSH if sectors == 0 => Kind::Flush,
        _ => return Err(io::Error::other(format!("flags {flags:#x} over {sectors} sectors"))),
    };
    match (bytes(sector), bytes(sectors)) {
        (Some(offset), Some(len)) if text_len == 0 => {
            Ok(Entry { kind, offset, len, data_at: at + sector_bytes })
        }
        _ => Err(io::Error::other("an entry that QEMU does not write")),
    }
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn wrong(path: &Path, at: u64, what: &dyn std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{} at byte {at}: {what}", path.display()))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A log of these entries: first sector, sectors, flags, what each of its sectors is filled with.
    pub fn log_of(path: &Path, entries: &[(u64, u64, u64, u8)]) {
        let mut bytes = [MAGIC, VERSION, entries.len() as u64, 512].map(u64::to_le_bytes).concat();
        bytes.resize(512, 0);
        for &(sector, sectors, flags, fill) in entries {
            let mut header = [sector, sectors, flags, 0].map(u64::to_le_bytes).concat();
            header.resize(512, 0);
            bytes.extend(header);
            if flags & DISCARD == 0 {
                bytes.resize(bytes.len() + sectors as usize * 512, fill);
            }
        }
        std::fs::write(path, bytes).unwrap();
    }

    #[test]
    fn entries_are_read_in_their_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        log_of(&path, &[(2, 3, 0, 7), (0, 0, FLUSH, 0), (3, 1, DISCARD, 0), (9, 1, FUA, 8)]);
        let log = WriteLog::open(&path, 5120).unwrap();
        let brief: Vec<_> = log.entries().iter().map(|entry| (entry.kind, entry.offset, entry.len)).collect();
        assert_eq!(
            brief,
            [
                (Kind::Write, 1024, 1536),
                (Kind::Flush, 0, 0),
                (Kind::Discard, 1536, 512),
                (Kind::Write, 4608, 512)
            ]
        );
        assert_eq!(log.data(&log.entries()[0]).unwrap(), [7; 1536]);
        assert_eq!(log.data(&log.entries()[3]).unwrap(), [8; 512]);
    }

    #[test]
    fn what_qemu_does_not_write_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        for bad in [
            (0, 1, 8, 0),
            (0, 1, FLUSH, 0),
            (10, 1, 0, 0),
            (u64::MAX, 1, 0, 0),
            (0, u64::MAX / 512, DISCARD, 0),
        ] {
            log_of(&path, &[(0, 1, 0, 1)]);
            assert!(WriteLog::open(&path, 5120).is_ok());
            log_of(&path, &[(0, 1, 0, 1), (bad.0, 0, bad.2, 0)]);
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[1536 + 8..][..8].copy_from_slice(&u64::to_le_bytes(bad.1));
            std::fs::write(&path, bytes).unwrap();
            assert!(WriteLog::open(&path, 5120).is_err(), "{bad:?}");
        }
        std::fs::write(&path, [0; 4096]).unwrap();
        assert!(WriteLog::open(&path, 5120).is_err());
    }
}
