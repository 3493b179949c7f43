//! Making a backup.
//!
//! ```text
//!  plan ──stretches with data──▶ workers (all cores) ──sealed chunks──▶ the open pack ──full──▶ writers
//!  which chunks, and which of     read, hash, known? compress,                            hash, write, fsync,
//!  them have data                 encrypt                                                 index file
//! ```
//!
//! Every arrow is a bounded queue, so memory is: chunks being worked on, one pack being filled and two being
//! written, and each disk's list of chunks. The first error stops everything. The order at the end is what
//! invariant 7 rests on; `model::backup` keeps it.

mod packer;
mod plan;
mod run;

use std::io;
use std::sync::atomic::AtomicBool;
use std::time::{Instant, SystemTime};

use model::backup::{Closing, close};
use model::{PointInfo, PolicyName, Timestamp, VmId, VmName};

use crate::Repository;
use crate::direct::Aligned;
use crate::error::Error;
use crate::id::{BackupId, Id};
use crate::info::{BackupInfo, Description, POLICY_TAG, TAG};
use crate::list;
use crate::lock::Lock;
use crate::manifest::{self, BackupDisk, DEFINITION_FILE, MANIFEST_FILE, Manifest};
use crate::pack::{BlobKind, PackBuilder};
use crate::rustic::{RunSummary, Snapshot};
use crate::source::Source;
use crate::storage::FileKind;
use crate::tree::{self, TreeFile};
pub(crate) use packer::Packer;
use packer::TreeBlob;
use run::Run;

/// What is known of a backup before it is made.
#[derive(Debug, Clone)]
pub struct BackupMeta {
    /// The VM.
    pub vm: VmId,
    /// Its name; `restic snapshots` shows it as the host.
    pub vm_name: VmName,
    /// The recovery point that the source shows.
    pub point: PointInfo,
    /// The VM's definition, kept beside the disks.
    pub definition: serde_json::Value,
    /// The policy that it is made by; a person asked for it if there is none.
    pub policy: Option<PolicyName>,
}

/// How far a backup or a restore is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Bytes of disk that are done.
    pub done_bytes: u64,
    /// Bytes of disk to do: for an incremental backup, only what has changed.
    pub total_bytes: u64,
    /// Bytes read from the source.
    pub read_bytes: u64,
    /// Bytes added to the repository.
    pub added_bytes: u64,
}

/// What a backup came to.
#[derive(Debug, Clone, PartialEq)]
pub struct BackupReport {
    /// The backup.
    pub backup: BackupInfo,
    /// Bytes read from the source.
    pub bytes_read: u64,
    /// Bytes that the repository grew by.
    pub bytes_added: u64,
    /// Chunks of all disks.
    pub chunks: u64,
    /// Chunks that were looked at; the others were taken over from the parent or are holes.
    pub chunks_read: u64,
    /// Chunks that the repository did not have.
    pub chunks_added: u64,
    /// Disks that were backed up incrementally.
    pub incremental_disks: usize,
    /// How long it took.
    pub seconds: f64,
}

impl Repository {
    /// Backs up what `source` shows. With a `parent` (an earlier backup of the same VM) only chunks that
    /// have changed since are read; a parent that does not serve costs time, never correctness.
    ///
    /// `progress` is called now and then on this thread; set `cancel` to stop.
    pub fn backup(
        &self,
        source: &dyn Source,
        meta: BackupMeta,
        parent: Option<&BackupInfo>,
        progress: &dyn Fn(Progress),
        cancel: &AtomicBool,
    ) -> Result<BackupReport, Error> {
        let (began, made_at) = (Instant::now(), Timestamp::from(SystemTime::now()));
        check_admission(source, &meta)?;
        let lock = Lock::shared(&self.store)?;
        self.load_index()?;
        // What is found there is built on; a power cut may not take it away again.
        self.store.settle(FileKind::Index)?;
        let parent = parent.filter(|parent| serves(parent, &meta));
        let plans = self.plan_disks(source, parent)?;

        let packer = Packer::new(&self.store, &self.index);
        let run = Run::new(source, &plans, &packer, cancel)?;
        let ending = Ending {
            repository: self,
            source,
            run,
            packer: &packer,
            lock: &lock,
            meta,
            parent: parent.map(|parent| parent.id),
            progress,
            began,
            made_at,
            stored: None,
        };
        close(ending)
    }

