//! Boot checks of points and backups: what boots is seen to, what does not is told, and the replica stays as it is.

mod common;

use std::path::Path;

use common::{DISKS, VM, World};
use rig::boot_sector;
use serde_json::Value;

const WORDS: &str = "afterimage lives";
const SYSTEM: &str = DISKS[0].0;

impl World {
    /// A protected VM whose system disk begins with these bytes; the first point that shows them.
    fn booting(seed: u64) -> Self {
        let mut world = Self::new(seed);
        world.head.stop();
        world.head.configure(&[("# accelerator = \"tcg\"", "accelerator = \"tcg\"")]).unwrap();
        world.head.serve().unwrap();
        rig::write(&world.daemon, SYSTEM, 0, &boot_sector(WORDS)).unwrap();
        world.protect("15m", &["--sign-of-life", &format!("console:{WORDS}")]);
        world.replicating();
        world.branch.ok(&["sync", VM]).unwrap();
        world
    }

    /// The guest's boot sector is gone, and a point shows it.
    fn break_boot(&self) {
        rig::write(&self.daemon, SYSTEM, 0, &[0; 512]).unwrap();
        self.branch.ok(&["sync", VM]).unwrap();
    }

    fn check(&self, more: &[&str]) -> (i32, Value) {
        let output = self.head.run(&[&["check", VM], more].concat()).unwrap();
        (output.status, output.json)
    }
}

fn is_kept(report: &Value) -> bool {
    ["screenshot", "console"].iter().all(|key| Path::new(report[key].as_str().unwrap()).exists())
}

#[test]
fn a_point_and_a_backup_boot_and_one_that_does_not_is_told_with_what_it_shows() {
    let world = World::booting(41);
    let before = world.points();
    let (status, alive) = world.check(&[]);
    assert_eq!((status, &alive["alive"]), (0, &Value::Bool(true)), "{alive}");
    assert_eq!(alive["sign"], format!("console:{WORDS}"), "the sign that the relationship names");
    assert!(alive["boot_s"].as_f64().unwrap() > 0.0 && is_kept(&alive), "{alive}");
    assert_eq!(alive["point"], before.last().unwrap()["id"]);
    let console = std::fs::read_to_string(alive["console"].as_str().unwrap()).unwrap();
    assert!(console.contains(WORDS), "{console}");
    assert!(std::fs::read(alive["screenshot"].as_str().unwrap()).unwrap().starts_with(b"\x89PNG"));

    let backup = world.backup(&[]);
    assert_eq!(backup.status, 0, "{backup:?}");
    world.break_boot();
    let (status, dead) = world.check(&["--within", "5s"]);
    assert_eq!((status, &dead["alive"], &dead["boot_s"]), (1, &Value::Bool(false), &Value::Null), "{dead}");
    assert!(dead["why"].as_str().unwrap().contains("within 5 s") && is_kept(&dead), "{dead}");
    // The backup of before still boots, by the sign that was kept with it.
    let id = backup.json["backup"].as_str().unwrap();
    let (status, restored) = world.check(&["--backup", id]);
    assert_eq!((status, &restored["kind"], &restored["alive"]), (0, &"backup".into(), &Value::Bool(true)));

    let checks = world.head.ok(&["checks", VM]).unwrap();
    let outcomes: Vec<bool> =
        checks["checks"].as_array().unwrap().iter().map(|check| check["alive"] == true).collect();
    assert_eq!(outcomes, [true, false, true], "newest first: {checks}");
    let events = world.head.ok(&["events"]).unwrap();
    assert!(events["events"].as_array().unwrap().iter().any(|event| event["kind"] == "boot-check-failed"));

    // Nothing is left of it: no pin, no layer, no export, and the replica goes on.
    assert_eq!(world.head.vm(VM).unwrap()["views"], 0);
    let layers = world.head.dir().join("run/layers");
    assert!(std::fs::read_dir(&layers).map_or(0, Iterator::count) == 0, "layers are left");
    assert_eq!(world.branch.ok(&["sync", VM]).unwrap()["state"], "replicating");
}

#[test]
fn what_cannot_be_booted_says_why_and_a_bad_sign_is_bad_usage() {
    let world = World::booting(42);
    let (status, refused) = world.check(&["--sign-of-life", "smoke"]);
    assert_eq!(status, 64, "{refused}");
    let (status, error) = world.check(&["--point", "00000000000000000000000000000001"]);
    assert_eq!((status, &error["error"]["code"]), (1, &"no-such-point".into()), "{error}");
    let machines = world.head.dir().join("machines");
    std::fs::create_dir(&machines).unwrap();
    std::fs::write(machines.join(format!("{VM}.toml")), "args = [\"-no-such-option\"]").unwrap();
    let (status, error) = world.check(&[]);
    assert_eq!((status, &error["error"]["code"]), (1, &"boot".into()), "{error}");
    assert!(error["error"]["message"].as_str().unwrap().contains("no-such-option"), "{error}");
    std::fs::write(machines.join(format!("{VM}.toml")), "memory = 5").unwrap();
    let (status, error) = world.check(&[]);
    assert_eq!((status, &error["error"]["code"]), (1, &"config".into()), "{error}");
    assert!(error["error"]["message"].as_str().unwrap().contains("web.toml"), "{error}");
    assert_eq!(world.head.vm(VM).unwrap()["views"], 0, "a check that failed leaves no pin");
}
