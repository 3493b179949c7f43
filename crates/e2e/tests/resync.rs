//! Passes under control: what starts a resynchronization, when it may run, how it is paused and ended, what it leaves of
//! the points of before; and initial replications that begin later, or with images that are there.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use common::{DISKS, LONG, MIB, VM, World, in_qemu, path};
use rig::{Site, need, tool};
use serde_json::Value;

const QUICK: Duration = Duration::from_millis(2);

/// A window of a day that begins and ends so many hours from now.
fn window(from_h: i64, until_h: i64) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs() as i64;
    let time = |hours: i64| {
        let minutes = (now / 60 + hours * 60).rem_euclid(24 * 60);
        format!("{:02}:{:02}", minutes / 60, minutes % 60)
    };
    format!("{}-{}", time(from_h), time(until_h))
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// What the replica shows, by id.
fn ids(world: &World) -> Vec<String> {
    world.points().iter().map(|point| text(point, "id").to_owned()).collect()
}

/// QEMU is restarted, and this many MiB are written anew: the sides have to be compared.
fn lose_bitmaps(world: &mut World, mib: u64) {
    let from = world.quiet();
    world.daemon.restart().unwrap();
    world.burst(mib, from);
    world.write(from, QUICK);
    let required = |vm: &Value| vm["state"] == "resynchronization-required";
    world.branch.wait_vm(VM, "to have to be compared", LONG, required).unwrap();
}

/// A backup of the replica is a moment of the VM.
fn check(world: &World) {
    world.branch.ok(&["sync", VM]).unwrap();
    let backup = world.head.ok(&["backup", VM]).unwrap();
    world.state(&world.restore(text(&backup, "backup")));
}

#[test]
fn a_manual_resynchronization_is_begun_paused_and_cancelled_and_costs_no_point() {
    let mut world = World::new(51);
    world.branch.stop();
    world.branch.configure(&[("initial-log-mib = 1024", "initial-log-mib = 16")]).unwrap();
    world.branch.serve().unwrap();
    world.write(1, QUICK);
    world.protect("1s", &["--points", "4", "--resync", "manual", "--bandwidth", "40M"]);
    world.replicating();
    let nothing = world.branch.run(&["resync", VM, "--cancel"]).unwrap();
    assert_eq!((nothing.status, nothing.code()), (1, Some("unfit")), "{nothing:?}");
    for _ in 0..3 {
        world.branch.ok(&["sync", VM]).unwrap();
    }

    lose_bitmaps(&mut world, 256);
    let before = ids(&world);
    let waiting = world.branch.vm(VM).unwrap();
    assert_eq!(waiting["health"], "critical");
    let reason = text(&waiting, "health_reason");
    assert!(
        reason.contains("lost the dirty bitmap") && reason.contains("run 'afterimage resync web'"),
        "{reason}"
    );
    let refused = world.branch.run(&["sync", VM]).unwrap();
    assert_eq!((refused.status, refused.code()), (1, Some("rests")), "{refused:?}");

    world.branch.ok(&["resync", VM]).unwrap();
    let covered = |vm: &Value| vm["progress"]["covered_bytes"].as_u64().unwrap_or(0);
    let under_way = |vm: &Value| vm["state"] == "resynchronizing" && covered(vm) > 0;
    world.branch.wait_vm(VM, "to be under way", LONG, under_way).unwrap();
    let paused = world.branch.ok(&["pause", VM]).unwrap();
    assert!(paused["paused"] == true && under_way(&paused), "the progress is kept: {paused}");
    assert!(text(&paused, "resync_reason").contains("lost the dirty bitmap"), "{paused}");
    let resumed = world.branch.ok(&["resume", VM]).unwrap();
    assert!(covered(&resumed) >= covered(&paused), "{resumed}");
    points_stay_in_a_pass(&world, &before);

    let cancelled = world.branch.ok(&["resync", VM, "--cancel"]).unwrap();
    assert_eq!(cancelled["state"], "resynchronization-required");
    let reason = text(&cancelled, "health_reason");
    assert!(reason.contains("lost the dirty bitmap") && reason.contains("it was cancelled"), "{reason}");
    world.branch.stop();
    world.branch.serve().unwrap();
    let still = world.branch.vm(VM).unwrap();
    assert_eq!(still["state"], "resynchronization-required", "nor does a restart begin it: {still}");
    points_stay_in_a_pass(&world, &before);

    world.branch.ok(&["resync", VM]).unwrap();
    world.replicating();
    check(&world);
}

