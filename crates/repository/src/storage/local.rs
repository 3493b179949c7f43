//! A repository in a local folder: temporary name, fsync, rename, fsync of the folder. rustic's local backend
//! syncs a file but not the folder that names it, so a power cut could take a pack away from under a backup
//! that was listed.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use steps::durable_step;

use super::{FileKind, FileName, Storage, Trouble, id_of};
use crate::direct::DirectFile;
use crate::id::Id;
use crate::partial;

/// Packs are written by this many threads: while one waits for the disk, the other hashes.
const WRITERS: usize = 2;

#[derive(Debug)]
pub(crate) struct LocalStorage {
    path: PathBuf,
    shown: String,
}

impl LocalStorage {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { shown: path.display().to_string(), path }
    }

    fn path_of(&self, file: &FileName) -> PathBuf {
        self.path.join(file.path())
    }

    fn put(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let folder = path.parent().unwrap_or(&self.path);
        let temporary = partial::name(path);
        let written = (|| -> io::Result<()> {
            let file = match DirectFile::create(&temporary) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    fs::create_dir_all(folder)?;
                    durable_step("repository::folder::made");
                    sync_folder(folder.parent().unwrap_or(&self.path))?;
                    durable_step("repository::folder::settled");
                    DirectFile::create(&temporary)?
                }
                created => created?,
            };
            file.write_all_at(bytes, 0)?;
            durable_step("repository::file::written");
            file.sync_all()?;
            durable_step("repository::file::synced");
            fs::rename(&temporary, path)?;
            durable_step("repository::file::renamed");
            Ok(())
        })();
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        written?;
        sync_folder(folder)?;
        durable_step("repository::file::settled");
        Ok(())
    }
}

impl Storage for LocalStorage {
    fn location(&self) -> &str {
        &self.shown
    }

    fn create(&self) -> Result<(), Trouble> {
        for kind in FileKind::WITH_FOLDER {
            fs::create_dir_all(self.path.join(kind.folder()))?;
        }
        // A folder for each first byte of a pack.
        let packs = self.path.join(FileKind::Pack.folder());
        for byte in 0..=u8::MAX {
            fs::create_dir_all(packs.join(hex::encode([byte])))?;
        }
        Ok(())
    }

    fn settle_created(&self) -> Result<(), Trouble> {
        durable_step("repository::create::made");
        sync_folder(&self.path.join(FileKind::Pack.folder()))?;
        durable_step("repository::create::folders");
        sync_folder(&self.path)?;
        durable_step("repository::create::settled");
        Ok(())
    }

    fn list(&self, kind: FileKind) -> Result<Vec<(Id, u64)>, Trouble> {
        let mut found = Vec::new();
        let mut folders = vec![self.path.join(kind.folder())];
        while let Some(folder) = folders.pop() {
            let entries = match fs::read_dir(&folder) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                entries => entries?,
            };
            for entry in entries {
                let entry = entry?;
                if let Some(id) = entry.file_name().to_str().and_then(id_of) {
                    match entry.metadata() {
                        Ok(metadata) => found.push((id, metadata.len())),
                        // Somebody has removed it in between.
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                        Err(error) => return Err(error.into()),
                    }
                } else if kind == FileKind::Pack && entry.file_type()?.is_dir() {
                    folders.push(entry.path());
                }
            }
        }
        Ok(found)
    }

    fn size(&self, file: &FileName) -> Result<Option<u64>, Trouble> {
        match fs::metadata(self.path_of(file)) {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn read(&self, file: &FileName) -> Result<Vec<u8>, Trouble> {
        Ok(fs::read(self.path_of(file))?)
    }

    fn read_at(&self, file: &FileName, offset: u64, into: &mut [u8]) -> Result<(), Trouble> {
        Ok(fs::File::open(self.path_of(file))?.read_exact_at(into, offset)?)
    }

    fn write(&self, file: &FileName, bytes: &[u8]) -> Result<(), Trouble> {
        Ok(self.put(&self.path_of(file), bytes)?)
    }

    fn remove(&self, file: &FileName) -> Result<(), Trouble> {
        match fs::remove_file(self.path_of(file)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    fn settle(&self, kind: FileKind) -> Result<(), Trouble> {
        durable_step("repository::backup::settling");
        sync_folder(&self.path.join(kind.folder()))?;
        durable_step("repository::backup::found");
        Ok(())
    }

    fn has_half_written(&self) -> bool {
        let locks = fs::read_dir(self.path.join(FileKind::Lock.folder()));
        locks.into_iter().flatten().flatten().any(|entry| partial::is_abandoned(&entry.path()))
    }

    fn sweep(&self) {
        partial::sweep(&self.path);
    }

    fn writers(&self) -> usize {
        WRITERS
    }
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    fs::File::open(folder)?.sync_all()
}
