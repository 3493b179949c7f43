//! Restores onto what is there: images and devices, of which only what differs is written; what must not be written
//! is refused, and what belongs to a protected VM is fenced.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::{DISKS, LONG, MIB, VM, World, path};
use rig::{Output, Site, need, tool, wait_for};
use serde_json::Value;

const QUICK: Duration = Duration::from_millis(2);
const SYSTEM: &str = DISKS[0].0;
const DATA: &str = DISKS[1].0;

/// A VM with two backups, of which the second has 8 MiB more on its second disk.
fn backed_up(seed: u64) -> (World, [String; 2]) {
    let mut world = World::new(seed);
    world.write(1, QUICK);
    world.protect("1s", &[]);
    world.replicating();
    let backup = |world: &World| {
        let made = world.head.ok(&["backup", VM]).unwrap();
        made["backup"].as_str().unwrap().to_owned()
    };
    let first = backup(&world);
    world.burst(8, 7);
    world.branch.ok(&["sync", VM]).unwrap();
    let second = backup(&world);
    (world, [first, second])
}

fn onto(site: &Site, backup: &str, targets: &[(&str, &Path)], more: &[&str]) -> Output {
    let named: Vec<String> =
        targets.iter().map(|(disk, path)| format!("{disk}={}", path.display())).collect();
    let named = named.iter().flat_map(|target| ["--onto", target]);
    let arguments: Vec<&str> =
        ["restore", VM, "--backup", backup].into_iter().chain(named).chain(more.iter().copied()).collect();
    site.run(&arguments).unwrap()
}

fn written(output: &Output) -> u64 {
    assert_eq!(output.status, 0, "{output:?}");
    output.json["disks"][0]["written_bytes"].as_u64().unwrap()
}

fn refused(output: &Output, why: &str) {
    let said = output.json["error"]["message"].as_str().unwrap_or_default();
    assert!(output.status == 1 && said.contains(why), "{why:?}: {output:?}");
}

fn assert_same(one: &Path, other: &Path) {
    tool(Command::new("cmp").args([one, other])).unwrap();
}

/// A file as a block device, until it is dropped.
struct Loop(PathBuf);

impl Loop {
    fn new(file: &Path) -> Self {
        need("losetup", "mount").unwrap();
        let shown = tool(Command::new("losetup").args(["--find", "--show"]).arg(file)).unwrap();
        Self(shown.trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = tool(Command::new("losetup").arg("--detach").arg(&self.0));
    }
}

#[test]
fn only_what_differs_is_written_onto_an_image() {
    let (world, [first, second]) = backed_up(61);
    let [before, after] = [&first, &second].map(|backup| world.restore(backup));
    let image = world.dir.path().join("data.img");
    let restore = |backup: &str, more: &[&str]| onto(&world.head, backup, &[(DATA, &image)], more);

    // A file that is not there needs nobody's consent.
    assert!(written(&restore(&first, &[])) > 0);
    assert_same(&image, &before[1]);
    refused(&restore(&second, &[]), "--overwrite");
    let crossing = written(&restore(&second, &["--overwrite"]));
    assert!((8 * MIB..20 * MIB).contains(&crossing), "{crossing} bytes were written for 8 MiB that differ");
    assert_same(&image, &after[1]);
    let again = restore(&second, &["--overwrite"]);
    assert_eq!((written(&again), &again.json["disks"][0]["read_bytes"]), (0, &Value::from(0)), "{again:?}");
    assert!(restore_text(&world, &second, &image).contains("the same already"));

    // What was cut off goes on: the half that is right is not written again.
    let file = File::options().write(true).open(&image).unwrap();
    file.write_all_at(&vec![0x5a; 3 * MIB as usize], DISKS[1].1 - 3 * MIB).unwrap();
    file.write_all_at(&vec![0; 2 * MIB as usize], common::BURST_AT).unwrap();
    drop(file);
    assert_eq!(written(&restore(&second, &["--overwrite"])), 5 * MIB);
    assert_same(&image, &after[1]);
    let zeroed = image.metadata().unwrap();
    assert!(std::os::unix::fs::MetadataExt::blocks(&zeroed) * 512 < 64 * MIB, "zeros are holes again");
}

fn restore_text(world: &World, backup: &str, image: &Path) -> String {
    let target = format!("{DATA}={}", image.display());
    let mut command = Command::new(rig::this_program().unwrap());
    command.arg("--dir").arg(world.head.dir());
    tool(command.args(["restore", VM, "--backup", backup, "--onto", &target, "--overwrite"])).unwrap()
}

#[test]
fn what_must_not_be_written_is_refused() {
    let (mut world, [_, backup]) = backed_up(62);
    world.quiet();
    let dir = world.dir.path().to_owned();
    let try_onto = |target: &Path| onto(&world.head, &backup, &[(SYSTEM, target)], &["--overwrite"]);

    refused(&try_onto(&world.daemon.disk(SYSTEM)), "in use");
    let small = dir.join("small");
    fs::write(&small, vec![1; 4096]).unwrap();
    refused(&try_onto(&small), "needs");
    assert_eq!(fs::read(&small).unwrap(), vec![1; 4096], "nothing was written");
    let qcow2 = dir.join("other.qcow2");
    tool(Command::new("qemu-img").args([
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "preallocation=full",
        path(&qcow2),
        "64M",
    ]))
    .unwrap();
    refused(&try_onto(&qcow2), "qcow2");
    let storage = world.head.vm(VM).unwrap()["storage"].as_str().unwrap().to_owned();
    let base = Path::new(&storage).join(format!("disks/{SYSTEM}.raw"));
    refused(&try_onto(&base), "replica");
    refused(&try_onto(&world.head.dir().join("new.raw")), "folder of a site");
    refused(&try_onto(&dir), "neither");
    refused(&onto(&world.head, &backup, &[("nothing", &small)], &["--overwrite"]), "has no disk nothing");
    let both = [(SYSTEM, small.as_path()), (DATA, small.as_path())];
    refused(&onto(&world.head, &backup, &both, &["--overwrite"]), "");
}

#[test]
fn a_device_is_written_if_nobody_uses_it() {
    let (mut world, [_, backup]) = backed_up(63);
    world.quiet();
    let reference = world.restore(&backup);
    let file = world.dir.path().join("device");
    File::create(&file).unwrap().set_len(DISKS[0].1 + MIB).unwrap();
    tool(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&file)).unwrap();
    let device = Loop::new(&file);
    let restore = |more: &[&str]| onto(&world.head, &backup, &[(SYSTEM, &device.0)], more);
    refused(&onto(&world.head, &backup, &[(SYSTEM, &file)], &["--overwrite"]), "loop device");
    refused(&restore(&[]), "--overwrite");

