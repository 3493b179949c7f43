//! One protected VM: what it remembers, and what can be done with it, one thing at a time.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use catalog::Catalog;
use model::{
    ApplyState, CycleTally, HealthInput, LastError, Lately, MayRun, Owed, Phase, Progress, Purpose,
    Timestamp, assess, tally_ms,
};
use qemu::Seat;
use steps::durable_step;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use wire::{RateLimiter, Relocation, Report};

use crate::ahead::Memory;
use crate::cycle::CycleReport;
use crate::error::{Error, Failure, FailureCode};
use crate::group::Membership;
use crate::ports::{Guest, Ports, Remote};
use crate::rows::{self, Measured, Protected};
use crate::{Config, VmStatus};

/// How often a source that had nothing newer is asked again: this part of the interval, and no less than a moment.
const NEWS_LOOKS: u32 = 10;
const NEWS_LOOK_MIN: Duration = Duration::from_millis(100);

/// No more of an error is kept in the monitoring window, in characters.
const ERROR_CHARS: usize = 500;

/// Whether images have arrived, or media were imported, is asked at least this often.
const SEED_LOOK: Duration = Duration::from_secs(30);

/// What the relationships of a site share.
pub struct Shared<P> {
    pub(crate) catalog: Catalog,
    pub(crate) config: Arc<Config>,
    pub(crate) ports: P,
    /// Cycles at once, over all VMs: bounds memory and what the guests' host feels.
    pub(crate) cycles: Semaphore,
    /// Memory for what is read ahead.
    pub(crate) ahead: Memory,
}

impl<P: Ports> Shared<P> {
    /// Makes sure of the tables in the catalog. Blocks.
    pub fn open(catalog: Catalog, config: Config, ports: P) -> Result<Arc<Self>, Error> {
        rows::migrate(&catalog)?;
        let cycles = Semaphore::new(config.cycles_at_once.max(1));
        let ahead = Memory::of_site();
        Ok(Arc::new(Self { catalog, config: Arc::new(config), ports, cycles, ahead }))
    }

    /// The ports.
    pub fn ports(&self) -> &P {
        &self.ports
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.ports.now()
    }
}

/// One protected VM. It does something only when it is asked to, on its caller's task: a site's runner asks it
/// when a cycle is due, a simulation whenever it likes.
///
/// It can be dropped, and any of its futures too, at any time, as when the process is killed: what it must
/// know is in the catalog, and [`Relationship::load`] goes on from there.
pub struct Relationship<P: Ports> {
    pub(crate) row: Protected,
    pub(crate) shared: Arc<Shared<P>>,
    /// The last cycle ended well, so both sides are known to agree.
    pub(crate) squared: bool,
    pub(crate) stop: CancellationToken,
    pub(crate) limiter: Option<RateLimiter>,
    /// The group that it is in.
    pub(crate) group: Option<Membership>,
    /// Where its cycle waits for those of its group.
    pub(crate) seat: Option<Seat>,
    guest: Option<Arc<P::Guest>>,
    next_at: Timestamp,
    /// When that was decided: a clock that shows less than this has been set back.
    booked_at: Timestamp,
    pub(crate) last_cycle: Option<CycleReport>,
    measured: Measured,
    /// When a cycle was last owed; what counts as missed begins anew with the process.
    owed: Owed,
    sent_bytes: u64,
    pending_bytes: Option<u64>,
    /// How far a move of the replica is, as it was told last.
    pub(crate) relocation: Relocation,
    pub(crate) stopper: Stopper,
    status: Arc<Mutex<VmStatus>>,
}

/// Ends a running cycle early, from another task.
#[derive(Debug, Clone, Default)]
pub struct Stopper(Arc<Mutex<CancellationToken>>);

impl Stopper {
    /// Ends the cycle that is running, if there is one.
    pub fn stop_cycle(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).cancel();
    }

    /// The token of a new cycle.
    pub(crate) fn renew(&self) -> CancellationToken {
        let token = CancellationToken::new();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = token.clone();
        token
    }
}