/// In the middle of a pass every point of before is there; no backup is taken, but the VM can be started from one.
fn points_stay_in_a_pass(world: &World, before: &[String]) {
    let now = ids(world);
    assert!(!before.is_empty() && before.iter().all(|id| now.contains(id)), "{before:?}, now {now:?}");
    let refused = world.head.run(&["backup", VM, "--no-retry"]).unwrap();
    assert_eq!((refused.status, text(&refused.json["error"], "condition")), (75, "resync"), "{refused:?}");
    let failover = world.head.ok(&["failover", "unplanned", VM, "--point", &before[0]]).unwrap();
    let flat: Vec<PathBuf> = DISKS
        .iter()
        .map(|(name, _)| {
            let disks = failover["disks"].as_array().unwrap();
            let layer = text(disks.iter().find(|disk| disk["name"] == *name).unwrap(), "path").to_owned();
            let raw = world.dir.path().join(format!("flat-{name}.raw"));
            tool(
                Command::new("qemu-img")
                    .args(["convert", "-U", "-f", "qcow2", "-O", "raw", &layer])
                    .arg(&raw),
            )
            .unwrap();
            raw
        })
        .collect();
    world.state(&flat);
    world.head.ok(&["failover", "cancel", VM]).unwrap();
}

#[test]
fn a_resynchronization_rests_outside_its_window() {
    let mut world = World::new(52);
    world.write(1, QUICK);
    let closed = window(2, 3);
    world.protect("1s", &["--resync", &closed]);
    world.replicating();
    lose_bitmaps(&mut world, 8);
    let rests = world.branch.vm(VM).unwrap();
    let opens = &closed[..5];
    assert!(text(&rests["rests"], "until").contains(&format!("T{opens}:00")), "{rests}");
    assert!(text(&rests, "health_reason").contains(&format!("it rests until {opens} UTC")), "{rests}");
    let refused = world.branch.run(&["sync", VM]).unwrap();
    assert_eq!((refused.status, refused.code()), (75, Some("rests")), "{refused:?}");
    let bad = world.branch.run(&["configure", VM, "--resync", "at night"]).unwrap();
    assert_eq!(bad.status, 64, "{bad:?}");

    // It opens.
    let set = world.branch.ok(&["configure", VM, "--resync", &window(-1, 1)]).unwrap();
    assert_eq!(set["rests"], Value::Null);
    world.replicating();
    assert_eq!(text(&world.branch.vm(VM).unwrap(), "resync"), window(-1, 1), "it stays set");
    check(&world);
}

/// Copies of the VM's disks as they are now, with nobody writing.
fn old_images(world: &World) -> Vec<(String, PathBuf)> {
    let copy = |name: &str| {
        let image = world.dir.path().join(format!("old-{name}.raw"));
        tool(Command::new("cp").args(["--sparse=always"]).arg(world.daemon.disk(name)).arg(&image)).unwrap();
        (name.to_owned(), image)
    };
    DISKS.iter().map(|(name, _)| copy(name)).collect()
}

fn seed(site: &Site, images: &[(String, PathBuf)], more: &[&str]) -> rig::Output {
    let disks: Vec<String> = images.iter().map(|(name, image)| format!("{name}={}", path(image))).collect();
    let disks = disks.iter().flat_map(|disk| ["--disk", disk]);
    let arguments: Vec<&str> =
        ["replica", "seed", VM].into_iter().chain(disks).chain(more.iter().copied()).collect();
    site.run(&arguments).unwrap()
}

#[test]
fn with_images_at_the_replicas_site_only_differences_travel() {
    need("qemu-img", "qemu-utils").unwrap();
    let mut world = World::new(53);
    world.burst(256, 1);
    let images = old_images(&world);
    world.write(1, QUICK);

    // The images come first, and the site is restarted in between.
    let seeded = seed(&world.head, &images, &[]);
    assert_eq!(seeded.status, 0, "{seeded:?}");
    assert_eq!(seeded.json["disks"][1]["size_bytes"], DISKS[1].1);
    images.iter().for_each(|(_, image)| std::fs::remove_file(image).unwrap());
    world.head.stop();
    world.head.serve().unwrap();
    let crossed = world.line.bytes();
    world.protect("1s", &["--initial", "seed"]);
    world.replicating();
    let crossed = world.line.bytes() - crossed;
    assert!(crossed < 32 * MIB, "{crossed} bytes crossed the line to compare 256 MiB that are equal");
    check(&world);
    let left = world.head.dir().join("seeds/ready").read_dir().unwrap().count();
    assert_eq!(left, 0, "the images are the replica's now");
    let next = world.daemon.disk(DISKS[0].0);
    let refused = seed(&world.head, &[(DISKS[0].0.into(), next)], &[]);
    assert_eq!((refused.status, refused.code()), (1, Some("replica")), "{refused:?}");
    assert!(text(&refused.json["error"], "message").contains("has begun already"), "{refused:?}");
}

