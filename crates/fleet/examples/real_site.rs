//! What an apply costs on this machine, and whether the simulation foretells how often a real store refuses.
//!
//! A real `replica::Store` with its workers gets logs for thirty VMs, each at its own time; somebody asks its
//! gate for strict views at random moments. The simulation gets what a single apply was measured to cost,
//! and must come to about the same share of refusals.
//!
//! `cargo run --release -p afterimage-fleet --example real_site`

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use catalog::Catalog;
use fleet::{Churn, Failures, Micros, SECOND, Scenario, SiteDisk, Strategy, Window};
use log::{Batcher, DiskInfo, Encoder, Footer, Header};
use model::gate::{Access, Condition};
use model::{Consistency, Head, LogClass, LogId, LogNumber, Phase, Progress, Purpose, Timestamp, VmId};
use replica::{Config, DiskSize, Error, Offer, Step, Store};

const PEER: &str = "primary-site";
const DISK: &str = "vda";
const DISK_BYTES: u64 = 4 << 30;
const BLOCK: u64 = 4096;
const VMS: u8 = 30;
const WORKERS: usize = 2;
const LOG_BYTES: u64 = 256 << 10;
const INTERVAL: Duration = Duration::from_secs(1);
const RUN: Duration = Duration::from_secs(30);

/// A VM whose logs are made here.
struct Source {
    vm: VmId,
    head: Head,
    chance: fastrand::Rng,
}

impl Source {
    fn new(number: u8, store: &Store) -> Result<Self> {
        let vm = VmId::from_bytes([number + 1; 16]);
        store.offer(
            PEER,
            Offer {
                vm,
                name: format!("vm-{number}").parse()?,
                disks: vec![DiskSize { name: DISK.parse()?, size_bytes: DISK_BYTES }],
                interval: INTERVAL,
                points: 0,
                primary_name: "primary".into(),
                definition: serde_json::json!({}),
                phase: Phase::Replicating,
                paused: false,
            },
        )?;
        let mut source = Self { vm, head: Head::EMPTY, chance: fastrand::Rng::with_seed(number.into()) };
        source.ship(store, BLOCK, Purpose::Initial)?;
        Ok(source)
    }

    /// Makes a log of scattered blocks and has it made durable.
    fn ship(&mut self, store: &Store, bytes: u64, purpose: Purpose) -> Result<()> {
        let (id, number) = (LogId::from_bytes(self.chance.u128(..).to_le_bytes()), self.head.number.next());
        let header = Header {
            vm: self.vm,
            id,
            number,
            predecessor: self.head.id,
            moment: Timestamp::from(std::time::SystemTime::now()),
            purpose,
            disks: vec![DiskInfo { name: DISK.parse()?, size_bytes: DISK_BYTES }],
        };
        let mut blocks: Vec<u64> =
            (0..bytes / BLOCK).map(|_| self.chance.u64(0..DISK_BYTES / BLOCK)).collect();
        blocks.sort_unstable();
        blocks.dedup();
        let (mut batcher, mut records, mut block) = (Batcher::new(0), Vec::new(), [0; BLOCK as usize]);
        for place in blocks {
            self.chance.fill(&mut block);
            records.extend(batcher.data(place * BLOCK, &block));
        }
        records.extend(batcher.finish());
        let mut encoder = Encoder::new(Vec::new(), &header)?;
        records.into_iter().try_for_each(|record| encoder.record(record.encode(1)))?;
        let footer = Footer { class: LogClass::Point(Consistency::Crash), progress: Progress::default() };
        let (_, bytes) = encoder.finish(footer)?;
        let at = store.upload_state(PEER, self.vm, number, id)?;
        store.append(PEER, self.vm, number, id, at.offset, &bytes, true)?;
        self.head = Head { number, id };
        Ok(())
    }
}

fn open(dir: &Path, workers: usize) -> Result<Store> {
    std::fs::create_dir_all(dir)?;
    let config = Config { workers, ..Config::new(dir) };
    Ok(Store::open(Catalog::open(dir.join("catalog.sqlite"))?, config)?)
}

/// The median time of an apply of so many logs of so many bytes.
fn apply_seconds(source: &mut Source, store: &Store, logs: u32, bytes: u64) -> Result<f64> {
    let mut took = Vec::new();
    for _ in 0..15 {
        for _ in 0..logs {
            source.ship(store, bytes, Purpose::Changes)?;
        }
        let began = Instant::now();
        while store.maintain(source.vm)? != Step::Idle {}
        took.push(began.elapsed().as_secs_f64());
    }
    took.sort_by(f64::total_cmp);
    Ok(took[took.len() / 2])
}