impl<P: Ports> Relationship<P> {
    /// All that the catalog remembers, by name.
    pub fn load(shared: &Arc<Shared<P>>) -> Result<Vec<Self>, Error> {
        let with_window = |row: Protected| {
            let measured = Measured::load(&shared.catalog, row.vm, shared.now())?;
            Ok(Self::new(row, measured, shared.clone()))
        };
        let served = |row: &Protected| P::serves(&row.settings);
        rows::load(&shared.catalog)?.into_iter().filter(served).map(with_window).collect()
    }

    pub(crate) fn new(row: Protected, measured: Measured, shared: Arc<Shared<P>>) -> Self {
        let (stopper, loaded_at) = (Stopper::default(), shared.now());
        Self {
            next_at: loaded_at,
            booked_at: loaded_at,
            limiter: row.settings.bandwidth_bytes_per_s.map(RateLimiter::new),
            status: Arc::new(Mutex::new(VmStatus::starting(&row))),
            row,
            shared,
            squared: false,
            group: None,
            seat: None,
            stop: stopper.renew(),
            guest: None,
            last_cycle: None,
            measured,
            owed: Owed::from(loaded_at),
            sent_bytes: 0,
            pending_bytes: None,
            relocation: Relocation::default(),
            stopper,
        }
    }

    /// What the catalog remembers of it.
    pub fn row(&self) -> &Protected {
        &self.row
    }

    /// What ends its running cycle.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// How long until a cycle is due by itself; none while it is not.
    pub fn due_in(&self) -> Option<Duration> {
        if self.group.is_some() && self.absence().is_none() && !self.row.has_joining() {
            return None; // the group's cycles are
        }
        let ended = self.row.phase == Phase::FailedOver;
        let blocked =
            ended || self.row.paused || self.row.error.as_ref().is_some_and(|failure| !failure.transient);
        let now = self.shared.now();
        // Whoever sets a clock back by a day must not stop replication for a day.
        let left = if now < self.booked_at { Duration::ZERO } else { self.next_at.since(now) };
        match self.row.may_run(now) {
            _ if blocked => None,
            MayRun::Now => Some(left),
            MayRun::From(at) => Some(left.max(at.since(now))),
            MayRun::WhenAsked => None,
        }
    }

    /// Asks a VM that is connected how much has changed since the last cycle, and whether it has got disks.
    pub async fn look(&mut self) {
        self.look_at_move().await;
        let Some(guest) = self.guest.clone().filter(|guest| guest.is_alive()) else { return };
        self.pending_bytes = match self.look_at_disks(&guest).await {
            Ok(disks) => guest.pending_bytes(&disks, self.row.shipped.tracking).await.ok(),
            Err(_) => None,
        };
    }

    /// Whether all that there is has been sent, as far as is known without asking the replica's site; then what is due
    /// is another look a little later.
    pub async fn has_sent_everything(&mut self) -> bool {
        let guest = self.guest.clone().filter(|guest| self.squared && guest.is_alive());
        let Some(guest) = guest.filter(|_| self.row.phase == Phase::Replicating) else { return false };
        if !matches!(guest.has_news(self.row.shipped.tracking).await, Ok(false)) {
            return false;
        }
        self.book_a_look();
        true
    }

    fn book_a_look(&mut self) {
        self.book((self.interval() / NEWS_LOOKS).max(NEWS_LOOK_MIN));
        // What is not there yet is not missed.
        self.owed = Owed::from(self.next_at);
    }

