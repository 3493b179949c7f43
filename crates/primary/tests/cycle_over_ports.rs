//! The cycle over ports in memory: one thread, tokio's clock paused, and after every point the replica has,
//! byte for byte, what the guest's disks held at the moment, whatever the guest wrote since.

mod world;

use std::time::Duration;

use model::{Consistency, Health, LogNumber, Phase, Purpose};
use primary::ports::Ports;
use primary::{CycleReport, Failure, FailureCode, Relationship};
use world::{BLOCK, Fault, World, alone, request};

const SIZES: [usize; 2] = [3 << 20, (1 << 20) + 3 * BLOCK];

fn write(world: &World, times: usize) {
    (0..times).for_each(|_| world.lock().guest_writes());
}

/// After a cycle that made a point, the replica is what the guest was.
#[track_caller]
fn check(world: &World, report: &CycleReport) {
    let state = world.lock();
    assert_eq!(state.vm.captures, 0, "no moment stays fixed");
    assert_eq!(state.vm.bitmaps().len(), 1, "one bitmap records");
    if report.point.is_some() {
        let moment = &state.vm.moments[&report.moment];
        assert!(state.replica.data() == *moment, "the replica differs from the guest at {:?}", report.moment);
    }
}

/// Runs cycles until one makes a point; what each of them was.
async fn until_a_point(world: &World, web: &mut Relationship<World>) -> Vec<CycleReport> {
    let mut reports = Vec::new();
    loop {
        let report = web.cycle_now().await.unwrap();
        check(world, &report);
        reports.push(report);
        if reports.last().unwrap().point.is_some() {
            return reports;
        }
    }
}

async fn protected(world: &World, catalog: &std::path::Path) -> Relationship<World> {
    let mut web = Relationship::protect(&world.primary(catalog), request()).await.unwrap();
    let reports = until_a_point(world, &mut web).await;
    let purposes: Vec<_> = reports.iter().map(|report| (report.purpose, report.point)).collect();
    // Each disk holds more than one log of a pass may: the second log has what changed on the first disk.
    assert_eq!(purposes, [(Purpose::Initial, None), (Purpose::Initial, Some(Consistency::Crash))]);
    web
}

/// A process that is killed while the replica's answer to its last log is on its way.
async fn killed(world: &World, mut web: Relationship<World>) {
    world.lock().replica.fault = Some(Fault::Hang);
    let hangs = world.lock().replica.hangs.clone();
    tokio::select! {
        biased;
        outcome = web.cycle_now() => panic!("the cycle ended: {outcome:?}"),
        () = hangs.notified() => {}
    }
}

fn failed(outcome: Result<CycleReport, Failure>, code: FailureCode) {
    assert_eq!(outcome.map_err(|failure| failure.code).unwrap_err(), code);
}

