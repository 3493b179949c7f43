//! Backups as the site makes them: a job that is written down before anything waits, one attempt through the gate,
//! and a repository in which every step is durable before the next.
//!
//! What becomes of a job is `model::job`'s to say, which point it gets `model::choose_point`'s, what it may build on
//! and in which order it comes into the list `model::backup`'s. What is left is the carrying out.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use model::backup::{Closing, choose_parent, close};
use model::gate::{Access, Condition, Refusal, admit};
use model::job::{self, Bounds, Next, Outcome};
use model::{Attempt, LogNumber, PointInfo, RetryPolicy, Timestamp, VmId, Wanted, choose_point};
use replica::{ConsistentView, Store};

use super::check::place_of;
use super::{Checked, Violation, World, wrong};
use crate::event::{Event, Side, Wish};
use crate::history::Moment;
use crate::power::Fate;
use crate::repository::{CHUNK_BYTES, ChunkId, Listed, ListedDisk, Packing, SimRepository};

/// How long a job is tried.
const WINDOW: Duration = Duration::from_secs(6 * 3600);
/// A hold that a backup reads lasts so long.
const LEASE: Duration = Duration::from_secs(1800);

/// Where a job stands, as its row says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Waiting { at: Timestamp, barrier: bool },
    Running,
    Done,
    Ended,
}

/// A job, as its row says.
#[derive(Debug, Clone)]
struct Job {
    place: usize,
    wish: Wish,
    standing: Standing,
    refused: Vec<Attempt>,
    deadline: Timestamp,
}

/// The jobs of the replica's site: durable, step by step.
#[derive(Default)]
pub(super) struct Jobs(Vec<Job>);

impl Jobs {
    /// Jobs that have not come to their end.
    pub fn open(&self) -> usize {
        self.0
            .iter()
            .filter(|job| matches!(job.standing, Standing::Waiting { .. } | Standing::Running))
            .count()
    }

    /// Whether the newest job has made a backup.
    pub fn newest_is_done(&self) -> bool {
        self.0.last().is_some_and(|job| job.standing == Standing::Done)
    }
}

/// Why an attempt has made no backup.
enum NoBackup {
    Refused(model::gate::Refusal),
    Failed(String),
    /// The checkers have something to say.
    Wrong(Violation),
}

impl From<replica::Error> for NoBackup {
    fn from(error: replica::Error) -> Self {
        match error {
            replica::Error::Gate(refusal) => Self::Refused(refusal),
            error => Self::Failed(error.to_string()),
        }
    }
}

