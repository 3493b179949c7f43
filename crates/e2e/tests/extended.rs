//! A replica is passed on to a third site: what the VM has is there byte for byte, also after the deaths of each site and
//! over a link that breaks; the third site is an ordinary replica, that is backed up and failed over to. And the first
//! hop never waits for the second.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::{DISKS, LONG, MIB, VM, World, far_site, path};
use rig::{Line, Site, StorageDaemon, state_of_exports, state_of_files, tool, wait_for};
use serde_json::Value;

const PAUSE: Duration = Duration::from_millis(3);
/// In the log of a site that finds that both sides must be compared.
const RESYNC: &str = "resynchronization is required";

/// The two sites of every test, and a third one behind a line of its own.
struct Three {
    far: Site,
    line: Line,
    world: World,
}

impl Three {
    /// A VM is replicated to `head`, every so often; nothing is passed on yet.
    fn new(seed: u64, every: &str, points: &str) -> Self {
        let mut world = World::new(seed);
        let (far, line) = far_site(world.dir.path(), &[("delay-max-s = 900", "delay-max-s = 2")]);
        far.invite(&world.head).unwrap();
        world.write(1, PAUSE);
        world.protect(every, &["--points", points]);
        world.replicating();
        Self { far, line, world }
    }

    fn extend(&self, more: &[&str]) {
        self.world.head.ok(&[&["extend", VM, "--to", "far"], more].concat()).unwrap();
        self.extended("to be passed on", |vm| vm["state"] == "replicating");
    }

    /// The extension, as the second site tells of it.
    fn extension(&self) -> Value {
        relationship(&self.world.head, "extension").unwrap().unwrap_or_default()
    }

    fn extended(&self, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
        let found = wait_for(&format!("the extension: {what}"), LONG, || {
            let found = relationship(&self.world.head, "extension")?;
            Ok(found.filter(|vm| fits(vm)))
        });
        found.unwrap_or_else(|trouble| panic!("{trouble}: {}\n{}", self.extension(), self.world.head.log()))
    }

    /// A cycle of either hop, with everything that the guest has written.
    fn sync(&self) {
        self.world.branch.ok(&["sync", VM]).unwrap();
        self.pass_on();
    }

    /// A cycle of the second hop that ends well, whatever had to be mended first.
    fn pass_on(&self) -> Value {
        let mut last = Value::Null;
        let passed = wait_for("a cycle of the second hop to end well", LONG, || {
            let output = self.world.head.run(&["sync", VM])?;
            last = output.json;
            Ok((output.status == 0).then_some(()))
        });
        passed.unwrap_or_else(|trouble| panic!("{trouble}: {last}\n{}", self.world.head.log()));
        last
    }

    /// With the guest at rest: the third site's newest point is the VM's disks, byte for byte.
    fn same_at_the_end(&self, daemon: &StorageDaemon) {
        let shown = self.far.ok(&["export", VM]).unwrap();
        for disk in shown["disks"].as_array().unwrap() {
            let name = disk["name"].as_str().unwrap();
            let runs = format!("nbd+unix:///{name}?socket={}", daemon.nbd().display());
            let mut compare = Command::new("qemu-img");
            compare.args(["compare", "-f", "raw", "-F", "raw", &runs, disk["uri"].as_str().unwrap()]);
            tool(&mut compare).unwrap_or_else(|trouble| panic!("disk {name}: {trouble}"));
        }
        self.far.ok(&["unexport", shown["export"].as_str().unwrap()]).unwrap();
    }

    fn same(&self) {
        self.same_at_the_end(&self.world.daemon);
    }

    /// The third site's points, each a moment of the VM.
    fn points_there(&self) -> Vec<Value> {
        let points = self.far.ok(&["points", VM]).unwrap()["points"].as_array().unwrap().clone();
        for point in &points {
            let id = point["id"].as_str().unwrap();
            let output = self.far.run(&["export", VM, "--point", id]).unwrap();
            if output.code() == Some("no-such-point") {
                continue; // it was dropped since it was listed
            }
            let shown = common::Shown::of(&output.json);
            let uris = shown.uris.each_ref().map(String::as_str);
            state_of_exports(&self.world.script, self.world.begun(), &uris)
                .unwrap_or_else(|violation| panic!("point {point}: {violation}"));
            self.far.ok(&["unexport", &shown.id]).unwrap();
        }
        points
    }

    /// The state that the VM's own disks show; the guest is at rest.
    fn state_of_vm(&self) -> u64 {
        let socket = self.world.daemon.nbd();
        let uris = DISKS.map(|(name, _)| format!("nbd+unix:///{name}?socket={}", socket.display()));
        state_of_exports(&self.world.script, u64::MAX, &uris.each_ref().map(String::as_str))
            .unwrap_or_else(|violation| panic!("{violation}"))
    }

