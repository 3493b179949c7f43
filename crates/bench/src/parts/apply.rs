//! Folding a sequential delta of 1 GiB into the base, beside dd of the same bytes to a file that is there
//! already, as the base is.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rig::StorageDaemon;
use serde_json::Value;

use super::{BY_HAND, Folder, PATIENCE, Sites, mb_per_s, rotated};
use crate::disk::Disk;
use crate::image::{self, MIB};
use crate::limits::Limits;
use crate::measure::{median, run as timed, settle};
use crate::table::{Row, Table, Wanted};
use crate::{Arguments, say};

const VM: &str = "vm";
const DISK: &str = "disk";
const DELTA_BYTES: u64 = 1 << 30;

/// Runs the part.
pub fn run(arguments: &Arguments, table: &mut Table) -> anyhow::Result<()> {
    let limits = Limits::of(arguments)?;
    let folder = Folder::new(arguments, "apply")?;
    let (delta, copy) = (folder.join("delta"), folder.join("copy"));
    image::noise(&delta, DELTA_BYTES)?;
    let daemon = StorageDaemon::start(&folder.join("daemon"), &[(DISK, DELTA_BYTES + (64 << 20))])?;
    let sites = Sites::start(&folder, &[])?;
    Disk::open(&daemon, DISK)?.write_file(&delta, MIB as u64)?;
    sites.protect(VM, &daemon, DISK, BY_HAND)?;
    dd(&delta, &copy)?;
    let (mut ours, mut theirs, mut told) = (Vec::new(), Vec::new(), true);
    for run in 0..arguments.runs {
        say(&format!("apply of a delta of 1 GiB, run {} of {}", run + 1, arguments.runs));
        for tool in rotated(&[0, 1], run) {
            settle()?;
            if tool == 0 {
                let (rate, by_status) = apply(&sites, &daemon, &delta)?;
                told &= by_status;
                ours.push(rate);
            } else {
                theirs.push(mb_per_s(DELTA_BYTES, dd(&delta, &copy)?));
            }
        }
    }
    table.add(Row {
        what: "apply of a sequential delta of 1 GiB".into(),
        ours: median(&ours),
        peer: Some(("dd".into(), median(&theirs))),
        unit: "MB/s",
        wanted: Some(Wanted::AtLeast(0.8)),
        limit: Some(limits.write_rate() / 1e6),
    });
    let how = if told {
        "as the replica's status tells"
    } else {
        "from the release of a hold to the status that tells its end"
    };
    table.note(&format!(
        "apply: incompressible data, timed {how}; dd bs=1M conv=fsync,notrunc over a file that is there"
    ));
    sites.memory("apply", &[], table)
}

/// The delta reaches the replica during a hold, so that nothing but the apply is left to be done at its end.
fn apply(sites: &Sites, daemon: &StorageDaemon, delta: &Path) -> anyhow::Result<(f64, bool)> {
    let held = sites.replica.ok(&["hold", VM, "--for", "30m"])?;
    let hold = held["hold"].as_str().context("no hold")?;
    Disk::open(daemon, DISK)?.write_file(delta, MIB as u64)?;
    let shipped = sites.sync(VM)?.data_bytes;
    ensure!(shipped >= DELTA_BYTES, "the cycle shipped {shipped} bytes of {DELTA_BYTES}");
    settle()?;
    let started = Instant::now();
    sites.replica.ok(&["release", hold])?;
    let vm = until_applied(sites)?;
    let seconds = started.elapsed().as_secs_f64();
    sites.quiet(VM)?;
    Ok(match last_apply(&vm) {
        Some((bytes, seconds)) if bytes >= DELTA_BYTES => (mb_per_s(bytes, seconds), true),
        _ => (mb_per_s(shipped, seconds), false),
    })
}

fn until_applied(sites: &Sites) -> anyhow::Result<Value> {
    let started = Instant::now();
    loop {
        let vm = sites.replica.vm(VM)?;
        if vm["applied"] == vm["received"] && vm["apply"] == "idle" {
            return Ok(vm);
        }
        ensure!(vm["apply"] != "failed" && started.elapsed() < PATIENCE, "the log is not applied: {vm}");
        // Who has to look for the end himself looks often; who is told it does not disturb.
        std::thread::sleep(Duration::from_millis(if vm.get("last_apply").is_some() { 200 } else { 5 }));
    }
}

/// Bytes and seconds of the last apply, where the status has them.
fn last_apply(vm: &Value) -> Option<(u64, f64)> {
    let last = &vm["last_apply"];
    Some((last["bytes"].as_u64()?, last["seconds"].as_f64().filter(|&seconds| seconds > 0.0)?))
}

fn dd(from: &Path, to: &Path) -> anyhow::Result<f64> {
    let mut command = Command::new("dd");
    command.arg(format!("if={}", from.display())).arg(format!("of={}", to.display()));
    Ok(timed(command.args(["bs=1M", "conv=fsync,notrunc"]))?.seconds)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_last_apply_is_taken_from_the_status_where_it_is_told() {
        assert_eq!(last_apply(&json!({"last_apply": {"bytes": 10, "seconds": 0.5}})), Some((10, 0.5)));
        assert_eq!(last_apply(&json!({"last_apply": {"bytes": 10, "seconds": 0.0}})), None);
        assert_eq!(last_apply(&json!({"last_apply": null})), None);
        assert_eq!(last_apply(&json!({})), None);
    }
}
