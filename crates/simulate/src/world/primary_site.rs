//! The primary's site: its catalog, and a relationship for each VM, which does one thing at a time.

use std::collections::{BTreeSet, VecDeque};
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use catalog::Catalog;
use model::{CycleBackoff, HealthThresholds, InitialStart, ResyncPolicy, VmName};
use primary::{Compress, Config, Failure, Monitor, ProtectRequest, Relationship, Settings, Shared, Stopper};

use super::{Checked, World, wrong};
use crate::event::{Order, Side};
use crate::ports::{PEER, SimPorts};
use crate::turns::turn;

/// A future is given no more turns than this to come to its end: what takes longer hangs.
const TURNS_MAX: usize = 200_000;

/// The phase that nobody comes back to.
pub(super) const INITIAL: &str = "initial-replication";

/// Where a VM's monitor is.
pub(super) fn monitor(vm: &VmName) -> PathBuf {
    PathBuf::from(format!("/run/{vm}.qmp"))
}

type Work = Pin<Box<dyn Future<Output = (Relationship<SimPorts>, Result<(), Failure>)> + Send>>;

/// A relationship, or what it is doing.
enum Slot {
    /// The site is dead, or the VM is not protected yet.
    Gone,
    Idle(Box<Relationship<SimPorts>>),
    Busy {
        order: Order,
        work: Work,
        stopper: Stopper,
    },
}

pub(super) struct PrimarySite {
    pub ports: SimPorts,
    catalog: Catalog,
    shared: Option<Arc<Shared<SimPorts>>>,
    slots: Vec<Slot>,
    waiting: Vec<VecDeque<Order>>,
    phases: Vec<&'static str>,
}

impl PrimarySite {
    pub fn new(ports: SimPorts) -> Self {
        let catalog = super::faults::guarded_catalog(&ports.power);
        Self { ports, catalog, shared: None, slots: Vec::new(), waiting: Vec::new(), phases: Vec::new() }
    }

    pub fn is_up(&self) -> bool {
        self.shared.is_some()
    }

    /// What a killed process leaves: nothing but its catalog and what it has in QEMU.
    pub fn kill(&mut self) {
        self.ports.power.cut();
        self.slots.clear();
        self.waiting.iter_mut().for_each(VecDeque::clear);
        self.shared = None;
    }
}

fn config(world: &World) -> Config {
    Config {
        site_name: "primary".into(),
        compression_level: 1,
        compress: Compress::Inline,
        initial_log_bytes: world.plan.initial_log_bytes,
        interval_min_s: 1,
        backoff: CycleBackoff::default(),
        patience: Duration::from_secs(60),
        thresholds: HealthThresholds::default(),
        cycles_at_once: world.plan.cycles_at_once,
        ahead_from_bytes: 1,
    }
}

fn run(mut relationship: Relationship<SimPorts>, order: Order) -> Work {
    Box::pin(async move {
        let outcome = match order {
            Order::Cycle => relationship.cycle_now().await.map(drop),
            Order::Sync => relationship.sync().await,
            Order::Pause => relationship.pause().await,
            Order::Resume => relationship.resume().await,
            Order::Resync => relationship.resync().await,
        };
        (relationship, outcome)
    })
}

impl World {
    /// Starts the primary's site.
    pub(super) fn boot_primary(&mut self) -> Checked {
        self.primary.kill();
        self.primary.ports.power.boot();
        self.primary.catalog.next_process();
        let shared = Shared::open(self.primary.catalog.clone(), config(self), self.primary.ports.clone());
        let loaded = shared.and_then(|shared| Ok((Relationship::load(&shared)?, shared)));
        let Ok((relationships, shared)) = loaded else {
            // A commit that failed prevents it; then somebody has to try again.
            self.primary.kill();
            return Ok(());
        };
        self.primary.shared = Some(shared);
        self.primary.slots = self.vms.iter().map(|_| Slot::Gone).collect();
        self.primary.waiting = self.vms.iter().map(|_| VecDeque::new()).collect();
        for relationship in relationships {
            let place = self.vms.iter().position(|vm| vm.name == relationship.row().name);
            let Some(place) = place else { return wrong("a VM is protected that there is not") };
            self.primary.slots[place] = Slot::Idle(Box::new(relationship));
        }
        Ok(())
    }

    /// Protects every VM.
    pub(super) fn protect_all(&mut self) -> Checked {
        let Some(shared) = self.primary.shared.clone() else { return wrong("the primary's site is not up") };
        for (place, vm) in self.plan.vms.clone().iter().enumerate() {
            let name = self.vms[place].name.clone();
            let settings = Settings {
                monitor: Monitor::Socket(monitor(&name)),
                nbd: None,
                nodes: Vec::new(),
                peer: PEER.into(),
                interval: Duration::from_secs(vm.interval_s),
                points: vm.points,
                app_every: vm.app_every_s.map(Duration::from_secs),
                guest_agent: vm.app_every_s.map(|_| PathBuf::from("/run/agent")),
                bandwidth_bytes_per_s: None,
                sign_of_life: None,
                excluded: Vec::new(),
                relocating: None,
                resync: ResyncPolicy::Automatic,
            };
            let mut protecting = Box::pin(Relationship::protect(
                &shared,
                ProtectRequest { name, settings, initial: InitialStart::Now },
            ));
            let protected = (0..TURNS_MAX).find_map(|_| match turn(protecting.as_mut()) {
                Poll::Ready(done) => Some(done),
                Poll::Pending => None,
            });
            drop(protecting);
            let Some(Ok(relationship)) = protected else { return wrong("a VM cannot be protected") };
            self.vms[place].id = Some(relationship.row().vm);
            self.primary.slots[place] = Slot::Idle(Box::new(relationship));
        }
        Ok(())
    }

