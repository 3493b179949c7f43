//! One lock per VM, for as long as somebody wants it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use model::VmId;
use tokio::sync::OwnedMutexGuard;

/// Keeps the uploads of one VM apart: bytes of a connection that is given up may still arrive while the
/// next one asks how far they came.
#[derive(Debug, Default)]
pub(crate) struct VmLocks(Mutex<HashMap<VmId, Weak<tokio::sync::Mutex<()>>>>);

impl VmLocks {
    /// Waits for the VM's turn; it ends when the guard is dropped.
    pub async fn lock(&self, vm: VmId) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let known = locks.get(&vm).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                // There are as many as requests that run at once: few enough to look through.
                locks.retain(|_, lock| lock.strong_count() > 0);
                let lock = Arc::default();
                locks.insert(vm, Arc::downgrade(&lock));
                lock
            })
        };
        lock.lock_owned().await
    }
}