    fn resyncs(&self) -> usize {
        self.world.head.log().matches(RESYNC).count()
    }

    fn received_at_head(&self) -> u64 {
        relationship(&self.world.head, "replica").unwrap().unwrap()["received"].as_u64().unwrap()
    }

    fn first_hop_goes_on(&self, while_what: &str) {
        let before = self.received_at_head();
        wait_for(&format!("the first hop to go on while {while_what}"), LONG, || {
            Ok((self.received_at_head() >= before + 3).then_some(()))
        })
        .unwrap();
    }
}

/// The relationship in which a site has this role.
fn relationship(site: &Site, role: &str) -> rig::Result<Option<Value>> {
    let answer = site.run(&["status", VM])?;
    let vms = answer.json["vms"].as_array().cloned().unwrap_or_default();
    Ok(vms.into_iter().find(|vm| vm["role"] == role))
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("no number: {value}"))
}

#[test]
fn logs_are_passed_on_as_they_are_and_several_as_one() {
    let mut three = Three::new(901, "15m", "3");
    let head = &three.world.head;
    for (wrong, code) in [("branch", "usage"), ("nobody", "usage")] {
        let refused = head.run(&["extend", VM, "--to", wrong]).unwrap();
        assert_eq!(refused.code(), Some(code), "{refused:?}");
    }
    let faster = head.run(&["extend", VM, "--to", "far", "--every", "1m"]).unwrap();
    assert_eq!((faster.status, faster.code()), (64, Some("usage")), "{faster:?}");
    three.extend(&[]);
    let twice = three.world.head.run(&["extend", VM, "--to", "far"]).unwrap();
    assert_eq!(twice.code(), Some("exists"), "{twice:?}");
    let shown = three.extension();
    assert_eq!(
        (&shown["peer"], &shown["interval_s"], &shown["points"]),
        (&"far".into(), &900.into(), &3.into())
    );
    assert_eq!(relationship(&three.far, "replica").unwrap().unwrap()["peer"], "head");

    // How it is passed on is configured here; what only its VM has is not.
    let faster = three.world.head.run(&["configure", VM, "--every", "1m"]).unwrap();
    assert_eq!((faster.status, faster.code()), (64, Some("usage")), "{faster:?}");
    let frozen = three.world.head.run(&["configure", VM, "--app-every", "1h"]).unwrap();
    assert_eq!((frozen.status, frozen.code()), (64, Some("usage")), "{frozen:?}");
    let set = three.world.head.ok(&["configure", VM, "--points", "4"]).unwrap();
    assert_eq!((&set["role"], &set["points"]), (&"extension".into(), &4.into()));
    wait_for("the third site to hear of it", LONG, || {
        let there = relationship(&three.far, "replica")?.unwrap_or_default();
        Ok((there["points"] == 4).then_some(()))
    })
    .unwrap();

    // One log: its records travel as they are.
    three.world.burst(3, 1);
    three.world.branch.ok(&["sync", VM]).unwrap();
    let sent = relationship(&three.world.branch, "primary").unwrap().unwrap()["last_cycle"].clone();
    three.pass_on();
    let passed = three.extension()["last_cycle"].clone();
    for key in ["logs", "log_bytes", "data_bytes", "zero_bytes", "moment", "point"] {
        assert_eq!(sent[key], passed[key], "{key}: {sent} {passed}");
    }

    // Several: what is overwritten meanwhile does not travel a second time.
    let from = three.world.quiet();
    let mut bytes = 0;
    for seed in 2..6 {
        three.world.burst(2, seed);
        three.world.branch.ok(&["sync", VM]).unwrap();
        bytes += number(
            &relationship(&three.world.branch, "primary").unwrap().unwrap()["last_cycle"]["data_bytes"],
        );
    }
    assert!(
        number(
            &three.extended("to see what is pending", |vm| vm["pending_bytes"].as_u64() > Some(0))["pending_bytes"]
        ) > 0
    );
    three.pass_on();
    let merged = number(&three.extension()["last_cycle"]["data_bytes"]);
    assert!(bytes >= 8 * MIB && (2 * MIB..3 * MIB).contains(&merged), "{bytes} bytes became {merged}");
    three.same();
    assert_eq!(three.points_there().len(), 3, "the end of the pass, one log, and several as one");
    three.pass_on();
    assert_eq!(three.points_there().len(), 3, "there is nothing new");

    // Pausing is its own; so are its figures, and its end.
    three.world.head.ok(&["pause", VM]).unwrap();
    assert_eq!(three.extension()["paused"], true);
    assert_eq!(relationship(&three.world.branch, "primary").unwrap().unwrap()["paused"], false);
    three.world.head.ok(&["resume", VM]).unwrap();
    let measured = three.world.head.ok(&["measurements", VM]).unwrap()["measurements"].clone();
    let roles: Vec<&Value> = measured.as_array().unwrap().iter().map(|vm| &vm["role"]).collect();
    assert_eq!(roles, ["extension", "replica"]);
    let refused = three.world.head.run(&["unprotect", VM]).unwrap();
    assert_eq!(refused.code(), Some("exists"), "{refused:?}");
    three.world.head.ok(&["unextend", VM]).unwrap();
    assert_eq!(relationship(&three.far, "replica").unwrap().unwrap()["withdrawn"], true);
    assert_eq!(three.world.head.run(&["unextend", VM]).unwrap().code(), Some("no-such-vm"));

    // Once more, onto what is there: the chain there is not this one's, so both are compared.
    three.world.write(from, PAUSE);
    three.world.branch.ok(&["sync", VM]).unwrap();
    let before = three.line.bytes();
    three.extend(&[]);
    three.world.quiet();
    three.sync();
    three.same();
    let sent = three.line.bytes() - before;
    assert!(sent < 8 * MIB, "{sent} bytes: only what differs is sent");
    three.far.ok(&["verify"]).unwrap();
}

