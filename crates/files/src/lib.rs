//! The file system as the store sees it, so that the very same store runs on the operating system's files
//! ([`Os`]) and on a disk that a test makes up: one that loses what was not synced, tears a write, runs full.
//!
//! Invariants that every [`FileSystem`] has, and that the store builds on:
//! * what a file holds is durable after [`File::sync_data`] or [`File::sync_all`], what it is called after
//!   [`FileSystem::sync_dir`] on its folder; nothing is durable before;
//! * [`FileSystem::rename`] puts the new file in the place of the old one as one step;
//! * an open file stays what it is when its name is removed or given to another file;
//! * the order of [`FileSystem::read_dir`] is the order of the names, so that nothing hangs on chance;
//! * all of it may be called from several threads at once.
//!
//! What it does not do: buffer, cache or retry, and know what the files are for.

mod os;

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

pub use os::Os;

/// A file system that many share.
pub type Shared = Arc<dyn FileSystem>;

/// How a file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Open {
    /// To read it; it must exist.
    Read,
    /// To read and write it; it must exist.
    ReadWrite,
    /// To read and write it; it is made, empty, if it does not exist, and keeps what it has if it does.
    Create,
    /// To read and write it; it must not exist yet.
    CreateNew,
}

/// What is in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name within the folder.
    pub name: OsString,
    /// It is a folder itself.
    pub is_dir: bool,
}

/// What there is to know of a path without opening it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metadata {
    /// The file's length in bytes.
    pub len: u64,
    /// The bytes that it takes up on its disk; holes take none.
    pub allocated_bytes: u64,
    /// It is a file, not a folder.
    pub is_file: bool,
}

/// Where files are. Errors are those of the operating system, by their [`io::ErrorKind`].
pub trait FileSystem: Send + Sync + fmt::Debug {
    /// Opens a file.
    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn File>>;

    /// Makes a folder and those above it that are missing; it does not matter if it is there.
    fn create_dir_all(&self, path: &Path) -> io::Result<()>;

    /// Gives a file or folder another name; a file that has that name already is replaced, in one step.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file's name. Who has the file open goes on reading and writing it.
    fn remove_file(&self, path: &Path) -> io::Result<()>;

    /// Removes a folder with all that is in it.
    fn remove_dir_all(&self, path: &Path) -> io::Result<()>;

    /// Makes durable what was made, renamed or removed in a folder, but not what its files hold.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// What is in a folder, sorted by name.
    fn read_dir(&self, path: &Path) -> io::Result<Vec<Entry>>;

    /// What there is to know of a file or folder.
    fn metadata(&self, path: &Path) -> io::Result<Metadata>;

    /// How much is free, for us, where this path is.
    fn free_bytes(&self, path: &Path) -> io::Result<u64>;

    /// Whether there is a file or folder of this name. That it cannot be told is an error: what is on a disk
    /// that fails is not gone.
    fn exists(&self, path: &Path) -> io::Result<bool> {
        match self.metadata(path) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// An open file. It has no position: every read and write says where.
#[allow(
    clippy::len_without_is_empty,
    reason = "a file's length is asked of the disk; nobody asks whether it is 0"
)]
pub trait File: Send + Sync + fmt::Debug {
    /// Reads some bytes from `offset`; 0 at the file's end or beyond.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes some bytes at `offset`; a file that ends before is filled with zeros up to there.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize>;

    /// The file's length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Cuts the file off, or lengthens it by zeros.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Makes a range a hole, which reads as zeros and takes up no space; the length stays. Where that cannot
    /// be done the error is [`io::ErrorKind::Unsupported`], and nothing has changed.
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()>;

    /// The parts of a range that are not holes, in order; what lies beyond the end is a hole. Where the file
    /// system cannot tell, all of the range is given.
    fn data_ranges(&self, range: Range<u64>) -> io::Result<Vec<Range<u64>>>;

    /// Makes the bytes and the length durable. After an error nothing is known of what was written: the
    /// file is not to be trusted, and a second sync that succeeds proves nothing.
    fn sync_data(&self) -> io::Result<()>;

    /// The same with all that is known of the file beside its bytes.
    fn sync_all(&self) -> io::Result<()>;

    /// A hint: begin to write a range to the disk, so that a later sync finds little left. It makes nothing
    /// durable, and an error of it is not the caller's: the sync tells.
    fn start_writeback(&self, _offset: u64, _len: u64) {}

    /// A hint: what is cached around a range that is about to be written may be forgotten.
    fn forget_cached(&self, _offset: u64, _len: u64) {}

    /// Fills `buf` from `offset`; the file's end before that is an error.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match fill(self, buf, offset)? {
            0 => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Fills `buf` from `offset`; what lies beyond the file's end is zeros.
    fn read_or_zeros(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let missing = fill(self, buf, offset)?;
        let end = buf.len() - missing;
        buf[end..].fill(0);
        Ok(())
    }

    /// Writes all of `buf` at `offset`.
    fn write_all_at(&self, mut buf: &[u8], mut offset: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match self.write_at(buf, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => (buf, offset) = (&buf[written..], offset + written as u64),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Makes a range zeros: a hole where that can be, written zeros elsewhere.
    fn make_zero(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(()); // the system calls that a mistake
        }
        match self.punch_hole(offset, len) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => write_zeros(self, offset, len),
            done => done,
        }
    }
}

/// Reads until `buf` is full or the file has ended; gives how many bytes are missing then.
fn fill<F: File + ?Sized>(file: &F, mut buf: &mut [u8], mut offset: u64) -> io::Result<usize> {
    while !buf.is_empty() {
        match file.read_at(buf, offset) {
            Ok(0) => break,
            Ok(read) => (buf, offset) = (&mut buf[read..], offset + read as u64),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(buf.len())
}

fn write_zeros<F: File + ?Sized>(file: &F, mut offset: u64, mut len: u64) -> io::Result<()> {
    let zeros = [0_u8; 64 * 1024];
    while len > 0 {
        let part = usize::try_from(len).map_or(zeros.len(), |len| len.min(zeros.len()));
        file.write_all_at(&zeros[..part], offset)?;
        (offset, len) = (offset + part as u64, len - part as u64);
    }
    Ok(())
}
