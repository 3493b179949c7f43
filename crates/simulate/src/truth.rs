//! What the checkers know of each log: which moment it was made of, and whether anybody was told that it is safe.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use model::{Head, LogId, LogNumber, VmId};

use crate::history::Moment;

/// The truth about one VM's logs.
#[derive(Debug, Default)]
pub struct LogTruth {
    /// The moment that was fixed last.
    current: Option<Moment>,
    /// The moment of each log that was sent.
    logs: BTreeMap<LogId, Moment>,
    /// The newest log that the replica has called durable.
    pub acked: Option<Head>,
    /// Bits of its logs were made to rot, so that parts of the chain may be lost, if that is said.
    pub rotten: bool,
}

/// The truth of a world; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Truth(Arc<Mutex<BTreeMap<VmId, LogTruth>>>);

impl Truth {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<VmId, LogTruth>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A moment was fixed.
    pub fn fixed(&self, vm: VmId, moment: Moment) {
        self.lock().entry(vm).or_default().current = Some(moment);
    }

    /// A log of the moment that was fixed last is on its way.
    pub fn sent(&self, vm: VmId, id: LogId) {
        let mut truth = self.lock();
        let truth = truth.entry(vm).or_default();
        if let Some(moment) = truth.current.clone() {
            truth.logs.insert(id, moment);
        }
    }

    /// The replica has called a log durable.
    pub fn acked(&self, vm: VmId, head: Head) {
        let mut truth = self.lock();
        let truth = truth.entry(vm).or_default();
        if truth.acked.is_none_or(|acked| acked.number < head.number) {
            truth.acked = Some(head);
        }
    }

    /// The newest log that the replica has called durable.
    #[must_use]
    pub fn newest_acked(&self, vm: VmId) -> LogNumber {
        self.lock().get(&vm).and_then(|truth| truth.acked).map_or(LogNumber::ZERO, |acked| acked.number)
    }

    /// The moment that a log was made of.
    #[must_use]
    pub fn moment(&self, vm: VmId, id: LogId) -> Option<Moment> {
        self.lock().get(&vm)?.logs.get(&id).cloned()
    }

    /// A part of the VM's chain was made to rot.
    pub fn rotted(&self, vm: VmId) {
        self.lock().entry(vm).or_default().rotten = true;
    }

    /// Whether a loss has a cause that the product cannot help.
    #[must_use]
    pub fn may_lose(&self, vm: VmId) -> bool {
        self.lock().get(&vm).is_some_and(|truth| truth.rotten)
    }
}