fn measure(dir: &Path) -> Result<SiteDisk> {
    let store = open(dir, 0)?;
    let mut source = Source::new(0, &store)?;
    while store.maintain(source.vm)? != Step::Idle {}
    let mut cost = |logs, bytes| apply_seconds(&mut source, &store, logs, bytes);
    let (small, large, ten) = (cost(1, 64 << 10)?, cost(1, 16 << 20)?, cost(10, 64 << 10)?);
    let per_byte = (large - small) / ((16 << 20) - (64 << 10)) as f64;
    let log_seconds = ((ten - small) / 9.0 - per_byte * 65_536.0).max(0.0);
    let apply_seconds = (small - log_seconds - per_byte * 65_536.0).max(0.0);
    println!(
        "an apply of one log of 64 KiB: {:.1} ms; of 16 MiB: {:.1} ms; of ten of 64 KiB: {:.1} ms",
        small * 1e3,
        large * 1e3,
        ten * 1e3
    );
    let disk = SiteDisk { bytes_per_s: 1.0 / per_byte, apply_seconds, log_seconds };
    println!(
        "so an apply costs {:.1} ms, each log {:.2} ms, and a second takes {:.0} MB of scattered 4 KiB blocks",
        disk.apply_seconds * 1e3,
        disk.log_seconds * 1e3,
        disk.bytes_per_s / 1e6
    );
    Ok(disk)
}

/// The share of strict views that a real store refuses because an apply runs.
fn refused(dir: &Path) -> Result<f64> {
    let store = open(dir, WORKERS)?;
    let mut sources = (0..VMS).map(|number| Source::new(number, &store)).collect::<Result<Vec<_>>>()?;
    let vms: Vec<VmId> = sources.iter().map(|source| source.vm).collect();
    let stop = AtomicBool::new(false);
    let (asked, refused) = std::thread::scope(|scope| -> Result<(u64, u64)> {
        let asker = scope.spawn(|| ask(&store, &vms, &stop));
        let (began, step) = (Instant::now(), INTERVAL / u32::from(VMS));
        let mut due = began;
        let mut shipped = Ok(());
        while began.elapsed() < RUN && shipped.is_ok() {
            for source in &mut sources {
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                due += step;
                shipped = shipped.and(source.ship(&store, LOG_BYTES, Purpose::Changes));
            }
        }
        stop.store(true, Ordering::SeqCst);
        shipped?;
        asker.join().map_err(|_| anyhow::anyhow!("the asking thread has panicked"))?
    })?;
    store.shutdown();
    ensure!(asked > 1000, "only {asked} requests in {RUN:?}");
    println!("a real store refused {refused} of {asked} strict views");
    Ok(refused as f64 / asked as f64)
}

fn ask(store: &Store, vms: &[VmId], stop: &AtomicBool) -> Result<(u64, u64)> {
    let (mut asked, mut refused) = (0, 0);
    let mut chance = fastrand::Rng::with_seed(9);
    while !stop.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_micros(chance.u64(1_000..9_000)));
        let vm = vms[chance.usize(..vms.len())];
        let newest = store.points(vm)?.last().map_or(LogNumber::ZERO, |point| point.number);
        match store.admit(vm, Access::Strict, newest) {
            Ok(admitted) => drop(admitted),
            Err(Error::Gate(refusal)) if refusal.condition == Condition::ApplyInProgress => refused += 1,
            // A log came between the two questions, and the point that was the newest is gone.
            Err(Error::NoSuchPoint { .. }) => continue,
            Err(error) => return Err(error).context("asking the gate"),
        }
        asked += 1;
    }
    Ok((asked, refused))
}

fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let disk = measure(&folder.path().join("one"))?;
    let real = refused(&folder.path().join("many"))?;
    let standard = Scenario::standard(u32::from(VMS), 30, Strategy::Strict);
    let rate = LOG_BYTES as f64 / INTERVAL.as_secs_f64();
    let interval = INTERVAL.as_micros() as Micros;
    let scenario = Scenario {
        interval,
        sites: 200,
        apply_workers: WORKERS as u32,
        disk,
        churn: Churn::constant(rate),
        failures: Failures::NONE,
        warm_up: 10 * SECOND,
        window: Window {
            due_until: standard.window.from + 60 * SECOND,
            backup_seconds: 0.000_1,
            backup_bytes_per_s: f64::INFINITY,
            ..standard.window
        },
        ..standard
    };
    let foretold = fleet::run(&scenario, 2).collision_share();
    println!("collisions: {:.1} % real, {:.1} % simulated", real * 100.0, foretold * 100.0);
    Ok(())
}
