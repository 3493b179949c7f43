//! Two sites, a VM's disks under a writer, and the power that can go.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rig::{
    LossyDisk, Process, Result, Site, StorageDaemon, Trouble, Writer, fill, state_of_exports, wait_for,
};
use serde_json::Value;
use tempfile::TempDir;
use witness::{Region, Script};

use crate::common::{LONG, MIB, VM, path};

/// The VM's disks: small, so that a whole pass takes no time.
pub const DISKS: [(&str, u64); 2] = [("system", 8 * MIB), ("data", 12 * MIB + 20480)];
/// Where bursts go: nothing else writes there.
const BURST_AT: u64 = 4 * MIB;
/// The guest writes so often.
const PAUSE: Duration = Duration::from_millis(4);

/// Whose process dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// The replica's site.
    Head,
    /// The primary's site.
    Branch,
    /// A command that runs by itself.
    Command,
}

/// Two sites that are peers and a VM that is replicated.
pub struct Pair {
    pub writer: Option<Writer>,
    pub script: Arc<Script>,
    pub branch: Site,
    pub head: Site,
    pub daemon: StorageDaemon,
    /// A third site, where one was needed.
    far: Option<Site>,
    /// Another site of the primary's trust group, where there is one.
    pub depot: Option<Site>,
    /// The lossy disks of the sites, where they are on such.
    disks: [Option<LossyDisk>; 2],
    pub dir: TempDir,
    pub points: &'static str,
}

impl Pair {
    /// Makes the sites, on lossy file systems if `lossy`, and replicates the VM.
    pub fn new(seed: u64, lossy: bool, points: &'static str) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("crash").tempdir().map_err(trouble)?;
        let daemon = StorageDaemon::start(&dir.path().join("vm"), &DISKS)?;
        let regions = (0..DISKS.len()).map(|disk| Region { disk, offset: MIB, len: MIB }).collect();
        let script = Arc::new(Script::new(seed, regions, 5));
        let disk = |name| lossy.then(|| lossy_disk(dir.path(), name)).transpose();
        let disks = [disk("head")?, disk("branch")?];
        let home = |disk: &Option<LossyDisk>| disk.as_ref().map_or(dir.path(), LossyDisk::path).to_owned();
        let mut head = Site::init(&home(&disks[0]), "head")?;
        let mut branch = Site::init(&home(&disks[1]), "branch")?;
        for site in [&mut head, &mut branch] {
            site.keep_log_at(dir.path().join(format!("{}.log", site.name())));
            site.configure(&[
                ("backoff-s = [60, 120, 240, 480, 600, 1800]", "backoff-s = [1]"),
                ("patience-s = 30", "patience-s = 1"),
                ("delay-max-s = 900", "delay-max-s = 2"),
                ("free-reserve-mib = 1024", "free-reserve-mib = 1"),
                ("warning-after-s = 600", "warning-after-s = 600000"),
                ("critical-after-s = 3600", "critical-after-s = 6000000"),
            ])?;
            // What a person types into an editor comes to the disk by itself, some time.
            sync_file(&site.dir().join("config.toml"))?;
            site.serve()?;
        }
        head.invite(&branch)?;
        let mut pair =
            Self { writer: None, script, branch, head, daemon, far: None, depot: None, disks, dir, points };
        pair.write_from(1)?;
        pair.protect()?;
        Ok(pair)
    }

    /// Protects the VM and waits until it is replicated.
    pub fn protect(&self) -> Result<()> {
        let ordered = self.order_protect(&[])?;
        let outcome = self.replicated();
        drop(ordered);
        outcome
    }

    /// The same without waiting.
    pub fn order_protect(&self, more: &[&str]) -> Result<Process> {
        let (qmp, nbd) = (self.daemon.qmp(), self.daemon.nbd());
        let arguments = ["protect", VM, "--qmp", path(&qmp), "--nbd", path(&nbd), "--to", "head"];
        order(&self.branch, &[&arguments[..], &["--every", "15m", "--points", self.points], more].concat())
    }

    pub fn replicated(&self) -> Result<()> {
        self.branch.wait_vm(VM, "to replicate", LONG, |vm| vm["state"] == "replicating").map(drop)
    }

    /// Lets the guest write.
    pub fn write_from(&mut self, from: u64) -> Result<()> {
        self.writer = Some(Writer::start(&self.daemon, self.script.clone(), from, PAUSE)?);
        Ok(())
    }

    /// Stops the guest; the number to go on with.
    pub fn quiet(&mut self) -> u64 {
        self.writer.take().map_or(1, Writer::stop)
    }

    /// The newest write begun.
    pub fn begun(&self) -> u64 {
        self.writer.as_ref().map_or(u64::MAX, Writer::begun)
    }

    /// Overwrites the same place with other bytes.
    pub fn burst(&self, seed: u64) -> Result<()> {
        fill(&self.daemon, DISKS[1].0, BURST_AT, MIB, seed)
    }

    /// Makes a third site, if there is none yet, that takes replicas of the second.
    pub fn third_site(&mut self) -> Result<()> {
        if self.far.is_none() {
            let mut far = Site::init(self.dir.path(), "far")?;
            far.configure(&[("free-reserve-mib = 1024", "free-reserve-mib = 1")])?;
            far.serve()?;
            far.invite(&self.head)?;
            self.far = Some(far);
        }
        Ok(())
    }

