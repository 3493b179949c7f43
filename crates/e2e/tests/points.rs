//! Recovery points pinned by hand: what is pinned stays through everything that retention, restarts, moves and
//! resynchronizations do, under its name, byte for byte, and goes when it is let go.

mod common;

use std::time::Duration;

use common::{LONG, VM, World, path};
use rig::{state_of_exports, wait_for};
use serde_json::Value;

const NAME: &str = "before-upgrade";

impl World {
    /// A cycle after some more writes of the guest.
    fn cycle(&mut self) {
        let goal = self.begun() + 20;
        wait_for("the guest to write", LONG, || Ok((self.begun() >= goal).then_some(()))).unwrap();
        self.branch.ok(&["sync", VM]).unwrap();
    }

    /// Waits until retention has nothing to do.
    fn settled(&self) {
        wait_for("retention to have nothing to do", LONG, || {
            Ok(self.plan().iter().all(|step| step["action"] == "keep").then_some(()))
        })
        .unwrap();
    }

    fn plan(&self) -> Vec<Value> {
        self.head.ok(&["points", VM, "--plan"]).unwrap()["plan"].as_array().unwrap().clone()
    }

    /// The state that the pinned point shows.
    fn pinned_state(&self) -> u64 {
        let output = self.head.ok(&["export", VM, "--point", NAME]).unwrap();
        let shown = common::Shown::of(&output);
        let uris = shown.uris.each_ref().map(String::as_str);
        let state = state_of_exports(&self.script, self.begun(), &uris).unwrap();
        self.unexport(&shown);
        state
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

#[test]
fn a_pinned_point_outlives_retention_restarts_moves_and_resynchronizations() {
    let mut world = World::new(71);
    world.write(1, Duration::from_millis(2));
    world.protect("15m", &[]);
    world.replicating();
    world.cycle();
    let pinned = world.head.ok(&["pin", VM, "latest", "--name", NAME]).unwrap();
    assert_eq!((&pinned["pinned"], text(&pinned["name"])), (&Value::Bool(true), NAME));
    let state = world.pinned_state();

    // Retention: only the latest is wanted beside it. What it costs is told.
    for _ in 0..3 {
        world.cycle();
    }
    world.settled();
    let points = world.points();
    assert_eq!(points.len(), 2, "{points:?}");
    assert_eq!((&points[0]["id"], text(&points[0]["name"])), (&pinned["point"], NAME));
    assert_eq!((&points[0]["pinned"], &points[1]["pinned"]), (&Value::Bool(true), &Value::Bool(false)));
    assert!(points[1]["name"].is_null());
    let cost = points[0]["pin_bytes"].as_u64().unwrap();
    let status = world.head.vm(VM).unwrap();
    assert!(cost > 0 && status["pin_bytes"] == cost && status["pinned"] == 1, "{status}");
    assert_eq!(status["applied"], points[0]["number"], "the base stays at the oldest pin");
    let plan = world.plan();
    assert_eq!(plan[0]["why"], serde_json::json!(["pinned-by-hand"]), "{plan:?}");
    assert_eq!(plan[1]["why"], serde_json::json!(["latest"]), "{plan:?}");
    assert_eq!(world.pinned_state(), state);

    // A kill, a move, a resynchronization.
    world.head.kill();
    world.head.serve().unwrap();
    let elsewhere = world.dir.path().join("elsewhere");
    world.head.ok(&["migrate", VM, "--storage", path(&elsewhere)]).unwrap();
    world.branch.ok(&["resync", VM]).unwrap();
    world.cycle();
    world.settled();
    assert_eq!(world.pinned_state(), state);
    let backup = world.backup(&["--point", NAME]);
    assert_eq!((backup.status, &backup.json["point"]), (0, &pinned["point"]), "{backup:?}");
    assert_eq!(world.state(&world.restore(text(&backup.json["backup"]))), state);

    // A failover to a newer point ends it when it is completed: that is not done behind anybody's back.
    world.head.ok(&["failover", "unplanned", VM]).unwrap();
    let refused = world.head.run(&["failover", "complete", VM]).unwrap();
    assert_eq!(refused.code(), Some("failover"), "{refused:?}");
    world.head.ok(&["failover", "cancel", VM]).unwrap();
    let first_digits = &text(&pinned["point"])[..8];
    world.head.ok(&["unpin", VM, first_digits]).unwrap();
    world.settled();
    let points = world.points();
    assert_eq!(points.len(), 1, "{points:?}");
    assert_ne!(points[0]["id"], pinned["point"]);
    let gone = world.head.run(&["export", VM, "--point", NAME]).unwrap();
    assert_eq!(gone.code(), Some("no-such-point"));
    assert_eq!(world.head.vm(VM).unwrap()["applied"], points[0]["number"]);
}

#[test]
fn names_of_points_are_unique_and_cannot_be_taken_for_ids() {
    let mut world = World::new(72);
    world.write(1, Duration::from_millis(2));
    world.protect("15m", &["--points", "24"]);
    world.replicating();
    world.cycle();
    world.cycle();
    let points = world.points();
    let [older, newer] =
        [&points[points.len() - 2], &points[points.len() - 1]].map(|point| text(&point["id"]));
    world.head.ok(&["pin", VM, older, "--name", NAME]).unwrap();
    let taken = world.head.run(&["pin", VM, newer, "--name", NAME]).unwrap();
    assert_eq!(taken.code(), Some("exists"), "{taken:?}");
    for bad in ["beef", "latest", "../x", ""] {
        let refused = world.head.run(&["pin", VM, newer, "--name", bad]).unwrap();
        assert_eq!((refused.status, refused.code()), (64, Some("usage")), "{bad}: {refused:?}");
    }
    let none = world.head.run(&["pin", VM, "no-such-name"]).unwrap();
    assert_eq!(none.code(), Some("no-such-point"));
    // A pin without a name, a new name for what is pinned, and the contract's own form.
    world.head.ok(&["pin", VM, newer]).unwrap();
    world.head.ok(&["pin", VM, newer, "--name", "second"]).unwrap();
    let shown = world.points();
    let names: Vec<&str> = shown.iter().filter_map(|point| point["name"].as_str()).collect();
    assert_eq!(names, [NAME, "second"]);
    for key in ["id", "number", "taken_at", "consistency", "bytes", "pinned", "name"] {
        assert!(shown.iter().all(|point| point.get(key).is_some()), "{key}");
    }
}