    /// Runs cycles until one made a point, or there is nothing to make one of.
    pub async fn sync(&mut self) -> Result<(), Failure> {
        self.check_is_ours()?;
        if self.row.paused {
            let message = format!("replication of {} is paused; 'afterimage resume' first", self.row.name);
            return Err(Failure::lasting(FailureCode::Stopped, message));
        }
        self.begin_initial_now();
        loop {
            self.check_rest()?;
            let before = self.row.phase.clone();
            match self.cycle_now().await {
                Ok(report) if report.point.is_some() || report.logs == 0 => return Ok(()),
                Ok(_) => {}
                // A resynchronization that has just become necessary is a part of the way, not its end.
                Err(failure)
                    if failure.code == FailureCode::ResyncRequired
                        && !matches!(before, Phase::ResyncRequired { .. }) => {}
                Err(failure) => return Err(failure),
            }
            self.publish();
        }
    }

    pub(crate) fn check_is_ours(&self) -> Result<(), Failure> {
        if self.row.phase != Phase::FailedOver {
            return Ok(());
        }
        let message = format!(
            "{} was failed over and runs at {}; 'afterimage failover reverse' there makes this site its replica",
            self.row.name, self.row.settings.peer
        );
        Err(Failure::lasting(FailureCode::Stopped, message))
    }

    /// Stops cycles; the VM goes on tracking changes.
    pub async fn pause(&mut self) -> Result<(), Failure> {
        self.check_is_ours()?;
        self.set_paused(true).await
    }

    /// Lets cycles run again, at once, whatever stopped them.
    pub async fn resume(&mut self) -> Result<(), Failure> {
        self.row.error = None;
        self.row.failures = 0;
        self.begin_initial_now();
        self.book(Duration::ZERO);
        self.owed = Owed::from(self.next_at);
        self.set_paused(false).await
    }

    async fn set_paused(&mut self, paused: bool) -> Result<(), Failure> {
        self.row.paused = paused;
        durable_step("primary::pause::saving");
        self.row.save(&self.shared.catalog).await?;
        durable_step("primary::pause::saved");
        self.tell_replica().await;
        Ok(())
    }

    /// Leaves nothing of ours in the VM, and tells the replica; the row stays.
    pub async fn forget(&mut self) -> Result<(), Failure> {
        self.give_up_relocation().await;
        let nodes = self.row.nodes();
        // A VM that is gone has no bitmaps of ours any more.
        if let Ok(guest) = self.connect_guest().await
            && let Ok(disks) = guest.resolve(&nodes).await
        {
            guest.cleanup(&disks, None).await?;
            guest.stop_tracking(&disks).await?;
        }
        if let Ok(remote) = self.remote() {
            let _ = remote.withdraw(self.row.vm).await;
        }
        self.give_up_media().await;
        Ok(())
    }

    /// Runs one cycle, whether it is due or not, and books how it ended. Waits while too many others run.
    pub async fn cycle_now(&mut self) -> Result<CycleReport, Failure> {
        let shared = self.shared.clone();
        let _turn = shared
            .cycles
            .acquire()
            .await
            .map_err(|_| Failure::transient(FailureCode::Stopped, "the site is stopping"))?;
        self.stop = self.stopper.renew();
        self.move_on().await;
        let started = self.shared.now();
        let outcome = self.cycle().await;
        self.settle(started, &outcome).await;
        outcome
    }

    /// Books a cycle: when the next one is due, what to show and what to measure.
    pub(crate) async fn settle(&mut self, started: Timestamp, outcome: &Result<CycleReport, Failure>) {
        match outcome {
            Ok(report) => self.settle_done(started, report),
            // A pause, or the end of the site: no error, and nothing that was missed.
            Err(failure) if failure.code == FailureCode::Stopped && self.stop.is_cancelled() => {
                self.squared = false;
                self.book(Duration::ZERO);
                self.owed = Owed::from(self.next_at);
            }
            Err(failure) if matches!(failure.code, FailureCode::SeedAwaited | FailureCode::MediaAwaited) => {
                self.row.error = Some(failure.clone());
                self.book(SEED_LOOK.min(self.interval()));
                self.owed = Owed::from(self.next_at);
            }
            Err(failure) => self.settle_failed(failure).await,
        }
        durable_step("primary::cycle::settling");
        if let Err(error) = self.row.save_measured(&self.shared.catalog, &self.measured).await {
            tracing::error!(vm = %self.row.name, %error, "the cycle could not be written down");
        }
        durable_step("primary::cycle::settled");
    }

