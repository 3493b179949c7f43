//! What a compare does to a replica: the points of before stay until it is complete; and a replica that begins with
//! images that were brought.

mod common;

use std::path::{Path, PathBuf};
use std::time::Duration;

use common::bench::bench;
use common::*;
use model::{Head, LogClass, LogNumber, Phase, Purpose, ResyncReason};
use replica::{Offer, Seed, Step};

#[test]
fn until_a_compare_is_complete_no_point_goes_however_long_it_waits() {
    let mut bench = bench(2);
    for _ in 0..6 {
        bench.cycle();
    }
    bench.site.settle(VM);
    let before = bench.site.store.points(VM).unwrap();
    let phase = Phase::ResyncRequired { why: ResyncReason::Requested };
    bench.site.store.report(PEER, VM, phase, None, false).unwrap();
    for class in [None, Some(LogClass::Partial), Some(LogClass::Partial)] {
        // A night between the steps of the pass.
        bench.clock.pass(Duration::from_secs(9 * 3600));
        if let Some(class) = class {
            bench.primary.write("vda", 0..9 * UNIT, |at| at as u8);
            bench.primary.ship(&bench.site, Purpose::Resync, class);
        }
        assert_eq!(bench.site.settle(VM), [], "nothing is dropped, applied or merged");
        bench.reopen();
        assert_eq!(bench.site.store.points(VM).unwrap(), before);
    }
    let oldest = before[0].number;
    bench.site.store.failover_begin(VM, oldest).unwrap();
    let view = bench.site.store.failover_view(VM).unwrap();
    for size in view.disks() {
        let mut bytes = vec![0; usize::try_from(size.size_bytes).unwrap()];
        view.read_at(&size.name, 0, &mut bytes).unwrap();
        assert!(bytes == bench.primary.truth[&oldest][size.name.as_str()], "it is still that point");
    }
    drop(view);
    bench.site.store.failover_cancel(VM).unwrap();

    bench.primary.ship(&bench.site, Purpose::Resync, POINT);
    bench.site.settle(VM);
    let after = bench.site.store.points(VM).unwrap();
    assert!(after.len() > 1 && after.len() < before.len(), "now they go by the rules: {after:?}");
    bench.site.check_points(&bench.primary);
}

struct World {
    dir: tempfile::TempDir,
    clock: TestClock,
    site: Site,
    primary: Primary,
    chance: Chance,
}

const SIZES: [(&str, u64); 2] = [("vda", 300 * 1024), ("vdb", 70 * 1024)];

impl World {
    fn new() -> Self {
        let (dir, clock) = (tempfile::tempdir().unwrap(), TestClock::new());
        let site = Site::open(dir.path(), &clock);
        let (mut primary, mut chance) = (Primary::new(VM, &SIZES), Chance(5));
        (0..20).for_each(|_| primary.write_some(&mut chance, 100));
        Self { dir, clock, site, primary, chance }
    }

    fn reopen(&mut self) {
        let other = tempfile::tempdir().unwrap();
        // The old store is gone before the new one opens: its place is taken by another, empty one.
        self.site = Site::open(other.path(), &self.clock);
        self.site = Site::open(self.dir.path(), &self.clock);
    }

    /// Images of the primary's disks as they are now; the replica's site is never told what has changed since.
    fn images(&mut self) -> Vec<Seed> {
        self.primary.dirty.clear();
        let image = |(name, bytes): (&String, &Vec<u8>)| {
            let path = self.dir.path().join(format!("{name}.image"));
            std::fs::write(&path, bytes).unwrap();
            Seed { disk: disk(name), path, format: "raw".into() }
        };
        self.primary.disks.iter().map(image).collect()
    }

    fn offer(&self) -> Offer {
        self.primary.offer()
    }

