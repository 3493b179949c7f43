//! Backup jobs: each refusal, each next attempt and the outcome are in the catalog before anything waits, so
//! that a job comes home whatever happens to the process.
//!
//! What becomes of a job after each attempt, `model::job` says.
//!
//! A job that was running when the site was killed is waiting when it starts again: a backup that was cut
//! off leaves nothing in the repository.

mod places;
mod rows;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use catalog::Catalog;
use model::gate::Refusal;
use model::job::{Bounds, Next, Outcome, Turn};
use model::{Attempt, GiveUp, PolicyName, RetryPolicy, Timestamp, VmName, human_duration};
use policy::{Limits, Place};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::clock::{now, rfc3339};
use crate::control::Reporter;
use crate::failure::{Code, Failure};
use crate::random;
use crate::request::BackupRequest;
use places::Places;
pub(crate) use rows::{BackedUp, Selected, newest_backup};

/// When a backup is tried again that failed by something that passes, if nothing better is known.
const FALTERED: Duration = Duration::from_secs(60);

/// Where a job stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum State {
    /// It is tried next at this moment.
    Waiting {
        /// When.
        at: Timestamp,
        /// Applies are held off for it.
        barrier: bool,
    },
    /// It is being tried.
    Running {
        /// Since when.
        since: Timestamp,
    },
    /// The backup is in the repository.
    Done {
        /// What `backup` answers.
        report: Value,
    },
    /// There is none.
    Failed {
        /// Why.
        failure: Failure,
    },
}

/// Whose a job is, and how it comes home.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Terms {
    /// The policy that it was made by; a person's if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<PolicyName>,
    /// What it was due for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<Timestamp>,
    /// Its own window had ended when it was made.
    #[serde(default)]
    pub caught_up: bool,
    /// How it comes home, where that is not the site's own way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<RetryPolicy>,
}

/// A job.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// Its number.
    pub id: i64,
    /// What was asked for.
    pub request: BackupRequest,
    /// Whose it is, and how it comes home.
    pub terms: Terms,
    /// Where it stands.
    pub state: State,
    /// The refused attempts.
    pub attempts: Vec<Attempt>,
    /// When it was asked for.
    pub made_at: Timestamp,
    /// When its window ends.
    pub deadline: Timestamp,
    /// When it came to its end.
    pub ended_at: Option<Timestamp>,
}

impl Job {
    /// A job that is made now, and begins at this moment.
    pub fn new(request: BackupRequest, terms: Terms, begin: Timestamp, deadline: Timestamp) -> Self {
        let state = State::Waiting { at: begin, barrier: false };
        Self { id: 0, request, terms, state, attempts: Vec::new(), made_at: now(), deadline, ended_at: None }
    }

    /// What it has come to, if it is at its end.
    pub fn outcome(&self) -> Option<Result<Value, Failure>> {
        match &self.state {
            State::Waiting { .. } | State::Running { .. } => None,
            State::Done { report } => Some(Ok(report.clone())),
            State::Failed { failure } => Some(Err(failure.clone())),
        }
    }

    /// As `jobs` lists it.
    #[must_use]
    pub fn shown(&self) -> Value {
        let (state, next_at, failure, report) = match &self.state {
            State::Waiting { at, .. } => ("waiting", Some(rfc3339(*at)), None, None),
            State::Running { .. } => ("running", None, None, None),
            State::Done { report } => ("done", None, None, Some(report)),
            State::Failed { failure } => ("failed", None, Some(failure), None),
        };
        json!({
            "id": self.id, "vm": self.request.vm, "state": state, "next_at": next_at,
            "policy": self.terms.policy, "repository": self.request.repository,
            "made_at": rfc3339(self.made_at), "deadline": rfc3339(self.deadline),
            "ended_at": self.ended_at.map(rfc3339), "error": failure,
            "attempts": attempts_shown(&self.attempts), "backup": report.map(|report| &report["backup"]),
        })
    }
}

/// Refused attempts as commands show them.
pub(crate) fn attempts_shown(attempts: &[Attempt]) -> Value {
    attempts.iter().map(|attempt| json!({ "at": rfc3339(attempt.at), "refused": attempt.refused })).collect()
}

/// What one attempt came to, if not to a backup.
pub(crate) enum NoBackup {
    /// The gate refused.
    Refused(Refusal),
    /// It failed, and another attempt would too.
    Failed(Failure),
}

