//! A flat image as a disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::path::Path;

use nix::errno::Errno;

use super::{Disk, image::Image, push_joined};
use crate::codec::StatusExtent;

/// A raw image file (or a block device): byte for byte the disk. Its holes are told as zeros.
#[derive(Debug)]
pub struct FileDisk {
    image: Image,
    size_bytes: u64,
    read_only: bool,
}

impl FileDisk {
    /// Opens an image, to be read only.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::new(File::open(path)?, true)
    }

    /// Opens an image, to be read and written.
    pub fn open_writable(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::new(OpenOptions::new().read(true).write(true).open(path)?, false)
    }

    /// The same of a file that is open already. Its position is moved: no clone of it should rely on that.
    pub fn new(file: File, read_only: bool) -> io::Result<Self> {
        let image = Image::new(file);
        let size_bytes = image.len()?;
        Ok(Self { image, size_bytes, read_only })
    }

    fn check_writable(&self) -> io::Result<()> {
        if self.read_only { Err(Errno::EPERM.into()) } else { Ok(()) }
    }
}

impl Disk for FileDisk {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.image.read_at(offset, buffer)
    }

    fn extents(&self, range: Range<u64>) -> io::Result<Vec<StatusExtent>> {
        let mut found = Vec::new();
        self.image.extents(range, |extent| push_joined(&mut found, extent))?;
        Ok(found)
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.check_writable()?;
        self.image.write_at(offset, bytes)
    }

    fn zero(&self, offset: u64, len: u64, allocate: bool) -> io::Result<()> {
        self.check_writable()?;
        self.image.zero(offset..offset + len, allocate)
    }

    fn trim(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_writable()?;
        self.image.trim(offset..offset + len)
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.image.sync() }
    }
}
