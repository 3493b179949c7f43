//! Where a VM's files are, and the few things done to files that the standard library does not do.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use model::{DiskName, LogId, LogNumber};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;
use nix::unistd::{Whence, lseek};

use crate::error::{Error, Result};

/// The folder of one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Folder(pub PathBuf);

impl Folder {
    pub fn disks(&self) -> PathBuf {
        self.0.join("disks")
    }

    pub fn logs(&self) -> PathBuf {
        self.0.join("logs")
    }

    pub fn incoming(&self) -> PathBuf {
        self.0.join("incoming")
    }

    pub fn changes(&self) -> PathBuf {
        self.0.join("changes")
    }

    pub fn failover(&self) -> PathBuf {
        self.0.join("failover")
    }

    pub fn disk(&self, name: &DiskName) -> PathBuf {
        self.disks().join(format!("{name}.raw"))
    }

    pub fn map(&self, name: &DiskName) -> PathBuf {
        self.changes().join(format!("{name}.map"))
    }

    pub fn log(&self, file: &str) -> PathBuf {
        self.logs().join(file)
    }

    pub fn partial(&self, number: LogNumber, id: LogId) -> PathBuf {
        self.incoming().join(format!("{number}-{id}.partial"))
    }

    /// What is known of the VM without the catalog.
    pub fn description(&self) -> PathBuf {
        self.0.join("vm.json")
    }

    /// Makes the folders that are not there, durably.
    pub fn create(&self) -> Result<()> {
        for folder in [self.disks(), self.logs(), self.incoming(), self.changes()] {
            fs::create_dir_all(&folder).map_err(Error::io("making the folder", &folder))?;
        }
        sync_folder(&self.0)?;
        self.0.parent().map_or(Ok(()), sync_folder)
    }
}

/// The number and id that a partial file's name tells.
pub(crate) fn parse_partial(name: &str) -> Option<(LogNumber, LogId)> {
    let (number, id) = name.strip_suffix(".partial")?.split_once('-')?;
    Some((LogNumber(number.parse().ok()?), id.parse().ok()?))
}

/// The first and last number that a log file's name tells: `7.log` or, merged, `3-7.log`.
pub(crate) fn parse_log(name: &str) -> Option<(LogNumber, LogNumber)> {
    let stem = name.strip_suffix(".log")?;
    let (first, last) = stem.split_once('-').unwrap_or((stem, stem));
    Some((LogNumber(first.parse().ok()?), LogNumber(last.parse().ok()?)))
}

/// Makes what was made, renamed or removed in a folder durable.
pub(crate) fn sync_folder(path: &Path) -> Result<()> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(Error::io("syncing the folder", path))
}

/// Opens a file for reading and writing, making it if it is not there.
pub(crate) fn open_or_create(path: &Path) -> Result<File> {
    let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
    opened.map_err(Error::io("opening", path))
}

/// Opens a disk's file to read it: a reader must not need what only an apply needs, a file system that can be
/// written. A disk that no apply has touched yet gets its empty file.
pub(crate) fn open_to_read(path: &Path) -> Result<File> {
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => open_or_create(path),
        opened => opened.map_err(Error::io("opening", path)),
    }
}

pub(crate) fn open_read(path: &Path) -> Result<File> {
    File::open(path).map_err(Error::io("opening", path))
}

/// Replaces a small file as a whole: it has the old bytes or the new ones.
pub(crate) fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let fresh = path.with_extension("new");
    let write = || {
        let mut file = File::create(&fresh)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&fresh, path)
    };
    write().map_err(Error::io("writing", path))?;
    path.parent().map_or(Ok(()), sync_folder)
}

/// Removes a file; it does not matter if it is gone.
pub(crate) fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("removing", path)(error)),
        _ => Ok(()),
    }
}

/// Removes a folder with all that is in it; it does not matter if it is gone.
pub(crate) fn remove_folder(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("removing", path)(error)),
        _ => Ok(()),
    }
}

