//! The operating system's files.

use std::fs::{self, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;
use nix::sys::statvfs::statvfs;
use nix::unistd::{Whence, lseek};

use crate::{Entry, File, FileSystem, Metadata, Open};

/// The operating system's file system.
#[derive(Debug, Clone, Copy, Default)]
pub struct Os;

impl FileSystem for Os {
    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn File>> {
        let mut options = OpenOptions::new();
        options.read(true).write(how != Open::Read);
        options.create(how == Open::Create).truncate(false).create_new(how == Open::CreateNew);
        Ok(Arc::new(OsFile(options.open(path)?)))
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        fs::create_dir_all(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir_all(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        fs::File::open(path)?.sync_all()
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<Entry>> {
        let entry = |entry: io::Result<fs::DirEntry>| {
            let entry = entry?;
            Ok(Entry { name: entry.file_name(), is_dir: entry.file_type()?.is_dir() })
        };
        let mut entries: Vec<Entry> = fs::read_dir(path)?.map(entry).collect::<io::Result<_>>()?;
        entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        let meta = fs::metadata(path)?;
        Ok(Metadata { len: meta.len(), allocated_bytes: meta.blocks() * 512, is_file: meta.is_file() })
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        let stat = statvfs(path)?;
        Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
    }
}

/// An open file of the operating system.
#[derive(Debug)]
struct OsFile(fs::File);

/// The largest unit in which the system caches a file, in bytes (a huge page).
const CACHED_TOGETHER_BYTES: u64 = 2 << 20;

impl File for OsFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        self.0.write_at(buf, offset)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(&self.0, flags, signed(offset)?, signed(len)?) {
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Err(io::ErrorKind::Unsupported.into()),
            done => done.map_err(io::Error::from),
        }
    }

    fn data_ranges(&self, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let mut found = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let start = match lseek(&self.0, signed(at)?, Whence::SeekData) {
                Ok(start) => u64::try_from(start).unwrap_or(at),
                Err(Errno::ENXIO) => break,
                Err(Errno::EINVAL) => {
                    found.push(at..range.end);
                    break;
                }
                Err(errno) => return Err(errno.into()),
            };
            if start >= range.end {
                break;
            }
            let end = match lseek(&self.0, signed(start)?, Whence::SeekHole) {
                Ok(end) => u64::try_from(end).unwrap_or(range.end).min(range.end),
                // The file was cut off between the two calls.
                Err(Errno::ENXIO) => break,
                Err(errno) => return Err(errno.into()),
            };
            found.push(start.max(at)..end);
            at = end.max(at + 1);
        }
        Ok(found)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn sync_all(&self) -> io::Result<()> {
        self.0.sync_all()
    }

    fn start_writeback(&self, offset: u64, len: u64) {
        let (Ok(offset), Ok(len)) = (signed(offset), signed(len)) else { return };
        // SAFETY: the descriptor is open as long as the file is borrowed; the call touches no memory of ours.
        unsafe { libc::sync_file_range(self.0.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE) };
    }

    /// Newer kernels cache files in units of up to 2 MiB and count the whole unit as dirty when a part of it
    /// is written: against the limit of dirty memory, at which every writer is made to wait, and as bytes
    /// written by this process (six times too many were counted for scattered changes of 64 to 512 KiB, a
    /// hundred times for 4 KiB). So whole units are forgotten.
    fn forget_cached(&self, offset: u64, len: u64) {
        let start = offset - offset % CACHED_TOGETHER_BYTES;
        let end =
            offset.saturating_add(len).div_ceil(CACHED_TOGETHER_BYTES).saturating_mul(CACHED_TOGETHER_BYTES);
        let (Ok(start), Ok(len)) = (signed(start), signed(end - start)) else { return };
        // SAFETY: the descriptor is open as long as the file is borrowed; the call touches no memory of ours.
        unsafe { libc::posix_fadvise(self.0.as_raw_fd(), start, len, libc::POSIX_FADV_DONTNEED) };
    }
}

fn signed(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use super::*;

    fn kind<T: std::fmt::Debug>(outcome: io::Result<T>) -> ErrorKind {
        outcome.unwrap_err().kind()
    }

    #[test]
    fn a_file_is_opened_as_it_was_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        assert_eq!(kind(Os.open(&path, Open::Read)), ErrorKind::NotFound);
        assert_eq!(kind(Os.open(&path, Open::ReadWrite)), ErrorKind::NotFound);
        Os.open(&path, Open::CreateNew).unwrap().write_all_at(b"kept", 2).unwrap();
        assert_eq!(kind(Os.open(&path, Open::CreateNew)), ErrorKind::AlreadyExists);
        for how in [Open::Create, Open::ReadWrite, Open::Read] {
            let file = Os.open(&path, how).unwrap();
            let mut buf = [9; 8];
            file.read_or_zeros(&mut buf, 0).unwrap();
            assert_eq!(&buf, b"\0\0kept\0\0", "{how:?}");
            assert_eq!(kind(file.read_exact_at(&mut buf, 0)), ErrorKind::UnexpectedEof);
            assert_eq!(file.write_at(b"k", 2).is_ok(), how != Open::Read);
        }
    }

    #[test]
    fn an_open_file_outlives_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|name| dir.path().join(name));
        let [old, new] = [&a, &b].map(|path| Os.open(path, Open::CreateNew).unwrap());
        old.write_all_at(b"old", 0).unwrap();
        new.write_all_at(b"new", 0).unwrap();
        Os.rename(&b, &a).unwrap();
        let read = |file: &dyn File| {
            let mut buf = [0; 3];
            file.read_exact_at(&mut buf, 0).unwrap();
            buf
        };
        assert_eq!(&read(&*old), b"old");
        assert_eq!(&read(&*Os.open(&a, Open::Read).unwrap()), b"new");
        Os.remove_file(&a).unwrap();
        assert_eq!(&read(&*new), b"new");
        assert_eq!(kind(Os.remove_file(&a)), ErrorKind::NotFound);
        assert_eq!(kind(Os.rename(&a, &b)), ErrorKind::NotFound);
    }

    #[test]
    fn folders_are_listed_in_order_and_removed_whole() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("x/y");
        for _ in 0..2 {
            Os.create_dir_all(&folder.join("m")).unwrap();
        }
        for name in ["z", "10", "9", "a"] {
            Os.open(&folder.join(name), Open::CreateNew).unwrap();
        }
        Os.sync_dir(&folder).unwrap();
        let entries = Os.read_dir(&folder).unwrap();
        let names: Vec<_> = entries.iter().map(|entry| entry.name.to_str().unwrap()).collect();
        assert_eq!(names, ["10", "9", "a", "m", "z"]);
        let folders: Vec<_> = entries.iter().map(|entry| entry.is_dir).collect();
        assert_eq!(folders, [false, false, false, true, false]);
        assert!(!Os.metadata(&folder).unwrap().is_file);
        assert!(Os.free_bytes(&folder).unwrap() > 0);
        Os.remove_dir_all(&dir.path().join("x")).unwrap();
        assert!(!Os.exists(&folder).unwrap());
        for missing in [Os.remove_dir_all(&folder), Os.sync_dir(&folder), Os.read_dir(&folder).map(drop)] {
            assert_eq!(kind(missing), ErrorKind::NotFound);
        }
    }

    #[test]
    fn what_cannot_be_told_is_not_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        Os.open(&path, Open::CreateNew).unwrap();
        assert!(Os.exists(&path).unwrap());
        assert!(!Os.exists(&dir.path().join("b")).unwrap());
        assert_eq!(kind(Os.exists(&path.join("below a file"))), ErrorKind::NotADirectory);
    }

    #[test]
    fn zeros_become_holes_and_what_is_beside_them_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let file = Os.open(&path, Open::CreateNew).unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(&[7; 512 * 1024], 1 << 20).unwrap();
        let before = Os.metadata(&path).unwrap();
        assert!(before.is_file && before.len == 8 << 20 && before.allocated_bytes < 1 << 20, "{before:?}");
        file.make_zero((1 << 20) + 1, 256 * 1024).unwrap();
        file.make_zero(7 << 20, 2 << 20).unwrap();
        assert_eq!(file.len().unwrap(), 8 << 20, "the length stays");
        let mut bytes = vec![1; 8 << 20];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let sevens = |range: Range<usize>| bytes[range].iter().filter(|byte| **byte == 7).count();
        assert_eq!(sevens(0..bytes.len()), 256 * 1024);
        assert_eq!((sevens(1 << 20..(1 << 20) + 1), sevens((1 << 20) + 1..(1 << 20) + 4096)), (1, 0));
        let data = file.data_ranges(0..16 << 20).unwrap();
        assert!(data.iter().all(|range| range.start >= 1 << 20 && range.end <= 2 << 20), "{data:?}");
        let covered = |at: u64| data.iter().any(|range| range.contains(&at));
        let lost = bytes.iter().zip(0..).find(|(byte, at)| **byte != 0 && !covered(*at));
        assert_eq!(lost, None, "data that is said to be a hole");
        file.set_len(1 << 20).unwrap();
        file.sync_all().unwrap();
        assert_eq!((file.len().unwrap(), file.data_ranges(0..8 << 20).unwrap()), (1 << 20, vec![]));
    }

    #[test]
    fn hints_change_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = Os.open(&dir.path().join("a"), Open::CreateNew).unwrap();
        file.write_all_at(&[3; 100_000], 5000).unwrap();
        for (offset, len) in [(0, 4096), (5000, 100_000), (1 << 40, 1), (u64::MAX, u64::MAX)] {
            file.start_writeback(offset, len);
            file.forget_cached(offset, len);
        }
        file.sync_data().unwrap();
        let mut bytes = vec![0; 105_000];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes[5000..].iter().all(|byte| *byte == 3) && bytes[..5000].iter().all(|byte| *byte == 0));
    }
}
