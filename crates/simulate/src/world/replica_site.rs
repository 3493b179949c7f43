//! The replica's site: a store on a simulated disk, and who reads of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use catalog::Catalog;
use model::VmId;
use model::gate::{Access, Refusal};
use replica::{Clock, Config, Step, Store};

use super::check::Remembered;
use super::readers::{Readers, Watch};
use super::{Checked, World, wrong};
use crate::chance::Chance;
use crate::clock::{SiteClock, Time};
use crate::disk::{Class, DiskFault, Loss, SimDisk};
use crate::plan::Plan;
use crate::ports::ReplicaEnd;
use crate::power::Power;

/// Where the site is.
const HOME: &str = "/site";
/// Where files can be moved to.
const ELSEWHERE: &str = "/elsewhere";

pub(super) struct ReplicaSite {
    pub power: Power,
    pub clock: SiteClock,
    pub disk: SimDisk,
    catalog: Catalog,
    config: Config,
    end: ReplicaEnd,
    pub readers: Readers,
    remembered: BTreeMap<VmId, Remembered>,
}

impl ReplicaSite {
    pub fn new(power: Power, time: &Time, plan: &Plan, seed: u64) -> Self {
        let clock = time.clock();
        let disk = SimDisk::new(power.clone(), seed);
        let chance = Mutex::new(Chance::new(seed ^ 1));
        let (shown, layers) = (clock.clone(), disk.clone());
        let config = Config {
            workers: 0,
            apply_threads: 1,
            free_reserve_bytes: 1 << 20,
            recent_points: plan.recent_points,
            plan_extents_max: plan.plan_extents_max,
            view_cache_bytes: 256 << 10,
            files: Arc::new(disk.clone()),
            clock: Clock::from_fn(move || shown.now()),
            chance: replica::Chance::from_fn(move |bytes| {
                let mut chance = chance.lock().unwrap_or_else(PoisonError::into_inner);
                bytes.iter_mut().for_each(|byte| *byte = chance.next() as u8);
                Ok(())
            }),
            layers: replica::Layers::from_fn(
                move |_, layer, _| files::FileSystem::open(&layers, layer, files::Open::Create).map(drop),
                |_, _| Ok(true),
            ),
            ..Config::new(HOME)
        };
        let catalog = super::faults::guarded_catalog(&power);
        Self {
            power,
            clock,
            disk,
            catalog,
            config,
            end: ReplicaEnd::default(),
            readers: Readers::default(),
            remembered: BTreeMap::new(),
        }
    }

    /// What is remembered of a VM between two looks.
    pub fn remembered(&mut self, vm: VmId) -> &mut Remembered {
        self.remembered.entry(vm).or_default()
    }

    /// The end of the line: the store, while the site lives.
    pub fn end(&self) -> ReplicaEnd {
        self.end.clone()
    }

    /// The store, while the site lives.
    pub fn store(&self) -> Option<Store> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn is_up(&self) -> bool {
        self.store().is_some()
    }

    /// What a killed process leaves: its files and its catalog. Those who read its flat files go on as well
    /// as they can.
    pub fn kill(&mut self) {
        self.power.cut();
        self.readers.process_ended();
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub fn disk_fault(&self, class: Class, skip: u64, count: u64) {
        self.disk.inject(DiskFault { class, skip, count });
    }

    pub fn set_full(&self, full: bool) {
        self.disk.set_full(full);
    }

    pub fn heal(&self) {
        self.disk.heal();
    }

    /// Looks at something with nothing going wrong and nobody dying.
    pub fn observed<T>(&self, look: impl FnOnce() -> T) -> T {
        self.power.observe(true);
        let seen = look();
        self.power.observe(false);
        seen
    }

    pub fn repository(&self) -> PathBuf {
        PathBuf::from("/repository")
    }
}

impl World {
    /// Starts the replica's site; what it had not synced is lost as far as that. An error of its disk may prevent
    /// that; then somebody has to try again.
    pub(super) fn boot_replica(&mut self, loss: Loss) -> Checked {
        self.note_kill();
        self.replica.kill();
        self.replica.disk.settle(loss);
        self.replica.power.boot();
        self.replica.catalog.next_process();
        let opened = self.open_store();
        self.notice_deaths();
        match opened {
            Ok(store) if !self.replica.power.is_down() => {
                *self.replica.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(store);
                self.note(|| "the replica's site is up".into());
                self.jobs_after_restart();
                self.check_bases()?;
                self.check_backups()
            }
            Ok(_) => Ok(()),
            Err(error) => {
                self.note(|| format!("the replica's site does not start: {error}"));
                self.coverage.hit("starts that failed");
                self.replica.kill();
                Ok(())
            }
        }
    }

