//! The whole job once: a VM is replicated, its replica backed up, the backup restored; and stock restic
//! agrees with us.

mod common;

use std::fs::File;
use std::process::Command;
use std::time::Duration;

use common::{DISKS, LONG, VM, World, path};
use rig::{need, tool};

#[test]
fn a_replica_is_backed_up_and_comes_back_as_the_vm_was() {
    need("restic", "restic").unwrap();
    need("qemu-img", "qemu-utils").unwrap();
    let mut world = World::new(1);
    world.write(1, Duration::from_millis(1));
    world.protect("1s", &["--points", "2"]);
    world.replicating();

    let first = world.head.ok(&["backup", VM]).unwrap();
    assert_eq!(first["consistency"], "crash");
    assert!(first["attempts"].as_array().unwrap().is_empty(), "a pinned view does not collide: {first}");
    world.burst(8, 7);
    world.branch.ok(&["sync", VM]).unwrap();
    let second = world.head.ok(&["backup", VM]).unwrap();
    let read = second["bytes_read"].as_u64().unwrap();
    assert!(read < 48 << 20, "an incremental backup reads what has changed, not {read} bytes");
    assert_eq!(world.backups(), 2);

    let [first, second] = [&first, &second].map(|backup| backup["backup"].as_str().unwrap());
    let images = [world.restore(first), world.restore(second)];
    assert!(world.state(&images[0]) < world.state(&images[1]), "the second is newer");

    stock_restic_agrees(&world, second, &images[1]);
    a_qcow2_is_the_same_disk(&world, second, &images[1]);
    world.head.ok(&["verify", VM]).unwrap();
}

fn stock_restic_agrees(world: &World, backup: &str, images: &[std::path::PathBuf]) {
    let restic = |arguments: &[&str]| {
        let dir = world.head.dir();
        let mut command = Command::new("restic");
        command.arg("-r").arg(dir.join("repository")).arg("-p").arg(dir.join("repository.password"));
        command.arg("--no-cache").args(arguments);
        command
    };
    tool(&mut restic(&["check", "--read-data"])).unwrap();
    for ((name, _), image) in DISKS.iter().zip(images) {
        let dumped = world.dir.path().join("dumped");
        let file = format!("/{name}.raw");
        let status =
            restic(&["dump", backup, &file]).stdout(File::create(&dumped).unwrap()).status().unwrap();
        assert!(status.success(), "restic dump {file}");
        tool(Command::new("cmp").arg(&dumped).arg(image)).unwrap();
    }
    let restored = world.dir.path().join("by-restic");
    tool(&mut restic(&["restore", backup, "--target", path(&restored)])).unwrap();
    for ((name, _), image) in DISKS.iter().zip(images) {
        tool(Command::new("cmp").arg(restored.join(format!("{name}.raw"))).arg(image)).unwrap();
    }
}

fn a_qcow2_is_the_same_disk(world: &World, backup: &str, images: &[std::path::PathBuf]) {
    let to = world.dir.path().join("qcow2");
    world.head.ok(&["restore", VM, "--backup", backup, "--to", path(&to), "--format", "qcow2"]).unwrap();
    for ((name, _), image) in DISKS.iter().zip(images) {
        let copy = to.join(format!("{name}.qcow2"));
        tool(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "qcow2"]).arg(image).arg(copy))
            .unwrap();
    }
}

#[test]
fn a_site_that_was_stopped_and_started_goes_on_by_itself() {
    let mut world = World::new(2);
    world.write(1, Duration::from_millis(2));
    world.protect("1s", &[]);
    world.replicating();
    world.branch.stop();
    world.head.stop();
    world.head.serve().unwrap();
    world.branch.serve().unwrap();
    let before = world.branch.vm(VM).unwrap()["last_point"].clone();
    let later = world.branch.wait_vm(VM, "a newer point", LONG, |vm| vm["last_point"] != before).unwrap();
    assert_eq!(later["state"], "replicating", "a restart of the sites needs no resynchronization");
    let backup = world.head.ok(&["backup", VM]).unwrap();
    let images = world.restore(backup["backup"].as_str().unwrap());
    world.state(&images);
}
