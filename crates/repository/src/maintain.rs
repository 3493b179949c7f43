//! Taking backups out of a repository, and giving back the room that they had.
//!
//! [`Repository::forget`] takes backups out of the list, beside anything else that goes on. [`Repository::prune`]
//! removes what no backup and no snapshot of another program needs any more; it holds an exclusive lock, so no
//! backup runs meanwhile that could build on it. What it writes anew is durable and indexed before anything is
//! removed, and index files go before the packs that they name: whenever it is cut off, every backup is whole.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::Repository;
use crate::error::Error;
use crate::id::{BackupId, Id};
use crate::lock::Lock;
use crate::storage::FileKind;

/// How often a lock that is waited for is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// What a prune came to.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct PruneReport {
    /// Packs that were there before.
    pub packs_before: u64,
    /// Bytes of packs before.
    pub bytes_before: u64,
    /// Packs that are there now.
    pub packs: u64,
    /// Bytes of packs now.
    pub bytes: u64,
    /// How long it took, with the wait for others.
    pub seconds: f64,
}

/// How much a prune does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PruneOptions {
    /// So much of what is stored may be of no use to anybody, in percent: packs that are used in part are written
    /// anew only above that.
    pub unused_percent: u8,
    /// How long to wait for backups that run, and whatever else excludes a prune.
    pub patience: Duration,
}

impl Default for PruneOptions {
    fn default() -> Self {
        Self { unused_percent: 5, patience: Duration::ZERO }
    }
}

impl Repository {
    /// Takes backups out of the list, for good; says which were there. Their data stays until a prune.
    pub fn forget(&self, backups: &[BackupId]) -> Result<Vec<BackupId>, Error> {
        let _lock = Lock::shared(&self.store)?;
        let mut there: HashSet<Id> = self.store.list(FileKind::Snapshot)?.into_iter().collect();
        let mut forgotten = Vec::new();
        for backup in backups.iter().filter(|backup| there.remove(&backup.0)) {
            self.store.remove(FileKind::Snapshot, &backup.0)?;
            forgotten.push(*backup);
        }
        Ok(forgotten)
    }

    /// Removes what nothing needs any more. Refused while anybody else uses the repository, once the patience ends.
    pub fn prune(&self, options: &PruneOptions, cancel: &AtomicBool) -> Result<PruneReport, Error> {
        let began = Instant::now();
        let lock = Arc::new(self.exclusive_lock(options.patience, cancel)?);
        let (packs_before, bytes_before) = self.packs()?;
        self.store.opened.prune(&lock, options.unused_percent)?;
        let (packs, bytes) = self.packs()?;
        self.load_index()?;
        Ok(PruneReport { packs_before, bytes_before, packs, bytes, seconds: began.elapsed().as_secs_f64() })
    }

    fn exclusive_lock(&self, patience: Duration, cancel: &AtomicBool) -> Result<Lock, Error> {
        let began = Instant::now();
        loop {
            match Lock::exclusive(&self.store) {
                Err(Error::Locked { .. }) if began.elapsed() < patience => std::thread::sleep(AGAIN),
                taken => return taken,
            }
            if cancel.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
        }
    }

    /// How many packs there are, and their bytes.
    fn packs(&self) -> Result<(u64, u64), Error> {
        let packs = self.store.list_with_size(FileKind::Pack)?;
        Ok((packs.len() as u64, packs.iter().map(|(_, bytes)| bytes).sum()))
    }
}
