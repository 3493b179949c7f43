//! A block device or a raw image that a disk is restored onto.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, OFlag, fallocate};
use nix::unistd::{Whence, lseek};

use super::in_use;
use crate::direct::DirectFile;
use crate::error::Error;
use crate::manifest::BackupDisk;

/// The beginnings of images that are not raw. A guest can write them onto a raw disk, so they prove nothing; but who
/// writes a raw disk over such a file has most likely named the wrong one.
const FORMATS: [(&[u8], &str); 4] =
    [(b"QFI\xfb", "qcow2"), (b"vhdxfile", "VHDX"), (b"KDMV", "VMDK"), (b"conectix", "VHD")];

/// An open target, kept from others as long as it lives.
pub(super) struct Surface {
    path: PathBuf,
    file: DirectFile,
    /// Its size when it was opened.
    size_bytes: u64,
    is_device: bool,
}

impl Surface {
    /// Opens the target of a disk, and makes it if it is a file that is not there.
    pub fn open(path: &Path, disk: &BackupDisk, overwrite: bool) -> Result<Self, Error> {
        let (path, metadata) = match fs::canonicalize(path) {
            Ok(real) => {
                let metadata =
                    fs::metadata(&real).map_err(|source| Error::io("cannot open", &real, source))?;
                (real, Some(metadata))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => (absolute(path)?, None),
            Err(source) => return Err(Error::io("cannot find", path, source)),
        };
        let kind = metadata.as_ref().map(fs::Metadata::file_type);
        let is_device = kind.is_some_and(|kind| kind.is_block_device());
        if !is_device && kind.is_some_and(|kind| !kind.is_file()) {
            return Err(Error::target_unfit(&path, "it is neither a block device nor a file"));
        }
        if let Some(metadata) = &metadata {
            in_use::check(&path, metadata)?;
        }
        let mut options = File::options();
        options.read(true).write(true);
        // A device that the kernel uses for anything (a mount, LVM, RAID) is not opened so.
        if is_device {
            options.custom_flags(OFlag::O_EXCL.bits())
        } else {
            options.create(true)
        };
        let file = options.open(&path).map_err(|source| match source.raw_os_error() {
            Some(errno) if errno == nix::errno::Errno::EBUSY as i32 => in_use::busy(&path),
            Some(errno) if errno == nix::errno::Errno::ETXTBSY as i32 => in_use::busy(&path),
            _ => Error::io("cannot open", &path, source),
        })?;
        in_use::keep(&path, &file)?;
        let size_bytes = lseek(&file, 0, Whence::SeekEnd)
            .map_err(|errno| Error::io("cannot measure", &path, errno.into()))?;
        let size_bytes = u64::try_from(size_bytes).unwrap_or(0);
        let surface = Self { file: DirectFile::over(file, &path), path, size_bytes, is_device };
        surface.check(disk, overwrite)?;
        Ok(surface)
    }

    fn check(&self, disk: &BackupDisk, overwrite: bool) -> Result<(), Error> {
        if self.size_bytes < disk.size_bytes && (self.is_device || self.size_bytes > 0) {
            return Err(Error::TargetTooSmall {
                path: self.path.clone(),
                disk: disk.name.clone(),
                has_bytes: self.size_bytes,
                needs_bytes: disk.size_bytes,
            });
        }
        if !overwrite && (self.is_device || self.size_bytes > 0) {
            return Err(Error::TargetNotEmpty { path: self.path.clone() });
        }
        let mut start = [0; 8];
        let is_image = !self.is_device && self.size_bytes >= 8 && self.read_at(&mut start, 0).is_ok();
        match FORMATS.iter().find(|(magic, _)| is_image && start.starts_with(magic)) {
            Some((_, format)) => {
                let why = format!(
                    "it begins like a {format} image, and a raw disk would be written over it; restore to a new file with --to and --format, or empty it first"
                );
                Err(Error::target_unfit(&self.path, why))
            }
            None => Ok(()),
        }
    }

    /// The device or file, with links resolved.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives a new file its size.
    pub fn prepare(&self, size_bytes: u64) -> io::Result<()> {
        if self.size_bytes == 0 && !self.is_device { self.file.file().set_len(size_bytes) } else { Ok(()) }
    }

    /// How much of it lies beyond a disk of this size.
    pub fn beyond_bytes(&self, size_bytes: u64) -> u64 {
        self.size_bytes.saturating_sub(size_bytes)
    }

    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.file().read_exact_at(buffer, offset)
    }

    pub fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    /// Whether bytes are known to be zero without reading them.
    pub fn is_hole(&self, bytes: &Range<u64>) -> bool {
        let Ok(start) = i64::try_from(bytes.start) else { return false };
        match lseek(self.file.file(), start, Whence::SeekData) {
            Ok(data) => u64::try_from(data).is_ok_and(|data| data >= bytes.end),
            Err(errno) => !self.is_device && errno == nix::errno::Errno::ENXIO,
        }
    }

    /// Makes bytes zero, without room for them where that can be had.
    pub fn empty(&self, bytes: &Range<u64>) -> io::Result<()> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (start, len) = (i64::try_from(bytes.start), i64::try_from(bytes.end - bytes.start));
        if let (Ok(start), Ok(len)) = (start, len)
            && fallocate(self.file.file(), flags, start, len).is_ok()
        {
            return Ok(());
        }
        let zeros = [0; 64 * 1024];
        let mut offset = bytes.start;
        while offset < bytes.end {
            let len = usize::try_from(bytes.end - offset).map_or(zeros.len(), |left| left.min(zeros.len()));
            self.file.write_all_at(&zeros[..len], offset)?;
            offset += len as u64;
        }
        Ok(())
    }

    pub fn make_durable(&self) -> io::Result<()> {
        self.file.sync_all()
    }
}

/// A file that is not there yet, in a folder that is.
fn absolute(path: &Path) -> Result<PathBuf, Error> {
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let folder =
        fs::canonicalize(folder).map_err(|source| Error::io("cannot find the folder of", path, source))?;
    match path.file_name() {
        Some(name) => Ok(folder.join(name)),
        None => Err(Error::target_unfit(path, "it is not the name of a file")),
    }
}
