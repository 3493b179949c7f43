//! The locks that keep a `prune` away while a backup runs, in restic's form: a sealed JSON file in `locks/`.
//!
//! Backups, restores and copies take shared ones: any number of them go on at once. What removes data takes an
//! exclusive one, and is refused while anybody has a lock; the others are refused while it is there. Stock
//! restic's commands and ours keep each other out in the same way.
//! A lock whose process is dead, or that has not been refreshed for half an hour, is stale; whoever comes
//! next of us removes it, so a killed backup hinders nobody, and with it what its process had half written.

use std::collections::HashSet;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use model::Timestamp;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::id::Id;
use crate::owner::{Owner, hostname, is_alive};
use crate::storage::FileKind;
use crate::store::Store;

const REFRESH: Duration = Duration::from_secs(5 * 60);
const STALE: Duration = Duration::from_secs(30 * 60);

/// The lock files that this process holds: one of its own that is not here was left behind.
static HELD: LazyLock<Mutex<HashSet<Id>>> = LazyLock::new(Mutex::default);

fn held() -> MutexGuard<'static, HashSet<Id>> {
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a lock lets others do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// Others may hold such locks too.
    Shared,
    /// Nobody else may hold any.
    Exclusive,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct LockJson {
    time: jiff::Timestamp,
    #[serde(default)]
    exclusive: bool,
    #[serde(default)]
    hostname: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    pid: i32,
    #[serde(default)]
    uid: u32,
    #[serde(default)]
    gid: u32,
    /// Ours alone: which process that was, once and never again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    afterimage: Option<Owner>,
}

impl LockJson {
    fn ours(sharing: Sharing) -> Self {
        Self {
            time: jiff::Timestamp::now(),
            exclusive: sharing == Sharing::Exclusive,
            hostname: hostname(),
            username: "afterimage".into(),
            pid: std::process::id().cast_signed(),
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
            afterimage: Some(Owner::ours()),
        }
    }

    fn is_stale(&self, id: &Id, now: Timestamp) -> bool {
        if now.since(Timestamp(self.time.as_microsecond())) > STALE {
            return true;
        }
        if self.is_ours() {
            return !held().contains(id);
        }
        match &self.afterimage {
            Some(owner) => owner.is_dead(self.pid),
            None => self.hostname == hostname() && !is_alive(self.pid),
        }
    }

    /// Whether this process wrote it. Others are started within the same tick of the clock: the number must be ours, too.
    fn is_ours(&self) -> bool {
        self.pid == std::process::id().cast_signed() && self.afterimage.as_ref() == Some(&Owner::ours())
    }

    fn holder(&self) -> String {
        format!("process {} of {} on {:?} since {}", self.pid, self.username, self.hostname, self.time)
    }
}

/// A lock, kept fresh until it is dropped.
pub(crate) struct Lock {
    store: Arc<Store>,
    file: Arc<Mutex<Id>>,
    stop: Option<Sender<()>>,
    refresher: Option<JoinHandle<()>>,
}

impl Lock {
    /// Takes a shared lock; refused while somebody has an exclusive one.
    pub(crate) fn shared(store: &Arc<Store>) -> Result<Self, Error> {
        Self::take(store, Sharing::Shared)
    }

    /// Takes an exclusive lock; refused while anybody has a lock.
    pub(crate) fn exclusive(store: &Arc<Store>) -> Result<Self, Error> {
        Self::take(store, Sharing::Exclusive)
    }

    fn take(store: &Arc<Store>, sharing: Sharing) -> Result<Self, Error> {
        let id = write(store, sharing)?;
        let mut lock =
            Self { store: store.clone(), file: Arc::new(Mutex::new(id)), stop: None, refresher: None };
        // Ours is written before the others are read: of two that exclude each other, one sees the other.
        if let Some(by) = excluded(store, &id, sharing)? {
            return Err(Error::Locked { at: store.at().to_owned(), by });
        }
        let (stop, stopped) = channel();
        let (store, file) = (store.clone(), lock.file.clone());
        lock.stop = Some(stop);
        lock.refresher = Some(std::thread::spawn(move || {
            while stopped.recv_timeout(REFRESH) == Err(RecvTimeoutError::Timeout) {
                refresh(&store, &file, sharing);
            }
        }));
        Ok(lock)
    }

    /// Whether nobody has removed it.
    pub(crate) fn is_held(&self) -> Result<bool, Error> {
        self.store.has(FileKind::Lock, &current(&self.file))
    }

    /// An error if somebody has removed it.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.is_held()? { Ok(()) } else { Err(Error::LockLost { at: self.store.at().to_owned() }) }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(refresher) = self.refresher.take() {
            let _ = refresher.join();
        }
        remove(&self.store, &current(&self.file));
    }
}

