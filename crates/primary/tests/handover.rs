//! A planned failover over ports in memory: nothing is handed over that is not off, and nothing before all of it is there.

mod world;

use std::time::Duration;

use model::{Phase, ResyncReason};
use primary::{Failure, FailureCode, Relationship};
use world::{BLOCK, Fault, World, alone, request};

const SIZES: [usize; 2] = [1 << 20, 4 * BLOCK];

async fn replicated(world: &World, catalog: &std::path::Path) -> Relationship<World> {
    let mut web = Relationship::protect(&world.primary(catalog), request()).await.unwrap();
    web.sync().await.unwrap();
    (0..20).for_each(|_| world.lock().guest_writes());
    web
}

fn code<T: std::fmt::Debug>(outcome: Result<T, Failure>) -> FailureCode {
    outcome.unwrap_err().code
}

#[test]
fn a_guest_that_runs_is_not_handed_over_unless_it_shuts_down() {
    alone(async {
        let dir = tempfile::tempdir().unwrap();
        let catalog = dir.path().join("catalog.sqlite");
        let world = World::new(11, &SIZES);
        let mut web = replicated(&world, &catalog).await;
        assert_eq!(code(web.hand_over(None).await), FailureCode::Qemu);
        world.lock().vm.obeys = false;
        assert_eq!(code(web.hand_over(Some(Duration::from_secs(30))).await), FailureCode::Qemu);
        assert!(!world.lock().replica.handed_over && web.row().phase == Phase::Replicating);

        world.lock().vm.obeys = true;
        web.hand_over(Some(Duration::from_secs(30))).await.unwrap();
        let last = world.lock().vm.data();
        assert!(world.lock().replica.handed_over);
        assert!(world.lock().replica.data() == last, "the last changes are there");
        assert_eq!((&web.row().phase, web.due_in()), (&Phase::FailedOver, None));
        for refused in [web.sync().await, web.resync().await] {
            assert_eq!(code(refused), FailureCode::Stopped);
        }
        let mut web = world.reload(&catalog);
        assert_eq!((&web.row().phase, web.due_in()), (&Phase::FailedOver, None));
        web.hand_over(None).await.unwrap();
    });
}

#[test]
fn what_cannot_be_sent_is_not_handed_over() {
    alone(async {
        let dir = tempfile::tempdir().unwrap();
        let catalog = dir.path().join("catalog.sqlite");
        let world = World::new(12, &SIZES);
        let mut web = replicated(&world, &catalog).await;
        world.lock().vm.quiet = true;
        world.lock().replica.fault = Some(Fault::Break);
        assert_eq!(code(web.hand_over(None).await), FailureCode::Link);
        assert!(!world.lock().replica.handed_over && web.row().phase == Phase::Replicating);
        web.hand_over(None).await.unwrap();
        assert!(world.lock().replica.handed_over);
    });
}

#[test]
fn a_vm_that_is_taken_over_keeps_its_id_and_is_compared() {
    alone(async {
        let dir = tempfile::tempdir().unwrap();
        let world = World::new(13, &SIZES);
        let shared = world.primary(&dir.path().join("catalog.sqlite"));
        let vm = model::VmId::from_bytes([7; 16]);
        let mut web =
            Relationship::take_over(&shared, request(), vm, 4, ResyncReason::Reversed).await.unwrap();
        assert_eq!((web.row().vm, web.row().generation), (vm, 4));
        assert_eq!(web.row().phase, Phase::ResyncRequired { why: ResyncReason::Reversed });
        assert!(!web.is_off().await);
        web.sync().await.unwrap();
        assert_eq!(web.row().phase, Phase::Replicating);
        assert!(world.lock().replica.digests_asked > 0, "what is there already is not sent");
        assert!(
            Relationship::take_over(&shared, request(), vm, 5, ResyncReason::Reversed).await.is_err(),
            "the name is taken"
        );
    });
}
