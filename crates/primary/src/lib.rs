//! The primary's side: runs cycles over the VMs protected here.
//!
//! A cycle fixes one moment over all disks of a VM, reads what changed since the last one, encodes it
//! into a log and ships it, in bounded memory and without a spool on this side's disk. What holds:
//!
//! * the changes of a cycle are dropped from QEMU only after the replica's durable acknowledgement;
//! * a cycle that fails anywhere leaves no bitmap, job, export or scratch behind and gives its changes
//!   to the next one; a site that is killed in the middle cleans up when it starts again;
//! * what cannot be known (a lost bitmap, a chain that is not ours) becomes a resynchronization by
//!   compare, never a guess and never silently a full copy.
//!
//! The cycle is written over [`ports`]: what it touches are a VM, a link, a clock and chance. [`Real`] is QEMU
//! and the wire; a simulation brings its own and runs the same code. [`Relationship`] does one thing at a time on
//! its caller's task; [`Primary`] gives each relationship of a site a task of its own.
//!
//! What it does not do: decide what a cycle does (`model::plan_cycle`), speak QMP (`qemu`) or HTTP (`wire`).

mod ahead;
mod compress;
mod configure;
mod cover;
mod cycle;
mod digests;
mod disks;
mod error;
mod folder;
mod group;
mod handover;
mod media;
mod overwritten;
mod passes;
pub mod ports;
mod protect;
mod read;
mod real;
mod relationship;
mod relocate;
mod rows;
mod runner;
mod ship;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use catalog::Catalog;
use model::{
    Assessment, CycleBackoff, CycleTally, DiskName, GroupName, Health, HealthThresholds, InitialStart,
    LastError, LogNumber, MayRun, Phase, ResyncReason, Sum, Timestamp, VmId, VmName,
};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use wire::{HandedOver, KeyId, Relocation};

pub use crate::ahead::AHEAD_FROM_BYTES;
pub use crate::compress::Compress;
pub use crate::configure::Changes;
pub use crate::cycle::CycleReport;
pub use crate::error::{Error, Failure, FailureCode};
use crate::group::{GroupRow, Handles, Running};
pub use crate::group::{GroupStatus, Synced};
pub use crate::overwritten::overwritten_offline;
use crate::ports::Ports;
pub use crate::protect::find_domain;
pub use crate::read::RecordSink;
pub use crate::real::{PeerClients, Real, WireRemote, random_id};
pub use crate::relationship::{Relationship, Shared, Stopper};
pub use crate::rows::{Image, KnownDisk, Media, Passes, Protected, Relocating, Settings, Written};
use crate::runner::{Handle, Order};
pub use qemu::{DomainAddress, Monitor};

/// How this site runs its cycles.
#[derive(Debug, Clone)]
pub struct Config {
    /// What this site is called; the replica shows it.
    pub site_name: String,
    /// The zstd level of logs.
    pub compression_level: i32,
    /// Where logs are compressed.
    pub compress: Compress,
    /// A pass (initial replication, resynchronization) is cut into logs of about this many bytes of data.
    pub initial_log_bytes: u64,
    /// The shortest interval that may be set, in seconds: 5, and less only to demonstrate and to test.
    pub interval_min_s: u64,
    /// Delays after failed cycles.
    pub backoff: CycleBackoff,
    /// How long an upload waits for a broken link before the cycle is given up.
    pub patience: Duration,
    /// When health turns.
    pub thresholds: HealthThresholds,
    /// Cycles at once, over all VMs.
    pub cycles_at_once: usize,
    /// A cycle after one with at least so many bytes of data reads ahead of its moment.
    pub ahead_from_bytes: u64,
}

/// A wish to protect a VM.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProtectRequest {
    /// What the VM is called.
    pub name: VmName,
    /// How it is to be protected.
    pub settings: Settings,
    /// How its initial replication is to begin.
    #[serde(default)]
    pub initial: InitialStart,
}

