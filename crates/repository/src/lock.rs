//! The lock that keeps a `prune` away while a backup runs, in restic's form: a sealed JSON file in `locks/`.
//!
//! Ours are shared ones: any number of backups and restores go on at once; stock restic's exclusive commands
//! (`prune`, `forget --prune`, `check`) wait or refuse while one is there, and we refuse while they run.
//! A lock whose process is dead, or that has not been refreshed for half an hour, is stale; whoever comes
//! next of us removes it, so a killed backup hinders nobody, and with it what its process had half written.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use model::Timestamp;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::id::Id;
use crate::partial;
use crate::rustic::Store;

const REFRESH: Duration = Duration::from_secs(5 * 60);
const STALE: Duration = Duration::from_secs(30 * 60);

/// The lock files that this process holds: one with our process id that is not here is of a former life.
static HELD: LazyLock<Mutex<HashSet<PathBuf>>> = LazyLock::new(Mutex::default);

fn held() -> MutexGuard<'static, HashSet<PathBuf>> {
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Serialize, Deserialize)]
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
}

impl LockJson {
    fn ours() -> Self {
        Self {
            time: jiff::Timestamp::now(),
            exclusive: false,
            hostname: hostname(),
            username: "afterimage".into(),
            pid: std::process::id().cast_signed(),
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
        }
    }

    fn is_stale(&self, path: &Path, now: Timestamp) -> bool {
        if now.since(Timestamp(self.time.as_microsecond())) > STALE {
            return true;
        }
        if self.hostname != hostname() {
            return false;
        }
        if self.pid == std::process::id().cast_signed() {
            return !held().contains(path);
        }
        let alive = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid), None);
        self.pid <= 0 || alive == Err(nix::errno::Errno::ESRCH)
    }
}

pub(crate) fn hostname() -> String {
    nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// A shared lock, kept fresh until it is dropped.
pub(crate) struct Lock {
    file: Arc<Mutex<PathBuf>>,
    stop: Option<Sender<()>>,
    refresher: Option<JoinHandle<()>>,
}

impl Lock {
    /// Takes a shared lock; refused while somebody has an exclusive one.
    pub(crate) fn shared(store: &Arc<Store>) -> Result<Self, Error> {
        let path = write(store)?;
        let mut lock = Self { file: Arc::new(Mutex::new(path.clone())), stop: None, refresher: None };
        // Ours is written before the others are read: of two that exclude each other, one sees the other.
        if let Some(by) = excluded(store, &path)? {
            return Err(Error::Locked { path: store.path().to_owned(), by });
        }
        let (stop, stopped) = channel();
        let (store, file) = (store.clone(), lock.file.clone());
        lock.stop = Some(stop);
        lock.refresher = Some(std::thread::spawn(move || {
            while stopped.recv_timeout(REFRESH) == Err(RecvTimeoutError::Timeout) {
                refresh(&store, &file);
            }
        }));
        Ok(lock)
    }

    /// Whether nobody has removed it.
    pub(crate) fn is_held(&self) -> bool {
        current(&self.file).exists()
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(refresher) = self.refresher.take() {
            let _ = refresher.join();
        }
        let path = current(&self.file);
        let _ = fs::remove_file(&path);
        held().remove(&path);
    }
}

fn current(file: &Mutex<PathBuf>) -> PathBuf {
    file.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Writes a newer lock file and removes the older one. If our lock was taken away it stays away, so that
/// the backup notices; if it cannot be written the old one goes on until it is stale.
fn refresh(store: &Store, file: &Mutex<PathBuf>) {
    let old = current(file);
    if !old.exists() {
        return;
    }
    match write(store) {
        Ok(new) => {
            *file.lock().unwrap_or_else(PoisonError::into_inner) = new;
            let _ = fs::remove_file(&old);
            held().remove(&old);
        }
        Err(error) => tracing::warn!(%error, "the lock of the repository could not be refreshed"),
    }
}

fn write(store: &Store) -> Result<PathBuf, Error> {
    let json = serde_json::to_vec(&LockJson::ours())
        .map_err(|error| Error::io("cannot encode a lock of", store.path(), std::io::Error::other(error)))?;
    store.write_lock(&json, |path| {
        held().insert(path.to_owned());
    })
}

/// Who excludes us; stale locks are removed on the way.
fn excluded(store: &Store, ours: &Path) -> Result<Option<String>, Error> {
    let folder = store.lock_folder();
    let entries = fs::read_dir(&folder).map_err(|source| Error::io("cannot read", &folder, source))?;
    let now = Timestamp::from(SystemTime::now());
    // A file that is still being written has another name than its hash: it is nobody's business yet.
    let is_named = |path: &PathBuf| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.parse::<Id>().is_ok())
    };
    let paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    let mut died = paths.iter().any(|path| partial::is_abandoned(path));
    for path in paths.into_iter().filter(|path| path != ours).filter(is_named) {
        // One that is gone again, or is no lock of this repository, excludes nobody.
        let Some(lock) =
            store.read_lock(&path).and_then(|json| serde_json::from_slice::<LockJson>(&json).ok())
        else {
            continue;
        };
        if lock.is_stale(&path, now) {
            tracing::info!(path = %path.display(), pid = lock.pid, host = lock.hostname, "removed a stale lock");
            let _ = fs::remove_file(&path);
            died = true;
        } else if lock.exclusive {
            return Ok(Some(format!(
                "process {} of {} on {:?} since {}",
                lock.pid, lock.username, lock.hostname, lock.time
            )));
        }
    }
    if died {
        partial::sweep(store.path());
    }
    Ok(None)
}
