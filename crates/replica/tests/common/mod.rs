//! A primary in miniature: disks as byte arrays, real logs of what was written to them, a real store.
#![allow(dead_code, reason = "each test file uses its part")]

pub mod bench;
pub mod memory;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use catalog::Catalog;
use log::{Batcher, DiskInfo, Encoder, Footer, Header};
use model::gate::Access;
use model::{
    Consistency, DiskName, Head, LogClass, LogId, LogNumber, Phase, Progress, Purpose, Timestamp, VmId,
};
use replica::{Clock, Config, ConsistentView, DiskSize, Offer, Step, Store};

pub const VM: VmId = VmId::from_bytes([0x51; 16]);
pub const PEER: &str = "primary-site";
pub const POINT: LogClass = LogClass::Point(Consistency::Crash);
/// Disks change in units of this many bytes: less than a block, so that nothing is aligned by luck.
pub const UNIT: u64 = 512;

/// A small generator with a seed: what fails can be run again.
pub struct Chance(pub u64);

impl Chance {
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mixed = (self.0 ^ (self.0 >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        (mixed ^ (mixed >> 33)) % bound
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// A clock that tests set.
#[derive(Clone)]
pub struct TestClock(Arc<AtomicI64>);

impl TestClock {
    pub fn new() -> Self {
        Self(Arc::new(AtomicI64::new(1_700_000_000_000_000)))
    }

    pub fn pass(&self, time: Duration) {
        self.0.fetch_add(i64::try_from(time.as_micros()).unwrap(), Ordering::SeqCst);
    }

    pub fn now(&self) -> Timestamp {
        Timestamp(self.0.load(Ordering::SeqCst))
    }

    pub fn clock(&self) -> Clock {
        let clock = self.clone();
        Clock::from_fn(move || clock.now())
    }
}

pub type Disks = BTreeMap<String, Vec<u8>>;

/// The primary: its disks now, and as they were at every log.
pub struct Primary {
    pub vm: VmId,
    pub disks: Disks,
    pub head: Head,
    pub truth: BTreeMap<LogNumber, Disks>,
    pub ids: BTreeMap<LogNumber, LogId>,
    pub dirty: BTreeMap<String, Vec<Range<u64>>>,
    pub phase: Phase,
    pub points: u8,
    ids_made: u64,
}

pub fn disk(name: &str) -> DiskName {
    name.parse().unwrap()
}

impl Primary {
    pub fn new(vm: VmId, sizes: &[(&str, u64)]) -> Self {
        let disks = sizes.iter().map(|&(name, size)| (name.to_owned(), vec![0; size as usize])).collect();
        Self {
            vm,
            disks,
            head: Head::EMPTY,
            truth: BTreeMap::new(),
            ids: BTreeMap::new(),
            dirty: BTreeMap::new(),
            phase: Phase::InitialReplication { progress: Progress::default() },
            points: 0,
            ids_made: 0,
        }
    }

    pub fn offer(&self) -> Offer {
        let disks = self.disks.iter();
        Offer {
            vm: self.vm,
            name: format!("vm-{:02x}", self.vm.as_bytes()[0]).parse().unwrap(),
            disks: disks
                .map(|(n, bytes)| DiskSize { name: disk(n), size_bytes: bytes.len() as u64 })
                .collect(),
            interval: Duration::from_secs(30),
            points: self.points,
            primary_name: "primary".into(),
            definition: serde_json::json!({"memory": 512}),
            phase: self.phase.clone(),
            paused: false,
            generation: 1,
            media: None,
            pins: Vec::new(),
            group: None,
        }
    }

    /// Writes a random run of units: of data, or now and then of zeros.
    pub fn write_some(&mut self, chance: &mut Chance, units_max: u64) {
        let names: Vec<String> = self.disks.keys().cloned().collect();
        let name = &names[chance.below(names.len() as u64) as usize];
        let units = self.disks[name].len() as u64 / UNIT;
        if units == 0 {
            return;
        }
        let start = chance.below(units);
        let end = (start + 1 + chance.below(units_max)).min(units);
        let (zeros, mark) = (chance.one_in(4), chance.below(u64::MAX));
        self.write(name, start * UNIT..end * UNIT, |at| {
            if zeros { 0 } else { (mark ^ at.wrapping_mul(0x9e37_79b9)) as u8 | 1 }
        });
    }

    pub fn write(&mut self, name: &str, range: Range<u64>, byte: impl Fn(u64) -> u8) {
        let bytes = self.disks.get_mut(name).unwrap();
        for at in range.clone() {
            bytes[at as usize] = byte(at);
        }
        self.dirty.entry(name.to_owned()).or_default().push(range);
    }

    pub fn resize(&mut self, name: &str, size: u64) {
        self.disks.get_mut(name).unwrap().resize(size as usize, 0);
    }

    pub fn new_id(&mut self) -> LogId {
        self.ids_made += 1;
        let mut bytes = [0xa5; 16];
        bytes[..8].copy_from_slice(&self.ids_made.to_be_bytes());
        bytes[8] = self.vm.as_bytes()[0];
        LogId::from_bytes(bytes)
    }

    /// The next log: header and bytes. It is the primary's only once [`Primary::shipped`] says so.
    pub fn make_log(&mut self, purpose: Purpose, class: LogClass, moment: Timestamp) -> (Header, Vec<u8>) {
        let id = self.new_id();
        let disks = self.disks.iter();
        let header = Header {
            vm: self.vm,
            id,
            number: self.head.number.next(),
            predecessor: self.head.id,
            moment,
            purpose,
            disks: disks
                .map(|(n, bytes)| DiskInfo { name: disk(n), size_bytes: bytes.len() as u64 })
                .collect(),
        };
        let mut encoder = Encoder::new(Vec::new(), &header).unwrap();
        for (place, (name, bytes)) in self.disks.iter().enumerate() {
            let mut batcher = Batcher::new(place as u16);
            let mut records = Vec::new();
            for range in joined(self.dirty.get(name).cloned().unwrap_or_default(), bytes.len() as u64) {
                let part = &bytes[range.start as usize..range.end as usize];
                records.extend(if part.iter().all(|byte| *byte == 0) {
                    batcher.zero(range.start, range.end - range.start)
                } else {
                    batcher.data(range.start, part)
                });
            }
            records.extend(batcher.finish());
            records.into_iter().for_each(|record| encoder.record(record.encode(1)).unwrap());
        }
        let (_, bytes) = encoder.finish(Footer { class, progress: Progress::default() }).unwrap();
        (header, bytes)
    }

    /// A log that was made is durable at the replica.
    pub fn shipped(&mut self, header: &Header) {
        self.head = Head { number: header.number, id: header.id };
        self.truth.insert(header.number, self.disks.clone());
        self.ids.insert(header.number, header.id);
        self.dirty.clear();
    }

    /// Makes a log of what was written and sends it until it is durable.
    pub fn ship(&mut self, site: &Site, purpose: Purpose, class: LogClass) -> LogNumber {
        let (header, bytes) = self.make_log(purpose, class, site.clock.now());
        site.send(&header, &bytes, 64 * 1024).unwrap();
        self.shipped(&header);
        header.number
    }
}

/// Ranges sorted, joined and cut off at `end`.
fn joined(mut ranges: Vec<Range<u64>>, end: u64) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        let range = range.start..range.end.min(end);
        match joined.last_mut() {
            _ if range.is_empty() => {}
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// The replica's site.
pub struct Site {
    pub store: Store,
    pub clock: TestClock,
}

/// A config without workers: tests say when maintenance happens.
pub fn config(dir: &Path, clock: &TestClock) -> Config {
    Config {
        workers: 0,
        free_reserve_bytes: 0,
        recent_points: 2,
        plan_extents_max: 64,
        view_cache_bytes: 1 << 20,
        clock: clock.clock(),
        ..Config::new(dir)
    }
}

impl Site {
    pub fn open(dir: &Path, clock: &TestClock) -> Self {
        Self::open_with(config(dir, clock), clock)
    }

    pub fn open_with(config: Config, clock: &TestClock) -> Self {
        let catalog = Catalog::open(config.dir.join("catalog.sqlite")).unwrap();
        Self { store: Store::open(catalog, config).unwrap(), clock: clock.clone() }
    }

    /// Sends a log in parts until it is durable.
    pub fn send(&self, header: &Header, bytes: &[u8], part: usize) -> replica::Result<()> {
        let (vm, number, id) = (header.vm, header.number, header.id);
        let mut at = self.store.upload_state(PEER, vm, number, id)?;
        while !at.durable {
            let start = at.offset as usize;
            let end = (start + part).min(bytes.len());
            at =
                self.store.append(PEER, vm, number, id, at.offset, &bytes[start..end], end == bytes.len())?;
        }
        Ok(())
    }

    /// Maintains until there is nothing to do.
    pub fn settle(&self, vm: VmId) -> Vec<Step> {
        let mut steps = Vec::new();
        loop {
            match self.store.maintain(vm).unwrap() {
                Step::Idle => return steps,
                Step::Released => {
                    steps.push(Step::Released);
                    return steps;
                }
                step => steps.push(step),
            }
        }
    }

    pub fn view(&self, vm: VmId, point: LogNumber) -> replica::Result<ConsistentView> {
        self.store.open_view(self.store.admit(vm, Access::Pinned, point)?)
    }

    /// Every point that is shown reads as the primary was.
    pub fn check_points(&self, primary: &Primary) {
        for point in self.store.points(primary.vm).unwrap() {
            let view = self.view(primary.vm, point.number).unwrap();
            check_view(&view, &primary.truth[&point.number]);
        }
    }
}

/// A view reads exactly as these disks, and says of no data that it is zeros.
pub fn check_view(view: &ConsistentView, disks: &Disks) {
    let point = view.point().number;
    let names: Vec<String> = view.disks().iter().map(|disk| disk.name.to_string()).collect();
    assert_eq!(names, disks.keys().cloned().collect::<Vec<_>>(), "disks of point {point}");
    for size in view.disks() {
        let truth = &disks[size.name.as_str()];
        assert_eq!(size.size_bytes, truth.len() as u64, "size of {} at point {point}", size.name);
        let mut bytes = vec![0xee; truth.len() + 100];
        view.read_at(&size.name, 0, &mut bytes).unwrap();
        assert!(bytes[truth.len()..].iter().all(|byte| *byte == 0), "zeros beyond the end");
        if let Some(at) = bytes.iter().zip(truth).position(|(is, should)| is != should) {
            panic!("{} at point {point} differs at offset {at}", size.name);
        }
        let mut zeros = vec![true; truth.len()];
        for range in view.data_extents(&size.name, 0..u64::MAX / 2).unwrap() {
            zeros[range.start as usize..range.end as usize].fill(false);
        }
        let wrong = zeros.iter().zip(truth).position(|(zero, byte)| *zero && *byte != 0);
        assert_eq!(wrong, None, "data taken for zeros in {} at point {point}", size.name);
    }
}

/// What differs between a view and its parent is among what it says has changed.
pub fn check_changes(view: &ConsistentView, primary: &Primary, parent: LogNumber) -> bool {
    let mut known = true;
    for size in view.disks() {
        let Some(ranges) = view.changed_since(&size.name, primary.ids[&parent]).unwrap() else {
            known = false;
            continue;
        };
        let now = &primary.truth[&view.point().number][size.name.as_str()];
        let mut changed = vec![false; now.len()];
        for range in ranges {
            changed[range.start as usize..range.end as usize].fill(true);
        }
        let before = primary.truth[&parent].get(size.name.as_str()).cloned().unwrap_or_default();
        for (at, byte) in now.iter().enumerate() {
            let was = before.get(at).copied().unwrap_or(0);
            assert!(
                changed[at] || was == *byte,
                "{} differs at {at} between {parent} and {}",
                size.name,
                view.point().number
            );
        }
    }
    known
}
