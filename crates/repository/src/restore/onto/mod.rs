//! Restoring over what is there: onto a block device, or into an existing raw image, writing only what differs.
//!
//! A chunk's id is the SHA-256 hash of its bytes. So each chunk's place on the target is read and hashed first:
//! what has the chunk's hash already is neither read from the repository nor written. A restore that was cut off
//! goes on in the same way when it is run again: what it has written is found to be the same.
//!
//! Between its first write and its end the target is a mix of two states; an error says so.

mod in_use;
mod surface;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use model::DiskName;
use serde::{Deserialize, Serialize};
use steps::durable_step;

use super::{DamagedRange, STRETCH_BYTES, joined};
use crate::backup::Progress;
use crate::direct::Aligned;
use crate::error::{Error, Unread};
use crate::id::Id;
use crate::info::BackupInfo;
use crate::list::{self, BLOCK_BYTES, Chunk, Stretch, index_of};
use crate::lock::Lock;
use crate::manifest::BackupDisk;
use crate::zeros::is_zero;
use crate::{Repository, parallel, reader};
use surface::Surface;

/// What to restore over what.
#[derive(Debug, Clone)]
pub struct OntoOptions {
    /// The disks, and the block device or raw image that each is written to. A file that is not there is made.
    pub disks: Vec<(DiskName, PathBuf)>,
    /// Leave zeros in place of what is damaged in the backup.
    pub keep_going: bool,
    /// What is on a device or in a file may go.
    pub overwrite: bool,
}

/// A disk that was restored onto something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OntoDisk {
    /// Its name.
    pub name: DiskName,
    /// The device or file.
    pub path: PathBuf,
    /// The disk's size.
    pub size_bytes: u64,
    /// Bytes that differed, and were written.
    pub written_bytes: u64,
    /// Bytes of chunks that were read from the backup: those of which a part differed.
    pub read_bytes: u64,
    /// Bytes of the target beyond the disk's end, which were left as they were.
    pub beyond_bytes: u64,
}

/// What a restore over something came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OntoReport {
    /// The disks.
    pub disks: Vec<OntoDisk>,
    /// What was left out, with `keep_going`; zeros are in its place.
    pub damaged: Vec<DamagedRange>,
    /// How long it took.
    pub seconds: f64,
}

/// A restore whose targets are open, checked, and kept from others; nothing has been written.
pub struct Onto<'a> {
    repository: &'a Repository,
    backup: BackupInfo,
    jobs: Vec<Job>,
    keep_going: bool,
    _lock: Option<Lock>,
}

struct Job {
    disk: BackupDisk,
    list: Vec<Chunk>,
    surface: Surface,
}

/// What is compared at a time.
enum Piece {
    Data(Stretch),
    Zeros(Range<u64>),
}

/// Counts of one disk.
#[derive(Default)]
struct Counts {
    done: AtomicU64,
    written: AtomicU64,
    read: AtomicU64,
}

impl Repository {
    /// Opens the targets of a restore, and refuses those that must not be written: what is mounted or open in
    /// another program, what is too small, and, without `overwrite`, what is not empty.
    pub fn onto(&self, backup: &BackupInfo, options: &OntoOptions) -> Result<Onto<'_>, Error> {
        let unread = |unread: Unread| unread.of_backup(backup.id);
        let lock = self.lock_to_read()?;
        self.load_index()?;
        let mut files = self.read_tree(&backup.tree).map_err(unread)?;
        let mut jobs: Vec<Job> = Vec::new();
        for (name, path) in &options.disks {
            let disk = backup.disk(name)?;
            let surface = Surface::open(path, disk, options.overwrite)?;
            let is_in_it =
                |folder: &Path| folder.canonicalize().is_ok_and(|folder| surface.path().starts_with(folder));
            if self.location().local_path().is_some_and(is_in_it) {
                let why = "it is a part of the repository that is restored from";
                return Err(Error::target_unfit(path, why));
            }
            if jobs.iter().any(|job| job.surface.path() == surface.path() || job.disk.name == *name) {
                return Err(Error::target_unfit(path, "a disk or a target is named twice"));
            }
            let list = self.disk_list(&mut files, disk).map_err(unread)?;
            jobs.push(Job { disk: disk.clone(), list, surface });
        }
        Ok(Onto {
            repository: self,
            backup: backup.clone(),
            jobs,
            keep_going: options.keep_going,
            _lock: lock,
        })
    }
}

