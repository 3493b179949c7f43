//! Full and incremental backup, restore and check of a realistic image, beside restic, borg, rustic and virtnbdbackup; and
//! what copying it plainly takes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use rig::StorageDaemon;

use super::{BY_HAND, Backup, Folder, Sites, name_of, rotated, same};
use crate::disk::Disk;
use crate::image::scattered;
use crate::limits::Limits;
use crate::measure::{Ran, disk_usage, median, run as timed, settle};
use crate::peers::{Borg, Restic, Rustic, SETTINGS, VirtNbdBackup};
use crate::table::{Row, Table, Wanted};
use crate::{Arguments, say};

const VM: &str = "vm";
const DISK: &str = "disk";

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Tool {
    Ours,
    Restic,
    Borg,
    Rustic,
    VirtNbdBackup,
    QemuImg,
    NbdCopy,
}

impl Tool {
    const fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Restic => "restic",
            Self::Borg => "borg",
            Self::Rustic => "rustic",
            Self::VirtNbdBackup => "virtnbdbackup",
            Self::QemuImg => "qemu-img",
            Self::NbdCopy => "nbdcopy",
        }
    }
}

const BACKUP_TOOLS: [Tool; 5] = [Tool::Ours, Tool::Restic, Tool::Borg, Tool::Rustic, Tool::VirtNbdBackup];

/// One figure of each tool, for every run.
#[derive(Default)]
struct Figures(BTreeMap<Tool, Vec<f64>>);

impl Figures {
    fn push(&mut self, tool: Tool, figure: f64) {
        self.0.entry(tool).or_default().push(figure);
    }

    fn ours(&self) -> f64 {
        self.0.get(&Tool::Ours).map_or(f64::NAN, |figures| median(figures))
    }

