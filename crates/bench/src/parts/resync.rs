//! A resynchronization after QEMU was killed: both sides read their whole disk and compare it, and what differs travels. Beside
//! it `cat` of both images, one after the other and both from the disk.

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, ensure};
use rig::{Line, Site, StorageDaemon};

use super::{BY_HAND, Folder, PATIENCE, Sites, mb_per_s};
use crate::disk::Disk;
use crate::image::{noise, scattered};
use crate::measure::{median, run as timed, settle};
use crate::table::{Row, Table, Wanted};
use crate::{Arguments, say};

const VM: &str = "vm";
const DISK: &str = "disk";
/// The share of the disk that changes.
const CHANGED: f64 = 0.01;

/// Runs the part.
pub fn run(arguments: &Arguments, table: &mut Table) -> anyhow::Result<()> {
    let bytes = arguments.resync_gib << 30;
    let folder = Folder::new(arguments, "resync")?;
    let dir = folder.join("daemon");
    std::fs::create_dir_all(&dir)?;
    noise(&dir.join(format!("{DISK}.raw")), bytes)?;
    let mut daemon = StorageDaemon::start(&dir, &[(DISK, bytes)])?;
    let (sites, line) = sites(&folder)?;
    sites.protect(VM, &daemon, DISK, BY_HAND)?;
    let (mut rates, mut peers, mut shares) = (Vec::new(), Vec::new(), Vec::new());
    for run in 0..arguments.runs {
        say(&format!("a resynchronization after a kill of QEMU, run {} of {}", run + 1, arguments.runs));
        let changed = scattered(u64::from(run) + 1, bytes, (bytes as f64 * CHANGED) as u64);
        Disk::open(&daemon, DISK)?.scramble(&changed, u64::from(run) + 1)?;
        daemon.kill();
        daemon = StorageDaemon::start(&dir, &[(DISK, bytes)])?;
        forget_cache()?;
        let before = line.bytes();
        let began = Instant::now();
        sites.primary.ok(&["resync", VM])?;
        sites.primary.wait_vm(VM, "to be compared", PATIENCE, |vm| vm["state"] == "replicating")?;
        rates.push(mb_per_s(2 * bytes, began.elapsed().as_secs_f64()));
        shares.push((line.bytes() - before) as f64 / bytes as f64 * 100.0);
        sites.quiet(VM)?;
        same(&sites, &daemon)?;
        forget_cache()?;
        let base = base_of(&sites.replica)?;
        let read = timed(Command::new("cat").arg(daemon.disk(DISK)).arg(&base))?;
        peers.push(mb_per_s(2 * bytes, read.seconds));
    }
    let gib = arguments.resync_gib;
    table.figure(
        format!("resynchronization of {gib} GiB with 1 % changed: bytes on the line"),
        median(&shares),
        "% of the disk",
        Some(Wanted::AtMost(1.5)),
    );
    table.add(Row {
        what: format!("resynchronization of {gib} GiB with 1 % changed: both images read"),
        ours: median(&rates),
        peer: Some(("cat of both".into(), median(&peers))),
        unit: "MB/s",
        wanted: Some(Wanted::AtLeast(0.7)),
        limit: None,
    });
    table.note(
        "resynchronization: extents of 64 to 512 KiB all over the disk change, QEMU is killed and started again, the caches are emptied; the bytes of both \
         images per second, from the command to the point that is whole again, beside cat of both images from the disk; bytes on the \
         line are all of them, digests and acknowledgements too",
    );
    sites.memory("resync", &[], table)
}

/// Two sites with a line between them that counts.
fn sites(folder: &Folder) -> anyhow::Result<(Sites, Line)> {
    let mut replica = Site::init(&folder.join(""), "replica")?;
    let mut primary = Site::init(&folder.join(""), "primary")?;
    let line = Line::to(replica.address())?;
    // Invites name the line, so that all replication crosses it.
    let advertise = format!("\nadvertise = \"{}\"\n", line.address());
    replica.configure(&[("\n# What peers are told", &format!("{advertise}# What peers are told"))])?;
    replica.serve()?;
    primary.serve()?;
    replica.invite(&primary)?;
    Ok((Sites { primary, replica }, line))
}

/// The flat image of the replica.
fn base_of(replica: &Site) -> anyhow::Result<PathBuf> {
    let vm = replica.vm(VM)?;
    let id = vm["id"].as_str().context("the replica has an id")?;
    Ok(replica.dir().join("vms").join(id).join("disks").join(format!("{DISK}.raw")))
}

/// What is measured is worth nothing if it is wrong.
fn same(sites: &Sites, daemon: &StorageDaemon) -> anyhow::Result<()> {
    let status = Command::new("cmp").arg(daemon.disk(DISK)).arg(base_of(&sites.replica)?).status()?;
    ensure!(status.success(), "the replica differs from the disk after the resynchronization");
    Ok(())
}

/// Has both images read from the disk.
fn forget_cache() -> anyhow::Result<()> {
    settle()?;
    std::fs::write("/proc/sys/vm/drop_caches", "3").context("emptying the caches needs root")
}
