//! Bytes of a disk, and stretches of them as a disk of its own.

use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::sync::Arc;

/// A disk, or a part of one.
pub trait ReadAt: Send + Sync {
    /// Its size.
    fn size_bytes(&self) -> u64;
    /// Fills `buffer` with the bytes from `offset`; an error where they are not within it.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

/// Stretches of disks, one after the other, as one: a partition, or a logical volume.
#[derive(Clone)]
pub struct Window {
    pieces: Vec<Piece>,
    size_bytes: u64,
}

#[derive(Clone)]
struct Piece {
    /// Where it begins in the window.
    start: u64,
    bytes: Range<u64>,
    source: Arc<dyn ReadAt>,
}

impl Window {
    /// These stretches; none if one is not within its disk.
    #[must_use]
    pub fn new(stretches: Vec<(Arc<dyn ReadAt>, Range<u64>)>) -> Option<Self> {
        let (mut pieces, mut size_bytes) = (Vec::with_capacity(stretches.len()), 0_u64);
        for (source, bytes) in stretches {
            if bytes.start >= bytes.end || bytes.end > source.size_bytes() {
                return None;
            }
            let len = bytes.end - bytes.start;
            pieces.push(Piece { start: size_bytes, bytes, source });
            size_bytes = size_bytes.checked_add(len)?;
        }
        Some(Self { pieces, size_bytes })
    }
}

impl ReadAt for Window {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64).filter(|end| *end <= self.size_bytes);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        let first = self.pieces.partition_point(|piece| piece.start <= offset).saturating_sub(1);
        for piece in &self.pieces[first.min(self.pieces.len())..] {
            let piece_end = piece.start + (piece.bytes.end - piece.bytes.start);
            let part = offset.max(piece.start)..end.min(piece_end);
            if part.start >= part.end {
                continue;
            }
            let place = |at: u64| usize::try_from(at - offset).map_err(io::Error::other);
            let out = &mut buffer[place(part.start)?..place(part.end)?];
            piece.source.read_at(piece.bytes.start + (part.start - piece.start), out)?;
        }
        Ok(())
    }
}

/// A disk with a place in it, as libraries want it.
pub(crate) struct Cursor {
    source: Arc<dyn ReadAt>,
    place: u64,
}

impl Cursor {
    pub fn new(source: Arc<dyn ReadAt>) -> Self {
        Self { source, place: 0 }
    }
}

impl Read for Cursor {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.source.size_bytes().saturating_sub(self.place);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        self.source.read_at(self.place, &mut buffer[..len])?;
        self.place += len as u64;
        Ok(len)
    }
}

impl Seek for Cursor {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let place = match to {
            SeekFrom::Start(place) => Some(place),
            SeekFrom::Current(by) => self.place.checked_add_signed(by),
            SeekFrom::End(by) => self.source.size_bytes().checked_add_signed(by),
        };
        self.place = place.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.place)
    }
}

/// Bytes at a place; none if they are not there.
pub(crate) fn bytes_at<const N: usize>(source: &dyn ReadAt, offset: u64) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    source.read_at(offset, &mut bytes).ok()?;
    Some(bytes)
}

pub(crate) fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(crate) fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

pub(crate) fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    impl ReadAt for Vec<u8> {
        fn size_bytes(&self) -> u64 {
            self.len() as u64
        }
        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
            let start = usize::try_from(offset).map_err(io::Error::other)?;
            let end = start.checked_add(buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            buffer.copy_from_slice(self.get(start..end).ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        }
    }

    #[test]
    fn a_window_reads_over_its_seams_and_no_further() {
        let disk: Arc<dyn ReadAt> = Arc::new((0..100).collect::<Vec<u8>>());
        let window =
            Window::new(vec![(disk.clone(), 90..95), (disk.clone(), 3..10), (disk.clone(), 0..1)]).unwrap();
        let mut all = [0; 13];
        window.read_at(0, &mut all).unwrap();
        assert_eq!(all, [90, 91, 92, 93, 94, 3, 4, 5, 6, 7, 8, 9, 0]);
        let mut some = [0; 3];
        window.read_at(4, &mut some).unwrap();
        assert_eq!(some, [94, 3, 4]);
        assert!(window.read_at(11, &mut some).is_err() && window.read_at(u64::MAX, &mut some).is_err());
        assert!(
            Window::new(vec![(disk.clone(), 99..101)]).is_none() && Window::new(vec![(disk, 5..5)]).is_none()
        );
    }
}