/// What there is to say of a protected VM.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmStatus {
    /// Its id.
    pub vm: VmId,
    /// Its name.
    pub name: VmName,
    /// Where its replica is.
    pub settings: Settings,
    /// Its disks.
    pub disks: Vec<KnownDisk>,
    /// Where the relationship stands.
    pub phase: Phase,
    /// Paused by a person.
    pub paused: bool,
    /// Its health.
    pub health: Assessment,
    /// The newest log known to be durable on the replica.
    pub acked: LogNumber,
    /// The moment of the newest recovery point.
    pub last_point_at: Option<Timestamp>,
    /// The last cycle that ended well since this site started.
    pub last_cycle: Option<CycleReport>,
    /// Bytes changed and not yet shipped, as far as known.
    pub pending_bytes: Option<u64>,
    /// Cycles failed in a row.
    pub failures: u32,
    /// When the next cycle is due.
    pub next_at: Timestamp,
    /// Whether it may run then, or its pass rests.
    pub may_run: MayRun,
    /// What steers its passes.
    pub passes: Passes,
    /// Why the last cycle failed.
    pub error: Option<Failure>,
    /// Bytes of logs shipped since this site started.
    pub sent_bytes: u64,
    /// How often the VM has changed its site for good, and one more.
    pub generation: u64,
    /// How cycles went in the monitoring window.
    pub measured: Sum<CycleTally>,
    /// The last error of the window, mended or not.
    pub last_error: Option<LastError>,
    /// The group that it is in.
    pub group: Option<GroupName>,
    /// The moment of the newest application-consistent point.
    pub app_at: Option<Timestamp>,
    /// How far its move to another site is, as the site that has it told last; see [`Settings::relocating`].
    #[serde(default)]
    pub relocation: Relocation,
}

impl VmStatus {
    fn starting(row: &Protected) -> Self {
        Self {
            vm: row.vm,
            name: row.name.clone(),
            settings: row.settings.clone(),
            disks: row.disks.clone(),
            phase: row.phase.clone(),
            paused: row.paused,
            health: Assessment { health: Health::Normal, reason: String::new() },
            acked: row.shipped.acked.number,
            last_point_at: row.point_at,
            last_cycle: None,
            pending_bytes: None,
            failures: row.failures,
            next_at: row.made_at,
            may_run: MayRun::Now,
            passes: row.passes.clone(),
            error: row.error.clone(),
            sent_bytes: 0,
            generation: row.generation,
            measured: Sum::default(),
            last_error: None,
            group: None,
            app_at: row.app_at,
            relocation: Relocation::default(),
        }
    }
}

/// The primary's side of a site: a task for each relationship.
pub struct Primary<P: Ports = Real> {
    shared: Arc<Shared<P>>,
    handles: Handles,
    running_groups: Mutex<BTreeMap<GroupName, Running>>,
    /// Groups are made, changed and removed one at a time.
    changing_groups: tokio::sync::Mutex<()>,
}

impl<P: Ports> Primary<P> {
    /// Opens it; nothing runs before [`Primary::start`].
    pub fn open(catalog: Catalog, config: Config, ports: P) -> Result<Self, Error> {
        let shared = Shared::open(catalog, config, ports)?;
        Relationship::load(&shared)?; // what cannot be read is better known now than at the start
        Self::load_groups(&shared)?;
        let (handles, running_groups) = (Handles::default(), Mutex::default());
        Ok(Self { shared, handles, running_groups, changing_groups: tokio::sync::Mutex::default() })
    }

    /// Starts a runner for each protected VM. Call it within a tokio runtime.
    pub fn start(&self) -> Result<(), Error> {
        let groups = Self::load_groups(&self.shared)?;
        for mut relationship in Relationship::load(&self.shared)? {
            relationship.join_group(Self::membership(&groups, &relationship.row().name));
            self.spawn(relationship);
        }
        // A site may have several kinds of relationships: a group is where its members are.
        let is_here = |row: &GroupRow| row.group.members.iter().any(|member| self.get(&member.vm).is_some());
        for row in groups.into_iter().filter(is_here) {
            self.start_group(row);
        }
        Ok(())
    }

    /// Ends all runners; a running cycle is given up and its changes stay with QEMU.
    pub async fn shutdown(&self) {
        self.groups().clear(); // no more moments are begun
        let handles = std::mem::take(&mut *self.lock());
        for handle in handles.values() {
            let _ = handle.orders.try_send(Order::End);
            handle.stopper.stop_cycle();
        }
        for handle in handles.into_values() {
            let _ = handle.orders.send(Order::End).await;
            let _ = handle.task.await;
        }
    }