impl Onto<'_> {
    /// The devices and files, with links resolved.
    pub fn targets(&self) -> impl Iterator<Item = &Path> {
        self.jobs.iter().map(|job| job.surface.path())
    }

    /// Compares, and writes what differs.
    pub fn run(&self, progress: &dyn Fn(Progress), cancel: &AtomicBool) -> Result<OntoReport, Error> {
        let began = Instant::now();
        let total_bytes = self.jobs.iter().map(|job| job.disk.size_bytes).fold(0, u64::saturating_add);
        let (mut disks, mut damaged, mut before) = (Vec::new(), Vec::new(), 0);
        for job in &self.jobs {
            let shown = |done| {
                progress(Progress { done_bytes: before + done, total_bytes, ..Progress::default() });
            };
            let (disk, lost) = self.run_one(job, &shown, cancel)?;
            disks.push(disk);
            damaged.extend(lost);
            before += job.disk.size_bytes;
        }
        Ok(OntoReport { disks, damaged, seconds: began.elapsed().as_secs_f64() })
    }

    fn run_one(
        &self,
        job: &Job,
        progress: &dyn Fn(u64),
        cancel: &AtomicBool,
    ) -> Result<(OntoDisk, Vec<DamagedRange>), Error> {
        let failed = |source| Error::io("cannot write", job.surface.path(), source);
        let (counts, lost) = (Counts::default(), Mutex::new(Vec::new()));
        job.surface.prepare(job.disk.size_bytes).map_err(failed)?;
        let work = |tools: &mut Tools, piece: &Piece| {
            let bytes = match piece {
                Piece::Data(stretch) => {
                    for damage in self.compare(job, stretch, tools, &counts)? {
                        lost.lock().unwrap_or_else(PoisonError::into_inner).push(damage);
                    }
                    &stretch.bytes
                }
                Piece::Zeros(bytes) => {
                    empty(&job.surface, bytes, &mut tools.there, &counts).map_err(failed)?;
                    bytes
                }
            };
            counts.done.fetch_add(bytes.end - bytes.start, Ordering::Relaxed);
            Ok(())
        };
        let tools = (0..parallel::threads())
            .map(|_| Tools::new(self.repository))
            .collect::<std::io::Result<Vec<_>>>()
            .map_err(failed)?;
        let shown = || progress(counts.done.load(Ordering::Relaxed));
        let done = parallel::for_each(&pieces(&job.list), tools, &work, &shown, cancel);
        let written_bytes = counts.written.load(Ordering::Relaxed);
        durable_step("repository::onto::written");
        let done = done.and_then(|()| job.surface.make_durable().map_err(failed));
        durable_step("repository::onto::synced");
        match done {
            Err(source) if written_bytes > 0 => {
                let path = job.surface.path().to_owned();
                Err(Error::HalfWritten { disk: job.disk.name.clone(), path, source: Box::new(source) })
            }
            Err(error) => Err(error),
            Ok(()) => {
                let disk = OntoDisk {
                    name: job.disk.name.clone(),
                    path: job.surface.path().to_owned(),
                    size_bytes: job.disk.size_bytes,
                    written_bytes,
                    read_bytes: counts.read.into_inner(),
                    beyond_bytes: job.surface.beyond_bytes(job.disk.size_bytes),
                };
                Ok((disk, joined(lost.into_inner().unwrap_or_else(PoisonError::into_inner))))
            }
        }
    }

    /// Compares the chunks of a stretch with what is on the target, and writes the blocks that differ. Gives what is
    /// damaged in the backup, with zeros in its place.
    fn compare(
        &self,
        job: &Job,
        stretch: &Stretch,
        tools: &mut Tools,
        counts: &Counts,
    ) -> Result<Vec<DamagedRange>, Error> {
        let failed = |source| Error::io("cannot write", job.surface.path(), source);
        let unread = |source| Error::io("cannot read", job.surface.path(), source);
        let (mut offset, mut damaged) = (stretch.bytes.start, Vec::new());
        for chunk in &job.list[stretch.chunks.clone()] {
            let len = index_of(chunk.bytes());
            let there = tools.there.room(len);
            job.surface.read_at(there, offset).map_err(unread)?;
            if Id::of(there) != chunk.id {
                let wanted = tools.wanted.room(len);
                if let Err(unread) = self.repository.read_chunk(&mut tools.reading, &chunk.id, wanted) {
                    let why = unread.damage()?;
                    let (disk, len) = (job.disk.name.clone(), chunk.bytes());
                    if !self.keep_going {
                        let backup = self.backup.id.short();
                        return Err(Error::ChunkDamaged { backup, disk, offset, len, why });
                    }
                    wanted.fill(0);
                    damaged.push(DamagedRange { disk, offset, len, why });
                }
                counts.read.fetch_add(chunk.bytes(), Ordering::Relaxed);
                for run in differing(there, wanted) {
                    job.surface.write_at(&wanted[run.clone()], offset + run.start as u64).map_err(failed)?;
                    counts.written.fetch_add(run.len() as u64, Ordering::Relaxed);
                }
            }
            offset += chunk.bytes();
        }
        Ok(damaged)
    }
}

