//! A VM changes its site for good, and a process dies at a step of that: each time with sites of its own.
//!
//! ```text
//! planned:    handed over ─▶ logs folded in, released ─▶ started there ─▶ reversed ─▶ old disks copied as seeds ─▶ compared
//! unplanned:  failed over to the oldest of several points ─▶ completed ─▶ the same
//! ```

use std::path::PathBuf;
use std::process::Command;

use rig::{Result, StorageDaemon, Trouble, tool, wait_for};
use serde_json::Value;

use super::pair::{DISKS, Pair, Side, trouble};
use super::plan::Case;
use crate::common::{LONG, VM, path};

/// One trip of a VM.
struct Trip<'a> {
    pair: Pair,
    case: &'a Case,
    power: Option<u64>,
    lost: &'a mut Option<String>,
    died: bool,
    /// Where the VM runs after it was failed over.
    daemon: Option<StorageDaemon>,
}

/// The whole trip, with a death at the case's step.
pub fn crash(case: &Case, power: Option<u64>, lost: &mut Option<String>) -> Result<()> {
    let pair = Pair::new(77, power.is_some(), "4")?;
    let mut trip = Trip { pair, case, power, lost, died: false, daemon: None };
    for _ in 0..3 {
        trip.pair.sync()?;
    }
    trip.pair.quiet();
    trip.pair.sync()?;
    let side = trip.pair.site(case.side);
    side.kill();
    side.serve_with(&[(steps::FAIL_AT, &case.fail_at())])?;
    let storage = trip.pair.storage_known();
    if case.step.starts_with("replica::completion::") {
        trip.unplanned()?
    } else {
        trip.planned()?
    }
    trip.released()?;
    let layers =
        DISKS.map(|(name, _)| (name.to_owned(), storage.join("failover").join(format!("{name}.qcow2"))));
    trip.start(&layers)?;
    trip.reverse()?;
    if !trip.died {
        return Err(trouble(format!("nothing came to {}", case.step)));
    }
    trip.compare()
}

impl Trip<'_> {
    /// Starts a site again that has died at its step.
    fn look_after(&mut self) -> Result<bool> {
        let site = self.pair.site(self.case.side);
        if site.is_running() {
            return Ok(false);
        }
        if site.died_of() != Some(9) {
            return Err(trouble(format!("the site ended by itself: {}", site.log())));
        }
        self.died = true;
        if let Some(seed) = self.power {
            // Whatever runs on the files of a machine goes with it.
            let goes_too = if self.case.side == Side::Head { self.daemon.take() } else { None };
            let images = goes_too.map(|daemon| DISKS.map(|(name, _)| (name.to_owned(), daemon.disk(name))));
            *self.lost = Some(self.pair.lose_power(self.case.side, seed)?);
            if self.case.side == Side::Branch && self.case.step.starts_with("replica::") {
                self.pair.quiet();
                self.pair.daemon.kill(); // the old VM stays off
            }
            self.pair.site(self.case.side).serve()?;
            if let Some(images) = images {
                self.start(&images)?;
            }
            return Ok(true);
        }
        self.pair.site(self.case.side).serve()?;
        Ok(true)
    }

    /// Asks until the answer is one of success, or one that `also` takes; sites that die are started again.
    fn insist(&mut self, side: Side, arguments: &[&str], also: &[&str]) -> Result<Value> {
        let mut last = Value::Null;
        for _ in 0..100 {
            let output = self.pair.site(side).run(arguments)?;
            self.look_after()?;
            if output.status == 0 || output.code().is_some_and(|code| also.contains(&code)) {
                return Ok(output.json);
            }
            last = output.json;
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
        Err(Trouble(format!("{arguments:?} never succeeded: {last}\n{}", self.pair.logs())))
    }

    fn planned(&mut self) -> Result<()> {
        self.insist(Side::Branch, &["failover", "planned", VM], &[])?;
        self.pair.daemon.wait_for_end()
    }

    fn unplanned(&mut self) -> Result<()> {
        self.pair.daemon.kill();
        let points = self.pair.head.ok(&["points", VM])?["points"].as_array().cloned().unwrap_or_default();
        let oldest = points.iter().min_by_key(|point| point["number"].as_u64());
        let id = oldest.and_then(|point| point["id"].as_str()).unwrap_or_default().to_owned();
        if points.len() < 2 {
            return Err(trouble("there is one point alone"));
        }
        self.insist(Side::Head, &["failover", "unplanned", VM, "--point", &id], &[])?;
        // It may be at its end before it is asked a second time.
        self.insist(Side::Head, &["failover", "complete", VM], &["no-such-vm"]).map(drop)
    }

    /// Waits until the replica is none any more.
    fn released(&mut self) -> Result<()> {
        wait_for("the failover to come to its end", LONG, || {
            self.look_after()?;
            Ok((self.pair.head.run(&["status", VM])?.code() == Some("no-such-vm")).then_some(()))
        })
    }

    fn start(&mut self, images: &[(String, PathBuf)]) -> Result<()> {
        self.daemon = Some(StorageDaemon::start_on(&self.pair.dir.path().join("there"), images)?);
        Ok(())
    }

    fn reverse(&mut self) -> Result<()> {
        let Some(daemon) = &self.daemon else { return Err(trouble("the VM was not started")) };
        let (qmp, nbd) = (daemon.qmp(), daemon.nbd());
        let arguments = ["failover", "reverse", VM, "--qmp", path(&qmp), "--nbd", path(&nbd)];
        // It may have been written down before the death.
        self.insist(Side::Head, &arguments, &["exists"])?;
        wait_for("the VM to be replicated the other way", LONG, || {
            self.look_after()?;
            let status = self.pair.head.run(&["status", VM])?;
            let vm = &status.json["vms"][0];
            Ok((vm["role"] == "primary" && vm["state"] == "replicating").then_some(()))
        })
        .map_err(|Trouble(text)| Trouble(format!("{text}\n{}", self.pair.logs())))
    }

    /// The newest point at the new replica is the VM's disks, byte for byte, and nothing is left over.
    fn compare(&mut self) -> Result<()> {
        self.insist(Side::Head, &["sync", VM], &[])?;
        let shown = self.pair.branch.ok(&["export", VM])?;
        let Some(daemon) = &self.daemon else { return Err(trouble("the VM was not started")) };
        for disk in shown["disks"].as_array().into_iter().flatten() {
            let (name, uri) =
                (disk["name"].as_str().unwrap_or_default(), disk["uri"].as_str().unwrap_or_default());
            let runs = format!("nbd+unix:///{name}?socket={}", daemon.nbd().display());
            let mut compare = Command::new("qemu-img");
            compare.args(["compare", "-q", "-f", "raw", "-F", "raw", &runs, uri]);
            tool(&mut compare)?;
        }
        let released = daemon.disk(DISKS[0].0).parent().and_then(|layers| layers.parent()).map(PathBuf::from);
        let left: Vec<String> = std::fs::read_dir(released.unwrap_or_default())
            .map_err(trouble)?
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| !["disks", "failover", "released.json"].contains(&name.as_str()))
            .collect();
        if left.is_empty() { Ok(()) } else { Err(trouble(format!("left over: {left:?}"))) }
    }
}
