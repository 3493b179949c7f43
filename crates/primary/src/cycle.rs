//! One cycle: square up with the replica, fix a moment, read, ship, and let go of the changes, or give
//! them back.
//!
//! ```text
//! offer ─▶ reconcile ─▶ clean up leftovers ─▶ plan ─▶ fix the moment ─▶ read ∥ ship ─▶ durable ─▶ drop bitmap
//!            │                                 │            └── anything fails: end the capture, merge the bitmaps
//!            └── chain not ours                └── bitmap lost ──▶ resynchronization required
//! ```

use std::time::{Duration, Instant};

use model::{
    Consistency, CyclePlan, Head, LogAttempt, Phase, Progress, Purpose, ResyncReason, Timestamp, Tracking,
    phase_after, plan_cycle,
};
use qemu::{Capture, CaptureRequest, Disk, Vm};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use wire::{Offer, OfferedDisk, RelationshipStatus};

use crate::digests::Digests;
use crate::error::{Failure, FailureCode};
use crate::link::link_failure;
use crate::read::{DiskSource, Item, PassLimits, QUEUE_RECORDS, Reader};
use crate::rows::KnownDisk;
use crate::runner::Runner;
use crate::ship::{Cycle, Ledger, Shipment};

/// A pass fixes a new moment at least this often: while a moment is fixed, each first write of the guest
/// to a cluster pays a copy, and the scratch grows.
const PASS_TIME: Duration = Duration::from_secs(60);

/// What a cycle did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CycleReport {
    /// The moment it fixed.
    pub moment: Timestamp,
    /// What its logs were made for.
    pub purpose: Purpose,
    /// Whether it made a recovery point, and of which consistency.
    pub point: Option<Consistency>,
    /// Why an application-consistent point became a crash-consistent one.
    pub note: Option<String>,
    /// The logs shipped, and their bytes on the way.
    pub logs: u32,
    /// Bytes of the logs.
    pub log_bytes: u64,
    /// Bytes of disk in them.
    pub data_bytes: u64,
    /// Bytes of zeros in them.
    pub zero_bytes: u64,
    /// From the moment to the last byte read: how long the guest had a fixed moment beside it.
    pub reading: Duration,
    /// From the moment to the durable acknowledgement.
    pub total: Duration,
}

impl Runner {
    /// Runs one cycle. On failure the changes are where the next cycle finds them.
    pub(crate) async fn cycle(&mut self) -> Result<CycleReport, Failure> {
        let vm = self.connect_vm().await?;
        let disks = self.check_disks(&vm).await?;
        if !self.squared {
            self.square_up(&vm, &disks).await?;
        }
        let tracking = self.tracking(&vm, &disks).await?;
        let row = &self.row;
        let plan = match plan_cycle(&row.phase, &row.shipped, &tracking, row.total_bytes()) {
            Ok(plan) => plan,
            Err(why) => return Err(self.require_resync(why).await?),
        };
        if plan.base.is_none() {
            vm.stop_tracking(&disks).await.map_err(qemu_failure)?;
        }
        self.squared = false; // until this cycle has ended well
        let (capture, consistency, note) = self.fix_moment(&vm, &disks, plan).await?;
        let (moment, fixed) = (capture.moment, Instant::now());
        let outcome = self.read_and_ship(&vm, capture, plan, moment, consistency).await;
        let base = plan.base;
        match outcome {
            Ok((shipment, reading)) => {
                vm.commit(&disks, base, plan.next).await.map_err(qemu_failure)?;
                self.squared = true;
                let point = (self.row.phase == Phase::Replicating).then_some(consistency);
                Ok(report(plan, moment, point, note, shipment, reading, fixed.elapsed()))
            }
            Err(failure) => {
                // The fate of the last log may be unknown: keep every change since the last known one.
                if let Err(error) = vm.give_back(&disks, base, plan.next).await {
                    tracing::warn!(vm = %self.row.name, %error, "the bitmaps are merged when the next cycle starts");
                }
                Err(failure)
            }
        }
    }

    /// Tells the replica what we have, hears what it has, and squares the two.
    async fn square_up(&mut self, vm: &Vm, disks: &[Disk]) -> Result<(), Failure> {
        let offer = self.offer(vm).await;
        let status = self.link()?.client.offer(&offer).await.map_err(|error| link_failure(&error))?;
        if let Some(refused) = &status.refused {
            return Err(Failure {
                code: FailureCode::ReplicaRefused,
                message: refused.message.clone(),
                transient: refused.transient,
            });
        }
        let durable = Head { number: status.durable, id: status.durable_id };
        match self.row.shipped.reconcile(durable) {
            Ok(reconciled) => {
                if let Some(attempt) = reconciled.arrived {
                    self.row.phase = arrived_phase(&self.row.phase, &attempt, &status);
                }
                self.row.shipped = reconciled.shipped;
            }
            Err(why) => {
                self.row.shipped.acked = durable;
                self.row.shipped.attempt = None;
                return Err(self.require_resync(why).await?);
            }
        }
        if let (Phase::ResyncRequired { why }, Phase::Replicating | Phase::InitialReplication { .. }) =
            (&status.phase, &self.row.phase)
        {
            let why = why.clone();
            return Err(self.require_resync(why).await?);
        }
        self.row.save(&self.shared.catalog).await?;
        vm.cleanup(disks, Some(self.row.shipped.tracking)).await.map_err(qemu_failure)?;
        Ok(())
    }

