//! Each of the eight conditions, brought about for real: it refuses the backup with its code and exit
//! status 75, leaves no backup, and when it has cleared the backup succeeds.

mod common;

use std::process::Command;
use std::time::Duration;

use common::{BURST_AT, DISKS, LONG, MIB, VM, World, path};
use rig::{Process, noise, tool, wait_for};
use serde_json::Value;

const QUICK: Duration = Duration::from_millis(3);

impl World {
    /// A VM that is replicated.
    fn replicated(seed: u64, every: &str) -> Self {
        let mut world = Self::new(seed);
        world.write(1, QUICK);
        world.protect(every, &[]);
        world.replicating();
        world
    }

    /// Whether a backup is refused by `condition` just now; no backup may come of that.
    fn is_refused_by(&self, condition: &str, view: &str) -> bool {
        let output = self.backup(&["--view", view, "--no-retry"]);
        if output.condition() != Some(condition) {
            assert!(matches!(output.status, 0 | 75), "{output:?}");
            return false;
        }
        assert_eq!(self.backups(), self.backups_made.get(), "a refused backup leaves none");
        assert_eq!(output.status, 75, "{output:?}");
        let error = &output.json["error"];
        assert!(error["retry_after_s"].is_u64() && error["transient"].is_boolean(), "{error}");
        assert!(error["message"].as_str().is_some_and(|message| message.len() > 20), "{error}");
        true
    }

    /// Tries a backup again and again until it is refused by `condition`.
    fn refused_by(&self, condition: &str, view: &str) {
        wait_for(&format!("a {view} backup to be refused by {condition}"), LONG, || {
            Ok(self.is_refused_by(condition, view).then_some(()))
        })
        .unwrap();
    }

    /// Waits until the replica's status fits.
    fn head_shows(&self, what: &str, fits: impl Fn(&Value) -> bool) {
        self.head.wait_vm(VM, what, LONG, fits).unwrap();
    }

    /// The condition has cleared: a backup succeeds and is a moment of the VM.
    fn clears(&self, view: &str) {
        let backup = wait_for("a backup to succeed", LONG, || {
            let output = self.backup(&["--view", view, "--no-retry"]);
            assert!(matches!(output.status, 0 | 75), "{output:?}");
            Ok((output.status == 0).then_some(output.json))
        })
        .unwrap();
        self.state(&self.restore(backup["backup"].as_str().unwrap()));
    }
}

#[test]
fn initial_replication() {
    let mut world = World::new(11);
    world.write(1, QUICK);
    world.burst(24, 1);
    world.protect("1s", &["--bandwidth", "6M"]);
    world.head_shows("the VM", |vm| vm["state"] == "initial-replication");
    for view in ["pinned", "strict", "hold"] {
        world.refused_by("initial-replication", view);
    }
    world.replicating();
    world.clears("pinned");
}

#[test]
fn apply_in_progress_refuses_a_hold_and_comes_home() {
    let world = World::replicated(12, "1s");
    for (seed, view) in [(2, "hold"), (3, "strict")] {
        world.burst(512, seed);
        world.head_shows("an apply", |vm| vm["apply"] == "running");
        world.refused_by("apply-in-progress", view);
    }
    world.clears("hold");
    // With retries the same backup comes home by itself, and says by what it was refused.
    let mut collided = false;
    for seed in 4..12 {
        world.burst(512, seed);
        wait_for("an apply to run", LONG, || Ok((world.head.vm(VM)?["apply"] == "running").then_some(())))
            .unwrap();
        let backup = world.backup(&["--view", "hold"]);
        assert_eq!(backup.status, 0, "{backup:?}");
        let attempts = backup.json["attempts"].as_array().unwrap();
        if attempts.iter().any(|attempt| attempt["refused"] == "apply-in-progress") {
            collided = true;
            break;
        }
    }
    assert!(collided, "none of eight backups beside an apply met it");
}

#[test]
fn a_pinned_view_does_not_meet_the_apply() {
    let world = World::replicated(13, "1s");
    for seed in 1..4 {
        world.burst(512, seed);
        wait_for("an apply to run", LONG, || Ok((world.head.vm(VM)?["apply"] == "running").then_some(())))
            .unwrap();
        let output = world.backup(&["--no-retry"]);
        assert_eq!(output.status, 0, "{output:?}");
        world.state(&world.restore(output.json["backup"].as_str().unwrap()));
    }
}

