//! What a backup reads, as the repository wants to see it: the only way from a replica's disks into a
//! repository, and it needs an admission of the gate.

use std::io;
use std::ops::Range;

use model::gate::Admission;
use model::{LogNumber, PointInfo};
use replica::{ConsistentView, Store};
use repository::{BackupInfo, Source, SourceDisk};

use crate::failure::Failure;

/// A view of a replica that is backed up, with the hold behind it if the flat files are read.
pub(crate) struct Opened {
    view: ConsistentView,
    disks: Vec<SourceDisk>,
    parent: Option<PointInfo>,
    hold: Option<String>,
    store: Store,
}

impl Opened {
    pub fn new(store: &Store, view: ConsistentView, hold: Option<String>) -> Self {
        let disks = view.disks().into_iter();
        let disks = disks.map(|disk| SourceDisk { name: disk.name, size_bytes: disk.size_bytes }).collect();
        Self { view, disks, parent: None, hold, store: store.clone() }
    }

    /// The newest of these backups that an incremental one can build on: of a point that this very chain
    /// went through, not newer than the one that is shown.
    pub fn choose_parent(&mut self, backups: Vec<BackupInfo>) -> Result<Option<BackupInfo>, Failure> {
        let knows = |id| self.view.knows_changes_since(id);
        let newest = model::backup::choose_parent(backups, |backup| backup.point, knows)?;
        self.parent = newest.as_ref().map(|backup| backup.point);
        Ok(newest)
    }
}

impl Drop for Opened {
    /// However the backup ended: a hold that stays keeps applies away.
    fn drop(&mut self) {
        if let Some(hold) = self.hold.take()
            && let Err(error) = self.store.release(&hold)
        {
            tracing::warn!(hold, %error, "a hold could not be released; it ends by itself");
        }
    }
}

impl Source for Opened {
    fn admission(&self) -> &Admission {
        self.view.admission()
    }

    fn disks(&self) -> &[SourceDisk] {
        &self.disks
    }

    fn data_extents(&self, disk: usize, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        self.view.data_extents(&self.disks[disk].name, range).map_err(io::Error::other)
    }

    fn changed_since(&self, disk: usize, parent: LogNumber) -> io::Result<Option<Vec<Range<u64>>>> {
        match self.parent {
            Some(point) if point.number == parent => {
                self.view.changed_since(&self.disks[disk].name, point.id).map_err(io::Error::other)
            }
            _ => Ok(None),
        }
    }

    fn read_at(&self, disk: usize, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.view.read_at(&self.disks[disk].name, offset, buffer).map_err(io::Error::other)
    }

    fn still_valid(&self) -> Result<(), String> {
        self.view.still_valid().map_err(|error| error.to_string())
    }
}
