//! What a person says of a pass, over ports in memory: policies and windows, pause, cancel, a time to begin, a seed.

mod world;

use std::time::Duration;

use model::{InitialStart, MayRun, Phase, Purpose, ResyncReason, ResyncWord};
use primary::ports::Ports;
use primary::{Changes, CycleReport, Error, Failure, FailureCode, Relationship};
use world::{BLOCK, Fault, World, alone, request};

const SIZES: [usize; 2] = [3 << 20, (1 << 20) + 3 * BLOCK];
const HOUR: Duration = Duration::from_secs(3600);

struct Story {
    world: World,
    web: Relationship<World>,
    dir: tempfile::TempDir,
}

impl Story {
    /// A VM that is replicated, under this policy. In the worlds of these tests it is 01:46:40 UTC at the beginning.
    async fn new(seed: u64, policy: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let world = World::new(seed, &SIZES);
        let mut wish = request();
        wish.settings.resync = policy.parse().unwrap();
        let shared = world.primary(&dir.path().join("catalog.sqlite"));
        let mut web = Relationship::protect(&shared, wish).await.unwrap();
        web.sync().await.unwrap();
        assert_eq!(world.now().0 / 60_000_000 % (24 * 60), 106);
        Self { world, web, dir }
    }

    /// QEMU is restarted, and so much changes that a compare takes more than one log.
    async fn loses_its_bitmaps(&mut self) {
        self.world.lock().vm.restart();
        self.write(400);
        let failure = self.web.cycle_now().await.unwrap_err();
        assert_eq!(failure.code, FailureCode::ResyncRequired);
    }

    /// The first log of the compare is there, and it is not the last.
    async fn half_way(&mut self) -> CycleReport {
        let report = self.web.cycle_now().await.unwrap();
        assert_eq!((report.purpose, report.point), (Purpose::Resync, None));
        assert!(matches!(self.web.row().phase, Phase::Resynchronizing { .. }));
        report
    }

    fn write(&self, times: usize) {
        (0..times).for_each(|_| self.world.lock().guest_writes());
    }

    /// The primary's site is started again.
    fn reload(&mut self) {
        self.web = self.world.reload(&self.dir.path().join("catalog.sqlite"));
    }

    async fn in_the_end_both_sides_are_the_same(&mut self) {
        self.write(10);
        self.web.sync().await.unwrap();
        same(&self.world, &self.web);
        assert_eq!(self.web.row().phase, Phase::Replicating);
        assert_eq!(self.web.row().passes, primary::Passes::default(), "nothing is left of what was said");
    }

    fn digests_asked(&self) -> u64 {
        self.world.lock().replica.digests_asked
    }
}

#[track_caller]
fn same(world: &World, web: &Relationship<World>) {
    let moment = web.status().last_cycle.unwrap().moment;
    let state = world.lock();
    assert!(state.replica.data() == state.vm.moments[&moment], "both sides are the same");
}

/// The blocks that a compare asks for once.
fn blocks() -> u64 {
    SIZES.iter().map(|size| size.div_ceil(64 << 10) as u64).sum()
}

fn code<T: std::fmt::Debug>(outcome: Result<T, Failure>) -> FailureCode {
    outcome.unwrap_err().code
}

#[test]
fn under_a_manual_policy_nothing_is_compared_before_it_is_asked_for() {
    alone(async {
        let mut story = Story::new(21, "manual").await;
        story.loses_its_bitmaps().await;
        for _ in 0..2 {
            assert_eq!(story.web.due_in(), None);
            assert_eq!(story.web.status().may_run, MayRun::WhenAsked);
            let refused = story.web.sync().await.unwrap_err();
            assert_eq!((refused.code, refused.transient), (FailureCode::Rests, false));
            assert!(refused.message.contains("'afterimage resync web'"), "{refused}");
            // A pause that ends is no wish to compare.
            story.web.pause().await.unwrap();
            story.web.resume().await.unwrap();
            story.reload();
        }
        assert_eq!(story.digests_asked(), 0);
        story.web.resync().await.unwrap();
        assert_eq!(story.web.due_in(), Some(Duration::ZERO));
        let Phase::ResyncRequired { why: ResyncReason::BitmapLost(_) } = &story.web.row().phase else {
            panic!("the reason is kept: {:?}", story.web.row().phase)
        };
        story.half_way().await;
        story.reload();
        assert_eq!(story.web.due_in(), Some(Duration::ZERO), "what was asked for goes on after a restart");
        story.in_the_end_both_sides_are_the_same().await;
        assert_eq!(story.digests_asked(), blocks());
    });
}

