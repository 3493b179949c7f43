//! One cycle: square up with the replica, fix a moment, read, ship, and let go of the changes, or give
//! them back.
//!
//! ```text
//! offer ─▶ reconcile ─▶ clean up leftovers ─▶ plan ─▶ fix the moment ─▶ read ∥ ship ─▶ durable ─▶ drop bitmap
//!            │                                 │            └── anything fails: end the capture, merge the bitmaps
//!            └── chain not ours                └── bitmap lost ──▶ resynchronization required
//! ```

use std::time::Duration;

use catalog::Catalog;
use model::{
    Consistency, CyclePlan, Head, LogAttempt, LogNumber, Phase, Progress, Purpose, ResyncReason, Timestamp,
    Tracking, phase_after, plan_cycle,
};
use serde::{Deserialize, Serialize};
use steps::durable_step;
use tokio::sync::mpsc;
use tokio::time::Instant;
use wire::{Offer, OfferedDisk, RelationshipStatus};

use crate::ahead::ReadAhead;
use crate::digests::Digests;
use crate::error::{Failure, FailureCode};
use crate::ports::{Ahead, Capture, CaptureRequest, Disk, Guest, Ports, Remote};
use crate::read::{Item, PassLimits, QUEUE_RECORDS, Reader};
use crate::relationship::Relationship;
use crate::rows::{KnownDisk, Protected};
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

type DiskOf<P> = <<P as Ports>::Guest as Guest>::Disk;
type CaptureOf<P> = <<P as Ports>::Guest as Guest>::Capture;

