//! How much of this site's storage each peer takes up, held against what it may.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use model::authorization::OverQuota;
use replica::Store;

use crate::entry::PeerRow;

/// So long a sum is good: it looks at every file of the peer's replicas. What has arrived since is added to it.
const GOOD_FOR: Duration = Duration::from_secs(10);

/// The sums, by peer.
#[derive(Debug, Default)]
pub(crate) struct Usage(Mutex<HashMap<String, Sum>>);

#[derive(Debug, Clone, Copy)]
struct Sum {
    at: Instant,
    bytes: u64,
}

impl Usage {
    /// Takes `more_bytes` that a peer is about to bring into its sum, if its quota has room for them. Nobody is refused
    /// for what has gone meanwhile. Reads the metadata of files: call it on a thread that may wait.
    pub fn admit(&self, store: &Store, peer: &PeerRow, more_bytes: u64) -> Result<(), OverQuota> {
        let known = self.lock().get(&peer.name).copied().filter(|sum| sum.at.elapsed() < GOOD_FOR);
        let fits = |sum: &Sum| peer.entry.admit_bytes(sum.bytes, more_bytes).is_ok();
        let sum = known
            .filter(fits)
            .unwrap_or_else(|| Sum { at: Instant::now(), bytes: used_bytes(store, &peer.name) });
        let admitted = peer.entry.admit_bytes(sum.bytes, more_bytes);
        let taken = if admitted.is_ok() { more_bytes } else { 0 };
        // Others of the same peer may have been admitted in between: what they bring counts too.
        let mut sums = self.lock();
        let latest = sums.get(&peer.name).filter(|latest| latest.at == sum.at).copied().unwrap_or(sum);
        sums.insert(peer.name.clone(), Sum { bytes: latest.bytes.saturating_add(taken), ..latest });
        admitted
    }

    /// The next sum is made anew.
    pub fn forget(&self, peer: &str) {
        self.lock().remove(peer);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Sum>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The bytes that the replicas of a peer take up here. Reads the metadata of files.
pub(crate) fn used_bytes(store: &Store, peer: &str) -> u64 {
    let of_peer = store.of_peer(peer).into_iter().filter_map(|vm| store.status(vm).ok());
    of_peer.map(|status| allocated_bytes(&status.folder)).fold(0, u64::saturating_add)
}

/// What a folder's files take up on their disk: what is still arriving too. What goes meanwhile takes up nothing.
fn allocated_bytes(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let bytes = entries.map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => allocated_bytes(&entry.path()),
        Ok(metadata) => metadata.blocks().saturating_mul(512),
        Err(_) => 0,
    });
    bytes.fold(0, u64::saturating_add)
}