#[test]
fn outside_its_window_a_pass_rests_and_then_goes_on_where_it_was() {
    alone(async {
        let mut story = Story::new(22, "01:30-02:00").await;
        story.loses_its_bitmaps().await;
        assert_eq!(story.web.due_in(), Some(Duration::ZERO), "the window is open");
        story.half_way().await;
        tokio::time::sleep(HOUR / 3).await;
        story.write(40);
        let refused = story.web.sync().await.unwrap_err();
        assert_eq!((refused.code, refused.transient), (FailureCode::Rests, true));
        assert!(refused.message.contains("until 01:30 UTC"), "{refused}");
        story.reload();
        let due = story.web.due_in().unwrap();
        assert!(due > HOUR * 23 && due < HOUR * 24, "{due:?}");
        tokio::time::sleep(due - Duration::from_secs(1)).await;
        assert_eq!(story.web.due_in(), Some(Duration::from_secs(1)));
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(story.web.due_in(), Some(Duration::ZERO));
        story.in_the_end_both_sides_are_the_same().await;
        assert_eq!(story.digests_asked(), blocks(), "nothing was compared twice");
    });
}

#[test]
fn what_is_covered_is_not_read_again_after_a_pause() {
    alone(async {
        let mut story = Story::new(23, "auto").await;
        story.loses_its_bitmaps().await;
        story.half_way().await;
        let (covered, asked) = (story.web.row().phase.clone(), story.digests_asked());
        story.web.pause().await.unwrap();
        assert_eq!(story.web.due_in(), None);
        tokio::time::sleep(HOUR * 10).await;
        story.write(20);
        story.reload();
        assert_eq!((&story.web.row().phase, story.digests_asked()), (&covered, asked));
        story.web.resume().await.unwrap();
        assert_eq!(story.web.row().phase, covered);
        story.in_the_end_both_sides_are_the_same().await;
        assert_eq!(story.digests_asked(), blocks());

        // The same with `resync`, which asks for a compare, and not for another one.
        story.loses_its_bitmaps().await;
        story.half_way().await;
        story.web.resync().await.unwrap();
        story.in_the_end_both_sides_are_the_same().await;
        assert_eq!(story.digests_asked(), 2 * blocks());
    });
}

#[test]
fn a_pass_that_is_cancelled_waits_for_a_person_and_begins_anew() {
    alone(async {
        let mut story = Story::new(24, "auto").await;
        let refused = story.web.cancel_resync().await.unwrap_err();
        assert_eq!(refused.code, FailureCode::Unfit);
        assert!(refused.message.contains("phase replicating"), "{refused}");

        story.loses_its_bitmaps().await;
        story.half_way().await;
        let asked = story.digests_asked();
        story.web.cancel_resync().await.unwrap();
        story.web.cancel_resync().await.unwrap();
        let told = story.world.lock().replica.reported.last().unwrap().phase.clone();
        for phase in [&story.web.row().phase, &told] {
            assert!(matches!(phase, Phase::ResyncRequired { why: ResyncReason::BitmapLost(_) }), "{phase:?}");
        }
        for _ in 0..2 {
            assert_eq!(story.web.due_in(), None, "not at once, and not after a restart");
            assert_eq!(code(story.web.sync().await), FailureCode::Rests);
            story.web.resume().await.unwrap();
            story.reload();
        }
        assert_eq!(story.digests_asked(), asked);
        story.web.resync().await.unwrap();
        story.in_the_end_both_sides_are_the_same().await;
        assert_eq!(story.digests_asked(), asked + blocks(), "from the start");
    });
}

#[test]
fn a_pass_that_is_cancelled_comes_back_with_the_next_window() {
    alone(async {
        let mut story = Story::new(25, "01:30-02:00").await;
        story.loses_its_bitmaps().await;
        // In the middle of a log.
        story.world.lock().replica.fault = Some(Fault::Hang);
        let (hangs, stopper) = (story.world.lock().replica.hangs.clone(), story.web.stopper());
        let (stopped, ()) = tokio::join!(story.web.cycle_now(), async {
            hangs.notified().await;
            stopper.stop_cycle();
        });
        assert_eq!(code(stopped), FailureCode::Stopped);
        story.web.cancel_resync().await.unwrap();
        assert_eq!(story.world.lock().vm.captures, 0);
        let due = story.web.due_in().unwrap();
        assert!(due > HOUR * 23, "not in the window that it was cancelled in: {due:?}");
        tokio::time::sleep(due).await;
        story.in_the_end_both_sides_are_the_same().await;
    });
}