impl From<io::Error> for NoBackup {
    fn from(error: io::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<Violation> for NoBackup {
    fn from(violation: Violation) -> Self {
        Self::Wrong(violation)
    }
}

impl World {
    /// A person asks for a backup.
    pub(super) fn want_backup(&mut self, place: usize, wish: Wish) {
        if !self.replica.is_up() {
            return;
        }
        let now = self.clock(Side::Replica).now();
        let standing = Standing::Waiting { at: now, barrier: false };
        let job = Job { place, wish, standing, refused: Vec::new(), deadline: now.plus(WINDOW) };
        self.jobs.0.push(job);
        let number = self.jobs.0.len() - 1;
        if !self.save(number, standing) {
            self.jobs.0.pop();
        }
    }

    /// Writes down where a job stands; false if the site has died before that.
    fn save(&mut self, number: usize, standing: Standing) -> bool {
        let fate = self.replica.power.step();
        if fate != Fate::DiesBefore {
            self.jobs.0[number].standing = standing;
        }
        fate == Fate::Lives
    }

    /// After a start: what was running is tried anew.
    pub(super) fn jobs_after_restart(&mut self) {
        let now = self.clock(Side::Replica).now();
        for job in self.jobs.0.iter_mut().filter(|job| job.standing == Standing::Running) {
            job.standing = match job::after_restart::<(), ()>(now) {
                Next::Again { at, barrier } => Standing::Waiting { at, barrier },
                _ => Standing::Ended,
            };
        }
    }

    /// When the next job is due.
    pub(super) fn next_job_in(&self) -> Option<Duration> {
        let now = self.clock(Side::Replica).now();
        let due = self.jobs.0.iter().filter_map(|job| match job.standing {
            Standing::Waiting { at, .. } => Some(at.since(now)),
            _ => None,
        });
        due.min()
    }

    /// Tries the jobs that are due; other things happen while they read.
    pub(super) fn run_jobs(&mut self, meanwhile: &[Event]) -> Checked {
        let now = self.clock(Side::Replica).now();
        for number in 0..self.jobs.0.len() {
            let Standing::Waiting { at, barrier } = self.jobs.0[number].standing else { continue };
            if at > now || !self.replica.is_up() {
                continue;
            }
            if self.save(number, Standing::Running) {
                self.run_job(number, barrier, meanwhile)?;
            }
            self.notice_deaths();
        }
        Ok(())
    }

    fn run_job(&mut self, number: usize, barrier: bool, meanwhile: &[Event]) -> Checked {
        let life = self.replica.power.boots();
        let job = self.jobs.0[number].clone();
        if let Some(refusal) = self.collision(&job, barrier)? {
            // The apply may last for several attempts.
            for _ in 0..=self.chance.below(4) {
                self.settle_job(number, life, Outcome::Refused(refusal.clone()))?;
                let Standing::Waiting { at, barrier: false } = self.jobs.0[number].standing else { break };
                self.pass(at.since(self.clock(Side::Replica).now()));
            }
            return Ok(());
        }
        let outcome = match self.attempt(&job, barrier, meanwhile) {
            Err(NoBackup::Wrong(violation)) => return Err(violation),
            Ok(backup) => Outcome::Done(backup),
            Err(NoBackup::Refused(refusal)) if barrier && refusal.condition == Condition::ApplyInProgress => {
                return wrong(format!("backup job {number} collides with an apply behind the barrier"));
            }
            Err(NoBackup::Refused(refusal)) => Outcome::Refused(refusal),
            Err(NoBackup::Failed(error)) => Outcome::Failed(error),
        };
        self.settle_job(number, life, outcome)
    }

    /// What an attempt has come to is written down, unless whoever made it is dead.
    fn settle_job(&mut self, number: usize, life: u64, outcome: Outcome<(), String>) -> Checked {
        let job = self.jobs.0[number].clone();
        if life != self.replica.power.boots() || self.replica.power.is_down() {
            return Ok(());
        }
        self.note(|| format!("backup job {number}: {outcome:?}"));
        self.coverage.hit(match &outcome {
            Outcome::Done(_) => format!("backups {:?}", job.wish.access),
            Outcome::Refused(refusal) => format!("backups refused {}", refusal.condition),
            Outcome::Faltered { .. } | Outcome::Failed(_) => "backups that failed".into(),
        });
        let policy = RetryPolicy::default();
        let (deadline, no_retry) = (job.deadline, job.wish.no_retry);
        let bounds = Bounds { policy: &policy, deadline, no_retry, allowed_from: &Some };
        let (now, chance) = (self.clock(Side::Replica).now(), self.chance.unit());
        let mut refused = job.refused;
        let next = job::settle(&mut refused, outcome, bounds, now, chance);
        if refused.len() > policy.attempts_max as usize {
            return wrong(format!("backup job {number} was tried {} times", refused.len()));
        }
        let (standing, ended) = match next {
            Next::Done(()) => (Standing::Done, "done"),
            Next::Failed(..) => (Standing::Ended, "failed"),
            Next::Refused(_, None) => (Standing::Ended, "refused, no retry"),
            Next::Refused(_, Some(model::GiveUp::Attempts)) => (Standing::Ended, "attempts used up"),
            Next::Refused(_, Some(model::GiveUp::Deadline)) => (Standing::Ended, "window over"),
            Next::Again { at, .. } if at > job.deadline => {
                return wrong(format!("backup job {number} is to be tried after its window has ended"));
            }
            Next::Again { at, barrier: true } => {
                (Standing::Waiting { at, barrier: true }, "again, with the barrier")
            }
            Next::Again { at, barrier } => (Standing::Waiting { at, barrier }, "again"),
        };
        self.coverage.hit(format!("jobs {ended}"));
        if self.save(number, standing) {
            self.jobs.0[number].refused = refused;
        }
        if standing == Standing::Done { self.check_backups() } else { Ok(()) }
    }

    /// By chance an attempt comes in the middle of an apply, if there is one to be made; then it is refused
    /// unless what it reads is pinned, or a barrier keeps applies away.
    fn collision(&mut self, job: &Job, barrier: bool) -> Checked<Option<Refusal>> {
        if barrier || job.wish.access == Access::Pinned || self.chance.below(4) == 0 {
            return Ok(None);
        }
        let refused = self.maintained(job.place, 4, 1)?;
        let same = refused.into_iter().find(|(access, _)| *access == job.wish.access);
        Ok(same.map(|(_, refusal)| refusal))
    }

    /// One attempt, as the site makes it.
    fn attempt(&mut self, job: &Job, barrier: bool, meanwhile: &[Event]) -> Result<(), NoBackup> {
        let (Some(store), Some(vm)) = (self.replica.store(), self.vms[job.place].id) else {
            return Err(NoBackup::Failed("there is no such replica".into()));
        };
        let barrier = barrier.then(|| store.barrier(vm, Duration::ZERO)).transpose()?;
        let (point, opened) = self.open(&store, vm, job.wish)?;
        // From here on the pin or the hold keeps applies away.
        drop(barrier);
        let Some(moment) = self.truth.moment(vm, point.id) else {
            return Err(Violation("a backup of a point that nobody made".into()).into());
        };
        let repository = SimRepository::open(&self.replica.disk, &self.replica.repository())?;
        repository.settle()?;
        let mut backups = repository.backups()?;
        backups.retain(|backup| backup.vm == vm);
        let parent = choose_parent(backups, |backup| backup.point, |id| opened.view.knows_changes_since(id))?;
        self.coverage.hit(if parent.is_some() { "backups begun incremental" } else { "backups begun full" });
        let making = Making {
            world: self,
            opened,
            vm,
            point,
            moment,
            repository,
            parent,
            meanwhile: meanwhile.iter().cloned().collect(),
            packing: Packing::default(),
            disks: Vec::new(),
        };
        match close(making) {
            // What was read may not be used: the gate knows why.
            Err(NoBackup::Failed(why)) if why.contains("must be thrown away") => {
                store.admit(vm, job.wish.access, point.number)?;
                Err(NoBackup::Failed(why))
            }
            outcome => outcome,
        }
    }

    fn open(&self, store: &Store, vm: VmId, wish: Wish) -> Result<(PointInfo, Opened), NoBackup> {
        let (now, power) = (self.clock(Side::Replica).now(), self.replica.power.clone());
        let mut points = store.points(vm)?;
        if wish.access == Access::Hold {
            let base = store.hold_point(vm)?.map(|base| base.number);
            points.retain(|point| Some(point.number) == base);
        }
        let wanted = if wish.application { Wanted::Application } else { Wanted::default() };
        let point = match choose_point(&points, wanted, now) {
            Ok(point) => point,
            Err(none) => {
                let facts = store.facts(vm)?;
                admit(&facts.as_facts(), wish.access, LogNumber::ZERO, now).map_err(NoBackup::Refused)?;
                return Err(NoBackup::Failed(none.to_string()));
            }
        };
        let admitted = store.admit(vm, wish.access, point.number)?;
        let life = power.boots();
        let opened = |view, hold| Opened { view, hold, store: store.clone(), power: power.clone(), life };
        if wish.access == Access::Hold {
            let (hold, admission) = store.open_hold(admitted, LEASE)?;
            let view = hold.view(store, admission).inspect_err(|_| drop(store.release(&hold.id)))?;
            return Ok((point, opened(view, Some((hold.id, hold.expires_at)))));
        }
        Ok((point, opened(store.open_view(admitted)?, None)))
    }
}

/// What a backup reads.
struct Opened {
    view: ConsistentView,
    /// Its id, and when it ends.
    hold: Option<(String, Timestamp)>,
    store: Store,
    power: crate::power::Power,
    life: u64,
}

impl Drop for Opened {
    /// The dead release nothing: a hold of theirs ends by itself.
    fn drop(&mut self) {
        if let Some((hold, _)) = self.hold.take()
            && self.life == self.power.boots()
            && !self.power.is_down()
        {
            let _ = self.store.release(&hold);
        }
    }
}

/// A backup that is being made.
struct Making<'w> {
    world: &'w mut World,
    opened: Opened,
    vm: VmId,
    point: PointInfo,
    moment: Moment,
    repository: SimRepository,
    parent: Option<Listed>,
    meanwhile: VecDeque<Event>,
    packing: Packing,
    disks: Vec<ListedDisk>,
}

impl Making<'_> {
    /// The next thing that happens while this backup reads.
    fn let_others_go_on(&mut self) -> Result<(), NoBackup> {
        let Some(event) = self.meanwhile.pop_front() else { return Ok(()) };
        self.world.happen(&event)?;
        if self.opened.life != self.world.replica.power.boots() || self.world.replica.power.is_down() {
            return Err(NoBackup::Failed("the power is cut".into()));
        }
        Ok(())
    }

