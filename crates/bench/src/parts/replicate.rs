//! A delta of 1 GiB, from the moment to the durable acknowledgement with both sites on this machine, beside
//! nbdcopy of the same bytes to a file that is flushed, and rsync of the disk into a copy of it.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use rig::StorageDaemon;

use super::{BY_HAND, Cycle, Folder, PATIENCE, Sites, mb_per_s, rotated};
use crate::disk::Disk;
use crate::image::{self, MIB};
use crate::limits::Limits;
use crate::measure::{median, run as timed, settle};
use crate::table::{Row, Table, Wanted};
use crate::{Arguments, say};

const VM: &str = "vm";
const DISK: &str = "disk";
const DELTA_PIECES: usize = 1024;
/// The delta is every other MiB of the disk.
const STRIDE: u64 = 2 * MIB as u64;
const DELTA_BYTES: u64 = DELTA_PIECES as u64 * MIB as u64;
/// Deltas: the disk that has just these bytes, and what they are.
const KINDS: [(&str, &str); 2] = [("noise", "incompressible"), ("real", "realistic")];

/// Runs the part.
pub fn run(arguments: &Arguments, table: &mut Table) -> anyhow::Result<()> {
    let image = arguments.image()?;
    let folder = Folder::new(arguments, "replicate")?;
    let daemon = start_daemon(&folder, &image)?;
    let sites = Sites::start(&folder, &[])?;
    // The replica's base is to be as allocated as that of a disk in use.
    Disk::open(&daemon, DISK)?.write_file(&daemon.disk("noise"), STRIDE)?;
    sites.protect(VM, &daemon, DISK, BY_HAND)?;
    let old = folder.join("rsync.raw");
    rsync(&daemon, &old)?;
    let mut rates: [[Vec<f64>; 3]; 2] = Default::default();
    let mut shares = Vec::new();
    for run in 0..arguments.runs {
        say(&format!("replication of a delta of 1 GiB, run {} of {}", run + 1, arguments.runs));
        for (kind, (source, _)) in KINDS.iter().enumerate() {
            for tool in rotated(&[0, 1], run) {
                settle()?;
                if tool == 1 {
                    rates[kind][1].push(copy(&daemon, source, &folder.join("copy.raw"))?);
                    continue;
                }
                let cycle = replicate(&sites, &daemon, source)?;
                if kind == 1 {
                    shares.push(cycle.log_bytes as f64 / cycle.data_bytes as f64);
                }
                rates[kind][0].push(mb_per_s(cycle.data_bytes, cycle.total_s));
                // Its copy lacks just what this cycle has shipped.
                settle()?;
                rates[kind][2].push(mb_per_s(DELTA_BYTES, rsync(&daemon, &old)?));
            }
        }
    }
    let limits = Limits::of(arguments)?;
    for ((_, what), ([ours, copied, synced], ratio)) in
        KINDS.iter().zip(rates.iter().zip([1.0, limits.log_ratio()]))
    {
        let what = format!("replication of a 1 GiB delta, {what}");
        table.figure(what.clone(), median(ours), "MB/s", Some(Wanted::AtLeast(200.0)));
        let limit = Some(limits.replicate_rate(ratio) / 1e6);
        for (peer, theirs) in [("nbdcopy", copied), ("rsync", synced)] {
            let (what, peer) = (what.clone(), Some((peer.to_owned(), median(theirs))));
            table.add(Row { what, ours: median(ours), peer, unit: "MB/s", wanted: None, limit });
        }
    }
    table.note(&format!(
        "replication: bytes of disk per second from the moment to the durable acknowledgement; the logs of the \
         realistic delta had {:.0} % of its bytes; nbdcopy --flush copies the same bytes, neither compressed nor \
         checksummed, to a file; rsync --inplace --no-whole-file --fsync brings a copy of the disk up to date",
        median(&shares) * 100.0
    ));
    sites.memory("replicate", &[], table)
}

/// The VM's disk, and beside it one for each delta that has only its bytes.
fn start_daemon(folder: &Folder, image: &Path) -> anyhow::Result<StorageDaemon> {
    let dir = folder.join("daemon");
    std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    image::noise(&dir.join("noise.raw"), DELTA_BYTES)?;
    image::excerpt(image, &dir.join("real.raw"), DELTA_PIECES)?;
    let disks = [(DISK, DELTA_PIECES as u64 * STRIDE), ("noise", DELTA_BYTES), ("real", DELTA_BYTES)];
    Ok(StorageDaemon::start(&dir, &disks)?)
}

/// The delta is written while the VM is paused, so that one cycle ships all of it.
fn replicate(sites: &Sites, daemon: &StorageDaemon, source: &str) -> anyhow::Result<Cycle> {
    sites.primary.ok(&["pause", VM])?;
    let before = Cycle::of(&sites.primary.vm(VM)?).ok();
    Disk::open(daemon, DISK)?.write_file(&daemon.disk(source), STRIDE)?;
    settle()?;
    sites.primary.ok(&["resume", VM])?;
    let is_new = |cycle: &Cycle| before.as_ref().is_none_or(|before| before.moment != cycle.moment);
    let vm = sites.primary.wait_vm(VM, "the delta to be replicated", PATIENCE, |vm| {
        Cycle::of(vm).is_ok_and(|cycle| is_new(&cycle))
    })?;
    let cycle = Cycle::of(&vm)?;
    let shipped = cycle.data_bytes + cycle.zero_bytes;
    ensure!(shipped >= DELTA_BYTES, "the cycle shipped {shipped} bytes of {DELTA_BYTES}: {cycle:?}");
    sites.quiet(VM)?;
    Ok(cycle)
}

fn copy(daemon: &StorageDaemon, source: &str, to: &Path) -> anyhow::Result<f64> {
    let uri = format!("nbd+unix:///{source}?socket={}", daemon.nbd().display());
    let ran = timed(Command::new("nbdcopy").arg("--flush").arg(uri).arg(to))?;
    std::fs::remove_file(to)?;
    Ok(mb_per_s(DELTA_BYTES, ran.seconds))
}

/// Brings a copy of the disk up to date; how long it took, in seconds.
fn rsync(daemon: &StorageDaemon, copy: &Path) -> anyhow::Result<f64> {
    let mut command = Command::new("rsync");
    command.args(["--inplace", "--no-whole-file", "--fsync", "--ignore-times"]);
    Ok(timed(command.arg(daemon.disk(DISK)).arg(copy))?.seconds)
}