    /// The replica has begun with the images: what differs makes it the primary.
    fn complete(&mut self) {
        let standing = self.site.store.offer(PEER, self.offer()).unwrap();
        assert_eq!(standing.head, Head::EMPTY);
        assert_eq!(standing.phase, Phase::ResyncRequired { why: ResyncReason::Seeded });
        let image = &self.primary.disks["vdb"];
        let digest = self.site.store.digests(PEER, VM, &disk("vdb"), 0, 65536, 65536).unwrap();
        assert_eq!(digest[0][..], blake3::hash(&image[..65536]).as_bytes()[..16], "it has the image's bytes");
        self.primary.write("vda", 7 * UNIT..9 * UNIT, |at| at as u8 | 1);
        self.primary.ship(&self.site, Purpose::Resync, LogClass::Partial);
        self.primary.ship(&self.site, Purpose::Resync, POINT);
        assert!(self.left().is_empty());
        for _ in 0..3 {
            self.primary.write_some(&mut self.chance, 40);
            self.primary.ship(&self.site, Purpose::Changes, POINT);
            self.site.check_points(&self.primary);
            let steps = self.site.settle(VM);
            assert!(matches!(steps[..], [Step::Applied { .. }]), "{steps:?}");
            self.reopen();
        }
        self.site.check_points(&self.primary);
        let folder = self.site.store.status(VM).unwrap().folder;
        let base = std::fs::read(folder.join("disks/vda.raw")).unwrap();
        assert!(base == self.primary.disks["vda"], "the images are the base now");
    }

    /// What lies about of images.
    fn left(&self) -> Vec<PathBuf> {
        let seeds = self.dir.path().join("seeds");
        let list = |path: &Path| std::fs::read_dir(path).into_iter().flatten().flatten().collect::<Vec<_>>();
        list(&seeds).iter().flat_map(|kind| list(&kind.path())).map(|entry| entry.path()).collect()
    }
}

#[test]
fn a_vm_that_is_offered_begins_with_the_images_that_were_brought_before() {
    let mut world = World::new();
    let images = world.images();
    let name = world.offer().name;
    let disks = world.site.store.stage_seed(&name, &images).unwrap();
    assert_eq!(disks.iter().map(|disk| disk.size_bytes).sum::<u64>(), 370 * 1024);
    images.iter().for_each(|image| std::fs::remove_file(&image.path).unwrap());
    world.reopen();
    world.complete();
}

#[test]
fn an_empty_replica_begins_with_the_images_that_are_brought_later() {
    let mut world = World::new();
    world.site.store.offer(PEER, world.offer()).unwrap();
    // A log that is just arriving is none of a compare.
    let (header, bytes) = world.primary.make_log(Purpose::Initial, POINT, world.clock.now());
    let (name, images) = (world.offer().name, world.images());
    world.site.store.append(PEER, VM, header.number, header.id, 0, &bytes[..200], false).unwrap();
    world.site.store.stage_seed(&name, &images).unwrap();
    // Brought again, they take the place of the ones before.
    (0..5).for_each(|_| world.primary.write_some(&mut world.chance, 30));
    let images = world.images();
    world.site.store.stage_seed(&name, &images).unwrap();
    world.site.store.offer(PEER, world.offer()).unwrap();
    let rest = world.site.store.append(PEER, VM, header.number, header.id, 200, &bytes[200..], true);
    assert_eq!(rest.unwrap_err().code(), "wrong-phase");
    world.complete();
}

#[test]
fn a_replica_that_has_begun_takes_no_images() {
    let mut world = World::new();
    let (name, images) = (world.offer().name, world.images());
    assert_eq!(world.site.store.stage_seed(&name, &[]).unwrap_err().code(), "seed");
    let twice = [images[0].clone(), images[0].clone()];
    assert_eq!(world.site.store.stage_seed(&name, &twice).unwrap_err().code(), "seed");
    let nothing = Seed { path: "/nowhere".into(), ..images[0].clone() };
    assert!(world.site.store.stage_seed(&name, &[nothing]).is_err());
    world.site.store.offer(PEER, world.offer()).unwrap();
    world.primary.ship(&world.site, Purpose::Initial, LogClass::Partial);
    let refused = world.site.store.stage_seed(&name, &images).unwrap_err();
    assert_eq!(refused.code(), "not-empty");
    assert!(refused.to_string().contains("has begun already"), "{refused}");
    world.reopen();
    assert_eq!(world.left(), Vec::<PathBuf>::new(), "what could not be copied is gone with the next start");
    assert_eq!(world.site.store.head(VM).unwrap().number, LogNumber(1));
}
