//! Backup jobs, as `site::jobs` drives them: a place, an attempt, the gate's answer, and what the policy says.
//!
//! ```text
//!  Waiting ──its time──▶ Queued ──a place──▶ (AtBarrier ──the apply ends──▶) asks the gate ─▶ Reading ─▶ Ended
//!     ▲                                                                             │
//!     └───────────────── refused: again then, or with the barrier ──────────────────┴──▶ given up: Ended
//! ```

use model::gate::{Access, Admission, Refusal};
use model::{ApplyState, Attempt, GiveUp, RetryDecision};

use crate::clock::{HOUR, Micros, moment};
use crate::site::{Event, Site};
use crate::vm::Point;

/// One backup of one VM.
#[derive(Debug)]
pub(crate) struct Job {
    pub vm: u32,
    pub due: Micros,
    /// When it is tried next.
    pub next_at: Micros,
    pub barrier: bool,
    pub refused: Vec<Attempt>,
    pub state: JobState,
}

/// Where a job stands.
#[derive(Debug)]
pub(crate) enum JobState {
    Waiting,
    Queued,
    AtBarrier,
    /// Only the gate makes an admission, here as there.
    Reading(Admission),
    Ended,
}

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Done,
    GaveUp(GiveUp),
}

impl Site<'_> {
    /// One job for each VM, due evenly over the first part of the window.
    pub fn make_jobs(&mut self, chance: &mut fastrand::Rng) {
        let window = self.scenario.window;
        let mut vms: Vec<u32> = (0..self.vms.len() as u32).collect();
        chance.shuffle(&mut vms);
        let step = (window.due_until - window.from) as f64 / vms.len().max(1) as f64;
        for (place, vm) in vms.into_iter().enumerate() {
            let due = window.from + ((place as f64 + chance.f64()) * step) as Micros;
            let job =
                Job { vm, due, next_at: due, barrier: false, refused: Vec::new(), state: JobState::Waiting };
            self.at(due, Event::JobDue(self.jobs.len() as u32));
            self.jobs.push(job);
            self.open_jobs += 1;
        }
    }

    pub fn job_due(&mut self, index: u32) {
        let job = &mut self.jobs[index as usize];
        let due = matches!(job.state, JobState::Waiting) && job.next_at == self.now;
        if self.down || !due {
            return; // the site's next start tries it
        }
        job.state = JobState::Queued;
        self.waiting.push_back(index);
        self.give_places();
    }

    fn give_places(&mut self) {
        while self.places > 0
            && let Some(job) = self.waiting.pop_front()
        {
            self.places -= 1;
            self.attempt(job);
        }
    }

    /// One attempt: it has a place from here until it is refused or has read everything.
    fn attempt(&mut self, index: u32) {
        let pauses = self.pauses();
        let job = &mut self.jobs[index as usize];
        let vm = &mut self.vms[job.vm as usize];
        if vm.watched_age.is_none() {
            vm.watched_age = Some(self.now - vm.kept.latest().at);
            self.tally.first_attempt(vm.churn.bytes_per_s);
        }
        vm.primary.paused |= pauses;
        if job.barrier {
            vm.barred = true;
            self.tally.barriers += 1;
            if matches!(vm.apply, ApplyState::Running { .. }) {
                job.state = JobState::AtBarrier;
                let (life, attempt) = (self.life, job.refused.len() as u32);
                let at = self.now + self.scenario.barrier_patience;
                return self.at(at, Event::BarrierTimeout { job: index, life, attempt });
            }
        }
        self.ask(index);
    }

    /// A VM's apply has ended: the attempt that waited for it goes on before the next one can begin.
    pub fn apply_gave_way(&mut self, vm: u32) {
        if !self.vms[vm as usize].barred {
            return;
        }
        let waits = |job: &Job| job.vm == vm && matches!(job.state, JobState::AtBarrier);
        if let Some(index) = self.jobs.iter().position(waits) {
            self.ask(index as u32);
        }
    }

    /// The apply has not ended in time: the gate refuses, as it does in production, and the job comes again.
    pub fn barrier_timeout(&mut self, index: u32, life: u32, attempt: u32) {
        let job = &self.jobs[index as usize];
        let same = life == self.life && attempt == job.refused.len() as u32;
        if same && matches!(job.state, JobState::AtBarrier) {
            self.tally.barrier_in_vain += 1;
            self.ask(index);
        }
    }

    fn ask(&mut self, index: u32) {
        let access = self.scenario.strategy.access();
        let vm = &mut self.vms[self.jobs[index as usize].vm as usize];
        let answer = vm.ask(access, self.interval, &self.scenario.health, self.now);
        // The pin or the hold keeps applies away from here on, or nothing does.
        vm.barred = false;
        match answer {
            Ok((admission, point)) => self.open(index, admission, point),
            Err(refusal) => self.refused(index, &refusal),
        }
        self.wake(self.jobs[index as usize].vm);
    }

    fn open(&mut self, index: u32, admission: Admission, point: Point) {
        let job = &mut self.jobs[index as usize];
        let vm = &mut self.vms[job.vm as usize];
        vm.pin = Some(point);
        vm.held = admission.access() == Access::Hold;
        self.tally.admitted(self.now - job.due, self.now - point.at);
        job.state = JobState::Reading(admission);
        let read = self.scenario.backup_time(self.sizes.expected(&vm.churn, 24 * HOUR));
        self.disk.begin_reading(self.now);
        self.at(self.now + read, Event::BackupRead { job: index, life: self.life });
    }

    pub fn backup_read(&mut self, index: u32, life: u32) {
        let job = &mut self.jobs[index as usize];
        let vm = &mut self.vms[job.vm as usize];
        // If the site died in between, nothing of it is in the repository.
        let admitted = matches!(&job.state, JobState::Reading(admission) if admission.vm() == vm.id);
        if life != self.life || !admitted {
            return;
        }
        vm.pin = None;
        vm.held = false;
        self.tally.behind(self.now - vm.base.at);
        self.disk.end_reading(self.now);
        self.end(index, End::Done);
        self.wake(self.jobs[index as usize].vm);
    }

    fn refused(&mut self, index: u32, refusal: &Refusal) {
        let now = moment(self.now);
        let job = &mut self.jobs[index as usize];
        let rate = self.vms[job.vm as usize].churn.bytes_per_s;
        self.tally.refused(refusal.condition, job.refused.is_empty().then_some(rate));
        job.refused.push(Attempt { at: now, refused: refusal.condition.into() });
        let (deadline, chance) = (moment(self.scenario.window.until), self.job_chance.f64());
        match self.policy.decide(&job.refused, refusal.retry_after, Some(deadline), now, chance) {
            RetryDecision::Again { at, barrier } => {
                (job.state, job.next_at, job.barrier) = (JobState::Waiting, at.0, barrier);
                self.at(at.0, Event::JobDue(index));
                self.free_place();
            }
            RetryDecision::GiveUp(why) => self.end(index, End::GaveUp(why)),
        }
    }

    fn free_place(&mut self) {
        self.places += 1;
        self.give_places();
    }

    /// A job is at its end, whatever that is: what it paused goes on.
    fn end(&mut self, index: u32, end: End) {
        let job = &mut self.jobs[index as usize];
        job.state = JobState::Ended;
        let (vm, attempts) = (job.vm, job.refused.len() as u64 + u64::from(end == End::Done));
        let collided = job.refused.last().is_some_and(|last| last.refused.is_collision());
        let replica = &mut self.vms[vm as usize];
        replica.watch(self.now);
        let age = replica.watched_age.take().unwrap_or_default();
        let in_window = self.now <= self.scenario.window.until;
        self.tally.ended(end, attempts, self.now - job.due, in_window, collided, age);
        self.open_jobs -= 1;
        if replica.primary.paused {
            replica.primary.paused = false;
            self.cycle_now(vm);
        }
        self.free_place();
    }
}
