//! A VM that runs under libvirt, of a daemon of the test's own: protected by its name alone, replicated byte for byte
//! through other programs' work on it and through the end of its QEMU, and left as it was.

mod common;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use common::{LONG, MIB, VM, path, sites};
use rig::{Libvirt, Line, Site, tool, wait_for};
use serde_json::{Value, json};
use tempfile::TempDir;

/// What the VM is called in libvirt.
const DOMAIN: &str = "web-server";
const DISKS: [(&str, u64); 2] = [("vda", 32 * MIB), ("vdb", 5 * MIB + 4096)];

struct World {
    branch: Site,
    head: Site,
    _line: Line,
    libvirt: Libvirt,
    dir: TempDir,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("ai").tempdir().unwrap();
        let libvirt = Libvirt::start(&dir.path().join("l")).unwrap();
        let disks = DISKS.map(|(target, bytes)| {
            let image = dir.path().join(format!("{target}.qcow2"));
            libvirt.make_disk(&image, bytes).unwrap();
            tool(Command::new("qemu-io").args(["-c", "write -P 17 1M 2M"]).arg(&image)).unwrap();
            (target, image)
        });
        libvirt
            .start_domain(DOMAIN, &disks.each_ref().map(|(target, image)| (*target, image.as_path())))
            .unwrap();
        let (head, branch, line) = sites(dir.path(), None);
        Self { branch, head, _line: line, libvirt, dir }
    }

    fn protect(&self) -> rig::Output {
        let uri = self.libvirt.uri();
        let how = ["--libvirt", &uri, "--domain", DOMAIN, "--to", "head", "--every", "1s"];
        self.branch.run(&[&["protect", VM], &how[..]].concat()).unwrap()
    }

    /// The guest writes: a byte over a stretch of each disk.
    fn write(&self, offset: u64, len: u64, byte: u8) {
        for disk in 0..DISKS.len() {
            self.libvirt.write(DOMAIN, &format!("virtio-disk{disk}"), offset, len, byte).unwrap();
        }
    }

    fn virsh(&self, arguments: &[&str]) {
        self.libvirt.virsh(arguments).unwrap();
    }

    /// Runs a cycle; the newest point at the replica is then the disks, byte for byte. Nobody may write meanwhile.
    fn is_replicated(&self) {
        self.branch.ok(&["sync", VM]).unwrap();
        let export = self.head.ok(&["export", VM]).unwrap();
        for (target, bytes) in DISKS {
            let disks = export["disks"].as_array().unwrap();
            let shown = disks.iter().find(|disk| disk["name"] == target).expect("a disk by its target");
            let image = self.image(target);
            let compare = ["compare", "-U", "-f", "qcow2", "-F", "raw"];
            let uri = shown["uri"].as_str().unwrap();
            let same = tool(Command::new("qemu-img").args(compare).arg(&image).arg(uri));
            assert!(same.unwrap().contains("identical"), "{target} of {bytes} bytes");
        }
        self.head.ok(&["unexport", export["export"].as_str().unwrap()]).unwrap();
    }

    fn image(&self, target: &str) -> PathBuf {
        self.dir.path().join(format!("{target}.qcow2"))
    }

    /// Jobs, exports and nodes of ours in QEMU.
    fn ours(&self) -> Vec<String> {
        let questions =
            [("query-jobs", "id"), ("query-block-exports", "id"), ("query-named-block-nodes", "node-name")];
        let mut ours = Vec::new();
        for (command, key) in questions {
            let there = self.libvirt.qmp(DOMAIN, command, &json!({})).unwrap();
            let names = there.as_array().unwrap().iter().filter_map(|item| item[key].as_str());
            ours.extend(names.filter(|name| name.starts_with("afterimage")).map(str::to_owned));
        }
        ours
    }

    /// All bitmaps in QEMU.
    fn bitmaps(&self) -> Vec<Value> {
        let nodes = self.libvirt.qmp(DOMAIN, "query-named-block-nodes", &json!({})).unwrap();
        let of = |node: &Value| node["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
        nodes.as_array().unwrap().iter().flat_map(of).collect()
    }
}

