//! ext2, ext3 and ext4. A journal that was not replayed (the disk of a VM that ran) is read as if it were.

use std::io::Write;
use std::sync::Arc;

use ext4_view::{Ext4, Ext4Error, Ext4Read, Metadata, Path};

use crate::filesystem::{Entry, FileSystem, Kind};
use crate::source::ReadAt;
use crate::{ENTRIES_MAX, Error};

/// So much of a file is read at a time.
const PIECE_BYTES: usize = 1 << 20;

pub(crate) struct Ext(Ext4);

struct Reader(Arc<dyn ReadAt>);

impl Ext4Read for Reader {
    fn read(
        &mut self,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        Ok(self.0.read_at(offset, buffer)?)
    }
}

impl Ext {
    pub fn open(source: Arc<dyn ReadAt>) -> Result<Self, Error> {
        Ok(Self(Ext4::load(Box::new(Reader(source))).map_err(|error| failed(b"/", error))?))
    }

    fn described(&self, name: &[u8], path: &[u8], metadata: &Metadata) -> Entry {
        let kind = if metadata.is_dir() {
            Kind::Folder
        } else if metadata.is_symlink() {
            let to = named(path).and_then(|path| self.0.read_link(path).map_err(|error| failed(b"", error)));
            Kind::Link(to.map(|to| AsRef::<[u8]>::as_ref(&to).to_vec()).unwrap_or_default())
        } else if metadata.file_type().is_regular_file() {
            Kind::File
        } else {
            Kind::Other
        };
        Entry {
            name: name.to_vec(),
            kind,
            size_bytes: metadata.len(),
            modified_s: metadata.modified().seconds(),
            mode: Some(metadata.mode() & 0o7777),
        }
    }
}

impl FileSystem for Ext {
    fn entry(&self, path: &[u8]) -> Result<Entry, Error> {
        let metadata = self.0.metadata(named(path)?).map_err(|error| failed(path, error))?;
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        Ok(self.described(name, path, &metadata))
    }

    fn list(&self, path: &[u8]) -> Result<Vec<Entry>, Error> {
        let mut entries = Vec::new();
        for entry in self.0.read_dir(named(path)?).map_err(|error| failed(path, error))? {
            let entry = entry.map_err(|error| failed(path, error))?;
            let name = entry.file_name();
            if [&b"."[..], b".."].contains(&name.as_ref()) {
                continue;
            }
            if entries.len() >= ENTRIES_MAX {
                return Err(Error::TooMuch("a folder has more names than are read"));
            }
            let metadata = entry.metadata().map_err(|error| failed(path, error))?;
            entries.push(self.described(name.as_ref(), entry.path().as_ref(), &metadata));
        }
        entries.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(entries)
    }

    fn read(&self, path: &[u8], to: &mut dyn Write) -> Result<u64, Error> {
        let mut file = self.0.open(named(path)?).map_err(|error| failed(path, error))?;
        let (mut buffer, mut written) = (vec![0; PIECE_BYTES], 0);
        loop {
            let len = file.read_bytes(&mut buffer).map_err(|error| failed(path, error))?;
            if len == 0 {
                return Ok(written);
            }
            to.write_all(&buffer[..len])?;
            written += len as u64;
        }
    }
}

fn named(path: &[u8]) -> Result<Path<'_>, Error> {
    Path::try_from(path).map_err(|_| Error::NotFound(String::from_utf8_lossy(path).into_owned()))
}

fn failed(path: &[u8], error: Ext4Error) -> Error {
    let path = || String::from_utf8_lossy(path).into_owned();
    match error {
        Ext4Error::NotFound => Error::NotFound(path()),
        Ext4Error::NotADirectory => Error::WrongKind { path: path(), wanted: "folder" },
        Ext4Error::IsADirectory | Ext4Error::IsASpecialFile => {
            Error::WrongKind { path: path(), wanted: "file" }
        }
        error => Error::FileSystem(error.to_string()),
    }
}
