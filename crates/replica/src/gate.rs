//! What the gate sees of a VM, and the pin that comes with its answer.

use std::sync::Arc;

use model::gate::{Access, Admission, Facts, admit};
use model::{
    ApplyState, Assessment, DiskName, Head, HealthInput, Lately, LogNumber, Phase, PointInfo, ReplicaTally,
    Sum, Timestamp, VmId, VmName, Window, assess,
};
use steps::durable_step;

use crate::error::{Error, Result};
use crate::failover::FailoverStatus;
use crate::import::AwaitedMedia;
use crate::rows::{DiskSize, Reported};
use crate::store::Store;
use crate::vm::{State, Vm};

/// The facts of one replica at one moment.
#[derive(Debug, Clone)]
pub struct VmFacts {
    /// The VM.
    pub vm: VmId,
    /// Where the relationship stands.
    pub phase: Phase,
    /// Since when.
    pub phase_since: Timestamp,
    /// What the last apply came to.
    pub apply: ApplyState,
    /// The replica's health, with the reason.
    pub health: Assessment,
    /// Since when it has that health.
    pub health_since: Timestamp,
    /// Since when its storage is being moved, if it is.
    pub migrating_since: Option<Timestamp>,
}

impl VmFacts {
    /// As the gate takes them.
    #[must_use]
    pub fn as_facts(&self) -> Facts<'_> {
        Facts {
            vm: self.vm,
            phase: &self.phase,
            phase_since: self.phase_since,
            apply: &self.apply,
            health: self.health.health,
            health_since: self.health_since,
            migrating_since: self.migrating_since,
        }
    }
}

/// What `status` shows of a replica.
#[derive(Debug, Clone)]
pub struct ReplicaStatus {
    /// Its name.
    pub name: VmName,
    /// The peer that it belongs to.
    pub peer: String,
    /// The site that the VM runs on.
    pub primary_name: String,
    /// The facts that the gate looks at.
    pub facts: VmFacts,
    /// What the primary last said of itself.
    pub reported: Reported,
    /// The VM's disks at its newest log, as offered.
    pub disks: Vec<DiskSize>,
    /// Seconds between cycles.
    pub interval_s: u64,
    /// Hourly points to keep beside the latest one.
    pub points_wanted: u8,
    /// The newest durable log.
    pub head: Head,
    /// When it became durable.
    pub last_log_at: Option<Timestamp>,
    /// The newest log folded into the flat files.
    pub applied: LogNumber,
    /// The recovery points that are shown.
    pub points: Vec<PointInfo>,
    /// What the monitoring window comes to.
    pub measured: Sum<ReplicaTally>,
    /// How many of the points are pinned by hand.
    pub pinned: usize,
    /// The bytes of logs that only these pins keep.
    pub pin_bytes: u64,
    /// The logs that are not folded in, and the bytes of their files.
    pub logs: usize,
    /// The bytes of these logs' files.
    pub log_bytes: u64,
    /// What the flat files take up on their disk.
    pub base_bytes: u64,
    /// How many views are open.
    pub views: usize,
    /// The holds that last: id, point and end.
    pub holds: Vec<(String, LogNumber, Timestamp)>,
    /// The primary no longer protects it.
    pub withdrawn: bool,
    /// What was lost here, until a resynchronization has made it good.
    pub damage: Option<String>,
    /// Where its files are.
    pub folder: std::path::PathBuf,
    /// How often the VM has changed its site for good, and one more.
    pub generation: u64,
    /// The media that it waits for.
    pub media: Option<AwaitedMedia>,
    /// The group that its primary has it in.
    pub group: Option<model::GroupName>,
    /// The site that it is on its way to.
    pub moving_to: Option<String>,
    /// Its failover, if it is failed over.
    pub failover: Option<FailoverStatus>,
}

/// The gate's yes, with the point pinned: nothing that happens between the answer and the reading takes the
/// point away. Dropped unused, it lets go.
#[derive(Debug)]
pub struct Admitted {
    pub(crate) admission: Admission,
    pub(crate) pin: Pin,
}

