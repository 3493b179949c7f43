//! Full and incremental backup and restore of a realistic image, beside restic and borg.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use rig::StorageDaemon;

use super::{BY_HAND, Folder, Sites, rotated, same};
use crate::disk::Disk;
use crate::image::scattered;
use crate::measure::{disk_usage, median, run as timed, settle};
use crate::peers::{Borg, Restic, SETTINGS};
use crate::table::{Row, Table, Wanted};
use crate::{Arguments, say};

const VM: &str = "vm";
const DISK: &str = "disk";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Tool {
    Ours,
    Restic,
    Borg,
}

const TOOLS: [Tool; 3] = [Tool::Ours, Tool::Restic, Tool::Borg];

/// One figure of each tool, for every run.
#[derive(Default)]
struct Figures {
    ours: Vec<f64>,
    restic: Vec<f64>,
    borg: Vec<f64>,
}

impl Figures {
    fn of(&mut self, tool: Tool) -> &mut Vec<f64> {
        match tool {
            Tool::Ours => &mut self.ours,
            Tool::Restic => &mut self.restic,
            Tool::Borg => &mut self.borg,
        }
    }

    /// A row for each peer, with what is wanted of the ratio.
    fn rows(&self, what: &str, unit: &'static str, wanted: [Option<f64>; 2], table: &mut Table) {
        for (peer, figures, wanted) in [("restic", &self.restic, wanted[0]), ("borg", &self.borg, wanted[1])]
        {
            if !figures.is_empty() {
                table.add(Row {
                    what: what.to_owned(),
                    ours: median(&self.ours),
                    peer: Some((peer.to_owned(), median(figures))),
                    unit,
                    wanted: wanted.map(Wanted::AtMost),
                });
            }
        }
    }
}

/// Everything that is measured against each other.
struct Bench<'a> {
    arguments: &'a Arguments,
    folder: &'a Folder,
    sites: &'a Sites,
    daemon: &'a StorageDaemon,
    /// Ours, one for each run.
    repositories: &'a [PathBuf],
    restic: Restic,
    borg: Borg,
}

/// Runs the part.
pub fn run(arguments: &Arguments, table: &mut Table) -> anyhow::Result<()> {
    let image = arguments.image()?;
    let folder = Folder::new(arguments, "backup")?;
    let daemon = daemon_with(&folder, &image, arguments.image_gib)?;
    let repositories: Vec<PathBuf> = (1..=arguments.runs).map(|n| folder.join(&format!("run{n}"))).collect();
    let paths: Vec<&Path> = repositories.iter().map(PathBuf::as_path).collect();
    let sites = Sites::start(&folder, &paths)?;
    sites.protect(VM, &daemon, DISK, BY_HAND)?;
    let restic = Restic::new(&folder.join("restic"), "repository", &folder.password());
    let borg = Borg::new(&folder.join("borg"));
    let (folder, sites, daemon, repositories) = (&folder, &sites, &daemon, &repositories);
    let mut bench = Bench { arguments, folder, sites, daemon, repositories, restic, borg };
    let data = disk_usage(&bench.disk())? / 1e9;
    table.note(&format!("realistic image: {} GiB, {data:.1} GB of it data; {SETTINGS}", arguments.image_gib));
    bench.full(table)?;
    let newest = bench.incremental(table)?;
    let peaks = bench.restore(&newest, table)?;
    sites.memory("backup", &[("restore command", &peaks)], table)
}

/// A daemon whose disk is a copy of the image, as sparse as it is.
fn daemon_with(folder: &Folder, image: &Path, gib: u64) -> anyhow::Result<StorageDaemon> {
    let dir = folder.join("daemon");
    std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    let disk = dir.join(format!("{DISK}.raw"));
    rig::tool(Command::new("cp").arg("--sparse=always").arg(image).arg(&disk))?;
    Ok(StorageDaemon::start(&dir, &[(DISK, gib << 30)])?)
}