    /// When all chunks are packed: the definition, the manifest and the tree that names everything.
    fn finish_blobs(
        &self,
        run: &Run<'_>,
        source: &dyn Source,
        meta: &BackupMeta,
        made_at: Timestamp,
        full: &mut dyn FnMut(PackBuilder) -> Result<(), Error>,
    ) -> Result<(Vec<BackupDisk>, Id), Error> {
        let encode = |error: serde_json::Error| self.store.failed_here("cannot encode a backup for", error);
        let compress = |error: io::Error| self.store.failed_here("cannot compress for", error);
        let (mut disks, mut files) = (Vec::new(), Vec::new());
        for (disk, plan) in source.disks().iter().zip(run.plans) {
            let list = plan.finished_list();
            run.store_zeros(&list, full)?;
            let known = BackupDisk {
                name: disk.name.clone(),
                size_bytes: disk.size_bytes,
                chunks: list.len() as u64,
                digest: list::digest(disk.size_bytes, &list),
            };
            let lengths = list::encode_lengths(&list);
            files.push(TreeFile {
                name: known.lengths_file(),
                size_bytes: lengths.len() as u64,
                content: run.store_file(&lengths, full)?,
            });
            files.push(TreeFile {
                name: known.raw_file(),
                size_bytes: disk.size_bytes,
                content: list.into_iter().map(|chunk| chunk.id).collect(),
            });
            disks.push(known);
        }
        let manifest = manifest_of(meta, made_at, disks.clone());
        let manifest_json = serde_json::to_vec_pretty(&manifest).map_err(encode)?;
        let definition_json = serde_json::to_vec_pretty(&meta.definition).map_err(encode)?;
        for (name, json) in [(MANIFEST_FILE, manifest_json), (DEFINITION_FILE, definition_json)] {
            let content = run.store_file(&json, full)?;
            files.push(TreeFile { name: name.into(), size_bytes: json.len() as u64, content });
        }
        let mut blob = TreeBlob::new(self.store.cipher().clone()).map_err(compress)?;
        tree::encode(&files.iter().collect::<Vec<_>>(), meta.point.taken_at, &mut blob).map_err(compress)?;
        drop(files);
        let blob = blob.finish().map_err(compress)?;
        let id = blob.id;
        if self.index().tree(&id).is_none_or(|location| !location.present) {
            let mut pack = PackBuilder::new(BlobKind::Tree, Aligned::default());
            pack.add(&blob.sealed());
            full(pack)?;
        }
        Ok((disks, id))
    }

    /// What a listing shows of a backup.
    pub(crate) fn describe(&self, backup: &BackupInfo) -> Result<String, Error> {
        let meta = BackupMeta {
            vm: backup.vm,
            vm_name: backup.vm_name.clone(),
            point: backup.point,
            definition: serde_json::Value::Null,
            policy: None,
        };
        let description = Description {
            manifest: manifest_of(&meta, backup.made_at, backup.disks.clone()),
            bytes_read: backup.bytes_read,
            bytes_added: backup.bytes_added,
            seconds: backup.seconds,
        };
        serde_json::to_string(&description)
            .map_err(|error| self.store.failed_here("cannot encode a backup for", error))
    }

    /// Writes the snapshot file. From here on the backup is listed.
    fn list_backup(
        &self,
        backup: &BackupInfo,
        packer: &Packer<'_>,
        chunks_added: u64,
    ) -> Result<BackupId, Error> {
        let description = self.describe(backup)?;
        let consistency = match backup.point.consistency {
            model::Consistency::Application => "application",
            model::Consistency::Crash => "crash",
        };
        let mut tags = vec![
            TAG.into(),
            format!("vm:{}", backup.vm),
            format!("point:{}", backup.point.id),
            format!("number:{}", backup.point.number),
            consistency.into(),
        ];
        tags.extend(backup.policy.as_ref().map(|policy| format!("{POLICY_TAG}{policy}")));
        let snapshot = Snapshot {
            tree: backup.tree,
            time: backup.point.taken_at,
            hostname: backup.vm_name.to_string(),
            tags,
            paths: backup.disks.iter().map(|disk| format!("/{}", disk.raw_file())).collect(),
            parent: backup.parent.map(|parent| parent.0),
            description: Some(description),
        };
        let summary = RunSummary {
            began: backup.made_at,
            ended: Timestamp::from(SystemTime::now()),
            disks: backup.disks.len() as u64,
            disk_bytes: backup.disk_bytes(),
            raw_bytes_added: packer.raw_bytes_added(),
            packed_bytes_added: packer.bytes_added(),
            chunks_added,
        };
        self.store.write_snapshot(snapshot, summary).map(BackupId)
    }
}