#[test]
fn each_site_dies_and_the_link_breaks_and_nothing_is_lost_or_compared() {
    let mut three = Three::new(902, "1s", "3");
    three.extend(&[]);
    for round in 0..3 {
        three.line.cut();
        three.first_hop_goes_on("the third site cannot be reached");
        three.extended("to say that the link is broken", |vm| !vm["error"].is_null());
        three.line.mend();
        three.pass_on();
        three.far.kill();
        three.first_hop_goes_on("the third site is dead");
        three.far.serve().unwrap();
        three.pass_on();
        // In the middle of whatever they are doing.
        std::thread::sleep(Duration::from_millis(130 * (round + 1)));
        three.world.head.kill();
        three.world.head.serve().unwrap();
        three.pass_on();
        three.world.branch.kill();
        three.world.branch.serve().unwrap();
        three.sync();
        assert!(!three.points_there().is_empty());
    }
    three.world.quiet();
    three.sync();
    three.same();
    assert_eq!(three.resyncs(), 0, "{}", three.world.head.log());
    let bytes =
        |site: &Site| -> u64 { number(&relationship(site, "replica").unwrap().unwrap()["log_bytes"]) };
    assert!(bytes(&three.world.head) < 64 * MIB, "nothing is kept for the third site any more");
}

#[test]
fn what_becomes_of_the_first_hop_the_extension_follows() {
    let mut three = Three::new(903, "15m", "0");
    three.extend(&[]);
    // Both sides of the first hop are compared: to the extension that is a log like others.
    three.world.burst(4, 7);
    three.world.branch.ok(&["resync", VM]).unwrap();
    three.sync();
    three.pass_on();
    assert_eq!(three.resyncs(), 0, "{}", three.world.head.log());
    // The replica's storage is moved.
    let elsewhere = three.world.dir.path().join("elsewhere");
    three.world.head.ok(&["migrate", VM, "--storage", path(&elsewhere)]).unwrap();
    three.sync();

    // The replica is lost in part: then the third site is compared too, and only what differs is sent.
    three.world.head.stop();
    let disk = three.world.head.dir().join(elsewhere).join(three.extension_id()).join("disks/system.raw");
    std::fs::remove_file(&disk).unwrap();
    three.world.head.serve().unwrap();
    let before = three.line.bytes();
    let from = three.world.quiet();
    wait_for("the first hop to be mended", LONG, || {
        Ok((three.world.branch.run(&["sync", VM])?.status == 0).then_some(()))
    })
    .unwrap();
    three.pass_on();
    three.same();
    assert!(three.resyncs() > 0, "{}", three.world.head.log());
    let sent = three.line.bytes() - before;
    assert!(sent < 8 * MIB, "{sent} bytes");
    three.world.write(from, PAUSE);

    // The third site is paused for so long that the logs are folded in: what changed is told more coarsely.
    three.world.head.ok(&["pause", VM]).unwrap();
    for seed in 0..4 {
        three.world.burst(60, 100 + seed);
        three.world.branch.ok(&["sync", VM]).unwrap();
    }
    wait_for("the logs to be folded in all the same", LONG, || {
        let replica = relationship(&three.world.head, "replica")?.unwrap_or_default();
        Ok((replica["log_bytes"].as_u64() < Some(200 * MIB)).then_some(()))
    })
    .unwrap();
    let compared = three.resyncs();
    three.world.head.ok(&["resume", VM]).unwrap();
    three.world.quiet();
    three.sync();
    three.same();
    assert_eq!(three.resyncs(), compared, "what changed could still be told: {}", three.world.head.log());
}

