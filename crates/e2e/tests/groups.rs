//! A group of VMs: fixed at one moment again and again while a writer writes the same count to one after the other, failed
//! over together, started in their order. Each VM is QEMU's block layer.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::{LONG, MIB, path, sites};
use rig::{Line, Output, Site, StorageDaemon, need, tool, wait_for};
use serde_json::Value;
use tempfile::TempDir;

/// The VMs, in the order in which they are written to and started.
const VMS: [&str; 3] = ["db", "web", "app"];
const DISK: &str = "system";

struct World {
    daemons: Vec<StorageDaemon>,
    branch: Site,
    head: Site,
    _line: Line,
    dir: TempDir,
}

impl World {
    /// Three VMs that are replicated, each by itself.
    fn new() -> Self {
        need("qemu-img", "qemu-utils").unwrap();
        let dir = tempfile::Builder::new().prefix("ai").tempdir().unwrap();
        let start = |vm: &&str| StorageDaemon::start(&dir.path().join(vm), &[(DISK, 4 * MIB)]).unwrap();
        let daemons: Vec<StorageDaemon> = VMS.iter().map(start).collect();
        let (head, branch, line) = sites(dir.path(), None);
        for (vm, daemon) in VMS.iter().zip(&daemons) {
            let (qmp, nbd) = (daemon.qmp(), daemon.nbd());
            let to = ["--to", "head", "--every", "2s", "--points", "2"];
            branch
                .ok(&[&["protect", vm, "--qmp", path(&qmp), "--nbd", path(&nbd)], &to[..]].concat())
                .unwrap();
        }
        for vm in VMS {
            branch.wait_vm(vm, "to replicate", LONG, |vm| vm["state"] == "replicating").unwrap();
        }
        Self { daemons, branch, head, _line: line, dir }
    }

    fn group(&self) -> Value {
        self.branch.ok(&["group", "create", "shop", "db", "web:1s", "app:1"]).unwrap()
    }

    /// Fixes moments until one has all VMs: one that is just busy is not waited for.
    fn whole_moment(&self) -> Value {
        wait_for("a moment of all VMs", LONG, || {
            let moment = self.branch.ok(&["sync", "--group", "shop"])?;
            Ok((moment["complete"] == true).then_some(moment))
        })
        .unwrap()
    }

    /// The moments at the replicas' site, oldest first.
    fn moments(&self) -> Vec<Value> {
        self.head.ok(&["points", "--group", "shop"]).unwrap()["moments"].as_array().unwrap().clone()
    }

    /// The counts that the points of a moment show; `None` if one was dropped meanwhile.
    fn counts(&self, moment: &Value) -> Option<[u64; 3]> {
        let mut counts = [0; 3];
        for member in moment["members"].as_array().unwrap() {
            let (vm, point) = (member["vm"].as_str().unwrap(), member["point"].as_str().unwrap());
            let shown = self.head.run(&["export", vm, "--point", point]).unwrap();
            if shown.code() == Some("no-such-point") {
                return None;
            }
            assert_eq!(shown.status, 0, "{shown:?}");
            let uri = shown.json["disks"][0]["uri"].as_str().unwrap();
            counts[place(vm)] = self.count("raw", uri);
            self.head.ok(&["unexport", shown.json["export"].as_str().unwrap()]).unwrap();
        }
        Some(counts)
    }

    /// The count on a disk.
    fn count(&self, format: &str, image: &str) -> u64 {
        let flat = self.dir.path().join("flat");
        let mut convert = Command::new("qemu-img");
        tool(convert.args(["convert", "-U", "-f", format, "-O", "raw", image]).arg(&flat)).unwrap();
        let bytes = std::fs::read(&flat).unwrap();
        u64::from_le_bytes(bytes[..8].try_into().unwrap())
    }

    /// The counts on the disks that a failover gives.
    fn counts_of(&self, members: &Value) -> [u64; 3] {
        let mut counts = [0; 3];
        for member in members.as_array().unwrap() {
            let disk = member["disks"][0]["path"].as_str().unwrap();
            counts[place(member["vm"].as_str().unwrap())] = self.count("qcow2", disk);
        }
        counts
    }
}

