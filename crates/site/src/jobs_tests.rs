use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use model::gate::{Access, Condition};

use super::*;

/// Refuses a number of times, then succeeds; keeps whether the barrier was asked for.
struct Gate {
    refusals: AtomicUsize,
    condition: Condition,
    barriers: Mutex<Vec<bool>>,
    gave_up: AtomicUsize,
}

impl Gate {
    fn new(refusals: usize, condition: Condition) -> Arc<Self> {
        let (barriers, gave_up) = (Mutex::default(), AtomicUsize::new(0));
        Arc::new(Self { refusals: AtomicUsize::new(refusals), condition, barriers, gave_up })
    }
}

impl Attempts for Gate {
    async fn attempt(
        &self,
        request: &BackupRequest,
        barrier: bool,
        _: Option<&Reporter>,
        _: &CancellationToken,
    ) -> Result<Value, NoBackup> {
        self.barriers.lock().unwrap().push(barrier);
        let left = self.refusals.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        match left {
            Err(_) => Ok(json!({ "backup": "abc", "vm": request.vm })),
            Ok(_) => Err(NoBackup::Refused(Refusal {
                condition: self.condition,
                transient: self.condition.clears_by_itself(),
                since: Timestamp(0),
                retry_after: Duration::ZERO,
                message: format!("refused by {}", self.condition),
            })),
        }
    }

    async fn gave_up(&self, _: &Job, _: &Failure) {
        self.gave_up.fetch_add(1, Ordering::SeqCst);
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
    }
}

fn jobs(dir: &std::path::Path, gate: &Arc<Gate>, stop: &CancellationToken) -> Arc<Jobs<Gate>> {
    let catalog = Catalog::open(dir.join("catalog.sqlite")).unwrap();
    let policy = RetryPolicy {
        first_delay: Duration::from_millis(1),
        delay_max: Duration::from_millis(5),
        attempts_max: 6,
        ..RetryPolicy::default()
    };
    Jobs::open(catalog, policy, Duration::from_secs(60), 2, stop.clone(), gate.clone()).unwrap()
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
    let job = loop {
        let job = second.list().unwrap().remove(0);
        if job.outcome().is_some() {
            break job;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    };
    let State::Done { report } = &job.state else { panic!("{job:?}") };
    assert_eq!(report["attempts"].as_array().unwrap().len(), job.attempts.len());
    assert!(!job.attempts.is_empty(), "what was refused before the kill is not forgotten");
}
