//! Restoring disks from a backup.
//!
//! Chunks are read, checked against their hashes and written at their places, on all cores; holes are never
//! written. The list itself is checked against the manifest's digest first. Every file has a name ending in
//! `.partial` until all disks are restored and durable; so a file with a disk's name is a whole disk, or with
//! `keep_going` one whose damaged ranges are in the report.

mod onto;
mod qcow2;
mod target;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use model::DiskName;
use serde::{Deserialize, Serialize};
use steps::durable_step;

use crate::backup::Progress;
use crate::direct::Aligned;
use crate::error::{Error, ErrorKind, Unread};
use crate::info::BackupInfo;
use crate::list::{self, Chunk, Stretch, index_of};
use crate::lock::Lock;
use crate::manifest::BackupDisk;
use crate::parallel;
use crate::{Repository, reader};
pub use onto::{Onto, OntoDisk, OntoOptions, OntoReport};
use target::Target;

/// The format of restored disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// A flat image, sparse where the disk is zero.
    #[default]
    Raw,
    /// QEMU's qcow2.
    Qcow2,
    /// Hyper-V's VHDX; needs the program `qemu-img`.
    Vhdx,
}

impl Format {
    /// The ending of file names.
    #[must_use]
    pub const fn extension(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vhdx => "vhdx",
        }
    }
}

/// What to restore, and to where.
#[derive(Debug, Clone)]
pub struct RestoreOptions {
    /// The folder; made if it is not there. Files are `<disk>.<format>`.
    pub to: PathBuf,
    /// Their format.
    pub format: Format,
    /// Only these disks; none means all.
    pub disks: Option<Vec<DiskName>>,
    /// Restore what is unharmed, and leave zeros in place of what is damaged.
    pub keep_going: bool,
    /// Replace files that are there.
    pub overwrite: bool,
}

impl RestoreOptions {
    /// All disks into this folder, as raw images, with nothing overwritten or left out.
    pub fn to(folder: impl Into<PathBuf>) -> Self {
        Self { to: folder.into(), format: Format::Raw, disks: None, keep_going: false, overwrite: false }
    }
}

/// A range of a disk that could not be restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedRange {
    /// Which disk.
    pub disk: DiskName,
    /// Where it begins.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
    /// What is wrong.
    pub why: String,
}

/// A disk that was restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoredDisk {
    /// Its name.
    pub name: DiskName,
    /// The file.
    pub path: PathBuf,
    /// The disk's size.
    pub size_bytes: u64,
}

/// What a restore came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RestoreReport {
    /// The disks.
    pub disks: Vec<RestoredDisk>,
    /// What was left out, with `keep_going`; zeros are in its place.
    pub damaged: Vec<DamagedRange>,
    /// Bytes that were written: the disks without their holes.
    pub bytes_written: u64,
    /// How long it took.
    pub seconds: f64,
}

/// So much is read and then written at a time: neighbours go to the file together.
const STRETCH_BYTES: u64 = 4 << 20;

/// A disk on its way.
struct Job {
    disk: BackupDisk,
    list: Vec<Chunk>,
    partial: PathBuf,
    path: PathBuf,
}

impl Repository {
    /// Restores disks of a backup into a folder.
    pub fn restore(
        &self,
        backup: &BackupInfo,
        options: &RestoreOptions,
        progress: &dyn Fn(Progress),
        cancel: &AtomicBool,
    ) -> Result<RestoreReport, Error> {
        let began = Instant::now();
        if options.format == Format::Vhdx {
            target::check_qemu_img()?;
        }
        let _lock = self.lock_to_read()?;
        self.load_index()?;
        let jobs = self.restore_jobs(backup, options)?;
        fs::create_dir_all(&options.to)
            .map_err(|source| Error::io("cannot make the folder", &options.to, source))?;
        let result = self.restore_all(backup, &jobs, options, progress, cancel);
        if result.is_err() {
            for job in &jobs {
                let _ = fs::remove_file(&job.partial);
            }
        }
        let (damaged, bytes_written) = result?;
        let restored =
            |job: Job| RestoredDisk { name: job.disk.name, path: job.path, size_bytes: job.disk.size_bytes };
        Ok(RestoreReport {
            disks: jobs.into_iter().map(restored).collect(),
            damaged,
            bytes_written,
            seconds: began.elapsed().as_secs_f64(),
        })
    }

