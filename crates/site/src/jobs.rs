//! Backup jobs: each refusal, each next attempt and the outcome are in the catalog before anything waits, so
//! that a job comes home whatever happens to the process.
//!
//! What becomes of a job after each attempt, `model::job` says.
//!
//! A job that was running when the site was killed is waiting when it starts again: a backup that was cut
//! off leaves nothing in the repository.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use catalog::column::{json, to_json};
use catalog::{Catalog, params, rusqlite};
use model::gate::Refusal;
use model::job::{Bounds, Next, Outcome};
use model::{Attempt, GiveUp, RetryPolicy, Timestamp, human_duration};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use steps::durable_step;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use crate::clock::{now, rfc3339};
use crate::control::Reporter;
use crate::failure::{Code, Failure};
use crate::random;
use crate::request::BackupRequest;

const TABLES: &[&str] = &["
    CREATE TABLE jobs (
        id       INTEGER PRIMARY KEY,
        vm       TEXT NOT NULL,         -- its name
        request  TEXT NOT NULL,         -- json: BackupRequest
        state    TEXT NOT NULL,         -- json: State
        attempts TEXT NOT NULL,         -- json: [Attempt], the refused ones
        made_at  INTEGER NOT NULL,
        deadline INTEGER NOT NULL
    ) STRICT;
"];

/// Jobs at their end that are kept for `jobs` to list.
const ENDED_KEPT: u32 = 1000;

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

/// A job.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// Its number.
    pub id: i64,
    /// What was asked for.
    pub request: BackupRequest,
    /// Where it stands.
    pub state: State,
    /// The refused attempts.
    pub attempts: Vec<Attempt>,
    /// When it was asked for.
    pub made_at: Timestamp,
    /// When its window ends.
    pub deadline: Timestamp,
}

impl Job {
    fn outcome(&self) -> Option<Result<Value, Failure>> {
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
            "made_at": rfc3339(self.made_at), "deadline": rfc3339(self.deadline), "error": failure,
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
        request: &BackupRequest,
        barrier: bool,
        reporter: Option<&Reporter>,
        stop: &CancellationToken,
    ) -> impl Future<Output = Result<Value, NoBackup>> + Send;

    /// A job failed for good.
    fn gave_up(&self, job: &Job, failure: &Failure) -> impl Future<Output = ()> + Send;
}

/// All jobs of a site.
pub(crate) struct Jobs<A> {
    catalog: Catalog,
    policy: RetryPolicy,
    window: Duration,
    places: Semaphore,
    stop: CancellationToken,
    attempts: Arc<A>,
}

impl<A: Attempts> Jobs<A> {
    pub fn open(
        catalog: Catalog,
        policy: RetryPolicy,
        window: Duration,
        at_once: usize,
        stop: CancellationToken,
        attempts: Arc<A>,
    ) -> Result<Arc<Self>, Failure> {
        catalog.migrate("jobs", TABLES)?;
        let places = Semaphore::new(at_once);
        Ok(Arc::new(Self { catalog, policy, window, places, stop, attempts }))
    }

    /// Goes on with the jobs that had not come to their end.
    pub fn start(self: &Arc<Self>) -> Result<(), Failure> {
        for mut job in self.list()?.into_iter().filter(|job| job.outcome().is_none()) {
            if matches!(job.state, State::Running { .. }) {
                job.state = self.state_after(&job, model::job::after_restart(now()));
            }
            self.spawn(job, None);
        }
        Ok(())
    }

    /// Makes a job, and waits for its outcome.
    pub async fn run(self: &Arc<Self>, request: BackupRequest, reporter: Reporter) -> Result<Value, Failure> {
        let made_at = now();
        let mut job = Job {
            id: 0,
            request,
            state: State::Waiting { at: made_at, barrier: false },
            attempts: Vec::new(),
            made_at,
            deadline: made_at.plus(self.window),
        };
        job.id = self.add(&job).await?;
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

    /// All jobs that are kept, newest first.
    pub fn list(&self) -> Result<Vec<Job>, Failure> {
        let query =
            "SELECT id, request, state, attempts, made_at, deadline FROM jobs ORDER BY id DESC LIMIT ?1";
        let jobs = self.catalog.read(|c| {
            c.prepare_cached(query)?.query_map([ENDED_KEPT], read_job)?.collect::<Result<_, _>>()
        })?;
        Ok(jobs)
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
            let Ok(_place) = self.places.acquire().await else { return };
            job.state = State::Running { since: now() };
            if !self.save(&job).await {
                return;
            }
            let outcome = self.attempts.attempt(&job.request, barrier, reporter, &self.stop).await;
            if self.stop.is_cancelled() && outcome.is_err() {
                return; // the catalog says "running": the next start goes on
            }
            self.settle(&mut job, outcome, reporter);
            if !self.save(&job).await {
                return;
            }
        }
        if let State::Failed { failure } = &job.state {
            self.attempts.gave_up(&job, failure).await;
        }
        changed.send_replace(job);
    }