fn place(vm: &str) -> usize {
    VMS.iter().position(|name| *name == vm).unwrap()
}

/// Writes a count to the first VM, then to the second, then to the third, each flushed before the next; then the next count.
struct Counter {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<[(Instant, Instant); 3]>>,
}

impl Counter {
    fn start(daemons: &[StorageDaemon]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, sockets) = (stop.clone(), daemons.iter().map(StorageDaemon::nbd).collect::<Vec<_>>());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(count(&sockets, &stopped))
        });
        Self { stop, thread }
    }

    /// When each count was begun and done on each VM; that of count 1 first.
    fn stop(self) -> Vec<[(Instant, Instant); 3]> {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap()
    }
}

/// Until it is stopped, or a VM does not take it any more.
async fn count(sockets: &[PathBuf], stopped: &AtomicBool) -> Vec<[(Instant, Instant); 3]> {
    let mut disks = Vec::new();
    for socket in sockets {
        disks.push(nbd::Client::connect(socket, DISK, &[]).await.unwrap());
    }
    let mut written = Vec::new();
    for count in 1_u64.. {
        let now = Instant::now();
        let mut times = [(now, now); 3];
        for (disk, times) in disks.iter().zip(&mut times) {
            times.0 = Instant::now();
            let done = async {
                disk.write(0, &[count.to_le_bytes(), [0; 8]].concat()).await?;
                disk.flush().await
            };
            if done.await.is_err() {
                return written;
            }
            times.1 = Instant::now();
        }
        written.push(times);
        if stopped.load(Ordering::SeqCst) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    written
}

/// Whatever one VM has and another has not, was written within the skew: of any two VMs, the first one's next count was not
/// done earlier before the second one's was begun.
fn check_order(counts: [u64; 3], skew: Duration, written: &[[(Instant, Instant); 3]]) {
    for (one, other) in [(0, 1), (0, 2), (1, 2), (1, 0), (2, 0), (2, 1)] {
        let (next, has) = (counts[one] as usize, counts[other] as usize);
        let (Some(missed), Some(seen)) =
            (written.get(next), has.checked_sub(1).and_then(|at| written.get(at)))
        else {
            continue;
        };
        // What `one` has not yet was done then, and what `other` has already was begun then.
        let apart = seen[other].0.saturating_duration_since(missed[one].1);
        assert!(
            apart <= skew,
            "{counts:?}: {} and {} are {apart:?} apart, not {skew:?}",
            VMS[one],
            VMS[other]
        );
    }
}

fn skew(moment: &Value) -> Duration {
    Duration::from_secs_f64(moment["skew_ms"].as_f64().unwrap() / 1e3)
}

fn refused(output: &Output, code: &str, words: &str) {
    let message = output.json["error"]["message"].as_str().unwrap_or_default();
    assert!(output.code() == Some(code) && message.contains(words), "{code}, {words:?}: {output:?}");
}

#[test]
fn a_group_comes_to_one_moment_and_is_failed_over_to_it_in_its_order() {
    let mut world = World::new();
    let made = world.group();
    assert_eq!(
        (&made["interval_s"], &made["role"], &made["peer"]),
        (&2.into(), &"primary".into(), &"head".into())
    );
    refused(
        &world.branch.run(&["group", "create", "other", "web"]).unwrap(),
        "exists",
        "in group shop already",
    );
    refused(&world.branch.run(&["group", "create", "other", "nobody"]).unwrap(), "no-such-vm", "nobody");
    assert_eq!(world.branch.vm("web").unwrap()["group"], "shop");

    let counter = Counter::start(&world.daemons);
    let mut seen = Vec::new();
    for _ in 0..5 {
        let fixed = world.whole_moment();
        let shown = world.moments().into_iter().find(|shown| shown["id"] == fixed["id"]);
        // Retention may have dropped it by now.
        let Some(shown) = shown.filter(|shown| shown["complete"] == true) else { continue };
        assert_eq!((&shown["at"], &shown["skew_ms"]), (&fixed["at"], &fixed["skew_ms"]));
        if let Some(counts) = world.counts(&shown) {
            seen.push((counts, skew(&shown)));
        }
    }
    assert!(!seen.is_empty());
    same_moment_for_all(&world);

    // One is lost: the others go on without it, and say so.
    world.daemons[1].kill();
    wait_for("a moment without web", LONG, || {
        let moments = world.moments();
        let told = |moment: &&Value| {
            moment["missing"][0]["vm"] == "web" && moment["members"].as_array().unwrap().len() == 2
        };
        Ok(moments.iter().find(told).cloned())
    })
    .unwrap();
    let group = world.head.ok(&["group", "show", "shop"]).unwrap();
    assert_eq!(
        (&group["role"], &group["last"]["complete"], &group["last_complete"]["complete"]),
        (&"replica".into(), &false.into(), &true.into())
    );
    let written = counter.stop();
    for (counts, skew) in &seen {
        println!("{counts:?} within {skew:?}");
        check_order(*counts, *skew, &written);
    }
    let most = seen.iter().map(|(counts, _)| counts[0]).max().unwrap();
    assert!(most > 0 && (most as usize) <= written.len() + 1, "{most}");

    world.branch.kill();
    fail_over(&world);
}

/// Points of one moment say the same of when they were taken, and what they are.
fn same_moment_for_all(world: &World) {
    let by_moment = |vm: &str| -> BTreeMap<String, Value> {
        let points = world.head.ok(&["points", vm]).unwrap();
        let of_moment =
            points["points"].as_array().unwrap().iter().filter(|point| point["moment"].is_string());
        of_moment
            .map(|point| (point["moment"].as_str().unwrap().to_owned(), point["taken_at"].clone()))
            .collect()
    };
    let [db, web, app] = VMS.map(by_moment);
    let common: Vec<&String> =
        db.keys().filter(|id| web.contains_key(*id) && app.contains_key(*id)).collect();
    assert!(!common.is_empty(), "{db:?} {web:?} {app:?}");
    assert!(common.iter().all(|id| db[*id] == web[*id] && db[*id] == app[*id]));
}

/// The replicas' site alone: all to the newest moment that is complete, started in their order; back, and for good.
fn fail_over(world: &World) {
    let moments = world.moments();
    let incomplete = moments.iter().find(|moment| moment["complete"] == false).unwrap();
    let id = incomplete["id"].as_str().unwrap();
    let refusal = world.head.run(&["failover", "unplanned", "--group", "shop", "--point", id]).unwrap();
    refused(&refusal, "no-such-point", "web");
    assert_eq!(world.head.vm("db").unwrap()["state"], "replicating", "nothing was begun");

    let newest = moments.iter().rfind(|moment| moment["complete"] == true).unwrap();
    let counts = world.counts(newest).unwrap();
    let starts = world.dir.path().join("starts");
    let note = format!("date +%s%3N.$AFTERIMAGE_VM.$AFTERIMAGE_MOMENT >> {}", starts.display());
    let fails = format!("test $AFTERIMAGE_VM != web && {note}");
    let unplanned = ["failover", "unplanned", "--group", "shop", "--start-with"];
    let stopped = world.head.run(&[&unplanned[..], &[fails.as_str()]].concat()).unwrap();
    refused(&stopped, "failover", "web was not started");
    refused(&stopped, "failover", "not tried: app");
    assert_eq!(started(&starts).len(), 1, "only db was started");
    let answer = world.head.ok(&[&unplanned[..], &[note.as_str(), "--from", "web"]].concat()).unwrap();
    assert_eq!(answer["moment"], newest["id"]);
    let lines = started(&starts);
    let order: Vec<&str> = lines.iter().map(|line| line[1].as_str()).collect();
    assert_eq!(order, VMS);
    assert!(lines.iter().all(|line| newest["id"] == line[2]));
    let at = |place: usize| lines[place][0].parse::<u64>().unwrap();
    assert!(at(2) >= at(1) + 1000, "app is started no sooner than a second after web: {lines:?}");
    assert_eq!(world.counts_of(&answer["members"]), counts, "each is at the very same moment");
    assert_eq!(world.head.vm("app").unwrap()["state"], "failover");

    world.head.ok(&["failover", "cancel", "--group", "shop"]).unwrap();
    assert_eq!(world.head.vm("app").unwrap()["state"], "replicating");
    let early = world.head.run(&["failover", "complete", "--group", "shop"]).unwrap();
    refused(&early, "failover", "not failed over");
    let again = world.head.ok(&[
        "failover",
        "unplanned",
        "--group",
        "shop",
        "--point",
        newest["id"].as_str().unwrap(),
    ]);
    assert_eq!(world.counts_of(&again.unwrap()["members"]), counts);
    world.head.ok(&["failover", "complete", "--group", "shop"]).unwrap();
    for vm in VMS {
        wait_for("it to be no replica any more", LONG, || {
            Ok((world.head.run(&["status", vm])?.code() == Some("no-such-vm")).then_some(()))
        })
        .unwrap();
    }
}

/// What the starts have written down: when, which VM, of which moment.
fn started(file: &Path) -> Vec<Vec<String>> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines().map(|line| line.split('.').map(str::to_owned).collect()).collect()
}

