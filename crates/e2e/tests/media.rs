//! Initial replications by media: written at one site, carried, imported at the other; killed on both, spoilt on the way,
//! given up. Only what has changed since crosses the line.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::{BURST_AT, DISKS, LONG, MIB, VM, World, path};
use rig::{Output, fill, tool, wait_for};
use serde_json::Value;

const QUICK: Duration = Duration::from_millis(2);

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// A pass ends a log only between stretches of so much of a disk.
const STRETCH: u64 = 64 * MIB;

/// A world with noise in this many stretches of a disk, so that a pass takes about as many logs, and a writer.
fn world(seed: u64, stretches: u64) -> World {
    let mut world = World::new(seed);
    world.branch.stop();
    world.branch.configure(&[("initial-log-mib = 1024", "initial-log-mib = 16")]).unwrap();
    world.branch.serve().unwrap();
    for stretch in 0..stretches {
        let at = BURST_AT + stretch * STRETCH;
        fill(&world.daemon, DISKS[1].0, at, 18 * MIB, seed + stretch).unwrap();
    }
    world.write(1, QUICK);
    world
}

/// An empty folder.
fn folder(world: &World, name: &str) -> PathBuf {
    let dir = world.dir.path().join(name);
    std::fs::create_dir(&dir).unwrap();
    dir
}

fn protect(world: &World, dir: &Path) -> Value {
    world.protect("1s", &["--initial", &format!("media:{}", dir.display())])
}

fn written(world: &World) -> Value {
    let written = |vm: &Value| vm["media"]["written_at"].is_string();
    world.branch.wait_vm(VM, "to be written", LONG, written).unwrap()
}

/// The files of logs in a folder.
fn logs(dir: &Path) -> Vec<PathBuf> {
    let mut logs: Vec<PathBuf> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "sealed"))
        .filter(|path| path.file_name().is_some_and(|name| name != "end.sealed"))
        .collect();
    logs.sort();
    logs
}

fn carry(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    tool(Command::new("cp").arg("-r").args([from, to])).unwrap();
}

fn import(world: &World, dir: &Path) -> Output {
    world.head.run(&["replica", "import", path(dir)]).unwrap()
}

#[track_caller]
fn refused(output: &Output, words: &[&str]) {
    assert_eq!(output.status, 1, "{output:?}");
    let message = text(&output.json["error"], "message");
    assert!(words.iter().all(|word| message.contains(word)), "{message}");
}

fn change(file: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(file).unwrap();
    change(&mut bytes);
    std::fs::write(file, bytes).unwrap();
}

/// With nobody writing, a backup of the replica is the VM's disks, byte for byte.
fn compare(world: &mut World) {
    world.quiet();
    world.branch.ok(&["sync", VM]).unwrap();
    let backup = world.head.ok(&["backup", VM]).unwrap();
    let images = world.restore(text(&backup, "backup"));
    world.state(&images);
    for ((name, _), image) in DISKS.iter().zip(images) {
        tool(Command::new("cmp").arg(world.daemon.disk(name)).arg(image)).unwrap();
    }
}

#[test]
fn an_initial_replication_comes_on_media_and_only_what_changed_since_crosses_the_line() {
    let mut world = world(71, 6);
    let (disk, there) = (folder(&world, "disk"), world.dir.path().join("there"));

    // The site that writes is killed in the middle, with a log that it has not heard is written.
    world.branch.stop();
    world.branch.serve_with(&[(steps::FAIL_AT, "primary::media::renamed:4")]).unwrap();
    let begun = protect(&world, &disk);
    assert!(text(&begun["media"], "message").contains("is being written to"), "{begun}");
    let crossed = world.line.bytes();
    wait_for("the site to die", LONG, || Ok((world.branch.died_of() == Some(9)).then_some(()))).unwrap();
    assert_eq!(logs(&disk).len(), 3);
    let early = import(&world, &disk);
    refused(&early, &["are not whole", "they are still being written"]);
    world.branch.serve().unwrap();
    let whole = written(&world);
    assert_eq!(whole["media"]["logs"], logs(&disk).len(), "{whole}");
    assert!(logs(&disk).len() > 5 && whole["acked"] == 0, "{whole}");
    assert!(world.line.bytes() - crossed < MIB, "{} bytes crossed the line", world.line.bytes() - crossed);

    waits_for_its_media(&world, &disk);
    world.burst(4, 1071);
    carry(&disk, &there);
    spoilt_media_are_refused(&world, &disk, &there);

    // The site that reads is killed in the middle, too.
    world.head.stop();
    world.head.serve_with(&[(steps::FAIL_AT, "replica::receive::renamed:2")]).unwrap();
    let cut_off = import(&world, &there);
    assert_eq!(cut_off.code(), Some("not-running"), "{cut_off:?}");
    world.head.serve().unwrap();
    let crossed = world.line.bytes();
    let done = import(&world, &there);
    assert_eq!(done.status, 0, "{done:?}");
    assert!(
        done.json["here_before"].as_u64() >= Some(3) && done.json["logs"] == logs(&disk).len(),
        "{done:?}"
    );
    world.replicating();
    world.branch.ok(&["sync", VM]).unwrap();
    let crossed = world.line.bytes() - crossed;
    assert!((MIB..24 * MIB).contains(&crossed), "{crossed} bytes crossed the line for 4 MiB and a writer's");

    for site in [&world.branch, &world.head] {
        assert_eq!(site.vm(VM).unwrap()["media"], Value::Null);
    }
    refused(&import(&world, &there), &["does not wait for the media", "they were imported already"]);
    compare(&mut world);
}

