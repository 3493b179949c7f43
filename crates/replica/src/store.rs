//! The store: all VMs, and the way to each.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use catalog::{Catalog, Transaction, rusqlite};
use model::{LogNumber, Side, Timestamp, VmId, VmName};

use crate::config::Config;
use crate::error::{Error, Refused, Result};
use crate::folder::Folder;
use crate::fs::Files;
use crate::rows::{self, VmRow};
use crate::staging::Staging;
use crate::vm::{State, Vm};
use crate::worker::Workers;

/// When somebody should ask again whose storage folder is not there.
const RETRY_STORAGE: Duration = Duration::from_secs(60);

/// The store of chains of one site. A handle: clones share it. Everything here blocks on files and the
/// catalog; from async code, call it through [`Store::run`].
#[derive(Clone)]
pub struct Store {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub catalog: Catalog,
    pub config: Config,
    pub vms: RwLock<BTreeMap<VmId, Arc<Vm>>>,
    /// Taken while VMs are made, named or removed.
    pub registry: Mutex<()>,
    pub workers: Workers,
    /// Tells whether somebody reads what lies below a failover's layers.
    pub below_is_read: OnceLock<Box<ReadsBelow>>,
    /// Images that replicas are to begin with.
    pub staging: Mutex<Staging>,
    /// Tells where a peer's new replicas are to go, if not below the store's own folder.
    pub storage_of: OnceLock<Box<StorageOf>>,
}

type ReadsBelow = dyn Fn(VmId) -> bool + Send + Sync;
type StorageOf = dyn Fn(&str) -> Option<PathBuf> + Send + Sync;

impl Store {
    /// Opens the store in `config.dir`, makes good what a crash has left, and starts its workers.
    ///
    /// A log that had been verified and renamed, but whose row the catalog does not have, was never
    /// acknowledged; it is taken in all the same, so that it need not travel twice (its primary wrote down
    /// its id before it sent the end). Everything else that the catalog does not name is removed.
    pub fn open(catalog: Catalog, config: Config) -> Result<Self> {
        catalog.migrate("replica", rows::MIGRATIONS)?;
        raise_file_limit();
        let inner = Inner {
            workers: Workers::default(),
            below_is_read: OnceLock::new(),
            staging: Mutex::default(),
            storage_of: OnceLock::new(),
            vms: RwLock::new(BTreeMap::new()),
            registry: Mutex::new(()),
            catalog,
            config,
        };
        let store = Self { inner: Arc::new(inner) };
        store.recover()?;
        store.start_workers();
        Ok(store)
    }

    /// Has the store ask before it lets go of what lies below a completed failover's layers. Whoever opens a layer reads
    /// what is below it before he locks it, and so may go on reading what the layer's file no longer names.
    pub fn ask_who_reads_below(&self, is_read: impl Fn(VmId) -> bool + Send + Sync + 'static) {
        let _ = self.inner.below_is_read.set(Box::new(is_read));
    }

    /// Has the store ask which folder the replica of a peer's new VM is to be made in: what the peer's entry says. One
    /// that is not there is not made: a disk that is not mounted must not be filled beside its mount point.
    pub fn ask_where_replicas_go(&self, storage: impl Fn(&str) -> Option<PathBuf> + Send + Sync + 'static) {
        let _ = self.inner.storage_of.set(Box::new(storage));
    }

    /// Runs blocking work of the store for an async caller.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce(&Self) -> T + Send + 'static) -> T {
        let store = self.clone();
        match tokio::task::spawn_blocking(move || work(&store)).await {
            Ok(done) => done,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    /// How the store behaves.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// The VMs that there are replicas of.
    #[must_use]
    pub fn list(&self) -> Vec<VmId> {
        self.vms().keys().copied().collect()
    }

    /// The VM of this name.
    #[must_use]
    pub fn find(&self, name: &VmName) -> Option<VmId> {
        let vms: Vec<Arc<Vm>> = self.vms().values().cloned().collect();
        vms.into_iter().find(|vm| vm.lock().row.name == *name).map(|vm| vm.id)
    }

    /// The name of a VM.
    #[must_use]
    pub fn name(&self, vm: VmId) -> Option<VmName> {
        Some(self.vms().get(&vm)?.lock().row.name.clone())
    }

    /// The VMs that belong to a peer.
    #[must_use]
    pub fn of_peer(&self, peer: &str) -> Vec<VmId> {
        let vms: Vec<Arc<Vm>> = self.vms().values().cloned().collect();
        vms.iter().filter(|vm| vm.lock().row.peer == peer).map(|vm| vm.id).collect()
    }

    /// What a VM is called, and the peer that it belongs to.
    #[must_use]
    pub fn whose(&self, vm: VmId) -> Option<(VmName, String)> {
        let vm = self.vms().get(&vm)?.clone();
        let state = vm.lock();
        Some((state.row.name.clone(), state.row.peer.clone()))
    }

    pub(crate) fn vms(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<VmId, Arc<Vm>>> {
        self.inner.vms.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn vms_mut(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<VmId, Arc<Vm>>> {
        self.inner.vms.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn vm(&self, vm: VmId) -> Result<Arc<Vm>> {
        self.vms().get(&vm).cloned().ok_or(Error::NoSuchVm(vm))
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.inner.config.clock.now()
    }

    pub(crate) fn catalog(&self) -> &Catalog {
        &self.inner.catalog
    }

    /// Where the files of a peer's new VM are to go.
    pub(crate) fn home(&self, peer: &str, vm: VmId) -> Result<Folder> {
        let files = self.files();
        let base = match self.inner.storage_of.get().and_then(|storage_of| storage_of(peer)) {
            None => self.inner.config.dir.join("vms"),
            Some(storage) if files.exists(&storage)? => storage,
            Some(storage) => {
                let message = format!(
                    "the folder {} that the replicas of {peer} go to is not there; mount it, or name another one with 'afterimage peer allow {peer} --storage DIR'",
                    storage.display()
                );
                return Err(Refused::transient("storage", message, RETRY_STORAGE).into());
            }
        };
        Ok(Folder { files, path: base.join(vm.to_string()) })
    }

    /// The file system that the store is on.
    pub(crate) fn files(&self) -> Files {
        Files(self.inner.config.files.clone())
    }

    /// Commits a changed row with whatever changes beside it; only then the state has it too.
    pub(crate) fn commit(
        &self,
        state: &mut State,
        row: VmRow,
        beside: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<()> + Send + 'static,
    ) -> Result<()> {
        let saved = row.clone();
        self.catalog().write(move |tx| {
            rows::save_vm(tx, &saved)?;
            beside(tx)
        })?;
        if let Some(change) = state.row.doc.phase.transition(&row.doc.phase, Side::Replica) {
            tracing::info!(vm = %row.name, %change, "a replica enters another phase");
        }
        state.row = row;
        Ok(())
    }

    /// Commits a changed row.
    pub(crate) fn commit_row(&self, state: &mut State, row: VmRow) -> Result<()> {
        self.commit(state, row, |_| Ok(()))
    }

    /// The newest durable log of a VM.
    pub fn head(&self, vm: VmId) -> Result<model::Head> {
        Ok(self.vm(vm)?.live()?.row.doc.head)
    }

    /// The newest log that is folded into the flat files.
    pub fn applied(&self, vm: VmId) -> Result<LogNumber> {
        Ok(self.vm(vm)?.live()?.applied())
    }
}

/// A view keeps the files of all its logs open, and an hour of cycles of 5 s makes 720 logs.
fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, soft, hard, "the limit of open files could not be raised");
    }
}
