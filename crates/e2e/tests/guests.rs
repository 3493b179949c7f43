//! Real guests: Debian's kernel, ext4 and XFS, SQLite and PostgreSQL. What is restored of their replica is a
//! moment that their disks were in: file systems clean once their journals are replayed, databases that open,
//! and of the numbers that they acknowledged a prefix, over both disks together.

mod common;
mod guest_world;

use std::collections::BTreeSet;
use std::time::Instant;

use common::{LONG, VM, path};
use guest::{Acked, DATA, Disk, SYSTEM};
use guest_world::{World, failover_disks, pauses};
use serde_json::Value;

/// Backs up and boots at so many moments, from pinned views and each third time from the flat files of a hold;
/// on demand with a mishap before each.
fn at_moments(seed: u64, count: usize, mishaps: bool) -> (World, Vec<Value>) {
    let mut world = World::new(|_| Vec::new());
    let started = Instant::now();
    let begun = world.guest.acked();
    let mut backups = Vec::new();
    for (number, pause) in (1..=count).zip(pauses(seed)) {
        std::thread::sleep(pause);
        if mishaps {
            world.suffer(number);
        }
        let view = if number % 3 == 0 { "hold" } else { "pinned" };
        println!("moment {number} of {count}, {view}:");
        let (backup, checked) = world.back_up_and_boot(&["--view", view]);
        assert!(checked.needs_recovery, "nobody brought this guest to rest: {backup}");
        backups.push(backup);
    }
    let committed = world.guest.acked().total() - begun.total();
    let seconds = started.elapsed().as_secs_f64();
    println!(
        "seed {seed}: {count} of {count} moments boot clean; {committed} numbers acknowledged meanwhile, in {seconds:.0} s"
    );
    let points: BTreeSet<_> = backups.iter().map(|backup| backup["number"].as_u64()).collect();
    assert!(points.len() > count / 2, "the moments were different ones: {points:?}");
    assert!(committed as usize > 10 * count, "the guest went on committing: {committed}");
    assert_eq!(world.guest.console().failure(), None);
    (world, backups)
}

#[test]
fn a_guest_boots_from_the_backup_of_its_replica() {
    at_moments(1, 3, false);
}

#[test]
#[ignore = "twenty boots: make soak"]
fn a_guest_boots_from_backups_of_twenty_moments() {
    let (world, backups) = at_moments(2, 20, false);
    // The check can fail: a disk of the first moment beside one of the last is no moment.
    let disks = [world.restore(&backups[0], SYSTEM), world.restore(&backups[19], DATA)];
    let wrong = world.check(&disks).judge(&Acked::default(), None).unwrap_err();
    println!("two disks of two moments: {wrong}");
    assert!(wrong.contains("different moments"), "{wrong}");
}

#[test]
#[ignore = "eight boots: make soak"]
fn a_guest_boots_from_backups_made_while_sites_are_killed_and_the_line_is_cut() {
    let (world, _) = at_moments(3, 8, true);
    let replicates = |vm: &Value| vm["state"] == "replicating" && vm["error"].is_null();
    world.branch.wait_vm(VM, "all to be well", LONG, replicates).unwrap();
}

#[test]
fn a_guest_that_is_killed_goes_on_from_its_replica() {
    let mut world = World::new(|guest| {
        let agent = guest.agent();
        ["--app-every", "2s", "--guest-agent", path(&agent)].map(str::to_owned).into()
    });
    println!("at rest, through the guest agent:");
    let application = |point: &Value| point["consistency"] == "application";
    let has_one = || {
        let points = world.head.ok(&["points", VM])?;
        Ok(points["points"].as_array().unwrap().iter().any(application).then_some(()))
    };
    rig::wait_for("an application-consistent point", LONG, has_one).unwrap();
    let (backup, checked) = world.back_up_and_boot(&["--consistency", "application"]);
    assert!(application(&backup), "{backup}");
    assert!(!checked.needs_recovery, "a file system at rest has nothing to replay: {backup}");

    println!("booted by its replica's site, while it is replicated:");
    world.machine_file();
    for sign in ["console:ack relay-sqlite", "agent"] {
        let report = world.head.ok(&["check", VM, "--sign-of-life", sign]).unwrap();
        assert_eq!(report["alive"], true, "{report}");
        println!("  {sign} after {} s", report["boot_s"]);
    }

    println!("killed, and read over NBD:");
    world.guest.kill();
    let points = world.points();
    let newest = points.iter().max_by_key(|point| point["number"].as_u64()).unwrap();
    let id = newest["id"].as_str().unwrap();
    let export = world.head.ok(&["export", VM, "--point", id, "--writable"]).unwrap();
    let shown = export["disks"].as_array().unwrap();
    let disk = |name: &str| {
        let uri = shown.iter().find(|disk| disk["name"] == name).unwrap()["uri"].as_str().unwrap();
        Disk::nbd(name, uri).unwrap()
    };
    world.boot(&[disk(SYSTEM), disk(DATA)], newest, None);
    world.head.ok(&["unexport", export["export"].as_str().unwrap()]).unwrap();

    println!("failed over:");
    let failover = world.head.ok(&["failover", "unplanned", VM]).unwrap();
    world.boot(&failover_disks(&failover), &failover, None);
}
