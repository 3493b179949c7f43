//! What a guest's writes feel of cycles every 5 s: fio writes 4 KiB blocks at random, 500 a second, on a disk
//! that is not protected and on one that is, by turns, both of one storage daemon.

use std::process::Command;

use anyhow::{Context, ensure};
use rig::StorageDaemon;
use serde_json::Value;

use super::{Folder, PATIENCE, Sites, rotated};
use crate::disk::Disk;
use crate::measure::{median, settle};
use crate::table::{Row, Table, Wanted};
use crate::{Arguments, say};

const VM: &str = "vm";
/// The disk without protection, and the one with it.
const DISKS: [&str; 2] = ["plain", "guest"];
const DISK_BYTES: u64 = 4 << 30;
const IOPS: f64 = 500.0;
const SECONDS: u32 = 60;

/// Runs the part.
pub fn run(arguments: &Arguments, table: &mut Table) -> anyhow::Result<()> {
    let folder = Folder::new(arguments, "guest")?;
    let daemon = StorageDaemon::start(&folder.join("daemon"), &DISKS.map(|disk| (disk, DISK_BYTES)))?;
    say("filling two disks of 4 GiB");
    for (seed, disk) in (1..).zip(DISKS) {
        rig::fill(&daemon, disk, 0, DISK_BYTES, seed)?;
    }
    let sites = Sites::start(&folder, &[])?;
    sites.protect(VM, &daemon, DISKS[1], "5s")?;
    sites.primary.ok(&["pause", VM])?;
    let (mut without, mut with, mut cycles) = (Vec::new(), Vec::new(), 0);
    for run in 0..arguments.runs {
        say(&format!(
            "a guest that writes for {SECONDS} s without and with cycles, run {} of {}",
            run + 1,
            arguments.runs
        ));
        for protected in rotated(&[false, true], run) {
            settle()?;
            if protected {
                let (latency, seen) = beside_cycles(&sites, &daemon)?;
                cycles += seen;
                with.push(latency);
            } else {
                without.push(fio(&daemon, DISKS[0])?);
            }
        }
    }
    rows(&without, &with, table);
    table.note(&format!(
        "guest: fio, ioengine=nbd, random 4 KiB writes at {IOPS} a second for {SECONDS} s, both sites on the same \
         machine and disk; {:.1} cycles in each of the runs with cycles",
        cycles as f64 / f64::from(arguments.runs)
    ));
    sites.memory("guest", &[], table)
}

/// fio while cycles run; how many there were.
fn beside_cycles(sites: &Sites, daemon: &StorageDaemon) -> anyhow::Result<(Latency, u64)> {
    let acked = || -> anyhow::Result<u64> { sites.primary.vm(VM)?["acked"].as_u64().context("no acked") };
    let paused_at = acked()?;
    // Something to ship, or there would be no first cycle to wait for.
    Disk::open(daemon, DISKS[1])?.scramble(&[(0, 4096)], paused_at)?;
    sites.primary.ok(&["resume", VM])?;
    // The first cycle is over before fio begins: it is like all the others then.
    sites.primary.wait_vm(VM, "a cycle", PATIENCE, |vm| vm["acked"].as_u64() > Some(paused_at))?;
    let before = acked()?;
    let latency = fio(daemon, DISKS[1])?;
    let cycles = acked()? - before;
    sites.primary.ok(&["pause", VM])?;
    sites.quiet(VM)?;
    ensure!(cycles >= u64::from(SECONDS) / 10, "only {cycles} cycles ended in {SECONDS} s of writing");
    Ok((latency, cycles))
}

fn fio(daemon: &StorageDaemon, disk: &str) -> anyhow::Result<Latency> {
    let mut command = Command::new("fio");
    command.args([
        "--name=guest",
        "--ioengine=nbd",
        "--rw=randwrite",
        "--bs=4k",
        "--iodepth=4",
        "--time_based",
    ]);
    command.arg(format!("--uri=nbd+unix:///{disk}?socket={}", daemon.nbd().display()));
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
            let (p50_us, p99_us) = (percentile("50.000000")?, percentile("99.000000")?);
            Some(Self { p50_us, p99_us, iops: write["iops"].as_f64()? })
        };
        found().with_context(|| format!("fio reported no latencies: {said}"))
    }
}

fn rows(without: &[Latency], with: &[Latency], table: &mut Table) {
    let figures =
        |of: &[Latency], which: fn(&Latency) -> f64| median(&of.iter().map(which).collect::<Vec<_>>());
    let mut row = |what: &str, which: fn(&Latency) -> f64, wanted| {
        table.add(Row {
            what: format!("guest's writes with cycles every 5 s, {what}"),
            ours: figures(with, which),
            peer: Some(("without".into(), figures(without, which))),
            unit: "us",
            wanted,
            limit: None,
        });
    };
    row("p99", |latency| latency.p99_us, Some(Wanted::AtMost(1.5)));
    row("p50", |latency| latency.p50_us, None);
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"{"fio version": "fio-3.33", "jobs": [{"jobname": "guest", "write": {
        "iops": 499.8, "total_ios": 1500,
        "clat_ns": {"mean": 1.0, "percentile": {"50.000000": 91648, "99.000000": 3424256}}}}]}"#;

    #[test]
    fn latencies_are_read_from_fios_report() {
        let latency = Latency { p50_us: 91.648, p99_us: 3424.256, iops: 499.8 };
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