#[test]
fn a_group_is_tried_backed_up_and_handed_over_with_everything() {
    let mut world = World::new();
    world.group();
    let counter = Counter::start(&world.daemons);
    world.whole_moment();
    let moment = world.whole_moment();

    let tests = world.head.ok(&["failover", "test", "--group", "shop", "--disks-only"]).unwrap();
    let open = tests["tests"].as_array().unwrap();
    let order: Vec<&str> = open.iter().map(|test| test["vm"].as_str().unwrap()).collect();
    assert_eq!(order, VMS);
    assert_eq!(open[0]["group"], "shop");
    world.head.ok(&["failover", "end-test", "--group", "shop"]).unwrap();
    assert_eq!(world.head.ok(&["failover", "tests"]).unwrap()["tests"], serde_json::json!([]));

    let backup = world.head.ok(&["backup", "--group", "shop"]).unwrap();
    let backups = backup["backups"].as_array().unwrap();
    assert!(
        backups.len() == 3 && backups.iter().all(|one| one["taken_at"] == backup["taken_at"]),
        "{backup}"
    );

    // A site that is started anew still knows its groups, and goes on.
    world.branch.stop();
    world.branch.serve().unwrap();
    let later = world.whole_moment();
    assert_ne!(later["id"], moment["id"]);

    counter.stop();
    let last = VMS.map(|vm| world.count("raw", &uri(&world.daemons[place(vm)])));
    let handed = world.branch.ok(&["failover", "planned", "--group", "shop"]).unwrap();
    assert_eq!(handed["site"], "head");
    let order: Vec<&str> =
        handed["members"].as_array().unwrap().iter().map(|m| m["vm"].as_str().unwrap()).collect();
    assert_eq!(order, VMS, "they are listed as they are to be started");
    assert_eq!(world.counts_of(&handed["members"]), last, "nothing is missing");
    for daemon in &mut world.daemons {
        daemon.wait_for_end().unwrap();
    }
}

