//! Initial replications by media, over ports in memory and a real folder: cut off anywhere, with a line that is down, a VM
//! that forgets what has changed; carried, imported bit by bit, and gone on with.

mod world;

use std::future::{Future, poll_fn};
use std::path::PathBuf;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use model::{InitialStart, Phase, ResyncReason};
use primary::{Changes, Failure, FailureCode, ProtectRequest, Relationship};
use world::{BLOCK, World, alone, request};

const SIZES: [usize; 2] = [3 << 20, (1 << 20) + 3 * BLOCK];

struct Story {
    world: World,
    web: Relationship<World>,
    dir: tempfile::TempDir,
}

impl Story {
    async fn new(seed: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("media")).unwrap();
        let world = World::new(seed, &SIZES);
        let initial = InitialStart::Media { dir: dir.path().join("media") };
        let shared = world.primary(&dir.path().join("catalog.sqlite"));
        let web = Relationship::protect(&shared, ProtectRequest { initial, ..request() }).await.unwrap();
        Self { world, web, dir }
    }

    fn media(&self) -> PathBuf {
        self.dir.path().join("media")
    }

    /// The primary's site is started again.
    fn reload(&mut self) {
        self.web = self.world.reload(&self.dir.path().join("catalog.sqlite"));
    }

    fn write(&self, times: u64) {
        (0..times).for_each(|_| self.world.lock().guest_writes());
    }

    fn below(&self, bound: u64) -> u64 {
        self.world.lock().below(bound)
    }

    /// Cycles until the set is whole, and says how many of its logs are said to be in.
    async fn written(&mut self) -> Failure {
        loop {
            match self.web.cycle_now().await {
                Ok(_) => self.write(3),
                Err(failure) if failure.code == FailureCode::MediaAwaited => return failure,
                Err(failure) => assert_eq!(failure.code, FailureCode::ResyncRequired, "{failure}"),
            }
        }
    }

    fn import_all(&self) {
        let logs = self.web.row().shipped.acked.number;
        while self.world.lock().replica.durable.number < logs {
            self.world.lock().replica.import(&self.media(), self.web.row().vm);
        }
    }

    async fn in_the_end_both_sides_are_the_same(&mut self) {
        self.write(10);
        self.web.sync().await.unwrap();
        let moment = self.web.status().last_cycle.unwrap().moment;
        let state = self.world.lock();
        assert!(state.replica.data() == state.vm.moments[&moment], "both sides are the same");
        assert_eq!(self.web.row().passes, primary::Passes::default(), "nothing is left of the media");
        assert_eq!(state.replica.media, None, "nor of their key at the replica's site");
    }
}

/// Runs a future for so many steps, and drops it if it is not at its end by then.
async fn cut_off<F: Future>(steps: u64, future: F) -> Option<F::Output> {
    let (mut future, mut left) = (pin!(future), steps);
    poll_fn(|context| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        future.as_mut().poll(context).map(Some)
    })
    .await
}

#[test]
fn cut_off_anywhere_it_goes_on_and_only_changes_go_over_the_line() {
    let (mut begun_anew, mut compared) = (0, 0);
    for seed in 1..40 {
        alone(async {
            let mut story = Story::new(seed).await;
            let set = story.web.row().passes.media.as_ref().unwrap().set;
            loop {
                story.write(4);
                story.world.lock().replica.unreachable = story.below(3) == 0;
                if story.below(25) == 0 {
                    story.world.lock().vm.restart();
                }
                let steps = story.below(120);
                match cut_off(steps, story.web.cycle_now()).await {
                    None => story.reload(),
                    Some(Err(failure)) if failure.code == FailureCode::MediaAwaited => break,
                    Some(Err(failure)) => assert!(failure.transient, "{failure}"),
                    Some(Ok(report)) => assert_eq!(report.point, None, "there is no point before the import"),
                }
            }
            assert_eq!(story.world.lock().replica.logs.len(), 0, "nothing went over the line");
            begun_anew += u64::from(story.web.row().passes.media.as_ref().unwrap().set != set);

            story.world.lock().replica.unreachable = false;
            let failure = story.web.cycle_now().await.unwrap_err();
            assert!(failure.message.contains("(0 of "), "{failure}");
            let logs = story.web.row().shipped.acked.number;
            assert_eq!(story.world.lock().replica.media.as_ref().unwrap().logs, Some(logs));
            story.world.lock().replica.import(&story.media(), story.web.row().vm);
            if logs.0 > 1 {
                let failure = story.web.cycle_now().await.unwrap_err();
                assert!(failure.message.contains(&format!("(1 of {logs} logs")), "{failure}");
                assert_eq!(story.web.due_in(), Some(Duration::from_secs(30)));
            }
            let forgets = story.below(3) == 0;
            if forgets {
                story.world.lock().vm.restart();
            }
            story.write(5);
            story.import_all();
            story.reload();
            story.in_the_end_both_sides_are_the_same().await;
            let digests = story.world.lock().replica.digests_asked;
            assert_eq!(digests > 0, forgets, "a compare only where what has changed is not known");
            compared += u64::from(forgets);
        });
    }
    assert!(begun_anew > 3 && compared > 3, "{begun_anew} begun anew, {compared} compared");
}