/// Written, and not imported yet: everything says so.
fn waits_for_its_media(world: &World, disk: &Path) {
    let told = |vm: &Value| vm["media"]["logs"].is_u64();
    let replica = world.head.wait_vm(VM, "to know that its media are whole", LONG, told).unwrap();
    assert_eq!(replica["state"], "initial-replication");
    assert!(text(&replica["media"], "message").contains("afterimage replica import DIR"), "{replica}");
    let backup = world.head.run(&["backup", VM, "--no-retry"]).unwrap();
    assert_eq!((backup.status, backup.condition()), (75, Some("initial-replication")), "{backup:?}");
    let sync = world.branch.run(&["sync", VM]).unwrap();
    assert_eq!((sync.status, sync.code()), (75, Some("media")), "{sync:?}");
    refused(&world.branch.run(&["resync", VM]).unwrap(), &["before the media of web are imported at head"]);
    let again = format!("media:{}", disk.display());
    let again = world.branch.run(&["configure", VM, "--initial", &again]).unwrap();
    refused(&again, &["holds a set of media already", "remove it, or name another folder"]);
    let (qmp, nbd) = (world.daemon.second_qmp(), world.daemon.nbd());
    let protect = ["protect", "mail", "--qmp", path(&qmp), "--nbd", path(&nbd), "--to", "head"];
    let initial = format!("media:{}", disk.display());
    let other = world.branch.run(&[&protect[..], &["--initial", &initial]].concat()).unwrap();
    refused(&other, &["holds a set of media already"]);
    refused(
        &world.branch.run(&["replica", "import", path(disk)]).unwrap(),
        &["runs here", "import them there"],
    );
}

/// In the end the first two logs are in, and all files in `there` are as they were written.
fn spoilt_media_are_refused(world: &World, disk: &Path, there: &Path) {
    let file = |number: usize| there.join(logs(disk)[number - 1].file_name().unwrap());
    let mend = || carry(disk, there);

    change(&file(4), |bytes| bytes.truncate(bytes.len() / 2));
    refused(&import(world, there), &["log-00000004.sealed", "cut off"]);
    mend();
    std::fs::remove_file(file(5)).unwrap();
    refused(&import(world, there), &["log-00000005.sealed is missing"]);
    mend();
    std::fs::remove_file(there.join("end.sealed")).unwrap();
    refused(&import(world, there), &["are not whole"]);
    mend();
    change(&there.join("end.sealed"), |bytes| bytes[80] ^= 1);
    refused(&import(world, there), &["end.sealed", "is damaged or was changed"]);
    mend();
    // A file of another set, of another VM, in another place.
    for (at, what) in [(16, "another set"), (32, "another VM"), (48, "another place in the set")] {
        change(&file(2), |bytes| bytes[at] ^= 1);
        refused(&import(world, there), &["log-00000002.sealed", what]);
        mend();
    }
    let card = there.join("afterimage-media.json");
    let id = world.head.vm(VM).unwrap()["id"].as_str().unwrap().to_owned();
    let stranger = std::fs::read_to_string(&card).unwrap().replace(&id, &"7".repeat(32));
    std::fs::write(&card, stranger).unwrap();
    refused(&import(world, there), &["are of VM 7777", "no site has offered here"]);
    mend();
    let set = text(&world.head.vm(VM).unwrap()["media"], "set").to_owned();
    let older = std::fs::read_to_string(&card).unwrap().replace(&set, &"7".repeat(32));
    std::fs::write(&card, older).unwrap();
    refused(&import(world, there), &["it is of an earlier attempt", &set]);
    mend();
    assert_eq!(world.head.vm(VM).unwrap()["received"], 0, "nothing was taken in of all that");

    // What only reading all of it can tell: the logs before it are good.
    change(&file(3), |bytes| bytes[70_000] ^= 1);
    refused(&import(world, there), &["log-00000003.sealed", "is damaged or was changed"]);
    let replica = world.head.vm(VM).unwrap();
    assert_eq!((&replica["received"], &replica["media"]["imported"]), (&2.into(), &2.into()), "{replica}");
    assert_eq!(replica["state"], "initial-replication");
    mend();
}

