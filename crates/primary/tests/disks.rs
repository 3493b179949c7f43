//! Disks that grow, come and go while cycles run: over ports in memory, with a guest that goes on writing.

mod world;

use model::{Phase, Purpose};
use primary::{CycleReport, FailureCode, Relationship};
use world::guest::SimDisk;
use world::{BLOCK, Fault, World, alone, request};

const MIB: usize = 1 << 20;

fn write(world: &World, times: usize) {
    (0..times).for_each(|_| world.lock().guest_writes());
}

/// What the newest point has is what the guest had at its moment. Gives the point's disks.
#[track_caller]
fn check(world: &World, report: &CycleReport) -> Vec<String> {
    let state = world.lock();
    assert_eq!(state.vm.captures, 0, "no moment stays fixed");
    assert!(report.point.is_some(), "{report:?}");
    let moment = &state.vm.moments[&report.moment];
    for name in &state.replica.of_point {
        let place = state.vm.disks.iter().position(|disk| disk.known.name == *name).unwrap();
        let (_, replica) = state.replica.disks.iter().find(|(known, _)| known == name).unwrap();
        assert!(*replica == moment[place], "{name} differs from what it was at {:?}", report.moment);
    }
    state.replica.of_point.iter().map(ToString::to_string).collect()
}

async fn cycle(world: &World, web: &mut Relationship<World>) -> Vec<String> {
    write(world, 20);
    let report = web.cycle_now().await.unwrap();
    assert_eq!(report.purpose, Purpose::Changes, "nothing is compared, and nothing begins anew");
    check(world, &report)
}

/// Two disks, replicated.
async fn protected(world: &World, catalog: &std::path::Path) -> Relationship<World> {
    let mut web = Relationship::protect(&world.primary(catalog), request()).await.unwrap();
    web.sync().await.unwrap();
    assert_eq!(web.row().phase, Phase::Replicating);
    web
}

fn add(world: &World, size: usize, written: bool) {
    let disks = &mut world.lock().vm.disks;
    let mut disk = SimDisk::new(disks.len(), size);
    if written {
        disk.write(0, (size / BLOCK) as u64, 7);
    }
    disks.push(disk);
}

#[test]
fn a_disk_that_grows_is_followed_at_once_and_nothing_begins_anew() {
    alone(async {
        let dir = tempfile::tempdir().unwrap();
        let world = World::new(3, &[3 * MIB, MIB]);
        let mut web = protected(&world, &dir.path().join("catalog.sqlite")).await;
        for (lost, size) in [(false, 2 * MIB), (true, 3 * MIB + 5 * BLOCK)] {
            {
                let disk = &mut world.lock().vm.disks[1];
                let old = disk.data.len();
                disk.grow(size);
                // What is written before the next moment lies beyond what any bitmap knew the disk to be.
                disk.write((old / BLOCK) as u64, 3, 9);
            }
            if lost {
                // Its log arrives, and nobody hears of it: the new end is sent once more, with what was cleared since.
                world.lock().replica.fault = Some(Fault::LoseAnswer);
                assert_eq!(web.cycle_now().await.unwrap_err().code, FailureCode::Link);
                world.lock().vm.disks[1].write((2 * MIB / BLOCK) as u64, 2, 0);
            }
            assert_eq!(cycle(&world, &mut web).await, ["vd0", "vd1"]);
            assert_eq!(web.row().disks[1].size_bytes, size as u64);
            assert_eq!(cycle(&world, &mut web).await, ["vd0", "vd1"]);
        }
    });
}

