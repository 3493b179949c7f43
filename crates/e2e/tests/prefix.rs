//! The prefix property: every recovery point and every backup, over all disks together, equals the state
//! after some prefix of the writer's writes; through kills of both sites, link cuts and applies.

mod common;

use std::time::{Duration, Instant};

use common::{LONG, VM, World};
use rig::state_of_exports;

/// What happens to the sites while points are made.
#[derive(Debug, Clone, Copy)]
enum Mishap {
    KillBranch,
    KillHead,
    KillBoth,
    CutLine,
    Backup,
    Nothing,
}

impl World {
    fn suffer(&mut self, mishap: Mishap) {
        match mishap {
            Mishap::KillBranch => {
                self.branch.kill();
                self.branch.serve().unwrap();
            }
            Mishap::KillHead => {
                self.head.kill();
                self.head.serve().unwrap();
            }
            Mishap::KillBoth => {
                self.head.kill();
                self.branch.kill();
                self.branch.serve().unwrap();
                self.head.serve().unwrap();
            }
            Mishap::CutLine => {
                self.line.cut();
                std::thread::sleep(Duration::from_millis(700));
                self.line.mend();
            }
            Mishap::Backup => {
                self.head.ok(&["backup", VM]).unwrap();
            }
            Mishap::Nothing => std::thread::sleep(Duration::from_millis(500)),
        }
    }

    /// Reads every point that is there, and panics if one is no moment of the VM. How many they were.
    fn check_points(&self, after: u64) -> (usize, u64) {
        let mut checked = 0;
        let mut newest = after;
        for point in self.points().iter().filter(|point| point["number"].as_u64().unwrap() > after) {
            // Its hour may be over: then it was dropped since it was listed.
            let Some(shown) = self.export_point(point, &[]) else { continue };
            let uris = shown.uris.each_ref().map(String::as_str);
            if let Err(violation) = state_of_exports(&self.script, self.begun(), &uris) {
                panic!("point {point}: {violation}");
            }
            self.unexport(&shown);
            checked += 1;
            newest = newest.max(point["number"].as_u64().unwrap());
        }
        (checked, newest)
    }
}

fn run(seed: u64, points: &str, for_seconds: u64) -> usize {
    use Mishap::{Backup, CutLine, KillBoth, KillBranch, KillHead, Nothing};
    let mut world = World::new(seed);
    world.write(1, Duration::from_micros(500));
    world.protect("1s", &["--points", points]);
    world.replicating();
    let mut mishaps =
        [Nothing, KillBranch, Nothing, Backup, CutLine, Nothing, KillHead, Backup, Nothing, KillBoth]
            .iter()
            .cycle();
    let started = Instant::now();
    let (mut checked, mut newest) = (0, 0);
    while started.elapsed() < Duration::from_secs(for_seconds) {
        world.suffer(*mishaps.next().unwrap());
        // A cycle now, beside those that come by themselves: more points, at worse times.
        let _ = world.branch.run(&["sync", VM]).unwrap();
        let (more, to) = world.check_points(newest);
        (checked, newest) = (checked + more, to);
    }
    world.branch.ok(&["resume", VM]).unwrap();
    world.branch.ok(&["sync", VM]).unwrap();
    checked += world.check_points(newest).0;
    for backup in world.head.ok(&["backups", VM]).unwrap()["backups"].as_array().unwrap() {
        world.state(&world.restore(backup["id"].as_str().unwrap()));
        checked += 1;
    }
    let status = world.branch.wait_vm(VM, "all to be well", LONG, |vm| vm["state"] == "replicating").unwrap();
    println!("seed {seed}: {checked} points and backups, each a prefix; {status}");
    checked
}

#[test]
fn every_point_and_backup_is_a_moment_of_the_vm() {
    assert!(run(31, "24", 40) >= 40);
}

#[test]
fn with_each_log_applied_at_once_too() {
    assert!(run(32, "0", 25) >= 10);
}

#[test]
#[ignore = "hundreds of points: make soak"]
fn hundreds_of_points_without_an_exception() {
    let minutes =
        std::env::var("AFTERIMAGE_SOAK_MINUTES").ok().and_then(|text| text.parse().ok()).unwrap_or(10);
    let checked: usize = (0..minutes).map(|n| run(100 + n, if n % 2 == 0 { "24" } else { "0" }, 60)).sum();
    assert!(checked >= 300, "{checked}");
}