fn current(file: &Mutex<Id>) -> Id {
    *file.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A lock that cannot be removed now is no longer held, and so stale for this process, and for others soon.
fn remove(store: &Store, id: &Id) {
    if let Err(error) = store.remove(FileKind::Lock, id) {
        tracing::warn!(%error, "a lock of the repository is left behind");
    }
    held().remove(id);
}

/// Writes a newer lock file and removes the older one. If our lock was taken away it stays away, so that
/// the backup notices; if it cannot be written the old one goes on until it is stale.
fn refresh(store: &Store, file: &Mutex<Id>, sharing: Sharing) {
    let old = current(file);
    let renewed = store
        .has(FileKind::Lock, &old)
        .and_then(|there| if there { write(store, sharing).map(Some) } else { Ok(None) });
    match renewed {
        Ok(Some(new)) => {
            *file.lock().unwrap_or_else(PoisonError::into_inner) = new;
            remove(store, &old);
        }
        Ok(None) => {}
        Err(error) => tracing::warn!(%error, "the lock of the repository could not be refreshed"),
    }
}

fn write(store: &Store, sharing: Sharing) -> Result<Id, Error> {
    let json = serde_json::to_vec(&LockJson::ours(sharing))
        .map_err(|error| store.failed_here("cannot encode a lock of", error))?;
    store.write_lock(&json, |id| {
        held().insert(id);
    })
}

/// The locks of a repository, but for those that are no locks of it or gone again.
fn locks(store: &Store) -> Result<Vec<(Id, LockJson)>, Error> {
    let mut found = Vec::new();
    for id in store.list(FileKind::Lock)? {
        let json = store.read_lock(&id)?;
        found.extend(json.and_then(|json| Some((id, serde_json::from_slice(&json).ok()?))));
    }
    Ok(found)
}

/// Who excludes us; stale locks are removed on the way.
fn excluded(store: &Store, ours: &Id, sharing: Sharing) -> Result<Option<String>, Error> {
    let now = Timestamp::from(SystemTime::now());
    let (mut died, mut by) = (false, None);
    for (id, lock) in locks(store)?.into_iter().filter(|(id, _)| id != ours) {
        if lock.is_stale(&id, now) {
            tracing::info!(lock = %id, holder = lock.holder(), "removing a stale lock");
            // A store that lets nothing be removed keeps it; it excludes nobody all the same.
            if let Err(error) = store.remove(FileKind::Lock, &id) {
                tracing::info!(%error, "a stale lock stays");
            }
            died = true;
        } else if lock.exclusive || sharing == Sharing::Exclusive {
            by.get_or_insert_with(|| lock.holder());
        }
    }
    if died || store.has_half_written() {
        store.sweep();
    }
    Ok(by)
}

/// Who has a lock that is not stale.
pub(crate) fn holders(store: &Store) -> Result<Vec<String>, Error> {
    let now = Timestamp::from(SystemTime::now());
    let mut locks = locks(store)?;
    locks.retain(|(id, lock)| !lock.is_stale(id, now));
    Ok(locks.into_iter().map(|(_, lock)| lock.holder()).collect())
}

/// What was found of locks when they were cleared.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unlocked {
    /// Who had the locks that are removed.
    pub removed: Vec<String>,
    /// Who has those that are left: their processes are alive, or on machines that cannot be looked at from here
    /// and were there less than half an hour ago.
    pub kept: Vec<String>,
}

/// Removes the locks whose owners are dead, or all.
pub(crate) fn unlock(store: &Store, all: bool) -> Result<Unlocked, Error> {
    let now = Timestamp::from(SystemTime::now());
    let mut unlocked = Unlocked::default();
    for (id, lock) in locks(store)? {
        if all || lock.is_stale(&id, now) {
            store.remove(FileKind::Lock, &id)?;
            unlocked.removed.push(lock.holder());
        } else {
            unlocked.kept.push(lock.holder());
        }
    }
    if !unlocked.removed.is_empty() {
        store.sweep();
    }
    Ok(unlocked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_stale_by_its_age_or_its_owner() {
        let now = Timestamp::from(SystemTime::now());
        let id = Id::of(b"a lock");
        let ours = LockJson::ours(Sharing::Shared);
        assert!(ours.is_stale(&id, now), "of this process, which does not hold it");
        held().insert(id);
        assert!(!ours.is_stale(&id, now));
        held().remove(&id);
        let twin = LockJson { pid: ours.pid + 1, ..ours.clone() };
        assert!(ours.is_ours() && !twin.is_ours(), "two that were started in the same tick");
        let restics = LockJson { afterimage: None, pid: 1, ..ours.clone() };
        assert!(!restics.is_stale(&id, now));
        assert!(LockJson { pid: i32::MAX - 1, ..restics.clone() }.is_stale(&id, now));
        let elsewhere = LockJson { hostname: "other".into(), pid: i32::MAX - 1, ..restics };
        assert!(!elsewhere.is_stale(&id, now), "nobody here can tell");
        let old = jiff::Timestamp::now() - jiff::SignedDuration::from_mins(31);
        assert!(LockJson { time: old, ..elsewhere }.is_stale(&id, now));
    }
}
