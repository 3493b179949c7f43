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
    Consistency, CyclePlan, Head, LogAttempt, LogNumber, Phase, Progress, Purpose, ResyncReason, ResyncWord,
    Timestamp, phase_after, plan_cycle,
};
use qemu::Seat;
use serde::{Deserialize, Serialize};
use steps::durable_step;
use tokio::sync::mpsc;
use tokio::time::Instant;
use wire::{Offer, OfferedDisk, RelationshipStatus};

use crate::ahead::ReadAhead;
use crate::cover::{DiskPart, covered, parts_of_changes, parts_of_pass};
use crate::digests::Digests;
use crate::error::{Failure, FailureCode};
use crate::ports::{
    Ahead, Announced, Capture, CaptureRequest, Disk, DiskReader, GroupMoment, Guest, Ports, Remote, Report,
};
use crate::read::{Item, PassLimits, QUEUE_RECORDS, Reader, RecordSink};
use crate::relationship::Relationship;
use crate::rows::{KnownDisk, Protected};
use crate::ship::{Carrier, Cycle, Ledger, Shipment};

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
    /// The moment of its group, if it was one.
    #[serde(default)]
    pub shared: Option<GroupMoment>,
    /// The next one follows at once: there are more moments to be passed on.
    #[serde(default)]
    pub goes_on: bool,
}

pub(crate) type DiskOf<P> = <<P as Ports>::Guest as Guest>::Disk;
type CaptureOf<P> = <<P as Ports>::Guest as Guest>::Capture;

