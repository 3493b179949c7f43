//! What a guest's writes feel of cycles every 5 s and every 30 s: fio writes 4 KiB blocks at random, 500 a second, on a
//! disk that is not protected and on two that are, by turns, each behind a storage daemon of its own.

use std::process::Command;

use anyhow::{Context, ensure};
use rig::StorageDaemon;
use serde_json::Value;

use super::{Folder, PATIENCE, Sites, rotated};
use crate::disk::Disk;
use crate::measure::{median, settle};
use crate::table::{Row, Table, Wanted};
use crate::{Arguments, say};

const DISK: &str = "guest";
const DISK_BYTES: u64 = 4 << 30;
const IOPS: f64 = 500.0;
const SECONDS: u64 = 60;

/// A guest, and what was measured of it.
struct Guest {
    /// How often a cycle is due; none without protection.
    every_s: Option<u64>,
    daemon: StorageDaemon,
    latencies: Vec<Latency>,
    cycles: u64,
}

/// Runs the part.
pub fn run(arguments: &Arguments, table: &mut Table) -> anyhow::Result<()> {
    let folder = Folder::new(arguments, "guest")?;
    say("filling three disks of 4 GiB");
    let mut guests = Vec::new();
    for (seed, every_s) in (1..).zip([None, Some(5), Some(30)]) {
        let daemon = StorageDaemon::start(&folder.join(&format!("daemon{seed}")), &[(DISK, DISK_BYTES)])?;
        rig::fill(&daemon, DISK, 0, DISK_BYTES, seed)?;
        guests.push(Guest { every_s, daemon, latencies: Vec::new(), cycles: 0 });
    }
    let sites = Sites::start(&folder, &[])?;
    for guest in &guests {
        if let Some(vm) = guest.vm() {
            sites.protect(&vm, &guest.daemon, DISK, &format!("{}s", guest.every_s.unwrap_or_default()))?;
            sites.primary.ok(&["pause", &vm])?;
        }
    }
    for run in 0..arguments.runs {
        say(&format!(
            "guests that write for {SECONDS} s without and with cycles, run {} of {}",
            run + 1,
            arguments.runs
        ));
        for which in rotated(&[0, 1, 2], run) {
            settle()?;
            guests[which].write(&sites)?;
        }
    }
    rows(&guests, table);
    let cycles: Vec<String> = guests[1..]
        .iter()
        .map(|guest| format!("{:.1}", guest.cycles as f64 / f64::from(arguments.runs)))
        .collect();
    table.note(&format!(
        "guest: fio, ioengine=nbd, random 4 KiB writes at {IOPS} a second for {SECONDS} s, both sites on the same \
         machine and disk; {} cycles in each of the runs with cycles",
        cycles.join(" and ")
    ));
    sites.memory("guest", &[], table)
}

impl Guest {
    fn vm(&self) -> Option<String> {
        self.every_s.map(|every_s| format!("every-{every_s}s"))
    }

    /// fio, while cycles run if it is protected.
    fn write(&mut self, sites: &Sites) -> anyhow::Result<()> {
        let Some(vm) = self.vm() else {
            self.latencies.push(fio(&self.daemon)?);
            return Ok(());
        };
        let acked =
            || -> anyhow::Result<u64> { sites.primary.vm(&vm)?["acked"].as_u64().context("no acked") };
        let paused_at = acked()?;
        // Something to ship, or there would be no first cycle to wait for.
        Disk::open(&self.daemon, DISK)?.scramble(&[(0, 4096)], paused_at)?;
        sites.primary.ok(&["resume", &vm])?;
        // The first cycle is over before fio begins: it is like all the others then.
        sites.primary.wait_vm(&vm, "a cycle", PATIENCE, |vm| vm["acked"].as_u64() > Some(paused_at))?;
        let before = acked()?;
        self.latencies.push(fio(&self.daemon)?);
        let cycles = acked()? - before;
        self.cycles += cycles;
        sites.primary.ok(&["pause", &vm])?;
        sites.quiet(&vm)?;
        let due = SECONDS / self.every_s.unwrap_or(SECONDS);
        ensure!(2 * cycles >= due, "only {cycles} cycles of {due} ended in {SECONDS} s of writing");
        Ok(())
    }

