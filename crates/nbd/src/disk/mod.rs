//! What the server shows: disks, read and written by blocking calls.

mod blocks;
mod cow;
mod file;
mod image;

use std::io;
use std::ops::Range;

use nix::errno::Errno;

pub use self::cow::CowDisk;
pub use self::file::FileDisk;

use crate::codec::StatusExtent;

/// A disk that can be exported. Every call may block; the server makes them on its blocking threads, many
/// at a time, and never with a range that reaches past [`Disk::size_bytes`].
///
/// A disk that can be written implements all of [`Disk::is_read_only`], [`Disk::write_at`],
/// [`Disk::zero`], [`Disk::trim`] and [`Disk::flush`].
pub trait Disk: Send + Sync + 'static {
    /// Its size; does not change while it is exported.
    fn size_bytes(&self) -> u64;

    /// Fills `buffer` with the bytes from `offset` on.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// What is known of a range, from its start on and without gaps ([`StatusExtent::data`] or
    /// [`StatusExtent::zeros`]). The answer may end before the range does, so that it costs no more than it
    /// is worth, but it is not empty. A disk that knows nothing has data everywhere.
    fn extents(&self, range: Range<u64>) -> io::Result<Vec<StatusExtent>> {
        Ok(vec![StatusExtent::data(range.end - range.start)])
    }

    /// Whether it refuses to be written.
    fn is_read_only(&self) -> bool {
        true
    }

    /// Writes.
    fn write_at(&self, _offset: u64, _bytes: &[u8]) -> io::Result<()> {
        Err(Errno::EPERM.into())
    }

    /// Makes a range read as zeros; with `allocate`, so that later writes to it find room.
    fn zero(&self, _offset: u64, _len: u64, _allocate: bool) -> io::Result<()> {
        Err(Errno::EPERM.into())
    }

    /// Says that a range is no longer needed: it may read as anything, or be kept.
    fn trim(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(Errno::EPERM.into())
    }

    /// Puts every write that was completed before, by whomever, on stable storage.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// The first window of a disk that is looked at for extents, and the longest.
const WINDOW_BYTES_MIN: u64 = 64 << 10;
const WINDOW_BYTES_MAX: u64 = 1 << 30;

/// The extents of a range, neighbours joined, at most `extents_max` of them (at least one, unless the range
/// is empty): they end early, or where the range does. The disk is asked for windows that grow, so that one
/// extent of a crumbled disk does not cost looking at all of it.
pub(crate) fn extents_of(
    disk: &dyn Disk,
    range: Range<u64>,
    extents_max: usize,
) -> io::Result<Vec<StatusExtent>> {
    let mut found = Vec::new();
    let (mut at, mut window) = (range.start, WINDOW_BYTES_MIN);
    while at < range.end && found.len() <= extents_max {
        let before = found.len();
        at = some_extents(disk, at..range.end.min(at.saturating_add(window)), &mut found)?;
        // As long as a window is worth few extents, the next may be longer.
        if found.len() - before <= 64 {
            window = (2 * window).min(WINDOW_BYTES_MAX);
        }
    }
    found.truncate(extents_max.max(1));
    Ok(found)
}

/// The extents of all of a range, neighbours joined.
pub(crate) fn all_extents(disk: &dyn Disk, range: Range<u64>) -> io::Result<Vec<StatusExtent>> {
    let (mut found, mut at) = (Vec::new(), range.start);
    while at < range.end {
        at = some_extents(disk, at..range.end, &mut found)?;
    }
    Ok(found)
}

/// Appends what a disk says of a range, and gives where that ends: past the start, not past the end.
fn some_extents(disk: &dyn Disk, range: Range<u64>, found: &mut Vec<StatusExtent>) -> io::Result<u64> {
    let mut at = range.start;
    for extent in disk.extents(range.clone())? {
        let len = extent.len.min(range.end - at);
        at += len;
        push_joined(found, StatusExtent { len, flags: extent.flags });
    }
    if at == range.start {
        // It is silent against the rules: nothing is known, so it has to be read.
        push_joined(found, StatusExtent::data(range.end - at));
        at = range.end;
    }
    Ok(at)
}

/// Appends an extent, as a part of the last if it says the same; empty ones are left out.
pub(crate) fn push_joined(extents: &mut Vec<StatusExtent>, extent: StatusExtent) {
    match extents.last_mut() {
        Some(last) if last.flags == extent.flags => last.len += extent.len,
        _ if extent.len == 0 => {}
        _ => extents.push(extent),
    }
}

/// A block-wise cut of a range at the multiples of `unit`.
pub(crate) fn cut(range: Range<u64>, unit: u64) -> impl Iterator<Item = Range<u64>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        // Without overflow even at the end of what 64 bits can count.
        let piece = at..range.end.min(at + (unit - at % unit).min(range.end - at));
        at = piece.end;
        Some(piece)
    })
}
