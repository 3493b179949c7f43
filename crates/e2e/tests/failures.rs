//! What goes wrong in the field: lost links, full disks, killed QEMUs, strangers. Nothing is lost, nothing
//! is left behind, and everybody is told.

mod common;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::{DISKS, LONG, MIB, VM, World, in_qemu, path};
use rig::{Site, tool, wait_for};
use serde_json::{Value, json};

const QUICK: Duration = Duration::from_millis(2);
/// The VM's disks by name.
const NAMES: [&str; 2] = [DISKS[0].0, DISKS[1].0];

fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn a_cycle_that_fails_leaves_nothing_behind_and_its_changes_go_with_the_next() {
    let mut world = World::new(41);
    world.write(1, QUICK);
    world.protect("1s", &[]);
    world.replicating();
    world.line.cut();
    let failing = world.branch.wait_vm(VM, "to fail", LONG, |vm| !vm["error"].is_null()).unwrap();
    assert_eq!(failing["error"]["code"], "link", "{failing}");
    assert_eq!(failing["error"]["transient"], true);
    // With the site stopped, QEMU has one bitmap per disk of ours, to go on with, and nothing else.
    world.branch.stop();
    let left = in_qemu(&world.daemon.qmp(), &NAMES);
    assert!(left.iter().all(|item| item.starts_with("bitmap: ")) && left.len() == DISKS.len(), "{left:?}");
    assert_eq!(files(&world.branch.dir().join("scratch")), Vec::<String>::new());
    world.line.mend();
    world.branch.serve().unwrap();
    let status = world.branch.wait_vm(VM, "to go on", LONG, |vm| {
        vm["error"].is_null() && vm["lag_s"].as_f64().is_some_and(|lag| lag < 3.0)
    });
    assert_eq!(status.unwrap()["state"], "replicating", "no resynchronization was needed");
    let backup = world.head.ok(&["backup", VM]).unwrap();
    world.state(&world.restore(backup["backup"].as_str().unwrap()));
    world.branch.ok(&["unprotect", VM]).unwrap();
    world.branch.stop();
    assert_eq!(
        in_qemu(&world.daemon.qmp(), &NAMES),
        Vec::<String>::new(),
        "after unprotect nothing of ours is in QEMU"
    );
}

#[test]
fn a_qemu_that_was_restarted_is_compared_and_only_differences_travel() {
    let mut world = World::new(42);
    world.burst(256, 1);
    world.protect("1s", &[]);
    world.replicating();
    world.write(1, QUICK);
    world.branch.ok(&["sync", VM]).unwrap();
    let from = world.quiet();
    let crossed = world.line.bytes();
    world.daemon.kill();
    world.daemon.restart().unwrap();
    world.write(from, QUICK);
    let seen = world.branch.wait_vm(VM, "a resynchronization", LONG, |vm| {
        vm["state"].as_str().is_some_and(|state| state.starts_with("resync"))
    });
    seen.unwrap();
    world.replicating();
    world.branch.ok(&["sync", VM]).unwrap();
    let crossed = world.line.bytes() - crossed;
    assert!(crossed < 32 * MIB, "{crossed} bytes crossed the line to compare 256 MiB that are equal");
    let backup = world.head.ok(&["backup", VM]).unwrap();
    world.state(&world.restore(backup["backup"].as_str().unwrap()));
}

#[test]
fn a_disk_that_grows_is_resynchronized_and_backed_up_whole() {
    let mut world = World::new(43);
    world.write(1, QUICK);
    world.protect("1s", &[]);
    world.replicating();
    let grown = DISKS[0].1 + 16 * MIB;
    // Between two cycles; while a moment is fixed QEMU refuses, and it is tried again.
    world.branch.stop();
    tool(Command::new("truncate").args(["-s", &grown.to_string()]).arg(world.daemon.disk(DISKS[0].0)))
        .unwrap();
    let from = world.quiet();
    world.daemon.restart().unwrap();
    world.write(from, QUICK);
    world.branch.serve().unwrap();
    let is_grown = |disk: &Value| disk["name"] == DISKS[0].0 && disk["size_bytes"] == json!(grown);
    let status = world.branch.wait_vm(VM, "the new size", LONG, |vm| {
        vm["state"] == "replicating" && vm["disks"].as_array().is_some_and(|disks| disks.iter().any(is_grown))
    });
    status.unwrap();
    let backup = world.head.ok(&["backup", VM]).unwrap();
    let images = world.restore(backup["backup"].as_str().unwrap());
    assert_eq!(images[0].metadata().unwrap().len(), grown);
    world.state(&images);
}