/// To a millisecond: what is written down in JSON is read as the same.
pub(crate) fn seconds_since(began: Instant) -> f64 {
    (began.elapsed().as_secs_f64() * 1000.0).round() / 1000.0
}

fn manifest_of(meta: &BackupMeta, made_at: Timestamp, disks: Vec<BackupDisk>) -> Manifest {
    Manifest {
        format: manifest::FORMAT,
        vm: meta.vm,
        vm_name: meta.vm_name.clone(),
        point: meta.point.id,
        number: meta.point.number,
        taken_at: meta.point.taken_at,
        consistency: meta.point.consistency,
        made_at,
        disks,
    }
}

/// A backup while it is made; the order of its end is `model::backup`'s.
struct Ending<'a> {
    repository: &'a Repository,
    source: &'a dyn Source,
    run: Run<'a>,
    packer: &'a Packer<'a>,
    lock: &'a Lock,
    meta: BackupMeta,
    parent: Option<BackupId>,
    progress: &'a dyn Fn(Progress),
    began: Instant,
    made_at: Timestamp,
    /// The disks and the tree, once they are durable.
    stored: Option<(Vec<BackupDisk>, Id)>,
}

impl Closing for Ending<'_> {
    type Error = Error;
    type Listed = BackupReport;

    fn store(&mut self) -> Result<(), Error> {
        let last = |run: &Run<'_>, full: &mut dyn FnMut(PackBuilder) -> Result<(), Error>| {
            self.repository.finish_blobs(run, self.source, &self.meta, self.made_at, full)
        };
        self.stored = Some(self.run.execute(self.progress, &last)?);
        Ok(())
    }

    fn index(&mut self) -> Result<(), Error> {
        self.packer.write_index()
    }

    fn check_source(&mut self) -> Result<(), Error> {
        self.source.still_valid().map_err(|why| Error::Revoked { why })
    }

    fn check_run(&mut self) -> Result<(), Error> {
        self.run.check_cancel()?;
        self.lock.check()
    }

    fn list(self) -> Result<BackupReport, Error> {
        let (disks, tree) = self.stored.ok_or(Error::Cancelled)?;
        let counts = self.run.counts();
        let mut backup = BackupInfo {
            id: BackupId(tree),
            vm: self.meta.vm,
            vm_name: self.meta.vm_name,
            point: self.meta.point,
            made_at: self.made_at,
            disks,
            parent: self.parent,
            bytes_read: counts.read_bytes,
            bytes_added: self.packer.bytes_added(),
            seconds: seconds_since(self.began),
            policy: self.meta.policy,
            tree,
        };
        backup.id = self.repository.list_backup(&backup, self.packer, counts.chunks_added)?;
        Ok(BackupReport {
            bytes_read: backup.bytes_read,
            bytes_added: backup.bytes_added,
            chunks: backup.disks.iter().map(|disk| disk.chunks).sum(),
            chunks_read: counts.chunks_read,
            chunks_added: counts.chunks_added,
            incremental_disks: self.run.plans.iter().filter(|plan| plan.incremental).count(),
            seconds: self.began.elapsed().as_secs_f64(),
            backup,
        })
    }
}

/// A parent serves if it is of the same VM and of no later point: what has changed since a later point
/// says nothing of what lies between.
fn serves(parent: &BackupInfo, meta: &BackupMeta) -> bool {
    parent.vm == meta.vm && parent.point.number <= meta.point.number
}

/// The gate's admission must be for what the backup will say it is.
fn check_admission(source: &dyn Source, meta: &BackupMeta) -> Result<(), Error> {
    let admission = source.admission();
    if admission.vm() != meta.vm || admission.point() != meta.point.number {
        return Err(Error::NotAdmitted {
            admitted_vm: admission.vm(),
            admitted_point: admission.point(),
            vm: meta.vm,
            point: meta.point.number,
        });
    }
    let mut names: Vec<_> = source.disks().iter().map(|disk| &disk.name).collect();
    names.sort();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(Error::Unsupported { what: format!("two disks are called {}", pair[0]) }),
        None => Ok(()),
    }
}