    /// A shared lock; a repository that cannot be written to is read without.
    pub(crate) fn lock_to_read(&self) -> Result<Option<Lock>, Error> {
        match Lock::shared(&self.store) {
            Ok(lock) => Ok(Some(lock)),
            Err(error) if matches!(error.kind(), ErrorKind::Io | ErrorKind::NoSpace | ErrorKind::Denied) => {
                tracing::info!(%error, "reading the repository without a lock");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn restore_jobs(&self, backup: &BackupInfo, options: &RestoreOptions) -> Result<Vec<Job>, Error> {
        let unread = |unread: Unread| unread.of_backup(backup.id);
        for name in options.disks.iter().flatten() {
            backup.disk(name)?;
        }
        let mut files = self.read_tree(&backup.tree).map_err(unread)?;
        let wanted =
            |disk: &&BackupDisk| options.disks.as_ref().is_none_or(|names| names.contains(&disk.name));
        let mut jobs = Vec::new();
        for disk in backup.disks.iter().filter(wanted) {
            let path = options.to.join(format!("{}.{}", disk.name, options.format.extension()));
            if !options.overwrite && path.exists() {
                return Err(Error::FileExists { path });
            }
            jobs.push(Job {
                disk: disk.clone(),
                list: self.disk_list(&mut files, disk).map_err(unread)?,
                partial: with_suffix(&path, ".partial"),
                path,
            });
        }
        Ok(jobs)
    }

    fn restore_all(
        &self,
        backup: &BackupInfo,
        jobs: &[Job],
        options: &RestoreOptions,
        progress: &dyn Fn(Progress),
        cancel: &AtomicBool,
    ) -> Result<(Vec<DamagedRange>, u64), Error> {
        let total_bytes = jobs.iter().map(|job| job.disk.size_bytes).fold(0, u64::saturating_add);
        let (mut damaged, mut bytes_written, mut done_bytes) = (Vec::new(), 0, 0);
        for job in jobs {
            let before = Progress { done_bytes, total_bytes, ..Progress::default() };
            bytes_written += self.restore_disk(
                backup,
                job,
                options,
                &mut damaged,
                &|done| {
                    progress(Progress { done_bytes: before.done_bytes + done, ..before });
                },
                cancel,
            )?;
            done_bytes += job.disk.size_bytes;
        }
        for job in jobs {
            if options.format == Format::Vhdx {
                target::convert_to_vhdx(&job.partial)?;
            }
            durable_step("repository::restore::naming");
            fs::rename(&job.partial, &job.path)
                .map_err(|source| Error::io("cannot name", &job.path, source))?;
            durable_step("repository::restore::named");
        }
        fs::File::open(&options.to)
            .and_then(|folder| folder.sync_all())
            .map_err(|source| Error::io("cannot sync", &options.to, source))?;
        durable_step("repository::restore::settled");
        Ok((damaged, bytes_written))
    }

    fn restore_disk(
        &self,
        backup: &BackupInfo,
        job: &Job,
        options: &RestoreOptions,
        damaged: &mut Vec<DamagedRange>,
        progress: &dyn Fn(u64),
        cancel: &AtomicBool,
    ) -> Result<u64, Error> {
        let failed = |source| Error::io("cannot write", &job.partial, source);
        let stretches = list::data_stretches(&job.list, STRETCH_BYTES);
        let target =
            Target::create(&job.partial, options.format, job.disk.size_bytes, &stretches).map_err(failed)?;
        let (done, written) = (AtomicU64::new(0), AtomicU64::new(0));
        let found = Mutex::new(Vec::new());
        let work = |(tools, buffer): &mut (reader::Tools, Aligned), stretch: &Stretch| {
            let bytes = &stretch.bytes;
            let raw = buffer.room(index_of(bytes.end - bytes.start));
            for damage in self.read_stretch(job, stretch, tools, raw)? {
                if !options.keep_going {
                    let DamagedRange { disk, offset, len, why } = damage;
                    return Err(Error::ChunkDamaged { backup: backup.id.short(), disk, offset, len, why });
                }
                found.lock().unwrap_or_else(PoisonError::into_inner).push(damage);
            }
            let wrote = target.write(bytes.start, raw).map_err(failed)?;
            written.fetch_add(wrote, Ordering::Relaxed);
            done.fetch_add(bytes.end - bytes.start, Ordering::Relaxed);
            Ok(())
        };
        let tools = (0..parallel::threads())
            .map(|_| Ok((reader::Tools::new(self.store.cipher())?, Aligned::default())))
            .collect::<std::io::Result<Vec<_>>>()
            .map_err(failed)?;
        parallel::for_each(&stretches, tools, &work, &|| progress(done.load(Ordering::Relaxed)), cancel)?;
        durable_step("repository::restore::written");
        target.make_durable().map_err(failed)?;
        durable_step("repository::restore::synced");
        damaged.extend(joined(found.into_inner().unwrap_or_else(PoisonError::into_inner)));
        Ok(written.into_inner())
    }

    /// Reads neighbouring chunks into `raw`, with zeros in place of what is damaged, and says what is.
    fn read_stretch(
        &self,
        job: &Job,
        stretch: &Stretch,
        tools: &mut reader::Tools,
        raw: &mut [u8],
    ) -> Result<Vec<DamagedRange>, Error> {
        let (mut offset, mut rest) = (stretch.bytes.start, raw);
        let mut damaged = Vec::new();
        for chunk in &job.list[stretch.chunks.clone()] {
            let (place, more) = rest.split_at_mut(index_of(chunk.bytes()));
            if let Err(unread) = self.read_chunk(tools, &chunk.id, place) {
                let why = unread.damage()?;
                place.fill(0);
                damaged.push(DamagedRange { disk: job.disk.name.clone(), offset, len: chunk.bytes(), why });
            }
            (offset, rest) = (offset + chunk.bytes(), more);
        }
        Ok(damaged)
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Damaged chunks of one disk in order, neighbours with the same cause as one.
pub(crate) fn joined(mut ranges: Vec<DamagedRange>) -> Vec<DamagedRange> {
    ranges.sort_by_key(|range| range.offset);
    let mut joined: Vec<DamagedRange> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.offset + last.len == range.offset && last.why == range.why => {
                last.len += range.len;
            }
            _ => joined.push(range),
        }
    }
    joined
}