#[test]
fn a_policy_can_be_changed_and_counts_at_once() {
    alone(async {
        let mut story = Story::new(26, "auto").await;
        let set = |policy: &str| Changes { resync: Some(policy.parse().unwrap()), ..Changes::default() };
        story.web.configure(set("manual")).await.unwrap();
        story.reload();
        story.loses_its_bitmaps().await;
        assert_eq!(story.web.due_in(), None);
        story.web.configure(set("01:30-02:00")).await.unwrap();
        assert_eq!(story.web.due_in(), Some(Duration::ZERO));
        story.web.cancel_resync().await.unwrap();
        assert!(matches!(story.web.row().passes.word, ResyncWord::Cancelled { .. }));
        story.web.configure(set("auto")).await.unwrap();
        assert_eq!(story.web.due_in(), Some(Duration::ZERO));
        story.in_the_end_both_sides_are_the_same().await;
        let begun = Changes { initial: Some(InitialStart::Seed), ..Changes::default() };
        assert_eq!(code(story.web.configure(begun).await), FailureCode::Unfit);
    });
}

#[test]
fn an_initial_replication_begins_at_its_time_or_when_a_person_wants_it() {
    alone(async {
        for how in 0..3 {
            let dir = tempfile::tempdir().unwrap();
            let catalog = dir.path().join("catalog.sqlite");
            let world = World::new(27, &SIZES);
            let at = |hours| InitialStart::At { at: world.now().plus(HOUR * hours) };
            let late = primary::ProtectRequest { initial: at(7 * 24 + 1), ..request() };
            let refused = Relationship::protect(&world.primary(&catalog), late).await;
            assert!(matches!(refused, Err(Error::Setting(why)) if why.contains("7 days")));
            let wish = primary::ProtectRequest { initial: at(3), ..request() };
            Relationship::protect(&world.primary(&catalog), wish).await.unwrap();
            assert!(!world.lock().replica.disks.is_empty(), "the replica's site has been told");
            let mut web = world.reload(&catalog);
            let due = web.due_in().unwrap();
            assert!(due > HOUR * 3 - Duration::from_secs(1) && due <= HOUR * 3, "{due:?}");
            assert!(world.lock().vm.bitmaps().is_empty(), "until then nothing is done to the VM");
            match how {
                0 => tokio::time::sleep(due).await,
                1 => web.resume().await.unwrap(),
                _ => {}
            }
            assert_eq!(web.due_in() == Some(Duration::ZERO), how != 2);
            web.sync().await.unwrap();
            same(&world, &web);
        }
    });
}

#[test]
fn an_initial_replication_waits_for_its_seed_and_sends_only_what_differs() {
    alone(async {
        let dir = tempfile::tempdir().unwrap();
        let world = World::new(28, &SIZES);
        let shared = world.primary(&dir.path().join("catalog.sqlite"));
        let wish = primary::ProtectRequest { initial: InitialStart::Seed, ..request() };
        let mut web = Relationship::protect(&shared, wish).await.unwrap();
        let waits = web.cycle_now().await.unwrap_err();
        assert_eq!((waits.code, waits.transient), (FailureCode::SeedAwaited, true));
        assert!(waits.message.contains("'afterimage replica seed web --disk"), "{waits}");
        assert_eq!((web.due_in(), web.row().failures), (Some(Duration::from_secs(30)), 0));
        assert_eq!(web.status().measured.sum.failed, 0, "it is no failure");

        // The images arrive: what the disks were some writes ago. No policy holds their compare up.
        let manual = Changes { resync: Some("manual".parse().unwrap()), ..Changes::default() };
        web.configure(manual).await.unwrap();
        let images = world.lock().vm.data();
        (0..5).for_each(|_| world.lock().guest_writes());
        for ((_, disk), image) in world.lock().replica.disks.iter_mut().zip(images) {
            *disk = image;
        }
        world.lock().replica.phase = Phase::ResyncRequired { why: ResyncReason::Seeded };
        assert_eq!(code(web.cycle_now().await), FailureCode::ResyncRequired);
        assert_eq!(web.due_in(), Some(Duration::ZERO));
        let report = web.cycle_now().await.unwrap();
        assert_eq!(report.purpose, Purpose::Resync);
        assert!(report.data_bytes <= 10 * (64 << 10), "{report:?}");
        assert!(report.point.is_some());
        same(&world, &web);
    });
}