#[test]
fn a_disk_that_joins_is_in_the_points_once_it_is_whole() {
    alone(async {
        let dir = tempfile::tempdir().unwrap();
        let catalog = dir.path().join("catalog.sqlite");
        let world = World::new(5, &[3 * MIB, MIB]);
        let mut web = protected(&world, &catalog).await;
        add(&world, 40 * MIB, true);
        assert_eq!(cycle(&world, &mut web).await, ["vd0", "vd1"], "it was not asked for");
        web.add_disks(&["node2".into()]).await.unwrap();
        let twice = web.add_disks(&["node2".into()]).await.unwrap_err();
        assert!(twice.message.contains("vd2 of web is replicated already"), "{twice}");

        let mut cycles = 0;
        let mut points = cycle(&world, &mut web).await;
        while points.len() == 2 {
            assert_eq!(web.due_in(), Some(std::time::Duration::ZERO), "a disk that joins goes on at once");
            cycles += 1;
            match cycles {
                1 => {
                    world.lock().replica.fault = Some(Fault::LoseAnswer);
                    assert_eq!(web.cycle_now().await.unwrap_err().code, FailureCode::Link);
                    world.lock().vm.disks[2].write(0, 3000, 0); // it was sent, and is no longer there
                }
                2 => {
                    world.lock().replica.fault = Some(Fault::Break);
                    assert_eq!(web.cycle_now().await.unwrap_err().code, FailureCode::Link);
                }
                3 => web = world.reload(&catalog),
                _ => {}
            }
            points = cycle(&world, &mut web).await;
        }
        assert!(cycles > 3, "it joined in {cycles} cycles");
        assert_eq!(points, ["vd0", "vd1", "vd2"]);
        assert!(!web.row().has_joining());
        assert_eq!(cycle(&world, &mut web).await, ["vd0", "vd1", "vd2"]);
    });
}

#[test]
fn a_disk_joins_a_pass_that_is_under_way_and_one_that_leaves_takes_its_part_with_it() {
    alone(async {
        let dir = tempfile::tempdir().unwrap();
        let world = World::new(7, &[3 * MIB, MIB]);
        let mut web = Relationship::protect(&world.primary(&dir.path().join("catalog.sqlite")), request())
            .await
            .unwrap();
        let report = web.cycle_now().await.unwrap();
        assert_eq!((report.purpose, report.point), (Purpose::Initial, None));
        add(&world, 2 * MIB, true);
        web.add_disks(&["node2".into()]).await.unwrap();
        write(&world, 20);
        web.remove_disks(&["vd0".parse().unwrap()]).await.unwrap();
        loop {
            write(&world, 20);
            let report = web.cycle_now().await.unwrap();
            assert_eq!(report.purpose, Purpose::Initial);
            if report.point.is_some() {
                assert_eq!(check(&world, &report), ["vd1", "vd2"]);
                break;
            }
        }
        assert_eq!(cycle(&world, &mut web).await, ["vd1", "vd2"]);
    });
}

#[test]
fn disks_leave_and_come_back() {
    alone(async {
        let dir = tempfile::tempdir().unwrap();
        let world = World::new(11, &[3 * MIB, MIB]);
        let mut web = protected(&world, &dir.path().join("catalog.sqlite")).await;
        let none = web.remove_disks(&["vdx".parse().unwrap()]).await.unwrap_err();
        assert!(none.message.contains("no disk of web is named vdx; it has vd0, vd1"), "{none}");
        web.remove_disks(&["vd0".parse().unwrap()]).await.unwrap();
        let last = web.remove_disks(&["vd1".parse().unwrap()]).await.unwrap_err();
        assert!(last.message.contains("at least one whole disk of web must stay"), "{last}");
        assert_eq!(cycle(&world, &mut web).await, ["vd1"]);
        assert!(world.lock().vm.disks[0].bitmaps.is_empty(), "nothing of ours stays on it");

        // It was taken out by hand, so that it does not come in by itself; another new one does.
        add(&world, MIB, true);
        world.lock().vm.disks[0].write(0, 100, 0);
        web.look().await;
        let mut points = cycle(&world, &mut web).await;
        assert_eq!(points, ["vd1", "vd2"]);
        web.add_disks(&["node0".into()]).await.unwrap();
        while points.len() < 3 {
            points = cycle(&world, &mut web).await;
        }
        assert_eq!(points, ["vd1", "vd2", "vd0"]);
    });
}

#[test]
fn a_bitmap_that_is_lost_while_a_disk_joins_has_everything_compared() {
    alone(async {
        let dir = tempfile::tempdir().unwrap();
        let world = World::new(13, &[3 * MIB, MIB]);
        let mut web = protected(&world, &dir.path().join("catalog.sqlite")).await;
        add(&world, 9 * MIB, true);
        web.add_disks(&["node2".into()]).await.unwrap();
        assert_eq!(cycle(&world, &mut web).await, ["vd0", "vd1"]);
        world.lock().vm.disks[2].write(0, 300, 0);
        world.lock().vm.restart();
        web.sync().await.unwrap();
        assert_eq!(web.row().phase, Phase::Replicating);
        assert_eq!(cycle(&world, &mut web).await, ["vd0", "vd1", "vd2"]);
    });
}
