//! What is known of a recovered VM: `recovery.json` in its folder.

use std::path::{Path, PathBuf};

use boot::Live;
use model::{DiskName, Timestamp, VmName};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::clock::rfc3339;
use crate::failure::{Code, Failure};

const FILE: &str = "recovery.json";

/// A VM that runs, or ran, from a backup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Recovery {
    /// The VM.
    pub vm: VmName,
    /// The backup.
    pub backup: String,
    /// The repository's name.
    pub repository: String,
    /// The moment that the backup holds.
    pub taken_at: Timestamp,
    /// The VM's definition.
    pub definition: Value,
    /// Its cards have their cables.
    pub connected: bool,
    /// Its disks.
    pub disks: Vec<RecoveredDisk>,
    /// The folder that its disks are being moved to, or were.
    pub to: Option<PathBuf>,
}

/// One disk of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RecoveredDisk {
    /// Its name.
    pub name: DiskName,
    /// Its size.
    pub size_bytes: u64,
    /// See [`boot::boot_rank`].
    pub boot_rank: u8,
    /// Where it is.
    pub place: Place,
}

/// Where a disk of a recovered VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Place {
    /// In its layer, over the backup.
    Layer,
    /// In the file that it is moved to, which has everything; QEMU may still have the layer open.
    Switching,
    /// In the file that it was moved to.
    Moved,
}

impl Recovery {
    /// What is known in the VM's folder; none if nothing is.
    pub fn read(live: &Live) -> Result<Option<Self>, Failure> {
        let path = live.path(FILE);
        match std::fs::read(&path) {
            Ok(json) => serde_json::from_slice(&json)
                .map(Some)
                .map_err(|error| Failure::new(Code::Io, format!("{}: {error}", path.display()))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Failure::io("read", &path, &error)),
        }
    }

    /// Writes it down, durably.
    pub fn write(&self, live: &Live) -> Result<(), Failure> {
        let text = serde_json::to_vec(self).expect("plain values can be written as JSON");
        Ok(live.keep(FILE, &text)?)
    }

    /// What its exports are called.
    pub fn export(&self) -> String {
        format!("recovery-{}", self.vm)
    }

    /// A disk's layer.
    pub fn layer(live: &Live, disk: &RecoveredDisk) -> PathBuf {
        live.path(&format!("{}.qcow2", disk.name))
    }

    /// The file that a disk is moved to.
    pub fn target(to: &Path, disk: &RecoveredDisk) -> PathBuf {
        to.join(format!("{}.qcow2", disk.name))
    }

    /// The file that has the disk now.
    pub fn current(&self, live: &Live, disk: &RecoveredDisk) -> PathBuf {
        match (&self.to, disk.place) {
            (Some(to), Place::Switching | Place::Moved) => Self::target(to, disk),
            _ => Self::layer(live, disk),
        }
    }

    /// Whether it needs nothing of ours any more.
    pub fn is_moved(&self) -> bool {
        self.disks.iter().all(|disk| disk.place == Place::Moved)
    }

    /// As commands show it.
    pub fn shown(&self, live: &Live) -> Value {
        let disk = |disk: &RecoveredDisk| {
            json!({
                "name": disk.name, "path": self.current(live, disk), "format": "qcow2",
                "moved": disk.place == Place::Moved,
            })
        };
        let process = live.process();
        json!({
            "vm": self.vm, "backup": self.backup, "repository": self.repository,
            "taken_at": rfc3339(self.taken_at), "connected": self.connected,
            "running": process.is_some(), "process": process, "moved": self.is_moved(), "to": self.to,
            "disks": self.disks.iter().map(disk).collect::<Vec<_>>(),
            "qmp": live.people(), "console": live.console(), "screen": live.screen(),
            "guest_agent": live.agent(),
        })
    }
}
