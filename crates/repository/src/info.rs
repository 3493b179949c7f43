//! Which backups there are.

use model::{DiskName, PointInfo, PolicyName, Timestamp, VmId, VmName};
use serde::{Deserialize, Serialize};

use crate::Repository;
use crate::error::{Error, Unread};
use crate::id::{BackupId, Id};
use crate::manifest::{BackupDisk, FORMAT, MANIFEST_FILE, Manifest};
use crate::rustic::Snapshot;
use crate::storage::FileKind;

/// The tag that all our snapshots have.
pub(crate) const TAG: &str = "afterimage";
/// What the tag begins with that names the policy which a backup was made by.
pub(crate) const POLICY_TAG: &str = "policy:";

/// One backup: all disks of one VM at one recovery point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackupInfo {
    /// Its id: restic's snapshot id.
    pub id: BackupId,
    /// The VM.
    pub vm: VmId,
    /// The VM's name when the backup was made.
    pub vm_name: VmName,
    /// The recovery point that it holds.
    pub point: PointInfo,
    /// When it was made.
    pub made_at: Timestamp,
    /// Its disks.
    pub disks: Vec<BackupDisk>,
    /// The backup whose chunks it took over, if it was an incremental one.
    pub parent: Option<BackupId>,
    /// Bytes that were read for it; zero if that is not known any more.
    pub bytes_read: u64,
    /// Bytes that the repository grew by; zero if that is not known any more.
    pub bytes_added: u64,
    /// Seconds that it took; zero if that is not known any more.
    pub seconds: f64,
    /// The policy that it was made by; a person asked for it if there is none.
    #[serde(default)]
    pub policy: Option<PolicyName>,
    pub(crate) tree: Id,
}

impl BackupInfo {
    /// Bytes of all its disks.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        self.disks.iter().map(|disk| disk.size_bytes).fold(0, u64::saturating_add)
    }

    /// One of its disks.
    pub(crate) fn disk(&self, name: &DiskName) -> Result<&BackupDisk, Error> {
        self.disks.iter().find(|disk| disk.name == *name).ok_or_else(|| {
            let known: Vec<_> = self.disks.iter().map(|disk| disk.name.as_str()).collect();
            let what = format!("backup {} has no disk {name}; it has: {}", self.id.short(), known.join(", "));
            Error::Unsupported { what }
        })
    }
}

/// What the snapshot file itself says of the backup, so that listing reads nothing else.
#[derive(Serialize, Deserialize)]
pub(crate) struct Description {
    pub(crate) manifest: Manifest,
    #[serde(default)]
    pub(crate) bytes_read: u64,
    #[serde(default)]
    pub(crate) bytes_added: u64,
    #[serde(default)]
    pub(crate) seconds: f64,
}

impl Repository {
    /// The backups, of one VM or of all, oldest point first. Snapshots that other programs made are not
    /// ours and not listed; a damaged one is passed over with a warning ([`Repository::verify`] names it).
    pub fn backups(&self, vm: Option<VmId>) -> Result<Vec<BackupInfo>, Error> {
        let mut found = Vec::new();
        for id in self.store.list(FileKind::Snapshot)? {
            match self.backup_info(&id) {
                Ok(Some(info)) if vm.is_none_or(|vm| vm == info.vm) => found.push(info),
                Ok(_) => {}
                Err(unread) => {
                    let why = unread.damage()?;
                    tracing::warn!(backup = %BackupId(id).short(), why, "a backup is damaged");
                }
            }
        }
        found.sort_by_key(|info| (info.point.taken_at, info.made_at, info.id));
        Ok(found)
    }

    /// The one backup whose id begins with these digits.
    pub fn find(&self, prefix: &str) -> Result<BackupInfo, Error> {
        let wanted = prefix.to_ascii_lowercase();
        let mut ids = self.store.list(FileKind::Snapshot)?;
        ids.retain(|id| !wanted.is_empty() && id.to_string().starts_with(&wanted));
        let not_found = || Error::BackupNotFound { at: self.at().to_owned(), id: prefix.to_owned() };
        let [id] = ids[..] else {
            if ids.is_empty() {
                return Err(not_found());
            }
            let shown: Vec<_> = ids.iter().take(4).map(|id| BackupId(*id).short()).collect();
            return Err(Error::BackupAmbiguous {
                id: prefix.to_owned(),
                count: ids.len(),
                candidates: shown.join(", "),
            });
        };
        self.backup_info(&id).map_err(|unread| unread.of_backup(BackupId(id)))?.ok_or_else(not_found)
    }

    /// The backup in this snapshot; none if it is not one of ours.
    pub(crate) fn backup_info(&self, id: &Id) -> Result<Option<BackupInfo>, Unread> {
        let snapshot = self.store.read_snapshot(id).map_err(|unread| {
            unread.damaged(|why| format!("its snapshot file {} cannot be read: {why}", BackupId(*id).short()))
        })?;
        if !snapshot.tags.iter().any(|tag| tag == TAG) {
            return Ok(None);
        }
        let described = snapshot.description.as_deref().and_then(|json| serde_json::from_str(json).ok());
        let description = match described {
            Some(description) => description,
            // 'restic tag' and its like keep only what they know.
            None => Description {
                manifest: self.manifest_in_tree(&snapshot)?,
                bytes_read: 0,
                bytes_added: 0,
                seconds: 0.0,
            },
        };
        let manifest = description.manifest;
        if manifest.format != FORMAT {
            return Err(format!(
                "its manifest has format {}, this program knows {FORMAT}; use the Afterimage that made it",
                manifest.format
            )
            .into());
        }
        Ok(Some(BackupInfo {
            id: BackupId(*id),
            vm: manifest.vm,
            vm_name: manifest.vm_name.clone(),
            point: manifest.point_info(),
            made_at: manifest.made_at,
            disks: manifest.disks,
            parent: snapshot.parent.map(BackupId),
            bytes_read: description.bytes_read,
            bytes_added: description.bytes_added,
            seconds: description.seconds,
            policy: snapshot.tags.iter().find_map(|tag| tag.strip_prefix(POLICY_TAG)?.parse().ok()),
            tree: snapshot.tree,
        }))
    }

    fn manifest_in_tree(&self, snapshot: &Snapshot) -> Result<Manifest, Unread> {
        self.load_index()?;
        let files = self.read_tree(&snapshot.tree)?;
        let json = self.read_small_file(&files, MANIFEST_FILE)?;
        serde_json::from_slice(&json).map_err(|error| format!("its manifest is not one: {error}").into())
    }
}