/// Everything that can happen, one after the other; gives the logs that the replica took.
async fn story(seed: u64) -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let catalog = dir.path().join("catalog.sqlite");
    let world = World::new(seed, &SIZES);
    let mut web = protected(&world, &catalog).await;

    // Changes; the first point that is due to be application-consistent is.
    write(&world, 20);
    let report = web.cycle_now().await.unwrap();
    check(&world, &report);
    assert_eq!((report.purpose, report.point), (Purpose::Changes, Some(Consistency::Application)));
    let due = web.due_in().unwrap();
    assert!(due <= Duration::from_secs(30) && due > Duration::from_secs(29), "{due:?}");

    // An upload that fails: its changes are in the next log, and the next cycle waits a little.
    write(&world, 20);
    let logs = world.lock().replica.logs.len();
    world.lock().replica.fault = Some(Fault::Break);
    failed(web.cycle_now().await, FailureCode::Link);
    assert_eq!(web.due_in(), Some(Duration::from_secs(60)));
    assert_eq!((web.row().failures, world.lock().replica.logs.len()), (1, logs));
    write(&world, 5);
    check(&world, &web.cycle_now().await.unwrap());
    assert_eq!(web.row().failures, 0);

    // A log that arrived, and whose answer did not.
    write(&world, 20);
    world.lock().replica.fault = Some(Fault::LoseAnswer);
    failed(web.cycle_now().await, FailureCode::Link);
    assert!(web.row().shipped.attempt.is_some());
    write(&world, 5);
    let report = web.cycle_now().await.unwrap();
    check(&world, &report);
    assert_eq!(report.purpose, Purpose::Changes, "nothing had to be compared");

    // The same to a process that is killed: the row in the catalog tells whose log it is.
    write(&world, 20);
    killed(&world, web).await;
    let mut web = world.reload(&catalog);
    let arrived = world.lock().replica.durable;
    assert_eq!(web.row().shipped.attempt.map(|attempt| attempt.head), Some(arrived));
    write(&world, 5);
    let report = web.cycle_now().await.unwrap();
    check(&world, &report);
    assert_eq!(report.purpose, Purpose::Changes, "nothing had to be compared");
    assert_eq!(web.row().shipped.acked.number, arrived.number.next());

    // QEMU is restarted and its bitmaps are lost: both sides are compared, and only what differs is sent.
    let changed = resynchronized(&world, &mut web).await;
    assert!(changed.data_bytes < SIZES.iter().sum::<usize>() as u64 / 2, "{changed:?}");

    web.forget().await.unwrap();
    assert!(world.lock().vm.bitmaps().is_empty() && world.lock().replica.withdrawn);
    world.lock().replica.logs.clone()
}

async fn resynchronized(world: &World, web: &mut Relationship<World>) -> CycleReport {
    world.lock().vm.restart();
    write(world, 5);
    failed(web.cycle_now().await, FailureCode::ResyncRequired);
    assert!(matches!(web.row().phase, Phase::ResyncRequired { .. }));
    assert_eq!(web.due_in(), Some(Duration::ZERO));
    assert_eq!(world.lock().replica.digests_asked, 0);
    let reports = until_a_point(world, web).await;
    let report = reports.last().unwrap().clone();
    assert_eq!((report.purpose, report.point), (Purpose::Resync, Some(Consistency::Crash)));
    let blocks = SIZES.iter().map(|size| size.div_ceil(64 << 10) as u64).sum::<u64>();
    assert_eq!(world.lock().replica.digests_asked, blocks);
    assert_eq!(web.row().phase, Phase::Replicating);
    report
}

#[test]
fn whatever_happens_each_point_is_what_the_guest_was_at_its_moment() {
    for seed in [3, 77, 4711, 1 << 40] {
        alone(story(seed));
    }
}

#[test]
fn the_same_seed_makes_the_same_logs() {
    assert!(alone(story(9)) == alone(story(9)));
}

#[test]
fn a_kill_in_a_pass_goes_on_with_the_pass() {
    alone(async {
        let dir = tempfile::tempdir().unwrap();
        let catalog = dir.path().join("catalog.sqlite");
        let world = World::new(5, &SIZES);
        let web = Relationship::protect(&world.primary(&catalog), request()).await.unwrap();
        killed(&world, web).await;
        let mut web = world.reload(&catalog);
        let reports = until_a_point(&world, &mut web).await;
        assert_eq!(reports.len(), 1, "the first disk is not read a second time");
        assert_eq!(reports[0].purpose, Purpose::Initial);
        assert_eq!(web.row().shipped.acked.number, LogNumber(2));
    });
}

