//! How cycles and backups grow: with the disk, where the change stays the same, and with the change, where the disk does.
//! A backup of restic's stands beside each.

use plot::{Axis, BLUE, Canvas, GREEN, Panel, Series, Style, VERMILION, ticks};
use rig::StorageDaemon;

use super::{BY_HAND, Folder, Sites};
use crate::disk::Disk;
use crate::image;
use crate::measure::{median, settle};
use crate::peers::Restic;
use crate::table::{Row, Table};
use crate::{Arguments, say};

const DISK: &str = "disk";
const VM: &str = "vm";
/// The disks, in GiB.
const SIZES_GIB: [u64; 4] = [1, 4, 16, 64];
/// How much of each GiB is data, in pieces of 1 MiB.
const PIECES_OF_GIB: u64 = 128;
/// What changes on the disk of [`MIDDLE_GIB`], in MiB.
const CHANGES_MIB: [u64; 5] = [1, 4, 16, 64, 256];
const MIDDLE_GIB: u64 = 16;
/// What changes on every disk.
const MIDDLE_MIB: u64 = 16;
/// Curves need no more.
const RUNS_MAX: u32 = 3;

/// What a change costs, medians in seconds.
struct Point {
    gib: u64,
    mib: u64,
    cycle_s: f64,
    backup_s: f64,
    restic_s: f64,
}

/// Runs the part.
pub fn run(arguments: &Arguments, table: &mut Table) -> anyhow::Result<()> {
    let mut points = Vec::new();
    for gib in SIZES_GIB {
        let changes: &[u64] = if gib == MIDDLE_GIB { &CHANGES_MIB } else { &[MIDDLE_MIB] };
        points.extend(of_disk(arguments, gib, changes)?);
    }
    for point in &points {
        let Point { gib, mib, .. } = point;
        table.figure(format!("{mib} MiB changed on {gib} GiB: cycle"), point.cycle_s, "s", None);
        table.add(Row {
            what: format!("{mib} MiB changed on {gib} GiB: backup"),
            ours: point.backup_s,
            peer: Some(("restic".into(), point.restic_s)),
            unit: "s",
            wanted: None,
            limit: None,
        });
    }
    table.note(&format!(
        "curves: {} MiB of each GiB are data; medians of {}; a cycle is from its moment to the durable acknowledgement",
        PIECES_OF_GIB,
        arguments.runs.min(RUNS_MAX)
    ));
    table.plot("curves.svg", drawn(&points));
    Ok(())
}

/// A disk, its full backups, and what each change costs after them.
fn of_disk(arguments: &Arguments, gib: u64, changes: &[u64]) -> anyhow::Result<Vec<Point>> {
    say(&format!("a disk of {gib} GiB"));
    let folder = Folder::new(arguments, "curves")?;
    let (dir, pieces) = (folder.join("daemon"), gib * PIECES_OF_GIB);
    std::fs::create_dir_all(&dir)?;
    image::sparse(&[(&dir.join(format!("{DISK}.raw")), gib)], pieces)?;
    let daemon = StorageDaemon::start(&dir, &[(DISK, gib << 30)])?;
    let repository = Restic::new(&folder.join(""), "ours", &folder.password());
    let restic = Restic::new(&folder.join("restic"), "repository", &folder.password());
    repository.init()?;
    restic.init()?;
    let sites = Sites::start(&folder, &[repository.path()])?;
    sites.protect(VM, &daemon, DISK, BY_HAND)?;
    sites.backup(VM, repository.path())?;
    restic.backup(&daemon.disk(DISK))?;

    let mut points = Vec::new();
    for &mib in changes {
        let (mut cycles, mut backups, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
        for run in 0..arguments.runs.min(RUNS_MAX) {
            let seed = mib * u64::from(RUNS_MAX) + u64::from(run);
            Disk::open(&daemon, DISK)?.change(&image::within_pieces(seed, gib, pieces, mib << 20), seed)?;
            settle()?;
            cycles.push(sites.sync(VM)?.total_s);
            sites.quiet(VM)?;
            backups.push(sites.backup(VM, repository.path())?.seconds);
            settle()?;
            theirs.push(restic.backup(&daemon.disk(DISK))?.seconds);
        }
        points.push(Point {
            gib,
            mib,
            cycle_s: median(&cycles),
            backup_s: median(&backups),
            restic_s: median(&theirs),
        });
    }
    Ok(points)
}

fn drawn(points: &[Point]) -> String {
    let mut canvas = Canvas::new(
        960.0,
        450.0,
        "A cycle and a backup cost what has changed, not what the disk holds",
        "Seconds; an eighth of each disk is data",
    );
    let seconds = ticks(&[0.01, 0.1, 1.0, 10.0, 100.0], |value| format!("{value} s"));
    let panel = |left, x| Panel {
        left,
        top: 104.0,
        width: 290.0,
        height: 260.0,
        x,
        y: Axis::log("", seconds.clone()),
    };
    let gib = ticks(&SIZES_GIB.map(|gib| gib as f64), |gib| format!("{gib} GiB"));
    let mib = ticks(&CHANGES_MIB.map(|mib| mib as f64), |mib| format!("{mib} MiB"));
    let size = panel(64.0, Axis::log("disk, 16 MiB changed", gib));
    let change = panel(540.0, Axis::log("changed, on a disk of 16 GiB", mib));
    for (panel, of) in [
        (
            size,
            points
                .iter()
                .filter(|point| point.mib == MIDDLE_MIB)
                .map(|point| (point.gib, point))
                .collect::<Vec<_>>(),
        ),
        (
            change,
            points.iter().filter(|point| point.gib == MIDDLE_GIB).map(|point| (point.mib, point)).collect(),
        ),
    ] {
        panel.frame(&mut canvas);
        let line = |name: &str, style: Style, value: fn(&Point) -> f64| Series {
            name: name.into(),
            style,
            points: of.iter().map(|(x, point)| (*x as f64, value(point))).collect(),
        };
        panel.lines(
            &mut canvas,
            &[
                line("cycle", GREEN, |point| point.cycle_s),
                line("backup", BLUE, |point| point.backup_s),
                line("restic", VERMILION, |point| point.restic_s),
            ],
        );
    }
    canvas.finish()
}
