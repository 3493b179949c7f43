//! The file system of the config, with errors that say what was done to which path.
//!
//! Nothing in the store goes past it to the operating system: a path leaves the store only for other programs
//! (a hold's flat files, a failover's layers).

use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::sync::Arc;

use files::{File, Open};
use steps::durable_step;

use crate::error::{Error, Result};

/// The file system that the store is on.
#[derive(Debug, Clone)]
pub(crate) struct Files(pub files::Shared);

impl Files {
    #[cfg(test)]
    pub fn os() -> Self {
        Self(Arc::new(files::Os))
    }

    pub fn open_read(&self, path: &Path) -> Result<Arc<dyn File>> {
        self.0.open(path, Open::Read).map_err(Error::io("opening", path))
    }

    /// Opens a file for reading and writing, making it if it is not there.
    pub fn open_or_create(&self, path: &Path) -> Result<Arc<dyn File>> {
        self.0.open(path, Open::Create).map_err(Error::io("opening", path))
    }

    /// Opens a disk's file to read it: a reader must not need what only an apply needs, a file system that can be
    /// written. A disk that no apply has touched yet gets its empty file.
    pub fn open_to_read(&self, path: &Path) -> Result<Arc<dyn File>> {
        self.open_if_there(path)?.map_or_else(|| self.open_or_create(path), Ok)
    }

    /// Opens a file to read it, if there is one.
    pub fn open_if_there(&self, path: &Path) -> Result<Option<Arc<dyn File>>> {
        if_there(self.0.open(path, Open::Read)).map_err(Error::io("opening", path))
    }

    /// Opens a file that has nothing in it, whatever was there before.
    pub fn open_empty(&self, path: &Path) -> Result<Arc<dyn File>> {
        let file = self.0.open(path, Open::Create).map_err(Error::io("making", path))?;
        file.set_len(0).map_err(Error::io("making", path))?;
        Ok(file)
    }

    /// All of a small file.
    pub fn read(&self, path: &Path) -> Result<Vec<u8>> {
        let file = self.open_read(path)?;
        let len = file.len().map_err(Error::io("reading", path))?;
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        file.read_exact_at(&mut bytes, 0).map_err(Error::io("reading", path))?;
        Ok(bytes)
    }

    /// Replaces a small file as a whole: it has the old bytes or the new ones.
    pub fn replace(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let fresh = path.with_extension("new");
        let file = self.open_empty(&fresh)?;
        let written = file.write_all_at(bytes, 0).and_then(|()| file.sync_all());
        written.map_err(Error::io("writing", &fresh))?;
        self.rename(&fresh, path)?;
        path.parent().map_or(Ok(()), |folder| self.sync_folder(folder))
    }

    pub fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.0.rename(from, to).map_err(Error::io("renaming", from))
    }

    /// Removes a file; it does not matter if it is gone.
    pub fn remove_file(&self, path: &Path) -> Result<()> {
        if_there(self.0.remove_file(path)).map(drop).map_err(Error::io("removing", path))
    }

    /// Removes a folder with all that is in it, durably: what a power cut brought back would be nobody's. It does
    /// not matter if it is gone.
    pub fn remove_folder(&self, path: &Path) -> Result<()> {
        if if_there(self.0.remove_dir_all(path)).map_err(Error::io("removing", path))?.is_none() {
            return Ok(());
        }
        durable_step("replica::folder::removed");
        path.parent().map_or(Ok(()), |folder| self.sync_folder(folder))?;
        durable_step("replica::folder::gone");
        Ok(())
    }

    pub fn make_folder(&self, path: &Path) -> Result<()> {
        self.0.create_dir_all(path).map_err(Error::io("making the folder", path))
    }

    /// Makes what was made, renamed or removed in a folder durable.
    pub fn sync_folder(&self, path: &Path) -> Result<()> {
        self.0.sync_dir(path).map_err(Error::io("syncing the folder", path))
    }

    /// The names of what is in a folder, in order.
    pub fn names(&self, path: &Path) -> Result<Vec<OsString>> {
        let entries = self.0.read_dir(path).map_err(Error::io("reading", path))?;
        Ok(entries.into_iter().map(|entry| entry.name).collect())
    }

    pub fn exists(&self, path: &Path) -> Result<bool> {
        self.0.exists(path).map_err(Error::io("looking for", path))
    }

    pub fn is_folder(&self, path: &Path) -> bool {
        self.0.metadata(path).is_ok_and(|meta| !meta.is_file)
    }

    /// The length of a file; none if there is no file of that name.
    pub fn len(&self, path: &Path) -> Result<Option<u64>> {
        let meta = if_there(self.0.metadata(path)).map_err(Error::io("looking for", path))?;
        Ok(meta.filter(|meta| meta.is_file).map(|meta| meta.len))
    }

    /// The bytes that a file takes up on its disk; of one that is not there, none.
    pub fn allocated_bytes(&self, path: &Path) -> u64 {
        self.0.metadata(path).map_or(0, |meta| meta.allocated_bytes)
    }

    /// How much is free for us where a path is.
    pub fn free_bytes(&self, path: &Path) -> Result<u64> {
        self.0.free_bytes(path).map_err(Error::io("asking for the free space of", path))
    }

    /// Copies a file with its holes and makes the copy durable.
    pub fn copy_sparse(&self, from: &Path, to: &Path) -> Result<()> {
        let source = self.open_read(from)?;
        let target = self.0.open(to, Open::CreateNew).map_err(Error::io("making", to))?;
        let size = source.len().map_err(Error::io("reading", from))?;
        target.set_len(size).map_err(Error::io("writing", to))?;
        let mut buf = vec![0; 1 << 20];
        for range in source.data_ranges(0..size).map_err(Error::io("reading", from))? {
            let mut at = range.start;
            while at < range.end {
                let len = usize::try_from(range.end - at).map_or(buf.len(), |left| left.min(buf.len()));
                source.read_or_zeros(&mut buf[..len], at).map_err(Error::io("reading", from))?;
                target.write_all_at(&buf[..len], at).map_err(Error::io("writing", to))?;
                target.start_writeback(at, len as u64);
                at += len as u64;
            }
        }
        target.sync_all().map_err(Error::io("syncing", to))
    }
}

/// What came of something done to a path; none if there is nothing of that name.
fn if_there<T>(outcome: io::Result<T>) -> io::Result<Option<T>> {
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_has_the_bytes_and_the_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b, files) = (dir.path().join("a"), dir.path().join("b"), Files::os());
        let file = files.open_or_create(&a).unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(&[7; 256 * 1024], 1 << 20).unwrap();
        files.copy_sparse(&a, &b).unwrap();
        assert_eq!(files.read(&a).unwrap(), files.read(&b).unwrap());
        assert!(files.allocated_bytes(&b) < 1 << 20);
        assert!(files.copy_sparse(&a, &b).is_err(), "nothing is written over");
    }

    #[test]
    fn a_file_that_is_replaced_has_nothing_left_of_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let (path, files) = (dir.path().join("vm.json"), Files::os());
        files.open_or_create(&dir.path().join("vm.new")).unwrap().write_all_at(&[1; 100], 0).unwrap();
        for bytes in [&b"long long ago"[..], b"short"] {
            files.replace(&path, bytes).unwrap();
            assert_eq!(files.read(&path).unwrap(), bytes);
        }
        assert_eq!(files.names(dir.path()).unwrap(), ["vm.json"]);
    }
}