#[test]
fn a_replica_without_space_refuses_logs_and_goes_on_when_there_is_room() {
    let mount = tempfile::Builder::new().prefix("small").tempdir().unwrap();
    tool(Command::new("mount").args(["-t", "tmpfs", "-o", "size=160m", "tmpfs"]).arg(mount.path()))
        .expect("this test mounts a small file system: run it as root");
    let mut world = World::with_head_in(44, Some(mount.path()));
    world.write(1, QUICK);
    world.protect("1s", &[]);
    world.replicating();
    world.burst(200, 1);
    let refused = world.branch.wait_vm(VM, "no space", LONG, |vm| !vm["error"].is_null()).unwrap();
    assert_eq!(refused["error"]["code"], "replica-refused", "{refused}");
    assert!(refused["error"]["message"].as_str().unwrap().contains("space"), "{refused}");
    // The chain is whole: what was there before can be backed up (to where there is room), and restored.
    let points = world.head.ok(&["points", VM]).unwrap();
    assert!(!points["points"].as_array().unwrap().is_empty());
    tool(Command::new("mount").args(["-o", "remount,size=1g"]).arg(mount.path())).unwrap();
    world.branch.ok(&["resume", VM]).unwrap();
    world.branch.ok(&["sync", VM]).unwrap();
    let backup = world.head.ok(&["backup", VM]).unwrap();
    world.state(&world.restore(backup["backup"].as_str().unwrap()));
    world.head.stop();
    drop(world);
    let _ = tool(Command::new("umount").args(["-l"]).arg(mount.path()));
}

#[test]
fn a_removed_peer_and_a_vm_that_is_not_allowed_are_refused_and_noted() {
    let mut world = World::new(45);
    world.write(1, QUICK);
    world.protect("1s", &[]);
    world.replicating();
    world.head.ok(&["peer", "remove", "branch"]).unwrap();
    let refused = world.branch.wait_vm(VM, "to be refused", LONG, |vm| !vm["error"].is_null()).unwrap();
    assert_eq!(refused["error"]["transient"], false, "a refused certificate is not tried blindly: {refused}");
    assert_eq!(refused["health"], "critical");
    let events = world.head.ok(&["events"]).unwrap();
    let noted = |events: &Value, what: &str| {
        events["events"].as_array().unwrap().iter().any(|event| event["kind"].as_str() == Some(what))
    };
    assert!(noted(&events, "unknown-peer"), "{events}");

    // Invited again, for other VMs only: this one is forbidden.
    let invite = world.head.ok(&["peer", "invite", "branch", "--vms", "db-*"]).unwrap();
    world.branch.ok(&["peer", "accept", invite["invite"].as_str().unwrap()]).unwrap();
    world.branch.ok(&["resume", VM]).unwrap();
    let refused =
        world.branch.wait_vm(VM, "to be forbidden", LONG, |vm| vm["error"]["code"] == "not-authorized");
    assert_eq!(refused.unwrap()["error"]["transient"], false);
    let events = world.head.ok(&["events"]).unwrap();
    assert!(noted(&events, "not-authorized"), "{events}");

    // Allowed again: it goes on where it was.
    world.head.ok(&["peer", "remove", "branch"]).unwrap();
    world.head.invite(&world.branch).unwrap();
    world.branch.ok(&["resume", VM]).unwrap();
    world.branch.ok(&["sync", VM]).unwrap();
    assert_eq!(world.branch.vm(VM).unwrap()["state"], "replicating");
}

#[test]
fn an_invite_is_good_once_and_a_stranger_gets_nothing() {
    let dir = tempfile::Builder::new().prefix("ai").tempdir().unwrap();
    let [mut head, mut branch, mut other] =
        ["head", "branch", "other"].map(|name| Site::init(dir.path(), name).unwrap());
    for site in [&mut head, &mut branch, &mut other] {
        site.serve().unwrap();
    }
    let invite = head.ok(&["peer", "invite", "branch"]).unwrap();
    let line = invite["invite"].as_str().unwrap();
    branch.ok(&["peer", "accept", line]).unwrap();
    let again = other.run(&["peer", "accept", line]).unwrap();
    assert_eq!((again.status, again.code()), (1, Some("invite")), "{again:?}");
    for bad in ["afterimage1.", "hello", &line[..line.len() - 4], "afterimage9.AAAA"] {
        let output = other.run(&["peer", "accept", bad]).unwrap();
        assert_eq!(output.code(), Some("invite"), "{bad}: {output:?}");
    }
    // Nobody without a certificate gets past the door.
    let url = format!("https://{}/v1/relationships/{}", head.address(), "0".repeat(32));
    let code = tool(Command::new("curl").args([
        "-sk",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code}",
        "-X",
        "DELETE",
        &url,
    ]));
    assert_eq!(code.unwrap(), "401");
    assert!(head.ok(&["events"]).unwrap().to_string().contains("no-certificate"));
}