    fn settle_done(&mut self, started: Timestamp, report: &CycleReport) {
        let (now, interval) = (self.shared.now(), self.interval());
        self.row.failures = 0;
        self.row.error = None;
        if report.logs == 0 {
            return self.book_a_look();
        }
        self.sent_bytes += report.log_bytes;
        self.pending_bytes = Some(0);
        self.last_cycle = Some(report.clone());
        // A pass goes on at once, and so does what a disk joins by. A cycle that took longer than its interval is not made up for.
        let goes_on = report.point.is_none() || report.goes_on || self.row.has_joining();
        let pause = if goes_on { Duration::ZERO } else { interval };
        self.book(pause.saturating_sub(now.since(started)));
        let tally = if report.purpose == Purpose::Changes {
            let latency_ms = tally_ms(report.total);
            CycleTally {
                done: 1,
                missed: self.owed.done(now, interval, self.next_at),
                log_bytes: report.log_bytes,
                log_bytes_max: report.log_bytes,
                latency_ms,
                latency_ms_max: latency_ms,
                ..CycleTally::default()
            }
        } else {
            self.owed = Owed::from(self.next_at);
            CycleTally { passes: 1, ..CycleTally::default() }
        };
        self.note(&tally);
    }

    async fn settle_failed(&mut self, failure: &Failure) {
        let (now, interval) = (self.shared.now(), self.interval());
        tracing::warn!(vm = %self.row.name, error = %failure, "a cycle failed");
        self.guest = self.guest.take().filter(|_| failure.code != FailureCode::QemuGone);
        self.squared = false;
        let before = self.row.error.replace(failure.clone()).map(|failure| failure.code);
        // What the next cycle mends is no reason to wait, unless it has just failed to mend it.
        if failure.code == FailureCode::ResyncRequired && before != Some(FailureCode::ResyncRequired) {
            self.book(Duration::ZERO);
        } else {
            self.row.failures += 1;
            self.book(self.shared.config.backoff.delay(self.row.failures));
        }
        let missed = if self.row.phase == Phase::Replicating {
            self.owed.failed(now, interval)
        } else {
            self.owed = Owed::from(self.next_at);
            0
        };
        self.note(&CycleTally { failed: 1, missed, ..CycleTally::default() });
        let message = failure.message.chars().take(ERROR_CHARS).collect();
        self.measured.last_error = Some(LastError { at: now, message });
        if !failure.transient {
            self.tell_replica().await;
        }
    }

    fn note(&mut self, tally: &CycleTally) {
        self.measured.cycles.note(tally, self.shared.now(), self.shared.config.thresholds.window);
    }

    /// Begins a new monitoring window.
    pub async fn reset_measurements(&mut self) -> Result<(), Failure> {
        self.measured = Measured::beginning(self.shared.now());
        durable_step("primary::measured::saving");
        self.row.save_measured(&self.shared.catalog, &self.measured).await?;
        durable_step("primary::measured::saved");
        Ok(())
    }

    /// What the replica's site is told has changed: the next cycle is due at once, and begins with an offer.
    pub(crate) fn square_up_anew(&mut self) {
        self.squared = false;
        self.book_now();
        self.owed = Owed::from(self.next_at);
    }

    /// The next connection to the VM is a new one.
    pub(crate) fn let_go_of_guest(&mut self) {
        self.guest = None;
        self.squared = false;
    }

    /// The next cycle is due at once.
    pub(crate) fn book_now(&mut self) {
        self.book(Duration::ZERO);
    }