/// Who makes attempts.
pub(crate) trait Attempts: Send + Sync + 'static {
    /// One attempt; with `barrier`, applies are held off for it. The report lacks the refused attempts.
    fn attempt(
        &self,
        job: &Job,
        barrier: bool,
        reporter: Option<&Reporter>,
        stop: &CancellationToken,
    ) -> impl Future<Output = Result<Value, NoBackup>> + Send;

    /// A job failed for good.
    fn gave_up(&self, job: &Job, failure: &Failure) -> impl Future<Output = ()> + Send;

    /// What a job keeps busy while it runs.
    fn place(&self, job: &Job) -> Place;

    /// How long its promise can still be kept without it: of those that wait, the one with the least time runs next.
    fn time_left(&self, job: &Job) -> Duration;

    /// The first moment from `at` on at which an attempt may begin.
    fn allowed_from(&self, job: &Job, at: Timestamp) -> Option<Timestamp>;

    /// Until when a policy's job is tried whose window has ended while the site was off; none if it is no policy's any more.
    fn caught_up_until(&self, job: &Job, now: Timestamp) -> Option<Timestamp>;
}

/// All jobs of a site.
pub(crate) struct Jobs<A> {
    catalog: Catalog,
    settings: Settings,
    places: Places,
    stop: CancellationToken,
    attempts: Arc<A>,
}

/// How a site makes backups, where nothing else is said.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// How they come home.
    pub retry: RetryPolicy,
    /// How long one is tried.
    pub window: Duration,
    /// How many run at once.
    pub limits: Limits,
    /// How long it is remembered what came of them.
    pub history: Duration,
}

impl<A: Attempts> Jobs<A> {
    pub fn open(
        catalog: Catalog,
        settings: Settings,
        stop: CancellationToken,
        attempts: Arc<A>,
    ) -> Result<Arc<Self>, Failure> {
        rows::migrate(&catalog)?;
        let places = Places::new(settings.limits);
        Ok(Arc::new(Self { catalog, settings, places, stop, attempts }))
    }

    /// Goes on with the jobs that had not come to their end.
    pub fn start(self: &Arc<Self>) -> Result<(), Failure> {
        let now = now();
        for mut job in rows::unfinished(&self.catalog)? {
            if matches!(job.state, State::Running { .. }) {
                job.state = self.state_after(&job, model::job::after_restart(now));
            }
            // A policy's backup that the site was off for is caught up.
            if job.deadline < now
                && let Some(deadline) = self.attempts.caught_up_until(&job, now)
            {
                job.deadline = deadline;
                job.terms.caught_up = true;
            }
            self.spawn(job, None);
        }
        Ok(())
    }

    /// Makes a person's job, and waits for its outcome.
    pub async fn run(self: &Arc<Self>, request: BackupRequest, reporter: Reporter) -> Result<Value, Failure> {
        let now = now();
        let mut job = Job::new(request, Terms::default(), now, now.plus(self.settings.window));
        job.id = rows::add(&self.catalog, &job, now.minus(self.settings.history)).await?;
        let mut changes = self.spawn(job, Some(reporter));
        loop {
            if let Some(outcome) = changes.borrow_and_update().outcome() {
                return outcome;
            }
            if changes.changed().await.is_err() {
                let message =
                    "the site ends; the backup is tried again when it is started ('afterimage jobs')";
                return Err(Failure::transient(Code::Stopped, message));
            }
        }
    }

    /// Makes the jobs of a policy, all of them or none, and notes of each VM what it was backed up for. Of a VM of which
    /// the policy has a job already that is not at its end, none is made. Gives the jobs' numbers.
    pub async fn plan(self: &Arc<Self>, planned: Vec<Job>) -> Result<Vec<i64>, Failure> {
        let jobs = rows::plan(&self.catalog, planned, now().minus(self.settings.history)).await?;
        let ids = jobs.iter().map(|job| job.id).collect();
        for job in jobs {
            self.spawn(job, None);
        }
        Ok(ids)
    }

    /// The VMs that a policy has selected.
    pub fn selected(&self, policy: &PolicyName) -> Result<Vec<Selected>, Failure> {
        rows::selected(&self.catalog, policy)
    }