#[test]
fn apply_interrupted() {
    let mut world = World::replicated(14, "1s");
    world.branch.ok(&["pause", VM]).unwrap();
    world.head.stop();
    // The site kills itself in the middle of an apply, as a power cut would; of a large one, so that it takes
    // a while to be run again.
    world.head.serve_with(&[("AFTERIMAGE_FAIL_AT", "replica::apply::written")]).unwrap();
    world.burst(512, 5);
    world.branch.ok(&["resume", VM]).unwrap();
    wait_for("the site to die in an apply", LONG, || Ok((!world.head.is_running()).then_some(()))).unwrap();
    world.head.serve().unwrap();
    world.refused_by("apply-interrupted", "pinned");
    world.clears("pinned");
}

#[test]
fn apply_failed() {
    let world = World::replicated(15, "1s");
    let storage = world.head.vm(VM).unwrap()["storage"].as_str().unwrap().to_owned();
    let disks = format!("{storage}/disks");
    // The base's folder can be read and not written: every apply gets a real I/O error.
    tool(Command::new("mount").args(["--bind", &disks, &disks])).unwrap();
    tool(Command::new("mount").args(["-o", "remount,ro,bind", &disks])).unwrap();
    world.refused_by("apply-failed", "pinned");
    let status = world.head.vm(VM).unwrap();
    assert_eq!((status["apply"].as_str(), status["health"].as_str()), (Some("failed"), Some("critical")));
    tool(Command::new("umount").arg(&disks)).unwrap();
    world.head.ok(&["resume", VM]).unwrap();
    world.clears("pinned");
}

#[test]
fn health_critical() {
    let mut world = World::replicated(16, "1s");
    world.head.stop();
    world
        .head
        .configure(&[
            ("warning-after-s = 600", "warning-after-s = 2"),
            ("critical-after-s = 3600", "critical-after-s = 3"),
        ])
        .unwrap();
    world.head.serve().unwrap();
    world.line.cut();
    world.refused_by("health-critical", "pinned");
    world.line.mend();
    world.clears("pinned");
}

#[test]
fn resync_required_and_running() {
    let mut world = World::new(17);
    world.write(1, QUICK);
    world.protect("1s", &["--bandwidth", "8M"]);
    world.replicating();
    // QEMU dies, the disk changes while nobody tracks it, QEMU starts again.
    let from = world.quiet();
    world.daemon.kill();
    let disk = std::fs::OpenOptions::new().write(true).open(world.daemon.disk(DISKS[1].0)).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&disk, &noise(9, 32 * MIB), BURST_AT).unwrap();
    world.daemon.restart().unwrap();
    world.write(from, QUICK);
    world.refused_by("resync", "pinned");
    world.replicating();
    world.clears("pinned");
}

#[test]
fn migration() {
    let world = World::replicated(18, "1s");
    world.burst(512, 6);
    world.branch.ok(&["sync", VM]).unwrap();
    // Forth and back until a backup has met a move: it takes less than a second.
    let folders = ["here", "there"].map(|name| world.dir.path().join(name));
    let mut met = false;
    for storage in folders.iter().cycle().take(20) {
        let mut command = world.head.command(&["migrate", VM, "--storage", path(storage)]).unwrap();
        let mut moving = Process::start(command.stdout(std::process::Stdio::null())).unwrap();
        while !met && !moving.has_ended() {
            met = world.is_refused_by("migration", "pinned");
        }
        wait_for("the move to end", LONG, || Ok(moving.has_ended().then_some(()))).unwrap();
        assert!(world.head.vm(VM).unwrap()["storage"].as_str().unwrap().starts_with(path(storage)));
        if met {
            break;
        }
    }
    assert!(met, "no backup met one of twenty moves");
    world.clears("pinned");
}

#[test]
fn failover() {
    let world = World::replicated(19, "1s");
    let answer = world.head.ok(&["failover", "unplanned", VM]).unwrap();
    let disks: Vec<_> =
        answer["disks"].as_array().unwrap().iter().map(|disk| disk["path"].as_str().unwrap()).collect();
    assert_eq!(disks.len(), DISKS.len());
    world.refused_by("failover", "pinned");
    // The disks are there to start a VM from, and can be written.
    for disk in disks {
        tool(Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -P 7 0 64k", disk])).unwrap();
    }
    world.head.ok(&["failover", "cancel", VM]).unwrap();
    world.clears("pinned");
}

#[test]
fn a_vm_that_is_not_there_and_names_that_are_tricks() {
    let world = World::new(20);
    let missing = world.head.run(&["backup", "nothing"]).unwrap();
    assert_eq!((missing.status, missing.code()), (1, Some("no-such-vm")));
    for trick in ["../x", "a/b", "", ".", "-x"] {
        let output = world.head.run(&["backup", "--", trick]).unwrap();
        assert_eq!((output.status, output.code()), (64, Some("usage")), "{trick:?}: {output:?}");
    }
}
