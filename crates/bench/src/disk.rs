//! The guest's side of a disk: writes through the storage daemon's NBD export.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::Context;
use nbd::Client;
use rig::StorageDaemon;
use tokio::runtime::{Builder, Runtime};

use crate::image::{MIB, Random};

/// A disk of a daemon, open for writing.
pub struct Disk {
    runtime: Runtime,
    client: Client,
}

/// What extents hold after a change: half of each does not compress, half is text.
pub fn changed(extents: &[(u64, u64)], seed: u64) -> impl Iterator<Item = (u64, Vec<u8>)> {
    let mut random = Random::new(seed);
    extents.iter().map(move |&(offset, len)| {
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        let half = bytes.len() / 2;
        random.fill(&mut bytes[..half]);
        text(&mut bytes[half..], random.next());
        (offset, bytes)
    })
}

impl Disk {
    /// Opens the export of a disk.
    pub fn open(daemon: &StorageDaemon, name: &str) -> anyhow::Result<Self> {
        Self::connect(&daemon.nbd(), name)
    }

    /// Opens an export of an NBD server on a unix socket.
    pub fn connect(socket: &Path, name: &str) -> anyhow::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(Client::connect(socket, name, &[]));
        let client = client.with_context(|| format!("opening disk {name}"))?;
        Ok(Self { runtime, client })
    }

    /// Writes extents: the first half of each does not compress, the other half does.
    pub fn change(&self, extents: &[(u64, u64)], seed: u64) -> anyhow::Result<()> {
        changed(extents, seed).try_for_each(|(offset, bytes)| self.write(offset, &bytes))?;
        self.flush()
    }

    /// Writes extents with bytes that do not compress.
    pub fn scramble(&self, extents: &[(u64, u64)], seed: u64) -> anyhow::Result<()> {
        let mut random = Random::new(seed);
        for &(offset, len) in extents {
            let mut bytes = vec![0; usize::try_from(len)?];
            random.fill(&mut bytes);
            self.write(offset, &bytes)?;
        }
        self.flush()
    }

    /// Writes the pieces of a file, each `stride` bytes after the one before. How many bytes they were.
    pub fn write_file(&self, path: &Path, stride: u64) -> anyhow::Result<u64> {
        let file = File::open(path).with_context(|| path.display().to_string())?;
        let pieces = file.metadata()?.len() / MIB as u64;
        let mut piece = vec![0; MIB];
        for n in 0..pieces {
            file.read_exact_at(&mut piece, n * MIB as u64)?;
            self.write(n * stride, &piece)?;
        }
        self.flush()?;
        Ok(pieces * MIB as u64)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> anyhow::Result<()> {
        self.runtime.block_on(self.client.write(offset, bytes)).context("writing to the guest's disk")
    }

    fn flush(&self) -> anyhow::Result<()> {
        self.runtime.block_on(self.client.flush()).context("flushing the guest's disk")
    }
}

/// Lines that compress well, and are others for another seed.
fn text(buffer: &mut [u8], seed: u64) {
    for (n, line) in buffer.chunks_mut(64).enumerate() {
        let words = format!("{:<63}\n", format!("{seed:016x} line {n:08} was changed by the guest"));
        let count = line.len();
        line.copy_from_slice(&words.as_bytes()[..count]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_on_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let daemon = StorageDaemon::start(dir.path(), &[("disk", 16 << 20)]).unwrap();
        let disk = Disk::open(&daemon, "disk").unwrap();
        disk.change(&[(0, 65536), (1 << 20, 131_072)], 1).unwrap();
        let source = dir.path().join("source");
        std::fs::write(&source, vec![7; 2 * MIB]).unwrap();
        assert_eq!(disk.write_file(&source, 4 << 20).unwrap(), 2 << 20);
        disk.scramble(&[(9 << 20, 4096)], 5).unwrap();
        let bytes = std::fs::read(daemon.disk("disk")).unwrap();
        assert!(bytes[..MIB] == [7; MIB][..] && bytes[4 * MIB..5 * MIB] == [7; MIB][..]);
        assert!(
            bytes[MIB + 65536..].starts_with(format!("{:016x}", text_seed(&bytes[MIB + 65536..])).as_bytes())
        );
        assert!(bytes[9 * MIB..9 * MIB + 4096].iter().any(|&byte| byte != 0));
        assert!(bytes[10 * MIB..].iter().all(|&byte| byte == 0));
    }

    fn text_seed(bytes: &[u8]) -> u64 {
        u64::from_str_radix(std::str::from_utf8(&bytes[..16]).unwrap(), 16).unwrap()
    }
}