    /// A third site that the replica can move to, and back from.
    pub fn site_to_move_to(&mut self) -> Result<()> {
        self.third_site()?;
        let is_known = self.branch.run(&["peer", "show", "far"])?.status == 0;
        let Some(far) = self.far.as_ref().filter(|_| !is_known) else { return Ok(()) };
        far.invite(&self.branch)?;
        for (site, peers) in [(far, ["head", "branch"]), (&self.head, ["far", "branch"])] {
            for peer in peers {
                site.ok(&["peer", "allow", peer, "--group", "hosts"])?;
            }
        }
        Ok(())
    }

    /// Has the replica moved to that site, wherever an earlier wish was cut off.
    pub fn move_to(&self, site: &str) -> Result<()> {
        let mut last = Value::Null;
        let moved = wait_for("the replica to move", 2 * LONG, || {
            let vm = self.branch.vm(VM)?;
            if vm["peer"] == site && vm["moving"].is_null() {
                return Ok(Some(()));
            }
            if vm["moving"].is_null() {
                last = self.branch.run(&["migrate", VM, "--to-site", site])?.json;
            }
            Ok(None)
        });
        moved.map_err(|Trouble(text)| Trouble(format!("{text} to {site}: {last}\n{}", self.logs())))
    }

    /// A cycle of the second hop that ends well; then the third site's point is a moment of the VM.
    pub fn passed_on(&self) -> Result<()> {
        wait_for("a cycle of the second hop to end well", LONG, || {
            Ok((self.head.run(&["sync", VM])?.status == 0).then_some(()))
        })?;
        let Some(far) = &self.far else { return Err(trouble("there is no third site")) };
        let shown = far.ok(&["export", VM])?;
        let uri = |name: &str| {
            let disks = shown["disks"].as_array().cloned().unwrap_or_default();
            let disk = disks.into_iter().find(|disk| disk["name"] == name);
            disk.and_then(|disk| disk["uri"].as_str().map(str::to_owned)).unwrap_or_default()
        };
        let uris = DISKS.map(|(name, _)| uri(name));
        state_of_exports(&self.script, self.begun(), &uris.each_ref().map(String::as_str))
            .map_err(trouble)?;
        far.ok(&["unexport", shown["export"].as_str().unwrap_or_default()]).map(drop)
    }

    /// Passes the replica on once more, and then no more.
    pub fn end_extension(&self) -> Result<()> {
        self.passed_on()?;
        self.head.ok(&["unextend", VM])?;
        self.far.as_ref().map_or(Ok(()), |far| far.ok(&["unprotect", VM]).map(drop))
    }

    /// A cycle that ends well, whatever had to be mended first.
    pub fn sync(&self) -> Result<()> {
        let mut last = Value::Null;
        let synced = wait_for("a cycle to end well", LONG, || {
            let output = self.branch.run(&["sync", VM])?;
            last = output.json;
            Ok((output.status == 0).then_some(()))
        });
        synced.map_err(|Trouble(text)| Trouble(format!("{text}: {last}\n{}", self.logs())))
    }

    /// What both sites have said of late.
    pub fn logs(&self) -> String {
        let tail = |site: &Site| {
            let log = site.log();
            let lines: Vec<&str> = log.lines().rev().take(12).collect();
            format!("{}:\n{}\n", site.name(), lines.into_iter().rev().collect::<Vec<_>>().join("\n"))
        };
        tail(&self.head) + &tail(&self.branch)
    }

    pub fn site(&mut self, side: Side) -> &mut Site {
        match side {
            Side::Branch => &mut self.branch,
            Side::Head | Side::Command => &mut self.head,
        }
    }

    /// Where a site's files are.
    pub fn home(&self, side: Side) -> &Path {
        match side {
            Side::Branch => self.branch.dir(),
            Side::Head | Side::Command => self.head.dir(),
        }
    }

    /// A folder on the same file system as a site's.
    pub fn beside(&self, side: Side, name: &str) -> PathBuf {
        self.home(side).with_file_name(name)
    }

    /// The power of a site goes, after its process has died: what had not been synced is lost in part.
    pub fn lose_power(&mut self, side: Side, seed: u64) -> Result<String> {
        if side == Side::Branch {
            // The guest's host has gone with it.
            let from = self.quiet();
            self.daemon.kill();
            self.daemon.restart()?;
            self.write_from(from)?;
        }
        let disk = &mut self.disks[usize::from(side == Side::Branch)];
        disk.as_mut().ok_or_else(|| trouble("this site is on no lossy file system"))?.lose_power(seed)
    }
}

/// A command of a site that is left to itself.
pub fn order(site: &Site, arguments: &[&str]) -> Result<Process> {
    Process::start(site.command(arguments)?.stdout(Stdio::null()).stderr(Stdio::null()))
}

/// The same again and again, as long as it succeeds.
pub fn order_again(site: &Site, arguments: &[&str]) -> Result<Process> {
    let command = site.command(arguments)?;
    let mut again = Command::new("sh");
    again.args(["-c", "while \"$0\" \"$@\"; do :; done"]).arg(command.get_program()).args(command.get_args());
    Process::start(again.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()))
}

fn lossy_disk(dir: &Path, name: &str) -> Result<LossyDisk> {
    LossyDisk::mount(&dir.join(format!("on-{name}")), &dir.join(format!("disk-{name}")))
}

fn sync_file(file: &Path) -> Result<()> {
    std::fs::File::open(file).and_then(|file| file.sync_all()).map_err(trouble)
}

pub fn trouble(what: impl std::fmt::Display) -> Trouble {
    Trouble(what.to_string())
}
