//! NTFS. Its log is not replayed: of the last seconds before a crash-consistent point a folder may be older than its files.

use std::io::Write;
use std::sync::Arc;

use ntfs::indexes::NtfsFileNameIndex;
use ntfs::structured_values::{NtfsFileAttributeFlags, NtfsFileName, NtfsFileNamespace};
use ntfs::{Ntfs, NtfsAttributeFlags, NtfsError, NtfsFile, NtfsReadSeek as _};

use crate::filesystem::{Entry, FileSystem, Kind};
use crate::source::{Cursor, ReadAt};
use crate::{ENTRIES_MAX, Error};

/// So much of a file is read at a time.
const PIECE_BYTES: usize = 1 << 20;
/// From 1601 to 1970, in seconds.
const EPOCH_S: i64 = 11_644_473_600;

pub(crate) struct NtfsFiles {
    source: Arc<dyn ReadAt>,
    ntfs: Ntfs,
}

impl NtfsFiles {
    pub fn open(source: Arc<dyn ReadAt>) -> Result<Self, Error> {
        let mut disk = Cursor::new(source.clone());
        let mut ntfs = Ntfs::new(&mut disk).map_err(failed)?;
        ntfs.read_upcase_table(&mut disk).map_err(failed)?;
        Ok(Self { source, ntfs })
    }

    /// The file at a path, and what its folder says of it; the root has no folder.
    fn find(&self, path: &[u8]) -> Result<(NtfsFile<'_>, Option<NtfsFileName>), Error> {
        let mut disk = Cursor::new(self.source.clone());
        let shown = String::from_utf8_lossy(path);
        let not_found = || Error::NotFound(shown.clone().into_owned());
        let (mut file, mut named) = (self.ntfs.root_directory(&mut disk).map_err(failed)?, None);
        for name in shown.split('/').filter(|name| !name.is_empty()) {
            if !file.is_directory() {
                return Err(not_found());
            }
            let index = file.directory_index(&mut disk).map_err(failed)?;
            let mut finder = index.finder();
            let found = NtfsFileNameIndex::find(&mut finder, &self.ntfs, &mut disk, name);
            let entry = found.ok_or_else(not_found)?.map_err(failed)?;
            named = entry.key().transpose().map_err(failed)?;
            file = entry.to_file(&self.ntfs, &mut disk).map_err(failed)?;
        }
        Ok((file, named))
    }
}

impl FileSystem for NtfsFiles {
    fn entry(&self, path: &[u8]) -> Result<Entry, Error> {
        match self.find(path)? {
            (_, Some(named)) => Ok(described(&named)),
            (_, None) => {
                Ok(Entry { name: Vec::new(), kind: Kind::Folder, size_bytes: 0, modified_s: 0, mode: None })
            }
        }
    }

    fn list(&self, path: &[u8]) -> Result<Vec<Entry>, Error> {
        let (folder, _) = self.find(path)?;
        if !folder.is_directory() {
            let path = String::from_utf8_lossy(path).into_owned();
            return Err(Error::WrongKind { path, wanted: "folder" });
        }
        let mut disk = Cursor::new(self.source.clone());
        let index = folder.directory_index(&mut disk).map_err(failed)?;
        let (mut names, mut entries) = (index.entries(), Vec::new());
        while let Some(entry) = names.next(&mut disk) {
            let Some(named) = entry.map_err(failed)?.key().transpose().map_err(failed)? else { continue };
            // Short names are a second name of what has a long one; the root names itself.
            if named.namespace() == NtfsFileNamespace::Dos || named.name() == "." {
                continue;
            }
            if entries.len() >= ENTRIES_MAX {
                return Err(Error::TooMuch("a folder has more names than are read"));
            }
            entries.push(described(&named));
        }
        entries.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(entries)
    }

    fn read(&self, path: &[u8], to: &mut dyn Write) -> Result<u64, Error> {
        let (file, _) = self.find(path)?;
        let shown = || String::from_utf8_lossy(path).into_owned();
        if file.is_directory() {
            return Err(Error::WrongKind { path: shown(), wanted: "file" });
        }
        let mut disk = Cursor::new(self.source.clone());
        let Some(item) = file.data(&mut disk, "") else { return Ok(0) };
        let item = item.map_err(failed)?;
        let attribute = item.to_attribute().map_err(failed)?;
        if attribute.flags().intersects(NtfsAttributeFlags::COMPRESSED | NtfsAttributeFlags::ENCRYPTED) {
            return Err(Error::FileSystem(format!("{} is compressed or encrypted by Windows", shown())));
        }
        let mut value = attribute.value(&mut disk).map_err(failed)?;
        let (mut buffer, mut written) = (vec![0; PIECE_BYTES], 0);
        loop {
            let len = value.read(&mut disk, &mut buffer).map_err(failed)?;
            if len == 0 {
                return Ok(written);
            }
            to.write_all(&buffer[..len])?;
            written += len as u64;
        }
    }
}

fn described(named: &NtfsFileName) -> Entry {
    let kind = if named.file_attributes().contains(NtfsFileAttributeFlags::REPARSE_POINT) {
        Kind::Other
    } else if named.is_directory() {
        Kind::Folder
    } else {
        Kind::File
    };
    let seconds = i64::try_from(named.modification_time().nt_timestamp() / 10_000_000).unwrap_or(0);
    Entry {
        name: named.name().to_string_lossy().into_bytes(),
        kind,
        size_bytes: named.data_size(),
        modified_s: seconds - EPOCH_S,
        mode: None,
    }
}

fn failed(error: NtfsError) -> Error {
    Error::FileSystem(error.to_string())
}