#[test]
fn a_vm_that_is_not_protected_any_more_leaves_its_group() {
    let world = World::new();
    world.group();
    world.whole_moment();
    let left = world.branch.ok(&["unprotect", "app"]).unwrap();
    assert_eq!(left["left_group"]["members"], 2, "{left}");
    let moment = world.whole_moment();
    assert_eq!(moment["members"], serde_json::json!(["db", "web"]));
    wait_for("the replicas' site to know", LONG, || {
        let group = world.head.ok(&["group", "show", "shop"])?;
        Ok((group["members"].as_array().is_some_and(|members| members.len() == 2)).then_some(()))
    })
    .unwrap();
    world.branch.ok(&["group", "remove", "shop"]).unwrap();
    refused(&world.branch.run(&["sync", "--group", "shop"]).unwrap(), "no-such-group", "shop");
    world.branch.ok(&["sync", "db"]).unwrap();
    world.branch.ok(&["sync", "web"]).unwrap();
    assert_eq!(world.head.vm("db").unwrap()["group"], Value::Null);
    assert_eq!(world.head.ok(&["group", "list"]).unwrap()["groups"], serde_json::json!([]));
}

fn uri(daemon: &StorageDaemon) -> String {
    format!("nbd+unix:///{DISK}?socket={}", daemon.nbd().display())
}
