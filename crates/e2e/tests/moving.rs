//! A replica moves to another site: with all its points and pins, without an initial replication over the primary's line, through
//! the deaths of each of the three sites; the primary goes on there with its next cycle, and back again.

mod common;

use std::process::Command;
use std::time::Duration;

use common::{DISKS, LONG, MIB, VM, World, far_site};
use rig::{Line, Site, state_of_exports, tool, wait_for};
use serde_json::Value;
use wire::{Client, Identity};

const PAUSE: Duration = Duration::from_millis(3);
/// The newest points that are kept in any case, where hourly ones are wanted.
const RECENT: usize = 10;
const RESYNC: &str = "resynchronization is required";

/// Two sites, and a third one that the replica can move to.
struct Three {
    far: Site,
    line: Line,
    world: World,
}

/// A point as it was before the move: what it is known by, and the state that it shows.
struct Seen {
    taken_at: Value,
    consistency: Value,
    name: Value,
    state: u64,
}

impl Three {
    fn new(seed: u64, every: &str) -> Self {
        let mut world = World::new(seed);
        let (far, line) = far_site(
            world.dir.path(),
            &[
                ("backoff-s = [60, 120, 240, 480, 600, 1800]", "backoff-s = [1]"),
                ("patience-s = 30", "patience-s = 3"),
            ],
        );
        world.write(1, PAUSE);
        world.protect(every, &["--points", "24"]);
        world.replicating();
        Self { far, line, world }
    }

    /// All of them know each other, and the two that replicate may take over from each other.
    fn acquaint(&self) {
        self.far.invite(&self.world.head).unwrap();
        self.far.invite(&self.world.branch).unwrap();
        for (site, peers) in [(&self.far, ["head", "branch"]), (&self.world.head, ["far", "branch"])] {
            peers.iter().for_each(|peer| drop(site.ok(&["peer", "allow", peer, "--group", "web"]).unwrap()));
        }
    }

    fn migrate(&self, to: &str) {
        self.world.branch.ok(&["migrate", VM, "--to-site", to]).unwrap();
    }

    /// Waits until the primary replicates to that site, and the other one has heard of it.
    fn moved(&self, to: &str) {
        let moved = self.world.branch.wait_vm(VM, "to have its replica elsewhere", LONG, |vm| {
            vm["peer"] == to && vm["moving"].is_null()
        });
        moved.unwrap_or_else(|trouble| {
            panic!("{trouble}\n{}\n{}\n{}", self.world.branch.log(), self.world.head.log(), self.far.log())
        });
    }

    fn site(&self, name: &str) -> &Site {
        if name == "far" { &self.far } else { &self.world.head }
    }

    fn points(&self, site: &str) -> Vec<Value> {
        self.site(site).ok(&["points", VM]).unwrap()["points"].as_array().unwrap().clone()
    }

    fn state_of(&self, site: &str, point: &Value) -> u64 {
        let site = self.site(site);
        let shown = site.ok(&["export", VM, "--point", point["id"].as_str().unwrap()]).unwrap();
        let disks = shown["disks"].as_array().unwrap();
        let uri = |name| disks.iter().find(|disk| disk["name"] == name).unwrap()["uri"].as_str().unwrap();
        let uris = DISKS.map(|(name, _)| uri(name));
        let state = state_of_exports(&self.world.script, self.world.begun(), &uris);
        site.ok(&["unexport", shown["export"].as_str().unwrap()]).unwrap();
        state.unwrap_or_else(|violation| panic!("{violation}: {point}"))
    }

    fn seen(&self, site: &str) -> Vec<Seen> {
        let points = self.points(site);
        let seen = points.iter().map(|point| Seen {
            taken_at: point["taken_at"].clone(),
            consistency: point["consistency"].clone(),
            name: point["name"].clone(),
            state: self.state_of(site, point),
        });
        seen.collect()
    }

    /// Every point of before is there, with its state, its consistency and its name, as far as retention wants it: what is
    /// not pinned may have gone when there were [`RECENT`] newer ones.
    fn has_all(&self, site: &str, seen: &[Seen]) {
        let points = self.points(site);
        for before in seen {
            let found = points.iter().find(|point| point["taken_at"] == before.taken_at);
            let is_newer = |point: &&Value| point["taken_at"].as_str() > before.taken_at.as_str();
            let newer = points.iter().filter(is_newer).count();
            if found.is_none() && before.name.is_null() && newer >= RECENT {
                continue;
            }
            let found = found.unwrap_or_else(|| panic!("{} is lost: {points:?}", before.taken_at));
            assert_eq!((&found["consistency"], &found["name"]), (&before.consistency, &before.name));
            assert_eq!(self.state_of(site, found), before.state, "{found}");
        }
    }