    async fn offer(&self, vm: &Vm) -> Offer {
        let row = &self.row;
        Offer {
            vm: row.vm,
            vm_name: row.name.clone(),
            disks: row
                .disks
                .iter()
                .map(|d| OfferedDisk { name: d.name.clone(), size_bytes: d.size_bytes })
                .collect(),
            interval_s: row.settings.interval.as_secs(),
            points: row.settings.points,
            primary_name: self.shared.config.site_name.clone(),
            definition: vm.definition().await.unwrap_or_default(),
            phase: row.phase.clone(),
            error: row.error.as_ref().map(|failure| failure.message.clone()),
            paused: row.paused,
        }
    }

    /// The disks as they are now; a changed set or size asks for a resynchronization.
    async fn check_disks(&mut self, vm: &Vm) -> Result<Vec<Disk>, Failure> {
        let disks = vm.resolve(&self.row.nodes()).await.map_err(qemu_failure)?;
        let found: Vec<KnownDisk> = disks
            .iter()
            .zip(&self.row.disks)
            .map(|(now, known)| KnownDisk {
                node: known.node.clone(),
                name: known.name.clone(),
                size_bytes: now.size_bytes,
            })
            .collect();
        if let Some((now, known)) = found.iter().zip(&self.row.disks).find(|(now, known)| now != known) {
            let why = ResyncReason::DiskResized(format!(
                "{}: {} bytes before, {} now",
                known.name, known.size_bytes, now.size_bytes
            ));
            self.row.disks = found;
            return Err(self.require_resync(why).await?);
        }
        Ok(disks)
    }

    async fn tracking(&self, vm: &Vm, disks: &[Disk]) -> Result<Tracking, Failure> {
        vm.inspect(disks, self.row.shipped.tracking).await.map_err(qemu_failure)
    }

    /// Writes down that both sides must be compared, tells the replica, and gives the failure to show.
    pub(crate) async fn require_resync(&mut self, why: ResyncReason) -> Result<Failure, Failure> {
        let message = format!("resynchronization is required: {why}");
        tracing::warn!(vm = %self.row.name, %why, "resynchronization is required");
        self.row.phase = Phase::ResyncRequired { why };
        self.squared = false;
        self.row.save(&self.shared.catalog).await?;
        self.tell_replica().await;
        Ok(Failure::transient(FailureCode::ResyncRequired, message))
    }

    async fn fix_moment(
        &mut self,
        vm: &Vm,
        disks: &[Disk],
        plan: CyclePlan,
    ) -> Result<(Capture, Consistency, Option<String>), Failure> {
        let config = &self.shared.config;
        let request = CaptureRequest {
            disks: disks.to_vec(),
            base: plan.base,
            next: plan.next,
            scratch_dir: config.scratch_dir.clone(),
            scratch_limit_bytes: config.scratch_limit_bytes,
        };
        let agent =
            self.row.settings.guest_agent.clone().filter(|_| self.application_point_is_due(plan.purpose));
        match agent {
            None => Ok((vm.begin_capture(request).await.map_err(qemu_failure)?, Consistency::Crash, None)),
            Some(socket) => {
                let (capture, frozen) =
                    vm.begin_capture_frozen(request, &socket).await.map_err(qemu_failure)?;
                Ok(match frozen {
                    Ok(()) => (capture, Consistency::Application, None),
                    Err(error) => (capture, Consistency::Crash, Some(error.to_string())),
                })
            }
        }
    }

    fn application_point_is_due(&self, purpose: Purpose) -> bool {
        let now = self.shared.now();
        purpose == Purpose::Changes
            && self
                .row
                .settings
                .app_every
                .is_some_and(|every| self.row.app_at.is_none_or(|last| now.since(last) >= every))
    }

