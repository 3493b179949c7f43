//! A VM changes its site, for a while or for good: planned, unplanned, completed, reversed, and back again. The VM is
//! QEMU's block layer with a writer; it really runs from the disks that a failover gives.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{DISKS, LONG, MIB, VM, path, protect_arguments, sites};
use rig::{Line, Site, StorageDaemon, Writer, state_of_exports, state_of_files, tool, wait_for};
use serde_json::Value;
use tempfile::TempDir;
use witness::{Region, Script};

const PAUSE: Duration = Duration::from_millis(3);

/// A VM at one of two sites, and its replica at the other.
struct World {
    daemon: StorageDaemon,
    writer: Option<Writer>,
    script: Arc<Script>,
    next: u64,
    /// Where the VM runs, and where its replica is.
    here: Site,
    there: Site,
    _line: Line,
    moves: usize,
    dir: TempDir,
}

impl World {
    fn new(seed: u64, points: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("ai").tempdir().unwrap();
        let daemon = StorageDaemon::start(&dir.path().join("vm"), &DISKS).unwrap();
        let regions = (0..DISKS.len()).map(|disk| Region { disk, offset: 4 * MIB, len: 8 * MIB });
        let script = Arc::new(Script::new(seed, regions.collect(), 5));
        let (there, here, line) = sites(dir.path(), None);
        let arguments = protect_arguments(&daemon, "1s", &["--points", points]);
        here.ok(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
        let mut world =
            Self { daemon, writer: None, script, next: 1, here, there, _line: line, moves: 0, dir };
        world.write();
        world.replicating();
        world
    }

    fn write(&mut self) {
        self.writer = Some(Writer::start(&self.daemon, self.script.clone(), self.next, PAUSE).unwrap());
    }

    /// Stops writing; the state that the VM's disks show then.
    fn quiet(&mut self) -> u64 {
        if let Some(writer) = self.writer.take() {
            self.next = writer.stop();
        }
        let socket = self.daemon.nbd();
        let uris = DISKS.map(|(name, _)| format!("nbd+unix:///{name}?socket={}", socket.display()));
        let state = state_of_exports(&self.script, u64::MAX, &uris.each_ref().map(String::as_str));
        state.unwrap_or_else(|violation| panic!("{violation}"))
    }

    fn replicating(&self) {
        self.here
            .wait_vm(VM, "to replicate", LONG, |vm| vm["role"] == "primary" && vm["state"] == "replicating")
            .unwrap();
    }

    /// The VM is started at the other site, from the disks of a failover there, and both sites change their parts.
    fn start_there(&mut self, disks: &[(String, PathBuf)]) {
        self.moves += 1;
        let dir = self.dir.path().join(format!("vm{}", self.moves));
        self.daemon = StorageDaemon::start_on(&dir, disks).unwrap();
        std::mem::swap(&mut self.here, &mut self.there);
    }

    fn reverse(&self) {
        let (qmp, nbd) = (self.daemon.qmp(), self.daemon.nbd());
        self.here
            .ok(&["failover", "reverse", VM, "--qmp", path(&qmp), "--nbd", path(&nbd), "--every", "1s"])
            .unwrap();
        self.replicating();
    }

    /// What images of the VM's disks show.
    fn state(&self, images: &[(String, PathBuf)]) -> u64 {
        let flat = self.dir.path().join("flat");
        std::fs::create_dir_all(&flat).unwrap();
        let flat: Vec<PathBuf> = images
            .iter()
            .map(|(name, image)| {
                let raw = flat.join(format!("{name}.raw"));
                let mut convert = Command::new("qemu-img");
                tool(convert.args(["convert", "-U", "-f", "qcow2", "-O", "raw"]).arg(image).arg(&raw))
                    .unwrap();
                raw
            })
            .collect();
        state_of_files(&self.script, u64::MAX, &flat).unwrap_or_else(|violation| panic!("{violation}"))
    }

    /// The replica's newest point is the VM's disks, byte for byte.
    fn same_on_both_sides(&self) {
        self.here.ok(&["sync", VM]).unwrap();
        let shown = self.there.ok(&["export", VM]).unwrap();
        for disk in shown["disks"].as_array().unwrap() {
            // Over NBD on both sides: a qcow2 file that QEMU has open says nothing to others.
            let name = disk["name"].as_str().unwrap();
            let runs = format!("nbd+unix:///{name}?socket={}", self.daemon.nbd().display());
            let mut compare = Command::new("qemu-img");
            compare.args(["compare", "-f", "raw", "-F", "raw", &runs, disk["uri"].as_str().unwrap()]);
            tool(&mut compare).unwrap_or_else(|trouble| panic!("disk {name}: {trouble}"));
        }
        self.there.ok(&["unexport", shown["export"].as_str().unwrap()]).unwrap();
    }
}

/// The disks of a failover, in the order of the VM's.
fn disks(answer: &Value) -> Vec<(String, PathBuf)> {
    let found = answer["disks"].as_array().unwrap();
    let path_of = |name: &str| {
        let disk = found.iter().find(|disk| disk["name"] == name).unwrap_or_else(|| panic!("{answer}"));
        PathBuf::from(disk["path"].as_str().unwrap())
    };
    DISKS.iter().map(|(name, _)| ((*name).to_owned(), path_of(name))).collect()
}

#[test]
fn a_vm_moves_to_the_other_site_and_back_three_times_and_nothing_is_lost() {
    let mut world = World::new(401, "0");
    for trip in 1..=6 {
        let written = world.quiet();
        let answer = world.here.ok(&["failover", "planned", VM]).unwrap();
        world.daemon.wait_for_end().unwrap();
        let images = disks(&answer);
        assert_eq!(world.state(&images), written, "trip {trip}: not one write is missing");
        let old = world.here.vm(VM).unwrap();
        assert_eq!(old["state"], "failed-over", "{old}");
        assert_eq!(world.here.run(&["sync", VM]).unwrap().status, 1, "nothing is sent from there any more");
        world.start_there(&images);
        world.write();
        world.reverse();
        let replica = world.there.vm(VM).unwrap();
        assert_eq!(replica["role"], "replica", "{replica}");
        world.quiet();
        world.same_on_both_sides();
        world.write();
    }
}

#[test]
fn a_vm_that_runs_is_not_handed_over() {
    let mut world = World::new(402, "0");
    let last = world.quiet();
    // QEMU's block layer alone has no processors; one that has is in `guests.rs`. Here: the replica's site is away.
    world.there.stop();
    let refused = world.here.run(&["failover", "planned", VM]).unwrap();
    assert_eq!(refused.status, 75, "{refused:?}");
    assert_ne!(world.here.vm(VM).unwrap()["state"], "failed-over");
    world.there.serve().unwrap();
    let answer = world.here.ok(&["failover", "planned", VM]).unwrap();
    assert_eq!(world.state(&disks(&answer)), last);
    let again = world.here.ok(&["failover", "planned", VM]).unwrap();
    assert_eq!(again["site"], "head", "asked again, it is the same: {again}");
}

#[test]
fn an_unplanned_failover_can_be_taken_back_until_it_is_completed() {
    let mut world = World::new(403, "4");
    wait_for("some points", LONG, || {
        Ok((world.there.ok(&["points", VM])?["points"].as_array().is_some_and(|points| points.len() >= 5))
            .then_some(()))
    })
    .unwrap();
    // The primary's site is lost.
    world.here.kill();
    let last = world.quiet();
    world.daemon.kill();
    let points = world.there.ok(&["points", VM]).unwrap()["points"].as_array().unwrap().clone();
    let newest = world.there.ok(&["failover", "unplanned", VM]).unwrap();
    let state = world.state(&disks(&newest));
    assert!(state <= last);
    // It is no good: another one is taken, and nothing of the points was lost by trying.
    world.there.ok(&["failover", "cancel", VM]).unwrap();
    assert_eq!(world.there.ok(&["points", VM]).unwrap()["points"].as_array().unwrap(), &points);
    let oldest = points.iter().min_by_key(|point| point["number"].as_u64()).unwrap();
    let begun = Instant::now();
    let older =
        world.there.ok(&["failover", "unplanned", VM, "--point", oldest["id"].as_str().unwrap()]).unwrap();
    println!("failed over in {:.0} ms", begun.elapsed().as_secs_f64() * 1e3);
    let images = disks(&older);
    assert!(world.state(&images) <= state);
    let busy = world.there.run(&["unprotect", VM]).unwrap();
    assert_ne!(busy.status, 0, "a VM runs from it: {busy:?}");

    // It runs while its site is started anew, and while the failover is completed.
    let found = world.state(&images);
    world.next = found + 1;
    world.start_there(&images);
    world.here.stop();
    world.here.serve().unwrap();
    world.write();
    let qmp = world.daemon.second_qmp();
    let done = world.here.ok(&["failover", "complete", VM, "--qmp", path(&qmp)]).unwrap();
    assert_eq!(done["released"], true, "{done}");
    assert_eq!(world.here.run(&["failover", "cancel", VM]).unwrap().code(), Some("no-such-vm"));
    assert!(!uses_nbd(&qmp), "the VM reads flat files now");
    world.here.kill();
    std::thread::sleep(Duration::from_millis(300));
    let written = world.quiet();
    // Ended as a VM is: what a qcow2 file has not been told yet goes with a QEMU that is killed.
    quit(&world.daemon.second_qmp());
    world.daemon.wait_for_end().unwrap();
    assert_eq!(world.state(&images), written, "it needs nothing of ours to run");

    // The old primary comes back, and is turned away; its site becomes the replica's.
    world.here.serve().unwrap();
    world.daemon = StorageDaemon::start_on(&world.dir.path().join("again"), &images).unwrap();
    let mut old = StorageDaemon::start(&world.dir.path().join("vm"), &DISKS).unwrap();
    world.there.serve().unwrap();
    world
        .there
        .wait_vm(VM, "to be told", LONG, |vm| {
            vm["error"]["message"].as_str().is_some_and(|why| why.contains("failed over"))
        })
        .unwrap();
    let (qmp, nbd) = (world.daemon.qmp(), world.daemon.nbd());
    world
        .here
        .ok(&["failover", "reverse", VM, "--qmp", path(&qmp), "--nbd", path(&nbd), "--every", "1s"])
        .unwrap();
    world
        .here
        .wait_vm(VM, "to be told that it runs twice", LONG, |vm| {
            vm["error"]["message"].as_str().is_some_and(|why| why.contains("still runs"))
        })
        .unwrap();
    old.kill();
    world.replicating();
    world.same_on_both_sides();
}

fn quit(socket: &Path) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let qmp = qemu::Qmp::connect(socket, Duration::from_secs(10)).await.unwrap();
        let _ = qmp.run(qemu::Command::bare("quit")).await;
    });
}

