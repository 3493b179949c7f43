//! Disks of a running VM that grow, come and go: the others are replicated on, and each point has the disks that were
//! whole at its moment, byte for byte.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::{DISKS, LONG, MIB, VM, World, in_qemu};
use rig::{fill, tool, wait_for};
use serde_json::{Value, json};

const NEW: (&str, u64) = ("extra", 96 * MIB);
const LATER: (&str, u64) = ("later", 5 * MIB);

impl World {
    /// Has QEMU do something, over the monitor that nobody else uses.
    fn try_qemu(&self, name: &'static str, arguments: Value) -> Result<Value, qemu::Error> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let qmp = qemu::Qmp::connect(&self.daemon.second_qmp(), LONG).await?;
            qmp.run(qemu::Command::new(name, arguments)).await
        })
    }

    fn qemu(&self, commands: &[(&'static str, Value)]) {
        for (name, arguments) in commands {
            self.try_qemu(name, arguments.clone()).unwrap();
        }
    }

    /// Plugs a disk in, with noise all over it.
    fn plug(&self, (name, bytes): (&str, u64), seed: u64) -> PathBuf {
        let file = self.dir.path().join(format!("{name}.raw"));
        std::fs::File::create(&file).unwrap().set_len(bytes).unwrap();
        self.qemu(&[
            ("blockdev-add", json!({"driver": "file", "node-name": format!("{name}-file"), "filename": file})),
            ("blockdev-add", json!({"driver": "raw", "node-name": name, "file": format!("{name}-file")})),
            ("block-export-add", json!({"type": "nbd", "id": format!("guest-{name}"), "node-name": name, "name": name, "writable": true})),
        ]);
        fill(&self.daemon, name, 0, bytes, seed).unwrap();
        file
    }

    fn disks(&self) -> Vec<String> {
        let vm = self.branch.vm(VM).unwrap();
        vm["disks"].as_array().unwrap().iter().map(|disk| disk["name"].as_str().unwrap().to_owned()).collect()
    }

    /// Waits until a disk has joined.
    fn joined(&self, name: &str) {
        let whole = |vm: &Value| {
            let disks = vm["disks"].as_array().unwrap();
            disks.iter().any(|disk| disk["name"] == name && disk["copied_bytes"].is_null())
        };
        self.branch.wait_vm(VM, "to have the disk", LONG, whole).unwrap();
    }

    /// Whether a point's disks are, byte for byte, what these files hold.
    #[track_caller]
    fn same(&self, point: &str, files: &[(&str, PathBuf)]) {
        let shown = self.head.ok(&["export", VM, "--point", point]).unwrap();
        let disks = shown["disks"].as_array().unwrap();
        let names: Vec<&str> = disks.iter().map(|disk| disk["name"].as_str().unwrap()).collect();
        assert_eq!(names, files.iter().map(|(name, _)| *name).collect::<Vec<_>>());
        for (disk, (_, file)) in disks.iter().zip(files) {
            let compare = ["compare", "-U", "-f", "raw", "-F", "raw"];
            tool(Command::new("qemu-img").args(compare).arg(file).arg(disk["uri"].as_str().unwrap()))
                .unwrap();
        }
        self.head.ok(&["unexport", shown["export"].as_str().unwrap()]).unwrap();
    }
}

/// A copy of a disk as it is now.
fn copy(from: &Path, to: &Path) -> PathBuf {
    std::fs::copy(from, to).unwrap();
    to.to_owned()
}

#[test]
fn disks_grow_come_and_go_and_the_others_are_replicated_on() {
    let mut world = World::new(83);
    world.write(1, Duration::from_millis(2));
    world.protect("1s", &["--points", "4"]);
    world.replicating();
    let from = world.quiet();
    world.branch.ok(&["sync", VM]).unwrap();
    world.head.ok(&["pin", VM, "latest", "--name", "before"]).unwrap();
    let files = ["data", "system"].map(|name| (name, world.daemon.disk(name)));
    let before = files
        .each_ref()
        .map(|(name, file)| (*name, copy(file, &world.dir.path().join(format!("{name}.before")))));
    world.same("before", &before);

    // A disk grows and is written to beyond its old end. (An export, other than a device of QEMU's, keeps it from that.)
    let (name, size) = ("data", DISKS[1].1 + 40 * MIB);
    world.qemu(&[("block-export-del", json!({"id": "guest-data", "mode": "hard"}))]);
    wait_for("no moment to be fixed", LONG, || {
        Ok(world.try_qemu("block_resize", json!({"node-name": name, "size": size})).is_ok().then_some(()))
    })
    .unwrap();
    let export =
        json!({"type": "nbd", "id": "guest-data", "node-name": name, "name": name, "writable": true});
    world.qemu(&[("block-export-add", export)]);
    world.write(from, Duration::from_millis(2));
    fill(&world.daemon, name, DISKS[1].1 - MIB, 9 * MIB, 5).unwrap();
    let from = world.quiet();
    world.branch.ok(&["sync", VM]).unwrap();
    world.same("latest", &files);
    world.same("before", &before);
    assert_eq!(world.head.vm(VM).unwrap()["disks"][0]["size_bytes"], size);

    // Disks are plugged in. All writable ones are protected: they join by themselves, and meanwhile points are made.
    world.write(from, Duration::from_millis(2));
    let extra = world.plug(NEW, 7);
    world
        .branch
        .wait_vm(VM, "to see the disk", LONG, |vm| vm["disks"].as_array().unwrap().len() == 3)
        .unwrap();
    world.branch.kill(); // wherever it is
    world.branch.serve().unwrap();
    world.joined(NEW.0);
    let from = world.quiet();
    world.branch.ok(&["sync", VM]).unwrap();
    let three = [files[0].clone(), files[1].clone(), (NEW.0, extra.clone())];
    world.same("latest", &three);
    world.same("before", &before);
    let backup = world.backup(&["--consistency", "crash"]);
    assert_eq!(backup.status, 0, "{backup:?}");
    let restored = world.restore(backup.json["backup"].as_str().unwrap());
    let restored = restored[0].with_file_name(format!("{}.raw", NEW.0));
    tool(Command::new("cmp").args([&restored, &extra])).unwrap();

    // One is taken out; the points that have it keep it.
    world.head.ok(&["pin", VM, "latest", "--name", "three"]).unwrap();
    let three_then = three
        .each_ref()
        .map(|(name, file)| (*name, copy(file, &world.dir.path().join(format!("{name}.three")))));
    world.branch.ok(&["disk", "remove", VM, NEW.0]).unwrap();
    assert_eq!(world.disks(), ["data", "system"]);
    world.write(from, Duration::from_millis(2));
    fill(&world.daemon, NEW.0, MIB, MIB, 11).unwrap();
    world.plug(LATER, 13);
    world.joined(LATER.0);
    let from = world.quiet();
    world.branch.ok(&["sync", VM]).unwrap();
    let later = (LATER.0, world.dir.path().join(format!("{}.raw", LATER.0)));
    world.same("latest", &[files[0].clone(), files[1].clone(), later.clone()]);
    world.same("three", &three_then);

    // It comes back: under its name, as it is now.
    world.write(from, Duration::from_millis(2));
    world.branch.ok(&["disk", "add", VM, NEW.0]).unwrap();
    world.joined(NEW.0);
    world.quiet();
    world.branch.ok(&["sync", VM]).unwrap();
    world.same("latest", &[files[0].clone(), files[1].clone(), later, (NEW.0, extra)]);
    world.same("three", &three_then);
    world.same("before", &before);

    let refused = world.branch.run(&["disk", "remove", VM, "nvme7"]).unwrap();
    let message = refused.json["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("no disk of web is named nvme7"), "{message}");
    world.branch.ok(&["unprotect", VM]).unwrap();
    let known = ["system", "data", "extra", "later", "system-file", "data-file", "extra-file", "later-file"];
    assert_eq!(in_qemu(&world.daemon.second_qmp(), &known), Vec::<String>::new());
}
