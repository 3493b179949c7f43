//! What a peer may do at a site, by its entry there: which VMs, into which folder, how much, and whose.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use common::{LONG, MIB, VM, World, client, path, protect_arguments};
use rig::{Output, Site, wait_for};
use serde_json::Value;

const QUICK: Duration = Duration::from_millis(2);

fn message(output: &Output) -> &str {
    output.json["error"]["message"].as_str().unwrap_or_default()
}

fn is_noted(site: &Site, kind: &str) -> bool {
    let events = site.ok(&["events", "--count", "500"]).unwrap();
    events["events"].as_array().unwrap().iter().any(|event| event["kind"] == kind)
}

/// A backup of the newest point shows a state that the VM was in.
fn is_whole(world: &World) -> u64 {
    let backup = world.head.ok(&["backup", VM]).unwrap();
    world.state(&world.restore(backup["backup"].as_str().unwrap()))
}

#[test]
fn a_peer_keeps_to_its_vms_its_folder_and_its_quota() {
    let mut world = World::new(81);
    let storage = world.dir.path().join("depot/of-branch");
    // What a new peer may: everything, as ever.
    let before = world.head.ok(&["peer", "show", "branch"]).unwrap();
    assert_eq!((&before["vms"], &before["quota_bytes"]), (&Value::from("*"), &Value::Null));
    let allow =
        ["peer", "allow", "branch", "--vms", "db-*,w?b", "--storage", path(&storage), "--quota", "24M"];
    let allowed = world.head.ok(&allow).unwrap();
    assert_eq!(allowed["quota_bytes"], 24 * MIB);
    assert_eq!(world.head.ok(&["peer", "list"]).unwrap()["peers"][0]["vms"], "db-*,w?b");
    let mode = |path: &std::path::Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(storage.parent().unwrap()), mode(&storage)), (0o700, 0o700));

    // More than the quota: the log is refused as it streams in, by VM, peer and figures; what had come of it goes.
    world.write(1, QUICK);
    world.burst(64, 1);
    world.protect("1s", &[]);
    let refused = world.branch.wait_vm(VM, "the quota", LONG, |vm| !vm["error"].is_null()).unwrap();
    let why = refused["error"]["message"].as_str().unwrap();
    for part in ["VM web", "branch", "24 MiB", "--quota", "Nothing is lost"] {
        assert!(why.contains(part), "{part}: {why}");
    }
    assert_eq!(refused["error"]["transient"], true);
    assert!(is_noted(&world.head, "quota"));
    let shown = world.head.ok(&["peer", "show", "branch"]).unwrap();
    assert!(shown["used_bytes"].as_u64().unwrap() <= 24 * MIB, "{shown}");
    assert_eq!(shown["replicas"], serde_json::json!([VM]));

    // Raised, it goes on by itself.
    world.head.ok(&["peer", "allow", "branch", "--quota", "2G"]).unwrap();
    world.replicating();
    let replica = world.head.vm(VM).unwrap();
    assert!(replica["storage"].as_str().unwrap().starts_with(path(&storage)), "{replica}");
    assert_eq!(mode(std::path::Path::new(replica["storage"].as_str().unwrap())), 0o700);
    world.branch.ok(&["sync", VM]).unwrap();
    let shown = world.head.ok(&["peer", "show", "branch"]).unwrap();
    let [used, left] = ["used_bytes", "left_bytes"].map(|key| shown[key].as_u64().unwrap());
    assert!(used > 64 * MIB && used + left == 2 << 30, "{shown}");
    is_whole(&world);

    // Narrowed, the VM that is here is refused too, and what is here stays; widened, it goes on where it was.
    world.head.ok(&["peer", "allow", "branch", "--vms", "db-*"]).unwrap();
    let denied = |vm: &Value| vm["error"]["code"] == "not-authorized";
    let denied = world.branch.wait_vm(VM, "to be forbidden", LONG, denied).unwrap();
    assert!(denied["error"]["message"].as_str().unwrap().contains("peer allow branch"), "{denied}");
    let received = world.head.vm(VM).unwrap()["received"].clone();
    world
        .head
        .ok(&["peer", "allow", "branch", "--vms", "*", "--storage", "default", "--quota", "none"])
        .unwrap();
    assert_eq!(world.head.vm(VM).unwrap()["received"], received);
    world.branch.ok(&["resume", VM]).unwrap();
    world.branch.ok(&["sync", VM]).unwrap();
    is_whole(&world);
}

#[test]
fn an_entry_outlives_its_site_and_what_cannot_be_meant_is_refused() {
    let dir = tempfile::Builder::new().prefix("ai").tempdir().unwrap();
    let [mut head, mut branch] = ["head", "branch"].map(|name| Site::init(dir.path(), name).unwrap());
    head.serve().unwrap();
    branch.serve().unwrap();
    let invite = head.ok(&["peer", "invite", "branch", "--quota", "1G", "--group", "shops"]).unwrap();
    branch.ok(&["peer", "accept", invite["invite"].as_str().unwrap(), "--vms", "lab-*"]).unwrap();
    assert_eq!(branch.ok(&["peer", "show", "head"]).unwrap()["vms"], "lab-*");
    head.ok(&["peer", "allow", "branch", "--bandwidth", "2M"]).unwrap();
    head.kill();
    head.serve().unwrap();
    let shown = head.ok(&["peer", "show", "branch"]).unwrap();
    assert_eq!(shown["bandwidth_bytes_per_s"], 2_000_000);
    assert_eq!((&shown["quota_bytes"], &shown["group"]), (&Value::from(1_u64 << 30), &Value::from("shops")));

    let file = dir.path().join("file");
    std::fs::write(&file, "mine").unwrap();
    for (arguments, status, word) in [
        (&["peer", "allow", "branch"][..], 64, "--vms"),
        (&["peer", "allow", "nobody", "--quota", "1G"], 1, "nobody"),
        (&["peer", "allow", "branch", "--vms", "a/b"], 64, "fits no VM"),
        (&["peer", "allow", "branch", "--quota", "0"], 64, "size"),
        (&["peer", "allow", "branch", "--group", "../x"], 64, "group name"),
        (&["peer", "allow", "branch", "--storage", path(&file)], 1, "file"),
        (&["peer", "show", "nobody"], 1, "nobody"),
    ] {
        let output = head.run(arguments).unwrap();
        assert!(output.status == status && message(&output).contains(word), "{arguments:?}: {output:?}");
    }
    let after = head.ok(&["peer", "show", "branch"]).unwrap();
    assert_eq!(after, shown, "what was refused has changed nothing");
}