    /// A row for each peer, with what is wanted of the ratio.
    fn rows(
        &self,
        what: &str,
        unit: &'static str,
        limit: Option<f64>,
        wanted: &[(Tool, f64)],
        table: &mut Table,
    ) {
        for (tool, figures) in self.0.iter().filter(|(tool, _)| **tool != Tool::Ours) {
            let bound = wanted.iter().find(|(of, _)| of == tool).map(|(_, bound)| Wanted::AtMost(*bound));
            table.add(Row {
                what: what.to_owned(),
                ours: self.ours(),
                peer: Some((tool.name().to_owned(), median(figures))),
                unit,
                wanted: bound,
                limit,
            });
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
    rustic: Rustic,
    virtnbd: VirtNbdBackup,
    limits: &'static Limits,
    /// Bytes of the disk that are no holes.
    data: f64,
}

/// Runs the part.
pub fn run(arguments: &Arguments, table: &mut Table) -> anyhow::Result<()> {
    let image = arguments.image()?;
    let limits = Limits::of(arguments)?;
    let folder = Folder::new(arguments, "backup")?;
    let daemon = daemon_with(&folder, &image, arguments.image_gib)?;
    let repositories: Vec<PathBuf> = (1..=arguments.runs).map(|n| folder.join(&format!("run{n}"))).collect();
    let paths: Vec<&Path> = repositories.iter().map(PathBuf::as_path).collect();
    let sites = Sites::start(&folder, &paths)?;
    sites.protect(VM, &daemon, DISK, BY_HAND)?;
    let data = disk_usage(&daemon.disk(DISK))?;
    table.note(&format!(
        "realistic image: {} GiB, {:.1} GB of it data; {SETTINGS}",
        arguments.image_gib,
        data / 1e9
    ));
    let mut bench = Bench {
        arguments,
        restic: Restic::new(&folder.join("restic"), "repository", &folder.password()),
        borg: Borg::new(&folder.join("borg")),
        rustic: Rustic::new(&folder.join("rustic"), &folder.password()),
        virtnbd: VirtNbdBackup::start(&folder.join("lv"), &daemon.disk(DISK))?,
        folder: &folder,
        sites: &sites,
        daemon: &daemon,
        repositories: &repositories,
        limits,
        data,
    };
    bench.full(table)?;
    let newest = bench.incremental(table)?;
    let peaks = bench.restore(&newest, table)?;
    bench.check(table)?;
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
        let [mut seconds, mut bytes, mut peaks, mut cpu] = [(); 4].map(|()| Figures::default());
        for run in 0..self.arguments.runs {
            say(&format!("full backup, run {} of {}", run + 1, self.arguments.runs));
            self.make_repositories(run)?;
            for tool in rotated(&BACKUP_TOOLS, run) {
                settle()?;
                let ran = self.back_up(tool, run)?;
                seconds.push(tool, ran.seconds);
                cpu.push(tool, ran.cpu_s / (self.data / 1e9));
                bytes.push(tool, self.repository_bytes(tool, run)? / 1e9);
                peaks.push(tool, ran.peak_mb);
            }
        }
        let image = format!("{} GiB image", self.arguments.image_gib);
        let limit = Some(self.limits.backup_s(self.data));
        seconds.rows(
            &format!("full backup, {image}"),
            "s",
            limit,
            &[(Tool::Restic, 0.5), (Tool::Borg, 0.4)],
            table,
        );
        bytes.rows(&format!("repository after it, {image}"), "GB", None, &[(Tool::Restic, 1.0)], table);
        cpu.rows("processor time of a full backup, per GB", "s", None, &[], table);
        let peaks = peaks.0.iter().filter(|(tool, _)| **tool != Tool::Ours);
        let peaks: Vec<String> =
            peaks.map(|(tool, figures)| format!("{} {:.0} MB", tool.name(), median(figures))).collect();
        table.note(&format!("peak memory of a full backup: {}", peaks.join(", ")));
        Ok(())
    }

    fn back_up(&mut self, tool: Tool, run: u32) -> anyhow::Result<Ran> {
        let disk = self.disk();
        match tool {
            Tool::Restic => self.restic.backup(&disk),
            Tool::Borg => self.borg.backup(&disk),
            Tool::Rustic => self.rustic.backup(&disk),
            Tool::VirtNbdBackup => self.virtnbd.full(),
            _ => {
                let backup = self.sites.backup(VM, &self.repositories[run as usize])?;
                let Backup { seconds, cpu_s, .. } = backup;
                Ok(Ran { seconds, cpu_s, peak_mb: 0.0, stdout: String::new() })
            }
        }
    }

    fn repository_bytes(&self, tool: Tool, run: u32) -> anyhow::Result<f64> {
        match tool {
            Tool::Restic => self.restic.bytes(),
            Tool::Borg => self.borg.bytes(),
            Tool::Rustic => self.rustic.bytes(),
            Tool::VirtNbdBackup => self.virtnbd.bytes(),
            _ => disk_usage(&self.repositories[run as usize]),
        }
    }

    fn make_repositories(&mut self, run: u32) -> anyhow::Result<()> {
        if let Some(previous) = run.checked_sub(1) {
            let _ = std::fs::remove_dir_all(&self.repositories[previous as usize]);
        }
        // Tool::Ours is a restic repository like any other.
        let name = format!("run{}", run + 1);
        Restic::new(&self.folder.join(""), &name, &self.folder.password()).init()?;
        self.restic.init()?;
        self.borg.init()?;
        self.rustic.init()
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
            self.virtnbd.change(&extents, u64::from(run) + 1)?;
            self.sites.sync(VM)?;
            self.sites.quiet(VM)?;
            for tool in rotated(&BACKUP_TOOLS, run) {
                settle()?;
                let took = match tool {
                    Tool::Ours => {
                        let backup = self.sites.backup(VM, &repository)?;
                        read.push([backup.bytes_read, backup.bytes_added].map(|bytes| bytes as f64));
                        newest = backup.id;
                        backup.seconds
                    }
                    Tool::VirtNbdBackup => self.virtnbd.incremental()?.seconds,
                    _ => self.back_up(tool, run)?.seconds,
                };
                seconds.push(tool, took);
            }
        }
        let column = |n: usize| median(&read.iter().map(|figures| figures[n]).collect::<Vec<_>>());
        let limit = self.limits.backup_s(size as f64 / 100.0);
        seconds.rows("backup of a 1 % change", "s", Some(limit), &[(Tool::Restic, 0.1)], table);
        table.note(&format!(
            "for a 1 % change ({:.0} MB) ours read {:.0} MB and added {:.0} MB",
            size as f64 / 100.0 / 1e6,
            column(0) / 1e6,
            column(1) / 1e6
        ));
        Ok(newest)
    }

