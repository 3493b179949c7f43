//! The scratch: where QEMU puts what the guest overwrites while a moment is fixed.
//!
//! It must never fail a guest's write. Before QEMU 10.1 a copy that finds no space does just that, so the
//! scratch is measured all the time and the capture given up while there is still room.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use model::{LogNumber, VmId};
use nix::sys::statvfs::statvfs;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::broadcast;
use tokio::time::{Instant, timeout_at};

use crate::disks::Disk;
use crate::error::{Error, ErrorClass};
use crate::names::Names;
use crate::qmp::{Command, Event, Qmp};

/// How often the scratch is measured.
pub(crate) const WATCH_INTERVAL: Duration = Duration::from_millis(50);
/// What must stay free on the scratch's file system: what a fast guest overwrites between two looks, and
/// while the capture is taken down.
const RESERVE_BYTES_MAX: u64 = 256 << 20;
/// The same for a small file system, as a part of its size.
const RESERVE_PART: u64 = 20;
/// How long QEMU may take to make the scratch files.
const CREATE_TIME: Duration = Duration::from_secs(30);

/// The scratch files of one capture.
#[derive(Debug, Clone)]
pub(crate) struct Scratch {
    pub dir: PathBuf,
    pub files: Vec<PathBuf>,
    pub limit_bytes: u64,
}

impl Scratch {
    /// The files that a capture will have; a directory that QEMU finds too, wherever it was started.
    pub fn plan(
        dir: &Path,
        limit_bytes: u64,
        names: &Names,
        next: LogNumber,
        disks: usize,
    ) -> Result<Self, Error> {
        let failed =
            |source| Error::Scratch { what: "use the scratch directory", path: dir.to_owned(), source };
        let dir = dir.canonicalize().map_err(failed)?;
        let files = (0..disks).map(|disk| dir.join(names.scratch_file(next, disk))).collect();
        Ok(Self { dir, files, limit_bytes })
    }

    /// What the files take on their file system.
    pub fn used_bytes(&self) -> Result<u64, Error> {
        let mut used_bytes = 0;
        for path in &self.files {
            match path.metadata() {
                Ok(metadata) => used_bytes += metadata.blocks() * 512,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(source) => return Err(Error::Scratch { what: "measure", path: path.clone(), source }),
            }
        }
        Ok(used_bytes)
    }

    /// An error once the scratch is past its bound.
    pub fn check(&self) -> Result<(), Error> {
        let used_bytes = self.used_bytes()?;
        let stat = statvfs(&self.dir).map_err(|errno| Error::Scratch {
            what: "ask for the free space of",
            path: self.dir.clone(),
            source: errno.into(),
        })?;
        let reserve_bytes = (stat.blocks() * stat.fragment_size() / RESERVE_PART).min(RESERVE_BYTES_MAX);
        let free_bytes = stat.blocks_available() * stat.fragment_size();
        if used_bytes > self.limit_bytes || free_bytes < reserve_bytes {
            let (dir, limit_bytes) = (self.dir.clone(), self.limit_bytes);
            return Err(Error::ScratchFull { dir, used_bytes, free_bytes, limit_bytes, reserve_bytes });
        }
        Ok(())
    }

    /// Removes the files.
    pub fn remove(&self) -> Result<(), Error> {
        self.files.iter().try_for_each(|path| remove_file(path))
    }
}

/// Removes the scratch files that an earlier capture of this VM left in `dir`; gives how many there were.
/// No capture of it may be open.
pub fn remove_scratch(dir: &Path, vm: VmId) -> Result<usize, Error> {
    remove_leftovers(dir, &Names::new(vm))
}

pub(crate) fn has_leftovers(dir: &Path, names: &Names) -> Result<bool, Error> {
    leftovers(dir, names).map(|files| !files.is_empty())
}

pub(crate) fn remove_leftovers(dir: &Path, names: &Names) -> Result<usize, Error> {
    let files = leftovers(dir, names)?;
    files.iter().try_for_each(|path| remove_file(path))?;
    Ok(files.len())
}

