//! 100 MB changed on a 100 GiB and on a 10 GiB sparse disk with the same 4 GiB of data, beside restic: what a
//! backup costs follows from what has changed, not from the size of the disk.

use std::path::PathBuf;

use anyhow::Context;
use rig::StorageDaemon;

use super::{BY_HAND, Folder, Sites, rotated};
use crate::disk::Disk;
use crate::image;
use crate::measure::{median, settle};
use crate::peers::Restic;
use crate::table::{Row, Table, Wanted};
use crate::{Arguments, say};

const DISK: &str = "disk";
/// The pieces of data of each disk, in MiB: 4 GiB.
const PIECES: u64 = 4096;
/// How much of them is changed, in bytes.
const CHANGE: u64 = 100_000_000;
const LARGE: &str = "large";
const SMALL: &str = "small";
const DISKS: [(&str, u64); 2] = [(LARGE, 100), (SMALL, 10)];

/// Runs the part.
pub fn run(arguments: &Arguments, table: &mut Table) -> anyhow::Result<()> {
    let folder = Folder::new(arguments, "sparse")?;
    say("making two sparse disks with 4 GiB of data");
    let daemons = daemons(&folder)?;
    let repositories = DISKS.map(|(name, _)| Restic::new(&folder.join(""), name, &folder.password()));
    repositories.iter().try_for_each(Restic::init)?;
    let sites = Sites::start(&folder, &[repositories[0].path(), repositories[1].path()])?;
    for ((name, _), daemon) in DISKS.iter().zip(&daemons) {
        sites.protect(name, daemon, DISK, BY_HAND)?;
    }
    say("full backups of both disks, which the changes are measured against");
    for ((name, _), repository) in DISKS.iter().zip(&repositories) {
        sites.backup(name, repository.path())?;
    }
    let restic = Restic::new(&folder.join("restic"), "repository", &folder.password());
    restic.init()?;
    restic.backup(&daemons[0].disk(DISK))?;

    let (mut large, mut small, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
    for run in 0..arguments.runs {
        say(&format!("backup of 100 MB changed, run {} of {}", run + 1, arguments.runs));
        change(&daemons, u64::from(run) + 1)?;
        for (name, _) in DISKS {
            sites.sync(name)?;
            sites.quiet(name)?;
        }
        for n in rotated(&[0, 1], run) {
            settle()?;
            let took = sites.backup(DISKS[n].0, repositories[n].path())?.seconds;
            if n == 0 { large.push(took) } else { small.push(took) }
        }
        settle()?;
        theirs.push(restic.backup(&daemons[0].disk(DISK))?.seconds);
    }
    rows(&large, &small, &theirs, table);
    sites.memory("sparse", &[], table)
}

/// A daemon for each disk.
fn daemons(folder: &Folder) -> anyhow::Result<[StorageDaemon; 2]> {
    let dirs = DISKS.map(|(name, _)| folder.join(&format!("daemon-{name}")));
    for dir in &dirs {
        std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    }
    let files: [PathBuf; 2] = dirs.each_ref().map(|dir| dir.join(format!("{DISK}.raw")));
    image::sparse(&[(&files[0], DISKS[0].1), (&files[1], DISKS[1].1)], PIECES)?;
    let start = |n: usize| StorageDaemon::start(&dirs[n], &[(DISK, DISKS[n].1 << 30)]);
    Ok([start(0)?, start(1)?])
}

/// The same pieces change on both disks.
fn change(daemons: &[StorageDaemon; 2], seed: u64) -> anyhow::Result<()> {
    for ((_, gib), daemon) in DISKS.iter().zip(daemons) {
        Disk::open(daemon, DISK)?.change(&image::within_pieces(seed, *gib, PIECES, CHANGE), seed)?;
    }
    Ok(())
}

fn rows(large: &[f64], small: &[f64], theirs: &[f64], table: &mut Table) {
    let what = "100 MB changed on a 100 GiB disk with 4 GiB of data";
    let row = |peer: &str, figures: &[f64], bound: f64| Row {
        what: what.into(),
        ours: median(large),
        peer: Some((peer.into(), median(figures))),
        unit: "s",
        wanted: Some(Wanted::AtMost(bound)),
        limit: None,
    };
    table.add(row("restic", theirs, 0.01));
    table.add(row("10 GiB disk", small, 1.3));
}