impl<P: Ports> Relationship<P> {
    /// Runs one cycle. On failure the changes are where the next cycle finds them.
    pub(crate) async fn cycle(&mut self) -> Result<CycleReport, Failure> {
        let vm = self.connect_guest().await?;
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
            vm.stop_tracking(&disks).await?;
        }
        self.squared = false; // until this cycle has ended well
        let shared = self.shared.clone();
        let room = self.worth_reading_ahead(plan).and_then(|bytes| shared.ahead.take(bytes));
        let ahead = match (&room, plan.base) {
            (Some(room), Some(base)) => self.read_ahead(&vm, &disks, base, room.bytes).await,
            _ => None,
        };
        let (capture, consistency, note) = self.fix_moment(&vm, &disks, plan, ahead.is_some()).await?;
        let (moment, fixed) = (capture.moment(), Instant::now());
        let outcome = self.read_and_ship(&vm, capture, plan, ahead, moment, consistency).await;
        drop(room);
        let base = plan.base;
        match outcome {
            Ok((shipment, reading)) => {
                vm.commit(&disks, base, plan.next).await?;
                self.squared = true;
                let point = (self.row.phase == Phase::Replicating).then_some(consistency);
                Ok(report(plan, moment, point, note, shipment, reading, fixed.elapsed()))
            }
            Err(failure) => {
                // The fate of the last log may be unknown: keep every change since the last known one.
                if let Err(error) = vm.give_back(&disks, base).await {
                    tracing::warn!(vm = %self.row.name, %error, "the bitmaps are merged when the next cycle starts");
                }
                Err(failure)
            }
        }
    }

    /// Tells the replica what we have, hears what it has, and squares the two.
    async fn square_up(&mut self, vm: &P::Guest, disks: &[DiskOf<P>]) -> Result<(), Failure> {
        let offer = self.offer(vm).await;
        let status = self.remote()?.offer(&offer).await?;
        self.heed_bandwidth(status.bandwidth_bytes_per_s);
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
        if let (
            Phase::ResyncRequired { why },
            Phase::Replicating | Phase::InitialReplication { .. } | Phase::Resynchronizing { .. },
        ) = (&status.phase, &self.row.phase)
        {
            let why = why.clone();
            return Err(self.require_resync(why).await?);
        }
        durable_step("primary::offer::saving");
        self.row.save(&self.shared.catalog).await?;
        durable_step("primary::offer::saved");
        vm.cleanup(disks, Some(self.row.shipped.tracking)).await?;
        Ok(())
    }

    async fn offer(&self, vm: &P::Guest) -> Offer {
        let row = &self.row;
        let mut definition = vm.definition().await.unwrap_or_default();
        if let (Some(sign), Some(told)) = (&row.settings.sign_of_life, definition.as_object_mut()) {
            told.insert("sign-of-life".into(), sign.as_str().into());
        }
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
            definition,
            phase: row.phase.clone(),
            error: row.error.as_ref().map(|failure| failure.message.clone()),
            paused: row.paused,
            generation: row.generation,
        }
    }

    /// The disks as they are now; a changed set or size asks for a resynchronization.
    async fn check_disks(&mut self, vm: &P::Guest) -> Result<Vec<DiskOf<P>>, Failure> {
        let disks = vm.resolve(&self.row.nodes()).await?;
        let found: Vec<KnownDisk> = disks
            .iter()
            .zip(&self.row.disks)
            .map(|(now, known)| KnownDisk {
                node: known.node.clone(),
                name: known.name.clone(),
                size_bytes: now.known().size_bytes,
                image: now.known().image,
            })
            .collect();
        let sized = |(now, known): &(&KnownDisk, &KnownDisk)| now.size_bytes != known.size_bytes;
        if let Some((now, known)) = found.iter().zip(&self.row.disks).find(sized) {
            let why = ResyncReason::DiskResized(format!(
                "{}: {} bytes before, {} now",
                known.name, known.size_bytes, now.size_bytes
            ));
            self.row.disks = found;
            return Err(self.require_resync(why).await?);
        }
        self.row.disks = found;
        Ok(disks)
    }

    async fn tracking(&self, vm: &P::Guest, disks: &[DiskOf<P>]) -> Result<Tracking, Failure> {
        vm.inspect(disks, self.row.shipped.tracking).await
    }

    /// Writes down that both sides must be compared, tells the replica, and gives the failure to show.
    pub(crate) async fn require_resync(&mut self, why: ResyncReason) -> Result<Failure, Failure> {
        let message = format!("resynchronization is required: {why}");
        tracing::warn!(vm = %self.row.name, %why, "resynchronization is required");
        self.row.phase = Phase::ResyncRequired { why };
        self.squared = false;
        durable_step("primary::resync::saving");
        self.row.save(&self.shared.catalog).await?;
        durable_step("primary::resync::saved");
        self.tell_replica().await;
        Ok(Failure::transient(FailureCode::ResyncRequired, message))
    }

    /// About how many bytes this cycle will read, if reading ahead saves the guest something: the last one tells.
    fn worth_reading_ahead(&self, plan: CyclePlan) -> Option<u64> {
        let last = self.last_cycle.as_ref().filter(|_| plan.purpose == Purpose::Changes)?;
        (last.data_bytes >= self.shared.config.ahead_from_bytes).then_some(last.data_bytes)
    }

    /// Reads what has changed so far. It only helps: without it everything is read at the moment.
    async fn read_ahead(
        &self,
        vm: &P::Guest,
        disks: &[DiskOf<P>],
        base: LogNumber,
        bytes_max: u64,
    ) -> Option<ReadAhead> {
        let reading = async {
            let ahead = vm.begin_ahead(disks, base).await?;
            let readers = ahead.readers().await?;
            let read = ReadAhead::of(&readers, bytes_max).await?;
            drop(readers);
            vm.end_ahead(ahead).await?;
            Ok(read)
        };
        tokio::select! {
            read = reading => read
                .inspect_err(|error: &Failure| tracing::debug!(vm = %self.row.name, %error, "nothing was read ahead"))
                .ok(),
            () = self.stop.cancelled() => None,
        }
    }

    async fn fix_moment(
        &mut self,
        vm: &P::Guest,
        disks: &[DiskOf<P>],
        plan: CyclePlan,
        again: bool,
    ) -> Result<(CaptureOf<P>, Consistency, Option<String>), Failure> {
        let request = CaptureRequest { disks, base: plan.base, next: plan.next, again };
        let agent = self.row.settings.agent().filter(|_| self.application_point_is_due(plan.purpose));
        match agent {
            None => Ok((vm.begin_capture(request).await?, Consistency::Crash, None)),
            Some(agent) => {
                let (capture, frozen) = vm.begin_capture_frozen(request, &agent).await?;
                Ok(match frozen {
                    Ok(()) => (capture, Consistency::Application, None),
                    Err(why) => (capture, Consistency::Crash, Some(why)),
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
        vm: &P::Guest,
        capture: CaptureOf<P>,
        plan: CyclePlan,
        ahead: Option<ReadAhead>,
        moment: Timestamp,
        consistency: Consistency,
    ) -> Result<(Shipment, Duration), Failure> {
        let remote = self.remote()?;
        let (vm_id, config) = (self.row.vm, self.shared.config.clone());
        let started = Instant::now();
        let stop = self.stop.clone();
        let (items, received) = mpsc::channel::<Item>(QUEUE_RECORDS);
        let nodes = self.row.nodes();
        let sizes: Vec<u64> = self.row.disks.iter().map(|disk| disk.size_bytes).collect();
        let cycle = Cycle {
            ports: &self.shared.ports,
            remote: &remote,
            limiter: self.limiter.as_ref(),
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
            check_sizes(&vm.resolve(&nodes).await?, &sizes)?;
            let readers = open.readers().await?;
            let reader = Reader {
                disks: &readers,
                plan,
                limits: PassLimits { data_bytes: config.initial_log_bytes, time: PASS_TIME },
                compress: config.compress,
                level: config.compression_level,
                digests: Digests { remote: &remote, vm: vm_id },
                read_ahead: ahead,
                items,
            };
            tokio::select! {
                biased;
                result = reader.run() => result?,
                over = open.watch() => return Err(over),
            }
            drop(readers);
            let capture = capture.take().expect("taken once");
            reading = started.elapsed();
            vm.end_reading(capture).await
        };
        let mut ledger =
            Rows { row: &mut self.row, catalog: &self.shared.catalog, plan, moment, consistency };
        let outcome = tokio::select! {
            biased;
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
    row: &'a mut Protected,
    catalog: &'a Catalog,
    plan: CyclePlan,
    moment: Timestamp,
    consistency: Consistency,
}

impl Ledger for Rows<'_> {
    async fn about_to_finish(&mut self, attempt: LogAttempt) -> Result<(), Failure> {
        self.row.shipped.attempt = Some(attempt);
        durable_step("primary::attempt::saving");
        self.row.save(self.catalog).await?;
        durable_step("primary::attempt::saved");
        Ok(())
    }

    async fn durable(&mut self, attempt: LogAttempt, makes_point: bool) -> Result<(), Failure> {
        let row = &mut *self.row;
        row.shipped = row.shipped.with_acked(attempt);
        row.phase =
            phase_after(self.plan.purpose, makes_point, attempt.progress.unwrap_or_default(), &row.phase);
        if makes_point {
            row.point_at = Some(self.moment);
            if self.consistency == Consistency::Application {
                row.app_at = Some(self.moment);
            }
        }
        durable_step("primary::acked::saving");
        row.save(self.catalog).await?;
        durable_step("primary::acked::saved");
        Ok(())
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

/// A disk may have been resized after it was looked at and before the moment was fixed; then the log would lie. Once
/// the moment is fixed QEMU lets nobody resize it.
fn check_sizes<D: Disk>(now: &[D], known: &[u64]) -> Result<(), Failure> {
    match now.iter().map(Disk::known).zip(known).find(|(disk, known)| disk.size_bytes != **known) {
        None => Ok(()),
        Some((disk, _)) => {
            let message = format!("disk {} was resized just before the moment was fixed", disk.name);
            Err(Failure::transient(FailureCode::Qemu, message))
        }
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
