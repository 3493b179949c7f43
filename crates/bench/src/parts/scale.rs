//! How many VMs one site takes: many small disks, each behind a storage daemon of its own, each changed by 256 KiB in
//! every interval of 30 s, both sites on this machine.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nbd::Client;
use plot::{Axis, BLUE, Canvas, GREEN, ORANGE, Panel, Series, Style, ticks};
use rig::StorageDaemon;
use serde_json::Value;

use super::{Folder, PATIENCE, Sites};
use crate::image::Random;
use crate::measure::{cpu_seconds, largest, median};
use crate::table::{Table, Wanted};
use crate::{Arguments, say};

const INTERVAL_S: u64 = 30;
const DISK: &str = "disk";
const DISK_BYTES: u64 = 64 << 20;
/// What changes in an interval: pieces at random, as a guest's writes are.
const PIECES: u64 = 16;
const PIECE_BYTES: u64 = 16 << 10;
/// How often the replica's site is asked how old its points are.
const SAMPLE: Duration = Duration::from_secs(10);
/// Fewer VMs than the most are watched for this long.
const SHORT: Duration = Duration::from_secs(120);

/// Runs the part.
pub fn run(arguments: &Arguments, table: &mut Table) -> anyhow::Result<()> {
    let most = arguments.vms.iter().copied().max().unwrap_or(0);
    let mut loads = Vec::new();
    for &vms in &arguments.vms {
        let whole = Duration::from_secs(60 * arguments.minutes);
        loads.push(watch(arguments, vms, if vms == most { whole } else { whole.min(SHORT) }, table)?);
    }
    table.plot("scale.svg", drawn(&loads));
    table.note(&format!(
        "scale: each VM has a disk of {} MiB, of which {} KiB change in every interval of {INTERVAL_S} s, {} KiB here \
         and there; both sites, the storage daemons and the writer share this machine",
        DISK_BYTES >> 20,
        (PIECES * PIECE_BYTES) >> 10,
        PIECE_BYTES >> 10
    ));
    Ok(())
}

fn watch(arguments: &Arguments, vms: usize, time: Duration, table: &mut Table) -> anyhow::Result<Load> {
    let folder = Folder::new(arguments, "scale")?;
    say(&format!("{vms} VMs: starting daemons, protecting"));
    let fleet = Fleet::start(&folder, vms)?;
    let sites = Sites::start(&folder, &[])?;
    fleet.protect(&sites, INTERVAL_S)?;
    let _writer = fleet.write(INTERVAL_S);
    // A first round of changes is over before anything counts.
    std::thread::sleep(Duration::from_secs(INTERVAL_S + 10));

    say(&format!("{vms} VMs: watching for {} s", time.as_secs()));
    let (before, started) = (Standing::of(&sites, &fleet)?, Instant::now());
    let mut lags = Vec::new();
    while started.elapsed() < time {
        std::thread::sleep(SAMPLE.min(time.saturating_sub(started.elapsed())));
        lags.extend(numbers(&sites.replica.ok(&["status"])?, "lag_s")?);
    }
    let elapsed_s = started.elapsed().as_secs_f64();
    let after = Standing::of(&sites, &fleet)?;
    rows(vms, &before, &after, elapsed_s, &lags, &sites, table)
}

/// A daemon for each VM, as each VM has a QEMU of its own.
pub(super) struct Fleet {
    daemons: Vec<StorageDaemon>,
}

impl Fleet {
    pub fn start(folder: &Folder, vms: usize) -> anyhow::Result<Self> {
        let start = |vm| StorageDaemon::start(&folder.join(&format!("d{vm}")), &[(DISK, DISK_BYTES)]);
        let daemons = (0..vms).map(start).collect::<Result<_, _>>()?;
        Ok(Self { daemons })
    }

