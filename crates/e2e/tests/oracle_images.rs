//! One state of a VM, read in every way there is (restored as raw, qcow2 and vhdx; a point and a backup over
//! NBD; a hold's flat files), by the programs of others: all of them show the same bytes.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::{DISKS, LONG, MIB, Shown, VM, World, path};
use e2e::foreign::{Nbdkit, are_alike, nbdcopy, nbdinfo};
use rig::{tool, wait_for};
use serde_json::Value;

/// A VM that has stopped writing, and one state of it: a point and its backup.
struct Still {
    world: World,
    point: Value,
    backup: String,
    /// The restored raw images.
    raw: Vec<PathBuf>,
}

impl Still {
    fn new(seed: u64) -> Self {
        let mut world = World::new(seed);
        world.write(1, Duration::from_micros(500));
        // Applied at once, so that the flat files are soon at the newest point.
        world.protect("1s", &["--points", "0"]);
        world.replicating();
        world.burst(5, seed);
        // The very end of the disk, which is no multiple of 4 MiB, too.
        rig::fill(&world.daemon, DISKS[1].0, DISKS[1].1 - 5120, 5120, seed).unwrap();
        world.quiet();
        world.branch.ok(&["sync", VM]).unwrap();
        world.branch.ok(&["pause", VM]).unwrap();
        let made = world.head.ok(&["backup", VM]).unwrap();
        let backup = made["backup"].as_str().unwrap().to_owned();
        let point = world.points().pop().unwrap();
        assert_eq!(made["point"], point["id"], "{made}");
        let raw = world.restore(&backup);
        Self { world, point, backup, raw }
    }

    fn restored(&self, format: &str) -> Vec<PathBuf> {
        let to = self.world.dir.path().join(format);
        let arguments = ["restore", VM, "--backup", &self.backup, "--to", path(&to), "--format", format];
        self.world.head.ok(&arguments).unwrap();
        DISKS.iter().map(|(name, _)| to.join(format!("{name}.{format}"))).collect()
    }

    fn point(&self, more: &[&str]) -> Shown {
        self.world.export_point(&self.point, more).unwrap()
    }

    fn backup(&self) -> Shown {
        Shown::of(&self.world.head.ok(&["export", "--backup", &self.backup]).unwrap())
    }

    /// The flat files, once they are at the point.
    fn held(&self) -> Vec<PathBuf> {
        let held = wait_for("a hold at the newest point", LONG, || {
            let output = self.world.head.run(&["hold", VM])?;
            if output.status == 75 {
                return Ok(None);
            }
            assert_eq!(output.status, 0, "{output:?}");
            if output.json["point"] == self.point["id"] {
                return Ok(Some(output.json));
            }
            self.world.head.ok(&["release", output.json["hold"].as_str().unwrap()])?;
            Ok(None)
        });
        let held = held.unwrap();
        let disks = held["disks"].as_array().unwrap();
        let file =
            |name| disks.iter().find(|disk| disk["name"] == name).unwrap()["path"].as_str().unwrap().into();
        DISKS.iter().map(|&(name, _)| file(name)).collect()
    }
}

#[test]
fn every_way_to_read_a_state_shows_the_same_bytes() {
    let still = Still::new(81);
    let [qcow2, vhdx] = ["qcow2", "vhdx"].map(|format| still.restored(format));
    let (point, backup, held) = (still.point(&[]), still.backup(), still.held());
    for disk in 0..DISKS.len() {
        let raw = ("raw", path(&still.raw[disk]));
        let others = [
            ("qcow2", path(&qcow2[disk])),
            ("vhdx", path(&vhdx[disk])),
            ("raw", &point.uris[disk]),
            ("raw", &backup.uris[disk]),
            ("raw", path(&held[disk])),
        ];
        for other in others {
            assert!(are_alike(raw, other).unwrap(), "{raw:?} and {other:?}");
        }
        info_is_true(&point.uris[disk], DISKS[disk].1, &still.raw[disk]);
        info_is_true(&backup.uris[disk], DISKS[disk].1, &still.raw[disk]);
        copies_are_true(&still, &point.uris[disk], disk);
        copies_are_true(&still, &backup.uris[disk], disk);
    }
    all_are_listed(&[&point, &backup]);
    nothing_but_these_bytes_is_written(&still, &point.uris[0]);
    what_is_copied_to_a_writable_export_is_there(&still, &backup.uris);
    // And all of this can fail.
    flip(&still.raw[1], 600 * MIB);
    assert!(!are_alike(("raw", path(&still.raw[1])), ("raw", &point.uris[1])).unwrap());
}