    fn last_repository(&self) -> &Path {
        &self.repositories[self.repositories.len() - 1]
    }

    /// The newest backup of each, restored; ours is compared with the disk once. Beside them what plain copies of
    /// the disk take. Our command's memory.
    fn restore(&self, newest: &str, table: &mut Table) -> anyhow::Result<Vec<f64>> {
        let (mut seconds, mut peaks) = (Figures::default(), Vec::new());
        let to = self.folder.join("restored");
        for run in 0..self.arguments.runs {
            say(&format!("restore, run {} of {}", run + 1, self.arguments.runs));
            for tool in rotated(&[Tool::Ours, Tool::Restic, Tool::Rustic, Tool::QemuImg, Tool::NbdCopy], run)
            {
                std::fs::create_dir_all(&to)?;
                settle()?;
                let ran = match tool {
                    Tool::Restic => self.restic.restore(&to)?,
                    Tool::Rustic => self.rustic.restore(&to)?,
                    Tool::QemuImg | Tool::NbdCopy => timed(&self.copy(tool, &to.join("copy.raw")))?,
                    _ => timed(&self.sites.restore(VM, newest, self.last_repository(), &to)?)?,
                };
                if tool == Tool::Ours {
                    peaks.push(ran.peak_mb);
                    if run == 0 {
                        same(&to.join(format!("{DISK}.raw")), &self.disk())?;
                    }
                }
                seconds.push(tool, ran.seconds);
                std::fs::remove_dir_all(&to)?;
            }
        }
        let what = format!("restore of the {} GiB image", self.arguments.image_gib);
        let limit = Some(self.limits.restore_s(self.data));
        seconds.rows(&what, "s", limit, &[(Tool::Restic, 0.7)], table);
        table.note("beside the restore: qemu-img convert and nbdcopy --flush copy the raw disk, neither packed nor checked");
        Ok(peaks)
    }

    /// The disk copied as it is.
    fn copy(&self, tool: Tool, to: &Path) -> Command {
        let mut command = Command::new(tool.name());
        if tool == Tool::NbdCopy {
            let uri = format!("nbd+unix:///{DISK}?socket={}", self.daemon.nbd().display());
            command.arg("--flush").arg(uri).arg(to);
        } else {
            // The disk is open for writing in the daemon; nobody writes to it now.
            command
                .args(["convert", "-U", "-f", "raw", "-O", "raw", "-t", "writeback"])
                .arg(self.disk())
                .arg(to);
        }
        command
    }

    /// Everything read again and checked: all backups of ours, and restic's of its own repository.
    fn check(&self, table: &mut Table) -> anyhow::Result<()> {
        let mut seconds = Figures::default();
        let name = name_of(self.last_repository());
        for run in 0..self.arguments.runs {
            say(&format!("check, run {} of {}", run + 1, self.arguments.runs));
            for tool in rotated(&[Tool::Ours, Tool::Restic], run) {
                settle()?;
                let ran = match tool {
                    Tool::Ours => {
                        timed(&self.sites.replica.command(&["verify", VM, "--repository", &name])?)?
                    }
                    _ => self.restic.check()?,
                };
                seconds.push(tool, ran.seconds);
            }
        }
        seconds.rows("everything read again and checked", "s", None, &[], table);
        Ok(())
    }
}