impl<P: Ports> Relationship<P> {
    /// Runs one cycle. On failure the changes are where the next cycle finds them.
    pub(crate) async fn cycle(&mut self) -> Result<CycleReport, Failure> {
        let vm = self.connect_guest().await?;
        let disks = vm.resolve(&self.row.nodes()).await?;
        let resized = |(now, known): (&DiskOf<P>, &KnownDisk)| now.known().size_bytes != known.size_bytes;
        // The replica is told of it, too.
        if !self.squared || disks.iter().zip(&self.row.disks).any(resized) {
            self.square_up(&vm, &disks).await?;
        }
        self.check_sizes(&disks).await?;
        let work = self.plan(&vm, &disks).await?;
        let plan = work.plan;
        if plan.base.is_none() {
            vm.stop_tracking(&disks).await?;
        }
        if plan.purpose == Purpose::Changes && !vm.has_news(self.row.shipped.tracking).await? {
            self.squared = true;
            let moment = self.row.point_at.unwrap_or(self.row.made_at);
            let (nothing, at_once) = (Shipment::default(), Duration::ZERO);
            return Ok(report(plan, moment, None, None, nothing, at_once, at_once));
        }
        self.squared = false; // until this cycle has ended well
        let shared = self.shared.clone();
        let room = self.worth_reading_ahead(&work).and_then(|bytes| shared.ahead.take(bytes));
        let ahead = match (&room, plan.base) {
            (Some(room), Some(base)) => self.read_ahead(&vm, &disks, base, room.bytes).await,
            _ => None,
        };
        let is_seated = self.seat.is_some();
        let (capture, consistency, note) = self.fix_moment(&vm, &disks, &work, ahead.is_some()).await?;
        // While the others were waited for it had none: a group may have more VMs than there are turns.
        let turn = if is_seated { shared.cycles.acquire().await.ok() } else { None };
        let group = capture.shared();
        let moment = group.as_ref().map_or_else(|| capture.moment(), |group| group.at);
        let fixed = Instant::now();
        let made = Made { moment, consistency, group: group.clone() };
        let outcome = self.read_and_ship(&vm, capture, work, ahead, made).await;
        drop((room, turn));
        let base = plan.base;
        match outcome {
            Ok((shipment, reading)) => {
                vm.commit(&disks, base, plan.next).await?;
                self.squared = !self.row.is_whole_on_media();
                let point = (self.row.phase == Phase::Replicating).then_some(consistency);
                let report = report(plan, moment, point, note, shipment, reading, fixed.elapsed());
                let goes_on = vm.has_backlog(self.row.shipped.tracking).await;
                Ok(CycleReport { shared: group, goes_on, ..report })
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
    pub(crate) async fn square_up(&mut self, vm: &P::Guest, disks: &[DiskOf<P>]) -> Result<(), Failure> {
        let offer = self.offer(vm, disks).await;
        if let Some(folder) = self.media_folder() {
            return self.square_up_with_media(&folder, &offer, vm, disks).await;
        }
        let status = self.remote()?.offer(&offer).await?;
        self.heed_bandwidth(status.bandwidth_bytes_per_s);
        if let Some(refused) = &status.refused {
            return Err(Failure {
                code: FailureCode::ReplicaRefused,
                message: refused.message.clone(),
                transient: refused.transient,
            });
        }
        self.check_import(&status)?;
        let durable = Head { number: status.durable, id: status.durable_id };
        match self.row.shipped.reconcile(durable) {
            Ok(reconciled) => {
                if let Some(attempt) = reconciled.arrived {
                    let phase = arrived_phase(&self.row.phase, &attempt, &status);
                    self.row.enter(phase);
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
        self.check_seed()?;
        durable_step("primary::offer::saving");
        self.row.save(&self.shared.catalog).await?;
        durable_step("primary::offer::saved");
        vm.cleanup(disks, Some(self.row.shipped.tracking)).await?;
        Ok(())
    }

    async fn offer(&self, vm: &P::Guest, disks: &[DiskOf<P>]) -> Offer {
        let row = &self.row;
        let mut definition = vm.definition().await.unwrap_or_default();
        if let (Some(sign), Some(told)) = (&row.settings.sign_of_life, definition.as_object_mut()) {
            told.insert("sign-of-life".into(), sign.as_str().into());
        }
        Offer {
            vm: row.vm,
            vm_name: row.name.clone(),
            disks: disks
                .iter()
                .zip(&row.disks)
                .map(|(now, known)| OfferedDisk {
                    name: known.name.clone(),
                    size_bytes: now.known().size_bytes,
                })
                .collect(),
            interval_s: self.interval().as_secs(),
            points: row.settings.points,
            primary_name: self.shared.config.site_name.clone(),
            definition,
            phase: row.phase.clone(),
            error: row.error.as_ref().map(|failure| failure.message.clone()),
            paused: row.paused,
            generation: row.generation,
            media: row.offered_media(),
            pins: vm.pins().await,
            group: self.group.as_ref().map(|membership| membership.group.clone()),
        }
    }

    /// Looks at the disks' sizes. One that has grown is read to its new end by this cycle, and one that joins begins
    /// anew; a disk that has shrunk, or any that changes its size within a pass, asks for a resynchronization.
    async fn check_sizes(&mut self, disks: &[DiskOf<P>]) -> Result<(), Failure> {
        let now = |(disk, known): (&DiskOf<P>, &KnownDisk)| {
            let KnownDisk { size_bytes, image, .. } = disk.known();
            KnownDisk { size_bytes, image, ..known.clone() }
        };
        let now: Vec<KnownDisk> = disks.iter().zip(&self.row.disks).map(now).collect();
        if self.row.begins_pass() {
            self.row.disks = now.into_iter().map(|disk| KnownDisk { joining: None, ..disk }).collect();
            return Ok(());
        }
        let goes_on = |known: &KnownDisk, now: &KnownDisk| match known.joining {
            Some(_) => true,
            None if self.row.phase == Phase::Replicating => now.size_bytes >= known.size_bytes,
            None => now.size_bytes == known.size_bytes,
        };
        if let Some((known, now)) = self.row.disks.iter().zip(&now).find(|(known, now)| !goes_on(known, now))
        {
            let (name, before, now) = (&known.name, known.size_bytes, now.size_bytes);
            let why = ResyncReason::DiskResized(format!("{name}: {before} bytes before, {now} now"));
            return Err(self.require_resync(why).await?);
        }
        for (known, now) in self.row.disks.iter_mut().zip(now) {
            known.image = now.image;
            if known.joining.is_some() && known.size_bytes != now.size_bytes {
                (known.size_bytes, known.joining) = (now.size_bytes, Some(0));
            }
        }
        Ok(())
    }

    /// Decides what this cycle does, and what it looks at on each disk.
    async fn plan(&mut self, vm: &P::Guest, disks: &[DiskOf<P>]) -> Result<Work, Failure> {
        let row = &self.row;
        let covered = covered(&row.phase, &row.disks);
        // Of what nothing has been read, no bitmap is needed.
        let tracked: Vec<_> = disks
            .iter()
            .zip(covered)
            .filter(|(_, covered)| *covered > 0)
            .map(|(disk, _)| disk.clone())
            .collect();
        let tracking = vm.inspect(&tracked, row.shipped.tracking).await?;
        let plan = match plan_cycle(&row.phase, &row.shipped, &tracking, row.total_bytes()) {
            Ok(plan) => plan,
            Err(why) => return Err(self.require_resync(why).await?),
        };
        let sizes: Vec<u64> = disks.iter().map(|disk| disk.known().size_bytes).collect();
        let parts = match plan.purpose {
            Purpose::Changes => parts_of_changes(&row.disks, &sizes),
            Purpose::Initial | Purpose::Resync => parts_of_pass(&sizes, plan.covered_bytes),
        };
        let resized = |(known, &size_bytes): (&KnownDisk, &u64)| KnownDisk { size_bytes, ..known.clone() };
        let after = row.disks.iter().zip(&sizes).map(resized).collect();
        Ok(Work { plan, parts, after })
    }

    /// Writes down that both sides must be compared, tells the replica, and gives the failure to show.
    pub(crate) async fn require_resync(&mut self, why: ResyncReason) -> Result<Failure, Failure> {
        if self.media_folder().is_some() {
            self.begin_media_anew()?;
            return self
                .saved_requirement(format!("the media are written anew from the beginning: {why}"))
                .await;
        }
        let message = format!("resynchronization is required: {why}");
        tracing::warn!(vm = %self.row.name, %why, "resynchronization is required");
        if why == ResyncReason::Seeded {
            self.row.passes.word = ResyncWord::Asked; // with the wish for an initial replication
        }
        self.row.must_resync(why);
        self.saved_requirement(message).await
    }

    async fn saved_requirement(&mut self, message: String) -> Result<Failure, Failure> {
        self.squared = false;
        durable_step("primary::resync::saving");
        self.row.save(&self.shared.catalog).await?;
        durable_step("primary::resync::saved");
        self.tell_replica().await;
        Ok(Failure::transient(FailureCode::ResyncRequired, message))
    }

    /// About how many bytes this cycle will read, if reading ahead saves the guest something: the last one tells.
    fn worth_reading_ahead(&self, work: &Work) -> Option<u64> {
        // Only changes are read ahead, and only with a bitmap on every disk.
        let last = self.last_cycle.as_ref().filter(|_| work.is_only_changes())?;
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
        work: &Work,
        again: bool,
    ) -> Result<(CaptureOf<P>, Consistency, Option<String>), Failure> {
        let plan = work.plan;
        let fresh: Vec<usize> =
            work.parts.iter().filter(|part| part.covered.is_empty()).map(|part| part.disk).collect();
        let seat = self.seat.take().filter(|_| plan.purpose == Purpose::Changes);
        let freezes = self.row.settings.app_every.is_some() && seat.as_ref().is_some_and(Seat::freezes);
        let agent =
            self.row.settings.agent().filter(|_| freezes || self.application_point_is_due(plan.purpose));
        let in_pass = plan.purpose != Purpose::Changes;
        let request =
            CaptureRequest { disks, fresh: &fresh, base: plan.base, next: plan.next, in_pass, again, seat };
        match agent {
            None => {
                let capture = vm.begin_capture(request).await?;
                let consistency = capture.consistency();
                Ok((capture, consistency, None))
            }
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
        work: Work,
        ahead: Option<ReadAhead>,
        made: Made,
    ) -> Result<(Shipment, Duration), Failure> {
        let (remote, folder) = (self.remote()?, self.media_folder());
        // What a capture has as records already speaks for changes alone.
        let only_changes = work.is_only_changes();
        let Work { plan, parts, after } = work;
        let (vm_id, config) = (self.row.vm, self.shared.config.clone());
        let started = Instant::now();
        // While a disk joins, the points of the others go on: it has half of the time between them.
        let time = match plan.purpose {
            Purpose::Changes => self.interval() / 2,
            Purpose::Initial | Purpose::Resync => PASS_TIME,
        };
        let stop = self.stop.clone();
        let (items, received) = mpsc::channel::<Item>(QUEUE_RECORDS);
        let nodes = self.row.nodes();
        let sizes: Vec<u64> = after.iter().map(|disk| disk.size_bytes).collect();
        let cycle = Cycle {
            ports: &self.shared.ports,
            carrier: match &folder {
                Some(folder) => Carrier::Media(folder),
                None => Carrier::Line {
                    remote: &remote,
                    limiter: self.limiter.as_ref(),
                    patience: config.patience,
                },
            },
            vm: vm_id,
            disks: after
                .iter()
                .map(|d| log::DiskInfo { name: d.name.clone(), size_bytes: d.size_bytes })
                .collect(),
            plan,
            moment: made.moment,
            consistency: made.consistency,
        };
        let mut capture = Some(capture);
        let mut reading = Duration::ZERO;
        let read = async {
            let open = capture.as_ref().expect("it is taken only after reading");
            check_sizes(&vm.resolve(&nodes).await?, &sizes)?;
            let made = RecordSink::new(items.clone());
            let readers = open.readers().await?;
            check_readers(&readers, &cycle.disks)?;
            let reader = Reader {
                disks: &readers,
                parts,
                plan,
                limits: PassLimits { data_bytes: config.initial_log_bytes, time },
                compress: config.compress,
                level: config.compression_level,
                digests: Digests { remote: &remote, vm: vm_id },
                read_ahead: ahead,
                items,
            };
            let read = async {
                if only_changes && open.records(&made).await? {
                    return made.end(sizes.iter().sum()).await;
                }
                reader.run().await
            };
            tokio::select! {
                biased;
                result = read => result?,
                over = open.watch() => return Err(over),
            }
            drop(readers);
            let capture = capture.take().expect("taken once");
            reading = started.elapsed();
            vm.end_reading(capture).await
        };
        let catalog = &self.shared.catalog;
        let mut ledger = Rows { row: &mut self.row, catalog, remote: &remote, plan, after, made };
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

/// What one cycle is to do.
struct Work {
    plan: CyclePlan,
    parts: Vec<DiskPart>,
    /// The disks as they are agreed once it has ended.
    after: Vec<KnownDisk>,
}

impl Work {
    /// Whether nothing is sent but what a bitmap on every disk names.
    fn is_only_changes(&self) -> bool {
        self.plan.purpose == Purpose::Changes && self.parts.iter().all(DiskPart::is_only_changes)
    }
}

/// What a cycle's point comes to.
struct Made {
    moment: Timestamp,
    consistency: Consistency,
    /// It is the point of other VMs too.
    group: Option<GroupMoment>,
}

/// The ledger of a cycle is the VM's row in the catalog.
struct Rows<'a, R> {
    row: &'a mut Protected,
    catalog: &'a Catalog,
    remote: &'a R,
    plan: CyclePlan,
    after: Vec<KnownDisk>,
    made: Made,
}

impl<R: Remote> Rows<'_, R> {
    /// Tells the replica's site, before it has the point, that it is one of the group's.
    async fn announce(&self, head: Head) -> Result<(), Failure> {
        let Some(moment) = self.made.group.clone() else { return Ok(()) };
        let Head { number, id } = head;
        let report = Report {
            phase: self.row.phase.clone(),
            error: None,
            paused: self.row.paused,
            moment: Some(Announced { number, id, moment }),
        };
        self.remote.report(self.row.vm, &report).await
    }
}

impl<R: Remote> Ledger for Rows<'_, R> {
    fn joined(&mut self, covered: &[u64]) -> usize {
        let joining = self.after.iter_mut().filter(|disk| disk.joining.is_some());
        joining.zip(covered).for_each(|(disk, &covered)| disk.joining = Some(covered));
        // A log's disks go by their places: one that is whole waits for those before it.
        let whole =
            self.after.iter().take_while(|d| d.joining.is_none_or(|covered| covered == d.size_bytes)).count();
        self.after[..whole].iter_mut().for_each(|disk| disk.joining = None);
        whole
    }

    async fn about_to_finish(&mut self, attempt: LogAttempt) -> Result<(), Failure> {
        if attempt.ends_cycle {
            self.announce(attempt.head).await?;
        }
        self.row.shipped.attempt = Some(attempt);
        durable_step("primary::attempt::saving");
        self.row.save(self.catalog).await?;
        durable_step("primary::attempt::saved");
        Ok(())
    }

    async fn durable(&mut self, attempt: LogAttempt, makes_point: bool) -> Result<(), Failure> {
        let row = &mut *self.row;
        row.shipped = row.shipped.with_acked(attempt);
        // Not before, and not when its answer is lost: then what it had new of a disk is sent once more.
        if attempt.ends_cycle {
            row.disks.clone_from(&self.after);
        }
        let progress = attempt.progress.unwrap_or_default();
        if let Some(media) = &mut row.passes.media {
            // At the replica it is once it was imported.
            media.moment = makes_point.then_some(self.made.moment);
            if let Some(progress) = attempt.progress {
                row.phase = Phase::InitialReplication { progress };
            }
        } else {
            row.enter(phase_after(self.plan.purpose, makes_point, progress, &row.phase));
            if makes_point {
                row.point_at = Some(self.made.moment);
                if self.made.consistency == Consistency::Application {
                    row.app_at = Some(self.made.moment);
                }
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

/// What is fixed may be of another moment than what was looked at, and have other disks: where a point is passed on.
fn check_readers<D: DiskReader>(readers: &[D], disks: &[log::DiskInfo]) -> Result<(), Failure> {
    let found = readers.iter().map(|reader| (reader.name(), reader.size_bytes()));
    if found.eq(disks.iter().map(|disk| (&disk.name, disk.size_bytes))) {
        return Ok(());
    }
    let message = "the disks have changed just before the moment was fixed";
    Err(Failure::transient(FailureCode::Disks, message))
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
        shared: None,
        goes_on: false,
    }
}