impl Admitted {
    /// What the gate gave.
    #[must_use]
    pub fn admission(&self) -> &Admission {
        &self.admission
    }
}

/// Keeps a point's bytes in place: the base is not taken past it.
pub(crate) struct Pin {
    store: Store,
    pub vm: Arc<Vm>,
    pub point: PointInfo,
    epoch: u64,
}

impl std::fmt::Debug for Pin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pin({} of {})", self.point.number, self.vm.id)
    }
}

impl Pin {
    /// Pins a point; the caller holds the VM's lock and has seen that the point can be read.
    pub fn new(store: &Store, vm: &Arc<Vm>, state: &mut State, point: PointInfo) -> Self {
        *state.pins.entry(point.number).or_insert(0) += 1;
        Self { store: store.clone(), vm: vm.clone(), point, epoch: state.epoch }
    }

    /// Fails once the point's bytes may have changed.
    pub fn check(&self) -> Result<()> {
        self.check_in(&self.vm.lock())
    }

    pub fn check_in(&self, state: &State) -> Result<()> {
        if state.epoch == self.epoch {
            return Ok(());
        }
        Err(Error::Revoked { vm: self.vm.id, point: self.point.number, why: state.revoked.clone() })
    }
}

/// A point that stays where it is for as long as this is kept. It says nothing of whether it may be read.
#[derive(Debug)]
pub struct KeptPoint(#[allow(dead_code, reason = "it is kept")] Pin);

impl Drop for Pin {
    fn drop(&mut self) {
        self.vm.lock().unpin(self.epoch, self.point.number);
        self.store.wake(self.vm.id);
    }
}

impl Store {
    /// Keeps a point in place, whatever becomes of its VM meanwhile: for what has to happen at that of several VMs.
    pub fn keep_point(&self, vm: VmId, point: LogNumber) -> Result<KeptPoint> {
        let vm = self.vm(vm)?;
        let mut state = vm.live()?;
        let found = state.points.get(&point).copied().ok_or(Error::NoSuchPoint { vm: vm.id, point })?;
        Ok(KeptPoint(Pin::new(self, &vm, &mut state, found)))
    }

    /// The recovery points of a VM, oldest first.
    pub fn points(&self, vm: VmId) -> Result<Vec<PointInfo>> {
        Ok(self.vm(vm)?.live()?.points.values().copied().collect())
    }

    /// The point that the flat files equal now; none while they equal none.
    pub fn hold_point(&self, vm: VmId) -> Result<Option<PointInfo>> {
        Ok(self.vm(vm)?.live()?.base_point())
    }

    /// The bytes of the log that makes a point; none once it is folded into the base.
    pub fn log_bytes(&self, vm: VmId, point: LogNumber) -> Result<Option<u64>> {
        Ok(self.vm(vm)?.live()?.logs.get(&point).map(|log| log.row.bytes))
    }

    /// What the gate looks at.
    pub fn facts(&self, vm: VmId) -> Result<VmFacts> {
        let vm = self.vm(vm)?;
        let mut state = vm.live()?;
        Ok(self.facts_of(&mut state))
    }

    pub(crate) fn facts_of(&self, state: &mut State) -> VmFacts {
        let now = self.now();
        let doc = &state.row.doc;
        let input = HealthInput {
            phase: &doc.phase,
            apply: &state.apply,
            paused: doc.reported.paused || state.pauses > 0,
            // Media may be on their way for days: that nothing arrives is no news.
            last_log_at: if doc.media.is_some() { now } else { doc.last_log_at.unwrap_or(doc.made_at) },
            interval: std::time::Duration::from_secs(doc.interval_s),
            // That is the primary's to judge, which knows of the cycles that failed.
            lately: Lately::default(),
            error: doc.reported.error.as_deref(),
        };
        let health = assess(&input, &self.inner.config.health, now);
        if health.health != state.health.0 {
            state.health = (health.health, now);
        }
        let doc = &state.row.doc;
        VmFacts {
            vm: state.row.vm,
            phase: doc.phase.clone(),
            phase_since: doc.phase_since,
            apply: state.apply.clone(),
            health,
            health_since: state.health.1,
            migrating_since: doc
                .migrating
                .as_ref()
                .map(|migrating| migrating.since)
                .or(doc.relocating.as_ref().map(|relocating| relocating.since)),
        }
    }

    /// Asks the gate for a point. One step: what it saw is still true when the point is pinned.
    ///
    /// A hold can only be had of the point that the flat files equal ([`Store::hold_point`]).
    pub fn admit(&self, vm: VmId, access: Access, point: LogNumber) -> Result<Admitted> {
        let vm = self.vm(vm)?;
        let mut state = vm.live()?;
        let facts = self.facts_of(&mut state);
        let admission = admit(&facts.as_facts(), access, point, self.now())?;
        let found = state.points.get(&point).copied().ok_or(Error::NoSuchPoint { vm: vm.id, point })?;
        let base = state.base_point().map(|base| base.number);
        if access == Access::Hold && base != Some(point) {
            return Err(Error::NotTheBase { vm: vm.id, point, base });
        }
        let pin = Pin::new(self, &vm, &mut state, found);
        drop(state);
        Ok(Admitted { admission, pin })
    }

    /// What there is to show of a replica.
    pub fn status(&self, vm: VmId) -> Result<ReplicaStatus> {
        let vm = self.vm(vm)?;
        let mut state = vm.live()?;
        let facts = self.facts_of(&mut state);
        let now = self.now();
        let (row, doc, folder) = (&state.row, &state.row.doc, state.folder());
        let holds = state.holds.iter().filter(|hold| hold.expires_at > now);
        let allocated = |name: &DiskName| folder.files.allocated_bytes(&folder.disk(name));
        Ok(ReplicaStatus {
            name: row.name.clone(),
            peer: row.peer.clone(),
            primary_name: doc.primary_name.clone(),
            facts,
            reported: doc.reported.clone(),
            disks: doc.offered.clone(),
            interval_s: doc.interval_s,
            points_wanted: doc.points,
            moving_to: doc.relocating.as_ref().map(|relocating| relocating.to.clone()),
            head: doc.head,
            last_log_at: doc.last_log_at,
            applied: doc.base.applied,
            points: state.points.values().copied().collect(),
            measured: doc.measured.sum(now, self.inner.config.health.window),
            pinned: doc.pinned.len(),
            pin_bytes: if doc.pinned.is_empty() { 0 } else { self.pin_bytes(&state) },
            logs: state.logs.len(),
            log_bytes: state.logs.values().map(|log| log.row.bytes).sum(),
            base_bytes: doc.disks.iter().map(allocated).sum(),
            views: state.pins.values().sum(),
            holds: holds.map(|hold| (hold.id.clone(), hold.point, hold.expires_at)).collect(),
            withdrawn: doc.withdrawn,
            damage: doc.damage.clone(),
            folder: row.folder.clone(),
            generation: doc.generation,
            media: doc.media.as_ref().filter(|_| matches!(doc.phase, Phase::InitialReplication { .. })).map(
                |media| AwaitedMedia {
                    set: media.set,
                    logs: media.logs,
                    importing: self.staging().importing.contains(&row.name),
                },
            ),
            group: doc.group.as_ref().map(|group| group.name.clone()),
            failover: doc.failover.as_ref().map(|failover| FailoverStatus {
                point: failover.point,
                ready: failover.ready,
                completing: failover.completing,
                folded: doc.base.applied == failover.point && doc.applying.is_none(),
            }),
        })
    }

    /// Begins a new monitoring window.
    pub fn reset_measurements(&self, vm: VmId) -> Result<()> {
        let vm = self.vm(vm)?;
        let mut state = vm.live()?;
        let mut row = state.row.clone();
        row.doc.measured = Window::beginning(self.now());
        durable_step("replica::measured::resetting");
        self.commit_row(&mut state, row)?;
        durable_step("replica::measured::reset");
        Ok(())
    }

    /// The VM's definition as its primary gave it.
    pub fn definition(&self, vm: VmId) -> Result<serde_json::Value> {
        Ok(serde_json::from_str(&self.vm(vm)?.live()?.row.definition).unwrap_or_default())
    }
}
