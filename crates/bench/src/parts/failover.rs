//! An unplanned failover of a large disk with a thousand logs that are not folded in: from the command to the first block
//! that is read as a VM would read it.

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::Context;
use catalog::Catalog;
use log::{Batcher, DiskInfo, Encoder, Footer, Header};
use model::{Consistency, LogClass, LogId, LogNumber, POINTS_MAX, Phase, Progress, Purpose, Timestamp, VmId};
use replica::{Config, DiskSize, Offer, Store};
use rig::{Site, tool};

use super::Folder;
use crate::image::Random;
use crate::measure::median;
use crate::table::{Table, Wanted};
use crate::{Arguments, say};

const VM: VmId = VmId::from_bytes([7; 16]);
const NAME: &str = "vm";
const PEER: &str = "primary";
const DISK_BYTES: u64 = 100 << 30;
const LOGS: u64 = 1000;
/// What each log changes, in blocks all over the disk: 256 KiB.
const BLOCKS: usize = 64;
const BLOCK: usize = 4096;

/// Runs the part.
pub fn run(arguments: &Arguments, table: &mut Table) -> anyhow::Result<()> {
    let mut took = Vec::new();
    for run in 0..arguments.runs {
        say(&format!("a failover with {LOGS} logs, run {} of {}", run + 1, arguments.runs));
        took.push(one(arguments)?);
    }
    table.figure(
        format!("failover of a 100 GiB disk with {LOGS} logs, until its first block is read"),
        median(&took),
        "s",
        Some(Wanted::AtMost(1.0)),
    );
    Ok(())
}

fn one(arguments: &Arguments) -> anyhow::Result<f64> {
    let folder = Folder::new(arguments, "failover")?;
    let mut site = Site::init(&folder.join(""), "replica")?;
    fill(&site)?;
    site.serve()?;
    let began = Instant::now();
    let answer = site.ok(&["failover", "unplanned", NAME])?;
    let overlay = answer["disks"][0]["path"].as_str().context("a disk of the failover")?;
    // The first block is the last log's.
    let mut io = Command::new("qemu-io");
    tool(io.args(["-r", "-f", "qcow2", "-c", &format!("read -P {} 0 {BLOCK}", LOGS % 251)]).arg(overlay))?;
    Ok(began.elapsed().as_secs_f64())
}

/// The chain, as if its logs had arrived while nothing was folded in.
fn fill(site: &Site) -> anyhow::Result<()> {
    let dir = PathBuf::from(site.dir());
    let store =
        Store::open(Catalog::open(dir.join("catalog.sqlite"))?, Config { workers: 0, ..Config::new(&dir) })?;
    store.offer(PEER, offer()?)?;
    let mut predecessor = LogId::NONE;
    for number in 1..=LOGS {
        let (header, bytes) = make_log(number, predecessor)?;
        predecessor = header.id;
        store.append(PEER, VM, header.number, header.id, 0, &bytes, true)?;
    }
    Ok(())
}

fn offer() -> anyhow::Result<Offer> {
    Ok(Offer {
        vm: VM,
        name: NAME.parse()?,
        disks: vec![DiskSize { name: "disk".parse()?, size_bytes: DISK_BYTES }],
        interval: std::time::Duration::from_secs(5),
        points: POINTS_MAX,
        primary_name: PEER.into(),
        definition: serde_json::Value::Null,
        phase: Phase::InitialReplication { progress: Progress::default() },
        paused: false,
        generation: 1,
        media: None,
        pins: Vec::new(),
        group: None,
    })
}

fn make_log(number: u64, predecessor: LogId) -> anyhow::Result<(Header, Vec<u8>)> {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&number.to_be_bytes());
    let header = Header {
        vm: VM,
        id: LogId::from_bytes(id),
        number: LogNumber(number),
        predecessor,
        moment: Timestamp::from(std::time::SystemTime::now()),
        purpose: if number == 1 { Purpose::Initial } else { Purpose::Changes },
        disks: vec![DiskInfo { name: "disk".parse()?, size_bytes: DISK_BYTES }],
    };
    let mut encoder = Encoder::new(Vec::new(), &header)?;
    let mut batcher = Batcher::new(0);
    let mut records = Vec::new();
    records.extend(batcher.data(0, &[(number % 251) as u8; BLOCK]));
    let mut random = Random::new(number);
    let blocks = DISK_BYTES / BLOCK as u64;
    let mut changed: Vec<u64> = (0..BLOCKS).map(|_| 1 + random.next() % (blocks - 1)).collect();
    changed.sort_unstable();
    changed.dedup();
    for block in changed {
        let mut bytes = [0; BLOCK];
        random.fill(&mut bytes);
        records.extend(batcher.data(block * BLOCK as u64, &bytes));
    }
    records.extend(batcher.finish());
    for record in records {
        encoder.record(record.encode(1))?;
    }
    let footer = Footer { class: LogClass::Point(Consistency::Crash), progress: Progress::default() };
    Ok((header, encoder.finish(footer)?.1))
}
