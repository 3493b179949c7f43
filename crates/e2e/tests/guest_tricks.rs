//! A guest that writes to its disks what would make a careless host open other files: its bytes are bytes.

mod common;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use common::{DISKS, LONG, VM, World, path};
use rig::{need, tool};
use serde_json::Value;

const SECRET: &str = "the host's secret, which no guest may read";

/// Makes disk images of each kind whose backing file or extent is the secret, and writes them where a guest would.
fn plant(world: &World) {
    let secret = world.dir.path().join("secret");
    std::fs::write(&secret, SECRET.repeat(4096)).unwrap();
    let trick = world.dir.path().join("trick");
    tool(
        Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
            .args([&secret, &trick])
            .arg(DISKS[0].1.to_string()),
    )
    .unwrap();
    let descriptor = format!(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\nRW 8192 FLAT \"{}\" 0\n",
        secret.display()
    );
    let luks = b"LUKS\xba\xbe\x00\x01aes\0".to_vec();
    let write = |disk: &str, offset: u64, bytes: &[u8]| {
        let file = std::fs::OpenOptions::new().write(true).open(world.daemon.disk(disk)).unwrap();
        file.write_all_at(bytes, offset).unwrap();
    };
    write(DISKS[0].0, 0, &std::fs::read(&trick).unwrap());
    write(DISKS[1].0, 0, descriptor.as_bytes());
    write(DISKS[1].0, 1 << 20, &luks);
}

fn same(original: &Path, format: &str, copy: &Path) {
    tool(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", format]).arg(original).arg(copy))
        .unwrap();
}

fn holds_no_secret(file: &Path) {
    let found = Command::new("grep").args(["-q", "-a", "-F", SECRET]).arg(file).status().unwrap();
    assert_eq!(found.code(), Some(1), "{} holds the secret", file.display());
}

#[test]
fn images_within_a_disk_are_bytes_of_the_disk() {
    need("qemu-img", "qemu-utils").unwrap();
    let world = World::new(81);
    plant(&world);
    world.protect("1s", &[]);
    world.replicating();
    world.branch.ok(&["sync", VM]).unwrap();
    world.branch.ok(&["pause", VM]).unwrap();
    let originals: Vec<_> = DISKS.iter().map(|(name, _)| world.daemon.disk(name)).collect();
    let original_of = |disk: &Value| world.daemon.disk(disk["name"].as_str().unwrap());
    let backup = world.head.ok(&["backup", VM]).unwrap();
    let id = backup["backup"].as_str().unwrap();
    world.head.ok(&["verify", VM]).unwrap();

    for (format, extension) in [("raw", "raw"), ("qcow2", "qcow2"), ("vhdx", "vhdx")] {
        let to = world.dir.path().join(format);
        world.head.ok(&["restore", VM, "--backup", id, "--to", path(&to), "--format", format]).unwrap();
        for ((name, _), original) in DISKS.iter().zip(&originals) {
            let copy = to.join(format!("{name}.{extension}"));
            same(original, format, &copy);
            holds_no_secret(&copy);
            std::fs::remove_file(copy).unwrap();
        }
    }

    for what in [&["export", VM][..], &["export", "--backup", id, "--writable"]] {
        let export = world.head.ok(what).unwrap();
        for disk in export["disks"].as_array().unwrap() {
            let (original, uri) = (original_of(disk), disk["uri"].as_str().unwrap());
            tool(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw"]).arg(original).arg(uri))
                .unwrap();
        }
        world.head.ok(&["unexport", export["export"].as_str().unwrap()]).unwrap();
    }

    let hold = world.head.ok(&["hold", VM]).unwrap();
    assert!(hold["disks"].as_array().unwrap().iter().all(|disk| disk["format"] == "raw"), "{hold}");
    world.head.ok(&["release", hold["hold"].as_str().unwrap()]).unwrap();

    let failover = world.head.ok(&["failover", "unplanned", VM]).unwrap();
    for disk in failover["disks"].as_array().unwrap() {
        let original = &original_of(disk);
        let overlay = Path::new(disk["path"].as_str().unwrap());
        same(original, "qcow2", overlay);
        let chain = tool(
            Command::new("qemu-img")
                .args(["info", "--output=json", "--backing-chain", "-f", "qcow2"])
                .arg(overlay),
        );
        let chain: Value = serde_json::from_str(&chain.unwrap()).unwrap();
        assert_eq!(chain[0]["backing-filename-format"], "raw", "QEMU is not left to guess: {chain}");
        assert_eq!(chain.as_array().unwrap().len(), 2, "the base is raw, and the last: {chain}");
    }
    world.head.ok(&["failover", "cancel", VM]).unwrap();
    world.branch.ok(&["resume", VM]).unwrap();
    world.branch.wait_vm(VM, "to go on", LONG, |vm| vm["error"].is_null()).unwrap();
}