    /// The chunks of a disk: from the parent where nothing has changed, else read.
    fn store_disk(&mut self, disk: &replica::DiskSize) -> Result<ListedDisk, NoBackup> {
        let parent = self.parent.as_ref().and_then(|parent| {
            let known = parent.disks.iter().find(|known| known.name == disk.name)?;
            Some((parent.point.id, known.size_bytes, known.chunks.clone()))
        });
        let changed = match &parent {
            Some((id, ..)) => self.opened.view.changed_since(&disk.name, *id)?,
            None => None,
        };
        let mut chunks = Vec::new();
        for start in (0..disk.size_bytes).step_by(CHUNK_BYTES as usize) {
            let end = (start + CHUNK_BYTES).min(disk.size_bytes);
            let kept = parent.as_ref().zip(changed.as_ref()).and_then(|((_, size_bytes, known), changed)| {
                let touched = changed.iter().any(|range| range.start < end && start < range.end);
                let whole =
                    end <= *size_bytes && (end - start == CHUNK_BYTES || *size_bytes == disk.size_bytes);
                known.get(usize::try_from(start / CHUNK_BYTES).ok()?).filter(|_| whole && !touched).cloned()
            });
            chunks.push(match kept {
                Some(chunk) => chunk,
                None => self.store_chunk(disk, start, end)?,
            });
        }
        Ok(ListedDisk { name: disk.name.clone(), size_bytes: disk.size_bytes, chunks })
    }

