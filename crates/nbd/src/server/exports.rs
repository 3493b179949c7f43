//! Which disks a server shows, by name, and who uses them.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock, Weak};

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::codec::{ExportFlags, NAME_BYTES_MAX};
use crate::disk::Disk;
use crate::error::{Cause, ErrorKind, Result};

/// A disk under its name.
pub(super) struct Export {
    pub name: String,
    pub disk: Arc<dyn Disk>,
    pub size_bytes: u64,
    pub read_only: bool,
    /// Set when it is shown no longer.
    pub ended: CancellationToken,
    users: TaskTracker,
}

/// What clients are told of an export. It does not keep the disk: a client that is slow in the negotiation
/// holds nobody up.
pub(super) struct Described {
    pub size_bytes: u64,
    read_only: bool,
    export: Weak<Export>,
}

impl Described {
    /// One disk stands behind all connections and a flush covers what was completed on any of them, so that
    /// there may always be several.
    pub fn flags(&self, structured: bool) -> ExportFlags {
        let mut bits = ExportFlags::HAS_FLAGS | ExportFlags::CAN_MULTI_CONN | ExportFlags::SEND_FLUSH;
        bits |= if self.read_only {
            ExportFlags::READ_ONLY
        } else {
            ExportFlags::SEND_FUA | ExportFlags::SEND_TRIM | ExportFlags::SEND_WRITE_ZEROES
        };
        if structured {
            bits |= ExportFlags::SEND_DF;
        }
        ExportFlags(bits)
    }
}

/// An export that is in use: it is gone only when the last of these is.
pub(super) struct Use {
    pub export: Arc<Export>,
    _token: TaskTrackerToken,
}

impl fmt::Debug for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Use").field("export", &self.export.name).finish_non_exhaustive()
    }
}

/// All of them.
#[derive(Default)]
pub(super) struct Exports {
    by_name: RwLock<BTreeMap<String, Arc<Export>>>,
}

impl Exports {
    pub fn add(&self, name: &str, disk: Arc<dyn Disk>, ended: CancellationToken) -> Result<()> {
        let failed = |kind: ErrorKind| Err(Cause::from(kind).error(name, "add", None));
        if name.len() > NAME_BYTES_MAX || name.contains('\0') {
            let (what, len, max) = ("a name", name.len() as u64, NAME_BYTES_MAX as u64);
            return failed(ErrorKind::TooLong { what, len, max });
        }
        let (size_bytes, read_only) = (disk.size_bytes(), disk.is_read_only());
        if size_bytes > i64::MAX as u64 {
            let (what, len, max) = ("a disk", size_bytes, i64::MAX as u64);
            return failed(ErrorKind::TooLong { what, len, max });
        }
        let mut by_name = self.by_name.write().unwrap_or_else(PoisonError::into_inner);
        if by_name.contains_key(name) {
            return failed(ErrorKind::NameTaken);
        }
        let name = name.to_owned();
        let users = TaskTracker::new();
        let export = Export { name: name.clone(), disk, size_bytes, read_only, ended, users };
        by_name.insert(name, Arc::new(export));
        Ok(())
    }

    /// Takes it out, ends its connections and waits until nobody uses it.
    pub async fn remove(&self, name: &str) -> bool {
        let taken = self.by_name.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        let Some(export) = taken else { return false };
        export.ended.cancel();
        export.users.close();
        export.users.wait().await;
        true
    }

    /// Whether a client has it open.
    pub fn is_used(&self, name: &str) -> bool {
        let by_name = self.by_name.read().unwrap_or_else(PoisonError::into_inner);
        by_name.get(name).is_some_and(|export| !export.users.is_empty())
    }

    pub fn describe(&self, name: &str) -> Option<Described> {
        let by_name = self.by_name.read().unwrap_or_else(PoisonError::into_inner);
        let export = by_name.get(name)?;
        let Export { size_bytes, read_only, .. } = **export;
        Some(Described { size_bytes, read_only, export: Arc::downgrade(export) })
    }

    /// For a client that was told of it, unless it was removed since. The use is counted while the table is
    /// locked: who has taken the export out of it waits for just those that were counted before.
    pub fn open(&self, described: &Described) -> Option<Use> {
        let by_name = self.by_name.read().unwrap_or_else(PoisonError::into_inner);
        let export = described.export.upgrade()?;
        // There may be another of that name by now.
        let shown = by_name.get(&export.name).is_some_and(|found| Arc::ptr_eq(found, &export));
        let token = export.users.token();
        shown.then_some(Use { export, _token: token })
    }

    pub fn names(&self) -> Vec<String> {
        self.by_name.read().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }
}
