//! How a VM is protected is changed while it is: both sites go by it from the next cycle on, and what cannot be changed is
//! refused with what to do instead.

mod common;

use std::time::Duration;

use common::{LONG, VM, World, path};
use rig::wait_for;
use serde_json::Value;

const PAUSE: Duration = Duration::from_millis(2);

impl World {
    fn configure(&self, more: &[&str]) -> Value {
        self.branch.ok(&[&["configure", VM], more].concat()).unwrap()
    }

    /// Refused with that status, and what is said of it.
    fn refused(&self, more: &[&str], status: i32) -> String {
        let before = self.branch.vm(VM).unwrap();
        let output = self.branch.run(&[&["configure", VM], more].concat()).unwrap();
        assert_eq!(output.status, status, "{more:?}: {output:?}");
        let after = self.branch.vm(VM).unwrap();
        for key in ["interval_s", "points", "app_every_s", "bandwidth_bytes_per_s", "peer"] {
            assert_eq!(before[key], after[key], "{more:?}: nothing has changed");
        }
        output.json["error"]["message"].as_str().unwrap_or_default().to_owned()
    }

    fn received(&self) -> u64 {
        self.head.vm(VM).unwrap()["received"].as_u64().unwrap()
    }
}

#[test]
fn interval_points_and_bandwidth_change_on_a_running_relationship() {
    let mut world = World::new(181);
    world.write(1, PAUSE);
    world.protect("15m", &["--points", "24", "--bandwidth", "50M"]);
    world.replicating();
    for _ in 0..4 {
        world.branch.ok(&["sync", VM]).unwrap();
    }
    let points = world.points();
    assert!(points.len() > 3, "{points:?}");
    let pinned = points[points.len() - 3]["id"].as_str().unwrap().to_owned();
    world.head.ok(&["pin", VM, &pinned, "--name", "kept"]).unwrap();

    // Fewer points, at once: retention's plan goes by it, and the pinned one stays.
    let changed = world.configure(&["--points", "0", "--bandwidth", "none", "--sign-of-life", "tcp:22"]);
    assert_eq!((&changed["points"], &changed["sign_of_life"]), (&0.into(), &"tcp:22".into()));
    assert!(changed["bandwidth_bytes_per_s"].is_null(), "{changed}");
    wait_for("the replica's site to hear of it, and to keep two points", LONG, || {
        let told = world.head.vm(VM)?["points"] == 0;
        Ok((told && world.points().len() == 2).then_some(()))
    })
    .unwrap();
    let points = world.points();
    assert_eq!((&points[0]["name"], &points[0]["pinned"]), (&"kept".into(), &true.into()), "{points:?}");

    // A shorter interval: cycles come by themselves, where one was due in a quarter of an hour.
    let before = world.received();
    world.configure(&["--every", "1s"]);
    wait_for("cycles to come by themselves", LONG, || Ok((world.received() > before + 3).then_some(())))
        .unwrap();
    assert_eq!(world.head.vm(VM).unwrap()["interval_s"], 1);

    // It stays so over a restart, and while it is paused it waits.
    world.branch.ok(&["pause", VM]).unwrap();
    world.configure(&["--points", "7"]);
    world.branch.kill();
    world.branch.serve().unwrap();
    assert_eq!(world.head.vm(VM).unwrap()["points"], 0, "nothing is sent while it is paused");
    world.branch.ok(&["resume", VM]).unwrap();
    world.branch.ok(&["sync", VM]).unwrap();
    let (here, there) = (world.branch.vm(VM).unwrap(), world.head.vm(VM).unwrap());
    assert_eq!((&here["points"], &there["points"]), (&7.into(), &7.into()));
    assert_eq!((&here["interval_s"], &here["sign_of_life"]), (&1.into(), &"tcp:22".into()));
    assert_eq!(here["state"], "replicating");
}

#[test]
fn the_guest_agent_and_the_monitor_are_told_anew() {
    let mut world = World::new(182);
    world.write(1, PAUSE);
    world.protect("15m", &[]);
    world.replicating();
    let nobody = world.dir.path().join("agent.sock");
    let told = world.refused(&["--app-every", "1h"], 64);
    assert!(told.contains("--guest-agent"), "{told}");
    world.configure(&["--app-every", "1h", "--guest-agent", path(&nobody)]);
    // Nobody answers there: the points are crash-consistent, and the cycle says why.
    let noted = |world: &World| world.branch.ok(&["sync", VM]).unwrap()["last_cycle"]["note"].clone();
    assert!(noted(&world).is_string(), "{}", world.branch.vm(VM).unwrap());
    assert!(world.refused(&["--guest-agent", "none"], 64).contains("--app-every none"));
    let changed = world.configure(&["--app-every", "none", "--guest-agent", "none"]);
    assert!(changed["app_every_s"].is_null() && changed["guest_agent"].is_null(), "{changed}");
    assert!(noted(&world).is_null());

    // The monitor's socket has another path.
    let told = world.refused(&["--qmp", path(&nobody)], 75);
    assert!(told.contains("stays as it was"), "{told}");
    let elsewhere = world.dir.path().join("qmp-elsewhere");
    std::os::unix::fs::symlink(world.daemon.qmp(), &elsewhere).unwrap();
    world.configure(&["--qmp", path(&elsewhere)]);
    world.branch.ok(&["sync", VM]).unwrap();
    assert_eq!(world.branch.vm(VM).unwrap()["state"], "replicating", "its bitmaps are still there");
}

#[test]
fn what_cannot_change_is_refused_with_what_to_do() {
    let world = World::new(183);
    world.protect("15m", &[]);
    world.replicating();
    for (wrong, says) in [
        (&["--to", "far"][..], "migrate web --to-site far"),
        (&["--disk", "data"], "disk add web"),
        (&["--exclude", "data"], "disk remove web"),
        (&["--libvirt", "qemu:///system"], "unprotect web"),
        (&["--every", "16m"], "out of range"),
        (&["--points", "25"], "too many"),
        (&["--bandwidth", "fast"], "bandwidth"),
        (&[], "--help"),
    ] {
        let told = world.refused(wrong, 64);
        assert!(told.contains(says), "{wrong:?}: {told}");
    }
    let there = world.head.run(&["configure", VM, "--points", "3"]).unwrap();
    assert_eq!(there.code(), Some("no-such-vm"), "{there:?}");
    world.branch.ok(&["group", "create", "shop", VM]).unwrap();
    let told = world.refused(&["--every", "30s"], 64);
    assert!(told.contains("group remove shop"), "{told}");
    world.configure(&["--points", "3"]);
}