    /// The policies that have selected VMs.
    pub fn policies(&self) -> Result<Vec<PolicyName>, Failure> {
        rows::policies(&self.catalog)
    }

    /// Notes which VMs a policy selects from now on, and which no more.
    pub async fn select(
        &self,
        policy: PolicyName,
        joined: Vec<VmName>,
        left: Vec<VmName>,
        at: Timestamp,
    ) -> Result<(), Failure> {
        rows::select(&self.catalog, policy, joined, left, at).await
    }

    /// The newest backup of each VM in each repository, as far as jobs of this site made them.
    pub fn backed_up(&self) -> Result<Vec<BackedUp>, Failure> {
        rows::backed_up(&self.catalog)
    }

    /// Notes a copy. Blocks.
    pub fn note_backup(&self, made: BackedUp) -> Result<(), Failure> {
        rows::note_backup(&self.catalog, made, now())
    }

    /// Whether backups were made in a repository since some were last forgotten there, and none is being made.
    pub fn is_forgetting_due(&self, repository: &str) -> Result<bool, Failure> {
        rows::is_forgetting_due(&self.catalog, repository)
    }

    /// Notes that it was looked for what no rule keeps. Blocks.
    pub fn note_forgetting(
        &self,
        repository: &str,
        at: Timestamp,
        has_forgotten: bool,
    ) -> Result<(), Failure> {
        rows::note_forgetting(&self.catalog, repository.to_owned(), at, has_forgotten)
    }

    /// Whether something was forgotten in a repository that was not pruned for so long.
    pub fn is_pruning_due(&self, repository: &str, every: Duration) -> Result<bool, Failure> {
        rows::is_pruning_due(&self.catalog, repository, now().minus(every))
    }

    /// Notes that a repository was pruned. Blocks.
    pub fn note_pruning(&self, repository: &str, at: Timestamp) -> Result<(), Failure> {
        rows::note_pruning(&self.catalog, repository.to_owned(), at)
    }

    /// The jobs made from this moment on, oldest first.
    pub fn made_since(&self, since: Timestamp) -> Result<Vec<Job>, Failure> {
        rows::made_since(&self.catalog, since)
    }

    /// The newest jobs, newest first.
    pub fn list(&self) -> Result<Vec<Job>, Failure> {
        rows::newest(&self.catalog)
    }

    fn spawn(self: &Arc<Self>, job: Job, reporter: Option<Reporter>) -> watch::Receiver<Job> {
        let (changed, changes) = watch::channel(job.clone());
        let jobs = self.clone();
        tokio::spawn(async move { jobs.drive(job, &changed, reporter.as_ref()).await });
        changes
    }

    /// Takes a job to its end, or as far as the site runs.
    async fn drive(&self, mut job: Job, changed: &watch::Sender<Job>, reporter: Option<&Reporter>) {
        while let State::Waiting { at, barrier } = job.state {
            tokio::select! {
                () = tokio::time::sleep(at.since(now())) => {}
                () = self.stop.cancelled() => return,
            }
            let _place = tokio::select! {
                place = self.places.take(self.attempts.place(&job), self.attempts.time_left(&job)) => place,
                () = self.stop.cancelled() => return,
            };
            match self.turn(&job) {
                Turn::Begin => job.state = State::Running { since: now() },
                Turn::Wait(at) => job.state = State::Waiting { at, barrier },
                Turn::TooLate => {
                    job.state = State::Failed { failure: self.too_late(&job) };
                    job.ended_at = Some(now());
                }
            }
            if !self.save(&job).await {
                return;
            }
            if !matches!(job.state, State::Running { .. }) {
                continue;
            }
            let outcome = self.attempts.attempt(&job, barrier, reporter, &self.stop).await;
            if self.stop.is_cancelled() && outcome.is_err() {
                return; // the catalog says "running": the next start goes on
            }
            self.settle(&mut job, outcome, reporter);
            job.ended_at = job.outcome().map(|_| now());
            if !self.save(&job).await {
                return;
            }
        }
        if let State::Failed { failure } = &job.state {
            self.attempts.gave_up(&job, failure).await;
        }
        changed.send_replace(job);
    }