#[test]
fn an_initial_replication_waits_for_the_images_that_it_is_to_begin_with() {
    need("qemu-img", "qemu-utils").unwrap();
    let mut world = World::new(54);
    world.burst(64, 1);
    let images: Vec<(String, PathBuf)> = old_images(&world)
        .into_iter()
        .map(|(name, raw)| {
            let qcow2 = raw.with_extension("qcow2");
            tool(Command::new("qemu-img").args(["convert", "-O", "qcow2"]).arg(&raw).arg(&qcow2)).unwrap();
            (name, qcow2)
        })
        .collect();
    world.write(1, QUICK);
    world.protect("1s", &["--initial", "seed"]);
    let waits =
        world.branch.wait_vm(VM, "to wait", LONG, |vm| vm["error"]["code"] == "seed-awaited").unwrap();
    let message = text(&waits["error"], "message");
    assert!(
        message.contains("'afterimage replica seed web --disk data=FILE --disk system=FILE'"),
        "{message}"
    );
    let here = seed(&world.branch, &images, &["--format", "qcow2"]);
    assert_eq!(here.code(), Some("no-such-vm"), "at the wrong site: {here:?}");
    let missing = [("system".to_owned(), PathBuf::from("/nowhere.raw"))];
    let missing = seed(&world.head, &missing, &[]);
    assert_eq!((missing.status, missing.code()), (1, Some("io")), "{missing:?}");

    let crossed = world.line.bytes();
    let seeded = seed(&world.head, &images, &["--format", "qcow2"]);
    assert_eq!(seeded.status, 0, "{seeded:?}");
    world.replicating();
    let crossed = world.line.bytes() - crossed;
    assert!(crossed < 32 * MIB, "{crossed} bytes crossed the line to compare 64 MiB that are equal");
    check(&world);
}

#[test]
fn an_initial_replication_begins_at_its_time_or_when_it_is_wanted() {
    let mut world = World::new(55);
    world.write(1, QUICK);
    let (qmp, nbd) = (world.daemon.qmp(), world.daemon.nbd());
    let week = ["--qmp", path(&qmp), "--nbd", path(&nbd), "--to", "head", "--initial", "at:+8d"];
    let refused = world.branch.run(&[&["protect", VM][..], &week].concat()).unwrap();
    assert_eq!((refused.status, refused.code()), (64, Some("usage")), "{refused:?}");

    let waits = world.protect("1s", &["--initial", "at:+3h"]);
    assert!(text(&waits["rests"], "message").starts_with("the initial replication begins at 2"), "{waits}");
    assert_eq!(world.head.vm(VM).unwrap()["state"], "initial-replication", "the other site knows of it");
    let left = in_qemu(&world.daemon.second_qmp(), &DISKS.map(|(name, _)| name));
    assert_eq!(left, Vec::<String>::new(), "until then nothing is done to the VM");
    let sooner = world.branch.ok(&["configure", VM, "--initial", "at:+2h"]).unwrap();
    assert!(text(&sooner["rests"], "until") < text(&waits["rests"], "until"), "{sooner}");
    world.branch.ok(&["resume", VM]).unwrap();
    world.replicating();
    check(&world);
}

/// A site's folder, put back as it was.
struct Copy {
    of: PathBuf,
    to: PathBuf,
}

impl Copy {
    fn take(site: &mut Site, dir: &Path) -> Self {
        site.stop();
        let copy = Self { of: site.dir().to_owned(), to: dir.join(format!("{}-before", site.name())) };
        tool(Command::new("cp").arg("-a").args([&copy.of, &copy.to])).unwrap();
        site.serve().unwrap();
        copy
    }

    fn put_back(self, site: &mut Site) {
        site.stop();
        std::fs::remove_dir_all(&self.of).unwrap();
        std::fs::rename(&self.to, &self.of).unwrap();
        site.serve().unwrap();
    }
}

#[test]
fn a_site_that_was_restored_from_an_older_copy_is_compared() {
    let mut world = World::new(56);
    world.write(1, QUICK);
    world.protect("1s", &[]);
    world.replicating();
    let dir = world.dir.path().to_owned();
    for of_replica in [true, false] {
        let copy = Copy::take(if of_replica { &mut world.head } else { &mut world.branch }, &dir);
        let at_copy = world.head.vm(VM).unwrap()["received"].as_u64();
        let later = |vm: &Value| vm["received"].as_u64() > at_copy.map(|received| received + 1);
        world.head.wait_vm(VM, "to have more logs", LONG, later).unwrap();
        world.burst(4, u64::from(of_replica));
        world.branch.ok(&["sync", VM]).unwrap();
        copy.put_back(if of_replica { &mut world.head } else { &mut world.branch });
        let broken = "does not continue ours";
        let log = |world: &World| world.branch.log().matches(broken).count();
        rig::wait_for("the chain to be found broken", LONG, || Ok((log(&world) > 0).then_some(())))
            .unwrap_or_else(|trouble| {
                panic!("{of_replica}: {trouble}: {}\n{}", world.branch.vm(VM).unwrap(), world.branch.log())
            });
        world.replicating();
        check(&world);
        // The log of the branch goes with its folder; that of the first time must not stand for the second.
        std::fs::write(world.branch.dir().join("serve.log"), "").unwrap();
    }
}
