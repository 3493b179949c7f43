use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use model::Setback;
use model::gate::{Access, Condition};

use super::*;

/// Refuses a number of times, then succeeds; keeps whether the barrier was asked for.
struct Gate {
    refusals: AtomicUsize,
    by: Setback,
    barriers: Mutex<Vec<bool>>,
    gave_up: AtomicUsize,
}

impl Gate {
    fn new(refusals: usize, by: impl Into<Setback>) -> Arc<Self> {
        let (barriers, gave_up) = (Mutex::default(), AtomicUsize::new(0));
        Arc::new(Self { refusals: AtomicUsize::new(refusals), by: by.into(), barriers, gave_up })
    }
}

impl Attempts for Gate {
    async fn attempt(
        &self,
        job: &Job,
        barrier: bool,
        _: Option<&Reporter>,
        _: &CancellationToken,
    ) -> Result<Value, NoBackup> {
        self.barriers.lock().unwrap().push(barrier);
        let left = self.refusals.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        match (left, &self.by) {
            (Err(_), _) => {
                Ok(json!({ "backup": "abc", "vm": job.request.vm, "taken_at": "2026-11-28T20:00:00.000Z" }))
            }
            (Ok(_), Setback::Gate(condition)) => Err(NoBackup::Refused(Refusal {
                condition: *condition,
                transient: condition.clears_by_itself(),
                since: Timestamp(0),
                retry_after: Duration::ZERO,
                message: format!("refused by {condition}"),
            })),
            (Ok(_), Setback::Failure(why)) => Err(NoBackup::Failed(Failure::new(Code::Io, why.as_str()))),
        }
    }

    async fn gave_up(&self, _: &Job, _: &Failure) {
        self.gave_up.fetch_add(1, Ordering::SeqCst);
    }

    fn place(&self, _: &Job) -> Place {
        Place { repository: "local".into(), storage: "1".into() }
    }

    fn time_left(&self, _: &Job) -> Duration {
        Duration::ZERO
    }

    fn allowed_from(&self, _: &Job, at: Timestamp) -> Option<Timestamp> {
        Some(at)
    }

    fn caught_up_until(&self, _: &Job, now: Timestamp) -> Option<Timestamp> {
        Some(now.plus(Duration::from_secs(60)))
    }
}

fn request(no_retry: bool) -> BackupRequest {
    BackupRequest {
        vm: "web".parse().unwrap(),
        point: None,
        consistency: None,
        view: Access::Hold,
        repository: "local".into(),
        no_retry,
        pause: false,
    }
}

fn retry() -> RetryPolicy {
    RetryPolicy {
        first_delay: Duration::from_millis(1),
        delay_max: Duration::from_millis(5),
        attempts_max: 6,
        ..RetryPolicy::default()
    }
}

fn jobs(dir: &std::path::Path, gate: &Arc<Gate>, stop: &CancellationToken) -> Arc<Jobs<Gate>> {
    let catalog = Catalog::open(dir.join("catalog.sqlite")).unwrap();
    let settings = Settings {
        retry: retry(),
        window: Duration::from_secs(60),
        limits: Limits { site: 2, repository: 2, storage: 2 },
        history: Duration::from_secs(3600),
    };
    Jobs::open(catalog, settings, stop.clone(), gate.clone()).unwrap()
}

/// A job of the policy `nightly` for what was due at this moment.
fn planned(start: i64) -> Job {
    let terms = Terms {
        policy: Some("nightly".parse().unwrap()),
        start: Some(Timestamp(start)),
        caught_up: false,
        retry: Some(RetryPolicy { barrier_after: u32::MAX, ..retry() }),
    };
    Job::new(request(false), terms, now(), now().plus(Duration::from_secs(60)))
}