#[test]
fn a_folder_that_is_gone_is_not_made_again_beside_its_mount_point() {
    let world = World::new(82);
    let storage = world.dir.path().join("mounted");
    world.head.ok(&["peer", "allow", "branch", "--storage", path(&storage)]).unwrap();
    std::fs::remove_dir(&storage).unwrap();
    world.protect("1s", &[]);
    let refused = world.branch.wait_vm(VM, "the folder", LONG, |vm| !vm["error"].is_null()).unwrap();
    let why = refused["error"]["message"].as_str().unwrap();
    assert!(why.contains("mounted") && why.contains("--storage"), "{why}");
    assert!(!storage.exists());
    std::fs::create_dir(&storage).unwrap();
    world.replicating();
}

#[test]
fn logs_are_taken_no_faster_than_the_entry_says() {
    let mut world = World::new(83);
    world.write(1, QUICK);
    world.protect("1s", &[]);
    world.replicating();
    world.head.ok(&["peer", "allow", "branch", "--bandwidth", "4M"]).unwrap();
    world.burst(12, 7);
    let started = Instant::now();
    world.branch.ok(&["sync", VM]).unwrap();
    let took = started.elapsed();
    assert!(took > Duration::from_secs(2), "12 MiB at 4 MB/s took {took:?}");
    world.head.ok(&["peer", "allow", "branch", "--bandwidth", "none"]).unwrap();
    world.branch.ok(&["sync", VM]).unwrap();
    is_whole(&world);
}

#[test]
fn a_vm_that_was_moved_is_taken_over_within_its_trust_group_and_by_nobody_else() {
    let mut world = World::new(84);
    let mut depot = Site::init(world.dir.path(), "depot").unwrap();
    depot.configure(&[("interval-min-s = 5", "interval-min-s = 1")]).unwrap();
    depot.serve().unwrap();
    world.head.invite(&depot).unwrap();
    world.write(1, QUICK);
    world.burst(64, 1);
    world.protect("1s", &["--points", "3"]);
    world.replicating();
    world.branch.ok(&["sync", VM]).unwrap();
    let before = world.head.vm(VM).unwrap();
    let point = world.points().last().unwrap()["id"].clone();
    world.branch.stop();

    let take_over = protect_arguments(&world.daemon, "1s", &["--points", "3", "--take-over"]);
    let take_over: Vec<&str> = take_over.iter().map(String::as_str).collect();
    let refused = |arguments: &[&str]| {
        let output = depot.run(arguments).unwrap();
        assert_ne!(output.status, 0, "{output:?}");
        message(&output).to_owned()
    };
    // In no group, in two, and a VM that is not there.
    assert!(refused(&take_over).contains("trust group"), "{}", refused(&take_over));
    world.head.ok(&["peer", "allow", "branch", "--group", "shops"]).unwrap();
    assert!(refused(&take_over).contains("trust group"));
    world.head.ok(&["peer", "allow", "depot", "--group", "depots"]).unwrap();
    assert!(refused(&take_over).contains("trust group"));
    let other = take_over.iter().map(|word| if *word == VM { "mail" } else { word }).collect::<Vec<_>>();
    assert!(refused(&other).contains("no replica of a VM named mail"));
    assert_eq!(world.head.vm(VM).unwrap()["peer"], "branch");

    // In one: the relationship goes on from the other host, with all its points, and only differences travel.
    world.head.ok(&["peer", "allow", "depot", "--group", "shops"]).unwrap();
    let sent_before = world.line.bytes();
    depot.ok(&take_over).unwrap();
    depot.wait_vm(VM, "to replicate", LONG, |vm| vm["state"] == "replicating").unwrap();
    let after = world.head.vm(VM).unwrap();
    assert_eq!((&after["id"], &after["peer"]), (&before["id"], &Value::from("depot")));
    assert!(world.points().iter().any(|kept| kept["id"] == point), "no point was lost");
    let sent = world.line.bytes() - sent_before;
    assert!(sent < 40 * MIB, "{sent} bytes: the 64 MiB that are there already need not travel");
    assert!(is_noted(&world.head, "taken-over"));
    depot.ok(&["sync", VM]).unwrap();
    is_whole(&world);

    // Who had it before may do nothing to it any more.
    world.branch.serve().unwrap();
    let theirs = client(&world.branch);
    let vm = after["id"].as_str().unwrap().parse().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let refused = runtime.block_on(theirs.withdraw(vm)).unwrap_err();
    assert!(refused.has_code("forbidden"), "{refused}");
    let seen = wait_for("the next cycle from depot", LONG, || {
        Ok(Some(world.head.vm(VM)?).filter(|vm| vm["received"].as_u64() > after["received"].as_u64()))
    });
    assert_eq!(seen.unwrap()["withdrawn"], false);
}