    let mounted = world.dir.path().join("mounted");
    fs::create_dir(&mounted).unwrap();
    tool(Command::new("mount").arg(&device.0).arg(&mounted)).unwrap();
    refused(&restore(&["--overwrite"]), path(&mounted));
    tool(Command::new("umount").arg(&mounted)).unwrap();

    let done = restore(&["--overwrite"]);
    assert!(written(&done) > 0);
    assert_eq!(done.json["disks"][0]["beyond_bytes"], MIB);
    let size = DISKS[0].1.to_string();
    tool(Command::new("cmp").args(["-n", &size]).args([&device.0, &reference[0]])).unwrap();
    assert_eq!(written(&restore(&["--overwrite"])), 0);
}

#[test]
fn a_restore_over_the_disks_of_a_protected_vm_has_both_sides_compared() {
    let (mut world, [first, second]) = backed_up(64);
    // The head office's backups, at the branch.
    let more = format!(
        "\n[repositories.head]\npath = {:?}\npassword-file = {:?}\n",
        world.head.dir().join("repository"),
        world.head.dir().join("repository.password")
    );
    let config = world.branch.dir().join("config.toml");
    let text = fs::read_to_string(&config).unwrap() + &more;
    fs::write(&config, text).unwrap();
    for (backup, runs) in [(first, true), (second, false)] {
        let reference = world.restore(&backup);
        world.quiet();
        world.daemon.kill();
        if !runs {
            world.branch.stop();
        }
        let disks = [world.daemon.disk(SYSTEM), world.daemon.disk(DATA)];
        let targets = [(SYSTEM, disks[0].as_path()), (DATA, disks[1].as_path())];
        let done = onto(&world.branch, &backup, &targets, &["--overwrite", "--repository", "head"]);
        assert_eq!(done.status, 0, "{done:?}");
        assert_eq!(done.json["fenced"].as_array().unwrap().len(), 2, "{done:?}");
        if !runs {
            world.branch.serve().unwrap();
        }
        let status = world.branch.vm(VM).unwrap();
        assert_eq!(status["state"], "resynchronization-required", "{status}");
        assert!(status.to_string().contains("a backup was restored over its disks"), "{status}");
        let events = world.branch.ok(&["events"]).unwrap();
        assert!(events["events"].as_array().unwrap().iter().any(|event| event["kind"] == "restored-over"));

        world.daemon.restart().unwrap();
        world.replicating();
        world.branch.ok(&["sync", VM]).unwrap();
        let point = world.points().pop().unwrap();
        let shown = world.export_point(&point, &[]).unwrap();
        for (uri, image) in shown.uris.iter().zip(&reference) {
            wait_for("the point to be what was restored", LONG, || {
                e2e::foreign::are_alike(("raw", uri), ("raw", path(image))).map(|same| same.then_some(()))
            })
            .unwrap();
        }
        world.unexport(&shown);
    }
}