    fn store_chunk(&mut self, disk: &replica::DiskSize, start: u64, end: u64) -> Result<ChunkId, NoBackup> {
        self.let_others_go_on()?;
        let mut bytes = vec![0; usize::try_from(end - start).unwrap_or(0)];
        let data = self.opened.view.data_extents(&disk.name, start..end)?;
        for range in data {
            let place = |at: u64| usize::try_from(at - start).unwrap_or(0);
            self.opened.view.read_at(
                &disk.name,
                range.start,
                &mut bytes[place(range.start)..place(range.end)],
            )?;
        }
        // A hold that has ended shows anything; whoever reads it asks at the end whether it has lasted.
        if self.opened.hold.is_none()
            && let Err(what) = self.moment.state.check(place_of(&disk.name), start, &bytes)
        {
            return Err(Violation(format!("a backup reads what the VM never was: {what}")).into());
        }
        Ok(self.repository.add(&mut self.packing, &bytes)?)
    }
}

impl Closing for Making<'_> {
    type Error = NoBackup;
    type Listed = ();

    fn store(&mut self) -> Result<(), NoBackup> {
        for disk in self.opened.view.disks() {
            let listed = self.store_disk(&disk)?;
            self.disks.push(listed);
        }
        self.repository.flush(&mut self.packing)?;
        while !self.meanwhile.is_empty() {
            self.let_others_go_on()?;
        }
        Ok(())
    }

    fn index(&mut self) -> Result<(), NoBackup> {
        Ok(self.repository.write_index(&mut self.packing)?)
    }

    fn check_source(&mut self) -> Result<(), NoBackup> {
        Ok(self.opened.view.still_valid()?)
    }

    fn check_run(&mut self) -> Result<(), NoBackup> {
        Ok(())
    }

    fn list(self) -> Result<(), NoBackup> {
        // What was read may be used only if it was there to the end.
        let Opened { view, hold, .. } = &self.opened;
        let held = hold.as_ref().is_none_or(|(_, ends)| *ends > self.world.clock(Side::Replica).now());
        if !held || view.still_valid().is_err() {
            return Err(Violation("a backup of what could no longer be read is listed".into()).into());
        }
        let listed = Listed { vm: self.vm, point: self.point, disks: self.disks };
        Ok(self.repository.list_backup(&listed)?)
    }
}
