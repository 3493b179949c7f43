//! The parts of the bench, and what they have in common: two real sites on this machine, and a VM's disks.

pub mod apply;
pub mod backup;
pub mod curves;
pub mod failover;
pub mod guest;
pub mod io;
pub mod nightly;
pub mod replicate;
pub mod resync;
pub mod scale;
pub mod sparse;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use rig::{Site, StorageDaemon};
use serde_json::Value;

use crate::measure::{Ran, cpu_seconds, largest, peak_mb, run, settle};
use crate::table::{Table, Wanted};
use crate::{Arguments, say};

/// How long anything may take before the bench gives up.
const PATIENCE: Duration = Duration::from_secs(3600);
/// The most memory that a site may use, in MB.
const MEMORY: Wanted = Wanted::AtMost(200.0);
/// An interval so long that only those cycles run that are asked for.
const BY_HAND: &str = "15m";

/// The folder of a part. It goes with its owner, unless it is to be kept.
pub struct Folder {
    path: PathBuf,
    keep: bool,
}

impl Folder {
    /// An empty folder for a part.
    pub fn new(arguments: &Arguments, part: &str) -> anyhow::Result<Self> {
        let path = arguments.dir.join(part);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
        fs::write(path.join("password"), "bench")?;
        Ok(Self { path, keep: arguments.keep })
    }