/// What libnbd hears about an export, against the disk's bytes.
fn info_is_true(uri: &str, size_bytes: u64, truth: &Path) {
    let info = &nbdinfo(uri, &[]).unwrap()["exports"][0];
    assert_eq!(info["export-size"], size_bytes, "{info}");
    for can in ["is_read_only", "can_multi_conn", "can_df"] {
        assert_eq!(info[can], true, "{can}: {info}");
    }
    for cannot in ["can_trim", "can_zero"] {
        assert_eq!(info[cannot], false, "{cannot}: {info}");
    }
    assert!(info["contexts"].as_array().unwrap().iter().any(|name| name == "base:allocation"), "{info}");

    let map = nbdinfo(uri, &["--map"]).unwrap();
    let truth = File::open(truth).unwrap();
    let (mut at, mut data) = (0, 0);
    for extent in map.as_array().unwrap() {
        let [offset, len, kind] = ["offset", "length", "type"].map(|key| extent[key].as_u64().unwrap());
        assert_eq!(offset, at, "no gap, no overlap: {extent}");
        at += len;
        if kind & 2 == 0 {
            data += len;
        } else {
            is_zero(&truth, offset, len);
        }
    }
    assert_eq!(at, size_bytes);
    assert!((MIB / 8..40 * MIB).contains(&data), "the holes are told: {data} bytes of data");
}

fn is_zero(file: &File, offset: u64, len: u64) {
    let mut buffer = vec![0; MIB as usize];
    for at in (offset..offset + len).step_by(MIB as usize) {
        let part = &mut buffer[..MIB.min(offset + len - at) as usize];
        file.read_exact_at(part, at).unwrap();
        assert!(part.iter().all(|&byte| byte == 0), "the map says zeros at byte {at}");
    }
}

/// Copied by libnbd over one connection and several, in small requests and large ones, with and without
/// extents.
fn copies_are_true(still: &Still, uri: &str, disk: usize) {
    let copy = still.world.dir.path().join("nbdcopied.raw");
    for options in [
        &["--connections=1", "--request-size=4096", "--requests=32"][..],
        &["--connections=4", "--threads=4", "--request-size=262144"],
        &["--connections=4", "--request-size=33554432", "--requests=4"],
        &["--synchronous", "--sparse=65536"],
        &["--no-extents", "--connections=2", "--request-size=1048576"],
    ] {
        if options[0] == "--no-extents" && disk == 1 {
            continue; // it would write out all the zeros of a large disk
        }
        nbdcopy(uri, &copy, options).unwrap();
        tool(Command::new("cmp").arg(&still.raw[disk]).arg(&copy)).unwrap();
        fs::remove_file(&copy).unwrap();
    }
}

fn all_are_listed(shown: &[&Shown]) {
    let (_, socket) = shown[0].uris[0].split_once('?').unwrap();
    let list = nbdinfo(&format!("nbd+unix:///?{socket}"), &["--list"]).unwrap();
    let names: Vec<_> = list["exports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|export| export["export-name"].as_str().unwrap())
        .collect();
    assert_eq!(names.len(), 2 * shown.len(), "{names:?}");
    for (name, _) in DISKS {
        for export in shown {
            assert!(names.contains(&&*format!("{}-{name}", export.id)), "{names:?}");
        }
    }
}

/// nbdkit's `checkwrite` takes writes and fails those that are not what its disk holds already.
fn nothing_but_these_bytes_is_written(still: &Still, uri: &str) {
    let dir = still.world.dir.path();
    let check = |truth: &Path| {
        let nbdkit = Nbdkit::start(dir, &["--filter=checkwrite", "file", path(truth)]).unwrap();
        tool(Command::new("nbdcopy").arg(uri).arg(nbdkit.uri()))
    };
    check(&still.raw[0]).unwrap();
    let other = dir.join("other.raw");
    fs::copy(&still.raw[0], &other).unwrap();
    flip(&other, 5 * MIB);
    check(&other).unwrap_err();
}

/// Our server as the one that is written to: the disks swap nothing, lose nothing, and the point below stays.
fn what_is_copied_to_a_writable_export_is_there(still: &Still, from: &[String; 2]) {
    let below = still.point(&["--writable"]);
    for (disk, from) in from.iter().enumerate() {
        // Other bytes first, so that something has to be written.
        let to = &below.uris[disk];
        tool(Command::new("qemu-io").args([
            "-f",
            "raw",
            "-c",
            "write -P 0x5a 3M 7M",
            "-c",
            "write -z 11M 1M",
            to,
        ]))
        .unwrap();
        assert!(!are_alike(("raw", path(&still.raw[disk])), ("raw", to)).unwrap());
        tool(Command::new("nbdcopy").args(["--connections=4", "--flush", from, to])).unwrap();
        assert!(are_alike(("raw", path(&still.raw[disk])), ("raw", to)).unwrap());
    }
    still.world.unexport(&below);
    let again = still.point(&[]);
    for disk in 0..DISKS.len() {
        assert!(are_alike(("raw", path(&still.raw[disk])), ("raw", &again.uris[disk])).unwrap());
    }
    still.world.unexport(&again);
}

fn flip(file: &Path, offset: u64) {
    let file = File::options().read(true).write(true).open(file).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[!byte[0]], offset).unwrap();
}