/// What a thread needs.
struct Tools {
    reading: reader::Tools,
    there: Aligned,
    wanted: Aligned,
}

impl Tools {
    fn new(repository: &Repository) -> std::io::Result<Self> {
        let reading = reader::Tools::new(repository.store.cipher())?;
        Ok(Self { reading, there: Aligned::default(), wanted: Aligned::default() })
    }
}

/// Sees to it that bytes of the target are zero.
fn empty(
    surface: &Surface,
    bytes: &Range<u64>,
    buffer: &mut Aligned,
    counts: &Counts,
) -> std::io::Result<()> {
    let mut offset = bytes.start;
    while offset < bytes.end {
        let end = bytes.end.min(offset + STRETCH_BYTES);
        if !surface.is_hole(&(offset..end)) {
            let there = buffer.room(index_of(end - offset));
            surface.read_at(there, offset)?;
            for run in runs(there, |block, _| !is_zero(block)) {
                surface.empty(&(offset + run.start as u64..offset + run.end as u64))?;
                counts.written.fetch_add(run.len() as u64, Ordering::Relaxed);
            }
        }
        offset = end;
    }
    Ok(())
}

/// The runs of blocks of 4 KiB that differ.
fn differing(there: &[u8], wanted: &[u8]) -> Vec<Range<usize>> {
    runs(there, |block, place| block != &wanted[place..place + block.len()])
}

/// The runs of blocks of 4 KiB of which something holds, told with their places.
fn runs(bytes: &[u8], holds: impl Fn(&[u8], usize) -> bool) -> Vec<Range<usize>> {
    let block_bytes = index_of(BLOCK_BYTES);
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (block, start) in bytes.chunks(block_bytes).zip((0..).step_by(block_bytes)) {
        if holds(block, start) {
            match runs.last_mut() {
                Some(last) if last.end == start => last.end = start + block.len(),
                _ => runs.push(start..start + block.len()),
            }
        }
    }
    runs
}

/// A disk in pieces: its stretches with data, and what is zero between them.
fn pieces(chunks: &[Chunk]) -> Vec<Piece> {
    let size_bytes: u64 = chunks.iter().map(Chunk::bytes).sum();
    let (mut pieces, mut end) = (Vec::new(), 0);
    let zeros = |pieces: &mut Vec<Piece>, mut from: u64, to: u64| {
        while from < to {
            let end = to.min(from + 16 * STRETCH_BYTES);
            pieces.push(Piece::Zeros(from..end));
            from = end;
        }
    };
    for stretch in list::data_stretches(chunks, STRETCH_BYTES) {
        zeros(&mut pieces, end, stretch.bytes.start);
        end = stretch.bytes.end;
        pieces.push(Piece::Data(stretch));
    }
    zeros(&mut pieces, end, size_bytes);
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::zeros::zero_chunks;

    #[test]
    fn what_differs_is_found_in_blocks() {
        let there = vec![1; 5 * 4096 + 100];
        let mut wanted = there.clone();
        assert!(differing(&there, &wanted).is_empty());
        for place in [0, 4096 * 2, 4096 * 3 - 1, 4096 * 3, 4096 * 5 + 99] {
            wanted[place] = 2;
        }
        assert_eq!(differing(&there, &wanted), [0..4096, 8192..16_384, 20_480..20_580]);
    }

    #[test]
    fn pieces_cover_a_disk_once() {
        let mut chunks: Vec<Chunk> = zero_chunks(200 << 20).collect();
        chunks.push(Chunk::data(Id::of(b"a"), 8192));
        chunks.extend(zero_chunks(5 * 4096));
        let mut end = 0;
        for piece in pieces(&chunks) {
            let bytes = match piece {
                Piece::Data(stretch) => stretch.bytes,
                Piece::Zeros(bytes) => bytes,
            };
            assert!(bytes.start == end && bytes.end > end && bytes.end - end <= 64 << 20);
            end = bytes.end;
        }
        assert_eq!(end, (200 << 20) + 8192 + 5 * 4096);
    }
}
