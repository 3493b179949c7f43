//! Single files out of a backup and out of a recovery point: listed, found, fetched, byte for byte.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;

use common::{DISKS, VM, World, path};
use rig::{need, noise, tool};
use serde_json::Value;

/// A tree of files on the VM's first disk, before anything is replicated.
fn install(world: &mut World) -> std::path::PathBuf {
    need("mkfs.ext4", "e2fsprogs").unwrap();
    let root = world.dir.path().join("tree");
    fs::create_dir_all(root.join("home/ann")).unwrap();
    fs::create_dir(root.join("etc")).unwrap();
    fs::write(root.join("etc/fstab"), "one line\n").unwrap();
    fs::write(root.join("home/ann/report.odt"), noise(5, 200_000)).unwrap();
    std::os::unix::fs::symlink("../../etc/fstab", root.join("home/ann/link")).unwrap();
    let disk = world.daemon.disk(DISKS[0].0);
    world.daemon.kill();
    tool(Command::new("mkfs.ext4").args(["-q", "-F", "-d"]).arg(&root).arg(&disk).arg("40M")).unwrap();
    world.daemon.restart().unwrap();
    root
}

#[test]
fn files_come_out_of_a_backup_and_out_of_a_point() {
    let mut world = World::new(81);
    let root = install(&mut world);
    world.protect("1s", &[]);
    world.replicating();
    world.branch.ok(&["sync", VM]).unwrap();
    world.head.ok(&["backup", VM]).unwrap();
    for of in [&["--backup", "latest"][..], &[]] {
        let files = |arguments: &[&str]| world.head.ok(&[&["files"], arguments, of].concat()).unwrap();
        let volumes = files(&["list", VM]);
        let shown = |name: &str| {
            volumes["volumes"]
                .as_array()
                .unwrap()
                .iter()
                .find(|volume| volume["name"] == name)
                .cloned()
                .unwrap()
        };
        assert_eq!(
            (&shown("system")["content"], &shown("data")["readable"]),
            (&"ext4".into(), &Value::Bool(false))
        );

        let listed = files(&["list", VM, "system:/home/ann"]);
        let names: Vec<_> =
            listed["entries"].as_array().unwrap().iter().map(|entry| entry["name"].clone()).collect();
        assert_eq!(names, ["link", "report.odt"]);
        let found = files(&["find", VM, "*.ODT"]);
        assert_eq!(found["found"][0]["place"], "system:/home/ann/report.odt", "{found}");

        let to = world.dir.path().join(format!("fetched-{}", of.len()));
        let got = files(&["get", VM, "system:/home", "system:/etc/fstab", "--to", path(&to)]);
        assert_eq!((&got["files"], got["skipped"].as_array().unwrap().len()), (&2.into(), 1), "{got}");
        tool(Command::new("cmp").arg(root.join("home/ann/report.odt")).arg(to.join("home/ann/report.odt")))
            .unwrap();
        assert_eq!(fs::read_to_string(to.join("fstab")).unwrap(), "one line\n");
        let again = world
            .head
            .run(&[&["files", "get", VM, "system:/etc/fstab", "--to", path(&to)], of].concat())
            .unwrap();
        assert!(again.status == 1, "nothing that is there is replaced: {again:?}");
    }

    let before = world.points().pop().unwrap()["id"].as_str().unwrap().to_owned();
    let refused = world.head.run(&["files", "list", VM, "nothing:/"]).unwrap();
    assert_eq!((refused.status, refused.code()), (1, Some("files")), "{refused:?}");
    let refused = world.head.run(&["files", "list", VM, "system", "--point", &before]).unwrap();
    assert_eq!((refused.status, refused.code()), (64, Some("usage")), "{refused:?}");
    let refused = world.head.run(&["files", "list", VM, "system:/no/such", "--point", &before]).unwrap();
    assert!(refused.status == 1 && refused.json.to_string().contains("/no/such"), "{refused:?}");
}

#[test]
fn a_file_system_that_makes_no_sense_ends_the_command_and_nothing_else() {
    let mut world = World::new(82);
    install(&mut world);
    let disk = fs::File::options().write(true).open(world.daemon.disk(DISKS[0].0)).unwrap();
    disk.write_all_at(&[0xff; 64], 1024 + 0x60).unwrap();
    world.protect("1s", &[]);
    world.replicating();
    let output = world.head.run(&["files", "list", VM, "system:/"]).unwrap();
    assert_eq!(output.status, 1, "{output:?}");
    assert!(world.head.is_running());
    world.head.ok(&["status"]).unwrap();
}