    fn settle(&self, job: &mut Job, outcome: Result<Value, NoBackup>, reporter: Option<&Reporter>) {
        let outcome = match outcome {
            Ok(report) => Outcome::Done(report),
            Err(NoBackup::Failed(failure)) => Outcome::Failed(failure),
            Err(NoBackup::Refused(refusal)) => Outcome::Refused(refusal),
        };
        let no_retry = job.request.no_retry;
        let bounds = Bounds { policy: &self.policy, deadline: job.deadline, no_retry };
        let next = model::job::settle(&mut job.attempts, outcome, bounds, now(), chance());
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
            Next::Failed(failure) => State::Failed { failure },
            Next::Again { at, barrier } => State::Waiting { at, barrier },
            Next::Refused(refusal, None) => State::Failed { failure: (&refusal).into() },
            Next::Refused(refusal, Some(why)) => {
                let why = match why {
                    GiveUp::Attempts => format!("after {} attempts", job.attempts.len()),
                    GiveUp::Deadline => format!("because its window of {} ends", human_duration(self.window)),
                };
                let message = format!("the backup of {} was given up {why}: {refusal}", job.request.vm);
                let refused = Failure::from(&refusal);
                State::Failed { failure: Failure { code: Code::GaveUp, message, ..refused } }
            }
        }
    }

    async fn add(&self, job: &Job) -> Result<i64, Failure> {
        let job = job.clone();
        durable_step("site::job::adding");
        let id = self.catalog.change(move |tx| {
            tx.prepare_cached("INSERT INTO jobs (vm, request, state, attempts, made_at, deadline) VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?.execute(params![
                    job.request.vm.as_str(),
                    to_json(&job.request),
                    to_json(&job.state),
                    to_json(&job.attempts),
                    job.made_at.0,
                    job.deadline.0
                ])?;
            let id = tx.last_insert_rowid();
            tx.prepare_cached("DELETE FROM jobs WHERE id <= ?1 - ?2 AND state NOT LIKE '%\"waiting\"%'")?.execute(params![id, ENDED_KEPT])?;
            Ok(id)
        });
        let id = id.await?;
        durable_step("site::job::added");
        Ok(id)
    }

    /// Writes a job down; if that cannot be done the job stays as it was and goes on at the next start.
    async fn save(&self, job: &Job) -> bool {
        let (id, state, attempts) = (job.id, to_json(&job.state), to_json(&job.attempts));
        durable_step("site::job::saving");
        let saved = self
            .catalog
            .change(move |tx| {
                tx.prepare_cached("UPDATE jobs SET state = ?2, attempts = ?3 WHERE id = ?1")?
                    .execute(params![id, state, attempts])
            })
            .await;
        durable_step("site::job::saved");
        saved
            .inspect_err(|error| tracing::error!(job = id, %error, "a backup job could not be written down"))
            .is_ok()
    }
}

fn read_job(row: &rusqlite::Row<'_>) -> rusqlite::Result<Job> {
    Ok(Job {
        id: row.get(0)?,
        request: json(row, 1)?,
        state: json(row, 2)?,
        attempts: json(row, 3)?,
        made_at: Timestamp(row.get(4)?),
        deadline: Timestamp(row.get(5)?),
    })
}

/// Uniform in 0..1. Without randomness the middle will do: jitter is a courtesy, not a safeguard.
fn chance() -> f64 {
    random::bytes().map_or(0.5, |bytes| f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX))
}

#[cfg(test)]
#[path = "jobs_tests.rs"]
mod tests;