#[test]
fn a_domain_is_protected_by_its_name_through_everything_that_befalls_it() {
    let mut world = World::new();
    let protected = match world.protect() {
        refused if refused.status != 0 => {
            // As root: the site's folder is closed to QEMU's user, and the message says how to open it.
            let folder = world.branch.dir();
            let message = refused.json["error"]["message"].as_str().unwrap().to_owned();
            assert!(message.contains(&format!("chmod o+x {}", path(folder))), "{message}");
            std::fs::set_permissions(folder, Permissions::from_mode(0o711)).unwrap();
            world.protect()
        }
        protected => protected,
    };
    assert_eq!(protected.status, 0, "{protected:?}");
    let disks = protected.json["disks"].as_array().unwrap();
    assert_eq!(disks.iter().map(|disk| disk["name"].as_str().unwrap()).collect::<Vec<_>>(), ["vda", "vdb"]);
    world.branch.wait_vm(VM, "to replicate", LONG, |vm| vm["state"] == "replicating").unwrap();
    world.is_replicated();
    for round in 0..3 {
        world.write(round * 70_000, 12_345, 40 + round as u8);
        world.is_replicated();
    }

    // The site is killed while a moment is fixed: QEMU keeps what was made in it, until the site is back.
    world.branch.stop();
    world.branch.start(&[("AFTERIMAGE_FAIL_AT", "qemu::sweep::begin:2")]).unwrap();
    wait_for("the site to die", LONG, || Ok((!world.branch.is_running()).then_some(()))).unwrap();
    assert!(world.ours().iter().any(|name| name.ends_with("-j0")), "{:?}", world.ours());
    world.branch.serve().unwrap();
    world.write(9 * MIB / 2, 50_000, 45);
    world.is_replicated();

    // Between cycles QEMU is as others want it: libvirt starts its NBD server for a pull backup.
    world.branch.ok(&["pause", VM]).unwrap();
    assert_eq!(world.ours(), Vec::<String>::new());
    let backup = format!(
        "<domainbackup mode='pull'><server transport='unix' socket='{0}/backup.sock'/><disks>\
         <disk name='vda' backup='yes' type='file'><scratch file='{0}/scratch.qcow2'/></disk>\
         <disk name='vdb' backup='no'/></disks></domainbackup>",
        world.dir.path().join("l").display()
    );
    let backup = world.libvirt.file("backup.xml", &backup).unwrap();
    world.virsh(&["backup-begin", DOMAIN, path(&backup)]);
    world.virsh(&["domjobabort", DOMAIN]);
    let jobs = || world.libvirt.qmp(DOMAIN, "query-jobs", &json!({}));
    wait_for("the backup to end", LONG, || Ok((jobs()? == json!([])).then_some(()))).unwrap();
    world.branch.ok(&["resume", VM]).unwrap();

    // Another program's job: named, waited for, and not hindered.
    let copy = world.dir.path().join("l/copy.qcow2");
    world.virsh(&["blockcopy", DOMAIN, "vda", path(&copy), "--transient-job"]);
    world.write(3 * MIB, 100_000, 50);
    let refused = world.branch.run(&["sync", VM]).unwrap();
    let message = refused.json["error"]["message"].as_str().unwrap();
    assert!(refused.status == 75 && message.contains("mirror job"), "{refused:?}");
    let status = world.branch.vm(VM).unwrap();
    assert_eq!(status["error"]["code"], "in-the-way", "{status}");
    world.virsh(&["blockjob", DOMAIN, "vda", "--abort"]);
    world.is_replicated();

    // QEMU ends, and starts again: what was tracked is gone with it.
    let before = world.head.vm(VM).unwrap();
    world.virsh(&["destroy", DOMAIN]);
    let gone = |vm: &Value| {
        let error = &vm["error"];
        error["code"] == "qemu-gone"
            && error["message"].as_str().is_some_and(|why| why.contains("was destroyed"))
    };
    world.branch.wait_vm(VM, "to say that the domain was destroyed", LONG, gone).unwrap();
    world.virsh(&["start", DOMAIN, "--paused"]);
    world.write(0, 2 * MIB, 60);
    let again = |vm: &Value| vm["state"] == "replicating" && vm["failures"] == 0;
    world.branch.wait_vm(VM, "to replicate again", LONG, again).unwrap();
    world.is_replicated();
    let after = world.head.vm(VM).unwrap();
    assert!(after["received"].as_u64() > before["received"].as_u64(), "{before} {after}");

    // What defines the domain is at the replica.
    let catalog: Vec<u8> = ["catalog.sqlite", "catalog.sqlite-wal"]
        .iter()
        .flat_map(|name| std::fs::read(world.head.dir().join(name)).unwrap_or_default())
        .collect();
    let needle = format!("<name>{DOMAIN}</name>");
    assert!(catalog.windows(needle.len()).any(|bytes| bytes == needle.as_bytes()), "the domain's XML");

    world.branch.ok(&["unprotect", VM]).unwrap();
    let left = std::fs::read_dir(world.branch.dir().join("libvirt")).unwrap().count();
    assert_eq!(left, 0, "QEMU's folder is gone");
    assert_eq!((world.ours(), world.bitmaps()), (Vec::new(), Vec::new()));
    world.virsh(&["destroy", DOMAIN]);
}

#[test]
fn a_domain_that_is_not_there_or_lacks_something_is_refused_with_what_to_do() {
    let world = World::new();
    let uri = world.libvirt.uri();
    let refused = |more: &[&str]| {
        let refused = world.branch.run(&[&["protect", VM, "--to", "head"], more].concat()).unwrap();
        assert_ne!(refused.status, 0, "{refused:?}");
        refused.json["error"]["message"].as_str().unwrap_or_default().to_owned()
    };
    // Without --domain it is the VM's name.
    let message = refused(&["--libvirt", &uri]);
    assert!(message.contains("no domain web") && message.contains("list --all"), "{message}");
    let message = refused(&["--libvirt", &uri, "--domain", DOMAIN, "--app-every", "1h"]);
    assert!(message.contains("org.qemu.guest_agent.0"), "{message}");
    let message = refused(&["--libvirt", "qemu+ssh://host/system"]);
    assert!(message.contains("run a site there"), "{message}");
    world.virsh(&["destroy", DOMAIN]);
    let message = refused(&["--libvirt", &uri, "--domain", DOMAIN]);
    assert!(message.contains("does not run here"), "{message}");
}