#[test]
fn orders_change_the_row() {
    alone(async {
        let dir = tempfile::tempdir().unwrap();
        let catalog = dir.path().join("catalog.sqlite");
        let world = World::new(6, &SIZES);
        let mut web = protected(&world, &catalog).await;

        web.pause().await.unwrap();
        assert_eq!(web.due_in(), None);
        assert!(world.reload(&catalog).row().paused);
        assert!(world.lock().replica.reported.last().unwrap().paused);
        assert_eq!(web.sync().await.unwrap_err().code, FailureCode::Stopped);

        // A resynchronization that is asked for resumes, too.
        web.resync().await.unwrap();
        assert!(matches!(world.reload(&catalog).row().phase, Phase::ResyncRequired { .. }));
        assert_eq!(web.due_in(), Some(Duration::ZERO));
        world.lock().vm.restless = Some("the agent sleeps".into());
        web.sync().await.unwrap();
        assert_eq!(web.row().phase, Phase::Replicating);

        // A guest that cannot be brought to rest makes a crash-consistent point, with the reason.
        write(&world, 10);
        let report = web.cycle_now().await.unwrap();
        check(&world, &report);
        assert_eq!(report.point, Some(Consistency::Crash));
        assert_eq!(report.note.as_deref(), Some("the agent sleeps"));
    });
}

/// The next cycle, when it is due by itself.
async fn when_due(world: &World, web: &mut Relationship<World>) -> Result<CycleReport, Failure> {
    tokio::time::sleep(web.due_in().unwrap()).await;
    write(world, 5);
    web.cycle_now().await
}

#[test]
fn a_window_counts_what_is_done_and_missed_and_outlives_the_process() {
    alone(async {
        let dir = tempfile::tempdir().unwrap();
        let catalog = dir.path().join("catalog.sqlite");
        let world = World::new(7, &SIZES);
        let mut web = protected(&world, &catalog).await;
        let sum = |web: &Relationship<World>| {
            let sum = web.status().measured.sum;
            (sum.done, sum.missed, sum.failed)
        };
        assert_eq!((sum(&web), web.status().measured.sum.passes), ((0, 0, 0), 2));
        for _ in 0..3 {
            when_due(&world, &mut web).await.unwrap();
        }
        assert_eq!(sum(&web), (3, 0, 0));
        let measured = web.status().measured;
        assert!(measured.sum.log_bytes >= measured.sum.log_bytes_max && measured.sum.log_bytes_max > 0);

        // A failure, and the minute that it is waited out: two intervals.
        world.lock().replica.fault = Some(Fault::Break);
        failed(when_due(&world, &mut web).await, FailureCode::Link);
        assert_eq!((sum(&web), web.status().last_error.unwrap().at), ((3, 0, 1), world.now()));
        when_due(&world, &mut web).await.unwrap();
        assert_eq!(sum(&web), (4, 2, 1));
        let health = web.status().health;
        assert_eq!(health.health, Health::Warning);
        assert!(health.reason.starts_with("2 of the 6 cycles of the last"), "{}", health.reason);

        // The site stops in the middle of a cycle and is away for an hour: no error, and nothing missed.
        let (hangs, stopper) = (world.lock().replica.hangs.clone(), web.stopper());
        world.lock().replica.fault = Some(Fault::Hang);
        let (outcome, ()) = tokio::join!(when_due(&world, &mut web), async {
            hangs.notified().await;
            stopper.stop_cycle();
        });
        failed(outcome, FailureCode::Stopped);
        assert_eq!((sum(&web), &web.row().error, web.row().failures), ((4, 2, 1), &None, 0));
        drop(web);
        tokio::time::sleep(Duration::from_secs(3600)).await;
        let mut web = world.reload(&catalog);
        assert_eq!(web.due_in(), Some(Duration::ZERO), "it goes on by itself");
        when_due(&world, &mut web).await.unwrap();
        assert_eq!((sum(&web), web.status().measured.since), ((5, 2, 1), measured.since));

        // Nor is a pause held against anybody.
        web.pause().await.unwrap();
        tokio::time::sleep(Duration::from_secs(600)).await;
        web.resume().await.unwrap();
        when_due(&world, &mut web).await.unwrap();
        assert_eq!(sum(&web), (6, 2, 1));
        web.reset_measurements().await.unwrap();
        let fresh = world.reload(&catalog).status();
        assert_eq!((fresh.measured.sum.done, fresh.last_error), (0, None));
        assert!(fresh.measured.since > measured.since);
    });
}
