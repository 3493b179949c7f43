//! fio writes blocks that it can recognise to the primary, and finds them in what comes back: in restored
//! backups, and in recovery points over NBD.

mod common;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::{DISKS, MIB, VM, World, path};
use e2e::foreign::fio;
use serde_json::Value;

/// Where fio writes, and how much.
const AT: u64 = 2 * MIB;
const LEN: u64 = 12 * MIB;

/// How fio recognises its blocks.
#[derive(Debug, Clone, Copy)]
enum Marks {
    /// Each carries its place and a checksum of itself. Blocks of an earlier job would pass as well.
    Checksums,
    /// Each is filled with its place and these bytes: blocks of an earlier job do not pass.
    Bytes(u16),
}

/// A job: blocks of random sizes at random places, the same each time.
fn job(marks: Marks, more: &[&str]) -> rig::Result<Value> {
    let (at, len) = (format!("--offset={AT}"), format!("--size={LEN}"));
    let job =
        ["--name=job", "--rw=randwrite", "--bsrange=512-64k", "--verify_fatal=1", "--verify_state_save=0"];
    let marks = match marks {
        Marks::Checksums => vec!["--verify=crc32c".to_owned()],
        Marks::Bytes(bytes) => vec!["--verify=pattern".into(), format!("--verify_pattern={bytes:#06x}%o")],
    };
    let marks = marks.iter().map(String::as_str).collect::<Vec<_>>();
    fio(&[&job, &marks[..], &[&at, &len], more].concat()).map(|report| report["jobs"][0].clone())
}

/// Writes to a disk of the primary; how many blocks.
fn write(world: &World, disk: usize, marks: Marks) -> u64 {
    let uri = format!("--uri=nbd+unix:///{}?socket={}", DISKS[disk].0, world.daemon.nbd().display());
    let report =
        job(marks, &["--ioengine=nbd", &uri, "--iodepth=16", "--fsync=100", "--do_verify=0"]).unwrap();
    report["write"]["total_ios"].as_u64().unwrap()
}

/// Reads the blocks of a job back from a file, and checks them; how many bytes.
fn verify_file(file: &Path, marks: Marks) -> rig::Result<u64> {
    let name = format!("--filename={}", path(file));
    let report = job(marks, &["--ioengine=psync", &name, "--verify_only=1"])?;
    Ok(report["read"]["io_bytes"].as_u64().unwrap())
}

/// The same from an export, which fio wants to be writable.
fn verify_export(uri: &str, marks: Marks) -> rig::Result<u64> {
    let uri = format!("--uri={uri}");
    let report = job(marks, &["--ioengine=nbd", &uri, "--iodepth=16", "--verify_only=1"])?;
    Ok(report["read"]["io_bytes"].as_u64().unwrap())
}

#[test]
fn what_fio_wrote_comes_back_from_points_and_backups() {
    let world = World::new(71);
    world.protect("1s", &[]);
    world.replicating();
    let (mut blocks, mut bytes) = (0, 0);
    let mut before = Marks::Bytes(0x0101);
    for marks in [Marks::Checksums, Marks::Bytes(0x7102), Marks::Checksums] {
        for disk in [0, 1] {
            blocks += write(&world, disk, marks);
        }
        world.branch.ok(&["sync", VM]).unwrap();
        let backup = world.head.ok(&["backup", VM]).unwrap();
        let images = world.restore(backup["backup"].as_str().unwrap());
        let shown = world.export_point(world.points().last().unwrap(), &["--writable"]).unwrap();
        for disk in [0, 1] {
            assert_eq!(verify_file(&images[disk], marks).unwrap(), LEN);
            assert_eq!(verify_export(&shown.uris[disk], marks).unwrap(), LEN);
            bytes += 2 * LEN;
            // And it does say no: to blocks of the job before.
            verify_file(&images[disk], before).unwrap_err();
        }
        world.unexport(&shown);
        flip(&images[0], AT + LEN / 2);
        verify_file(&images[0], marks).unwrap_err();
        before = marks;
    }
    println!("fio wrote {blocks} blocks and verified {} MiB", bytes / MIB);
}

fn flip(image: &Path, offset: u64) {
    let file = OpenOptions::new().read(true).write(true).open(image).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[!byte[0]], offset).unwrap();
}
