//! How often the replica writes each changed byte: once into a log, at most once into the base. The kernel
//! counts (`write_bytes` of the site's process); the data does not compress, so nothing is hidden by that.

use anyhow::Context;
use rig::StorageDaemon;

use super::{BY_HAND, Folder, Sites};
use crate::disk::Disk;
use crate::image::scattered;
use crate::measure::written_bytes;
use crate::table::{Table, Wanted};
use crate::{Arguments, say};

const VM: &str = "vm";
const DISK: &str = "disk";
const DISK_BYTES: u64 = 1 << 30;
const CYCLES: u64 = 8;
const CHANGE_BYTES: u64 = 128 << 20;

/// Runs the part.
pub fn run(arguments: &Arguments, table: &mut Table) -> anyhow::Result<()> {
    let folder = Folder::new(arguments, "io")?;
    let daemon = StorageDaemon::start(&folder.join("daemon"), &[(DISK, DISK_BYTES)])?;
    let sites = Sites::start(&folder, &[])?;
    let disk = Disk::open(&daemon, DISK)?;
    disk.scramble(&whole_disk(), 99)?;
    sites.protect(VM, &daemon, DISK, BY_HAND)?;

    say(&format!("{CYCLES} cycles of 128 MiB, and as many of one block"));
    let large = cycles(&sites, |n| disk.scramble(&scattered(n + 1, DISK_BYTES, CHANGE_BYTES), n + 1))?;
    let small = cycles(&sites, |n| disk.scramble(&[(n << 24, 4096)], n + 1))?;
    // What a cycle of one block writes beyond that block's two writes is what any cycle costs.
    let fixed = small.written.saturating_sub(2 * small.changed);
    let written = large.written.saturating_sub(fixed);
    table.figure(
        "replica: bytes written per changed byte, log and base",
        written as f64 / large.changed as f64,
        "x",
        Some(Wanted::AtMost(2.0)),
    );
    table.figure("replica: the same with everything", large.written as f64 / large.changed as f64, "x", None);
    let per_cycle = fixed as f64 / CYCLES as f64 / 1e3;
    table.figure("replica: written per cycle beside its data (catalog, headers)", per_cycle, "kB", None);
    sites.memory("io", &[], table)
}

fn whole_disk() -> Vec<(u64, u64)> {
    (0..DISK_BYTES >> 20).map(|n| (n << 20, 1 << 20)).collect()
}

/// Bytes changed, and bytes that the replica wrote for them.
struct Count {
    changed: u64,
    written: u64,
}

/// Cycles one after the other, each applied before the next one.
fn cycles(sites: &Sites, mut change: impl FnMut(u64) -> anyhow::Result<()>) -> anyhow::Result<Count> {
    let pid = sites.replica.pid().context("the replica's site does not run")?;
    let (before, mut changed) = (written_bytes(pid)?, 0);
    for n in 0..CYCLES {
        change(n)?;
        changed += sites.sync(VM)?.data_bytes;
        sites.quiet(VM)?;
    }
    Ok(Count { changed, written: written_bytes(pid)? - before })
}
