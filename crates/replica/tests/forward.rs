//! Passing a replica on: whatever is received, applied, merged, cut off and started anew in between, what is given since
//! a mark makes of the disks that the third site has the disks of the next point.

mod common;

use std::collections::BTreeMap;
use std::io::Cursor;
use std::time::Duration;

use common::*;
use log::{DiskInfo, EncodedRecord, Encoder, Footer, Header, RecordReader};
use model::bitmaps::{after_durable, after_failure, repair};
use model::{Consistency, DiskName, LogClass, LogId, LogNumber, Progress, Purpose};
use replica::Forward;

/// The third site in miniature: what it has, and as which log of its own.
struct Third {
    disks: Disks,
    has: Option<LogNumber>,
    lifted: usize,
    read: usize,
}

impl Third {
    /// What the third site has after it has taken everything that a cycle gives.
    fn taking(&mut self, forward: &Forward, first: bool) -> Disks {
        let mut disks = self.disks.clone();
        if first {
            for (name, bytes) in &mut disks {
                forward.read_at(&disk(name), 0, bytes).unwrap();
            }
            return disks;
        }
        let names: Vec<DiskName> = forward.disks().into_iter().map(|disk| disk.name).collect();
        let mut records = Vec::new();
        let mut take = |record| {
            records.push(record);
            true
        };
        if forward.records(&names, 1, &mut take).unwrap() {
            self.lifted += 1;
            apply(&a_log_of(forward, records), &mut disks);
            return disks;
        }
        self.read += 1;
        for (name, bytes) in &mut disks {
            for range in forward.changed(&disk(name)).unwrap() {
                forward
                    .read_at(&disk(name), range.start, &mut bytes[range.start as usize..range.end as usize])
                    .unwrap();
            }
        }
        disks
    }
}

/// The records as a log, which checks them like any others.
fn a_log_of(forward: &Forward, records: Vec<EncodedRecord>) -> Vec<u8> {
    let sizes = forward.disks().into_iter();
    let header = Header {
        vm: VM,
        id: LogId::from_bytes([1; 16]),
        number: LogNumber(1),
        predecessor: LogId::NONE,
        moment: forward.point().taken_at,
        purpose: Purpose::Changes,
        disks: sizes.map(|disk| DiskInfo { name: disk.name, size_bytes: disk.size_bytes }).collect(),
    };
    let mut encoder = Encoder::new(Vec::new(), &header).unwrap();
    records.into_iter().for_each(|record| encoder.record(record).unwrap());
    let footer =
        Footer { class: LogClass::Point(forward.point().consistency), progress: Progress::default() };
    let (_, bytes) = encoder.finish(footer).unwrap();
    log::verify(&mut &bytes[..]).unwrap();
    bytes
}

fn apply(log: &[u8], disks: &mut Disks) {
    let mut reader = RecordReader::open(Cursor::new(log)).unwrap();
    let names: Vec<String> = reader.meta().header.disks.iter().map(|disk| disk.name.to_string()).collect();
    let mut place = 0;
    while let Some(record) = reader.record(place).unwrap() {
        let bytes = disks.get_mut(&names[usize::from(record.entry.disk)]).unwrap();
        for (extent, data) in record.pieces() {
            let target = &mut bytes[extent.offset as usize..extent.end() as usize];
            match data {
                Some(data) => target.copy_from_slice(data),
                None => target.fill(0),
            }
        }
        place += 1;
    }
}