    /// One after the other within an interval, so that their cycles are spread over it, as they are over days.
    pub fn protect(&self, sites: &Sites, interval_s: u64) -> anyhow::Result<()> {
        let (started, pause) =
            (Instant::now(), Duration::from_secs(interval_s) / self.daemons.len().max(1) as u32);
        for (vm, daemon) in (0..).zip(&self.daemons) {
            sites.begin_to_protect(&format!("vm-{vm}"), daemon, DISK, &format!("{interval_s}s"))?;
            std::thread::sleep((pause * (vm + 1)).saturating_sub(started.elapsed()));
        }
        rig::wait_for("every VM to be replicating", PATIENCE, || {
            let status = sites.primary.ok(&["status"])?;
            let all =
                status["vms"].as_array().is_some_and(|vms| vms.iter().all(|vm| vm["state"] == "replicating"));
            Ok(all.then_some(()))
        })?;
        Ok(())
    }

    /// A guest for all of them: each VM's changes, once in every interval.
    pub fn write(&self, interval_s: u64) -> Writer {
        let disks: Vec<PathBuf> = self.daemons.iter().map(StorageDaemon::nbd).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            if let Err(error) = change_all(&disks, interval_s, &stopped) {
                say(&format!("the writer ended: {error:#}"));
            }
        });
        Writer { stop, thread: Some(thread) }
    }
}

/// Writes until it is dropped.
pub(super) struct Writer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn change_all(disks: &[PathBuf], interval_s: u64, stop: &AtomicBool) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut clients = Vec::new();
        for socket in disks {
            clients.push(
                Client::connect(socket, DISK, &[]).await.with_context(|| socket.display().to_string())?,
            );
        }
        let pause = Duration::from_secs(interval_s) / clients.len().max(1) as u32;
        let mut turns = tokio::time::interval(pause);
        let mut random = Random::new(7);
        let mut bytes = vec![0; PIECE_BYTES as usize];
        for client in clients.iter().cycle() {
            turns.tick().await;
            if stop.load(Ordering::Relaxed) {
                break;
            }
            for _ in 0..PIECES {
                random.fill(&mut bytes);
                let at = random.next() % (DISK_BYTES / PIECE_BYTES) * PIECE_BYTES;
                client.write(at, &bytes).await?;
            }
        }
        Ok(())
    })
}

/// Where everything stands at one time.
struct Standing {
    received: Vec<f64>,
    primary_cpu_s: f64,
    replica_cpu_s: f64,
    daemons_cpu_s: f64,
}

impl Standing {
    fn of(sites: &Sites, fleet: &Fleet) -> anyhow::Result<Self> {
        let cpu = |pid: Option<u32>| cpu_seconds(pid.context("a process has ended")?);
        let daemons = fleet.daemons.iter().map(|daemon| cpu(daemon.pid())).sum::<anyhow::Result<f64>>();
        Ok(Self {
            received: numbers(&sites.replica.ok(&["status"])?, "received")?,
            primary_cpu_s: cpu(sites.primary.pid())?,
            replica_cpu_s: cpu(sites.replica.pid())?,
            daemons_cpu_s: daemons?,
        })
    }
}

/// A figure of every VM.
fn numbers(status: &Value, key: &str) -> anyhow::Result<Vec<f64>> {
    let vms = status["vms"].as_array().context("no VMs")?;
    vms.iter().map(|vm| vm[key].as_f64().with_context(|| format!("no {key} of {vm}"))).collect()
}