impl Bench<'_> {
    fn disk(&self) -> PathBuf {
        self.daemon.disk(DISK)
    }

    /// Full backups, each into a repository that was made for it; those of the last run stay.
    fn full(&mut self, table: &mut Table) -> anyhow::Result<()> {
        let (mut seconds, mut bytes, mut peaks) =
            (Figures::default(), Figures::default(), Figures::default());
        for run in 0..self.arguments.runs {
            say(&format!("full backup, run {} of {}", run + 1, self.arguments.runs));
            self.make_repositories(run)?;
            for tool in rotated(&TOOLS, run) {
                settle()?;
                let (took, added) = match tool {
                    Tool::Ours => {
                        let repository = &self.repositories[run as usize];
                        (self.sites.backup(VM, repository)?.seconds, disk_usage(repository)?)
                    }
                    Tool::Restic => {
                        let ran = self.restic.backup(&self.disk())?;
                        peaks.restic.push(ran.peak_mb);
                        (ran.seconds, self.restic.bytes()?)
                    }
                    Tool::Borg => {
                        let ran = self.borg.backup(&self.disk())?;
                        peaks.borg.push(ran.peak_mb);
                        (ran.seconds, self.borg.bytes()?)
                    }
                };
                seconds.of(tool).push(took);
                bytes.of(tool).push(added / 1e9);
            }
        }
        let image = format!("{} GiB image", self.arguments.image_gib);
        seconds.rows(&format!("full backup, {image}"), "s", [Some(0.5), Some(0.4)], table);
        bytes.rows(&format!("repository after it, {image}"), "GB", [Some(1.0), None], table);
        table.note(&format!(
            "peak memory of a full backup: restic {:.0} MB, borg {:.0} MB",
            median(&peaks.restic),
            median(&peaks.borg)
        ));
        Ok(())
    }

    fn make_repositories(&mut self, run: u32) -> anyhow::Result<()> {
        if let Some(previous) = run.checked_sub(1) {
            let _ = std::fs::remove_dir_all(&self.repositories[previous as usize]);
        }
        // Ours is a restic repository like any other.
        let name = format!("run{}", run + 1);
        Restic::new(&self.folder.join(""), &name, &self.folder.password()).init()?;
        self.restic.init()?;
        self.borg.init()
    }

    /// A change of 1 %, and a backup of it with each tool; again for every run. The newest backup of ours.
    fn incremental(&mut self, table: &mut Table) -> anyhow::Result<String> {
        let (mut seconds, mut newest, mut read) = (Figures::default(), String::new(), Vec::new());
        let size = self.arguments.image_gib << 30;
        let repository = self.last_repository().to_owned();
        for run in 0..self.arguments.runs {
            say(&format!("backup of a 1 % change, run {} of {}", run + 1, self.arguments.runs));
            let extents = scattered(u64::from(run) + 1, size, size / 100);
            Disk::open(self.daemon, DISK)?.change(&extents, u64::from(run) + 1)?;
            self.sites.sync(VM)?;
            self.sites.quiet(VM)?;
            for tool in rotated(&TOOLS, run) {
                settle()?;
                let took = match tool {
                    Tool::Ours => {
                        let backup = self.sites.backup(VM, &repository)?;
                        read.push([backup.bytes_read, backup.bytes_added].map(|bytes| bytes as f64 / 1e6));
                        newest = backup.id;
                        backup.seconds
                    }
                    Tool::Restic => self.restic.backup(&self.disk())?.seconds,
                    Tool::Borg => self.borg.backup(&self.disk())?.seconds,
                };
                seconds.of(tool).push(took);
            }
        }
        seconds.rows("backup of a 1 % change", "s", [Some(0.1), None], table);
        let column = |n: usize| median(&read.iter().map(|figures| figures[n]).collect::<Vec<_>>());
        table.note(&format!(
            "for a 1 % change ({:.0} MB) ours read {:.0} MB and added {:.0} MB",
            size as f64 / 100.0 / 1e6,
            column(0),
            column(1)
        ));
        Ok(newest)
    }

    fn last_repository(&self) -> &Path {
        &self.repositories[self.repositories.len() - 1]
    }

    /// The newest backup of each, restored; ours is compared with the disk once. Our command's memory.
    fn restore(&self, newest: &str, table: &mut Table) -> anyhow::Result<Vec<f64>> {
        let (mut seconds, mut peaks) = (Figures::default(), Vec::new());
        let to = self.folder.join("restored");
        for run in 0..self.arguments.runs {
            say(&format!("restore, run {} of {}", run + 1, self.arguments.runs));
            for tool in rotated(&[Tool::Ours, Tool::Restic], run) {
                settle()?;
                let ran = if tool == Tool::Ours {
                    let ran = timed(&self.sites.restore(VM, newest, self.last_repository(), &to)?)?;
                    peaks.push(ran.peak_mb);
                    ran
                } else {
                    self.restic.restore(&to)?
                };
                if run == 0 && tool == Tool::Ours {
                    same(&to.join(format!("{DISK}.raw")), &self.disk())?;
                }
                seconds.of(tool).push(ran.seconds);
                std::fs::remove_dir_all(&to)?;
            }
        }
        let what = format!("restore of the {} GiB image", self.arguments.image_gib);
        seconds.rows(&what, "s", [Some(0.7), None], table);
        Ok(peaks)
    }
}
