//! One task per protected VM: waits for the next cycle or a person's word, and runs one at a time.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use catalog::Catalog;
use model::{ApplyState, HealthInput, Phase, Progress, ResyncReason, Timestamp, assess};
use qemu::{NbdAccess, Vm, VmAddress};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use wire::{RateLimiter, Report};

use crate::cycle::{CycleReport, qemu_failure};
use crate::error::{Failure, FailureCode};
use crate::link::{Link, PeerClients};
use crate::rows::Protected;
use crate::{Config, VmStatus};

/// How often QEMU is asked, between two cycles, how much has changed.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// Of the latest this many cycles, status tells how many were missed.
const WINDOW_CYCLES: usize = 100;

/// What all runners of a site share.
pub(crate) struct Shared {
    pub catalog: Catalog,
    pub config: Arc<Config>,
    pub peers: Arc<dyn PeerClients>,
    /// Cycles at once, over all VMs: bounds memory and what the guests' host feels.
    pub cycles: Semaphore,
}

impl Shared {
    pub fn now(&self) -> Timestamp {
        Timestamp::from(std::time::SystemTime::now())
    }
}

/// What a person asks of a runner. Each is answered with the VM's status after it.
pub(crate) enum Order {
    Sync(oneshot::Sender<Result<(), Failure>>),
    Pause(oneshot::Sender<Result<(), Failure>>),
    Resume(oneshot::Sender<Result<(), Failure>>),
    Resync(oneshot::Sender<Result<(), Failure>>),
    /// Remove our bitmaps from QEMU and end.
    Forget(oneshot::Sender<Result<(), Failure>>),
    /// End, leaving the bitmaps to the next start of the site.
    End,
}

/// A handle on a runner.
pub(crate) struct Handle {
    pub orders: mpsc::Sender<Order>,
    /// Cancelled to end a running cycle early; the runner makes a new one for each cycle.
    pub stop: Arc<Mutex<CancellationToken>>,
    pub status: Arc<Mutex<VmStatus>>,
    pub task: tokio::task::JoinHandle<()>,
}

impl Handle {
    pub fn status(&self) -> VmStatus {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn stop_cycle(&self) {
        self.stop.lock().unwrap_or_else(PoisonError::into_inner).cancel();
    }
}

pub(crate) struct Runner {
    pub row: Protected,
    pub shared: Arc<Shared>,
    /// The last cycle ended well, so both sides are known to agree.
    pub squared: bool,
    pub stop: CancellationToken,
    vm: Option<Arc<Vm>>,
    limiter: Option<RateLimiter>,
    next_at: Timestamp,
    last_cycle: Option<CycleReport>,
    outcomes: std::collections::VecDeque<bool>,
    sent_bytes: u64,
    pending_bytes: Option<u64>,
    stop_shared: Arc<Mutex<CancellationToken>>,
    status: Arc<Mutex<VmStatus>>,
}

impl Runner {
    /// Starts the task of a VM.
    pub fn spawn(row: Protected, shared: Arc<Shared>) -> Handle {
        let (orders, received) = mpsc::channel(16);
        let stop = CancellationToken::new();
        let stop_shared = Arc::new(Mutex::new(stop.clone()));
        let now = shared.now();
        let limiter = row.settings.bandwidth_bytes_per_s.map(RateLimiter::new);
        let status = Arc::new(Mutex::new(VmStatus::starting(&row)));
        let runner = Self {
            next_at: now,
            row,
            shared,
            squared: false,
            stop,
            vm: None,
            limiter,
            last_cycle: None,
            outcomes: std::collections::VecDeque::new(),
            sent_bytes: 0,
            pending_bytes: None,
            stop_shared: stop_shared.clone(),
            status: status.clone(),
        };
        let task = tokio::spawn(runner.run(received));
        Handle { orders, stop: stop_shared, status, task }
    }

    async fn run(mut self, mut orders: mpsc::Receiver<Order>) {
        self.publish();
        let mut looks = tokio::time::interval(LOOK_INTERVAL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let due = self.until_next();
            tokio::select! {
                // A person's word comes before the next cycle.
                biased;
                order = orders.recv() => match order {
                    None | Some(Order::End) => return,
                    Some(Order::Forget(done)) => {
                        let _ = done.send(self.forget().await);
                        return;
                    }
                    Some(order) => self.obey(order).await,
                },
                () = sleep_for(due) => {
                    let _ = self.run_cycle().await;
                }
                _ = looks.tick() => self.look().await,
            }
            self.publish();
        }
    }