    /// Sends no faster than a person has said here, nor than the replica's site takes it.
    pub(crate) fn heed_bandwidth(&mut self, taken_bytes_per_s: Option<u64>) {
        let rate = self.row.settings.bandwidth_bytes_per_s.into_iter().chain(taken_bytes_per_s).min();
        if self.limiter.as_ref().map(RateLimiter::bytes_per_s) != rate {
            self.limiter = rate.map(RateLimiter::new);
        }
    }

    /// The next cycle is due after this time.
    pub(crate) fn book(&mut self, wait: Duration) {
        self.booked_at = self.shared.now();
        self.next_at = self.booked_at.plus(wait);
    }

    /// Tells the replica's site where we stand, as far as it can be reached.
    pub(crate) async fn tell_replica(&self) {
        let report = Report {
            phase: self.row.phase.clone(),
            error: self.row.error.as_ref().filter(|failure| !failure.transient).map(|f| f.message.clone()),
            paused: self.row.paused,
            moment: None,
        };
        if let Ok(remote) = self.remote()
            && let Err(error) = remote.report(self.row.vm, &report).await
        {
            tracing::debug!(vm = %self.row.name, %error, "the replica was not told");
        }
    }

    /// The connection to the VM; kept over cycles, made again when it is gone.
    pub(crate) async fn connect_guest(&mut self) -> Result<Arc<P::Guest>, Failure> {
        if let Some(guest) = self.guest.as_ref().filter(|guest| guest.is_alive()) {
            return Ok(guest.clone());
        }
        let guest = Arc::new(self.shared.ports.connect(self.row.vm, &self.row.settings).await?);
        self.squared = false;
        self.guest = Some(guest.clone());
        Ok(guest)
    }

    pub(crate) fn remote(&self) -> Result<P::Remote, Failure> {
        let peer = &self.row.settings.peer;
        self.shared.ports.remote(peer).ok_or_else(|| {
            Failure::lasting(
                FailureCode::UnknownPeer,
                format!("the peer {peer} of VM {} is not known here, or was revoked; invite it again or accept an invite of it, then run 'afterimage resume'", self.row.name),
            )
        })
    }

    /// What there is to say of it now.
    pub fn status(&self) -> VmStatus {
        let now = self.shared.now();
        let measured = self.measured.cycles.sum(now, self.shared.config.thresholds.window);
        // Media may be on their way for days: that nothing is sent is no news.
        let by_media = self.row.passes.media.as_ref().map(|_| now);
        let health = assess(
            &HealthInput {
                phase: &self.row.phase,
                apply: &ApplyState::Idle,
                paused: self.row.paused,
                last_log_at: by_media.or(self.row.point_at).unwrap_or(self.row.made_at),
                interval: self.interval(),
                lately: Lately::of(&measured, now),
                error: self.row.error.as_ref().filter(|f| !f.transient).map(|f| f.message.as_str()),
            },
            &self.shared.config.thresholds,
            now,
        );
        let settings = rows::Settings { interval: self.interval(), ..self.row.settings.clone() };
        VmStatus {
            settings,
            group: self.group.as_ref().map(|membership| membership.group.name.clone()),
            health,
            last_cycle: self.last_cycle.clone(),
            pending_bytes: self.pending_bytes,
            next_at: self.next_at,
            may_run: self.row.may_run(now),
            sent_bytes: self.sent_bytes,
            last_error: self.measured.last_error.clone().filter(|error| error.at >= measured.since),
            measured,
            relocation: self.relocation.clone(),
            ..VmStatus::starting(&self.row)
        }
    }

    /// Where other tasks see its status, as it was last published.
    pub(crate) fn published(&self) -> Arc<Mutex<VmStatus>> {
        self.status.clone()
    }

    /// Shows its status to other tasks.
    pub(crate) fn publish(&self) {
        *self.status.lock().unwrap_or_else(PoisonError::into_inner) = self.status();
    }
}

/// Where a relationship starts.
pub(crate) fn first_phase(total_bytes: u64) -> Phase {
    Phase::InitialReplication { progress: Progress { covered_bytes: 0, total_bytes } }
}