    /// A person's word, or the schedule's.
    pub(super) fn order(&mut self, place: usize, order: Order) {
        if !self.primary.is_up() {
            return;
        }
        self.causes[place].asked |= order == Order::Resync;
        if let (Slot::Busy { stopper, .. }, Order::Pause | Order::Resync) =
            (&self.primary.slots[place], order)
        {
            stopper.stop_cycle();
        }
        // A cycle that is due while one runs is not made up for.
        let busy = matches!(self.primary.slots[place], Slot::Busy { .. });
        if !(busy && order == Order::Cycle) && self.primary.waiting[place].len() < 4 {
            self.primary.waiting[place].push_back(order);
        }
        self.begin_next(place);
    }

    fn begin_next(&mut self, place: usize) {
        let slot = &mut self.primary.slots[place];
        if !matches!(slot, Slot::Idle(_)) {
            return;
        }
        let Some(order) = self.primary.waiting[place].pop_front() else { return };
        if let Slot::Idle(relationship) = std::mem::replace(slot, Slot::Gone) {
            let stopper = relationship.stopper();
            *slot = Slot::Busy { order, work: run(*relationship, order), stopper };
        }
    }

    /// What runs beside everything else goes on: each turn is one VM's.
    pub(super) fn turns(&mut self, turns: u64) -> Checked {
        for _ in 0..turns {
            let place = self.chance.place(self.vms.len());
            self.give_turn(place)?;
        }
        Ok(())
    }

    /// What runs for a VM goes on to its end.
    pub(super) fn finish(&mut self, place: usize) -> Checked {
        for _ in 0..TURNS_MAX {
            if !self.is_busy(place) {
                return Ok(());
            }
            self.give_turn(place)?;
            // Who waits for its turn among the cycles waits for the others.
            let other = self.chance.place(self.vms.len());
            self.give_turn(other)?;
        }
        wrong(format!("what runs for {} does not come to its end", self.vms[place].name))
    }

    pub(super) fn is_busy(&self, place: usize) -> bool {
        matches!(self.primary.slots.get(place), Some(Slot::Busy { .. }))
    }

    fn give_turn(&mut self, place: usize) -> Checked {
        let Some(Slot::Busy { work, order, .. }) = self.primary.slots.get_mut(place) else { return Ok(()) };
        let order = *order;
        let done = turn(work.as_mut());
        self.coverage.hit("turns");
        self.notice_deaths();
        if let (Poll::Ready((relationship, outcome)), true) = (done, self.primary.is_up()) {
            return self.ended(place, order, relationship, outcome);
        }
        Ok(())
    }

    fn ended(
        &mut self,
        place: usize,
        order: Order,
        relationship: Relationship<SimPorts>,
        outcome: Result<(), Failure>,
    ) -> Checked {
        let name = self.vms[place].name.clone();
        match &outcome {
            Ok(()) => self.coverage.hit(format!("{order:?} done")),
            Err(failure) => self.coverage.hit(format!("failed {:?}", failure.code)),
        }
        let row = relationship.row();
        let (acked, phase) = (row.shipped.acked.number, row.phase.name());
        let caused = self.check_cause(place, &row.phase);
        self.note(|| match &outcome {
            Ok(()) => format!("{order:?} of {name}: done, log {acked}, {phase}"),
            Err(failure) => {
                format!("{order:?} of {name}: {:?}: {failure}; log {acked}, {phase}", failure.code)
            }
        });
        self.primary.phases.resize(self.vms.len(), "none");
        let before = std::mem::replace(&mut self.primary.phases[place], phase);
        if before != phase {
            self.coverage.hit(format!("primary {before} -> {phase}"));
        }
        if phase == INITIAL && ![INITIAL, "none"].contains(&before) {
            return wrong(format!("{name} begins its initial replication anew, from {before}"));
        }
        self.primary.slots[place] = Slot::Idle(Box::new(relationship));
        self.begin_next(place);
        caused
    }

    /// How long until the next cycle of a VM is due; none while it is not, or something runs.
    pub(super) fn due_in(&self, place: usize) -> Option<Duration> {
        match &self.primary.slots.get(place) {
            Some(Slot::Idle(relationship)) => relationship.due_in(),
            _ => None,
        }
    }

    /// Whether a VM replicates, and nobody has stopped that.
    pub(super) fn stopped(&self, place: usize) -> Option<String> {
        let Some(Slot::Idle(relationship)) = self.primary.slots.get(place) else { return None };
        let row = relationship.row();
        let lasting = row.error.as_ref().filter(|failure| !failure.transient);
        (row.paused || lasting.is_some()).then(|| format!("paused {}, error {:?}", row.paused, row.error))
    }

    /// A site that has died at a step is dead from then on.
    pub(super) fn notice_deaths(&mut self) {
        if self.primary.ports.power.is_down() && self.primary.is_up() {
            self.note(|| "the primary's site has died".into());
            self.coverage.hit("deaths of the primary");
            self.primary.kill();
        }
        if self.replica.power.is_down() && self.replica.is_up() {
            self.note(|| "the replica's site has died".into());
            self.coverage.hit("deaths of the replica");
            self.note_kill();
            self.replica.kill();
        }
    }

    pub(super) fn clock(&self, side: Side) -> &crate::clock::SiteClock {
        match side {
            Side::Primary => &self.primary.ports.clock,
            Side::Replica => &self.replica.clock,
        }
    }

    /// VMs that have been protected.
    pub(super) fn places(&self) -> BTreeSet<usize> {
        (0..self.vms.len()).collect()
    }
}