/// Whether a QEMU reads anything over NBD.
fn uses_nbd(socket: &Path) -> bool {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let qmp = qemu::Qmp::connect(socket, Duration::from_secs(10)).await.unwrap();
        let nodes = qmp.run(qemu::Command::bare("query-named-block-nodes")).await.unwrap();
        nodes.as_array().unwrap().iter().any(|node| node["drv"] == "nbd")
    })
}

#[test]
fn test_failovers_run_beside_replication_and_leave_nothing() {
    let mut world = World::new(405, "4");
    world.there.stop();
    world.there.configure(&[("# accelerator = \"tcg\"", "accelerator = \"tcg\"")]).unwrap();
    world.there.serve().unwrap();
    rig::write(&world.daemon, DISKS[0].0, 0, &rig::boot_sector("a guest")).unwrap();
    world.here.ok(&["sync", VM]).unwrap();
    let points = world.there.ok(&["points", VM]).unwrap()["points"].as_array().unwrap().clone();
    let oldest = points[0]["id"].as_str().unwrap();

    let first = world.there.ok(&["failover", "test", VM, "--point", oldest, "--disks-only"]).unwrap();
    let second = world.there.ok(&["failover", "test", VM]).unwrap();
    assert_eq!(
        (&first["running"], &second["running"]),
        (&Value::Bool(false), &Value::Bool(true)),
        "{second}"
    );
    assert!(Path::new(second["vnc"].as_str().unwrap()).exists(), "its screen can be looked at: {second}");
    // What is written in one is seen neither by the other nor by the replica.
    for disk in first["disks"].as_array().unwrap() {
        tool(Command::new("qemu-io").args([
            "-f",
            "raw",
            "-c",
            "write -P 7 4M 8M",
            disk["uri"].as_str().unwrap(),
        ]))
        .unwrap();
    }
    assert_eq!(world.there.ok(&["failover", "tests", VM]).unwrap()["tests"].as_array().unwrap().len(), 2);
    assert_eq!(world.here.ok(&["sync", VM]).unwrap()["state"], "replicating", "replication goes on");
    assert_eq!(world.there.ok(&["backup", VM, "--no-retry"]).unwrap()["attempts"], serde_json::json!([]));
    world.quiet();
    world.same_on_both_sides();
    world.there.ok(&["failover", "end-test", first["test"].as_str().unwrap()]).unwrap();
    assert_eq!(world.there.run(&["failover", "end-test", "nothing"]).unwrap().code(), Some("no-such-export"));

    // A site that is killed leaves a QEMU behind: its next start ends it.
    let folder = world.there.dir().join("run/tests").join(second["test"].as_str().unwrap());
    let pid = std::fs::read_to_string(folder.join("pid")).unwrap();
    let process = PathBuf::from(format!("/proc/{}", pid.trim()));
    assert!(process.exists());
    world.there.kill();
    world.there.serve().unwrap();
    wait_for("the QEMU that was left to end", LONG, || Ok(has_ended(&process).then_some(()))).unwrap();
    assert!(
        !folder.exists() && world.there.ok(&["failover", "tests"]).unwrap()["tests"] == serde_json::json!([])
    );
    assert_eq!(world.there.vm(VM).unwrap()["views"], 0, "nothing is pinned any more");
}

/// Whether a process is gone, or waits for nothing but to be reaped.
fn has_ended(process: &Path) -> bool {
    std::fs::read_to_string(process.join("stat")).map_or(true, |stat| stat.contains(") Z "))
}