    /// Begins to protect a VM: finds its disks, and starts the initial replication.
    pub async fn protect(&self, request: ProtectRequest) -> Result<VmStatus, Error> {
        let relationship = Relationship::protect(&self.shared, request).await?;
        Ok(self.spawn(relationship))
    }

    /// Begins to pass on a VM that has its id already, as a replica of another site's.
    pub async fn begin(&self, request: ProtectRequest, vm: VmId, generation: u64) -> Result<VmStatus, Error> {
        let relationship = Relationship::begin(&self.shared, request, vm, generation).await?;
        Ok(self.spawn(relationship))
    }

    /// The status of each protected VM, by name.
    pub fn status(&self) -> Vec<VmStatus> {
        self.lock().values().map(Handle::status).collect()
    }

    /// The status of one.
    pub fn get(&self, name: &VmName) -> Option<VmStatus> {
        self.lock().get(name).map(Handle::status)
    }

    /// Runs a cycle now and waits until it has made a point.
    pub async fn sync(&self, name: &VmName) -> Result<VmStatus, Error> {
        self.order(name, Order::Sync, WhenRunning::Wait).await
    }

    /// Stops cycles; QEMU goes on tracking changes.
    pub async fn pause(&self, name: &VmName) -> Result<VmStatus, Error> {
        self.order(name, Order::Pause, WhenRunning::Stop).await
    }

    /// Lets cycles run again, at once, whatever stopped them.
    pub async fn resume(&self, name: &VmName) -> Result<VmStatus, Error> {
        self.order(name, Order::Resume, WhenRunning::Wait).await
    }

    /// Compares both sides and sends what differs, whatever the policy says; a pass that rests goes on.
    pub async fn resync(&self, name: &VmName) -> Result<VmStatus, Error> {
        self.order(name, Order::Resync, WhenRunning::Stop).await
    }

    /// The disks that lie at some of these places (a file, or a device), each with its VM.
    pub fn disks_at(&self, places: &[PathBuf]) -> Vec<(VmName, DiskName)> {
        let vms = self.status();
        vms.iter().flat_map(|vm| overwritten::lying_at(&vm.name, &vm.disks, places)).collect()
    }

    /// A backup is about to be restored over disks of a VM, which QEMU's bitmaps do not know of: when this comes
    /// back it is written down that both sides must be compared.
    pub async fn overwritten(&self, name: &VmName, disks: String) -> Result<VmStatus, Error> {
        self.order(name, |done| Order::Overwritten(disks, done), WhenRunning::Stop).await
    }

    /// Begins to replicate more disks of a VM, by their nodes.
    pub async fn add_disks(&self, name: &VmName, nodes: Vec<String>) -> Result<VmStatus, Error> {
        self.order(name, |done| Order::AddDisks(nodes, done), WhenRunning::Wait).await
    }

    /// Ends the replication of some of its disks, by their names.
    pub async fn remove_disks(&self, name: &VmName, disks: Vec<DiskName>) -> Result<VmStatus, Error> {
        self.order(name, |done| Order::RemoveDisks(disks, done), WhenRunning::Wait).await
    }

    /// Ends a resynchronization: it is required as before, and waits for a person or the next window.
    pub async fn cancel_resync(&self, name: &VmName) -> Result<VmStatus, Error> {
        self.order(name, Order::CancelResync, WhenRunning::Stop).await
    }

    pub(crate) async fn order_relocated(
        &self,
        name: &VmName,
        to: Option<(String, KeyId)>,
    ) -> Result<VmStatus, Error> {
        self.order(name, |done| Order::Relocate(to, done), WhenRunning::Wait).await
    }

    pub(crate) async fn order_configured(&self, name: &VmName, changes: Changes) -> Result<VmStatus, Error> {
        self.order(name, |done| Order::Configure(changes, done), WhenRunning::Wait).await
    }