    fn median(&self, which: fn(&Latency) -> f64) -> f64 {
        median(&self.latencies.iter().map(which).collect::<Vec<_>>())
    }
}

fn fio(daemon: &StorageDaemon) -> anyhow::Result<Latency> {
    let mut command = Command::new("fio");
    command.args([
        "--name=guest",
        "--ioengine=nbd",
        "--rw=randwrite",
        "--bs=4k",
        "--iodepth=4",
        "--time_based",
    ]);
    command.arg(format!("--uri=nbd+unix:///{DISK}?socket={}", daemon.nbd().display()));
    command.args([
        format!("--rate_iops={IOPS}"),
        format!("--size={DISK_BYTES}"),
        format!("--runtime={SECONDS}"),
    ]);
    command.args(["--ramp_time=3", "--randrepeat=0", "--output-format=json"]);
    let latency = Latency::of(&rig::tool(&mut command)?)?;
    ensure!(latency.iops >= 0.9 * IOPS, "the machine did {:.0} writes a second of {IOPS}", latency.iops);
    Ok(latency)
}

/// What fio says of its writes.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Latency {
    p50_us: f64,
    p99_us: f64,
    p999_us: f64,
    iops: f64,
}

impl Latency {
    /// From fio's JSON, which other lines may surround.
    fn of(said: &str) -> anyhow::Result<Self> {
        let json = said.find("\n{").map_or(said, |at| &said[at..]);
        let mut documents = serde_json::Deserializer::from_str(json).into_iter::<Value>();
        let report = documents.next().context("fio reported nothing")?.context("fio's report")?;
        let write = &report["jobs"][0]["write"];
        let percentile = |which: &str| write["clat_ns"]["percentile"][which].as_f64().map(|ns| ns / 1e3);
        let found = || {
            Some(Self {
                p50_us: percentile("50.000000")?,
                p99_us: percentile("99.000000")?,
                p999_us: percentile("99.900000")?,
                iops: write["iops"].as_f64()?,
            })
        };
        found().with_context(|| format!("fio reported no latencies: {said}"))
    }
}

/// What is told of a guest's latencies.
const FIGURES: [Figure; 3] = [
    ("p50", |latency| latency.p50_us),
    ("p99", |latency| latency.p99_us),
    ("p99.9", |latency| latency.p999_us),
];

type Figure = (&'static str, fn(&Latency) -> f64);

fn rows(guests: &[Guest], table: &mut Table) {
    for guest in &guests[1..] {
        for (what, which) in FIGURES {
            let every_s = guest.every_s.unwrap_or_default();
            table.add(Row {
                what: format!("guest's writes with cycles every {every_s} s, {what}"),
                ours: guest.median(which),
                peer: Some(("without".into(), guests[0].median(which))),
                unit: "us",
                wanted: (what == "p99").then_some(Wanted::AtMost(1.5)),
                limit: None,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"{"fio version": "fio-3.33", "jobs": [{"jobname": "guest", "write": {
        "iops": 499.8, "total_ios": 1500,
        "clat_ns": {"mean": 1.0, "percentile": {"50.000000": 91648, "99.000000": 3424256, "99.900000": 9000000}}}}]}"#;

    #[test]
    fn latencies_are_read_from_fios_report() {
        let latency = Latency { p50_us: 91.648, p99_us: 3424.256, p999_us: 9000.0, iops: 499.8 };
        assert_eq!(Latency::of(REPORT).unwrap(), latency);
        assert_eq!(Latency::of(&format!("fio: connected to NBD server\n{REPORT}\n")).unwrap(), latency);
        assert_eq!(Latency::of(&format!("{REPORT}\nand more")).unwrap(), latency);
    }

    #[test]
    fn a_report_without_them_is_an_error() {
        for said in ["", "fio: failed", r#"{"jobs": []}"#, r#"{"jobs": [{"write": {"iops": 1}}]}"#] {
            assert!(Latency::of(said).is_err(), "{said}");
        }
    }
}