fn rows(
    vms: usize,
    before: &Standing,
    after: &Standing,
    elapsed_s: f64,
    lags: &[f64],
    sites: &Sites,
    table: &mut Table,
) -> anyhow::Result<Load> {
    ensure!(before.received.len() == vms && after.received.len() == vms, "a VM has gone");
    let cycles: Vec<f64> =
        after.received.iter().zip(&before.received).map(|(after, before)| after - before).collect();
    // Where the window cuts an interval, one cycle more or less falls into it.
    let due = (elapsed_s / INTERVAL_S as f64).floor() - 1.0;
    let missed: f64 = cycles.iter().map(|done| (due - done).max(0.0)).sum();
    let all: f64 = cycles.iter().sum();
    let wanted = |bound| (vms >= 1000).then_some(Wanted::AtMost(bound));
    let status = sites.primary.ok(&["status"])?;
    let totals: Vec<f64> = status["vms"]
        .as_array()
        .context("no VMs")?
        .iter()
        .filter_map(|vm| vm["last_cycle"]["total_s"].as_f64())
        .collect();
    let mut row = |what: &str, figure: f64, unit, wanted| {
        table.figure(format!("{vms} VMs: {what}"), figure, unit, wanted)
    };
    row("cycles missed", missed, "", wanted(0.0));
    row("oldest newest point seen at the replica", largest(lags), "s", wanted(2.0 * INTERVAL_S as f64));
    row("a cycle, median", median(&totals) * 1e3, "ms", None);
    row("a cycle, longest of the last ones", largest(&totals) * 1e3, "ms", None);
    let mut cores = [0.0; 3];
    for ((what, before, after), share) in [
        ("primary's site", before.primary_cpu_s, after.primary_cpu_s),
        ("replica's site", before.replica_cpu_s, after.replica_cpu_s),
        ("storage daemons", before.daemons_cpu_s, after.daemons_cpu_s),
    ]
    .into_iter()
    .zip(&mut cores)
    {
        *share = (after - before) / elapsed_s * 100.0;
        row(&format!("processor time of a cycle, {what}"), (after - before) / all * 1e3, "ms", None);
        row(&format!("share of one core, {what}"), *share, "%", None);
    }
    let peaks = sites.peaks()?;
    for (what, peak) in peaks {
        row(&format!("peak memory, {what}'s site"), peak, "MB", wanted(500.0));
    }
    Ok(Load { vms: vms as f64, cores, memory_mb: peaks.map(|(_, peak)| peak) })
}

/// What so many VMs cost.
struct Load {
    vms: f64,
    /// Shares of one core in per cent: the primary's site, the replica's, all storage daemons.
    cores: [f64; 3],
    /// The primary's site and the replica's.
    memory_mb: [f64; 2],
}

fn drawn(loads: &[Load]) -> String {
    let mut canvas = Canvas::new(
        960.0,
        450.0,
        "What VMs cost a site, at an interval of 30 s",
        "256 KiB changed in each VM and interval; both sites and all storage daemons on one machine",
    );
    let panel = |left, y| Panel {
        left,
        top: 104.0,
        width: 270.0,
        height: 260.0,
        x: Axis::log("VMs", ticks(&[1.0, 10.0, 100.0, 1000.0], |vms| vms.to_string())),
        y,
    };
    let line = |name: &str, style: Style, value: &dyn Fn(&Load) -> f64| Series {
        name: name.into(),
        style,
        points: loads.iter().map(|load| (load.vms, value(load))).collect(),
    };
    let percent = ticks(&[0.01, 0.1, 1.0, 10.0, 100.0], |share| format!("{share} %"));
    let cores = panel(64.0, Axis::log("share of one core", percent));
    cores.frame(&mut canvas);
    cores.lines(
        &mut canvas,
        &[
            line("primary", BLUE, &|load| load.cores[0]),
            line("replica", GREEN, &|load| load.cores[1]),
            line("storage daemons", ORANGE, &|load| load.cores[2]),
        ],
    );
    let megabytes = ticks(&[0.0, 100.0, 200.0, 300.0, 400.0, 500.0], |mb| format!("{mb} MB"));
    let memory = panel(560.0, Axis::linear("peak memory", megabytes));
    memory.frame(&mut canvas);
    memory.lines(
        &mut canvas,
        &[
            line("primary", BLUE, &|load| load.memory_mb[0]),
            line("replica", GREEN, &|load| load.memory_mb[1]),
        ],
    );
    canvas.finish()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn figures_of_every_vm_are_read() {
        let status = json!({"vms": [{"received": 3, "lag_s": 1.5}, {"received": 4, "lag_s": 2.5}]});
        assert_eq!(numbers(&status, "received").unwrap(), [3.0, 4.0]);
        assert_eq!(numbers(&status, "lag_s").unwrap(), [1.5, 2.5]);
        assert!(numbers(&status, "applied").is_err());
        assert!(numbers(&json!({}), "received").is_err());
    }
}
