//! The change map of a disk: one number per chunk, the newest log folded into the base that changed it.
//!
//! It is raised, durably, before the base is touched; a crash between the two makes a backup read more,
//! never less. An entry that cannot be known counts as changed by the newest log folded in.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chain::CHANGE_CHUNK_BYTES;
use files::File;
use log::Extent;
use model::LogNumber;
use steps::durable_step;

use crate::error::{Error, Result};
use crate::fs::Files;

/// The map is read and written in pages of this many entries: 32 KiB, 1 GiB of disk.
const PAGE_ENTRIES: u64 = 4096;
const ENTRY_BYTES: u64 = 8;

/// A map that is being raised.
pub(crate) struct ChangeMap {
    file: Arc<dyn File>,
    path: PathBuf,
    page: Option<Page>,
}

struct Page {
    number: u64,
    entries: Vec<u64>,
    dirty: bool,
}

impl ChangeMap {
    /// Opens the map of a disk whose base has `base_bytes`, made of logs up to `applied`. Where the map is
    /// shorter than the base, nothing is known: those chunks count as changed by `applied`.
    pub fn open(files: &Files, path: &Path, base_bytes: u64, applied: LogNumber) -> Result<Self> {
        let fresh = !files.exists(path)?;
        let file = files.open_or_create(path)?;
        let map = Self { file, path: path.to_path_buf(), page: None };
        let mut known = map.file.len().map_err(Error::io("reading", path))? / ENTRY_BYTES;
        let wanted = base_bytes.div_ceil(CHANGE_CHUNK_BYTES);
        // Page by page: memory does not grow with the disk.
        while known < wanted {
            let entries = PAGE_ENTRIES.min(wanted - known);
            let unknown = vec![applied.0.to_le_bytes(); usize::try_from(entries).unwrap_or(0)];
            map.file
                .write_all_at(unknown.as_flattened(), known * ENTRY_BYTES)
                .map_err(Error::io("writing", path))?;
            known += entries;
        }
        if fresh && let Some(folder) = path.parent() {
            durable_step("replica::map::made");
            files.sync_folder(folder)?;
            durable_step("replica::map::settled");
        }
        Ok(map)
    }

    /// Raises the entries of some chunks to at least `log`.
    pub fn raise(&mut self, chunks: Range<u64>, log: LogNumber) -> Result<()> {
        for chunk in chunks {
            let page = self.page(chunk / PAGE_ENTRIES)?;
            let entry = &mut page.entries[usize::try_from(chunk % PAGE_ENTRIES).unwrap_or(0)];
            *entry = (*entry).max(log.0);
            // Written even if it was high enough: an earlier sync may have failed after that write.
            page.dirty = true;
        }
        Ok(())
    }

    /// Makes it durable.
    pub fn sync(mut self) -> Result<()> {
        self.flush()?;
        self.file.sync_data().map_err(Error::io("syncing", &self.path))
    }

    fn page(&mut self, number: u64) -> Result<&mut Page> {
        if self.page.as_ref().is_none_or(|page| page.number != number) {
            self.flush()?;
            let mut bytes = vec![0; usize::try_from(PAGE_ENTRIES * ENTRY_BYTES).unwrap_or(0)];
            self.file
                .read_or_zeros(&mut bytes, number * PAGE_ENTRIES * ENTRY_BYTES)
                .map_err(Error::io("reading", &self.path))?;
            self.page = Some(Page { number, entries: entries(&bytes).collect(), dirty: false });
        }
        Ok(self.page.as_mut().expect("it was just set"))
    }

    fn flush(&mut self) -> Result<()> {
        let Some(page) = self.page.take().filter(|page| page.dirty) else { return Ok(()) };
        // Not past the last entry that says something: the map's length tells how far it is known.
        let used = page.entries.iter().rposition(|entry| *entry != 0).map_or(0, |last| last + 1);
        let bytes: Vec<u8> = page.entries[..used].iter().flat_map(|entry| entry.to_le_bytes()).collect();
        self.file
            .write_all_at(&bytes, page.number * PAGE_ENTRIES * ENTRY_BYTES)
            .map_err(Error::io("writing", &self.path))
    }
}

fn entries(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_le_bytes(*entry))
}

/// What a map says has changed after a log in the first `base_bytes` of its disk. No map, all of it.
pub(crate) fn changed_after(
    file: Option<&dyn File>,
    path: &Path,
    after: LogNumber,
    base_bytes: u64,
) -> Result<Vec<Extent>> {
    let Some(file) = file else { return Ok(chain::changed_since([], after, base_bytes)) };
    let len = file.len().map_err(Error::io("reading", path))?;
    let known = base_bytes.div_ceil(CHANGE_CHUNK_BYTES).min(len / ENTRY_BYTES);
    let mut failed = None;
    let pages = (0..known).step_by(PAGE_ENTRIES as usize).map_while(|first| {
        let wanted = PAGE_ENTRIES.min(known - first) * ENTRY_BYTES;
        let mut bytes = vec![0; usize::try_from(wanted).unwrap_or(0)];
        let read = file.read_exact_at(&mut bytes, first * ENTRY_BYTES);
        failed = read.map_err(Error::io("reading", path)).err();
        failed.is_none().then(|| entries(&bytes).collect::<Vec<_>>())
    });
    let changed = chain::changed_since(pages.flatten(), after, base_bytes);
    failed.map_or(Ok(changed), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_only_rise_and_what_is_not_known_counts_as_changed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, files) = (dir.path().join("map"), Files::os());
        let size = 3 * PAGE_ENTRIES * CHANGE_CHUNK_BYTES;
        let mut map = ChangeMap::open(&files, &path, 0, LogNumber::ZERO).unwrap();
        map.raise(5..7, LogNumber(3)).unwrap();
        map.raise(2 * PAGE_ENTRIES - 1..2 * PAGE_ENTRIES + 1, LogNumber(4)).unwrap();
        map.raise(6..8, LogNumber(2)).unwrap();
        map.sync().unwrap();
        let changed = |after, size| {
            let file = files.open_if_there(&path).unwrap();
            changed_after(file.as_deref(), &path, LogNumber(after), size).unwrap()
        };
        let chunks = |from: u64, to: u64| Extent {
            offset: from * CHANGE_CHUNK_BYTES,
            len: (to - from) * CHANGE_CHUNK_BYTES,
        };
        let known = (2 * PAGE_ENTRIES + 1) * CHANGE_CHUNK_BYTES;
        assert_eq!(changed(2, known), [chunks(5, 7), chunks(2 * PAGE_ENTRIES - 1, 2 * PAGE_ENTRIES + 1)]);
        assert_eq!(changed(1, 8 * CHANGE_CHUNK_BYTES), [chunks(5, 8)]);
        assert_eq!(changed(4, size), [chunks(2 * PAGE_ENTRIES + 1, 3 * PAGE_ENTRIES)]);
        ChangeMap::open(&files, &path, size, LogNumber(9)).unwrap().sync().unwrap();
        assert_eq!(changed(9, size), []);
        assert_eq!(changed(8, size), [chunks(2 * PAGE_ENTRIES + 1, 3 * PAGE_ENTRIES)]);
    }
}
