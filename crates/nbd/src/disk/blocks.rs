//! Which blocks of a disk were written: a bitmap in memory, made as it is needed, that only ever gains bits.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use super::cut;

/// One bit's worth of disk.
pub(super) const BLOCK_BYTES: u64 = 4096;
/// One page's worth of bitmap (one sector: it is written whole or not at all) and of disk.
pub(super) const PAGE_BYTES: usize = 512;
pub(super) const PAGE_SPAN_BYTES: u64 = PAGE_BYTES as u64 * 8 * BLOCK_BYTES;
const WORDS: usize = PAGE_BYTES / 8;

/// The bitmap.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    pages: RwLock<BTreeMap<u64, Arc<Page>>>,
    /// Pages with bits that are not on stable storage.
    dirty: Mutex<Vec<Arc<Page>>>,
}

impl Blocks {
    /// The page that `offset` lies in, if it has any bit.
    fn page(&self, offset: u64) -> Option<Arc<Page>> {
        let pages = self.pages.read().unwrap_or_else(PoisonError::into_inner);
        pages.get(&(offset / PAGE_SPAN_BYTES)).cloned()
    }

    /// The page that `offset` lies in.
    pub(super) fn page_for_writing(&self, offset: u64) -> Arc<Page> {
        self.page(offset).unwrap_or_else(|| {
            let number = offset / PAGE_SPAN_BYTES;
            let mut pages = self.pages.write().unwrap_or_else(PoisonError::into_inner);
            pages.entry(number).or_insert_with(|| Arc::new(Page::new(number))).clone()
        })
    }

    /// Takes in a page from stable storage.
    pub(super) fn load(&self, number: u64, bytes: &[u8; PAGE_BYTES]) {
        let page = Page::new(number);
        for (word, bytes) in page.words.iter().zip(bytes.as_chunks().0) {
            word.store(u64::from_le_bytes(*bytes), Ordering::Relaxed);
        }
        self.pages.write().unwrap_or_else(PoisonError::into_inner).insert(number, Arc::new(page));
    }

    /// Goes over a range in runs of bytes that are all in written blocks, or all not; neighbours differ.
    pub(super) fn try_for_runs(
        &self,
        range: Range<u64>,
        mut take: impl FnMut(Range<u64>, bool) -> io::Result<()>,
    ) -> io::Result<()> {
        let (mut run, mut is_written) = (range.start..range.start, false);
        for piece in cut(range, PAGE_SPAN_BYTES) {
            let page = self.page(piece.start);
            while run.end < piece.end {
                let at = run.end;
                let (written, end) = page.as_ref().map_or((false, piece.end), |page| page.run(at));
                if written != is_written {
                    if !run.is_empty() {
                        take(run, is_written)?;
                    }
                    (run, is_written) = (at..at, written);
                }
                run.end = end.min(piece.end);
            }
        }
        if run.is_empty() { Ok(()) } else { take(run, is_written) }
    }

    /// Marks the blocks that a range touches, which must lie in `page`.
    pub(super) fn mark(&self, page: &Arc<Page>, range: &Range<u64>) {
        for (word, mask) in page.masks(range) {
            word.fetch_or(mask, Ordering::AcqRel);
        }
        // After the bits: who takes the page from the list then sees them.
        if !page.dirty.swap(true, Ordering::AcqRel) {
            self.dirty().push(page.clone());
        }
    }

    /// The pages with bits that are not on stable storage; from now on they count as if they were.
    pub(super) fn take_dirty(&self) -> Vec<Arc<Page>> {
        let pages = std::mem::take(&mut *self.dirty());
        // Before the bits are read: a bit that comes later lists the page anew.
        pages.iter().for_each(|page| page.dirty.store(false, Ordering::Release));
        pages
    }

    /// Says that these are not on stable storage after all.
    pub(super) fn put_back_dirty(&self, pages: Vec<Arc<Page>>) {
        let mut dirty = self.dirty();
        dirty.extend(pages.into_iter().filter(|page| !page.dirty.swap(true, Ordering::AcqRel)));
    }

    /// Bytes of all the blocks written.
    pub(super) fn written_bytes(&self) -> u64 {
        let pages = self.pages.read().unwrap_or_else(PoisonError::into_inner);
        let words = pages.values().flat_map(|page| &page.words);
        words.map(|word| u64::from(word.load(Ordering::Relaxed).count_ones()) * BLOCK_BYTES).sum()
    }