    /// In which phases it is killed, if it lives.
    pub(super) fn note_kill(&mut self) {
        let Some(store) = self.replica.store() else { return };
        for vm in self.vms.iter().filter_map(|vm| vm.id) {
            if let Ok(facts) = store.facts(vm) {
                let cut = if self.line.lock().down { ", with the link cut" } else { "" };
                self.coverage.hit(format!("the replica killed in {}{cut}", facts.phase.name()));
            }
        }
    }

    fn open_store(&self) -> Result<Store, String> {
        let disk = &self.replica.disk;
        for folder in [HOME, ELSEWHERE] {
            files::FileSystem::create_dir_all(disk, Path::new(folder)).map_err(|error| error.to_string())?;
        }
        files::FileSystem::sync_dir(disk, Path::new("/")).map_err(|error| error.to_string())?;
        Store::open(self.replica.catalog.clone(), self.replica.config.clone())
            .map_err(|error| error.to_string())
    }

    /// Keeps a replica in shape for some steps.
    pub(super) fn maintain(&mut self, place: usize, steps: u64, looks: u64) -> Checked {
        self.maintained(place, steps, looks).map(drop)
    }

    /// The same; and what the gate answered in the middle.
    pub(super) fn maintained(
        &mut self,
        place: usize,
        steps: u64,
        looks: u64,
    ) -> Checked<Vec<(Access, Refusal)>> {
        let (Some(store), Some(vm)) = (self.replica.store(), self.vms[place].id) else {
            return Ok(Vec::new());
        };
        self.watch(vm, Watch::Apply, looks);
        for _ in 0..steps {
            let step = store.maintain(vm);
            let done = matches!(step, Ok(Step::Idle) | Err(_));
            self.note(|| format!("maintain: {step:?}"));
            self.coverage.hit(match &step {
                Ok(step) => format!("maintain {}", first_word(&format!("{step:?}"))),
                Err(error) => format!("maintain error {}", error.code()),
            });
            self.notice_deaths();
            if done || !self.replica.is_up() {
                break;
            }
        }
        self.watched()
    }

    /// Until there is nothing to do, or it does not get on.
    pub(super) fn maintain_all(&mut self) -> Checked {
        for place in self.places() {
            self.maintain(place, 200, 0)?;
        }
        Ok(())
    }

    pub(super) fn mend(&mut self, place: usize) {
        if let (Some(store), Some(vm)) = (self.replica.store(), self.vms[place].id) {
            let _ = store.resume(vm);
        }
    }

    /// Moves a replica's files there, or back.
    pub(super) fn migrate(&mut self, place: usize) -> Checked {
        let (Some(store), Some(vm)) = (self.replica.store(), self.vms[place].id) else { return Ok(()) };
        let home = Path::new(HOME).join("vms");
        let there = store.status(vm).is_ok_and(|status| status.folder.starts_with(ELSEWHERE));
        self.watch(vm, Watch::Move, 4);
        let moved = store.migrate(vm, if there { &home } else { Path::new(ELSEWHERE) });
        self.note(|| format!("migrate: {moved:?}"));
        self.coverage.hit(if moved.is_ok() { "moves" } else { "moves that failed" });
        self.watched().map(drop)
    }

    /// Fails a VM over to one of its points.
    pub(super) fn failover(&mut self, place: usize, point: u64) -> Checked {
        let (Some(store), Some(vm)) = (self.replica.store(), self.vms[place].id) else { return Ok(()) };
        let Some(point) = self.pick_point(&store, vm, point) else { return Ok(()) };
        let begun = store.failover_begin(vm, point.number);
        self.note(|| format!("failover to {}: {:?}", point.number, begun.as_ref().map(Vec::len)));
        self.causes[place].failed_over = true;
        self.coverage.hit(if begun.is_ok() { "failovers" } else { "failovers that failed" });
        if begun.is_err() {
            return Ok(());
        }
        // What the VM is started from is the point.
        let Some(moment) = self.truth.moment(vm, point.id) else {
            return wrong("a failover to a point that nobody made");
        };
        self.replica.observed(|| super::check::check_failover(&store, vm, &moment, self.truth.may_lose(vm)))
    }

    pub(super) fn cancel_failover(&mut self, place: usize) {
        if let (Some(store), Some(vm)) = (self.replica.store(), self.vms[place].id) {
            let cancelled = store.failover_cancel(vm);
            self.note(|| format!("cancel the failover: {cancelled:?}"));
        }
    }

    pub(super) fn pick_point(&self, store: &Store, vm: VmId, point: u64) -> Option<model::PointInfo> {
        let points = store.points(vm).ok()?;
        let place = usize::try_from(point.checked_rem(points.len() as u64)?).unwrap_or(0);
        points.into_iter().rev().nth(place)
    }

    /// Time passes at both sites.
    pub(super) fn pass(&self, duration: Duration) {
        self.time.pass(duration);
    }
}

fn first_word(text: &str) -> &str {
    text.split([' ', '(', '{']).next().unwrap_or_default()
}