    /// Gives a VM that is off to its replica's site, with everything: a planned failover. With `shut_down` the guest is
    /// asked to shut down, and waited for that long.
    pub async fn hand_over(&self, name: &VmName, shut_down: Option<Duration>) -> Result<HandedOver, Error> {
        let no_such_vm = || Error::NoSuchVm(name.clone());
        let orders = self.lock().get(name).map(|handle| handle.orders.clone()).ok_or_else(no_such_vm)?;
        let (done, answer) = oneshot::channel();
        orders.send(Order::HandOver(shut_down, done)).await.map_err(|_| no_such_vm())?;
        Ok(answer.await.map_err(|_| no_such_vm())??)
    }

    /// Whether a VM could be given over as it is: it is off, or was given over before.
    pub async fn check_off(&self, name: &VmName) -> Result<VmStatus, Error> {
        self.order(name, Order::CheckOff, WhenRunning::Wait).await
    }

    /// Begins to protect a VM that has come to this site, under the id that it has always had; `why` both sides are
    /// compared first.
    pub async fn take_over(
        &self,
        request: ProtectRequest,
        vm: VmId,
        generation: u64,
        why: ResyncReason,
    ) -> Result<VmStatus, Error> {
        let relationship = Relationship::take_over(&self.shared, request, vm, generation, why).await?;
        Ok(self.spawn(relationship))
    }

    /// Ends the protection of a VM that is to become a replica here, if the VM is off. False if it runs. What is
    /// remembered of it stays until [`Primary::forget`].
    pub async fn stand_down(&self, name: &VmName) -> Result<bool, Error> {
        let no_such_vm = || Error::NoSuchVm(name.clone());
        let (orders, stopper) = {
            let handles = self.lock();
            let handle = handles.get(name).ok_or_else(no_such_vm)?;
            (handle.orders.clone(), handle.stopper.clone())
        };
        let (done, answer) = oneshot::channel();
        if orders.send(Order::StandDown(done)).await.is_err() {
            return Ok(true); // it has stood down before
        }
        stopper.stop_cycle();
        Ok(answer.await.unwrap_or(true))
    }

    /// Forgets a VM that has stood down.
    pub async fn forget(&self, name: &VmName) -> Result<(), Error> {
        let status = self.get(name).ok_or_else(|| Error::NoSuchVm(name.clone()))?;
        self.leave_group(name).await?;
        rows::remove(&self.shared.catalog, status.vm).await?;
        self.lock().remove(name);
        Ok(())
    }

    /// Begins a new monitoring window; the status is the one before, with what the window had come to.
    pub async fn reset_measurements(&self, name: &VmName) -> Result<VmStatus, Error> {
        let before = self.get(name).ok_or_else(|| Error::NoSuchVm(name.clone()))?;
        self.order(name, Order::Reset, WhenRunning::Wait).await?;
        Ok(before)
    }

    /// Ends the protection, and takes the VM out of its group; nothing of ours stays in QEMU. The replica keeps what it has.
    pub async fn unprotect(&self, name: &VmName) -> Result<VmStatus, Error> {
        self.leave_group(name).await?;
        let status = self.order(name, Order::Forget, WhenRunning::Stop).await?;
        rows::remove(&self.shared.catalog, status.vm).await?;
        self.lock().remove(name);
        Ok(status)
    }

    async fn order(
        &self,
        name: &VmName,
        order: impl FnOnce(oneshot::Sender<Result<(), Failure>>) -> Order,
        when_running: WhenRunning,
    ) -> Result<VmStatus, Error> {
        let no_such_vm = || Error::NoSuchVm(name.clone());
        let orders = self.lock().get(name).map(|handle| handle.orders.clone()).ok_or_else(no_such_vm)?;
        let (done, answer) = oneshot::channel();
        orders.send(order(done)).await.map_err(|_| no_such_vm())?;
        if let (WhenRunning::Stop, Some(handle)) = (when_running, self.lock().get(name)) {
            handle.stopper.stop_cycle();
        }
        answer.await.map_err(|_| no_such_vm())??;
        self.get(name).ok_or_else(no_such_vm)
    }

    /// Starts its runner; the status is what it begins with.
    fn spawn(&self, relationship: Relationship<P>) -> VmStatus {
        let name = relationship.row().name.clone();
        let handle = Handle::spawn(relationship);
        let status = handle.status();
        self.lock().insert(name, handle);
        status
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<VmName, Handle>> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an order does to a cycle that is running.
enum WhenRunning {
    Wait,
    Stop,
}