fn life(seed: u64, extents_max: usize) -> (usize, usize) {
    let (dir, clock, mut chance) = (tempfile::tempdir().unwrap(), TestClock::new(), Chance(seed));
    let config = || replica::Config { plan_extents_max: extents_max, ..config(dir.path(), &clock) };
    let mut site = Site::open_with(config(), &clock);
    let mut primary = Primary::new(VM, &[("vda", 300 * 1024), ("vdb", 100 * 1024 + UNIT)]);
    primary.points = 2;
    site.store.offer(PEER, primary.offer()).unwrap();
    primary.write_some(&mut chance, 200);
    primary.ship(&site, Purpose::Initial, POINT);
    let zeros: BTreeMap<_, _> =
        primary.disks.iter().map(|(name, bytes)| (name.clone(), vec![0; bytes.len()])).collect();
    let mut third = Third { disks: zeros, has: None, lifted: 0, read: 0 };
    let mut number = LogNumber::ZERO;
    for _ in 0..60 {
        for _ in 0..chance.below(4) {
            clock.pass(Duration::from_secs(60 * (1 + chance.below(25))));
            (0..=chance.below(5)).for_each(|_| primary.write_some(&mut chance, 40));
            let class = if chance.one_in(4) { LogClass::Point(Consistency::Application) } else { POINT };
            primary.ship(&site, Purpose::Changes, class);
            if !chance.one_in(3) {
                site.settle(VM);
            }
        }
        if chance.one_in(8) {
            drop(site);
            site = Site::open_with(config(), &clock);
            // As a cycle does that squares up first: the third site says what it has.
            site.store.change_marks(VM, |found| repair(found, third.has)).unwrap();
        }
        if chance.one_in(3) {
            continue;
        }
        let (base, next) = (third.has, number.next());
        let news = base.is_none_or(|base| site.store.is_newer_than_mark(VM, base).unwrap());
        let forward = site.store.forward(VM, base, next, false).unwrap();
        let point = forward.point();
        if !news {
            assert_eq!(third.disks, primary.truth[&point.number], "seed {seed}: there was nothing newer");
        }
        if chance.one_in(2) {
            site.settle(VM); // while it is read
        }
        let disks = third.taking(&forward, base.is_none());
        assert!(
            disks == primary.truth[&point.number],
            "seed {seed}: point {} is not what was given",
            point.number
        );
        match chance.below(5) {
            // It did not arrive.
            0 => site.store.change_marks(VM, |found| after_failure(found, base)).unwrap(),
            // It arrived, and the answer was lost: given back first, and then it turns out.
            1 if base.is_some() => {
                site.store.change_marks(VM, |found| after_failure(found, base)).unwrap();
                site.store.change_marks(VM, |found| repair(found, Some(next))).unwrap();
                (third.disks, third.has, number) = (disks, Some(next), next);
            }
            _ => {
                site.store.change_marks(VM, |found| after_durable(found, base, next)).unwrap();
                (third.disks, third.has, number) = (disks, Some(next), next);
            }
        }
        drop(forward);
        site.settle(VM);
        site.check_points(&primary);
    }
    site.store.change_marks(VM, |found| repair(found, None)).unwrap();
    assert!(site.store.marks(VM).unwrap().is_empty());
    (third.lifted, third.read)
}

#[test]
fn whatever_happens_in_between_the_next_point_is_what_the_third_site_gets() {
    let (mut lifted, mut read) = (0, 0);
    for seed in 0..6 {
        let (some, others) = life(seed, if seed % 3 == 0 { 40 } else { 1 << 16 });
        (lifted, read) = (lifted + some, read + others);
    }
    assert!(lifted > 40 && read > 5, "{lifted} were lifted out of logs, {read} read");
}

#[test]
fn an_application_consistent_point_travels_with_what_it_is() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), TestClock::new());
    let site = Site::open(dir.path(), &clock);
    let mut primary = Primary::new(VM, &[("vda", 64 * 1024)]);
    primary.points = 2;
    site.store.offer(PEER, primary.offer()).unwrap();
    primary.ship(&site, Purpose::Initial, POINT);
    let first = site.store.forward(VM, None, LogNumber(1), false).unwrap();
    assert_eq!(first.point().consistency, Consistency::Crash);
    drop(first);
    let application = LogClass::Point(Consistency::Application);
    for class in [POINT, application, POINT] {
        clock.pass(Duration::from_secs(30));
        primary.ship(&site, Purpose::Changes, class);
        site.settle(VM);
    }
    let way: Vec<_> = (1..=2)
        .map(|k| site.store.forward(VM, Some(LogNumber(k)), LogNumber(k + 1), false).unwrap().point())
        .map(|point| (point.number.0, point.consistency))
        .collect();
    assert_eq!(way, [(3, Consistency::Application), (4, Consistency::Crash)]);
}

#[test]
fn logs_are_kept_for_the_third_site_and_not_for_ever() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), TestClock::new());
    let config =
        replica::Config { plan_extents_max: 1 << 16, recent_points: 0, ..config(dir.path(), &clock) };
    let site = Site::open_with(config, &clock);
    let mut primary = Primary::new(VM, &[("vda", 24 << 20)]);
    site.store.offer(PEER, primary.offer()).unwrap();
    let mut chance = Chance(5);
    let mut noise = |primary: &mut Primary| {
        let mark = chance.below(u64::MAX);
        primary.write("vda", 0..20 << 20, |at| {
            (at.wrapping_mul(mark | 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 | 1
        });
    };
    noise(&mut primary);
    primary.ship(&site, Purpose::Initial, POINT);
    drop(site.store.forward(VM, None, LogNumber(1), false).unwrap());
    let mut kept = 0;
    for number in 2..=8 {
        clock.pass(Duration::from_secs(30));
        noise(&mut primary);
        primary.ship(&site, Purpose::Changes, POINT);
        site.settle(VM);
        let status = site.store.status(VM).unwrap();
        kept = kept.max(status.log_bytes);
        assert!(status.log_bytes <= chain::FORWARD_KEEP_BYTES_MIN + (21 << 20), "log {number}: {status:?}");
    }
    assert!(kept > 0, "the first ones were kept");
    // Folded in or not: what changed can be told.
    let forward = site.store.forward(VM, Some(LogNumber(1)), LogNumber(2), false).unwrap();
    let changed: u64 =
        forward.changed(&disk("vda")).unwrap().iter().map(|range| range.end - range.start).sum();
    assert!((20 << 20..=24 << 20).contains(&changed), "{changed}");
}
