//! A writable layer over a disk that is not written.
//!
//! The layer is one sparse file: the disk's bytes at their own places; after them, from the next multiple
//! of 4096, a header of 4096 bytes (the magic `AFTRLYR1`, then the disk's size and the block size, 64 bits
//! each, little-endian, then zeros) and the bitmap, one bit per block of 4 KiB, least significant first.
//! Where a bit is set the layer counts, and elsewhere the disk below, whatever the layer's file holds there.
//!
//! A bit reaches the file only after its block has reached stable storage, and is never taken back. So at
//! whatever moment the machine stops, the layer is what a disk with a write cache would be: every write
//! before the last flush is there, every later one may be, and nothing that was not written has changed.

use std::fmt;
use std::fs::{File, TryLockError};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::blocks::{BLOCK_BYTES, Blocks, PAGE_BYTES, PAGE_SPAN_BYTES, Page};
use super::image::Image;
use super::{Disk, all_extents, cut, push_joined};
use crate::codec::StatusExtent;

const MAGIC: &[u8; 8] = b"AFTRLYR1";
const HEADER_BYTES: u64 = 4096;
/// Bytes of bitmap read at once.
const LOAD_BYTES: usize = 64 << 10;

/// A disk that can be written over one that is only read; what is written is kept in a file of its own.
pub struct CowDisk {
    base: Arc<dyn Disk>,
    size_bytes: u64,
    layer: Image,
    blocks: Blocks,
    flushing: Mutex<()>,
}