    fn dirty(&self) -> MutexGuard<'_, Vec<Arc<Page>>> {
        self.dirty.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The bits of one stretch of disk.
#[derive(Debug)]
pub(super) struct Page {
    /// Its place in the bitmap.
    pub(super) number: u64,
    words: [AtomicU64; WORDS],
    dirty: AtomicBool,
    filling: Mutex<()>,
}

impl Page {
    fn new(number: u64) -> Self {
        let words = [const { AtomicU64::new(0) }; WORDS];
        Self { number, words, dirty: AtomicBool::new(false), filling: Mutex::new(()) }
    }

    /// To be held while blocks of the page are filled for the first time.
    pub(super) fn filling(&self) -> MutexGuard<'_, ()> {
        self.filling.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether every block that a range touches, which must lie in the page, was written.
    pub(super) fn is_written(&self, range: &Range<u64>) -> bool {
        self.masks(range).all(|(word, mask)| word.load(Ordering::Acquire) & mask == mask)
    }

    /// Whether the block at `offset` was written, and where the blocks alike end, at the latest with the page.
    fn run(&self, offset: u64) -> (bool, u64) {
        let first = block_of(offset);
        let written = self.words[first / 64].load(Ordering::Acquire) >> (first % 64) & 1 == 1;
        let mut block = first;
        while block < WORDS * 64 {
            let word = self.words[block / 64].load(Ordering::Acquire);
            let other = (if written { !word } else { word }) >> (block % 64);
            if other != 0 {
                block += other.trailing_zeros() as usize;
                break;
            }
            block = (block / 64 + 1) * 64;
        }
        (written, self.number * PAGE_SPAN_BYTES + block as u64 * BLOCK_BYTES)
    }

    fn masks(&self, range: &Range<u64>) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let (first, last) = (block_of(range.start), block_of(range.end - 1));
        (first / 64..=last / 64).map(move |word| {
            let from = first.saturating_sub(word * 64);
            let to = (last - word * 64).min(63);
            (&self.words[word], (u64::MAX << from) & (u64::MAX >> (63 - to)))
        })
    }

    /// As on stable storage: bit 0 of byte 0 is the first block.
    pub(super) fn to_bytes(&self) -> [u8; PAGE_BYTES] {
        let mut bytes = [0; PAGE_BYTES];
        for (out, word) in bytes.as_chunks_mut().0.iter_mut().zip(&self.words) {
            *out = word.load(Ordering::Acquire).to_le_bytes();
        }
        bytes
    }
}

/// A byte's block, counted from the start of its page.
const fn block_of(offset: u64) -> usize {
    (offset % PAGE_SPAN_BYTES / BLOCK_BYTES) as usize
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_agree_with_a_list_of_blocks(
            marks in prop::collection::vec((0..3 * PAGE_SPAN_BYTES, 1..300 * BLOCK_BYTES), 0..20),
            window in (0..3 * PAGE_SPAN_BYTES, 1..PAGE_SPAN_BYTES),
        ) {
            let blocks = Blocks::default();
            let mut expected = vec![false; 5 * PAGE_BYTES * 8];
            for (offset, len) in marks {
                for piece in cut(offset..offset + len, PAGE_SPAN_BYTES) {
                    let page = blocks.page_for_writing(piece.start);
                    blocks.mark(&page, &piece);
                    prop_assert!(page.is_written(&piece));
                    for block in piece.start / BLOCK_BYTES..piece.end.div_ceil(BLOCK_BYTES) {
                        expected[block as usize] = true;
                    }
                }
            }
            // As it is, and after a way through stable storage.
            let again = Blocks::default();
            blocks.take_dirty().iter().for_each(|page| again.load(page.number, &page.to_bytes()));
            for blocks in [&blocks, &again] {
                let (mut at, mut before) = (window.0, None);
                blocks.try_for_runs(window.0..window.0 + window.1, |run, written| {
                    assert_eq!(run.start, at);
                    assert!(run.end > at && before != Some(written));
                    before = Some(written);
                    at = run.end;
                    let touched = run.start / BLOCK_BYTES..run.end.div_ceil(BLOCK_BYTES);
                    assert!(touched.into_iter().all(|block| expected[block as usize] == written));
                    Ok(())
                }).unwrap();
                prop_assert_eq!(at, window.0 + window.1);
                let written = expected.iter().filter(|&&written| written).count() as u64;
                prop_assert_eq!(blocks.written_bytes(), written * BLOCK_BYTES);
            }
            prop_assert!(blocks.take_dirty().is_empty());
        }
    }
}