#[test]
fn media_without_room_or_a_vm_that_was_restarted_cost_no_more_than_they_must() {
    let mut world = world(72, 5);
    let disk = folder(&world, "small");
    tool(Command::new("mount").args(["-t", "tmpfs", "-o", "size=40m", "tmpfs"]).arg(&disk)).unwrap();
    let _mounted = Mounted(disk.clone());
    protect(&world, &disk);
    let full = |vm: &Value| vm["error"]["code"] == "media-full";
    let stopped = world.branch.wait_vm(VM, "to find no room", LONG, full).unwrap();
    let message = text(&stopped["error"], "message");
    assert!(message.contains("there is no room on the media") && message.contains("small/log-"), "{message}");
    let before = logs(&disk).len();
    assert!((1..=3).contains(&before), "{before}");
    tool(Command::new("mount").args(["-o", "remount,size=400m"]).arg(&disk)).unwrap();
    let set = text(&stopped["media"], "set").to_owned();
    let first = std::fs::read(&logs(&disk)[0]).unwrap();
    let whole = written(&world);
    assert_eq!(text(&whole["media"], "set"), set, "it goes on with what is there");
    assert!(std::fs::read(&logs(&disk)[0]).unwrap() == first);

    // QEMU has forgotten what has changed since: the two sides are compared, once the media are there.
    let from = world.quiet();
    world.daemon.restart().unwrap();
    world.burst(8, 1072);
    world.write(from, QUICK);
    let crossed = world.line.bytes();
    let done = import(&world, &disk);
    assert_eq!(done.status, 0, "{done:?}");
    world.replicating();
    let crossed = world.line.bytes() - crossed;
    assert!(world.branch.log().contains("resynchronization is required"));
    assert!(crossed < 40 * MIB, "{crossed} bytes crossed the line to compare 90 MiB of which 8 have changed");
    compare(&mut world);
}

#[test]
fn media_are_written_anew_when_they_cannot_be_gone_on_with_and_given_up_when_nobody_wants_them() {
    let mut world = world(73, 4);
    let disk = folder(&world, "disk");
    world.branch.stop();
    world.branch.serve_with(&[(steps::FAIL_AT, "primary::media::renamed:3")]).unwrap();
    let begun = protect(&world, &disk);
    wait_for("the site to die", LONG, || Ok((world.branch.died_of() == Some(9)).then_some(()))).unwrap();
    // Nothing is written into the folder that they were mounted on.
    let away = world.dir.path().join("away");
    std::fs::rename(&disk, &away).unwrap();
    std::fs::create_dir(&disk).unwrap();
    world.branch.serve().unwrap();
    let missing = |vm: &Value| vm["error"]["code"] == "media";
    let waits = world.branch.wait_vm(VM, "to miss its media", LONG, missing).unwrap();
    assert!(text(&waits["error"], "message").contains("mount them there again"), "{waits}");
    assert_eq!(std::fs::read_dir(&disk).unwrap().count(), 0);

    // The VM is started anew in the middle: what has changed in what is written is not known any more.
    let from = world.quiet();
    world.daemon.restart().unwrap();
    world.write(from, QUICK);
    std::fs::remove_dir(&disk).unwrap();
    std::fs::rename(&away, &disk).unwrap();
    let whole = written(&world);
    assert_ne!(whole["media"]["set"], begun["media"]["set"], "another set, under another key");
    assert_eq!(whole["media"]["logs"], logs(&disk).len(), "of the old one nothing is left: {whole}");
    assert!(world.branch.log().contains("the media are written anew"));

    let cancelled = world.branch.ok(&["resync", VM, "--cancel"]).unwrap();
    assert_eq!((&cancelled["paused"], &cancelled["media"]), (&true.into(), &Value::Null), "{cancelled}");
    assert_eq!(std::fs::read_dir(&disk).unwrap().count(), 0, "what nobody can open is removed");
    assert_eq!(world.head.vm(VM).unwrap()["media"], Value::Null, "the key is gone there, too");
    // And now with another set, given up half imported: the rest is found by a compare.
    world.branch.ok(&["configure", VM, "--initial", &format!("media:{}", disk.display())]).unwrap();
    world.branch.ok(&["resume", VM]).unwrap();
    written(&world);
    let told = |vm: &Value| vm["media"]["logs"].is_u64();
    world.head.wait_vm(VM, "to know its media", LONG, told).unwrap();
    change(&logs(&disk)[1], |bytes| bytes[70_000] ^= 1);
    refused(&import(&world, &disk), &["log-00000002.sealed"]);
    assert_eq!(world.head.vm(VM).unwrap()["received"], 1);
    world.branch.ok(&["configure", VM, "--initial", "now"]).unwrap();
    world.replicating();
    refused(&import(&world, &folder(&world, "empty")), &["there are no media in"]);
    compare(&mut world);
    world.branch.ok(&["unprotect", VM]).unwrap();
}

/// A folder that something is mounted on; not any more when dropped.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