fn leftovers(dir: &Path, names: &Names) -> Result<Vec<PathBuf>, Error> {
    let failed = |source| Error::Scratch { what: "list the scratch directory", path: dir.to_owned(), source };
    let mut files = Vec::new();
    for entry in dir.read_dir().map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if is_scratch(&path, names) {
            files.push(path);
        }
    }
    Ok(files)
}

/// Whether a file is a scratch of this VM, by its name.
pub(crate) fn is_scratch(path: &Path, names: &Names) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| names.is_ours(name) && name.ends_with(".qcow2"))
}

pub(crate) fn remove_file(path: &Path) -> Result<(), Error> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        outcome => outcome.map_err(|source| Error::Scratch { what: "remove", path: path.to_owned(), source }),
    }
}

/// Has QEMU make the files and attaches an overlay for each disk, all disks side by side. QEMU makes them
/// itself so that they are its own, whatever user it runs as.
pub(crate) async fn attach(qmp: &Qmp, names: &Names, scratch: &Scratch, disks: &[Disk]) -> Result<(), Error> {
    let mut events = qmp.events();
    let create = |disk: usize, options: serde_json::Value| {
        Command::new("blockdev-create", json!({"job-id": names.create_job(disk), "options": options}))
    };
    let dismiss = |disk| Command::new("job-dismiss", json!({"id": names.create_job(disk)}));
    let files = scratch.files.iter().enumerate();
    let file = |path: &PathBuf| json!({"driver": "file", "filename": path, "size": 0});
    qmp.run_all(files.clone().map(|(i, path)| create(i, file(path))).collect()).await?;
    concluded(qmp, names, &mut events).await?;

    // Nobody needs the scratch after a crash: not one flush of it may delay the guest.
    let cache = json!({"no-flush": true});
    let mut commands = Vec::new();
    for ((i, path), disk) in files.zip(disks) {
        let node = json!({"driver": "file", "node-name": names.file(i), "filename": path, "cache": cache});
        let format = json!({"driver": "qcow2", "file": names.file(i), "size": disk.size_bytes});
        commands.extend([dismiss(i), Command::new("blockdev-add", node), create(i, format)]);
    }
    qmp.run_all(commands).await?;
    concluded(qmp, names, &mut events).await?;

    let mut commands = Vec::new();
    for (i, disk) in disks.iter().enumerate() {
        let overlay = json!({
            "driver": "qcow2", "node-name": names.overlay(i), "file": names.file(i),
            "backing": disk.block_node, "cache": cache,
        });
        commands.extend([dismiss(i), Command::new("blockdev-add", overlay)]);
    }
    qmp.run_all(commands).await.map(drop)
}

#[derive(Deserialize)]
struct Job {
    id: String,
    status: String,
    error: Option<String>,
}

/// Waits until all our jobs have come to their end, and to a good one.
async fn concluded(qmp: &Qmp, names: &Names, events: &mut broadcast::Receiver<Event>) -> Result<(), Error> {
    let deadline = Instant::now() + CREATE_TIME;
    loop {
        let mut jobs: Vec<Job> = qmp.ask(Command::bare("query-jobs")).await?;
        jobs.retain(|job| names.is_ours(&job.id));
        if let Some(Job { error: Some(desc), id, .. }) = jobs.iter().find(|job| job.error.is_some()) {
            let command = format!("blockdev-create ({id})");
            return Err(Error::Refused { command, class: ErrorClass::Generic, desc: desc.clone() });
        }
        if jobs.iter().all(|job| job.status == "concluded") {
            return Ok(());
        }
        // An event missed is no harm: the next look asks QEMU itself.
        let timed_out = timeout_at(deadline, events.recv()).await.is_err();
        if timed_out {
            return Err(Error::Timeout { command: "blockdev-create".into(), after: CREATE_TIME });
        }
        if !qmp.is_alive() {
            return Err(qmp.closed().await);
        }
    }
}