    /// Reads and ships side by side; the capture ends as soon as the last byte is read, and in any case.
    async fn read_and_ship(
        &mut self,
        vm: &Vm,
        capture: Capture,
        plan: CyclePlan,
        moment: Timestamp,
        consistency: Consistency,
    ) -> Result<(Shipment, Duration), Failure> {
        let link = self.link()?;
        let (vm_id, config) = (self.row.vm, self.shared.config.clone());
        let started = Instant::now();
        let stop = self.stop.clone();
        let (items, received) = mpsc::channel::<Item>(QUEUE_RECORDS);
        let cycle = Cycle {
            link: &link,
            vm: vm_id,
            disks: self
                .row
                .disks
                .iter()
                .map(|d| log::DiskInfo { name: d.name.clone(), size_bytes: d.size_bytes })
                .collect(),
            plan,
            moment,
            consistency,
            patience: config.patience,
        };
        let mut capture = Some(capture);
        let mut reading = Duration::ZERO;
        let read = async {
            let open = capture.as_ref().expect("it is taken only after reading");
            let mut sources = Vec::new();
            for disk in &open.disks {
                sources.push(DiskSource::open(disk).await?);
            }
            let reader = Reader {
                disks: &sources,
                plan,
                limits: PassLimits { data_bytes: config.initial_log_bytes, time: PASS_TIME },
                level: config.compression_level,
                digests: Digests { client: &link.client, vm: vm_id },
                items,
            };
            tokio::select! {
                result = reader.run() => result?,
                over = open.watch() => return Err(qemu_failure(over)),
            }
            drop(sources);
            let capture = capture.take().expect("taken once");
            reading = started.elapsed();
            vm.end_reading(capture).await.map_err(qemu_failure)
        };
        let mut ledger = Rows { runner_row: &mut self.row, shared: &self.shared, plan, moment, consistency };
        let outcome = tokio::select! {
            both = async { tokio::try_join!(read, cycle.ship(received, &mut ledger)) } => both,
            () = stop.cancelled() => Err(Failure::transient(FailureCode::Stopped, "the cycle was stopped")),
        };
        if let Some(capture) = capture.take()
            && let Err(error) = vm.end_reading(capture).await
        {
            tracing::warn!(vm = %self.row.name, %error, "leftovers are removed when the next cycle starts");
        }
        outcome.map(|((), shipment)| (shipment, reading))
    }
}

/// The ledger of a cycle is the VM's row in the catalog.
struct Rows<'a> {
    runner_row: &'a mut crate::rows::Protected,
    shared: &'a crate::runner::Shared,
    plan: CyclePlan,
    moment: Timestamp,
    consistency: Consistency,
}

impl Ledger for Rows<'_> {
    async fn about_to_finish(&mut self, attempt: LogAttempt) -> Result<(), Failure> {
        self.runner_row.shipped.attempt = Some(attempt);
        Ok(self.runner_row.save(&self.shared.catalog).await?)
    }

    async fn durable(&mut self, attempt: LogAttempt, makes_point: bool) -> Result<(), Failure> {
        let row = &mut *self.runner_row;
        row.shipped = row.shipped.with_acked(attempt);
        row.phase =
            phase_after(self.plan.purpose, makes_point, attempt.progress.unwrap_or_default(), &row.phase);
        if makes_point {
            row.point_at = Some(self.moment);
            if self.consistency == Consistency::Application {
                row.app_at = Some(self.moment);
            }
        }
        Ok(row.save(&self.shared.catalog).await?)
    }
}

/// The phase after an attempt whose answer had been lost: its progress was written down with it, and
/// the replica, which has the log, knows whether it made a point.
fn arrived_phase(before: &Phase, attempt: &LogAttempt, status: &RelationshipStatus) -> Phase {
    let complete = |progress: &Progress| progress.covered_bytes == progress.total_bytes;
    match (&attempt.progress, before) {
        (Some(progress), Phase::InitialReplication { .. }) if !complete(progress) => {
            Phase::InitialReplication { progress: *progress }
        }
        (Some(progress), Phase::Resynchronizing { .. } | Phase::ResyncRequired { .. })
            if !complete(progress) =>
        {
            Phase::Resynchronizing { progress: *progress }
        }
        (
            Some(_),
            Phase::InitialReplication { .. } | Phase::Resynchronizing { .. } | Phase::ResyncRequired { .. },
        ) => status.phase.clone(),
        _ => before.clone(),
    }
}

fn report(
    plan: CyclePlan,
    moment: Timestamp,
    point: Option<Consistency>,
    note: Option<String>,
    shipment: Shipment,
    reading: Duration,
    total: Duration,
) -> CycleReport {
    let Shipment { logs, log_bytes, data_bytes, zero_bytes } = shipment;
    CycleReport {
        moment,
        purpose: plan.purpose,
        point,
        note,
        logs,
        log_bytes,
        data_bytes,
        zero_bytes,
        reading,
        total,
    }
}

/// What QEMU refuses is tried again: disks come back, jobs of other tools end, a scratch empties.
pub(crate) fn qemu_failure(error: qemu::Error) -> Failure {
    let code = match &error {
        qemu::Error::ScratchFull { .. } => FailureCode::ScratchFull,
        error if error.is_gone() => FailureCode::QemuGone,
        _ => FailureCode::Qemu,
    };
    Failure::transient(code, error.to_string())
}