    /// How long until a cycle is due by itself; none while it is not.
    fn until_next(&self) -> Option<Duration> {
        let blocked = self.row.paused || self.row.error.as_ref().is_some_and(|failure| !failure.transient);
        (!blocked).then(|| self.next_at.since(self.shared.now()))
    }

    /// Asks a QEMU that we are connected to how much has changed since the last cycle.
    async fn look(&mut self) {
        let Some(vm) = self.vm.clone().filter(|vm| vm.is_alive()) else { return };
        self.pending_bytes = match vm.resolve(&self.row.nodes()).await {
            Ok(disks) => vm.pending_bytes(&disks, self.row.shipped.tracking).await.ok(),
            Err(_) => None,
        };
    }

    async fn obey(&mut self, order: Order) {
        let (done, result) = match order {
            Order::Sync(done) => (done, self.sync().await),
            Order::Pause(done) => (done, self.set_paused(true).await),
            Order::Resume(done) => (done, self.resume().await),
            Order::Resync(done) => (done, self.resync().await),
            Order::Forget(_) | Order::End => return,
        };
        self.publish();
        let _ = done.send(result);
    }

    /// Runs cycles until one made a point.
    async fn sync(&mut self) -> Result<(), Failure> {
        if self.row.paused {
            let message = format!("replication of {} is paused; 'afterimage resume' first", self.row.name);
            return Err(Failure::lasting(FailureCode::Stopped, message));
        }
        loop {
            let before = self.row.phase.clone();
            match self.run_cycle().await {
                Ok(report) if report.point.is_some() => return Ok(()),
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

    async fn set_paused(&mut self, paused: bool) -> Result<(), Failure> {
        self.row.paused = paused;
        self.row.save(&self.shared.catalog).await?;
        self.tell_replica().await;
        Ok(())
    }

    async fn resume(&mut self) -> Result<(), Failure> {
        self.row.error = None;
        self.row.failures = 0;
        self.next_at = self.shared.now();
        self.set_paused(false).await
    }

    async fn resync(&mut self) -> Result<(), Failure> {
        if matches!(self.row.phase, Phase::InitialReplication { .. }) && self.row.shipped.acked.number.0 == 0
        {
            return Ok(()); // nothing has been shipped: there is nothing to compare with
        }
        self.require_resync(ResyncReason::Requested).await?;
        self.resume().await
    }

    async fn forget(&mut self) -> Result<(), Failure> {
        let nodes = self.row.nodes();
        // A QEMU that is gone has no bitmaps of ours any more.
        if let Ok(vm) = self.connect_vm().await
            && let Ok(disks) = vm.resolve(&nodes).await
        {
            vm.cleanup(&disks, None).await.map_err(qemu_failure)?;
            vm.stop_tracking(&disks).await.map_err(qemu_failure)?;
        }
        if let Ok(link) = self.link() {
            let _ = link.client.withdraw(self.row.vm).await;
        }
        Ok(())
    }

    async fn run_cycle(&mut self) -> Result<CycleReport, Failure> {
        let shared = self.shared.clone();
        let _turn = shared
            .cycles
            .acquire()
            .await
            .map_err(|_| Failure::transient(FailureCode::Stopped, "the site is stopping"))?;
        self.stop = CancellationToken::new();
        *self.stop_shared.lock().unwrap_or_else(PoisonError::into_inner) = self.stop.clone();
        let started = self.shared.now();
        let outcome = self.cycle().await;
        self.settle(started, &outcome).await;
        outcome
    }

    /// Books a cycle: when the next one is due, and what to show.
    async fn settle(&mut self, started: Timestamp, outcome: &Result<CycleReport, Failure>) {
        let now = self.shared.now();
        let interval = self.row.settings.interval;
        self.outcomes.push_front(outcome.is_ok() && now.since(started) <= interval);
        self.outcomes.truncate(WINDOW_CYCLES);
        match outcome {
            Ok(report) => {
                self.row.failures = 0;
                self.row.error = None;
                self.sent_bytes += report.log_bytes;
                self.pending_bytes = Some(0);
                self.last_cycle = Some(report.clone());
                // A pass goes on at once. A cycle that took longer than its interval is not made up for.
                let pause = if report.point.is_some() { interval } else { Duration::ZERO };
                self.next_at = started.plus(pause).max(now);
            }
            Err(failure) => {
                tracing::warn!(vm = %self.row.name, error = %failure, "a cycle failed");
                self.vm = self.vm.take().filter(|_| failure.code != FailureCode::QemuGone);
                self.squared = false;
                let before = self.row.error.replace(failure.clone()).map(|failure| failure.code);
                // What the next cycle mends is no reason to wait, unless it has just failed to mend it.
                let at_once = match failure.code {
                    FailureCode::Stopped => true,
                    FailureCode::ResyncRequired => before != Some(FailureCode::ResyncRequired),
                    _ => false,
                };
                if at_once {
                    self.next_at = now;
                } else {
                    self.row.failures += 1;
                    self.next_at = now.plus(self.shared.config.backoff.delay(self.row.failures));
                }
                if !failure.transient {
                    self.tell_replica().await;
                }
            }
        }
        if let Err(error) = self.row.save(&self.shared.catalog).await {
            tracing::error!(vm = %self.row.name, %error, "the cycle could not be written down");
        }
    }

    /// Tells the replica's site where we stand, as far as it can be reached.
    pub(crate) async fn tell_replica(&self) {
        let report = Report {
            phase: self.row.phase.clone(),
            error: self.row.error.as_ref().filter(|failure| !failure.transient).map(|f| f.message.clone()),
            paused: self.row.paused,
        };
        if let Ok(link) = self.link()
            && let Err(error) = link.client.report(self.row.vm, &report).await
        {
            tracing::debug!(vm = %self.row.name, %error, "the replica was not told");
        }
    }

    /// The connection to the VM's QEMU; kept over cycles, made again when it is gone.
    pub(crate) async fn connect_vm(&mut self) -> Result<Arc<Vm>, Failure> {
        if let Some(vm) = self.vm.as_ref().filter(|vm| vm.is_alive()) {
            return Ok(vm.clone());
        }
        let vm = Arc::new(connect(&self.row, &self.shared.config).await?);
        self.squared = false;
        self.vm = Some(vm.clone());
        Ok(vm)
    }

    pub(crate) fn link(&self) -> Result<Link, Failure> {
        let peer = &self.row.settings.peer;
        let client = self.shared.peers.client(peer).ok_or_else(|| {
            Failure::lasting(
                FailureCode::UnknownPeer,
                format!("the peer {peer} of VM {} is not known; accept an invite of it, then run 'afterimage resume'", self.row.name),
            )
        })?;
        Ok(Link { client, limiter: self.limiter.clone() })
    }

    fn publish(&self) {
        let now = self.shared.now();
        let missed = self.outcomes.iter().filter(|&&met| !met).count();
        let health = assess(
            &HealthInput {
                phase: &self.row.phase,
                apply: &ApplyState::Idle,
                paused: self.row.paused,
                last_log_at: self.row.point_at.unwrap_or(self.row.made_at),
                interval: self.row.settings.interval,
                missed: (missed as u32, self.outcomes.len() as u32),
                error: self.row.error.as_ref().filter(|f| !f.transient).map(|f| f.message.as_str()),
            },
            &self.shared.config.thresholds,
            now,
        );
        let status = VmStatus {
            health,
            last_cycle: self.last_cycle.clone(),
            pending_bytes: self.pending_bytes,
            next_at: self.next_at,
            sent_bytes: self.sent_bytes,
            ..VmStatus::starting(&self.row)
        };
        *self.status.lock().unwrap_or_else(PoisonError::into_inner) = status;
    }
}

/// Connects to a VM's QEMU.
pub(crate) async fn connect(row: &Protected, config: &Config) -> Result<Vm, Failure> {
    let nbd = match &row.settings.nbd {
        Some(socket) => NbdAccess::Existing(socket.clone()),
        None => NbdAccess::Own(config.run_dir.clone()),
    };
    Vm::connect(VmAddress { id: row.vm, qmp: row.settings.qmp.clone(), nbd }).await.map_err(qemu_failure)
}

async fn sleep_for(due: Option<Duration>) {
    match due {
        Some(due) => tokio::time::sleep(due).await,
        None => std::future::pending().await,
    }
}

/// Where a relationship starts.
pub(crate) fn first_phase(total_bytes: u64) -> Phase {
    Phase::InitialReplication { progress: Progress { covered_bytes: 0, total_bytes } }
}