impl Three {
    fn extension_id(&self) -> String {
        // The second site is down: the third one knows it too.
        self.far.vm(VM).unwrap()["id"].as_str().unwrap().to_owned()
    }

    /// What the disks of a failover show.
    fn state(&self, images: &[(String, PathBuf)]) -> u64 {
        let flat: Vec<PathBuf> = images
            .iter()
            .map(|(name, image)| {
                let raw = self.world.dir.path().join(format!("{name}.flat"));
                let mut convert = Command::new("qemu-img");
                tool(convert.args(["convert", "-U", "-f", "qcow2", "-O", "raw"]).arg(image).arg(&raw))
                    .unwrap();
                raw
            })
            .collect();
        state_of_files(&self.world.script, u64::MAX, &flat).unwrap_or_else(|violation| panic!("{violation}"))
    }
}

/// The disks of a failover, in the order of the VM's.
fn disks(answer: &Value) -> Vec<(String, PathBuf)> {
    let found = answer["disks"].as_array().unwrap_or_else(|| panic!("{answer}"));
    let path_of = |name: &str| {
        let disk = found.iter().find(|disk| disk["name"] == name).unwrap();
        Path::new(disk["path"].as_str().unwrap()).to_owned()
    };
    DISKS.iter().map(|(name, _)| ((*name).to_owned(), path_of(name))).collect()
}

#[test]
fn the_third_site_backs_up_and_takes_over() {
    let mut three = Three::new(904, "1s", "3");
    three.extend(&[]);
    let backup = three.far.ok(&["backup", VM]).unwrap();
    let to = three.world.dir.path().join("restored");
    let id = backup["backup"].as_str().unwrap();
    three.far.ok(&["restore", VM, "--backup", id, "--to", path(&to)]).unwrap();
    let images: Vec<PathBuf> = DISKS.iter().map(|(name, _)| to.join(format!("{name}.raw"))).collect();
    three.world.state(&images);

    // A failover there, taken back: the extension waits, and the first hop does not.
    let from = three.world.quiet();
    three.sync();
    let answer = three.far.ok(&["failover", "unplanned", VM]).unwrap();
    assert_eq!(three.state(&disks(&answer)), three.state_of_vm(), "not one write is missing");
    three.world.write(from, PAUSE);
    three.extended("to be told of the failover", |vm| {
        vm["error"]["message"].as_str().is_some_and(|why| why.contains("failed over"))
    });
    three.first_hop_goes_on("the third site is failed over");
    three.far.ok(&["failover", "cancel", VM]).unwrap();
    three.pass_on();

    // And for good: what comes from here is not the VM any more.
    three.far.ok(&["failover", "unplanned", VM]).unwrap();
    three.far.ok(&["failover", "complete", VM]).unwrap();
    let told = three.extended("to be told that it is over", |vm| {
        vm["error"]["message"].as_str().is_some_and(|why| why.contains("for good"))
    });
    assert_eq!(told["health"], "critical", "{told}");
    three.first_hop_goes_on("the VM runs at the third site");
}

#[test]
fn after_a_failover_at_the_second_site_the_third_can_be_its_replica() {
    let mut three = Three::new(905, "1s", "0");
    three.extend(&[]);
    let written = three.world.quiet();
    three.sync();
    let answer = three.world.branch.ok(&["failover", "planned", VM]).unwrap();
    three.world.daemon.wait_for_end().unwrap();
    let told = three.extended("to be told that it is over", |vm| !vm["error"].is_null());
    let message = told["error"]["message"].as_str().unwrap();
    assert!(message.contains("reverse") && told["health"] == "critical", "{told}");

    // The VM runs at the second site, and is replicated to the third, which is compared.
    let images = disks(&answer);
    three.world.daemon = StorageDaemon::start_on(&three.world.dir.path().join("vm2"), &images).unwrap();
    three.world.write(written, PAUSE);
    let before = three.line.bytes();
    let (qmp, nbd) = (three.world.daemon.qmp(), three.world.daemon.nbd());
    let reverse =
        ["failover", "reverse", VM, "--qmp", path(&qmp), "--nbd", path(&nbd), "--to", "far", "--every", "1s"];
    three.world.head.ok(&reverse).unwrap();
    three
        .world
        .head
        .wait_vm(VM, "to replicate", LONG, |vm| vm["role"] == "primary" && vm["state"] == "replicating")
        .unwrap();
    assert!(relationship(&three.world.head, "extension").unwrap().is_none());
    three.world.quiet();
    three.world.head.ok(&["sync", VM]).unwrap();
    three.same();
    let sent = three.line.bytes() - before;
    assert!(sent < 24 * MIB, "{sent} bytes: only what differs is sent");
    assert!(!three.points_there().is_empty());
}