/// Fills `buf` from `offset`; what lies beyond the end of the file is zeros.
pub(crate) fn read_or_zeros(file: &File, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buf.is_empty() {
        match file.read_at(buf, offset) {
            Ok(0) => {
                buf.fill(0);
                return Ok(());
            }
            Ok(read) => {
                buf = &mut buf[read..];
                offset += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Makes a range of a file zeros and, where the file system can, a hole. The file's size stays.
pub(crate) fn make_zero(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match fallocate(file, flags, signed(offset)?, signed(len)?) {
        Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => write_zeros(file, offset, len),
        other => other.map_err(io::Error::from),
    }
}

fn write_zeros(file: &File, mut offset: u64, mut len: u64) -> io::Result<()> {
    let zeros = [0_u8; 64 * 1024];
    while len > 0 {
        let part = len.min(zeros.len() as u64);
        file.write_all_at(&zeros[..usize::try_from(part).unwrap_or(zeros.len())], offset)?;
        (offset, len) = (offset + part, len - part);
    }
    Ok(())
}

fn signed(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

/// Asks the system to begin writing a range to the disk, so that a later sync finds little left. An
/// error here is not one of ours: the sync tells.
pub(crate) fn start_writeback(file: &File, offset: u64, len: u64) {
    let (Ok(offset), Ok(len)) = (signed(offset), signed(len)) else { return };
    // SAFETY: the descriptor is open as long as `file` is borrowed; the call touches no memory of ours.
    unsafe { libc::sync_file_range(file.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE) };
}

/// The largest unit in which the system caches a file, in bytes (a huge page).
const CACHED_TOGETHER_BYTES: u64 = 2 << 20;

/// Lets the system forget what it has cached around a range that is about to be written. Newer kernels cache
/// files in units of up to 2 MiB and count the whole unit as dirty when a part of it is written: against the
/// limit of dirty memory, at which every writer is made to wait, and as bytes written by this process (six
/// times too many were counted for scattered changes of 64 to 512 KiB, a hundred times for 4 KiB).
pub(crate) fn forget_cached(file: &File, offset: u64, len: u64) {
    let start = offset - offset % CACHED_TOGETHER_BYTES;
    let end =
        offset.saturating_add(len).div_ceil(CACHED_TOGETHER_BYTES).saturating_mul(CACHED_TOGETHER_BYTES);
    let (Ok(start), Ok(len)) = (signed(start), signed(end - start)) else { return };
    // SAFETY: the descriptor is open as long as `file` is borrowed; the call touches no memory of ours.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), start, len, libc::POSIX_FADV_DONTNEED) };
}

/// How much a file system has free for us.
pub(crate) fn free_bytes(path: &Path) -> Result<u64> {
    let stat = nix::sys::statvfs::statvfs(path)
        .map_err(|errno| Error::io("asking for the free space of", path)(errno.into()))?;
    Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
}

/// The bytes that a file takes up on its disk.
pub(crate) fn allocated_bytes(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |meta| meta.blocks() * 512)
}

/// The parts of a range of a file that are not holes, in order. What lies beyond its end is a hole. Where
/// the file system cannot tell, all of the range is given.
pub(crate) fn data_ranges(file: &File, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let mut found = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let start = match lseek(file, signed(at)?, Whence::SeekData) {
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
        let end = match lseek(file, signed(start)?, Whence::SeekHole) {
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

/// Copies a file with its holes and makes the copy durable.
pub(crate) fn copy_sparse(from: &Path, to: &Path) -> Result<()> {
    let source = open_read(from)?;
    let target = File::create_new(to).map_err(Error::io("making", to))?;
    let size = source.metadata().map_err(Error::io("reading", from))?.len();
    target.set_len(size).map_err(Error::io("writing", to))?;
    let mut buf = vec![0; 1 << 20];
    for range in data_ranges(&source, 0..size).map_err(Error::io("reading", from))? {
        let mut at = range.start;
        while at < range.end {
            let len = usize::try_from(range.end - at).map_or(buf.len(), |left| left.min(buf.len()));
            read_or_zeros(&source, &mut buf[..len], at).map_err(Error::io("reading", from))?;
            target.write_all_at(&buf[..len], at).map_err(Error::io("writing", to))?;
            start_writeback(&target, at, len as u64);
            at += len as u64;
        }
    }
    target.sync_all().map_err(Error::io("syncing", to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_tell_what_they_are() {
        let id = LogId::from_bytes([0xab; 16]);
        let folder = Folder("/vm".into());
        let partial = folder.partial(LogNumber(7), id);
        assert_eq!(parse_partial(partial.file_name().unwrap().to_str().unwrap()), Some((LogNumber(7), id)));
        assert_eq!(parse_log("7.log"), Some((LogNumber(7), LogNumber(7))));
        assert_eq!(parse_log("3-7.log"), Some((LogNumber(3), LogNumber(7))));
        for other in ["", "x.log", "7.log.new", "7-.log", "7.partial", "3-7.merging"] {
            assert_eq!(parse_log(other), None, "{other}");
            assert_eq!(parse_partial(other), None, "{other}");
        }
    }

    #[test]
    fn holes_stay_holes_and_zeros_become_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let file = open_or_create(&a).unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(&[7; 256 * 1024], 1 << 20).unwrap();
        make_zero(&file, (1 << 20) + 1, 128 * 1024).unwrap();
        copy_sparse(&a, &b).unwrap();
        assert_eq!(fs::read(&a).unwrap(), fs::read(&b).unwrap());
        assert!(allocated_bytes(&b) < 1 << 20);
        let data = data_ranges(&open_read(&b).unwrap(), 0..16 << 20).unwrap();
        assert!(data.iter().all(|range| range.start >= 1 << 20 && range.end <= 2 << 20), "{data:?}");
    }
}