    /// With the guest at rest: that site's newest point is the VM's disks, byte for byte.
    fn same(&self, site: &str) {
        let shown = self.site(site).ok(&["export", VM]).unwrap();
        for disk in shown["disks"].as_array().unwrap() {
            let name = disk["name"].as_str().unwrap();
            let runs = format!("nbd+unix:///{name}?socket={}", self.world.daemon.nbd().display());
            let mut compare = Command::new("qemu-img");
            compare.args(["compare", "-f", "raw", "-F", "raw", &runs, disk["uri"].as_str().unwrap()]);
            tool(&mut compare).unwrap_or_else(|trouble| panic!("disk {name}: {trouble}"));
        }
        self.site(site).ok(&["unexport", shown["export"].as_str().unwrap()]).unwrap();
    }

    /// A cycle that ends well, whatever had to be mended first.
    fn sync(&self) {
        let mut last = Value::Null;
        let synced = wait_for("a cycle to end well", LONG, || {
            let output = self.world.branch.run(&["sync", VM])?;
            last = output.json;
            Ok((output.status == 0).then_some(()))
        });
        synced.unwrap_or_else(|trouble| panic!("{trouble}: {last}\n{}", self.world.branch.log()));
    }

    fn nothing_was_compared(&self) {
        for site in [&self.world.branch, &self.world.head, &self.far] {
            assert!(!site.log().contains(RESYNC), "{}: {}", site.name(), site.log());
        }
    }

    fn sent_by_the_primary(&self) -> u64 {
        self.world.branch.vm(VM).unwrap()["sent_bytes"].as_u64().unwrap()
    }
}

