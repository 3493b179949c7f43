//! A sparse file (or block device) by absolute places: what both kinds of disk are kept in.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};

use super::cut;
use crate::codec::StatusExtent;

/// Zeros are written in pieces of this where the file system cannot make them by itself.
const ZEROS_BYTES: usize = 256 << 10;

/// The file. Its position is moved when holes are looked for, and means nothing.
#[derive(Debug)]
pub(super) struct Image {
    file: File,
    /// Set once stable storage has failed: what was not written then is forgotten by the kernel, so that
    /// a later attempt would claim what is not so.
    lost: AtomicBool,
}

impl Image {
    pub(super) const fn new(file: File) -> Self {
        Self { file, lost: AtomicBool::new(false) }
    }

    /// Its length: a block device's, too.
    pub(super) fn len(&self) -> io::Result<u64> {
        (&self.file).seek(SeekFrom::End(0))
    }

    pub(super) fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    pub(super) fn unlock(&self) -> io::Result<()> {
        self.file.unlock()
    }

    pub(super) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    pub(super) fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    /// Makes zeros, as a hole or (`allocate`) with room behind them.
    pub(super) fn zero(&self, range: Range<u64>, allocate: bool) -> io::Result<()> {
        let kind = if allocate { FallocateFlags::FALLOC_FL_ZERO_RANGE } else { punch() };
        if self.fallocate(kind, &range)? {
            return Ok(());
        }
        let zeros = vec![0; ZEROS_BYTES.min((range.end - range.start) as usize)];
        cut(range, ZEROS_BYTES as u64)
            .try_for_each(|piece| self.write_at(piece.start, &zeros[..(piece.end - piece.start) as usize]))
    }

    /// Gives the room of a range back, if the file system can.
    pub(super) fn trim(&self, range: Range<u64>) -> io::Result<()> {
        self.fallocate(punch(), &range).map(drop)
    }

    /// Whether the file system did it.
    fn fallocate(&self, kind: FallocateFlags, range: &Range<u64>) -> io::Result<bool> {
        if range.is_empty() {
            return Ok(true);
        }
        let kind = kind | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (offset, len) = (range.start.cast_signed(), (range.end - range.start).cast_signed());
        loop {
            match fallocate(&self.file, kind, offset, len) {
                Ok(()) => return Ok(true),
                Err(Errno::EINTR) => {}
                // The last is what block devices say.
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ENODEV) => return Ok(false),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        if self.lost.load(Ordering::Acquire) {
            return Err(io::Error::other("an earlier flush failed: what was written before it may be lost"));
        }
        self.file.sync_data().inspect_err(|_| self.lost.store(true, Ordering::Release))
    }

    /// Appends what the range is made of; where the file cannot tell, it is data.
    pub(super) fn extents(&self, range: Range<u64>, mut push: impl FnMut(StatusExtent)) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            let data = self.next(at, Whence::SeekData)?.clamp(at, range.end);
            push(StatusExtent::zeros(data - at));
            if data == range.end {
                return Ok(());
            }
            at = self.next(data, Whence::SeekHole)?;
            if at <= data {
                // Somebody made a hole just now; the rest can be looked at another time.
                at = range.end;
            }
            at = at.min(range.end);
            push(StatusExtent::data(at - data));
        }
        Ok(())
    }

    /// Whether nothing was ever written to it.
    pub(super) fn is_all_hole(&self) -> io::Result<bool> {
        Ok(self.next(0, Whence::SeekData)? >= self.len()?)
    }

    /// Where the next data or hole begins; far away if there is none.
    fn next(&self, at: u64, whence: Whence) -> io::Result<u64> {
        match lseek(&self.file, at.cast_signed(), whence) {
            Ok(found) => Ok(found.cast_unsigned()),
            Err(Errno::ENXIO) => Ok(u64::MAX),
            // It does not know holes.
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) if matches!(whence, Whence::SeekData) => Ok(at),
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(u64::MAX),
            Err(errno) => Err(errno.into()),
        }
    }
}

fn punch() -> FallocateFlags {
    FallocateFlags::FALLOC_FL_PUNCH_HOLE
}