#[test]
fn a_scratch_that_fills_up_gives_the_cycle_up_and_never_a_guest_write() {
    let mut world = World::new(46);
    world.branch.stop();
    world.branch.configure(&[("scratch-limit-mib = 8192", "scratch-limit-mib = 16")]).unwrap();
    world.branch.serve().unwrap();
    world.burst(128, 1);
    world.write(1, Duration::ZERO);
    // So slow that the moment stays fixed while the guest overwrites a lot.
    world.protect("1s", &["--bandwidth", "4M"]);
    let mut seeds = 2..;
    let message = wait_for("the scratch to fill up", LONG, || {
        world.burst(64, seeds.next().unwrap_or_default());
        let error = world.branch.vm(VM)?["error"].clone();
        Ok((error["code"] == "scratch-full").then(|| error["message"].to_string()))
    });
    assert!(message.unwrap().contains("scratch"));
    world.burst(8, 3); // every guest write went through, and goes through
    assert!(world.quiet() > 1);
}

#[test]
fn a_damaged_pack_is_named_and_the_rest_is_saved() {
    let mut world = World::new(47);
    world.write(1, QUICK);
    world.burst(64, 1);
    world.protect("1s", &[]);
    world.replicating();
    world.quiet();
    world.branch.ok(&["sync", VM]).unwrap();
    let backup = world.head.ok(&["backup", VM]).unwrap();
    let id = backup["backup"].as_str().unwrap();
    let packs = tool(
        Command::new("find")
            .arg(world.head.dir().join("repository/data"))
            .args(["-type", "f", "-size", "+1M"]),
    )
    .unwrap();
    let pack = packs.lines().next().expect("a pack with data").to_owned();
    tool(Command::new("chmod").args(["u+w", &pack])).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&pack).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"rot rot rot", 100_000).unwrap();

    let verified = world.head.run(&["verify", VM]).unwrap();
    assert_eq!((verified.status, verified.code()), (1, Some("damaged")), "{verified:?}");
    let to = world.dir.path().join("to");
    let refused = world.head.run(&["restore", VM, "--backup", id, "--to", path(&to)]).unwrap();
    assert_eq!(refused.code(), Some("damaged"), "{refused:?}");
    let message = refused.json["error"]["message"].as_str().unwrap();
    assert!(DISKS.iter().any(|(disk, _)| message.contains(disk)) && message.contains("offset"), "{message}");
    let saved = world.head.run(&["restore", VM, "--backup", id, "--to", path(&to), "--keep-going"]).unwrap();
    assert_eq!(saved.status, 1, "what is damaged is not hidden: {saved:?}");
    assert!(!saved.json["damaged"].as_array().unwrap().is_empty(), "{saved:?}");
    for (name, bytes) in DISKS {
        assert_eq!(to.join(format!("{name}.raw")).metadata().unwrap().len(), bytes);
    }

    let password = world.head.dir().join("repository.password");
    std::fs::write(&password, "wrong").unwrap();
    let wrong = world.head.run(&["backups"]).unwrap();
    assert!(wrong.code() == Some("repository") && wrong.json.to_string().contains("password"), "{wrong:?}");
    std::fs::rename(world.head.dir().join("repository"), world.head.dir().join("gone")).unwrap();
    let missing = world.head.run(&["backups"]).unwrap();
    assert_eq!(missing.code(), Some("repository"), "{missing:?}");
}

#[test]
fn a_backup_that_waits_survives_a_kill_of_its_site() {
    let mut world = World::new(48);
    world.write(1, QUICK);
    world.protect("1s", &[]);
    world.replicating();
    world.head.ok(&["failover", "unplanned", VM]).unwrap();
    let mut waiting = rig::Process::start(
        world
            .head
            .command(&["backup", VM])
            .unwrap()
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null()),
    )
    .unwrap();
    wait_for("a refused attempt", LONG, || {
        Ok(world.head.ok(&["jobs"])?["jobs"][0]["attempts"][0]["refused"].as_str().map(str::to_owned))
    })
    .map(|refused| assert_eq!(refused, "failover"))
    .unwrap();
    world.head.kill();
    waiting.kill();
    world.head.serve().unwrap();
    assert_eq!(world.head.ok(&["jobs"]).unwrap()["jobs"][0]["state"], "waiting");
    assert_eq!(world.backups(), 0);
    world.head.ok(&["failover", "cancel", VM]).unwrap();
    wait_for("the backup to come home", Duration::from_secs(400), || {
        Ok((world.head.ok(&["jobs"])?["jobs"][0]["state"] == "done").then_some(()))
    })
    .unwrap();
    assert_eq!(world.backups(), 1);
}