#[test]
fn a_replica_moves_with_its_points_and_the_primary_goes_on_there_and_back_again() {
    let mut three = Three::new(271, "15m");
    three.world.burst(48, 1);
    for seed in 2..5 {
        three.world.burst(2, seed);
        three.sync();
    }
    let pinned = three.points("head")[1].clone();
    three.world.head.ok(&["pin", VM, pinned["id"].as_str().unwrap(), "--name", "kept"]).unwrap();

    // Who does not know whom, and who may decide.
    let refused = |arguments: &[&str]| three.world.branch.run(arguments).unwrap();
    assert_eq!(refused(&["migrate", VM, "--to-site", "far"]).code(), Some("no-such-peer"));
    assert_eq!(refused(&["migrate", VM]).status, 64);
    let nothing = refused(&["migrate", VM, "--cancel"]);
    assert_eq!(nothing.code(), Some("unfit"), "{nothing:?}");
    three.far.invite(&three.world.branch).unwrap();
    let stranger = refused(&["migrate", VM, "--to-site", "far"]);
    assert_ne!(stranger.status, 0);
    let told = stranger.json["error"]["message"].as_str().unwrap();
    assert!(told.contains("does not know the site"), "{told}");
    assert!(three.world.branch.vm(VM).unwrap()["moving"].is_null(), "nothing has begun");
    three.far.invite(&three.world.head).unwrap();
    let here = three.world.head.run(&["migrate", VM, "--to-site", "far"]).unwrap();
    assert!(here.json["error"]["message"].as_str().unwrap().contains("branch"), "{here:?}");

    // Begun and given up: as if it had not been. The gate refuses meanwhile, and replication goes on.
    three.line.cut();
    three.migrate("far");
    let backup = three.world.head.run(&["backup", VM, "--no-retry"]).unwrap();
    assert_eq!((backup.status, &backup.json["error"]["condition"]), (75, &"migration".into()), "{backup:?}");
    assert_eq!(three.world.head.vm(VM).unwrap()["moving_to"], "far");
    three.sync();
    three.world.branch.ok(&["migrate", VM, "--cancel"]).unwrap();
    assert_eq!(three.world.backup(&["--no-retry"]).status, 0);
    assert_eq!(three.world.head.ok(&["status", VM]).unwrap()["vms"].as_array().unwrap().len(), 1);
    three.line.mend();

    // Without the trust group it gets as far as the hand-over, and the old site goes on.
    for (place, point) in three.points("head").iter().enumerate().filter(|(place, _)| place % 2 == 0) {
        let id = point["id"].as_str().unwrap();
        if point["pinned"] == false {
            three.world.head.ok(&["pin", VM, id, "--name", &format!("point-{place}")]).unwrap();
        }
    }
    let seen = three.seen("head");
    let named = seen.iter().filter(|point| point.name.is_string()).count();
    assert!(named > 2 && seen.len() > named, "{named} of {}", seen.len());
    let before = three.sent_by_the_primary();
    three.migrate("far");
    let waits = three.world.branch.wait_vm(VM, "to be told of the trust group", LONG, |vm| {
        vm["moving"]["error"].as_str().is_some_and(|error| error.contains("trust group"))
    });
    waits.unwrap_or_else(|trouble| panic!("{trouble}\n{}", three.world.branch.log()));
    three.sync();
    assert_eq!(three.world.branch.vm(VM).unwrap()["peer"], "head");
    for peer in ["head", "branch"] {
        three.far.ok(&["peer", "allow", peer, "--group", "web"]).unwrap();
    }
    three.world.branch.ok(&["resume", VM]).unwrap();
    three.moved("far");
    three.has_all("far", &seen);
    three.world.quiet();
    three.sync();
    three.same("far");
    three.nothing_was_compared();
    let sent = three.sent_by_the_primary() - before;
    assert!(sent < 24 * MIB, "{sent} bytes: nothing but cycles crossed the primary's line");
    let there = three.far.vm(VM).unwrap();
    assert_eq!(
        (&there["peer"], &there["role"], &there["pinned"]),
        (&"branch".into(), &"replica".into(), &named.into())
    );
    assert!(there["withdrawn"] == false && there["moving_to"].is_null(), "{there}");
    three.far.ok(&["backup", VM]).unwrap();
    assert_eq!(three.world.head.run(&["status", VM]).unwrap().code(), Some("no-such-vm"));

    // A primary of before, put back from an older copy, is turned away by the site that had the replica.
    let identity = Identity::load(three.world.branch.dir()).unwrap();
    let peers = three.world.branch.ok(&["peer", "list"]).unwrap();
    let head = peers["peers"].as_array().unwrap().iter().find(|peer| peer["name"] == "head").unwrap().clone();
    let fingerprint = head["fingerprint"].as_str().unwrap().parse().unwrap();
    let client = Client::new(&identity, head["address"].as_str().unwrap(), fingerprint).unwrap();
    let offer = common::forged_offer(there["id"].as_str().unwrap().parse().unwrap(), VM, DISKS[0].1);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let turned_away = runtime.block_on(client.offer(&offer)).unwrap_err();
    assert!(turned_away.to_string().contains("was moved from here to far"), "{turned_away}");

    // And back, onto the site that had it.
    for peer in ["far", "branch"] {
        three.world.head.ok(&["peer", "allow", peer, "--group", "web"]).unwrap();
    }
    let seen = three.seen("far");
    three.migrate("head");
    three.moved("head");
    three.has_all("head", &seen);
    three.sync();
    three.same("head");
    three.nothing_was_compared();
    assert_eq!(three.far.run(&["status", VM]).unwrap().code(), Some("no-such-vm"));
}

#[test]
fn a_move_goes_on_after_the_death_of_each_site_and_nothing_is_lost() {
    let mut three = Three::new(272, "1s");
    three.acquaint();
    three.world.burst(64, 1);
    three.sync();
    let mut at = ["head", "far"];
    for round in 0..3_u64 {
        three.migrate(at[1]);
        // In the middle of whatever they are doing.
        for (step, who) in ["branch", "head", "far"].iter().enumerate() {
            std::thread::sleep(Duration::from_millis(170 * (round + 1) + 110 * step as u64));
            let site = match *who {
                "branch" => &mut three.world.branch,
                "head" => &mut three.world.head,
                _ => &mut three.far,
            };
            site.kill();
            site.serve().unwrap();
        }
        three.moved(at[1]);
        at.swap(0, 1);
        three.sync();
    }
    three.world.quiet();
    three.sync();
    three.same(at[0]);
    three.nothing_was_compared();
    for point in three.points(at[0]) {
        three.state_of(at[0], &point);
    }
    three.site(at[0]).ok(&["backup", VM]).unwrap();
}