    /// A path in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The password of every repository in it.
    pub fn password(&self) -> PathBuf {
        self.join("password")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.keep {
            say(&format!("{} is kept", self.path.display()));
        } else {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Two sites that trust each other.
pub struct Sites {
    /// Where the VMs run.
    pub primary: Site,
    /// Where their replicas and backups are.
    pub replica: Site,
}

impl Sites {
    /// Starts both; the replica's site knows these repositories, each by the name of its folder.
    pub fn start(folder: &Folder, repositories: &[&Path]) -> anyhow::Result<Self> {
        let mut replica = Site::init(&folder.path, "replica")?;
        let mut primary = Site::init(&folder.path, "primary")?;
        let mut config = fs::OpenOptions::new().append(true).open(replica.dir().join("config.toml"))?;
        for path in repositories {
            let password = folder.password();
            writeln!(
                config,
                "\n[repositories.{}]\npath = {path:?}\npassword-file = {password:?}",
                name_of(path)
            )?;
        }
        replica.serve()?;
        primary.serve()?;
        replica.invite(&primary)?;
        Ok(Self { primary, replica })
    }

    /// Protects one disk of a daemon, and waits until the whole of it is at the replica.
    pub fn protect(&self, vm: &str, daemon: &StorageDaemon, disk: &str, every: &str) -> anyhow::Result<()> {
        say(&format!("initial replication of {vm}"));
        self.begin_to_protect(vm, daemon, disk, every)?;
        self.primary.wait_vm(vm, "its initial replication", PATIENCE, |vm| vm["state"] == "replicating")?;
        self.quiet(vm)
    }

    /// The same without waiting for its initial replication.
    pub fn begin_to_protect(
        &self,
        vm: &str,
        daemon: &StorageDaemon,
        disk: &str,
        every: &str,
    ) -> anyhow::Result<()> {
        let (qmp, nbd) = (daemon.qmp(), daemon.nbd());
        let (qmp, nbd) = (qmp.to_string_lossy(), nbd.to_string_lossy());
        self.primary.ok(&[
            "protect", vm, "--qmp", &qmp, "--nbd", &nbd, "--to", "replica", "--every", every, "--disk", disk,
        ])?;
        Ok(())
    }

    /// Runs a cycle; what it was.
    pub fn sync(&self, vm: &str) -> anyhow::Result<Cycle> {
        self.primary.ok(&["sync", vm])?;
        Cycle::of(&self.primary.vm(vm)?)
    }

    /// Waits until the replica has everything and has applied it, and until all that is on the disk.
    pub fn quiet(&self, vm: &str) -> anyhow::Result<()> {
        let acked = self.primary.vm(vm)?["acked"].as_u64();
        self.replica.wait_vm(vm, "to have applied everything", PATIENCE, |vm| {
            vm["apply"] == "idle" && vm["received"].as_u64() >= acked && vm["applied"] == vm["received"]
        })?;
        settle()
    }

    /// Backs up a replica.
    pub fn backup(&self, vm: &str, repository: &Path) -> anyhow::Result<Backup> {
        let arguments = ["backup", vm, "--repository", &name_of(repository)];
        let pid = self.replica.pid().context("the replica's site does not run")?;
        let before = cpu_seconds(pid)?;
        let mut ran = run(&self.replica.command(&arguments)?)?;
        ran.cpu_s += cpu_seconds(pid)? - before;
        Backup::of(&ran).with_context(|| format!("{arguments:?} printed {}", ran.stdout))
    }

    /// The command that restores a backup into a folder.
    pub fn restore(&self, vm: &str, backup: &str, repository: &Path, to: &Path) -> anyhow::Result<Command> {
        let (to, repository) = (to.to_string_lossy(), name_of(repository));
        let arguments = ["restore", vm, "--backup", backup, "--repository", &repository, "--to", &to];
        Ok(self.replica.command(&arguments)?)
    }

    /// The most memory that each site has used, in MB.
    pub fn peaks(&self) -> anyhow::Result<[(&'static str, f64); 2]> {
        let peak = |site: &Site| peak_mb(site.pid().context("the site does not run")?);
        Ok([("primary", peak(&self.primary)?), ("replica", peak(&self.replica)?)])
    }

    /// The rows of both sites' memory, and of other peaks in MB.
    pub fn memory(&self, part: &str, others: &[(&str, &[f64])], table: &mut Table) -> anyhow::Result<()> {
        for (what, peak) in self.peaks()? {
            table.figure(format!("{part}: peak memory, {what}'s site"), peak, "MB", Some(MEMORY));
        }
        for (what, peaks) in others {
            table.figure(format!("{part}: peak memory, {what}"), largest(peaks), "MB", Some(MEMORY));
        }
        Ok(())
    }
}

/// The name of a repository: that of its folder.
fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A cycle, as the primary's status tells.
#[derive(Debug, Clone, PartialEq)]
pub struct Cycle {
    /// Its moment: which cycle it was.
    pub moment: String,
    /// Bytes of its logs.
    pub log_bytes: u64,
    /// Bytes of disk in them.
    pub data_bytes: u64,
    /// Bytes of zeros in them.
    pub zero_bytes: u64,
    /// From the moment to the durable acknowledgement, in seconds.
    pub total_s: f64,
}

impl Cycle {
    /// The last one of a VM's status.
    pub fn of(vm: &Value) -> anyhow::Result<Self> {
        let cycle = &vm["last_cycle"];
        let number = |key: &str| cycle[key].as_u64();
        let found = || {
            Some(Self {
                moment: cycle["moment"].as_str()?.to_owned(),
                log_bytes: number("log_bytes")?,
                data_bytes: number("data_bytes")?,
                zero_bytes: number("zero_bytes")?,
                total_s: cycle["total_s"].as_f64()?,
            })
        };
        found().with_context(|| format!("the status tells of no cycle: {vm}"))
    }
}

/// A backup of ours.
pub struct Backup {
    /// Its id.
    pub id: String,
    /// Wall time of the command in seconds.
    pub seconds: f64,
    /// Processor time of the command and of the site for it, in seconds.
    pub cpu_s: f64,
    /// Bytes read for it.
    pub bytes_read: u64,
    /// Bytes added to the repository.
    pub bytes_added: u64,
}

impl Backup {
    fn of(ran: &Ran) -> anyhow::Result<Self> {
        let json: Value = serde_json::from_str(&ran.stdout)?;
        let number = |key: &str| json[key].as_u64().with_context(|| format!("no {key}"));
        Ok(Self {
            id: json["backup"].as_str().context("no backup")?.to_owned(),
            seconds: ran.seconds,
            cpu_s: ran.cpu_s,
            bytes_read: number("bytes_read")?,
            bytes_added: number("bytes_added")?,
        })
    }
}

/// `items` beginning with another one in every run, so that none always goes first.
pub fn rotated<T: Copy>(items: &[T], run: u32) -> Vec<T> {
    let mut items = items.to_vec();
    let count = items.len();
    items.rotate_left(run as usize % count.max(1));
    items
}

/// Bytes per second in MB/s.
pub fn mb_per_s(bytes: u64, seconds: f64) -> f64 {
    bytes as f64 / 1e6 / seconds
}

/// Fails unless two files are the same, byte for byte.
pub fn same(restored: &Path, disk: &Path) -> anyhow::Result<()> {
    let status = Command::new("cmp").arg(restored).arg(disk).status().context("starting cmp")?;
    ensure!(status.success(), "{} is not what {} was", restored.display(), disk.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_cycle_is_read_from_the_status() {
        let vm = json!({"name": "vm", "last_cycle": {
            "moment": "2026-11-24T21:00:00Z", "point": "crash", "note": null, "logs": 1, "log_bytes": 600,
            "data_bytes": 1000, "zero_bytes": 24, "reading_s": 0.5, "total_s": 2.0,
        }});
        let cycle = Cycle::of(&vm).unwrap();
        assert_eq!((cycle.log_bytes, cycle.data_bytes, cycle.zero_bytes), (600, 1000, 24));
        assert!(Cycle::of(&json!({"name": "vm", "last_cycle": null})).is_err());
    }

    #[test]
    fn a_backup_is_read_from_what_the_command_prints() {
        let ran = |stdout: &str| Ran { seconds: 1.5, peak_mb: 1.0, cpu_s: 2.0, stdout: stdout.into() };
        let backup =
            Backup::of(&ran(r#"{"backup":"ab12","bytes_read":10,"bytes_added":4,"seconds":1.0}"#)).unwrap();
        assert_eq!((backup.id.as_str(), backup.bytes_read, backup.bytes_added), ("ab12", 10, 4));
        assert!(Backup::of(&ran(r#"{"error":{"code":"x"}}"#)).is_err());
        assert!(Backup::of(&ran("")).is_err());
    }

    #[test]
    fn everyone_goes_first_once() {
        assert_eq!(rotated(&[1, 2, 3], 0), [1, 2, 3]);
        assert_eq!(rotated(&[1, 2, 3], 4), [2, 3, 1]);
        assert!(rotated::<u8>(&[], 4).is_empty());
    }
}