impl CowDisk {
    /// Lays the layer in `file`, open to be read and written, over `base`. An empty file becomes a new
    /// layer; one that was a layer over a disk of this size goes on where its last flush left it (that it
    /// was over *this* disk is for the caller to know). The file is locked while the layer is in use.
    pub fn new(base: Arc<dyn Disk>, file: File) -> io::Result<Self> {
        file.try_lock().map_err(|error| match error {
            TryLockError::Error(error) => error,
            TryLockError::WouldBlock => {
                io::Error::new(io::ErrorKind::ResourceBusy, "the layer is in use already")
            }
        })?;
        let size_bytes = base.size_bytes();
        let layer = Image::new(file);
        let disk = Self { base, size_bytes, layer, blocks: Blocks::default(), flushing: Mutex::new(()) };
        if disk.has_header()? {
            disk.load()?;
        } else if disk.is_blank()? {
            disk.format()?;
        } else {
            let message = format!("the file is no layer over a disk of {size_bytes} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        Ok(disk)
    }

    /// Bytes of all the blocks that the layer has.
    #[must_use]
    pub fn written_bytes(&self) -> u64 {
        self.blocks.written_bytes()
    }

    fn header_offset(&self) -> u64 {
        self.size_bytes.next_multiple_of(BLOCK_BYTES)
    }

    fn bitmap(&self) -> Range<u64> {
        let start = self.header_offset() + HEADER_BYTES;
        start..start + self.size_bytes.div_ceil(PAGE_SPAN_BYTES) * PAGE_BYTES as u64
    }

    fn header(&self) -> [u8; 24] {
        let mut header = [0; 24];
        header[..8].copy_from_slice(MAGIC);
        header[8..16].copy_from_slice(&self.size_bytes.to_le_bytes());
        header[16..].copy_from_slice(&BLOCK_BYTES.to_le_bytes());
        header
    }

    fn has_header(&self) -> io::Result<bool> {
        let mut found = [0; 24];
        if self.layer.len()? != self.bitmap().end {
            return Ok(false);
        }
        self.layer.read_at(self.header_offset(), &mut found)?;
        Ok(found == self.header())
    }

    /// Whether the file is empty, or was becoming a layer when the machine stopped.
    fn is_blank(&self) -> io::Result<bool> {
        let len = self.layer.len()?;
        Ok(len == 0 || (len == self.bitmap().end && self.layer.is_all_hole()?))
    }

    fn format(&self) -> io::Result<()> {
        self.layer.set_len(self.bitmap().end)?;
        self.layer.write_at(self.header_offset(), &self.header())?;
        self.layer.sync()
    }

    fn load(&self) -> io::Result<()> {
        let bitmap = self.bitmap();
        let mut at = bitmap.start;
        let mut stretches = Vec::new();
        self.layer.extents(bitmap.clone(), |extent| {
            if !extent.has(StatusExtent::ZERO) {
                stretches.push(at..at + extent.len);
            }
            at += extent.len;
        })?;
        for stretch in stretches {
            self.load_pages(page_number(&bitmap, stretch.start)..page_number(&bitmap, stretch.end - 1) + 1)?;
        }
        Ok(())
    }

    fn load_pages(&self, pages: Range<u64>) -> io::Result<()> {
        let mut buffer = vec![0; LOAD_BYTES];
        for piece in cut(pages, (LOAD_BYTES / PAGE_BYTES) as u64) {
            let bytes = &mut buffer[..(piece.end - piece.start) as usize * PAGE_BYTES];
            self.layer.read_at(self.bitmap().start + piece.start * PAGE_BYTES as u64, bytes)?;
            for (number, page) in piece.zip(bytes.as_chunks::<PAGE_BYTES>().0) {
                if page.iter().any(|&byte| byte != 0) {
                    self.blocks.load(number, page);
                }
            }
        }
        Ok(())
    }

    /// Writes a range that lies in one page of the bitmap.
    fn write_in_page(&self, range: &Range<u64>, bytes: &[u8]) -> io::Result<()> {
        let page = self.blocks.page_for_writing(range.start);
        if page.is_written(range) {
            return self.layer.write_at(range.start, bytes);
        }
        // Nobody else may fill the blocks meanwhile: two writes to parts of one block would each fill the
        // rest of it with what was there before the other.
        let _filling = page.filling();
        self.fill_block_of(&page, range.start, range)?;
        if range.start / BLOCK_BYTES != (range.end - 1) / BLOCK_BYTES {
            self.fill_block_of(&page, range.end - 1, range)?;
        }
        self.layer.write_at(range.start, bytes)?;
        self.blocks.mark(&page, range);
        Ok(())
    }

    /// Copies the block at `offset` up into the layer if it is not there and `range` will not replace it.
    fn fill_block_of(&self, page: &Page, offset: u64, range: &Range<u64>) -> io::Result<()> {
        let start = offset - offset % BLOCK_BYTES;
        let block = start..self.size_bytes.min(start + BLOCK_BYTES);
        if (range.start <= block.start && block.end <= range.end) || page.is_written(&block) {
            return Ok(());
        }
        let mut buffer = [0; BLOCK_BYTES as usize];
        let bytes = &mut buffer[..(block.end - block.start) as usize];
        self.base.read_at(block.start, bytes)?;
        self.layer.write_at(block.start, bytes)
    }

    /// Makes whole blocks zeros; the range ends between blocks or with the disk.
    fn zero_blocks(&self, range: Range<u64>, allocate: bool) -> io::Result<()> {
        cut(range, PAGE_SPAN_BYTES).try_for_each(|piece| {
            let page = self.blocks.page_for_writing(piece.start);
            let _filling = page.filling();
            // Even where no bit is set: a write that never was completed may have left bytes there.
            self.layer.zero(piece.clone(), allocate)?;
            self.blocks.mark(&page, &piece);
            Ok(())
        })
    }

    /// The whole blocks in a range; empty if there are none.
    fn whole_blocks(&self, offset: u64, len: u64) -> Range<u64> {
        let end = offset + len;
        let start = offset.next_multiple_of(BLOCK_BYTES).min(end);
        let end = if end == self.size_bytes { end } else { end - end % BLOCK_BYTES };
        start..end.max(start)
    }
}

impl Disk for CowDisk {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.blocks.try_for_runs(offset..offset + buffer.len() as u64, |run, written| {
            let part = &mut buffer[(run.start - offset) as usize..(run.end - offset) as usize];
            if written { self.layer.read_at(run.start, part) } else { self.base.read_at(run.start, part) }
        })
    }

    fn extents(&self, range: Range<u64>) -> io::Result<Vec<StatusExtent>> {
        let mut found = Vec::new();
        self.blocks.try_for_runs(range, |run, written| {
            if written {
                return self.layer.extents(run, |extent| push_joined(&mut found, extent));
            }
            let below = all_extents(&*self.base, run)?;
            below.into_iter().for_each(|extent| push_joined(&mut found, extent));
            Ok(())
        })?;
        Ok(found)
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        cut(offset..offset + bytes.len() as u64, PAGE_SPAN_BYTES).try_for_each(|piece| {
            let part = &bytes[(piece.start - offset) as usize..(piece.end - offset) as usize];
            self.write_in_page(&piece, part)
        })
    }

    fn zero(&self, offset: u64, len: u64, allocate: bool) -> io::Result<()> {
        let whole = self.whole_blocks(offset, len);
        let zeros = [0; BLOCK_BYTES as usize];
        for edge in [offset..whole.start, whole.end..offset + len] {
            // At most two blocks' worth, where the range lies within two.
            cut(edge, BLOCK_BYTES)
                .try_for_each(|part| self.write_at(part.start, &zeros[..(part.end - part.start) as usize]))?;
        }
        self.zero_blocks(whole, allocate)
    }

    fn trim(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero_blocks(self.whole_blocks(offset, len), false)
    }

    fn flush(&self) -> io::Result<()> {
        let _one = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        let pages = self.blocks.take_dirty();
        // The bits are copied before the blocks are made stable, so that none is newer than they are.
        let bits: Vec<_> = pages.iter().map(|page| (page.number, page.to_bytes())).collect();
        let flushed = self.layer.sync().and_then(|()| {
            if bits.is_empty() {
                return Ok(());
            }
            let start = self.bitmap().start;
            for (number, bytes) in &bits {
                self.layer.write_at(start + number * PAGE_BYTES as u64, bytes)?;
            }
            self.layer.sync()
        });
        flushed.inspect_err(|_| self.blocks.put_back_dirty(pages))
    }
}

impl Drop for CowDisk {
    /// Closing the file would not do: a program that is just being started has it, too, for a moment.
    fn drop(&mut self) {
        if let Err(error) = self.layer.unlock() {
            tracing::warn!(%error, "the file of a writable layer could not be unlocked");
        }
    }
}

impl fmt::Debug for CowDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CowDisk")
            .field("size_bytes", &self.size_bytes)
            .field("layer", &self.layer)
            .finish_non_exhaustive()
    }
}

fn page_number(bitmap: &Range<u64>, offset: u64) -> u64 {
    (offset - bitmap.start) / PAGE_BYTES as u64
}
