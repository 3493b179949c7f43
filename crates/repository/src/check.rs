//! Whether a repository hangs together: its packs and its index, beside its backups.

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};

use crate::backup::Progress;
use crate::error::Error;
use crate::id::{BackupId, ById, Id};
use crate::storage::FileKind;
use crate::verify::{VerifyOptions, VerifyReport};
use crate::{Repository, lock};

/// Files of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Found {
    /// How many.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct CheckReport {
    /// All packs.
    pub packs: Found,
    /// Packs that no index file names: a run that was cut off has left them. They harm nothing; a prune removes them.
    pub unindexed: Found,
    /// Packs that index files name and that are not there, by the first digits of their names. Backups that need
    /// them are damaged, and named in `backups`.
    pub missing: Vec<String>,
    /// Who has a lock.
    pub locks: Vec<String>,
    /// The backups.
    pub backups: VerifyReport,
}

impl CheckReport {
    /// Whether all is as it was written.
    #[must_use]
    pub fn is_well(&self) -> bool {
        self.missing.is_empty() && self.backups.damaged.is_empty()
    }
}

impl Repository {
    /// Checks the repository: packs against the index, and every backup; with `read_data` every byte of them. Beside
    /// backups that run: what they are at is not looked for.
    pub fn check(
        &self,
        read_data: bool,
        progress: &dyn Fn(Progress),
        cancel: &AtomicBool,
    ) -> Result<CheckReport, Error> {
        let locks = lock::holders(&self.store)?;
        // Packs first: a pack that comes later may be named by an index file that is read here.
        let packs: HashMap<Id, u64, ById> = self.store.list_with_size(FileKind::Pack)?.into_iter().collect();
        self.load_index()?;
        let mut report = CheckReport { locks, ..CheckReport::default() };
        let named: HashMap<Id, bool, ById> = self.index().packs().collect();
        for (id, bytes) in &packs {
            report.packs.add(*bytes);
            if !named.contains_key(id) {
                report.unindexed.add(*bytes);
            }
        }
        let missing = named.iter().filter(|(_, present)| !**present);
        report.missing = missing.map(|(id, _)| BackupId(*id).short()).collect();
        report.missing.sort();
        let options = VerifyOptions { read_data, ..VerifyOptions::default() };
        report.backups = self.verify(&options, progress, cancel)?;
        Ok(report)
    }
}

impl Found {
    fn add(&mut self, bytes: u64) {
        self.files += 1;
        self.bytes += bytes;
    }
}