async fn ended(jobs: &Jobs<Gate>) -> Vec<Job> {
    loop {
        let all = jobs.list().unwrap();
        if all.iter().all(|job| job.outcome().is_some()) {
            return all;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn reporter() -> Reporter {
    Reporter::to_nobody()
}

#[tokio::test]
async fn a_refused_backup_comes_home_and_says_by_what_it_was_refused() {
    let dir = tempfile::tempdir().unwrap();
    let gate = Gate::new(4, Condition::ApplyInProgress);
    let jobs = jobs(dir.path(), &gate, &CancellationToken::new());
    let report = jobs.run(request(false), reporter()).await.unwrap();
    let refused: Vec<_> =
        report["attempts"].as_array().unwrap().iter().map(|attempt| &attempt["refused"]).collect();
    assert_eq!(refused, ["apply-in-progress"; 4]);
    assert_eq!(
        *gate.barriers.lock().unwrap(),
        [false, false, false, true, true],
        "the barrier follows collisions"
    );
    assert!(matches!(jobs.list().unwrap()[0].state, State::Done { .. }));
}

#[tokio::test]
async fn without_retry_the_refusal_itself_is_the_outcome() {
    let dir = tempfile::tempdir().unwrap();
    let gate = Gate::new(1, Condition::Resync);
    let jobs = jobs(dir.path(), &gate, &CancellationToken::new());
    let failure = jobs.run(request(true), reporter()).await.unwrap_err();
    assert_eq!((failure.condition, failure.exit_status()), (Some(Condition::Resync), 75));
    assert_eq!(jobs.list().unwrap()[0].attempts.len(), 1);
    assert_eq!(gate.gave_up.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn attempts_end_and_the_last_reason_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let gate = Gate::new(usize::MAX, Condition::ApplyFailed);
    let jobs = jobs(dir.path(), &gate, &CancellationToken::new());
    let failure = jobs.run(request(false), reporter()).await.unwrap_err();
    assert_eq!((failure.code, failure.condition), (Code::GaveUp, Some(Condition::ApplyFailed)));
    assert!(failure.message.contains("after 6 attempts"), "{failure}");
}

#[tokio::test]
async fn a_job_goes_on_where_a_killed_site_left_it() {
    let dir = tempfile::tempdir().unwrap();
    let stop = CancellationToken::new();
    let gate = Gate::new(usize::MAX, Condition::Failover);
    let first = jobs(dir.path(), &gate, &stop);
    let running = tokio::spawn({
        let first = first.clone();
        async move { first.run(request(false), reporter()).await }
    });
    while first.list().unwrap().first().is_none_or(|job| job.attempts.is_empty()) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    stop.cancel();
    let stopped = running.await.unwrap().unwrap_err();
    assert_eq!(stopped.code, Code::Stopped);

    let again = Gate::new(0, Condition::Failover);
    let second = jobs(dir.path(), &again, &CancellationToken::new());
    second.start().unwrap();
    let job = ended(&second).await.remove(0);
    let State::Done { report } = &job.state else { panic!("{job:?}") };
    assert_eq!(report["attempts"].as_array().unwrap().len(), job.attempts.len());
    assert!(!job.attempts.is_empty(), "what was refused before the kill is not forgotten");
}

#[tokio::test]
async fn a_policys_job_comes_home_over_what_a_person_is_told_of_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let gate = Gate::new(3, Setback::Failure("the disk is full".into()));
    let jobs = jobs(dir.path(), &gate, &CancellationToken::new());
    let failure = jobs.run(request(false), reporter()).await.unwrap_err();
    assert_eq!((failure.code, failure.message.as_str()), (Code::Io, "the disk is full"));
    let policy: PolicyName = "nightly".parse().unwrap();
    jobs.select(policy.clone(), vec!["web".parse().unwrap()], vec![], Timestamp(5)).await.unwrap();
    assert_eq!(jobs.plan(vec![planned(7)]).await.unwrap().len(), 1);
    let job = ended(&jobs).await.remove(0);
    let by: Vec<_> = job.attempts.iter().map(|attempt| attempt.refused.to_string()).collect();
    assert_eq!(by, ["io", "io"]);
    assert_eq!(*gate.barriers.lock().unwrap(), [false; 4]);
    let made = jobs.backed_up().unwrap();
    assert_eq!(
        (made[0].backup.as_str(), rfc3339(made[0].taken_at).as_str()),
        ("abc", "2026-11-28T20:00:00.000Z")
    );
    assert_eq!(jobs.selected(&policy).unwrap()[0].seen, Timestamp(7));
}

#[tokio::test]
async fn a_vm_has_one_job_of_a_policy_at_a_time_and_no_start_is_seen_to_twice() {
    let dir = tempfile::tempdir().unwrap();
    let (gate, stop) = (Gate::new(usize::MAX, Condition::Resync), CancellationToken::new());
    let first = jobs(dir.path(), &gate, &stop);
    let policy: PolicyName = "nightly".parse().unwrap();
    first.select(policy.clone(), vec!["web".parse().unwrap()], vec![], Timestamp(0)).await.unwrap();
    assert_eq!(first.plan(vec![planned(7)]).await.unwrap().len(), 1);
    assert_eq!(first.plan(vec![planned(9)]).await.unwrap().len(), 0, "the one before is not at its end");
    assert_eq!(first.selected(&policy).unwrap()[0].seen, Timestamp(9));
    let jobs = ended(&first).await;
    assert_eq!(jobs.len(), 1);
    assert!(matches!(&jobs[0].state, State::Failed { failure } if failure.code == Code::GaveUp));
    // Whoever is not selected any more is not known, and begins anew when it is again.
    first.select(policy.clone(), vec![], vec!["web".parse().unwrap()], Timestamp(10)).await.unwrap();
    assert!(first.selected(&policy).unwrap().is_empty() && first.policies().unwrap().is_empty());
}

#[tokio::test]
async fn thousands_of_ended_jobs_do_not_hide_one_that_waits() {
    let dir = tempfile::tempdir().unwrap();
    let waits = jobs(dir.path(), &Gate::new(0, Condition::Resync), &CancellationToken::new());
    let mut job = planned(1);
    job.id = rows::add(&waits.catalog, &job, Timestamp(0)).await.unwrap();
    let many = (0..1100).map(|_| Job {
        ended_at: Some(now()),
        state: State::Failed { failure: Failure::new(Code::Io, "") },
        ..planned(2)
    });
    for ended in many {
        let id = rows::add(&waits.catalog, &ended, Timestamp(i64::MAX)).await.unwrap();
        rows::save(&waits.catalog, &Job { id, ..ended }).await.unwrap();
    }
    assert!(waits.list().unwrap().iter().all(|job| job.ended_at.is_some()));
    assert!(waits.list().unwrap().len() <= 1001, "the oldest are forgotten");
    waits.start().unwrap();
    while waits.backed_up().unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn what_the_site_was_off_for_is_caught_up_and_what_waited_too_long_for_its_turn_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = jobs(dir.path(), &Gate::new(0, Condition::Resync), &CancellationToken::new());
    let past = Job { deadline: Timestamp(9), ..planned(1) };
    rows::add(&jobs.catalog, &past, Timestamp(0)).await.unwrap();
    jobs.start().unwrap();
    let caught_up = ended(&jobs).await.remove(0);
    assert!(matches!(caught_up.state, State::Done { .. }) && caught_up.terms.caught_up, "{caught_up:?}");
    assert!(caught_up.deadline > Timestamp(9));
    jobs.plan(vec![past]).await.unwrap();
    let late = ended(&jobs).await.remove(0);
    let State::Failed { failure } = &late.state else { panic!("{late:?}") };
    assert!(failure.code == Code::GaveUp && failure.message.contains("others had its turn"), "{failure}");
}