    fn within_bounds<T>(&self, job: &Job, decide: impl FnOnce(Bounds<'_>) -> T) -> T {
        decide(Bounds {
            policy: job.terms.retry.as_ref().unwrap_or(&self.settings.retry),
            deadline: job.deadline,
            no_retry: job.request.no_retry,
            allowed_from: &|at| self.attempts.allowed_from(job, at),
        })
    }

    fn turn(&self, job: &Job) -> Turn {
        self.within_bounds(job, |bounds| model::job::turn(bounds, now()))
    }

    fn too_late(&self, job: &Job) -> Failure {
        let waited = match job.attempts.last() {
            Some(last) => format!("its last attempt was refused by {}", last.refused),
            None => {
                "others had its turn before; see 'at-once' in config.toml, or give the policy a longer window"
                    .into()
            }
        };
        Failure::new(Code::GaveUp, self.gave_up(job, GiveUp::Deadline, &waited))
    }

    fn settle(&self, job: &mut Job, outcome: Result<Value, NoBackup>, reporter: Option<&Reporter>) {
        let outcome = match outcome {
            Ok(report) => Outcome::Done(report),
            Err(NoBackup::Failed(failure)) if job.is_worth_another_try(&failure) => Outcome::Faltered {
                code: failure.code.to_string(),
                retry_after: failure.retry_after_s.map_or(FALTERED, Duration::from_secs),
                failure,
            },
            Err(NoBackup::Failed(failure)) => Outcome::Failed(failure),
            Err(NoBackup::Refused(refusal)) => Outcome::Refused(refusal),
        };
        let mut attempts = job.attempts.clone();
        let next = self
            .within_bounds(job, |bounds| model::job::settle(&mut attempts, outcome, bounds, now(), chance()));
        job.attempts = attempts;
        if let (Next::Again { at, barrier }, Some(last), Some(reporter)) =
            (&next, job.attempts.last(), reporter)
        {
            let wait = human_duration(at.since(now()));
            let how = if *barrier { ", with applies held off" } else { "" };
            reporter.progress(format!("refused: {}; again in {wait}{how}", last.refused), 0, 0);
        }
        job.state = self.state_after(job, next);
    }

    fn state_after(&self, job: &Job, next: Next<Value, Failure>) -> State {
        match next {
            Next::Done(mut report) => {
                report["attempts"] = attempts_shown(&job.attempts);
                State::Done { report }
            }
            Next::Failed(failure, None) => State::Failed { failure },
            Next::Failed(failure, Some(why)) => {
                let message = self.gave_up(job, why, &failure.message);
                State::Failed { failure: Failure { message, ..failure } }
            }
            Next::Again { at, barrier } => State::Waiting { at, barrier },
            Next::Refused(refusal, None) => State::Failed { failure: (&refusal).into() },
            Next::Refused(refusal, Some(why)) => {
                let message = self.gave_up(job, why, &refusal.message);
                let refused = Failure::from(&refusal);
                State::Failed { failure: Failure { code: Code::GaveUp, message, ..refused } }
            }
        }
    }

    fn gave_up(&self, job: &Job, why: GiveUp, last: &str) -> String {
        let why = match why {
            GiveUp::Attempts => format!("after {} attempts", job.attempts.len()),
            GiveUp::Deadline => {
                format!("because its window of {} ends", human_duration(job.deadline.since(job.made_at)))
            }
        };
        format!("the backup of {} was given up {why}: {last}", job.request.vm)
    }

    /// Writes a job down; if that cannot be done the job stays as it was and goes on at the next start.
    async fn save(&self, job: &Job) -> bool {
        let saved = rows::save(&self.catalog, job).await;
        saved
            .inspect_err(
                |error| tracing::error!(job = job.id, %error, "a backup job could not be written down"),
            )
            .is_ok()
    }
}

impl Job {
    /// A policy's backup comes home over what an administrator mends or what passes by itself, as a full disk or a VM
    /// that has no point yet; a person is told at once.
    fn is_worth_another_try(&self, failure: &Failure) -> bool {
        let may_pass =
            matches!(failure.code, Code::Io | Code::Repository | Code::Replica | Code::NoSuchPoint);
        failure.transient || (self.terms.policy.is_some() && may_pass)
    }
}

/// Uniform in 0..1. Without randomness the middle will do: jitter is a courtesy, not a safeguard.
fn chance() -> f64 {
    random::bytes().map_or(0.5, |bytes| f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests;