#[test]
fn what_needs_the_replica_is_refused_until_the_import_and_giving_up_pauses() {
    alone(async {
        let mut story = Story::new(77).await;
        let unfit = |outcome: Result<(), Failure>| {
            let failure = outcome.unwrap_err();
            assert_eq!((failure.code, failure.transient), (FailureCode::Unfit, false), "{failure}");
            assert!(failure.message.contains("'afterimage resync web --cancel' gives them up"), "{failure}");
        };
        for _ in 0..2 {
            unfit(story.web.resync().await);
            unfit(story.web.add_disks(&["vdz".into()]).await);
            unfit(story.web.remove_disks(&["vda".parse().unwrap()]).await);
            unfit(story.web.hand_over(None).await.map(drop));
            story.written().await;
        }
        assert_eq!(story.web.status().last_point_at, None, "there is no point before the import");
        story.web.cancel_resync().await.unwrap();
        assert_eq!(story.web.due_in(), None, "it is paused");
        assert_eq!(std::fs::read_dir(story.media()).unwrap().count(), 0);
        assert_eq!(story.world.lock().replica.media, None);
        story.reload();
        story.web.resume().await.unwrap();
        story.in_the_end_both_sides_are_the_same().await;
        assert!(!story.world.lock().replica.logs.is_empty(), "it went over the line");
        let begun =
            Changes { initial: Some(InitialStart::Media { dir: story.media() }), ..Changes::default() };
        unfit_now(story.web.configure(begun).await);
    });
}

fn unfit_now(outcome: Result<(), Failure>) {
    assert_eq!(outcome.unwrap_err().code, FailureCode::Unfit, "it has begun already, in another way");
}

#[test]
fn media_do_not_begin_where_images_were_brought() {
    alone(async {
        let mut story = Story::new(79).await;
        story.world.lock().replica.phase = Phase::ResyncRequired { why: ResyncReason::Seeded };
        let refused = story.web.cycle_now().await.unwrap_err();
        assert_eq!((refused.code, refused.transient), (FailureCode::Media, false), "{refused}");
        assert!(refused.message.contains("(images of it)"), "{refused}");
        let over_the_line = Changes { initial: Some(InitialStart::Now), ..Changes::default() };
        story.web.configure(over_the_line).await.unwrap();
        let failure = story.web.cycle_now().await.unwrap_err();
        assert_eq!(failure.code, FailureCode::ResyncRequired);
        story.in_the_end_both_sides_are_the_same().await;
    });
}

#[test]
fn given_up_half_imported_the_two_sides_are_compared() {
    alone(async {
        let mut story = Story::new(78).await;
        story.written().await;
        story.world.lock().replica.import(&story.media(), story.web.row().vm);
        let again =
            Changes { initial: Some(InitialStart::Media { dir: story.media() }), ..Changes::default() };
        let refused = story.web.configure(again).await.unwrap_err();
        assert!(refused.message.contains("holds a set of media already"), "{refused}");
        let over_the_line = Changes { initial: Some(InitialStart::Now), ..Changes::default() };
        story.web.configure(over_the_line).await.unwrap();
        let failure = story.web.cycle_now().await.unwrap_err();
        assert_eq!(failure.code, FailureCode::ResyncRequired);
        assert!(matches!(story.web.row().phase, Phase::ResyncRequired { why: ResyncReason::ChainBroken(_) }));
        story.in_the_end_both_sides_are_the_same().await;
    });
}
